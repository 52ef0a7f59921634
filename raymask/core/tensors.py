"""Many tensors packed into one flat buffer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ALIGN = 64  # bytes: suits vector loads and Ray's object store

warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


@dataclass(frozen=True)
class PackedTensors:
    """Tensors of any dtype in one buffer.

    Ray maps one such array read-only into every process of a node, without a copy.

    Attributes:
        buffer: uint8 `[n_bytes]`. Each tensor of `pack` starts at a multiple of ALIGN.
        index: (offset in bytes, size in bytes, shape, dtype name without "torch.") by tensor name.
    """

    buffer: np.ndarray
    index: dict[str, tuple[int, int, tuple[int, ...], str]]

    def views(self) -> dict[str, Tensor]:
        """Tensors by name, views of the buffer. Do not write: a write would reach every process of the node."""
        base = torch.from_numpy(self.buffer)
        return {
            name: base[offset : offset + size].view(getattr(torch, dtype)).view(shape)
            if size
            else torch.empty(shape, dtype=getattr(torch, dtype))
            for name, (offset, size, shape, dtype) in self.index.items()
        }


def empty_packed(tensors: Mapping[str, Tensor]) -> PackedTensors:
    """A buffer of zeros with room for tensors of these names, shapes and dtypes."""
    index, end = {}, 0
    for name, tensor in tensors.items():
        offset = -(-end // ALIGN) * ALIGN
        size = tensor.numel() * tensor.element_size()
        index[name] = (offset, size, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        end = offset + size
    return PackedTensors(np.zeros(end, np.uint8), index)


def pack(tensors: Mapping[str, Tensor]) -> PackedTensors:
    """Copy `tensors`, from any device, into one new buffer."""
    packed = empty_packed(tensors)
    for name, view in packed.views().items():
        view.copy_(tensors[name].detach())
    return packed


@torch.no_grad()
def copy_into(packed: PackedTensors, target: Mapping[str, Tensor]) -> None:
    """Copy packed tensors into live ones of the same names, in place.

    Args:
        packed: Source. Names that `target` lacks are ignored.
        target: Live tensors by name, on any device. `packed` must have every name.

    Raises:
        KeyError: `packed` lacks a name of `target`.
    """
    views = packed.views()
    for name, tensor in target.items():
        tensor.copy_(views[name], non_blocking=True)
