"""Compact codes of sparse masks: gaps between kept entries, or bits, whichever is shorter."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

FULL_GAP = 255  # the byte that says: 255 pruned entries, no kept one after them


Code = Literal["gaps", "bits"]


def encode_mask(mask: Tensor) -> tuple[Code, Tensor]:
    """Encode a mask with the shorter code.

    Args:
        mask: Bool mask of any shape; True is kept.

    Returns:
        The code's name and its bytes, uint8 `[num_bytes]`.
    """
    gaps = encode_gaps(mask)
    return ("gaps", gaps) if len(gaps) <= -(-mask.numel() // 8) else ("bits", encode_bits(mask))


def decode(code: Code, codes: Tensor) -> Tensor:
    """Indices of the kept entries in the flat mask, int64 `[num_kept]`, ascending."""
    return decode_gaps(codes) if code == "gaps" else decode_bits(codes)


def encode_gaps(mask: Tensor) -> Tensor:
    """Encode a bool mask as one byte per kept entry: the number of pruned entries since the last kept one.

    A gap of 255 or more is written as bytes of 255, one for each 255 entries, before the byte of the rest.
    """
    indices = mask.reshape(-1).nonzero()[:, 0]
    gaps = torch.diff(indices, prepend=indices.new_tensor([-1])) - 1
    ends = (gaps // FULL_GAP + 1).cumsum(0)
    codes = torch.full((int(ends[-1]) if len(ends) else 0,), FULL_GAP, dtype=torch.uint8)
    codes[ends - 1] = (gaps % FULL_GAP).to(torch.uint8)
    return codes


def decode_gaps(codes: Tensor) -> Tensor:
    """Indices of the kept entries, int64 `[num_kept]`, from the bytes of `encode_gaps`."""
    is_kept = codes != FULL_GAP
    return (codes.long() + is_kept).cumsum(0)[is_kept] - 1


def encode_bits(mask: Tensor) -> Tensor:
    """Encode a bool mask as one bit per entry, most significant bit first, padded to whole bytes."""
    return torch.from_numpy(np.packbits(mask.numpy().reshape(-1)))


def decode_bits(codes: Tensor) -> Tensor:
    """Indices of the kept entries, int64 `[num_kept]`, from the bytes of `encode_bits`."""
    return torch.from_numpy(np.unpackbits(codes.numpy())).nonzero()[:, 0]
