"""A Watch that writes down what it is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from raymask.report.terminal import Silent


@dataclass
class Ear(Silent):
    """Notes and progress, in the order in which they came.

    Attributes:
        notes: Every note.
        shares: Every progress report: shares in [0, 1] by name.
    """

    notes: list[str] = field(default_factory=list)
    shares: list[dict[str, float]] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)

    @property
    def troubles(self) -> list[str]:
        """The notes on workers that were lost or did not start."""
        return [text for text in self.notes if "worker was lost" in text or "did not start" in text]

    def running(self, shares: Mapping[str, float]) -> None:
        self.shares.append(dict(shares))
