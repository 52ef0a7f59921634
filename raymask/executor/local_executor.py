"""Executor without Ray: one worker in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Self

import torch

from raymask.core.callbacks import Callback
from raymask.core.errors import UserError
from raymask.core.records import EvalKey, Evaluation
from raymask.core.spec import Spec
from raymask.core.tasks import Checkpoint, EvalTask, FinetuneTask, Snapshot
from raymask.train.context import WorkerContext
from raymask.train.failures import SystemFailure
from raymask.train.worker import Worker


class LocalExecutor:
    """One worker in this process. Timeouts do not apply: a process cannot end itself and go on.

    Attributes:
        callback: Receives progress.
        worker: The worker.
        paused: Snapshots in which candidates are paused at a rung, by key of the evaluation; None where there are no
            rungs above.
        callback_error: What the callback raised during the current task, if it did.
    """

    def __init__(self, context: WorkerContext, callback: Callback) -> None:
        """Build the worker.

        Args:
            context: What the worker needs.
            callback: Receives progress.
        """
        self.callback = callback
        self.worker = Worker(context, device_for(context.spec))
        self.paused: dict[EvalKey, Snapshot | None] = {}
        self.callback_error: Exception | None = None

    def __enter__(self) -> Self:
        """Nothing: the worker is ready."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing: the worker does nothing between two calls."""

    def evaluate(self, parents: Mapping[int, Snapshot], tasks: Sequence[EvalTask]) -> Evaluation:
        """Run the most urgent early evaluation (`Executor.evaluate`)."""
        eval_task, needed = tasks[0], {task.resume_from for task in tasks}
        self.paused = {key: snapshot for key, snapshot in self.paused.items() if key in needed}
        self.worker.on_progress = partial(self.report_progress, eval_task.candidate.name)
        try:
            evaluation, self.paused[eval_task.key] = self.worker.evaluate(
                parents[eval_task.candidate.parent_branch], eval_task, self.paused.pop(eval_task.resume_from, None)
            )
        except SystemFailure as error:  # there is no other machine to try
            evaluation = eval_task.failed(str(error), system_failure=True, worker=self.worker.name)
        self.raise_callback_error()
        return evaluation

    def cancel(self) -> None:
        """Forget the candidates that are paused at a rung."""
        self.paused.clear()

    def finetune(self, tasks: Sequence[tuple[Snapshot, FinetuneTask]]) -> Iterator[tuple[int, Checkpoint]]:
        """Run fine-tunings one after the other (`Executor.finetune`)."""
        for index, (parent, finetune_task) in enumerate(tasks):
            self.worker.on_progress = partial(self.report_progress, finetune_task.name)
            try:
                checkpoint = self.worker.finetune(parent, finetune_task)
            except SystemFailure as error:
                raise UserError(f"{finetune_task.name}: {error}. The same command goes on from here") from None
            self.raise_callback_error()
            assert checkpoint is not None, "a single process returns the checkpoint"
            yield index, checkpoint

    def report_progress(self, name: str, share: float) -> None:
        """Tell the callback the share in [0, 1] of a task that is done."""
        try:
            self.callback.on_progress({name: share})
        except Exception as error:  # noqa: BLE001 - the worker would take it for the candidate's own
            self.callback_error = error

    def raise_callback_error(self) -> None:
        """Raise what the callback raised during the task that has ended."""
        error, self.callback_error = self.callback_error, None
        if error is not None:
            raise error


def device_for(spec: Spec) -> str:
    """The device of a worker in this process: "cuda" if there is a GPU and `workers.gpus` is not 0, else "cpu"."""
    return "cuda" if torch.cuda.is_available() and spec.workers.gpus != 0 else "cpu"
