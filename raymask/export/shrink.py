"""Which neurons and attention heads are dead, and what is the same model without them?"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from raymask.core.errors import UserError
from raymask.train.model import blocks


@dataclass(frozen=True)
class Layout:
    """Dotted names of what can become narrower in a block; its attention finds out by itself how many heads it has."""

    queries: str
    keys: str
    values: str
    mixed: str
    rising: str
    activation: str
    falling: str


BERT = Layout(
    queries="attention.self.query",
    keys="attention.self.key",
    values="attention.self.value",
    mixed="attention.output.dense",
    rising="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    falling="output.dense",
)
DISTILBERT = Layout(
    queries="attention.q_lin",
    keys="attention.k_lin",
    values="attention.v_lin",
    mixed="attention.out_lin",
    rising="ffn.lin1",
    activation="ffn.activation",
    falling="ffn.lin2",
)
LAYOUTS = {"bert": BERT, "roberta": BERT, "xlm-roberta": BERT, "electra": BERT, "distilbert": DISTILBERT}
"""By a configuration's model_type."""


@dataclass(frozen=True)
class Removed:
    """How many neurons, attention heads and parameters are gone, each of how many."""

    neurons: tuple[int, int]
    heads: tuple[int, int]
    parameters: tuple[int, int]

    def __str__(self) -> str:
        named = (("neurons", self.neurons), ("attention heads", self.heads), ("parameters", self.parameters))
        return ", ".join(f"{gone:,} of {there:,} {name}" for name, (gone, there) in named)


@torch.no_grad()
def shrink(module: Any) -> tuple[Any, Removed]:
    """A copy without dead neurons and heads, whose outputs are the same but for rounding, and what is gone.

    Dead is what says the same whatever goes in, which the next bias can say as well, or what nothing listens to. At
    least one neuron and one head of a block stay. Widths then differ from block to block, as no configuration has
    them. Raises UserError for a model that it does not know.
    """
    config = module.config
    if config.model_type not in LAYOUTS:
        raise UserError(f"--shrink: knows {', '.join(LAYOUTS)}, not {config.model_type}; leave it out")
    layout, small = LAYOUTS[config.model_type], copy.deepcopy(module)
    size = config.hidden_size // config.num_attention_heads
    neurons, heads = [], []
    for block in (block for layers in blocks(small).values() for block in layers):
        queries, keys, values, mixed = attrgetter(layout.queries, layout.keys, layout.values, layout.mixed)(block)
        rising, activation, falling = attrgetter(layout.rising, layout.activation, layout.falling)(block)
        # attention weights sum to 1: of values that are all the same comes that value
        heads.append(narrow([values, keys, queries], mixed, values.bias, size))
        neurons.append(narrow([rising], falling, activation(rising.bias), 1))
    before, after = (sum(each.numel() for each in model.parameters()) for model in (module, small))
    return small, Removed(total(neurons), total(heads), (before - after, before))


def narrow(inner: Sequence[nn.Linear], outer: nn.Linear, constants: Tensor, size: int) -> tuple[int, int]:
    """Take dead units of `size` out between layers, in place; returns how many of how many.

    Units are rows of all `inner` layers and columns of `outer`. `constants` (units * size,): what `outer` gets of a row
    that is zero in inner[0].
    """
    silent, unheard = (inner[0].weight == 0).all(1), (outer.weight == 0).all(0)
    dead = (silent | unheard).view(-1, size).all(1)
    if dead.all():
        dead[0] = False
    gone = dead.repeat_interleave(size)
    outer.bias.add_(outer.weight[:, gone].double() @ constants[gone].double())
    for layer in inner:
        layer.weight = nn.Parameter(layer.weight[~gone])
        layer.bias = nn.Parameter(layer.bias[~gone])
        layer.out_features = len(layer.weight)
    outer.weight = nn.Parameter(outer.weight[:, ~gone])
    outer.in_features = outer.weight.shape[1]
    return int(dead.sum()), len(dead)


def total(counts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    gone, there = zip(*counts, strict=True)
    return sum(gone), sum(there)
