"""How do tests choose by scores alone, without a candidate?"""

from torch import Tensor

from raymask.core.patterns import Pattern, budget, winners


def largest(pattern: Pattern, scores: Tensor, density: float) -> Tensor:
    """The mask of the largest scores, of a matrix by itself."""
    contests = pattern.fold(scores)
    return pattern.unfold(winners(contests, budget(contests.shape[1], density)), tuple(scores.shape))


def unstructured(scores: Tensor, density: float) -> Tensor:
    """The same without a pattern."""
    return largest(Pattern(), scores, density)
