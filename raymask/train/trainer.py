"""Training and prediction, with or without a mask and a teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raymask.core import seeds
from raymask.core.masking.masks import Mask
from raymask.core.records import TrainConfig
from raymask.core.seeds import derive
from raymask.data.hf_config import vocab_size
from raymask.data.types import TokenizedSplit
from raymask.train.batches import batch_stream, collate, to_device
from raymask.train.cpu_kernels import cpu_kernels
from raymask.train.fsdp import local_tensor
from raymask.train.losses import ZERO_WEIGHT, Batch, LossDenominators, TaskLoss, loss_denominators
from raymask.train.optim import lr_multiplier
from raymask.train.process_group import SINGLE_PROCESS, ProcessGroup, tree_sum
from raymask.train.teacher import ATTENTIONS, HIDDEN_STATES, layer_outputs

MAX_EVAL_ROWS = 128  # rows of a batch for prediction, at most
MAX_LOGIT_BYTES = 2**28  # bytes of float32 logits of such a batch at most, for models with logits for every token

Autocast = Callable[[], AbstractContextManager[object]]
"""Makes the context manager in which a model computes: autocast, or none."""

Backward = Callable[[np.ndarray, LossDenominators], None]
"""(indices of rows, denominators of the batch that they are a part of): adds the gradients of these rows."""


def num_steps(config: TrainConfig, rows: int) -> int:
    """Optimizer steps of a training on `rows` rows. Epochs may be a fraction; more than 0 are at least one step."""
    return max(1, round(config.epochs * steps_per_epoch(config, rows))) if config.epochs > 0 else 0


def steps_per_epoch(config: TrainConfig, rows: int) -> int:
    """Optimizer steps of one epoch on `rows` rows."""
    return math.ceil(rows / config.batch_size)


@dataclass(frozen=True)
class Trainer:
    """Training and prediction of one model.

    Attributes:
        module: The model, in evaluation mode.
        task_loss: The task's losses and predictions.
        padding: The token id that pads batches.
        max_grad_norm: Gradients are clipped to this norm.
        autocast: The context for forward passes.
        on_progress: Called after each training step with the share in (0, 1] of steps done.
        group: The processes that have this model. They train and predict together, and all end with the same bits.
    """

    module: nn.Module
    task_loss: TaskLoss
    padding: int
    max_grad_norm: float = math.inf
    autocast: Autocast = nullcontext
    on_progress: Callable[[float], None] = lambda share: None
    group: ProcessGroup = SINGLE_PROCESS

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.module.parameters()).device

    @property
    def without_autocast(self) -> Trainer:
        """The same in the weights' own precision, as an exported model computes."""
        return replace(self, autocast=nullcontext)

    def train(
        self,
        rows: TokenizedSplit,
        config: TrainConfig,
        optimizer: torch.optim.Optimizer,
        mask: Mask,
        *,
        seed: int,
        teacher: Callable[..., Any] | None = None,
        steps: tuple[int, int] | None = None,
        eval_steps: Container[int] = (),
    ) -> Iterator[int]:
        """Train the model in place. The mask is applied before the first and after every optimizer step.

        Training goes on as the caller iterates; it must iterate to the end.

        Args:
            rows: Training rows.
            config: Epochs, batch size, learning rate and schedule.
            optimizer: The optimizer of all parameters.
            mask: Masks by parameter name, in the parameters' layout; this rank's rows if the model is sharded. Empty
                for dense training.
            seed: Fixes the order of rows and the dropout, so that both are the same for two masks.
            teacher: Called as the module is; None to train on the labels.
            steps: (begin, end) to run only the steps after `begin`, up to `end`; None for all.
            eval_steps: The steps after which the caller evaluates.

        Yields:
            Each of these steps once it is done, with the module in evaluation mode.
        """
        total = num_steps(config, len(rows))
        begin, end = steps or (0, total)
        batches = batch_stream(rows, config.batch_size, seed, begin)
        parameters = dict(self.module.named_parameters())
        pruned = [local_tensor(parameters[name]) for name in mask]
        masks = [mask[name].to(weight.dtype) for name, weight in zip(mask, pruned, strict=True)]
        torch.manual_seed(derive(seed, seeds.DROPOUT, *([begin] if begin else [])))
        apply_masks(pruned, masks)
        self.module.train()
        backward = partial(self.backward, rows, teacher, cpu_kernels(self.module, self.device))
        for step in range(begin + 1, end + 1):
            for parameter_group in optimizer.param_groups:
                parameter_group["lr"] = config.learning_rate * lr_multiplier(config, step, total)
            indices = next(batches)
            batch = indices, loss_denominators(rows.lengths[indices])
            self.set_gradients(backward, *batch, config.data_parallel, derive(seed, seeds.DROPOUT, step))
            nn.utils.clip_grad_norm_(parameters.values(), self.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            apply_masks(pruned, masks)
            if step in eval_steps:
                self.module.eval()
                yield step
                self.module.train()
            self.on_progress((step - begin) / (end - begin))
        self.module.eval()

    def backward(
        self,
        rows: TokenizedSplit,
        teacher: Callable[..., Any] | None,
        kernels: Autocast,
        indices: np.ndarray,
        denominators: LossDenominators,
    ) -> None:
        """Add the gradients of some rows.

        Args:
            rows: Training rows.
            teacher: Called as the module is; None to train on the labels.
            kernels: The context for the forward pass, beside autocast.
            indices: The rows, int64.
            denominators: Those of the batch that they are a part of.
        """
        batch = to_device(collate(rows, indices, self.padding), self.device)
        with self.autocast(), kernels():
            if teacher:
                loss = distillation(self.module, teacher, batch, self.task_loss, denominators)
            else:
                loss = mean_label_loss(self.module, batch, self.task_loss, denominators)
        loss.backward()  # type: ignore[no-untyped-call]

    def set_gradients(
        self, backward: Backward, indices: np.ndarray, denominators: LossDenominators, shards: int, seed: int
    ) -> None:
        """Set the parameters' gradients to those of a batch.

        Args:
            backward: Adds the gradients of some rows.
            indices: The rows of the batch, int64.
            denominators: Those of the batch.
            shards: Into how many shards the batch is split, a power of two.
            seed: The step's seed.
        """
        if self.group.sharded:  # FSDP sums the gradients in the backward pass
            backward(*take_shard(indices, denominators, self.group.rank, self.group.size, seed))
        elif shards == 1:
            backward(indices, denominators)
        else:
            accumulate_shards(self.module, backward, (indices, denominators), shards, seed, self.group)

    @torch.no_grad()
    def predict(self, rows: TokenizedSplit) -> Tensor:
        """Compute predictions for all rows. The processes of the group share the work.

        Args:
            rows: The rows.

        Returns:
            float32 [rows, columns] on the CPU, in the order of the rows (`TaskLoss.predictions`).
        """
        size = rows_at_once(self.module, rows, self.task_loss)
        batches = np.split(np.argsort(rows.lengths, kind="stable"), range(size, len(rows), size))
        group = self.group if len(batches) >= self.group.size else SINGLE_PROCESS
        local_batches = batches[group.rank :: group.size]
        # With a sharded model all processes must run equally many batches.
        missing = -(-len(batches) // group.size) - len(local_batches)
        predictions = []
        for indices in (*local_batches, *batches[: missing * self.group.sharded]):
            batch = to_device(collate(rows, indices, self.padding), self.device)
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            with self.autocast():
                logits = self.module(**inputs).logits
            predictions.append(self.task_loss.predictions(logits, batch))
        ordered = torch.zeros(len(rows), predictions[0].shape[1], device=self.device)
        positions = torch.from_numpy(np.concatenate(local_batches)).to(self.device)
        ordered[positions] = torch.cat(predictions[: len(local_batches)])
        group.all_reduce(ordered.view(-1))
        return ordered.cpu()


def take_shard(
    indices: np.ndarray, denominators: LossDenominators, number: int, shards: int, seed: int
) -> tuple[np.ndarray, LossDenominators]:
    """Take one shard of a batch, and seed its dropout.

    Args:
        indices: The rows of the batch, int64.
        denominators: Those of the batch.
        number: The shard, from 0.
        shards: The number of shards.
        seed: The step's seed; each shard has its own dropout.

    Returns:
        The shard's rows, and the denominators of its losses. A shard without rows is one row of weight zero.
    """
    torch.manual_seed(derive(seed, seeds.SHARD, number))
    shard_indices = indices[number::shards]  # rows are sorted by length, so every shard has some of the long ones
    return (shard_indices, denominators) if len(shard_indices) else (indices[:1], ZERO_WEIGHT)


def accumulate_shards(
    module: nn.Module,
    backward: Backward,
    batch: tuple[np.ndarray, LossDenominators],
    shards: int,
    seed: int,
    group: ProcessGroup,
) -> None:
    """Set the parameters' gradients to those of a batch, summed over all shards of all processes.

    Args:
        module: The model.
        backward: Adds the gradients of one shard, given its rows and its denominators.
        batch: The rows of the batch, int64, and its denominators.
        shards: The number of shards, a power of two.
        seed: The step's seed.
        group: The processes that share the shards.
    """
    used: list[nn.Parameter] = []

    def gradients() -> Iterator[Tensor]:
        """The gradients of each local shard, flat."""
        for number in group.local_shards(shards):
            backward(*take_shard(*batch, number, shards, seed))
            used[:] = [parameter for parameter in module.parameters() if parameter.grad is not None]
            yield torch.cat([parameter.grad.flatten() for parameter in used if parameter.grad is not None])
            for parameter in used:
                parameter.grad = None

    total = tree_sum(gradients())
    group.all_reduce(total)
    sizes = [parameter.numel() for parameter in used]
    for parameter, gradient in zip(used, torch.split(total, sizes), strict=True):
        parameter.grad = gradient.view_as(parameter)


def apply_masks(weights: list[Tensor], masks: list[Tensor]) -> None:
    """Multiply weights by masks of the same dtypes, in place and in one call."""
    if weights:
        torch._foreach_mul_(weights, masks)


def mean_label_loss(module: nn.Module, batch: Batch, task_loss: TaskLoss, denominators: LossDenominators) -> Tensor:
    """The mean loss against the labels.

    Args:
        module: The model.
        batch: The batch.
        task_loss: The task's loss.
        denominators: Those of the batch, or of a larger batch that it is a part of.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return task_loss.label_loss(module(**inputs).logits, batch).sum() / task_loss.targets(denominators)


def distillation(
    module: nn.Module, teacher: Callable[..., Any], batch: Batch, task_loss: TaskLoss, denominators: LossDenominators
) -> Tensor:
    """The distillation loss.

    It is the sum over layers of the MSE of attention probabilities, plus the sum over layers of the MSE of hidden
    states, plus the loss against the teacher's outputs. A student with half the teacher's layers, a third, ... is
    compared with every second, third, ... of them. Means are over tokens without padding, so padding changes nothing.
    A model with an encoder and a decoder has such layers in both, and attention between them. The decoder of a
    classifier reads the same tokens, one place later, so the same of its positions are padding.

    Args:
        module: The student.
        teacher: Called as the module is.
        batch: The batch.
        task_loss: The task's loss.
        denominators: Those of the batch, or of a larger batch that it is a part of.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    student_out = module(**inputs, output_attentions=True, output_hidden_states=True)
    with torch.no_grad():
        teacher_out = teacher(**inputs, output_attentions=True, output_hidden_states=True)
    is_token = batch["attention_mask"].float()
    loss = task_loss.distill_loss(student_out.logits, teacher_out.logits, batch).sum() / task_loss.targets(denominators)
    student_layers, teacher_layers = layer_outputs(student_out), layer_outputs(teacher_out)
    if student_layers.keys() != teacher_layers.keys():
        raise ValueError(f"the model returns {', '.join(student_layers)}, its teacher {', '.join(teacher_layers)}")
    for name in (name for name in HIDDEN_STATES if name in student_layers):
        (first, *student), (first_target, *targets) = student_layers[name], teacher_layers[name]
        for states, target in [(first, first_target), *matched_layers(student, targets)]:
            loss = loss + ((states.float() - target.float()).square().mean(-1) * is_token).sum() / denominators.tokens
    for name in (name for name in ATTENTIONS if name in student_layers):
        for states, target in matched_layers(student_layers[name], teacher_layers[name]):
            error = (states.float() - target.float()).square().sum(-1).mean(1)  # over keys, then heads: [rows, queries]
            loss = loss + (error * is_token).sum() / denominators.pairs
    return loss


def matched_layers(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of a student's layer and a teacher's, evenly spaced up to the last.

    Raises:
        ValueError: The number of the teacher's layers is no multiple of the student's.
    """
    if len(teacher) % len(student):
        raise ValueError(f"the model returns {len(student)} layers, and its teacher {len(teacher)}")
    spacing = len(teacher) // len(student)
    return zip(student, teacher[spacing - 1 :: spacing], strict=True)


def rows_at_once(module: nn.Module, rows: TokenizedSplit, task_loss: TaskLoss) -> int:
    """Rows of a batch for prediction: at most MAX_EVAL_ROWS, and MAX_LOGIT_BYTES of logits, but at least one."""
    if not task_loss.per_token:
        return MAX_EVAL_ROWS
    row_bytes = 4 * int(rows.lengths.max()) * vocab_size(module.config)
    return max(1, min(MAX_EVAL_ROWS, MAX_LOGIT_BYTES // row_bytes))
