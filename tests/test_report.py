"""Is a report written when it should be, true to its run, and fit for a browser?"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from test_search import Fakes, Killed, plan_of

from raymask.core.records import Evaluation, Level
from raymask.driver.search import conclude
from raymask.report import live, plots
from raymask.report.figures import Figures, gather
from raymask.report.live import Reporter, write_report
from raymask.report.page import page
from raymask.report.sections import Section, Table, differences, million, report
from raymask.report.terminal import Silent
from raymask.store import FIGURES, PAGE, RESULT, TABLE, RunDir

TREE = {"levels": [0.5, 0.6, 0.7], "select": {"keep": 2, "beam": True}, "probe": {"rungs": [0.5, 1.0]}}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome here")


def run_of(path: Path, lives: int | None = None, **changes: Any) -> RunDir:
    """A search by fakes, whole or killed after so many pieces of work."""
    plan, store = plan_of(**changes), RunDir(path)
    scores = (0.1, 0.2, None, 0.3) if "select" not in changes else tuple(0.1 + index / 100 for index in range(8))
    fakes = Fakes(plan, scores=scores, **({} if lives is None else {"lives": lives}))
    store.write_spec(plan.recipe.spec)
    if lives is None:
        fakes.run(store)
        conclude(plan, store, 61.0)
    else:
        with pytest.raises(Killed):
            fakes.run(store)
    return store


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return run_of(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return run_of(tmp_path_factory.mktemp("tree"), **TREE)


def text_of(store: RunDir, name: str) -> str:
    return store.storage.read(name).decode()


def embedded(html: str) -> list[Any]:
    """The plots that a page draws."""
    found = re.search(r"^const plots = (.*);$", html, re.MULTILINE)
    assert found
    return list(json.loads(found[1]))


# --- what is written, and when ---------------------------------------------------------------------------------------


def test_a_finished_search_leaves_a_page_its_figures_and_a_table(finished: RunDir) -> None:
    result = finished.read_result()
    assert result is not None
    figures = Figures.model_validate_json(text_of(finished, FIGURES))
    assert figures.state == "finished"
    assert figures.result == result
    assert figures == gather(finished).model_copy(update={"written": figures.written})
    assert figures.densities == {"selected": {"w": 0.125}, "control (IMP)": {"w": 0.125}}
    html = text_of(finished, PAGE)
    assert "http-equiv" not in html
    for row in result.rows:
        for metric, spread in row.intervals.items():
            assert row.report[metric] == pytest.approx(spread.mean)
            assert spread.low <= spread.mean <= spread.high
            assert f"{row.report[metric]:.4f} [{spread.low:.3f}, {spread.high:.3f}]" in html


def test_the_result_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a search that dies over its report goes on to write it."""

    def dies(*_: object) -> None:
        raise Killed

    monkeypatch.setattr("raymask.driver.search.write_report", dies)
    with pytest.raises(Killed):
        run_of(tmp_path)
    assert not RunDir(tmp_path).storage.has(RESULT)


def test_the_table_has_a_row_an_evaluation(tree: RunDir) -> None:
    table = pyarrow.parquet.read_table(Path(tree.uri) / TABLE)
    figures = gather(tree)
    found = [(stand, one) for stand in figures.levels for one in stand.evaluations]
    assert table.num_rows == len(found) > 20
    for row, (stand, one) in zip(table.to_pylist(), found, strict=True):
        assert (row["level"], row["candidate"], row["rung"]) == (stand.level, one.candidate.index, one.rung)
        assert (row["score"], row["error"], row["digest"]) == (one.score, one.error, one.digest)
        assert row["control"] == (row["exponent"] is None) == one.candidate.is_control
        assert row["winner"] == (one.candidate.index in stand.winners)
        assert row["curve"] == [point.model_dump() for point in one.curve]
    assert table.schema == live.COLUMNS


def test_it_is_refreshed_with_every_level_and_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = [100.0], []
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])

    def write(store: RunDir) -> None:
        written.append(now[0])
        now[0] += 2.0  # so long does it take

    monkeypatch.setattr(live, "write_report", write)
    watch = Reporter(Silent(), RunDir(tmp_path))
    some: Any = object()
    for seconds in (0.0, 1.0, 38.0, 1.0, 1.0):
        now[0] += seconds
        watch.evaluated(some)
    assert written == [100.0, 143.0]  # behind 2 s of writing come 40 s without
    watch.settled("", some)
    assert written == [100.0, 143.0, 145.0]


def test_whoever_listened_still_hears_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "write_report", lambda store: None)
    heard: list[tuple[str, tuple[object, ...]]] = []

    class Ear:
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: heard.append((name, arguments))

    told: Any = {
        "begins": ("stage", 1, 2, None),
        "running": ({"control": 0.5},),
        "evaluated": (Evaluation.model_construct(),),
        "settled": ("", Level.model_construct()),
        "sent": (7,),
        "note": ("text",),
    }
    watch = Reporter(Ear(), RunDir(tmp_path))  # type: ignore[arg-type]
    for name, arguments in told.items():
        getattr(watch, name)(*arguments)
    assert heard == list(told.items())


# --- what is in it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lives", [0, 1, 3, 5, 6, 7, 9])
def test_a_search_is_reported_as_far_as_it_is(tmp_path: Path, lives: int) -> None:
    """And a page that runs is read again by the browser."""
    store = run_of(tmp_path, lives)
    with store.storage.held():
        write_report(store)
    figures = Figures.model_validate_json(text_of(store, FIGURES))
    assert figures.state == "running"
    html = text_of(store, PAGE)
    assert '<meta http-equiv="refresh" content="15">' in html
    assert len(embedded(html)) == html.count('<div class="plot"')
    assert ("Early evaluation</h2>" in html) == (lives > 1)


def test_every_candidate_has_its_curve_and_winner_and_control_stand_out(tree: RunDir) -> None:
    for stand in gather(tree).levels:
        traces = plots.curves(stand)["data"]
        alive = {(found.candidate.index, found.order) for found in stand.evaluations if found.ok}
        assert len(traces) == len(alive)
        assert sum(trace["name"] == "winner" for trace in traces) == 2
        assert traces[-1]["name"] == "winner"  # on top of the others
        assert sum(trace["showlegend"] for trace in traces) == len({trace["name"] for trace in traces})


def test_failures_are_counted_and_told(finished: RunDir) -> None:
    figures = gather(finished)
    early = next(section for section in report(figures) if section.title == "Early evaluation")
    assert "2 evaluations failed: the table below says why." in early.lines
    table = early.more["All early evaluations"]
    assert isinstance(table, Table)
    assert sum(row[-1] == "it broke" for row in table.rows) == 2
    assert "3 of 4, 1 failed" not in text_of(finished, PAGE)
    assert "4 of 4, 1 failed" in text_of(finished, PAGE)


def test_a_failure_that_a_worker_told_of_is_marked_in_its_time(finished: RunDir) -> None:
    figures = gather(finished)
    broken = [
        found.model_copy(update={"worker": "host/7 cpu", "started": 12.0, "seconds": 1.0})
        for found in figures.levels[0].evaluations
        if not found.ok
    ]
    stand = figures.levels[0].model_copy(update={"evaluations": tuple(broken)})
    plot = plots.workers(figures.model_copy(update={"levels": (stand,)}))
    begin = min(piece.started for piece in figures.timeline)
    [cross] = [trace for trace in plot["data"] if trace["name"] == "failed"]
    assert (cross["x"], cross["y"], cross["text"]) == ([13.0 - begin], ["host/7"], ["candidate 2: it broke"])


def test_scores_are_against_the_control_of_the_same_parent_and_rung(tree: RunDir) -> None:
    stand = gather(tree).levels[1]
    looks = plots.last_looks(stand)
    controls = {found.candidate.parent: found.score for found in stand.evaluations if found.candidate.is_control}
    assert {found.candidate.parent for found, _ in looks} == {1, 2}
    assert all(score == controls[found.candidate.parent] for found, score in looks)
    tops = {found.candidate.index: found.rung for found in stand.evaluations if not found.candidate.is_control}
    assert {found.candidate.index: found.rung for found, _ in looks} == tops


def test_the_tree_has_an_edge_a_fine_tuned_mask_and_the_selected_path_is_bold(tree: RunDir) -> None:
    figures = gather(tree)
    edges = plots.tree(figures)["data"]
    assert len(edges) == sum(len(stand.settled) for stand in figures.levels) == 9
    assert sum(edge["line"]["width"] == 4 for edge in edges) == len(figures.levels)


def test_densities_stand_by_kind_and_layer() -> None:
    shares = {f"bert.encoder.layer.{layer}.{kind}.weight": 0.1 * layer for layer in range(3) for kind in ("q", "k.x")}
    [trace] = plots.densities(shares | {"head.weight": 0.7})["data"]
    assert trace["x"] == ["0", "1", "2"]
    assert trace["y"] == ["q", "k.x", "head"]
    assert trace["z"] == [[0.0, 0.1, 0.2], [0.0, 0.1, 0.2], [0.7, None, None]]


def test_budgets_are_compared_in_epochs(finished: RunDir) -> None:
    figures = gather(finished)

    def said(figures: Figures) -> str:
        return next(section.lines[0] for section in report(figures) if section.title == "Budget")

    assert said(figures).endswith("Its baseline trains 30; `imp.epochs: 14` gives it as many.")
    equal = figures.epochs | {"baseline (IMP)": 28.0}
    assert said(figures.model_copy(update={"epochs": equal})).endswith("So does its baseline: equal budgets.")


def test_only_keys_that_differ_are_told() -> None:
    specs = {name: plan_of(seed=seed).recipe.spec for name, seed in (("a", 1), ("b", 2))}
    assert differences(specs).rows == [["seed", "1", "2"]]


def test_sizes_are_short() -> None:
    assert [million(count) for count in (7, 12_345, 10_646_400)] == ["7", "12,345", "10.65 M"]


# --- in a browser ----------------------------------------------------------------------------------------------------


def test_nothing_of_a_user_s_becomes_markup_or_script() -> None:
    nasty = "</script><script>alert(1)</script><b>"
    section = Section(nasty, [nasty], Table([nasty], [[nasty]]), [(nasty, {"data": [{"name": nasty}], "layout": {}})])
    html = page(nasty, [section], "finished", 0.0)
    assert nasty not in html
    assert html.count("<script>alert") == 0
    assert embedded(html)[0]["data"][0]["name"] == nasty


def test_a_page_asks_the_network_for_nothing(finished: RunDir) -> None:
    html = text_of(finished, PAGE)
    outside = html[: html.index("<script>")] + html[html.rindex("<script>") :]
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?:", outside)


PROBE = """
<script>
addEventListener("load", () => setTimeout(() => {
  const drawn = document.querySelectorAll(".plot .main-svg:first-child").length;
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const paper = getComputedStyle(document.body).backgroundColor;
  const seen = [...document.querySelectorAll(".plot")].every(plot => plot.getBoundingClientRect().width > 200);
  parent.document.title = [drawn, wide, paper, seen, window.broken ?? "fine"].join("|");
}, 1500));
addEventListener("error", event => { window.broken = event.message; });
</script>
"""


@pytest.fixture(scope="module")
def pages(finished: RunDir, tree: RunDir, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both reports, with a few lines that tell how they are drawn."""
    folder, found = tmp_path_factory.mktemp("pages"), {}
    for name, store in (("finished", finished), ("tree", tree)):
        found[name] = folder / f"{name}.html"
        found[name].write_text(text_of(store, PAGE).replace("<head>", f"<head>{PROBE}", 1), encoding="utf-8")
    return found


@needs_browser
@pytest.mark.parametrize("name", ["finished", "tree"])
@pytest.mark.parametrize(("scheme", "paper"), [(1, "rgb(255, 255, 255)"), (0, "rgb(20, 23, 28)")])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_it(
    pages: dict[str, Path], tmp_path: Path, name: str, width: int, scheme: int, paper: str
) -> None:
    """On a phone and on a desk, in the light and in the dark, without a network."""
    frame = tmp_path / "frame.html"  # a window cannot be as narrow as a phone
    frame.write_text(
        f'<!doctype html><meta name="color-scheme" content="light dark"><title>none</title>'
        f'<iframe src="{pages[name].as_uri()}" style="width: {width}px; height: 3000px"></iframe>'
    )
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--blink-settings=preferredColorScheme={scheme}",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1400,3000",
        "--virtual-time-budget=10000",
        "--dump-dom",
    ]
    done = subprocess.run([str(BROWSER), *options, frame.as_uri()], capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr
    plots_there = len(embedded(pages[name].read_text(encoding="utf-8")))
    assert title[1].split("|") == [str(plots_there), "0", paper, "true", "fine"]
