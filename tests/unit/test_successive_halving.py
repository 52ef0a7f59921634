"""Successive halving: the same outcome in whatever order evaluations finish."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymask.core import stats
from raymask.core.masking.noise import Noise
from raymask.core.records import Candidate, Evaluation
from raymask.core.successive_halving import (
    SuccessiveHalving,
    num_evaluations,
    num_full_evaluations,
    rung_fraction,
    rung_sizes,
)

RUNGS = [(1.0,), (0.5, 1.0), (0.25, 0.5, 1.0), (0.1, 0.2, 0.4, 1.0)]
NOISE = Noise(exponent=5.0, sampling_ratio=1e-3)


@pytest.fixture(scope="module", autouse=True)
def few_resamples():
    """Enough where no interval's width matters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "RESAMPLES", 100)
        yield


def pool_of(num_random, num_magnitude=1):
    """So many magnitude masks, each of a parent of its own, then the random ones."""
    return [
        Candidate(level=1, index=index, seed=index, density=0.5, noise=None if index < num_magnitude else NOISE)
        for index in range(num_magnitude + num_random)
    ]


def evaluated(candidate, rung, score):
    if score is None:
        return Evaluation(candidate=candidate, rung=rung, error="it broke")
    return Evaluation(candidate=candidate, rung=rung, score=score)


def by_the_book(pool, rungs, scores):
    """Rung after rung, each complete before the next begins: who is at the top, with what score."""
    promoted = list(pool)
    top = {}
    for rung, capacity in enumerate([*rung_sizes(sum(not c.is_magnitude for c in pool), rungs)[1:], 0]):
        found = [(scores[candidate.index][rung], candidate) for candidate in promoted]
        top = {(candidate.index, rung): score for score, candidate in found} or top
        alive = [(score, c) for score, c in found if score is not None and math.isfinite(score)]
        others = sorted(((s, c) for s, c in alive if not c.is_magnitude), key=lambda pair: (-pair[0], pair[1].index))
        promoted = [c for _, c in alive if c.is_magnitude] + [c for _, c in others[:capacity]]
    return top


@st.composite
def races(draw):
    """A pool, rungs, and a score or a failure for every candidate at every rung."""
    rungs = draw(st.sampled_from(RUNGS))
    pool = pool_of(draw(st.integers(0, 12)), draw(st.integers(1, 3)))
    score = st.one_of(st.none(), st.integers(-3, 3).map(float), st.just(math.nan))
    return pool, rungs, [draw(st.lists(score, min_size=len(rungs), max_size=len(rungs))) for _ in pool]


@given(races(), st.data())
def test_the_same_are_left_at_the_top_whoever_runs_beside_whom_and_is_done_first(race, data):
    pool, rungs, scores = race
    halving, running = SuccessiveHalving(pool, rungs), []
    workers = data.draw(st.integers(1, 5))
    while wanted := halving.ask():
        for eval_task in wanted:
            if len(running) < workers and eval_task not in running:
                running.append(eval_task)
        done = running.pop(data.draw(st.integers(0, len(running) - 1)))
        halving.tell(evaluated(done.candidate, done.rung, scores[done.candidate.index][done.rung]))
    found = {(e.candidate.index, e.rung): e.score for e in halving.finalists()}
    expected = by_the_book(pool, rungs, scores)
    assert found.keys() == expected.keys()


@given(races(), st.data())
def test_one_worker_does_nothing_in_vain(race, data):
    pool, rungs, scores = race
    halving, spent = SuccessiveHalving(pool, rungs), 0
    while eval_task := next(iter(halving.ask()), None):
        assert eval_task.key not in halving.results
        halving.tell(evaluated(eval_task.candidate, eval_task.rung, scores[eval_task.candidate.index][eval_task.rung]))
        spent += 1
    num_magnitude = sum(candidate.is_magnitude for candidate in pool)
    assert spent <= num_evaluations(len(pool) - num_magnitude, num_magnitude, rungs)


@given(races(), st.data())
def test_it_goes_on_from_what_is_known(race, data):
    """Also from speculative evaluations that an earlier start made, and from any part of what it found."""
    pool, rungs, scores = race
    everything = [
        evaluated(candidate, rung, scores[candidate.index][rung]) for candidate in pool for rung in range(len(rungs))
    ]
    known = data.draw(st.lists(st.sampled_from(everything), unique_by=lambda e: (e.candidate.index, e.rung)))
    halving = SuccessiveHalving(pool, rungs, known)
    while eval_task := next(iter(halving.ask()), None):
        assert all((e.candidate, e.rung) != (eval_task.candidate, eval_task.rung) for e in known)
        halving.tell(evaluated(eval_task.candidate, eval_task.rung, scores[eval_task.candidate.index][eval_task.rung]))
    assert {(e.candidate.index, e.rung) for e in halving.finalists()} == by_the_book(pool, rungs, scores).keys()


def test_a_promotion_happens_as_soon_as_it_is_certain():
    pool = pool_of(4)
    halving = SuccessiveHalving(pool, (0.5, 1.0))
    for index, score in ((1, 5.0), (2, 4.0), (3, 3.0)):
        halving.tell(evaluated(pool[index], 0, score))
    first, *_ = halving.ask()
    assert (first.candidate.index, first.rung) == (1, 1), "it is ahead of two of four, whatever the fourth brings"
    assert [(c.candidate.index, c.rung) for c in halving.ask()] == [(1, 1), (0, 0), (4, 0), (2, 1)], "2 is speculative"
    halving.tell(evaluated(pool[4], 0, 9.0))
    assert [(c.candidate.index, c.rung) for c in halving.ask()] == [(4, 1), (1, 1), (0, 0)]


def test_every_rung_costs_about_the_same():
    assert rung_sizes(8, (0.25, 0.5, 1.0)) == [8, 4, 2]
    assert rung_sizes(5, (0.25, 1.0)) == [5, 2]
    assert rung_sizes(0, (0.5, 1.0)) == [0, 0]
    assert num_evaluations(8, 1, (0.25, 0.5, 1.0)) == 9 + 5 + 3
    assert num_full_evaluations(8, 1, (0.25, 0.5, 1.0)) == pytest.approx(9 / 4 + 5 / 4 + 3 / 2)
    assert num_full_evaluations(8, 1, (1.0,)) == 9


# --- repeats ---------------------------------------------------------------------------------------------------------


def told(candidate, rung, order, losses):
    return Evaluation(
        candidate=candidate,
        rung=rung,
        repeat=order,
        score=-float(np.mean(losses)),
        row_losses=np.asarray(losses, np.float32).tobytes(),
    )


def doubtful_losses(index, order):
    """Rows on which 1 and 2 are about as good, 3 is hopeless, and the magnitude mask is not much better."""
    noise = np.random.default_rng(7 * index + order).normal(0, 0.3, 200)
    return noise + [0.3, 0.0, 0.005, 2.0][index]


def run(halving, losses=doubtful_losses):
    """Run all that it asks for; returns the keys in this order."""
    seen = []
    while eval_task := next(iter(halving.ask()), None):
        seen.append(eval_task.key)
        found = losses(eval_task.candidate.index, eval_task.repeat)
        halving.tell(told(eval_task.candidate, eval_task.rung, eval_task.repeat, found))
    return seen


def test_only_contenders_and_the_magnitude_mask_are_evaluated_again():
    halving = SuccessiveHalving(pool_of(3), (1.0,), repeats=3)
    seen = run(halving)
    assert seen[:4] == [(index, 0, 0) for index in range(4)]
    assert sorted(seen[4:7]) == [(0, 0, 1), (1, 0, 1), (2, 0, 1)]
    assert all(index != 3 for index, _, order in seen if order)
    for evaluation in halving.finalists():
        orders = [order for index, _, order in seen if index == evaluation.candidate.index]
        expected = np.mean([doubtful_losses(evaluation.candidate.index, order) for order in orders], axis=0)
        np.testing.assert_allclose(evaluation.losses(), expected, rtol=1e-5, atol=1e-6)
        assert evaluation.score == pytest.approx(-expected.mean(), rel=1e-5)


def test_where_there_is_no_doubt_nothing_is_repeated():
    halving = SuccessiveHalving(pool_of(3), (1.0,), repeats=5)
    assert len(run(halving, lambda index, order: np.full(50, float(index)))) == 4


@given(st.data())
def test_repeats_go_on_from_any_part_of_what_is_known(data):
    """A continued search doubts as the undisturbed one did, whatever it knows already."""
    whole = SuccessiveHalving(pool_of(3), (0.5, 1.0), repeats=4)
    run(whole)
    known = data.draw(st.lists(st.sampled_from(sorted(whole.results.items())), unique_by=lambda item: item[0]))
    again = SuccessiveHalving(pool_of(3), (0.5, 1.0), [evaluation for _, evaluation in known], repeats=4)
    run(again)
    assert again.results == whole.results
    assert again.finalists() == whole.finalists()


def test_a_repeat_that_fails_does_not_count():
    halving = SuccessiveHalving(pool_of(1), (1.0,), repeats=2)
    for candidate in halving.pool:
        halving.tell(told(candidate, 0, 0, doubtful_losses(1, candidate.index)))
    for eval_task in halving.ask():
        halving.tell(Evaluation(candidate=eval_task.candidate, repeat=1, error="it broke"))
    assert not halving.ask()
    assert [evaluation.losses().mean() for evaluation in halving.finalists()] == pytest.approx(
        [doubtful_losses(1, index).mean() for index in range(2)], rel=1e-4
    )


def test_a_repeat_is_a_whole_evaluation_and_a_promotion_a_part_of_one():
    rungs = (0.25, 0.5, 1.0)
    assert [rung_fraction(rungs, rung) for rung in range(3)] == [0.25, 0.25, 0.5]
    assert rung_fraction(rungs, 2, order=1) == 1.0
