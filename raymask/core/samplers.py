"""Where does randomness enter a mask?

The method votes: V times it draws k of N entries without replacement, with probabilities p_i = s_i^a / sum s^a,
and keeps the k entries with most votes. Such a draw is an exponential race: entry i arrives at time E_i / p_i,
E_i ~ Exp(1), and the first k are drawn. `race` runs it as it stands. For large N the k-th arrival hardly varies, so
with a threshold L that solves sum_i (1 - exp(-L p_i)) = k the votes of entry i are Binomial(V, q_i),
q_i = 1 - exp(-L p_i), and only entries whose outcome is open need a draw at all: `predict` and `tally_open`. In many
contests of few, the q_i are those of `inclusion`, and a contest's votes are kept to their sum: `tally_contests`.
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

from raymask.core.inclusion import NEVER, inclusion
from raymask.core.patterns import nth_largest

Draw = Callable[[Tensor, Generator], Tensor]
"""(scores, generator on their device) -> float32 scores' >= 0, larger = keep, for the contests' winners to be told by.

Both (contests, contestants).
"""

Sampler = Callable[[Tensor, int, float, int], Draw]
"""(float32 scores >= 0 (contests, contestants), places in each contest, exponent a, number of votes V) -> Draw.

What depends only on the parent is computed here, once, and kept as a few numbers; the Draw takes the same scores
again. Score 0 gives score' 0, which never wins.
"""

EXACT = 2**20  # entries times votes up to which the race itself is run
FEW = 4  # votes up to which many contests are raced: fewer are too coarse for errors that sum to nothing
BINS = 2048  # of the log-score histogram: 0.03 in log p over 6 decades of weights at a = 5
CHUNK = 2**22  # entries at a time: float32 counts are exact below 2^24, and copies stay small
OPEN = 1e-7  # an entry whose outcome is as sure as this needs no draw
TINY = torch.finfo(torch.float32).tiny  # above zero, which no mask keeps
MARGIN = 2  # votes by which the boundary may miss its prediction, beside what half a bin is worth


def rounds(entries: int, kept: int, ratio: float) -> int:
    """V = max(1, floor((N - k) r)): the number of votes, the method's noise knob."""
    return max(1, math.floor((entries - kept) * ratio))


def votes(scores: Tensor, kept: int, exponent: float, count: int) -> Draw:
    """The method's voting masks, ties broken at random from the generator."""
    # not by rows where there is but one: that takes five times as long
    live = scores.count_nonzero() if len(scores) == 1 else scores.count_nonzero(1).max()
    if kept == 0 or int(live) <= kept:
        return lambda scores, rng: scores
    if count == 1 or scores.numel() * count <= EXACT or (len(scores) > 1 and count <= FEW):
        return partial(race, kept=kept, exponent=exponent, count=count)
    if len(scores) > 1:
        return partial(tally_contests, kept=kept, exponent=exponent, count=count)
    return predict(scores, kept, exponent, count)


def uniform(scores: Tensor, kept: int, exponent: float, count: int) -> Draw:
    """Chance alone: whatever has a score may be kept, and how large the score is makes no difference. What the method
    is to be better than."""
    return lambda scores, rng: torch.where(
        scores > 0, torch.rand(scores.shape, generator=rng, device=scores.device) + TINY, 0.0
    )


def race(scores: Tensor, rng: Generator, *, kept: int, exponent: float, count: int) -> Tensor:
    """`count` exact draws of `kept` entries of each contest without replacement, summed, plus a tie-break in (0, 1)."""
    live = scores[0].nonzero()[:, 0] if len(scores) == 1 else torch.arange(scores.shape[1], device=scores.device)
    entered = scores[:, live]
    log_p = exponent * entered.log()
    tally = torch.rand(log_p.shape, generator=rng, device=scores.device)
    for _ in range(count):
        lateness = torch.empty_like(log_p).exponential_(generator=rng).log_()
        earliness = torch.sub(log_p, lateness, out=lateness)
        tally += earliness >= nth_largest(earliness, kept)
    keys = torch.zeros_like(scores)
    keys[:, live] = torch.where(entered > 0, tally + TINY, 0.0)
    return keys


def tally_contests(scores: Tensor, rng: Generator, *, kept: int, exponent: float, count: int) -> Tensor:
    """Votes in many contests of few: binomials, bent so that those of a contest sum to what was given out.

    An entry's vote is another's loss: errors e_i of variance d_i become (e_i - c_i sum e) / sqrt(1 - c_i) with shares
    c_i = d_i / sum d. They sum to about nothing, have the correlations of sampling without replacement to first order
    (Hajek 1964), and their own variances still. Measured against `race`, Gaussian scores, a = 5: the same distance from
    the control to 4 %, and 8 to 14 % more of it where `inclusion` is not exact.
    """
    q = inclusion(torch.where(scores > 0, exponent * scores.log(), NEVER), kept)
    error = torch.binomial(torch.full_like(q, count), q, generator=rng) - count * q
    spread = q * (1 - q)
    share = spread / spread.sum(1, keepdim=True).clamp_min(TINY)
    error = (error - share * error.sum(1, keepdim=True)) / (1 - share).clamp_min(0.25).sqrt()
    tally = count * q + error + torch.rand(q.shape, generator=rng, device=q.device)
    return torch.where(scores > 0, (tally + 2 * count).clamp_min(TINY), 0.0)  # above zero, whatever the errors


def predict(scores: Tensor, kept: int, exponent: float, count: int) -> Draw:
    """Find L, the boundary in votes, and the span of scores whose outcome is open; the rest is certain."""
    top, centers, sizes = histogram(scores)
    log_p = exponent * centers

    def excess(log_l: float) -> float:
        return float(sizes @ -np.expm1(-np.exp(np.minimum(log_p + log_l, 700.0)))) - kept

    # 1 - exp(-x) <= x bounds the root from below; doubling finds the other side.
    low = math.log(kept) - math.log(float(sizes @ np.exp(log_p)))
    high, step = low + 1.0, 1.0
    while excess(high) < 0:
        step *= 2
        high += step
    log_l = float(brentq(excess, low - 1e-6, high, xtol=1e-10))

    q = -np.expm1(-np.exp(np.minimum(log_p + log_l, 700.0)))
    boundary = vote_boundary(q, sizes, kept, count)
    # dq / dlog p = (1 - q) log(1 / (1 - q)) <= 1 / e: the entries of a bin lie within so many votes of its center.
    margin = MARGIN + math.ceil(count * exponent * float(centers[1] - centers[0]) / 2 / math.e)
    lowest, highest = max(boundary - margin, 0), min(boundary + margin, count)

    def score_at(probability: float) -> float:
        """The score whose entry is drawn with `probability` in one vote."""
        if probability <= 0.0:
            return 0.0
        if probability >= 1.0:
            return math.inf
        return top * math.exp(min((math.log(-math.log1p(-probability)) - log_l) / exponent, 700.0))

    # P(votes >= lowest) = I_q(lowest, V - lowest + 1) and P(votes <= highest) = I_{1-q}(V - highest, highest + 1).
    out_below = score_at(betaincinv(lowest, count - lowest + 1, OPEN) if lowest > 0 else 0.0)
    in_above = score_at(1 - betaincinv(count - highest, highest + 1, OPEN) if highest < count else 1.0)
    return partial(
        tally_open,
        kept=kept,
        exponent=exponent,
        count=count,
        shift=log_l - exponent * math.log(top),
        span=(out_below, in_above),
        boundary=(lowest, highest),
    )


def tally_open(
    scores: Tensor,
    rng: Generator,
    *,
    kept: int,
    exponent: float,
    count: int,
    shift: float,
    span: tuple[float, float],
    boundary: tuple[int, int],
) -> Tensor:
    """Binomial votes for entries with `span[0]` <= score < `span[1]`; above it all votes, below it none.

    Where the boundary fell outside its prediction (about never), every live entry is drawn instead.
    """
    flat = scores[0]
    certain = flat >= span[1]
    possible = flat >= span[0] if span[0] > 0 else flat > 0
    opened = (possible ^ certain).nonzero()[:, 0]
    q = -torch.expm1(-torch.exp(exponent * flat[opened].log() + shift))
    drawn = torch.binomial(torch.full_like(q, count), q, generator=rng)
    missing = kept - int(certain.count_nonzero())
    inside = int((drawn > boundary[1]).count_nonzero()) < missing <= int((drawn >= boundary[0]).count_nonzero())
    if not inside and span != (0.0, math.inf):
        whole = (0.0, math.inf)
        return tally_open(
            scores, rng, kept=kept, exponent=exponent, count=count, shift=shift, span=whole, boundary=boundary
        )
    tally = drawn + torch.rand(len(opened), generator=rng, device=flat.device)
    keys = torch.where(certain, count + 2.0, 0.0)
    keys[opened] = tally + TINY
    return keys.view(scores.shape)


def histogram(scores: Tensor) -> tuple[float, np.ndarray, np.ndarray]:
    """The largest score, then by bin log(score / largest) and how many live entries, both float64 (BINS,).

    Counts are integers, so the thread count never changes what follows from them.
    """
    flat = scores.reshape(-1)
    top = float(flat.max())
    bottom = min(float(torch.where(part > 0, part, top).min()) for part in chunks(flat))
    floor = min(math.log(bottom / top), -1e-6)
    sizes = np.zeros(BINS)
    for part in chunks(flat):
        logs = (part / top).log_().clamp_(floor, 0.0)  # a score of 0 falls into the lowest bin
        sizes += torch.histc(logs, BINS, floor, 0.0).double().cpu().numpy()
    sizes[0] -= len(flat) - int(flat.count_nonzero())
    width = -floor / BINS
    return top, floor + width * (np.arange(BINS) + 0.5), sizes


def chunks(flat: Tensor) -> tuple[Tensor, ...]:
    """Views of at most CHUNK entries."""
    return torch.split(flat, CHUNK)


def vote_boundary(q: np.ndarray, sizes: np.ndarray, kept: int, count: int) -> int:
    """How many votes the k-th entry will have: the largest t with an expected `kept` entries of t votes or more."""
    spread = np.sqrt(count * q * (1 - q)) + 1e-9
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        if float(sizes @ ndtr((count * q - middle + 0.5) / spread)) >= kept:
            low = middle
        else:
            high = middle - 1
    return low


SAMPLERS: dict[str, Sampler] = {"votes": votes, "uniform": uniform}
"""By a spec's candidates.sampler."""
