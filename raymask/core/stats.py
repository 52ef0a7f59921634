"""Bootstrap statistics: whether a difference is more than noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import rankdata

from raymask.core.records import ConfidenceInterval

RESAMPLES = 2000  # bootstrap resamples


def paired_gain(baseline: np.ndarray, winner: np.ndarray, seed: int) -> ConfidenceInterval:
    """By how much the winner's mean loss is below the baseline's.

    Args:
        baseline: Losses of the baseline, float `[n_rows]`.
        winner: Losses of the winner on the same rows, float `[n_rows]`.
        seed: Seed of the resampling.

    Returns:
        The mean difference with its bootstrap interval; positive where the winner is better.
    """
    gains = baseline.astype(np.float64) - winner.astype(np.float64)
    [gain] = bootstrap(len(gains), lambda rows: [float(gains[rows].mean())], seed)
    return gain


def win_probabilities(losses: np.ndarray, seed: int) -> np.ndarray:
    """How likely each candidate has the lowest mean loss, by the bootstrap over rows.

    Args:
        losses: Losses on the same rows, float `[n_candidates, n_rows]`.
        seed: Seed of the resampling.

    Returns:
        For each candidate the share of resamples in which no other mean loss is below its own, float64
        `[n_candidates]`. In a tie every tied candidate wins.
    """
    rng = np.random.default_rng(seed)
    n_rows = losses.shape[1]
    wins = np.zeros(len(losses))
    for _ in range(RESAMPLES):
        means = losses @ (np.bincount(rng.integers(0, n_rows, n_rows), minlength=n_rows) / n_rows)
        wins += means <= means.min()
    return wins / RESAMPLES


def spearman_interval(early: np.ndarray, final: np.ndarray, seed: int) -> ConfidenceInterval:
    """Spearman's rank correlation with its bootstrap interval over the items.

    Args:
        early: One measure of each item, float `[n_items]`.
        final: Another measure of the same items, float `[n_items]`.
        seed: Seed of the resampling.

    Returns:
        The correlation in [-1, 1]; 0 where one of the measures is constant and so gives no order.
    """
    resampled = np.random.default_rng(seed).integers(0, len(early), (RESAMPLES, len(early)))
    low, high = np.quantile(spearman(early[resampled], final[resampled]), [0.025, 0.975])
    return ConfidenceInterval(mean=float(spearman(early, final)), low=float(low), high=float(high))


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's correlation along the last axis: two float `[..., n_items]` -> `[...]`. Ties share their mean rank."""
    x_ranks, y_ranks = (ranks - ranks.mean(-1, keepdims=True) for ranks in (rankdata(x, axis=-1), rankdata(y, axis=-1)))
    spread = np.sqrt((x_ranks**2).sum(-1) * (y_ranks**2).sum(-1))
    return np.asarray((x_ranks * y_ranks).sum(-1) / np.where(spread > 0, spread, 1.0))


def bootstrap(count: int, measure: Callable[[np.ndarray], Sequence[float]], seed: int) -> list[ConfidenceInterval]:
    """Percentile bootstrap (Efron 1979) of several statistics over the same resampled rows.

    Args:
        count: Number of rows.
        measure: Computes the statistics on rows given by their indices, int64 `[count]` in [0, count).
        seed: Seed of the resampling.

    Returns:
        For each statistic its value on all rows, with the 2.5 % and 97.5 % quantiles over the resamples.
    """
    rng = np.random.default_rng(seed)
    resampled = [measure(rng.integers(0, count, count)) for _ in range(RESAMPLES)]
    lows, highs = np.quantile(resampled, [0.025, 0.975], axis=0)
    statistics = zip(measure(np.arange(count)), lows, highs, strict=True)
    return [ConfidenceInterval(mean=float(value), low=float(low), high=float(high)) for value, low, high in statistics]
