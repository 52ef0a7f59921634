"""Prunable matrices of a model: the weights of linear layers in its transformer blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from raymask.core.masking.masks import Mask, match_names


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, the three denominators of sparsity.

    Attributes:
        prunable: Parameters of the prunable matrices.
        encoder: Parameters of the transformer blocks and of the prunable matrices.
        whole: Parameters of the whole model.
    """

    prunable: int
    encoder: int
    whole: int

    def sparsities(self, pruned: int) -> dict[str, float]:
        """Share of zeros in [0, 1] by denominator, with `pruned` weights zero."""
        return {name: pruned / getattr(self, name) for name in ("prunable", "encoder", "whole")}


def transformer_blocks(module: nn.Module) -> dict[str, nn.ModuleList]:
    """The encoder or decoder layers by name: outermost ModuleLists whose items have one class and linear layers."""
    blocks: dict[str, nn.ModuleList] = {}
    for name, child in module.named_modules():
        outermost = not any(name.startswith(f"{outer}.") for outer in blocks)
        repeated = isinstance(child, nn.ModuleList) and len({type(block) for block in child}) == 1
        if repeated and outermost and any(map(is_linear, child.modules())):
            blocks[name] = child
    return blocks


def block_parameters(module: nn.Module) -> set[str]:
    """Names of all parameters in the transformer blocks."""
    names = tuple(f"{name}." for name in transformer_blocks(module))
    return {name for name, _ in module.named_parameters() if name.startswith(names)}


def find_prunable(module: nn.Module, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Names of the weights to prune, in the module's order: by default those of linear layers in its blocks.

    Args:
        module: The model.
        include: Shell-style patterns; if there are any, they choose among all linear weights instead.
        exclude: Shell-style patterns of weights not to prune.
    """
    parameters = dict(module.named_parameters())  # a tied weight has one name here
    linear = [f"{name}.weight" for name, child in module.named_modules() if is_linear(child)]
    linear = [name for name in linear if name in parameters]
    chosen = match_names(linear, include) if include else set(linear) & block_parameters(module)
    chosen -= match_names(linear, exclude)
    return tuple(name for name in linear if name in chosen)


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is linear: nn.Linear, or transformers' Conv1D."""
    return isinstance(layer, nn.Linear) or is_conv1d(layer)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D, whose weight is [n_in, n_out], as in GPT-2."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def transposed_weights(module: nn.Module) -> frozenset[str]:
    """Names of the weights that the module holds as [n_in, n_out]."""
    return frozenset(f"{name}.weight" for name, layer in module.named_modules() if is_conv1d(layer))


def matrices(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The weights of these names as [n_out, n_in], views of the module's parameters."""
    weights, transposed = {name: module.get_parameter(name).detach() for name in names}, transposed_weights(module)
    return {name: weight.T if name in transposed else weight for name, weight in weights.items()}


def to_module_layout(module: nn.Module, mask: Mask) -> Mask:
    """A mask of [n_out, n_in] matrices in the layout of the module's weights."""
    transposed = transposed_weights(module)
    return {name: bits.T.contiguous() if name in transposed else bits for name, bits in mask.items()}


def count_sizes(module: nn.Module, prunable: tuple[str, ...], count: Callable[[Tensor], int] = Tensor.numel) -> Sizes:
    """Count parameters for the three denominators. The encoder contains all prunable matrices.

    Args:
        module: The model.
        prunable: Names of the prunable weights.
        count: How many entries of a tensor to count; all by default.
    """
    sizes = {name: count(parameter) for name, parameter in module.named_parameters()}
    inside = block_parameters(module) | set(prunable)
    return Sizes(
        prunable=sum(sizes[name] for name in prunable),
        encoder=sum(sizes[name] for name in inside),
        whole=sum(sizes.values()),
    )
