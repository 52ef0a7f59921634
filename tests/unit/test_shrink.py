"""Removal of dead units: the same model, and none left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builders import refused, tiny_config
from torch import Tensor, nn

from raymask.export.shrink import LAYOUTS, Removed, remove_units, shrink
from raymask.train.model import build_model
from raymask.train.prunable import find_prunable, transformer_blocks

KNOWN = ["bert", "roberta", "distilbert", "electra"]


def random_module(family: str, seed: int = 0) -> Any:
    """Two blocks of two heads and 32 neurons, with biases that matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build_model(tiny_config(family)).eval()
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
    return module.requires_grad_(False)


def outputs(module: Any) -> Tensor:
    """Logits of rows of different lengths, float32 (4, classes)."""
    ids = torch.randint(4, 20, (4, 9), generator=torch.Generator().manual_seed(1))
    there = torch.arange(9) < torch.tensor([9, 3, 5, 1])[:, None]
    with torch.no_grad():
        logits: Tensor = module(input_ids=ids * there, attention_mask=there.long()).logits
    return logits


def linear(block: nn.Module, which: str, family: str) -> nn.Linear:
    found = block.get_submodule(getattr(LAYOUTS[family], which))
    assert isinstance(found, nn.Linear)
    return found


@pytest.mark.parametrize("family", KNOWN)
@given(seed=st.integers(0, 10**6), density=st.sampled_from([0.02, 0.1, 0.5]))
@settings(max_examples=10)
def test_outputs_stay_and_dead_units_go(family: str, seed: int, density: float) -> None:
    """What is dead is decided here by another definition: no path from a row's weights to a column's."""
    module = random_module(family, seed)
    rng = torch.Generator().manual_seed(seed)
    for name in find_prunable(module):
        weight = module.get_parameter(name)
        weight *= torch.rand(weight.shape, generator=rng) < density
    small, removed = shrink(module)
    assert torch.allclose(outputs(small), outputs(module), atol=1e-4)
    [before], [after] = transformer_blocks(module).values(), transformer_blocks(small).values()
    kept = 0
    for old, new in zip(before, after, strict=True):
        up, down = linear(old, "ffn_up", family).weight, linear(old, "ffn_down", family).weight
        alive = int((up.abs().sum(1) * down.abs().sum(0) > 0).sum())
        assert linear(new, "ffn_up", family).weight.shape == (max(alive, 1), 16)
        assert linear(new, "ffn_down", family).weight.shape == (16, max(alive, 1))
        kept += max(alive, 1)
        values, attn_out = linear(old, "values", family).weight, linear(old, "attn_out", family).weight
        heads = int(((values.abs().sum(1) * attn_out.abs().sum(0)).view(2, 8).sum(1) > 0).sum())
        for which in ("values", "keys", "queries"):
            assert linear(new, which, family).weight.shape == (8 * max(heads, 1), 16)
    assert removed.neurons == (64 - kept, 64)
    left = sum(parameter.numel() for parameter in small.parameters())
    assert removed.parameters[0] == removed.parameters[1] - left


def test_where_nothing_is_dead_nothing_changes() -> None:
    module = random_module("bert")
    small, removed = shrink(module)
    assert removed == Removed((0, 64), (0, 4), (0, sum(each.numel() for each in module.parameters())))
    for name, tensor in module.state_dict().items():
        assert torch.equal(small.state_dict()[name], tensor), name
    assert small is not module


@pytest.mark.parametrize("which", ["values", "attn_out", "ffn_up", "ffn_down"])
def test_of_a_block_that_is_all_dead_one_unit_stays(which: str) -> None:
    module = random_module("bert")
    [layers] = transformer_blocks(module).values()
    linear(layers[0], which, "bert").weight.zero_()
    small, removed = shrink(module)
    assert torch.allclose(outputs(small), outputs(module), atol=1e-5)
    attention = which in ("values", "attn_out")
    assert (removed.neurons[0], removed.heads[0]) == ((0, 1) if attention else (31, 0))
    assert str(removed).startswith("0 of 64 neurons, 1 of 4 att" if attention else "31 of 64 neurons, 0 of 4 att")


def test_the_original_stays_as_it_is() -> None:
    module = random_module("bert")
    [layers] = transformer_blocks(module).values()
    linear(layers[1], "ffn_up", "bert").weight[3:] = 0
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    shrink(module)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_unit_is_dead_only_when_all_of_it_is() -> None:
    """Of a head of two, one row is silent and the other unheard; of the next, one row is alive."""
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)
    with torch.no_grad():
        first.weight[[0, 2]] = 0
        second.weight[:, 1] = 0
        assert remove_units([first], second, first.bias, 2) == (1, 2)
    assert (first.out_features, second.in_features) == (2, 2)


def test_other_models_are_refused() -> None:
    said = "--shrink: supports bert, roberta, xlm-roberta, electra, distilbert, not albert; leave out --shrink"
    assert refused(shrink, random_module("albert")) == said
