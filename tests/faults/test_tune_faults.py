"""Whole tunings on Ray: side by side, stopped, killed and continued, by `raymask tune` and by Ray Tune itself."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from ray import tune as ray_tune
from ray.tune.schedulers import ASHAScheduler
from support.builders import reviews, tiny_model, write_table
from support.callbacks import PATIENCE, private_ray, wait_until, worker_pids
from support.cli import Done, raymask, refused_command
from support.paths import RAYMASK

from raymask import search
from raymask.config import apply_choices
from raymask.runs.run_dir import RunDir
from raymask.tune import command, trial

SPACE = "candidates.exponent: {uniform: [2, 10]}"
WORDS = ("tune", "spec.yaml", "space.yaml")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny model of its own, not trained densely; its fine-tunings are long enough to be killed in."""
    folder = tmp_path_factory.mktemp("task")
    for name, rows in (("train", 60), ("report", 20)):
        texts, labels = reviews(rows)
        write_table(folder / f"{name}.csv", {"text": texts, "label": labels})
    return {
        "model": str(tiny_model(folder / "model")),
        "task": {"train": str(folder / "train.csv"), "test": str(folder / "report.csv"), "text": "text"},
        "levels": [0.5, 0.75],
        "candidates": {"count": 2, "sampling_ratios": [0.01]},
        "dense": {"epochs": 0},
        "early_eval": {"epochs": 1, "batch_size": 16},
        "finetune": {"epochs": 60, "batch_size": 16},
        "imp": {"run": False},
        "distill": False,
        "precision": "fp32",
    }


@pytest.fixture
def here(spec: dict[str, Any], tmp_path: Path) -> Path:
    """A folder with spec.yaml and space.yaml."""
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    (tmp_path / "space.yaml").write_text(SPACE)
    return tmp_path


def winners(run: str | Path) -> list[tuple[str, float | None]]:
    """Of the levels that a run has."""
    store = RunDir(run)
    levels = [store.read_level("", number) for number in (1, 2) if store.has_level("", number)]
    return [(level.digest, level.winner.score) for level in levels]


def journals(folder: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in folder.rglob("evaluations.jsonl")}


def kill_after_a_level(victim: subprocess.Popen[Any], folder: Path) -> None:
    """When the first level of a trial is done, and another is not."""
    start = time.monotonic()
    while not list(folder.rglob("level-1/level.json")):
        assert victim.poll() is None, "the tuning ended too early"
        assert time.monotonic() - start < 2 * PATIENCE, "no trial came to a level"
        time.sleep(0.05)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert not list(folder.rglob("run/result.json")), "killed too late"


FINETUNE = ({"epochs": 30, "warmup": 0.1}, {"epochs": 30, "warmup": 0.2}, {"epochs": 40, "warmup": 0.1})


def test_trials_run_side_by_side_asha_stops_one_between_levels_and_no_worker_is_left(
    spec: dict[str, Any], tmp_path: Path
) -> None:
    """The third trial starts when one of the others has ended; by what it costs it counts as the worst."""
    with private_ray(cpus=2), command.quiet_tune():
        results = ray_tune.Tuner(
            trial.trainable(spec),
            param_space={"finetune": ray_tune.grid_search([spec["finetune"] | choice for choice in FINETUNE])},
            tune_config=ray_tune.TuneConfig(
                metric="epochs",
                mode="min",
                scheduler=ASHAScheduler(time_attr="level", max_t=2, reduction_factor=2),
            ),
            run_config=ray_tune.RunConfig(name="tuning", storage_path=str(tmp_path), verbose=0),
        ).fit()
        wait_until(lambda: not worker_pids())
    assert [result.metrics["level"] for result in results] == [2, 2, 1]
    good, other, bad = results
    started_at = [result.metrics["timestamp"] - result.metrics["time_total_s"] for result in (good, other)]
    ended_at = [result.metrics["timestamp"] for result in (good, other)]
    assert max(started_at) < min(ended_at), "one trial ran after the other"
    told = good.metrics_dataframe
    store = RunDir(good.metrics["run"])
    result = store.read_result()
    assert result is not None
    assert Path(good.metrics["run"]) == Path(good.path) / "run"
    assert list(told["level"]) == [1, 2]
    assert list(told["metric"]) == [level.finetune_result.best_eval.metric for level in result.levels]
    assert list(told["sparsity"]) == [level.sparsity for level in result.levels]
    assert list(told["score"] - told["metric"]) == [-2, 0]
    assert "accuracy" not in good.metrics
    assert len({span.worker for span in result.timeline}) == 1
    assert store.has_export()
    assert list(told["epochs"]) == pytest.approx([3 + 30, 2 * (3 + 30)])
    assert not RunDir(bad.metrics["run"]).has_level("", 2)
    for number, (result, choice) in enumerate(zip(results, FINETUNE, strict=True)):
        chosen = {f"finetune.{key}": value for key, value in choice.items()}
        alone = search(apply_choices(spec, chosen), run=tmp_path / f"alone-{number}", in_process=True)
        assert RunDir(result.metrics["run"]).read_spec().finetune == RunDir(alone.run).read_spec().finetune
        assert winners(result.metrics["run"]) == winners(alone.run)[: result.metrics["level"]]
        assert not RunDir(result.metrics["run"]).storage.is_locked()


def test_ctrl_c_and_kill_9_end_a_tuning_and_the_same_command_goes_on_with_every_trial(
    spec: dict[str, Any], here: Path
) -> None:
    """By Optuna where it is installed."""
    algorithm = "optuna" if find_spec("optuna") else "random"
    words = [*WORDS, "--num-samples", "2", "--run", "out", "--set", "seed=3", "--algorithm", algorithm]
    first = subprocess.Popen([RAYMASK, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=here)
    assert first.stdout is not None
    while "candidates.exponent=" not in first.stdout.readline():
        assert first.poll() is None
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=2 * PATIENCE)
    assert first.returncode == 130, said
    assert said.strip() == "raymask: stopped. Run the same command again to continue"

    kill_after_a_level(subprocess.Popen([RAYMASK, *words], stdout=subprocess.DEVNULL, cwd=here), here)
    before = journals(here)
    done = raymask(*words, cwd=here)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(path.read_text().startswith(text) for path, text in before.items())
    check_output(done, here)
    tried = [json.loads(line) for line in (here / "out" / "trials.jsonl").read_text().splitlines()]
    runs = {RunDir(run).read_spec().candidates.exponent: run for run in (here / "out").glob("trial-*/run")}
    assert len(tried) == len(runs) == 2
    for number, choices in enumerate(tried):
        alone = search(apply_choices(spec, {"seed": 3} | choices), run=here / f"alone-{number}", in_process=True)
        assert winners(runs[choices["candidates.exponent"]]) == winners(alone.run)

    again = raymask(*words, cwd=here)
    assert again.stdout.partition("Best: ")[2] == done.stdout.partition("Best: ")[2] != ""
    assert list(here.glob("out/trial-*/events.out.tfevents*")), "there is nothing for TensorBoard"
    (here / "space.yaml").write_text("candidates.exponent: {uniform: [2, 5]}")
    assert "out: was started with another space, see out/tuning.yaml" in refused_command(*words, cwd=here)


def check_output(done: Done, here: Path) -> None:
    """The trials' progress, their table, and the best one's command."""
    for part in ("trials, best first", "candidates.exponent", "level 1, 50.00%: metric", "done", "Best: "):
        assert part in done.stdout, part
    for noise in ("Configuration for experiment", "\x1b", "WARNING"):
        assert noise not in done.stdout + done.stderr
    [run] = re.findall("Next: raymask show (.*)", done.stdout)
    [command] = re.findall("(raymask search spec.yaml .*)", done.stdout)
    assert f"--set seed=3 --set candidates.exponent={RunDir(run).read_spec().candidates.exponent}" in command
    result = RunDir(run).read_result()
    assert result is not None
    assert result.levels[-1].level == 2


TUNER = """
import json, sys
from ray import tune
from raymask.executor import connection
from raymask.tune import trial

spec, folder = json.load(open(sys.argv[1])), sys.argv[2]
with connection.ray_connection(trial.worker_context(trial.trial_spec(spec, {})), None):
    trainable = trial.trainable(spec)
    space = {"candidates.exponent": tune.grid_search([2.0])}
    tune.Tuner(trainable, param_space=space, run_config=tune.RunConfig(name="tuning", storage_path=folder)).fit()
"""


def test_a_killed_tuner_is_restored_and_its_trial_goes_on(spec: dict[str, Any], here: Path) -> None:
    """In the middle of a trial; what was finished is not done again, and the winners are the undisturbed ones."""
    tuner = [sys.executable, "-c", TUNER, str(here / "spec.yaml"), str(here)]
    kill_after_a_level(subprocess.Popen(tuner, stdout=subprocess.DEVNULL), here)
    before = journals(here)
    with private_ray(cpus=1), command.quiet_tune():
        [restored] = ray_tune.Tuner.restore(str(here / "tuning"), trial.trainable(spec), resume_unfinished=True).fit()
    run = restored.metrics["run"]
    assert list(here.glob("tuning/*/run")) == [Path(run)]
    assert all(path.read_text().startswith(text) for path, text in before.items())
    alone = search(apply_choices(spec, {"candidates.exponent": 2.0}), run=here / "alone", in_process=True)
    assert winners(run) == winners(alone.run)
