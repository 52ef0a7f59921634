"""Calibration: inputs and gradients over all tokens of all rows."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from support.builders import DECODERS, FAMILIES, refused, tiny_context, tiny_snapshot

from raymask.core.masking.scorers import Calibration
from raymask.core.tensors import copy_into
from raymask.data.types import TokenizedSplit
from raymask.train import calibration, worker
from raymask.train.batches import collate
from raymask.train.calibration import calibrate
from raymask.train.losses import TASK_LOSSES, loss_denominators
from raymask.train.model import build_model, state_tensors
from raymask.train.prunable import matrices, transposed_weights
from raymask.train.trainer import mean_label_loss


def prepared(family="bert", *, regression=False, **settings):
    """A tiny model in evaluation mode, and its job."""
    job = tiny_context(family, regression=regression, **settings)
    module = build_model(job.config, kind=job.data.kind).eval()
    copy_into(tiny_snapshot(job).weights, state_tensors(module))
    return module, job


def ragged(rows):
    """The rows, cut to lengths of 3 to 6 tokens at most in turn."""
    lengths = np.minimum(3 + np.arange(len(rows)) % 4, rows.lengths)
    kept = np.concatenate([start + np.arange(length) for start, length in zip(rows.offsets, lengths, strict=False)])
    types = None if rows.types is None else rows.types[kept]
    return TokenizedSplit(rows.ids[kept], types, np.concatenate([[0], np.cumsum(lengths)]), rows.labels)


def calibrated(module, job):
    rows = ragged(job.data.train)
    return calibrate(module, job.model.prunable, rows, padding=job.data.padding, task_loss=TASK_LOSSES[job.data.kind])


def one_by_one(module, job):
    """The same row after row, without padding: (squares of the inputs, gradients) by name."""
    rows = ragged(job.data.train)
    layers = {name: module.get_submodule(name.removesuffix(".weight")) for name in job.model.prunable}
    squares = {name: torch.zeros(weight.shape[1]) for name, weight in matrices(module, job.model.prunable).items()}

    def hear(name):
        def add(layer, inputs):
            squares[name].add_(inputs[0].detach().flatten(0, -2).square().sum(0))

        return add

    hooks = [layers[name].register_forward_pre_hook(hear(name)) for name in job.model.prunable]
    for row in range(len(rows)):
        batch = collate(rows, np.array([row]), job.data.padding)
        mean_label_loss(module, batch, TASK_LOSSES[job.data.kind], loss_denominators(rows.lengths)).backward()
    for hook in hooks:
        hook.remove()
    gradients = {name: module.get_parameter(name).grad.clone() for name in job.model.prunable}
    gradients |= {name: gradients[name].T for name in transposed_weights(module) & gradients.keys()}
    module.zero_grad(set_to_none=True)
    return squares, gradients


@pytest.mark.parametrize(
    ("family", "regression"), [*product(FAMILIES, [False, True]), *((family, False) for family in DECODERS)]
)
def test_it_is_what_rows_without_padding_add_up_to(family, regression):
    module, job = prepared(family, regression=regression)
    found = calibrated(module, job)
    squares, gradients = one_by_one(module, job)
    assert list(found) == list(job.model.prunable)
    for name, seen in found.items():
        torch.testing.assert_close(seen.inputs, squares[name].sqrt(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(seen.gradient, gradients[name], rtol=1e-3, atol=1e-6)
        assert bool((seen.inputs > 0).any())
        assert bool((seen.gradient != 0).any())


def test_batches_change_nothing_but_the_order_of_sums(monkeypatch):
    module, job = prepared()
    whole = calibrated(module, job)
    monkeypatch.setattr(calibration, "MAX_BATCH_ROWS", 7)
    for name, seen in calibrated(module, job).items():
        torch.testing.assert_close(seen.inputs, whole[name].inputs, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(seen.gradient, whole[name].gradient, rtol=1e-3, atol=1e-6)


def test_of_weights_in_bf16_it_is_summed_in_float32():
    exact, rough = (calibrated(*prepared(model={"dtype": dtype}, precision="auto")) for dtype in ("fp32", "bf16"))
    for name, seen in rough.items():
        assert seen.inputs.dtype == seen.gradient.dtype == torch.float32
        torch.testing.assert_close(seen.inputs, exact[name].inputs, rtol=0.05, atol=0.05)
        error = (seen.gradient - exact[name].gradient).norm() / exact[name].gradient.norm()
        assert 0 < error < 0.1


def test_it_is_the_same_to_the_bit_and_leaves_nothing_behind():
    module, job = prepared()
    before = {name: tensor.clone() for name, tensor in state_tensors(module).items()}
    first, again = calibrated(module, job), calibrated(module, job)
    assert all(torch.equal(first[name].inputs, again[name].inputs) for name in first)
    assert all(torch.equal(first[name].gradient, again[name].gradient) for name in first)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_tensors(module).items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not any(layer._forward_pre_hooks for layer in module.modules())
    assert not module.training


def test_a_layer_that_is_not_called_has_no_inputs_and_gradients_of_zero():
    module, job = prepared()
    module.add_module("unused", torch.nn.Linear(4, 3))
    shapes = job.model.shapes | {"unused.weight": (3, 4)}
    found = calibrated(module, replace(job, model=replace(job.model, shapes=shapes)))
    assert found["unused.weight"].inputs is None
    assert torch.equal(found["unused.weight"].gradient, torch.zeros(3, 4))


def test_wanda_refuses_weights_whose_inputs_it_has_not_seen(monkeypatch):
    job = tiny_context(mask={"score": "wanda"})
    monkeypatch.setattr(worker, "calibrate", lambda *arguments, **options: {"a": Calibration(None, torch.zeros(2, 2))})
    assert refused(worker.Worker(job, "cpu").calibrate).startswith(
        "mask.score: wanda needs the inputs of all weights, and 1 have none, such as a, whose layer is never called or "
    )
    saliency = worker.Worker(tiny_context(mask={"score": "saliency"}), "cpu")
    assert list(saliency.calibrate()) == ["a"]
