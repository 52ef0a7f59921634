"""Process groups: several processes train one model with torch.distributed, bit for bit as one process does."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LOOPBACK = "127.0.0.1"
TIMEOUT = timedelta(minutes=10)  # of one operation; the death of a process is noticed sooner
MAX_NAME_BYTES = 256

Rendezvous = tuple[str, int]
"""Host and port of a group's store."""


@dataclass(frozen=True)
class ProcessGroup:
    """This process's membership in a group of processes that train one model.

    A batch has as many shards as the group has processes, or more: a power of two. Each process has consecutive shards.
    All sums over shards are balanced binary trees, within a process and between processes, so the result does not
    depend on which process has which shards.

    Attributes:
        rank: This process's number, from 0.
        size: The number of processes, a power of two.
        sharded: The model is sharded over the processes (FSDP), instead of replicated on each.
    """

    rank: int = 0
    size: int = 1
    sharded: bool = False

    def local_shards(self, shards: int) -> range:
        """The shards of this process; `shards`: all shards of a batch, a multiple of `size`."""
        per_process = shards // self.size
        return range(self.rank * per_process, (self.rank + 1) * per_process)

    def all_reduce(self, values: Tensor) -> None:
        """Sum a tensor [entries] over the group, in place. All processes get the same bits.

        Recursive halving and doubling: ever smaller halves are summed with ever more distant processes, then the sums
        are sent back. A process sends and receives less than twice the `values`.
        """
        halves = []
        distance, remaining = 1, values
        while distance < self.size:
            low, high = remaining.tensor_split([len(remaining) // 2])
            kept, sent = (high, low) if self.rank & distance else (low, high)
            received = torch.empty_like(kept)
            send_recv(sent, received, self.rank ^ distance)
            remaining = kept.add_(received)
            halves.append((kept, sent, self.rank ^ distance))
            distance *= 2
        for kept, sent, peer in reversed(halves):
            send_recv(kept, sent, peer)

    def all_gather_names(self, name: str, device: torch.device) -> tuple[str, ...]:
        """The names of all processes by rank. Names are cut at MAX_NAME_BYTES.

        Args:
            name: This process's name.
            device: The device of the group's communication.
        """
        table = torch.zeros(self.size, MAX_NAME_BYTES, dtype=torch.uint8)
        encoded = torch.frombuffer(bytearray(name.encode()[:MAX_NAME_BYTES]), dtype=torch.uint8)
        table[self.rank, : len(encoded)] = encoded
        table = table.to(device)
        self.all_reduce(table.view(-1))
        return tuple(bytes(row).rstrip(b"\0").decode(errors="replace") for row in table.tolist())


SINGLE_PROCESS = ProcessGroup()
"""A process without others."""


def send_recv(sent: Tensor, received: Tensor, peer: int) -> None:
    """Exchange tensors with one process.

    Args:
        sent: The tensor to send. An empty one is not sent.
        received: Where to receive. An empty one is not received; the other process must send an empty one.
        peer: The other process's rank.
    """
    directions = [(dist.isend, sent), (dist.irecv, received)]
    if operations := [dist.P2POp(operation, tensor, peer) for operation, tensor in directions if len(tensor)]:
        for work in dist.batch_isend_irecv(operations):
            work.wait()


def tree_sum(parts: Iterable[Tensor]) -> Tensor:
    """Sum tensors as a balanced binary tree, in the tensors' own memory.

    Args:
        parts: 1, 2, 4, 8, ... tensors of one shape.
    """
    sums: list[tuple[int, Tensor]] = []  # (how many parts, their sum); the numbers decrease from one to the next
    for part in parts:
        count = 1
        while sums and sums[-1][0] == count:
            part = sums.pop()[1].add_(part)
            count *= 2
        sums.append((count, part))
    [(_, total)] = sums
    return total


def open_rendezvous(host: str) -> tuple[Any, Rendezvous]:
    """Open a store for a new group on a free port.

    Args:
        host: The address to listen on, and no other.

    Returns:
        The store, and the host and port by which the other processes connect.
    """
    with socket.create_server((host, 0)) as listener:
        rendezvous = (host, listener.getsockname()[1])
        return connect_store(rendezvous, is_master=True, master_listen_fd=listener.detach()), rendezvous


def connect_store(rendezvous: Rendezvous, **options: Any) -> Any:
    """The store at a host and port, by which a group's processes find each other; `options`: of TCPStore."""
    return dist.TCPStore(*rendezvous, wait_for_workers=False, timeout=TIMEOUT, **options)  # type: ignore[attr-defined]


@contextmanager
def connect_process_group(
    member: ProcessGroup, rendezvous: Rendezvous, device: torch.device, store: Any | None = None
) -> Iterator[ProcessGroup]:
    """Connect a process group for the length of a block, GPUs with NCCL, otherwise with gloo.

    Args:
        member: This process's membership.
        rendezvous: Host and port of the group's store.
        device: The device of the group's communication.
        store: The store that rank 0 has opened; None on the other ranks, which connect to it.

    Yields:
        `member`.
    """
    if rendezvous[0] == LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # otherwise gloo takes the address of the host name
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store or connect_store(rendezvous),
        rank=member.rank,
        world_size=member.size,
        timeout=TIMEOUT,
        device_id=torch.device("cuda", torch.cuda.current_device()) if on_gpu else None,
    )
    try:
        yield member
        dist.barrier()  # no process disconnects before all have received their data
    finally:
        dist.destroy_process_group()
