"""Training and prediction, with or without a mask and a teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from contextlib import AbstractContextManager
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


def num_steps(config: TrainConfig, rows: int) -> int:
    """Optimizer steps of a training on `rows` rows. Epochs may be a fraction; more than 0 are at least one step."""
    return max(1, round(config.epochs * steps_per_epoch(config, rows))) if config.epochs > 0 else 0


def steps_per_epoch(config: TrainConfig, rows: int) -> int:
    """Optimizer steps of one epoch on `rows` rows."""
    return math.ceil(rows / config.batch_size)


def train(
    module: nn.Module,
    rows: TokenizedSplit,
    config: TrainConfig,
    *,
    padding: int,
    seed: int,
    mask: Mask,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    autocast: Autocast,
    teacher: Callable[..., Any] | None,
    objective: TaskLoss,
    eval_steps: Container[int],
    on_eval: Callable[[int], None],
    on_progress: Callable[[float], None],
    steps: tuple[int, int] | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> None:
    """Train a model in place. The mask is applied before the first and after every optimizer step.

    Args:
        module: The model; it is left in evaluation mode.
        rows: Training rows.
        config: Epochs, batch size, learning rate and schedule.
        padding: The token id that pads batches.
        seed: Fixes the order of rows and the dropout, so that both are the same for two masks.
        mask: Masks by parameter name, in the parameters' layout; this rank's rows if the model is sharded. Empty for
            dense training.
        optimizer: The optimizer of all parameters.
        max_grad_norm: Gradients are clipped to this norm.
        autocast: The context for forward passes.
        teacher: Called as the module is; None to train on the labels.
        objective: The task's loss.
        eval_steps: The steps after which to evaluate.
        on_eval: Called with the step after each of these, with the module in evaluation mode.
        on_progress: Called after each step with the share in (0, 1] of steps done.
        steps: (begin, end) to run only the steps after `begin`, up to `end`; None for all.
        group: The processes that train this model together. All end with the same bits.
    """
    parameters = dict(module.named_parameters())
    pruned = [local_tensor(parameters[name]) for name in mask]
    masks = [mask[name].to(weight.dtype) for name, weight in zip(mask, pruned, strict=True)]
    device = next(module.parameters()).device
    total = num_steps(config, len(rows))
    begin, end = steps or (0, total)
    batches = batch_stream(rows, config.batch_size, seed, begin)

    def backward(indices: np.ndarray, denominators: LossDenominators) -> None:
        """Add the gradients of these rows."""
        batch = to_device(collate(rows, indices, padding), device)
        with autocast(), kernels():
            if teacher:
                loss = distillation(module, teacher, batch, objective, denominators)
            else:
                loss = task_loss(module, batch, objective, denominators)
        loss.backward()  # type: ignore[no-untyped-call]

    torch.manual_seed(derive(seed, seeds.DROPOUT, *([begin] if begin else [])))
    apply_masks(pruned, masks)
    module.train()
    kernels = cpu_kernels(module, device)
    for step in range(begin + 1, end + 1):
        for parameter_group in optimizer.param_groups:
            parameter_group["lr"] = config.learning_rate * lr_multiplier(config, step, total)
        indices = next(batches)
        denominators = loss_denominators(rows.lengths[indices])
        if group.sharded:  # FSDP sums the gradients in the backward pass
            backward(*take_shard(indices, denominators, group.rank, group.size, derive(seed, seeds.DROPOUT, step)))
        elif config.data_parallel == 1:
            backward(indices, denominators)
        else:
            step_seed = derive(seed, seeds.DROPOUT, step)
            accumulate_shards(
                parameters.values(), backward, indices, denominators, config.data_parallel, step_seed, group
            )
        nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        apply_masks(pruned, masks)
        if step in eval_steps:
            module.eval()
            on_eval(step)
            module.train()
        on_progress((step - begin) / (end - begin))
    module.eval()


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
    parameters: Collection[nn.Parameter],
    backward: Callable[[np.ndarray, LossDenominators], None],
    indices: np.ndarray,
    denominators: LossDenominators,
    shards: int,
    seed: int,
    group: ProcessGroup,
) -> None:
    """Set the parameters' gradients to those of a batch, summed over all shards of all processes.

    Args:
        parameters: The model's parameters.
        backward: Adds the gradients of one shard, given its rows and its denominators.
        indices: The rows of the batch, int64.
        denominators: Those of the batch.
        shards: The number of shards, a power of two.
        seed: The step's seed.
        group: The processes that share the shards.
    """
    used: list[nn.Parameter] = []

    def gradients() -> Iterator[Tensor]:
        """The gradients of each local shard, flat."""
        for number in group.local_shards(shards):
            backward(*take_shard(indices, denominators, number, shards, seed))
            used[:] = [parameter for parameter in parameters if parameter.grad is not None]
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


def task_loss(module: nn.Module, batch: Batch, objective: TaskLoss, denominators: LossDenominators) -> Tensor:
    """The mean loss against the labels.

    Args:
        module: The model.
        batch: The batch.
        objective: The task's loss.
        denominators: Those of the batch, or of a larger batch that it is a part of.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return objective.label_loss(module(**inputs).logits, batch).sum() / objective.targets(denominators)


def distillation(
    module: nn.Module, teacher: Callable[..., Any], batch: Batch, objective: TaskLoss, denominators: LossDenominators
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
        objective: The task's loss.
        denominators: Those of the batch, or of a larger batch that it is a part of.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    student_out = module(**inputs, output_attentions=True, output_hidden_states=True)
    with torch.no_grad():
        teacher_out = teacher(**inputs, output_attentions=True, output_hidden_states=True)
    is_token = batch["attention_mask"].float()
    loss = objective.distill_loss(student_out.logits, teacher_out.logits, batch).sum() / objective.targets(denominators)
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


@torch.no_grad()
def predict(
    module: nn.Module,
    rows: TokenizedSplit,
    *,
    padding: int,
    autocast: Autocast,
    objective: TaskLoss,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Tensor:
    """Compute predictions for all rows.

    The processes of a group share the work, and all get the same bits.

    Args:
        module: The model, in evaluation mode.
        rows: The rows.
        padding: The token id that pads batches.
        autocast: The context for forward passes.
        objective: The task's loss, which says what is kept of the outputs.
        group: The processes that have this model.

    Returns:
        float32 [rows, columns] on the CPU, in the order of the rows (`TaskLoss.predictions`).
    """
    device = next(module.parameters()).device
    size = rows_at_once(module, rows, objective)
    batches = np.split(np.argsort(rows.lengths, kind="stable"), range(size, len(rows), size))
    sharing = group if len(batches) >= group.size else SINGLE_PROCESS
    local_batches = batches[sharing.rank :: sharing.size]
    # With a sharded model all processes must run equally many batches.
    missing = -(-len(batches) // sharing.size) - len(local_batches)
    predictions = []
    for indices in (*local_batches, *batches[: missing * group.sharded]):
        batch = to_device(collate(rows, indices, padding), device)
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with autocast():
            logits = module(**inputs).logits
        predictions.append(objective.predictions(logits, batch))
    ordered = torch.zeros(len(rows), predictions[0].shape[1], device=device)
    ordered[torch.from_numpy(np.concatenate(local_batches)).to(device)] = torch.cat(predictions[: len(local_batches)])
    sharing.all_reduce(ordered.view(-1))
    return ordered.cpu()


def rows_at_once(module: nn.Module, rows: TokenizedSplit, objective: TaskLoss) -> int:
    """Rows of a batch for prediction: at most EVAL_BATCH, and at most OUTPUTS bytes of logits, but at least one."""
    if not objective.per_token:
        return MAX_EVAL_ROWS
    row_bytes = 4 * int(rows.lengths.max()) * vocab_size(module.config)
    return max(1, min(MAX_EVAL_ROWS, MAX_LOGIT_BYTES // row_bytes))
