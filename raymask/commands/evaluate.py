"""Evaluation of any checkpoint, with the metrics and intervals of a search's report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from os.path import expanduser
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from raymask.config import apply_overrides, load_spec, make_spec
from raymask.core import seeds
from raymask.core.errors import UserError
from raymask.core.records import ModelMetrics
from raymask.core.seeds import derive
from raymask.core.spec import QUICKSTART, Levels, MaskOptions, Spec
from raymask.core.stats import bootstrap
from raymask.core.tensors import PackedTensors, copy_into, pack
from raymask.data.metrics import constant_prediction
from raymask.driver.setup import SearchSetup, load_initial, prepare
from raymask.executor.local_executor import device_for
from raymask.export.sparse import SPARSE, load_sparse
from raymask.report.console import say
from raymask.report.text import blocks, constant_lines, metric_label, percent
from raymask.train.device import isolated_torch_state
from raymask.train.model import state_tensors
from raymask.train.prunable import count_sizes
from raymask.train.worker import Worker


def show_evaluation(
    console: Console, model: str, task: str, overrides: Sequence[str] = (), as_json: bool = False
) -> None:
    """Evaluate a checkpoint, and print its metrics with 95 % intervals and its sparsity.

    Args:
        console: Where the output goes.
        model: A hub id, or a folder with a checkpoint.
        task: A task's name, or the path of a YAML spec.
        overrides: Overrides of the spec, `KEY=VALUE`.
        as_json: Print JSON instead of a table.

    Raises:
        UserError: When the model or the task cannot be evaluated.
    """
    setup = prepare(eval_spec(model, task, overrides), test_only=True)
    row = evaluate(setup)
    data = setup.context.data
    if as_json:
        print(json.dumps({"rows": len(data.test), **row.model_dump()}, indent=1))
        return
    table = Table()
    for head in ("", "on `test`", "95 % interval"):
        table.add_column(head, justify="right" if head else "left")
    for name, value in row.test_metrics.items():
        interval = row.intervals[name]
        table.add_row(
            metric_label(name, setup.dataset.classes, data.positive),
            f"{value:.4f}",
            f"{interval.low:.4f} to {interval.high:.4f}",
        )
    console.print(table)
    zeros = {"prunable": "prunable weights", "encoder": blocks(data.kind), "whole": "whole model"}
    shares = ", ".join(f"{percent(row.sparsity[key])} of the {name}" for key, name in zeros.items())
    say(console, f"{len(data.test):,} rows of `test`. Exact zeros: {shares}.")
    for line in constant_lines([row]):
        say(console, line)


def eval_spec(model: str, task: str, overrides: Sequence[str] = ()) -> Spec:
    """The spec of a search that starts from this model without fine-tuning it.

    Args:
        model: A hub id, or a folder with a checkpoint.
        task: A task's name, or the path of a YAML spec. Everything in the spec that could change a report's metrics
            applies.
        overrides: Overrides of the spec, `KEY=VALUE`.

    Raises:
        UserError: When `task` is neither a task's name nor a valid spec.
    """
    model = expanduser(model)
    if Path(task).suffix in (".yaml", ".yml"):
        spec = load_spec(task, overrides)
    else:
        # the quickstart's task only goes with its own model
        settings = {"model": task if task == QUICKSTART else model, "task": task}
        spec = make_spec(apply_overrides(settings, overrides), source="--task")
    new_model = {"name": model} if spec.model.name == model else {"name": model, "revision": None}
    changes = {
        "model": spec.model.model_copy(update=new_model),
        "dense": spec.dense.model_copy(update={"epochs": 0.0}),
        "levels": Levels(sparsities=(0.5,)),  # never used: nothing is pruned here
        "mask": MaskOptions(),
    }
    return spec.model_copy(update=changes)


def evaluate(setup: SearchSetup) -> ModelMetrics:
    """The model's metrics on `test` with intervals, and its share of exact zeros in the three denominators.

    Args:
        setup: The setup of the spec from `eval_spec`.

    Raises:
        UserError: When the model is not fine-tuned for this task, or its outputs are not finite.
    """
    spec, data = setup.recipe.spec, setup.context.data
    weights = read_weights(setup)
    worker = Worker(setup.context, device_for(spec))
    require_same_shapes(spec.model.name, weights, worker)
    with isolated_torch_state(spec, worker.device):
        copy_into(weights, worker.named_tensors)
        logits = worker.trainer.without_autocast.predict(data.test).numpy()
    if not np.isfinite(logits).all():
        raise UserError(f"model.name: {spec.model.name} has outputs on `test` that are not finite")
    names = tuple(data.test_metrics(logits))
    estimates = bootstrap(
        len(data.test),
        lambda rows: list(data.test_metrics(logits, rows).values()),
        derive(spec.seed, seeds.BOOTSTRAP),  # the same seed as in a search's report
    )
    zeros = count_sizes(worker.module, setup.model_info.prunable, lambda weight: int((weight == 0).sum()))
    sizes = asdict(setup.model_info.sizes)
    return ModelMetrics(
        name=spec.model.name,
        test_metrics={name: estimate.mean for name, estimate in zip(names, estimates, strict=True)},
        intervals=dict(zip(names, estimates, strict=True)),
        sparsity={name: count / sizes[name] for name, count in asdict(zeros).items()},
        constant_prediction=constant_prediction(setup.dataset.classes, logits),
    )


def read_weights(setup: SearchSetup) -> PackedTensors:
    """The weights of a checkpoint, or of a folder that `raymask export --to sparse` wrote."""
    model = setup.recipe.spec.model
    if not (Path(model.name) / SPARSE).is_file():
        return load_initial(setup).weights
    return pack(state_tensors(load_sparse(model.name, trust_remote_code=model.trust_remote_code)))


def require_same_shapes(name: str, weights: PackedTensors, worker: Worker) -> None:
    """Raise UserError when the checkpoint's shapes do not fit: it is for another kind of task, or for other classes."""
    shapes = {key: shape for key, (_, _, shape, _) in weights.index.items()}
    for key, tensor in worker.named_tensors.items():
        if shapes.get(key) != tuple(tensor.shape):
            reason = f"its {key} has shape {shapes[key]}" if key in shapes else f"it has no {key}"
            raise UserError(
                f"model.name: {name} was made for another task: {reason}, this one needs {tuple(tensor.shape)}"
            )
