"""Executor on Ray.

The driver puts weights into the object store once per level and sends candidates, which are seeds. Actors draw the
masks again and return scores and digests. There is one actor per worker slot, kept across levels. After a system
failure a task is retried on a fresh actor; a candidate's own failure is recorded and never retried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from raymask.core.errors import UserError
from raymask.core.protocols import Callback, Evaluate, FineTune
from raymask.core.records import EvalKey, Evaluation
from raymask.core.tasks import Checkpoint, EvalTask, FinetuneTask, Snapshot
from raymask.executor.actor_pool import RemoteTask, TaskFailed, WorkerPool
from raymask.executor.connection import ray_connection
from raymask.executor.resources import format_resources, node_resources, num_worker_slots
from raymask.train.context import WorkerContext
from raymask.train.process_group import ProcessGroup


@contextmanager
def workers(context: WorkerContext, callback: Callback, address: str | None) -> Iterator[tuple[Evaluate, FineTune]]:
    """Workers on Ray for the block.

    Args:
        context: What every worker needs.
        callback: Receives progress and messages.
        address: Address of a Ray cluster; None starts a private Ray that ends with the block.

    Yields:
        The functions that evaluate candidates and fine-tune masks.

    Raises:
        UserError: No cluster answers at `address`, or no node can hold a worker.
    """
    callback.on_message(f"connecting to the Ray cluster at {address}" if address else "starting Ray on this machine")
    with ray_connection(context, address):
        pool = WorkerPool(context, callback)
        num_slots = num_worker_slots(pool.need, node_resources(), pool.workers.fsdp)
        callback.on_message(f"room for {num_slots} workers; each has {format_resources(pool.need)}")

        def evaluate(
            parents: Mapping[int, Snapshot], open_tasks: Callable[[], Iterable[EvalTask]]
        ) -> Iterator[Evaluation]:
            paused: dict[EvalKey, Any] = {}
            eval_tasks: dict[EvalKey, EvalTask] = {}
            last_rung = len(context.spec.early_eval.rungs) - 1

            def to_remote_task(eval_task: EvalTask) -> RemoteTask:
                candidate, parent = eval_task.candidate, parents[eval_task.candidate.parent_branch]

                def send(actors: Sequence[Any]) -> Sequence[Any]:
                    eval_tasks[eval_task.key] = eval_task
                    resume_refs = [paused[eval_task.resume_from]] if eval_task.resume_from in paused else []
                    evaluate_remotely = actors[0].evaluate.options(num_returns=2).remote
                    ref, paused_ref = evaluate_remotely(parent.key, pool.put(parent), eval_task, resume_refs)
                    if eval_task.rung < last_rung:
                        paused[eval_task.key] = paused_ref
                    return [ref]

                return RemoteTask(eval_task.key, candidate.name, pool.workers.timeout, send)

            for key, result in pool.run(lambda: map(to_remote_task, open_tasks())):
                eval_task = eval_tasks[key]
                if isinstance(result, TaskFailed):
                    result = Evaluation(
                        candidate=eval_task.candidate,
                        rung=eval_task.rung,
                        repeat=eval_task.repeat,
                        error=result.reason,
                        system_failure=True,
                    )
                yield result
                if paused:
                    needed = {open_task.resume_from for open_task in open_tasks()}
                    needed |= {running.key for running, _, _ in pool.running.values()}
                    for unneeded in paused.keys() - needed:
                        del paused[unneeded]

        def fine_tune(tasks: Sequence[tuple[Snapshot, FinetuneTask]]) -> Iterator[tuple[int, Checkpoint]]:
            def to_remote_task(index: int) -> RemoteTask:
                parent, finetune_task = tasks[index]

                def send(actors: Sequence[Any]) -> Sequence[Any]:
                    refs, size = pool.put(parent), len(actors)
                    rendezvous = actors[0].open_rendezvous.remote() if size > 1 else None
                    return [
                        actor.finetune.remote(parent.key, refs, finetune_task, ProcessGroup(rank, size), rendezvous)
                        for rank, actor in enumerate(actors)
                    ]

                return RemoteTask(
                    index,
                    finetune_task.name,
                    pool.workers.timeout * max(1.0, finetune_task.config.epochs),
                    send,
                    # NCCL needs a whole GPU for each process.
                    1 if 0 < pool.need["GPU"] < 1 else finetune_task.config.data_parallel,
                )

            missing = dict.fromkeys(range(len(tasks)))
            for index, result in pool.run(lambda: map(to_remote_task, missing)):
                if isinstance(result, TaskFailed):
                    raise UserError(f"{tasks[index][1].name}: {result.reason}. The same command goes on from here")
                del missing[index]
                yield index, result

        try:
            yield evaluate, fine_tune
        finally:
            pool.close()
