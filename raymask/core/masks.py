"""What is a mask, and how is one drawn, applied, packed and recognised?

A mask is always the winners of contests: an allocation says which matrices share a budget, a scorer what each weight
is worth, a pattern which weights compete, a sampler where chance comes in, and the best of each contest are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from raymask.core import seeds
from raymask.core.allocations import Allocation, Shapes, uniform
from raymask.core.patterns import Pattern, budget, winners
from raymask.core.records import Candidate
from raymask.core.samplers import Draw, Sampler, rounds, votes
from raymask.core.scorers import Calibration, Scorer, magnitude
from raymask.core.seeds import derive
from raymask.core.tensors import Packed

Mask = dict[str, Tensor]
"""Bool tensors by parameter name; True is kept."""

UNSTRUCTURED = Pattern()


def draw(
    weights: Mapping[str, Tensor],
    candidate: Candidate,
    *,
    allocation: Allocation = uniform,
    scorer: Scorer = magnitude,
    sampler: Sampler = votes,
    pattern: Pattern = UNSTRUCTURED,
    calibration: Mapping[str, Calibration] | None = None,
    prepared: dict[object, Draw] | None = None,
    take: Callable[[str, Tensor], Tensor] = lambda name, mask: mask,
) -> Mask:
    """The mask that `candidate` stands for on `weights`, of any float dtypes and of shapes that the pattern fits.

    Matrices that share a budget have a generator, seeded from the candidate's seed and their names, so neither the
    order of the others nor their weights matter. Ratios mean the same for every allocation and pattern: the votes are
    those of a matrix of their mean size, counted in weights. `calibration`: by name, for scorers that need it.
    `prepared`: pass the same dict for every draw from the same weights, and what depends only on them is computed once.
    `take`: what to keep of each matrix's mask, called as soon as it is drawn, so that not all need be there at once.
    Raises ValueError when a weight, or what it scores, is not finite.
    """
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    mask = {}
    for names, density in allocation(shapes, candidate.density).items():
        parts = [pattern.fold(scored(name, weights[name], scorer, (calibration or {}).get(name))) for name in names]
        widths = [part.shape[1] for part in parts]
        scores = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        del parts  # of a whole model, perhaps
        places = budget(scores.shape[1], density)
        if candidate.noise is not None:
            key = (names, density, candidate.noise)
            ready = {} if prepared is None else prepared
            if key not in ready:
                entries = sum(weights[name].numel() for name in names) // len(names)
                count = rounds(entries, budget(entries, density), candidate.noise.ratio)
                ready[key] = sampler(scores, places, candidate.noise.exponent, count)
            rng = torch.Generator(scores.device).manual_seed(derive(candidate.seed, seeds.MASK, *names))
            scores = ready[key](scores, rng)
        for name, kept in zip(names, torch.split(winners(scores, places), widths, 1), strict=True):
            mask[name] = take(name, pattern.unfold(kept, shapes[name]))
    return {name: mask[name] for name in weights}


def scored(name: str, weight: Tensor, scorer: Scorer, calibration: Calibration | None) -> Tensor:
    """The scores of one matrix. Raises ValueError when one is not finite."""
    scores = scorer(weight, calibration)
    if scores.numel() and not bool(torch.isfinite(scores.max())):
        culprit = name if not bool(torch.isfinite(weight).all()) else f"the calibration of {name}"
        raise ValueError(f"{culprit} holds values that are not finite: it cannot be pruned")
    return scores


def quotas(shapes: Shapes, density: float, allocation: Allocation, pattern: Pattern) -> dict[tuple[str, ...], int]:
    """How many weights are kept at most, by the names of the matrices that share them."""
    return {
        names: pattern.keeps(sum(math.prod(shapes[name]) for name in names), share)
        for names, share in allocation(shapes, density).items()
    }


@torch.no_grad()
def apply(tensors: Mapping[str, Tensor], mask: Mapping[str, Tensor]) -> None:
    """Zero the pruned entries of the tensors that the mask names, in place."""
    for name, kept in mask.items():
        tensors[name].mul_(kept)


def kept(bits: Packed) -> int:
    """How many entries a packed mask keeps."""
    return int(np.bitwise_count(bits.buffer).sum(dtype=np.int64))


def distance(bits: Packed, control: Packed) -> float:
    """Share in [0, 1] of the entries that one packed mask keeps and `control`, of the same matrices, prunes."""
    strays = np.bitwise_count(bits.buffer & ~control.buffer).sum(dtype=np.int64)
    return int(strays) / max(kept(bits), 1)


def pack_bits(mask: Mapping[str, Tensor]) -> Packed:
    """One bit an entry, row-major, most significant bit first, each matrix padded to whole bytes."""
    packed = vacant_bits({name: tuple(tensor.shape) for name, tensor in mask.items()})
    for name, tensor in mask.items():
        put_bits(packed, name, tensor)
    return packed


def vacant_bits(shapes: Shapes) -> Packed:
    """Room for the packed bits of a mask of these shapes, all of them 0."""
    index, end = {}, 0
    for name, shape in shapes.items():
        index[name] = (end, -(-math.prod(shape) // 8), shape, "bool")
        end += index[name][1]
    return Packed(np.zeros(end, np.uint8), index)


def put_bits(packed: Packed, name: str, tensor: Tensor) -> None:
    """Write the bits of one matrix where they belong."""
    offset, size, _, _ = packed.index[name]
    packed.buffer[offset : offset + size] = np.packbits(tensor.cpu().numpy().reshape(-1))


def unpack_bits(packed: Packed) -> Mask:
    """The inverse of `pack_bits`, on the CPU."""
    mask = {}
    for name, (offset, size, shape, _) in packed.index.items():
        count = int(np.prod(shape, dtype=np.int64))
        bits = np.unpackbits(packed.buffer[offset : offset + size], count=count)
        mask[name] = torch.from_numpy(bits).bool().view(shape)
    return mask


def digest(packed: Packed) -> str:
    """A fingerprint of packed mask bits, names and shapes (BLAKE2b, 128 bits, hex), whatever the order of names."""
    state = blake2b(digest_size=16)
    for name in sorted(packed.index):
        offset, size, shape, _ = packed.index[name]
        state.update(f"{name}{shape}".encode())
        state.update(packed.buffer[offset : offset + size].data)
    return state.hexdigest()


def matching(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """The names that match at least one shell-style pattern (* ? [])."""
    wanted = tuple(patterns)
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)}
