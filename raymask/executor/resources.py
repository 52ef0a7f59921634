"""Resources of workers and nodes: what a worker needs, what the cluster has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import ray
import torch

from raymask.core.errors import UserError
from raymask.machine import available_memory, usable_cpus

if TYPE_CHECKING:
    from raymask.train.context import WorkerContext


Resources = Mapping[str, float]
"""Amounts by Ray's resource names: CPU, GPU, memory (bytes)."""

WORKER_MEMORY_SHARE = 0.7  # share of a private Ray's memory that is for workers; Ray's object store takes the rest
MIN_PRIVATE_MEMORY = 2**29  # bytes; with less Ray, once its own processes run, refuses to start its object store


def private_resources() -> Resources:
    """Resources of a private Ray: those that this process may use.

    Raises:
        UserError: The memory is too little for Ray.
    """
    memory = available_memory()
    if memory < MIN_PRIVATE_MEMORY:
        raise UserError(
            f"this machine, or this process's share of it, has {memory / 2**20:.0f} MiB of memory left, and Ray needs "
            f"{MIN_PRIVATE_MEMORY / 2**20:.0f} MiB: free some, or search without Ray (`raymask search --in-process`)"
        )
    return {
        "CPU": float(usable_cpus()),
        "GPU": float(torch.cuda.device_count()),
        "memory": float(int(WORKER_MEMORY_SHARE * memory)),
    }


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
