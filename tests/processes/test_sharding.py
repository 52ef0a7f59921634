"""FSDP: a model that is sharded among two processes is the model of one process."""

import os
from collections import defaultdict
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.builders import FAMILIES, SIZE, refused, tiny_config, tiny_context, tiny_snapshot, tiny_tokenizer
from support.ranks import forks
from torch import nn

from raymask.core import seeds, tensors
from raymask.core.masking import masks
from raymask.core.masking.allocations import ALLOCATIONS
from raymask.core.masking.masks import PruningMethod
from raymask.core.masking.noise import Noise
from raymask.core.masking.patterns import parse_pattern
from raymask.core.recipe import early_eval_config, propose_candidates, resolve
from raymask.core.seeds import derive
from raymask.core.spec import Model
from raymask.core.tasks import EvalTask
from raymask.train import batches, optim, trainer
from raymask.train.fsdp import (
    apply_fsdp,
    copy_into_shards,
    draw_sharded_mask,
    gather_full,
    init_empty_weights,
    like_parameter,
    local_rows,
    local_tensor,
)
from raymask.train.model import build_model, inspect_model, state_tensors
from raymask.train.worker import Worker

RANKS = 2
MINUTE = timedelta(minutes=1)
MAGNITUDE = {"density": 0.25, "seed": 5}
RANDOM = MAGNITUDE | {"noise": Noise(exponent=5.0, sampling_ratio=0.01)}
OPTIMIZERS = {"adamw": (torch.optim.AdamW, {"fused": True})}


def meet(rank, port):
    """Make this process one of the ranks."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, timeout=MINUTE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=MINUTE)


def on_rank(check, arguments):
    return check(dist.init_device_mesh("cpu", (RANKS,)), *arguments)


@pytest.fixture(scope="module")
def together():
    """A function (check, *arguments) -> what `check(mesh, *arguments)` returns in each of two processes, by rank."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [ProcessPoolExecutor(1, forks(), meet, (rank, store.port)) for rank in range(RANKS)]

    def run(check, *arguments):
        work = [rank.submit(on_rank, check, arguments) for rank in ranks]
        done, _ = wait(work, return_when=FIRST_EXCEPTION)
        for finished in done:
            finished.result()  # the error itself, rather than that of the rank which waits for it in vain
        return [each.result() for each in work]

    yield run
    for rank in ranks:
        rank.shutdown()


# The models: a decoder with rotary buffers and a head of one row, one with a tied head, and two encoders, of which one
# uses its only block twice. 51 words: two ranks do not have as many rows.


def configured(kind, **changes):
    from transformers import AutoConfig

    changes = {"vocab_size": 51, "num_labels": 1} | changes
    if kind in FAMILIES:
        return tiny_config(kind, **changes)
    tied = {"tie_word_embeddings": kind == "qwen2", "num_key_value_heads": 1, "initializer_range": 0.2}
    return AutoConfig.for_model(kind, **SIZE | changes | tied | {"pad_token_id": 0, "max_position_embeddings": 72})


def built(kind):
    from transformers import AutoModelForCausalLM

    if kind == "qwen2":
        return AutoModelForCausalLM.from_config(configured(kind), dtype=torch.float32).eval()
    return build_model(configured(kind)).eval()


KINDS = ("llama", "qwen2", "bert", "albert")


def whole(kind, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return built(kind)


def on_mesh(mesh, kind, packed, computes=None):
    """The same on a mesh, with these weights."""
    with init_empty_weights():
        module = built(kind)
    assert all(parameter.is_meta for parameter in module.parameters())
    apply_fsdp(module, mesh, computes)
    copy_into_shards(packed, state_tensors(module))
    return module


def inputs():
    ids = torch.randint(1, 51, (6, 9), generator=torch.Generator().manual_seed(3))
    attended = torch.ones_like(ids)
    attended[::3, 7:] = 0
    return {"input_ids": ids, "attention_mask": attended}


def loss_of(module, rows):
    """A part of a loss over six rows."""
    logits = module(**{name: tensor[rows] for name, tensor in inputs().items()}).logits
    return logits.float().square().sum() / 6


def close(found, expected, share=1e-5):
    """Whether packed tensors differ by at most a share of the largest entry of their kind, `kind/name` or none."""
    ours, theirs = found.views(), expected.views()
    assert found.index == expected.index
    largest, worst = defaultdict(float), defaultdict(float)
    for name, view in theirs.items():
        kind, _, rest = name.partition("/")
        kind = kind if rest else ""
        largest[kind] = max(largest[kind], float(view.abs().max()))
        worst[kind] = max(worst[kind], float((ours[name] - view).abs().max()))
    return all(worst[kind] <= share * largest[kind] for kind in largest)


# Rows.


@given(st.integers(0, 13), st.integers(1, 9))
def test_parts_are_as_torch_chunks_them(rows, ranks):
    tensor = torch.arange(rows * 2).view(rows, 2)

    def seen_by(rank):
        return SimpleNamespace(device_mesh=SimpleNamespace(size=lambda: ranks, get_local_rank=lambda: rank))

    parts = [local_rows(tensor, seen_by(rank)) for rank in range(ranks)]
    assert torch.equal(torch.cat(parts), tensor)
    expected = [chunk for chunk in tensor.chunk(ranks) if len(chunk)]
    assert [found.tolist() for found in parts if len(found)] == [chunk.tolist() for chunk in expected]


def test_what_is_not_cut_is_loaded_gathered_and_drawn_as_ever(gaussian):
    live = {"w": gaussian(8, 16), "b": gaussian(3), "n": torch.tensor(7)}
    packed = tensors.pack(live)
    gathered = gather_full(live, here=True)
    assert gathered.index == packed.index
    assert gathered.buffer.tobytes() == packed.buffer.tobytes()
    target = {name: torch.zeros_like(tensor) for name, tensor in live.items()}
    copy_into_shards(packed, target)
    assert all(torch.equal(target[name], live[name]) for name in live)
    assert torch.equal(like_parameter(live["w"], live["b"]), live["b"])
    mask, bits = draw_sharded_mask({"w": live["w"]}, live, **RANDOM)
    expected = masks.draw_mask({"w": live["w"]}, **RANDOM)
    assert torch.equal(mask["w"], expected["w"])
    assert masks.digest(bits) == masks.digest(masks.pack_bits(expected))


def test_draws_from_the_same_weights_share_what_is_prepared(gaussian):
    live, cache = {"w": gaussian(8, 16), "v": gaussian(8, 16)}, {}
    for seed in (1, 2):
        draw_sharded_mask(live, live, **RANDOM | {"seed": seed}, sampler_cache=cache)
    assert len(cache) == len(live)


# Parameters without memory.


@pytest.mark.parametrize("kind", KINDS)
def test_only_parameters_are_without_memory_and_only_there(kind):
    module = whole(kind)
    with init_empty_weights():
        empty = built(kind)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert [(name, p.shape) for name, p in empty.named_parameters()] == [
        (name, p.shape) for name, p in module.named_parameters()
    ]
    buffers = dict(empty.named_buffers())
    assert list(buffers) == [name for name, _ in module.named_buffers()]
    assert all(torch.equal(buffers[name], buffer) for name, buffer in module.named_buffers())
    assert not nn.Linear(2, 2).weight.is_meta


def test_an_error_on_the_way_leaves_nothing_behind():
    with pytest.raises(ZeroDivisionError), init_empty_weights():
        1 / 0  # noqa: B018
    assert not nn.Linear(2, 2).weight.is_meta


# Weights.


def there_and_back(mesh, kind, packed):
    live = state_tensors(on_mesh(mesh, kind, packed))
    gathered = gather_full(live, here=mesh.get_rank() == 0)
    return gathered, {name: tuple(local_tensor(tensor).shape) for name, tensor in live.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_gathered_is_what_was_loaded_and_no_rank_has_it_all(together, kind):
    module = whole(kind)
    packed = tensors.pack(state_tensors(module))
    (gathered, first), (nothing, second) = together(there_and_back, kind, packed)
    assert gathered.index == packed.index
    assert gathered.buffer.tobytes() == packed.buffer.tobytes()
    assert nothing is None
    for name, parameter in module.named_parameters():
        rows = len(parameter)
        assert first[name] == (-(-rows // 2), *parameter.shape[1:])
        assert second[name] == (rows // 2, *parameter.shape[1:])


def outputs(mesh, kind, before, after):
    module = on_mesh(mesh, kind, before)
    live = state_tensors(module)
    with torch.no_grad():
        module(**inputs())
        copy_into_shards(after, live)
        return module(**inputs()).logits.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_weights_loaded_last(together, kind):
    before, after = whole(kind), whole(kind, seed=1)
    with torch.no_grad():
        expected = after(**inputs()).logits.numpy()
    found = together(outputs, kind, tensors.pack(state_tensors(before)), tensors.pack(state_tensors(after)))
    for logits in found:
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


# Gradients.


def gradients(mesh, kind, packed, computes, parts):
    module = on_mesh(mesh, kind, packed, computes)
    for first in range(parts):
        loss_of(module, slice(mesh.get_rank() * parts + first, None, RANKS * parts)).backward()
    return gather_full({name: p.grad for name, p in module.named_parameters()}, here=mesh.get_rank() == 0)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_summed_over_ranks_and_over_what_each_does_one_after_the_other(together, kind, parts):
    module = whole(kind)
    loss_of(module, slice(None)).backward()
    expected = tensors.pack({name: parameter.grad for name, parameter in module.named_parameters()})
    found, _ = together(gradients, kind, tensors.pack(state_tensors(module)), None, parts)
    assert close(found, expected)


def test_in_bf16_products_are_rounded_and_sums_of_gradients_are_not(together):
    module = whole("llama")
    packed = tensors.pack(state_tensors(module))
    loss_of(module, slice(None)).backward()
    expected = tensors.pack({name: parameter.grad for name, parameter in module.named_parameters()})
    found, _ = together(gradients, "llama", packed, torch.bfloat16, 1)
    assert close(found, expected, 0.1)
    assert not close(found, expected, 1e-4)
    summed = found.views()["model.layers.0.mlp.up_proj.weight"]
    assert summed.dtype == torch.float32
    assert not torch.equal(summed, summed.bfloat16().float())


# Masks.


def masked(mesh, kind, packed, names, arguments, method):
    live = state_tensors(on_mesh(mesh, kind, packed))
    views = packed.views()
    mask, bits = draw_sharded_mask({name: views[name] for name in names}, live, **arguments, method=method)
    assert all(rows.untyped_storage().nbytes() == rows.numel() for rows in mask.values())  # holds on to no more
    trainer.apply_masks([local_tensor(live[name]) for name in names], [mask[name].float() for name in names])
    return bits, gather_full(live, here=mesh.get_rank() == 0)


@pytest.mark.parametrize("arguments", [MAGNITUDE, RANDOM], ids=["magnitude mask", "random"])
@pytest.mark.parametrize(("allocation", "pattern"), [("uniform", "unstructured"), ("global", "4x1"), ("erk", "2x2")])
def test_all_ranks_draw_the_mask_of_one_and_apply_their_rows_of_it(together, arguments, allocation, pattern):
    module = whole("llama")
    weights = {name: p.detach() for name, p in module.named_parameters() if p.ndim == 2 and "layers" in name}
    packed = tensors.pack(state_tensors(module))
    method = PruningMethod(allocation=ALLOCATIONS[allocation], pattern=parse_pattern(pattern))
    expected = masks.draw_mask(weights, **arguments, method=method)
    (bits, gathered), (same, _) = together(masked, "llama", packed, tuple(weights), arguments, method)
    assert masks.digest(bits) == masks.digest(same) == masks.digest(masks.pack_bits(expected))
    masks.apply(weights, expected)
    assert gathered.buffer.tobytes() == tensors.pack(state_tensors(module)).buffer.tobytes()


# Optimizers.


def stepped(module, optimizer, steps, rows):
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * step
        loss_of(module, rows).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def state_of(module, optimizer):
    """Flat, as a snapshot has it."""
    return {
        f"{moment}/{name}": value
        for name, parameter in module.named_parameters()
        for moment, value in optimizer.state[parameter].items()
    }


def optimized(mesh, kind, packed, name, pause):
    """Weights and state after four steps; with a `pause`, on another module and optimizer from there."""
    cls, settings = OPTIMIZERS[name]
    rows = slice(mesh.get_rank(), None, RANKS)
    module = on_mesh(mesh, kind, packed)
    optimizer = cls(module.parameters(), weight_decay=0.1, **settings)
    if pause:
        stepped(module, optimizer, (1, 2), rows)
        weights, state = (gather_full(kept, here=True) for kept in (state_tensors(module), state_of(module, optimizer)))
        module = on_mesh(mesh, kind, weights)
        optimizer = cls(module.parameters(), weight_decay=0.1, **settings)
        for key, value in state.views().items():
            moment, _, of = key.partition("/")
            parameter = module.get_parameter(of)
            optimizer.state[parameter][moment] = like_parameter(parameter, value)
    stepped(module, optimizer, (3, 4) if pause else (1, 2, 3, 4), rows)
    return [
        gather_full(kept, here=mesh.get_rank() == 0) for kept in (state_tensors(module), state_of(module, optimizer))
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_optimizers_step_as_on_one_process_and_go_on_from_where_they_paused(together, kind, name):
    module = whole(kind)
    packed = tensors.pack(state_tensors(module))
    straight, _ = together(optimized, kind, packed, name, False)
    resumed, _ = together(optimized, kind, packed, name, True)
    for found, again in zip(straight, resumed, strict=True):
        assert found.index == again.index
        assert found.buffer.tobytes() == again.buffer.tobytes()
    cls, settings = OPTIMIZERS[name]
    optimizer = cls(module.parameters(), weight_decay=0.1, **settings)
    stepped(module, optimizer, (1, 2, 3, 4), slice(None))
    assert close(straight[0], tensors.pack(state_tensors(module)), 1e-4)
    assert close(straight[1], tensors.pack(state_of(module, optimizer)), 1e-4)


# An early evaluation.


def evaluated(mesh, job, parent, candidate):
    """What Worker.evaluate does, with each rank at its rows of a batch."""
    spec, data, rank = job.spec, job.data, mesh.get_rank()
    with init_empty_weights():
        module = build_model(job.config).eval()
    apply_fsdp(module, mesh)
    live = state_tensors(module)
    copy_into_shards(parent.weights, live)
    views, method = parent.weights.views(), resolve(spec).method
    weights = {name: views[name] for name in job.model.prunable}
    arguments = {"density": candidate.density, "seed": candidate.seed, "method": method}
    mask, bits = draw_sharded_mask(weights, live, **arguments, noise=candidate.noise)
    _, magnitude_bits = draw_sharded_mask(weights, live, **arguments)

    optimizer = optim.make_optimizer(module, spec.optimizer, None)
    pruned, factors = [local_tensor(live[name]) for name in mask], [kept.float() for kept in mask.values()]
    stage, seed = early_eval_config(spec), derive(spec.seed, seeds.EARLY_EVAL, candidate.level)
    total = trainer.num_steps(stage, len(data.train))
    rng = np.random.default_rng(derive(seed, seeds.ORDER, 0))
    order = batches.length_bucketed_batches(data.train.lengths, stage.batch_size, rng)
    trainer.apply_masks(pruned, factors)
    module.train()
    for step, chosen in enumerate(islice(order, total), 1):
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * optim.lr_multiplier(stage, step, total)
        batch = batches.collate(data.train, chosen[rank::RANKS], data.padding)
        labels = batch.pop("labels")
        loss = F.cross_entropy(module(**batch).logits, labels, reduction="sum") / len(chosen)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), spec.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        trainer.apply_masks(pruned, factors)
    batch = batches.collate(job.scored_rows, np.arange(len(job.scored_rows)), data.padding)
    labels = batch.pop("labels")
    with torch.no_grad():
        score = -float(F.cross_entropy(module.eval()(**batch).logits, labels))
    return score, masks.digest(bits), masks.distance(bits, magnitude_bits), gather_full(live, here=rank == 0)


def test_an_early_evaluation_on_two_ranks_scores_as_on_one(together):
    job, tokenizer = tiny_context("roberta", early_eval={"score_window": 1}), tiny_tokenizer("roberta")
    config = configured("llama", vocab_size=len(tokenizer))
    source = inspect_model(Model(name="llama"), config, ("bad", "good"))
    job = replace(job, model=source)
    parent, candidate = tiny_snapshot(job), propose_candidates(resolve(job.spec), 1)[1]
    worker = Worker(job, "cpu")
    expected, _ = worker.evaluate(parent, EvalTask(candidate))
    assert expected.ok, expected.error
    (score, digest, distance, weights), (same, *_) = together(evaluated, job, parent, candidate)
    assert score == same == pytest.approx(expected.score, rel=1e-5)
    assert digest == expected.digest
    assert distance == expected.distance
    assert close(weights, tensors.pack(worker.named_tensors))


def test_a_torch_that_is_too_old_for_a_model_in_parts_is_named(monkeypatch):
    from torch.distributed.fsdp import FSDPModule

    monkeypatch.delattr(FSDPModule, "set_force_sum_reduction_for_comms")
    assert "use torch 2.9 or newer, or set workers.fsdp to 1" in refused(apply_fsdp, nn.Linear(2, 2), SimpleNamespace())
