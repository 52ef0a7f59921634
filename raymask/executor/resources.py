"""Resources of workers and nodes: what a worker needs, what the cluster has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import ray

from raymask.core.errors import UserError

if TYPE_CHECKING:
    from raymask.train.context import WorkerContext


Resources = Mapping[str, float]
"""Amounts by Ray's resource names: CPU, GPU, memory (bytes)."""


def resources_per_worker(context: WorkerContext, nodes: Sequence[Resources]) -> Resources:
    """Resources of one worker process.

    Args:
        context: Gives `workers.cpus`, `workers.gpus` and the memory estimate.
        nodes: Resources by node. When the spec leaves `workers.gpus` open, a worker gets one GPU if any node has one.
    """
    gpus = context.spec.workers.gpus
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU", 0) for node in nodes) else 0.0
    return {"CPU": context.spec.workers.cpus, "GPU": gpus, "memory": context.peak_host_memory(on_gpu=gpus > 0)}


def num_worker_slots(need: Resources, nodes: Sequence[Resources], group: int = 1) -> int:
    """How many workers the nodes can hold.

    Args:
        need: Resources of one worker process.
        nodes: Resources by node.
        group: Processes per worker (`workers.fsdp`).
    """
    processes = sum(
        min(math.floor(node.get(name, 0.0) / amount + 1e-9) for name, amount in need.items() if amount)
        for node in nodes
    )
    return processes // group


def node_resources() -> list[Resources]:
    """Resources of every live node of the cluster.

    In a placement group, such as that of a Ray Tune trial, they are the group's bundles, because actors started inside
    the group are placed in its bundles.
    """
    group = ray.util.get_current_placement_group()
    if group is not None:
        return list(group.bundle_specs)
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def require_capacity(need: Resources, nodes: Sequence[Resources], group: int = 1) -> None:
    """Check that the nodes can hold a worker.

    Args:
        need: Resources of one worker process.
        nodes: Resources by node.
        group: Processes per worker (`workers.fsdp`).

    Raises:
        UserError: They cannot hold even one.
    """
    if not num_worker_slots(need, nodes, group):
        per_process = f" for each of its {group} processes (workers.fsdp)" if group > 1 else ""
        available = "; ".join(map(format_resources, nodes)) or "nothing"
        raise UserError(
            f"no node can hold a worker: one asks for {format_resources(need)}{per_process} (workers.cpus, "
            f"workers.gpus, the model's memory), the nodes have {available}. On an autoscaling cluster, set "
            "workers.scale_up_timeout to the number of seconds to wait for new nodes"
        )


def format_resources(resources: Resources) -> str:
    """Resources as text, such as `4 CPUs, 1 GPUs, 2.5 GiB`."""
    memory = resources.get("memory", 0.0) / 2**30
    return f"{resources.get('CPU', 0.0):g} CPUs, {resources.get('GPU', 0.0):g} GPUs, {memory:.1f} GiB"
