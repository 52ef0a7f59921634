"""Does a search work as a trial of Ray Tune, and does `raymask tune` do what its help says?"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import tune as ray_tune
from ray.tune.schedulers import ASHAScheduler
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from rich.console import Console
from support.builders import refused
from support.fakes import Fakes, plan_of

import raymask
from raymask import tune
from raymask.cli import app
from raymask.config import make_spec, varied
from raymask.core.errors import UserError
from raymask.core.records import Result
from raymask.driver import cluster
from raymask.space import Way
from raymask.store import RunDir, branches

import psutil  # isort: skip - Ray brings it along, so it is found once Ray is imported

SPEC: dict[str, Any] = {
    "model": "quickstart",
    "task": "quickstart",
    "levels": [0.5, 0.9],
    "candidates": {"count": 2, "ratios": [0.02]},
    "dense": {"epochs": 0.5, "learning_rate": 4e-3},
    "probe": {"epochs": 0.1, "batch_size": 32, "eval_every": 5, "last": 2},
    "finetune": {"epochs": 0.1, "batch_size": 32},
    "imp": {"run": False},
    "distill": False,
    "precision": "fp32",
}
"""The quickstart in seconds."""
SLOWER = SPEC | {"probe": SPEC["probe"] | {"epochs": 0.5}, "finetune": {"epochs": 1.0, "batch_size": 32}}
"""With a middle to be killed in."""

optuna = pytest.mark.skipif(find_spec("optuna") is None, reason="pip install 'raymask[optuna]'")
CPUS = 2
PATIENCE = 60.0  # seconds after which something that must happen counts as never happening


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    """A private Ray with two CPUs, however many this machine has, as a search would start it."""
    before = ray.init

    def init(*arguments: Any, **options: Any) -> Any:
        return before(*arguments, **options, num_cpus=CPUS)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "init", init)
        with cluster.connected(tune.job_of(make_spec(SPEC)), None):
            yield


def fit(folder: Path, space: dict[str, Any], metric: str = "score", **config: Any) -> ray_tune.ResultGrid:
    """A tuning in a folder, its trials in the order of the space."""
    with tune.quiet():
        return ray_tune.Tuner(
            tune.trainable(SPEC),
            param_space=space,
            tune_config=ray_tune.TuneConfig(metric=metric, mode="max", **config),
            run_config=ray_tune.RunConfig(name="tuning", storage_path=str(folder), verbose=0),
        ).fit()


def result_of(run: str | Path) -> Result:
    found = RunDir(run).read_result()
    assert found is not None
    return found


def winners(result: Result) -> list[tuple[str, float | None]]:
    return [(level.digest, level.winner.score) for level in result.levels]


def no_workers_left() -> None:
    """Wait until no actor of a search is there any more."""
    start = time.monotonic()
    while any("ray::Desk" in name for name in names()):
        assert time.monotonic() - start < PATIENCE, "workers outlive their trial"
        time.sleep(0.1)


def names() -> Iterator[str]:
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                yield process.cmdline()[0]
        except (psutil.NoSuchProcess, IndexError):
            pass


# --- what needs no Ray ------------------------------------------------------------------------------------------------


def test_a_mistake_in_the_spec_is_said_when_the_trainable_is_made(tmp_path: Path) -> None:
    assert "probe.epocs: there is no such key" in refused(tune.trainable, SPEC | {"probe": {"epocs": 1}})
    assert "nowhere.yaml: there is no such file" in refused(tune.trainable, tmp_path / "nowhere.yaml")
    assert "levels: a sparsity of 0.99999 keeps none" in refused(tune.trainable, SPEC | {"levels": [0.99999]})


def test_choices_may_be_dotted_or_nested_and_levels_win_whole() -> None:
    choices = {"candidates.exponent": 3.0, "candidates": {"count": 1}, "levels": {"sparsity": 0.9, "steps": 2}}
    spec = tune.trial_spec(SPEC, choices)
    assert (spec.candidates.exponent, spec.candidates.count, spec.candidates.ratios) == (3.0, 1, (0.02,))
    assert len(spec.levels.densities()) == 2
    assert SPEC["candidates"] == {"count": 2, "ratios": [0.02]}


def test_a_trial_has_one_worker_when_nothing_is_said() -> None:
    assert tune.trial_spec(SPEC, {}).workers.count == 1
    assert tune.trial_spec(SPEC, {"workers.count": 3}).workers.count == 3


def test_grids_alone_are_gone_through_once() -> None:
    grid, other = Way(grid=[1, 2]), Way(choice=[1, 2])
    assert (tune.how_many({"seed": grid}), tune.how_many({"seed": grid, "candidates.count": other})) == (1, 8)


def test_a_trial_works_where_all_nodes_reach_and_says_so_when_it_cannot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def placed(kind: str, folder: str) -> str:
        storage = SimpleNamespace(
            storage_filesystem=SimpleNamespace(type_name=kind),
            experiment_fs_path=folder,
            trial_fs_path=f"{folder}/trial",
        )
        monkeypatch.setattr(tune.tune, "get_context", lambda: SimpleNamespace(get_storage=lambda: storage))
        return tune.place()

    assert placed("local", str(tmp_path)) == f"{tmp_path}/trial/run"
    assert placed("s3", "bucket/tuning") == "s3://bucket/tuning/trial/run"
    assert "nowhere on this node: give a folder that all nodes reach" in refused(placed, "local", "/nowhere")
    assert "a search cannot work on py::custom" in refused(placed, "py::custom", "x")


def test_the_last_number_of_randint_is_one_of_them() -> None:
    drawn = tune.domain(Way(randint=(1, 2)))
    assert {drawn.sample() for _ in range(50)} == {1, 2}


def test_what_does_not_go_together_is_said() -> None:
    levels = {"levels.steps": Way(choice=[1, 2])}
    assert "--scheduler asha" in refused(tune.require_agreement, levels, "asha", "random")


@optuna
def test_optuna_takes_no_grid() -> None:
    grid = {"seed": Way(grid=[1, 2])}
    assert "make the grid of seed a choice" in refused(tune.require_agreement, grid, "none", "optuna")


@optuna
def test_optuna_begins_with_what_it_has_chosen_before() -> None:
    space = {"candidates.exponent": Way(uniform=(2.0, 10.0)), "candidates.ratios": Way(choice=[[0.005], [0.02]])}

    def suggested(known: list[dict[str, Any]]) -> list[dict[str, Any]]:
        with tune.quiet():
            chooser = tune.searcher("optuna", 7, known)
            chooser.set_search_properties("score", "max", {key: tune.domain(way) for key, way in space.items()})
            return [chooser.suggest(str(number)) for number in range(3)]

    first = suggested([])
    assert suggested(json.loads(json.dumps(first[:2])))[:2] == first[:2]


def test_the_table_has_the_best_trial_first_and_says_what_failed_and_why() -> None:
    def trial(name: str, **told: Any) -> tune.Trial:
        return tune.Trial(name, {"seed": 1}, told.pop("error", None), levels=2, sparsity=0.5, **told)

    trials = [
        trial("a", error=UserError("the cluster burns\nand more")),
        trial("b", level=1, score=-1.0, metric=0.9),
        trial("c", level=2, score=0.7, metric=0.7),
        trial("d", level=2, score=0.8, metric=0.8),
    ]
    console = Console(record=True, width=100)
    tune.show_trials(console, sorted(trials, key=tune.Trial.rank, reverse=True), ["seed"])
    said = console.export_text()
    assert re.findall(r"^│ (\w) ", said, re.MULTILINE) == ["d", "c", "b", "a"]
    assert "stopped after level 1" in said
    assert "a failed: the cluster burns\n" in said
    message = refused(tune.show_best, console, trials[1], Path("spec.yaml"), [])
    assert message == "no trial came to its end; the same command tries again"


def test_without_optuna_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "find_spec", lambda name: None)
    assert "pip install 'raymask[optuna]'" in refused(tune.require_agreement, {}, "none", "optuna")


def test_import_raymask_does_not_load_tune_and_both_ways_lead_to_it() -> None:
    code = """
import sys, raymask
assert not {"ray", "torch"} & set(sys.modules)
from raymask import tune
import raymask.tune
assert raymask.tune.trainable is tune.trainable
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- trials -----------------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_a_trial_takes_its_workers_and_nothing_else(two_cpus: None) -> None:
    spec = tune.trial_spec(SPEC, {"workers": {"count": 2, "cpus": 0.5}})
    asked = tune.bundles(spec)
    memory = tune.job_of(spec).memory(on_gpu=False)
    assert asked.head_bundle_is_empty
    assert asked.bundles == [{"CPU": 0.5, "memory": memory}] * 2
    assert "no node can hold a worker" in refused(tune.bundles, tune.trial_spec(SPEC, {"workers.gpus": 1.0}))
    assert "a trial asks for 3 workers at once" in refused(tune.bundles, tune.trial_spec(SPEC, {"workers.count": 3}))


@pytest.mark.ray
def test_a_pool_inside_a_placement_group_sees_its_bundles_only(two_cpus: None) -> None:
    class Driver:
        def look(self) -> list[list[Any]]:
            with ThreadPoolExecutor(1) as elsewhere:  # Tune runs a trial in a thread
                return [cluster.alive(), elsewhere.submit(cluster.alive).result()]

    group = ray.util.placement_group([{"CPU": 1}])
    inside = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    driver = ray.remote(num_cpus=0)(Driver).options(scheduling_strategy=inside).remote()
    found = ray.get(driver.look.remote())
    ray.util.remove_placement_group(group)
    assert found == [[{"CPU": 1.0}]] * 2
    [node] = cluster.alive()
    assert node["CPU"] == CPUS


@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.long
def test_two_trials_side_by_side_report_their_levels(two_cpus: None, tmp_path: Path) -> None:
    """Two drivers and two workers on two CPUs; each finds what a search of its spec finds alone, in one process."""
    grid = fit(tmp_path, {"candidates.exponent": ray_tune.grid_search([2.0, 8.0])})
    assert grid.num_errors == 0
    started, ended = [], []
    for trial, exponent in zip(grid, (2.0, 8.0), strict=True):
        told = trial.metrics_dataframe
        result = result_of(trial.metrics["run"])
        assert Path(trial.metrics["run"]) == Path(trial.path) / "run"
        assert list(told["level"]) == [1, 2]
        assert list(told["metric"]) == [level.finetuned.kept.metric for level in result.levels]
        assert list(told["sparsity"]) == [level.sparsity for level in result.levels]
        assert list(told["score"] - told["metric"]) == [-2, 0]
        assert list(told["epochs"]) == pytest.approx([0.5 + 0.4, 0.5 + 0.8])
        assert "accuracy" not in trial.metrics
        assert len({piece.worker for piece in result.timeline}) == 1
        assert RunDir(result.run).read_spec().candidates.exponent == exponent
        alone = raymask.search(
            SPEC | {"candidates": {**SPEC["candidates"], "exponent": exponent}},
            run=tmp_path / str(exponent),
            in_process=True,
        )
        assert winners(result) == winners(alone)
        ended.append(trial.metrics["timestamp"])
        started.append(trial.metrics["timestamp"] - trial.metrics["time_total_s"])
    assert max(started) < min(ended), "the trials ran one after the other"
    no_workers_left()


@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.long
def test_asha_stops_a_trial_between_levels_and_its_workers_are_gone(two_cpus: None, tmp_path: Path) -> None:
    """By what they cost, which is known: the second trial trains less, and counts as the worse one."""
    good, bad = fit(
        tmp_path,
        {"candidates.count": ray_tune.grid_search([2, 1])},
        metric="epochs",
        scheduler=ASHAScheduler(time_attr="level", max_t=2, reduction_factor=2),
        max_concurrent_trials=1,
    )
    assert (good.metrics["level"], bad.metrics["level"]) == (2, 1)
    no_workers_left()
    assert RunDir(good.metrics["run"]).has_export()
    run = bad.metrics["run"]
    assert RunDir(run).has_level("", 1)
    assert not RunDir(run).has_level("", 2)
    assert not RunDir(run).storage.busy()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"candidates.exponnet": 3.0}, "candidates.exponnet: there is no such key; did you mean exponent?"),
        ({"candidates.count": ray_tune.uniform(2, 8)}, "candidates.count: input should be a valid integer"),
        ({"workers.count": 1000}, "a trial asks for 1000 workers at once"),
    ],
)
def test_a_mistake_in_the_space_is_said_before_any_trial(
    two_cpus: None, tmp_path: Path, space: dict[str, Any], said: str
) -> None:
    assert said in refused(fit, tmp_path, space)
    assert not list(tmp_path.rglob("run"))


TUNER = """
import sys
from ray import tune
from raymask import tune as searches
from raymask.core.spec import Spec
from raymask.driver import cluster

SPEC, FOLDER = {spec}, {folder!r}
with cluster.connected(searches.job_of(searches.trial_spec(SPEC, {{}})), None):
    trainable = searches.trainable(SPEC)
    if sys.argv[1] == "restore":
        tuner = tune.Tuner.restore(f"{{FOLDER}}/tuning", trainable, resume_unfinished=True)
    else:
        space = {{"candidates.exponent": tune.grid_search([2.0])}}
        tuner = tune.Tuner(trainable, param_space=space, run_config=tune.RunConfig(name="tuning", storage_path=FOLDER))
    [trial] = tuner.fit()
    print("RUN", trial.metrics["run"])
"""


@pytest.mark.faults
def test_a_killed_tuner_is_restored_and_its_trial_goes_on(tmp_path: Path) -> None:
    """In the middle of a trial; what was finished is not done again, and the winners are the undisturbed ones."""
    script = TUNER.format(spec=SLOWER, folder=str(tmp_path))
    victim = subprocess.Popen([sys.executable, "-c", script, "start"], stdout=subprocess.DEVNULL)
    kill_after_a_level(victim, tmp_path)
    before = lines(tmp_path)
    done = subprocess.run([sys.executable, "-c", script, "restore"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    [run] = re.findall("RUN (.*)", done.stdout)
    assert list(tmp_path.glob("tuning/*/run")) == [Path(run)]
    assert lines(tmp_path)[: len(before)] == before
    alone = raymask.search(varied(SLOWER, {"candidates.exponent": 2.0}), run=tmp_path / "alone", in_process=True)
    assert winners(result_of(run)) == winners(alone)


def kill_after_a_level(victim: subprocess.Popen[Any], folder: Path) -> None:
    """When the first level of a trial is done, and another is not."""
    start = time.monotonic()
    while not list(folder.rglob("level-1/level.json")):
        assert victim.poll() is None, "the tuning ended too early"
        assert time.monotonic() - start < PATIENCE, "no trial came to a level"
        time.sleep(0.05)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert not list(folder.rglob("run/result.json")), "killed too late"


def lines(folder: Path) -> list[str]:
    """All journals below a folder, line by line."""
    return [line for path in sorted(folder.rglob("evaluations.jsonl")) for line in path.read_text().splitlines()]


# --- the command line -------------------------------------------------------------------------------------------------

RAYMASK = str(Path(sys.executable).with_name("raymask"))
SPACE = """# the noise
candidates.exponent: {uniform: [2, 10]}
candidates.ratios: {choice: [[0.005], [0.02]]}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with spec.yaml and space.yaml, which is the current one."""
    (tmp_path / "spec.yaml").write_text(json.dumps(SPEC))
    (tmp_path / "space.yaml").write_text(SPACE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def raymask_tune(*words: str) -> subprocess.CompletedProcess[str]:
    command = [RAYMASK, "tune", "spec.yaml", "space.yaml", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


def run_here(*words: str) -> None:
    """The same command, in this process."""
    app(["tune", "spec.yaml", "space.yaml", *words], standalone_mode=False)


def test_mistakes_are_said_and_nothing_is_written(here: Path) -> None:
    (here / "space.yaml").write_text("candidates.exponnet: {uniform: [2, 10]}")
    done = raymask_tune()
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stderr
    assert "space.yaml: candidates.exponnet=2.0: candidates.exponnet: there is no such key" in done.stderr
    told = refused(run_here, "--set", "probe.epocs=1")
    assert "spec.yaml --set probe.epocs=1: probe.epocs: there is no such key; did you mean epochs?" in told
    (here / "space.yaml").unlink()
    assert "space.yaml: there is no such file" in refused(run_here)
    (here / "space.yaml").write_text("levels: {choice: [[0.5], [0.9]]}")
    assert "with levels in the space" in refused(run_here, "--scheduler", "asha")
    assert "is not empty and not a tuning" in refused(run_here, "--run", ".")
    assert "give an endpoint by $AWS_ENDPOINT_URL" in refused(run_here, "--run", "s3://bucket/x?scheme=http")
    assert "credentials do not belong in a URI" in refused(run_here, "--run", "s3://key:hunter2@bucket/x")
    assert sorted(path.name for path in here.iterdir()) == ["space.yaml", "spec.yaml"]


@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.long
def test_a_tuning_prints_its_trials_and_the_best_one_s_command(here: Path) -> None:
    """By Optuna where it is installed; with ASHA, which may stop one of the two."""
    algorithm = "optuna" if find_spec("optuna") else "random"
    words = ["--num-samples", "2", "--scheduler", "asha", "--run", "out", "--set", "seed=3", "--algorithm", algorithm]
    done = raymask_tune(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("trials, best first", "candidates.exponent", "level 1, 50.00%: metric", "done", "Best: "):
        assert part in done.stdout, part
    for noise in ("Configuration for experiment", "\x1b", "WARNING"):
        assert noise not in done.stdout + done.stderr
    [run] = re.findall("Next: raymask show (.*)", done.stdout)
    [command] = re.findall("(raymask search spec.yaml .*)", done.stdout)
    assert f"--set seed=3 --set candidates.exponent={RunDir(run).read_spec().candidates.exponent} " in command
    assert result_of(run).levels[-1].level == 2
    assert len((here / "out" / "trials.jsonl").read_text().splitlines()) == 2
    assert list(here.glob("out/trial-*/events.out.tfevents*")), "there is nothing for TensorBoard"

    (here / "space.yaml").write_text("candidates.exponent: {uniform: [2, 5]}")
    assert "out: was started with another space, see out/tuning.yaml" in refused(run_here, *words)


@pytest.mark.faults
def test_kill_9_and_the_same_command_go_on_with_every_trial(here: Path) -> None:
    (here / "spec.yaml").write_text(json.dumps(SLOWER))
    words = ["--num-samples", "2", "--run", "out"]
    victim = subprocess.Popen([RAYMASK, "tune", "spec.yaml", "space.yaml", *words], stdout=subprocess.DEVNULL)
    kill_after_a_level(victim, here)
    before = {path: path.read_text() for path in here.rglob("evaluations.jsonl")}
    done = raymask_tune(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(path.read_text().startswith(text) for path, text in before.items())
    tried = [json.loads(line) for line in (here / "out" / "trials.jsonl").read_text().splitlines()]
    assert len(tried) == 2
    again = raymask_tune(*words)
    assert again.stdout.partition("Best: ")[2] == done.stdout.partition("Best: ")[2] != ""
    runs = {RunDir(run).read_spec().candidates.exponent: run for run in (here / "out").glob("trial-*/run")}
    for number, choices in enumerate(tried):
        alone = raymask.search(varied(SLOWER, choices), run=here / f"alone-{number}", in_process=True)
        assert winners(result_of(runs[choices["candidates.exponent"]])) == winners(alone)


@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.long
def test_ctrl_c_ends_a_tuning_with_a_word(here: Path) -> None:
    command = [RAYMASK, "tune", "spec.yaml", "space.yaml", "--run", "out"]
    victim = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    while "candidates.exponent=" not in victim.stdout.readline():
        assert victim.poll() is None
    victim.send_signal(signal.SIGINT)
    _, said = victim.communicate(timeout=60)
    assert victim.returncode == 130, said
    assert said.strip() == "raymask: stopped; the same command goes on from here"


def test_of_several_branches_the_best_after_fine_tuning_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As soon as the next level begins; a search that is found finished tells all its levels as well."""
    plan = plan_of(levels=[0.5, 0.9], select={"keep": 2}, imp={"run": False})
    store = RunDir(tmp_path)
    Fakes(plan, metrics=(0.5, 0.5, 0.6, 0.7)).run(store)
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(ray_tune, "report", told.append)
    reporter = tune.Reporter(plan.recipe.spec, "run")
    for lineage in branches(plan.recipe.spec):
        reporter.settled(lineage, store.read_level(lineage, 1))
    assert told == []
    reporter.begins("level 1, fine-tuning", 1, 2)
    assert told == []
    reporter.begins("level 2, early evaluation", 2, 4, [])
    assert [(report["level"], report["metric"], report["score"]) for report in told] == [(1, 0.7, 0.7 - 2)]
    reporter.finish(store.read_level("branch-2", 2))
    assert [(report["level"], report["metric"], report["score"]) for report in told[1:]] == [(2, 0.7, 0.7)]


def test_a_perplexity_is_told_as_its_logarithm_and_scored_within_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = plan_of(levels=[0.5, 0.9], imp={"run": False})
    store = RunDir(tmp_path)
    Fakes(plan, metrics=(-3.0,) * 4).run(store)
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(ray_tune, "report", told.append)
    reporter = tune.Reporter(plan.recipe.spec, "run")
    perplexity = {"report": {"perplexity": 20.0}}
    reporter.settled("", store.read_level("", 1).model_copy(update=perplexity))
    reporter.finish(store.read_level("", 2).model_copy(update=perplexity))
    assert [report["metric"] for report in told] == [-3.0, -3.0]
    assert [report["score"] for report in told] == pytest.approx([math.exp(-3) - 2, math.exp(-3)])
