"""Where does the workers' time go?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raymask.core.records import Evaluation, FineTuned, Level, Piece, Purpose
from raymask.report.words import duration
from raymask.store import IMP

LETTERS: Mapping[Purpose, str] = {"dense": "d", "early evaluation": "p", "fine-tuning": "f", "baseline (IMP)": "b"}
IDLE = "."
WIDTH, WORKERS = 60, 16  # letters of a bar, and how many workers get one
STOP = 600.0  # seconds in which nobody worked that no picture shows: the search was stopped, or waited for a cluster


def worked(finished: Sequence[tuple[str, Level]], evaluations: Sequence[Evaluation]) -> tuple[Piece, ...]:
    """Every piece of work that a worker has finished in a search, in the order in which they started."""
    work: list[tuple[Purpose, int, FineTuned | Evaluation]] = [
        ("early evaluation", found.candidate.level, found) for found in evaluations if found.started
    ]
    for lineage, record in finished:
        work.append((purpose_of(lineage, record.level), record.level, record.finetuned))
    return tuple(
        Piece(worker=worker, kind=kind, level=number, started=found.started, seconds=found.seconds)
        for kind, number, found in sorted(work, key=lambda item: item[2].started)
        for worker in (found.worker, *(found.helpers if isinstance(found, FineTuned) else ()))
    )


def purpose_of(lineage: str, level: int) -> Purpose:
    """What a fine-tuning was for."""
    return "dense" if level == 0 else "baseline (IMP)" if lineage == IMP else "fine-tuning"


@dataclass(frozen=True)
class Clock:
    """Where a moment stands in a picture, in seconds from the first start. `stops`: beginnings and seconds of cuts."""

    begin: float
    stops: Sequence[tuple[float, float]]

    def at(self, moment: float) -> float:
        return moment - self.begin - sum(seconds for begin, seconds in self.stops if begin < moment)

    def scaled(self, *scale: str) -> list[str]:
        """What stands beside a picture: its scale, and how much is cut out where something is."""
        seconds = sum(seconds for _, seconds in self.stops)
        return [*scale, f"{duration(seconds)} without work cut out"] if seconds else [*scale]


def clock(pieces: Sequence[Piece]) -> Clock:
    """The clock by which work is drawn. Work that was lost with its worker left no piece: nobody worked."""
    begin = end = min((piece.started for piece in pieces), default=0.0)
    stops = []
    for piece in sorted(pieces, key=lambda piece: piece.started):
        if piece.started - end > STOP:
            stops.append((end, piece.started - end))
        end = max(end, piece.started + piece.seconds)
    return Clock(begin, stops)


def short(worker: str) -> str:
    """A worker's host and process."""
    return worker.partition(" ")[0]


def timeline(pieces: Sequence[Piece]) -> list[str]:
    """A bar a worker from the first start to the last end, the share of it that the worker was busy, and a legend.

    Idle is idle: a worker that waits, has not come yet or was lost, with what it had not finished, and a search that
    was stopped for no longer than STOP. Every worker's clock is believed.
    """
    time = clock(pieces)
    pieces = [piece.model_copy(update={"started": time.at(piece.started)}) for piece in pieces]
    span = max((piece.started + piece.seconds for piece in pieces), default=0.0)
    if not span:
        return []
    workers: dict[str, list[Piece]] = {}
    for piece in sorted(pieces, key=lambda piece: (piece.started, piece.worker)):
        workers.setdefault(short(piece.worker), []).append(piece)
    rows = [(name, work, sum(piece.seconds for piece in work) / span) for name, work in workers.items()]
    lines = [f"{bar(work, span)} {share:4.0%}  {name}" for name, work, share in rows[:WORKERS]]
    rest = [share for _, _, share in rows[WORKERS:]]
    if rest:
        lines.append(f"{f'and {len(rest)} more':{WIDTH}} {sum(rest) / len(rest):4.0%}")
    busy = "".join(f"{LETTERS[kind]} {kind} {duration(spent)}, " for kind, spent in by_purpose(pieces).items() if spent)
    scale = ", ".join(time.scaled("Workers' time", f"{duration(span / WIDTH)} a letter"))
    return [f"{scale}:", *lines, f"{busy}{IDLE} idle"]


def bar(work: Sequence[Piece], span: float) -> str:
    """A letter for each of WIDTH equal parts of `span` seconds: what took most of it. Work starts at 0 or later."""
    cell = span / WIDTH
    letters = ""
    for left in (cell * index for index in range(WIDTH)):
        taken = {IDLE: cell} | dict.fromkeys(LETTERS.values(), 0.0)
        for piece in work:
            inside = max(0.0, min(piece.started + piece.seconds, left + cell) - max(piece.started, left))
            taken[LETTERS[piece.kind]] += inside
            taken[IDLE] -= inside
        letters += max(taken, key=taken.__getitem__)
    return letters


def by_purpose(pieces: Sequence[Piece]) -> dict[Purpose, float]:
    """Seconds, summed over workers."""
    return {kind: sum(piece.seconds for piece in pieces if piece.kind == kind) for kind in LETTERS}
