"""How fast does the density fall from level to level?"""

from collections.abc import Callable

Schedule = Callable[[float, int], tuple[float, ...]]
"""(final sparsity in (0, 1), number of levels >= 1) -> sparsities, strictly increasing, the last one is the final."""


def cubic(sparsity: float, steps: int) -> tuple[float, ...]:
    """s_t = s (1 - (1 - t/n)^3) (Zhu and Gupta, 2017): fast while there is much to take, slow at the end."""
    return (*(sparsity * (1 - (1 - t / steps) ** 3) for t in range(1, steps)), sparsity)


def linear(sparsity: float, steps: int) -> tuple[float, ...]:
    """s_t = s t/n."""
    return (*(sparsity * t / steps for t in range(1, steps)), sparsity)


SCHEDULES: dict[str, Schedule] = {"cubic": cubic, "linear": linear}
