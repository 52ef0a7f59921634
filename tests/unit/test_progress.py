"""Progress: counts, and the estimate of the time left."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from raymask.config import make_spec
from raymask.core.lineage import DENSE, IMP, SEARCH
from raymask.core.recipe import (
    dense_distillation_config,
    finetune_config,
    has_baseline,
    planned_epochs,
    propose_candidates,
    resolve,
)
from raymask.core.records import Candidate, EvalPoint, Evaluation, FinetuneResult, LevelRecord
from raymask.core.spec import Spec
from raymask.report import progress as module
from raymask.report.progress import Progress

BASE: dict[str, Any] = {
    "model": "quickstart",
    "task": "quickstart",
    "levels": [0.5, 0.75, 0.9],
    "candidates": {"count": 8},
    "dense": {"epochs": 3},
    "early_eval": {"epochs": 1},
    "finetune": {"epochs": 10},
    "distill": False,
}
TICK, EPOCH = 0.25, 8.0  # seconds between two polls of the workers, and of one epoch


def spec_of(**changes: Any) -> Spec:
    return make_spec(BASE | changes)


def evaluation(candidate: Candidate, score: float | None = 0.5, seconds: float = 1.0) -> Evaluation:
    error = None if score is not None else "it broke"
    return Evaluation(candidate=candidate, score=score, error=error, seconds=seconds)


def level_record(level: int, seconds: float) -> LevelRecord:
    point = EvalPoint(step=1, loss=0.5, metric=0.5)
    return LevelRecord(
        level=level,
        density=0.5,
        num_kept=1,
        num_prunable=2,
        winner=evaluation(Candidate(level=level, index=0, seed=0, density=0.5)),
        num_evaluated=1,
        num_failed=0,
        gain=None,
        finetune_result=FinetuneResult(curve=(point,), best=0, started=0.0, seconds=seconds, worker="w"),
        test_metrics={},
        digest="",
        parent_key="",
        data_fingerprint="",
    )


@pytest.fixture
def pool() -> tuple[Candidate, ...]:
    """The magnitude mask and eight random ones."""
    return propose_candidates(resolve(spec_of()), 1)


# --- counts ----------------------------------------------------------------------------------------------------------


def test_what_is_done_failed_running_and_waiting_is_counted(pool: tuple[Candidate, ...]) -> None:
    progress = Progress(spec_of())
    progress.on_phase_begin("early evaluation", 1, 9, [])
    assert (progress.done, progress.failed, progress.waiting) == (0, 0, 9)
    progress.on_progress({"magnitude mask": 0.5, "candidate 1": 0.1})
    assert progress.waiting == 7
    progress.on_evaluation(evaluation(pool[0]))
    assert (progress.done, progress.waiting, progress.shares) == (1, 7, {"candidate 1": 0.1})
    progress.on_evaluation(evaluation(pool[1], None))
    assert (progress.done, progress.failed, progress.waiting) == (2, 1, 7)
    progress.on_phase_begin("fine-tuning", 1, 2, None)
    assert (progress.done, progress.failed, progress.waiting, progress.best) == (0, 0, 2, None)
    progress.on_level_end(SEARCH, level_record(1, 1.0))
    assert (progress.done, progress.waiting) == (1, 1)


def test_what_the_journal_knew_counts_after_a_resume(pool: tuple[Candidate, ...]) -> None:
    progress = Progress(spec_of())
    progress.on_phase_begin("early evaluation", 2, 9, [evaluation(pool[3], 0.25), evaluation(pool[4], None)])
    assert (progress.done, progress.failed, progress.waiting) == (2, 1, 7)
    assert progress.best is not None
    assert progress.best.candidate is pool[3]
    assert progress.left() is None, "when it was done, and by whom, tells nothing of this start's workers"


def test_what_waits_is_never_less_than_nothing() -> None:
    progress = Progress(spec_of())
    progress.on_phase_begin("early evaluation", 1, 1, [])
    progress.on_progress({"magnitude mask": 0.5, "the same, elsewhere": 0.0})
    assert progress.waiting == 0


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([0.1, 0.3, 0.2], 0.3),
        ([-0.4, -0.2, -0.3], -0.2),
        ([0.0, -0.5], 0.0),
        ([math.nan, -1.0, math.inf, -2.0], -1.0),
        ([None, 0.2], 0.2),
        ([-math.inf, None], None),
    ],
)
def test_the_best_score_is_the_highest_that_is_a_number(
    pool: tuple[Candidate, ...], scores: Sequence[float | None], best: float | None
) -> None:
    progress = Progress(spec_of())
    progress.on_phase_begin("early evaluation", 1, 9, [])
    for candidate, score in zip(pool, scores, strict=False):
        progress.on_evaluation(evaluation(candidate, score))
    assert (progress.best and progress.best.score) == best
    if progress.best:
        progress.on_evaluation(evaluation(pool[8], best))
        assert progress.best.candidate is not pool[8], "on a tie the first one stays"


def test_all_of_it_is_a_line(pool: tuple[Candidate, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress(spec_of(levels=[0.5], imp={"run": False}))
    progress.on_phase_begin("level 1/1, sparsity 50.00%: early evaluation", 1, 9, [evaluation(pool[2], -0.25)])
    stage = "level 1/1, sparsity 50.00%: early evaluation"
    assert progress.line() == f"{stage}: 1 of 9 done, 0 running, 0 failed, best score -0.2500 (candidate 2)"
    progress.on_progress({"candidate 3": 0.5, "magnitude mask": 0.25})
    progress.on_evaluation(evaluation(pool[3], None))
    progress.on_evaluation(evaluation(pool[4], -0.5, seconds=60.0))
    progress.on_progress({"magnitude mask": 0.5, "candidate 5": 0.0})
    # the magnitude mask goes on for half an early evaluation, then takes two of the four that wait; ten epochs follow
    assert progress.line() == (
        f"{stage}: 3 of 9 done, 2 running (magnitude mask 50%, candidate 5 0%), 1 failed, best score -0.2500 "
        "(candidate 2), about 13 min 0 s left"
    )
    progress.on_phase_begin("level 1/1, sparsity 50.00%: fine-tuning", 1, 1, None)
    progress.on_progress({"raymask (candidate 2)": 0.25})
    assert progress.line() == (
        "level 1/1, sparsity 50.00%: fine-tuning: 0 of 1 done, 1 running (raymask (candidate 2) 25%), "
        "about 7 min 30 s left"
    )


# --- the time that is left -------------------------------------------------------------------------------------------


@dataclass
class Work:
    """One early evaluation or fine-tuning."""

    name: str
    epochs: float
    ends: Callable[[], None]
    done: float = 0.0  # epochs


@dataclass
class Simulation:
    """A whole search on workers that all train equally fast, and the estimates that were given on the way."""

    spec: Spec
    workers: int
    fails: Sequence[int] = ()  # indices of candidates whose training breaks at half its way
    now: float = 1000.0
    told: list[tuple[str, float, float | None]] = field(default_factory=list)  # phase, time, estimate
    known: float = math.inf  # when one early evaluation and one fine-tuning had been seen

    def go(self, progress: Progress, skip: Callable[[int, str], bool] = lambda level, what: False) -> None:
        """All phases; `skip` says what an earlier start has done."""
        recipe, evaluated, tuned = resolve(self.spec), not self.spec.candidates.count, False
        for level in range(len(recipe.densities) + 1):
            pool = propose_candidates(recipe, level) if level and self.spec.candidates.count else ()
            if pool and not skip(level, SEARCH):
                known = [evaluation(candidate) for candidate in pool if skip(level, candidate.name)]
                progress.on_phase_begin(f"early evaluation {level}", level, len(pool), known)
                self.work(progress, [self.early_evaluation(progress, c) for c in pool if not skip(level, c.name)])
                evaluated = True
            for lineages in self.fine_tunings(level):
                left = [lineage for lineage in lineages if not skip(level, lineage)]
                if left:
                    progress.on_phase_begin(f"fine-tuning {level}", level, len(left), None)
                    self.work(progress, [self.fine_tuning(progress, level, lineage) for lineage in left])
                    tuned = True
            if evaluated and tuned:
                self.known = min(self.known, self.now)

    def fine_tunings(self, level: int) -> list[list[str]]:
        """The lineages of a level that are fine-tuned side by side, one phase after another."""
        if level:
            return [[SEARCH, IMP]] if has_baseline(self.spec) else [[SEARCH]]
        return [[DENSE], [SEARCH]] if dense_distillation_config(self.spec) else [[DENSE]]

    def early_evaluation(self, progress: Progress, candidate: Candidate) -> Work:
        fails, length = candidate.index in self.fails, self.spec.early_eval.epochs
        found = evaluation(candidate, None if fails else 0.5, length * EPOCH)
        return Work(candidate.name, length / 2 if fails else length, lambda: progress.on_evaluation(found))

    def fine_tuning(self, progress: Progress, level: int, lineage: str) -> Work:
        dense = self.spec.dense
        if level:
            length = finetune_config(resolve(self.spec), level, imp=lineage == IMP).epochs
        else:
            length = dense.epochs if lineage == DENSE else dense.distill_epochs
        name = lineage or ("raymask" if level else "dense distillation")
        return Work(name, length, lambda: progress.on_level_end(lineage, level_record(level, length * EPOCH)))

    def work(self, progress: Progress, todo: Sequence[Work]) -> None:
        waiting, busy = deque(todo), list[Work]()
        while waiting or busy:
            while waiting and len(busy) < self.workers:
                busy.append(waiting.popleft())
            progress.on_progress({work.name: work.done / (work.epochs or 1) for work in busy})
            self.told.append((progress.stage, self.now, progress.left()))
            self.now += TICK
            for work in list(busy):
                work.done += TICK / EPOCH
                if work.done >= work.epochs - 1e-9:
                    busy.remove(work)
                    work.ends()

    def errors(self, since: float) -> Iterator[tuple[str, float]]:
        """How far every estimate since then was from the time that was really left, as a share of it."""
        for stage, at, left in self.told:
            if at >= since and self.now - at > EPOCH:
                assert left is not None
                yield f"{stage}, {self.now - at:.1f} s before the end", abs(left - (self.now - at)) / (self.now - at)


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Simulation]:
    """A simulated search, whose clock is the one that progress looks at."""

    def make(spec: Spec, workers: int, **options: Any) -> Simulation:
        found = Simulation(spec, workers, **options)
        monkeypatch.setattr(module.time, "monotonic", lambda: found.now)
        return found

    return make


SPECS = {
    "with a baseline": {},
    "without one": {"imp": {"run": False}},
    "with a short baseline": {"imp": {"epochs": 2}},
    "with distillation": {"distill": True},
    "without candidates": {"candidates": {"count": 0}},
    "of one level": {"levels": [0.9]},
    "with long early evaluations": {"early_eval": {"epochs": 6}, "finetune": {"epochs": 2}},
    "from a dense model": {"model": "m", "task": "glue/mrpc", "dense": {"epochs": 0}},
}


@pytest.mark.parametrize("workers", [1, 2, 4, 20])
@pytest.mark.parametrize("changes", SPECS.values(), ids=SPECS)
def test_once_an_early_evaluation_and_a_fine_tuning_have_been_seen_the_estimate_is_right(
    simulation: Callable[..., Simulation], changes: dict[str, Any], workers: int
) -> None:
    """At every moment of the search that follows, but for the last seconds."""
    search = simulation(spec_of(**changes), workers)
    search.go(Progress(search.spec))
    assert all(left is None or left >= 0 for _, _, left in search.told)
    last = search.told[-1]
    assert last[2] is not None
    assert last[2] <= 2 * TICK
    assert max([error for _, error in search.errors(since=search.known)], default=0.0) < 0.02


@pytest.mark.parametrize("changes", SPECS.values(), ids=SPECS)
def test_one_worker_knows_it_from_the_start(simulation: Callable[..., Simulation], changes: dict[str, Any]) -> None:
    """Nobody can know how many others there will be, but one alone can tell as soon as it has trained a little."""
    search = simulation(spec_of(**changes), 1)
    search.go(Progress(search.spec))
    first = next(at for _, at, left in search.told if left is not None)
    assert first <= search.told[0][1] + 1.1 * EPOCH
    assert max(error for _, error in search.errors(since=first + EPOCH)) < 0.02
    assert search.now - 1000 == pytest.approx(sum(planned_epochs(resolve(search.spec)).values()) * EPOCH, rel=0.01)


def test_nothing_is_said_before_anything_is_known(simulation: Callable[..., Simulation]) -> None:
    search = simulation(spec_of(), 1)
    progress = Progress(search.spec)
    assert progress.left() is None
    progress.on_phase_begin("dense model", 0, 1, None)
    assert progress.left() is None
    search.now += 1000  # until a worker has started
    progress.on_progress({"dense": 0.0})
    search.now += 5
    progress.on_progress({"dense": 0.01})
    assert progress.left() is None, "a first step may take long"
    assert "left" not in progress.line()
    search.now += 7
    progress.on_progress({"dense": 0.5})
    assert progress.left() == pytest.approx((1.5 + 3 * (9 + 10 + 15)) * EPOCH)


def test_a_model_that_needs_no_training_says_nothing_about_the_others(simulation: Callable[..., Simulation]) -> None:
    """The dense model is measured all the same, and that takes its time."""
    search = simulation(spec_of(**SPECS["from a dense model"]), 1)
    progress = Progress(search.spec)
    progress.on_phase_begin("dense model", 0, 1, None)
    progress.on_level_end(DENSE, level_record(0, 1000.0))
    assert progress.left() is None
    progress.on_phase_begin("early evaluation", 1, 9, [])
    progress.on_evaluation(evaluation(propose_candidates(resolve(search.spec), 1)[0], seconds=EPOCH))
    assert progress.left() == pytest.approx((8 + 25 + 2 * (9 + 25)) * EPOCH)


def test_between_two_fine_tunings_the_second_is_all_ahead(simulation: Callable[..., Simulation]) -> None:
    progress = Progress(simulation(spec_of(), 1).spec)
    progress.on_phase_begin("fine-tuning", 3, 2, None)
    progress.on_progress({"raymask": 1.0})
    progress.on_level_end(SEARCH, level_record(3, 10 * EPOCH))
    assert progress.left() == pytest.approx(15 * EPOCH)


@pytest.mark.parametrize("workers", [1, 4])
def test_candidates_that_fail_do_not_lead_it_astray(simulation: Callable[..., Simulation], workers: int) -> None:
    search = simulation(spec_of(), workers, fails=(0, 3))
    search.go(Progress(search.spec))
    assert max(error for _, error in search.errors(since=search.known)) < 0.1


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    "done",
    [
        {(1, "magnitude mask"), (1, "candidate 1"), (1, "candidate 2")},
        {*((1, f"candidate {index}") for index in range(1, 9)), (1, "magnitude mask")},
        {(1, SEARCH)},
        {(1, IMP)},
        set(),
    ],
    ids=[
        "in the middle of the early evaluations",
        "before the fine-tuning",
        "before the baseline",
        "after the baseline alone",
        "before distillation",
    ],
)
def test_a_search_that_was_continued_knows_what_is_left(
    simulation: Callable[..., Simulation], workers: int, done: set[tuple[int, str]]
) -> None:
    search = simulation(spec_of(distill=not done), workers)
    done = done | {(0, DENSE)}
    search.go(Progress(search.spec), lambda level, what: (level, what) in done)
    assert max(error for _, error in search.errors(since=search.known)) < 0.02
    if workers == 1:
        first = next(at for stage, at, _ in search.told if stage.startswith("fine-tuning"))
        assert max(error for _, error in search.errors(since=first + EPOCH / 2)) < 0.02


def test_workers_that_come_or_go_change_the_estimate(simulation: Callable[..., Simulation]) -> None:
    search = simulation(spec_of(imp={"run": False}), 4)
    progress = Progress(search.spec)
    progress.on_phase_begin("early evaluation", 1, 9, [])
    progress.on_progress({"magnitude mask": 0.5})
    progress.on_evaluation(evaluation(propose_candidates(resolve(search.spec), 1)[0], seconds=EPOCH))
    estimates = []
    for workers in (1, 4, 2):
        progress.on_progress({f"candidate {index}": 0.0 for index in range(1, workers + 1)})
        estimates.append(progress.left())
    tuning = 3 * 10 * EPOCH
    assert estimates == [
        (8 + 2 * 9) * EPOCH + tuning,
        (2 + 2 * 3) * EPOCH + tuning,
        (4 + 2 * 5) * EPOCH + tuning,
    ]
