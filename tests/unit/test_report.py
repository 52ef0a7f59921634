"""Is a report written when it should be, true to its run, and fit for a browser?"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet
import pytest
from support.fakes import Fakes, Killed, plan_of

from raymask.core import stats
from raymask.core.errors import UserError
from raymask.core.records import Evaluation, Level
from raymask.driver.search import conclude
from raymask.report import live, plots, sections
from raymask.report.figures import Figures, gather, spent
from raymask.report.live import Reporter, reporting, write_report
from raymask.report.page import page
from raymask.report.sections import Section, Table, differences, million, report
from raymask.report.terminal import Silent
from raymask.store import FIGURES, PAGE, RESULT, TABLE, RunDir, branch, open_run

TREE = {"levels": [0.5, 0.6, 0.7], "select": {"keep": 2, "beam": True}, "probe": {"rungs": [0.5, 1.0]}}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome here")


@pytest.fixture(scope="module", autouse=True)
def few_resamples() -> Iterator[None]:
    """Enough where no interval's width matters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "RESAMPLES", 50)
        yield


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

    def write(store: RunDir, state: str) -> None:
        assert state == "running"
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
    monkeypatch.setattr(live, "write_report", lambda store, state: None)
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


@pytest.mark.parametrize("end", [KeyboardInterrupt, UserError])
def test_whoever_ends_a_search_the_report_says_that_it_stopped(tmp_path: Path, end: type[BaseException]) -> None:
    """From its start on it says that the search runs, in an object store as well."""
    memory = fsspec.filesystem("memory")
    for place in (str(tmp_path / "run"), "memory://reports/run"):
        plan, store = plan_of(), RunDir(place)
        try:
            with pytest.raises(end), open_run(store, plan.recipe.spec), reporting(Silent(), store):
                assert Figures.model_validate_json(text_of(store, FIGURES)).state == "running"
                raise end("no more")
            assert Figures.model_validate_json(text_of(store, FIGURES)).state == "stopped"
            assert "http-equiv" not in text_of(store, PAGE)
        finally:
            if place.startswith("memory") and memory.exists("/reports"):
                memory.rm("/reports", recursive=True)


def test_a_report_that_cannot_be_written_ends_no_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    run_of(tmp_path, 3)
    monkeypatch.setattr(live, "page", lambda *_: 1 / 0)
    write_report(RunDir(tmp_path, notes.append), "running")
    assert notes == ["the report cannot be written: division by zero"]


def test_a_run_that_was_fetched_is_shown_without_what_it_lacks(finished: RunDir, tmp_path: Path) -> None:
    for name in finished.results():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(finished.storage.read(name))
    figures = gather(RunDir(tmp_path))
    assert figures.densities == {}
    assert figures.result == gather(finished).result
    assert "Density by layer" not in {section.title for section in report(figures)}


# --- what is in it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lives", [0, 1, 3, 5, 6, 7, 9])
def test_a_search_is_reported_as_far_as_it_is(tmp_path: Path, lives: int) -> None:
    """And a page that runs is read again by the browser."""
    store = run_of(tmp_path, lives)
    write_report(store, "running")
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


def test_a_stop_of_the_search_is_cut_out_of_the_workers_time(finished: RunDir) -> None:
    figures = gather(finished)
    whole = plots.workers(figures)
    last = max(piece.started for piece in figures.timeline)
    later = [
        piece.model_copy(update={"started": piece.started + 86_430 * (piece.started == last)})
        for piece in figures.timeline
    ]
    cut = plots.workers(figures.model_copy(update={"timeline": tuple(later)}))
    assert cut["layout"]["xaxis"]["title"]["text"] == "seconds<br>24 h 0 min without work cut out"
    assert whole["layout"]["xaxis"]["title"]["text"] == "seconds"
    ends = [max(max(trace["base"]) for trace in plot["data"] if trace["type"] == "bar") for plot in (cut, whole)]
    assert ends[0] <= ends[1]


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
    words = [edge["text"][1] for edge in edges]
    assert words.count("IMP") == len(figures.levels)
    assert all(word in ("IMP", "control") or word.isdigit() for word in words)  # short: a phone has 80 pixels a level


def test_the_path_of_an_unfinished_tree_goes_from_parent_to_parent(tree: RunDir, tmp_path: Path) -> None:
    shutil.copytree(tree.uri, tmp_path / "copy")
    (tmp_path / "copy" / RESULT).unlink()
    figures = gather(RunDir(tmp_path / "copy"))
    above = [level.winner.candidate.parent for level in figures.path]
    for level, parent in zip(figures.path, above[1:], strict=False):
        assert level == figures.levels[level.level - 1].settled[branch(parent)]
    assert list(figures.densities) == ["selected", "control (IMP)"]


def test_a_level_that_somebody_deleted_is_no_mishap(tree: RunDir, tmp_path: Path) -> None:
    shutil.copytree(tree.uri, tmp_path / "copy")
    for path in [tmp_path / "copy" / RESULT, *(tmp_path / "copy" / "branch-2").rglob("level.json")]:
        path.unlink()
    figures = gather(RunDir(tmp_path / "copy"))
    assert plots.tree(figures)["data"]
    assert report(figures)


def test_intervals_on_report_stand_at_no_figures_on_select(finished: RunDir, tmp_path: Path) -> None:
    whole, part = gather(finished), gather(run_of(tmp_path, 7))
    for runs, there in (({"": whole}, True), ({"a": whole, "b": part}, False)):
        traces = plots.metric_by_sparsity(runs)["data"]
        assert all(bool(trace["error_y"]) == there for trace in traces)


def test_a_side_without_levels_has_no_line(finished: RunDir) -> None:
    figures = gather(finished)
    alone = [stand.model_copy(update={"settled": {"": stand.settled[""]}}) for stand in figures.levels]
    [trace] = plots.metric_by_sparsity({"": figures.model_copy(update={"levels": tuple(alone)})})["data"]
    assert trace["name"] == "selected"


def test_repeats_are_counted_in_the_budget_and_beyond_what_was_planned(finished: RunDir) -> None:
    figures = gather(finished)
    first = figures.levels[0]
    again = tuple(found.model_copy(update={"order": order}) for order in (0, 1, 2) for found in first.evaluations)
    stand = first.model_copy(update={"evaluations": again})
    assert sections.progress(first) == "4 of 4, 1 failed"
    assert sections.progress(stand) == "12, 3 failed"
    recipe = plan_of().recipe
    assert spent(recipe, [stand], [])["early evaluation"] == 3 * spent(recipe, [first], [])["early evaluation"] == 9.0


def test_how_to_repeat_it_can_be_typed(finished: RunDir) -> None:
    figures = gather(finished)
    start = {"versions": {"python": "3.12", "torch": "2.9", "ray": ""}, "machine": "m", "in_process": False}

    def told(run: str, **start_: object) -> str:
        starts = (start | {"address": None} | start_,)
        return sections.again(figures.model_copy(update={"run": run, "starts": starts})).lines[0]

    assert told("a b") == "raymask search 'a b/spec.yaml' --run another"
    assert told("a", in_process=True) == "raymask search a/spec.yaml --run another --in-process"
    remote = "raymask search spec.yaml --run another --address auto, with s3://x/spec.yaml as spec.yaml"
    assert told("s3://x", address="auto") == remote
    assert "ray==" not in sections.again(figures.model_copy(update={"starts": (start | {"address": None},)})).lines[1]


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

    assert said(figures).endswith("Its baseline trains 30; `imp.epochs: 13` gives it as many.")
    equal = figures.spent | {"baseline (IMP)": 26.0}  # what failed is not counted
    assert said(figures.model_copy(update={"spent": equal})).endswith("So does its baseline: equal budgets.")


def test_only_keys_that_differ_are_told() -> None:
    """As a spec has them."""
    keys = {"seed": 1, "distill": True, "probe": {"score": "loss"}, "imp": {"epochs": 2}}
    other = {"seed": 2, "distill": False, "probe": {"score": "metric"}, "imp": {"epochs": None}}
    specs = {name: plan_of(**asked).recipe.spec for name, asked in (("a", keys), ("b", other))}
    assert sorted(differences(specs).rows) == [
        ["distill", "true", "false"],
        ["imp.epochs", "2.0", "null"],
        ["probe.score", "loss", "metric"],
        ["seed", "1", "2"],
    ]


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
