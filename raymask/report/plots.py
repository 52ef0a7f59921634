"""What does a run look like? Each plot is the plain data that plotly's JavaScript draws."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from raymask.core.records import CONTROL, SELECTED, Evaluation, Purpose
from raymask.report.figures import Figures, Stand
from raymask.report.timeline import clock, short
from raymask.report.words import on_select, percent
from raymask.store import IMP, branch

Plot = dict[str, Any]
"""Traces as `data`, and a `layout` to be laid over the page's own."""

BLUE, ORANGE, GREEN, GREY, RED = "#3b82f6", "#e8850c", "#2a9d8f", "#8b93a1", "#dc4a4a"
CYCLE = (BLUE, ORANGE, GREEN, "#b5569b", "#8a6fd8", "#a3902f", "#5b7a99", "#4f9d4f")
KINDS: Mapping[Purpose, str] = {
    "dense": GREY,
    "early evaluation": GREEN,
    "fine-tuning": BLUE,
    "baseline (IMP)": ORANGE,
}
"""All are seen on white and on black."""


def metric_by_sparsity(runs: Mapping[str, Figures]) -> Plot:
    """The first metric on `report` over the levels, of every run by its name; before the end, that on `select`."""
    traces, ticks = [], {1.0: "dense"}
    ended = all(figures.result for figures in runs.values())
    title = ""
    for color, (name, figures) in zip(colors(len(runs)), runs.items(), strict=True):
        if figures.dense is None:
            continue
        title = title or (next(iter(figures.dense.report)) if ended else on_select(figures.dense)[0])
        ticks |= {1 / (1 - stand.sparsity): percent(stand.sparsity) for stand in figures.levels}
        alone = len(runs) == 1
        for side, levels in ((SELECTED, figures.path), (CONTROL, figures.imp)):
            if not levels:
                continue
            shown = [figures.dense, *levels]
            traces.append(
                {
                    "name": side if alone else f"{name}: {side}",
                    "x": [1 / level.density for level in shown],
                    "y": [next(iter(level.report.values())) if ended else on_select(level)[1] for level in shown],
                    "error_y": whiskers(figures, side, len(shown)) if ended else {},
                    "mode": "lines+markers",
                    "line": {
                        "color": (BLUE if side == SELECTED else ORANGE) if alone else color,
                        "dash": "dot" if side == CONTROL else "solid",
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
            "yaxis": {"title": {"text": f"{title} on {'report' if ended else 'select'}"}},
        },
    }


def colors(count: int) -> list[str]:
    """As many as asked for; they come again where there are many."""
    return [CYCLE[index % len(CYCLE)] for index in range(count)]


def whiskers(figures: Figures, side: str, points: int) -> Plot:
    """The first metric's intervals at a line's ends, the dense model and the last level of a side."""
    rows = {row.name: row for row in figures.result.rows} if figures.result else {}
    above, below = [0.0] * points, [0.0] * points
    for place, name in ((0, "dense"), (-1, side)):
        if name in rows:
            found = next(iter(rows[name].intervals.values()))
            above[place], below[place] = found.high - found.mean, found.mean - found.low
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1}


def curves(stand: Stand) -> Plot:
    """Loss on `select` of a level's early evaluations, look by look."""
    ways: dict[tuple[int, int], list[Evaluation]] = {}
    for found in sorted(stand.evaluations, key=lambda found: found.rung):
        if found.ok:
            ways.setdefault((found.candidate.index, found.order), []).append(found)
    ranked = sorted(ways.values(), key=lambda way: rank(way[0], stand))  # what stands out is drawn last
    traces, named = [], set()
    for way in ranked:
        color, kind = appearance(way[0], stand)
        points = [point for found in way for point in found.curve]
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
                "hovertemplate": f"{described(way[-1])}<br>step %{{x}}, loss %{{y:.4f}}",
            }
        )
        named.add(kind)
    return {
        "data": traces,
        "layout": {"xaxis": {"title": {"text": "steps"}}, "yaxis": {"title": {"text": "loss on select"}}},
    }


def rank(found: Evaluation, stand: Stand) -> int:
    """0, 1 or 2: others, controls, winners."""
    return 2 if found.candidate.index in stand.winners else int(found.candidate.is_control)


def appearance(found: Evaluation, stand: Stand) -> tuple[str, str]:
    """A candidate's colour, and what it is called in a legend."""
    return ((GREY, "other candidates"), (ORANGE, "control"), (BLUE, "winner"))[rank(found, stand)]


def described(found: Evaluation) -> str:
    """A candidate in the few words that fit beside a pointer."""
    noise = found.candidate.noise
    ratio = f", ratio {noise.ratio:g}" if noise else ""
    distance = f", {percent(found.distance)} from control" if found.distance else ""
    return f"{found.candidate.name}{ratio}{distance}"


def last_looks(stand: Stand) -> list[tuple[Evaluation, float]]:
    """Every random candidate's evaluation at the highest rung that it reached, with the score that its control has
    there."""
    scores = {
        (found.candidate.parent, found.rung): found.score
        for found in stand.evaluations
        if found.candidate.is_control and found.score is not None and not found.order
    }
    best: dict[int, Evaluation] = {}
    for found in sorted(stand.evaluations, key=lambda found: found.rung):
        if found.score is not None and not found.order and not found.candidate.is_control:
            best[found.candidate.index] = found
    pairs = [(found, scores.get((found.candidate.parent, found.rung))) for found in best.values()]
    return [(found, score) for found, score in pairs if score is not None]


def scores_by(figures: Figures, what: str) -> Plot:
    """How much better than its control every candidate scored, by its `distance` from the control or its `ratio`."""
    traces = []
    for color, stand in zip(colors(len(figures.levels)), figures.levels, strict=True):
        looks = [(found, found.score - score) for found, score in last_looks(stand)]  # type: ignore[operator]
        if not looks:
            continue
        looks.sort(key=lambda look: look[0].candidate.index in stand.winners)  # a legend shows the first one's symbol
        wins = [found.candidate.index in stand.winners for found, _ in looks]
        traces.append(
            {
                "name": percent(stand.sparsity),
                "x": [
                    (found.distance or 0.0) if what == "distance" else found.candidate.noise.ratio  # type: ignore[union-attr]
                    for found, _ in looks
                ],
                "y": [gain for _, gain in looks],
                "mode": "markers",
                "marker": {
                    "color": color,
                    "size": [14 if won else 9 for won in wins],
                    "symbol": ["star" if won else "circle" for won in wins],
                },
                "text": [described(found) for found, _ in looks],
                "hovertemplate": "%{text}<br>%{y:+.4f}",
            }
        )
    distance = {"title": {"text": "distance from the control"}, "tickformat": ".0%", "rangemode": "tozero"}
    ratios = sorted(set(figures.spec.candidates.ratios))
    ratio = {
        "title": {"text": "sampling ratio"},
        "type": "log",
        "tickvals": ratios,
        "ticktext": [f"{value:g}" for value in ratios],
    }
    axis = distance if what == "distance" else ratio
    return {"data": traces, "layout": {"xaxis": axis, "yaxis": {"title": {"text": "score above control's"}}}}


def densities(shares: Mapping[str, float]) -> Plot:
    """What each matrix keeps: kinds of matrices by number of the layer."""
    places = {name: re.search(r"(?<![^.])(\d+)(?![^.])", name) for name in shares}
    kinds = {name: kind(name, found[1] if found else "") for name, found in places.items()}
    layers = sorted({int(found[1]) for found in places.values() if found}) or [0]
    rows = list(dict.fromkeys(kinds.values()))
    table: list[list[float | None]] = [[None] * len(layers) for _ in rows]
    for name, share in shares.items():
        found = places[name]
        table[rows.index(kinds[name])][layers.index(int(found[1])) if found else 0] = share
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
    """A matrix's name behind its layer's number."""
    inside = name.partition(f".{layer}.")[2] if layer else name
    return (inside or name).removesuffix(".weight")


def tree(figures: Figures) -> Plot:
    """Which mask was made from which, from the dense model to the last level; the selected path is bold."""
    lineages = list(dict.fromkeys(name for stand in figures.levels for name in stand.settled))
    rows = {name: -place for place, name in enumerate(lineages)}
    traces = []
    for stand in figures.levels:
        for name, record in stand.settled.items():
            candidate = record.winner.candidate
            above = name if name == IMP else branch(candidate.parent)
            bold = record in figures.path
            color = ORANGE if name == IMP else BLUE if bold else GREY
            start = rows.get(above, 0) if stand.level > 1 else 0
            traces.append(
                {
                    "x": [stand.level - 1, stand.level],
                    "y": [start, rows[name]],
                    "mode": "lines+markers+text",
                    "line": {"color": color, "width": 4 if bold else 2, "dash": "dot" if name == IMP else "solid"},
                    "marker": {"color": color, "size": [0, 14]},
                    "text": ["", "IMP" if name == IMP else "control" if candidate.is_control else str(candidate.index)],
                    "textposition": "top center",
                    "showlegend": False,
                    "hovertemplate": f"{candidate.name}, {percent(record.sparsity)}, loss on select "
                    f"{record.finetuned.kept.loss:.4f}<extra></extra>",
                }
            )
    ticks = [0, *(stand.level for stand in figures.levels)]
    names = ["dense", *(percent(stand.sparsity) for stand in figures.levels)]
    return {
        "data": traces,
        "layout": {
            "height": 160 + 60 * len(rows),
            "xaxis": {"tickvals": ticks, "ticktext": names, "range": [-0.3, len(names) - 0.6], "zeroline": False},
            "yaxis": {"visible": False, "range": [-len(rows) + 0.4, 0.8]},
        },
    }


def workers(figures: Figures) -> Plot:
    """Who did what when; what is empty is idle, and a cross is work that failed."""
    time = clock(figures.timeline)
    names = list(dict.fromkeys(short(piece.worker) for piece in figures.timeline))
    traces: list[Plot] = []
    for purpose, color in KINDS.items():
        pieces = [piece for piece in figures.timeline if piece.kind == purpose]
        if pieces:
            traces.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "name": purpose,
                    "y": [short(piece.worker) for piece in pieces],
                    "base": [time.at(piece.started) for piece in pieces],
                    "x": [piece.seconds for piece in pieces],
                    "marker": {"color": color, "line": {"width": 0.5}},
                    "text": [f"level {piece.level}" for piece in pieces],
                    "textposition": "none",
                    "hovertemplate": "%{text}, %{x:.1f} s",
                }
            )
    failed = [found for stand in figures.levels for found in stand.evaluations if not found.ok and found.started]
    if failed:
        traces.append(
            {
                "name": "failed",
                "x": [time.at(found.started + found.seconds) for found in failed],
                "y": [short(found.worker) for found in failed],
                "mode": "markers",
                "marker": {"color": RED, "symbol": "x", "size": 12},
                "text": [f"{found.candidate.name}: {(found.error or '')[:80]}" for found in failed],
                "hovertemplate": "%{text}",
            }
        )
    return {
        "data": traces,
        "layout": {
            "height": 150 + 34 * min(len(names), 30),
            "barmode": "overlay",
            "xaxis": {"title": {"text": "<br>".join(time.scaled("seconds"))}},
            "yaxis": {"type": "category", "categoryarray": names[::-1], "automargin": True},
        },
    }
