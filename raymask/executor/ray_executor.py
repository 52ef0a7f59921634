"""Executor on Ray.

The driver puts weights into the object store once per level and sends candidates, which are seeds. Actors draw the
masks again and return scores and digests. There is one actor per worker slot, kept across levels. After a system
failure a task is retried on a fresh actor; a candidate's own failure is recorded and never retried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from raymask.core.callbacks import Callback
from raymask.core.errors import UserError
from raymask.core.records import EvalKey, Evaluation
from raymask.core.tasks import Checkpoint, EvalTask, FinetuneTask, Snapshot
from raymask.executor.actor_pool import RemoteTask, TaskFailed, WorkerPool
from raymask.executor.connection import ray_connection
from raymask.executor.resources import format_resources, node_resources, num_worker_slots
from raymask.train.context import WorkerContext
from raymask.train.process_group import ProcessGroup


class RayExecutor:
    """Workers on a Ray cluster.

    Attributes:
        context: What every worker needs.
        callback: Receives progress and messages.
        address: Address of the cluster; None for a private Ray that ends with the block.
        pool: The workers, inside the block.
        cleanup: Ends the workers and the connection, inside the block.
        paused: References to the snapshots in which candidates are paused at a rung, by key of the evaluation.
    """

    def __init__(self, context: WorkerContext, callback: Callback, address: str | None) -> None:
        """Prepare; the connection is made when the block begins.

        Args:
            context: What every worker needs.
            callback: Receives progress and messages.
            address: Address of a Ray cluster; None starts a private Ray.
        """
        self.context = context
        self.callback = callback
        self.address = address
        self.paused: dict[EvalKey, Any] = {}

    def __enter__(self) -> Self:
        """Connect to Ray, and find out how many workers it can hold.

        Raises:
            UserError: No cluster answers at the address, or no node can hold a worker.
        """
        where = f"connecting to the Ray cluster at {self.address}" if self.address else "starting Ray on this machine"
        self.callback.on_message(where)
        with ExitStack() as stack:
            stack.enter_context(ray_connection(self.context, self.address))
            self.pool = WorkerPool(self.context, self.callback)
            stack.callback(self.pool.close)
            num_slots = num_worker_slots(self.pool.need, node_resources(), self.context.spec.workers.fsdp)
            self.callback.on_message(f"room for {num_slots} workers; each has {format_resources(self.pool.need)}")
            self.cleanup = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the workers and the connection."""
        self.cleanup.__exit__(kind, error, traceback)

    def evaluate(self, parents: Mapping[int, Snapshot], tasks: Sequence[EvalTask]) -> Evaluation:
        """Keep the workers busy with early evaluations until one ends (`Executor.evaluate`)."""
        needed = {task.resume_from for task in tasks} | {task.key.key for task in self.pool.running_tasks()}
        self.paused = {key: ref for key, ref in self.paused.items() if key in needed}
        eval_task, result = self.pool.next_result([self.remote_evaluation(task, parents) for task in tasks])
        evaluation: Evaluation = (
            eval_task.failed(result.reason, system_failure=True) if isinstance(result, TaskFailed) else result
        )
        return evaluation

    def remote_evaluation(self, eval_task: EvalTask, parents: Mapping[int, Snapshot]) -> RemoteTask:
        """An early evaluation as a task of the pool."""

        def send(actors: Sequence[Any]) -> Sequence[Any]:
            parent = parents[eval_task.candidate.parent_branch]
            resume_refs = [self.paused[eval_task.resume_from]] if eval_task.resume_from in self.paused else []
            evaluate_remotely = actors[0].evaluate.options(num_returns=2).remote
            ref, paused_ref = evaluate_remotely(parent.key, self.pool.put(parent), eval_task, resume_refs)
            if eval_task.rung < len(self.context.spec.early_eval.rungs) - 1:
                self.paused[eval_task.key] = paused_ref
            return [ref]

        return RemoteTask(eval_task, eval_task.candidate.name, self.context.spec.workers.timeout, send)

    def cancel(self) -> None:
        """End the evaluations that still run, and forget the candidates that are paused at a rung."""
        self.pool.cancel()
        self.paused.clear()

    def finetune(self, tasks: Sequence[tuple[Snapshot, FinetuneTask]]) -> Iterator[tuple[int, Checkpoint]]:
        """Run fine-tunings in parallel; idle workers share them (`Executor.finetune`)."""
        remote_tasks = {
            index: self.remote_finetuning(index, parent, finetune_task)
            for index, (parent, finetune_task) in enumerate(tasks)
        }
        while remote_tasks:
            index, result = self.pool.next_result(list(remote_tasks.values()))
            if isinstance(result, TaskFailed):
                raise UserError(f"{remote_tasks[index].name}: {result.reason}. The same command goes on from here")
            del remote_tasks[index]
            yield index, result
        self.pool.cancel()

    def remote_finetuning(self, index: int, parent: Snapshot, finetune_task: FinetuneTask) -> RemoteTask:
        """A fine-tuning as a task of the pool, with its index as key."""

        def send(actors: Sequence[Any]) -> Sequence[Any]:
            refs, size = self.pool.put(parent), len(actors)
            rendezvous = actors[0].open_rendezvous.remote() if size > 1 else None
            return [
                actor.finetune.remote(parent.key, refs, finetune_task, ProcessGroup(rank, size), rendezvous)
                for rank, actor in enumerate(actors)
            ]

        config = finetune_task.config
        # NCCL needs a whole GPU for each process.
        max_workers = 1 if 0 < self.pool.need["GPU"] < 1 else config.data_parallel
        timeout = self.context.spec.workers.timeout * max(1.0, config.epochs)
        return RemoteTask(index, finetune_task.name, timeout, send, max_workers)
