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
from raymask.train.prunable import is_linear, matrices, transposed_weights
from raymask.train.trainer import mean_label_loss, rows_at_once

CALIBRATION_ROWS = 128  # as in Wanda (Sun et al. 2023)
MAX_BATCH_ROWS = 32  # rows at most


def calibrate(
    module: nn.Module, prunable: Sequence[str], rows: TokenizedSplit, *, padding: int, task_loss: TaskLoss
) -> dict[str, Calibration]:
    """Measure the inputs and gradients of linear layers.

    Sums are in float32. The loss is that of the labels, also if the training distils. Padding is ignored. The module is
    left unchanged.

    Args:
        module: The model, in evaluation mode.
        prunable: Names of weights of linear layers.
        rows: Calibration rows.
        padding: The token id that pads batches.
        task_loss: The task's loss.

    Returns:
        Calibrations by weight name, for matrices of [n_out, n_in].
    """
    parameters = dict(module.named_parameters())
    weights = [parameters[name] for name in prunable]
    input_squares = [torch.zeros_like(matrix[0], dtype=torch.float32) for matrix in matrices(module, prunable).values()]
    gradients = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    squares_by_id = {id(weight): total for weight, total in zip(weights, input_squares, strict=True)}
    is_token = torch.empty(0)

    def add_inputs(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Add the squared inputs of one layer and batch."""
        inputs = arguments[0].detach().float()
        # inputs that all rows share, such as relative positions, are given once a batch
        times = 1 if len(inputs) == len(is_token) else len(is_token)
        if inputs.shape[:-1] == is_token.shape:  # a vector for every token, not only for every row
            inputs = inputs[is_token]
        squares_by_id[id(layer.weight)] += times * inputs.reshape(-1, inputs.shape[-1]).square().sum(0)

    hooks = [
        layer.register_forward_pre_hook(add_inputs) for layer in module.modules() if weight_id(layer) in squares_by_id
    ]
    denominators, size = loss_denominators(rows.lengths), min(MAX_BATCH_ROWS, rows_at_once(module, rows, task_loss))
    try:
        for indices in np.split(np.argsort(rows.lengths, kind="stable"), range(size, len(rows), size)):
            batch = to_device(collate(rows, indices, padding), weights[0].device)
            is_token = batch["attention_mask"].bool()
            loss = mean_label_loss(module, batch, task_loss, denominators)
            torch._foreach_add_(gradients, torch.autograd.grad(loss, weights))
    finally:
        for hook in hooks:
            hook.remove()
    transposed = transposed_weights(module)
    return {
        name: Calibration(inputs=total.sqrt(), gradient=gradient.T if name in transposed else gradient)
        for name, total, gradient in zip(prunable, input_squares, gradients, strict=True)
    }


def weight_id(layer: nn.Module) -> int | None:
    """The id of a linear layer's weight, the same for tied weights; None for other layers."""
    return id(layer.weight) if is_linear(layer) else None
