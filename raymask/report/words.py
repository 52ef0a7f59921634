"""How are figures put into words, the same everywhere?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from raymask.core.records import CONTROL, Evaluation, Interval, Level, Result, Row
from raymask.store import IMP


def percent(share: float) -> str:
    return f"{share:.2%}"


def blocks(kind: str) -> str:
    """What a model's repeated blocks are together, by its task's kind."""
    return "decoder" if kind == "causal-lm" else "encoder"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def epochs(count: float) -> str:
    return f"{count:g} epoch{'' if count == 1 else 's'}"


def interval(found: Interval) -> str:
    return f"{found.mean:+.4f} (95 % interval {found.low:+.4f} to {found.high:+.4f})"


def verdict(result: Result) -> str:
    """The selected model against the baseline, and which of the models have one answer only."""
    lines = constant_lines(result.rows)
    if lines:
        dense = result.rows[0].always is not None
        lines.append(f"Train longer ({'dense.epochs' if dense else 'finetune.epochs, probe.epochs, more levels'}).")
    return " ".join([compared(result), *lines])


def constant_lines(rows: Sequence[Row]) -> list[str]:
    """Which models tell no two rows of `report` apart, however good their figures look."""
    return [
        f"{row.name} answers {row.always!r} to every row of `report`: its figures are this constant answer's."
        for row in rows
        if row.always is not None
    ]


def compared(result: Result) -> str:
    """The selected model against the baseline: which is better, and whether that is more than noise."""
    if result.gain is None:
        return "There was no baseline to compare with (imp.run: false, or no random candidates)."
    metric = "the metrics' mean" if len(result.metrics) > 1 else result.metrics[0]
    if metric == "perplexity":
        metric = "minus the log of the perplexity"  # of which more is better
    better = "the selected mask is better" if result.gain.mean > 0 else "the control is better"
    finding = "within noise" if result.gain.within_noise else f"more than noise: {better}"
    return f"Selected against control on `report`, {metric}: {interval(result.gain)}, {finding}."


def evaluated_line(evaluation: Evaluation, rungs: Sequence[float] = (1.0,)) -> str:
    """One early evaluation; `rungs`: the spec's."""
    if not evaluation.ok:
        return f"{evaluation.candidate.name}: failed: {evaluation.error}"
    last = evaluation.curve[-1]
    stray = "" if evaluation.candidate.is_control else f", {percent(evaluation.distance or 0.0)} from control"
    part = f" after {rungs[evaluation.rung]:.0%}" if len(rungs) > 1 else ""
    part += f", order {evaluation.order + 1}" if evaluation.order else ""
    return (
        f"{evaluation.candidate.name}{part}: score {evaluation.score:.4f}, last loss {last.loss:.4f}, last metric "
        f"{last.metric:.4f}{stray}, {duration(evaluation.seconds)}"
    )


def scored_line(result: Result) -> str:
    """How much of `select` the early evaluations looked at."""
    part, whole = result.scored
    return f"Candidates were scored on {part:,} of the {whole:,} rows of `select`, the same for all."


def on_select(level: Level) -> tuple[str, float]:
    """What a fine-tuned model's metric on `select` is called, and how large it is."""
    metric = level.finetuned.kept.metric
    return ("perplexity", math.exp(-metric)) if "perplexity" in level.report else ("metric", metric)


def settled_line(lineage: str, level: Level) -> str:
    """One finished level."""
    who = "dense" if level.level == 0 else CONTROL if lineage == IMP else f"selected ({level.winner.candidate.name})"
    kept, (named, value) = level.finetuned.kept, on_select(level)
    gain = ""
    if level.gain:
        noise = ", within noise" if level.gain.within_noise else ""
        gain = f"; early loss below the control's by {interval(level.gain)}{noise}"
    if level.confidence is not None:
        gain += f"; the lowest of {level.evaluated} with a probability of {level.confidence:.0%}"
    return (
        f"{who}, sparsity {percent(level.sparsity)}: select loss {kept.loss:.4f}, {named} {value:.4f}, "
        f"{duration(level.finetuned.seconds)}{gain}"
    )
