"""When is a report written, and what is in it?"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pyarrow as pa

from raymask.core.errors import first_line
from raymask.core.records import Evaluation, Level, Result, Watch
from raymask.report.figures import Figures, State, gather
from raymask.report.page import page
from raymask.report.sections import report
from raymask.store import RunDir

LEAST = 10.0  # seconds between two reports on a level's early evaluation
SHARE = 20  # of the driver's time, at most one part in so many goes into them

COLUMNS = pa.schema(
    {
        "level": pa.int64(),
        "sparsity": pa.float64(),
        "parent": pa.int64(),
        "candidate": pa.int64(),
        "seed": pa.uint64(),
        "control": pa.bool_(),
        "exponent": pa.float64(),
        "ratio": pa.float64(),
        "rung": pa.int64(),
        "order": pa.int64(),
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
"""Of results.parquet: one row an early evaluation, as in the records. `winner`: its mask was fine-tuned."""


class Reporter:
    """A Watch that passes everything on to another, and keeps a run's report up to date."""

    def __init__(self, inner: Watch, store: RunDir) -> None:
        self.inner = inner
        self.store = store
        self.due = 0.0

    def begins(self, stage: str, level: int, total: int, known: Sequence[Evaluation] | None = None) -> None:
        self.inner.begins(stage, level, total, known)

    def running(self, shares: Mapping[str, float]) -> None:
        self.inner.running(shares)

    def evaluated(self, evaluation: Evaluation) -> None:
        self.inner.evaluated(evaluation)
        if time.monotonic() > self.due:
            self.write()

    def settled(self, lineage: str, level: Level) -> None:
        self.inner.settled(lineage, level)
        self.write()

    def sent(self, size: int) -> None:
        self.inner.sent(size)

    def note(self, text: str) -> None:
        self.inner.note(text)

    def write(self) -> None:
        began = time.monotonic()
        write_report(self.store, "running")
        ended = time.monotonic()
        self.due = ended + max(LEAST, SHARE * (ended - began))


@contextmanager
def reporting(watch: Watch, store: RunDir) -> Iterator[Watch]:
    """A Watch that keeps the run's report up to date; whoever ends the block early, the report says that it stopped."""
    reporter = Reporter(watch, store)
    reporter.write()
    try:
        yield reporter
    except BaseException:
        write_report(store, "stopped")
        raise


def write_report(store: RunDir, state: State, result: Result | None = None) -> None:
    """The page, its figures, and the table of early evaluations, with the result that is about to be written."""
    try:
        figures = gather(store, state, result)
        title = f"{figures.spec.model.name} on {figures.spec.task.name or figures.spec.task.train}"
        html = page(title, report(figures), figures.state, figures.written)
        store.write_report(html, figures.model_dump_json(indent=1), table(figures))
    except Exception as error:  # noqa: BLE001 - no page is worth a search
        store.note(f"the report cannot be written: {first_line(error)}")


def table(figures: Figures) -> pa.Table:
    """All early evaluations, in the order of the journals."""
    rows = [
        found.model_dump()
        | {
            "level": stand.level,
            "sparsity": stand.sparsity,
            "parent": found.candidate.parent,
            "candidate": found.candidate.index,
            "seed": found.candidate.seed,
            "control": found.candidate.is_control,
            "exponent": found.candidate.noise.exponent if found.candidate.noise else None,
            "ratio": found.candidate.noise.ratio if found.candidate.noise else None,
            "winner": found.candidate.index in stand.winners,
        }
        for stand in figures.levels
        for found in stand.evaluations
    ]
    return pa.Table.from_pylist(rows, COLUMNS)
