"""What does a pass over a few training rows tell of each matrix?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from raymask.core.scorers import Calibration
from raymask.train.data import Rows
from raymask.train.loop import collate, moved, rows_at_once, task_loss
from raymask.train.model import is_linear, matrices, turned
from raymask.train.objectives import Objective, counts

ROWS = 128  # as many as Wanda takes
BATCH = 32


def calibrate(
    module: nn.Module, prunable: Sequence[str], rows: Rows, *, padding: int, objective: Objective
) -> dict[str, Calibration]:
    """By name, for weights of linear layers. The module is in evaluation mode; nothing is left behind in it.

    Summed in float32, on the labels' loss whatever the training distils from; padding counts for nothing.
    """
    parameters = dict(module.named_parameters())
    weights = [parameters[name] for name in prunable]
    squares = [torch.zeros_like(matrix[0], dtype=torch.float32) for matrix in matrices(module, prunable).values()]
    gradients = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    by_weight = {id(weight): total for weight, total in zip(weights, squares, strict=True)}
    real = torch.empty(0)

    def meet(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs = arguments[0].detach().float()
        times = 1 if len(inputs) == len(real) else len(real)  # what all rows share, such as relative positions
        if inputs.shape[:-1] == real.shape:  # tokens, rather than one vector a row
            inputs = inputs[real]
        by_weight[id(layer.weight)] += times * inputs.reshape(-1, inputs.shape[-1]).square().sum(0)

    hooks = [layer.register_forward_pre_hook(meet) for layer in module.modules() if id_of_weight(layer) in by_weight]
    whole, size = counts(rows.lengths), min(BATCH, rows_at_once(module, rows, objective))
    try:
        for chosen in np.split(np.argsort(rows.lengths, kind="stable"), range(size, len(rows), size)):
            batch = moved(collate(rows, chosen, padding), weights[0].device)
            real = batch["attention_mask"].bool()
            loss = task_loss(module, batch, objective, whole)
            torch._foreach_add_(gradients, torch.autograd.grad(loss, weights))
    finally:
        for hook in hooks:
            hook.remove()
    other = turned(module)
    return {
        name: Calibration(inputs=total.sqrt(), gradient=gradient.T if name in other else gradient)
        for name, total, gradient in zip(prunable, squares, gradients, strict=True)
    }


def id_of_weight(layer: nn.Module) -> int | None:
    """By which a linear layer's weight is known, tied or not."""
    return id(layer.weight) if is_linear(layer) else None
