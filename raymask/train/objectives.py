"""What is a model trained for, and what does one row of it cost?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Counts:
    """What losses are means over: a batch's rows, its real tokens, the pairs of tokens of one row, and the tokens that
    others of their row come before.

    Divided by the counts of a larger batch that it is a part of, a batch's losses add up with the other parts' to the
    larger one's.
    """

    rows: float
    tokens: float
    pairs: float
    predicted: float


NOTHING = Counts(math.inf, math.inf, math.inf, math.inf)
"""Makes every loss and its gradients zero."""


def counts(lengths: np.ndarray) -> Counts:
    """Of a batch whose rows have so many real tokens each."""
    rows, tokens = len(lengths), int(lengths.sum())
    return Counts(rows, tokens, int(np.square(lengths).sum()), tokens - rows)


@dataclass(frozen=True)
class Objective:
    """What one kind of task trains a model for, on its outputs, of any float dtype.

    `hard`: (outputs, batch) -> float32 (rows,), each row's cost, against what the batch says. `soft`: (outputs, the
    teacher's, batch) -> the same against the teacher, where it knows more. A row may have more `targets` than one; then
    its cost is their sum. `answers`: (outputs, batch) -> float32 (rows, few), what is kept of a prediction. `losses`:
    (answers, labels) -> float32 (rows,), each row's mean cost of a target. `agreement`: (answers, the dense model's) ->
    larger is better; None where the answers cannot tell. `auto_class` and `tag`: transformers' names for such models.
    `per_token`: the outputs are (rows, tokens, vocabulary), else (rows, outputs).
    """

    hard: Callable[[Tensor, Batch], Tensor]
    soft: Callable[[Tensor, Tensor, Batch], Tensor]
    targets: Callable[[Counts], float]
    answers: Callable[[Tensor, Batch], Tensor]
    losses: Callable[[Tensor, Tensor], Tensor]
    agreement: Callable[[Tensor, Tensor], float] | None
    auto_class: str = "AutoModelForSequenceClassification"
    tag: str = "text-classification"
    per_token: bool = False


def as_they_are(outputs: Tensor, batch: Batch) -> Tensor:
    return outputs.float()


def rows_of(whole: Counts) -> float:
    return whole.rows


# Classes.


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="none")


def hard_cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    return cross_entropy(logits, batch["labels"])


def soft_cross_entropy(logits: Tensor, taught: Tensor, batch: Batch) -> Tensor:
    """At temperature 1."""
    return -(taught.float().softmax(-1) * logits.float().log_softmax(-1)).sum(-1)


def minus_divergence(logits: Tensor, standard: Tensor) -> float:
    """Minus the mean Kullback-Leibler divergence of the logits' probabilities from the standard's."""
    ours, theirs = logits.double().log_softmax(-1), standard.double().log_softmax(-1)
    return -float(F.kl_div(ours, theirs, reduction="batchmean", log_target=True))


# A number.


def squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """Of the one output."""
    return F.mse_loss(outputs[:, 0].float(), labels.float(), reduction="none")


def hard_squared_error(outputs: Tensor, batch: Batch) -> Tensor:
    return squared_error(outputs, batch["labels"])


def soft_squared_error(outputs: Tensor, taught: Tensor, batch: Batch) -> Tensor:
    """A teacher's one number says no more than the label does."""
    return squared_error(outputs, batch["labels"])


def minus_squared_error(outputs: Tensor, standard: Tensor) -> float:
    return -float(F.mse_loss(outputs.double(), standard.double()))


# The next token.


def followed(batch: Batch) -> Tensor:
    """Whether a real token follows each, bool (rows, tokens)."""
    there = batch["attention_mask"].bool().roll(-1, 1)
    there[:, -1] = False
    return there


def token_nll(logits: Tensor, batch: Batch) -> Tensor:
    """Minus the log-likelihood of each row's tokens but the first, each given those before it, summed."""
    after = batch["input_ids"].roll(-1, 1)
    costs = F.cross_entropy(logits.flatten(0, 1).float(), after.flatten(), reduction="none").view_as(after)
    return (costs * followed(batch)).sum(1)


def soft_token_nll(logits: Tensor, taught: Tensor, batch: Batch) -> Tensor:
    """The same where the teacher's probabilities stand for the token that came."""
    return (soft_cross_entropy(logits, taught, batch) * followed(batch)).sum(1)


def nll_and_tokens(logits: Tensor, batch: Batch) -> Tensor:
    """(rows, 2): the summed cost, and of how many predicted tokens."""
    return torch.stack([token_nll(logits, batch), followed(batch).sum(1).float()], 1)


def nll_per_token(answers: Tensor, labels: Tensor) -> Tensor:
    return answers[:, 0] / answers[:, 1]


def predicted_tokens(whole: Counts) -> float:
    return whole.predicted


OBJECTIVES: dict[str, Objective] = {
    "classification": Objective(
        hard_cross_entropy, soft_cross_entropy, rows_of, as_they_are, cross_entropy, minus_divergence
    ),
    "regression": Objective(
        hard_squared_error, soft_squared_error, rows_of, as_they_are, squared_error, minus_squared_error
    ),
    "causal-lm": Objective(
        token_nll,
        soft_token_nll,
        predicted_tokens,
        nll_and_tokens,
        nll_per_token,
        None,
        auto_class="AutoModelForCausalLM",
        tag="text-generation",
        per_token=True,
    ),
}
"""By a spec's task.kind."""
