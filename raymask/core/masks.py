"""What is a mask, and how is one drawn, applied, packed and recognised?

A mask is always `pattern(sampler(scorer(w), density, noise)(scores, generator), density)`, one matrix at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from raymask.core.patterns import Pattern, unstructured
from raymask.core.records import Candidate
from raymask.core.samplers import Draw, Sampler, votes
from raymask.core.scorers import Scorer, magnitude
from raymask.core.seeds import derive
from raymask.core.tensors import Packed

Mask = dict[str, Tensor]
"""Bool tensors by parameter name; True is kept."""


def draw(
    weights: Mapping[str, Tensor],
    candidate: Candidate,
    *,
    scorer: Scorer = magnitude,
    sampler: Sampler = votes,
    pattern: Pattern = unstructured,
    prepared: dict[object, Draw] | None = None,
) -> Mask:
    """The mask that `candidate` stands for on `weights`, of any shapes and float dtypes, on their device.

    Every matrix has its own generator, seeded from the candidate's seed and the matrix's name, so neither the order
    of the matrices nor the other matrices matter. `prepared`: pass the same dict for every draw from the same
    weights, and what depends only on them is computed once.
    Raises ValueError when a weight is not finite.
    """
    prepared = {} if prepared is None else prepared
    mask = {}
    for name, weight in weights.items():
        scores = scorer(weight)
        if scores.numel() and not bool(torch.isfinite(scores.max())):
            raise ValueError(f"{name} holds values that are not finite: it cannot be pruned")
        if candidate.noise is not None:
            key = (name, candidate.density, candidate.noise)
            if key not in prepared:
                prepared[key] = sampler(scores, candidate.density, candidate.noise)
            rng = torch.Generator(weight.device).manual_seed(derive(candidate.seed, "mask", name))
            scores = prepared[key](scores, rng)
        mask[name] = pattern(scores, candidate.density)
    return mask


@torch.no_grad()
def apply(tensors: Mapping[str, Tensor], mask: Mapping[str, Tensor]) -> None:
    """Zero the pruned entries of the tensors that the mask names, in place."""
    for name, kept in mask.items():
        tensors[name].mul_(kept)


def kept(mask: Mapping[str, Tensor]) -> int:
    """How many entries the mask keeps."""
    return sum(int(bits.count_nonzero()) for bits in mask.values())


def distance(mask: Mapping[str, Tensor], control: Mapping[str, Tensor]) -> float:
    """Share in [0, 1] of the kept entries that `control` prunes."""
    strays = sum(int((bits & ~control[name]).count_nonzero()) for name, bits in mask.items())
    return strays / max(kept(mask), 1)


def pack_bits(mask: Mapping[str, Tensor]) -> Packed:
    """One bit an entry, row-major, most significant bit first, each matrix padded to whole bytes."""
    bits = {name: np.packbits(tensor.cpu().numpy().reshape(-1)) for name, tensor in mask.items()}
    index, end = {}, 0
    for name, tensor in mask.items():
        index[name] = (end, len(bits[name]), tuple(tensor.shape), "bool")
        end += len(bits[name])
    return Packed(np.concatenate([*bits.values(), np.zeros(0, np.uint8)]), index)


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
