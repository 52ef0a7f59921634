"""How far is a search, and how long will it take?"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Mapping, Sequence

from raymask.core.recipe import climbs_of, finetune_stage, probe_epochs, resolve, runs_imp, warm_stage
from raymask.core.records import Evaluation, Level
from raymask.core.rungs import share
from raymask.core.spec import Spec
from raymask.report.words import duration
from raymask.store import DENSE, IMP, SEARCH, branches

FIRST = 0.02  # the share of a stage that must be done before it tells how long an epoch takes


class Progress:
    """What has been told so far: a Watch's events go in, counts and an estimate come out."""

    def __init__(self, spec: Spec) -> None:
        self.recipe = resolve(spec)
        self.stage = ""
        self.level = self.total = self.done = self.failed = 0
        self.probing = False
        self.best: Evaluation | None = None
        self.shares: dict[str, float] = {}
        self.unsettled = self.lineages(0)
        self.began = time.monotonic()
        self.at_once = 1
        self.seconds = self.epochs = 0.0

    def begins(self, stage: str, level: int, total: int, known: Sequence[Evaluation] | None) -> None:
        if level:
            self.unsettled = self.lineages(level)
            if known is None:  # who was just probed is fine-tuned; alone, when the baseline was done before
                probed = self.probing and level == self.level
                self.unsettled = self.unsettled[:total] if probed else self.unsettled[-total:]
        self.stage, self.level, self.total = stage, level, total
        self.probing, self.done, self.failed, self.best = known is not None, 0, 0, None
        self.shares = {}
        for evaluation in known or ():
            self.count(evaluation)

    def count(self, evaluation: Evaluation) -> None:
        self.done += 1
        self.total = max(self.total, self.done)  # guesses come on top
        self.failed += not evaluation.ok
        if height(evaluation) > height(self.best):
            self.best = evaluation

    def running(self, shares: Mapping[str, float]) -> None:
        if not self.shares:
            self.began = time.monotonic()
        self.shares = dict(shares)
        if shares and not self.level and DENSE not in shares:  # it was done before this start
            self.unsettled = self.unsettled[-1:]
        if self.waiting and shares:  # then all workers are busy, be they more or fewer than before
            self.at_once = len(shares)
        self.at_once = max(self.at_once, len(shares))

    def evaluated(self, evaluation: Evaluation) -> None:
        self.count(evaluation)
        self.shares.pop(evaluation.candidate.name, None)
        if evaluation.ok:
            probe = self.recipe.spec.probe
            self.measure(evaluation.seconds, probe.epochs * share(probe.rungs, evaluation.rung, evaluation.order))

    def settled(self, lineage: str, level: Level) -> None:
        self.done += 1
        if self.at_once == 1:
            self.shares = {}
        if lineage in self.unsettled:
            self.unsettled.remove(lineage)
        self.measure(level.finetuned.seconds, self.tuning(level.level, lineage))

    def measure(self, seconds: float, epochs: float) -> None:
        if epochs:
            self.seconds += seconds
            self.epochs += epochs

    @property
    def waiting(self) -> int:
        return max(0, self.total - self.done - len(self.shares))

    def lineages(self, level: int) -> list[str]:
        """What is fine-tuned at a level, in this order."""
        if level:
            return [*branches(self.recipe.spec), *([IMP] if runs_imp(self.recipe.spec) else [])]
        return [DENSE, SEARCH] if warm_stage(self.recipe.spec) else [DENSE]

    def tuning(self, level: int, lineage: str) -> float:
        """Epochs of one fine-tuning."""
        if level:
            return finetune_stage(self.recipe, level, imp=lineage == IMP).epochs
        dense = self.recipe.spec.dense
        return dense.epochs if lineage == DENSE else dense.distill_epochs

    def settling(self, level: int, lineages: Sequence[str], share: float = 0.0) -> float:
        """Epochs one after another of a level's fine-tunings, of the first of which a share is done already.

        They run side by side where there is room.
        """
        epochs = [self.tuning(level, lineage) for lineage in lineages] or [0.0]
        if self.at_once > 1:
            return max(max(epochs), sum(epochs) / self.at_once) * (1 - share)
        return sum(epochs) - epochs[0] * share

    def probes(self, open_probes: int) -> float:
        """Climbs one after another until those that run and `open_probes` others are done."""
        loads = [1 - share for share in self.shares.values()] if self.probing else []
        loads += [0.0] * (self.at_once - len(loads))
        heapq.heapify(loads)
        for _ in range(open_probes):  # each goes to the worker that is free first
            heapq.heapreplace(loads, loads[0] + 1)
        return max(loads)

    def climb(self, level: int) -> float:
        """Epochs of one of a level's climbs, on the average."""
        count = climbs_of(self.recipe, level)
        return probe_epochs(self.recipe, level) / count if count else 0.0

    def rounds(self, level: int) -> int:
        """A level's climbs one after another."""
        return math.ceil(climbs_of(self.recipe, level) / self.at_once)

    def ahead(self) -> float:
        """Epochs one after another until the end, were all workers to go on as they do now."""
        later = range(self.level + 1, len(self.recipe.densities) + 1)
        rest = sum(
            self.rounds(level) * self.climb(level) + self.settling(level, self.lineages(level)) for level in later
        )
        if self.probing:
            ours = self.probes(self.waiting) * self.climb(self.level)
            return rest + ours + self.settling(self.level, self.unsettled)
        return rest + self.settling(self.level, self.unsettled, min(self.shares.values(), default=0.0))

    def left(self) -> float | None:
        """Seconds until the end, about; None before there is anything to tell it from."""
        if self.epochs:
            return self.ahead() * self.seconds / self.epochs
        share = max(self.shares.values(), default=0.0)
        if share < FIRST:
            return None
        first = self.settling(self.level, self.unsettled[:1])
        epochs = share * (self.climb(self.level) if self.probing else first)
        return self.ahead() * (time.monotonic() - self.began) / epochs if epochs else None

    def line(self) -> str:
        """All of it in a line."""
        running = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
        counts = f"{self.done} of {self.total} done, {len(self.shares)} running" + (f" ({running})" if running else "")
        left = self.time_left()
        return f"{self.stage}: {counts}{self.tail()}" + (f", {left}" if left else "")

    def tail(self) -> str:
        """Failures, and the best score so far."""
        parts = [f"{self.failed} failed"] if self.probing else []
        if self.best is not None:
            parts.append(f"best score {self.best.score:.4f} ({self.best.candidate.name})")
        return "".join(f", {part}" for part in parts)

    def time_left(self) -> str:
        """The time left in words, none before it can be told."""
        left = self.left()
        return "" if left is None else f"about {duration(left)} left"


def height(evaluation: Evaluation | None) -> tuple[int, float]:
    """How far a candidate has come: its rung, then its score."""
    if evaluation is None or evaluation.score is None or not math.isfinite(evaluation.score):
        return -1, 0.0
    return evaluation.rung, evaluation.score
