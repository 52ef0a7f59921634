"""Selections by scores alone, without candidates."""

from torch import Tensor

from raymask.core.masking.patterns import Pattern, num_kept, topk_mask


def largest(pattern: Pattern, scores: Tensor, density: float) -> Tensor:
    """The mask of the largest scores, of a matrix by itself."""
    contests = pattern.to_groups(scores)
    return pattern.from_groups(topk_mask(contests, num_kept(contests.shape[1], density)), tuple(scores.shape))


def unstructured(scores: Tensor, density: float) -> Tensor:
    """The same without a pattern."""
    return largest(Pattern(), scores, density)
