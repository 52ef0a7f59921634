"""Scorers: how important each weight is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """Statistics of one matrix `[n_out, n_in]`, from one pass over a sample of training rows.

    Attributes:
        inputs: Norm ||x||_2 of each input feature over all tokens, float32 `[n_in]`; None if no inputs were seen.
        gradient: Gradient of the mean task loss with respect to the weights, float32 `[n_out, n_in]`.
    """

    inputs: Tensor | None
    gradient: Tensor


ScoreFn = Callable[[Tensor, Calibration | None], Tensor]
"""(weight of any float dtype, its calibration) -> scores, float32 >= 0 of the weight's shape; 0 is never kept.

Weights that the parent has pruned are zero and must score 0, so that levels nest. All others must score more than 0.
"""


MIN_RELATIVE_SCORE = 1e-12  # least score of a non-zero weight, relative to its matrix's largest score


def magnitude(weight: Tensor, calibration: Calibration | None = None) -> Tensor:
    """|w|, for a weight of any shape."""
    return weight.detach().float().abs()


def wanda(weight: Tensor, calibration: Calibration | None) -> Tensor:
    """|w_ij| ||x_j||_2 (Sun et al. 2023). Unlike there, weights need not compete within a row: the pattern decides."""
    assert calibration is not None, "wanda needs calibration"
    assert calibration.inputs is not None, "the worker has checked it"
    return clamp_nonzero_scores(weight, magnitude(weight) * calibration.inputs)


def saliency(weight: Tensor, calibration: Calibration | None) -> Tensor:
    """|w dL/dw|: to first order, how much the loss changes without the weight (Molchanov et al. 2017)."""
    assert calibration is not None, "saliency needs calibration"
    return clamp_nonzero_scores(weight, magnitude(weight) * calibration.gradient.abs())


def clamp_nonzero_scores(weight: Tensor, scores: Tensor) -> Tensor:
    """Raise the scores of non-zero weights above 0, since a score of 0 means pruned by the parent.

    Args:
        weight: Weights, `[n_out, n_in]`.
        scores: Their scores, float32 >= 0 of the same shape. An input feature that is always 0 gives scores of 0.

    Returns:
        The scores, at least MIN_RELATIVE_SCORE times the largest one for non-zero weights, and 0 for zero weights.
    """
    floor = (MIN_RELATIVE_SCORE * scores.max()).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(weight == 0, 0.0, torch.maximum(scores, floor))


SCORERS: dict[str, ScoreFn] = {"magnitude": magnitude, "wanda": wanda, "saliency": saliency}
"""By a spec's `mask.score`."""


DATA_FREE = frozenset({magnitude})
"""Scorers that need no calibration; the calibration pass is skipped for them."""


NEEDS_INPUTS = frozenset({wanda})
"""Scorers that need the inputs of every matrix."""
