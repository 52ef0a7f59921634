"""The workers' timeline: what each worker did when, as records and as a text plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raymask.core.lineage import IMP
from raymask.core.records import Evaluation, FinetuneResult, LevelRecord, Phase, Span
from raymask.report.text import duration

LETTERS: Mapping[Phase, str] = {"dense": "d", "early evaluation": "e", "fine-tuning": "f", "IMP baseline": "i"}
IDLE = "."
BAR_WIDTH, MAX_BARS = 60, 16  # characters per bar, and the number of workers that get a bar
MAX_GAP_S = 600.0  # seconds; a longer gap without any work is cut out: the search was stopped, or waited for a cluster


def worker_spans(finished: Sequence[tuple[str, LevelRecord]], evaluations: Sequence[Evaluation]) -> tuple[Span, ...]:
    """All work that workers have finished, ordered by start time.

    Args:
        finished: Lineage and record of every finished level.
        evaluations: All early evaluations; those that no worker reported on (`started` is 0) are left out.

    Returns:
        One span per evaluation and per fine-tuning; helper workers of a fine-tuning get a span of their own.
    """
    work: list[tuple[Phase, int, FinetuneResult | Evaluation]] = [
        ("early evaluation", evaluation.candidate.level, evaluation) for evaluation in evaluations if evaluation.started
    ]
    for lineage, record in finished:
        work.append((phase_of(lineage, record.level), record.level, record.finetune_result))
    return tuple(
        Span(worker=worker, phase=phase, level=level, started=outcome.started, seconds=outcome.seconds)
        for phase, level, outcome in sorted(work, key=lambda item: item[2].started)
        for worker in (outcome.worker, *(outcome.helper_workers if isinstance(outcome, FinetuneResult) else ()))
    )


def phase_of(lineage: str, level: int) -> Phase:
    """The phase that a fine-tuning of a lineage's level belongs to."""
    return "dense" if level == 0 else "IMP baseline" if lineage == IMP else "fine-tuning"


@dataclass(frozen=True)
class TimeAxis:
    """A time axis that starts at the first span and leaves out long gaps.

    Attributes:
        begin: Start of the first span, Unix time in seconds.
        stops: Start (Unix time) and length of each gap that is cut out, in seconds.
    """

    begin: float
    stops: Sequence[tuple[float, float]]

    def at(self, moment: float) -> float:
        """The position of a Unix time on the axis, in seconds."""
        return moment - self.begin - sum(seconds for begin, seconds in self.stops if begin < moment)

    def scaled(self, *scale: str) -> list[str]:
        """The labels of the axis: its scale, and how much time is cut out, if any."""
        seconds = sum(seconds for _, seconds in self.stops)
        return [*scale, f"{duration(seconds)} without work cut out"] if seconds else [*scale]


def time_axis(pieces: Sequence[Span]) -> TimeAxis:
    """The time axis of some spans. Work that was lost with its worker has no span and counts as a gap."""
    begin = end = min((piece.started for piece in pieces), default=0.0)
    stops = []
    for piece in sorted(pieces, key=lambda piece: piece.started):
        if piece.started - end > MAX_GAP_S:
            stops.append((end, piece.started - end))
        end = max(end, piece.started + piece.seconds)
    return TimeAxis(begin, stops)


def worker_host(worker: str) -> str:
    """A worker's host and process id, without its device."""
    return worker.partition(" ")[0]


def timeline(pieces: Sequence[Span]) -> list[str]:
    """A text plot: one bar per worker with the share of time that it was busy, and a legend.

    A worker is idle when it waits, has not started yet, or was lost together with unfinished work. Stops of the search
    of at most STOP seconds count as idle time; longer ones are cut out. Every worker's clock is trusted as it is.

    Args:
        pieces: All finished work.

    Returns:
        Lines of text; none when there is no work.
    """
    axis = time_axis(pieces)
    pieces = [piece.model_copy(update={"started": axis.at(piece.started)}) for piece in pieces]
    span = max((piece.started + piece.seconds for piece in pieces), default=0.0)
    if not span:
        return []
    workers: dict[str, list[Span]] = {}
    for piece in sorted(pieces, key=lambda piece: (piece.started, piece.worker)):
        workers.setdefault(worker_host(piece.worker), []).append(piece)
    rows = [(name, work, sum(piece.seconds for piece in work) / span) for name, work in workers.items()]
    lines = [f"{bar(work, span)} {share:4.0%}  {name}" for name, work, share in rows[:MAX_BARS]]
    rest = [share for _, _, share in rows[MAX_BARS:]]
    if rest:
        lines.append(f"{f'and {len(rest)} more':{BAR_WIDTH}} {sum(rest) / len(rest):4.0%}")
    busy = "".join(
        f"{LETTERS[phase]} {phase} {duration(spent)}, " for phase, spent in seconds_by_phase(pieces).items() if spent
    )
    scale = ", ".join(axis.scaled("Workers' time", f"{duration(span / BAR_WIDTH)} a letter"))
    return [f"{scale}:", *lines, f"{busy}{IDLE} idle"]


def bar(work: Sequence[Span], span: float) -> str:
    """One worker's bar: WIDTH letters, each for what took most of an equal part of the time.

    Args:
        work: The worker's spans, `started` in seconds from 0.
        span: Length of the time axis in seconds.
    """
    cell = span / BAR_WIDTH
    letters = ""
    for left in (cell * index for index in range(BAR_WIDTH)):
        taken = {IDLE: cell} | dict.fromkeys(LETTERS.values(), 0.0)
        for piece in work:
            inside = max(0.0, min(piece.started + piece.seconds, left + cell) - max(piece.started, left))
            taken[LETTERS[piece.phase]] += inside
            taken[IDLE] -= inside
        letters += max(taken, key=taken.__getitem__)
    return letters


def seconds_by_phase(pieces: Sequence[Span]) -> dict[Phase, float]:
    """Seconds of work by phase, summed over workers."""
    return {phase: sum(piece.seconds for piece in pieces if piece.phase == phase) for phase in LETTERS}
