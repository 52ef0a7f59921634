"""What does a search look like in a terminal, and in a log?"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text

from raymask.core.records import Evaluation, Level, Result, Watch
from raymask.core.spec import Spec
from raymask.report.progress import Progress
from raymask.report.timeline import timeline
from raymask.report.words import blocks, duration, evaluated_line, percent, scored_line, settled_line, verdict

OFTEN, SELDOM = 10.0, 60.0  # seconds between two lines of progress in a log, at its start and in the long run
PROGRESS = "progress: "
"""How such a line begins, behind its time: by it a job's log is asked how far the search is."""


class Silent:
    """A Watch that says nothing."""

    def begins(self, stage: str, level: int, total: int, known: Sequence[Evaluation] | None = None) -> None:
        pass

    def running(self, shares: Mapping[str, float]) -> None:
        pass

    def evaluated(self, evaluation: Evaluation) -> None:
        pass

    def settled(self, lineage: str, level: Level) -> None:
        pass

    def sent(self, size: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class Lines(Silent):
    """A Watch for logs: a line per event, and one for progress now and then."""

    def __init__(self, console: Console, spec: Spec) -> None:
        self.console = console
        self.progress = Progress(spec)
        self.started = self.told = time.monotonic()

    def say(self, text: str) -> None:
        self.console.print(Text(f"[{time.monotonic() - self.started:6.1f} s] {text}"), soft_wrap=True)

    def begins(self, stage: str, level: int, total: int, known: Sequence[Evaluation] | None = None) -> None:
        self.progress.begins(stage, level, total, known)
        self.say(f"{stage}" + (f", {len(known)} of {total} known" if known else ""))

    def running(self, shares: Mapping[str, float]) -> None:
        self.progress.running(shares)
        now = time.monotonic()
        if shares and now - self.told > min(max(OFTEN, (now - self.started) / 60), SELDOM):
            self.told = now
            self.say(f"{PROGRESS}{self.progress.line()}")

    def evaluated(self, evaluation: Evaluation) -> None:
        self.progress.evaluated(evaluation)
        self.say("  " + evaluated_line(evaluation, self.progress.recipe.spec.probe.rungs))

    def settled(self, lineage: str, level: Level) -> None:
        self.progress.settled(lineage, level)
        self.say("  " + settled_line(lineage, level))

    def note(self, text: str) -> None:
        self.say("  " + text)


class Bars(Lines):
    """A Watch for terminals: the lines of a log above bars that move."""

    def __init__(self, console: Console, spec: Spec, bars: rich.progress.Progress) -> None:
        super().__init__(console, spec)
        self.bars = bars
        self.stage = bars.add_task("starting", total=None, left="")
        self.tasks: dict[str, TaskID] = {}

    def begins(self, stage: str, level: int, total: int, known: Sequence[Evaluation] | None = None) -> None:
        super().begins(stage, level, total, known)
        self.bars.reset(self.stage, total=total)
        self.running({})

    def running(self, shares: Mapping[str, float]) -> None:
        self.progress.running(shares)
        now = self.progress
        self.bars.update(
            self.stage,
            description=f"{now.stage}{now.tail()}",
            completed=now.done + sum(now.shares.values()),
            left=now.time_left(),
        )
        for name in self.tasks.keys() - shares.keys():
            self.bars.remove_task(self.tasks.pop(name))
        for name, share in shares.items():
            if name not in self.tasks:
                self.tasks[name] = self.bars.add_task(f"  {name}", total=1.0, left="")
            self.bars.update(self.tasks[name], completed=share)


@contextmanager
def watching(console: Console, spec: Spec) -> Iterator[Watch]:
    """Bars on a terminal, lines elsewhere."""
    if not console.is_terminal:
        yield Lines(console, spec)
        return
    columns = (
        TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        BarColumn(bar_width=10),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),  # the last to be cut on a narrow terminal
    )
    with rich.progress.Progress(*columns, console=console, transient=True, expand=True) as bars:
        yield Bars(console, spec, bars)


def say(console: Console, text: str) -> None:
    """Print a line as it is: nothing in it is markup, and only the terminal wraps it."""
    console.print(Text(text), soft_wrap=True)


def show_result(console: Console, result: Result) -> None:
    """The final table, the verdict, where the time went, and where things are."""
    table = Table(title=Text(f"{result.model} on {result.task}: the report split"), title_justify="left")
    table.add_column("")
    for name in result.metrics:
        table.add_column(name, justify="right")
    for name in ("prunable", blocks(result.kind), "whole model"):
        table.add_column(f"zeros in\n{name}", justify="right")
    for row in result.rows:
        cells = [f"{row.report[name]:.4f}" for name in result.metrics]
        table.add_row(row.name, *cells, *map(percent, row.sparsity.values()))
    console.print(table)
    console.print(Text(verdict(result)))
    winners = ", ".join(level.winner.candidate.name for level in result.levels)
    console.print(Text(f"Winners by level: {winners}. Mask digest {result.levels[-1].digest}."))
    if result.others:
        others = ", ".join(f"{level.winner.candidate.name} at level {level.level}" for level in result.others)
        console.print(Text(f"Fine-tuned as well: {others}."))
    if result.scored[0] < result.scored[1]:
        console.print(Text(scored_line(result)))
    console.print(Text(f"Took {duration(result.seconds['wall'])}."))
    for line in timeline(result.timeline):
        say(console, line)
    console.print(
        Text(f"Everything is in {result.run}, report.html first; the sparse model, ready to load, in {result.export}.")
    )
