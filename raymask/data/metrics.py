"""Metrics of predictions: accuracy, F1, Matthews and other correlations, perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

MAX_LOG_PERPLEXITY = 700.0  # exp of much more is infinite


def compute_metrics(
    names: Sequence[str], logits: np.ndarray, labels: np.ndarray, positive: int = 1
) -> dict[str, float]:
    """Compute metrics by name.

    F1 is that of the positive class if there are two classes, else the mean over the classes. A correlation is
    undefined if all predictions or all labels are equal, and is then 0. A perplexity is always finite.

    Args:
        names: The metrics. "perplexity" and correlations are not mixed with others.
        logits: Float [rows, outputs]. For a perplexity [rows, 2]: each row's summed negative log-likelihood and its
            number of predicted tokens.
        labels: [rows], class numbers (int64) or regression targets (float32). A perplexity does not read them.
        positive: The number of the positive class.
    """
    if "perplexity" in names:
        nll, tokens = logits.sum(0, dtype=np.float64)
        return {"perplexity": math.exp(min(nll / tokens, MAX_LOG_PERPLEXITY))}
    if set(names) & {"pearson", "spearman"}:
        predictions = logits[:, 0]
        metrics = {}
        for name in names:
            correlate = stats.pearsonr if name == "pearson" else stats.spearmanr
            defined = np.ptp(predictions) > 0 and np.ptp(labels) > 0
            metrics[name] = float(correlate(predictions, labels).statistic) if defined else 0.0
        return metrics
    classes = logits.shape[1]
    # the confusion matrix
    counts = np.bincount(labels * classes + logits.argmax(axis=1), minlength=classes**2).reshape(classes, classes)
    if classes == 2 and positive == 0:
        counts = counts[::-1, ::-1]  # as if it were class 1
    return {name: CLASSIFICATION[name](counts) for name in names}


def accuracy(counts: np.ndarray) -> float:
    """Share of correct predictions, from the confusion matrix `counts`, int64 [true classes, predicted classes]."""
    return float(counts.trace() / counts.sum())


def f1(counts: np.ndarray) -> float:
    """F1 from the confusion matrix `counts`, int64 [true classes, predicted classes].

    With two classes it is the F1 of class 1 (0 if class 1 does not occur), else the mean over the classes that occur
    among labels or predictions.
    """
    sizes = counts.sum(0) + counts.sum(1)
    scores = 2 * counts.diagonal() / np.maximum(sizes, 1)
    return float(scores[1] if len(counts) == 2 else scores[sizes > 0].mean())


def matthews(counts: np.ndarray) -> float:
    """Matthews correlation from the confusion matrix `counts`, int64 [true classes, predicted classes].

    For more than two classes it is Gorodkin's (2004). It is 0 if all labels or all predictions are equal.
    """
    true, predicted, total = counts.sum(1), counts.sum(0), counts.sum()
    spread = float(total**2 - true @ true) * float(total**2 - predicted @ predicted)
    return float((counts.trace() * total - true @ predicted) / math.sqrt(spread)) if spread else 0.0


CLASSIFICATION = {"accuracy": accuracy, "f1": f1, "matthews": matthews}
"""Metrics of a confusion matrix. A bootstrap computes them thousands of times; scikit-learn needs 1 ms for each."""


def constant_prediction(classes: Sequence[str], logits: np.ndarray) -> str | None:
    """The class that a model predicts for every row.

    Args:
        classes: Class names in the order of their numbers; empty for other tasks than classification.
        logits: Float [rows, classes].

    Returns:
        The class name; None if predictions differ or there are no classes.
    """
    if not classes:
        return None
    first, *others = np.unique(logits.argmax(axis=1))
    return None if others else classes[first]


def selection_metric(metrics: dict[str, float]) -> float:
    """The mean of a task's metrics, larger is better: the number by which models are compared.

    A perplexity, where smaller is better, counts as the mean token log-likelihood, -log(perplexity).
    """
    return float(np.mean([-math.log(value) if name == "perplexity" else value for name, value in metrics.items()]))
