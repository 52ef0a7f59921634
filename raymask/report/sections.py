"""What does a report say, one section after another, on a page and in a terminal?"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from raymask.core.records import CONTROL, SELECTED, Evaluation, Interval, Level, Row
from raymask.core.spec import Spec
from raymask.report import plots
from raymask.report.figures import Figures, Stand
from raymask.report.plots import Plot
from raymask.report.timeline import by_purpose, timeline
from raymask.report.words import blocks, duration, epochs, on_select, percent, scored_line, settled_line, verdict
from raymask.store import DENSE

BAR = 40  # letters of a full bar


@dataclass(frozen=True)
class Table:
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """`lines` of text, a `table`, `plots` behind their captions, and, folded away, `more`.

    `drawn`: what stands for the plots where there are only letters.
    """

    title: str
    lines: Sequence[str] = ()
    table: Table | None = None
    plots: Sequence[tuple[str, Plot]] = ()
    drawn: Sequence[str] = ()
    more: Mapping[str, str | Table] = field(default_factory=dict)


def report(figures: Figures) -> list[Section]:
    """A run's sections; those that have nothing to say yet are left out, and so are plots."""
    sections = [
        found(figures),
        asked(figures),
        levels(figures),
        early(figures),
        layers(figures),
        parents(figures),
        workers(figures),
        budget(figures),
        again(figures),
    ]
    said = [section for section in sections if section.lines or section.table or section.more]
    return [replace(section, plots=[shown for shown in section.plots if shown[1]["data"]]) for section in said]


def comparison(runs: Mapping[str, Figures]) -> list[Section]:
    """Searches side by side."""
    rows = [side_by_side(name, figures) for name, figures in runs.items()]
    shared = [head for head in ("model", "task") if len({row[head] for row in rows}) == 1]
    heads = [head for head in rows[0] if head not in shared]
    ours = Table(heads, [[row[head] for head in heads] for row in rows])
    lines = ["Metrics on `report`, with 95 % intervals over its rows. Epochs and time worked are those of all workers."]
    if shared:
        lines.append(f"All of them: {', '.join(f'{head} {rows[0][head]}' for head in shared)}.")
    sections = [
        Section(
            "Side by side",
            lines,
            ours,
            [("The first metric over the levels", plots.metric_by_sparsity(runs))],
        )
    ]
    differing = differences({name: figures.spec for name, figures in runs.items()})
    if differing.rows:
        sections.append(Section("What was asked differently", table=differing))
    for what, title in (("distance", "Scores by distance from the control"), ("ratio", "Scores by sampling ratio")):
        sections.append(Section(title, plots=[(name, plots.scores_by(run, what)) for name, run in runs.items()]))
    sections.append(
        Section(
            "Workers",
            plots=[(name, plots.workers(run)) for name, run in runs.items()],
            drawn=[line for name, run in runs.items() for line in ("", name, *timeline(run.timeline))],
        )
    )
    return sections


def side_by_side(name: str, figures: Figures) -> dict[str, str]:
    """A run's row among others, by the heads of its columns."""
    result, spec = figures.result, figures.spec
    cells = {row.name: measured(row, next(iter(row.report))) for row in result.rows} if result else {}
    return {
        "run": name,
        "model": spec.model.name,
        "task": spec.task.name or str(spec.task.train),
        "sparsity": percent(figures.path[-1].sparsity) if figures.path else "",
        "dense": cells.get("dense", "") if result else figures.state,
        CONTROL: cells.get(CONTROL, ""),
        SELECTED: cells.get(SELECTED, ""),
        "gain over control": gained(result.gain if result else None),
        "epochs": f"{sum(figures.spent.values()):g}",
        "worked": duration(sum(piece.seconds for piece in figures.timeline)),
    }


def differences(specs: Mapping[str, Spec]) -> Table:
    """The keys in which specs differ, with what each has."""
    flat = {name: flattened(spec.model_dump(mode="json")) for name, spec in specs.items()}
    keys = dict.fromkeys(key for keys in flat.values() for key in keys)
    rows = [[key, *(spelled(found.get(key, "")) for found in flat.values())] for key in keys]
    return Table(["key", *specs], [row for row in rows if len(set(row[1:])) > 1])


def spelled(value: object) -> str:
    """A key's value as a spec has it."""
    return value if isinstance(value, str) else json.dumps(value)


def flattened(value: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested mappings as one, its keys joined by dots."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flattened(inner, f"{above}{key}.") if isinstance(inner, Mapping) else {f"{above}{key}": inner}
    return found


def measured(row: Row, metric: str) -> str:
    """A metric with its interval."""
    spread = row.intervals.get(metric)
    return f"{row.report[metric]:.4f}" + (f" [{spread.low:.3f}, {spread.high:.3f}]" if spread else "")


def found(figures: Figures) -> Section:
    """The verdict, and the models side by side."""
    result = figures.result
    if result is None:
        state = {
            "running": "This search runs.",
            "stopped": "This search is stopped; the same command goes on from here.",
        }
        lines = [state[figures.state]]
        lines += [settled_line(DENSE, figures.dense)] if figures.dense else ["The dense model is not done yet."]
        return Section("Not finished", lines)
    names = ("prunable", "encoder", "whole")
    rows = [
        [
            row.name,
            *(measured(row, metric) for metric in result.metrics),
            *(left(row.sparsity[name], result.sizes[name]) for name in names),
        ]
        for row in result.rows
    ]
    heads = ["", *result.metrics, *(f"left of {name}" for name in ("prunable", blocks(result.kind), "whole model"))]
    first = result.metrics[0]
    dense, selected = (row.report[first] for row in (result.rows[0], result.rows[-1]))
    lines = [
        verdict(result),
        f"Against dense, {first}: {dense:.4f} before, {selected:.4f} after, {selected - dense:+.4f}.",
        "Metrics are those of the `report` split, which no choice saw, with 95 % intervals over its rows.",
        f"Mask digest {result.levels[-1].digest}. The sparse model, ready to load, is in {result.export}.",
    ]
    return Section("Verdict", lines, Table(heads, rows))


def left(sparsity: float, size: int) -> str:
    """How many parameters are not zero, and how many times fewer that is, which has to fit a page six columns wide."""
    kept = round(size * (1 - sparsity))
    times = f", {size / kept:.1f}x" if sparsity and kept else ""
    return f"{million(kept)} ({percent(sparsity)} zeros{times})" if sparsity else million(kept)


def million(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 100_000 else f"{count:,}"


def asked(figures: Figures) -> Section:
    """What the spec says, in short and whole."""
    spec = figures.spec
    mask = spec.mask
    kept = f", {spec.select.keep} kept a level" if spec.select.keep > 1 else ""
    rungs = f" on rungs {', '.join(f'{rung:g}' for rung in spec.probe.rungs)}" if len(spec.probe.rungs) > 1 else ""
    rows = [
        ["model", spec.model.name],
        ["task", spec.task.name or f"{spec.task.train} ({spec.task.kind})"],
        ["levels", ", ".join(percent(stand.sparsity) for stand in figures.levels)],
        ["masks", f"{mask.pattern}, {mask.allocation} allocation, by {mask.score}"],
        ["candidates", f"{spec.candidates.count} random ones a level beside the control{kept}"],
        ["early evaluation", f"{epochs(spec.probe.epochs)}, scored by {spec.probe.score}{rungs}"],
        ["fine-tuning", f"{epochs(spec.finetune.epochs)}{', distilled from the dense model' if spec.distill else ''}"],
        ["seed", str(spec.seed)],
    ]
    whole = yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False).rstrip()
    lines = [scored_line(figures.result)] if figures.result else []
    return Section("What was asked", lines, Table(["", ""], rows), more={"The whole spec": whole})


def levels(figures: Figures) -> Section:
    """Metric against sparsity, and how every level went."""
    metrics = ", ".join(figures.result.metrics) if figures.result else "metric"
    heads = ["level", "sparsity", "done", "winner", "distance", "early gain over control", "is best"]
    heads += [f"{SELECTED}: {metrics}", CONTROL]
    controls = {level.level: level for level in figures.imp}
    chosen = {level.level: level for level in figures.path}
    rows = [
        [
            f"{stand.level} of {len(figures.levels)}",
            percent(stand.sparsity),
            progress(stand),
            *(won(chosen[stand.level]) if stand.level in chosen else ["", "", "", ""]),
            metric_of(figures, chosen.get(stand.level)),
            metric_of(figures, controls.get(stand.level)),
        ]
        for stand in figures.levels
        if stand.evaluations or stand.settled
    ]
    if not rows:
        return Section("Level by level")
    split = "report" if figures.result else "select"
    plot = ("Metric by sparsity", plots.metric_by_sparsity({"": figures}))
    lines = [f"Metrics are those of `{split}` after fine-tuning."]
    return Section("Level by level", lines, Table(heads, rows), [plot])


def progress(stand: Stand) -> str:
    """How many of a level's early evaluations there are, and how many failed."""
    done, failed = len(stand.evaluations), sum(not found.ok for found in stand.evaluations)
    of = f" of {stand.climbs}" if done <= stand.climbs else ""  # repeats, and guesses that came to nothing, are on top
    return f"{done}{of}" + (f", {failed} failed" if failed else "")


def won(level: Level) -> list[str]:
    """Who won a level, and by how much."""
    winner = level.winner
    distance = "" if winner.distance is None else percent(winner.distance)
    sure = "" if level.confidence is None else f"{level.confidence:.0%}"
    return [winner.candidate.name, distance, gained(level.gain), sure]


def gained(gain: Interval | None) -> str:
    return "" if gain is None else f"{gain.mean:+.4f} [{gain.low:+.3f}, {gain.high:+.3f}]"


def metric_of(figures: Figures, level: Level | None) -> str:
    """A finished level's metrics."""
    if level is None:
        return ""
    if figures.result:
        return ", ".join(f"{value:.4f}" for value in level.report.values())
    return f"{on_select(level)[1]:.4f}"


def early(figures: Figures) -> Section:
    """Every candidate's early evaluation."""
    stands = [stand for stand in figures.levels if stand.evaluations]
    if not stands:
        return Section("Early evaluation")
    shown = [(f"Level {stand.level}, {percent(stand.sparsity)}", plots.curves(stand)) for stand in stands]
    shown += [
        ("Score by distance from the control; a star was fine-tuned", plots.scores_by(figures, "distance")),
        ("Score by sampling ratio", plots.scores_by(figures, "ratio")),
    ]
    heads = ["level", "candidate", "rung", "ratio", "distance", "score", "loss", "metric", "took", ""]
    rows = [candidate_row(found, stand) for stand in stands for found in ordered(stand)]
    failures = sum(not found.ok for stand in stands for found in stand.evaluations)
    lines = [f"{failures} evaluations failed: the table below says why."] if failures else []
    lines.insert(0, "All masks of one parent train for a short while, on the same rows in the same order.")
    return Section("Early evaluation", lines, plots=shown, more={"All early evaluations": Table(heads, rows)})


def ordered(stand: Stand) -> list[Evaluation]:
    """The best first, by rung."""
    return sorted(stand.evaluations, key=lambda found: (found.score is not None, found.rung, found.score), reverse=True)


def candidate_row(found: Evaluation, stand: Stand) -> list[str]:
    """An early evaluation's cells."""
    noise, last = found.candidate.noise, found.curve[-1] if found.curve else None
    remark = found.error or ("won" if found.candidate.index in stand.winners else "")
    return [
        str(stand.level),
        found.candidate.name,
        str(found.rung + 1) + (f", order {found.order + 1}" if found.order else ""),
        f"{noise.ratio:g}" if noise else "",
        "" if found.distance is None else percent(found.distance),
        "" if found.score is None else f"{found.score:.4f}",
        f"{last.loss:.4f}" if last else "",
        f"{last.metric:.4f}" if last else "",
        duration(found.seconds),
        remark,
    ]


def layers(figures: Figures) -> Section:
    """Where the weights are that are left."""
    title = "Density by layer"
    if not figures.densities:
        return Section(title)
    shown = [(name, plots.densities(shares)) for name, shares in figures.densities.items()]
    if len({tuple(shares.items()) for shares in figures.densities.values()}) == 1:
        shown = [("All masks", shown[0][1])]
    whose, shares = next(iter(figures.densities.items()))
    top = max(shares.values()) or 1.0
    width = max(map(len, shares))
    drawn = [f"{name:{width}} {percent(share):>7} {'█' * round(BAR * share / top)}" for name, share in shares.items()]
    if len(shown) > 1:
        drawn.insert(0, f"{whose}:")
    return Section(
        title, ["The share of each matrix that is kept at the last finished level."], plots=shown, drawn=drawn
    )


def parents(figures: Figures) -> Section:
    """Which mask was made from which."""
    title = "Which mask comes from which"
    if not figures.path:
        return Section(title)
    chain = " → ".join(["dense", *(level.winner.candidate.name for level in figures.path)])
    return Section(
        title, [f"{chain}."], plots=[("Fine-tuned masks, by the numbers of their candidates", plots.tree(figures))]
    )


def workers(figures: Figures) -> Section:
    """Where the workers' time went."""
    if not figures.timeline:
        return Section("Workers")
    lines = ["What is empty is idle. Work that was lost with its worker is not in the journal, so it is empty too."]
    return Section(
        "Workers", lines, plots=[("Work by worker", plots.workers(figures))], drawn=timeline(figures.timeline)
    )


def budget(figures: Figures) -> Section:
    """What it cost, beside the baseline."""
    spent = figures.spent if figures.result else figures.planned
    rows = [
        [purpose, f"{figures.planned[purpose]:g}", f"{figures.spent[purpose]:g}", duration(seconds)]
        for purpose, seconds in by_purpose(figures.timeline).items()
        if figures.planned[purpose]
    ]
    search, imp = spent["early evaluation"] + spent["fine-tuning"], spent["baseline (IMP)"]
    lines = [f"The search trains {epochs(search)} behind the dense model."]
    if imp and round(imp, 6) == round(search, 6):
        lines[0] += " So does its baseline: equal budgets."
    elif imp:
        level = round(search / len(figures.levels), 3)
        lines[0] += f" Its baseline trains {imp:g}; `imp.epochs: {level:g}` gives it as many."
    if figures.result:
        lines.append(f"The last start took {duration(figures.result.seconds['wall'])} by the clock.")
    return Section("Budget", lines, Table(["", "epochs planned", "done", "workers' time"], rows))


def again(figures: Figures) -> Section:
    """How to get the same."""
    if not figures.starts:
        return Section("To repeat it")
    last = figures.starts[-1]
    pins = " ".join(f"{name}=={version}" for name, version in last["versions"].items() if version and name != "python")
    spec = f"{figures.run}/spec.yaml"
    how = " --in-process" if last["in_process"] else f" --address {last['address']}" if last["address"] else ""
    command = f"raymask search {'spec.yaml' if '://' in spec else shlex.quote(spec)} --run another{how}"
    lines = [
        f"{command}, with {spec} as spec.yaml" if "://" in spec else command,
        f"Versions: Python {last['versions']['python']}, {pins}.",
        f"Machine of the last of {len(figures.starts)} starts: {last['machine']}.",
    ]
    return Section("To repeat it", lines)
