"""Calibration: input norms and gradients of prunable matrices, from one pass over a few training rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from raymask.core.masking.scorers import Calibration
from raymask.data.types import TokenizedSplit
from raymask.train.batches import collate, to_device
from raymask.train.losses import TaskLoss, loss_denominators
from raymask.train.prunable import is_linear, transposed_weights
from raymask.train.trainer import mean_label_loss, rows_at_once

CALIBRATION_ROWS = 128  # as in Wanda (Sun et al. 2023)
MAX_BATCH_ROWS = 32  # rows at most


def calibrate(
    module: nn.Module, prunable: Sequence[str], rows: TokenizedSplit, *, padding: int, task_loss: TaskLoss
) -> dict[str, Calibration]:
    """Measure the inputs of linear layers, and the gradients of all prunable weights.

    Sums are in float32. The loss is that of the labels, also if the training distils. Padding is ignored. The module is
    left unchanged.

    Args:
        module: The model, in evaluation mode.
        prunable: Names of prunable weights.
        rows: Calibration rows.
        padding: The token id that pads batches.
        task_loss: The task's loss.

    Returns:
        Calibrations by weight name, for matrices of [n_out, n_in]. Weights of layers that are not called, as where
        their weights are multiplied in the layer above, and of experts have no inputs.
    """
    parameters = dict(module.named_parameters())
    weights = [parameters[name] for name in prunable]
    gradients = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    squares_by_id: dict[int | None, Tensor | None] = dict.fromkeys(map(id, weights))
    is_token = torch.empty(0)

    def add_inputs(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Add the squared inputs of one layer and batch."""
        inputs = arguments[0].detach().float()
        # inputs that all rows share, such as relative positions, are given once a batch
        times = 1 if len(inputs) == len(is_token) else len(is_token)
        if inputs.shape[:-1] == is_token.shape:  # a vector for every token, not only for every row
            inputs = inputs[is_token]
        squares, seen = times * inputs.reshape(-1, inputs.shape[-1]).square().sum(0), squares_by_id[id(layer.weight)]
        squares_by_id[id(layer.weight)] = squares if seen is None else seen + squares

    hooks = [
        layer.register_forward_pre_hook(add_inputs) for layer in module.modules() if weight_id(layer) in squares_by_id
    ]
    denominators, size = loss_denominators(rows.lengths), min(MAX_BATCH_ROWS, rows_at_once(module, rows, task_loss))
    try:
        for indices in np.split(np.argsort(rows.lengths, kind="stable"), range(size, len(rows), size)):
            batch = to_device(collate(rows, indices, padding), weights[0].device)
            is_token = batch["attention_mask"].bool()
            loss = mean_label_loss(module, batch, task_loss, denominators)
            torch._foreach_add_(gradients, torch.autograd.grad(loss, weights, materialize_grads=True))
    finally:
        for hook in hooks:
            hook.remove()
    transposed = transposed_weights(module)
    found = {}
    for name, weight, gradient in zip(prunable, weights, gradients, strict=True):
        squares = squares_by_id[id(weight)]
        inputs = None if squares is None else squares.sqrt()
        found[name] = Calibration(inputs, gradient.mT if name in transposed else gradient)
    return found


def weight_id(layer: nn.Module) -> int | None:
    """The id of a linear layer's weight, the same for tied weights; None for other layers."""
    return id(layer.weight) if is_linear(layer) else None
