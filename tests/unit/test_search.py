"""The level loop over a fake executor: the method, resumed at every piece of work."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from rich.console import Console
from support.builders import reviews, tiny_model, write_table
from support.fakes import BASE, Fakes, Killed, setup_of

from raymask.commands.check import show_check
from raymask.config import make_spec
from raymask.core.errors import UserError
from raymask.core.lineage import DENSE, IMP, SEARCH
from raymask.core.records import Evaluation, Result
from raymask.core.tasks import Checkpoint, EvalTask, FinetuneTask, Snapshot
from raymask.core.tensors import PackedTensors
from raymask.driver.result import build_result
from raymask.driver.search import search
from raymask.driver.setup import SearchSetup
from raymask.report.sections import report_sections
from raymask.report.summary import load_summary
from raymask.runs.run_dir import RunDir, check_run, dump_checksummed, open_run

pytestmark = pytest.mark.usefixtures("few_resamples")


@pytest.fixture(scope="module")
def search_setup() -> SearchSetup:
    return setup_of()


def origin(key: str) -> str:
    """A snapshot's key without the hash of its contents."""
    return key.rpartition("-")[0]


def names(fakes: Fakes) -> list[str]:
    return [finetune_task.name for _, finetune_task in fakes.tuned]


def test_the_best_candidate_of_every_level_is_fine_tuned_from_its_parent(
    search_setup: SearchSetup, tmp_path: Path
) -> None:
    fakes = Fakes(search_setup)
    fakes.run(RunDir(tmp_path))
    assert sorted((origin(key), candidate.level, candidate.index) for key, candidate in fakes.evaluated) == [
        *(("dense-0", 1, index) for index in range(4)),
        *(("search-1", 2, index) for index in range(4)),
    ]
    selected = [
        (origin(parent.key), finetune_task)
        for parent, finetune_task in fakes.tuned
        if finetune_task.name.startswith("raymask")
    ]
    assert [(key, finetune_task.candidate.index, finetune_task.digest) for key, finetune_task in selected] == [
        ("dense-0", 2, "1-2"),
        ("search-1", 2, "2-2"),
    ]


def test_the_baseline_goes_its_own_way_from_the_same_dense_model(search_setup: SearchSetup, tmp_path: Path) -> None:
    fakes = Fakes(search_setup)
    fakes.run(RunDir(tmp_path))
    baseline = [
        (origin(parent.key), finetune_task) for parent, finetune_task in fakes.tuned if "IMP" in finetune_task.name
    ]
    assert [key for key, _ in baseline] == ["dense-0", "imp-1"]
    assert all(finetune_task.candidate.is_magnitude for _, finetune_task in baseline)
    assert [finetune_task.config.epochs for _, finetune_task in baseline] == [15.0, 15.0]


def test_only_the_last_level_decays_its_rate(search_setup: SearchSetup, tmp_path: Path) -> None:
    fakes = Fakes(search_setup)
    fakes.run(RunDir(tmp_path))
    schedules = {(finetune_task.candidate.level, finetune_task.config.schedule) for _, finetune_task in fakes.tuned}
    assert schedules == {(0, "linear"), (1, "constant"), (2, "linear")}


WORK = 1 + 2 * (4 + 2)  # dense; at each level four early evaluations, raymask's mask and the baseline


@pytest.fixture(scope="module")
def undisturbed(search_setup: SearchSetup, tmp_path_factory: pytest.TempPathFactory) -> tuple[Fakes, RunDir]:
    """A whole search, and its run. Only ever read it."""
    fakes, store = Fakes(search_setup), RunDir(tmp_path_factory.mktemp("whole"))
    fakes.run(store)
    return fakes, store


@pytest.mark.parametrize("lives", range(WORK))
def test_a_killed_search_continues_and_finds_the_same_without_repeating_anything(
    search_setup: SearchSetup, undisturbed: tuple[Fakes, RunDir], tmp_path: Path, lives: int
) -> None:
    calm, whole = undisturbed
    assert len(calm.evaluated) + len(calm.tuned) == WORK
    first, second, killed = Fakes(search_setup, lives=lives), Fakes(search_setup), RunDir(tmp_path)
    with pytest.raises(Killed):
        first.run(killed)
    second.run(killed)
    assert len(first.evaluated) + len(second.evaluated) == len(calm.evaluated)
    assert sorted(names(first) + names(second)) == sorted(names(calm))
    for lineage, level in [(DENSE, 0), (SEARCH, 1), (IMP, 1), (SEARCH, 2), (IMP, 2)]:
        mine, theirs = killed.read_level(lineage, level), whole.read_level(lineage, level)
        assert (mine.winner, mine.gain, mine.digest) == (theirs.winner, theirs.gain, theirs.digest)


def test_the_result_says_when_every_task_was_done(search_setup: SearchSetup, tmp_path: Path) -> None:
    """But for one that no worker finished."""
    store = RunDir(tmp_path)
    Fakes(search_setup, scores=(0.1, 0.2, None, 0.3), machine=True).run(store)
    result = build_result(search_setup, store, 7.0)
    assert [(span.phase, span.level, span.started) for span in result.timeline] == [
        ("dense", 0, 4.0),
        *(("early evaluation", 1, 10.0 + index) for index in (0, 1, 3)),
        ("fine-tuning", 1, 14.0),
        ("IMP baseline", 1, 15.0),
        *(("early evaluation", 2, 20.0 + index) for index in (0, 1, 3)),
        ("fine-tuning", 2, 24.0),
        ("IMP baseline", 2, 25.0),
    ]
    assert {(span.worker, span.seconds) for span in result.timeline} == {("fake/1 cpu", 1.0)}
    assert result.seconds == {
        "dense": 1.0,
        "early evaluation": 6.0,
        "fine-tuning": 2.0,
        "IMP baseline": 2.0,
        "wall": 7.0,
    }


# --- rungs, and several winners --------------------------------------------------------------------------------------

TREE = {"levels": [0.5, 0.75, 0.9], "imp": {"run": False}}
SCORES = (0.1, 0.2, 0.4, 0.3, 0.15, 0.35, 0.6, 0.25)  # the last four: of a second parent's candidates


def test_only_the_best_and_the_magnitude_mask_are_evaluated_to_the_end(tmp_path: Path) -> None:
    search_setup = setup_of(candidates={"count": 7}, early_eval={"rungs": [0.25, 1.0]})
    fakes = Fakes(search_setup, scores=SCORES)
    store = RunDir(tmp_path)
    fakes.run(store)
    found = store.evaluations(1)
    assert sorted(e.candidate.index for e in found if e.rung == 0) == list(range(8))
    assert {e.candidate.index for e in found if e.rung == 1} >= {0, 2, 6}
    level = store.read_level(SEARCH, 1)
    assert (level.winner.candidate.index, level.winner.rung, level.num_evaluated) == (6, 1, 8)
    assert level.win_probability == 1.0


def test_a_beam_draws_from_every_branch_and_the_result_is_one_path_of_the_tree(tmp_path: Path) -> None:
    """Branch 1 of level 1 is candidate 2, branch 2 is 3; at the later levels 6, of branch 2, and 2, of branch 1."""
    search_setup = setup_of(**TREE, select={"keep": 2, "beam": True})
    fakes = Fakes(search_setup, scores=SCORES)
    store = RunDir(tmp_path)
    fakes.run(store)
    assert sorted((origin(key), candidate.index) for key, candidate in fakes.evaluated if candidate.level == 2) == [
        *(("branch-2-1", index) for index in range(4, 8)),
        *(("search-1", index) for index in range(4)),
    ]
    tuned = [
        (parent.key, finetune_task.candidate) for parent, finetune_task in fakes.tuned if finetune_task.candidate.level
    ]
    assert sorted((candidate.level, candidate.index, origin(key)) for key, candidate in tuned) == [
        (1, 2, "dense-0"),
        (1, 3, "dense-0"),
        (2, 2, "search-1"),
        (2, 6, "branch-2-1"),
        (3, 2, "search-2"),
        (3, 6, "branch-2-2"),
    ]
    result = build_result(search_setup, store, 1.0)
    assert [level.winner.candidate.index for level in result.levels] == [2, 2, 6]
    assert [level.winner.candidate.index for level in result.other_levels] == [3, 6, 2]


def test_without_a_beam_the_best_after_fine_tuning_is_the_only_parent(tmp_path: Path) -> None:
    search_setup = setup_of(**TREE, select={"keep": 2})
    fakes = Fakes(search_setup, scores=SCORES, metrics=(0.5, 0.5, 0.5, 0.9))
    store = RunDir(tmp_path)
    fakes.run(store)
    assert {(candidate.level, origin(key)) for key, candidate in fakes.evaluated} == {
        (1, "dense-0"),
        (2, "branch-2-1"),
        (3, "branch-2-2"),
    }
    result = build_result(search_setup, store, 1.0)
    assert [level.winner.candidate.index for level in result.levels] == [3, 3, 3]
    assert [level.winner.candidate.index for level in result.other_levels] == [2, 2, 2]
    assert result.export
    assert len([span for span in result.timeline if span.phase == "fine-tuning"]) == 6


def tree_fakes(search_setup: SearchSetup, **changes: int) -> Fakes:
    return Fakes(search_setup, scores=SCORES, metrics=(0.5, 0.5, 0.5, 0.9, 0.5, 0.6), **changes)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], tuple[SearchSetup, Result]]:
    """A function (beam) -> a tree's search_setup, and what an undisturbed search makes of it."""

    @cache
    def grow(beam: bool) -> tuple[SearchSetup, Result]:
        search_setup = setup_of(**TREE, select={"keep": 2, "beam": beam}, early_eval={"rungs": [0.5, 1.0]})
        store = RunDir(tmp_path_factory.mktemp("tree"))
        tree_fakes(search_setup).run(store)
        return search_setup, build_result(search_setup, store, 1.0)

    return grow


@pytest.mark.parametrize("beam", [False, True])
@pytest.mark.parametrize("lives", range(0, 34, 6))
def test_a_killed_tree_grows_on_to_the_same_tree(
    grown: Callable[[bool], tuple[SearchSetup, Result]], tmp_path: Path, lives: int, beam: bool
) -> None:
    (search_setup, theirs), killed = grown(beam), RunDir(tmp_path)
    with suppress(Killed):
        tree_fakes(search_setup, lives=lives).run(killed)
    tree_fakes(search_setup).run(killed)
    ours = build_result(search_setup, killed, 1.0)
    for mine, other in zip([*ours.levels, *ours.other_levels], [*theirs.levels, *theirs.other_levels], strict=True):
        assert (mine.winner, mine.gain, mine.win_probability) == (other.winner, other.gain, other.win_probability)
        assert origin(mine.parent_key) == origin(other.parent_key)


def test_no_mask_is_fine_tuned_twice_when_a_continued_search_ranks_otherwise(tmp_path: Path) -> None:
    """Candidate 2's machine failed; so 3 and 1 had won, and 1 was fine-tuned when the driver was killed."""
    search_setup = setup_of(levels=[0.5], imp={"run": False}, select={"keep": 2})
    store = RunDir(tmp_path)
    with pytest.raises(Killed):
        Fakes(search_setup, scores=(0.1, 0.2, None, 0.3), machine=True, lives=1 + 4 + 1).run(store)
    before = [store.read_level(lineage, 1).winner.candidate.index for lineage in ("branch-2",)]
    assert before == [1]
    Fakes(search_setup, scores=(0.1, 0.2, 0.4, 0.3)).run(store)
    assert store.read_level(SEARCH, 1).winner.candidate.index == 2
    assert store.read_level("branch-2", 1).winner.candidate.index == 1


def test_a_failed_candidate_never_wins_and_is_counted(search_setup: SearchSetup, tmp_path: Path) -> None:
    Fakes(search_setup, scores=(0.1, 0.2, None, 0.3)).run(RunDir(tmp_path))
    level = RunDir(tmp_path).read_level(SEARCH, 1)
    assert (level.winner.candidate.index, level.num_evaluated, level.num_failed) == (3, 4, 1)


def test_a_failed_candidate_is_not_tried_again(search_setup: SearchSetup, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        Fakes(search_setup, scores=(0.1, 0.2, None, 0.3), lives=1 + 4).run(RunDir(tmp_path))
    again = Fakes(search_setup)
    again.run(RunDir(tmp_path))
    assert all(candidate.level == 2 for _, candidate in again.evaluated)
    assert RunDir(tmp_path).read_level(SEARCH, 1).winner.candidate.index == 3


def test_a_candidate_whose_machine_failed_is_tried_again_by_a_continued_search(
    search_setup: SearchSetup, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        Fakes(search_setup, scores=(0.1, 0.2, None, 0.3), machine=True, lives=1 + 4).run(RunDir(tmp_path))
    again = Fakes(search_setup)
    again.run(RunDir(tmp_path))
    assert [candidate.index for _, candidate in again.evaluated if candidate.level == 1] == [2]
    level = RunDir(tmp_path).read_level(SEARCH, 1)
    assert (level.winner.candidate.index, level.num_failed) == (2, 0)


def test_a_level_that_was_made_from_another_parent_is_refused(search_setup: SearchSetup, tmp_path: Path) -> None:
    store = RunDir(tmp_path)
    Fakes(search_setup).run(store)
    record = store.read_level(SEARCH, 1)
    path = Path(store.level_uri(SEARCH, 1))
    path.write_text(dump_checksummed(record.model_copy(update={"parent_key": "dense-0-another"})))
    with pytest.raises(UserError, match=r"level-1/level.json: was made from another parent than .*\. Delete it to"):
        Fakes(search_setup).run(RunDir(tmp_path))


def test_a_level_that_would_keep_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"levels: a sparsity of 0\.9999 keeps none of the 1,024 weights of bert\."):
        setup_of(levels=[0.5, 0.9999])


def test_blocks_are_counted_where_a_level_would_keep_nothing() -> None:
    with pytest.raises(UserError, match=r"levels: a sparsity of 0\.99 keeps none of the 1,024 weights of bert\.\S+: "):
        setup_of(levels=[0.99], mask={"pattern": "16x1"})
    with pytest.raises(UserError, match=r"keeps none of the \d\d,\d{3} weights of bert\.\S+, bert\..*: lower it"):
        setup_of(levels=[0.9999], mask={"pattern": "16x1", "allocation": "global"})


@pytest.mark.parametrize(("pattern", "levels"), [("n:5", [0.2]), ("3x1", [0.5]), ("1x48", [0.5])])
def test_a_pattern_that_does_not_divide_a_matrix_names_it_and_its_shape(pattern: str, levels: list[float]) -> None:
    message = rf"^mask\.pattern: {pattern} does not divide bert\.\S+\.weight of \d+ x \d+: choose another, or leave"
    with pytest.raises(UserError, match=message):
        setup_of(levels=levels, mask={"pattern": pattern})


def test_no_survivor_is_an_error_that_says_why(search_setup: SearchSetup, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"level 1: all 4 candidates failed; the first one said: it broke"):
        Fakes(search_setup, scores=(None,) * 4).run(RunDir(tmp_path))


def test_the_winner_states_its_gain_over_the_magnitude_mask_and_the_magnitude_mask_none(
    search_setup: SearchSetup, tmp_path: Path
) -> None:
    Fakes(search_setup).run(RunDir(tmp_path / "a"))
    gain = RunDir(tmp_path / "a").read_level(SEARCH, 1).gain
    assert gain is not None
    assert gain.mean == pytest.approx(0.3)
    assert not gain.within_noise
    Fakes(search_setup, scores=(0.9, 0.2, 0.4, 0.3)).run(RunDir(tmp_path / "b"))
    assert RunDir(tmp_path / "b").read_level(SEARCH, 1).gain is None


def test_without_random_candidates_the_search_is_the_baseline(tmp_path: Path) -> None:
    fakes = Fakes(setup_of(candidates={"count": 0}))
    fakes.run(RunDir(tmp_path))
    assert fakes.evaluated == []
    assert names(fakes) == ["dense", "raymask (magnitude mask)", "raymask (magnitude mask)"]
    assert not RunDir(tmp_path).has_level(IMP, 1)


def test_the_baseline_can_be_left_out(tmp_path: Path) -> None:
    fakes = Fakes(setup_of(imp={"run": False}))
    fakes.run(RunDir(tmp_path))
    assert not any("IMP" in name for name in names(fakes))


def test_parents_are_let_go_of_with_their_level(search_setup: SearchSetup, tmp_path: Path) -> None:
    known: list[weakref.ref[PackedTensors]] = []

    class Watching(Fakes):
        def evaluate(self, parents: Mapping[int, Snapshot], tasks: Sequence[EvalTask]) -> Evaluation:
            if len(tasks) == 4:  # the first of the level
                assert not any(weights() for weights in known)
                known.extend(weakref.ref(parent.weights) for parent in parents.values())
            return super().evaluate(parents, tasks)

        def finetune(self, tasks: Sequence[tuple[Snapshot, FinetuneTask]]) -> Iterator[tuple[int, Checkpoint]]:
            known.extend(weakref.ref(parent.weights) for parent, _ in tasks)
            yield from super().finetune(tasks)
            self.tuned.clear()

    Watching(search_setup).run(RunDir(tmp_path / "run"))
    assert len(known) == 1 + 2 * (1 + 2)  # the dense model; at each level the search's twice, the baseline's once


def test_distillation_warms_the_dense_model_up_and_hands_every_training_the_same_teacher(tmp_path: Path) -> None:
    fakes = Fakes(setup_of(distill=True))
    fakes.run(RunDir(tmp_path))
    assert names(fakes)[:2] == ["dense", "dense distillation"]
    dense, *others = fakes.tuned
    assert dense[0].teacher is None
    assert not dense[1].config.distill
    assert len({id(parent.teacher) for parent, _ in others}) == 1
    assert others[0][0].teacher is not None
    assert all(finetune_task.config.distill for _, finetune_task in others)
    assert {origin(parent.key) for parent, finetune_task in others if finetune_task.candidate.level == 1} == {
        "search-0"
    }


def test_other_data_under_the_same_run_is_refused(search_setup: SearchSetup, tmp_path: Path) -> None:
    Fakes(search_setup).run(RunDir(tmp_path))
    labels = search_setup.context.data.train.labels.copy()
    labels[0] = 1 - labels[0]
    data = replace(search_setup.context.data, train=replace(search_setup.context.data.train, labels=labels))
    changed = replace(search_setup, context=replace(search_setup.context, data=data))
    with pytest.raises(UserError, match="was started on other data"):
        Fakes(changed).run(RunDir(tmp_path))


def test_a_finished_run_is_held_against_the_files_too(tmp_path: Path) -> None:
    def write_rows(name: str, seed: int) -> str:
        texts, labels = reviews(40, seed)
        return str(write_table(tmp_path / f"{name}.csv", {"text": texts, "label": labels}))

    task = {"train": write_rows("train", 0), "test": write_rows("test", 1), "text": "text", "label": "label"}
    search_setup = setup_of(model=str(tiny_model(tmp_path / "model")), task=task)
    spec, run = search_setup.recipe.spec, tmp_path / "run"
    with open_run(RunDir(run), spec) as store:
        Fakes(search_setup).run(store)
        result = build_result(search_setup, store, 1.0)
    assert search(spec, run) == result
    write_rows("test", 2)
    with pytest.raises(UserError, match=r"run: was started on other data: files, tokenizer or labels have changed"):
        search(spec, run)


@pytest.mark.parametrize("error", [ZeroDivisionError("by nothing"), UserError("training diverged:\nlower the rate")])
def test_the_error_that_ends_a_search_is_in_its_run_directory(
    search_setup: SearchSetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    class Failing(Fakes):
        def evaluate(self, parents: Mapping[int, Snapshot], tasks: Sequence[EvalTask]) -> Evaluation:
            raise error

    monkeypatch.setattr("raymask.driver.search.open_executor", lambda *_: Failing(search_setup))
    with pytest.raises(type(error)) as raised:
        search(search_setup.recipe.spec, tmp_path)
    traceback, is_unexpected = tmp_path / "traceback.txt", isinstance(error, ZeroDivisionError)
    notes = [f"The traceback is in {traceback}"] if is_unexpected else []
    assert getattr(raised.value, "__notes__", []) == notes
    assert traceback.exists() == is_unexpected
    said = f"ZeroDivisionError: by nothing. {notes[0]}" if is_unexpected else str(error)
    summary = load_summary(RunDir(tmp_path))
    assert (summary.state, summary.error) == ("failed", said)
    [lines] = [section.lines for section in report_sections(summary) if section.title == "Not finished"]
    assert lines[0] == f"This search ended with an error: {said}"
    assert "Run the same command again" not in (tmp_path / "report.html").read_text()
    RunDir(tmp_path).record_start()
    assert load_summary(RunDir(tmp_path)).state == "stopped"


def test_proposals_differ_in_seed_and_cycle_through_the_sampling_ratios(tmp_path: Path) -> None:
    fakes = Fakes(setup_of(candidates={"count": 3, "sampling_ratios": [0.1, 0.2]}))
    fakes.run(RunDir(tmp_path))
    pool = sorted((candidate for _, candidate in fakes.evaluated), key=lambda c: (c.level, c.index))
    assert len({candidate.seed for candidate in pool}) == len(pool)
    ratios = [candidate.noise.sampling_ratio if candidate.noise else None for candidate in pool]
    assert ratios == [None, 0.1, 0.2, 0.1] * 2


def test_what_is_trained_on_is_no_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    task = {"train": "a.csv", "test": str(tmp_path / "a.csv"), "text": "s"}
    said = r"task\.test: is the file of task.train: give a file with rows that the model is not trained on"
    for start in (lambda spec: search(spec, "run"), lambda spec: show_check(Console(), spec, None)):
        with pytest.raises(UserError, match=said):
            start(make_spec({"model": "m", "task": task}))


def test_a_run_directory_of_another_spec_is_refused_with_the_keys_that_differ(
    search_setup: SearchSetup, tmp_path: Path
) -> None:
    with open_run(RunDir(tmp_path), search_setup.recipe.spec) as store:
        Fakes(search_setup).run(store)
    other = make_spec({**BASE, "seed": 5, "candidates": {"count": 4}})
    with pytest.raises(UserError, match=r"(?s)another spec.*candidates.count: 3 there, 4 now.*seed: 0 there, 5 now"):
        check_run(RunDir(tmp_path), other)


def test_a_run_directory_without_finished_work_takes_another_spec(search_setup: SearchSetup, tmp_path: Path) -> None:
    with pytest.raises(Killed), open_run(RunDir(tmp_path), search_setup.recipe.spec) as store:
        Fakes(search_setup, lives=0).run(store)
    other = make_spec({**BASE, "seed": 5})
    with open_run(RunDir(tmp_path), other) as store:
        assert store.read_spec() == other


def test_deleting_the_dense_record_does_not_let_another_spec_in(search_setup: SearchSetup, tmp_path: Path) -> None:
    with open_run(RunDir(tmp_path), search_setup.recipe.spec) as store:
        Fakes(search_setup).run(store)
    Path(store.level_uri(DENSE, 0)).unlink()
    with pytest.raises(UserError, match="another spec"):
        check_run(RunDir(tmp_path), make_spec({**BASE, "seed": 5}))


def test_how_many_workers_there_are_may_change_under_a_run(search_setup: SearchSetup, tmp_path: Path) -> None:
    with open_run(RunDir(tmp_path), search_setup.recipe.spec) as store:
        Fakes(search_setup).run(store)
    more = make_spec({**BASE, "workers": {"count": 7, "timeout": 5, "max_retries": 0}})
    check_run(store, more)
    assert store.has_level(SEARCH, 2)
