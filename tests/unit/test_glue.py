"""Experiment on GLUE: the right figures side by side, at equal budgets, and resumed after a kill."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console
from support.builders import refused, reviews, tiny_model, write_table

from raymask.core import stats
from raymask.core.lineage import DENSE
from raymask.core.recipe import planned_epochs, resolve
from raymask.runs.run_dir import RunDir, check_run

SCRIPT = Path(__file__).resolve().parents[2] / "jobs" / "experiments" / "glue.py"
LEVELS = (0.75, 0.9375)


@pytest.fixture(scope="module")
def glue() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield import_module("glue")


def rows(glue: ModuleType, scores: dict[str, list[float]]) -> list[str]:
    """The cells of the one row that is pruned, for scores in [0, 1] by method and seed."""
    cells = [
        glue.Cell("glue/rte", seed, method, 0.0 if method == "dense" else 0.9375, {"accuracy": score})
        for method, values in scores.items()
        for seed, score in enumerate(values)
    ]
    head, _, row = glue.table(cells).strip().splitlines()
    return [*zip(*([cell.strip() for cell in line.strip("| ").split("|")] for line in (head, row)), strict=True)]


def test_the_table_has_means_spreads_and_differences_seed_by_seed(glue: ModuleType) -> None:
    found = dict(
        rows(
            glue,
            {
                "dense": [0.9, 0.9, 0.9],
                "IMP": [0.5, 0.6, 0.7],
                "one uniform mask": [0.5, 0.5, 0.5],
                "one random mask": [0.5, 0.6, 0.7],
                "raymask": [0.52, 0.61, 0.73],
            },
        )
    )
    assert found["sparsity"] == "93.75%"
    assert found["dense"] == "90.0 ± 0.0"
    assert "smaller dense" not in found
    assert found["IMP"] == "60.0 ± 10.0"
    assert found["one random mask - IMP"] == "+0.0 ± 0.0"
    assert found["one uniform mask - IMP"] == "-10.0 ± 5.8"
    assert found["raymask - IMP"] == "+2.0 ± 0.6"


def test_what_was_left_out_has_no_column(glue: ModuleType) -> None:
    kept = {"dense": [0.9, 0.9], "IMP": [0.5, 0.6], "one random mask": [0.5, 0.7], "raymask": [0.5, 0.6]}
    found = dict(rows(glue, kept))
    assert not [head for head in found if "uniform" in head]
    assert found["one random mask - IMP"] == "+5.0 ± 5.0"


def test_one_seed_has_no_spread(glue: ModuleType) -> None:
    methods = ("dense", "IMP", "one uniform mask", "one random mask", "raymask")
    found = dict(rows(glue, {method: [0.5] for method in methods}))
    assert (found["IMP"], found["raymask - IMP"]) == ("50.0", "+0.0")


def test_a_search_by_other_settings_is_not_taken_for_this_one(glue: ModuleType, finished: Path) -> None:
    spec = glue.spec_of(RunDir(finished).read_spec().model_dump(mode="json"), {"seed": 7})
    said = refused(glue.searched, Console(quiet=True), spec, str(finished), None)
    assert "was started with another spec" in said
    assert "seed: 0 there, 7 now" in said


@pytest.mark.parametrize("copied", range(4))
def test_a_dense_model_that_was_copied_in_part_is_copied_again(
    glue: ModuleType, finished: Path, tmp_path: Path, copied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after so many of its five files: whatever is there is a run directory without work."""
    files: list[object] = []

    def copy(source: Path, target: Path) -> None:
        if len(files) == copied:
            raise KeyboardInterrupt
        files.append(target.write_bytes(source.read_bytes()))

    monkeypatch.setattr(glue.shutil, "copyfile", copy)
    dense = RunDir(finished)
    with pytest.raises(KeyboardInterrupt):
        glue.searched(Console(quiet=True), dense.read_spec(), str(tmp_path / "run"), None, dense)
    assert not RunDir(tmp_path / "run").has_progress()
    check_run(RunDir(tmp_path / "run"), dense.read_spec())


def test_a_mistake_in_the_spec_is_told_before_anything_runs(
    glue: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in (
        ([str(tmp_path / "none.yaml")], "glue: " + str(tmp_path / "none.yaml") + ": there is no such file"),
        (["--set", "early_eval.repeats=3"], "glue: early_eval.repeats: how many epochs they take is not known before"),
    ):
        monkeypatch.setattr(sys, "argv", ["glue.py", "--run", str(tmp_path / "run"), *words])
        with pytest.raises(SystemExit) as end:
            glue.main()
        assert end.value.code == 2
        assert capsys.readouterr().err.startswith(said)
    assert not (tmp_path / "run").exists()


def test_budgets_are_equal_whatever_the_spec_keeps(glue: ModuleType) -> None:
    plain = {"model": "quickstart", "task": "quickstart", "levels": [0.5, 0.9]}
    tree = glue.spec_of(plain, {"select": {"keep": 2, "beam": True}, "early_eval.rungs": [0.5, 1.0]})
    budget, searches = glue.at_equal_budget(tree)
    spent = {name: planned_epochs(resolve(spec)) for name, spec in searches.items()}
    assert spent["raymask"]["IMP baseline"] == pytest.approx(2 * budget)
    assert spent["voting"]["fine-tuning"] == spent["random"]["fine-tuning"] == pytest.approx(2 * budget)
    assert not searches["voting"].select.beam


def test_it_runs_and_what_is_done_is_not_done_again(
    glue: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By one worker in this process, where the script itself takes Ray's."""
    monkeypatch.setattr(stats, "RESAMPLES", 50)
    monkeypatch.setattr(glue, "search", partial(glue.search, in_process=True))
    open_executor = glue.open_executor
    monkeypatch.setattr(
        glue,
        "open_executor",
        lambda context, callback, address, in_process: open_executor(context, callback, address, True),
    )
    model = tiny_model(tmp_path / "model", head=False, num_hidden_layers=3)
    for split, count in (("train", 80), ("validation", 40)):
        texts, labels = reviews(count, seed=len(split))
        write_table(tmp_path / "glue" / "sst2" / f"{split}.parquet", {"sentence": texts, "label": labels})
    keys = [f"model={model}", f"task.folder={tmp_path / 'glue'}", f"levels={list(LEVELS)}", "candidates.count=2"]
    keys += ["dense.epochs=1", "early_eval.epochs=0.5", "finetune.epochs=1", "distill=false", "workers.gpus=0"]
    command = ["glue.py", "--tasks", "glue/sst2", "--seeds", "1", "--run", str(tmp_path / "run")]
    command += [word for key in keys for word in ("--set", key)]

    def printed(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", [*command, *words])
        glue.main()
        return capsys.readouterr().out

    printed()
    cells = [glue.Cell(**cell) for cell in json.loads((tmp_path / "run" / "glue.json").read_text())]
    assert {cell.method for cell in cells} == set(glue.METHODS)
    assert {(cell.method, cell.sparsity) for cell in cells} >= {
        (name, level) for name in glue.METHODS[2:] for level in LEVELS
    }
    place = tmp_path / "run" / "sst2-0"
    ours, single = RunDir(place / "raymask"), RunDir(place / "voting")
    spent = planned_epochs(resolve(ours.read_spec()))
    assert spent["IMP baseline"] == spent["early evaluation"] + spent["fine-tuning"] == 5.0
    assert planned_epochs(resolve(single.read_spec()))["fine-tuning"] == 5.0
    assert single.read_level(DENSE, 0) == ours.read_level(DENSE, 0)
    for name in ("voting", "random"):
        result = RunDir(place / name).read_result()
        assert result is not None
        assert [level.winner.candidate.index for level in result.levels] == [1, 1]
    [small] = [cell for cell in cells if cell.method == "smaller dense"]
    assert small.sparsity == 0.75  # one layer of 16 neurons

    page, whole = tmp_path / "page.md", (tmp_path / "run" / "glue.md").read_text()
    page.write_text(f"{glue.pages.begin(glue.SCRIPT)}\n{glue.pages.END}\n")
    for words in (("--page", str(page)), ("--skip", "one uniform mask")):
        again = printed(*words)
        searches = ("raymask", "voting") if "--skip" in words else ("raymask", "random", "voting")
        said = re.findall(r"== (.+)\n.*was finished before: nothing is done again\n", again)
        assert said == [str(place / name) for name in searches]
        text = (tmp_path / "run" / "glue.md").read_text()
        assert again.splitlines()[2 * len(searches) :] == [*text.splitlines(), ""]
        assert (text == whole) is ("--skip" not in words)
    assert whole.strip() in page.read_text()
