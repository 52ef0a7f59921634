"""Numbers and results as text, shared by the console, the report and the model card."""

from __future__ import annotations

import math
from collections.abc import Sequence

from raymask.core.lineage import IMP
from raymask.core.records import BASELINE, RAYMASK, ConfidenceInterval, Evaluation, LevelRecord, ModelMetrics, Result


def percent(share: float) -> str:
    """A share in [0, 1] as a percentage with two decimals."""
    return f"{share:.2%}"


def blocks(kind: str) -> str:
    """The name of a model's repeated blocks, by the kind of its task."""
    return "decoder" if kind == "causal-lm" else "encoder"


def metric_label(name: str, classes: Sequence[str], positive: int) -> str:
    """A metric's name; for the F1 of two classes also the class that it is of, by its number `positive`."""
    return f"f1 of {classes[positive]!r}" if name == "f1" and len(classes) == 2 else name


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def epochs(count: float) -> str:
    """A number of epochs with its unit."""
    return f"{count:g} epoch{'' if count == 1 else 's'}"


def interval(estimate: ConfidenceInterval) -> str:
    """A signed mean with its 95 % interval."""
    return f"{estimate.mean:+.4f} (95 % interval {estimate.low:+.4f} to {estimate.high:+.4f})"


def verdict(result: Result) -> str:
    """The search's model against the IMP baseline, and a warning for each model that predicts one constant."""
    lines = constant_lines(result.models)
    if lines:
        dense = result.models[0].constant_prediction is not None
        lines.append(
            f"Train longer ({'dense.epochs' if dense else 'finetune.epochs, early_eval.epochs, more levels'})."
        )
    return " ".join([compare_with_baseline(result), *lines])


def constant_lines(rows: Sequence[ModelMetrics]) -> list[str]:
    """A warning for each model that predicts the same for every row of `test`, however good its metrics look."""
    return [
        f"{row.name} predicts {row.constant_prediction!r} for every row of `test`: its metrics are those of a constant "
        "prediction."
        for row in rows
        if row.constant_prediction is not None
    ]


def compare_with_baseline(result: Result) -> str:
    """The search's model against the IMP baseline: which is better, and whether the difference is more than noise."""
    if result.gain is None:
        return "There is no baseline to compare with (imp.run: false, or no random candidates)."
    metric = "the metrics' mean" if len(result.metrics) > 1 else result.metrics[0]
    if metric == "perplexity":
        metric = "-log(perplexity)"  # higher is better
    better = f"{RAYMASK if result.gain.mean > 0 else BASELINE} is better"
    finding = "within noise" if result.gain.within_noise else f"more than noise: {better}"
    return f"{RAYMASK} against {BASELINE} on `test`, {metric}: {interval(result.gain)}, {finding}."


def evaluated_line(evaluation: Evaluation, rungs: Sequence[float] = (1.0,)) -> str:
    """One early evaluation as a line.

    Args:
        evaluation: The early evaluation.
        rungs: The spec's `early_eval.rungs`, shares in (0, 1].
    """
    if not evaluation.ok:
        return f"{evaluation.candidate.name}: failed: {evaluation.error}"
    last = evaluation.curve[-1]
    distance = "" if evaluation.candidate.is_magnitude else f", distance {percent(evaluation.distance or 0.0)}"
    part = f" after {rungs[evaluation.rung]:.0%}" if len(rungs) > 1 else ""
    part += f", repeat {evaluation.repeat}" if evaluation.repeat else ""
    return (
        f"{evaluation.candidate.name}{part}: score {evaluation.score:.4f}, last loss {last.loss:.4f}, last metric "
        f"{last.metric:.4f}{distance}, {duration(evaluation.seconds)}"
    )


def scored_line(result: Result) -> str:
    """How many rows of `validation` the early evaluations used."""
    scored, total = result.rows_scored
    return f"Candidates were scored on {scored:,} of the {total:,} rows of `validation`, the same for all."


def validation_metric(level: LevelRecord) -> tuple[str, float]:
    """Name and value of a fine-tuned model's metric on `validation`.

    The name is "perplexity" for a language model, otherwise "metric": the mean of the task's metrics.
    """
    metric = level.finetune_result.best_eval.metric
    return ("perplexity", math.exp(-metric)) if "perplexity" in level.test_metrics else ("metric", metric)


def level_line(lineage: str, level: LevelRecord) -> str:
    """One finished level of a lineage as a line."""
    winner = f"{RAYMASK} ({level.winner.candidate.name})"
    name = "dense" if level.level == 0 else BASELINE if lineage == IMP else winner
    best, (metric_name, metric) = level.finetune_result.best_eval, validation_metric(level)
    gain = ""
    if level.gain:
        noise = ", within noise" if level.gain.within_noise else ""
        gain = f"; early loss below the magnitude mask's by {interval(level.gain)}{noise}"
    if level.win_probability is not None:
        gain += f"; the lowest of {level.num_evaluated} with a probability of {level.win_probability:.0%}"
    return (
        f"{name}, sparsity {percent(level.sparsity)}: validation loss {best.loss:.4f}, {metric_name} {metric:.4f}, "
        f"{duration(level.finetune_result.seconds)}{gain}"
    )
