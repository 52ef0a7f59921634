"""Ray actor around a worker."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raymask.core.records import Evaluation
from raymask.core.tasks import Checkpoint, EvalTask, FinetuneTask, Snapshot
from raymask.executor.resources import Resources
from raymask.train import process_group
from raymask.train.context import WorkerContext
from raymask.train.failures import SystemFailure
from raymask.train.process_group import SINGLE_PROCESS, ProcessGroup, Rendezvous
from raymask.train.worker import Worker


class WorkerActor:
    """A Worker that takes object references, with a second thread that answers progress requests.

    With FSDP, rank 0 starts the actors of the other ranks and forwards every call to them.
    """

    def __init__(
        self,
        context: WorkerContext,
        need: Resources,
        member: ProcessGroup = SINGLE_PROCESS,
        rendezvous: Rendezvous | None = None,
    ) -> None:
        """Build the worker's model; with FSDP, also start the other ranks and connect to them.

        Args:
            context: What the worker needs.
            need: Resources of this actor.
            member: This process in its FSDP group; rank 0 makes its own.
            rendezvous: Where the FSDP group meets; None for rank 0 and without FSDP.
        """
        self.share = 0.0
        self.peers: list[Any] = []
        self.is_leader = rendezvous is None
        device = torch.device("cuda" if need["GPU"] > 0 else "cpu")
        if context.spec.workers.fsdp > 1 and rendezvous is None:
            member = ProcessGroup(0, context.spec.workers.fsdp, sharded=True)
            rendezvous = self.open_rendezvous()
            strategy: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
            if ray.util.get_current_placement_group():  # a Ray Tune trial has bundles for all ranks
                strategy = "DEFAULT"
            self.peers = [
                actor_class(need)
                .options(scheduling_strategy=strategy)
                .remote(context, need, replace(member, rank=rank), rendezvous)
                for rank in range(1, member.size)
            ]
        if rendezvous is not None:
            self.connection = process_group.connect_process_group(
                member, rendezvous, device, self.store if self.is_leader else None
            )
            self.connection.__enter__()  # stays connected for the life of the process
        self.worker = Worker(context, device.type, self.set_progress, member)

    def set_progress(self, share: float) -> None:
        """Store the share in [0, 1] of the running task that is done."""
        self.share = share

    def progress(self) -> float:
        """Share in [0, 1] of the running task that is done; 0 without a task."""
        return self.share

    def evaluate(
        self, key: str, refs: Mapping[str, Any], eval_task: EvalTask, paused: Sequence[Any]
    ) -> tuple[Evaluation, Snapshot | None]:
        """Evaluate a candidate early, up to one rung.

        Args:
            key: Key of the parent snapshot.
            refs: Object references of the parent's tensors, by `Snapshot` field.
            eval_task: The evaluation.
            paused: At most one reference to the snapshot in which the candidate paused on the rung below. It may be
                lost; then the evaluation starts from the parent.

        Returns:
            The evaluation, and the snapshot in which the candidate pauses when there are rungs above.

        Raises:
            SystemFailure: The machine failed, not the candidate.
        """
        try:
            paused_snapshot = get_if_alive(paused)
            with self.mirrored_on_peers("evaluate", key, refs, eval_task, paused if paused_snapshot else []):
                return self.worker.evaluate(get_snapshot(key, refs), eval_task, paused_snapshot)
        finally:
            self.share = 0.0  # not at the next start: a poll between two tasks must not see the last task's share

    def open_rendezvous(self) -> Rendezvous:
        """Open the store at which a process group meets; this actor is the group's rank 0."""
        self.store, rendezvous = process_group.open_rendezvous(ray.util.get_node_ip_address())
        return rendezvous

    def finetune(
        self,
        key: str,
        refs: Mapping[str, Any],
        finetune_task: FinetuneTask,
        member: ProcessGroup = SINGLE_PROCESS,
        rendezvous: Rendezvous | None = None,
    ) -> Checkpoint | None:
        """Fine-tune a mask, alone or with other actors.

        Args:
            key: Key of the parent snapshot.
            refs: Object references of the parent's tensors, by `Snapshot` field.
            finetune_task: The fine-tuning.
            member: This actor in the data-parallel process group.
            rendezvous: Where the group meets; None when the actor works alone.

        Returns:
            The checkpoint; None for every rank but 0.

        Raises:
            UserError: The mask differs from the evaluated one, or training diverged.
            SystemFailure: The machine failed.
        """
        group_connection = None
        if rendezvous is not None:
            group_connection = process_group.connect_process_group(
                member, rendezvous, self.worker.device, None if member.rank else self.store
            )
        try:
            with self.mirrored_on_peers("finetune", key, refs, finetune_task):
                return self.worker.finetune(get_snapshot(key, refs), finetune_task, group_connection)
        finally:
            self.share = 0.0

    @contextmanager
    def mirrored_on_peers(self, method: str, *arguments: Any) -> Iterator[None]:
        """Call a method on all peers while the block runs here.

        A peer that has a system failure ends its process, so that no other rank waits for it.

        Args:
            method: Name of the actor method.
            *arguments: Its arguments.
        """
        refs = [getattr(peer, method).remote(*arguments) for peer in self.peers]
        try:
            yield
        except SystemFailure:
            if not self.is_leader:
                os._exit(1)
            raise
        ray.get(refs)


def actor_class(need: Resources) -> Any:
    """The Ray actor class of workers.

    Args:
        need: Resources of one actor.
    """
    return ray.remote(
        num_cpus=need["CPU"],
        num_gpus=need["GPU"],
        memory=need["memory"],
        max_restarts=0,
        concurrency_groups={"aside": 1},
    )(WorkerActor)


def get_snapshot(key: str, refs: Mapping[str, Any]) -> Snapshot:
    """A snapshot whose tensors are this node's one shared, read-only copy.

    Args:
        key: The snapshot's key.
        refs: Object references by `Snapshot` field.
    """
    return Snapshot(key, **dict(zip(refs, ray.get(list(refs.values())), strict=True)))


def get_if_alive(paused: Sequence[Any]) -> Snapshot | None:
    """The snapshot behind a reference.

    Args:
        paused: One reference, or none.

    Returns:
        The snapshot; None without a reference, or when the snapshot was lost with its node.
    """
    try:
        return next(iter(ray.get(list(paused))), None)
    except RayError:
        return None
