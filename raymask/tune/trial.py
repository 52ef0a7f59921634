"""Search as a trial of Ray Tune.

A trial is a whole search on workers of its own. Its run directory lies in the trial's folder and is the trial's
checkpoint: a restarted trial resumes there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ray import tune

from raymask.config import apply_choices, load_data, make_spec
from raymask.core.callbacks import Callback
from raymask.core.errors import UserError
from raymask.core.lineage import IMP, branches
from raymask.core.recipe import planned_epochs, resolve
from raymask.core.records import Evaluation, LevelRecord
from raymask.core.spec import Dense, Levels, Model, Spec, Task
from raymask.driver.search import search as run_search
from raymask.driver.setup import SearchSetup, apply_dry_run, prepare, require_masks
from raymask.executor.resources import (
    format_resources,
    node_resources,
    num_worker_slots,
    require_capacity,
    resources_per_worker,
)
from raymask.runs.run_dir import RunDir, check_run
from raymask.train.context import WorkerContext

RUN_DIR = "run"  # name of the run directory in a trial's folder


# URI scheme by type of pyarrow file system.
SCHEMES = {"local": "", "s3": "s3://", "gcs": "gs://", "abfs": "abfs://"}

REPORTED = ("score", "level", "levels", "sparsity", "metric", "loss", "epochs", "run")
"""Keys that a trial reports; see `trainable`."""


def trainable(spec: Spec | Mapping[str, Any] | str | Path) -> Callable[[dict[str, Any]], None]:
    """Make a trainable for `ray.tune.Tuner`.

    Any key of the spec can be in the search space, dotted as in `--set`, or nested in its section's mapping. A trial
    has `workers.count` workers, or one.

    A trial reports after every level; the last level is reported once the model is exported. It reports:

    - `score`: to be maximised. The metric (of a perplexity, 1/perplexity) minus 2 for each level to come, so that a
      trial that was stopped early never beats one that went on;
    - `level`, `levels`: the finished level and the number of levels;
    - `sparsity`: in [0, 1];
    - `metric`: mean of the task's metrics on `validation`; of a perplexity, -log(perplexity);
    - `loss`: on `validation`;
    - `epochs`: epochs trained so far;
    - `run`: the trial's run directory.

    Nothing about `test` is reported.

    Args:
        spec: A Spec, its keys as plain data, or the path of a YAML file.

    Returns:
        The trainable with its resources.

    Raises:
        UserError: The spec is wrong. `Tuner.fit` raises it, before any trial, for a key of the search space that the
            spec does not have, and for workers that the cluster cannot hold.
    """
    if isinstance(spec, Spec):
        data = spec.model_dump(mode="json", exclude_unset=True)
    else:
        data = dict(spec) if isinstance(spec, Mapping) else load_data(spec)
    worker_context(trial_spec(data, {}))
    working_dir = os.getcwd()

    def search(choices: dict[str, Any]) -> None:
        run_trial(data, choices, working_dir)

    return tune.with_resources(search, lambda choices: placement_bundles(trial_spec(data, choices)))  # type: ignore[no-any-return]


def trial_spec(data: Mapping[str, Any], choices: Mapping[str, Any]) -> Spec:
    """The spec of a trial, with one worker unless the spec says more.

    Args:
        data: The spec as plain data.
        choices: The trial's values from the search space.

    Raises:
        UserError: The spec is wrong.
    """
    spec = make_spec(apply_choices(data, choices), source="search space" if choices else "spec")
    return spec.model_copy(update={"workers": spec.workers.model_copy(update={"count": spec.workers.count or 1})})


def run_trial(data: Mapping[str, Any], choices: Mapping[str, Any], working_dir: str) -> None:
    """Run or resume a trial's search, and report every level, including those of an earlier start.

    Args:
        data: The spec as plain data.
        choices: The trial's values from the search space.
        working_dir: Directory that relative paths in the spec start from.

    Raises:
        UserError: As in `search`.
    """
    with suppress(OSError):
        os.chdir(working_dir)  # Tune changes the directory, and a spec may name files by relative paths
    spec, run = trial_spec(data, choices), trial_run_uri()
    run_dir, callback = RunDir(run), TuneCallback(spec, run)
    check_run(run_dir, spec)
    for level in range(1, callback.last):
        for lineage in branches(spec):
            if run_dir.has_level(lineage, level):
                callback.on_level_end(lineage, run_dir.read_level(lineage, level))
    callback.finish(run_search(spec, run, [callback]).levels[-1])


def trial_run_uri() -> str:
    """Location of the running trial's run directory, in its folder in Tune's storage.

    Raises:
        UserError: raymask cannot use Tune's storage, or the storage is a folder that this node does not have.
    """
    storage = tune.get_context().get_storage()
    kind = storage.storage_filesystem.type_name
    if kind not in SCHEMES:
        raise UserError(f"RunConfig.storage_path: a search cannot work on {kind}: give a path, s3://, gs:// or abfs://")
    if kind == "local" and not Path(storage.experiment_fs_path).is_dir():  # Tune makes it on one node
        raise UserError(
            f"RunConfig.storage_path: there is no {storage.experiment_fs_path} on this node: give a folder that all "
            "nodes reach, or s3://, gs:// or abfs://"
        )
    return f"{SCHEMES[kind]}{storage.trial_fs_path}/{RUN_DIR}"


class TuneCallback(Callback):
    """Callback that reports the best branch of every level to Tune. Tune may end the trial at a report.

    Attributes:
        run: Location of the run directory.
        last: Number of levels.
        epochs: Planned epochs by phase.
        done: Records of finished levels that are not reported yet, by level.
    """

    def __init__(self, spec: Spec, run: str) -> None:
        """Create the callback.

        Args:
            spec: The trial's spec.
            run: Location of the run directory.
        """
        self.run = run
        self.last = len(spec.levels.densities())
        self.epochs = planned_epochs(resolve(spec))
        self.done: dict[int, list[LevelRecord]] = {}

    def on_level_end(self, lineage: str, level: LevelRecord) -> None:
        """Remember a finished level of the search; the dense model and the IMP baseline are not reported."""
        if lineage != IMP and 0 < level.level < self.last:  # the last level is reported by `finish`
            self.done.setdefault(level.level, []).append(level)

    def on_phase_begin(self, phase: str, level: int, total: int, known: Sequence[Evaluation] | None = None) -> None:
        """Report the levels before `level`, all of whose branches are done."""
        for number in sorted(number for number in self.done if number < level):
            records = self.done.pop(number)
            self.report(max(records, key=lambda record: record.finetune_result.best_eval.sort_key))

    def finish(self, level: LevelRecord) -> None:
        """Report what is left, and then the last level of a finished search."""
        self.on_phase_begin("", level.level, 0)
        self.report(level)

    def report(self, level: LevelRecord) -> None:
        """Report one level to Tune."""
        best, dense_epochs = level.finetune_result.best_eval, self.epochs["dense"]
        metric = math.exp(best.metric) if "perplexity" in level.test_metrics else best.metric  # in [-1, 1]
        values = (
            metric - 2 * (self.last - level.level),
            level.level,
            self.last,
            level.sparsity,
            best.metric,
            best.loss,
            dense_epochs + (sum(self.epochs.values()) - dense_epochs) * level.level / self.last,
            self.run,
        )
        tune.report(dict(zip(REPORTED, values, strict=True)))


def placement_bundles(spec: Spec) -> Any:
    """A trial's placement group: an empty bundle for the driver, which mostly waits, and one bundle per worker process.

    Raises:
        UserError: The cluster cannot hold the workers and does not scale up.
    """
    need, nodes, count, group = (
        resources_per_worker(worker_context(spec), node_resources()),
        node_resources(),
        spec.workers.count or 1,
        spec.workers.fsdp,
    )
    if not spec.workers.scale_up_timeout:
        require_capacity(need, nodes, group)
        if num_worker_slots(need, nodes, group) < count:
            raise UserError(
                f"workers.count: a trial asks for {count} workers at once, each with {format_resources(need)}; "
                f"there is room for {num_worker_slots(need, nodes, group)}"
            )
    return tune.PlacementGroupFactory([{}, *[dict(need)] * count * group])


def worker_context(spec: Spec) -> WorkerContext:
    """The context of a trial's workers, from which their memory is estimated.

    Raises:
        UserError: Model, data or masks are not possible.
    """
    trained = spec.distill, spec.precision, spec.gradient_checkpointing
    setup = cached_setup(spec.model, spec.task, spec.seed, spec.dense.epochs == 0, *trained)
    require_masks(setup.model_info, resolve(spec))
    return replace(setup.context, spec=spec)


@lru_cache(maxsize=1)
def cached_setup(
    model: Model,
    task: Task,
    seed: int,
    is_finetuned: bool,
    distill: bool,
    precision: str,
    gradient_checkpointing: bool,
) -> SearchSetup:
    """Model and data, read and tried once for trials in a row that share them.

    Args:
        model: The spec's `model` section.
        task: The spec's `task` section.
        seed: The spec's seed.
        is_finetuned: Whether the checkpoint is already fine-tuned on the task (`dense.epochs` is 0).
        distill: The spec's `distill`.
        precision: The spec's `precision`.
        gradient_checkpointing: The spec's `gradient_checkpointing`.
    """
    keys = {"distill": distill, "precision": precision, "gradient_checkpointing": gradient_checkpointing}
    dense = Dense(epochs=0.0 if is_finetuned else 1.0)
    spec = Spec.model_validate(
        {"model": model, "task": task, "seed": seed, "dense": dense, "levels": Levels(sparsities=(0.5,)), **keys}
    )
    return apply_dry_run(prepare(spec), lambda text: None)
