"""Dry run: a few steps of everything that a spec asks of a model, on a few of the task's rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from raymask.core.errors import UserError, first_line
from raymask.core.recipe import deterministic_candidate, finetune_config, resolve
from raymask.core.tasks import Snapshot
from raymask.core.tensors import PackedTensors
from raymask.data.types import TokenizedSplit
from raymask.train.context import WorkerContext
from raymask.train.device import isolated_torch_state
from raymask.train.model import quiet
from raymask.train.worker import Worker

ROWS = 2  # of the shortest and of the longest rows of each split, and of a batch

MAX_BATCH_EFFECT = 0.05  # of the largest output: a smaller difference is rounding in bf16

CHANGES: tuple[Mapping[str, Any], ...] = (
    {},
    {"precision": "fp32"},
    {"distill": False},
    {"precision": "fp32", "distill": False},
)
"""Changes of the spec with which a model that fails is tried again."""


@dataclass(frozen=True)
class DryRun:
    """What a dry run found.

    Attributes:
        precision: The spec's precision, or "fp32" where that is "auto" and the model fails in bf16.
        batch_effect: The largest change of an output between a row alone and the row in a batch with longer ones, as a
            share of the largest output. Only rounding is left of it where a model ignores padding.
        activation_bytes: Bytes that a training step keeps for its backward pass, for each row of the longest length.
        error: The error in bf16; None if there was none.
    """

    precision: str
    batch_effect: float
    activation_bytes: int
    error: str | None = None


def dry_run(context: WorkerContext, weights: PackedTensors) -> DryRun:
    """Train and evaluate a model on a few rows, on the CPU of this process, masked and distilled as the spec asks.

    Args:
        context: What a worker of the search needs.
        weights: The model's weights.

    Raises:
        UserError: The model fails. The message has the change of the spec with which it does not, if there is one.
    """
    spec, errors = context.spec, []
    # bf16 also where this CPU is slow in it: the workers may have other devices
    asked = spec.model_copy(update={"precision": "bf16"}) if spec.precision == "auto" else spec
    for changes in CHANGES:
        changed = asked.model_copy(update=changes)
        if changes and changed == asked:
            continue
        try:
            found = run_steps(replace(context, spec=changed), weights)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - a model's own code raises anything
            errors.append(f"{type(error).__name__}: {first_line(error)}")
            continue
        if not errors:
            return replace(found, precision=spec.precision)
        if changes.keys() == {"precision"} and spec.precision == "auto":
            return replace(found, error=errors[0])
        named = [key for key in changes if key != "precision" or spec.precision != "auto"]
        advice = ", ".join(f"{key}: {str(changes[key]).lower()}" for key in named)
        raise UserError(
            f"model.name: {spec.model.name} fails on the task's rows ({errors[0]}). It does not with {advice}"
        )
    raise UserError(f"model.name: {spec.model.name} fails on the task's rows: {errors[0]}")


def dry_run_memory(context: WorkerContext) -> int:
    """Estimated memory of a dry run in bytes: weights twice, gradients, moments, masks, and the teacher."""
    return 2**29 + 4 * context.model_bytes + context.moment_bytes + context.spec.uses_teacher * context.teacher_bytes


def run_steps(context: WorkerContext, weights: PackedTensors) -> DryRun:
    """Predict, draw the magnitude mask of level 1, train with it for a few steps, and evaluate.

    Args:
        context: What a worker of the search needs.
        weights: The model's weights, which are also the teacher's.

    Raises:
        FloatingPointError: The loss is not finite. Other errors are the model's own.
    """
    data, spec = context.data, context.spec
    worker = Worker(replace(context, data=replace(data, train=extreme_rows(data.train))), "cpu")
    parent = Snapshot("dry run", weights, teacher=weights if spec.uses_teacher else None)
    recipe = resolve(spec)
    config = finetune_config(recipe, 1).model_copy(update={"epochs": 1.0, "batch_size": ROWS})

    def train(rows: TokenizedSplit) -> int:
        """Train on these rows for an epoch; returns the bytes that were kept for the backward passes."""
        teacher = worker.teacher_outputs(parent, config, 0, 0, cache=False)
        with saved_for_backward(worker.module) as sizes:
            list(worker.trainer.train(rows, config, optimizer, mask, seed=0, teacher=teacher))
        return sum(sizes.values())

    with quiet(), isolated_torch_state(spec, worker.device):
        mask, _ = worker.reset(parent, deterministic_candidate(recipe, 1))
        worker.trainer.predict(extreme_rows(data.test))
        effect = batch_effect(worker, extreme_rows(data.validation))
        optimizer, longest = worker.optimizer(parent), np.argsort(-data.train.lengths, kind="stable")[:ROWS]
        one, two = (train(data.train.take(np.sort(longest[:count]))) for count in (1, ROWS))
        train(extreme_rows(data.train))
        point, _ = worker.evaluate_model(worker.trainer, 1, extreme_rows(data.validation))
    if not np.isfinite(point.loss):
        raise FloatingPointError(f"the loss is {point.loss}")
    return DryRun(spec.precision, effect, max(two - one, 0))


@contextmanager
def saved_for_backward(module: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Run a block and note what it keeps for backward passes, weights left out.

    Yields:
        Bytes by address. Memory that is freed and taken again counts once.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = max(storage.nbytes(), sizes.get(storage.data_ptr(), 0))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield sizes


def extreme_rows(rows: TokenizedSplit) -> TokenizedSplit:
    """The ROWS shortest and the ROWS longest rows, in their original order."""
    order = np.argsort(rows.lengths, kind="stable")
    return rows.take(np.unique([*order[:ROWS], *order[-ROWS:]]))


def batch_effect(worker: Worker, rows: TokenizedSplit) -> float:
    """`DryRun.batch_effect` of these rows.

    Raises:
        UserError: The outputs for a row change once the model has seen shorter ones.
    """
    from_longest = np.argsort(-rows.lengths, kind="stable")
    alone = torch.cat([worker.trainer.without_autocast.predict(rows.take(np.array([row]))) for row in from_longest])
    together = worker.trainer.without_autocast.predict(rows)[torch.from_numpy(from_longest)]
    again = worker.trainer.without_autocast.predict(rows.take(from_longest[:1]))
    if not torch.allclose(again, alone[:1], rtol=1e-3):  # the same batch again: not even rounding may differ
        raise UserError(
            f"model.name: {worker.context.spec.model.name} gives a row other outputs once it has seen shorter ones, so "
            'that results would depend on the order of the work. If it is a BigBird, write "attention_type": '
            '"original_full" in its config.json'
        )
    largest = max(float(together.abs().max()), torch.finfo(torch.float32).tiny)
    return float((together - alone).abs().max()) / largest
