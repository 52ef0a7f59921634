"""What does a search look like in a terminal, and in a log?"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from raymask.core.records import Evaluation, Level, Result, Watch
from raymask.report.words import duration, evaluated_line, percent, settled_line, verdict

QUIET = 10.0  # seconds between two lines of progress in a log


class Silent:
    """A Watch that says nothing."""

    def begins(self, stage: str, total: int, done: int) -> None:
        pass

    def running(self, shares: Mapping[str, float]) -> None:
        pass

    def evaluated(self, evaluation: Evaluation) -> None:
        pass

    def settled(self, lineage: str, level: Level) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class Lines:
    """A Watch for logs: a line per event, and one for progress now and then."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.started = self.last = time.monotonic()

    def say(self, text: str) -> None:
        self.last = time.monotonic()
        self.console.print(Text(f"[{self.last - self.started:6.1f} s] {text}"), soft_wrap=True)

    def begins(self, stage: str, total: int, done: int) -> None:
        self.say(f"{stage}" + (f", {done} of {total} known" if done else ""))

    def running(self, shares: Mapping[str, float]) -> None:
        if shares and time.monotonic() - self.last > QUIET:
            self.say("  " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))

    def evaluated(self, evaluation: Evaluation) -> None:
        self.say("  " + evaluated_line(evaluation))

    def settled(self, lineage: str, level: Level) -> None:
        self.say("  " + settled_line(lineage, level))

    def note(self, text: str) -> None:
        self.say("  " + text)


class Bars(Lines):
    """A Watch for terminals: the lines of a log above bars that move."""

    def __init__(self, console: Console, progress: Progress) -> None:
        super().__init__(console)
        self.progress = progress
        self.stage = progress.add_task("starting", total=None)
        self.tasks: dict[str, TaskID] = {}

    def begins(self, stage: str, total: int, done: int) -> None:
        super().begins(stage, total, done)
        self.progress.reset(self.stage, description=stage, total=total, completed=done)
        self.running({})

    def running(self, shares: Mapping[str, float]) -> None:
        for name in self.tasks.keys() - shares.keys():
            self.progress.remove_task(self.tasks.pop(name))
        for name, share in shares.items():
            if name not in self.tasks:
                self.tasks[name] = self.progress.add_task(f"  {name}", total=1.0)
            self.progress.update(self.tasks[name], completed=share)

    def evaluated(self, evaluation: Evaluation) -> None:
        super().evaluated(evaluation)
        self.progress.advance(self.stage)

    def settled(self, lineage: str, level: Level) -> None:
        super().settled(lineage, level)
        self.progress.advance(self.stage)


@contextmanager
def watching(console: Console) -> Iterator[Watch]:
    """Bars on a terminal, lines elsewhere."""
    if not console.is_terminal:
        yield Lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bars(console, progress)


def show_result(console: Console, result: Result) -> None:
    """The final table, the verdict, and where things are."""
    table = Table(title=Text(f"{result.model} on {result.task}: the report split"), title_justify="left")
    table.add_column("")
    for name in result.metrics:
        table.add_column(name, justify="right")
    for name in ("prunable", "encoder", "whole model"):
        table.add_column(f"zeros in\n{name}", justify="right")
    for row in result.rows:
        cells = [f"{row.report[name]:.4f}" for name in result.metrics]
        table.add_row(row.name, *cells, *map(percent, row.sparsity.values()))
    console.print(table)
    console.print(Text(verdict(result)))
    winners = ", ".join(level.winner.candidate.name for level in result.levels)
    console.print(Text(f"Winners by level: {winners}. Mask digest {result.levels[-1].digest}."))
    wall = duration(result.seconds["wall"])
    busy = ", ".join(f"{name} {duration(spent)}" for name, spent in result.seconds.items() if name != "wall" and spent)
    console.print(Text(f"Took {wall} (workers' time: {busy})."))
    console.print(Text(f"Everything is in {result.run}; the sparse model, ready to load, in {result.export}."))
