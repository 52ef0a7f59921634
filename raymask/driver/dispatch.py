"""Dispatch, scaling and waiting decisions of the worker pool, on plain data and the caller's clock.

All times are seconds of one monotonic clock.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


def share_workers(max_workers: Iterable[int], num_idle: int) -> list[int]:
    """How many idle workers each waiting task gets: one at least, and evenly what is left over.

    Args:
        max_workers: The most workers that a task can share, 1 or more, by task, the most urgent first.
        num_idle: Idle workers, 0 or more.

    Returns:
        Powers of two, for the first `num_idle` tasks or fewer.
    """
    tasks = list(islice(max_workers, num_idle))
    counts: list[int] = []
    for position, limit in enumerate(tasks):
        fair = (num_idle - sum(counts)) // (len(tasks) - position)
        counts.append(1 << min(limit, fair).bit_length() - 1)
    return counts


def num_workers_to_start(max_workers: Iterable[int], num_slots: int, num_workers: int) -> int:
    """How many more workers the open tasks are worth.

    Args:
        max_workers: The most workers that a task can share, by open task, running ones included.
        num_slots: Workers that there may be in all.
        num_workers: Workers that there are, those that are starting included.
    """
    demand = sum(islice(max_workers, num_slots))
    return max(0, min(demand, num_slots) - num_workers)


def overdue(deadlines: Mapping[Key, float], now: float) -> set[Key]:
    """The running tasks whose deadline, a time, has passed."""
    return {key for key, deadline in deadlines.items() if now > deadline}


def next_to_poll(running: Sequence[Key], awaited: Iterable[Key], limit: int) -> tuple[list[Key], list[Key]]:
    """Which running tasks are asked for their progress in this round; all get their turn.

    Args:
        running: Keys, the longest unasked first.
        awaited: Keys of tasks that still owe an answer; they keep their turn and are not asked again.
        limit: Tasks a round, since to ask costs about as much as to dispatch.

    Returns:
        The keys to ask, and all keys in the order for the next round.
    """
    turn, rest = running[:limit], running[limit:]
    owing = set(awaited)
    return [key for key in turn if key not in owing], [*rest, *turn]


@dataclass
class SharedTaskWait:
    """The wait of tasks that several workers can share for workers that are on their way; not for ever.

    Attributes:
        limit: Seconds to wait at most.
        since: When this wait began; None while nothing waits.
    """

    limit: float
    since: float | None = None

    def should_wait(self, max_workers: Sequence[int], workers_coming: bool, now: float) -> bool:
        """Whether the waiting tasks, by the most workers that each can share, stay where they are."""
        if not workers_coming or all(limit == 1 for limit in max_workers):
            self.since = None
            return False
        self.since = now if self.since is None else self.since
        return now - self.since < self.limit


@dataclass
class Starvation:
    """How long nothing has run, and when that is worth a line.

    Attributes:
        warn_every: Seconds without any running task between two warnings.
        last_busy: When a task ran last, or the start.
        last_warned: When the last warning was, or a task ran last.
    """

    warn_every: float
    last_busy: float
    last_warned: float

    def observe(self, busy: bool, now: float) -> float | None:
        """Seconds without any running task, when that is to be said now; else None."""
        if busy:
            self.last_busy = self.last_warned = now
        elif now - self.last_warned > self.warn_every:
            self.last_warned = now
            return now - self.last_busy
        return None
