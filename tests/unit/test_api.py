"""The Python API: masks in a training loop of one's own."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel

import raymask


@pytest.fixture
def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64))


def test_without_a_seed_it_is_the_magnitude_mask(bert: BertModel) -> None:
    mask = raymask.draw_mask(bert, 0.25)
    assert len(mask) == 12
    for name, kept in mask.items():
        weight = bert.get_parameter(name).detach().abs()
        assert int(kept.sum()) == weight.numel() // 4
        assert weight[kept].min() >= weight[~kept].max()


def test_a_seed_gives_a_random_mask_of_the_same_size_and_the_same_seed_the_same(bert: BertModel) -> None:
    magnitude, first, again, other = (raymask.draw_mask(bert, 0.25, seed=seed) for seed in (None, 7, 7, 8))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], magnitude[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert all(first[name].sum() == magnitude[name].sum() for name in first)


def test_what_was_pruned_never_comes_back(bert: BertModel) -> None:
    first = raymask.draw_mask(bert, 0.5, seed=1)
    raymask.apply_mask(bert, first)
    second = raymask.draw_mask(bert, 0.25, seed=2)
    assert all(bool((first[name] | ~second[name]).all()) for name in first)


def test_a_mask_holds_through_a_training_loop(bert: BertModel) -> None:
    mask = raymask.draw_mask(bert, 1 / 16, seed=3)
    raymask.apply_mask(bert, mask)
    optimizer = torch.optim.AdamW(bert.parameters(), lr=1e-2)
    for _ in range(3):
        bert(torch.randint(0, 100, (2, 8))).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        raymask.apply_mask(bert, mask)
    for name, kept in mask.items():
        weight = bert.get_parameter(name)
        assert torch.equal(weight != 0, kept)


def test_any_module_can_be_named_by_pattern() -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(ValueError, match=r"no matrix of the module can be pruned; name some with include"):
        raymask.draw_mask(module, 0.5)
    assert set(raymask.draw_mask(module, 0.5, include=["*.weight"])) == {"0.weight", "2.weight"}
    assert set(raymask.draw_mask(module, 0.5, include=["*.weight"], exclude=["2.*"])) == {"0.weight"}


def test_a_tied_weight_goes_by_one_name() -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50)
    mask = raymask.draw_mask(BertForMaskedLM(config), 0.5, include=["*.weight"])
    assert "cls.predictions.decoder.weight" not in mask
    assert "cls.predictions.transform.dense.weight" in mask


def test_a_mask_takes_the_pattern_and_allocation_of_a_spec(bert: BertModel) -> None:
    for kept in raymask.draw_mask(bert, 0.25, seed=1, pattern="n:4").values():
        assert bool((kept.view(-1, 4).sum(1) == 1).all())
    for kept in raymask.draw_mask(bert, 0.25, seed=1, pattern="8x1").values():
        assert set(kept.view(-1, 8, kept.shape[1]).sum(1).view(-1).tolist()) == {0, 8}
    shares = {
        name: float(kept.float().mean()) for name, kept in raymask.draw_mask(bert, 0.25, allocation="erk").items()
    }
    assert len({round(share, 2) for share in shares.values()}) == 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"pattern": "2:4"}, r"2:4 is written n:4"),
        ({"pattern": "n:4", "allocation": "erk"}, r"goes with uniform"),
        ({"pattern": "n:8", "density": 0.3}, r"keeps 2\.4 of each 8"),
        ({"pattern": "5x1"}, r"^5x1 does not divide encoder\.layer\.0\.attention\.self\.query\.weight of 32 x 32$"),
        ({"allocation": "all"}, r"no allocation is called 'all'"),
    ],
)
def test_a_mask_that_cannot_be_is_refused(bert: BertModel, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        raymask.draw_mask(bert, **{"density": 0.25} | asked)


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5, float("nan")])
def test_an_impossible_density_is_refused(bert: BertModel, density: float) -> None:
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\]"):
        raymask.draw_mask(bert, density)


def test_no_module_of_the_package_hides_a_public_name() -> None:
    modules = {module.name for module in pkgutil.iter_modules(raymask.__path__)}
    assert modules & set(raymask.__all__) == set()
    for module in pkgutil.walk_packages(raymask.__path__, "raymask."):
        importlib.import_module(module.name)
    assert callable(raymask.search)
    assert all(hasattr(raymask, name) for name in raymask.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'prune'"):
        raymask.prune  # noqa: B018 - the access is the test


def test_the_public_names_are_listed() -> None:
    assert dir(raymask) == sorted(raymask.__all__)


def test_a_seed_and_a_density_may_be_numpy_s(bert: BertModel) -> None:
    plain, other = raymask.draw_mask(bert, 0.25, seed=7), raymask.draw_mask(bert, np.float32(0.25), seed=np.int64(7))
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_a_mask_of_other_shapes_or_names_is_refused(bert: BertModel) -> None:
    name = "encoder.layer.0.attention.self.query.weight"
    with pytest.raises(ValueError, match=rf"^the mask of {name} has shape \(1, 32\), the parameter has \(32, 32\)$"):
        raymask.apply_mask(bert, {name: torch.ones(1, 32, dtype=torch.bool)})
    with pytest.raises(ValueError, match="the module has no parameter other: is the mask of another model, or packed"):
        raymask.apply_mask(bert, {"other": torch.ones(1, dtype=torch.bool)})
