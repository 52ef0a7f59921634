"""Selection rules: which of a level's masks are fine-tuned."""

import math
from collections.abc import Callable, Sequence

from raymask.core.errors import UserError
from raymask.core.records import Evaluation

SelectFn = Callable[[Sequence[Evaluation], int], Sequence[Evaluation]]
"""(evaluations of one level, in any order; how many to keep >= 1) -> the winners, at least one, the best first."""


def ranked(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Evaluations with a finite score, the highest first. Ties go to the lower index, in any order of the input."""
    scored = [e for e in evaluations if e.ok and e.score is not None and math.isfinite(e.score)]
    return sorted(scored, key=lambda evaluation: (-(evaluation.score or 0.0), evaluation.candidate.index))


def best(evaluations: Sequence[Evaluation], keep: int = 1) -> list[Evaluation]:
    """Select the highest scores.

    Args:
        evaluations: Evaluations of one level, in any order.
        keep: How many to select at most.

    Returns:
        The selected evaluations, the highest score first.

    Raises:
        UserError: Every candidate failed, or no score is finite.
    """
    winners = ranked(evaluations)
    if not winners:
        failed = min(evaluations, key=lambda evaluation: evaluation.candidate.index)
        reason = failed.error or f"its score is {failed.score}"
        raise UserError(
            f"level {failed.candidate.level}: all {len(evaluations)} candidates failed; the first one said: {reason}. "
            "Mend the cause, such as too high a learning rate or too little memory, and start in a new run directory"
        )
    return winners[:keep]


def first(evaluations: Sequence[Evaluation], keep: int = 1) -> list[Evaluation]:
    """Select the random masks that were drawn first, whatever their scores: a baseline for selection by score.

    The magnitude mask comes in only where the random masks are too few. Failed candidates are skipped.

    Args:
        evaluations: Evaluations of one level, in any order.
        keep: How many to select at most.

    Returns:
        The selected evaluations, the lowest index first.

    Raises:
        UserError: Every candidate failed, or no score is finite.
    """
    scored = best(evaluations, len(evaluations))
    return sorted(scored, key=lambda evaluation: (evaluation.candidate.is_magnitude, evaluation.candidate.index))[:keep]


SELECTIONS: dict[str, SelectFn] = {"best": best, "first": first}
"""By a spec's `select.rule`."""
