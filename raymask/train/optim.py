"""Optimizers, their state as flat tensors, and the learning rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from raymask.core.records import TrainConfig
from raymask.core.spec import Optimizer
from raymask.train.fsdp import like_parameter


def lr_multiplier(config: TrainConfig, step: int, total: int) -> float:
    """The learning rate of a step as a share of its peak: linear warm-up, then constant or linear decay.

    Args:
        config: Gives warmup and schedule.
        step: The step, from 1 to `total`.
        total: All steps of the training.

    Returns:
        A share in (0, 1].
    """
    warmup_steps = round(config.warmup * total)
    if step <= warmup_steps:
        return step / warmup_steps
    return 1.0 if config.schedule == "constant" else (total - step + 1) / (total - warmup_steps)


def make_optimizer(module: nn.Module, settings: Optimizer, state: Mapping[str, Tensor] | None) -> torch.optim.Optimizer:
    """Create the spec's optimizer for all parameters.

    Args:
        module: The model, sharded or not.
        settings: The spec's optimizer section.
        state: The state to continue from, full tensors as from `optimizer_state`; None or empty for a fresh start.
    """
    optimizer = OPTIMIZERS[settings.name](module.parameters(), weight_decay=settings.weight_decay)
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in (state or {}).items():
        moment, _, name = key.partition("/")
        moments.setdefault(name, {})[moment] = value
    for name, parameter in module.named_parameters():
        if name in moments:  # otherwise it never had a gradient
            values = moments[""] | moments[name]  # "" holds the step, which all parameters share
            optimizer.state[parameter] = {key: like_parameter(parameter, value) for key, value in values.items()}
    return optimizer


def adafactor(parameters: Iterable[nn.Parameter], weight_decay: float) -> torch.optim.Optimizer:
    """Adafactor, one tensor at a time: torch's foreach variant would copy all tensors.

    The floor of gradients (eps1) is 1e-12, below which the product of two squares would underflow. Torch's default, the
    dtype's resolution, is larger than nearly all gradients of a large model, so that a step in bf16 would change
    nothing.
    """
    return torch.optim.Adafactor(parameters, eps=(1e-12, 1e-3), weight_decay=weight_decay, foreach=False)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, fused=True),
    "adafactor": adafactor,
}


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by name; empty before the first step.

    Returns:
        `step`, float32 [], and `<moment>/<parameter>`. AdamW's moments have the parameter's shape. For a matrix,
        Adafactor has row_var (the last dimension is 1) and col_var (the last but one is 1). For other parameters it has
        variance, in the parameter's shape.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            state["step" if moment == "step" else f"{moment}/{name}"] = value
    return state
