"""Plots of a run, as the plain data that plotly's JavaScript draws."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from raymask.core.lineage import IMP, branch
from raymask.core.records import BASELINE, RAYMASK, Evaluation, Phase, Span
from raymask.report.summary import LevelSummary, RunSummary
from raymask.report.text import percent, validation_metric
from raymask.report.timeline import TimeAxis, time_axis, worker_host

Plot = dict[str, Any]
"""Traces as `data`, and a `layout` that is merged into the page's own."""

BLUE, ORANGE, GREEN, GREY, RED = "#3b82f6", "#e8850c", "#2a9d8f", "#8b93a1", "#dc4a4a"
CYCLE = (BLUE, ORANGE, GREEN, "#b5569b", "#8a6fd8", "#a3902f", "#5b7a99", "#4f9d4f")
PHASE_COLORS: Mapping[Phase, str] = {
    "dense": GREY,
    "early evaluation": GREEN,
    "fine-tuning": BLUE,
    "IMP baseline": ORANGE,
}
"""Colors by phase. All of them are visible on white and on black."""


def metric_by_sparsity(runs: Mapping[str, RunSummary]) -> Plot:
    """The first metric over the levels, one line per run for raymask and one for the IMP baseline.

    Args:
        runs: Summaries by the name of the run.

    Returns:
        The plot. Metrics are those on `test`; on `validation` as long as one of the runs is not finished.
    """
    traces, ticks = [], {1.0: "dense"}
    ended = all(summary.result for summary in runs.values())
    title = ""
    for color, (name, summary) in zip(colors(len(runs)), runs.items(), strict=True):
        if summary.dense is None:
            continue
        title = title or (next(iter(summary.dense.test_metrics)) if ended else validation_metric(summary.dense)[0])
        ticks |= {1 / (1 - level_summary.sparsity): percent(level_summary.sparsity) for level_summary in summary.levels}
        single = len(runs) == 1
        for side, levels in ((RAYMASK, summary.path), (BASELINE, summary.imp)):
            if not levels:
                continue
            shown = [summary.dense, *levels]
            traces.append(
                {
                    "name": side if single else f"{name}: {side}",
                    "x": [1 / level.density for level in shown],
                    "y": [
                        next(iter(level.test_metrics.values())) if ended else validation_metric(level)[1]
                        for level in shown
                    ],
                    "error_y": whiskers(summary, side, len(shown)) if ended else {},
                    "mode": "lines+markers",
                    "line": {
                        "color": (BLUE if side == RAYMASK else ORANGE) if single else color,
                        "dash": "dot" if side == BASELINE else "solid",
                    },
                    "text": [f"{percent(level.sparsity)}, {level.winner.candidate.name}" for level in shown],
                    "hovertemplate": "%{text}<br>%{y:.4f}",
                }
            )
    return {
        "data": traces,
        "layout": {
            "xaxis": {
                "type": "log",
                "title": {"text": "sparsity"},
                "tickvals": list(ticks),
                "ticktext": list(ticks.values()),
            },
            "yaxis": {"title": {"text": f"{title} on {'test' if ended else 'validation'}"}},
        },
    }


def colors(count: int) -> list[str]:
    """`count` colors; they repeat when there are more than CYCLE has."""
    return [CYCLE[index % len(CYCLE)] for index in range(count)]


def whiskers(summary: RunSummary, side: str, points: int) -> Plot:
    """Error bars of the first metric at both ends of a line: its 95 % intervals.

    Args:
        summary: The run; without a result all error bars are 0.
        side: RAYMASK or BASELINE, the row whose interval stands at the last level.
        points: Number of points on the line; the first one is the dense model.
    """
    rows = {row.name: row for row in summary.result.models} if summary.result else {}
    above, below = [0.0] * points, [0.0] * points
    for index, name in ((0, "dense"), (-1, side)):
        if name in rows:
            interval = next(iter(rows[name].intervals.values()))
            above[index], below[index] = interval.high - interval.mean, interval.mean - interval.low
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1}


def curves(level_summary: LevelSummary) -> Plot:
    """Loss on `validation` during a level's early evaluations, one line per candidate and repeat."""
    by_candidate: dict[tuple[int, int], list[Evaluation]] = {}
    for evaluation in sorted(level_summary.evaluations, key=lambda evaluation: evaluation.rung):
        if evaluation.ok:
            by_candidate.setdefault((evaluation.candidate.index, evaluation.repeat), []).append(evaluation)
    # what is highlighted is drawn last, on top of the others
    ordered = sorted(by_candidate.values(), key=lambda evaluations: highlight(evaluations[0], level_summary))
    traces, named = [], set()
    for evaluations in ordered:
        color, kind = appearance(evaluations[0], level_summary)
        points = [point for evaluation in evaluations for point in evaluation.curve]
        traces.append(
            {
                "name": kind,
                "legendgroup": kind,
                "showlegend": kind not in named,
                "x": [point.step for point in points],
                "y": [point.loss for point in points],
                "mode": "lines" if len(points) > 1 else "markers",
                "line": {"color": color, "width": 1 if kind == "other candidates" else 3},
                "marker": {"color": color},
                "opacity": 0.6 if kind == "other candidates" else 1,
                "hovertemplate": f"{described(evaluations[-1])}<br>step %{{x}}, loss %{{y:.4f}}",
            }
        )
        named.add(kind)
    return {
        "data": traces,
        "layout": {"xaxis": {"title": {"text": "steps"}}, "yaxis": {"title": {"text": "loss on validation"}}},
    }


def highlight(evaluation: Evaluation, level_summary: LevelSummary) -> int:
    """How much a candidate is highlighted: 2 for a winner, 1 for a magnitude mask, 0 for all others."""
    return 2 if evaluation.candidate.index in level_summary.winners else int(evaluation.candidate.is_magnitude)


def appearance(evaluation: Evaluation, level_summary: LevelSummary) -> tuple[str, str]:
    """A candidate's color and its name in the legend."""
    styles = ((GREY, "other candidates"), (ORANGE, "magnitude mask"), (BLUE, "winner"))
    return styles[highlight(evaluation, level_summary)]


def described(evaluation: Evaluation) -> str:
    """A candidate's hover text: name, sampling ratio and distance."""
    noise = evaluation.candidate.noise
    ratio = f", sampling ratio {noise.sampling_ratio:g}" if noise else ""
    distance = f", distance {percent(evaluation.distance)}" if evaluation.distance else ""
    return f"{evaluation.candidate.name}{ratio}{distance}"


def highest_rung_scores(level_summary: LevelSummary) -> list[tuple[Evaluation, float]]:
    """Every random candidate's evaluation at the highest rung that it reached, and the magnitude mask's score there.

    The magnitude mask is the one of the same parent branch. Repeats and failed evaluations are left out, and so are
    candidates without such a score to compare with.
    """
    scores = {
        (evaluation.candidate.parent_branch, evaluation.rung): evaluation.score
        for evaluation in level_summary.evaluations
        if evaluation.candidate.is_magnitude and evaluation.score is not None and not evaluation.repeat
    }
    highest: dict[int, Evaluation] = {}
    for evaluation in sorted(level_summary.evaluations, key=lambda evaluation: evaluation.rung):
        if evaluation.score is not None and not evaluation.repeat and not evaluation.candidate.is_magnitude:
            highest[evaluation.candidate.index] = evaluation
    pairs = [
        (evaluation, scores.get((evaluation.candidate.parent_branch, evaluation.rung)))
        for evaluation in highest.values()
    ]
    return [(evaluation, score) for evaluation, score in pairs if score is not None]


def scores_by(summary: RunSummary, what: str) -> Plot:
    """By how much every random candidate's score exceeds that of the magnitude mask of its parent.

    Args:
        summary: The run.
        what: The x axis: "distance", the distance from the magnitude mask, or "ratio", the sampling ratio.
    """
    traces = []
    for color, level_summary in zip(colors(len(summary.levels)), summary.levels, strict=True):
        gains = [(evaluation, evaluation.score - score) for evaluation, score in highest_rung_scores(level_summary)]  # type: ignore[operator]
        if not gains:
            continue
        # winners last: the legend shows the first one's symbol
        gains.sort(key=lambda item: item[0].candidate.index in level_summary.winners)
        wins = [evaluation.candidate.index in level_summary.winners for evaluation, _ in gains]
        traces.append(
            {
                "name": percent(level_summary.sparsity),
                "x": [
                    (evaluation.distance or 0.0) if what == "distance" else evaluation.candidate.noise.sampling_ratio  # type: ignore[union-attr]
                    for evaluation, _ in gains
                ],
                "y": [gain for _, gain in gains],
                "mode": "markers",
                "marker": {
                    "color": color,
                    "size": [14 if won else 9 for won in wins],
                    "symbol": ["star" if won else "circle" for won in wins],
                },
                "text": [described(evaluation) for evaluation, _ in gains],
                "hovertemplate": "%{text}<br>%{y:+.4f}",
            }
        )
    distance = {"title": {"text": "distance from the magnitude mask"}, "tickformat": ".0%", "rangemode": "tozero"}
    ratios = sorted(set(summary.spec.candidates.sampling_ratios))
    ratio = {
        "title": {"text": "sampling ratio"},
        "type": "log",
        "tickvals": ratios,
        "ticktext": [f"{value:g}" for value in ratios],
    }
    axis = distance if what == "distance" else ratio
    return {"data": traces, "layout": {"xaxis": axis, "yaxis": {"title": {"text": "score minus magnitude mask's"}}}}


def density_plot(shares: Mapping[str, float]) -> Plot:
    """Heat map of the share of weights that each matrix keeps: kinds of matrices by layer number.

    Args:
        shares: Density in [0, 1] by parameter name. A name without a layer number goes into the first column.
    """
    numbers = {name: re.search(r"(?<![^.])(\d+)(?![^.])", name) for name in shares}
    kinds = {name: kind(name, number[1] if number else "") for name, number in numbers.items()}
    layers = sorted({int(number[1]) for number in numbers.values() if number}) or [0]
    rows = list(dict.fromkeys(kinds.values()))
    table: list[list[float | None]] = [[None] * len(layers) for _ in rows]
    for name, share in shares.items():
        number = numbers[name]
        table[rows.index(kinds[name])][layers.index(int(number[1])) if number else 0] = share
    trace = {
        "type": "heatmap",
        "x": [str(layer) for layer in layers],
        "y": rows,
        "z": table,
        "colorscale": [[0, "rgba(59, 130, 246, 0.05)"], [1, "rgba(59, 130, 246, 0.7)"]],
        "zmin": 0,
        "zmax": max(shares.values(), default=1.0),
        "texttemplate": "%{z:.3~p}" if len(layers) <= 12 else "",
        "hovertemplate": "layer %{x}, %{y}<br>keeps %{z:.3%}<extra></extra>",
        "colorbar": {"tickformat": ".3~p", "thickness": 12},
    }
    height = 120 + 34 * len(rows)
    return {
        "data": [trace] if shares else [],
        "layout": {
            "height": height,
            "xaxis": {"title": {"text": "layer"}, "type": "category"},
            "yaxis": {"autorange": "reversed", "automargin": True},
        },
    }


def kind(name: str, layer: str) -> str:
    """The part of a matrix's name after its layer number, without `.weight`."""
    inside = name.partition(f".{layer}.")[2] if layer else name
    return (inside or name).removesuffix(".weight")


def tree(summary: RunSummary) -> Plot:
    """Which mask was made from which parent, from the dense model to the last level; the selected path is bold."""
    lineages = list(dict.fromkeys(name for level_summary in summary.levels for name in level_summary.finetuned))
    rows = {name: -row for row, name in enumerate(lineages)}
    traces = []
    for level_summary in summary.levels:
        for name, record in level_summary.finetuned.items():
            candidate = record.winner.candidate
            parent = name if name == IMP else branch(candidate.parent_branch)
            bold = record in summary.path
            color = ORANGE if name == IMP else BLUE if bold else GREY
            start = rows.get(parent, 0) if level_summary.level > 1 else 0
            traces.append(
                {
                    "x": [level_summary.level - 1, level_summary.level],
                    "y": [start, rows[name]],
                    "mode": "lines+markers+text",
                    "line": {"color": color, "width": 4 if bold else 2, "dash": "dot" if name == IMP else "solid"},
                    "marker": {"color": color, "size": [0, 14]},
                    "text": [
                        "",
                        "IMP" if name == IMP else "magnitude" if candidate.is_magnitude else str(candidate.index),
                    ],
                    "textposition": "top center",
                    "showlegend": False,
                    "hovertemplate": f"{candidate.name}, {percent(record.sparsity)}, loss on validation "
                    f"{record.finetune_result.best_eval.loss:.4f}<extra></extra>",
                }
            )
    ticks = [0, *(level_summary.level for level_summary in summary.levels)]
    names = ["dense", *(percent(level_summary.sparsity) for level_summary in summary.levels)]
    return {
        "data": traces,
        "layout": {
            "height": 160 + 60 * len(rows),
            "xaxis": {"tickvals": ticks, "ticktext": names, "range": [-0.3, len(names) - 0.6], "zeroline": False},
            "yaxis": {"visible": False, "range": [-len(rows) + 0.4, 0.8]},
        },
    }


def worker_plot(summary: RunSummary) -> Plot:
    """What each worker did when. Empty is idle, and a cross is an early evaluation that failed."""
    axis = time_axis(summary.timeline)
    names = list(dict.fromkeys(worker_host(piece.worker) for piece in summary.timeline))
    traces: list[Plot] = []
    for phase, color in PHASE_COLORS.items():
        pieces = [piece for piece in summary.timeline if piece.phase == phase]
        if pieces:
            traces.append({"name": phase, **worker_bars(pieces, axis, color)})
    failed = [
        evaluation
        for level_summary in summary.levels
        for evaluation in level_summary.evaluations
        if not evaluation.ok and evaluation.started
    ]
    if failed:
        traces.append({"name": "failed", **failure_crosses(failed, axis)})
    return {
        "data": traces,
        "layout": {
            "height": 150 + 34 * min(len(names), 30),
            "barmode": "overlay",
            "xaxis": {"title": {"text": "<br>".join(axis.scaled("seconds"))}},
            "yaxis": {"type": "category", "categoryarray": names[::-1], "automargin": True},
        },
    }


def worker_bars(pieces: Sequence[Span], axis: TimeAxis, color: str) -> Plot:
    """The bars of one phase's tasks, in the rows of their workers."""
    return {
        "type": "bar",
        "orientation": "h",
        "y": [worker_host(piece.worker) for piece in pieces],
        "base": [axis.at(piece.started) for piece in pieces],
        "x": [piece.seconds for piece in pieces],
        "marker": {"color": color, "line": {"width": 0.5}},
        "text": [f"level {piece.level}" for piece in pieces],
        "textposition": "none",
        "hovertemplate": "%{text}, %{x:.1f} s",
    }


def failure_crosses(failed: Sequence[Evaluation], axis: TimeAxis) -> Plot:
    """Crosses where early evaluations failed, in the rows of their workers."""
    return {
        "x": [axis.at(evaluation.started + evaluation.seconds) for evaluation in failed],
        "y": [worker_host(evaluation.worker) for evaluation in failed],
        "mode": "markers",
        "marker": {"color": RED, "symbol": "x", "size": 12},
        "text": [f"{evaluation.candidate.name}: {(evaluation.error or '')[:80]}" for evaluation in failed],
        "hovertemplate": "%{text}",
    }
