"""Sparsity schedules: how the sparsity rises from level to level."""

from collections.abc import Callable

ScheduleFn = Callable[[float, int], tuple[float, ...]]
"""(final sparsity in (0, 1), number of levels >= 1) -> sparsities, strictly increasing, the last one is the final."""


def cubic(sparsity: float, steps: int) -> tuple[float, ...]:
    """s_t = s (1 - (1 - t/n)^3) (Zhu and Gupta, 2017): large steps first, small steps at the end."""
    return (*(sparsity * (1 - (1 - t / steps) ** 3) for t in range(1, steps)), sparsity)


def linear(sparsity: float, steps: int) -> tuple[float, ...]:
    """s_t = s t/n: equal steps."""
    return (*(sparsity * t / steps for t in range(1, steps)), sparsity)


SCHEDULES: dict[str, ScheduleFn] = {"cubic": cubic, "linear": linear}
"""By a spec's `levels.schedule`."""
