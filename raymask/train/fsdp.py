"""One model on several devices with torch's FSDP2.

Each parameter is sharded by rows over the ranks of a device mesh. A transformer block is full on a device only while it
computes. A rank copies its rows from packed full tensors on its host, so loading weights and drawing masks need no
communication. All functions also accept a model that is not sharded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from raymask.core.errors import UserError
from raymask.core.masking import masks
from raymask.core.masking.masks import DEFAULT_METHOD, Mask, PruningMethod
from raymask.core.masking.scorers import Calibration, ScoreFn
from raymask.core.tensors import PackedTensors, empty_packed
from raymask.train.prunable import transformer_blocks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


@contextmanager
def init_empty_weights() -> Iterator[None]:
    """Within the block, new modules have their parameters on the meta device, without memory, and normal buffers."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:  # a tied parameter must stay the same object
            return None
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def mesh(device: str, size: int) -> DeviceMesh:
    """The device mesh of the connected process group.

    Args:
        device: The type of device, "cuda" or "cpu".
        size: The number of processes.
    """
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device, (size,))


def apply_fsdp(module: nn.Module, mesh: DeviceMesh, compute_dtype: torch.dtype | None = None) -> None:
    """Shard a module's parameters over the ranks of a mesh, in place, on the mesh's type of device.

    Parameters on the meta device get memory, but no values yet. After a backward pass each rank has its rows of the sum
    of all ranks' gradients, summed in float32. So each rank's loss must be its part of the batch's loss.

    Args:
        module: The model.
        mesh: The ranks.
        compute_dtype: The dtype in which weights and inputs are multiplied; None for their own. It replaces autocast,
            which would keep a copy of every weight for the backward pass.

    Raises:
        UserError: This version of torch is too old.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise UserError(
            f"workers.fsdp: torch {torch.__version__} cannot sum the gradients of a sharded model: use torch 2.9 or "
            "newer, or set workers.fsdp to 1"
        )
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for submodule in (*(block for blocks in transformer_blocks(module).values() for block in blocks), module):
        # The root is resharded too: otherwise a full copy left by `predict` would hide weights that are loaded later.
        sharded = fully_shard(submodule, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # the only reduction that gloo has
    module._apply(  # type: ignore[no-untyped-call]  # to_empty would discard the buffers' values
        lambda tensor: torch.empty_like(tensor, device=mesh.device_type) if tensor.is_meta else tensor
    )


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether the tensor is a DTensor, of which each rank has some rows."""
    return hasattr(tensor, "device_mesh")


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's rows of a tensor, detached, in the tensor's own memory; all rows if it is not sharded."""
    return (tensor.to_local() if is_sharded(tensor) else tensor).detach()


def local_rows(full: Tensor, tensor: Tensor) -> Tensor:
    """The rows of `full` that this rank has of `tensor`, which has the same number of rows.

    Returns:
        A view of `full`; `full` itself if `tensor` is not sharded.
    """
    if not is_sharded(tensor):
        return full
    rows = -(-len(full) // tensor.device_mesh.size())
    first = rows * tensor.device_mesh.get_local_rank()
    return full[first : first + rows]


def local_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`local_tensor` of each tensor, by name."""
    return {name: local_tensor(tensor) for name, tensor in tensors.items()}


def copy_into_shards(packed: PackedTensors, target: Mapping[str, Tensor]) -> None:
    """Copy this rank's rows of full tensors into the model's tensors of the same names.

    For tensors that are not sharded it does the same as `raymask.core.tensors.copy_into`.

    Args:
        packed: Full tensors; it must have every name of `target`.
        target: The model's tensors.
    """
    views = packed.views()
    for name, tensor in target.items():
        local_tensor(tensor).copy_(local_rows(views[name], tensor), non_blocking=True)


@torch.no_grad()
def gather_full(tensors: Mapping[str, Tensor], *, here: bool) -> PackedTensors | None:
    """Gather and pack full tensors. All ranks must call it with the same names.

    One tensor at a time is full on every device.

    Args:
        tensors: The tensors by name.
        here: Whether this rank wants the result.

    Returns:
        The packed tensors; None unless `here`.
    """
    packed = empty_packed(tensors) if here else None
    views = packed.views() if packed else {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if is_sharded(tensor) else tensor
        if packed:
            views[name].copy_(full)
    return packed


def like_parameter(parameter: Tensor, value: Tensor) -> Tensor:
    """Copy a tensor of an optimizer's state to where its parameter is.

    Args:
        parameter: The parameter, sharded or not.
        value: The full tensor of the state.

    Returns:
        A copy on the parameter's device. It is sharded like the parameter if it has as many rows; otherwise, such as
        Adafactor's column means, it is full on every rank.
    """
    if not is_sharded(parameter) or value.shape[:1] != parameter.shape[:1]:
        return value.to(parameter.device, copy=True)
    from torch.distributed.tensor import DTensor

    rows = local_rows(value, parameter).to(parameter.device, copy=True)
    return DTensor.from_local(
        rows, parameter.device_mesh, parameter.placements, shape=value.shape, stride=value.stride()
    )


@dataclass(frozen=True)
class ScoreOnDevice:
    """A scorer that copies each weight to a device and scores it there. Equal ones share a cache of samplers.

    Attributes:
        scorer: Scores the weights.
        device: The device.
    """

    scorer: ScoreFn
    device: torch.device

    def __call__(self, weight: Tensor, calibration: Calibration | None) -> Tensor:
        """Score one weight."""
        return self.scorer(weight.to(self.device), calibration)


def draw_sharded_mask(
    weights: Mapping[str, Tensor],
    live: Mapping[str, Tensor],
    density: float,
    *,
    method: PruningMethod = DEFAULT_METHOD,
    transposed: Collection[str] = (),
    **draw_options: Any,
) -> tuple[Mask, PackedTensors]:
    """Draw a mask for a model that may be sharded.

    One weight at a time is copied to the device of its `live` tensor, scored and drawn there. The bits are those that
    `masks.draw_mask` draws from weights on that device.

    Args:
        weights: Full weights [n_out, n_in], or stacks of them, by name, on the host or a device.
        live: The model's tensors by name, sharded or not.
        density: Share of the weights that is kept, in (0, 1].
        method: The functions that make the mask.
        transposed: Names of the weights whose `live` tensor is transposed, [..., n_in, n_out].
        **draw_options: Other arguments of `masks.draw_mask`.

    Returns:
        This rank's rows of the mask, in the layout of `live`, and the packed bits of all rows, which are the same on
        every rank.
    """
    bits = masks.empty_bits({name: tuple(live[name].shape) for name in weights})
    on_device = replace(method, scorer=ScoreOnDevice(method.scorer, next(iter(live.values())).device))

    def take_local_rows(name: str, mask: Tensor) -> Tensor:
        """Write the bits of one matrix, and return this rank's rows of it."""
        kept = mask.mT.contiguous() if name in transposed else mask
        masks.set_bits(bits, name, kept)
        return local_rows(kept, live[name]).clone() if is_sharded(live[name]) else kept

    return masks.draw_mask(weights, density, method=on_device, transform=take_local_rows, **draw_options), bits
