"""How does a search become a trial of Ray Tune, and how is a spec tuned from the command line?

A trial is a whole search, on workers of its own, in a run directory inside the trial's folder: that is its checkpoint.
So a trial that starts again goes on where it was, and so does a tuning, by the same command.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shlex
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml
from ray import tune
from ray.tune.callback import Callback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raymask.config import load_data, load_spec, make_spec, varied
from raymask.core.errors import UserError, first_line
from raymask.core.recipe import epochs, resolve
from raymask.core.records import Evaluation, Level
from raymask.core.spec import Dense, Levels, Model, Spec, Task
from raymask.driver.cluster import alive, connected, environment, needs, offer, require_room, slots
from raymask.driver.search import Plan, prepare, require_masks
from raymask.driver.search import search as run_search
from raymask.report.terminal import Silent, say
from raymask.report.words import percent
from raymask.space import Space, Way, load_space
from raymask.storage import Storage, open_storage
from raymask.store import EXPORT, IMP, RunDir, branches, check_run
from raymask.train.worker import Job

Scheduler = Literal["none", "asha"]
Algorithm = Literal["random", "optuna"]

RUN = "run"  # a trial's run directory, in its folder
SCHEMES = {"local": "", "s3": "s3://", "gcs": "gs://", "abfs": "abfs://"}
REPORTED = ("score", "level", "levels", "sparsity", "metric", "loss", "epochs", "run")
SAMPLES = 8
ASKED, TRIALS = "tuning.yaml", "trials.jsonl"


# --- a search as a trial ----------------------------------------------------------------------------------------------


def trainable(spec: Spec | Mapping[str, Any] | str | Path) -> Callable[[dict[str, Any]], None]:
    """A function for `ray.tune.Tuner`; `spec` is a Spec, its keys as plain data, or a YAML file.

    Any of the spec's keys may be in the search space, dotted as in `--set`, or in its section's mapping. After every
    level a trial reports `level` of `levels`, `sparsity` in [0, 1], `metric` (the mean of the task's metrics on
    `select`; of a perplexity, minus its logarithm), `loss` on `select`, `epochs` trained so far and `run`, its run
    directory; the last level once the model is exported. Nothing of `report` is told. To be maximised is `score`: the
    metric (one by a perplexity), less 2 for each level to come, so that whoever was stopped early never beats whoever
    went on. A trial has one worker, or `workers.count`.

    Raises raymask.UserError for what is wrong with the spec; `Tuner.fit` does, before any trial, for a key of the
    search space that the spec does not have, and for workers that no cluster of this size can hold.
    """
    if isinstance(spec, Spec):
        data = spec.model_dump(mode="json", exclude_unset=True)
    else:
        data = dict(spec) if isinstance(spec, Mapping) else load_data(spec)
    job_of(trial_spec(data, {}))
    home = os.getcwd()

    def search(choices: dict[str, Any]) -> None:
        run_trial(data, choices, home)

    return tune.with_resources(search, lambda choices: bundles(trial_spec(data, choices)))  # type: ignore[no-any-return]


def trial_spec(data: Mapping[str, Any], choices: Mapping[str, Any]) -> Spec:
    """The spec of a trial. Raises UserError."""
    spec = make_spec(varied(data, choices), source="search space" if choices else "spec")
    return spec.model_copy(update={"workers": spec.workers.model_copy(update={"count": spec.workers.count or 1})})


def run_trial(data: Mapping[str, Any], choices: Mapping[str, Any], home: str) -> None:
    """Search, or go on with it, and report every level, those of an earlier start among them."""
    with suppress(OSError):
        os.chdir(home)  # Tune has moved us, and a spec may name files by relative paths
    spec, run = trial_spec(data, choices), place()
    store, reporter = RunDir(run), Reporter(spec, run)
    check_run(store, spec)
    for level in range(1, reporter.last):
        for lineage in branches(spec):
            if store.has_level(lineage, level):
                reporter.settled(lineage, store.read_level(lineage, level))
    reporter.finish(run_search(spec, run, reporter).levels[-1])


def place() -> str:
    """Where this trial's run directory is: in its folder in Tune's storage. Raises UserError."""
    storage = tune.get_context().get_storage()
    kind = storage.storage_filesystem.type_name
    if kind not in SCHEMES:
        raise UserError(f"RunConfig.storage_path: a search cannot work on {kind}: give a path, s3://, gs:// or abfs://")
    if kind == "local" and not Path(storage.experiment_fs_path).is_dir():  # which was made where Tune was started
        raise UserError(
            f"RunConfig.storage_path: there is no {storage.experiment_fs_path} on this node: give a folder that all "
            "nodes reach, or s3://, gs:// or abfs://"
        )
    return f"{SCHEMES[kind]}{storage.trial_fs_path}/{RUN}"


class Reporter(Silent):
    """A Watch that reports the search's levels to Tune, the best branch of each, which may end the trial there."""

    def __init__(self, spec: Spec, run: str) -> None:
        self.run = run
        self.last = len(spec.levels.densities())
        self.epochs = epochs(resolve(spec))
        self.done: dict[int, list[Level]] = {}

    def settled(self, lineage: str, level: Level) -> None:
        if lineage != IMP and 0 < level.level < self.last:  # the last one is reported when all is done
            self.done.setdefault(level.level, []).append(level)

    def begins(self, stage: str, level: int, total: int, known: Sequence[Evaluation] | None = None) -> None:
        """All before `level` is done."""
        for number in sorted(number for number in self.done if number < level):
            kept = self.done.pop(number)
            self.report(max(kept, key=lambda record: record.finetuned.kept.rank))

    def finish(self, level: Level) -> None:
        """The search is over, with its last level."""
        self.begins("", level.level, 0)
        self.report(level)

    def report(self, level: Level) -> None:
        kept, dense = level.finetuned.kept, self.epochs["dense"]
        worth = math.exp(kept.metric) if "perplexity" in level.report else kept.metric
        told = (
            worth - 2 * (self.last - level.level),  # which lies in [-1, 1]
            level.level,
            self.last,
            level.sparsity,
            kept.metric,
            kept.loss,
            dense + (sum(self.epochs.values()) - dense) * level.level / self.last,
            self.run,
        )
        tune.report(dict(zip(REPORTED, told, strict=True)))


def bundles(spec: Spec) -> Any:
    """What a trial takes: a driver, which mostly waits and takes nothing, and its workers. Raises UserError."""
    need, nodes, count, gang = needs(job_of(spec), alive()), alive(), spec.workers.count or 1, spec.workers.gang
    if not spec.workers.wait:
        require_room(need, nodes, gang)
        if slots(need, nodes, gang) < count:
            raise UserError(
                f"workers.count: a trial asks for {count} workers at once, each with {offer(need)}; there is room for "
                f"{slots(need, nodes, gang)}"
            )
    return tune.PlacementGroupFactory([{}, *[dict(need)] * count * gang])


def job_of(spec: Spec) -> Job:
    """What the workers of a trial will be told, which says how large they are. Raises UserError."""
    plan = read(spec.model, spec.task, spec.seed, spec.dense.epochs == 0)
    require_masks(plan.source, resolve(spec))
    return replace(plan.job, spec=spec)


@lru_cache(maxsize=1)
def read(model: Model, task: Task, seed: int, tuned: bool) -> Plan:
    """Model and data, read once for all trials that share them."""
    dense = Dense(epochs=0.0 if tuned else 1.0)
    return prepare(Spec(model=model, task=task, seed=seed, dense=dense, levels=Levels(sparsities=(0.5,))))


# --- the command line -------------------------------------------------------------------------------------------------


def run_tuning(
    console: Console,
    source: Path,
    space_file: Path,
    overrides: Sequence[str],
    run: str,
    *,
    samples: int | None,
    scheduler: Scheduler,
    algorithm: Algorithm,
    address: str | None,
) -> None:
    """Tune a spec over a space in a folder, new or to be continued, and print the trials, best first.

    A tuning is continued by doing it again: the same seed makes the same trials, or Optuna is told those that were
    made, and each finds its run directory. Nothing that Tune has pickled is read.
    """
    spec, data = load_spec(source, overrides), load_data(source, overrides)
    space = load_space(space_file, data)
    require_agreement(space, scheduler, algorithm)
    if "?" in run:
        raise UserError(f"--run {run}: its options would not reach the trials: give an endpoint by $AWS_ENDPOINT_URL")
    storage = open_storage(run)
    asked = {
        "spec": spec.model_dump(mode="json", exclude={"workers"}),
        "space": {key: way.model_dump(mode="json", exclude_unset=True) for key, way in space.items()},
        "scheduler": scheduler,
        "algorithm": algorithm,
    }
    require_same(storage, asked)
    function = trainable(data)
    with storage.held(), connected(job_of(trial_spec(data, {})), address), quiet():
        with storage.writing(ASKED) as path:
            path.write_text(yaml.safe_dump(asked, sort_keys=False), encoding="utf-8")
        tuner = tune.Tuner(
            function,
            param_space={key: domain(way) for key, way in space.items()},
            tune_config=tune.TuneConfig(
                metric="score",
                mode="max",
                num_samples=samples or how_many(space),
                search_alg=searcher(algorithm, spec.seed, tried(storage)),
                scheduler=halving(spec) if scheduler == "asha" else None,
                trial_dirname_creator=Names(),
            ),
            run_config=tune.RunConfig(
                **folder(run),
                verbose=0,
                callbacks=[Journal(storage), Teller()],
                failure_config=tune.FailureConfig(max_failures=spec.workers.retries),
            ),
        )
        trials = sorted(map(ended, tuner.fit()), key=Trial.rank, reverse=True)
    show_trials(console, trials, list(space))
    show_best(console, trials[0], source, overrides)


def require_agreement(space: Space, scheduler: Scheduler, algorithm: Algorithm) -> None:
    """Raise UserError for what does not go together, or is not installed."""
    if algorithm == "optuna" and find_spec("optuna") is None:
        raise UserError("--algorithm optuna: Optuna is not installed: pip install 'raymask[optuna]'")
    grids = [key for key, way in space.items() if way.grid]
    if algorithm == "optuna" and grids:
        raise UserError(f"--algorithm optuna: it chooses by itself: make the grid of {grids[0]} a choice")
    levels = [key for key in space if key.partition(".")[0] == "levels"]
    if scheduler == "asha" and levels:
        raise UserError(
            f"--scheduler asha: it compares trials level by level, and with {levels[0]} in the space a level's "
            "sparsity differs between them: use --scheduler none"
        )


def require_same(storage: Storage, asked: Mapping[str, Any]) -> None:
    """Raise UserError when something else is there, or a tuning that asked for something else."""
    try:
        before = yaml.safe_load(storage.read(ASKED))
    except (FileNotFoundError, NotADirectoryError):
        if any(True for _ in storage.names()):
            raise UserError(f"{storage.at()}: is not empty and not a tuning: choose another with --run") from None
        return
    except yaml.YAMLError:
        before = None
    differing = [key for key in asked if not isinstance(before, dict) or before.get(key) != asked[key]]
    if differing:
        raise UserError(
            f"{storage.at()}: was started with another {', another '.join(differing)}, see {storage.at(ASKED)}; choose "
            "another with --run"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Leave Ctrl-C to us, and keep the words of Tune and Optuna out of our log."""
    words = logging.getLogger("ray.tune")
    before = words.level
    words.setLevel(logging.CRITICAL)
    try:
        with (
            environment(TUNE_DISABLE_SIGINT_HANDLER="1", RAY_AIR_NEW_OUTPUT="0"),
            warnings.catch_warnings(action="ignore"),
        ):
            yield
    finally:
        words.setLevel(before)


def how_many(space: Space) -> int:
    """How often to sample when nobody says: once when only grids are gone through, since the same finds the same."""
    return 1 if all(way.grid for way in space.values()) else SAMPLES


def domain(way: Way) -> Any:
    """A way to vary, in Tune's terms."""
    if way.uniform:
        return tune.uniform(*way.uniform)
    if way.loguniform:
        return tune.loguniform(*way.loguniform)
    if way.randint:
        low, high = way.randint
        return tune.randint(low, high + 1)
    return tune.choice(way.choice) if way.choice else tune.grid_search(way.grid)


def searcher(algorithm: Algorithm, seed: int, known: list[dict[str, Any]]) -> Any:
    """Who chooses the trials; Optuna begins with those that it has chosen before."""
    if algorithm == "random":
        return BasicVariantGenerator(random_state=seed)
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return OptunaSearch(points_to_evaluate=known, seed=seed + len(known))


def halving(spec: Spec) -> ASHAScheduler:
    """Who stops the worse half at level 1, 2, 4 and so on, of trials that have come that far."""
    return ASHAScheduler(time_attr="level", max_t=len(spec.levels.densities()), reduction_factor=2)


def tried(storage: Storage) -> list[dict[str, Any]]:
    """The choices of all trials that were ever started here, in that order. A torn last line is passed over."""
    try:
        *lines, _torn = storage.read(TRIALS).split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    try:
        return [json.loads(line) for line in lines]
    except ValueError:
        raise UserError(f"{storage.at(TRIALS)}: is damaged: choose another folder with --run") from None


def folder(run: str) -> dict[str, str]:
    """A place as Tune wants it: the folder above, and a name in it."""
    above, _, name = (run if "://" in run else str(Path(run).expanduser().resolve())).rstrip("/").rpartition("/")
    return {"storage_path": above or "/", "name": name}


class Names:
    """Folder names of trials: by what they try, so that the same trial meets its run directory again."""

    def __init__(self) -> None:
        self.seen = Counter[str]()

    def __call__(self, trial: Any) -> str:
        name = hashlib.sha256(json.dumps(trial.config, sort_keys=True).encode()).hexdigest()[:8]
        self.seen[name] += 1
        return f"trial-{name}" + (f"-{self.seen[name]}" if self.seen[name] > 1 else "")


class Journal(Callback):  # type: ignore[misc]
    """Writes down which trials there are."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.known = tried(storage)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if trial.config not in self.known:
            self.known.append(trial.config)
            self.storage.append(TRIALS, json.dumps(trial.config).encode())


class Teller(Callback):  # type: ignore[misc]
    """Says, a line each, how trials go on."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    def tell(self, trial: Any, text: str) -> None:
        print(f"[{time.monotonic() - self.began:6.1f} s] {trial.custom_dirname or trial}: {text}", flush=True)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.tell(trial, described(trial.config))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.tell(trial, f"level {result['level']}, {percent(result['sparsity'])}: metric {result['metric']:.4f}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.tell(trial, "failed or was lost; it goes on in its run directory")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.tell(trial, "failed")


def described(choices: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={shown(value)}" for key, value in choices.items())


def shown(value: Any) -> str:
    """A value, short."""
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def reason(error: Exception) -> str:
    """What a trial died of, without Ray's pages around it."""
    cause = getattr(error, "cause", None) or error
    return first_line(cause) if isinstance(cause, UserError) else f"{type(cause).__name__}: {first_line(cause)}"


@dataclass(frozen=True)
class Trial:
    """A trial as it ended: how far it came, and what it reported last."""

    name: str
    choices: dict[str, Any]
    error: Exception | None
    level: int = 0
    levels: int = 0
    sparsity: float = 0.0
    score: float = float("-inf")
    metric: float = 0.0
    loss: float = float("inf")
    epochs: float = 0.0
    run: str = ""

    @property
    def state(self) -> str:
        if self.error:
            return "failed"
        return "done" if self.level == self.levels else f"stopped after level {self.level}"

    def rank(self) -> tuple[bool, float]:
        """The larger the better; what failed is last."""
        return self.error is None, self.score


def ended(result: Any) -> Trial:
    """A trial from Tune's account of it."""
    told = {key: value for key, value in (result.metrics or {}).items() if key in REPORTED}
    return Trial(Path(result.path).name, result.config, result.error, **told)


def show_trials(console: Console, trials: Sequence[Trial], keys: Sequence[str]) -> None:
    """All trials, best first."""
    table = Table(title=Text("trials, best first; the metric is on the select split"), title_justify="left")
    figures = ("metric", "sparsity", "epochs")
    for head in ("trial", *figures, *keys, "state"):
        table.add_column(Text(head), justify="right" if head in figures else "left", overflow="fold")
    for trial in trials:
        told = (f"{trial.metric:.4f}", percent(trial.sparsity), f"{trial.epochs:g}") if trial.level else ("", "", "")
        choices = (shown(trial.choices[key]) for key in keys)
        table.add_row(*map(Text, (trial.name, *told, *choices, trial.state)))
    console.print(table)
    for trial in trials:
        if trial.error:
            say(console, f"{trial.name} failed: {reason(trial.error)}")


def show_best(console: Console, best: Trial, source: Path, overrides: Sequence[str]) -> None:
    """Where the best trial's model is, and the command that finds it again. Raises UserError when none was done."""
    if best.state != "done":
        raise UserError("no trial came to its end; the same command tries again")
    settings = [*overrides, *(f"{key}={json.dumps(value)}" for key, value in best.choices.items())]
    command = shlex.join(["raymask", "search", str(source), *(word for item in settings for word in ("--set", item))])
    say(console, f"Best: {described(best.choices)}. Its sparse model is in {best.run}/{EXPORT}.")
    say(console, f"\nNext: raymask show {best.run}\n      {command}")
