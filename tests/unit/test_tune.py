"""A search as a trial of Ray Tune, and `raymask tune`: what needs no Ray."""

from __future__ import annotations

import json
import math
import re
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import tune as ray_tune
from rich.console import Console
from support.builders import refused
from support.fakes import Fakes, setup_of

import raymask.tune.command
from raymask.core.errors import UserError
from raymask.core.lineage import branches
from raymask.runs.run_dir import EXPORT, MASK, RunDir
from raymask.tune import command, trial
from raymask.tune.space import Domain

SPEC: dict[str, Any] = {
    "model": "quickstart",
    "task": "quickstart",
    "levels": [0.5, 0.9],
    "candidates": {"count": 2, "sampling_ratios": [0.02]},
}

optuna = pytest.mark.skipif(find_spec("optuna") is None, reason="pip install 'raymask[optuna]'")


def test_a_mistake_in_the_spec_is_said_when_the_trainable_is_made(tmp_path: Path) -> None:
    assert "early_eval.epocs: there is no such key" in refused(trial.trainable, SPEC | {"early_eval": {"epocs": 1}})
    assert "nowhere.yaml: there is no such file" in refused(trial.trainable, tmp_path / "nowhere.yaml")
    assert "levels: a sparsity of 0.99999 keeps none" in refused(trial.trainable, SPEC | {"levels": [0.99999]})


def test_choices_may_be_dotted_or_nested_and_levels_win_whole() -> None:
    choices = {"candidates.exponent": 3.0, "candidates": {"count": 1}, "levels": {"sparsity": 0.9, "steps": 2}}
    spec = trial.trial_spec(SPEC, choices)
    assert (spec.candidates.exponent, spec.candidates.count, spec.candidates.sampling_ratios) == (3.0, 1, (0.02,))
    assert len(spec.levels.densities()) == 2
    assert SPEC["candidates"] == {"count": 2, "sampling_ratios": [0.02]}


def test_a_trial_has_one_worker_when_nothing_is_said() -> None:
    assert trial.trial_spec(SPEC, {}).workers.count == 1
    assert trial.trial_spec(SPEC, {"workers.count": 3}).workers.count == 3


def test_grids_alone_are_gone_through_once() -> None:
    grid, other = Domain(grid=[1, 2]), Domain(choice=[1, 2])
    assert (
        command.default_num_samples({"seed": grid}),
        command.default_num_samples({"seed": grid, "candidates.count": other}),
    ) == (1, 8)


def test_a_trial_works_where_all_nodes_reach_and_says_so_when_it_cannot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def placed(kind: str, folder: str) -> str:
        storage = SimpleNamespace(
            storage_filesystem=SimpleNamespace(type_name=kind),
            experiment_fs_path=folder,
            trial_fs_path=f"{folder}/trial",
        )
        monkeypatch.setattr(command.tune, "get_context", lambda: SimpleNamespace(get_storage=lambda: storage))
        return trial.trial_run_uri()

    assert placed("local", str(tmp_path)) == f"{tmp_path}/trial/run"
    assert placed("s3", "bucket/tuning") == "s3://bucket/tuning/trial/run"
    assert "nowhere on this node: give a folder that all nodes reach" in refused(placed, "local", "/nowhere")
    assert "a search cannot work on py::custom" in refused(placed, "py::custom", "x")


def test_the_last_number_of_randint_is_one_of_them() -> None:
    drawn = command.to_tune_domain(Domain(randint=(1, 2)))
    assert {drawn.sample() for _ in range(50)} == {1, 2}


def test_what_does_not_go_together_is_said() -> None:
    levels = {"levels.steps": Domain(choice=[1, 2])}
    assert "--scheduler asha" in refused(command.require_agreement, levels, command.TuneOptions(scheduler="asha"))


@optuna
def test_optuna_takes_no_grid() -> None:
    grid = {"seed": Domain(grid=[1, 2])}
    assert "make the grid of seed a choice" in refused(
        command.require_agreement, grid, command.TuneOptions(algorithm="optuna")
    )


@optuna
def test_optuna_begins_with_what_it_has_chosen_before() -> None:
    space = {
        "candidates.exponent": Domain(uniform=(2.0, 10.0)),
        "candidates.sampling_ratios": Domain(choice=[[0.005], [0.02]]),
    }

    def suggested(known: list[dict[str, Any]]) -> list[dict[str, Any]]:
        with command.quiet_tune():
            chooser = command.search_algorithm("optuna", 7, known)
            chooser.set_search_properties(
                "score", "max", {key: command.to_tune_domain(way) for key, way in space.items()}
            )
            return [chooser.suggest(str(number)) for number in range(3)]

    first = suggested([])
    assert suggested(json.loads(json.dumps(first[:2])))[:2] == first[:2]


def test_the_table_has_the_best_trial_first_and_says_what_failed_and_why() -> None:
    def trial(name: str, **told: Any) -> command.Trial:
        return command.Trial(name, {"seed": 1}, told.pop("error", None), levels=2, sparsity=0.5, **told)

    trials = [
        trial("a", error=UserError("the cluster burns\nand more")),
        trial("b", level=1, score=-1.0, metric=0.9),
        trial("c", level=2, score=0.7, metric=0.7),
        trial("d", level=2, score=0.8, metric=0.8),
    ]
    console = Console(record=True, width=100)
    command.show_trials(console, sorted(trials, key=command.Trial.sort_key, reverse=True), ["seed"])
    said = console.export_text()
    assert re.findall(r"^│ (\w) ", said, re.MULTILINE) == ["d", "c", "b", "a"]
    assert "stopped after level 1" in said
    assert "a failed: the cluster burns\n" in said
    message = refused(command.show_best, console, trials[1], Path("spec.yaml"), [])
    assert message == "no trial finished; the same command tries again"


def test_without_optuna_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert "pip install 'raymask[optuna]'" in refused(
        command.require_agreement, {}, command.TuneOptions(algorithm="optuna")
    )


def test_both_ways_to_import_tune_lead_to_it() -> None:
    assert raymask.tune.trainable is trial.trainable


SPACE = "candidates.exponent: {uniform: [2, 10]}"


@pytest.fixture
def tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A tuning of two trials that need no Ray; `run` types the command, and `trials` are what Tune would return."""
    finished = tmp_path / "finished"
    (finished / EXPORT).mkdir(parents=True)
    (finished / EXPORT / MASK).touch()
    trials = [
        command.Trial(f"trial-{exponent}", {"candidates.exponent": exponent}, None, 2, 2, 0.9, score, run=str(finished))
        for exponent, score in ((3.0, 0.8), (4.0, 0.7))
    ]
    made = SimpleNamespace(trials=trials, started=0, folder=tmp_path / "run")
    (tmp_path / "spec.yaml").write_text(json.dumps(SPEC))
    (tmp_path / "space.yaml").write_text(SPACE)

    def run_trials(*_: Any) -> list[command.Trial]:
        made.started += 1
        return made.trials

    def run(samples: int = 2) -> str:
        console = Console(record=True, width=100)
        files = tmp_path / "spec.yaml", tmp_path / "space.yaml"
        command.run_tuning(console, *files, (), str(made.folder), command.TuneOptions(samples), None)
        return console.export_text()

    monkeypatch.setattr(command, "run_trials", run_trials)
    monkeypatch.setattr(command, "ray_connection", lambda context, address: nullcontext())
    made.run = run
    return made


def test_a_finished_tuning_is_printed_again_without_ray(tuning: SimpleNamespace) -> None:
    first, again = tuning.run(), tuning.run()
    assert again == f"was finished before: nothing is done again\n{first}"
    assert tuning.started == 1
    tuning.run(samples=3)
    assert tuning.started == 2


def test_a_tuning_with_a_failed_trial_or_a_lost_model_is_no_finished_one(tuning: SimpleNamespace) -> None:
    whole = tuning.trials
    tuning.trials = [whole[0], replace(whole[1], error=UserError("its node burned"))]
    tuning.run()
    tuning.trials = [whole[0], replace(whole[1], run=str(tuning.folder / "gone"))]
    tuning.run()
    tuning.run()
    assert tuning.started == 3


def test_a_tuning_is_held_against_its_data(tuning: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.run()
    monkeypatch.setattr("raymask.data.types.TaskData.fingerprint", lambda data: "other")
    assert f"{tuning.folder}: was started with another dataset, see {tuning.folder}/tuning.yaml" in refused(tuning.run)


def test_a_damaged_record_of_a_finished_tuning_is_said(tuning: SimpleNamespace) -> None:
    tuning.run()
    (tuning.folder / "finished.json").write_text('{"trials": [{}], "num_samples": 2}')
    assert "finished.json: is damaged. Delete it, and run the same command again" in refused(tuning.run)


def test_asha_halves_at_the_levels_and_none_is_left_alone() -> None:
    scheduler = command.asha_scheduler(trial.trial_spec(SPEC, {}))
    assert (scheduler._time_attr, scheduler._max_t, scheduler._reduction_factor) == ("level", 2, 2)


def test_of_several_branches_the_best_after_fine_tuning_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As soon as the next level begins; a search that is found finished tells all its levels as well."""
    search_setup = setup_of(levels=[0.5, 0.9], select={"keep": 2}, imp={"run": False})
    store = RunDir(tmp_path)
    Fakes(search_setup, metrics=(0.5, 0.5, 0.6, 0.7)).run(store)
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(ray_tune, "report", told.append)
    callback = trial.TuneCallback(search_setup.recipe.spec, "run")
    for lineage in branches(search_setup.recipe.spec):
        callback.on_level_end(lineage, store.read_level(lineage, 1))
    assert told == []
    callback.on_phase_begin("level 1, fine-tuning", 1, 2)
    assert told == []
    callback.on_phase_begin("level 2, early evaluation", 2, 4, [])
    assert [(row["level"], row["metric"], row["score"]) for row in told] == [(1, 0.7, 0.7 - 2)]
    callback.finish(store.read_level("branch-2", 2))
    assert [(row["level"], row["metric"], row["score"]) for row in told[1:]] == [(2, 0.7, 0.7)]


def test_a_perplexity_is_told_as_its_logarithm_and_scored_within_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    search_setup = setup_of(levels=[0.5, 0.9], imp={"run": False})
    store = RunDir(tmp_path)
    Fakes(search_setup, metrics=(-3.0,) * 4).run(store)
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(ray_tune, "report", told.append)
    callback = trial.TuneCallback(search_setup.recipe.spec, "run")
    perplexity = {"test_metrics": {"perplexity": 20.0}}
    callback.on_level_end("", store.read_level("", 1).model_copy(update=perplexity))
    callback.finish(store.read_level("", 2).model_copy(update=perplexity))
    assert [row["metric"] for row in told] == [-3.0, -3.0]
    assert [row["score"] for row in told] == pytest.approx([math.exp(-3) - 2, math.exp(-3)])
