"""How far is a search, or what did it find?"""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.text import Text

from raymask.core.recipe import climbs_of, resolve
from raymask.report.terminal import show_result
from raymask.report.words import evaluated_line, settled_line
from raymask.store import DENSE, IMP, RunDir, branches


def show_run(console: Console, run: str, as_json: bool) -> None:
    """Print a run directory's search. Raises UserError when it is none."""
    store = RunDir(run)
    if as_json:
        print(json.dumps(summary(store), indent=1))
        return
    result = store.read_result()
    if result:
        show_result(console, result)
        return
    recipe = resolve(store.read_spec())
    state = "running" if store.storage.busy() else "stopped; the same command goes on from here"
    console.print(Text(f"{run}: {state}"))
    if not store.has_level(DENSE, 0):
        console.print(Text("the dense model is not done yet"))
        return
    console.print(Text(settled_line(DENSE, store.read_level(DENSE, 0))))
    for level, density in enumerate(recipe.densities, 1):
        found = store.evaluations(level)
        if not found and not any(store.has_level(lineage, level) for lineage in branches(recipe.spec)):
            break
        console.print(Text(f"level {level}/{len(recipe.densities)}, sparsity {1 - density:.2%}"))
        console.print(Text(f"  {len(found)} of {climbs_of(recipe, level)} early evaluations done"))
        for evaluation in found:
            console.print(Text(f"  {evaluated_line(evaluation, recipe.spec.probe.rungs)}"))
        for lineage in (*branches(recipe.spec), IMP):
            if store.has_level(lineage, level):
                console.print(Text(f"  {settled_line(lineage, store.read_level(lineage, level))}"))


def summary(store: RunDir) -> dict[str, Any]:
    """The same for other programs: state, the result when there is one, else what is known of each level."""
    result = store.read_result()
    if result:
        return {"state": "finished", "result": result.model_dump(mode="json")}
    recipe = resolve(store.read_spec())
    levels = range(1, len(recipe.densities) + 1)
    records = {
        name: [
            store.read_level(lineage, level).model_dump(mode="json")
            for level in ([0] if name == "dense" else levels)
            for lineage in lineages
            if store.has_level(lineage, level)
        ]
        for name, lineages in (("dense", [DENSE]), ("levels", branches(recipe.spec)), ("imp", [IMP]))
    }
    return {
        "state": "running" if store.storage.busy() else "stopped",
        "sparsities": [1 - density for density in recipe.densities],
        "evaluations": [
            evaluation.model_dump(mode="json", exclude={"row_losses"})
            for level in levels
            for evaluation in store.evaluations(level)
        ],
        **records,
    }
