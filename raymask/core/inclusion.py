"""How likely does one vote draw each of a few contestants?

A vote draws n of M without replacement, each time with probabilities proportional to p (successive sampling).
"""

from __future__ import annotations

from itertools import combinations
from math import comb, log

import torch
from torch import Tensor

SETS = 2**10  # transitions between sets up to which the probabilities are summed exactly: 4:8, 2:16, 1 of any
CHUNK = 2**15  # contests at a time, so that their sets' probabilities stay in the cache
HALVINGS = 30  # of an interval of log L
NEVER = -1e30  # log p of what may not be kept: drawn when nothing else is left
SURE = 30.0  # expected arrivals after which an entry has arrived for certain


def inclusion(log_p: Tensor, n: int) -> Tensor:
    """The probability in [0, 1] that a vote draws an entry, by contest summing to n. All (contests, contestants).

    `log_p`: float32 up to a constant a contest, NEVER for an entry that is out. 1 <= n < contestants. Exact where
    the sets that a vote may pass through are few; else as of a race whose end hardly varies (`samplers`).
    """
    size = log_p.shape[1]
    steps = sum(comb(size, drawn) * (size - drawn) for drawn in range(n))
    chances = summed_over_sets if steps <= SETS else at_a_threshold
    return torch.cat([chances(part, n) for part in torch.split(log_p, CHUNK)])


def summed_over_sets(log_p: Tensor, n: int) -> Tensor:
    """P(the first k drawn are S) = sum over i in S of P(the first k - 1 are S - i) p_i / (what p is left by S - i).

    Contestants are sorted, so that the largest p that is left is known and nothing under- or overflows.
    """
    ranked = log_p.sort(dim=1, descending=True)
    logs = ranked.values.T.contiguous()  # (contestants, contests)
    size = len(logs)
    everyone = frozenset(range(size))
    reached = {frozenset[int](): torch.ones_like(logs[0])}
    for drawn in range(n):
        # in the order of combinations, for sums that are always the same
        following = {frozenset(chosen): torch.zeros_like(logs[0]) for chosen in combinations(range(size), drawn + 1)}
        for chosen, probability in reached.items():
            left = sorted(everyone - chosen)
            odds = (logs[left] - logs[left[0]]).exp_()
            odds *= probability / odds.sum(0)
            for entry, chance in zip(left, odds, strict=True):
                following[chosen | {entry}] += chance
        reached = following
    chances = torch.zeros_like(logs)
    for chosen, probability in reached.items():
        chances[sorted(chosen)] += probability
    return torch.empty_like(log_p).scatter_(1, ranked.indices, chances.T.clamp(0.0, 1.0))


def at_a_threshold(log_p: Tensor, n: int) -> Tensor:
    """1 - exp(-L p_i), with the L of each contest at which these sum to n."""
    nth = log_p.topk(n, dim=1).values[:, -1:]
    low = log(n) - log_p.logsumexp(1, keepdim=True)  # 1 - exp(-x) <= x
    high = log(SURE) - nth
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        short = drawn_by(log_p + middle).sum(1, keepdim=True) < n
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return drawn_by(log_p + high)


def drawn_by(log_arrivals: Tensor) -> Tensor:
    """1 - exp(-exp(x))."""
    return log_arrivals.clamp_(max=log(SURE)).exp_().neg_().expm1_().neg_()
