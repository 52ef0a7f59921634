"""Is an unfinished search shown as far as it is?"""

from __future__ import annotations

import io
import json
from itertools import groupby
from pathlib import Path

import pytest
from rich.console import Console
from test_search import Fakes, Killed, plan_of

from raymask.driver.search import conclude
from raymask.report.show import show_run
from raymask.store import RunDir, open_run


def shown(path: Path) -> str:
    console = Console(file=io.StringIO(), width=200)
    show_run(console, str(path), as_json=False)
    return console.file.getvalue()  # type: ignore[attr-defined]


def stop_after(lives: int, path: Path) -> None:
    plan = plan_of()
    with pytest.raises(Killed), open_run(RunDir(path), plan.recipe.spec) as store:
        Fakes(plan, lives=lives).run(store)


def test_a_search_that_has_no_dense_model_yet_says_so(tmp_path: Path) -> None:
    stop_after(0, tmp_path)
    assert shown(tmp_path).splitlines() == [
        f"{tmp_path}: stopped; the same command goes on from here",
        "the dense model is not done yet",
    ]


def test_a_stopped_search_is_shown_with_its_evaluations(tmp_path: Path) -> None:
    stop_after(1 + 4 + 2 + 2, tmp_path)  # the dense model, level 1, and two candidates of level 2
    text = shown(tmp_path)
    for part in (
        "\ndense, sparsity ",
        "level 1/2, sparsity 50.00%\n  4 of 4 early evaluations done",
        "selected (candidate 2), sparsity 50.00%",
        "control (IMP), sparsity 50.00%",
        "level 2/2, sparsity 90.00%\n  2 of 4 early evaluations done\n  candidate 3: score 0.3000",
    ):
        assert part in text


def test_a_finished_search_is_shown_with_its_table_and_where_its_time_went(tmp_path: Path) -> None:
    plan = plan_of()
    with open_run(RunDir(tmp_path), plan.recipe.spec) as store:
        Fakes(plan).run(store)
        conclude(plan, store, 61.0)
    text = shown(tmp_path)
    assert "│ selected " in text
    took, head, bar, legend, where = text.splitlines()[-5:]
    assert took == "Took 1 min 1 s."
    assert head == "Workers' time, 0.4 s a letter:"
    assert "".join(letter for letter, _ in groupby(bar)).startswith("d.pfb.pfb ")
    assert bar.endswith("b  59%  fake/1")  # 13 of 22 seconds
    assert legend == "d dense 1.0 s, p early evaluation 8.0 s, f fine-tuning 2.0 s, b baseline (IMP) 2.0 s, . idle"
    assert where.startswith(f"Everything is in {tmp_path}")


def test_a_search_at_work_is_called_running(tmp_path: Path) -> None:
    with open_run(RunDir(tmp_path), plan_of().recipe.spec):
        assert shown(tmp_path).startswith(f"{tmp_path}: running")
    assert shown(tmp_path).startswith(f"{tmp_path}: stopped")


def test_other_programs_get_the_same_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop_after(1 + 4 + 2 + 2, tmp_path)
    show_run(Console(), str(tmp_path), as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "stopped"
    assert found["sparsities"] == pytest.approx([0.5, 0.9])
    assert [evaluation["candidate"]["index"] for evaluation in found["evaluations"]] == [3, 2, 1, 0, 3, 2]
    assert [len(found[name]) for name in ("dense", "levels", "imp")] == [1, 1, 1]
