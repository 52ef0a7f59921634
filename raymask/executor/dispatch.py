"""Dispatch, scaling and waiting decisions of the worker pool.

All functions work on plain data and on the caller's clock. All times are seconds of one monotonic clock.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


def share_workers(max_workers: Iterable[int], num_idle: int) -> list[int]:
    """How many idle workers each waiting task gets: at least one, and an even share of the surplus.

    Args:
        max_workers: The most workers that each task can share, 1 or more; the most urgent task first.
        num_idle: Number of idle workers, 0 or more.

    Returns:
        Number of workers, a power of two, for each of the first `num_idle` tasks (or fewer, when there are fewer).
    """
    tasks = list(islice(max_workers, num_idle))
    counts: list[int] = []
    for position, limit in enumerate(tasks):
        fair_share = (num_idle - sum(counts)) // (len(tasks) - position)
        counts.append(1 << min(limit, fair_share).bit_length() - 1)
    return counts


def num_workers_to_start(max_workers: Iterable[int], num_slots: int, num_workers: int) -> int:
    """How many more workers the open tasks can use.

    Args:
        max_workers: The most workers that each open task can share, running tasks included.
        num_slots: The most workers that may exist.
        num_workers: Workers that exist, including those that are starting.

    Returns:
        Workers to start, 0 or more.
    """
    demand = sum(islice(max_workers, num_slots))
    return max(0, min(demand, num_slots) - num_workers)


def overdue(deadlines: Mapping[Key, float], now: float) -> set[Key]:
    """The keys of the running tasks whose deadline has passed.

    Args:
        deadlines: Time at which a task must end, by key.
        now: The time.
    """
    return {key for key, deadline in deadlines.items() if now > deadline}


def next_to_poll(running: Sequence[Key], awaited: Iterable[Key], limit: int) -> tuple[list[Key], list[Key]]:
    """Which running tasks to poll for progress in this round; all tasks take turns.

    Args:
        running: Keys of the running tasks, the least recently polled first.
        awaited: Keys of tasks that have not answered the last poll. They use up their turn without being polled again.
        limit: The most tasks polled in a round, because a poll costs about as much as a dispatch.

    Returns:
        The keys to poll, and all keys in the order for the next round.
    """
    turn, rest = running[:limit], running[limit:]
    unanswered = set(awaited)
    return [key for key in turn if key not in unanswered], [*rest, *turn]


@dataclass
class SharedTaskWait:
    """A limited wait of shared tasks for workers that are starting.

    Attributes:
        limit: The most seconds to wait.
        since: When the wait began; None while nothing waits.
    """

    limit: float
    since: float | None = None

    def should_wait(self, max_workers: Sequence[int], workers_coming: bool, now: float) -> bool:
        """Whether the waiting tasks are held back in this round.

        Args:
            max_workers: The most workers that each waiting task can share.
            workers_coming: Whether workers are starting.
            now: The time.
        """
        if not workers_coming or all(limit == 1 for limit in max_workers):
            self.since = None
            return False
        self.since = now if self.since is None else self.since
        return now - self.since < self.limit


@dataclass
class Starvation:
    """Time without any running task, and when to warn about it.

    Attributes:
        warn_every: Seconds without a running task between two warnings.
        last_busy: When a task ran last; at first, when the pool started.
        last_warned: When the last warning was given, or when a task ran last.
    """

    warn_every: float
    last_busy: float
    last_warned: float

    def observe(self, busy: bool, now: float) -> float | None:
        """Record whether a task runs.

        Args:
            busy: Whether any task runs.
            now: The time.

        Returns:
            Seconds without a running task when a warning is due, else None.
        """
        if busy:
            self.last_busy = self.last_warned = now
        elif now - self.last_warned > self.warn_every:
            self.last_warned = now
            return now - self.last_busy
        return None
