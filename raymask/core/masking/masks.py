"""Masks: drawing, applying, packing, comparing and hashing them.

A mask is the top k of each group. An allocation says which matrices share a budget, a scorer how important each weight
is, a pattern which weights compete, and a sampler perturbs the scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from raymask.core import seeds
from raymask.core.masking.allocations import AllocationFn, Shapes, uniform
from raymask.core.masking.noise import Noise
from raymask.core.masking.patterns import Pattern, num_kept, topk_mask
from raymask.core.masking.samplers import SampleFn, Sampler, votes_from_ratio, voting
from raymask.core.masking.scorers import Calibration, ScoreFn, magnitude
from raymask.core.seeds import derive
from raymask.core.tensors import PackedTensors

Mask = dict[str, Tensor]
"""Bool tensors `[n_out, n_in]` by parameter name, `[n, n_out, n_in]` of a stack of matrices; True is kept."""


UNSTRUCTURED = Pattern()


@dataclass(frozen=True)
class PruningMethod:
    """The functions that make a mask of weights.

    Attributes:
        allocation: Distributes the density over the matrices.
        scorer: Scores the weights.
        sampler: Perturbs the scores, where a mask has noise.
        pattern: Which weights compete.
    """

    allocation: AllocationFn = uniform
    scorer: ScoreFn = magnitude
    sampler: Sampler = voting
    pattern: Pattern = UNSTRUCTURED


DEFAULT_METHOD = PruningMethod()
"""The paper's method: the same density everywhere, single weights scored by magnitude, and votes."""


def draw_mask(
    weights: Mapping[str, Tensor],
    density: float,
    *,
    seed: int = 0,
    noise: Noise | None = None,
    method: PruningMethod = DEFAULT_METHOD,
    calibration: Mapping[str, Calibration] | None = None,
    sampler_cache: dict[object, SampleFn] | None = None,
    transform: Callable[[str, Tensor], Tensor] = lambda name, mask: mask,
) -> Mask:
    """Draw a mask.

    Matrices that share a budget share a generator, seeded from `seed` and their names. So neither the order nor the
    weights of other matrices matter. A sampling ratio means the same for every allocation and pattern: the number of
    votes is that of a matrix of their mean size, counted in weights.

    Args:
        weights: Weights `[n_out, n_in]` by name, of any float dtype, or stacks of such matrices `[n, n_out, n_in]`.
            Every matrix of a stack is one of its own. The pattern must divide their shapes.
        density: Share of the weights that is kept, in (0, 1].
        seed: Seed of the random draws, in [0, 2^63).
        noise: Randomness of the mask. None for the mask of the largest scores, which no seed changes.
        method: The functions that make the mask.
        calibration: Calibration by name, for scorers that need it.
        sampler_cache: Cache of prepared samplers. Pass the same dict for every draw from the same weights, so that what
            depends only on the weights is computed once.
        transform: Called with the name and mask of each weight as soon as it is drawn; its result takes the mask's
            place. It allows that not all masks are in memory at once.

    Returns:
        The mask by name, in the order of `weights`, on their devices.

    Raises:
        ValueError: A weight or its score is not finite.
    """
    parts = {name: matrix_names(name, tuple(weight.shape)) for name, weight in weights.items()}
    owners = {part: name for name, names in parts.items() for part in names}
    shapes = matrix_shapes({name: tuple(weight.shape) for name, weight in weights.items()})
    matrices, calibrations = split_stacks(weights), split_calibration(calibration or {})
    drawn: dict[str, Tensor] = {}
    mask, pattern = {}, method.pattern
    for names, share in method.allocation(shapes, density).items():
        matrix_scores = [
            pattern.to_groups(score_matrix(name, matrices[name], method.scorer, calibrations.get(name)))
            for name in names
        ]
        widths = [matrix.shape[1] for matrix in matrix_scores]
        scores = matrix_scores[0] if len(matrix_scores) == 1 else torch.cat(matrix_scores, 1)
        del matrix_scores  # they may be as large as the whole model
        k = num_kept(scores.shape[1], share)
        if noise is not None:
            key = (names, share, noise, method)
            cache = {} if sampler_cache is None else sampler_cache
            if key not in cache:
                entries = sum(matrices[name].numel() for name in names) // len(names)
                votes = votes_from_ratio(entries, num_kept(entries, share), noise.sampling_ratio)
                cache[key] = method.sampler(scores, k, noise.exponent, votes)
            rng = torch.Generator(scores.device).manual_seed(derive(seed, seeds.MASK_DRAW, *names))
            scores = cache[key](scores, rng)
        for name, kept in zip(names, torch.split(topk_mask(scores, k), widths, 1), strict=True):
            drawn[name] = pattern.from_groups(kept, shapes[name])
            owner = owners[name]
            if all(part in drawn for part in parts[owner]):
                bits = [drawn.pop(part) for part in parts[owner]]
                mask[owner] = transform(owner, bits[0] if owner == name else torch.stack(bits))
    return {name: mask[name] for name in weights}


def matrix_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """Names of the matrices of a weight: its own, or `name[i]` for matrix i of a stack `[n, n_out, n_in]`."""
    return [f"{name}[{index}]" for index in range(shape[0])] if len(shape) == 3 else [name]


def matrix_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes of single matrices by name, those of stacks included."""
    return {part: shape[-2:] for name, shape in shapes.items() for part in matrix_names(name, shape)}


def split_stacks(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Single matrices by name, views of the weights."""
    return {
        part: matrix
        for name, weight in weights.items()
        for part, matrix in zip(
            matrix_names(name, tuple(weight.shape)), weight if weight.dim() == 3 else [weight], strict=True
        )
    }


def split_calibration(calibration: Mapping[str, Calibration]) -> dict[str, Calibration]:
    """Calibrations of single matrices by name. Those of a stack have gradients, and no inputs."""
    gradients = split_stacks({name: found.gradient for name, found in calibration.items()})
    return {
        part: calibration[part] if part in calibration else Calibration(None, gradient)
        for part, gradient in gradients.items()
    }


def score_matrix(name: str, weight: Tensor, scorer: ScoreFn, calibration: Calibration | None) -> Tensor:
    """Score one matrix, and check the scores.

    Args:
        name: Name of the matrix, for the error.
        weight: Its weights, `[n_out, n_in]`.
        scorer: Scores the weights.
        calibration: Its calibration, None where the scorer needs none.

    Returns:
        Scores, float32 >= 0 of the same shape.

    Raises:
        ValueError: A score is not finite.
    """
    scores = scorer(weight, calibration)
    if scores.numel() and not bool(torch.isfinite(scores.max())):
        source = name if not bool(torch.isfinite(weight).all()) else f"the calibration of {name}"
        raise ValueError(f"{source} holds values that are not finite: it cannot be pruned")
    return scores


def max_kept(shapes: Shapes, density: float, method: PruningMethod) -> dict[tuple[str, ...], int]:
    """How many weights a mask keeps at most, by the names of the matrices that share a budget."""
    single = matrix_shapes(shapes)
    return {
        names: method.pattern.num_kept(sum(math.prod(single[name]) for name in names), share)
        for names, share in method.allocation(single, density).items()
    }


@torch.no_grad()
def apply(tensors: Mapping[str, Tensor], mask: Mapping[str, Tensor]) -> None:
    """Zero the pruned weights of the tensors that the mask names, in place."""
    for name, kept in mask.items():
        tensors[name].mul_(kept)


def num_kept_bits(bits: PackedTensors) -> int:
    """How many weights a packed mask keeps."""
    return int(np.bitwise_count(bits.buffer).sum(dtype=np.int64))


def distance(bits: PackedTensors, magnitude_bits: PackedTensors) -> float:
    """Share in [0, 1] of a mask's kept weights that the magnitude mask prunes.

    Args:
        bits: The packed mask.
        magnitude_bits: The packed magnitude mask of the same matrices.

    Returns:
        The distance; 0 for a mask that keeps nothing.
    """
    num_differing = np.bitwise_count(bits.buffer & ~magnitude_bits.buffer).sum(dtype=np.int64)
    return int(num_differing) / max(num_kept_bits(bits), 1)


def pack_bits(mask: Mapping[str, Tensor]) -> PackedTensors:
    """Pack a mask: one bit a weight, row-major, most significant bit first, each matrix padded to whole bytes."""
    packed = empty_bits({name: tuple(tensor.shape) for name, tensor in mask.items()})
    for name, tensor in mask.items():
        set_bits(packed, name, tensor)
    return packed


def empty_bits(shapes: Shapes) -> PackedTensors:
    """Packed bits of a mask of these shapes, all of them 0."""
    index, end = {}, 0
    for name, shape in shapes.items():
        index[name] = (end, -(-math.prod(shape) // 8), shape, "bool")
        end += index[name][1]
    return PackedTensors(np.zeros(end, np.uint8), index)


def set_bits(packed: PackedTensors, name: str, tensor: Tensor) -> None:
    """Write the bits of one matrix into a packed mask, in place.

    Args:
        packed: The packed mask.
        name: Name of the matrix.
        tensor: Its mask, bool `[n_out, n_in]` on any device.
    """
    offset, size, _, _ = packed.index[name]
    packed.buffer[offset : offset + size] = np.packbits(tensor.cpu().numpy().reshape(-1))


def unpack_bits(packed: PackedTensors) -> Mask:
    """Unpack a mask, on the CPU; the inverse of `pack_bits`."""
    mask = {}
    for name, (offset, size, shape, _) in packed.index.items():
        count = int(np.prod(shape, dtype=np.int64))
        bits = np.unpackbits(packed.buffer[offset : offset + size], count=count)
        mask[name] = torch.from_numpy(bits).bool().view(shape)
    return mask


def digest(packed: PackedTensors) -> str:
    """Digest of a packed mask: names, shapes and bits, in any order of names (BLAKE2b, 128 bits, hex)."""
    state = blake2b(digest_size=16)
    for name in sorted(packed.index):
        offset, size, shape, _ = packed.index[name]
        state.update(f"{name}{shape}".encode())
        state.update(packed.buffer[offset : offset + size].data)
    return state.hexdigest()


def match_names(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """The names that match at least one shell-style pattern (* ? [])."""
    shell_patterns = tuple(patterns)
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in shell_patterns)}
