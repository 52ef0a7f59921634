"""Reports: when they are written, and their figures."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet
import pytest
from support.fakes import Killed, setup_of
from support.reports import TREE, embedded, run_of, text_of

from raymask.core.errors import UserError
from raymask.core.lineage import branch
from raymask.report import plots, sections, writer
from raymask.report.html import render_page
from raymask.report.sections import ReportSection, Table, differences, million, report_sections
from raymask.report.summary import RunSummary, load_summary, spent
from raymask.report.writer import ReportCallback, write_report
from raymask.runs.run_dir import REPORT_HTML, REPORT_JSON, RESULT, TABLE, RunDir, open_run

pytestmark = pytest.mark.usefixtures("few_resamples")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return run_of(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return run_of(tmp_path_factory.mktemp("tree"), **TREE)


# --- what is written, and when ---------------------------------------------------------------------------------------


def test_a_finished_search_leaves_a_page_its_figures_and_a_table(finished: RunDir) -> None:
    result = finished.read_result()
    assert result is not None
    summary = RunSummary.model_validate_json(text_of(finished, REPORT_JSON))
    assert summary.state == "finished"
    assert summary.result == result
    assert summary == load_summary(finished).model_copy(update={"written": summary.written})
    assert summary.densities == {"raymask": {"w": 0.125}, "IMP": {"w": 0.125}}
    html = text_of(finished, REPORT_HTML)
    assert "http-equiv" not in html
    for row in result.models:
        for metric, spread in row.intervals.items():
            assert row.test_metrics[metric] == pytest.approx(spread.mean)
            assert spread.low <= spread.mean <= spread.high
            assert f"{row.test_metrics[metric]:.4f} [{spread.low:.3f}, {spread.high:.3f}]" in html


def test_the_result_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a search that dies over its report goes on to write it."""

    def dies(*_: object) -> None:
        raise Killed

    monkeypatch.setattr("raymask.driver.result.write_report", dies)
    with pytest.raises(Killed):
        run_of(tmp_path)
    assert not RunDir(tmp_path).storage.has(RESULT)


def test_the_table_has_a_row_an_evaluation(tree: RunDir) -> None:
    table = pyarrow.parquet.read_table(Path(tree.uri) / TABLE)
    summary = load_summary(tree)
    found = [(level_summary, one) for level_summary in summary.levels for one in level_summary.evaluations]
    assert table.num_rows == len(found) > 20
    for row, (level_summary, one) in zip(table.to_pylist(), found, strict=True):
        assert (row["level"], row["candidate"], row["rung"]) == (level_summary.level, one.candidate.index, one.rung)
        assert (row["score"], row["error"], row["digest"]) == (one.score, one.error, one.digest)
        assert row["is_magnitude"] == (row["exponent"] is None) == one.candidate.is_magnitude
        assert row["winner"] == (one.candidate.index in level_summary.winners)
        assert row["curve"] == [point.model_dump() for point in one.curve]
    assert table.schema == writer.COLUMNS


def test_it_is_refreshed_with_every_level_and_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = [100.0], []
    monkeypatch.setattr(writer.time, "monotonic", lambda: now[0])

    def write(store: RunDir, state: str) -> None:
        assert state == "running"
        written.append(now[0])
        now[0] += 2.0  # so long does it take

    monkeypatch.setattr(writer, "write_report", write)
    callback = ReportCallback(RunDir(tmp_path))
    some: Any = object()
    for seconds in (0.0, 1.0, 38.0, 1.0, 1.0):
        now[0] += seconds
        callback.on_evaluation(some)
    assert written == [100.0, 143.0]  # behind 2 s of writing come 40 s without
    callback.on_level_end("", some)
    assert written == [100.0, 143.0, 145.0]


@pytest.mark.parametrize(("end", "state"), [(KeyboardInterrupt, "stopped"), (UserError, "failed")])
def test_whoever_ends_a_search_the_report_says_so(tmp_path: Path, end: type[BaseException], state: str) -> None:
    """From its start on it says that the search runs, in an object store as well."""
    memory = fsspec.filesystem("memory")
    for place in (str(tmp_path / "run"), "memory://reports/run"):
        search_setup, store = setup_of(), RunDir(place)
        try:
            with pytest.raises(end), open_run(store, search_setup.recipe.spec), ReportCallback(store):
                assert RunSummary.model_validate_json(text_of(store, REPORT_JSON)).state == "running"
                raise end("no more")
            assert RunSummary.model_validate_json(text_of(store, REPORT_JSON)).state == state
            assert "http-equiv" not in text_of(store, REPORT_HTML)
        finally:
            if place.startswith("memory") and memory.exists("/reports"):
                memory.rm("/reports", recursive=True)


def test_a_report_that_cannot_be_written_ends_no_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    run_of(tmp_path, 3)
    monkeypatch.setattr(writer, "render_page", lambda *_: 1 / 0)
    write_report(RunDir(tmp_path, notes.append), "running")
    assert notes == ["the report cannot be written: division by zero"]


def test_a_run_that_was_fetched_is_shown_without_what_it_lacks(finished: RunDir, tmp_path: Path) -> None:
    for name in finished.downloadable_files():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(finished.storage.read(name))
    summary = load_summary(RunDir(tmp_path))
    assert summary.densities == {}
    assert summary.result == load_summary(finished).result
    assert "Density by layer" not in {section.title for section in report_sections(summary)}


# --- what is in it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lives", [0, 1, 3, 5, 6, 7, 9])
def test_a_search_is_reported_as_far_as_it_is(tmp_path: Path, lives: int) -> None:
    """And a page that runs is read again by the browser."""
    store = run_of(tmp_path, lives)
    write_report(store, "running")
    summary = RunSummary.model_validate_json(text_of(store, REPORT_JSON))
    assert summary.state == "running"
    html = text_of(store, REPORT_HTML)
    assert '<meta http-equiv="refresh" content="15">' in html
    assert len(embedded(html)) == html.count('<div class="plot"')
    assert ("Early evaluation</h2>" in html) == (lives > 1)


def test_every_candidate_has_its_curve_and_winner_and_magnitude_mask_stand_out(tree: RunDir) -> None:
    for level_summary in load_summary(tree).levels:
        traces = plots.curves(level_summary)["data"]
        alive = {(found.candidate.index, found.repeat) for found in level_summary.evaluations if found.ok}
        assert len(traces) == len(alive)
        assert sum(trace["name"] == "winner" for trace in traces) == 2
        assert traces[-1]["name"] == "winner"  # on top of the others
        assert sum(trace["showlegend"] for trace in traces) == len({trace["name"] for trace in traces})


def test_failures_are_counted_and_told(finished: RunDir) -> None:
    summary = load_summary(finished)
    early = next(section for section in report_sections(summary) if section.title == "Early evaluation")
    assert "2 evaluations failed: the table below says why." in early.lines
    table = early.more["All early evaluations"]
    assert isinstance(table, Table)
    assert sum(row[-1] == "it broke" for row in table.rows) == 2
    assert "4 of 4, 1 failed" in text_of(finished, REPORT_HTML)


def test_a_failure_that_a_worker_told_of_is_marked_in_its_time(finished: RunDir) -> None:
    summary = load_summary(finished)
    broken = [
        found.model_copy(update={"worker": "host/7 cpu", "started": 12.0, "seconds": 1.0})
        for found in summary.levels[0].evaluations
        if not found.ok
    ]
    level_summary = summary.levels[0].model_copy(update={"evaluations": tuple(broken)})
    plot = plots.worker_plot(summary.model_copy(update={"levels": (level_summary,)}))
    begin = min(span.started for span in summary.timeline)
    [cross] = [trace for trace in plot["data"] if trace["name"] == "failed"]
    assert (cross["x"], cross["y"], cross["text"]) == ([13.0 - begin], ["host/7"], ["candidate 2: it broke"])


def test_a_stop_of_the_search_is_cut_out_of_the_workers_time(finished: RunDir) -> None:
    summary = load_summary(finished)
    whole = plots.worker_plot(summary)
    last = max(span.started for span in summary.timeline)
    later = [
        span.model_copy(update={"started": span.started + 86_430 * (span.started == last)}) for span in summary.timeline
    ]
    cut = plots.worker_plot(summary.model_copy(update={"timeline": tuple(later)}))
    assert cut["layout"]["xaxis"]["title"]["text"] == "seconds<br>24 h 0 min without work cut out"
    assert whole["layout"]["xaxis"]["title"]["text"] == "seconds"
    ends = [max(max(trace["base"]) for trace in plot["data"] if trace["type"] == "bar") for plot in (cut, whole)]
    assert ends[0] <= ends[1]


def test_scores_are_against_the_magnitude_mask_of_the_same_parent_and_rung(tree: RunDir) -> None:
    level_summary = load_summary(tree).levels[1]
    looks = plots.highest_rung_scores(level_summary)
    magnitude = {
        found.candidate.parent_branch: found.score
        for found in level_summary.evaluations
        if found.candidate.is_magnitude
    }
    assert {found.candidate.parent_branch for found, _ in looks} == {1, 2}
    assert all(score == magnitude[found.candidate.parent_branch] for found, score in looks)
    tops = {
        found.candidate.index: found.rung for found in level_summary.evaluations if not found.candidate.is_magnitude
    }
    assert {found.candidate.index: found.rung for found, _ in looks} == tops


def test_the_tree_has_an_edge_a_fine_tuned_mask_and_the_selected_path_is_bold(tree: RunDir) -> None:
    summary = load_summary(tree)
    edges = plots.tree(summary)["data"]
    assert len(edges) == sum(len(level_summary.finetuned) for level_summary in summary.levels) == 9
    assert sum(edge["line"]["width"] == 4 for edge in edges) == len(summary.levels)
    words = [edge["text"][1] for edge in edges]
    assert words.count("IMP") == len(summary.levels)
    assert all(word in ("IMP", "magnitude") or word.isdigit() for word in words)  # short: a phone has 80 pixels a level


def test_the_path_of_an_unfinished_tree_goes_from_parent_to_parent(tree: RunDir, tmp_path: Path) -> None:
    shutil.copytree(tree.uri, tmp_path / "copy")
    (tmp_path / "copy" / RESULT).unlink()
    summary = load_summary(RunDir(tmp_path / "copy"))
    above = [level.winner.candidate.parent_branch for level in summary.path]
    for level, parent in zip(summary.path, above[1:], strict=False):
        assert level == summary.levels[level.level - 1].finetuned[branch(parent)]
    assert list(summary.densities) == ["raymask", "IMP"]


def test_a_level_that_somebody_deleted_is_no_mishap(tree: RunDir, tmp_path: Path) -> None:
    shutil.copytree(tree.uri, tmp_path / "copy")
    for path in [tmp_path / "copy" / RESULT, *(tmp_path / "copy" / "branch-2").rglob("level.json")]:
        path.unlink()
    summary = load_summary(RunDir(tmp_path / "copy"))
    assert plots.tree(summary)["data"]
    assert report_sections(summary)


def test_intervals_on_test_stand_at_no_metrics_on_validation(finished: RunDir, tmp_path: Path) -> None:
    whole, part = load_summary(finished), load_summary(run_of(tmp_path, 7))
    for runs, there in (({"": whole}, True), ({"a": whole, "b": part}, False)):
        traces = plots.metric_by_sparsity(runs)["data"]
        assert all(bool(trace["error_y"]) == there for trace in traces)


def test_a_side_without_levels_has_no_line(finished: RunDir) -> None:
    summary = load_summary(finished)
    alone = [
        level_summary.model_copy(update={"finetuned": {"": level_summary.finetuned[""]}})
        for level_summary in summary.levels
    ]
    [trace] = plots.metric_by_sparsity({"": summary.model_copy(update={"levels": tuple(alone)})})["data"]
    assert trace["name"] == "raymask"


def test_repeats_are_counted_in_the_budget_and_beyond_what_was_planned(finished: RunDir) -> None:
    summary = load_summary(finished)
    first = summary.levels[0]
    again = tuple(found.model_copy(update={"repeat": repeat}) for repeat in (0, 1, 2) for found in first.evaluations)
    level_summary = first.model_copy(update={"evaluations": again})
    assert sections.progress(first) == "4 of 4, 1 failed"
    assert sections.progress(level_summary) == "12, 3 failed"
    recipe = setup_of().recipe
    assert (
        spent(recipe, [level_summary], [])["early evaluation"]
        == 3 * spent(recipe, [first], [])["early evaluation"]
        == 9.0
    )


def test_how_to_repeat_it_can_be_typed(finished: RunDir) -> None:
    summary = load_summary(finished)
    start = {"versions": {"python": "3.12", "torch": "2.9", "ray": ""}, "machine": "m", "in_process": False}

    def told(run: str, **start_: object) -> str:
        starts = (start | {"address": None} | start_,)
        return sections.reproduce_section(summary.model_copy(update={"run": run, "starts": starts})).lines[0]

    assert told("a b") == "raymask search 'a b/spec.yaml' --run another"
    assert told("a", in_process=True) == "raymask search a/spec.yaml --run another --in-process"
    remote = "raymask search spec.yaml --run another --address auto, with s3://x/spec.yaml as spec.yaml"
    assert told("s3://x", address="auto") == remote
    assert (
        "ray=="
        not in sections.reproduce_section(summary.model_copy(update={"starts": (start | {"address": None},)})).lines[1]
    )


def test_densities_stand_by_kind_and_layer() -> None:
    shares = {f"bert.encoder.layer.{layer}.{kind}.weight": 0.1 * layer for layer in range(3) for kind in ("q", "k.x")}
    [trace] = plots.density_plot(shares | {"head.weight": 0.7})["data"]
    assert trace["x"] == ["0", "1", "2"]
    assert trace["y"] == ["q", "k.x", "head"]
    assert trace["z"] == [[0.0, 0.1, 0.2], [0.0, 0.1, 0.2], [0.7, None, None]]


def test_budgets_are_compared_in_epochs(finished: RunDir) -> None:
    summary = load_summary(finished)

    def said(summary: RunSummary) -> str:
        return next(section.lines[0] for section in report_sections(summary) if section.title == "Budget")

    assert said(summary).endswith("Its baseline trains 30; `imp.epochs: 13` gives it as many.")
    equal = summary.spent | {"IMP baseline": 26.0}  # what failed is not counted
    assert said(summary.model_copy(update={"spent": equal})).endswith("So does its baseline: equal budgets.")


def test_only_keys_that_differ_are_told() -> None:
    """As a spec has them."""
    keys = {"seed": 1, "distill": True, "early_eval": {"score": "loss"}, "imp": {"epochs": 2}}
    other = {"seed": 2, "distill": False, "early_eval": {"score": "metric"}, "imp": {"epochs": None}}
    specs = {name: setup_of(**asked).recipe.spec for name, asked in (("a", keys), ("b", other))}
    assert sorted(differences(specs).rows) == [
        ["distill", "true", "false"],
        ["early_eval.score", "loss", "metric"],
        ["imp.epochs", "2.0", "null"],
        ["seed", "1", "2"],
    ]


def test_sizes_are_short() -> None:
    assert [million(count) for count in (7, 12_345, 10_646_400)] == ["7", "12,345", "10.65 M"]


# --- the page --------------------------------------------------------------------------------------------------------


def test_nothing_of_a_user_s_becomes_markup_or_script() -> None:
    nasty = "</script><script>alert(1)</script><b>"
    plot = {"data": [{"name": nasty}], "layout": {}}
    section = ReportSection(nasty, [nasty], Table([nasty], [[nasty]]), [(nasty, plot)])
    html = render_page(nasty, [section], "finished", 0.0)
    assert nasty not in html
    assert html.count("<script>alert") == 0
    assert embedded(html)[0]["data"][0]["name"] == nasty


def test_a_page_asks_the_network_for_nothing(finished: RunDir) -> None:
    html = text_of(finished, REPORT_HTML)
    outside = html[: html.index("<script>")] + html[html.rindex("<script>") :]
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?:", outside)
