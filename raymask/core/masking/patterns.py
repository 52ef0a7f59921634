"""Patterns: which shapes a mask may have, and which weights compete with each other."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

STRIDE = 64  # one value in STRIDE is sampled to bound the k-th largest


@dataclass(frozen=True)
class Pattern:
    """How the weights of a matrix form elements and groups.

    An element is a block of weights that is kept or pruned as one. Elements compete within their group.

    Attributes:
        block: (rows, columns) of an element.
        group: Number of neighbouring elements in a row that form a group. None for one group of all elements; only
            such a pattern works with every allocation.
    """

    block: tuple[int, int] = (1, 1)
    group: int | None = None

    def divides(self, shape: tuple[int, ...]) -> bool:
        """Whether a matrix `[n_out, n_in]` divides into whole blocks and groups."""
        rows, columns = (1, *shape)[-2:] if shape else (1, 1)
        return rows % self.block[0] == 0 and columns % (self.block[1] * (self.group or 1)) == 0

    def to_groups(self, scores: Tensor) -> Tensor:
        """Arrange scores `[n_out, n_in]` as `[n_groups, group_size]`.

        A block's score is the sum of its weights' scores. Without blocks the result is a view.
        """
        rows, columns = self.block
        if self.block != (1, 1):
            height, width = scores.shape
            scores = scores.reshape(height // rows, rows, width // columns, columns).sum((1, 3))
        return scores.reshape(-1, self.group) if self.group else scores.reshape(1, -1)

    def from_groups(self, kept: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Arrange bool `[n_groups, group_size]` as the mask of a matrix of this `shape`; inverse of `to_groups`."""
        rows, columns = self.block
        if self.block == (1, 1):
            return kept.reshape(shape)
        blocks = kept.reshape(shape[0] // rows, 1, shape[1] // columns, 1)
        return blocks.expand(-1, rows, -1, columns).reshape(shape).contiguous()

    def num_kept(self, entries: int, density: float) -> int:
        """How many of `entries` weights are kept at most, at a density in (0, 1]."""
        block_size = math.prod(self.block)
        group_size = self.group or entries // block_size
        n_groups = entries // block_size // max(group_size, 1)
        return n_groups * num_kept(group_size, density) * block_size


def num_kept(entries: int, density: float) -> int:
    """How many of `entries` a density in (0, 1] keeps: the floor, tolerant of float error (30 at 1 - 0.9 keeps 3)."""
    return math.floor(entries * density + 1e-12 * entries)


def topk_mask(scores: Tensor, k: int) -> Tensor:
    """Mask of the k largest elements of each group.

    Args:
        scores: Scores >= 0, `[n_groups, group_size]`. A score of 0 is never kept.
        k: Number of elements to keep in each group.

    Returns:
        Bool mask of the same shape. A group with fewer than k positive scores keeps all of these. Of equal scores at
        the boundary the first ones are kept.
    """
    if len(scores) == 1:
        return topk_mask_1d(scores[0], k)[None]
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = kth_largest(scores, k)
    above, tied = scores > threshold, (scores == threshold) & (scores > 0)
    return above | (tied & (tied.cumsum(1) <= k - above.sum(1, keepdim=True)))


def topk_mask_1d(scores: Tensor, k: int) -> Tensor:
    """`topk_mask` of one group `[group_size]`, without cumulative sums: the group may be a whole model."""
    count = min(k, int(scores.count_nonzero()))
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = kth_largest(scores[None], count)[0]
    mask = scores >= threshold
    extra = int(mask.count_nonzero()) - count
    if extra:
        ties = (scores == threshold).nonzero()[:, 0]
        mask[ties[len(ties) - extra :]] = False
    return mask


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The exact k-th largest value of each group.

    For one group, a sample of every STRIDE-th value gives a lower bound, so that only the largest values are searched
    (after Floyd and Rivest 1975). Where the sample misleads, all values are searched.

    Args:
        values: Float `[n_groups, group_size]`.
        k: Rank, 1 <= k <= group_size.

    Returns:
        The values, `[n_groups, 1]`.
    """
    if len(values) > 1:
        return values.topk(k, dim=1).values[:, -1:]
    group = values[0]
    sample = group[::STRIDE]
    share = k / len(group)
    sample_rank = round(len(sample) * share + 1 + 6 * math.sqrt(len(sample) * share * (1 - share)))
    if sample_rank < len(sample):
        largest = group[group >= kth_largest_1d(sample, sample_rank)]
        if len(largest) >= k:
            return kth_largest_1d(largest, k).view(1, 1)
    return kth_largest_1d(group, k).view(1, 1)


def kth_largest_1d(values: Tensor, k: int) -> Tensor:
    """The k-th largest of float `[n]`, a scalar. On a CPU numpy's partition is several times faster than topk."""
    if values.device.type != "cpu":
        return values.topk(k).values[-1]
    array = values.numpy()
    return torch.tensor(np.partition(array, array.size - k)[array.size - k])


def unstructured() -> Pattern:
    """Every weight is an element, and all compete."""
    return Pattern()


def n_m_pattern(size: str) -> Pattern:
    """Keep n of each `size` neighbours along the input dimension; the density gives n: 2:4 at 0.5."""
    return Pattern(group=int(size))


def block_pattern(rows: str, columns: str) -> Pattern:
    """Blocks of `rows` x `columns` weights, kept or pruned as one."""
    return Pattern(block=(int(rows), int(columns)))


PATTERNS: dict[str, Callable[..., Pattern]] = {
    r"unstructured": unstructured,
    r"n:([2-9]|[1-9]\d+)": n_m_pattern,
    r"([1-9]\d*)x([1-9]\d*)": block_pattern,
}
"""Regular expression of a spec's `mask.pattern` -> function that makes the pattern from its groups."""


def parse_pattern(name: str) -> Pattern:
    """Parse a pattern as a spec writes it.

    Args:
        name: `unstructured`, `n:M` or `RxC`.

    Returns:
        The pattern.

    Raises:
        ValueError: There is no such pattern.
    """
    for form, make in PATTERNS.items():
        if match := re.fullmatch(form, name):
            return make(*match.groups())
    if match := re.fullmatch(r"(\d+):([1-9]\d*)", name):
        kept, size = map(int, match.groups())
        raise ValueError(
            f"{name} is written n:{size}, and the levels say how many of {size} are kept: levels: [{1 - kept / size:g}]"
        )
    raise ValueError(f"no pattern is called {name!r}; known are unstructured, n:M such as n:4, and RxC such as 4x4")
