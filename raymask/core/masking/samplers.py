"""Samplers: where randomness enters a mask.

The paper's method votes: V times it draws k of N elements without replacement, with probabilities
p_i = s_i^a / sum s^a, and keeps the k elements with most votes. One such draw is an exponential race: element i arrives
at time E_i / p_i, E_i ~ Exp(1), and the first k to arrive are drawn. `sample_exact` runs this race.

For large N the k-th arrival time hardly varies. With a threshold L that solves sum_i (1 - exp(-L p_i)) = k, the votes
of element i are Binomial(V, q_i), q_i = 1 - exp(-L p_i), and only elements whose outcome is undecided need a random
draw: `prepare_binomial` and `sample_undecided`.

With many small groups the q_i come from `inclusion`, and the votes of a group keep a fixed sum: `sample_grouped`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import betaincinv, ndtr
from torch import Generator, Tensor

from raymask.core.masking.inclusion import NEVER, inclusion_probabilities
from raymask.core.masking.patterns import kth_largest

SampleFn = Callable[[Tensor, Generator], Tensor]
"""(scores, generator on their device) -> perturbed scores, float32 >= 0, larger = keep; `[n_groups, group_size]`."""


Sampler = Callable[[Tensor, int, float, int], SampleFn]
"""(float32 scores >= 0 `[n_groups, group_size]`, k per group, exponent a, number of votes V) -> SampleFn.

It computes once what depends only on the parent, and keeps it as a few numbers. The SampleFn takes the same scores
again. A score of 0 stays 0 and is never kept.
"""


MAX_EXACT_DRAWS = 2**20  # elements times votes up to which the race itself is run

MAX_EXACT_VOTES = (
    4  # votes up to which the races of many groups are run: too few for the approximation of `sample_grouped`
)

BINS = 2048  # of the log-score histogram: 0.03 in log p over 6 decades of weights at a = 5

CHUNK = 2**22  # elements at a time: float32 counts are exact below 2^24, and copies stay small

UNDECIDED_PROB = 1e-7  # probability of the less likely outcome, below which an element needs no draw

TINY = torch.finfo(torch.float32).tiny  # makes a key positive: no mask keeps a key of 0

MARGIN = 2  # votes by which the boundary may miss its prediction, beyond the votes of half a histogram bin


def votes_from_ratio(entries: int, k: int, ratio: float) -> int:
    """Number of votes V = max(1, floor((N - k) r)). More votes give a mask nearer to the magnitude mask.

    Args:
        entries: Number of weights N.
        k: Number of weights to keep.
        ratio: Sampling ratio r > 0.

    Returns:
        V >= 1.
    """
    return max(1, math.floor((entries - k) * ratio))


def voting(scores: Tensor, k: int, exponent: float, num_votes: int) -> SampleFn:
    """The paper's sampler: votes, with ties broken at random by the generator. A Sampler.

    It picks the fastest function that is accurate for the given sizes.

    Args:
        scores: Scores >= 0, float32 `[n_groups, group_size]`.
        k: Number of elements to keep in each group.
        exponent: Exponent a > 0.
        num_votes: Number of votes V >= 1.

    Returns:
        The function that draws.
    """
    # a single group is counted without dim: with it, counting takes five times as long
    num_nonzero = scores.count_nonzero() if len(scores) == 1 else scores.count_nonzero(1).max()
    if k == 0 or int(num_nonzero) <= k:
        return lambda scores, rng: scores
    if (
        num_votes == 1
        or scores.numel() * num_votes <= MAX_EXACT_DRAWS
        or (len(scores) > 1 and num_votes <= MAX_EXACT_VOTES)
    ):
        return partial(sample_exact, k=k, exponent=exponent, num_votes=num_votes)
    if len(scores) > 1:
        return partial(sample_grouped, k=k, exponent=exponent, num_votes=num_votes)
    return prepare_binomial(scores, k, exponent, num_votes)


def random(scores: Tensor, k: int, exponent: float, num_votes: int) -> SampleFn:
    """Uniformly random masks among the non-zero scores, whatever their size: a baseline for the method. A Sampler."""
    return lambda scores, rng: torch.where(
        scores > 0, torch.rand(scores.shape, generator=rng, device=scores.device) + TINY, 0.0
    )


def sample_exact(scores: Tensor, rng: Generator, *, k: int, exponent: float, num_votes: int) -> Tensor:
    """Exact votes: the sum of V draws without replacement, each run as a race.

    Args:
        scores: Scores >= 0, float32 `[n_groups, group_size]`.
        rng: Generator on the device of `scores`.
        k: Number of elements that a vote draws in each group.
        exponent: Exponent a > 0.
        num_votes: Number of votes V >= 1.

    Returns:
        Votes plus a tie-break in (0, 1), float32 of the same shape; 0 where the score is 0.
    """
    # of a single group only the elements with a score need to race
    racing = scores[0].nonzero()[:, 0] if len(scores) == 1 else torch.arange(scores.shape[1], device=scores.device)
    racing_scores = scores[:, racing]
    log_p = exponent * racing_scores.log()
    votes = torch.rand(log_p.shape, generator=rng, device=scores.device)
    for _ in range(num_votes):
        log_exponential = torch.empty_like(log_p).exponential_(generator=rng).log_()
        earliness = torch.sub(log_p, log_exponential, out=log_exponential)  # minus the log of the arrival time
        votes += earliness >= kth_largest(earliness, k)
    keys = torch.zeros_like(scores)
    keys[:, racing] = torch.where(racing_scores > 0, votes + TINY, 0.0)
    return keys


def sample_grouped(scores: Tensor, rng: Generator, *, k: int, exponent: float, num_votes: int) -> Tensor:
    """Approximate votes in many small groups: binomials, adjusted so that a group's votes sum to about k V.

    In a group, a vote for one element is a vote less for the others. Errors e_i of variance d_i therefore become
    (e_i - c_i sum e) / sqrt(1 - c_i) with shares c_i = d_i / sum d. They sum to about 0, have the correlations of
    sampling without replacement to first order (Hajek 1964), and keep their variances. Measured against
    `sample_exact`, Gaussian scores, a = 5: the same distance from the magnitude mask to 4 %, and 8 to 14 % more where
    `inclusion` is not exact.

    Args:
        scores: Scores >= 0, float32 `[n_groups, group_size]`.
        rng: Generator on the device of `scores`.
        k: Number of elements that a vote draws in each group.
        exponent: Exponent a > 0.
        num_votes: Number of votes V >= 1.

    Returns:
        Votes plus a tie-break and a constant offset, float32 > 0 of the same shape; 0 where the score is 0.
    """
    q = inclusion_probabilities(torch.where(scores > 0, exponent * scores.log(), NEVER), k)
    error = torch.binomial(torch.full_like(q, num_votes), q, generator=rng) - num_votes * q
    variance = q * (1 - q)
    share = variance / variance.sum(1, keepdim=True).clamp_min(TINY)
    error = (error - share * error.sum(1, keepdim=True)) / (1 - share).clamp_min(0.25).sqrt()
    votes = num_votes * q + error + torch.rand(q.shape, generator=rng, device=q.device)
    return torch.where(scores > 0, (votes + 2 * num_votes).clamp_min(TINY), 0.0)  # positive, however large the errors


def prepare_binomial(scores: Tensor, k: int, exponent: float, num_votes: int) -> SampleFn:
    """Prepare binomial votes in one group: find L, the boundary in votes, and which scores are undecided.

    Args:
        scores: Scores >= 0, float32 `[1, group_size]`.
        k: Number of elements to keep, fewer than have a positive score.
        exponent: Exponent a > 0.
        num_votes: Number of votes V >= 1.

    Returns:
        `sample_undecided` with everything but scores and generator filled in.
    """
    top, centers, sizes = histogram(scores)
    log_p = exponent * centers

    def excess(log_l: float) -> float:
        return float(sizes @ -np.expm1(-np.exp(np.minimum(log_p + log_l, 700.0)))) - k

    # 1 - exp(-x) <= x bounds the root from below; doubling steps find an upper bound.
    low = math.log(k) - math.log(float(sizes @ np.exp(log_p)))
    high, step = low + 1.0, 1.0
    while excess(high) < 0:
        step *= 2
        high += step
    log_l = float(brentq(excess, low - 1e-6, high, xtol=1e-10))

    q = -np.expm1(-np.exp(np.minimum(log_p + log_l, 700.0)))
    boundary = vote_boundary(q, sizes, k, num_votes)
    # dq / dlog p = (1 - q) log(1 / (1 - q)) <= 1 / e bounds how far a bin's elements are from its center, in votes.
    margin = MARGIN + math.ceil(num_votes * exponent * float(centers[1] - centers[0]) / 2 / math.e)
    lowest, highest = max(boundary - margin, 0), min(boundary + margin, num_votes)

    def score_at(probability: float) -> float:
        """The score at which one vote draws an element with `probability`."""
        if probability <= 0.0:
            return 0.0
        if probability >= 1.0:
            return math.inf
        return top * math.exp(min((math.log(-math.log1p(-probability)) - log_l) / exponent, 700.0))

    # P(votes >= lowest) = I_q(lowest, V - lowest + 1) and P(votes <= highest) = I_{1-q}(V - highest, highest + 1).
    out_below = score_at(betaincinv(lowest, num_votes - lowest + 1, UNDECIDED_PROB) if lowest > 0 else 0.0)
    in_above = score_at(
        1 - betaincinv(num_votes - highest, highest + 1, UNDECIDED_PROB) if highest < num_votes else 1.0
    )
    return partial(
        sample_undecided,
        k=k,
        exponent=exponent,
        num_votes=num_votes,
        shift=log_l - exponent * math.log(top),
        span=(out_below, in_above),
        boundary=(lowest, highest),
    )


def sample_undecided(
    scores: Tensor,
    rng: Generator,
    *,
    k: int,
    exponent: float,
    num_votes: int,
    shift: float,
    span: tuple[float, float],
    boundary: tuple[int, int],
) -> Tensor:
    """Binomial votes in one group, drawn only for the undecided elements: `span[0]` <= score < `span[1]`.

    Elements above the span get a key above all votes, those below it get 0. In the very rare case that the boundary
    lies outside its prediction, votes are drawn for every element with a positive score instead.

    Args:
        scores: The scores that were prepared, float32 `[1, group_size]`.
        rng: Generator on the device of `scores`.
        k: Number of elements to keep.
        exponent: Exponent a > 0.
        num_votes: Number of votes V.
        shift: log(L p) of an element of score 1, so that q = 1 - exp(-exp(a log(score) + shift)).
        span: (lowest, highest) score of the undecided elements.
        boundary: (fewest, most) votes that the k-th element is predicted to have.

    Returns:
        Votes plus a tie-break in (0, 1), float32 of the same shape; `num_votes` + 2 above the span, 0 below it.
    """
    flat = scores[0]
    is_certain = flat >= span[1]
    is_possible = flat >= span[0] if span[0] > 0 else flat > 0
    undecided = (is_possible ^ is_certain).nonzero()[:, 0]
    q = -torch.expm1(-torch.exp(exponent * flat[undecided].log() + shift))
    votes = torch.binomial(torch.full_like(q, num_votes), q, generator=rng)
    num_missing = k - int(is_certain.count_nonzero())
    is_predicted = (
        int((votes > boundary[1]).count_nonzero()) < num_missing <= int((votes >= boundary[0]).count_nonzero())
    )
    everything = (0.0, math.inf)
    if not is_predicted and span != everything:
        return sample_undecided(
            scores, rng, k=k, exponent=exponent, num_votes=num_votes, shift=shift, span=everything, boundary=boundary
        )
    keys = torch.where(is_certain, num_votes + 2.0, 0.0)
    keys[undecided] = votes + torch.rand(len(undecided), generator=rng, device=flat.device) + TINY
    return keys.view(scores.shape)


def histogram(scores: Tensor) -> tuple[float, np.ndarray, np.ndarray]:
    """Histogram of log-scores. Counts are integers, so the number of threads never changes the result.

    Args:
        scores: Scores >= 0, not all 0, float32 of any shape.

    Returns:
        The largest score; log(score / largest) at the centers of the bins, float64 `[BINS]`; number of positive scores
        by bin, float64 `[BINS]`.
    """
    flat = scores.reshape(-1)
    top = float(flat.max())
    bottom = min(float(torch.where(chunk > 0, chunk, top).min()) for chunk in chunks(flat))
    floor = min(math.log(bottom / top), -1e-6)
    sizes = np.zeros(BINS)
    for chunk in chunks(flat):
        logs = (chunk / top).log_().clamp_(floor, 0.0)  # a score of 0 falls into the lowest bin
        sizes += torch.histc(logs, BINS, floor, 0.0).double().cpu().numpy()
    sizes[0] -= len(flat) - int(flat.count_nonzero())
    width = -floor / BINS
    return top, floor + width * (np.arange(BINS) + 0.5), sizes


def chunks(flat: Tensor) -> tuple[Tensor, ...]:
    """Split into views of at most CHUNK elements."""
    return torch.split(flat, CHUNK)


def vote_boundary(q: np.ndarray, sizes: np.ndarray, k: int, num_votes: int) -> int:
    """Predict how many votes the k-th element has, by the normal approximation of the binomial.

    Args:
        q: Probability that one vote draws an element, by bin, float64 `[BINS]`.
        sizes: Number of elements by bin, float64 `[BINS]`.
        k: Number of elements to keep.
        num_votes: Number of votes V.

    Returns:
        The largest t in [0, V] such that k or more elements are expected to have t votes or more.
    """
    deviation = np.sqrt(num_votes * q * (1 - q)) + 1e-9
    low, high = 0, num_votes
    while low < high:
        middle = (low + high + 1) // 2
        if float(sizes @ ndtr((num_votes * q - middle + 0.5) / deviation)) >= k:
            low = middle
        else:
            high = middle - 1
    return low


SAMPLERS: dict[str, Sampler] = {"voting": voting, "random": random}
"""By a spec's `candidates.sampler`."""
