"""Tasks that the driver hands to workers, and the tensors that they start from and return."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raymask.core.records import Candidate, EvalKey, Evaluation, FinetuneResult, TrainConfig
from raymask.core.tensors import PackedTensors


@dataclass(frozen=True)
class EvalTask:
    """One candidate's early evaluation, from one rung to the next.

    An evaluation to rung 0 starts from the candidate's parent.

    Attributes:
        candidate: The candidate to evaluate.
        rung: Rung to evaluate to, from 0.
        repeat: 0 for the first evaluation. Larger numbers repeat it from the parent to the last rung, each with
            another order of the training rows.
    """

    candidate: Candidate
    rung: int = 0
    repeat: int = 0

    @property
    def key(self) -> EvalKey:
        """Key of the evaluation within its level."""
        return self.candidate.index, self.rung, self.repeat

    @property
    def resume_from(self) -> EvalKey:
        """Key of the evaluation whose paused state this one continues, where that state still exists."""
        return self.candidate.index, self.rung - 1, self.repeat

    def failed(self, reason: str, *, system_failure: bool = False, worker: str = "") -> Evaluation:
        """The evaluation's record when it failed.

        Args:
            reason: Why.
            system_failure: Whether the machine failed, not the candidate.
            worker: Name of the worker, where it is known.
        """
        return Evaluation(
            candidate=self.candidate,
            rung=self.rung,
            repeat=self.repeat,
            error=reason,
            system_failure=system_failure,
            worker=worker,
        )


@dataclass(frozen=True)
class Snapshot:
    """Weights and optimizer state that a training starts from.

    Attributes:
        key: Name of the contents: equal keys, equal tensors.
        weights: The model's tensors by name.
        optimizer: Optimizer state, None for a fresh optimizer.
        teacher: The dense model's weights, None where the training needs no teacher.
    """

    key: str
    weights: PackedTensors
    optimizer: PackedTensors | None = None
    teacher: PackedTensors | None = None


@dataclass(frozen=True)
class Checkpoint:
    """What a fine-tuning returns.

    Attributes:
        weights: The model's tensors by name, at the best evaluation on `validation`.
        optimizer: Optimizer state at the same step.
        mask: Packed mask bits.
        digest: Digest of the mask.
        num_kept: Number of prunable weights that are kept.
        num_prunable: Number of prunable weights.
        finetune_result: How the fine-tuning went.
        test_outputs: Predictions for `test`, float32 `[n_rows, n_outputs]`. For a language model `[n_rows, 2]`: each
            row's summed loss and its number of predicted tokens.
    """

    weights: PackedTensors
    optimizer: PackedTensors
    mask: PackedTensors
    digest: str
    num_kept: int
    num_prunable: int
    finetune_result: FinetuneResult
    test_outputs: np.ndarray


@dataclass(frozen=True)
class FinetuneTask:
    """One fine-tuning of a candidate's mask, drawn again from its parent.

    The search and the IMP baseline share the seeds, so that only the mask differs.

    Attributes:
        name: Name shown while the task runs.
        candidate: The candidate whose mask is trained.
        config: Hyper-parameters of the training.
        digest: Digest that the mask must have, None where it was not evaluated before.
    """

    name: str
    candidate: Candidate
    config: TrainConfig
    digest: str | None = None
