"""How do many tensors travel as one flat buffer?"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ALIGN = 64  # bytes: what vector loads and Ray's object store like

warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


@dataclass(frozen=True)
class Packed:
    """Tensors of any dtype in one uint8 buffer; `index` gives (offset, bytes, shape, dtype name) by tensor name.

    Ray maps one such array read-only into every process of a node, without a copy.
    """

    buffer: np.ndarray
    index: dict[str, tuple[int, int, tuple[int, ...], str]]

    def views(self) -> dict[str, Tensor]:
        """Tensors over the buffer itself. Only ever read them: a write would reach every process of the node."""
        base = torch.from_numpy(self.buffer)
        return {
            name: base[offset : offset + size].view(getattr(torch, dtype)).view(shape)
            if size
            else torch.empty(shape, dtype=getattr(torch, dtype))
            for name, (offset, size, shape, dtype) in self.index.items()
        }


def vacant(tensors: Mapping[str, Tensor]) -> Packed:
    """A buffer of zeros with room for such `tensors`."""
    index, end = {}, 0
    for name, tensor in tensors.items():
        offset = -(-end // ALIGN) * ALIGN
        size = tensor.numel() * tensor.element_size()
        index[name] = (offset, size, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        end = offset + size
    return Packed(np.zeros(end, np.uint8), index)


def pack(tensors: Mapping[str, Tensor]) -> Packed:
    """Copy `tensors`, from any device, into one buffer."""
    packed = vacant(tensors)
    for name, view in packed.views().items():
        view.copy_(tensors[name].detach())
    return packed


@torch.no_grad()
def load(packed: Packed, target: Mapping[str, Tensor]) -> None:
    """Copy `packed` into the live tensors of the same names; every name of `target` must be there."""
    views = packed.views()
    for name, tensor in target.items():
        tensor.copy_(views[name], non_blocking=True)
