"""Executor without Ray: one worker in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from raymask.core.errors import UserError
from raymask.core.protocols import Callback, Evaluate, FineTune
from raymask.core.records import EvalKey, Evaluation
from raymask.core.spec import Spec
from raymask.core.tasks import Checkpoint, EvalTask, FinetuneTask, Snapshot
from raymask.train.context import WorkerContext
from raymask.train.failures import SystemFailure
from raymask.train.worker import Worker


@contextmanager
def workers(context: WorkerContext, callback: Callback) -> Iterator[tuple[Evaluate, FineTune]]:
    """One worker in this process. Timeouts do not apply: a process cannot end itself and go on.

    Args:
        context: What the worker needs.
        callback: Receives progress.

    Yields:
        The functions that evaluate candidates and fine-tune masks.
    """
    worker = Worker(context, device_for(context.spec))

    def report_progress(name: str, share: float) -> None:
        callback.on_progress({name: share})

    def evaluate(parents: Mapping[int, Snapshot], open_tasks: Callable[[], Iterable[EvalTask]]) -> Iterator[Evaluation]:
        paused: dict[EvalKey, Snapshot | None] = {}
        while eval_task := next(iter(open_tasks()), None):
            candidate = eval_task.candidate
            worker.on_progress = partial(report_progress, candidate.name)
            try:
                paused_snapshot = paused.pop(eval_task.resume_from, None)
                evaluation, paused[eval_task.key] = worker.evaluate(
                    parents[candidate.parent_branch], eval_task, paused_snapshot
                )
            except SystemFailure as error:  # there is no other machine to try
                evaluation = Evaluation(
                    candidate=candidate,
                    rung=eval_task.rung,
                    repeat=eval_task.repeat,
                    error=str(error),
                    system_failure=True,
                    worker=worker.name,
                )
            yield evaluation
            needed = {open_task.resume_from for open_task in open_tasks()}
            paused = {key: snapshot for key, snapshot in paused.items() if key in needed}

    def fine_tune(tasks: Sequence[tuple[Snapshot, FinetuneTask]]) -> Iterator[tuple[int, Checkpoint]]:
        for index, (parent, finetune_task) in enumerate(tasks):
            worker.on_progress = partial(report_progress, finetune_task.name)
            try:
                checkpoint = worker.finetune(parent, finetune_task)
                assert checkpoint is not None, "a single process returns the checkpoint"
                yield index, checkpoint
            except SystemFailure as error:
                raise UserError(f"{finetune_task.name}: {error}. The same command goes on from here") from None

    yield evaluate, fine_tune


def device_for(spec: Spec) -> str:
    """The device of a worker in this process: "cuda" if there is a GPU and `workers.gpus` is not 0, else "cpu"."""
    return "cuda" if torch.cuda.is_available() and spec.workers.gpus != 0 else "cpu"
