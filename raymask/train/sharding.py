"""How does one model lie on several devices?

Its parameters are cut into ranges of rows, one for each rank of a mesh (torch's FSDP2). A block is whole on a device
only while it computes. What a rank needs of whole tensors it takes from the packed ones on its host, so that loading
weights and drawing masks need no communication. All of it works on a model that is not cut as well.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from raymask.core import masks
from raymask.core.errors import UserError
from raymask.core.masks import Mask
from raymask.core.records import Candidate
from raymask.core.scorers import Calibration, Scorer, magnitude
from raymask.core.tensors import Packed, vacant
from raymask.train.model import blocks

if TYPE_CHECKING:  # to import it takes a second, which a worker that is alone need not wait for
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


@contextmanager
def without_parameters() -> Iterator[None]:
    """Modules that are built here have buffers as ever, and parameters without memory, on the meta device."""

    def emptied(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:  # a tied one stays the same
            return None
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(emptied)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def mesh(device: str, size: int) -> DeviceMesh:
    """The ranks of the processes that have met, on this kind of device."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device, (size,))


def shard(module: nn.Module, mesh: DeviceMesh, computes: torch.dtype | None = None) -> None:
    """Cut a module's parameters among the ranks of a mesh, and bring it to the mesh's kind of device.

    Parameters on the meta device get memory, but no values yet. After a backward pass every rank has its rows of the
    sum of all ranks' gradients, added up in float32: each rank's loss is its part of the whole loss. `computes`: the
    type to which weights and inputs are rounded where they are multiplied, without autocast, which would keep a copy
    of every weight for the backward pass. Raises UserError when this torch is too old for it.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise UserError(
            f"workers.gang: torch {torch.__version__} cannot add up the gradients of a model in parts: use 2.9 or a "
            "newer one, or set it to 1"
        )
    policy = MixedPrecisionPolicy(param_dtype=computes, reduce_dtype=torch.float32)
    for part in (*(block for found in blocks(module).values() for block in found), module):
        # Resharded even at the root: a whole copy left behind by `predict` would not follow what is loaded later.
        cut = fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        cut.set_gradient_divide_factor(1.0)
        cut.set_force_sum_reduction_for_comms(True)  # the one kind of sum that gloo knows
    module._apply(  # type: ignore[no-untyped-call]  # to_empty would take the buffers' values
        lambda tensor: torch.empty_like(tensor, device=mesh.device_type) if tensor.is_meta else tensor
    )


def is_cut(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether the tensor is one of which each rank has some rows."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """What there is of a tensor on this rank, in the tensor's own memory."""
    return (tensor.to_local() if is_cut(tensor) else tensor).detach()


def part(whole: Tensor, tensor: Tensor) -> Tensor:
    """The rows of `whole` that belong where this rank's rows of `tensor` are, a view; all where it is not cut."""
    if not is_cut(tensor):
        return whole
    rows = -(-len(whole) // tensor.device_mesh.size())
    first = rows * tensor.device_mesh.get_local_rank()
    return whole[first : first + rows]


def parts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What there is of each on this rank."""
    return {name: local(tensor) for name, tensor in tensors.items()}


def load(packed: Packed, target: Mapping[str, Tensor]) -> None:
    """Copy this rank's rows of `packed` into the live tensors of the same names; every name of `target` must be there.

    It is what raymask.core.tensors.load does with tensors that are not cut.
    """
    views = packed.views()
    for name, tensor in target.items():
        local(tensor).copy_(part(views[name], tensor), non_blocking=True)


@torch.no_grad()
def gather(tensors: Mapping[str, Tensor], *, here: bool) -> Packed | None:
    """`pack` of whole tensors, for the rank that wants them `here`; all ranks must call it, with the same names.

    One tensor at a time is whole on every device.
    """
    packed = vacant(tensors) if here else None
    views = packed.views() if packed else {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if is_cut(tensor) else tensor
        if packed:
            views[name].copy_(whole)
    return packed


def beside(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy of a whole tensor of an optimizer's state, where its parameter is.

    Cut like the parameter if it has as many rows, else, such as Adafactor's columns of means, whole on every rank.
    """
    if not is_cut(parameter) or value.shape[:1] != parameter.shape[:1]:
        return value.to(parameter.device, copy=True)
    from torch.distributed.tensor import DTensor

    mine = part(value, parameter).to(parameter.device, copy=True)
    return DTensor.from_local(
        mine, parameter.device_mesh, parameter.placements, shape=value.shape, stride=value.stride()
    )


def draw(
    weights: Mapping[str, Tensor],
    live: Mapping[str, Tensor],
    candidate: Candidate,
    *,
    scorer: Scorer = magnitude,
    turned: Collection[str] = (),
    **verbs: Any,
) -> tuple[Mask, Packed]:
    """This rank's rows of a candidate's mask, and the packed bits of all rows, which are the same on every rank.

    `weights`: whole, on the host or a device. Each is brought to where its `live` tensor is, scored and drawn there,
    and let go before the next: the bits are those that `masks.draw` draws from weights on that device. `turned`: which
    are given the other way round than their live tensor is. `verbs`: as `masks.draw` takes them.
    """
    bits = masks.vacant_bits({name: tuple(live[name].shape) for name in weights})
    device = next(iter(live.values())).device

    def nearby(weight: Tensor, calibration: Calibration | None) -> Tensor:
        return scorer(weight.to(device), calibration)

    def take(name: str, mask: Tensor) -> Tensor:
        kept = mask.T.contiguous() if name in turned else mask
        masks.put_bits(bits, name, kept)
        return part(kept, live[name]).clone() if is_cut(live[name]) else kept

    return masks.draw(weights, candidate, scorer=nearby, take=take, **verbs), bits
