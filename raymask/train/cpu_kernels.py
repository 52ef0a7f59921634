"""Dropout and attention for training on a CPU, faster than torch's own.

torch draws the random bits of dropout one entry at a time, which takes a fifth of a training step of a small encoder.
Here four entries share one 64-bit draw. With dropout, torch's attention falls back to a kernel that computes in float32
and checks for rows without a key. Here it is two matrix products and a softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PROBABILITY_STEPS = 2**16  # a dropout probability is rounded to a multiple of 1 / PROBABILITY_STEPS


def cpu_kernels(module: nn.Module, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """The context manager to train a module in: `CPUKernels` on a CPU if the module has dropout, else `nullcontext`."""
    has_dropout = any(isinstance(child, nn.Dropout) and child.p > 0 for child in module.modules())
    return CPUKernels if has_dropout and device.type == "cpu" else nullcontext


class CPUKernels(TorchFunctionMode):
    """Replaces F.dropout, and F.scaled_dot_product_attention with dropout, for tensors on a CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in REPLACEMENTS and args and args[0].device.type == "cpu":
            func = REPLACEMENTS[func]
        return func(*args, **kwargs or {})


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Dropout with the arguments of F.dropout.

    Args:
        input: A float tensor of any shape.
        p: The probability in [0, 1] that an entry becomes 0. The others are scaled by 1 / (1 - p).
        training: False returns the input.
        inplace: Passed on to F.dropout.
    """
    dropped = round(p * PROBABILITY_STEPS)
    if not training or dropped in (0, PROBABILITY_STEPS) or inplace or not input.is_floating_point():
        return F.dropout(input, p, training, inplace)
    random_bits = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = torch.empty(input.shape, dtype=input.dtype)
    torch.ge(random_bits[: input.numel()].view(input.shape), dropped - PROBABILITY_STEPS // 2, out=kept)
    return input * kept.mul_(PROBABILITY_STEPS / (PROBABILITY_STEPS - dropped))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(Q K^T scale + mask) V with dropout of the probabilities; arguments of F.scaled_dot_product_attention.

    Args:
        query: Float [..., queries, width].
        key: Float [..., keys, width].
        value: Float [..., keys, value width].
        attn_mask: Bool, True where a query sees a key, or float to be added to the scores; None for no mask.
        dropout_p: The probability in [0, 1] that an attention probability becomes 0.
        is_causal: Passed on to torch.
        scale: None for 1 / sqrt(width).
        enable_gqa: Passed on to torch.
    """
    if dropout_p == 0.0 or is_causal or enable_gqa:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    scores = torch.matmul(query * (query.shape[-1] ** -0.5 if scale is None else scale), key.transpose(-2, -1))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            lowest = torch.finfo(scores.dtype).min
            attn_mask = torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill_(~attn_mask, lowest)
        scores = scores + attn_mask
    return torch.matmul(dropout(scores.softmax(-1), dropout_p), value)


REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.dropout: dropout,
    F.scaled_dot_product_attention: attention,
}
