"""Rules of selection: independent of the order of arrival, and never a failed candidate."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymask.core.errors import UserError
from raymask.core.masking.noise import Noise
from raymask.core.records import Candidate, Evaluation
from raymask.core.selection import SELECTIONS, best, first

scores = st.sampled_from([-1.0, -0.5, 0.5]) | st.floats(-9, 9)  # ties are common
outcomes = st.lists(st.none() | scores, min_size=1, max_size=9).filter(lambda found: set(found) != {None})


def evaluated(index, score=None, error=None):
    candidate = Candidate(level=3, index=index, seed=index, density=0.1)
    return Evaluation(candidate=candidate, score=score, error=error)


def failed_where_none(scores):
    """One evaluation a score; None stands for a failure."""
    return [evaluated(i, score, "out of memory" if score is None else None) for i, score in enumerate(scores)]


@pytest.mark.parametrize("rule", SELECTIONS.values(), ids=SELECTIONS.keys())
@given(scores=outcomes, keep=st.integers(1, 4), data=st.data())
def test_no_rule_heeds_the_order_of_arrival_or_lets_a_failure_win(rule, scores, keep, data):
    evaluations = failed_where_none(scores)
    winners = rule(data.draw(st.permutations(evaluations)), keep)
    assert winners == rule(evaluations, keep)
    assert all(winner.ok for winner in winners)
    assert len(winners) == min(keep, sum(score is not None for score in scores))


@given(scores=outcomes, data=st.data())
def test_the_highest_score_wins_and_on_a_tie_the_lowest_index(scores, data):
    highest = max(score for score in scores if score is not None)
    winner, *_ = best(data.draw(st.permutations(failed_where_none(scores))))
    assert winner.candidate.index == scores.index(highest)


def test_the_first_random_masks_win_whatever_their_scores_and_the_magnitude_mask_only_without_them():
    noise = Noise(exponent=5.0, sampling_ratio=1e-4)
    pool = [evaluated(0, 9.0), evaluated(1, error="died"), evaluated(2, -3.0), evaluated(3, 5.0)]
    random = [found.candidate.model_copy(update={"noise": noise if found.candidate.index else None}) for found in pool]
    pool = [found.model_copy(update={"candidate": drawn}) for found, drawn in zip(pool, random, strict=True)]
    assert [found.candidate.index for found in first(pool[::-1], 3)] == [2, 3, 0]


def test_a_failure_never_wins_even_with_a_score():
    assert best([evaluated(0, 9.0, "died later"), evaluated(1, -9.0)])[0].candidate.index == 1


def test_an_evaluation_without_a_score_never_wins():
    assert best([evaluated(0), evaluated(1, -9.0)])[0].candidate.index == 1


@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("indices", [(0, 1), (1, 0)], ids=["first", "last"])
def test_a_score_that_is_not_finite_never_wins(score, indices):
    strange, sound = indices
    evaluations = [evaluated(strange, score), evaluated(sound, -9.0)]
    assert best(evaluations)[0].candidate.index == sound
    assert best(evaluations[::-1])[0].candidate.index == sound


def test_when_all_failed_the_message_says_where_how_many_and_why():
    evaluations = [evaluated(2, error="out of memory"), evaluated(1, error="loss is nan")]
    with pytest.raises(UserError) as raised:
        best(evaluations)
    message = str(raised.value)
    assert message.startswith("level 3: all 2 candidates failed; the first one said: loss is nan.")
    assert "start in a new run directory" in message


def test_when_no_score_is_finite_there_is_no_winner():
    with pytest.raises(UserError, match="level 3: all 2 candidates failed"):
        best([evaluated(0, float("nan")), evaluated(1, float("nan"))])
