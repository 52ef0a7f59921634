"""Several processes and one process: the same bits, whoever has which shards."""

from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.builders import tiny_context, tiny_snapshot
from support.ranks import forks

from raymask.core.masking import masks
from raymask.core.recipe import dense_config, finetune_config, propose_candidates, resolve
from raymask.core.tasks import EvalTask, FinetuneTask
from raymask.core.tensors import pack
from raymask.train import fsdp, trainer
from raymask.train.failures import SystemFailure
from raymask.train.process_group import (
    LOOPBACK,
    SINGLE_PROCESS,
    ProcessGroup,
    connect_process_group,
    open_rendezvous,
    tree_sum,
)
from raymask.train.worker import Worker

SHARDS = {"dense": {"epochs": 1, "batch_size": 16, "data_parallel": 4}, "finetune": {"data_parallel": 4}}


def balanced(parts):
    """The sum as a tree, by halves."""
    if len(parts) == 1:
        return parts[0]
    middle = len(parts) // 2
    return balanced(parts[:middle]) + balanced(parts[middle:])


def noise(count, entries, seed=0):
    """Numbers of very different size, whose sum depends on the order."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((count, entries)) * 10.0 ** rng.integers(-4, 5, (count, entries))
    return [torch.tensor(row, dtype=torch.float32) for row in values]


@given(st.integers(0, 5), st.integers(0, 20), st.integers(0, 99))
def test_parts_are_summed_as_a_balanced_tree(exponent, entries, seed):
    parts = noise(2**exponent, entries, seed)
    expected = balanced([part.clone() for part in parts])
    assert torch.equal(tree_sum(iter(parts)), expected)


@given(st.integers(0, 4), st.integers(0, 4))
def test_every_shard_has_one_owner_and_neighbours_belong_together(more, exponent):
    size, shards = 2**exponent, 2 ** (exponent + more)
    owned = [list(ProcessGroup(rank, size).local_shards(shards)) for rank in range(size)]
    assert np.concatenate(owned).tolist() == list(range(shards))
    assert {len(mine) for mine in owned} == {2**more}


def test_who_is_alone_has_everything_and_adds_nothing():
    values = torch.tensor([1.0, 2.0])
    SINGLE_PROCESS.all_reduce(values)
    assert values.tolist() == [1.0, 2.0]
    assert list(SINGLE_PROCESS.local_shards(4)) == [0, 1, 2, 3]
    assert SINGLE_PROCESS.all_gather_names("me", torch.device("cpu")) == ("me",)


def in_a_group(size, function, *arguments, sharded=False):
    """What `function(process group, *arguments)` returns in each of so many processes, by rank."""
    store, rendezvous = open_rendezvous(LOOPBACK)
    with ProcessPoolExecutor(size, forks()) as processes:
        ranks = [
            processes.submit(one_of_a_group, ProcessGroup(rank, size, sharded), rendezvous, function, arguments)
            for rank in range(size)
        ]
        found = [rank.result(timeout=120) for rank in ranks]
    del store
    return found


def one_of_a_group(member, rendezvous, function, arguments):
    torch.set_num_threads(1)
    return function(connect_process_group(member, rendezvous, torch.device("cpu")), *arguments)


def added_up(gathering, shards, sizes):
    """Sums of several lengths, as bytes, and all names."""
    with gathering as member:
        sums = []
        for entries in sizes:
            parts = noise(shards, entries)
            total = tree_sum(parts[shard] for shard in member.local_shards(shards))
            member.all_reduce(total)
            sums.append(total.numpy().tobytes())
        return sums, member.all_gather_names(f"worker {member.rank}", torch.device("cpu"))


def test_a_group_s_sum_is_that_of_one_process_to_the_bit():
    sizes = (0, 1, 2, 3, 5, 1000)
    expected = [balanced(noise(8, entries)).numpy().tobytes() for entries in sizes]
    for sums, names in in_a_group(4, added_up, 8, sizes):
        assert sums == expected
        assert names == tuple(f"worker {rank}" for rank in range(4))


# Training.


def finetune_tasks(job):
    recipe = resolve(job.spec)
    candidate = propose_candidates(recipe, 1)[1]
    unmasked = candidate.model_copy(update={"level": 0, "density": 1.0, "noise": None})
    return [
        FinetuneTask("dense", unmasked, dense_config(job.spec)),
        FinetuneTask("selected", candidate, finetune_config(recipe, 1)),
    ]


def fine_tuned(gathering, jobs):
    """What a worker finds, and the bits of its model and its mask afterwards."""
    found = []
    with gathering as member:
        for job in jobs:
            worker, snapshot = Worker(job, "cpu"), tiny_snapshot(job)
            for finetune_task in finetune_tasks(job):
                checkpoint = worker.finetune(snapshot, finetune_task, nullcontext(member))
                model = pack(worker.named_tensors).buffer.tobytes()
                found.append((checkpoint, model, masks.digest(worker.reset(snapshot, finetune_task.candidate)[1])))
    return found


def test_a_group_fine_tunes_to_the_bits_of_one_worker_and_all_draw_one_mask():
    """Batches of 16 rows, the last one of three; a split that is looked at in three batches."""
    jobs = [
        tiny_context(rows=(19, 300, 12), **SHARDS),
        tiny_context(rows=(19, 300, 12), distill=True, precision="bf16", **SHARDS),
    ]
    alone = fine_tuned(nullcontext(SINGLE_PROCESS), jobs)
    first, second = in_a_group(2, fine_tuned, jobs)
    for (expected, *bits), (checkpoint, *leader_s), helper in zip(alone, first, second, strict=True):
        assert leader_s == bits
        assert helper == (None, *bits)
        for mine, theirs in [(checkpoint.weights, expected.weights), (checkpoint.optimizer, expected.optimizer)]:
            assert np.array_equal(mine.buffer, theirs.buffer)
        assert np.array_equal(checkpoint.test_outputs, expected.test_outputs)
        assert (checkpoint.digest, checkpoint.num_kept) == (expected.digest, expected.num_kept)
        found = checkpoint.finetune_result
        assert (found.curve, found.best) == (expected.finetune_result.curve, expected.finetune_result.best)
        [helper_s_name] = found.helper_workers
        assert helper_s_name != found.worker


def gradients_of(shards, rows, seed=0, **settings):
    """Of one batch of so many rows cut into shards, without dropout, by one process."""
    job = tiny_context(rows=(rows, 16, 12), **settings)
    job.config.hidden_dropout_prob = job.config.attention_probs_dropout_prob = 0.0
    worker = Worker(job, "cpu")
    worker.reset(tiny_snapshot(job, seed), finetune_tasks(job)[0].candidate)
    seen = {}

    class Stop(torch.optim.SGD):
        def step(self, closure=None):
            seen.update({name: weight.grad.clone() for name, weight in worker.module.named_parameters()})

    one_step = {"epochs": 0.001, "data_parallel": shards, "batch_size": rows, "distill": job.spec.distill}
    stage = dense_config(job.spec).model_copy(update=one_step)
    teacher = worker.teacher_outputs(tiny_snapshot(job), stage, 0, 0, cache=False)
    optimizer = Stop(worker.module.parameters())
    list(worker.trainer.train(job.data.train, stage, optimizer, {}, seed=0, teacher=teacher))
    return seen


KINDS = [
    {},
    {"distill": True},
    {"regression": True},
    {"regression": True, "distill": True},
    {"family": "llama"},
    {"family": "llama", "distill": True},
]


@pytest.mark.parametrize(
    ("shards", "rows", "settings"),
    [*((4, 7, kind) for kind in KINDS), *((*cut, kind) for cut in [(2, 16), (8, 5)] for kind in KINDS[1::4])],
    ids=str,
)
def test_gradients_of_shards_add_up_to_those_of_the_batch(monkeypatch, shards, rows, settings):
    monkeypatch.setattr(trainer.nn.utils, "clip_grad_norm_", lambda *arguments: None)
    whole, parts = (gradients_of(count, rows, **settings) for count in (1, shards))
    assert max(float(gradient.abs().max()) for gradient in whole.values()) > 1e-3
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)


# A model in parts.


def in_parts(gathering, job):
    """What a worker with a shard of the model finds of a candidate, on both rungs, and of its fine-tuning."""
    with gathering as member:
        worker, snapshot = Worker(job, "cpu", group=member), tiny_snapshot(job)
        candidate = propose_candidates(resolve(job.spec), 1)[1]
        first, paused = worker.evaluate(snapshot, EvalTask(candidate, 0))
        second, _ = worker.evaluate(snapshot, EvalTask(candidate, 1))
        largest = max(tensor.numel() for tensor in fsdp.local_tensors(worker.named_tensors).values())
        return (
            first,
            paused,
            second,
            [worker.finetune(snapshot, finetune_task) for finetune_task in finetune_tasks(job)],
            largest,
        )


@pytest.mark.parametrize(("family", "settings"), [("bert", {"distill": True}), ("llama", {}), ("gpt2", {})])
def test_a_model_in_parts_is_scored_and_tuned_as_one_in_one_piece(family, settings):
    job = tiny_context(
        family, rows=(51, 300, 12), dense={"epochs": 1, "batch_size": 16}, early_eval={"rungs": [0.5, 1.0]}, **settings
    )
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(job.config, name, 0.0)
    expected = in_parts(nullcontext(SINGLE_PROCESS), job)
    first, second = in_a_group(2, in_parts, job, sharded=True)
    assert second[1] is None
    assert second[3] == [None, None]
    assert first[4] <= expected[4] / 2
    for mine, wanted in [(first[0], expected[0]), (first[2], expected[2])]:
        assert (mine.ok, mine.digest, mine.distance) == (True, wanted.digest, wanted.distance)
        assert mine.score == pytest.approx(wanted.score, rel=1e-5)
        np.testing.assert_allclose(mine.losses(), wanted.losses(), rtol=1e-3, atol=1e-5)
    assert first[1].weights.index == expected[1].weights.index
    for mine, wanted in zip(first[3], expected[3], strict=True):
        assert (mine.digest, mine.num_kept, mine.num_prunable) == (wanted.digest, wanted.num_kept, wanted.num_prunable)
        for whole, other in [(mine.weights, wanted.weights), (mine.optimizer, wanted.optimizer)]:
            assert whole.index.keys() == other.index.keys()
            for name, tensor in other.views().items():
                if not name.endswith(("key.bias", "c_attn.bias")):  # where nothing but rounding errors drives AdamW
                    torch.testing.assert_close(whole.views()[name], tensor, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(mine.test_outputs, wanted.test_outputs, rtol=1e-3, atol=1e-4)


def test_a_candidate_s_own_failure_is_a_record_in_all_parts_and_any_other_the_machine_s(monkeypatch):
    monkeypatch.setattr(Worker, "_evaluate", lambda *_: 1 / 0)
    job = tiny_context()
    worker = Worker(job, "cpu")
    worker.group = ProcessGroup(0, 2, sharded=True)
    with pytest.raises(SystemFailure, match="ZeroDivisionError: division by zero"):
        worker.evaluate(tiny_snapshot(job), EvalTask(propose_candidates(resolve(job.spec), 1)[1]))
