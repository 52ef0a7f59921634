"""Does the level loop do the method, and never the same work twice, whoever does the work?"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from rich.console import Console
from support.fakes import BASE, Fakes, Killed, plan_of

from raymask.check import show_check
from raymask.config import make_spec
from raymask.core import stats
from raymask.core.errors import UserError
from raymask.core.records import Checkpoint, Climb, Evaluation, Result, Settling, Snapshot
from raymask.core.tensors import Packed
from raymask.driver.search import Plan, conclude, prune, search
from raymask.report.terminal import Silent
from raymask.store import DENSE, IMP, SEARCH, RunDir, check_run, open_run, sealed


@pytest.fixture(scope="module", autouse=True)
def few_resamples() -> Iterator[None]:
    """Enough where no interval's width matters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "RESAMPLES", 50)
        yield


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of()


def origin(key: str) -> str:
    """A snapshot's key without the hash of its contents."""
    return key.rpartition("-")[0]


def names(fakes: Fakes) -> list[str]:
    return [settling.name for _, settling in fakes.tuned]


def test_the_best_candidate_of_every_level_is_fine_tuned_from_its_parent(plan: Plan, tmp_path: Path) -> None:
    fakes = Fakes(plan)
    fakes.run(RunDir(tmp_path))
    assert sorted((origin(key), candidate.level, candidate.index) for key, candidate in fakes.evaluated) == [
        *(("dense-0", 1, index) for index in range(4)),
        *(("search-1", 2, index) for index in range(4)),
    ]
    selected = [
        (origin(parent.key), settling) for parent, settling in fakes.tuned if settling.name.startswith("selected")
    ]
    assert [(key, settling.candidate.index, settling.digest) for key, settling in selected] == [
        ("dense-0", 2, "1-2"),
        ("search-1", 2, "2-2"),
    ]


def test_the_baseline_goes_its_own_way_from_the_same_dense_model(plan: Plan, tmp_path: Path) -> None:
    fakes = Fakes(plan)
    fakes.run(RunDir(tmp_path))
    baseline = [(origin(parent.key), settling) for parent, settling in fakes.tuned if "IMP" in settling.name]
    assert [key for key, _ in baseline] == ["dense-0", "imp-1"]
    assert all(settling.candidate.is_control for _, settling in baseline)
    assert [settling.stage.epochs for _, settling in baseline] == [15.0, 15.0]


def test_only_the_last_level_decays_its_rate(plan: Plan, tmp_path: Path) -> None:
    fakes = Fakes(plan)
    fakes.run(RunDir(tmp_path))
    schedules = {(settling.candidate.level, settling.stage.schedule) for _, settling in fakes.tuned}
    assert schedules == {(0, "linear"), (1, "constant"), (2, "linear")}


WORK = 1 + 2 * (4 + 2)  # dense; at each level four probes, the selected mask and the baseline


@pytest.fixture(scope="module")
def undisturbed(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> tuple[Fakes, RunDir]:
    """A whole search, and its run. Only ever read it."""
    fakes, store = Fakes(plan), RunDir(tmp_path_factory.mktemp("whole"))
    fakes.run(store)
    return fakes, store


@pytest.mark.parametrize("lives", range(WORK))
def test_a_killed_search_continues_and_finds_the_same_without_repeating_anything(
    plan: Plan, undisturbed: tuple[Fakes, RunDir], tmp_path: Path, lives: int
) -> None:
    calm, whole = undisturbed
    assert len(calm.evaluated) + len(calm.tuned) == WORK
    first, second, killed = Fakes(plan, lives=lives), Fakes(plan), RunDir(tmp_path)
    with pytest.raises(Killed):
        first.run(killed)
    second.run(killed)
    assert len(first.evaluated) + len(second.evaluated) == len(calm.evaluated)
    assert sorted(names(first) + names(second)) == sorted(names(calm))
    for lineage, level in [(DENSE, 0), (SEARCH, 1), (IMP, 1), (SEARCH, 2), (IMP, 2)]:
        mine, theirs = killed.read_level(lineage, level), whole.read_level(lineage, level)
        assert (mine.winner, mine.gain, mine.digest) == (theirs.winner, theirs.gain, theirs.digest)


def test_the_result_says_when_every_piece_of_work_was_done(plan: Plan, tmp_path: Path) -> None:
    """But for one that no worker finished."""
    store = RunDir(tmp_path)
    Fakes(plan, scores=(0.1, 0.2, None, 0.3), machine=True).run(store)
    result = conclude(plan, store, 7.0)
    assert [(piece.kind, piece.level, piece.started) for piece in result.timeline] == [
        ("dense", 0, 4.0),
        *(("early evaluation", 1, 10.0 + index) for index in (0, 1, 3)),
        ("fine-tuning", 1, 14.0),
        ("baseline (IMP)", 1, 15.0),
        *(("early evaluation", 2, 20.0 + index) for index in (0, 1, 3)),
        ("fine-tuning", 2, 24.0),
        ("baseline (IMP)", 2, 25.0),
    ]
    assert {(piece.worker, piece.seconds) for piece in result.timeline} == {("fake/1 cpu", 1.0)}
    assert result.seconds == {
        "dense": 1.0,
        "early evaluation": 6.0,
        "fine-tuning": 2.0,
        "baseline (IMP)": 2.0,
        "wall": 7.0,
    }


# --- rungs, and several winners --------------------------------------------------------------------------------------

TREE = {"levels": [0.5, 0.75, 0.9], "imp": {"run": False}}
SCORES = (0.1, 0.2, 0.4, 0.3, 0.15, 0.35, 0.6, 0.25)  # the last four: of a second parent's candidates


def test_only_the_best_and_the_control_are_evaluated_to_the_end(tmp_path: Path) -> None:
    plan = plan_of(candidates={"count": 7}, probe={"rungs": [0.25, 1.0]})
    fakes = Fakes(plan, scores=SCORES)
    store = RunDir(tmp_path)
    fakes.run(store)
    found = store.evaluations(1)
    assert sorted(e.candidate.index for e in found if e.rung == 0) == list(range(8))
    assert {e.candidate.index for e in found if e.rung == 1} >= {0, 2, 6}
    level = store.read_level(SEARCH, 1)
    assert (level.winner.candidate.index, level.winner.rung, level.evaluated) == (6, 1, 8)
    assert level.confidence == 1.0


def test_a_beam_draws_from_every_branch_and_the_result_is_one_path_of_the_tree(tmp_path: Path) -> None:
    """Branch 1 of level 1 is candidate 2, branch 2 is 3; at the later levels 6, of branch 2, and 2, of branch 1."""
    plan = plan_of(**TREE, select={"keep": 2, "beam": True})
    fakes = Fakes(plan, scores=SCORES)
    store = RunDir(tmp_path)
    fakes.run(store)
    assert sorted((origin(key), candidate.index) for key, candidate in fakes.evaluated if candidate.level == 2) == [
        *(("branch-2-1", index) for index in range(4, 8)),
        *(("search-1", index) for index in range(4)),
    ]
    tuned = [(parent.key, settling.candidate) for parent, settling in fakes.tuned if settling.candidate.level]
    assert sorted((candidate.level, candidate.index, origin(key)) for key, candidate in tuned) == [
        (1, 2, "dense-0"),
        (1, 3, "dense-0"),
        (2, 2, "search-1"),
        (2, 6, "branch-2-1"),
        (3, 2, "search-2"),
        (3, 6, "branch-2-2"),
    ]
    result = conclude(plan, store, 1.0)
    assert [level.winner.candidate.index for level in result.levels] == [2, 2, 6]
    assert [level.winner.candidate.index for level in result.others] == [3, 6, 2]


def test_without_a_beam_the_best_after_fine_tuning_is_the_only_parent(tmp_path: Path) -> None:
    plan = plan_of(**TREE, select={"keep": 2})
    fakes = Fakes(plan, scores=SCORES, metrics=(0.5, 0.5, 0.5, 0.9))
    store = RunDir(tmp_path)
    fakes.run(store)
    assert {(candidate.level, origin(key)) for key, candidate in fakes.evaluated} == {
        (1, "dense-0"),
        (2, "branch-2-1"),
        (3, "branch-2-2"),
    }
    result = conclude(plan, store, 1.0)
    assert [level.winner.candidate.index for level in result.levels] == [3, 3, 3]
    assert [level.winner.candidate.index for level in result.others] == [2, 2, 2]
    assert result.export
    assert len([piece for piece in result.timeline if piece.kind == "fine-tuning"]) == 6


def tree_fakes(plan: Plan, **changes: int) -> Fakes:
    return Fakes(plan, scores=SCORES, metrics=(0.5, 0.5, 0.5, 0.9, 0.5, 0.6), **changes)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], tuple[Plan, Result]]:
    """A function (beam) -> a tree's plan, and what an undisturbed search makes of it."""

    @cache
    def grow(beam: bool) -> tuple[Plan, Result]:
        plan = plan_of(**TREE, select={"keep": 2, "beam": beam}, probe={"rungs": [0.5, 1.0]})
        store = RunDir(tmp_path_factory.mktemp("tree"))
        tree_fakes(plan).run(store)
        return plan, conclude(plan, store, 1.0)

    return grow


@pytest.mark.parametrize("beam", [False, True])
@pytest.mark.parametrize("lives", range(0, 34, 6))
def test_a_killed_tree_grows_on_to_the_same_tree(
    grown: Callable[[bool], tuple[Plan, Result]], tmp_path: Path, lives: int, beam: bool
) -> None:
    (plan, theirs), killed = grown(beam), RunDir(tmp_path)
    with suppress(Killed):
        tree_fakes(plan, lives=lives).run(killed)
    tree_fakes(plan).run(killed)
    ours = conclude(plan, killed, 1.0)
    for mine, other in zip([*ours.levels, *ours.others], [*theirs.levels, *theirs.others], strict=True):
        assert (mine.winner, mine.gain, mine.confidence) == (other.winner, other.gain, other.confidence)
        assert origin(mine.parent) == origin(other.parent)


def test_no_mask_is_fine_tuned_twice_when_a_continued_search_ranks_otherwise(tmp_path: Path) -> None:
    """Candidate 2's machine failed; so 3 and 1 had won, and 1 was fine-tuned when the driver was killed."""
    plan = plan_of(levels=[0.5], imp={"run": False}, select={"keep": 2})
    store = RunDir(tmp_path)
    with pytest.raises(Killed):
        Fakes(plan, scores=(0.1, 0.2, None, 0.3), machine=True, lives=1 + 4 + 1).run(store)
    before = [store.read_level(lineage, 1).winner.candidate.index for lineage in ("branch-2",)]
    assert before == [1]
    Fakes(plan, scores=(0.1, 0.2, 0.4, 0.3)).run(store)
    assert store.read_level(SEARCH, 1).winner.candidate.index == 2
    assert store.read_level("branch-2", 1).winner.candidate.index == 1


def test_a_failed_candidate_never_wins_and_is_counted(plan: Plan, tmp_path: Path) -> None:
    Fakes(plan, scores=(0.1, 0.2, None, 0.3)).run(RunDir(tmp_path))
    level = RunDir(tmp_path).read_level(SEARCH, 1)
    assert (level.winner.candidate.index, level.evaluated, level.failed) == (3, 4, 1)


def test_a_failed_candidate_is_not_tried_again(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        Fakes(plan, scores=(0.1, 0.2, None, 0.3), lives=1 + 4).run(RunDir(tmp_path))
    again = Fakes(plan)
    again.run(RunDir(tmp_path))
    assert all(candidate.level == 2 for _, candidate in again.evaluated)
    assert RunDir(tmp_path).read_level(SEARCH, 1).winner.candidate.index == 3


def test_a_candidate_whose_machine_failed_is_tried_again_by_a_continued_search(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        Fakes(plan, scores=(0.1, 0.2, None, 0.3), machine=True, lives=1 + 4).run(RunDir(tmp_path))
    again = Fakes(plan)
    again.run(RunDir(tmp_path))
    assert [candidate.index for _, candidate in again.evaluated if candidate.level == 1] == [2]
    level = RunDir(tmp_path).read_level(SEARCH, 1)
    assert (level.winner.candidate.index, level.failed) == (2, 0)


def test_a_level_that_was_made_from_another_parent_is_refused(plan: Plan, tmp_path: Path) -> None:
    store = RunDir(tmp_path)
    Fakes(plan).run(store)
    record = store.read_level(SEARCH, 1)
    path = Path(store.level_uri(SEARCH, 1))
    path.write_text(sealed(record.model_copy(update={"parent": "dense-0-another"})))
    with pytest.raises(UserError, match=r"level-1/level.json: was made from another parent than .*\. Delete it to"):
        Fakes(plan).run(store)


def test_a_level_that_would_keep_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"levels: a sparsity of 0\.9999 keeps none of the 1,024 weights of bert\."):
        plan_of(levels=[0.5, 0.9999])


def test_blocks_are_counted_where_a_level_would_keep_nothing() -> None:
    with pytest.raises(UserError, match=r"levels: a sparsity of 0\.99 keeps none of the 1,024 weights of bert\.\S+: "):
        plan_of(levels=[0.99], mask={"pattern": "16x1"})
    with pytest.raises(UserError, match=r"keeps none of the \d\d,\d{3} weights of bert\.\S+, bert\..*: lower it"):
        plan_of(levels=[0.9999], mask={"pattern": "16x1", "allocation": "global"})


@pytest.mark.parametrize(("pattern", "levels"), [("n:5", [0.2]), ("3x1", [0.5]), ("1x48", [0.5])])
def test_a_pattern_that_does_not_divide_a_matrix_names_it_and_its_shape(pattern: str, levels: list[float]) -> None:
    message = rf"^mask\.pattern: {pattern} does not divide bert\.\S+\.weight of \d+ x \d+: choose another, or leave"
    with pytest.raises(UserError, match=message):
        plan_of(levels=levels, mask={"pattern": pattern})


def test_no_survivor_is_an_error_that_says_why(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"level 1: all 4 candidates failed; the first one said: it broke"):
        Fakes(plan, scores=(None,) * 4).run(RunDir(tmp_path))


def test_the_winner_states_its_gain_over_the_control_and_the_control_none(plan: Plan, tmp_path: Path) -> None:
    Fakes(plan).run(RunDir(tmp_path / "a"))
    gain = RunDir(tmp_path / "a").read_level(SEARCH, 1).gain
    assert gain is not None
    assert gain.mean == pytest.approx(0.3)
    assert not gain.within_noise
    Fakes(plan, scores=(0.9, 0.2, 0.4, 0.3)).run(RunDir(tmp_path / "b"))
    assert RunDir(tmp_path / "b").read_level(SEARCH, 1).gain is None


def test_without_random_candidates_the_search_is_the_baseline(tmp_path: Path) -> None:
    fakes = Fakes(plan_of(candidates={"count": 0}))
    fakes.run(RunDir(tmp_path))
    assert fakes.evaluated == []
    assert names(fakes) == ["dense", "selected (control)", "selected (control)"]
    assert not RunDir(tmp_path).has_level(IMP, 1)


def test_the_baseline_can_be_left_out(tmp_path: Path) -> None:
    fakes = Fakes(plan_of(imp={"run": False}))
    fakes.run(RunDir(tmp_path))
    assert not any("IMP" in name for name in names(fakes))


def test_parents_are_let_go_of_with_their_level(plan: Plan, tmp_path: Path) -> None:
    fakes = Fakes(plan)
    known: list[weakref.ref[Packed]] = []

    def evaluate(parents: Mapping[int, Snapshot], wanted: Callable[[], Iterable[Climb]]) -> Iterator[Evaluation]:
        assert not any(weights() for weights in known)
        known.extend(weakref.ref(parent.weights) for parent in parents.values())
        yield from fakes.evaluate(parents, wanted)

    def fine_tune(work: Sequence[tuple[Snapshot, Settling]]) -> Iterator[tuple[int, Checkpoint]]:
        known.extend(weakref.ref(parent.weights) for parent, _ in work)
        yield from fakes.fine_tune(work)
        fakes.tuned.clear()

    prune(plan, RunDir(tmp_path / "run"), evaluate, fine_tune, Silent())
    assert len(known) == 1 + 2 * (1 + 2)  # the dense model; at each level the search's twice, the baseline's once


def test_distillation_warms_the_dense_model_up_and_hands_every_stage_the_same_teacher(tmp_path: Path) -> None:
    fakes = Fakes(plan_of(distill=True))
    fakes.run(RunDir(tmp_path))
    assert names(fakes)[:2] == ["dense", "dense distillation"]
    dense, *others = fakes.tuned
    assert dense[0].teacher is None
    assert not dense[1].stage.distill
    assert len({id(parent.teacher) for parent, _ in others}) == 1
    assert others[0][0].teacher is not None
    assert all(settling.stage.distill for _, settling in others)
    assert {origin(parent.key) for parent, settling in others if settling.candidate.level == 1} == {"search-0"}


def test_other_data_under_the_same_run_is_refused(plan: Plan, tmp_path: Path) -> None:
    Fakes(plan).run(RunDir(tmp_path))
    labels = plan.job.data.train.labels.copy()
    labels[0] = 1 - labels[0]
    data = replace(plan.job.data, train=replace(plan.job.data.train, labels=labels))
    changed = replace(plan, job=replace(plan.job, data=data))
    with pytest.raises(UserError, match="was started on other data"):
        Fakes(changed).run(RunDir(tmp_path))


def test_proposals_differ_in_seed_and_cycle_through_the_ratios(tmp_path: Path) -> None:
    fakes = Fakes(plan_of(candidates={"count": 3, "ratios": [0.1, 0.2]}))
    fakes.run(RunDir(tmp_path))
    pool = sorted((candidate for _, candidate in fakes.evaluated), key=lambda c: (c.level, c.index))
    assert len({candidate.seed for candidate in pool}) == len(pool)
    ratios = [candidate.noise.ratio if candidate.noise else None for candidate in pool]
    assert ratios == [None, 0.1, 0.2, 0.1] * 2


def test_what_is_trained_on_is_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    task = {"train": "a.csv", "report": str(tmp_path / "a.csv"), "text": "s"}
    for start in (lambda spec: search(spec, "run", Silent()), lambda spec: show_check(Console(), spec, None)):
        with pytest.raises(UserError, match=r"task\.report: is the file of task.train: what was trained on"):
            start(make_spec({"model": "m", "task": task}))


def test_a_run_directory_of_another_spec_is_refused_with_the_keys_that_differ(plan: Plan, tmp_path: Path) -> None:
    with open_run(RunDir(tmp_path), plan.recipe.spec) as store:
        Fakes(plan).run(store)
    other = make_spec({**BASE, "seed": 5, "candidates": {"count": 4}})
    with pytest.raises(UserError, match=r"(?s)another spec.*candidates.count: 3 there, 4 now.*seed: 0 there, 5 now"):
        check_run(RunDir(tmp_path), other)


def test_a_run_directory_without_finished_work_takes_another_spec(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(Killed), open_run(RunDir(tmp_path), plan.recipe.spec) as store:
        Fakes(plan, lives=0).run(store)
    other = make_spec({**BASE, "seed": 5})
    with open_run(RunDir(tmp_path), other) as store:
        assert store.read_spec() == other


def test_deleting_the_dense_record_does_not_let_another_spec_in(plan: Plan, tmp_path: Path) -> None:
    with open_run(RunDir(tmp_path), plan.recipe.spec) as store:
        Fakes(plan).run(store)
    Path(store.level_uri(DENSE, 0)).unlink()
    with pytest.raises(UserError, match="another spec"):
        check_run(RunDir(tmp_path), make_spec({**BASE, "seed": 5}))


def test_how_many_workers_there_are_may_change_under_a_run(plan: Plan, tmp_path: Path) -> None:
    with open_run(RunDir(tmp_path), plan.recipe.spec) as store:
        Fakes(plan).run(store)
    more = make_spec({**BASE, "workers": {"count": 7, "deadline": 5, "retries": 0}})
    check_run(store, more)
    assert store.has_level(SEARCH, 2)
