"""The worker: results that depend on the task alone, and where each failure ends up."""

import os
import platform
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.builders import FAMILIES, random_weights, refused, tiny_config, tiny_context, tiny_snapshot

from raymask.core.masking.masks import num_kept_bits, unpack_bits
from raymask.core.masking.scorers import SCORERS
from raymask.core.recipe import dense_config, deterministic_candidate, finetune_config, propose_candidates, resolve
from raymask.core.records import EvalPoint
from raymask.core.tasks import EvalTask, FinetuneTask, Snapshot
from raymask.core.tensors import pack
from raymask.data.metrics import compute_metrics
from raymask.train import device, worker
from raymask.train.calibration import calibrate
from raymask.train.device import autocast_factory, deterministic
from raymask.train.failures import SystemFailure
from raymask.train.losses import TASK_LOSSES
from raymask.train.model import build_model, inspect_model, state_tensors
from raymask.train.trainer import Trainer
from raymask.train.worker import Worker

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def job():
    return tiny_context()


@pytest.fixture(scope="module")
def dense(job):
    return tiny_snapshot(job)


def pool(job, level=1):
    return propose_candidates(resolve(job.spec), level)


def finetune_task(job, candidate, digest=None):
    config = finetune_config(resolve(job.spec), candidate.level) if candidate.level else dense_config(job.spec)
    return FinetuneTask(name="search", candidate=candidate, config=config, digest=digest)


def findings(evaluation):
    """All of an evaluation but when and where it was made, and whose it is."""
    return evaluation.model_dump(exclude={"started", "seconds", "worker", "candidate"})


def evaluated(job, snapshot, candidate):
    """A fresh worker's evaluation, which must have gone well."""
    found = evaluate(Worker(job, "cpu"), snapshot, candidate)
    assert found.ok, found.error
    return found


def evaluate(worker, snapshot, candidate):
    """An early evaluation in one go."""
    evaluation, paused = worker.evaluate(snapshot, EvalTask(candidate))
    assert paused is None
    return evaluation


def finetuned(job, snapshot, candidate):
    return Worker(job, "cpu").finetune(snapshot, finetune_task(job, candidate))


def after(snapshot, checkpoint, key="later"):
    """What the next level starts from."""
    return Snapshot(key, checkpoint.weights, checkpoint.optimizer, snapshot.teacher)


def with_nan(snapshot, name):
    """The snapshot with one weight of the tensor not a number."""
    tensors = {name: tensor.clone() for name, tensor in snapshot.weights.views().items()}
    tensors[name].view(-1)[3] = float("nan")
    return Snapshot("broken", pack(tensors), teacher=snapshot.teacher)


# An early evaluation is a pure function.


@pytest.mark.parametrize("distill", [False, True])
def test_an_early_evaluation_is_the_same_on_any_worker_in_any_order_and_after_any_work(distill):
    job = tiny_context(distill=distill)
    dense = tiny_snapshot(job)
    first = {candidate: findings(evaluated(job, dense, candidate)) for candidate in pool(job)}
    busy = Worker(job, "cpu")
    later = after(dense, busy.finetune(dense, finetune_task(job, pool(job)[2])))
    work = [(later, candidate) for candidate in pool(job, 2)] + [(dense, candidate) for candidate in pool(job)]
    random.Random(0).shuffle(work)
    work += [(dense, pool(job)[1]), (later, pool(job)[1]), (dense, pool(job)[1])]
    found = [(snapshot, candidate, findings(evaluate(busy, snapshot, candidate))) for snapshot, candidate in work]
    for snapshot, candidate, again in found:
        expected = first[candidate] if snapshot is dense else findings(evaluated(job, later, candidate))
        assert again == expected


def test_candidates_differ_in_their_masks(job, dense):
    found = [evaluated(job, dense, candidate) for candidate in pool(job)]
    assert len({evaluation.digest for evaluation in found}) == 4
    assert found[0].distance == 0.0
    assert all(0 < evaluation.distance < 1 for evaluation in found[1:])
    assert len({evaluation.score for evaluation in found}) == 4


def test_candidates_of_the_same_mask_get_the_same_score(job, dense):
    first = pool(job)[0]
    other = first.model_copy(update={"index": 7, "seed": 99})
    assert findings(evaluated(job, dense, other)) == findings(evaluated(job, dense, first))
    everything = [candidate.model_copy(update={"density": 1 - 1e-12}) for candidate in pool(job)]
    found = [findings(evaluated(job, dense, candidate)) for candidate in everything]
    assert found[1:] == found[:-1]
    assert found[0]["digest"] != findings(evaluated(job, dense, first))["digest"]


def test_another_level_or_seed_of_the_search_has_other_random_numbers(job, dense):
    first = pool(job)[0]
    moved = evaluated(job, dense, first.model_copy(update={"level": 2}))
    reseeded = evaluated(tiny_context(seed=1), dense, first)
    digests = {found.digest for found in (moved, reseeded, evaluated(job, dense, first))}
    scores = {found.score for found in (moved, reseeded, evaluated(job, dense, first))}
    assert (len(digests), len(scores)) == (1, 3)


def test_an_early_evaluation_leaves_the_snapshot_as_it_was(job):
    dense = tiny_snapshot(job)
    before = dense.weights.buffer.copy()
    evaluated(job, dense, pool(job)[1])
    assert np.array_equal(dense.weights.buffer, before)


# What an evaluation holds.


def test_the_score_is_the_negative_mean_loss_of_the_last_evaluations(dense):
    all_looks = evaluated(tiny_context(), dense, pool(tiny_context())[1])
    found = evaluated(tiny_context(early_eval={"score_window": 2}), dense, pool(tiny_context())[1])
    assert [point.step for point in all_looks.curve] == [1, 2, 3]
    assert found.curve == all_looks.curve[-2:]
    assert found.score == pytest.approx(-np.mean([point.loss for point in found.curve]))


def test_the_score_is_the_mean_metric_where_that_is_asked_for(dense):
    job = tiny_context(early_eval={"score_window": 2, "score": "metric", "epochs": 3})
    found = evaluated(job, dense, pool(job)[1])
    assert found.score == pytest.approx(np.mean([point.metric for point in found.curve]))
    assert 0 < found.score <= 1


def test_row_losses_average_to_the_score(dense):
    job = tiny_context(early_eval={"score_window": 2})
    found = evaluated(job, dense, pool(job)[1])
    assert found.losses().shape == (len(job.data.validation),)
    assert found.losses().mean() == pytest.approx(-found.score, rel=1e-5)
    assert found.losses().std() > 0


@pytest.mark.parametrize(
    ("every", "last", "steps"),
    [(1, 10, [1, 2, 3]), (2, 10, [2]), (3, 10, [3]), (50, 10, [3]), (1, 2, [2, 3]), (1, 1, [3]), (2, 1, [2])],
)
def test_only_evaluations_that_count_are_taken_and_at_least_one(dense, every, last, steps):
    job = tiny_context(early_eval={"eval_steps": every, "score_window": last})
    assert [point.step for point in evaluated(job, dense, pool(job)[0]).curve] == steps


def test_an_evaluation_is_on_a_fixed_sample_of_a_large_validation_split(dense):
    job, whole = tiny_context(early_eval={"max_rows": 5}), tiny_context()
    few = [evaluated(job, dense, candidate).losses() for candidate in pool(job)]
    assert [len(losses) for losses in few] == [5] * len(few)
    places = [
        np.isclose(evaluated(whole, dense, candidate).losses()[:, None], losses, rtol=1e-5).any(1)
        for candidate, losses in zip(pool(job), few, strict=True)
    ]
    assert all(place.sum() == 5 for place in places)
    assert all((place == places[0]).all() for place in places), "each candidate met other rows"
    assert len(finetuned(job, dense, pool(job)[1]).test_outputs) == len(job.data.test)


def test_an_evaluation_says_where_and_when_it_was_made_and_how_long_it_took(job, dense):
    before = time.time()
    found = evaluated(job, dense, pool(job)[0])
    assert found.worker == f"{platform.node()}/{os.getpid()} cpu 1 threads fp32"
    assert found.seconds > 0
    assert before <= found.started <= time.time() - found.seconds + 0.1  # seconds, for two clocks that may drift
    assert found.candidate == pool(job)[0]


# What becomes of failures.


def test_training_that_diverges_is_a_record_and_no_exception(dense):
    job = tiny_context(early_eval={"learning_rate": 1e30})
    found = evaluate(Worker(job, "cpu"), dense, pool(job)[1])
    assert not found.ok
    assert found.error.startswith("FloatingPointError: the loss on validation is ")
    assert found.error.endswith(" steps")
    assert (found.score, found.curve, found.row_losses) == (None, (), b"")
    assert (found.candidate, found.worker != "") == (pool(job)[1], True)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("classifier.weight", "FloatingPointError: the loss on validation is nan after 1 steps"),
        ("{matrix}", "ValueError: {matrix} holds values that are not finite: it cannot be pruned"),
    ],
)
def test_a_broken_snapshot_fails_its_candidates_and_nobody_after_them(job, dense, name, error, index):
    busy, candidate, matrix = Worker(job, "cpu"), pool(job)[index], job.model.prunable[-1]
    broken = with_nan(dense, name.format(matrix=matrix))
    assert evaluate(busy, broken, candidate).error == error.format(matrix=matrix)
    assert findings(evaluate(busy, dense, candidate)) == findings(evaluated(job, dense, candidate))


def test_any_other_error_of_a_candidate_is_recorded_by_kind_and_cut(job, dense, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("x" * 5000)

    monkeypatch.setattr(Worker, "evaluate_model", fail)
    found = evaluate(Worker(job, "cpu"), dense, pool(job)[0])
    assert found.error.startswith("ZeroDivisionError: xxx")
    assert len(found.error) == 2000


@pytest.mark.parametrize(
    "fault",
    [
        MemoryError("no room"),
        torch.OutOfMemoryError("no room"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: no room"),
        RuntimeError("CUDA error: an illegal memory access was encountered, no room"),
        RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer, no room"),
        dist.DistNetworkError("no room"),
    ],
    ids=["python", "cuda", "cpu", "sticky", "a group's", "a group's start"],
)
@pytest.mark.parametrize("work", ["evaluate", "finetune"])
def test_the_machine_s_own_faults_are_raised(job, dense, monkeypatch, fault, work):
    def fail(*_):
        raise fault

    monkeypatch.setattr(Worker, "evaluate_model", fail)
    candidate = pool(job)[0]
    busy = Worker(job, "cpu")
    with pytest.raises(SystemFailure, match="no room"):
        evaluate(busy, dense, candidate) if work == "evaluate" else busy.finetune(dense, finetune_task(job, candidate))


def test_memory_that_really_runs_out_is_the_machine_s_fault(job, dense, monkeypatch):
    monkeypatch.setattr(Worker, "evaluate_model", lambda *_: torch.empty(2**60, dtype=torch.uint8))
    with pytest.raises(SystemFailure, match="allocate"):
        evaluate(Worker(job, "cpu"), dense, pool(job)[0])


# Fine-tuning.


def scripted(monkeypatch, points):
    """Let the looks find (loss, metric) of `points` in turn; returns a list that gets the weights at each look."""
    seen, script = [], iter(points)

    def look(self, group_trainer, step, rows, *_):
        seen.append(pack(self.named_tensors).buffer)
        loss, metric = next(script)
        return EvalPoint(step=step, loss=loss, metric=metric), torch.zeros(1)

    monkeypatch.setattr(Worker, "evaluate_model", look)
    return seen


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ([(0.5, 0.6), (0.9, 0.8), (0.1, 0.7)], 1),  # the metric decides,
        ([(0.5, 0.6), (0.3, 0.6), (0.4, 0.6)], 1),  # then the loss,
        ([(0.5, 0.6), (0.5, 0.6), (0.5, 0.6)], 0),  # then who came first,
        ([(0.5, 0.6), (float("nan"), 0.9), (float("inf"), 0.9)], 0),  # and what is not finite never wins.
        ([(float("nan"), 0.9), (0.5, 0.6), (0.6, 0.6)], 1),
    ],
)
def test_the_best_evaluation_is_kept_with_its_optimizer(dense, monkeypatch, points, best):
    job = tiny_context(finetune={"epochs": 3})
    seen = scripted(monkeypatch, points)
    found = finetuned(job, dense, pool(job)[1])
    assert [point.step for point in found.finetune_result.curve] == [3, 6, 9]
    assert found.finetune_result.best == best
    assert found.finetune_result.best_eval.step == 3 * (best + 1)
    assert np.array_equal(found.weights.buffer, seen[best])
    assert float(found.optimizer.views()["step"]) == 3 * (best + 1)
    assert len({buffer.tobytes() for buffer in seen}) == 3


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, [2]), (1, [3]), (1.5, [3, 4]), (2, [3, 6])])
def test_an_evaluation_is_made_after_every_epoch_and_at_the_end(dense, epochs, steps):
    job = tiny_context(finetune={"epochs": epochs})
    assert [point.step for point in finetuned(job, dense, pool(job)[0]).finetune_result.curve] == steps


def test_what_is_returned_is_what_was_measured(job, dense):
    found = finetuned(job, dense, pool(job)[1])
    module = build_model(job.config).eval()
    module.load_state_dict(found.weights.views(), strict=False)
    plain = Trainer(module, TASK_LOSSES["classification"], 0)
    test = plain.predict(job.data.test)
    assert np.array_equal(found.test_outputs, test.numpy())
    validation = plain.predict(job.data.validation)
    metric = compute_metrics(("accuracy",), validation.numpy(), job.data.validation.labels)["accuracy"]
    assert found.finetune_result.best_eval.metric == metric
    assert found.finetune_result.worker == f"{platform.node()}/{os.getpid()} cpu 1 threads fp32"


@pytest.mark.parametrize("index", [0, 1])
def test_the_mask_that_was_scored_is_drawn_again(job, dense, index):
    candidate = pool(job)[index]
    digest = evaluated(job, dense, candidate).digest
    found = Worker(job, "cpu").finetune(dense, finetune_task(job, candidate, digest))
    bits, weights = unpack_bits(found.mask), found.weights.views()
    assert found.digest == digest
    assert set(bits) == set(job.model.prunable)
    assert (found.num_kept, found.num_prunable) == (num_kept_bits(found.mask), 4096)
    assert found.num_kept == 2048  # half of every matrix
    for name, mask in bits.items():
        assert not weights[name][~mask].any()
        assert weights[name][mask].count_nonzero() == mask.sum()


def test_another_mask_than_the_scored_one_is_refused(job, dense):
    first, second = (evaluated(job, dense, candidate) for candidate in pool(job)[1:3])
    message = refused(Worker(job, "cpu").finetune, dense, finetune_task(job, first.candidate, second.digest))
    assert message.startswith(f"candidate 1 of level 1 drew mask {first.digest} here (")
    assert f"but mask {second.digest} was scored" in message
    assert message.endswith("Use workers of one kind")


def test_levels_nest_and_go_on_with_the_optimizer(job, dense):
    first = finetuned(job, dense, pool(job)[1])
    parent = after(dense, first)
    second = finetuned(job, parent, pool(job, 2)[1])
    outer, inner = unpack_bits(first.mask), unpack_bits(second.mask)
    assert all(not (inner[name] & ~outer[name]).any() for name in outer)
    assert second.num_kept == 1024
    step = float(first.optimizer.views()["step"])
    assert float(second.optimizer.views()["step"]) == step + second.finetune_result.best_eval.step
    fresh = finetuned(job, Snapshot("fresh", first.weights), pool(job, 2)[1])
    assert fresh.digest == second.digest
    assert not np.array_equal(fresh.weights.buffer, second.weights.buffer)


def test_fine_tuning_is_the_same_on_a_fresh_worker_and_after_other_work(job, dense):
    busy = Worker(job, "cpu")
    busy.finetune(dense, finetune_task(job, pool(job)[2]))
    found, again = busy.finetune(dense, finetune_task(job, pool(job)[1])), finetuned(job, dense, pool(job)[1])
    assert np.array_equal(found.weights.buffer, again.weights.buffer)
    assert np.array_equal(found.optimizer.buffer, again.optimizer.buffer)
    assert np.array_equal(found.test_outputs, again.test_outputs)


def test_a_dense_fine_tuning_prunes_nothing(job, dense):
    found = finetuned(job, dense, deterministic_candidate(resolve(job.spec), 0))
    assert (found.num_kept, found.num_prunable, found.mask.index) == (0, 0, {})
    weights = found.weights.views()
    assert all(weights[name].count_nonzero() == weights[name].numel() for name in job.model.prunable)
    assert not np.array_equal(found.weights.buffer, dense.weights.buffer)


def test_no_epochs_return_the_weights_unchanged():
    job = tiny_context(dense={"epochs": 1})
    dense, candidate = tiny_snapshot(job), deterministic_candidate(resolve(job.spec), 0)
    config = dense_config(job.spec).model_copy(update={"epochs": 0.0})
    work = FinetuneTask(name="dense", candidate=candidate, config=config)
    found = Worker(job, "cpu").finetune(dense, work)
    assert np.array_equal(found.weights.buffer, dense.weights.buffer)
    assert found.optimizer.index == {}
    assert [point.step for point in found.finetune_result.curve] == [0]
    assert found.test_outputs.shape == (len(job.data.test), 2)


@pytest.mark.parametrize("level", [0, 1])
def test_a_fine_tuning_that_diverges_is_refused_with_advice(level):
    job = tiny_context(finetune={"learning_rate": 1e30}, dense={"learning_rate": 1e30})
    candidate = deterministic_candidate(resolve(job.spec), level)
    message = refused(Worker(job, "cpu").finetune, tiny_snapshot(job), finetune_task(job, candidate))
    assert message.startswith(f"level {level}: fine-tuning diverged, the loss on validation is ")
    assert "Lower finetune.learning_rate (dense.learning_rate at level 0)" in message


# Distillation, precision, regression, families.


@pytest.mark.parametrize("distill", [False, True])
def test_labels_matter_exactly_when_nothing_is_distilled(distill):
    job = tiny_context(distill=distill)
    dense = tiny_snapshot(job)
    plain = findings(evaluated(job, dense, pool(job)[1]))
    job.data.train.labels[:] = 1 - job.data.train.labels
    assert (findings(evaluated(job, dense, pool(job)[1])) == plain) is distill


def test_the_teacher_is_what_a_student_learns_from():
    job = tiny_context(distill=True)
    dense = tiny_snapshot(job)
    own = Snapshot("own", dense.weights, teacher=dense.weights)
    assert findings(evaluated(job, dense, pool(job)[1])) != findings(evaluated(job, own, pool(job)[1]))
    assert finetuned(job, dense, pool(job)[1]).num_kept == 2048


def test_a_teacher_may_be_a_deeper_model():
    job, deep = tiny_context(distill=True), tiny_config(num_hidden_layers=4)
    teacher = inspect_model(job.spec.model, deep, ("bad", "good"))
    taught, candidate = replace(job, teacher=teacher), deterministic_candidate(resolve(job.spec), 0)
    parents = [replace(tiny_snapshot(job), teacher=random_weights(deep, seed)) for seed in (1, 2)]
    first, other = (finetuned(taught, parent, candidate) for parent in parents)
    assert first.finetune_result != other.finetune_result
    assert taught.peak_host_memory(on_gpu=False) > job.peak_host_memory(on_gpu=False)


def test_bf16_is_near_float32_and_keeps_float32_weights(job, dense):
    half = tiny_context(precision="bf16")
    exact, rough = evaluated(job, dense, pool(job)[1]), evaluated(half, dense, pool(half)[1])
    assert rough.digest == exact.digest
    assert rough.score != exact.score
    assert rough.score == pytest.approx(exact.score, abs=0.1)
    found = finetuned(half, dense, pool(half)[1])
    assert {tensor.dtype for tensor in found.weights.views().values() if tensor.is_floating_point()} == {torch.float32}
    assert found.test_outputs.dtype == np.float32


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("distill", [False, True])
def test_weights_in_bf16_are_multiplied_as_they_are_and_stay_so(monkeypatch, distill, native):
    monkeypatch.setattr(device, "native_bf16", lambda device: native)
    exact, half = (
        tiny_context(model={"dtype": dtype}, precision="auto", distill=distill) for dtype in ("fp32", "bf16")
    )
    dense = tiny_snapshot(half)
    busy = Worker(half, "cpu")
    with busy.trainer.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    found = evaluate(busy, dense, pool(half)[1])
    assert found.ok, found.error
    assert found.worker.endswith(" bf16")
    assert found.score == pytest.approx(evaluated(exact, tiny_snapshot(exact), pool(exact)[1]).score, rel=0.1)
    assert findings(evaluated(half, dense, pool(half)[1])) == findings(found)
    tuned = busy.finetune(dense, finetune_task(half, pool(half)[1], found.digest))
    weights, state = tuned.weights.views(), tuned.optimizer.views()
    for name in half.model.prunable:
        assert {weights[name].dtype, state[f"exp_avg/{name}"].dtype} == {torch.bfloat16}
        assert not weights[name][~unpack_bits(tuned.mask)[name]].any()
    assert tuned.test_outputs.dtype == np.float32
    second = evaluated(half, after(dense, tuned), pool(half, 2)[1])
    assert np.isfinite(second.score)


@pytest.mark.parametrize("native", [False, True])
def test_auto_is_bf16_where_the_device_has_it(monkeypatch, native):
    monkeypatch.setattr(device, "native_bf16", lambda device: native)
    with autocast_factory("auto", CPU)():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if native else torch.float32)


@pytest.mark.parametrize("distill", [False, True])
def test_a_regression_is_evaluated_and_fine_tuned(distill):
    job = tiny_context(regression=True, distill=distill, finetune={"epochs": 9})
    dense = tiny_snapshot(job)
    found = evaluated(job, dense, pool(job)[1])
    assert found.losses().mean() == pytest.approx(-found.score, rel=1e-5)
    checkpoint = finetuned(job, dense, pool(job)[1])
    assert checkpoint.test_outputs.shape == (len(job.data.test), 1)
    curve = checkpoint.finetune_result.curve
    assert curve[-1].loss < curve[0].loss / 2
    assert len({point.metric for point in curve}) > 1
    assert checkpoint.finetune_result.best_eval.metric == max(point.metric for point in curve)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_evaluated_and_fine_tuned_with_a_teacher(family):
    job = tiny_context(family, distill=True, finetune={"epochs": 1})
    dense = tiny_snapshot(job)
    evaluation = evaluated(job, dense, pool(job)[1])
    found = Worker(job, "cpu").finetune(dense, finetune_task(job, pool(job)[1], evaluation.digest))
    assert found.num_kept == found.num_prunable / 2
    assert np.isfinite(found.test_outputs).all()


# Checkpointing.


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *(pytest.param(family, {"distill": True}, id=family) for family in ("bert", "distilbert", "deberta-v2")),
        pytest.param("bert", {}, id="labels"),
        pytest.param("bert", {"precision": "bf16", "distill": True}, id="autocast"),
        pytest.param("bert", {"model": {"dtype": "bf16"}, "precision": "auto"}, id="weights in bf16"),
        pytest.param("bert", {"mask": {"score": "saliency"}}, id="calibrated"),
    ],
)
def test_checkpointing_changes_no_bit(family, settings):
    plain, frugal = (tiny_context(family, **settings, gradient_checkpointing=on) for on in (False, True))
    dense, candidate = tiny_snapshot(plain), pool(plain)[1]
    found = evaluated(plain, dense, candidate)
    assert findings(evaluated(frugal, dense, candidate)) == findings(found)
    first, second = (
        Worker(job, "cpu").finetune(dense, finetune_task(job, candidate, found.digest)) for job in (plain, frugal)
    )
    assert first.finetune_result.curve == second.finetune_result.curve
    assert np.array_equal(first.weights.buffer, second.weights.buffer)
    assert np.array_equal(first.optimizer.buffer, second.optimizer.buffer)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("distill", [False, True])
def test_checkpointed_layers_run_again_in_each_step_and_in_no_evaluation(gradient_checkpointing, distill):
    job, trained, looked = tiny_context(gradient_checkpointing=gradient_checkpointing, distill=distill), [], []
    busy = Worker(job, "cpu")
    for layer in busy.module.bert.encoder.layer:
        layer.output.register_forward_pre_hook(lambda part, _: (trained if part.training else looked).append(part))
    assert evaluate(busy, tiny_snapshot(job), pool(job)[1]).ok
    assert len(trained) == 3 * 2 * (1 + gradient_checkpointing)  # steps, layers
    assert len(looked) == (3 + distill) * 2  # and the dense model, which the candidates are held against


# Where sparsity goes.

WHERE = [
    {"score": "magnitude"},
    {"allocation": "erk"},
    {"pattern": "4x4"},
    {"allocation": "global", "pattern": "8x1", "score": "saliency"},
    {"pattern": "n:4", "score": "wanda"},
]


@pytest.mark.parametrize("where", WHERE, ids=lambda where: " ".join(where.values()))
def test_every_worker_draws_the_same_masks_wherever_sparsity_goes(where):
    job = tiny_context(mask=where)
    dense = tiny_snapshot(job)
    candidates = pool(job)
    busy = Worker(job, "cpu")
    found = [evaluate(busy, dense, candidate) for candidate in candidates]
    assert all(evaluation.ok for evaluation in found), [evaluation.error for evaluation in found]
    assert len({evaluation.digest for evaluation in found}) == len(candidates)
    assert findings(evaluated(job, dense, candidates[2])) == findings(found[2])
    first = Worker(job, "cpu").finetune(dense, finetune_task(job, candidates[1], found[1].digest))
    later = after(dense, first)
    second = busy.finetune(later, finetune_task(job, pool(job, 2)[1], evaluated(job, later, pool(job, 2)[1]).digest))
    parent, child = unpack_bits(first.mask), unpack_bits(second.mask)
    assert all(not (child[name] & ~parent[name]).any() for name in job.model.prunable)
    assert (first.num_kept / first.num_prunable, second.num_kept / second.num_prunable) == pytest.approx(
        (0.5, 0.25), abs=0.001
    )


@pytest.mark.parametrize("score", sorted(set(SCORERS) - {"magnitude"}))
def test_a_score_that_looks_at_data_gives_another_magnitude_mask(job, dense, score):
    seeing = tiny_context(mask={"score": score})
    assert evaluated(seeing, dense, pool(job)[0]).digest != evaluated(job, dense, pool(job)[0]).digest


@pytest.mark.parametrize(("score", "passes"), [("magnitude", 0), ("wanda", 2), ("saliency", 2)])
def test_a_worker_calibrates_once_a_parent_and_level_if_at_all(score, passes, monkeypatch):
    job, calls = tiny_context(mask={"score": score}), []

    def counting(module, names, rows, **more):
        calls.append(len(rows))
        return calibrate(module, names, rows, **more)

    monkeypatch.setattr(worker, "calibrate", counting)
    monkeypatch.setattr(worker, "CALIBRATION_ROWS", 20)
    busy, dense = Worker(job, "cpu"), tiny_snapshot(job)
    for candidate in (*pool(job), *pool(job, 2)):
        assert evaluate(busy, dense, candidate).ok
    assert calls == [20] * passes


# What the caller notices.


@pytest.mark.parametrize("fails", [False, True])
def test_neither_random_state_nor_threads_of_the_caller_change(job, dense, fails):
    threads = []
    busy = Worker(
        tiny_context(workers={"cpus": 2.5}, finetune={"epochs": 0.3}),
        "cpu",
        lambda share: threads.append(torch.get_num_threads()),
    )
    snapshot = with_nan(dense, "classifier.weight") if fails else dense
    torch.manual_seed(1)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), torch.get_num_threads()
    assert evaluate(busy, snapshot, pool(job)[1]).ok is not fails
    if fails:
        refused(busy.finetune, snapshot, finetune_task(job, pool(job)[1]))
    else:
        busy.finetune(snapshot, finetune_task(job, pool(job)[1]))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_num_threads()) == states[1:]
    assert set(threads) == {2}


@pytest.mark.parametrize("work", ["evaluate", "finetune"])
def test_the_share_that_is_done_rises_to_one(job, dense, work):
    shares = []
    busy = Worker(job, "cpu", shares.append)
    if work == "evaluate":
        evaluate(busy, dense, pool(job)[1])
    else:
        busy.finetune(dense, finetune_task(job, pool(job)[1]))
    steps = 3 if work == "evaluate" else 6
    assert shares == pytest.approx([(step + 1) / steps for step in range(steps)])


def of_size(job, parameters):
    """The job with a model of so many parameters."""
    return replace(job, model=replace(job.model, sizes=replace(job.model.sizes, whole=parameters)))


def test_memory_counts_the_weights_and_the_teacher(job):
    other = of_size(job, job.model.sizes.whole + 1000)
    taught = replace(job, spec=tiny_context(distill=True).spec)
    grown = other.peak_host_memory(on_gpu=False) - job.peak_host_memory(on_gpu=False)
    assert grown >= 1000 * 4 * 4  # weights, gradients and two moments at the least
    assert taught.peak_host_memory(on_gpu=False) - job.peak_host_memory(on_gpu=False) >= 4 * job.model.sizes.whole
    seeing = replace(job, spec=tiny_context(mask={"score": "wanda"}).spec)
    assert seeing.peak_host_memory(on_gpu=False) - job.peak_host_memory(on_gpu=False) >= 4 * job.model.sizes.whole
    assert 0 < other.peak_host_memory(on_gpu=True) - job.peak_host_memory(on_gpu=True) < grown
    assert other.object_store_memory > job.object_store_memory


def test_memory_is_less_by_each_key_that_is_there_to_save_it(job):
    def bytes_a_weight(**settings):
        spec = tiny_context(**settings).spec
        large, none = (of_size(replace(job, spec=spec), count) for count in (10**9, 0))
        sizes = (large.peak_host_memory(on_gpu=False), large.peak_host_memory(on_gpu=True), large.object_store_memory)
        return [
            (size - rest) / 10**9
            for size, rest in zip(
                sizes,
                (none.peak_host_memory(on_gpu=False), none.peak_host_memory(on_gpu=True), none.object_store_memory),
                strict=True,
            )
        ]

    assert bytes_a_weight() == [64, 12, 52]
    assert bytes_a_weight(model={"dtype": "bf16"}, precision="auto") == [32, 6, 26]
    assert bytes_a_weight(optimizer={"name": "adafactor"}) == [32, 4, 20]
    assert bytes_a_weight(gradient_checkpointing=True) == [40, 12, 52]


def test_a_run_takes_weights_and_moments_of_every_trained_model(job):
    sizes = {count: of_size(job, count).run_dir_bytes for count in (0, 10**9)}
    assert sizes == {0: 0, 10**9: (1 + 2 * 2) * 12 * 10**9 + 4 * 10**9}  # dense, two levels of search and IMP; export
    assert (
        tiny_context(distill=True, imp={"run": False}).run_dir_bytes
        == (2 + 2) * 12 * job.model.sizes.whole + 4 * job.model.sizes.whole
    )


def test_a_worker_s_live_tensors_are_its_module_s(job):
    fresh = Worker(job, "cpu")
    assert all(fresh.named_tensors[name] is tensor for name, tensor in state_tensors(fresh.module).items())


def test_deterministic_kernels_are_for_the_block_alone():
    def settings():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed(),
        )

    before = settings()
    with pytest.raises(KeyError), deterministic():
        assert settings() == (True, False, True)
        raise KeyError
    assert settings() == before == (False, True, False)


def test_a_worker_that_has_no_teacher_asks_for_no_memory_for_its_answers():
    job = tiny_context()
    unknown = replace(job, model=replace(job.model, config=object()))  # tells nothing of its layers
    assert unknown.peak_host_memory(on_gpu=False) == job.peak_host_memory(on_gpu=False)


# --- rungs -----------------------------------------------------------------------------------------------------------


def halving(**changes):
    return tiny_context(early_eval={"rungs": [0.3, 0.6, 1.0], "epochs": 3.0} | changes)


def eval_task(job, snapshot, candidate, *, forget=False):
    """The evaluations of a candidate at each rung, every one on another worker; `forget`: what was paused is lost."""
    found, paused = [], None
    for rung in range(len(job.spec.early_eval.rungs)):
        evaluation, paused = Worker(job, "cpu").evaluate(
            snapshot, EvalTask(candidate, rung), None if forget else paused
        )
        assert evaluation.ok, evaluation.error
        found.append(evaluation)
    assert paused is None
    return found


@pytest.mark.parametrize("distill", [False, True])
def test_a_candidate_goes_on_where_it_paused_or_from_its_parent_with_the_same_result(distill):
    job = tiny_context(early_eval={"rungs": [0.3, 0.6, 1.0], "epochs": 3.0}, distill=distill)
    snapshot = tiny_snapshot(job)
    paused, forgotten = (eval_task(job, snapshot, pool(job)[1], forget=forget) for forget in (False, True))
    assert [findings(evaluation) for evaluation in paused] == [findings(evaluation) for evaluation in forgotten]
    assert [point.step for evaluation in paused for point in evaluation.curve] == list(range(1, 10))
    assert [evaluation.rung for evaluation in paused] == [0, 1, 2]


def test_without_dropout_rungs_change_nothing_but_where_it_pauses(monkeypatch):
    """Neither order, rate, moments nor mask: the last looks are those of an evaluation in one go."""
    monkeypatch.setitem(FAMILIES["bert"], "hidden_dropout_prob", 0.0)
    monkeypatch.setitem(FAMILIES["bert"], "attention_probs_dropout_prob", 0.0)
    job, whole = halving(), halving(rungs=[1.0])
    snapshot = tiny_snapshot(job)
    expected = evaluated(whole, snapshot, pool(job)[1])
    found = eval_task(job, snapshot, pool(job)[1])
    assert [point for evaluation in found for point in evaluation.curve] == list(expected.curve)


def test_a_rung_too_short_for_an_evaluation_is_evaluated_where_it_ends(dense):
    job = halving(eval_steps=100)
    found = eval_task(job, dense, pool(job)[1])
    assert [[point.step for point in evaluation.curve] for evaluation in found] == [[3], [5], [9]]


@pytest.mark.parametrize("regression", [False, True])
def test_agreement_with_the_dense_model_is_a_score(regression):
    job = tiny_context(regression=regression, early_eval={"score": "agreement", "score_window": 1})
    snapshot = tiny_snapshot(job)
    assert snapshot.teacher is not None
    found = evaluated(job, snapshot, pool(job)[1])
    assert found.score == found.curve[-1].agreement
    assert found.score < 0
    itself = Worker(job, "cpu")
    evaluate(itself, snapshot, pool(job)[0])
    with torch.no_grad():
        assert itself.task_loss.agreement(itself.dense_predictions, itself.dense_predictions) == pytest.approx(
            0.0, abs=1e-12
        )


def test_agreement_is_minus_the_divergence_of_the_probabilities():
    ours, theirs = torch.tensor([[0.0, 1.0], [2.0, -1.0]]), torch.tensor([[1.0, 0.0], [2.0, -1.0]])
    p, q = theirs.softmax(-1), ours.softmax(-1)
    expected = -float((p * (p / q).log()).sum(-1).mean())
    assert TASK_LOSSES["classification"].agreement(ours, theirs) == pytest.approx(expected, rel=1e-6)
    assert TASK_LOSSES["regression"].agreement(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [4.0]])) == -2.0


def test_a_repeat_is_the_same_mask_in_another_order(dense):
    job = halving()
    first, again = (Worker(job, "cpu").evaluate(dense, EvalTask(pool(job)[1], 2, order))[0] for order in (0, 1))
    assert (first.digest, first.distance) == (again.digest, again.distance)
    assert again.repeat == 1
    assert first.curve != again.curve
