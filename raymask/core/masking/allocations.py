"""Allocations: which matrices share a budget of kept weights, and how large it is."""

from collections.abc import Callable, Mapping
from math import prod

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of prunable matrices by parameter name, `[n_out, n_in]`."""


AllocationFn = Callable[[Shapes, float], dict[tuple[str, ...], float]]
"""(shapes, density in (0, 1] of all matrices together) -> density in (0, 1] by the names that share one budget.

Every matrix is named once. A lower density never gives a larger budget, so that levels nest.
"""


def uniform(shapes: Shapes, density: float) -> dict[tuple[str, ...], float]:
    """The same density for every matrix by itself, as in the paper."""
    return {(name,): density for name in shapes}


def erk(shapes: Shapes, density: float) -> dict[tuple[str, ...], float]:
    """Erdos-Renyi-Kernel (Evci et al. 2020): d_i = min(1, c (n_in + n_out) / (n_in n_out)).

    The constant c is chosen so that all matrices together have the given density. It falls with that density, and so
    does every d_i.
    """
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    lines = {name: sum(shape) for name, shape in shapes.items()}  # n_in + n_out
    dense: set[str] = set()  # matrices whose density is cut off at 1
    while True:
        rest = [name for name in shapes if name not in dense]
        scale = (density * sum(sizes.values()) - sum(sizes[name] for name in dense)) / max(
            sum(lines[name] for name in rest), 1
        )
        newly_dense = {name for name in rest if scale * lines[name] >= sizes[name]}
        if not newly_dense:
            return {(name,): 1.0 if name in dense else scale * lines[name] / sizes[name] for name in shapes}
        dense |= newly_dense


def global_allocation(shapes: Shapes, density: float) -> dict[tuple[str, ...], float]:
    """One budget for all matrices: each keeps its weights among the largest scores of all, which may be none."""
    return {tuple(shapes): density} if shapes else {}


ALLOCATIONS: dict[str, AllocationFn] = {"uniform": uniform, "erk": erk, "global": global_allocation}
"""By a spec's `mask.allocation`."""
