"""How good is a checkpoint, measured as a search's report measures its own?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from raymask.config import load_spec, make_spec, overridden
from raymask.core import seeds
from raymask.core.errors import UserError
from raymask.core.records import Row
from raymask.core.seeds import derive
from raymask.core.spec import QUICKSTART, Levels, Mask, Spec
from raymask.core.stats import bootstrap
from raymask.core.tensors import Packed, load, pack
from raymask.driver.local import device_for
from raymask.driver.search import Plan, initial, prepare
from raymask.export.sparse import SPARSE, load_sparse
from raymask.report.terminal import say
from raymask.report.words import blocks, constant_lines, percent
from raymask.train.metrics import only_answer
from raymask.train.model import count_sizes, persistent
from raymask.train.worker import Worker, isolated


def show_evaluation(
    console: Console, model: str, task: str, overrides: Sequence[str] = (), as_json: bool = False
) -> None:
    """Evaluate, and print metrics with intervals and how much of the model is zero, or the same as JSON."""
    plan = prepare(evaluation(model, task, overrides))
    row = evaluate(plan)
    data = plan.job.data
    if as_json:
        print(json.dumps({"rows": len(data.report), **row.model_dump()}, indent=1))
        return
    table = Table()
    for head in ("", "on `report`", "95 % interval"):
        table.add_column(head, justify="right" if head else "left")
    for name, value in row.report.items():
        between = row.intervals[name]
        table.add_row(name, f"{value:.4f}", f"{between.low:.4f} to {between.high:.4f}")
    console.print(table)
    zeros = {"prunable": "prunable weights", "encoder": blocks(data.kind), "whole": "whole model"}
    shares = ", ".join(f"{percent(row.sparsity[key])} of the {name}" for key, name in zeros.items())
    say(console, f"{len(data.report):,} rows of `report`. Exact zeros: {shares}.")
    for line in constant_lines([row]):
        say(console, line)


def evaluation(model: str, task: str, overrides: Sequence[str] = ()) -> Spec:
    """The spec of a search that would start from this model, fine-tuned as it is.

    `task`: a name, or a YAML spec, of which everything counts by which a report's figures could differ. Raises
    UserError when it is neither.
    """
    if Path(task).suffix in (".yaml", ".yml"):
        spec = load_spec(task, overrides)
    else:
        # the quickstart's model goes with its task only
        named = {"model": task if task == QUICKSTART else model, "task": task}
        spec = make_spec(overridden(named, overrides), source="--task")
    other = {"name": model} if spec.model.name == model else {"name": model, "revision": None}
    changes = {
        "model": spec.model.model_copy(update=other),
        "dense": spec.dense.model_copy(update={"epochs": 0.0}),
        "levels": Levels(sparsities=(0.5,)),  # nothing is pruned: what every model can be
        "mask": Mask(),
    }
    return spec.model_copy(update=changes)


def evaluate(plan: Plan) -> Row:
    """The model's metrics on `report`, with intervals, and the share of exact zeros in the three denominators.

    Raises UserError when the model is not fine-tuned for this task, or its outputs are not finite.
    """
    spec, data = plan.recipe.spec, plan.job.data
    weights = weights_of(plan)
    worker = Worker(plan.job, device_for(spec))
    require_same_shapes(spec.model.name, weights, worker)
    with isolated(spec, worker.device):
        load(weights, worker.live)
        logits = worker.answers(data.report, nullcontext).numpy()
    if not np.isfinite(logits).all():
        raise UserError(f"model.name: {spec.model.name} has outputs on `report` that are no numbers")
    names = tuple(data.measure_report(logits))
    figures = bootstrap(
        len(data.report),
        lambda rows: list(data.measure_report(logits, rows).values()),
        derive(spec.seed, seeds.BOOTSTRAP),  # as in a search's report
    )
    zeros = count_sizes(worker.module, plan.source.prunable, lambda weight: int((weight == 0).sum()))
    sizes = asdict(plan.source.sizes)
    return Row(
        name=spec.model.name,
        report={name: figure.mean for name, figure in zip(names, figures, strict=True)},
        intervals=dict(zip(names, figures, strict=True)),
        sparsity={name: count / sizes[name] for name, count in asdict(zeros).items()},
        always=only_answer(plan.corpus.classes, logits),
    )


def weights_of(plan: Plan) -> Packed:
    """A checkpoint's weights, or those of a folder that `raymask export --to sparse` wrote."""
    model = plan.recipe.spec.model
    if not (Path(model.name) / SPARSE).is_file():
        return initial(plan).weights
    return pack(persistent(load_sparse(model.name, trust_remote_code=model.trust_remote_code)))


def require_same_shapes(name: str, weights: Packed, worker: Worker) -> None:
    """Raise UserError when a model was made for another kind of task, or for other classes."""
    there = {key: shape for key, (_, _, shape, _) in weights.index.items()}
    for key, tensor in worker.live.items():
        if there.get(key) != tuple(tensor.shape):
            has = f"its {key} has shape {there[key]}" if key in there else f"it has no {key}"
            raise UserError(
                f"model.name: {name} was made for another task: {has}, this one needs {tuple(tensor.shape)}"
            )
