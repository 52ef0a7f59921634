"""Training: rows, masks, seeds, schedule, distillation, predictions."""

import copy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.builders import tiny_config, tiny_corpus, tiny_tokenizer
from torch import nn

from raymask.core.records import TrainConfig
from raymask.core.spec import Optimizer
from raymask.core.tensors import copy_into, pack
from raymask.data.tokenize import tokenize
from raymask.data.types import TokenizedSplit
from raymask.train import trainer
from raymask.train.batches import batch_stream, collate
from raymask.train.losses import TASK_LOSSES, LossDenominators, loss_denominators
from raymask.train.model import build_model, state_tensors
from raymask.train.optim import lr_multiplier, make_optimizer, optimizer_state
from raymask.train.prunable import find_prunable
from raymask.train.trainer import Trainer, distillation, mean_label_loss, num_steps, steps_per_epoch

CLASSIFICATION, REGRESSION, NEXT_TOKEN = TASK_LOSSES.values()
CONFIG = TrainConfig(epochs=1, batch_size=16, learning_rate=0.01, schedule="constant", warmup=0.0, distill=False)


def config_of(**changes):
    return CONFIG.model_copy(update=changes)


def numbered(lengths):
    """Rows of these lengths that hold their own number plus one in every token, and as their label."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    numbers = np.arange(len(lengths))
    ids = np.repeat(numbers + 1, lengths).astype(np.int32)
    return TokenizedSplit(ids, (ids % 2).astype(np.int8), offsets, numbers)


def tiny_module(seed=0, *, dropout=0.1, **changes):
    """A new tiny classifier that shows its attention, in evaluation mode."""
    config = tiny_config(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model(config, show_attention=True).eval()


def module_for(kind, seed=0):
    """A tiny model for a kind of task."""
    if kind != "causal-lm":
        return tiny_module(seed, num_labels=1 if kind == "regression" else 2)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model(tiny_config("llama"), kind=kind, show_attention=True).eval()


def batch_for(kind, rows, chosen):
    """Rows as a batch that such a model takes."""
    return collate(replace(rows, types=None) if kind == "causal-lm" else rows, np.array(chosen), 0)


def half_masks(module):
    """Masks that keep the first half of each prunable matrix's rows."""
    weights = dict(module.named_parameters())
    masks = {name: torch.zeros_like(weights[name], dtype=torch.bool) for name in find_prunable(module)}
    for bits in masks.values():
        bits[: len(bits) // 2] = True
    return masks


def trainer_of(module, task_loss=CLASSIFICATION, **changes):
    """A trainer with settings that change nothing unless they are given."""
    return Trainer(module, task_loss, 0, **{"max_grad_norm": 1.0} | changes)


def fit(module, rows, config=CONFIG, *, optimizer=None, mask=None, seed=0, teacher=None, eval_steps=(), **changes):
    """Train to the end, and call `on_eval` with each of the steps to evaluate at."""
    optimizer, on_eval = optimizer or make_optimizer(module, Optimizer(), None), changes.pop("on_eval", None)
    keys = {"seed": seed, "teacher": teacher, "eval_steps": eval_steps}
    for step in trainer_of(module, **changes).train(rows, config, optimizer, mask or {}, **keys):
        on_eval(step)


def predicted(module, rows, task_loss=CLASSIFICATION, **changes):
    return trainer_of(module, task_loss, **changes).predict(rows)


def loss_of(module, batch, task_loss=CLASSIFICATION, teacher=None, whole=None):
    """What a step would go down, of a batch on its own or as a part of a whole one."""
    whole = whole or counted(batch)
    if teacher:
        return distillation(module, teacher, batch, task_loss, whole)
    return mean_label_loss(module, batch, task_loss, whole)


def counted(batch):
    return loss_denominators(batch["attention_mask"].sum(1).numpy())


def weights_of(module):
    return {name: tensor.detach().clone() for name, tensor in state_tensors(module).items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


OPTIMIZERS = pytest.mark.parametrize("name", ["adamw", "adafactor"])


@pytest.fixture(scope="module")
def data():
    return tokenize(tiny_corpus(), tiny_tokenizer())


@pytest.fixture(scope="module")
def uneven(data):
    """Four rows of 3, 5, 8 and 6 real words' tokens, as one batch's worth of rows."""
    rng = np.random.default_rng(0)
    rows = numbered([3, 5, 8, 6])
    return TokenizedSplit(
        rng.integers(5, 50, len(rows.ids)).astype(np.int32), rows.types, rows.offsets, np.array([0, 1, 1, 0])
    )


# Batches.


@given(st.lists(st.integers(1, 9), min_size=1, max_size=80), st.integers(1, 20), st.integers(0, 99))
def test_every_epoch_covers_every_row_once(lengths, size, seed):
    rows, config = numbered(lengths), config_of(batch_size=size)
    batches = batch_stream(rows, size, seed)
    for _ in range(3):
        epoch = [next(batches) for _ in range(steps_per_epoch(config, len(rows)))]
        assert np.sort(np.concatenate(epoch)).tolist() == list(range(len(rows)))
        assert all(len(chosen) <= size for chosen in epoch)


def test_the_order_is_the_seed_s_and_new_every_epoch():
    rows = numbered([5] * 40)

    def epochs(seed):
        batches = batch_stream(rows, 8, seed)
        return [np.concatenate([next(batches) for _ in range(5)]).tolist() for _ in range(2)]

    assert epochs(1) == epochs(1)
    assert epochs(1) != epochs(2)
    first, second = epochs(1)
    assert first != second


def test_rows_of_like_length_share_a_batch():
    lengths = np.random.default_rng(0).integers(1, 60, 200)
    batches = batch_stream(numbered(lengths), 10, seed=0)
    widths = [lengths[next(batches)].max() for _ in range(20)]
    assert sum(widths) * 10 < 1.1 * lengths.sum()
    assert widths != sorted(widths)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.randoms(use_true_random=False), st.integers(0, 99))
def test_collate_pads_to_the_longest_and_masks_the_padding(lengths, random, padding):
    rows = numbered(lengths)
    chosen = np.array(random.sample(range(len(lengths)), random.randint(1, len(lengths))))
    batch = collate(rows, chosen, padding)
    longest = max(lengths[row] for row in chosen)
    for place, row in enumerate(chosen):
        real, rest = lengths[row], longest - lengths[row]
        assert batch["input_ids"][place].tolist() == [row + 1] * real + [padding] * rest
        assert batch["attention_mask"][place].tolist() == [1] * real + [0] * rest
        assert batch["token_type_ids"][place].tolist() == [(row + 1) % 2] * real + [0] * rest
    assert batch["labels"].tolist() == chosen.tolist()
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_model_without_token_types_is_given_none():
    rows = numbered([2, 3])
    batch = collate(TokenizedSplit(rows.ids, None, rows.offsets, rows.labels), np.array([0, 1]), 0)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


# Steps and rates.


@pytest.mark.parametrize(
    ("epochs", "rows", "size", "steps"),
    [
        (1, 64, 16, 4),
        (1, 65, 16, 5),
        (3, 65, 16, 15),
        (0.5, 64, 16, 2),
        (1.5, 65, 16, 8),
        (0.01, 64, 16, 1),
        (0, 64, 16, 0),
    ],
)
def test_steps_follow_from_epochs_which_may_be_a_fraction(epochs, rows, size, steps):
    assert num_steps(config_of(epochs=epochs, batch_size=size), rows) == steps


@given(st.floats(0, 1), st.integers(1, 300), st.sampled_from(["linear", "constant"]))
def test_the_rate_rises_to_its_peak_and_never_leaves_its_bounds(warmup, total, schedule):
    config = config_of(warmup=warmup, schedule=schedule)
    paces = [lr_multiplier(config, step, total) for step in range(1, total + 1)]
    assert all(0 < share <= 1 for share in paces)
    assert max(paces) == 1.0
    top = paces.index(1.0)
    assert paces[:top] == sorted(paces[:top])
    assert paces[top:] == sorted(paces[top:], reverse=True)


def test_a_linear_rate_warms_up_and_decays_step_by_step():
    config = config_of(warmup=0.4, schedule="linear")
    expected = [1 / 4, 2 / 4, 3 / 4, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert [lr_multiplier(config, step, 10) for step in range(1, 11)] == pytest.approx(expected)


def test_a_constant_rate_stays_at_its_peak():
    config = config_of(warmup=0.2)
    assert [lr_multiplier(config, step, 10) for step in range(1, 11)] == [0.5] + [1.0] * 9


def test_every_step_is_taken_at_the_schedule_s_rate(data):
    module, config = tiny_module(), config_of(epochs=2, schedule="linear", warmup=0.3)
    optimizer, rates = make_optimizer(module, Optimizer(), None), []
    look = lambda step: rates.append(optimizer.param_groups[0]["lr"])  # noqa: E731
    fit(module, data.train, config, optimizer=optimizer, eval_steps=range(1, 7), on_eval=look)
    assert rates == pytest.approx([0.01 * lr_multiplier(config, step, 6) for step in range(1, 7)])


# Training.


def test_pruned_entries_are_zero_at_every_step_and_kept_ones_move(data):
    module = tiny_module()
    masks, live, start = half_masks(module), state_tensors(module), weights_of(module)
    zeros = []

    def check(*_):
        zeros.append(all(not live[name][~bits].any() for name, bits in masks.items()))

    module.register_forward_pre_hook(check)
    fit(module, data.train, config_of(epochs=2), mask=masks, eval_steps=range(1, 7), on_eval=check)
    assert zeros == [True] * 12  # before each of six forward passes, the first included, and after each step
    for name, bits in masks.items():
        assert (live[name] != start[name])[bits].float().mean() > 0.9


@OPTIMIZERS
def test_a_mask_holds_against_the_momentum_of_the_dense_weights(data, name):
    module = tiny_module()
    optimizer = make_optimizer(module, Optimizer(name=name, weight_decay=0.1), None)
    fit(module, data.train, optimizer=optimizer)
    masks = half_masks(module)
    fit(module, data.train, optimizer=optimizer, mask=masks)
    assert all(not state_tensors(module)[name][~bits].any() for name, bits in masks.items())


def test_training_is_a_function_of_its_seed(data):
    found = []
    for seed, ambient in ((1, 10), (1, 11), (2, 10)):
        module = tiny_module()
        torch.manual_seed(ambient)
        fit(module, data.train, seed=seed)
        found.append(weights_of(module))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_dropout_is_on_while_training_and_off_while_evaluating(data):
    module, modes = tiny_module(), []
    module.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    fit(module, data.train, eval_steps={2}, on_eval=lambda step: modes.append(("look", step, module.training)))
    assert modes == [True, True, ("look", 2, False), True]
    assert not module.training


def test_evaluating_changes_nothing(data):
    found = []
    for looks in ((), (1, 2, 3)):
        module = tiny_module()
        look = partial(lambda module, _: predicted(module, data.validation), module)
        fit(module, data.train, eval_steps=looks, on_eval=look)
        found.append(weights_of(module))
    assert same(*found)


def test_the_share_done_is_told_after_every_step(data):
    shares = []
    fit(tiny_module(), data.train, on_progress=shares.append)
    assert shares == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_gradients_are_clipped_to_their_norm(data):
    moved = []
    for norm in (1e-9, 1.0):
        module = tiny_module()
        start = weights_of(module)
        optimizer = torch.optim.SGD(module.parameters())
        fit(module, data.train, config_of(epochs=0.1), optimizer=optimizer, max_grad_norm=norm)
        moved.append(sum(float((tensor - start[name]).square().sum()) for name, tensor in weights_of(module).items()))
    assert moved[0] <= (1.01 * 0.01 * 1e-9) ** 2 < moved[1] <= (1.01 * 0.01) ** 2


@OPTIMIZERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_learns_the_task(data, name, dtype):
    module = tiny_module(dropout=0.0, dtype=dtype)
    before = loss_of(module, collate(data.validation, np.arange(16), 0)).item()
    fit(module, data.train, config_of(epochs=20), optimizer=make_optimizer(module, Optimizer(name=name), None))
    assert loss_of(module, collate(data.validation, np.arange(16), 0)).item() < before / 2


# The optimizer's state.


@OPTIMIZERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_optimizer_continues_bitwise(data, name, dtype):
    module, config, settings = tiny_module(dtype=dtype), config_of(epochs=0.7), Optimizer(name=name, weight_decay=0.01)
    optimizer = make_optimizer(module, settings, None)
    fit(module, data.train, config, optimizer=optimizer, seed=1)
    weights, state = pack(state_tensors(module)), pack(optimizer_state(module, optimizer))
    assert float(state.views()["step"]) == 2
    fit(module, data.train, config, optimizer=optimizer, seed=2)

    restored = tiny_module(seed=9, dtype=dtype)
    copy_into(weights, state_tensors(restored))
    again = make_optimizer(restored, settings, state.views())
    fit(restored, data.train, config, optimizer=again, seed=2)
    assert same(weights_of(restored), weights_of(module))
    assert same(optimizer_state(restored, again), optimizer_state(module, optimizer))

    copy_into(weights, state_tensors(restored))
    fit(restored, data.train, config, seed=2, optimizer=make_optimizer(restored, settings, None))
    assert not same(weights_of(restored), weights_of(module))  # a fresh optimizer would not have done


@OPTIMIZERS
def test_restoring_copies_the_state(data, name):
    module, settings = tiny_module(), Optimizer(name=name)
    optimizer = make_optimizer(module, settings, None)
    fit(module, data.train, optimizer=optimizer)
    state = {name: tensor.clone() for name, tensor in optimizer_state(module, optimizer).items()}
    before = {name: tensor.clone() for name, tensor in state.items()}
    fit(module, data.train, optimizer=make_optimizer(module, settings, state))
    assert same(state, before)


def test_the_state_is_laid_out_by_moment_and_parameter(data):
    module = tiny_module()
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    expected = {
        "adamw": {f"{moment}/{name}": shape for name, shape in shapes.items() for moment in ("exp_avg", "exp_avg_sq")},
        "adafactor": {
            f"{moment}/{name}": inner
            for name, shape in shapes.items()
            for moment, inner in (
                {"row_var": (shape[0], 1), "col_var": (1, shape[1])} if len(shape) == 2 else {"variance": shape}
            ).items()
        },
    }
    for name, layout in expected.items():
        optimizer = make_optimizer(module, Optimizer(name=name), None)
        fit(module, data.train, optimizer=optimizer)
        state = optimizer_state(module, optimizer)
        assert {key: tuple(value.shape) for key, value in state.items()} == {"step": ()} | layout
        assert list(state) == ["step", *layout]
        assert (float(state["step"]), state["step"].dtype) == (3.0, torch.float32)


def test_an_optimizer_that_took_no_step_has_no_state():
    module = tiny_module()
    assert optimizer_state(module, make_optimizer(module, Optimizer(), None)) == {}
    assert optimizer_state(module, make_optimizer(module, Optimizer(), {})) == {}


@OPTIMIZERS
def test_a_parameter_that_gets_no_gradient_does_not_stop_a_restored_optimizer(name):
    def two_layers():
        torch.manual_seed(0)
        return nn.ModuleDict({"used": nn.Linear(3, 1), "idle": nn.Linear(3, 1)})

    def step(module, optimizer):
        module["used"](torch.ones(2, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    module, settings = two_layers(), Optimizer(name=name)
    optimizer = make_optimizer(module, settings, None)
    step(module, optimizer)
    restored = copy.deepcopy(module)
    again = make_optimizer(restored, settings, optimizer_state(module, optimizer))
    step(module, optimizer)
    step(restored, again)
    assert same(weights_of(restored), weights_of(module))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-6])
def test_a_step_of_adafactor_is_a_share_of_a_matrix_however_small_its_gradient(dtype, scale):
    rng = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 48, bias=False).to(dtype)
    start = layer.weight.clone()
    layer.weight.grad = (scale * torch.randn(48, 64, generator=rng)).to(dtype)
    optimizer = make_optimizer(layer, Optimizer(name="adafactor"), None)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    with torch.no_grad():
        assert float((layer.weight - start).norm() / start.norm()) == pytest.approx(0.1, rel=0.02)


# Losses.


def test_row_losses_are_cross_entropies():
    logits, labels = torch.tensor([[0.0, 0.0], [1.0, 3.0]]), torch.tensor([0, 1])
    expected = [np.log(2), np.log(1 + np.exp(-2))]
    assert CLASSIFICATION.losses(logits, labels).tolist() == pytest.approx(expected)


def test_row_losses_of_a_regression_are_squared_errors():
    logits, labels = torch.tensor([[1.0], [-2.0]], dtype=torch.bfloat16), torch.tensor([1.5, 1.0])
    found = REGRESSION.losses(logits, labels)
    assert found.tolist() == [0.25, 9.0]
    assert found.dtype == torch.float32


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_the_task_loss_is_the_mean_over_rows(uneven, kind):
    module = module_for(kind)
    each = [loss_of(module, collate(uneven, np.array([row]), 0), TASK_LOSSES[kind]).item() for row in range(4)]
    assert loss_of(module, collate(uneven, np.arange(4), 0), TASK_LOSSES[kind]).item() == pytest.approx(np.mean(each))


def test_counts_are_of_what_is_no_padding(uneven):
    assert loss_denominators(uneven.lengths) == LossDenominators(
        rows=4, tokens=22, pairs=9 + 25 + 64 + 36, predicted=18
    )


@pytest.mark.parametrize("kind", TASK_LOSSES)
@pytest.mark.parametrize("distilled", [False, True])
def test_the_losses_of_a_batch_s_parts_add_up_to_its_own(uneven, distilled, kind):
    module, teacher = (module_for(kind, seed) for seed in (0, 1))
    whole = batch_for(kind, uneven, range(4))

    def added(*parts):
        module.zero_grad()
        batches = [batch_for(kind, uneven, part) for part in parts]
        loss = sum(
            loss_of(module, batch, TASK_LOSSES[kind], teacher if distilled else None, counted(whole))
            for batch in batches
        )
        loss.backward()
        return loss.item(), {name: parameter.grad.clone() for name, parameter in module.named_parameters()}

    loss, gradients = added([0, 1, 2, 3])
    for parts in ([0, 2], [1, 3]), ([3], [0, 1, 2]):
        parted_loss, parted_gradients = added(*parts)
        assert parted_loss == pytest.approx(loss, rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(parted_gradients[name], gradient, rtol=1e-3, atol=1e-5)


def one_by_one(module, rows):
    """Of each row minus the log-likelihoods of its tokens but the first, each from what is before it alone."""
    found = []
    for start, end in zip(rows.offsets, rows.offsets[1:], strict=False):
        ids = torch.from_numpy(rows.ids[start:end].astype(np.int64))
        with torch.no_grad():
            found.append(
                [-module(input_ids=ids[None, :i]).logits[0, -1].log_softmax(-1)[ids[i]] for i in range(1, len(ids))]
            )
    return found


def test_a_language_model_s_loss_is_the_mean_over_predicted_tokens(uneven):
    module = module_for("causal-lm")
    costs = one_by_one(module, uneven)
    assert [len(row) for row in costs] == [2, 4, 7, 5]
    found = loss_of(module, batch_for("causal-lm", uneven, range(4)), NEXT_TOKEN)
    assert found.item() == pytest.approx(float(np.mean([cost for row in costs for cost in row])), rel=1e-5)


def test_a_language_model_answers_with_a_row_s_cost_and_its_tokens(uneven, monkeypatch):
    module, rows = module_for("causal-lm"), replace(uneven, types=None)
    expected = torch.tensor([[float(sum(row)), len(row)] for row in one_by_one(module, uneven)])
    whole = predicted(module, rows, NEXT_TOKEN)
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(NEXT_TOKEN.losses(whole, None), expected[:, 0] / expected[:, 1], rtol=1e-5, atol=1e-5)
    sizes = []
    module.register_forward_pre_hook(lambda *given: sizes.append(len(given[2]["input_ids"])), with_kwargs=True)
    monkeypatch.setattr(
        trainer, "MAX_LOGIT_BYTES", 3 * 8 * 4 * module.config.vocab_size
    )  # room for three rows of 8 tokens
    torch.testing.assert_close(predicted(module, rows, NEXT_TOKEN), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(trainer, "MAX_LOGIT_BYTES", 1)
    predicted(module, rows, NEXT_TOKEN)
    assert sizes == [3, 1, 1, 1, 1, 1]


def widened(batch, by):
    """The batch with `by` more columns of padding."""
    return {
        name: tensor if name == "labels" else nn.functional.pad(tensor, (0, by), value=0)
        for name, tensor in batch.items()
    }


@pytest.mark.parametrize("kind", TASK_LOSSES)
@pytest.mark.parametrize("distilled", [False, True])
def test_padding_changes_neither_loss_nor_gradient(uneven, distilled, kind):
    module, teacher = (module_for(kind, seed) for seed in (0, 1))
    batch = batch_for(kind, uneven, range(4))
    found = []
    for inputs in (batch, widened(batch, 7)):
        loss = loss_of(module, inputs, TASK_LOSSES[kind], teacher if distilled else None)
        loss.backward()
        found.append((loss.item(), {name: parameter.grad.clone() for name, parameter in module.named_parameters()}))
        module.zero_grad()
    (loss, gradients), (padded_loss, padded_gradients) = found
    assert padded_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(padded_gradients[name], gradient, rtol=1e-3, atol=1e-5)


def terms_of(module, teacher, rows, predicting=slice(None), apart=1):
    """Sums of the soft cross-entropies (of a language model's tokens, those that are `predicting`), and over layers of
    the errors of hidden states and attentions; how many tokens and pairs: row by row, so that nothing is padded.
    `apart`: how many of the teacher's layers stand for one of the student's."""
    soft, hidden, attention, tokens, pairs = 0.0, 0.0, 0.0, 0, 0
    for inputs in rows:
        with torch.no_grad():
            mine, theirs = (m(**inputs, output_attentions=True, output_hidden_states=True) for m in (module, teacher))
        soft += float(-(theirs.logits.softmax(-1) * mine.logits.log_softmax(-1))[:, predicting].sum())
        for ours, taught in zip(mine.hidden_states, theirs.hidden_states[::apart], strict=True):
            hidden += float((ours - taught).square().mean(-1).sum())
        for ours, taught in zip(mine.attentions, theirs.attentions[apart - 1 :: apart], strict=True):
            attention += float((ours - taught).square().mean(1).sum())
        length = inputs["input_ids"].shape[1]
        tokens, pairs = tokens + length, pairs + length**2
    return soft, hidden, attention, tokens, pairs


@pytest.mark.parametrize("apart", [1, 3])
def test_distillation_is_the_sum_of_its_terms_over_real_tokens(uneven, apart):
    module, teacher = tiny_module(0), tiny_module(1, num_hidden_layers=2 * apart)
    batches = (collate(uneven, np.array([row]), 0) for row in range(4))
    rows = ({name: tensor for name, tensor in batch.items() if name != "labels"} for batch in batches)
    soft, hidden, attention, tokens, pairs = terms_of(module, teacher, rows, apart=apart)
    found = loss_of(module, collate(uneven, np.arange(4), 0), teacher=teacher).item()
    assert found == pytest.approx(soft / 4 + hidden / tokens + attention / pairs, rel=1e-5)


def test_soft_targets_of_a_language_model_are_those_of_predicted_tokens(uneven):
    module, teacher = (module_for("causal-lm", seed) for seed in (0, 1))
    whole = loss_of(module, batch_for("causal-lm", uneven, range(4)), NEXT_TOKEN, teacher).item()
    batches = (batch_for("causal-lm", uneven, [row]) for row in range(4))
    rows = ({name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches)
    soft, hidden, attention, tokens, pairs = terms_of(module, teacher, rows, slice(-1))
    assert whole == pytest.approx(soft / (tokens - 4) + hidden / tokens + attention / pairs, rel=1e-5)


def test_a_model_that_is_its_own_teacher_is_left_with_the_teacher_s_entropy(uneven):
    module = tiny_module()
    batch = collate(uneven, np.arange(4), 0)
    logits = predicted(module, uneven)
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    loss = loss_of(module, batch, teacher=module)
    assert loss.item() == pytest.approx(float(entropy), rel=1e-6)
    loss.backward()
    assert max(float(parameter.grad.abs().max()) for parameter in module.parameters()) < 1e-6


def test_a_regression_that_is_its_own_teacher_is_left_with_the_labels_error(uneven):
    module = tiny_module(num_labels=1)
    batch = collate(uneven, np.arange(4), 0)
    errors = REGRESSION.losses(predicted(module, uneven), batch["labels"])
    assert loss_of(module, batch, REGRESSION, module).item() == pytest.approx(float(errors.mean()), rel=1e-6)


def test_an_encoder_with_a_decoder_is_distilled_in_both_and_padding_changes_nothing(uneven):
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = tiny_config("bart", d_model=16, encoder_ffn_dim=32, decoder_ffn_dim=32, init_std=0.2, **sizes)
    config.eos_token_id = 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, teacher = (build_model(config, show_attention=True).eval() for _ in range(2))
    rows = replace(uneven, types=None, ids=uneven.ids + 3)
    rows.ids[rows.offsets[1:] - 1] = 3  # each row ends with the token at which the model reads the class
    batch = collate(rows, np.arange(4), 0)
    single = (
        loss_of(module, collate(rows, np.array([row]), 0), teacher=teacher, whole=counted(batch)) for row in range(4)
    )
    whole = loss_of(module, batch, teacher=teacher)
    assert whole.item() == pytest.approx(sum(loss.item() for loss in single), rel=1e-5)
    whole.backward()
    parts = ("encoder.layers.0.self_attn.q_proj", "decoder.layers.0.encoder_attn.k_proj")
    assert all(module.get_parameter(f"model.{part}.weight").grad.abs().max() > 1e-6 for part in parts)


def test_a_model_with_other_layers_than_its_teacher_is_refused(uneven):
    batch = collate(uneven, np.arange(4), 0)
    with pytest.raises(ValueError, match=r"^the model returns 2 layers, and its teacher 3$"):
        loss_of(tiny_module(), batch, teacher=tiny_module(1, num_hidden_layers=3))
    blind = mock.Mock(return_value=SimpleNamespace(logits=torch.zeros(4, 2), hidden_states=(1,)))
    with pytest.raises(ValueError, match=r"^the model returns hidden_states, attentions, its teacher hidden_states$"):
        loss_of(tiny_module(), batch, teacher=blind)


def test_the_teacher_gets_no_gradient(uneven):
    module, teacher = tiny_module(0), tiny_module(1)
    loss_of(module, collate(uneven, np.arange(4), 0), teacher=teacher).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_distilling_draws_a_student_near_its_teacher(data):
    module, teacher = tiny_module(0, dropout=0.0), tiny_module(1)
    batch = collate(data.validation, np.arange(16), 0)
    before = loss_of(module, batch, teacher=teacher).item()
    fit(module, data.train, config_of(epochs=8), teacher=teacher)
    assert loss_of(module, batch, teacher=teacher).item() < before / 2


# Predictions.


def test_predictions_are_in_the_order_of_the_rows(monkeypatch):
    monkeypatch.setattr(trainer, "MAX_EVAL_ROWS", 4)
    lengths = np.random.default_rng(0).integers(1, 20, 30)
    rows, module = numbered(lengths), tiny_module()
    found = predicted(module, rows)
    assert found.shape == (30, 2)
    assert found.std(0).min() > 0.01
    for row in range(30):
        batch = collate(rows, np.array([row]), 0)
        del batch["labels"]
        torch.testing.assert_close(found[row], module(**batch).logits[0].detach(), rtol=1e-4, atol=1e-5)


def test_predictions_are_float32_and_need_no_gradient(uneven):
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    found = predicted(tiny_module(), uneven, autocast=autocast)
    assert (found.dtype, found.requires_grad) == (torch.float32, False)
