"""The report's writer: keeps the HTML page, its numbers and the table of early evaluations up to date."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

import pyarrow as pa

from raymask.core.callbacks import Callback
from raymask.core.errors import first_line
from raymask.core.records import Evaluation, LevelRecord, Result
from raymask.report.html import render_page
from raymask.report.sections import report_sections
from raymask.report.summary import RunSummary, State, load_summary
from raymask.runs.run_dir import RunDir

MIN_REPORT_INTERVAL_S = 10.0  # seconds, at least, between two reports during an early evaluation
REPORT_TIME_FACTOR = 20  # reports take at most 1/20 of the driver's time


COLUMNS = pa.schema(
    {
        "level": pa.int64(),
        "sparsity": pa.float64(),
        "parent": pa.int64(),
        "candidate": pa.int64(),
        "seed": pa.uint64(),
        "is_magnitude": pa.bool_(),
        "exponent": pa.float64(),
        "ratio": pa.float64(),
        "rung": pa.int64(),
        "repeat": pa.int64(),
        "score": pa.float64(),
        "distance": pa.float64(),
        "winner": pa.bool_(),
        "error": pa.string(),
        "digest": pa.string(),
        "worker": pa.string(),
        "started": pa.float64(),
        "seconds": pa.float64(),
        "curve": pa.list_(
            pa.struct({"step": pa.int64(), "loss": pa.float64(), "metric": pa.float64(), "agreement": pa.float64()})
        ),
    }
)
"""Columns of results.parquet: one row per early evaluation, with the fields of its records. `parent` is the parent's
branch, `ratio` the sampling ratio. `winner`: the search fine-tuned the mask."""


class ReportCallback(Callback):
    """A callback that keeps a run's report up to date while a `with` block runs.

    When the block ends with an exception, the report says that the search failed, or is stopped (Ctrl-C, SIGTERM).

    Attributes:
        run_dir: The run directory that the report goes into.
        due: `time.monotonic()` from which on the next early evaluation triggers a report.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self.due = 0.0

    def __enter__(self) -> Self:
        """Write the first report."""
        self.write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Say in the report how the search ended, if it has not finished."""
        if error is not None:
            write_report(self.run_dir, "failed" if isinstance(error, Exception) else "stopped")

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Write the report when it is due."""
        if time.monotonic() > self.due:
            self.write()

    def on_level_end(self, lineage: str, level: LevelRecord) -> None:
        """Write the report."""
        self.write()

    def write(self) -> None:
        """Write the report of the running search, and set when the next one is due."""
        began = time.monotonic()
        write_report(self.run_dir, "running")
        ended = time.monotonic()
        self.due = ended + max(MIN_REPORT_INTERVAL_S, REPORT_TIME_FACTOR * (ended - began))


def write_report(run_dir: RunDir, state: State, result: Result | None = None) -> None:
    """Write the page, its numbers as JSON, and the table of early evaluations.

    A report that cannot be written does not end the search: the run directory gets a note instead.

    Args:
        run_dir: The run directory.
        state: What the report says about the search.
        result: The result that is about to be written; None: the one in the run directory, if any.
    """
    try:
        summary = load_summary(run_dir, state, result)
        title = f"{summary.spec.model.name} on {summary.spec.task.name or summary.spec.task.train}"
        html = render_page(title, report_sections(summary), summary.state, summary.written)
        run_dir.write_report(html, summary.model_dump_json(indent=1), table(summary))
    except Exception as error:  # noqa: BLE001 - a search is worth more than its report
        run_dir.note(f"the report cannot be written: {first_line(error)}")


def table(summary: RunSummary) -> pa.Table:
    """All early evaluations with the columns of COLUMNS, in the order of the journals."""
    rows = [
        evaluation.model_dump()
        | {
            "level": level_summary.level,
            "sparsity": level_summary.sparsity,
            "parent": evaluation.candidate.parent_branch,
            "candidate": evaluation.candidate.index,
            "seed": evaluation.candidate.seed,
            "is_magnitude": evaluation.candidate.is_magnitude,
            "exponent": evaluation.candidate.noise.exponent if evaluation.candidate.noise else None,
            "ratio": evaluation.candidate.noise.sampling_ratio if evaluation.candidate.noise else None,
            "winner": evaluation.candidate.index in level_summary.winners,
        }
        for level_summary in summary.levels
        for evaluation in level_summary.evaluations
    ]
    return pa.Table.from_pylist(rows, COLUMNS)
