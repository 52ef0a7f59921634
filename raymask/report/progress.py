"""Progress of a search: counts and an estimate of the time left."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Mapping, Sequence

from raymask.core.lineage import DENSE, IMP, SEARCH, branches
from raymask.core.recipe import (
    dense_distillation_config,
    early_eval_epochs,
    finetune_config,
    has_baseline,
    level_evaluations,
    resolve,
)
from raymask.core.records import Evaluation, LevelRecord
from raymask.core.spec import Spec
from raymask.core.successive_halving import rung_fraction
from raymask.report.text import duration

MIN_SHARE_DONE = 0.02  # the share of a task that must be done before its speed is extrapolated


class Progress:
    """Counts and a time estimate, updated by a Callback's events.

    Attributes:
        recipe: The resolved spec.
        stage: Title of the current phase.
        level: Its level; 0 is the dense model.
        total: Number of tasks of the current phase; speculative evaluations and repeats may raise it.
        done: Tasks of the phase that ended, failed ones included.
        failed: Early evaluations of the phase that failed.
        evaluating: Whether the current phase is an early evaluation.
        best: The best early evaluation of the phase so far: the highest rung first, then the highest score.
        shares: Share in [0, 1] that is done of each running task, by task name.
        pending_lineages: Lineages of the level that are not fine-tuned yet.
        began: `time.monotonic()` when the first task of the phase was running.
        num_workers: Estimated number of workers: the tasks that run at once while others wait, or the most seen so far.
        seconds: Worker time of all finished training, in seconds.
        epochs: Epochs of all finished training.
    """

    def __init__(self, spec: Spec) -> None:
        self.recipe = resolve(spec)
        self.stage = ""
        self.level = self.total = self.done = self.failed = 0
        self.evaluating = False
        self.best: Evaluation | None = None
        self.shares: dict[str, float] = {}
        self.pending_lineages = self.lineages(0)
        self.began = time.monotonic()
        self.num_workers = 1
        self.seconds = self.epochs = 0.0

    def on_phase_begin(self, stage: str, level: int, total: int, known: Sequence[Evaluation] | None) -> None:
        """Start the counts of a phase; see `Callback.on_phase_begin`."""
        if level:
            self.pending_lineages = self.lineages(level)
            if known is None:
                # Fine-tuning after an early evaluation: the search's lineages come first. Without one only the last
                # lineages are left: an earlier start has done the others.
                evaluated = self.evaluating and level == self.level
                self.pending_lineages = self.pending_lineages[:total] if evaluated else self.pending_lineages[-total:]
        self.stage, self.level, self.total = stage, level, total
        self.evaluating, self.done, self.failed, self.best = known is not None, 0, 0, None
        self.shares = {}
        for evaluation in known or ():
            self.count(evaluation)

    def count(self, evaluation: Evaluation) -> None:
        """Count an early evaluation that ended, and keep the best one."""
        self.done += 1
        self.total = max(self.total, self.done)  # speculative evaluations are not in the planned total
        self.failed += not evaluation.ok
        if height(evaluation) > height(self.best):
            self.best = evaluation

    def on_progress(self, shares: Mapping[str, float]) -> None:
        """Take over the running tasks; see `Callback.on_progress`."""
        if not self.shares:
            self.began = time.monotonic()
        self.shares = dict(shares)
        if shares and not self.level and DENSE not in shares:  # an earlier start has trained the dense model
            self.pending_lineages = self.pending_lineages[-1:]
        if self.waiting and shares:  # tasks wait, so every worker is busy: their number may have gone up or down
            self.num_workers = len(shares)
        self.num_workers = max(self.num_workers, len(shares))

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Count a finished early evaluation and measure its speed."""
        self.count(evaluation)
        self.shares.pop(evaluation.candidate.name, None)
        if evaluation.ok:
            section = self.recipe.spec.early_eval
            self.measure(
                evaluation.seconds, section.epochs * rung_fraction(section.rungs, evaluation.rung, evaluation.repeat)
            )

    def on_level_end(self, lineage: str, level: LevelRecord) -> None:
        """Count a finished fine-tuning and measure its speed."""
        self.done += 1
        if self.num_workers == 1:
            self.shares = {}
        if lineage in self.pending_lineages:
            self.pending_lineages.remove(lineage)
        self.measure(level.finetune_result.seconds, self.finetune_epochs(level.level, lineage))

    def measure(self, seconds: float, epochs: float) -> None:
        """Add finished training to the totals that the speed is computed from; tasks without training do not count."""
        if epochs:
            self.seconds += seconds
            self.epochs += epochs

    @property
    def waiting(self) -> int:
        """Number of tasks of the phase that no worker has yet."""
        return max(0, self.total - self.done - len(self.shares))

    def lineages(self, level: int) -> list[str]:
        """The lineages that are fine-tuned at a level, in this order."""
        if level:
            return [*branches(self.recipe.spec), *([IMP] if has_baseline(self.recipe.spec) else [])]
        return [DENSE, SEARCH] if dense_distillation_config(self.recipe.spec) else [DENSE]

    def finetune_epochs(self, level: int, lineage: str) -> float:
        """Epochs of one fine-tuning."""
        if level:
            return finetune_config(self.recipe, level, imp=lineage == IMP).epochs
        dense = self.recipe.spec.dense
        return dense.epochs if lineage == DENSE else dense.distill_epochs

    def finetune_time(self, level: int, lineages: Sequence[str], share: float = 0.0) -> float:
        """Time of a level's fine-tunings, in epochs that follow one another; they run in parallel when workers allow.

        Args:
            level: The level.
            lineages: What is fine-tuned.
            share: Share in [0, 1] of the first one that is done already.
        """
        epochs = [self.finetune_epochs(level, lineage) for lineage in lineages] or [0.0]
        if self.num_workers > 1:
            return max(max(epochs), sum(epochs) / self.num_workers) * (1 - share)
        return sum(epochs) - epochs[0] * share

    def evaluation_rounds_left(self, num_waiting: int) -> float:
        """Time until the running early evaluations and `num_waiting` others are done, in whole evaluations."""
        loads = [1 - share for share in self.shares.values()] if self.evaluating else []
        loads += [0.0] * (self.num_workers - len(loads))
        heapq.heapify(loads)
        for _ in range(num_waiting):  # the next one goes to the worker that is free first
            heapq.heapreplace(loads, loads[0] + 1)
        return max(loads)

    def epochs_per_evaluation(self, level: int) -> float:
        """Average epochs of one of a level's early evaluations."""
        count = level_evaluations(self.recipe, level)
        return early_eval_epochs(self.recipe, level) / count if count else 0.0

    def evaluation_rounds(self, level: int) -> int:
        """How many early evaluations of a level one worker runs one after another."""
        return math.ceil(level_evaluations(self.recipe, level) / self.num_workers)

    def epochs_left(self) -> float:
        """Time until the end of the search in epochs that follow one another, at the current number of workers."""
        later = range(self.level + 1, len(self.recipe.densities) + 1)
        rest = sum(
            self.evaluation_rounds(level) * self.epochs_per_evaluation(level)
            + self.finetune_time(level, self.lineages(level))
            for level in later
        )
        if self.evaluating:
            evaluations = self.evaluation_rounds_left(self.waiting) * self.epochs_per_evaluation(self.level)
            return rest + evaluations + self.finetune_time(self.level, self.pending_lineages)
        return rest + self.finetune_time(self.level, self.pending_lineages, min(self.shares.values(), default=0.0))

    def left(self) -> float | None:
        """Estimated seconds until the end of the search; None as long as nothing is known about the speed."""
        if self.epochs:
            return self.epochs_left() * self.seconds / self.epochs
        share = max(self.shares.values(), default=0.0)
        if share < MIN_SHARE_DONE:
            return None
        first = self.finetune_time(self.level, self.pending_lineages[:1])
        epochs = share * (self.epochs_per_evaluation(self.level) if self.evaluating else first)
        return self.epochs_left() * (time.monotonic() - self.began) / epochs if epochs else None

    def line(self) -> str:
        """Phase, counts, running tasks, best score and time left in one line."""
        running = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
        counts = f"{self.done} of {self.total} done, {len(self.shares)} running" + (f" ({running})" if running else "")
        left = self.time_left()
        return f"{self.stage}: {counts}{self.tail()}" + (f", {left}" if left else "")

    def tail(self) -> str:
        """Number of failures and the best score so far, with a leading comma; empty when there is nothing to say."""
        parts = [f"{self.failed} failed"] if self.evaluating else []
        if self.best is not None:
            parts.append(f"best score {self.best.score:.4f} ({self.best.candidate.name})")
        return "".join(f", {part}" for part in parts)

    def time_left(self) -> str:
        """The time left as text; empty while it is unknown."""
        left = self.left()
        return "" if left is None else f"about {duration(left)} left"


def height(evaluation: Evaluation | None) -> tuple[int, float]:
    """Sort key of an early evaluation: rung, then score. Without a finite score it is (-1, 0)."""
    if evaluation is None or evaluation.score is None or not math.isfinite(evaluation.score):
        return -1, 0.0
    return evaluation.rung, evaluation.score
