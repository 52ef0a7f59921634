"""How far is a search, or what did it find? And how do several compare?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import rich.box
import rich.table
from rich.console import Console
from rich.text import Text

from raymask.core.errors import UserError
from raymask.report.figures import gather
from raymask.report.page import page
from raymask.report.sections import Section, Table, comparison, report
from raymask.report.terminal import say
from raymask.store import RunDir


def show_run(console: Console, run: str, as_json: bool) -> None:
    """Print a run directory's search, or its figures as JSON. Raises UserError when it is none."""
    figures = gather(RunDir(run))
    if as_json:
        print(figures.model_dump_json(indent=1))
        return
    say(console, f"{run}: {figures.state}")
    show_sections(console, report(figures))


def show_comparison(console: Console, runs: Sequence[str], html: Path | None) -> None:
    """Print searches side by side, and write the page. Raises UserError when one of them is no run."""
    found = dict(zip(short_names(runs), (gather(RunDir(run)) for run in runs), strict=True))
    sections = comparison(found)
    show_sections(console, sections)
    if html is not None:
        text = page(", ".join(found), sections, "compared", time.time())
        try:
            html.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--html: {html} cannot be written: {error.strerror}") from None
        say(console, f"\nThe same with plots is in {html}")


def short_names(runs: Sequence[str]) -> list[str]:
    """The runs without what all their places begin with. Raises UserError when one of them comes twice."""
    places = [run.rstrip("/").removeprefix("./") for run in runs]
    twice = {place for place in places if places.count(place) > 1}
    if twice:
        raise UserError(f"{min(twice)} is named twice")
    parts = [place.split("/") for place in places]
    same = 0
    while all(len(whole) > same + 1 for whole in parts) and len({whole[same] for whole in parts}) == 1:
        same += 1
    return ["/".join(whole[same:]) for whole in parts]


def show_sections(console: Console, sections: Sequence[Section]) -> None:
    """All of them, plots in letters where there are any, and what a page folds away as far as it is a table."""
    for section in sections:
        tables = [content for content in section.more.values() if isinstance(content, Table)]
        if not (section.lines or section.table or section.drawn or tables):
            continue  # there are only plots
        console.print()
        console.print(Text(section.title, style="bold"))
        for line in section.lines:
            say(console, line.replace("`", ""))
        if section.table:
            show_table(console, section.table)
        for line in section.drawn:
            say(console, line)
        for table in tables:
            show_table(console, table)


def show_table(console: Console, table: Table) -> None:
    found = rich.table.Table(box=rich.box.SIMPLE_HEAD if any(table.heads) else None, show_header=any(table.heads))
    for head in table.heads:
        found.add_column(Text(head))
    for row in table.rows:
        found.add_row(*map(Text, row))
    console.print(found)
