"""Failure policy: what follows a failed attempt, decided on plain data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Decision(Enum):
    """What follows a failed attempt at a task, or at starting a worker."""

    RETRY = "retry"  # once more, on a fresh worker
    RECORD = "record"  # the task has failed for good; the search goes on
    RAISE = "raise"  # the search ends with the error


@dataclass(frozen=True)
class Failure:
    """A failed attempt at a task.

    Attributes:
        system: Whether the machine failed (a lost process or node, no memory), not the task's own code.
        attempt: System failures of this task so far, this one included, from 1.
        timed_out: Whether the driver ended the attempt at its timeout.
    """

    system: bool
    attempt: int = 1
    timed_out: bool = False


@dataclass(frozen=True)
class FailurePolicy:
    """Retries, as the spec asks for them.

    Attributes:
        max_retries: System failures of one task that are forgiven, 0 or more.
        max_failed_starts: Workers that may fail to start, one after another, before the search ends, 1 or more.
    """

    max_retries: int
    max_failed_starts: int

    def decide(self, failure: Failure) -> Decision:
        """A task's own error ends the search; a system failure is retried, but a timeout never is."""
        if not failure.system:
            return Decision.RAISE
        if failure.timed_out or failure.attempt > self.max_retries:
            return Decision.RECORD
        return Decision.RETRY

    def decide_start(self, failed_starts: int) -> Decision:
        """After so many workers in a row that did not start, the last one included."""
        return Decision.RAISE if failed_starts >= self.max_failed_starts else Decision.RETRY
