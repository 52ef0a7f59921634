"""Prometheus metrics of a search, exported through Ray's metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from ray.util.metrics import Counter, Gauge

from raymask.core.callbacks import Callback
from raymask.core.records import Evaluation, LevelRecord
from raymask.core.successive_halving import rung_fraction
from raymask.report.progress import Progress
from raymask.train.context import WorkerContext


class PrometheusCallback(Callback):
    """A callback that updates Prometheus metrics."""

    def __init__(self, context: WorkerContext) -> None:
        """Create the callback; the metrics themselves are created at the first event.

        Args:
            context: Gives the spec and the number of training rows.
        """
        self.progress = Progress(context.spec)
        self.rungs = context.spec.early_eval.rungs
        self.examples = context.spec.early_eval.epochs * len(context.data.train)  # per full early evaluation

    # Cached properties, because a metric that is created before Ray runs is lost.

    @cached_property
    def candidates(self) -> Gauge:
        """Candidates of the current level, by state: done, failed, running, waiting."""
        return Gauge("raymask_candidates", "Candidates of the current level, by state.", tag_keys=("state",))

    @cached_property
    def level(self) -> Gauge:
        """The current level."""
        return Gauge("raymask_level", "The current level; 0 is the dense model.")

    @cached_property
    def best(self) -> Gauge:
        """The best score of the current level."""
        return Gauge("raymask_best_score", "The best score of the current level so far.")

    @cached_property
    def seconds(self) -> Gauge:
        """Duration of the last early evaluation, in seconds."""
        return Gauge("raymask_early_eval_seconds", "Seconds of the last finished early evaluation.")

    @cached_property
    def speed(self) -> Gauge:
        """Training examples per second of one worker."""
        return Gauge(
            "raymask_examples_per_second", "Training examples per second of one worker, in the last early evaluation."
        )

    @cached_property
    def left(self) -> Gauge:
        """Estimated time left, in seconds."""
        return Gauge("raymask_seconds_left", "Estimated seconds until the end of the search.")

    @cached_property
    def put(self) -> Counter:
        """Bytes put into the object store."""
        return Counter("raymask_put_bytes", "Bytes of weights and optimizer states put into the object store.")

    def on_phase_begin(self, phase: str, level: int, total: int, known: Sequence[Evaluation] | None = None) -> None:
        """Set the level."""
        self.progress.on_phase_begin(phase, level, total, known)
        self.level.set(level)
        self.update()

    def on_progress(self, shares: Mapping[str, float]) -> None:
        """Update the counts of running and waiting candidates."""
        self.progress.on_progress(shares)
        self.update()

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Set duration and speed of an early evaluation that did not fail."""
        self.progress.on_evaluation(evaluation)
        if evaluation.ok:
            self.seconds.set(evaluation.seconds)
            examples = self.examples * rung_fraction(self.rungs, evaluation.rung, evaluation.repeat)
            self.speed.set(examples / max(evaluation.seconds, 1e-9))
        self.update()

    def on_level_end(self, lineage: str, level: LevelRecord) -> None:
        """Update the time left."""
        self.progress.on_level_end(lineage, level)
        self.update()

    def on_object_put(self, size: int) -> None:
        """Count `size` bytes."""
        if size:  # an optimizer state before the first step is empty, and Ray refuses to add 0
            self.put.inc(size)

    def update(self) -> None:
        """Update the time left and, during early evaluation only, the candidate counts and the best score."""
        progress = self.progress
        seconds_left = progress.left()
        if seconds_left is not None:
            self.left.set(seconds_left)
        if not progress.evaluating:
            return
        counts = {
            "done": progress.done - progress.failed,
            "failed": progress.failed,
            "running": len(progress.shares),
            "waiting": progress.waiting,
        }
        for state, count in counts.items():
            self.candidates.set(count, {"state": state})
        if progress.best is not None:
            self.best.set(progress.best.score)
