"""Mixtures of experts, state spaces, mixed blocks and towers of other modalities: what is pruned of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from support.builders import SIZE, refused, tiny_context, tiny_snapshot
from torch import nn
from transformers import AutoConfig

import raymask
from raymask.core.masking.allocations import ALLOCATIONS
from raymask.core.masking.masks import DEFAULT_METHOD, draw_mask, matrix_shapes, max_kept, split_stacks, unpack_bits
from raymask.core.masking.noise import Noise
from raymask.core.masking.patterns import parse_pattern
from raymask.core.recipe import deterministic_candidate, finetune_config, resolve
from raymask.core.spec import Model
from raymask.core.tasks import FinetuneTask
from raymask.train.context import WorkerContext
from raymask.train.model import build_model, inspect_model
from raymask.train.prunable import block_parameters, find_prunable, matrices, name_pattern, transposed_weights
from raymask.train.worker import Worker

SHARED = SIZE | {"vocab_size": 72, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 3}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2, "num_key_value_heads": 1},
    "qwen2_moe": {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 1,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 16,
    },
    "phimoe": {"num_local_experts": 3, "num_experts_per_tok": 2, "num_key_value_heads": 1},
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2, "num_key_value_heads": 1, "head_dim": 8},
}


@cache
def decoder(family: str) -> nn.Module:
    """A tiny decoder with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_model(AutoConfig.for_model(family, **SHARED | EXPERTS[family]), kind="causal-lm").eval()


def patterns_of(names: Any) -> set[str]:
    return {name_pattern(name).partition("*.")[2] for name in names}


ATTENTION = {f"self_attn.{part}_proj.weight" for part in "qkvo"}
STACKED = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
SHARED_EXPERT = {f"mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("mixtral", ATTENTION | STACKED),
        ("phimoe", ATTENTION | STACKED),
        ("gpt_oss", ATTENTION | STACKED),
        ("qwen2_moe", ATTENTION | STACKED | SHARED_EXPERT),
    ],
)
def test_experts_are_pruned_and_what_chooses_them_is_not(family: str, expected: set[str]) -> None:
    module = decoder(family)
    assert patterns_of(find_prunable(module)) == expected
    everything = find_prunable(module, ("*",))
    assert not any("router" in name or ".gate." in name or "expert_gate" in name for name in everything)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize(
    ("allocation", "pattern"),
    [*((name, "unstructured") for name in ALLOCATIONS), ("uniform", "n:4"), ("uniform", "4x2")],
)
def test_each_expert_is_a_matrix_of_its_own(family: str, seed: int | None, allocation: str, pattern: str) -> None:
    module = decoder(family)
    weights = matrices(module, find_prunable(module))
    noise = None if seed is None else Noise(exponent=5.0, sampling_ratio=0.01)
    method = replace(DEFAULT_METHOD, allocation=ALLOCATIONS[allocation], pattern=parse_pattern(pattern))
    whole, single = (
        draw_mask(tensors, 0.25, seed=seed or 0, noise=noise, method=method)
        for tensors in (weights, split_stacks(weights))
    )
    for name, kept in split_stacks(whole).items():
        assert torch.equal(kept, single[name])
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    budgets = max_kept(shapes, 0.25, method)
    assert sum(budgets.values()) == sum(int(kept.sum()) for kept in whole.values())


def test_experts_that_hold_their_weights_transposed_are_seen_as_others() -> None:
    module = decoder("gpt_oss")
    experts = [name for name in find_prunable(module) if "experts" in name]
    assert transposed_weights(module) == set(experts)
    mask = raymask.draw_mask(module, 0.25, pattern="n:4")
    for name in experts:
        parameter = module.get_parameter(name)
        assert mask[name].shape == parameter.shape
        assert (mask[name].unflatten(1, (-1, 4)).sum(2) == 1).all()  # [n, n_in, n_out]: along the inputs
    raymask.apply_mask(module, {name: torch.ones_like(kept) for name, kept in mask.items()})


def test_pruned_experts_stay_zero_in_training() -> None:
    base = tiny_context("llama")
    info = inspect_model(
        Model(name="mixtral"), AutoConfig.for_model("mixtral", **SHARED | EXPERTS["mixtral"]), (), "causal-lm"
    )
    context = WorkerContext(base.spec, info, base.data)
    candidate = deterministic_candidate(resolve(base.spec), 2)
    config = finetune_config(resolve(base.spec), 2).model_copy(update={"epochs": 0.5})
    checkpoint = Worker(context, "cpu").finetune(tiny_snapshot(context), FinetuneTask("experts", candidate, config))
    assert checkpoint is not None
    for name, kept in unpack_bits(checkpoint.mask).items():
        weight = checkpoint.weights.views()[name]
        assert not weight[~kept].any()
        assert {int(count) for count in kept.flatten(-2).sum(-1).reshape(-1)} == {kept.flatten(-2).shape[-1] // 4}


def test_the_matrices_of_a_stack_are_counted_one_by_one() -> None:
    assert matrix_shapes({"a": (4, 2), "b": (3, 5, 6)}) == {"a": (4, 2)} | {f"b[{i}]": (5, 6) for i in range(3)}


# State spaces, mixed blocks, towers.


def built(family: str, kind: str = "causal-lm", **changes: Any) -> nn.Module:
    with torch.device("meta"):
        return build_model(AutoConfig.for_model(family, **changes), kind=kind)


def test_the_small_projections_of_a_state_space_are_left_out_unless_named() -> None:
    module = built("mamba", hidden_size=16, num_hidden_layers=2, vocab_size=72)
    assert patterns_of(find_prunable(module)) == {"mixer.in_proj.weight", "mixer.out_proj.weight"}
    assert "mixer.x_proj.weight" in patterns_of(find_prunable(module, ("*_proj.weight",)))


def test_layers_that_take_turns_are_blocks() -> None:
    small = SIZE | {"num_hidden_layers": 3, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2}
    module = built("jamba", vocab_size=72, num_key_value_heads=1, expert_layer_period=2, expert_layer_offset=1, **small)
    found = patterns_of(find_prunable(module))
    assert {"mamba.in_proj.weight", "self_attn.q_proj.weight", "feed_forward.experts.down_proj"} <= found
    assert not {name for name in found if "x_proj" in name or "dt_proj" in name or "router" in name}


def test_the_tower_for_images_of_a_text_model_is_not_pruned() -> None:
    text = SIZE | {"vocab_size": 72, "num_key_value_heads": 1, "head_dim": 8}
    module = built("gemma3", "classification", text_config=text, vision_config=SIZE | {"image_size": 28})
    assert find_prunable(module)
    assert not any("vision" in name for name in (*find_prunable(module), *block_parameters(module)))
    assert any("vision" in name for name in find_prunable(module, ("*vision_tower*",)))


def test_lists_of_single_layers_are_no_blocks() -> None:
    module = nn.ModuleDict({"projections": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    assert find_prunable(module) == ()


def test_a_model_for_images_alone_is_pruned_as_before() -> None:
    from transformers import ViTConfig, ViTModel

    with torch.device("meta"):
        assert len(find_prunable(ViTModel(ViTConfig(**SIZE)))) == 12


def test_attention_in_one_block_of_numbers_is_refused() -> None:
    config = AutoConfig.for_model("xlnet", d_model=16, n_layer=2, n_head=2, d_inner=32, vocab_size=72)
    message = refused(inspect_model, Model(name="some/xlnet"), config, ("bad", "good"))
    assert message.startswith("model.name: some/xlnet holds ")
    assert (
        "in parameters of three dimensions, such as transformer.layer.0.rel_attn.q, which raymask does not" in message
    )
    inspect_model(Model(name="some/xlnet", include=("*",)), config, ("bad", "good"))


# Patterns that match nothing.


@pytest.mark.parametrize(
    ("key", "pattern", "message"),
    [
        (
            "include",
            "*.q_prj.*",
            "matches no weight of a linear layer or of experts; the nearest are model.layers.*.self_attn.q_proj.weight",
        ),
        ("exclude", "*.gate_up_prj", "matches no parameter; the nearest are model.layers.*.mlp.experts.gate_up_proj, "),
        ("include", "*norm*", "matches no weight of a linear layer"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_names(key: str, pattern: str, message: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: find_prunable(decoder("mixtral"), **{key: (pattern,)}),
        lambda: raymask.draw_mask(decoder("mixtral"), 0.5, **{key: [pattern]}),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=key) as raised:
            call()
        assert str(raised.value).startswith(f"{key}: {pattern!r} {message}")
