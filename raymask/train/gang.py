"""How do several processes train one model together, and come to the same bits as one?"""

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
TIMEOUT = timedelta(minutes=10)  # for one exchange; the death of a process is noticed sooner
NAME = 256  # bytes of a member's name

Meeting = tuple[str, int]
"""Host and port."""


@dataclass(frozen=True)
class Gang:
    """`size` processes, a power of two, that train one model; this one is number `rank`.

    A batch is cut into shards, as many or more, a power of two too, and each process has neighbouring ones. Whatever is
    summed over shards is summed as a balanced binary tree, inside a process and between them, so that who has which
    shards changes nothing.
    """

    rank: int = 0
    size: int = 1

    def mine(self, shards: int) -> range:
        """The shards of so many that this process has."""
        each = shards // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def add_up(self, values: Tensor) -> None:
        """Sum in place over the gang, (entries,); all get the same bits.

        By halving and doubling: ever smaller pieces are summed with ever farther neighbours, then the sums travel
        back, so that a process sends and receives less than twice the `values`.
        """
        pieces = []
        distance, piece = 1, values
        while distance < self.size:
            low, high = piece.tensor_split([len(piece) // 2])
            mine, theirs = (high, low) if self.rank & distance else (low, high)
            received = torch.empty_like(mine)
            exchange(theirs, received, self.rank ^ distance)
            piece = mine.add_(received)
            pieces.append((mine, theirs, self.rank ^ distance))
            distance *= 2
        for mine, theirs, neighbour in reversed(pieces):
            exchange(mine, theirs, neighbour)

    def names(self, name: str, device: torch.device) -> tuple[str, ...]:
        """Of all members, by rank, when this one's is `name`."""
        table = torch.zeros(self.size, NAME, dtype=torch.uint8)
        letters = torch.frombuffer(bytearray(name.encode()[:NAME]), dtype=torch.uint8)
        table[self.rank, : len(letters)] = letters
        table = table.to(device)
        self.add_up(table.view(-1))
        return tuple(bytes(row).rstrip(b"\0").decode(errors="replace") for row in table.tolist())


ALONE = Gang()


def exchange(sent: Tensor, received: Tensor, neighbour: int) -> None:
    """Send one piece and receive another; either may be empty, and both processes know it."""
    ways = [(dist.isend, sent), (dist.irecv, received)]
    if operations := [dist.P2POp(way, piece, neighbour) for way, piece in ways if len(piece)]:
        for work in dist.batch_isend_irecv(operations):
            work.wait()


def tree_sum(parts: Iterable[Tensor]) -> Tensor:
    """The sum of 1, 2, 4, 8, ... tensors of one shape, as a balanced binary tree, in the tensors' own memory."""
    sums: list[tuple[int, Tensor]] = []  # and how many parts are in each, fewer from one to the next
    for part in parts:
        count = 1
        while sums and sums[-1][0] == count:
            part = sums.pop()[1].add_(part)
            count *= 2
        sums.append((count, part))
    [(_, total)] = sums
    return total


def opened(host: str) -> tuple[Any, Meeting]:
    """Where a gang meets: a free port of this address, and of no other."""
    with socket.create_server((host, 0)) as listener:
        meeting = (host, listener.getsockname()[1])
        return met(meeting, is_master=True, master_listen_fd=listener.detach()), meeting


def met(meeting: Meeting, **options: Any) -> Any:
    """The store at a place, which tells the members about each other."""
    return dist.TCPStore(*meeting, wait_for_workers=False, timeout=TIMEOUT, **options)  # type: ignore[attr-defined]


@contextmanager
def gathered(member: Gang, meeting: Meeting, device: torch.device, store: Any | None = None) -> Iterator[Gang]:
    """The gang, connected for as long as the block lasts: GPUs by NCCL, else by gloo. `store`: the first one's own."""
    if meeting[0] == LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo would choose the host name's address
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store or met(meeting),
        rank=member.rank,
        world_size=member.size,
        timeout=TIMEOUT,
        device_id=torch.device("cuda", torch.cuda.current_device()) if on_gpu else None,
    )
    try:
        yield member
        dist.barrier()  # nobody hangs up before all have what they need
    finally:
        dist.destroy_process_group()
