"""Removal of dead neurons and attention heads."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from raymask.core.errors import UserError
from raymask.train.prunable import transformer_blocks


@dataclass(frozen=True)
class Layout:
    """Dotted names of the layers of a block that can become narrower.

    The number of heads is not stored: the attention derives it from the width of its layers.

    Attributes:
        queries: Attention's query projection.
        keys: Attention's key projection.
        values: Attention's value projection.
        attn_out: Attention's output projection.
        ffn_up: First layer of the feed-forward network.
        activation: Its activation function.
        ffn_down: Second layer of the feed-forward network.
    """

    queries: str
    keys: str
    values: str
    attn_out: str
    ffn_up: str
    activation: str
    ffn_down: str


BERT = Layout(
    queries="attention.self.query",
    keys="attention.self.key",
    values="attention.self.value",
    attn_out="attention.output.dense",
    ffn_up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    ffn_down="output.dense",
)
DISTILBERT = Layout(
    queries="attention.q_lin",
    keys="attention.k_lin",
    values="attention.v_lin",
    attn_out="attention.out_lin",
    ffn_up="ffn.lin1",
    activation="ffn.activation",
    ffn_down="ffn.lin2",
)
LAYOUTS = {"bert": BERT, "roberta": BERT, "xlm-roberta": BERT, "electra": BERT, "distilbert": DISTILBERT}
"""Layouts by a configuration's `model_type`."""


@dataclass(frozen=True)
class Removed:
    """What was removed: pairs of the number removed and the number there was.

    Attributes:
        neurons: Neurons of the feed-forward networks.
        heads: Attention heads.
        parameters: Parameters of the model.
    """

    neurons: tuple[int, int]
    heads: tuple[int, int]
    parameters: tuple[int, int]

    def __str__(self) -> str:
        named = (("neurons", self.neurons), ("attention heads", self.heads), ("parameters", self.parameters))
        return ", ".join(f"{removed:,} of {count:,} {name}" for name, (removed, count) in named)


@torch.no_grad()
def shrink(module: Any) -> tuple[Any, Removed]:
    """Copy a model without its dead neurons and attention heads; outputs stay the same up to rounding.

    Dead units are those whose output is constant (it is folded into the next layer's bias) and those whose output no
    remaining weight reads. At least one neuron and one head of a block stay. Afterwards widths differ from block to
    block, which no transformers configuration can describe.

    Args:
        module: A transformers model of a type in LAYOUTS.

    Returns:
        The copy, and what was removed.

    Raises:
        UserError: For a model of another type.
    """
    config = module.config
    if config.model_type not in LAYOUTS:
        raise UserError(f"--shrink: supports {', '.join(LAYOUTS)}, not {config.model_type}; leave out --shrink")
    layout, small = LAYOUTS[config.model_type], copy.deepcopy(module)
    size = config.hidden_size // config.num_attention_heads
    neurons, heads = [], []
    for block in (block for layers in transformer_blocks(small).values() for block in layers):
        queries, keys, values, attn_out = attrgetter(layout.queries, layout.keys, layout.values, layout.attn_out)(block)
        ffn_up, activation, ffn_down = attrgetter(layout.ffn_up, layout.activation, layout.ffn_down)(block)
        # attention weights sum to 1: a head whose values are constant returns that constant
        heads.append(remove_units([values, keys, queries], attn_out, values.bias, size))
        neurons.append(remove_units([ffn_up], ffn_down, activation(ffn_up.bias), 1))
    before, after = (sum(parameter.numel() for parameter in model.parameters()) for model in (module, small))
    return small, Removed(total(neurons), total(heads), (before - after, before))


def remove_units(inner: Sequence[nn.Linear], outer: nn.Linear, constants: Tensor, size: int) -> tuple[int, int]:
    """Remove the dead units between layers, in place.

    Args:
        inner: Layers whose rows are the units' weights; a unit is constant when its rows in `inner[0]` are zero.
        outer: The layer that reads the units: its columns.
        constants: What `outer` reads from a constant unit, `[units * size]`.
        size: Rows per unit.

    Returns:
        The number of removed units, and of all units.
    """
    constant, unread = (inner[0].weight == 0).all(1), (outer.weight == 0).all(0)
    dead = (constant | unread).view(-1, size).all(1)
    if dead.all():
        dead[0] = False
    removed = dead.repeat_interleave(size)
    outer.bias.add_(outer.weight[:, removed].double() @ constants[removed].double())
    for layer in inner:
        layer.weight = nn.Parameter(layer.weight[~removed])
        layer.bias = nn.Parameter(layer.bias[~removed])
        layer.out_features = len(layer.weight)
    outer.weight = nn.Parameter(outer.weight[:, ~removed])
    outer.in_features = outer.weight.shape[1]
    return int(dead.sum()), len(dead)


def total(counts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The sums of the first and of the second numbers."""
    removed, existing = zip(*counts, strict=True)
    return sum(removed), sum(existing)
