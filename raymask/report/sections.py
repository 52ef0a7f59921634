"""Sections of a report, for the page and for the terminal."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from raymask.core.lineage import DENSE
from raymask.core.records import BASELINE, RAYMASK, ConfidenceInterval, Evaluation, LevelRecord, ModelMetrics
from raymask.core.spec import Spec
from raymask.report import plots
from raymask.report.plots import Plot
from raymask.report.summary import LevelSummary, RunSummary
from raymask.report.text import blocks, duration, epochs, level_line, percent, scored_line, validation_metric, verdict
from raymask.report.timeline import seconds_by_phase, timeline

BAR = 40  # characters of a full bar


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        heads: Column heads; all empty when the table has none.
        rows: Cells by row, as many as heads.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class ReportSection:
    """One section of a report, shown in the order of its fields.

    Attributes:
        title: The heading.
        lines: Paragraphs; text in backquotes is code.
        table: A table, or None.
        plots: Captions and plots, for the page only.
        text_plot: Lines that replace the plots in a terminal.
        more: What a page folds away, text or tables by title. A terminal shows the tables only.
    """

    title: str
    lines: Sequence[str] = ()
    table: Table | None = None
    plots: Sequence[tuple[str, Plot]] = ()
    text_plot: Sequence[str] = ()
    more: Mapping[str, str | Table] = field(default_factory=dict)


def report_sections(summary: RunSummary) -> list[ReportSection]:
    """The sections of a run's report. Sections and plots without content yet are left out."""
    sections = [
        verdict_section(summary),
        spec_section(summary),
        levels(summary),
        early_eval_section(summary),
        layers(summary),
        lineage_section(summary),
        workers(summary),
        budget(summary),
        reproduce_section(summary),
    ]
    filled = [section for section in sections if section.lines or section.table or section.more]
    return [replace(section, plots=[plot for plot in section.plots if plot[1]["data"]]) for section in filled]


def comparison_sections(runs: Mapping[str, RunSummary]) -> list[ReportSection]:
    """The sections of a comparison.

    Args:
        runs: Summaries by the name of the run.
    """
    rows = [side_by_side(name, summary) for name, summary in runs.items()]
    shared = [head for head in ("model", "task") if len({row[head] for row in rows}) == 1]
    heads = [head for head in rows[0] if head not in shared]
    table = Table(heads, [[row[head] for head in heads] for row in rows])
    lines = [
        "Metrics are on `test`, with 95 % intervals over its rows. Epochs and working time are sums over all workers."
    ]
    if shared:
        lines.append(f"All of them: {', '.join(f'{head} {rows[0][head]}' for head in shared)}.")
    sections = [
        ReportSection(
            "Side by side",
            lines,
            table,
            [("The first metric over the levels", plots.metric_by_sparsity(runs))],
        )
    ]
    differing = differences({name: summary.spec for name, summary in runs.items()})
    if differing.rows:
        sections.append(ReportSection("Keys that differ", table=differing))
    for what, title in (
        ("distance", "Scores by distance from the magnitude mask"),
        ("ratio", "Scores by sampling ratio"),
    ):
        sections.append(ReportSection(title, plots=[(name, plots.scores_by(run, what)) for name, run in runs.items()]))
    sections.append(
        ReportSection(
            "Workers",
            plots=[(name, plots.worker_plot(run)) for name, run in runs.items()],
            text_plot=[line for name, run in runs.items() for line in ("", name, *timeline(run.timeline))],
        )
    )
    return sections


def side_by_side(name: str, summary: RunSummary) -> dict[str, str]:
    """A run's row in the comparison, by column head."""
    result, spec = summary.result, summary.spec
    cells = {row.name: measured(row, next(iter(row.test_metrics))) for row in result.models} if result else {}
    return {
        "run": name,
        "model": spec.model.name,
        "task": spec.task.name or str(spec.task.train),
        "sparsity": percent(summary.path[-1].sparsity) if summary.path else "",
        "dense": cells.get("dense", "") if result else summary.state,
        BASELINE: cells.get(BASELINE, ""),
        RAYMASK: cells.get(RAYMASK, ""),
        f"gain over {BASELINE}": format_gain(result.gain if result else None),
        "epochs": f"{sum(summary.spent.values()):g}",
        "worked": duration(sum(piece.seconds for piece in summary.timeline)),
    }


def differences(specs: Mapping[str, Spec]) -> Table:
    """A table of the keys in which specs differ, with the value of every spec."""
    flat = {name: flattened(spec.model_dump(mode="json")) for name, spec in specs.items()}
    keys = dict.fromkeys(key for keys in flat.values() for key in keys)
    rows = [[key, *(spelled(values.get(key, "")) for values in flat.values())] for key in keys]
    return Table(["key", *specs], [row for row in rows if len(set(row[1:])) > 1])


def spelled(value: object) -> str:
    """A key's value as it is written in a spec."""
    return value if isinstance(value, str) else json.dumps(value)


def flattened(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= flattened(inner, f"{prefix}{key}.") if isinstance(inner, Mapping) else {f"{prefix}{key}": inner}
    return flat


def measured(row: ModelMetrics, metric: str) -> str:
    """A metric on `test` with its 95 % interval."""
    spread = row.intervals.get(metric)
    return f"{row.test_metrics[metric]:.4f}" + (f" [{spread.low:.3f}, {spread.high:.3f}]" if spread else "")


def verdict_section(summary: RunSummary) -> ReportSection:
    """The verdict and the table of models; before the end, the search's state."""
    result = summary.result
    if result is None:
        state = {
            "running": "This search is running.",
            "stopped": "This search is stopped. Run the same command again to continue.",
            "failed": f"This search ended with an error: {summary.error}",
        }
        lines = [state[summary.state]]
        lines += [level_line(DENSE, summary.dense)] if summary.dense else ["The dense model is not done yet."]
        return ReportSection("Not finished", lines)
    names = ("prunable", "encoder", "whole")
    rows = [
        [
            row.name,
            *(measured(row, metric) for metric in result.metrics),
            *(format_remaining(row.sparsity[name], result.sizes[name]) for name in names),
        ]
        for row in result.models
    ]
    heads = ["", *result.metrics, *(f"remaining, {name}" for name in ("prunable", blocks(result.kind), "whole model"))]
    first = result.metrics[0]
    dense, pruned = (row.test_metrics[first] for row in (result.models[0], result.models[-1]))
    lines = [
        verdict(result),
        f"Against dense, {first}: {dense:.4f} before, {pruned:.4f} after, {pruned - dense:+.4f}.",
        "Metrics are on `test`, a split that no choice has used, with 95 % intervals over its rows.",
        f"Mask digest {result.levels[-1].digest}. The sparse model, ready to load, is in {result.export}.",
    ]
    return ReportSection("Verdict", lines, Table(heads, rows))


def format_remaining(sparsity: float, size: int) -> str:
    """How many parameters are not zero, and the compression factor; short, because a page has six such columns.

    Args:
        sparsity: Share of zeros in [0, 1].
        size: Number of parameters.
    """
    remaining = round(size * (1 - sparsity))
    times = f", {size / remaining:.1f}x" if sparsity and remaining else ""
    return f"{million(remaining)} ({percent(sparsity)} zeros{times})" if sparsity else million(remaining)


def million(count: int) -> str:
    """A count in millions; below 100,000 in full."""
    return f"{count / 1e6:.2f} M" if count >= 100_000 else f"{count:,}"


def spec_section(summary: RunSummary) -> ReportSection:
    """The spec: its main settings, and the full text."""
    spec = summary.spec
    mask = spec.mask
    keep = f"; {spec.select.keep} fine-tuned per level" if spec.select.keep > 1 else ""
    rungs = (
        f" on rungs {', '.join(f'{rung:g}' for rung in spec.early_eval.rungs)}"
        if len(spec.early_eval.rungs) > 1
        else ""
    )
    rows = [
        ["model", spec.model.name],
        ["task", spec.task.name or f"{spec.task.train} ({spec.task.kind})"],
        ["levels", ", ".join(percent(level_summary.sparsity) for level_summary in summary.levels)],
        ["masks", f"{mask.pattern}, {mask.allocation} allocation, by {mask.score}"],
        ["candidates", f"{spec.candidates.count} random masks per level and the magnitude mask{keep}"],
        ["early evaluation", f"{epochs(spec.early_eval.epochs)}, scored by {spec.early_eval.score}{rungs}"],
        ["fine-tuning", f"{epochs(spec.finetune.epochs)}{', distilled from the dense model' if spec.distill else ''}"],
        ["seed", str(spec.seed)],
    ]
    full_spec = yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False).rstrip()
    lines = [scored_line(summary.result)] if summary.result else []
    return ReportSection("Spec", lines, Table(["", ""], rows), more={"The full spec": full_spec})


def levels(summary: RunSummary) -> ReportSection:
    """Metric by sparsity, and a table with one row per level."""
    metrics = ", ".join(summary.result.metrics) if summary.result else "metric"
    heads = ["level", "sparsity", "done", "winner", "distance", "early gain over magnitude mask", "P(best)"]
    heads += [f"{RAYMASK}: {metrics}", BASELINE]
    baseline = {level.level: level for level in summary.imp}
    path = {level.level: level for level in summary.path}
    rows = [
        [
            f"{level_summary.level} of {len(summary.levels)}",
            percent(level_summary.sparsity),
            progress(level_summary),
            *(format_winner(path[level_summary.level]) if level_summary.level in path else ["", "", "", ""]),
            metric_of(summary, path.get(level_summary.level)),
            metric_of(summary, baseline.get(level_summary.level)),
        ]
        for level_summary in summary.levels
        if level_summary.evaluations or level_summary.finetuned
    ]
    if not rows:
        return ReportSection("Level by level")
    split = "test" if summary.result else "validation"
    plot = ("Metric by sparsity", plots.metric_by_sparsity({"": summary}))
    lines = [f"Metrics are on `{split}`, after fine-tuning."]
    return ReportSection("Level by level", lines, Table(heads, rows), [plot])


def progress(level_summary: LevelSummary) -> str:
    """How many of a level's early evaluations are done, and how many of them failed."""
    done, failed = len(level_summary.evaluations), sum(not evaluation.ok for evaluation in level_summary.evaluations)
    # repeats and speculative evaluations come on top of the planned number
    total = f" of {level_summary.num_evaluations}" if done <= level_summary.num_evaluations else ""
    return f"{done}{total}" + (f", {failed} failed" if failed else "")


def format_winner(level: LevelRecord) -> list[str]:
    """Cells of a level's winner: name, distance, early gain, and the probability that it is the best."""
    winner = level.winner
    distance = "" if winner.distance is None else percent(winner.distance)
    confidence = "" if level.win_probability is None else f"{level.win_probability:.0%}"
    return [winner.candidate.name, distance, format_gain(level.gain), confidence]


def format_gain(gain: ConfidenceInterval | None) -> str:
    """A gain with its 95 % interval; empty for None."""
    return "" if gain is None else f"{gain.mean:+.4f} [{gain.low:+.3f}, {gain.high:+.3f}]"


def metric_of(summary: RunSummary, level: LevelRecord | None) -> str:
    """A finished level's metrics on `test`; before the end of the run, its metric on `validation`. Empty for None."""
    if level is None:
        return ""
    if summary.result:
        return ", ".join(f"{value:.4f}" for value in level.test_metrics.values())
    return f"{validation_metric(level)[1]:.4f}"


def early_eval_section(summary: RunSummary) -> ReportSection:
    """The early evaluations of all candidates."""
    evaluated_levels = [level_summary for level_summary in summary.levels if level_summary.evaluations]
    if not evaluated_levels:
        return ReportSection("Early evaluation")
    shown = [
        (f"Level {level_summary.level}, {percent(level_summary.sparsity)}", plots.curves(level_summary))
        for level_summary in evaluated_levels
    ]
    shown += [
        ("Score by distance from the magnitude mask; a star was fine-tuned", plots.scores_by(summary, "distance")),
        ("Score by sampling ratio", plots.scores_by(summary, "ratio")),
    ]
    heads = ["level", "candidate", "rung", "ratio", "distance", "score", "loss", "metric", "took", ""]
    rows = [
        candidate_row(evaluation, level_summary)
        for level_summary in evaluated_levels
        for evaluation in ordered(level_summary)
    ]
    failures = sum(not evaluation.ok for level_summary in evaluated_levels for evaluation in level_summary.evaluations)
    lines = [f"{failures} evaluations failed: the table below says why."] if failures else []
    lines.insert(0, "All masks of one parent train briefly, on the same rows in the same order.")
    return ReportSection("Early evaluation", lines, plots=shown, more={"All early evaluations": Table(heads, rows)})


def ordered(level_summary: LevelSummary) -> list[Evaluation]:
    """A level's early evaluations, highest rung first, then highest score; those without a score come last."""
    return sorted(
        level_summary.evaluations,
        key=lambda evaluation: (evaluation.score is not None, evaluation.rung, evaluation.score),
        reverse=True,
    )


def candidate_row(evaluation: Evaluation, level_summary: LevelSummary) -> list[str]:
    """The cells of an early evaluation."""
    noise, last = evaluation.candidate.noise, evaluation.curve[-1] if evaluation.curve else None
    remark = evaluation.error or ("won" if evaluation.candidate.index in level_summary.winners else "")
    return [
        str(level_summary.level),
        evaluation.candidate.name,
        str(evaluation.rung + 1) + (f", repeat {evaluation.repeat}" if evaluation.repeat else ""),
        f"{noise.sampling_ratio:g}" if noise else "",
        "" if evaluation.distance is None else percent(evaluation.distance),
        "" if evaluation.score is None else f"{evaluation.score:.4f}",
        f"{last.loss:.4f}" if last else "",
        f"{last.metric:.4f}" if last else "",
        duration(evaluation.seconds),
        remark,
    ]


def layers(summary: RunSummary) -> ReportSection:
    """The density of each matrix."""
    title = "Density by layer"
    if not summary.densities:
        return ReportSection(title)
    shown = [(name, plots.density_plot(shares)) for name, shares in summary.densities.items()]
    if len({tuple(shares.items()) for shares in summary.densities.values()}) == 1:
        shown = [("All masks", shown[0][1])]
    name, shares = next(iter(summary.densities.items()))
    top = max(shares.values()) or 1.0
    width = max(map(len, shares))
    text_plot = [
        f"{matrix:{width}} {percent(share):>7} {'█' * round(BAR * share / top)}" for matrix, share in shares.items()
    ]
    if len(shown) > 1:
        text_plot.insert(0, f"{name}:")
    return ReportSection(
        title, ["Share of each matrix that is kept at the last finished level."], plots=shown, text_plot=text_plot
    )


def lineage_section(summary: RunSummary) -> ReportSection:
    """Which mask was made from which parent."""
    title = "Lineage"
    if not summary.path:
        return ReportSection(title)
    chain = " → ".join(["dense", *(level.winner.candidate.name for level in summary.path)])
    return ReportSection(title, [f"{chain}."], plots=[("Fine-tuned masks, by candidate number", plots.tree(summary))])


def workers(summary: RunSummary) -> ReportSection:
    """The workers' timeline."""
    if not summary.timeline:
        return ReportSection("Workers")
    lines = ["Empty is idle. Work that was lost with its worker is not in the journal, so it is empty too."]
    return ReportSection(
        "Workers", lines, plots=[("Work by worker", plots.worker_plot(summary))], text_plot=timeline(summary.timeline)
    )


def budget(summary: RunSummary) -> ReportSection:
    """Epochs and worker time by phase, and the search's epochs against the baseline's."""
    spent = summary.spent if summary.result else summary.planned
    rows = [
        [phase, f"{summary.planned[phase]:g}", f"{summary.spent[phase]:g}", duration(seconds)]
        for phase, seconds in seconds_by_phase(summary.timeline).items()
        if summary.planned[phase]
    ]
    search, imp = spent["early evaluation"] + spent["fine-tuning"], spent["IMP baseline"]
    lines = [f"The search trains {epochs(search)} after the dense model."]
    if imp and round(imp, 6) == round(search, 6):
        lines[0] += " So does its baseline: equal budgets."
    elif imp:
        per_level = round(search / len(summary.levels), 3)
        lines[0] += f" Its baseline trains {imp:g}; `imp.epochs: {per_level:g}` gives it as many."
    if summary.result:
        lines.append(f"The last start took {duration(summary.result.seconds['wall'])} of wall time.")
    return ReportSection("Budget", lines, Table(["", "epochs planned", "done", "workers' time"], rows))


def reproduce_section(summary: RunSummary) -> ReportSection:
    """The command, versions and machine of the last start."""
    if not summary.starts:
        return ReportSection("Reproduce")
    last = summary.starts[-1]
    pins = " ".join(f"{name}=={version}" for name, version in last["versions"].items() if version and name != "python")
    spec = f"{summary.run}/spec.yaml"
    how = " --in-process" if last["in_process"] else f" --address {last['address']}" if last["address"] else ""
    command = f"raymask search {'spec.yaml' if '://' in spec else shlex.quote(spec)} --run another{how}"
    lines = [
        f"{command}, with {spec} as spec.yaml" if "://" in spec else command,
        f"Versions: Python {last['versions']['python']}, {pins}.",
        f"Machine of the last of {len(summary.starts)} starts: {last['machine']}.",
    ]
    return ReportSection("Reproduce", lines)
