"""Frozen records that driver, workers, journal and report share. Their field names are the on-disk format."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from raymask.core.masking.noise import Noise


class Record(BaseModel):
    """A frozen value that reads and writes JSON exactly."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="constants"
    )


EvalKey = tuple[int, int, int]
"""Key of an early evaluation within a level: (candidate index, rung, repeat)."""


class Candidate(Record):
    """Everything that determines one mask, given a snapshot; never the mask itself.

    Attributes:
        level: Level, counted from 1; 0 is the dense model.
        index: Index within the level, from 0.
        seed: Seed of the mask's random draws, in [0, 2^63).
        density: Share of the prunable weights that is kept, in (0, 1].
        noise: Randomness of the mask. None for the deterministic mask, the one of the largest scores; by default the
            scores are magnitudes.
        parent_branch: Branch of the level before whose snapshot the mask is drawn from, counted from 1.
    """

    level: int
    index: int
    seed: int
    density: float
    noise: Noise | None = None
    parent_branch: int = 1

    @property
    def is_magnitude(self) -> bool:
        """Whether the mask is deterministic."""
        return self.noise is None

    @property
    def name(self) -> str:
        """Name for people, unique within the level."""
        name = "magnitude mask" if self.is_magnitude else f"candidate {self.index}"
        return name if self.parent_branch == 1 else f"{name} of branch {self.parent_branch}"


class EvalPoint(Record):
    """One evaluation on the `validation` split during training.

    Attributes:
        step: Optimizer steps so far.
        loss: Mean loss.
        metric: Mean of the task's metrics, larger is better. Perplexity counts as -log(perplexity).
        agreement: Agreement with the dense model, larger is better: minus the mean Kullback-Leibler divergence of the
            class probabilities from the dense model's; for a regression minus the mean squared difference. None where
            the worker does not know the dense model's predictions.
    """

    step: int
    loss: float
    metric: float
    agreement: float | None = None

    @property
    def sort_key(self) -> tuple[float, float]:
        """Key for comparing fine-tuned models, larger is better: the metric, then the lower loss."""
        return self.metric, -self.loss


class Evaluation(Record):
    """Result of one early evaluation, or the error that ended it.

    Attributes:
        candidate: The candidate that was evaluated.
        rung: Rung that the evaluation ran to, from 0.
        repeat: Which order of the training rows; 0 is the first evaluation, larger ones repeat it.
        score: Score, larger is better: the negative loss, the metric, or the agreement, averaged over `curve`. None
            after an error.
        curve: The evaluations on `validation` that count for the score.
        row_losses: float32 bytes, the loss of each evaluated row, averaged over the same evaluations.
        distance: Share in [0, 1] of the mask's kept weights that the magnitude mask prunes.
        digest: The mask's digest.
        started: Start in Unix time, seconds; 0 when the worker was lost before it could report it.
        seconds: Duration in seconds.
        worker: Name of the worker.
        error: Text of the error that ended the evaluation, None when it succeeded.
        system_failure: Whether the machine caused the error, not the candidate. A resumed search evaluates such a
            candidate again.
    """

    candidate: Candidate
    rung: int = 0
    repeat: int = 0
    score: float | None = None
    curve: tuple[EvalPoint, ...] = ()
    row_losses: bytes = b""
    distance: float | None = None
    digest: str | None = None
    started: float = 0.0
    seconds: float = 0.0
    worker: str = ""
    error: str | None = None
    system_failure: bool = False

    @property
    def ok(self) -> bool:
        """Whether the evaluation succeeded."""
        return self.error is None

    @property
    def key(self) -> EvalKey:
        """Key of the evaluation within its level."""
        return self.candidate.index, self.rung, self.repeat

    def losses(self) -> np.ndarray:
        """Loss of each evaluated row of `validation`, float32 `[n_rows]`; empty after an error."""
        return np.frombuffer(self.row_losses, np.float32)


class TrainConfig(Record):
    """Hyper-parameters of one training.

    Attributes:
        epochs: Number of epochs; may be a fraction.
        batch_size: Rows of one batch.
        data_parallel: Number of shards that each batch is split into; different workers may train them.
        learning_rate: Peak learning rate, reached after the warm-up.
        schedule: "linear" decay after the warm-up, or "constant".
        warmup: Share of the steps, in [0, 1], over which the learning rate rises.
        distill: Whether the loss is distillation from the dense model; else it is the loss on the labels.
    """

    epochs: float
    batch_size: int
    data_parallel: int = 1
    learning_rate: float
    schedule: str
    warmup: float
    distill: bool


class FinetuneResult(Record):
    """How one fine-tuning went.

    Attributes:
        curve: All evaluations on `validation`.
        best: Index into `curve` of the evaluation whose weights are kept.
        started: Start in Unix time, seconds.
        seconds: Duration in seconds.
        worker: Name of the worker.
        helper_workers: Workers that trained shards of its batches.
    """

    curve: tuple[EvalPoint, ...]
    best: int
    started: float
    seconds: float
    worker: str
    helper_workers: tuple[str, ...] = ()

    @property
    def best_eval(self) -> EvalPoint:
        """The evaluation whose weights are kept."""
        return self.curve[self.best]


class ConfidenceInterval(Record):
    """A mean with its 95 % bootstrap interval.

    Attributes:
        mean: The mean over all rows.
        low: Lower bound of the interval.
        high: Upper bound of the interval.
    """

    mean: float
    low: float
    high: float

    @property
    def within_noise(self) -> bool:
        """Whether the interval contains zero."""
        return self.low <= 0.0 <= self.high


class LevelRecord(Record):
    """A finished level of one lineage. It is written last: its existence means that the level is done.

    Attributes:
        level: Level, counted from 1; 0 is the dense model.
        density: Requested share of kept weights, in (0, 1].
        num_kept: Number of prunable weights that are kept.
        num_prunable: Number of prunable weights.
        winner: Early evaluation of the selected mask; without a score when it was the only candidate.
        num_evaluated: Number of candidates.
        num_failed: How many of them failed.
        gain: By how much the winner's loss on `validation` is below the magnitude mask's; positive is better. None
            where there is nothing to compare.
        win_probability: Probability, by the bootstrap over rows, that no other candidate's loss is below the
            winner's. None where there is nothing to compare.
        finetune_result: Result of the fine-tuning.
        test_metrics: The task's metrics on `test`, which no choice ever sees.
        digest: The mask's digest.
        parent_key: Key of the snapshot that the level started from.
        data_fingerprint: Digest of the rows that the level was trained and evaluated on.
        files: SHA-256 by file name.
    """

    level: int
    density: float
    num_kept: int
    num_prunable: int
    winner: Evaluation
    num_evaluated: int
    num_failed: int
    gain: ConfidenceInterval | None
    win_probability: float | None = None
    finetune_result: FinetuneResult
    test_metrics: dict[str, float]
    digest: str
    parent_key: str
    data_fingerprint: str
    files: dict[str, str] = {}

    @property
    def sparsity(self) -> float:
        """Share in [0, 1] of the prunable weights that are pruned."""
        return 1 - self.num_kept / self.num_prunable if self.num_prunable else 0.0


RAYMASK, BASELINE = "raymask", "IMP"
"""Names of the search's model and of the IMP baseline's, in the final table."""


class ModelMetrics(Record):
    """One model of the final table.

    Attributes:
        name: "dense", BASELINE or RAYMASK.
        test_metrics: The task's metrics on `test`.
        intervals: Their confidence intervals.
        sparsity: Sparsity in [0, 1] by denominator: prunable, encoder, whole model.
        constant_prediction: The class that a classifier predicts for every row, None where it predicts several.
    """

    name: str
    test_metrics: dict[str, float]
    intervals: dict[str, ConfidenceInterval]
    sparsity: dict[str, float]
    constant_prediction: str | None = None


Phase = Literal["dense", "early evaluation", "fine-tuning", "IMP baseline"]
"""What a worker spends its time on. Training the dense model, distilled or not, is "dense"."""


class Span(Record):
    """One finished task on the timeline of a worker.

    Attributes:
        worker: Name of the worker.
        phase: Kind of task.
        level: Level of the task; 0 is the dense model.
        started: Start in Unix time by the worker's clock, seconds.
        seconds: Duration in seconds.
    """

    worker: str
    phase: Phase
    level: int
    started: float
    seconds: float


class Result(Record):
    """Result of a finished search.

    Attributes:
        run: Path or URI of the run directory.
        model: The spec's `model.name`.
        task: The spec's `task.name`, or `task.train` for own files.
        kind: The spec's `task.kind`.
        metrics: Names of the task's metrics.
        models: Rows of the final table: dense, IMP where the baseline ran, raymask.
        sizes: Parameters of the dense model by denominator: prunable, encoder, whole model.
        gain: By how much the selected model's mean metric on `test` exceeds the baseline's, paired over rows; of a
            perplexity, by how much its logarithm is lower. None without a baseline.
        levels: Records of the levels that lead to the selected model, level 1 first.
        other_levels: Records of the masks that were fine-tuned and that do not lead to the selected model.
        baseline_levels: Records of the IMP baseline's levels, level 1 first; empty where it did not run.
        rows_scored: How many rows of `validation` score the candidates, and how many rows it has.
        seconds: Seconds by phase, summed over workers, and under "wall" the wall-clock time of the last start.
        timeline: All finished tasks, of all starts.
        export: Path or URI of the exported model.
        files: SHA-256 by name of the tensor files in `export`.
    """

    run: str
    model: str
    task: str
    kind: str = "classification"
    metrics: tuple[str, ...]
    models: tuple[ModelMetrics, ...]
    sizes: dict[str, int]
    gain: ConfidenceInterval | None
    levels: tuple[LevelRecord, ...]
    other_levels: tuple[LevelRecord, ...] = ()
    baseline_levels: tuple[LevelRecord, ...]
    rows_scored: tuple[int, int]
    seconds: dict[str, float]
    timeline: tuple[Span, ...]
    export: str
    files: dict[str, str] = {}
