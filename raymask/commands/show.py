"""Reports in the terminal: one run, or several side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import rich.table
from rich.console import Console
from rich.text import Text

from raymask.core.errors import UserError
from raymask.export.selected import megabytes
from raymask.report.console import say
from raymask.report.html import render_page
from raymask.report.sections import ReportSection, Table, comparison_sections, report_sections
from raymask.report.summary import load_summary
from raymask.runs.run_dir import RunDir


def show_run(console: Console, run: str, as_json: bool) -> None:
    """Print the report of a run.

    Args:
        console: Where the output goes.
        run: The run directory, a path or a URI.
        as_json: Print the summary as JSON instead.

    Raises:
        UserError: When the directory is no run.
    """
    run_dir = RunDir(run)
    summary = load_summary(run_dir)
    if as_json:
        print(summary.model_dump_json(indent=1))
        return
    say(console, f"{run}: {summary.state}, {megabytes(run_dir.storage.size())}")
    show_sections(console, report_sections(summary))


def show_comparison(console: Console, runs: Sequence[str], html: Path | None) -> None:
    """Print runs side by side, and optionally write the comparison as a page.

    Args:
        console: Where the output goes.
        runs: Run directories, paths or URIs.
        html: The page's file; None for no page.

    Raises:
        UserError: When one of them is no run or is given twice, or the page cannot be written.
    """
    summaries = dict(zip(short_names(runs), (load_summary(RunDir(run)) for run in runs), strict=True))
    sections = comparison_sections(summaries)
    show_sections(console, sections)
    if html is not None:
        text = render_page(", ".join(summaries), sections, "compared", time.time())
        try:
            html.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--html: {html} cannot be written: {error.strerror}") from None
        say(console, f"\nThe same with plots is in {html}")


def short_names(runs: Sequence[str]) -> list[str]:
    """Names of runs: their locations without the leading folders that all of them share.

    Raises:
        UserError: When a run is given twice.
    """
    locations = [run.rstrip("/").removeprefix("./") for run in runs]
    twice = {location for location in locations if locations.count(location) > 1}
    if twice:
        raise UserError(f"{min(twice)} is named twice")
    parts = [location.split("/") for location in locations]
    shared = 0
    while all(len(folders) > shared + 1 for folders in parts) and len({folders[shared] for folders in parts}) == 1:
        shared += 1
    return ["/".join(folders[shared:]) for folders in parts]


def show_sections(console: Console, sections: Sequence[ReportSection]) -> None:
    """Print all sections, with text plots instead of plots, and the tables that a page folds away."""
    for section in sections:
        tables = [content for content in section.more.values() if isinstance(content, Table)]
        if not (section.lines or section.table or section.text_plot or tables):
            continue  # the section has only plots
        console.print()
        console.print(Text(section.title, style="bold"))
        for line in section.lines:
            say(console, line.replace("`", ""))
        if section.table:
            show_table(console, section.table)
        for line in section.text_plot:
            say(console, line)
        for table in tables:
            show_table(console, table)


def show_table(console: Console, table: Table) -> None:
    """Print a table."""
    grid = rich.table.Table(box=rich.box.SIMPLE_HEAD if any(table.heads) else None, show_header=any(table.heads))
    for head in table.heads:
        grid.add_column(Text(head))
    for row in table.rows:
        grid.add_row(*map(Text, row))
    console.print(grid)
