"""Failure policy: retry, record or raise, decided on plain data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Decision(Enum):
    """What to do after a failed attempt at a task, or at starting a worker."""

    RETRY = "retry"  # try again, on a fresh worker
    RECORD = "record"  # the task has failed for good; the search goes on
    RAISE = "raise"  # the search ends with the error


@dataclass(frozen=True)
class Failure:
    """A failed attempt at a task.

    Attributes:
        system: Whether it is a system failure (process or node lost, out of memory), not an error of the task's code.
        attempt: Number of system failures of the task so far, this one included, from 1.
        timed_out: Whether the driver ended the attempt at its timeout.
    """

    system: bool
    attempt: int = 1
    timed_out: bool = False


@dataclass(frozen=True)
class FailurePolicy:
    """Limits on retries.

    Attributes:
        max_retries: How often a task is retried after a system failure, 0 or more.
        max_failed_starts: Workers in a row that may fail to start before the search ends, 1 or more.
    """

    max_retries: int
    max_failed_starts: int

    def decide(self, failure: Failure) -> Decision:
        """Decide about a task: its own error ends the search, a system failure is retried, a timeout is not.

        Args:
            failure: The failed attempt.

        Returns:
            RAISE for the task's own error; RECORD after a timeout or the last retry; else RETRY.
        """
        if not failure.system:
            return Decision.RAISE
        if failure.timed_out or failure.attempt > self.max_retries:
            return Decision.RECORD
        return Decision.RETRY

    def decide_start(self, failed_starts: int) -> Decision:
        """Decide after a worker failed to start.

        Args:
            failed_starts: Workers in a row that failed to start, this one included.

        Returns:
            RAISE at the limit, else RETRY.
        """
        return Decision.RAISE if failed_starts >= self.max_failed_starts else Decision.RETRY
