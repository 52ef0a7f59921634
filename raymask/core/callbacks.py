"""Callbacks: observers of a search, such as a terminal, a log, a report or metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from raymask.core.records import Evaluation, LevelRecord


class Callback:
    """Observer of a search. Its methods do nothing; override those that you need. It changes nothing in the search."""

    def on_phase_begin(self, phase: str, level: int, total: int, known: Sequence[Evaluation] | None = None) -> None:
        """Handle the start of a phase of a level.

        Args:
            phase: Title of the phase.
            level: Level, 0 for the dense model.
            total: Number of tasks in the phase.
            known: In an early evaluation, the evaluations that the journal already has. None in a fine-tuning.
        """

    def on_progress(self, shares: Mapping[str, float]) -> None:
        """Handle progress: by name of each running task, the share in [0, 1] that is done."""

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Handle the end of a candidate's early evaluation, failed ones included."""

    def on_level_end(self, lineage: str, level: LevelRecord) -> None:
        """Handle the end of a level of a lineage."""

    def on_object_put(self, size: int) -> None:
        """Handle an object of `size` bytes that was put where all workers can read it."""

    def on_message(self, text: str) -> None:
        """Handle any other message, one line of text."""


class CallbackList(Callback):
    """Callbacks that get every event in turn.

    Attributes:
        callbacks: The callbacks, the first to be called first.
    """

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self.callbacks = list(callbacks)

    def on_phase_begin(self, phase: str, level: int, total: int, known: Sequence[Evaluation] | None = None) -> None:
        """Pass the start of a phase on."""
        for callback in self.callbacks:
            callback.on_phase_begin(phase, level, total, known)

    def on_progress(self, shares: Mapping[str, float]) -> None:
        """Pass progress on."""
        for callback in self.callbacks:
            callback.on_progress(shares)

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Pass the end of an early evaluation on."""
        for callback in self.callbacks:
            callback.on_evaluation(evaluation)

    def on_level_end(self, lineage: str, level: LevelRecord) -> None:
        """Pass the end of a level on."""
        for callback in self.callbacks:
            callback.on_level_end(lineage, level)

    def on_object_put(self, size: int) -> None:
        """Pass the size of an object on."""
        for callback in self.callbacks:
            callback.on_object_put(size)

    def on_message(self, text: str) -> None:
        """Pass a message on."""
        for callback in self.callbacks:
            callback.on_message(text)
