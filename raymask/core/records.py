"""What crosses a boundary: the frozen records that driver, workers, journal and report share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from raymask.core.tensors import Packed


class Record(BaseModel):
    """A frozen value that reads and writes JSON exactly."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="constants"
    )


Place = tuple[int, int, int]
"""Which early evaluation of a level: a candidate's index, a rung, an order of rows."""


class Noise(Record):
    """How far a random mask may stray: `exponent` a > 0 (1/temperature), `ratio` r > 0 of votes (method 2)."""

    exponent: float
    ratio: float


class Candidate(Record):
    """Everything about one mask, given a snapshot: never the mask itself.

    `level` counts from 1 (0 is dense), `density` in (0, 1] is the share of the prunable weights that is kept.
    Without `noise` it is the control: the deterministic mask of the largest scores, by default magnitudes. `parent`:
    the branch of the level before that it is drawn from, counted from 1.
    """

    level: int
    index: int
    seed: int
    density: float
    noise: Noise | None = None
    parent: int = 1

    @property
    def is_control(self) -> bool:
        return self.noise is None

    @property
    def name(self) -> str:
        name = "control" if self.is_control else f"candidate {self.index}"
        return name if self.parent == 1 else f"{name} of branch {self.parent}"


@dataclass(frozen=True)
class Climb:
    """A candidate's early evaluation from one rung to the next; to rung 0 it starts from its parent.

    With an `order` above 0 it is a repeat from the parent to the last rung, in another order of rows.
    """

    candidate: Candidate
    rung: int = 0
    order: int = 0

    @property
    def place(self) -> Place:
        return self.candidate.index, self.rung, self.order

    @property
    def below(self) -> Place:
        """Where it goes on from, when it got there."""
        return self.candidate.index, self.rung - 1, self.order


class Point(Record):
    """One look at the `select` split after `step` optimizer steps: mean `loss`, mean of the task's metrics.

    Of a perplexity the `metric` is minus its logarithm, so that larger is always better.

    `agreement` with the dense model, where that is known to the worker: minus the mean Kullback-Leibler divergence of
    its class probabilities from the dense model's, for a regression minus the mean squared difference.
    """

    step: int
    loss: float
    metric: float
    agreement: float | None = None

    @property
    def rank(self) -> tuple[float, float]:
        """By which fine-tuned models are compared, the larger the better: the metric, on a tie the loss."""
        return self.metric, -self.loss


class Evaluation(Record):
    """What the early evaluation of one candidate found at a `rung`, in an `order`, or the `error` that ended it.

    `score`: larger is better (the negative loss, the metric, or the agreement), the mean of the looks on the `curve`.
    `row_losses`: float32 bytes, one loss a row that was looked at, averaged over the same looks.
    `distance`: share in [0, 1] of kept entries that the control prunes. `digest`: the mask's. `started`: Unix time,
    seconds; 0 when no worker lived to tell. `machine`: the error was the machine's, not the candidate's, so a
    continued search tries again.
    """

    candidate: Candidate
    rung: int = 0
    order: int = 0
    score: float | None = None
    curve: tuple[Point, ...] = ()
    row_losses: bytes = b""
    distance: float | None = None
    digest: str | None = None
    started: float = 0.0
    seconds: float = 0.0
    worker: str = ""
    error: str | None = None
    machine: bool = False

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def place(self) -> Place:
        return self.candidate.index, self.rung, self.order

    def losses(self) -> np.ndarray:
        """float32, one a row of `select` that was looked at."""
        return np.frombuffer(self.row_losses, np.float32)


class Stage(Record):
    """One training: as many `epochs` as asked, at a peak `learning_rate` reached after the `warmup` share of steps.

    `shards`: parts of a batch, each of which may be another worker's.
    """

    epochs: float
    batch_size: int
    shards: int = 1
    learning_rate: float
    schedule: str
    warmup: float
    distill: bool


class FineTuned(Record):
    """How a fine-tuning went: every look at `select`, and which one (`best`, an index) was kept.

    `started`: Unix time, seconds. `helpers`: workers who trained it together with `worker`.
    """

    curve: tuple[Point, ...]
    best: int
    started: float
    seconds: float
    worker: str
    helpers: tuple[str, ...] = ()

    @property
    def kept(self) -> Point:
        return self.curve[self.best]


class Interval(Record):
    """A mean with the bounds of its 95 % bootstrap interval; within noise when it contains zero."""

    mean: float
    low: float
    high: float

    @property
    def within_noise(self) -> bool:
        return self.low <= 0.0 <= self.high


class Level(Record):
    """A finished level of one lineage; written last, so its existence means that the level is done.

    `winner` has no score when it was the only candidate. `gain`: by how much the winner's loss on `select`
    undercuts the control's, positive is better. `confidence`: the probability that no other candidate's is lower, by
    the bootstrap over rows. `report`: the task's metrics on the split that no choice ever sees. `parent`: key of the
    snapshot that it was made from. `data`: digest of the rows that it all rests on. `files`: SHA-256 by file name.
    """

    level: int
    density: float
    kept: int
    total: int
    winner: Evaluation
    evaluated: int
    failed: int
    gain: Interval | None
    confidence: float | None = None
    finetuned: FineTuned
    report: dict[str, float]
    digest: str
    parent: str
    data: str
    files: dict[str, str] = {}

    @property
    def sparsity(self) -> float:
        """Share of the prunable weights that are gone."""
        return 1 - self.kept / self.total if self.total else 0.0


SELECTED, CONTROL = "selected", "control (IMP)"
"""What a search's model and its baseline's are called."""


class Row(Record):
    """One model of the final table: metrics on `report` with their intervals, sparsity in [0, 1] in three denominators.

    `always`: of a classification the class that is the answer to all of its rows, None where there are several.
    """

    name: str
    report: dict[str, float]
    intervals: dict[str, Interval]
    sparsity: dict[str, float]
    always: str | None = None


Purpose = Literal["dense", "early evaluation", "fine-tuning", "baseline (IMP)"]
"""What workers' time goes into; what is dense, distilled or not, is "dense"."""


class Piece(Record):
    """One piece of work, and when it took which worker's time. `started`: Unix time by the worker's clock, seconds."""

    worker: str
    kind: Purpose
    level: int
    started: float
    seconds: float


class Result(Record):
    """What a finished search found. `rows`: dense, the baseline where it ran, selected.

    `kind`: the spec's task.kind. `sizes`: the dense model's parameters in the three denominators. `gain`: by how much
    the selected model's mean metric on `report` exceeds the baseline's, paired over rows; of a perplexity, by how much
    its logarithm falls short. `levels`: from the dense model
    to the selected one. `others`: masks that were fine-tuned too, and led elsewhere. `scored`: how many rows of
    `select` scored the candidates, and how many it has. `seconds`: by purpose, summed over workers, and the `wall`
    clock of the last start. `timeline`: all work that was finished, in any of its starts. `files`: SHA-256 by name of
    the tensors in `export`.
    """

    run: str
    model: str
    task: str
    kind: str = "classification"
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    sizes: dict[str, int]
    gain: Interval | None
    levels: tuple[Level, ...]
    others: tuple[Level, ...] = ()
    imp: tuple[Level, ...]
    scored: tuple[int, int]
    seconds: dict[str, float]
    timeline: tuple[Piece, ...]
    export: str
    files: dict[str, str] = {}


class Watch(Protocol):
    """Who is told what happens while it happens: a terminal, a log, or nobody."""

    def begins(self, stage: str, level: int, total: int, known: Sequence[Evaluation] | None = None) -> None:
        """A stage of a level starts, with `total` pieces of work.

        Early evaluation: `known` are the evaluations that the journal has already. Fine-tuning: None.
        """

    def running(self, shares: Mapping[str, float]) -> None:
        """What is being worked on, and which share in [0, 1] of each is done."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """A candidate's early evaluation ended."""

    def settled(self, lineage: str, level: Level) -> None:
        """A level of a lineage is done."""

    def sent(self, size: int) -> None:
        """So many bytes were put where all workers can read them."""

    def note(self, text: str) -> None:
        """Anything else that deserves a line."""


@dataclass(frozen=True)
class Snapshot:
    """Weights and optimizer state that training starts from, with the teacher's weights when it distils.

    `key` names the contents: equal keys, equal tensors. `optimizer` is None for a fresh start.
    """

    key: str
    weights: Packed
    optimizer: Packed | None = None
    teacher: Packed | None = None


@dataclass(frozen=True)
class Checkpoint:
    """What a fine-tuning returns: tensors by name, packed mask bits, logits of `report` (float32).

    Of a language model, in place of logits, each row's summed cost and how many predicted tokens it has, (rows, 2).
    """

    weights: Packed
    optimizer: Packed
    mask: Packed
    digest: str
    kept: int
    total: int
    finetuned: FineTuned
    logits: np.ndarray


@dataclass(frozen=True)
class Settling:
    """One fine-tuning to be done: `candidate`'s mask, redrawn from its parent, must have `digest` when given.

    `name` is shown while it runs. The search and its baseline share the seeds, so the mask is the difference.
    """

    name: str
    candidate: Candidate
    stage: Stage
    digest: str | None = None


Evaluate = Callable[[Mapping[int, Snapshot], Callable[[], Iterable[Climb]]], Iterator[Evaluation]]
"""The first seam: (parents by branch, what is worth doing now, best first) -> evaluations in the order in which they
finish. It asks again whenever one has been taken from it, and ends when there is nothing worth doing."""

FineTune = Callable[[Sequence[tuple[Snapshot, Settling]]], Iterator[tuple[int, Checkpoint]]]
"""The second seam: fine-tunings from their parents, yielded with their index in the order in which they finish."""
