"""Dry run of a search: what it reads, prunes, costs and needs."""

from __future__ import annotations

import math
import sys

from rich.console import Console
from rich.table import Table

from raymask.core.masking.masks import matrix_shapes, max_kept
from raymask.core.recipe import Recipe, has_baseline, num_parents, planned_epochs
from raymask.core.spec import Spec
from raymask.core.successive_halving import rung_sizes
from raymask.data.types import RawDataset
from raymask.driver.setup import SearchSetup, apply_dry_run, prepare, require_distinct_splits
from raymask.report.console import say
from raymask.report.text import blocks, metric_label, percent
from raymask.train.model import ModelInfo
from raymask.train.prunable import name_pattern

GIB = 2**30


MIN_PRUNABLE_SHARE = 0.5  # of the blocks' weights, below which a warning is printed

MAX_LISTED_CLASSES = 10  # number of classes that are listed by name


def show_check(console: Console, spec: Spec, address: str | None) -> None:
    """Read everything that a search reads, weights included, and print what it would do.

    Args:
        console: Where the output goes.
        spec: The search's spec.
        address: A Ray cluster; None: this machine.

    Raises:
        UserError: Where the search would raise it.
    """
    require_distinct_splits(spec.task)
    setup = apply_dry_run(prepare(spec), lambda text: say(console, text))
    show_model(console, setup)
    console.print(weight_table(setup.model_info))
    show_left_out(console, setup.model_info)
    show_data(console, setup)
    console.print(planned_levels(setup))
    show_rungs(console, setup)
    show_cost(console, setup)
    show_resources(console, setup, address)
    say(console, "Everything is readable, and a few steps of training and evaluation work.")


def show_model(console: Console, setup: SearchSetup) -> None:
    """Print the model's size and what is pruned."""
    sizes, model, body = setup.model_info.sizes, setup.recipe.spec.model, blocks(setup.model_info.kind)
    say(
        console,
        f"model    {model.name}: {sizes.whole:,} parameters in {model.dtype}, {sizes.encoder:,} in the {body}; "
        f"{len(matrix_shapes(setup.model_info.shapes))} matrices with {sizes.prunable:,} weights to prune",
    )


def weight_table(model_info: ModelInfo) -> Table:
    """The table of what is pruned and what else is in the blocks: all weights whose names differ in numbers only.

    Vectors, which are biases and the scales of norms, are one row.
    """
    table = Table(title="weights in the blocks", title_justify="left")
    table.add_column("name", overflow="fold")
    table.add_column("")
    for head in ("shape", "count", "share"):
        table.add_column(head, justify="right")
    rows: dict[tuple[str, str, str], list[int]] = {}
    for name, shape in model_info.shapes.items():
        rows.setdefault((name_pattern(name), "pruned", " x ".join(map(str, shape))), []).append(math.prod(shape))
    for name, shape in model_info.left_out.items():
        row = (name_pattern(name), " x ".join(map(str, shape))) if len(shape) > 1 else ("vectors", "")
        rows.setdefault((row[0], "left out", row[1]), []).append(math.prod(shape))
    for (name, treatment, size), sizes in rows.items():
        share = sum(sizes) / model_info.sizes.encoder
        table.add_row(name, treatment, size, f"{len(sizes):,}", percent(share))
    return table


def show_left_out(console: Console, model_info: ModelInfo) -> None:
    """Print a warning if less than half of the blocks' weights is pruned."""
    share = model_info.sizes.prunable / model_info.sizes.encoder
    if share < MIN_PRUNABLE_SHARE:
        say(
            console,
            f"warning  only {percent(share)} of the weights in the blocks can become zeros: sparsities are relative to "
            "these. See what is left out above; model.include chooses other weights",
        )


def show_data(console: Console, setup: SearchSetup) -> None:
    """Print the task's kind, metrics and number of rows by split."""
    data, dataset = setup.context.data, setup.dataset
    kind = dataset.kind
    if isinstance(dataset, RawDataset) and dataset.classes:
        kind = f"{len(dataset.classes)} classes ({numbered_classes(dataset)})"
    metrics = ", ".join(metric_label(name, dataset.classes, data.positive) for name in data.metrics)
    say(
        console,
        f"task     {kind}, {metrics}; rows: {len(data.train):,} train, {len(data.validation):,} "
        f"validation ({len(setup.context.scored_rows):,} of them score candidates), {len(data.test):,} test; "
        f"{data.train.lengths.mean():.0f} tokens a row, up to {data.train.lengths.max()}",
    )


def numbered_classes(dataset: RawDataset) -> str:
    """The first few classes with their numbers, as text; also what the rows call them if it is another name."""
    seen = {*dataset.train.labels.tolist(), *dataset.validation.labels.tolist()}
    named = [
        f"{number} = {name}"
        + (f" ({label} in the rows)" if label != name else "")
        + ("" if number in seen else " (no row of train)")
        for number, (name, label) in enumerate(zip(dataset.classes, dataset.class_labels, strict=True))
    ]
    more = ["..."] if len(named) > MAX_LISTED_CLASSES else []
    return ", ".join(named[:MAX_LISTED_CLASSES] + more)


def planned_levels(setup: SearchSetup) -> Table:
    """The table of levels: what each prunes, relative to the prunable weights, the blocks, and the whole model."""
    table = Table(title="levels", title_justify="left")
    zeros = f"zeros in {blocks(setup.model_info.kind)}"
    for head in ("level", "sparsity", "weights kept", zeros, "zeros in whole model", "candidates"):
        table.add_column(head, justify="right")
    for level, density in enumerate(setup.recipe.densities, 1):
        num_kept = sum(max_kept(setup.model_info.shapes, density, setup.recipe.method).values())
        shares = setup.model_info.sizes.sparsities(setup.model_info.sizes.prunable - num_kept)
        random, parents = setup.recipe.spec.candidates.count, num_parents(setup.recipe.spec, level)
        pool = f"magnitude mask + {random}" if random else "magnitude mask"
        if parents > 1:
            pool = f"{parents} x ({pool})"
        table.add_row(
            str(level),
            percent(shares["prunable"]),
            f"{num_kept:,}",
            percent(shares["encoder"]),
            percent(shares["whole"]),
            pool,
        )
    return table


def show_rungs(console: Console, setup: SearchSetup) -> None:
    """Print how many random masks of a level reach each rung, if there are several rungs."""
    spec = setup.recipe.spec
    rungs = spec.early_eval.rungs
    if len(rungs) > 1:
        sizes = zip(rung_sizes(spec.candidates.count, rungs), rungs, strict=True)
        parts = ", ".join(f"{count} to {share:.0%}" for count, share in sizes)
        say(
            console,
            f"rungs    of {spec.candidates.count} random masks {parts} of the early evaluation, and every "
            "magnitude mask",
        )


def show_cost(console: Console, setup: SearchSetup) -> None:
    """Print the epochs of training by phase, the memory of a worker, and the disk that the run takes."""
    epochs = planned_epochs(setup.recipe)
    parts = ", ".join(f"{count:g} {phase}" for phase, count in epochs.items() if count)
    worker, shared = setup.context.peak_host_memory(on_gpu=False) / GIB, setup.context.object_store_memory / GIB
    say(console, f"cost     {sum(epochs.values()):g} epochs of training: {parts}")
    say(
        console,
        f"memory   about {worker:.1f} GiB per worker on a CPU, {shared:.1f} GiB shared by all workers of a node",
    )
    say(console, f"disk     about {setup.context.run_dir_bytes / GIB:.1f} GiB in the run directory")


def show_resources(console: Console, setup: SearchSetup, address: str | None) -> None:
    """Print the resources of a worker and of the machine or cluster, and how many workers fit.

    Args:
        console: Where the output goes.
        setup: The search's setup.
        address: A Ray cluster; None: this machine.

    Raises:
        UserError: When no worker fits, and the spec does not wait for the cluster to grow.
    """
    section = setup.recipe.spec.workers
    gpus = "a GPU where there are any" if section.gpus is None else f"{section.gpus:g} GPUs"
    say(console, f"worker   {section.cpus:g} CPUs, {gpus}")
    from raymask.executor import connection, resources

    if address is None:
        nodes = [resources.private_resources()]
    else:
        with connection.ray_connection(setup.context, address):
            nodes = resources.node_resources()
    required = resources.resources_per_worker(setup.context, nodes)
    if not section.scale_up_timeout:
        resources.require_capacity(required, nodes, section.fsdp)
    where = "machine" if address is None else f"{len(nodes)} nodes"
    available = "; ".join(resources.format_resources(node) for node in nodes)
    num_workers = min(resources.num_worker_slots(required, nodes, section.fsdp), section.count or sys.maxsize)
    say(console, f"{where:8} {available}: room for {num_workers} workers")
    show_idle(console, setup.recipe, num_workers)


def show_idle(console: Console, recipe: Recipe, workers: int) -> None:
    """Print how to use the workers that are idle during fine-tuning, if there are any."""
    spec = recipe.spec
    busy = (spec.select.keep + has_baseline(spec)) * spec.finetune.data_parallel
    if busy < workers:
        say(
            console,
            f"idle     fine-tuning uses {busy} of {workers} workers: finetune.data_parallel lets several train "
            "one model, select.keep fine-tunes more masks",
        )
