"""The command `raymask tune`: hyperparameter tuning of a spec with Ray Tune.

Each trial is a whole search with its own workers and run directory. The run directory is the trial's checkpoint, so a
restarted trial resumes, and so does a tuning that is started again with the same command.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
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

from raymask.config import load_data, load_spec
from raymask.core.errors import UserError, describe
from raymask.core.spec import Spec
from raymask.executor.connection import ray_connection, set_environment
from raymask.report.console import say
from raymask.report.text import percent
from raymask.runs.open import open_storage
from raymask.runs.run_dir import EXPORT, RunDir
from raymask.runs.storage import Storage
from raymask.tune.space import Domain, SearchSpace, load_space
from raymask.tune.trial import REPORTED, trainable, trial_spec, worker_context

Scheduler = Literal["none", "asha"]

Algorithm = Literal["random", "optuna"]

SAMPLES = 8  # trials by default

TUNING_FILE, TRIALS, FINISHED = "tuning.yaml", "trials.jsonl", "finished.json"  # settings; choices; ended trials


@dataclass(frozen=True)
class TuneOptions:
    """How trials are chosen and stopped.

    Attributes:
        samples: Samples of the search space; None for 8, or for 1 when only grids vary.
        scheduler: "asha" stops the worse half of the trials level by level; "none" stops no trial.
        algorithm: How trials are chosen.
    """

    samples: int | None = None
    scheduler: Scheduler = "none"
    algorithm: Algorithm = "random"


def run_tuning(
    console: Console,
    source: Path,
    space_file: Path,
    overrides: Sequence[str],
    run: str,
    options: TuneOptions,
    address: str | None,
) -> None:
    """Start or resume a tuning, and print its trials, the best first.

    Resuming is doing it again: the same seed makes the same trials, or Optuna is given the trials that were made, and
    each trial finds its run directory. Files that Tune has pickled are never read.

    Args:
        console: Where the tables go.
        source: The spec file.
        space_file: The search space's YAML file.
        overrides: `key=value` settings that override the spec's.
        run: Path or URI of the tuning's folder.
        options: How trials are chosen and stopped.
        address: Address of a Ray cluster; None starts a private Ray.

    Raises:
        UserError: Spec, space or options are wrong, the folder belongs to something else, or no trial finished.
    """
    spec, data = load_spec(source, overrides), load_data(source, overrides)
    space = load_space(space_file, data)
    require_agreement(space, options)
    if "?" in run:
        raise UserError(
            f"--run {run}: the URI's options do not reach the trials: set the endpoint in $AWS_ENDPOINT_URL"
        )
    storage = open_storage(run, option="--run")
    context = worker_context(trial_spec(data, {}))
    settings = {
        "spec": spec.model_dump(mode="json", exclude={"workers"}),
        "space": {key: varied.model_dump(mode="json", exclude_unset=True) for key, varied in space.items()},
        "scheduler": options.scheduler,
        "algorithm": options.algorithm,
        "dataset": context.data.fingerprint(),
    }
    require_same_tuning(storage, settings)
    num_samples = options.samples or default_num_samples(space)
    trials = read_finished(storage, num_samples)
    if trials:
        say(console, "was finished before: nothing is done again")
    else:
        with storage.lock(), ray_connection(context, address):
            with storage.writing(TUNING_FILE) as path:
                path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
            trials = run_trials(trainable(data), space, storage, spec, replace(options, samples=num_samples))
            write_finished(storage, num_samples, trials)
    show_trials(console, trials, list(space))
    show_best(console, trials[0], source, overrides)


def run_trials(
    function: Callable[[dict[str, Any]], None],
    space: SearchSpace,
    storage: Storage,
    spec: Spec,
    options: TuneOptions,
) -> list[Trial]:
    """Run or resume the trials on the Ray that this process is connected to.

    Args:
        function: The trainable.
        space: The search space.
        storage: The tuning's folder.
        spec: The spec that the space varies.
        options: How trials are chosen and stopped, with a number of samples.

    Returns:
        The ended trials, the best first.
    """
    with quiet_tune():
        tuner = tune.Tuner(
            function,
            param_space={key: to_tune_domain(varied) for key, varied in space.items()},
            tune_config=tune.TuneConfig(
                metric="score",
                mode="max",
                num_samples=options.samples,
                search_alg=search_algorithm(options.algorithm, spec.seed, past_choices(storage)),
                scheduler=asha_scheduler(spec) if options.scheduler == "asha" else None,
                trial_dirname_creator=TrialDirname(),
            ),
            run_config=tune.RunConfig(
                **tune_location(storage.uri),
                verbose=0,
                callbacks=[TrialLog(storage), ConsoleCallback()],
                failure_config=tune.FailureConfig(max_failures=spec.workers.max_retries),
            ),
        )
        return sorted(map(to_trial, tuner.fit()), key=Trial.sort_key, reverse=True)


def require_agreement(space: SearchSpace, options: TuneOptions) -> None:
    """Check that search space, scheduler and algorithm fit together.

    Raises:
        UserError: They do not, or Optuna is not installed.
    """
    if options.algorithm == "optuna" and find_spec("optuna") is None:
        raise UserError("--algorithm optuna: Optuna is not installed: pip install 'raymask[optuna]'")
    grids = [key for key, varied in space.items() if varied.grid]
    if options.algorithm == "optuna" and grids:
        raise UserError(f"--algorithm optuna: Optuna takes no grid: make the grid of {grids[0]} a choice")
    levels = [key for key in space if key.partition(".")[0] == "levels"]
    if options.scheduler == "asha" and levels:
        raise UserError(
            f"--scheduler asha: it compares trials level by level, and with {levels[0]} in the space a level's "
            "sparsity differs between them: use --scheduler none"
        )


def require_same_tuning(storage: Storage, tuning: Mapping[str, Any]) -> None:
    """Check that a folder is empty or has a tuning that was started with the same settings.

    Args:
        storage: The tuning's folder.
        tuning: Spec, space, scheduler and algorithm as plain data.

    Raises:
        UserError: Something else is there, or the settings differ.
    """
    try:
        before = yaml.safe_load(storage.read(TUNING_FILE))
    except (FileNotFoundError, NotADirectoryError):
        if any(True for _ in storage.names()):
            raise UserError(f"{storage.at()}: is not empty and not a tuning: choose another with --run") from None
        return
    except yaml.YAMLError:
        before = None
    differing = [key for key in tuning if not isinstance(before, dict) or before.get(key) != tuning[key]]
    if differing:
        raise UserError(
            f"{storage.at()}: was started with another {', another '.join(differing)}, see {storage.at(TUNING_FILE)}; "
            "choose another with --run"
        )


@contextmanager
def quiet_tune() -> Iterator[None]:
    """Leave Ctrl-C to raymask, and keep the log messages of Tune and Optuna out of its output, for the block."""
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with (
            set_environment(TUNE_DISABLE_SIGINT_HANDLER="1", RAY_AIR_NEW_OUTPUT="0"),
            warnings.catch_warnings(action="ignore"),
        ):
            yield
    finally:
        logger.setLevel(level)


def default_num_samples(space: SearchSpace) -> int:
    """Default number of samples: 1 when only grids vary, because a repeated trial gives the same result."""
    return 1 if all(varied.grid for varied in space.values()) else SAMPLES


def to_tune_domain(varied: Domain) -> Any:
    """The Ray Tune domain of a `Domain`."""
    if varied.uniform:
        return tune.uniform(*varied.uniform)
    if varied.loguniform:
        return tune.loguniform(*varied.loguniform)
    if varied.randint:
        low, high = varied.randint
        return tune.randint(low, high + 1)
    return tune.choice(varied.choice) if varied.choice else tune.grid_search(varied.grid)


def search_algorithm(algorithm: Algorithm, seed: int, known: list[dict[str, Any]]) -> Any:
    """Ray Tune's search algorithm.

    Args:
        algorithm: "random" or "optuna".
        seed: Its seed.
        known: Choices of the trials so far; Optuna begins with them.
    """
    if algorithm == "random":
        return BasicVariantGenerator(random_state=seed)
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return OptunaSearch(points_to_evaluate=known, seed=seed + len(known))


def asha_scheduler(spec: Spec) -> ASHAScheduler:
    """ASHA scheduler: at levels 1, 2, 4, ... it stops the worse half of the trials that have reached the level."""
    return ASHAScheduler(time_attr="level", max_t=len(spec.levels.densities()), reduction_factor=2)


def past_choices(storage: Storage) -> list[dict[str, Any]]:
    """The choices of all trials that were ever started in a folder, in that order. An incomplete last line is skipped.

    Raises:
        UserError: Another line is damaged.
    """
    try:
        *lines, _incomplete = storage.read(TRIALS).split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    try:
        return [json.loads(line) for line in lines]
    except ValueError:
        raise UserError(f"{storage.at(TRIALS)}: is damaged: choose another folder with --run") from None


def tune_location(run: str) -> dict[str, str]:
    """Ray Tune's `storage_path` and `name` for a folder: its parent folder, and its name there."""
    location = run if "://" in run else str(Path(run).expanduser().resolve())
    parent, _, name = location.rstrip("/").rpartition("/")
    return {"storage_path": parent or "/", "name": name}


class TrialDirname:
    """Folder names of trials, from a hash of their choices, so that a repeated trial finds its run directory again.

    Attributes:
        seen: Number of trials so far by name; a name that repeats gets a number.
    """

    def __init__(self) -> None:
        self.seen = Counter[str]()

    def __call__(self, trial: Any) -> str:
        """The folder name of a new trial."""
        name = hashlib.sha256(json.dumps(trial.config, sort_keys=True).encode()).hexdigest()[:8]
        self.seen[name] += 1
        return f"trial-{name}" + (f"-{self.seen[name]}" if self.seen[name] > 1 else "")


class TrialLog(Callback):  # type: ignore[misc]
    """Callback that appends the choices of every new trial to a file.

    Attributes:
        storage: The tuning's folder.
        known: Choices of all trials so far.
    """

    def __init__(self, storage: Storage) -> None:
        """Read the trials so far.

        Args:
            storage: The tuning's folder.
        """
        self.storage = storage
        self.known = past_choices(storage)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Append the choices of a trial that is not in the file."""
        if trial.config not in self.known:
            self.known.append(trial.config)
            self.storage.append(TRIALS, json.dumps(trial.config).encode())


class ConsoleCallback(Callback):  # type: ignore[misc]
    """Callback that prints one line for each event of a trial."""

    def __init__(self) -> None:
        self.start_time = time.monotonic()

    def print_event(self, trial: Any, text: str) -> None:
        """Print a line with the seconds since the start and the trial's name."""
        print(f"[{time.monotonic() - self.start_time:6.1f} s] {trial.custom_dirname or trial}: {text}", flush=True)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print the trial's choices."""
        self.print_event(trial, format_choices(trial.config))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Print level, sparsity and metric."""
        self.print_event(
            trial, f"level {result['level']}, {percent(result['sparsity'])}: metric {result['metric']:.4f}"
        )

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print that the trial is restarted."""
        self.print_event(trial, "failed or was lost; it goes on in its run directory")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print that the trial failed for good."""
        self.print_event(trial, "failed")


def format_choices(choices: Mapping[str, Any]) -> str:
    """A trial's choices as text, `key=value, ...`."""
    return ", ".join(f"{key}={shown(value)}" for key, value in choices.items())


def shown(value: Any) -> str:
    """A value as short text: numbers with four digits, all else as JSON."""
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


@dataclass(frozen=True)
class Trial:
    """An ended trial with its last report.

    Attributes:
        name: The trial's folder name.
        choices: Value by dotted spec key.
        error: The error that ended it, or None.
        level: Last level reported; 0 when there is no report.
        levels: Number of levels.
        sparsity: In [0, 1].
        score: What the tuning maximises.
        metric: On `validation`.
        loss: On `validation`.
        epochs: Epochs trained.
        run: Location of the trial's run directory.
    """

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
        """The state as text: failed, done, or stopped after a level."""
        if self.error:
            return "failed"
        return "done" if self.level == self.levels else f"stopped after level {self.level}"

    def sort_key(self) -> tuple[bool, float]:
        """Sort key: larger is better, and failed trials come last."""
        return self.error is None, self.score


def to_trial(result: Any) -> Trial:
    """The trial of a `ray.tune.Result`."""
    reported = {key: value for key, value in (result.metrics or {}).items() if key in REPORTED}
    return Trial(Path(result.path).name, result.config, result.error, **reported)


def write_finished(storage: Storage, num_samples: int, trials: Sequence[Trial]) -> None:
    """Write the trials of a tuning that has ended, unless one failed, which the same command tries again.

    Args:
        storage: The tuning's folder.
        num_samples: Samples of the search space.
        trials: The trials, the best first.
    """
    if not any(trial.error for trial in trials):
        with storage.writing(FINISHED) as path:
            path.write_text(json.dumps({"num_samples": num_samples, "trials": [asdict(trial) for trial in trials]}))


def read_finished(storage: Storage, num_samples: int) -> list[Trial] | None:
    """The trials of a tuning that has ended, the best first.

    Args:
        storage: The tuning's folder.
        num_samples: Samples of the search space.

    Returns:
        The trials; None when the tuning has not ended, had another number of samples, or a trial's model is gone.

    Raises:
        UserError: The file is damaged.
    """
    try:
        finished = json.loads(storage.read(FINISHED))
        trials = [Trial(**trial) for trial in finished["trials"]]
        is_same = finished["num_samples"] == num_samples
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{storage.at(FINISHED)}: is damaged. Delete it, and run the same command again") from None
    has_models = all(RunDir(trial.run).has_export() for trial in trials if trial.state == "done")
    return trials if is_same and has_models else None


def show_trials(console: Console, trials: Sequence[Trial], keys: Sequence[str]) -> None:
    """Print a table of all trials and the errors of those that failed.

    Args:
        console: Where the table goes.
        trials: The trials, the best first.
        keys: Spec keys that vary.
    """
    table = Table(title=Text("trials, best first; the metric is on the validation split"), title_justify="left")
    numbers = ("metric", "sparsity", "epochs")
    for head in ("trial", *numbers, *keys, "state"):
        table.add_column(Text(head), justify="right" if head in numbers else "left", overflow="fold")
    for trial in trials:
        values = (f"{trial.metric:.4f}", percent(trial.sparsity), f"{trial.epochs:g}") if trial.level else ("", "", "")
        choices = (shown(trial.choices[key]) for key in keys)
        table.add_row(*map(Text, (trial.name, *values, *choices, trial.state)))
    console.print(table)
    for trial in trials:
        if trial.error:
            say(console, f"{trial.name} failed: {describe(trial.error)}")


def show_best(console: Console, best: Trial, source: Path, overrides: Sequence[str]) -> None:
    """Print where the best trial's model is, and the search command that makes it again.

    Args:
        console: Where the text goes.
        best: The best trial.
        source: The spec file.
        overrides: `key=value` settings of the tuning.

    Raises:
        UserError: The best trial did not finish.
    """
    if best.state != "done":
        raise UserError("no trial finished; the same command tries again")
    settings = [*overrides, *(f"{key}={json.dumps(value)}" for key, value in best.choices.items())]
    command = shlex.join(["raymask", "search", str(source), *(word for item in settings for word in ("--set", item))])
    say(console, f"Best: {format_choices(best.choices)}. Its sparse model is in {best.run}/{EXPORT}.")
    say(console, f"\nNext: raymask show {shlex.quote(best.run)}\n      {command}")
