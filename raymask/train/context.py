"""What every worker of a search needs, and how much memory that takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raymask.core import seeds
from raymask.core.masking.scorers import DATA_FREE
from raymask.core.recipe import dense_distillation_config, has_baseline, num_parents, resolve
from raymask.core.seeds import derive
from raymask.core.spec import Spec
from raymask.data.hf_config import vocab_size
from raymask.data.types import TaskData, TokenizedSplit
from raymask.train.losses import TASK_LOSSES
from raymask.train.model import DTYPES, ModelInfo
from raymask.train.teacher import cache_bytes

BACKWARD_FACTOR = 1.5  # of what is kept for the backward pass, with the gradients of activations


@dataclass(frozen=True)
class WorkerContext:
    """Everything that a worker needs once, except weights.

    Attributes:
        spec: The spec.
        model: The model without its weights.
        data: The task's rows.
        teacher: The teacher of fine-tunings, if it is not a dense model of this shape. It has the same width and heads,
            and as many layers or a multiple. None if it is such a model, or nothing is distilled.
        activation_bytes: Bytes that a training step keeps for its backward pass, for each row of the longest length;
            None if that is not measured.
    """

    spec: Spec
    model: ModelInfo
    data: TaskData
    teacher: ModelInfo | None = None
    activation_bytes: int | None = None

    @property
    def config(self) -> Any:
        """The model's transformers configuration."""
        return self.model.config

    @property
    def scored_rows(self) -> TokenizedSplit:
        """The rows of `validation` on which candidates are scored."""
        return self.data.validation.sample(self.spec.early_eval.max_rows, derive(self.spec.seed, seeds.SCORED_ROWS))

    @property
    def model_bytes(self) -> int:
        """Bytes of one model's weights."""
        return DTYPES[self.spec.model.dtype].itemsize * self.model.sizes.whole

    @property
    def teacher_bytes(self) -> int:
        """Bytes of a teacher's weights: the teacher's own, or those of a dense model of this shape."""
        count = self.teacher.sizes.whole if self.teacher else self.model.sizes.whole
        return DTYPES[self.spec.model.dtype].itemsize * count

    @property
    def moment_bytes(self) -> int:
        """Estimated bytes of the optimizer's moments; Adafactor's are so few that they count as 0."""
        return 2 * self.model_bytes if self.spec.optimizer.name == "adamw" else 0

    def peak_host_memory(self, *, on_gpu: bool) -> int:
        """Estimated peak host memory of one worker, in bytes.

        Always: interpreter and libraries, and one packed checkpoint in flight (best weights and moments). On a CPU also
        weights, gradients, masks, moments, calibration, the teacher and its cached outputs, and the activations of the
        largest batch. Where these are not measured they count as much as all the rest (a quarter of it with gradient
        checkpointing), and for a model with logits for every token also the logits of a batch, and what is computed
        from them.

        Args:
            on_gpu: The model is on a GPU, so most of this is in the GPU's memory.
        """
        calibrated = resolve(self.spec).method.scorer not in DATA_FREE
        checkpoint = self.model_bytes + self.moment_bytes
        resident = 3 * self.model_bytes + self.moment_bytes + 4 * calibrated * self.model.sizes.whole
        resident += self.teacher_bytes * self.spec.distill
        if on_gpu:
            return 2**30 * 3 + checkpoint
        rows = int(self.spec.early_eval.epochs * len(self.data.train))
        vocabulary = vocab_size(self.config) if TASK_LOSSES[self.data.kind].per_token else 0
        teacher_cache = cache_bytes(rows, self.data.train.lengths, self.config, vocabulary) if self.spec.distill else 0
        batch = max(section.batch_size for section in (self.spec.dense, self.spec.early_eval, self.spec.finetune))
        if self.activation_bytes is not None:
            activations = int(BACKWARD_FACTOR * self.activation_bytes * min(batch, len(self.data.train)))
        else:
            activations = (checkpoint + resident) // (4 if self.spec.gradient_checkpointing else 1)
            activations += (4 + 2 * self.spec.distill) * 4 * vocabulary * batch * int(self.data.train.lengths.max())
        return 2**29 + checkpoint + resident + activations + teacher_cache

    @property
    def run_dir_bytes(self) -> int:
        """Estimated size of the run directory: weights and moments of every trained model, and the export."""
        spec, levels = self.spec, len(self.spec.levels.densities())
        trained = 1 + (dense_distillation_config(spec) is not None) + levels * (spec.select.keep + has_baseline(spec))
        return trained * (self.model_bytes + self.moment_bytes) + self.model_bytes

    @property
    def object_store_memory(self) -> int:
        """Estimated peak of the object store, in bytes.

        It holds the weights and moments of all lineages, sent and returned, the teacher, and the candidates that are
        paused at a rung.
        """
        lineages, has_rungs = self.spec.select.keep + 1, len(self.spec.early_eval.rungs) > 1
        paused = num_parents(self.spec, 2) * (self.spec.candidates.count + 1) * has_rungs
        return (2 * lineages + paused) * (self.model_bytes + self.moment_bytes) + self.teacher_bytes
