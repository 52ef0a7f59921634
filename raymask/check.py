"""What would a search do, and can it?"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

import torch
from rich.console import Console
from rich.table import Table

from raymask.core.masks import quotas
from raymask.core.recipe import Recipe, epochs, parents_of, runs_imp
from raymask.core.rungs import places
from raymask.core.spec import Spec
from raymask.driver.search import Plan, initial, prepare, require_unseen
from raymask.report.terminal import say
from raymask.report.words import blocks, percent

GIB = 2**30
FEW = 10  # classes that are named


def show_check(console: Console, spec: Spec, address: str | None) -> None:
    """Read everything a search will read, weights included, and print what it will do. Raises UserError as it would."""
    require_unseen(spec.task)
    plan = prepare(spec)
    initial(plan)
    show_model(console, plan)
    show_data(console, plan)
    console.print(level_table(plan))
    show_rungs(console, plan)
    show_cost(console, plan)
    show_offer(console, plan, address)
    say(console, "Everything is readable.")


def show_model(console: Console, plan: Plan) -> None:
    sizes, model, body = plan.source.sizes, plan.recipe.spec.model, blocks(plan.source.kind)
    say(
        console,
        f"model    {model.name}: {sizes.whole:,} parameters in {model.dtype}, {sizes.encoder:,} in the {body}; "
        f"{len(plan.source.prunable)} matrices with {sizes.prunable:,} weights to prune",
    )


def show_data(console: Console, plan: Plan) -> None:
    data, corpus = plan.job.data, plan.corpus
    kind = f"{len(corpus.classes)} classes ({numbered(corpus.classes)})" if corpus.classes else corpus.kind
    say(
        console,
        f"task     {kind}, {', '.join(data.metrics)}; rows: {len(data.train):,} train, {len(data.select):,} select "
        f"({len(plan.job.scored):,} of them score candidates), {len(data.report):,} report; "
        f"{data.train.lengths.mean():.0f} tokens a row, up to {data.train.lengths.max()}",
    )


def numbered(classes: Sequence[str]) -> str:
    """The first few classes with their numbers."""
    named = [f"{number} = {name}" for number, name in enumerate(classes[:FEW])]
    return ", ".join([*named, "..."] if len(classes) > FEW else named)


def level_table(plan: Plan) -> Table:
    """What each level prunes, in all three denominators."""
    table = Table(title="levels", title_justify="left")
    zeros = f"zeros in {blocks(plan.source.kind)}"
    for head in ("level", "sparsity", "weights kept", zeros, "zeros in whole model", "candidates"):
        table.add_column(head, justify="right")
    for level, density in enumerate(plan.recipe.densities, 1):
        kept = sum(quotas(plan.source.shapes, density, plan.recipe.allocation, plan.recipe.pattern).values())
        shares = plan.source.sizes.sparsities(plan.source.sizes.prunable - kept)
        random, parents = plan.recipe.spec.candidates.count, parents_of(plan.recipe.spec, level)
        pool = f"control + {random}" if random else "control"
        if parents > 1:
            pool = f"{parents} x ({pool})"
        table.add_row(
            str(level),
            percent(shares["prunable"]),
            f"{kept:,}",
            percent(shares["encoder"]),
            percent(shares["whole"]),
            pool,
        )
    return table


def show_rungs(console: Console, plan: Plan) -> None:
    """How many of a level's random masks are evaluated how far, where there are rungs."""
    spec = plan.recipe.spec
    rungs = spec.probe.rungs
    if len(rungs) > 1:
        seats = zip(places(spec.candidates.count, rungs), rungs, strict=True)
        parts = ", ".join(f"{count} to {share:.0%}" for count, share in seats)
        say(
            console,
            f"rungs    of {spec.candidates.count} random masks {parts} of the early evaluation, and every control",
        )


def show_cost(console: Console, plan: Plan) -> None:
    found = epochs(plan.recipe)
    parts = ", ".join(f"{count:g} {purpose}" for purpose, count in found.items() if count)
    worker, shared = plan.job.memory(on_gpu=False) / GIB, plan.job.shared_memory / GIB
    say(console, f"cost     {sum(found.values()):g} epochs of training: {parts}")
    say(console, f"memory   about {worker:.1f} GiB a worker on a CPU, {shared:.1f} GiB shared by all of a node")


def show_offer(console: Console, plan: Plan, address: str | None) -> None:
    """What there is to run it on, and how many workers fit. Raises UserError when none does."""
    asked = plan.recipe.spec.workers
    gpus = "a GPU where there are any" if asked.gpus is None else f"{asked.gpus:g} GPUs"
    say(console, f"worker   {asked.cpus:g} CPUs, {gpus}")
    from raymask.driver import cluster

    if address is None:
        nodes = [this_machine()]
    else:
        with cluster.connected(plan.job, address):
            nodes = cluster.alive()
    need = cluster.needs(plan.job, nodes)
    if not asked.wait:
        cluster.require_room(need, nodes, asked.gang)
    where = "machine" if address is None else f"{len(nodes)} nodes"
    offers = "; ".join(cluster.offer(node) for node in nodes)
    room = min(cluster.slots(need, nodes, asked.gang), asked.count or sys.maxsize)
    say(console, f"{where:8} {offers}: room for {room} workers")
    show_idle(console, plan.recipe, room)


def show_idle(console: Console, recipe: Recipe, workers: int) -> None:
    """How to use the workers that no fine-tuning would, when there are any."""
    spec = recipe.spec
    busy = (spec.select.keep + runs_imp(spec)) * spec.finetune.shards
    if busy < workers:
        say(
            console,
            f"idle     fine-tuning takes {busy} of {workers} workers: finetune.shards lets several train one model, "
            "select.keep has more masks fine-tuned",
        )


def this_machine() -> Mapping[str, float]:
    """What a private Ray would offer, about: its object store takes three tenths of the memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count()), "memory": 0.7 * memory}
