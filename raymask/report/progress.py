"""How far is a search, and how long will it take?"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from raymask.core.recipe import finetune_stage, propose, resolve, runs_imp, warm_stage
from raymask.core.records import Evaluation, Level
from raymask.core.spec import Spec
from raymask.report.words import duration
from raymask.store import DENSE, IMP

FIRST = 0.02  # the share of a stage that must be done before it tells how long an epoch takes


class Progress:
    """What has been told so far: a Watch's events go in, counts and an estimate come out."""

    def __init__(self, spec: Spec) -> None:
        self.recipe = resolve(spec)
        self.stage = ""
        self.level = self.total = self.done = self.failed = 0
        self.probing = False
        self.best: Evaluation | None = None
        self.shares: Mapping[str, float] = {}
        self.began = time.monotonic()
        self.at_once = 1
        self.seconds = self.epochs = 0.0

    def begins(self, stage: str, level: int, total: int, known: Sequence[Evaluation] | None) -> None:
        self.stage, self.level, self.total = stage, level, total
        self.probing, self.done, self.failed, self.best = known is not None, 0, 0, None
        self.shares, self.began = {}, time.monotonic()
        for evaluation in known or ():
            self.count(evaluation)

    def count(self, evaluation: Evaluation) -> None:
        self.done += 1
        self.failed += not evaluation.ok
        if evaluation.score is not None and (self.best is None or evaluation.score > (self.best.score or -math.inf)):
            self.best = evaluation

    def running(self, shares: Mapping[str, float]) -> None:
        if not self.shares:
            self.began = time.monotonic()
        self.shares = shares
        self.at_once = max(self.at_once, len(shares))

    def evaluated(self, evaluation: Evaluation) -> None:
        self.count(evaluation)
        if evaluation.ok:
            self.measure(evaluation.seconds, self.recipe.spec.probe.epochs)

    def settled(self, lineage: str, level: Level) -> None:
        self.done += 1
        self.measure(level.finetuned.seconds, self.tuning(level.level, lineage))

    def measure(self, seconds: float, epochs: float) -> None:
        self.seconds += seconds
        self.epochs += epochs

    @property
    def waiting(self) -> int:
        return max(0, self.total - self.done - len(self.shares))

    def tuning(self, level: int, lineage: str) -> float:
        """Epochs of one fine-tuning."""
        spec = self.recipe.spec
        if level:
            return finetune_stage(self.recipe, level, imp=lineage == IMP).epochs
        warm = warm_stage(spec)
        return spec.dense.epochs if lineage == DENSE or warm is None else warm.epochs

    def settling(self, level: int) -> float:
        """Epochs one after another of a level's fine-tunings, which run side by side where there is room."""
        lineages = ["", IMP] if level and runs_imp(self.recipe.spec) else [""]
        epochs = [self.tuning(level, lineage) for lineage in lineages]
        return max(epochs) if self.at_once > 1 else sum(epochs)

    def ahead(self) -> float:
        """Epochs one after another until the end, were all workers to go on as they do now."""
        share = min(self.shares.values(), default=0.0)
        probe, pool = self.recipe.spec.probe.epochs, len(propose(self.recipe, 1))
        later = range(self.level + 1, len(self.recipe.densities) + 1)
        rounds = math.ceil(pool / self.at_once) if pool > 1 else 0
        rest = sum(rounds * probe + self.settling(level) for level in later)
        if self.probing:
            left = max(0.0, self.total - self.done - sum(self.shares.values()))
            return rest + left / self.at_once * probe + self.settling(self.level)
        return rest + self.settling(self.level) * (1 - share)

    def left(self) -> float | None:
        """Seconds until the end, about; None before there is anything to tell it from."""
        if self.epochs:
            return self.ahead() * self.seconds / self.epochs
        share = max(self.shares.values(), default=0.0)
        if share < FIRST:
            return None
        epochs = self.recipe.spec.probe.epochs if self.probing else self.tuning(self.level, DENSE)
        return self.ahead() * (time.monotonic() - self.began) / (share * epochs) if epochs else None

    def line(self) -> str:
        """All of it in a line."""
        running = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
        counts = f"{self.done} of {self.total} done, {len(self.shares)} running" + (f" ({running})" if running else "")
        return f"{self.stage}: {counts}{self.tail()}"

    def tail(self) -> str:
        """Failures, the best score so far, and the time left."""
        parts = [f"{self.failed} failed"] if self.probing else []
        if self.best is not None:
            parts.append(f"best score {self.best.score:.4f} ({self.best.candidate.name})")
        left = self.left()
        if left is not None:
            parts.append(f"about {duration(left)} left")
        return "".join(f", {part}" for part in parts)
