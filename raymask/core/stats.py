"""Is a difference more than noise?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import rankdata

from raymask.core.records import Interval

RESAMPLES = 2000


def paired_gain(baseline: np.ndarray, winner: np.ndarray, seed: int) -> Interval:
    """By how much the winner's mean loss undercuts the baseline's on the same rows; both float (rows,)."""
    gains = baseline.astype(np.float64) - winner.astype(np.float64)
    [gain] = bootstrap(len(gains), lambda rows: [float(gains[rows].mean())], seed)
    return gain


def chances(losses: np.ndarray, seed: int) -> np.ndarray:
    """Of each candidate, the share of resamples of the rows in which no other's mean loss is below its own.

    `losses`: float (candidates, rows), all on the same rows -> float64 (candidates,), which equals share.
    """
    rng = np.random.default_rng(seed)
    rows = losses.shape[1]
    wins = np.zeros(len(losses))
    for _ in range(RESAMPLES):
        means = losses @ (np.bincount(rng.integers(0, rows, rows), minlength=rows) / rows)
        wins += means <= means.min()
    return wins / RESAMPLES


def rank_agreement(early: np.ndarray, final: np.ndarray, seed: int) -> Interval:
    """Spearman's rank correlation of two measures of the same things, float (things,), with a bootstrap interval over
    the things. Where one of the two is constant the order says nothing, and it is 0."""
    drawn = np.random.default_rng(seed).integers(0, len(early), (RESAMPLES, len(early)))
    low, high = np.quantile(spearman(early[drawn], final[drawn]), [0.025, 0.975])
    return Interval(mean=float(spearman(early, final)), low=float(low), high=float(high))


def spearman(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The correlations of ranks, ties sharing theirs: two float (..., things) -> (...)."""
    ours, theirs = (
        ranks - ranks.mean(-1, keepdims=True) for ranks in (rankdata(one, axis=-1), rankdata(other, axis=-1))
    )
    spread = np.sqrt((ours**2).sum(-1) * (theirs**2).sum(-1))
    return np.asarray((ours * theirs).sum(-1) / np.where(spread > 0, spread, 1.0))


def bootstrap(count: int, measure: Callable[[np.ndarray], Sequence[float]], seed: int) -> list[Interval]:
    """Each of several figures on all rows, with the 2.5 % and 97.5 % quantiles over resampled rows (percentile
    bootstrap, Efron 1979), the same ones for all. `measure` takes the numbers of rows, int64 in [0, count).
    """
    rng = np.random.default_rng(seed)
    resampled = [measure(rng.integers(0, count, count)) for _ in range(RESAMPLES)]
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    found = zip(measure(np.arange(count)), low, high, strict=True)
    return [Interval(mean=float(value), low=float(below), high=float(above)) for value, below, above in found]
