"""Losses of classification, regression and language modelling, one value a row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Batch = dict[str, Tensor]
"""A model's inputs by transformers' names, int64 [rows, tokens], and `labels` [rows]."""


@dataclass(frozen=True)
class LossDenominators:
    """What the summed losses of a batch are divided by.

    With the denominators of a larger batch, the losses of its parts add up to its loss.

    Attributes:
        rows: Rows.
        tokens: Tokens without padding.
        pairs: Pairs of tokens of the same row, summed over rows.
        predicted: Tokens that a language model predicts: all but the first of each row.
    """

    rows: float
    tokens: float
    pairs: float
    predicted: float


ZERO_WEIGHT = LossDenominators(math.inf, math.inf, math.inf, math.inf)
"""Infinite denominators: every loss and its gradients are zero."""


def loss_denominators(lengths: np.ndarray) -> LossDenominators:
    """The denominators of a batch; `lengths`: int64 [rows], each row's tokens without padding."""
    rows, tokens = len(lengths), int(lengths.sum())
    return LossDenominators(rows, tokens, int(np.square(lengths).sum()), tokens - rows)


@dataclass(frozen=True)
class TaskLoss:
    """Losses and predictions of one kind of task.

    A model's outputs have any float dtype. A row has one target, or several (the tokens to predict); its training loss
    is the sum over its targets.

    Attributes:
        label_loss: (outputs, batch) -> float32 [rows], each row's loss against the labels.
        distill_loss: (outputs, teacher's outputs, batch) -> float32 [rows], each row's loss against the teacher, or
            against the labels where the teacher's outputs say no more.
        targets: Denominators -> the number of targets.
        predictions: (outputs, batch) -> float32 [rows, columns], what is kept of the outputs.
        losses: (predictions, labels) -> float32 [rows], each row's mean loss over its targets.
        agreement: (predictions, dense model's predictions) -> larger is better. None if predictions do not suffice.
        auto_class: transformers' auto class for such models.
        tag: The hub's pipeline tag for such models.
        per_token: Outputs are [rows, tokens, vocabulary] instead of [rows, outputs].
    """

    label_loss: Callable[[Tensor, Batch], Tensor]
    distill_loss: Callable[[Tensor, Tensor, Batch], Tensor]
    targets: Callable[[LossDenominators], float]
    predictions: Callable[[Tensor, Batch], Tensor]
    losses: Callable[[Tensor, Tensor], Tensor]
    agreement: Callable[[Tensor, Tensor], float] | None
    auto_class: str = "AutoModelForSequenceClassification"
    tag: str = "text-classification"
    per_token: bool = False


def float_outputs(outputs: Tensor, batch: Batch) -> Tensor:
    """The outputs in float32, [rows, outputs]."""
    return outputs.float()


def num_rows(denominators: LossDenominators) -> float:
    """One target a row."""
    return denominators.rows


# Classification: logits [rows, classes], labels int64 [rows].


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each row, float32 [rows]."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def hard_cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy against the labels, float32 [rows]."""
    return cross_entropy(logits, batch["labels"])


def soft_cross_entropy(logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy against the teacher's probabilities at temperature 1, over the last dimension; float32."""
    return -(teacher_logits.float().softmax(-1) * logits.float().log_softmax(-1)).sum(-1)


def negative_kl(logits: Tensor, dense_logits: Tensor) -> float:
    """Minus the mean over rows of KL(dense || model), the divergence of the model from the dense model."""
    log_probs, dense_log_probs = logits.double().log_softmax(-1), dense_logits.double().log_softmax(-1)
    return -float(F.kl_div(log_probs, dense_log_probs, reduction="batchmean", log_target=True))


# Regression: outputs [rows, 1], labels float32 [rows].


def squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """Squared error of each row, float32 [rows]."""
    return F.mse_loss(outputs[:, 0].float(), labels.float(), reduction="none")


def hard_squared_error(outputs: Tensor, batch: Batch) -> Tensor:
    """Squared error against the labels, float32 [rows]."""
    return squared_error(outputs, batch["labels"])


def soft_squared_error(outputs: Tensor, teacher_outputs: Tensor, batch: Batch) -> Tensor:
    """Squared error against the labels, float32 [rows]: a teacher's one number says no more than the label."""
    return squared_error(outputs, batch["labels"])


def negative_squared_error(outputs: Tensor, dense_outputs: Tensor) -> float:
    """Minus the mean squared difference from the dense model's outputs."""
    return -float(F.mse_loss(outputs.double(), dense_outputs.double()))


# Language modelling: logits [rows, tokens, vocabulary], no labels.


def has_next_token(batch: Batch) -> Tensor:
    """Whether a token other than padding follows, bool [rows, tokens]."""
    has_next = batch["attention_mask"].bool().roll(-1, 1)
    has_next[:, -1] = False
    return has_next


def token_nll(logits: Tensor, batch: Batch) -> Tensor:
    """Negative log-likelihood of all tokens but the first, each given those before it, summed; float32 [rows]."""
    targets = batch["input_ids"].roll(-1, 1)
    nll = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)
    return (nll * has_next_token(batch)).sum(1)


def soft_token_nll(logits: Tensor, teacher_logits: Tensor, batch: Batch) -> Tensor:
    """`token_nll` with the teacher's probabilities in place of the next token, float32 [rows]."""
    return (soft_cross_entropy(logits, teacher_logits, batch) * has_next_token(batch)).sum(1)


def nll_and_tokens(logits: Tensor, batch: Batch) -> Tensor:
    """Each row's summed negative log-likelihood and its number of predicted tokens, float32 [rows, 2]."""
    return torch.stack([token_nll(logits, batch), has_next_token(batch).sum(1).float()], 1)


def nll_per_token(predictions: Tensor, labels: Tensor) -> Tensor:
    """Each row's mean negative log-likelihood of a token, float32 [rows], from `nll_and_tokens`."""
    return predictions[:, 0] / predictions[:, 1]


def num_predicted_tokens(denominators: LossDenominators) -> float:
    """One target a predicted token."""
    return denominators.predicted


TASK_LOSSES: dict[str, TaskLoss] = {
    "classification": TaskLoss(
        hard_cross_entropy, soft_cross_entropy, num_rows, float_outputs, cross_entropy, negative_kl
    ),
    "regression": TaskLoss(
        hard_squared_error, soft_squared_error, num_rows, float_outputs, squared_error, negative_squared_error
    ),
    "causal-lm": TaskLoss(
        token_nll,
        soft_token_nll,
        num_predicted_tokens,
        nll_and_tokens,
        nll_per_token,
        None,
        auto_class="AutoModelForCausalLM",
        tag="text-generation",
        per_token=True,
    ),
}
"""By the spec's task.kind."""
