"""Interface between the search and the workers that run its tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

from raymask.core.records import Evaluation
from raymask.core.tasks import Checkpoint, EvalTask, FinetuneTask, Snapshot


class Executor(Protocol):
    """Workers that run a search's tasks, from the beginning to the end of a `with` block."""

    def __enter__(self) -> Self:
        """Prepare the workers.

        Raises:
            UserError: There can be no workers.
        """
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the workers, whatever they do."""
        ...

    def evaluate(self, parents: Mapping[int, Snapshot], tasks: Sequence[EvalTask]) -> Evaluation:
        """Keep the workers busy with early evaluations until one ends.

        Args:
            parents: Snapshots that the candidates start from, by branch.
            tasks: The evaluations worth doing now, at least one, the most urgent first. Those that run already are
                among them and are not started again.

        Returns:
            The evaluation that ended first. It may be one of an earlier call's.
        """
        ...

    def cancel(self) -> None:
        """End a phase: no one waits for the evaluations that still run."""
        ...

    def finetune(self, tasks: Sequence[tuple[Snapshot, FinetuneTask]]) -> Iterator[tuple[int, Checkpoint]]:
        """Run fine-tunings.

        Args:
            tasks: Pairs of a parent snapshot and a task.

        Yields:
            Index of a pair, and its checkpoint, as the fine-tunings finish.

        Raises:
            UserError: A fine-tuning failed.
        """
        ...
