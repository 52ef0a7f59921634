"""Which operations of a training step have a faster way on a CPU than torch's own?

Random bits: torch draws a dropout mask one Bernoulli at a time, which takes a fifth of a step of a small encoder; here
four entries share one 64-bit draw. Attention: with dropout, torch's fused kernels step aside for one that works in
float32 and looks for rows without a key; here it is the textbook's two products and a softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LEVELS = 2**16  # a dropout probability is rounded to a whole number of these


def kernels_for(module: nn.Module, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """The block to train a module in: the faster way, unless there is nothing to drop, or it is not on a CPU."""
    drops = any(isinstance(child, nn.Dropout) and child.p > 0 for child in module.modules())
    return FasterOnCPU if drops and device.type == "cpu" else nullcontext


class FasterOnCPU(TorchFunctionMode):
    """Within the block, dropout and attention with dropout run here where their tensors are on a CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in FASTER and args and args[0].device.type == "cpu":
            func = FASTER[func]
        return func(*args, **kwargs or {})


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`input` with each entry zeroed with probability p, the others scaled by 1 / (1 - p); as F.dropout."""
    dropped = round(p * LEVELS)
    if not training or dropped in (0, LEVELS) or inplace or not input.is_floating_point():
        return F.dropout(input, p, training, inplace)
    lanes = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = torch.empty(input.shape, dtype=input.dtype)
    torch.ge(lanes[: input.numel()].view(input.shape), dropped - LEVELS // 2, out=kept)
    return input * kept.mul_(LEVELS / (LEVELS - dropped))


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
    """softmax(Q K^T scale + mask) V with dropout of the probabilities; as F.scaled_dot_product_attention."""
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


FASTER: dict[Callable[..., Any], Callable[..., Any]] = {F.dropout: dropout, F.scaled_dot_product_attention: attention}
