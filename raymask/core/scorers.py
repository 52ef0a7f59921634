"""How much does each weight matter?"""

from collections.abc import Callable

from torch import Tensor

Scorer = Callable[[Tensor], Tensor]
"""A weight of any shape and float dtype -> float32 scores >= 0 of the same shape; 0 means never to be kept."""


def magnitude(weight: Tensor) -> Tensor:
    """|w|. Entries that the parent has pruned are zero, so levels nest."""
    return weight.detach().float().abs()


SCORERS: dict[str, Scorer] = {"magnitude": magnitude}
