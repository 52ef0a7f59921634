"""Audit of the early evaluation: how well early scores predict the results of full fine-tuning.

An audit fine-tunes all masks of a level and correlates their early scores with the results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from rich.console import Console
from rich.table import Table

from raymask.core import seeds
from raymask.core.errors import UserError
from raymask.core.records import ConfidenceInterval, Evaluation, LevelRecord, Result
from raymask.core.seeds import derive
from raymask.core.spec import Score, Spec
from raymask.core.stats import spearman_interval
from raymask.data.metrics import selection_metric
from raymask.report.console import say
from raymask.report.text import percent
from raymask.train.worker import eval_scores

BUDGETS = (0.25, 0.5, 1.0)  # shares of the early evaluation

ALL_POINTS = 10**6  # a score window that holds all points of a curve


@dataclass(frozen=True)
class ScoreCorrelation:
    """How one kind of early score at one budget correlates with full fine-tuning.

    Attributes:
        level: The level.
        score: The kind of early score.
        budget: Share in (0, 1] of the early evaluation.
        by_loss: Spearman's rank correlation with the final loss on `validation`; positive when the score is right.
        by_test: Spearman's rank correlation with the mean metric on `test`; positive when the score is right.
        regret: The best mask's mean metric on `test` minus that of the mask with the best early score, >= 0. Of a
            perplexity the metric is -log(perplexity).
    """

    level: int
    score: Score
    budget: float
    by_loss: ConfidenceInterval
    by_test: ConfidenceInterval
    regret: float


def audit_spec(spec: Spec) -> Spec:
    """The spec of the search that an audit runs: it fine-tunes every mask, keeps every point, and has no baseline.

    Args:
        spec: The user's spec.

    Raises:
        UserError: When the spec has fewer than 2 random masks per level.
    """
    if spec.candidates.count < 2:
        raise UserError(
            f"candidates.count: an audit needs 2 or more random masks per level, not {spec.candidates.count}"
        )
    settings = spec.model_dump()
    settings["select"] = {"keep": spec.candidates.count + 1, "beam": False}
    settings["imp"] = {"run": False}
    # with agreement the workers have the dense model, and each point of a curve has all three scores
    score = "loss" if spec.task.kind == "causal-lm" else "agreement"
    settings["early_eval"] |= {"rungs": [1.0], "repeats": 1, "score_window": ALL_POINTS, "score": score}
    return Spec.model_validate(settings)


def rank_correlations(result: Result, last: int, seed: int) -> list[ScoreCorrelation]:
    """The correlations for every level, kind of score and budget.

    Args:
        result: The result of the audit's search.
        last: How many points of a curve make a score: the spec's `early_eval.score_window`.
        seed: The spec's seed, for the bootstrap.
    """
    correlations = []
    for level, records in by_level(result).items():
        final = np.array([record.finetune_result.curve[-1].loss for record in records])
        test = np.array([selection_metric(record.test_metrics) for record in records])
        for kind in (
            kind for kind in get_args(Score) if not math.isnan(eval_scores(records[0].winner.curve[-1])[kind])
        ):
            for budget in BUDGETS:
                early = np.array([early_score(record.winner, kind, budget, last) for record in records])
                rng = derive(seed, seeds.AUDIT, level)
                correlations.append(
                    ScoreCorrelation(
                        level=level,
                        score=kind,
                        budget=budget,
                        by_loss=spearman_interval(early, -final, rng),
                        by_test=spearman_interval(early, test, rng),
                        regret=float(test.max() - test[early.argmax()]),
                    )
                )
    return correlations


def by_level(result: Result) -> dict[int, list[LevelRecord]]:
    """All fine-tuned masks of each level, in the order of their candidates."""
    records: dict[int, list[LevelRecord]] = {level.level: [] for level in result.levels}
    for record in sorted([*result.levels, *result.other_levels], key=lambda record: record.winner.candidate.index):
        records[record.level].append(record)
    return records


def early_score(evaluation: Evaluation, kind: Score, budget: float, last: int) -> float:
    """The early score that a shorter evaluation would give.

    Args:
        evaluation: A complete early evaluation.
        kind: The kind of score.
        budget: Share in (0, 1] of its steps that is used.
        last: How many of the last points within the budget are averaged. Without any, the first point counts.
    """
    curve = evaluation.curve
    within = [point for point in curve if point.step <= budget * curve[-1].step] or list(curve[:1])
    return float(np.mean([eval_scores(point)[kind] for point in within[-last:]]))


def show_audit(console: Console, result: Result, spec: Spec) -> None:
    """Print all masks, and the correlations of each kind of early score.

    Args:
        console: Where the output goes.
        result: The result of the audit's search.
        spec: The user's spec, not that of `audit_spec`.
    """
    console.print(mask_table(result, spec.early_eval.score_window))
    console.print(correlation_table(rank_correlations(result, spec.early_eval.score_window, spec.seed)))
    say(
        console,
        "Rank correlation (Spearman) of early score and full fine-tuning, with 95 % bootstrap intervals over masks: 1 "
        "is the same order, 0 is no relation. Regret: the best mask's metric on `test` minus that of the mask with the "
        "best early score" + (", in -log(perplexity)." if "perplexity" in result.metrics else "."),
    )


def mask_table(result: Result, last: int) -> Table:
    """A table of all fine-tuned masks."""
    table = Table(title=f"{result.model} on {result.task}: all masks, fine-tuned", title_justify="left")
    for head in ("level", "mask", "distance", "early loss", "final loss", *result.metrics):
        table.add_column(head, justify="left" if head == "mask" else "right")
    for level, records in by_level(result).items():
        for record in records:
            early = -early_score(record.winner, "loss", 1.0, last)
            table.add_row(
                str(level),
                record.winner.candidate.name,
                percent(record.winner.distance or 0.0),
                f"{early:.4f}",
                f"{record.finetune_result.curve[-1].loss:.4f}",
                *(f"{record.test_metrics[name]:.4f}" for name in result.metrics),
            )
        table.add_section()
    return table


def correlation_table(correlations: Sequence[ScoreCorrelation]) -> Table:
    """A table of the correlations."""
    table = Table(title="early scores against full fine-tuning", title_justify="left")
    for head in ("level", "score", "budget", "with final loss", "with `test`", "regret"):
        table.add_column(head, justify="left" if head == "score" else "right")
    for correlation in correlations:
        table.add_row(
            str(correlation.level),
            correlation.score,
            f"{correlation.budget:.0%}",
            format_correlation(correlation.by_loss),
            format_correlation(correlation.by_test),
            f"{correlation.regret:.4f}",
        )
    return table


def format_correlation(estimate: ConfidenceInterval) -> str:
    """A correlation with its interval."""
    return f"{estimate.mean:+.2f} ({estimate.low:+.2f} to {estimate.high:+.2f})"
