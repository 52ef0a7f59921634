"""Prunable matrices of a model: weights of linear layers and of experts in its transformer blocks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher

from torch import Tensor, nn

from raymask.core.masking.masks import Mask, match_names

ROUTERS = ("*router*", "*.gate.weight", "*.shared_expert_gate.weight")
"""Weights that choose a token's experts: few, and each decides over a whole expert. They are never pruned."""

STATE_SPACE = ("*.x_proj.weight", "*.dt_proj.weight")
"""Mamba's projections of the step size: small and sensitive. They are pruned only where model.include names them."""

TRANSPOSED_EXPERTS = ("Llama4TextExperts",)
"""Classes of experts that hold weights as [n, n_in, n_out] and do not say so with `is_transposed`."""


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
    """The encoder or decoder layers by name: outermost lists of layers that hold prunable weights in parts of theirs.

    The layers of a list have one class, or several of transformers' own, as where attention and state spaces take
    turns. Parts of a text model that read images or sound have none.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks: dict[str, nn.ModuleList] = {}
    towers = other_modalities(module)
    for name, child in module.named_modules():
        outermost = not name.startswith(tuple(f"{outer}." for outer in (*blocks, *towers)))
        if not outermost or not isinstance(child, nn.ModuleList) or any(map(is_linear, child)):
            continue
        one_class = len({type(layer) for layer in child}) == 1
        are_layers = one_class or all(isinstance(layer, GradientCheckpointingLayer) for layer in child)
        if are_layers and any(weights_of(part) for part in child.modules()):
            blocks[name] = child
    return blocks


def other_modalities(module: nn.Module) -> list[str]:
    """Names of the parts of a text model that read something else, such as images."""
    if "text" not in getattr(module, "input_modalities", ()):  # transformers' name, a text or a tuple of texts
        return []
    return [name for name, child in module.named_modules() if "text" not in getattr(child, "input_modalities", "text")]


def block_parameters(module: nn.Module) -> set[str]:
    """Names of all parameters in the transformer blocks."""
    names = tuple(f"{name}." for name in transformer_blocks(module))
    return {name for name, _ in module.named_parameters() if name.startswith(names)}


def weights_of(layer: nn.Module) -> list[str]:
    """Names of a layer's own weights that can be pruned: a linear layer's, or the stacked ones of experts."""
    if is_linear(layer):
        return ["weight"]
    if "Experts" not in type(layer).__name__:
        return []
    return [name for name, parameter in layer.named_parameters(recurse=False) if parameter.dim() == 3]


def named_weights(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names of all weights that can be pruned, and the layers that own them, in the module's order."""
    parameters = dict(module.named_parameters())  # a tied weight has one name here
    for path, layer in module.named_modules():
        for weight in weights_of(layer):
            name = f"{path}.{weight}" if path else weight
            if name in parameters:
                yield name, layer


def find_prunable(module: nn.Module, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Names of the weights to prune, in the module's order: by default those in its transformer blocks.

    Weights that choose experts are never among them.

    Args:
        module: The model.
        include: Shell-style patterns; if there are any, they choose among all linear layers and experts instead.
        exclude: Shell-style patterns of weights not to prune.

    Raises:
        ValueError: A pattern matches nothing.
    """
    names = [name for name, _ in named_weights(module)]
    require_matches("include", include, names)
    require_matches("exclude", exclude, [name for name, _ in module.named_parameters()])
    if include:
        chosen = match_names(names, include)
    else:
        chosen = set(names) & block_parameters(module) - match_names(names, STATE_SPACE)
    chosen -= match_names(names, (*ROUTERS, *exclude))
    return tuple(name for name in names if name in chosen)


def require_matches(key: str, patterns: Iterable[str], names: list[str]) -> None:
    """Check that each pattern matches a name.

    Raises:
        ValueError: One does not; the message has the names that are nearest to it.
    """
    for pattern in patterns:
        if not match_names(names, [pattern]):
            nearest = ", ".join(nearest_names(pattern, names))
            kind = "weight of a linear layer or of experts" if key == "include" else "parameter"
            raise ValueError(f"{key}: {pattern!r} matches no {kind}; the nearest are {nearest or 'none at all'}")


def nearest_names(pattern: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The names, with * for numbers, whose parts are most like the words of a pattern."""
    words = re.findall(r"\w+", pattern)

    def likeness(name: str) -> float:
        parts = name.split(".")
        return sum(max(SequenceMatcher(None, word, part).ratio() for part in parts) for word in words)

    return sorted({name_pattern(name) for name in names}, key=lambda name: (-likeness(name), name))[:count]


def name_pattern(name: str) -> str:
    """A parameter's name with * in place of the numbers of layers: the pattern of all that differ in these only."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is linear: nn.Linear, or transformers' Conv1D."""
    return isinstance(layer, nn.Linear) or is_conv1d(layer)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D, whose weight is [n_in, n_out], as in GPT-2."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer holds its weights as [n_in, n_out], or those of experts as [n, n_in, n_out]."""
    stated = getattr(layer, "is_transposed", type(layer).__name__ in TRANSPOSED_EXPERTS)
    return is_conv1d(layer) or bool(stated)


def transposed_weights(module: nn.Module) -> frozenset[str]:
    """Names of the weights that the module holds as [n_in, n_out]."""
    return frozenset(name for name, layer in named_weights(module) if is_transposed(layer))


def matrices(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The weights of these names as [n_out, n_in], views of the module's parameters.

    The weights of a layer's experts are one stack of matrices, [n_experts, n_out, n_in].
    """
    weights, transposed = {name: module.get_parameter(name).detach() for name in names}, transposed_weights(module)
    return {name: weight.mT if name in transposed else weight for name, weight in weights.items()}


def to_module_layout(module: nn.Module, mask: Mask) -> Mask:
    """A mask of [n_out, n_in] matrices in the layout of the module's weights."""
    transposed = transposed_weights(module)
    return {name: bits.mT.contiguous() if name in transposed else bits for name, bits in mask.items()}


def fused_parameters(module: nn.Module) -> dict[str, int]:
    """Sizes of the block parameters, by name, that hold several matrices in a form that cannot be pruned.

    They have three dimensions or more, and are neither experts nor kernels of convolutions.
    """
    inside, prunable = block_parameters(module), {name for name, _ in named_weights(module)}
    return {
        name: parameter.numel()
        for name, parameter in module.named_parameters()
        if name in inside - prunable and parameter.dim() > 2 and not is_convolution(module, name)
    }


def is_convolution(module: nn.Module, name: str) -> bool:
    """Whether a parameter is the kernel of one of torch's convolutions."""
    return isinstance(module.get_submodule(name.rpartition(".")[0]), (nn.Conv1d, nn.Conv2d, nn.Conv3d))


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
