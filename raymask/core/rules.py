"""Who goes on to the next level?"""

import math
from collections.abc import Callable, Sequence

from raymask.core.errors import UserError
from raymask.core.records import Evaluation

Rule = Callable[[Sequence[Evaluation], int], Sequence[Evaluation]]
"""(evaluations of one level, in any order; how many to keep) -> the winners, at least one, the first one first."""


def ranked(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Those with a finite score, the highest first; on a tie the lowest index, so that the order never matters."""
    alive = [e for e in evaluations if e.ok and e.score is not None and math.isfinite(e.score)]
    return sorted(alive, key=lambda evaluation: (-(evaluation.score or 0.0), evaluation.candidate.index))


def best(evaluations: Sequence[Evaluation], keep: int = 1) -> list[Evaluation]:
    """The highest scores.

    Raises UserError when every candidate failed.
    """
    found = ranked(evaluations)
    if not found:
        culprit = min(evaluations, key=lambda evaluation: evaluation.candidate.index)
        reason = culprit.error or f"its score is {culprit.score}"
        raise UserError(
            f"level {culprit.candidate.level}: all {len(evaluations)} candidates failed; the first one said: {reason}. "
            "Mend the cause, such as too high a learning rate or too little memory, and start in a new run directory"
        )
    return found[:keep]


def first(evaluations: Sequence[Evaluation], keep: int = 1) -> list[Evaluation]:
    """The random masks that were drawn first, whatever their scores: what the method's choice is to be better than.

    The control only where they are too few. Raises UserError when every candidate failed.
    """
    alive = best(evaluations, len(evaluations))
    return sorted(alive, key=lambda evaluation: (evaluation.candidate.is_control, evaluation.candidate.index))[:keep]


RULES: dict[str, Rule] = {"best": best, "first": first}
"""By a spec's select.rule."""
