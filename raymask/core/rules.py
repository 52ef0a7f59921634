"""Who goes on to the next level?"""

import math
from collections.abc import Callable, Sequence

from raymask.core.errors import UserError
from raymask.core.records import Evaluation

Rule = Callable[[Sequence[Evaluation]], Evaluation]
"""Evaluations of one level, in any order -> the winner."""


def best(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The highest finite score; on a tie the lowest index, so that the order of arrival never matters.

    Raises UserError when every candidate failed.
    """
    alive = [e for e in evaluations if e.ok and e.score is not None and math.isfinite(e.score)]
    if not alive:
        first = min(evaluations, key=lambda evaluation: evaluation.candidate.index)
        reason = first.error or f"its score is {first.score}"
        raise UserError(
            f"level {first.candidate.level}: all {len(evaluations)} candidates failed; the first one said: {reason}. "
            "Mend the cause, such as too high a learning rate or too little memory, and start in a new run directory"
        )
    return max(alive, key=lambda evaluation: (evaluation.score, -evaluation.candidate.index))


RULES: dict[str, Rule] = {"best": best}
