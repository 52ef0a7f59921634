"""What is a model trained for, and what does one row of it cost?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Counts:
    """What losses are means over: a batch's rows, its real tokens, and the pairs of tokens of one row.

    Divided by the counts of a larger batch that it is a part of, a batch's losses add up with the other parts' to the
    larger one's.
    """

    rows: float
    tokens: float
    pairs: float


NOTHING = Counts(math.inf, math.inf, math.inf)
"""Makes every loss and its gradients zero."""


def counts(lengths: np.ndarray) -> Counts:
    """Of a batch whose rows have so many real tokens each."""
    return Counts(len(lengths), int(lengths.sum()), int(np.square(lengths).sum()))


@dataclass(frozen=True)
class Objective:
    """What one kind of task trains for, on the outputs of the model, (rows, outputs) of any float dtype.

    `hard`: (outputs, labels) -> float32 (rows,), the cost against the labels. `soft`: (outputs, the teacher's, labels)
    -> the same against the teacher, where that is possible. `targets`: how many of these costs a mean is over.
    `agreement`: (outputs, the dense model's), both float32, on the CPU -> larger is better.
    """

    hard: Callable[[Tensor, Tensor], Tensor]
    soft: Callable[[Tensor, Tensor, Tensor], Tensor]
    targets: Callable[[Counts], float]
    agreement: Callable[[Tensor, Tensor], float]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="none")


def soft_cross_entropy(logits: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
    """At temperature 1."""
    return -(taught.float().softmax(-1) * logits.float().log_softmax(-1)).sum(-1)


def minus_divergence(logits: Tensor, standard: Tensor) -> float:
    """Minus the mean Kullback-Leibler divergence of the logits' probabilities from the standard's."""
    ours, theirs = logits.double().log_softmax(-1), standard.double().log_softmax(-1)
    return -float(F.kl_div(ours, theirs, reduction="batchmean", log_target=True))


def squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """Of the one output."""
    return F.mse_loss(outputs[:, 0].float(), labels.float(), reduction="none")


def untaught_squared_error(outputs: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
    """A teacher's one number says no more than the label does."""
    return squared_error(outputs, labels)


def minus_squared_error(outputs: Tensor, standard: Tensor) -> float:
    return -float(F.mse_loss(outputs.double(), standard.double()))


def rows_of(whole: Counts) -> float:
    return whole.rows


OBJECTIVES: dict[str, Objective] = {
    "classification": Objective(cross_entropy, soft_cross_entropy, rows_of, minus_divergence),
    "regression": Objective(squared_error, untaught_squared_error, rows_of, minus_squared_error),
}
"""By a spec's task.kind."""
