"""Contract tests of the functions that make a mask."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product
from math import isclose, prod

import torch
from torch import Tensor

from raymask.core.masking.allocations import AllocationFn, Shapes
from raymask.core.masking.patterns import Pattern, num_kept, topk_mask
from raymask.core.masking.samplers import Sampler
from raymask.core.masking.scorers import Calibration, ScoreFn
from raymask.testing.require import require

EXPONENTS, VOTES = (0.5, 5.0, 40.0), (1, 20, 10**6)

DENSITIES = (1.0, 0.5, 0.25, 0.1, 0.02)

SHAPES_OF_MODELS: tuple[Shapes, ...] = (
    {"query": (8, 8)},
    {"query": (64, 64), "up": (256, 64), "down": (64, 256)},
    {"small": (2, 3), "wide": (4, 4096), "tall": (5000, 7), "square": (96, 96)},
)


def check_sampler(sampler: Sampler) -> None:
    """Check a sampler.

    Args:
        sampler: The sampler.

    Raises:
        AssertionError: A rule is broken.
    """
    num_different = 0
    for scores, exponent, num_votes in product(sampler_scores(), EXPONENTS, VOTES):
        for k in {0, 1, scores.shape[1] // 2, scores.shape[1]}:
            num_different += check_sample(sampler, scores, k, exponent, num_votes)
    require(
        num_different > 0,
        "Another generator must give other scores, or all candidates are one mask",
        "sample(scores, torch.Generator().manual_seed(0)) beside the same with seed 1",
    )


def sampler_scores() -> Iterator[Tensor]:
    """Scores in few and many groups: without and with zeros, tied, one group without any score."""
    rng = torch.Generator().manual_seed(0)
    for shape in ((1, 12), (5, 6)):
        scores = torch.randint(1, 40, shape, generator=rng) / 8
        yield scores
        yield torch.where(torch.rand(shape, generator=rng) < 0.5, 0.0, scores)
        yield torch.ones(shape)
    yield scores * torch.tensor([[0.0], [1.0], [1.0], [1.0], [1.0]])


def check_sample(sampler: Sampler, scores: Tensor, k: int, exponent: float, num_votes: int) -> bool:
    """Check a sampler on these arguments.

    Args:
        sampler: The sampler.
        scores: Scores >= 0, float32 `[n_groups, group_size]`.
        k: Number of elements to keep in each group.
        exponent: Exponent a > 0.
        num_votes: Number of votes V >= 1.

    Returns:
        Whether another generator gives other scores.

    Raises:
        AssertionError: A rule is broken.
    """

    def draw(seed: int) -> Tensor:
        return sample(scores, torch.Generator().manual_seed(seed))

    shown = (
        f"sampler(scores, {k}, {exponent}, {num_votes})(scores, torch.Generator().manual_seed(0)) with scores = "
        f"torch.tensor({scores.tolist()})"
    )
    before = scores.clone()
    sample = sampler(scores, k, exponent, num_votes)
    sampled = draw(0)
    require(torch.equal(scores, before), "A sampler must leave the scores as they are", shown)
    require(
        sampled.shape == scores.shape and sampled.dtype == torch.float32,
        f"The perturbed scores must be float32 of shape {list(scores.shape)}, not {sampled.dtype} of "
        f"{list(sampled.shape)}",
        shown,
    )
    require(bool((sampled >= 0).all()), "Perturbed scores must be 0 or more, and none of them NaN", shown)
    require(not bool(sampled[scores == 0].any()), "A score of 0 must stay 0, or what is pruned comes back", shown)
    enough = (sampled > 0).sum(1) >= (scores > 0).sum(1).clamp(max=k)
    require(bool(enough.all()), "At least k of the scores above 0 must stay above 0, or a mask keeps too few", shown)
    require(torch.equal(draw(0), sampled), "All randomness must come from the generator, and no state be kept", shown)
    return not torch.equal(draw(1), sampled)


def check_score(score: ScoreFn) -> None:
    """Check a score.

    Args:
        score: The function that scores a weight.

    Raises:
        AssertionError: A rule is broken.
    """
    rng = torch.Generator().manual_seed(0)
    for dtype, scale, dead in product((torch.float32, torch.bfloat16), (1.0, 1e-30), (False, True)):
        weight = (torch.randint(-3, 4, (4, 6), generator=rng) / 4).to(dtype)
        inputs, gradient = torch.rand(6, generator=rng), torch.randn(4, 6, generator=rng)
        if dead:
            inputs[::2], gradient[:, ::2] = 0.0, 0.0
        check_scored(score, weight, Calibration(scale * inputs, scale * gradient))


def check_scored(score: ScoreFn, weight: Tensor, calibration: Calibration) -> None:
    """Check a score on this weight; see `check_score`."""
    assert calibration.inputs is not None
    shown = (
        f"score(torch.tensor({weight.tolist()}, dtype={weight.dtype}), Calibration(torch.tensor("
        f"{calibration.inputs.tolist()}), torch.tensor({calibration.gradient.tolist()})))"
    )
    before = weight.clone()
    scores = score(weight, calibration)
    require(torch.equal(weight, before), "A score must leave the weight as it is", shown)
    require(
        scores.shape == weight.shape and scores.dtype == torch.float32,
        f"Scores must be float32 of shape {list(weight.shape)}, not {scores.dtype} of {list(scores.shape)}",
        shown,
    )
    require(bool(torch.isfinite(scores).all()), "Scores must be finite where weights and calibration are", shown)
    require(not bool(scores[weight == 0].any()), "A weight of 0 must score 0, or what is pruned comes back", shown)
    require(
        bool((scores[weight != 0] > 0).all()),
        "A weight other than 0 must score above 0, or a mask keeps too few (see clamp_nonzero_scores)",
        shown,
    )
    require(torch.equal(score(weight, calibration), scores), "The same weight must score the same again", shown)


def check_allocation(allocation: AllocationFn) -> None:
    """Check an allocation.

    Args:
        allocation: The allocation.

    Raises:
        AssertionError: A rule is broken.
    """
    for shapes in SHAPES_OF_MODELS:
        for density in DENSITIES:
            check_budgets(allocation, shapes, density)
        for more, less in pairwise(DENSITIES):
            check_nested(allocation, shapes, less, more)


def check_budgets(allocation: AllocationFn, shapes: Shapes, density: float) -> None:
    """Check that every matrix has one budget, and that together they keep what was asked; see `check_allocation`."""
    shown = f"allocation({dict(shapes)}, {density})"
    shares = allocation(shapes, density)
    named = sorted(name for names in shares for name in names)
    require(named == sorted(shapes), f"Every matrix must be named once, not {', '.join(named)}", shown)
    require(all(0 < share <= 1 for share in shares.values()), "Every density must lie in (0, 1]", shown)
    kept = sum(share * sum(prod(shapes[name]) for name in names) for names, share in shares.items())
    asked = density * sum(map(prod, shapes.values()))
    require(isclose(kept, asked, rel_tol=1e-9), f"Together they must keep {asked:g} weights, not {kept:g}", shown)


def check_nested(allocation: AllocationFn, shapes: Shapes, less: float, more: float) -> None:
    """Check that no budget grows from a density `more` to a lower one, `less`; see `check_allocation`."""
    shown = f"allocation({dict(shapes)}, {less}) beside allocation({dict(shapes)}, {more})"
    below, above = allocation(shapes, less), allocation(shapes, more)
    require(below.keys() == above.keys(), "The same matrices must share a budget at every density", shown)
    require(
        all(share <= above[names] * (1 + 1e-9) for names, share in below.items()),
        "A lower density must give no matrix more, or levels do not nest",
        shown,
    )


def check_pattern(pattern: Pattern, shape: tuple[int, int] = (24, 48)) -> None:
    """Check a pattern on matrices of a shape.

    Args:
        pattern: The pattern.
        shape: Shape of the matrices, `[n_out, n_in]`, which the pattern divides.

    Raises:
        AssertionError: A rule is broken, or the pattern does not divide the shape.
    """
    require(pattern.divides(shape), "The shape must be one that the pattern divides", f"pattern.divides({shape})")
    check_elements(pattern, shape)
    rng = torch.Generator().manual_seed(0)
    parent = torch.ones(shape)
    for density in DENSITIES:
        scores = parent * torch.rand(shape, generator=rng)
        groups = pattern.to_groups(scores)
        mask = pattern.from_groups(topk_mask(groups, num_kept(groups.shape[1], density)), shape)
        expected = pattern.num_kept(prod(shape), density)
        shown = f"pattern.num_kept({prod(shape)}, {density}) beside the mask of the largest scores"
        require(int(mask.sum()) == expected, f"A mask must keep {expected} weights, not {int(mask.sum())}", shown)
        require(not bool(mask[parent == 0].any()), "A mask must keep no weight that its parent prunes", shown)
        parent = mask.float()


def check_elements(pattern: Pattern, shape: tuple[int, int]) -> None:
    """Check that `from_groups` is the inverse of `to_groups`; see `check_pattern`.

    Each weight lies in one element, whose score is the sum of its weights' scores.
    """
    scores = torch.arange(1.0, prod(shape) + 1).view(shape)
    groups = pattern.to_groups(scores.clone())
    covered = torch.zeros(shape, dtype=torch.int64)
    for index in range(groups.numel()):
        one = torch.zeros(groups.numel(), dtype=torch.bool)
        one[index] = True
        mask = pattern.from_groups(one.view(groups.shape), shape)
        shown = f"pattern.from_groups of a mask that keeps element {index} alone, of a matrix of shape {shape}"
        require(
            mask.dtype == torch.bool and tuple(mask.shape) == shape,
            f"A mask must be bool of shape {shape}, not {mask.dtype} of {tuple(mask.shape)}",
            shown,
        )
        total = float(scores[mask].sum())
        require(
            float(groups.view(-1)[index]) == total,
            f"An element's score must be the sum of its weights' scores, {total:g}, not {groups.view(-1)[index]:g}",
            shown,
        )
        covered += mask
    require(bool((covered == 1).all()), "Every weight must lie in one element", f"pattern.from_groups for {shape}")
