"""Interfaces of the search: callbacks that observe it, and the functions that run its tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from raymask.core.records import Evaluation, LevelRecord
from raymask.core.tasks import Checkpoint, EvalTask, FinetuneTask, Snapshot


class Callback(Protocol):
    """Observer of a search, such as a terminal, a log, or metrics. It changes nothing in the search."""

    def on_phase_begin(self, stage: str, level: int, total: int, known: Sequence[Evaluation] | None = None) -> None:
        """Handle the start of a phase of a level.

        Args:
            stage: Title of the phase.
            level: Level, 0 for the dense model.
            total: Number of tasks in the phase.
            known: In an early evaluation, the evaluations that the journal already has. None in a fine-tuning.
        """

    def on_progress(self, shares: Mapping[str, float]) -> None:
        """Handle progress: by name of each running task, the share in [0, 1] that is done."""

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Handle the end of a candidate's early evaluation, failed ones included."""

    def on_level_end(self, lineage: str, level: LevelRecord) -> None:
        """Handle the end of a level of a lineage."""

    def on_object_put(self, size: int) -> None:
        """Handle an object of `size` bytes that was put where all workers can read it."""

    def on_message(self, text: str) -> None:
        """Handle any other message, one line of text."""


Evaluate = Callable[[Mapping[int, Snapshot], Callable[[], Iterable[EvalTask]]], Iterator[Evaluation]]
"""(parent snapshots by branch, function that returns the tasks to run now, best first) -> evaluations as they finish.

Runs early evaluations. After each evaluation that the caller takes, it calls the function again. It ends when the
function returns no tasks and none is running.
"""


FineTune = Callable[[Sequence[tuple[Snapshot, FinetuneTask]]], Iterator[tuple[int, Checkpoint]]]
"""((parent snapshot, task) pairs) -> (index of the pair, checkpoint) pairs as they finish.

Runs fine-tunings.
"""
