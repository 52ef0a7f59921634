"""Console output of a search: log lines, progress bars, and the final table."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text

from raymask.core.callbacks import Callback
from raymask.core.records import Evaluation, LevelRecord, Result
from raymask.core.spec import Spec
from raymask.report.progress import Progress
from raymask.report.text import blocks, duration, evaluated_line, level_line, percent, scored_line, verdict
from raymask.report.timeline import timeline

MIN_LOG_INTERVAL_S, MAX_LOG_INTERVAL_S = (
    10.0,
    60.0,
)  # seconds between two progress lines in a log: at first, and later at most


PROGRESS = "progress: "
"""How a progress line begins, after its time. `raymask status` finds the progress in a job's log by it."""


class LogCallback(Callback):
    """A Callback for logs: one line per event, and a progress line from time to time.

    Attributes:
        console: Where the lines go.
        progress: Counts and the estimate of the time left.
        started: `time.monotonic()` of the start; lines show seconds since then.
        last_progress: `time.monotonic()` of the last progress line.
    """

    def __init__(self, console: Console, spec: Spec) -> None:
        self.console = console
        self.progress = Progress(spec)
        self.started = self.last_progress = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line with the seconds since the start."""
        self.console.print(Text(f"[{time.monotonic() - self.started:6.1f} s] {text}"), soft_wrap=True)

    def on_phase_begin(self, phase: str, level: int, total: int, known: Sequence[Evaluation] | None = None) -> None:
        """Print the phase, and how many of its evaluations the journal already has."""
        self.progress.on_phase_begin(phase, level, total, known)
        self.say(f"{phase}" + (f", {len(known)} of {total} known" if known else ""))

    def on_progress(self, shares: Mapping[str, float]) -> None:
        """Print a progress line when the last one is long enough ago."""
        self.progress.on_progress(shares)
        now = time.monotonic()
        if shares and now - self.last_progress > min(
            max(MIN_LOG_INTERVAL_S, (now - self.started) / 60), MAX_LOG_INTERVAL_S
        ):
            self.last_progress = now
            self.say(f"{PROGRESS}{self.progress.line()}")

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Print a finished early evaluation."""
        self.progress.on_evaluation(evaluation)
        self.say("  " + evaluated_line(evaluation, self.progress.recipe.spec.early_eval.rungs))

    def on_level_end(self, lineage: str, level: LevelRecord) -> None:
        """Print a finished level."""
        self.progress.on_level_end(lineage, level)
        self.say("  " + level_line(lineage, level))

    def on_message(self, text: str) -> None:
        """Print a message."""
        self.say("  " + text)


class ProgressBarCallback(LogCallback):
    """A Callback for terminals: the log's lines above progress bars, one for the phase and one per running task.

    Attributes:
        bars: rich's progress display.
        phase_bar: The bar of the current phase.
        task_bars: The bars of the tasks that run now, by task name.
    """

    def __init__(self, console: Console, spec: Spec, bars: rich.progress.Progress) -> None:
        super().__init__(console, spec)
        self.bars = bars
        self.phase_bar = bars.add_task("starting", total=None, left="")
        self.task_bars: dict[str, TaskID] = {}

    def on_phase_begin(self, phase: str, level: int, total: int, known: Sequence[Evaluation] | None = None) -> None:
        """Print the phase and reset its bar."""
        super().on_phase_begin(phase, level, total, known)
        self.bars.reset(self.phase_bar, total=total)
        self.on_progress({})

    def on_progress(self, shares: Mapping[str, float]) -> None:
        """Move the bars; a task that no longer runs loses its bar."""
        self.progress.on_progress(shares)
        progress = self.progress
        self.bars.update(
            self.phase_bar,
            description=f"{progress.stage}{progress.tail()}",
            completed=progress.done + sum(progress.shares.values()),
            left=progress.time_left(),
        )
        for name in self.task_bars.keys() - shares.keys():
            self.bars.remove_task(self.task_bars.pop(name))
        for name, share in shares.items():
            if name not in self.task_bars:
                self.task_bars[name] = self.bars.add_task(f"  {name}", total=1.0, left="")
            self.bars.update(self.task_bars[name], completed=share)


@contextmanager
def progress_callback(console: Console, spec: Spec) -> Iterator[Callback]:
    """A Callback for a search's progress: bars on a terminal, lines elsewhere.

    Args:
        console: Where the output goes.
        spec: The search's spec.

    Yields:
        The callback; its bars disappear when the block ends.
    """
    if not console.is_terminal:
        yield LogCallback(console, spec)
        return
    columns = (
        TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        BarColumn(bar_width=10),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn(
            "{task.fields[left]}", table_column=Column(no_wrap=True)
        ),  # the last column that a narrow terminal cuts
    )
    with rich.progress.Progress(*columns, console=console, transient=True, expand=True) as bars:
        yield ProgressBarCallback(console, spec, bars)


def say(console: Console, text: str) -> None:
    """Print a line as it is: without markup, and wrapped only by the terminal."""
    console.print(Text(text), soft_wrap=True)


def show_result(console: Console, result: Result) -> None:
    """Print the final table, the verdict, the workers' timeline, and where the files are."""
    table = Table(title=Text(f"{result.model} on {result.task}: the test split"), title_justify="left")
    table.add_column("")
    for name in result.metrics:
        table.add_column(name, justify="right")
    for name in ("prunable", blocks(result.kind), "whole model"):
        table.add_column(f"zeros in\n{name}", justify="right")
    for row in result.models:
        cells = [f"{row.test_metrics[name]:.4f}" for name in result.metrics]
        table.add_row(row.name, *cells, *map(percent, row.sparsity.values()))
    console.print(table)
    console.print(Text(verdict(result)))
    winners = ", ".join(level.winner.candidate.name for level in result.levels)
    console.print(Text(f"Winners by level: {winners}. Mask digest {result.levels[-1].digest}."))
    if result.other_levels:
        others = ", ".join(f"{level.winner.candidate.name} at level {level.level}" for level in result.other_levels)
        console.print(Text(f"Fine-tuned as well: {others}."))
    if result.rows_scored[0] < result.rows_scored[1]:
        console.print(Text(scored_line(result)))
    console.print(Text(f"Took {duration(result.seconds['wall'])}."))
    for line in timeline(result.timeline):
        say(console, line)
    console.print(
        Text(f"Everything is in {result.run}, report.html first; the sparse model, ready to load, in {result.export}.")
    )
