"""A search as a trial of Ray Tune, and `raymask tune`: what needs no Ray."""

from __future__ import annotations

import json
import math
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import tune as ray_tune
from rich.console import Console
from support.builders import refused
from support.fakes import Fakes, plan_of

import raymask.tune
from raymask import tune
from raymask.core.errors import UserError
from raymask.space import Way
from raymask.store import RunDir, branches

SPEC: dict[str, Any] = {
    "model": "quickstart",
    "task": "quickstart",
    "levels": [0.5, 0.9],
    "candidates": {"count": 2, "ratios": [0.02]},
}

optuna = pytest.mark.skipif(find_spec("optuna") is None, reason="pip install 'raymask[optuna]'")


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


def test_both_ways_to_import_tune_lead_to_it() -> None:
    assert raymask.tune is tune


def test_asha_halves_at_the_levels_and_none_is_left_alone() -> None:
    scheduler = tune.halving(tune.trial_spec(SPEC, {}))
    assert (scheduler._time_attr, scheduler._max_t, scheduler._reduction_factor) == ("level", 2, 2)


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
