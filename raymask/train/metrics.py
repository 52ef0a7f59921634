"""How good are these predictions, in the field's own measures?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

LARGEST = 700.0  # of a perplexity's logarithms, so that there is a number for it


def measure(names: Sequence[str], logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Each metric of `names` for logits, float (rows, outputs), against labels, (rows,).

    A perplexity is that of rows of summed costs and their tokens, (rows, 2); it is always finite. F1 is that of class
    1 where there are two classes, else the classes' plain mean. A correlation does not exist where predictions or
    labels are all the same, and counts as 0.
    """
    if "perplexity" in names:
        cost, tokens = logits.sum(0, dtype=np.float64)
        return {"perplexity": math.exp(min(cost / tokens, LARGEST))}
    if set(names) & {"pearson", "spearman"}:
        guesses = logits[:, 0]
        found = {}
        for name in names:
            correlate = stats.pearsonr if name == "pearson" else stats.spearmanr
            varied = np.ptp(guesses) > 0 and np.ptp(labels) > 0
            found[name] = float(correlate(guesses, labels).statistic) if varied else 0.0
        return found
    classes = logits.shape[1]
    counts = np.bincount(labels * classes + logits.argmax(axis=1), minlength=classes**2).reshape(classes, classes)
    return {name: CLASSIFICATION[name](counts) for name in names}


def accuracy(counts: np.ndarray) -> float:
    """The share of right answers; `counts`: int64 [true classes, predicted classes], as for the other metrics."""
    return float(counts.trace() / counts.sum())


def f1(counts: np.ndarray) -> float:
    """F1 of class 1 where there are two classes, else the mean over the classes that occur; 0 where there is none."""
    sizes = counts.sum(0) + counts.sum(1)
    scores = 2 * counts.diagonal() / np.maximum(sizes, 1)
    return float(scores[1] if len(counts) == 2 else scores[sizes > 0].mean())


def matthews(counts: np.ndarray) -> float:
    """Matthews correlation (Gorodkin 2004 for more than two classes); 0 where all labels or answers are the same."""
    true, predicted, total = counts.sum(1), counts.sum(0), counts.sum()
    spread = float(total**2 - true @ true) * float(total**2 - predicted @ predicted)
    return float((counts.trace() * total - true @ predicted) / math.sqrt(spread)) if spread else 0.0


CLASSIFICATION = {"accuracy": accuracy, "f1": f1, "matthews": matthews}
"""Written out on counts, since a bootstrap measures thousands of resamples: scikit-learn takes 1 ms for each."""


def only_answer(classes: Sequence[str], logits: np.ndarray) -> str | None:
    """The class that all rows of logits, float (rows, classes), answer; None where they differ, or have no classes."""
    if not classes:
        return None
    first, *others = np.unique(logits.argmax(axis=1))
    return None if others else classes[first]


def overall(metrics: dict[str, float]) -> float:
    """The one number that choices by metric use, larger is better: the mean of the task's metrics, and of a perplexity,
    of which smaller is better, minus its logarithm: the mean log-likelihood of a token."""
    return float(np.mean([-math.log(value) if name == "perplexity" else value for name, value in metrics.items()]))
