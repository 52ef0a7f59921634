"""Which shapes may a mask have, and what competes with what?"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

STRIDE = 64  # one value in so many tells well enough where to look


@dataclass(frozen=True)
class Pattern:
    """A contestant is a `block` of (rows, columns) that is kept or pruned as one; `group` neighbours in a row compete.

    Without `group` there is one contest for all: such a pattern goes with every allocation.
    """

    block: tuple[int, int] = (1, 1)
    group: int | None = None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a matrix (n_out, n_in) divides into whole blocks and groups."""
        rows, columns = (1, *shape)[-2:] if shape else (1, 1)
        return rows % self.block[0] == 0 and columns % (self.block[1] * (self.group or 1)) == 0

    def fold(self, scores: Tensor) -> Tensor:
        """(n_out, n_in) -> (contests, contestants): a block's score is its sum. Without blocks, a view."""
        rows, columns = self.block
        if self.block != (1, 1):
            height, width = scores.shape
            scores = scores.reshape(height // rows, rows, width // columns, columns).sum((1, 3))
        return scores.reshape(-1, self.group) if self.group else scores.reshape(1, -1)

    def unfold(self, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Bool (contests, contestants) -> the mask of a matrix of this shape."""
        rows, columns = self.block
        if self.block == (1, 1):
            return kept.reshape(shape)
        blocks = kept.reshape(shape[0] // rows, 1, shape[1] // columns, 1)
        return blocks.expand(-1, rows, -1, columns).reshape(shape).contiguous()

    def keeps(self, entries: int, density: float) -> int:
        """How many of so many entries are kept at most."""
        size = math.prod(self.block)
        contestants = self.group or entries // size
        contests = entries // size // max(contestants, 1)
        return contests * budget(contestants, density) * size


def budget(entries: int, density: float) -> int:
    """How many of `entries` a density keeps: the floor, forgiving float error (30 at 1 - 0.9 keeps 3)."""
    return math.floor(entries * density + 1e-12 * entries)


def winners(scores: Tensor, places: int) -> Tensor:
    """Bool of the shape of `scores` >= 0, (contests, contestants): the `places` largest of each contest.

    Score 0 never wins, so fewer do where fewer are positive. Equal scores at the boundary win from the front.
    """
    if len(scores) == 1:
        return winners_of_one(scores[0], places)[None]
    if places == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    last = nth_largest(scores, places)
    above, tied = scores > last, (scores == last) & (scores > 0)
    return above | (tied & (tied.cumsum(1) <= places - above.sum(1, keepdim=True)))


def winners_of_one(scores: Tensor, places: int) -> Tensor:
    """The same for one contest, 1-D: without sums over all of it, which may be a whole model."""
    count = min(places, int(scores.count_nonzero()))
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = nth_largest(scores[None], count)[0]
    mask = scores >= threshold
    extra = int(mask.count_nonzero()) - count
    if extra:
        ties = (scores == threshold).nonzero()[:, 0]
        mask[ties[len(ties) - extra :]] = False
    return mask


def nth_largest(values: Tensor, n: int) -> Tensor:
    """The n-th largest of each contest, exactly: float (contests, contestants) -> (contests, 1); 1 <= n <= contestants.

    Of one contest a sample of every STRIDE-th value says above what it lies, so that only the largest values are looked
    through (after Floyd and Rivest 1975); where the sample misleads, all are.
    """
    if len(values) > 1:
        return values.topk(n, dim=1).values[:, -1:]
    line = values[0]
    sample = line[::STRIDE]
    share = n / len(line)
    likely = round(len(sample) * share + 1 + 6 * math.sqrt(len(sample) * share * (1 - share)))
    if likely < len(sample):
        largest = line[line >= partitioned(sample, likely)]
        if len(largest) >= n:
            return partitioned(largest, n).view(1, 1)
    return partitioned(line, n).view(1, 1)


def partitioned(values: Tensor, n: int) -> Tensor:
    """The n-th largest; numpy's partition is several times faster than topk on a CPU."""
    if values.device.type != "cpu":
        return values.topk(n).values[-1]
    array = values.numpy()
    return torch.tensor(np.partition(array, array.size - n)[array.size - n])


def unstructured() -> Pattern:
    """Every weight by itself."""
    return Pattern()


def n_of(size: str) -> Pattern:
    """n of each `size` neighbours along the input dimension, n as the density says: 2:4 at 0.5."""
    return Pattern(group=int(size))


def blocks(rows: str, columns: str) -> Pattern:
    """Whole blocks."""
    return Pattern(block=(int(rows), int(columns)))


PATTERNS: dict[str, Callable[..., Pattern]] = {
    r"unstructured": unstructured,
    r"n:([2-9]|[1-9]\d+)": n_of,
    r"([1-9]\d*)x([1-9]\d*)": blocks,
}
"""How a spec writes a pattern, as a regular expression -> what its groups give."""


def named(name: str) -> Pattern:
    """The pattern that a spec writes so. Raises ValueError when there is none."""
    for form, make in PATTERNS.items():
        if found := re.fullmatch(form, name):
            return make(*found.groups())
    if found := re.fullmatch(r"(\d+):([1-9]\d*)", name):
        kept, size = map(int, found.groups())
        raise ValueError(
            f"{name} is written n:{size}, and the levels say how many of {size} are kept: levels: [{1 - kept / size:g}]"
        )
    raise ValueError(f"no pattern is called {name!r}; known are unstructured, n:M such as n:4, and RxC such as 4x4")
