"""Does the early evaluation pick masks that are truly better?

All masks of a level are fine-tuned in full, and the early scores are held against what came of them.
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
from raymask.core.records import Evaluation, Interval, Level, Result
from raymask.core.seeds import derive
from raymask.core.spec import Score, Spec
from raymask.core.stats import rank_agreement
from raymask.report.terminal import say
from raymask.report.words import percent
from raymask.train.metrics import overall
from raymask.train.worker import scores

BUDGETS = (0.25, 0.5, 1.0)
LOOKS = 10**6  # all of them


@dataclass(frozen=True)
class Judgement:
    """One kind of early score at a `budget`, a share of the early evaluation, held against full fine-tunings.

    `by_loss`, `by_report`: Spearman's rank correlation with the loss on `select` at the end, and with the mean metric
    on `report`, positive when the score is right. `regret`: by how much the pick's mean metric on `report` falls short
    of the best one's; of a perplexity, by how much its logarithm is more.
    """

    level: int
    score: Score
    budget: float
    by_loss: Interval
    by_report: Interval
    regret: float


def audited(spec: Spec) -> Spec:
    """The search that an audit runs: every mask of a level is kept, every look recorded, and no baseline run."""
    if spec.candidates.count < 2:
        raise UserError(
            f"candidates.count: an audit holds two or more random masks against the control, not "
            f"{spec.candidates.count}"
        )
    asked = spec.model_dump()
    asked["select"] = {"keep": spec.candidates.count + 1, "beam": False}
    asked["imp"] = {"run": False}
    # agreement, where there is one, so that the dense model is at hand: each look has all three scores then
    score = "loss" if spec.task.kind == "causal-lm" else "agreement"
    asked["probe"] |= {"rungs": [1.0], "repeats": 1, "last": LOOKS, "score": score}
    return Spec.model_validate(asked)


def judge(result: Result, last: int, seed: int) -> list[Judgement]:
    """Every level, kind of score and budget; `last`: how many looks make a score."""
    found = []
    for level, records in by_level(result).items():
        final = np.array([record.finetuned.curve[-1].loss for record in records])
        report = np.array([overall(record.report) for record in records])
        for kind in (kind for kind in get_args(Score) if not math.isnan(scores(records[0].winner.curve[-1])[kind])):
            for budget in BUDGETS:
                early = np.array([early_score(record.winner, kind, budget, last) for record in records])
                rng = derive(seed, seeds.AUDIT, level)
                found.append(
                    Judgement(
                        level=level,
                        score=kind,
                        budget=budget,
                        by_loss=rank_agreement(early, -final, rng),
                        by_report=rank_agreement(early, report, rng),
                        regret=float(report.max() - report[early.argmax()]),
                    )
                )
    return found


def by_level(result: Result) -> dict[int, list[Level]]:
    """All fine-tuned masks of each level, in the order of their candidates."""
    found: dict[int, list[Level]] = {level.level: [] for level in result.levels}
    for record in sorted([*result.levels, *result.others], key=lambda record: record.winner.candidate.index):
        found[record.level].append(record)
    return found


def early_score(evaluation: Evaluation, kind: Score, budget: float, last: int) -> float:
    """The mean of the `last` looks within a budget; of the first one where there is none yet."""
    curve = evaluation.curve
    within = [point for point in curve if point.step <= budget * curve[-1].step] or list(curve[:1])
    return float(np.mean([scores(point)[kind] for point in within[-last:]]))


def show_audit(console: Console, result: Result, spec: Spec) -> None:
    """The masks, and what each kind of early score says about them; `spec`: as the user gave it."""
    console.print(mask_table(result, spec.probe.last))
    console.print(judgement_table(judge(result, spec.probe.last, spec.seed)))
    say(
        console,
        "Rank correlation (Spearman) of early score and full fine-tuning, with 95 % bootstrap intervals over masks: 1 "
        "is the same order, 0 says nothing. Regret: what the pick lacks on `report` of the best mask there was"
        + (", of the perplexity's logarithm." if "perplexity" in result.metrics else "."),
    )


def mask_table(result: Result, last: int) -> Table:
    """Every mask that was fine-tuned."""
    table = Table(title=f"{result.model} on {result.task}: all masks, fine-tuned", title_justify="left")
    for head in ("level", "mask", "from control", "early loss", "final loss", *result.metrics):
        table.add_column(head, justify="left" if head == "mask" else "right")
    for level, records in by_level(result).items():
        for record in records:
            early = -early_score(record.winner, "loss", 1.0, last)
            table.add_row(
                str(level),
                record.winner.candidate.name,
                percent(record.winner.distance or 0.0),
                f"{early:.4f}",
                f"{record.finetuned.curve[-1].loss:.4f}",
                *(f"{record.report[name]:.4f}" for name in result.metrics),
            )
        table.add_section()
    return table


def judgement_table(judgements: Sequence[Judgement]) -> Table:
    table = Table(title="early scores against full fine-tunings", title_justify="left")
    for head in ("level", "score", "budget", "with final loss", "with `report`", "regret"):
        table.add_column(head, justify="left" if head == "score" else "right")
    for found in judgements:
        table.add_row(
            str(found.level),
            found.score,
            f"{found.budget:.0%}",
            correlation(found.by_loss),
            correlation(found.by_report),
            f"{found.regret:.4f}",
        )
    return table


def correlation(found: Interval) -> str:
    return f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})"
