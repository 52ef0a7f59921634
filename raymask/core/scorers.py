"""How much does each weight matter?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """What one pass over a sample of training rows tells of a matrix (n_out, n_in), in float32.

    `inputs`: the norm ||x||_2 of each input feature over all tokens, (n_in,). `gradient`: of the mean task loss by the
    weights, (n_out, n_in).
    """

    inputs: Tensor
    gradient: Tensor


Scorer = Callable[[Tensor, Calibration | None], Tensor]
"""(weight of any float dtype, its calibration) -> float32 scores >= 0 of the weight's shape; 0 means never to be kept.

Entries that the parent has pruned are zero and must score 0: so levels nest. All others must score more than 0.
"""

FAINT = 1e-12  # of a matrix's largest score: what a weight counts at least that is there


def magnitude(weight: Tensor, calibration: Calibration | None = None) -> Tensor:
    """|w|, of a weight of any shape."""
    return weight.detach().float().abs()


def wanda(weight: Tensor, calibration: Calibration | None) -> Tensor:
    """|w_ij| ||x_j||_2 (Sun et al. 2023), without their comparing within rows: that is the pattern's."""
    assert calibration is not None, "wanda looks at inputs"
    return faint_at_least(weight, magnitude(weight) * calibration.inputs)


def saliency(weight: Tensor, calibration: Calibration | None) -> Tensor:
    """|w dL/dw|: to first order, how much the loss changes without the weight (Molchanov et al. 2017)."""
    assert calibration is not None, "saliency looks at gradients"
    return faint_at_least(weight, magnitude(weight) * calibration.gradient.abs())


def faint_at_least(weight: Tensor, scores: Tensor) -> Tensor:
    """Scores above zero for every weight that is not zero: a feature that was never on must not cost a place."""
    floor = (FAINT * scores.max()).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(weight == 0, 0.0, torch.maximum(scores, floor))


SCORERS: dict[str, Scorer] = {"magnitude": magnitude, "wanda": wanda, "saliency": saliency}
BLIND = frozenset({magnitude})
"""Scorers that need no calibration, and are spared the pass."""
