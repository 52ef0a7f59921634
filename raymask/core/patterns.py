"""Which shapes may a mask have?"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

STRIDE = 64  # one value in so many tells well enough where to look

Pattern = Callable[[Tensor, float], Tensor]
"""(scores >= 0 of any shape, density in [0, 1]) -> bool mask of that shape; score 0 is never kept."""


def budget(entries: int, density: float) -> int:
    """How many of `entries` a density keeps: the floor, forgiving float error (30 at 1 - 0.9 keeps 3)."""
    return math.floor(entries * density + 1e-12 * entries)


def unstructured(scores: Tensor, density: float) -> Tensor:
    """Keep exactly the `budget` largest scores, or all that are positive when they are fewer.

    Equal scores at the boundary are kept from the front, in memory order.
    """
    flat = scores.reshape(-1)
    count = min(budget(flat.numel(), density), int(flat.count_nonzero()))
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = nth_largest(flat, count)
    mask = flat >= threshold
    extra = int(mask.count_nonzero()) - count
    if extra:
        ties = (flat == threshold).nonzero()[:, 0]
        mask[ties[len(ties) - extra :]] = False
    return mask.view(scores.shape)


def nth_largest(values: Tensor, n: int) -> Tensor:
    """The n-th largest of 1-D float `values`, 1 <= n <= len, exactly.

    A sample of every STRIDE-th value says above what it lies, so that only the largest values are looked through
    (after Floyd and Rivest 1975); where the sample misleads, all are.
    """
    sample = values[::STRIDE]
    share = n / len(values)
    likely = round(len(sample) * share + 1 + 6 * math.sqrt(len(sample) * share * (1 - share)))
    if likely < len(sample):
        largest = values[values >= partitioned(sample, likely)]
        if len(largest) >= n:
            return partitioned(largest, n)
    return partitioned(values, n)


def partitioned(values: Tensor, n: int) -> Tensor:
    """The n-th largest; numpy's partition is several times faster than topk on a CPU."""
    if values.device.type != "cpu":
        return values.topk(n).values[-1]
    array = values.numpy()
    return torch.tensor(np.partition(array, array.size - n)[array.size - n])


PATTERNS: dict[str, Pattern] = {"unstructured": unstructured}
