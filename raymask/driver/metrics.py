"""What does a search tell Prometheus, through Ray's own metrics?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

from ray.util.metrics import Counter, Gauge

from raymask.core.records import Evaluation, Level, Watch
from raymask.core.rungs import share
from raymask.report.progress import Progress
from raymask.train.worker import Job


class Meter:
    """A Watch that passes everything on to another, and keeps the metrics up to date."""

    def __init__(self, inner: Watch, job: Job) -> None:
        self.inner = inner
        self.progress = Progress(job.spec)
        self.rungs = job.spec.probe.rungs
        self.examples = job.spec.probe.epochs * len(job.data.train)  # in one probe

    # Made at the first event: before Ray runs, a metric goes nowhere.

    @cached_property
    def candidates(self) -> Gauge:
        return Gauge("raymask_candidates", "Candidates of the present level, by state.", tag_keys=("state",))

    @cached_property
    def level(self) -> Gauge:
        return Gauge("raymask_level", "The present level; 0 is the dense model.")

    @cached_property
    def best(self) -> Gauge:
        return Gauge("raymask_best_score", "The best score of the present level so far.")

    @cached_property
    def seconds(self) -> Gauge:
        return Gauge("raymask_probe_seconds", "How long the last finished probe took.")

    @cached_property
    def speed(self) -> Gauge:
        return Gauge("raymask_examples_per_second", "Training examples a second of one worker, in the last probe.")

    @cached_property
    def left(self) -> Gauge:
        return Gauge("raymask_seconds_left", "Seconds until the end of the search, about.")

    @cached_property
    def put(self) -> Counter:
        return Counter("raymask_put_bytes", "Bytes of weights and optimizer states put into the object store.")

    def begins(self, stage: str, level: int, total: int, known: Sequence[Evaluation] | None = None) -> None:
        self.inner.begins(stage, level, total, known)
        self.progress.begins(stage, level, total, known)
        self.level.set(level)
        self.tell()

    def running(self, shares: Mapping[str, float]) -> None:
        self.inner.running(shares)
        self.progress.running(shares)
        self.tell()

    def evaluated(self, evaluation: Evaluation) -> None:
        self.inner.evaluated(evaluation)
        self.progress.evaluated(evaluation)
        if evaluation.ok:
            self.seconds.set(evaluation.seconds)
            examples = self.examples * share(self.rungs, evaluation.rung, evaluation.order)
            self.speed.set(examples / max(evaluation.seconds, 1e-9))
        self.tell()

    def settled(self, lineage: str, level: Level) -> None:
        self.inner.settled(lineage, level)
        self.progress.settled(lineage, level)
        self.tell()

    def sent(self, size: int) -> None:
        self.inner.sent(size)
        if size:  # an optimizer that has not taken a step is empty, and Ray refuses to add nothing
            self.put.inc(size)

    def note(self, text: str) -> None:
        self.inner.note(text)

    def tell(self) -> None:
        """Candidates only while there are any: a fine-tuning is none."""
        now = self.progress
        left = now.left()
        if left is not None:
            self.left.set(left)
        if not now.probing:
            return
        counts = {
            "done": now.done - now.failed,
            "failed": now.failed,
            "running": len(now.shares),
            "waiting": now.waiting,
        }
        for state, count in counts.items():
            self.candidates.set(count, {"state": state})
        if now.best is not None:
            self.best.set(now.best.score)
