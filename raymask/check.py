"""What would a search do, and can it?"""

from __future__ import annotations

import os

from rich.console import Console
from rich.table import Table

from raymask.core.patterns import budget
from raymask.core.recipe import epochs, propose
from raymask.core.seeds import derive
from raymask.core.spec import Spec
from raymask.report.words import percent
from raymask.search import Plan, prepare
from raymask.train.model import load_weights

GIB = 2**30


def show_check(console: Console, spec: Spec, address: str | None) -> None:
    """Read everything a search will read, weights included, and print what it will do. Raises UserError as it would."""
    plan = prepare(spec)
    weights = load_weights(spec.model, plan.source.config, derive(spec.seed, "head"), spec.dense.epochs == 0)
    shapes = [weights.index[name][2] for name in plan.source.prunable]
    show_model(console, plan)
    show_data(console, plan)
    console.print(level_table(plan, [shape[0] * shape[1] for shape in shapes]))
    show_cost(console, plan)
    show_offer(console, plan, address)
    console.print("Everything is readable.", highlight=False)


def show_model(console: Console, plan: Plan) -> None:
    sizes = plan.source.sizes
    console.print(
        f"model    {plan.recipe.spec.model.name}: {sizes.whole:,} parameters, {sizes.encoder:,} in the encoder; "
        f"{len(plan.source.prunable)} matrices with {sizes.prunable:,} weights to prune",
        highlight=False,
    )


def show_data(console: Console, plan: Plan) -> None:
    data, corpus = plan.job.data, plan.corpus
    kind = f"{len(corpus.classes)} classes" if corpus.classes else "regression"
    console.print(
        f"task     {kind}, {', '.join(data.metrics)}; rows: {len(data.train):,} train, {len(data.select):,} select, "
        f"{len(data.report):,} report; {data.train.lengths.mean():.0f} tokens a row, up to {data.train.lengths.max()}",
        highlight=False,
    )


def level_table(plan: Plan, entries: list[int]) -> Table:
    """What each level prunes, in all three denominators."""
    table = Table(title="levels", title_justify="left")
    for head in ("level", "sparsity", "weights kept", "zeros in encoder", "zeros in whole model", "candidates"):
        table.add_column(head, justify="right")
    for level, density in enumerate(plan.recipe.densities, 1):
        kept = sum(budget(count, density) for count in entries)
        shares = plan.source.sizes.sparsities(plan.source.sizes.prunable - kept)
        random = len(propose(plan.recipe, level)) - 1
        pool = f"control + {random}" if random else "control"
        table.add_row(
            str(level),
            percent(shares["prunable"]),
            f"{kept:,}",
            percent(shares["encoder"]),
            percent(shares["whole"]),
            pool,
        )
    return table


def show_cost(console: Console, plan: Plan) -> None:
    found = epochs(plan.recipe)
    parts = ", ".join(f"{count:g} {purpose}" for purpose, count in found.items() if count)
    worker, shared = plan.job.memory(on_gpu=False) / GIB, plan.job.shared_memory / GIB
    console.print(f"cost     {sum(found.values()):g} epochs of training: {parts}", highlight=False)
    console.print(
        f"memory   about {worker:.1f} GiB a worker on a CPU, {shared:.1f} GiB shared by all of a node", highlight=False
    )


def show_offer(console: Console, plan: Plan, address: str | None) -> None:
    """What there is to run it on; Ray is asked only for a cluster."""
    asked = plan.recipe.spec.workers
    gpus = "a GPU where there are any" if asked.gpus is None else f"{asked.gpus:g} GPUs"
    console.print(f"worker   {asked.cpus:g} CPUs, {gpus}", highlight=False)
    if address is None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
        console.print(f"machine  {os.cpu_count()} CPUs, {memory:.1f} GiB", highlight=False)
        return
    from raymask import remote

    with remote.connected(plan.job, address):
        offers = remote.offers()
        need = remote.needs(plan.job)
        remote.require_room(need)
        slots = remote.slots(need)
    console.print(f"cluster  {len(offers)} nodes: {'; '.join(offers)}: room for {slots} workers", highlight=False)
