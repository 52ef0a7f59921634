"""Randomized masks on GLUE, beside other uses of the same training.

    python jobs/experiments/glue.py jobs/glue-short.yaml                    here, for a few hours
    python jobs/experiments/glue.py --address auto --run s3://bucket/glue   on this machine's Ray cluster

For each task and seed there are searches of one spec, from one dense model:

    raymask             as the spec says
    IMP                 the magnitude mask at every level, fine-tuned for as many epochs as the search evaluates and
                        fine-tunes
    one random mask     the first that is drawn, fine-tuned for as long
    one uniform mask    the same, of any weights
    smaller dense       the model's first layer with its strongest intermediate neurons, as many as make up for the
                        weights that are left; distilled from the dense model for as many epochs as all levels have

Every search is a run directory, so the same command goes on where a killed one was. The table, `glue.md`, has the mean
of a task's metrics on `test`, in per cent, over seeds, with its standard deviation, and differences to IMP, seed by
seed, with their standard error; `glue.json` has every figure.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from raymask.config import apply_overrides, load_data, make_spec
from raymask.core.callbacks import CallbackList
from raymask.core.errors import UserError
from raymask.core.lineage import DENSE
from raymask.core.recipe import deterministic_candidate, finetune_config, planned_epochs, resolve
from raymask.core.spec import Spec
from raymask.data.metrics import selection_metric
from raymask.driver.search import LevelLoop, search
from raymask.driver.setup import SearchSetup, load_initial, prepare
from raymask.driver.tasks import PendingFinetune, single
from raymask.executor.open import open_executor
from raymask.report.console import progress_callback
from raymask.runs.open import open_storage
from raymask.runs.run_dir import LEVEL, MODEL, RunDir, open_run, write_tensors

JOBS = Path(__file__).resolve().parents[1]
sys.path.append(str(JOBS))

import pages  # noqa: E402 - a module of jobs/, which is no package

SCRIPT = "jobs/experiments/glue.py"
OURS, BASELINE, SMALLER = "raymask", "IMP", "smaller dense"
SINGLE = {"one uniform mask": "random", "one random mask": "voting"}  # by the sampler that draws it
METHODS = ("dense", SMALLER, BASELINE, *SINGLE, OURS)


@dataclass(frozen=True)
class Cell:
    """One model's metrics on `test`; `sparsity` 0 for what is not pruned."""

    task: str
    seed: int
    method: str
    sparsity: float
    test_metrics: dict[str, float]

    @property
    def score(self) -> float:
        """The mean of the task's metrics, in per cent."""
        return 100 * selection_metric(self.test_metrics)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", nargs="?", default=JOBS / "glue.yaml", type=Path, help="a YAML spec")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the spec")
    parser.add_argument("--tasks", nargs="+", default=["glue/mrpc", "glue/stsb"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--skip", nargs="+", choices=(SMALLER, *SINGLE), default=[], help="methods to leave out")
    parser.add_argument("--run", default="runs/glue", help="folder of the searches, or a URI")
    parser.add_argument("--page", type=Path, help="a page that gets the table too, such as docs/results.md")
    parser.add_argument("--address", help="a Ray cluster: auto, HOST or HOST:PORT; else a private Ray")
    asked = parser.parse_args()
    try:
        fill(asked)
    except UserError as error:
        print(f"glue: {error}", file=sys.stderr)
        sys.exit(2)


def fill(asked: argparse.Namespace) -> None:
    """Do what is not done yet, and write the table after every task and seed. Raises UserError."""
    if asked.page:
        pages.split(asked.page, SCRIPT)  # before any long work
    data, console = load_data(asked.spec, asked.set), Console(width=120)
    cells: list[Cell] = []
    for seed in range(asked.seeds):  # a whole table of one seed first
        for task in asked.tasks:
            spec = spec_of(data, {"seed": seed, "task.name": task})
            place = f"{asked.run}/{task.rpartition('/')[2]}-{seed}"
            cells += [Cell(task, seed, *found) for found in measured(console, spec, place, asked.address, asked.skip)]
            text = table(cells)
            write(asked.run, {"glue.md": text, "glue.json": json.dumps([asdict(cell) for cell in cells], indent=1)})
            if asked.page:
                pages.write_table(asked.page, SCRIPT, text.strip())
            console.print(text, markup=False, highlight=False, soft_wrap=True)


def spec_of(data: Mapping[str, Any], changes: Mapping[str, Any]) -> Spec:
    """The spec with some keys, joined by dots, set otherwise."""
    return make_spec(apply_overrides(dict(data), [f"{key}={json.dumps(value)}" for key, value in changes.items()]))


def measured(
    console: Console, spec: Spec, place: str, address: str | None, skip: Sequence[str]
) -> Iterator[tuple[str, float, dict[str, float]]]:
    """The methods on one task with one seed: name, sparsity, and metrics on `test`."""
    budget, searches = at_equal_budget(spec)
    store = searched(console, searches["raymask"], f"{place}/raymask", address)
    yield "dense", 0.0, store.read_level(DENSE, 0).test_metrics
    result = store.read_result()
    assert result is not None
    for name, found in ((OURS, result.levels), (BASELINE, result.baseline_levels)):
        yield from ((name, sparsity_of(level.density), level.test_metrics) for level in found)
    for name, sampler in SINGLE.items():
        if name in skip:
            continue
        made = searched(console, searches[sampler], f"{place}/{sampler}", address, store)
        result = made.read_result()
        assert result is not None
        for level in result.levels:
            if level.winner.candidate.is_magnitude:
                raise UserError(
                    f"{made.uri}: its random mask of level {level.level} failed, so it has the magnitude mask"
                )
            yield name, sparsity_of(level.density), level.test_metrics
    densities = resolve(spec).densities
    for density in () if SMALLER in skip else densities:
        sparsity = sparsity_of(density)
        budget_of_all = budget * len(densities)
        test_metrics = smaller(console, spec, f"{place}/smaller-{sparsity:g}", address, density, budget_of_all, store)
        if test_metrics:
            yield SMALLER, sparsity, test_metrics


def at_equal_budget(spec: Spec) -> tuple[float, dict[str, Spec]]:
    """Epochs a level, and the specs of the search and of one mask alone by either sampler.

    Raises UserError for a spec whose epochs are not known before.
    """
    if spec.early_eval.repeats > 1:
        raise UserError("early_eval.repeats: how many epochs they take is not known before: leave it at 1")
    recipe, plain = resolve(spec), spec.model_dump(mode="json")
    planned = planned_epochs(recipe)
    budget = (planned["early evaluation"] + planned["fine-tuning"]) / len(recipe.densities)
    alone = {
        "candidates.count": 1,
        "select": {"rule": "first"},
        "early_eval.epochs": 0.01,  # nobody looks at it
        "early_eval.rungs": [1.0],
        "finetune.epochs": budget,
        "imp.run": False,
    }
    single = {sampler: spec_of(plain, alone | {"candidates.sampler": sampler}) for sampler in ("voting", "random")}
    return budget, {"raymask": spec_of(plain, {"imp.run": True, "imp.epochs": budget}), **single}


def sparsity_of(density: float) -> float:
    return round(1 - density, 6)


def searched(console: Console, spec: Spec, place: str, address: str | None, dense: RunDir | None = None) -> RunDir:
    """A finished search, perhaps from the dense model of another. Raises UserError when it is there by another spec."""
    store = RunDir(place)
    if dense is not None and not store.has_progress():
        store.write_spec(spec)
        # the record last: once it is there, so is all that it speaks of
        for name in sorted(dense.storage.names(DENSE), key=lambda name: name.endswith(LEVEL)):
            with dense.storage.reading(name) as source, store.storage.writing(name) as target:
                shutil.copyfile(source, target)
    console.print(f"== {place}", markup=False, highlight=False)
    with progress_callback(console, spec) as callback:
        search(spec, place, [callback], address=address)
    return store


def smaller(
    console: Console, spec: Spec, place: str, address: str | None, density: float, epochs: float, dense: RunDir
) -> dict[str, float] | None:
    """A dense model of as many prunable weights, distilled from the dense model of a run directory.

    None where these are not one layer's, or it is no BERT.
    """
    search_setup = prepare(spec)
    config, width = search_setup.model_info.config, search_setup.model_info.config.hidden_size
    neurons = round((search_setup.model_info.sizes.prunable * density - 4 * width**2) / (2 * width))
    if config.model_type != "bert" or not 1 <= neurons <= config.intermediate_size:
        return None
    store = RunDir(place)
    if not store.has_level(DENSE, 0):
        console.print(f"== {place}: one layer of {neurons} neurons", markup=False, highlight=False)
        with tempfile.TemporaryDirectory() as folder:
            cut(search_setup, Path(folder), neurons)
            changes = {"model.name": folder, "distill": True, "levels": [0.5], "finetune.epochs": epochs}
            changes["dense.epochs"] = epochs  # by which the time that is left is reckoned
            small = prepare(spec_of(spec.model_dump(mode="json", exclude={"levels"}), changes))
            small = replace(small, context=replace(small.context, teacher=search_setup.model_info))
            start = replace(load_initial(small), teacher=dense.read_weights(DENSE, 0))
            work = PendingFinetune(
                DENSE, start, finetune_config(small.recipe, 1), single(deterministic_candidate(small.recipe, 0))
            )
            with (
                progress_callback(console, small.recipe.spec) as callback,
                open_executor(small.context, callbacks := CallbackList([callback]), address, False) as executor,
                open_run(store, small.recipe.spec),
            ):
                LevelLoop(small, store, executor, callbacks).finetune([work])
    return store.read_level(DENSE, 0).test_metrics


def cut(search_setup: SearchSetup, folder: Path, neurons: int) -> None:
    """Save a model's first layer with its strongest intermediate neurons, and all that stands around its layers."""
    packed = load_initial(search_setup).weights
    kept = {name: tensor.clone() for name, tensor in packed.views().items() if not re.search(r"layer\.[1-9]", name)}
    [into] = [name for name in kept if name.endswith("intermediate.dense.weight")]
    out = into.replace("intermediate.dense", "output.dense")
    strength = kept[into].norm(dim=1) * kept[out].norm(dim=0)
    chosen = strength.topk(neurons).indices.sort().values
    bias = into.replace("weight", "bias")
    kept |= {into: kept[into][chosen], bias: kept[bias][chosen], out: kept[out][:, chosen].contiguous()}
    config = copy.deepcopy(search_setup.model_info.config)
    config.num_hidden_layers, config.intermediate_size = 1, neurons
    config.save_pretrained(folder)
    search_setup.tokenizer.save_pretrained(folder)
    write_tensors(folder / MODEL, kept)


def table(cells: Sequence[Cell]) -> str:
    """Markdown: a row a task and sparsity, a column a method, and differences to the baseline."""
    scores: dict[tuple[str, float, str], dict[int, float]] = {}
    for cell in cells:
        scores.setdefault((cell.task, cell.sparsity, cell.method), {})[cell.seed] = cell.score
    methods = [method for method in METHODS if method in {cell.method for cell in cells}]
    masks = [method for method in (*SINGLE, OURS) if method in methods]
    heads = ["task", "sparsity", *methods, *(f"{method} - {BASELINE}" for method in masks)]
    lines = []
    for task, sparsity in sorted({(cell.task, cell.sparsity) for cell in cells if cell.sparsity}):
        found = {method: scores.get((task, sparsity, method)) for method in methods}
        found["dense"] = scores[task, 0.0, "dense"]
        rival = found[BASELINE] or {}
        gaps = [[value - rival[seed] for seed, value in (found[method] or {}).items()] for method in masks]
        values = [spread(list(each.values())) if each else "" for each in found.values()]
        lines.append([task, f"{sparsity:.2%}", *values, *(gap(each) if each else "" for each in gaps)])
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *lines]) + "\n"


def spread(values: Sequence[float]) -> str:
    """A mean with its standard deviation over seeds."""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def gap(values: Sequence[float]) -> str:
    """A mean difference with its standard error over seeds."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.1f}{error}"


def write(place: str, texts: Mapping[str, str]) -> None:
    storage = open_storage(place)
    for name, text in texts.items():
        with storage.writing(name) as path:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
