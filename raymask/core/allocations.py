"""Which matrices share a budget, and how large is it?"""

from collections.abc import Callable, Mapping
from math import prod

Shapes = Mapping[str, tuple[int, ...]]
"""Prunable matrices by parameter name: (n_out, n_in)."""

Allocation = Callable[[Shapes, float], dict[tuple[str, ...], float]]
"""(shapes, density in (0, 1] of them all) -> density in (0, 1] by the names of matrices that compete for one budget.

Every matrix is named once. A lower density gives every budget as much or less, so that levels nest.
"""


def uniform(shapes: Shapes, density: float) -> dict[tuple[str, ...], float]:
    """The method's: the same density for every matrix by itself."""
    return {(name,): density for name in shapes}


def erk(shapes: Shapes, density: float) -> dict[tuple[str, ...], float]:
    """Erdos-Renyi-Kernel (Evci et al. 2020): d_i = min(1, c (n_in + n_out) / (n_in n_out)).

    The one c keeps the asked density of all weights together. It falls with that density, and so does every d_i.
    """
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    lines = {name: sum(shape) for name, shape in shapes.items()}  # n_in + n_out: at d_i = 1 a matrix keeps its size
    whole: set[str] = set()
    while True:
        rest = [name for name in shapes if name not in whole]
        scale = (density * sum(sizes.values()) - sum(sizes[name] for name in whole)) / max(
            sum(lines[name] for name in rest), 1
        )
        full = {name for name in rest if scale * lines[name] >= sizes[name]}
        if not full:
            return {(name,): 1.0 if name in whole else scale * lines[name] / sizes[name] for name in shapes}
        whole |= full


def together(shapes: Shapes, density: float) -> dict[tuple[str, ...], float]:
    """One contest over all matrices: a matrix keeps as much as its scores win, which may be nothing."""
    return {tuple(shapes): density} if shapes else {}


ALLOCATIONS: dict[str, Allocation] = {"uniform": uniform, "erk": erk, "global": together}
