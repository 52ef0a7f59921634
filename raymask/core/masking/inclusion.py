"""Inclusion probabilities: how likely one vote draws each of a few elements.

A vote draws k of M elements without replacement, each time with probabilities proportional to p (successive sampling).
"""

from __future__ import annotations

from itertools import combinations
from math import comb, log

import torch
from torch import Tensor

MAX_TRANSITIONS = 2**10  # transitions between subsets up to which the sum is exact: 4:8, 2:16, 1 of any

GROUPS_AT_ONCE = 2**15  # so that the probabilities of their subsets stay in the cache

BISECTION_STEPS = 30  # of an interval of log L

NEVER = -1e30  # log p of elements that may not be kept: drawn only when no others are left

CERTAIN = 30.0  # expected arrivals at which an element has arrived for certain


def inclusion_probabilities(log_p: Tensor, k: int) -> Tensor:
    """Probability that one vote draws an element.

    The result is exact where a vote can pass through few subsets; else it is the threshold approximation (see
    `samplers`).

    Args:
        log_p: Log-probabilities up to a constant a group, float32 `[n_groups, group_size]`; NEVER for pruned elements.
        k: Number of elements that a vote draws in each group, 1 <= k < group_size.

    Returns:
        Probabilities in [0, 1] of the same shape, which sum to k in each group.
    """
    size = log_p.shape[1]
    transitions = sum(comb(size, drawn) * (size - drawn) for drawn in range(k))
    method = exact_by_subsets if transitions <= MAX_TRANSITIONS else threshold_approximation
    return torch.cat([method(chunk, k) for chunk in torch.split(log_p, GROUPS_AT_ONCE)])


def exact_by_subsets(log_p: Tensor, k: int) -> Tensor:
    """Exact inclusion probabilities, by dynamic programming over subsets. Arguments as `inclusion_probabilities`.

    P(the first d drawn are S) = sum over i in S of P(the first d - 1 drawn are S - i) p_i / (sum of p outside S - i).
    Elements are sorted, so that the largest remaining p is known and nothing underflows or overflows.
    """
    ranked = log_p.sort(dim=1, descending=True)
    logs = ranked.values.T.contiguous()  # [group_size, n_groups]
    size = len(logs)
    elements = frozenset(range(size))
    reached = {frozenset[int](): torch.ones_like(logs[0])}
    for drawn in range(k):
        # the order of combinations, so that the sums are always taken in the same order
        following = {frozenset(subset): torch.zeros_like(logs[0]) for subset in combinations(range(size), drawn + 1)}
        for subset, probability in reached.items():
            remaining = sorted(elements - subset)
            transitions = (logs[remaining] - logs[remaining[0]]).exp_()
            transitions *= probability / transitions.sum(0)
            for element, transition in zip(remaining, transitions, strict=True):
                following[subset | {element}] += transition
        reached = following
    inclusion = torch.zeros_like(logs)
    for subset, probability in reached.items():
        inclusion[sorted(subset)] += probability
    return torch.empty_like(log_p).scatter_(1, ranked.indices, inclusion.T.clamp(0.0, 1.0))


def threshold_approximation(log_p: Tensor, k: int) -> Tensor:
    """1 - exp(-L p_i), with the L of each group at which these sum to k. Arguments as `inclusion_probabilities`."""
    kth = log_p.topk(k, dim=1).values[:, -1:]
    low = log(k) - log_p.logsumexp(1, keepdim=True)  # since 1 - exp(-x) <= x
    high = log(CERTAIN) - kth
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        too_low = hit_probability(log_p + middle).sum(1, keepdim=True) < k
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return hit_probability(log_p + high)


def hit_probability(log_arrivals: Tensor) -> Tensor:
    """1 - exp(-exp(x)), the probability of at least one arrival. Overwrites its argument."""
    return log_arrivals.clamp_(max=log(CERTAIN)).exp_().neg_().expm1_().neg_()
