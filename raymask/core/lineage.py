"""Names of the lineages: chains of levels, each level made from the one before."""

from __future__ import annotations

from raymask.core.spec import Spec

DENSE, SEARCH, IMP = "dense", "", "imp"
"""The lineages: the dense model alone, the search (its first branch), and the IMP baseline."""


def branch(number: int) -> str:
    """The lineage of one of the search's branches, counted from 1."""
    return SEARCH if number == 1 else f"branch-{number}"


def branches(spec: Spec) -> list[str]:
    """The lineages of all branches that a search may have: `select.keep` of them."""
    return [branch(number) for number in range(1, spec.select.keep + 1)]
