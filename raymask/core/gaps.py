"""How is a sparse mask written in few bytes? As gaps between kept entries or as bits, whichever is shorter."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

FAR = 255  # this many pruned entries, and none kept behind them
Code = Literal["gaps", "bits"]


def encode(kept: Tensor) -> tuple[Code, Tensor]:
    """The shorter code of a bool mask of any shape: its name and uint8 (bytes,)."""
    gaps = encode_gaps(kept)
    return ("gaps", gaps) if len(gaps) <= -(-kept.numel() // 8) else ("bits", encode_bits(kept))


def decode(code: Code, codes: Tensor) -> Tensor:
    """Where kept entries are in the flat mask, int64 (kept,), ascending."""
    return decode_gaps(codes) if code == "gaps" else decode_bits(codes)


def encode_gaps(kept: Tensor) -> Tensor:
    """One byte for each kept entry: how many pruned ones there are before it, since the last kept one. For each 255 of
    these there is a byte of 255 in front."""
    places = kept.reshape(-1).nonzero()[:, 0]
    gaps = torch.diff(places, prepend=places.new_tensor([-1])) - 1
    ends = (gaps // FAR + 1).cumsum(0)
    codes = torch.full((int(ends[-1]) if len(ends) else 0,), FAR, dtype=torch.uint8)
    codes[ends - 1] = (gaps % FAR).to(torch.uint8)
    return codes


def decode_gaps(codes: Tensor) -> Tensor:
    is_kept = codes != FAR
    return (codes.long() + is_kept).cumsum(0)[is_kept] - 1


def encode_bits(kept: Tensor) -> Tensor:
    """One bit an entry, most significant first, padded to whole bytes."""
    return torch.from_numpy(np.packbits(kept.numpy().reshape(-1)))


def decode_bits(codes: Tensor) -> Tensor:
    return torch.from_numpy(np.unpackbits(codes.numpy())).nonzero()[:, 0]
