"""Searches as `show` and `compare` print them, for people and for programs."""

from __future__ import annotations

import io
import json
import re
from itertools import groupby
from pathlib import Path

import pytest
from rich.console import Console
from support.builders import refused
from support.fakes import Fakes, Killed, setup_of

from raymask.commands.show import short_names, show_comparison, show_run
from raymask.driver.result import build_result
from raymask.report.summary import RunSummary
from raymask.runs.run_dir import RunDir, open_run

pytestmark = pytest.mark.usefixtures("few_resamples")


def output(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def shown(path: Path) -> str:
    console = Console(file=io.StringIO(), width=250)
    show_run(console, str(path), as_json=False)
    return output(console)


def stop_after(lives: int, path: Path, **changes: object) -> None:
    search_setup = setup_of(**changes)
    with pytest.raises(Killed), open_run(RunDir(path), search_setup.recipe.spec) as store:
        Fakes(search_setup, lives=lives).run(store)


def finish(path: Path, **changes: object) -> None:
    search_setup = setup_of(**changes)
    with open_run(RunDir(path), search_setup.recipe.spec) as store:
        Fakes(search_setup).run(store)
        build_result(search_setup, store, 61.0)


def cells(text: str, begins: str) -> list[str]:
    """The cells of the table's row that begins so."""
    [row] = [line for line in text.splitlines() if line.strip().startswith(begins)]
    return [cell.strip() for cell in row.strip().split("  ") if cell.strip()]


def test_a_search_that_has_no_dense_model_yet_says_so(tmp_path: Path) -> None:
    stop_after(0, tmp_path)
    text = shown(tmp_path)
    assert re.match(rf"{tmp_path}: stopped, [\d.]+ MB\n\nNot finished\n", text)
    assert "The dense model is not done yet." in text
    assert "Level by level" not in text


def test_a_stopped_search_is_shown_with_its_evaluations(tmp_path: Path) -> None:
    stop_after(1 + 4 + 2 + 2, tmp_path)  # the dense model, level 1, and two candidates of level 2
    text = shown(tmp_path)
    assert (
        "This search is stopped. Run the same command again to continue.\ndense, sparsity 50.00%: validation loss "
    ) in text
    assert cells(text, "1 of 2") == ["1 of 2", "50.00%", "4 of 4", "candidate 2", "0.00%", *cells(text, "1 of 2")[5:]]
    assert cells(text, "1 of 2")[-2:] == ["0.5000", "0.5000"]
    assert cells(text, "2 of 2") == ["2 of 2", "90.00%", "2 of 4"]
    assert cells(text, "2       candidate 3")[:5] == ["2", "candidate 3", "1", "8e-05", "0.00%"]


def test_a_finished_search_is_shown_with_its_table_and_where_its_time_went(tmp_path: Path) -> None:
    finish(tmp_path)
    text = shown(tmp_path)
    assert re.match(rf"{tmp_path}: finished, [\d.]+ MB\n\nVerdict\nraymask against IMP on ", text)
    assert len([line for line in text.splitlines() if line.startswith("  raymask ")]) == 1
    assert "The last start took 1 min 1 s of wall time." in text
    lines = text.splitlines()
    head = lines.index("Workers' time, 0.4 s a letter:")
    bar, legend = lines[head + 1 : head + 3]
    assert "".join(letter for letter, _ in groupby(bar)).startswith("d.efi.efi ")
    assert bar.endswith("i  59%  fake/1")  # 13 of 22 seconds
    assert legend == "d dense 1.0 s, e early evaluation 8.0 s, f fine-tuning 2.0 s, i IMP baseline 2.0 s, . idle"
    assert "dense → candidate 2 → candidate 2." in text
    assert f"raymask search {tmp_path}/spec.yaml --run another" not in text  # no start was noted


def test_a_search_at_work_is_called_running(tmp_path: Path) -> None:
    with open_run(RunDir(tmp_path), setup_of().recipe.spec):
        assert shown(tmp_path).startswith(f"{tmp_path}: running")
    assert shown(tmp_path).startswith(f"{tmp_path}: stopped")


def test_other_programs_get_the_same_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop_after(1 + 4 + 2 + 2, tmp_path)
    show_run(Console(), str(tmp_path), as_json=True)
    printed = capsys.readouterr().out
    found = json.loads(printed)
    assert found["state"] == "stopped"
    assert [level["sparsity"] for level in found["levels"]] == pytest.approx([0.5, 0.9])
    journals = [[one["candidate"]["index"] for one in level["evaluations"]] for level in found["levels"]]
    assert journals == [[3, 2, 1, 0], [3, 2]]
    assert [sorted(level["finetuned"]) for level in found["levels"]] == [["", "imp"], []]
    assert RunSummary.model_validate_json(printed).model_dump_json(indent=1) == printed.rstrip()


def test_searches_stand_side_by_side_with_the_keys_that_differ(tmp_path: Path) -> None:
    finish(tmp_path / "one")
    stop_after(1 + 4 + 2 + 2, tmp_path / "other", seed=3)
    console = Console(file=io.StringIO(), width=250)
    page = tmp_path / "page.html"
    show_comparison(console, [f"{tmp_path}/one", f"{tmp_path}/other/"], page)
    text = output(console)
    first, other = cells(text, "one "), cells(text, "other ")
    assert first[:2] == ["one", "50.00%"]
    assert other[:3] == ["other", "50.00%", "stopped"]
    assert "All of them: model quickstart, task quickstart." in text
    assert cells(text, "seed") == ["seed", "0", "3"]
    assert "candidates.count" not in text
    assert f"The same with plots is in {page}" in text
    assert "<title>one, other</title>" in page.read_text()


def test_one_that_is_no_run_and_a_page_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    stop_after(0, tmp_path / "one")
    runs = [str(tmp_path / "one"), str(tmp_path / "none")]
    assert "none: is not a run directory" in refused(show_comparison, Console(), runs, None)
    for again in (runs[0], f"{runs[0]}/"):
        assert "one is named twice" in refused(show_comparison, Console(), [runs[0], again], None)
    said = refused(show_comparison, Console(file=io.StringIO()), runs[:1], tmp_path / "no" / "page.html")
    assert said == f"--html: {tmp_path}/no/page.html cannot be written: No such file or directory"


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        (["runs/a", "runs/b"], ["a", "b"]),
        (["s3://x/a/run", "s3://x/b/run"], ["a/run", "b/run"]),
        (["a", "a/b"], ["a", "a/b"]),
        (["runs/a/"], ["a"]),
    ],
)
def test_names_leave_out_what_all_locations_share(runs: list[str], names: list[str]) -> None:
    assert short_names(runs) == names
