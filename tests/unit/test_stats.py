"""Bootstrap intervals and win probabilities."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from raymask.core.stats import bootstrap, paired_gain, spearman_interval, win_probabilities


@pytest.fixture(scope="module")
def losses():
    """A function (rows, seed) -> float32 losses of that many rows."""
    return lambda rows, seed: np.random.default_rng(seed).exponential(size=rows).astype(np.float32)


@settings(max_examples=10)
@given(st.integers(1, 200), st.integers(0, 2**63 - 1))
def test_equal_losses_are_within_noise(losses, rows, seed):
    interval = paired_gain(losses(rows, 0), losses(rows, 0), seed)
    assert (interval.mean, interval.low, interval.high) == (0.0, 0.0, 0.0)
    assert interval.within_noise


def test_a_lower_loss_of_the_winner_is_a_positive_gain(losses):
    baseline = losses(300, 0)
    interval = paired_gain(baseline, baseline - 0.1, 0)
    assert interval.mean == pytest.approx(0.1)
    assert interval.low > 0
    assert not interval.within_noise


def test_a_higher_loss_of_the_winner_is_a_negative_gain(losses):
    baseline = losses(300, 0)
    interval = paired_gain(baseline, baseline * 1.5, 0)
    assert interval.mean == pytest.approx(-0.5 * float(baseline.mean()), rel=1e-5)
    assert interval.high < 0
    assert not interval.within_noise


def test_the_mean_is_that_of_all_rows_in_double_precision():
    baseline = np.full(1000, 0.1, np.float32)
    interval = paired_gain(baseline, np.zeros(1000, np.float32), 0)
    assert interval.mean == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_rows_are_compared_in_pairs_not_as_two_heaps(losses):
    easy, hard = np.zeros(200, np.float32), np.full(200, 10.0, np.float32)
    baseline = np.concatenate([easy, hard])
    interval = paired_gain(baseline, baseline - losses(400, 1) * 0.01, 0)
    assert interval.low > 0


def test_the_same_seed_gives_the_same_interval_and_another_seed_another(losses):
    pair = losses(100, 0), losses(100, 1)
    assert paired_gain(*pair, seed=3) == paired_gain(*pair, seed=3)
    assert paired_gain(*pair, seed=3).low != paired_gain(*pair, seed=4).low


def test_the_interval_is_as_wide_as_normal_theory_says():
    values = np.random.default_rng(0).normal(size=400)
    interval = bootstrap(400, lambda rows: [float(values[rows].mean())], 0)[0]
    error = values.std() / 20
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_noise_is_called_noise_about_nineteen_times_in_twenty(losses):
    calls = [paired_gain(losses(100, 2 * n), losses(100, 2 * n + 1), n).within_noise for n in range(60)]
    assert 50 <= sum(calls) < 60


def test_any_measure_over_rows_can_be_compared():
    right = np.array([1, 1, 0, 1, 0, 1, 1, 1])
    interval = bootstrap(len(right), lambda rows: [float(np.median(right[rows]))], 0)[0]
    assert interval.mean == 1.0
    assert 0.0 <= interval.low <= interval.high == 1.0


# --- is the pick truly the best, and do two rankings agree? ----------------------------------------------------------


def test_a_clear_winner_is_sure_and_a_clear_loser_is_not(losses):
    pool = np.stack([losses(300, 0), losses(300, 0) - 0.5, losses(300, 0) + 0.5])
    assert win_probabilities(pool, 0).tolist() == [0.0, 1.0, 0.0]


def test_among_equals_the_confidence_is_shared(losses):
    pool = np.stack([losses(500, seed) for seed in range(2)])
    assert win_probabilities(pool, 0).sum() == pytest.approx(1.0)
    assert win_probabilities(np.stack([losses(9, 0)] * 2), 0).tolist() == [1.0, 1.0], "no other is below"


@given(st.lists(st.integers(-99, 99), min_size=3, max_size=9, unique=True), st.randoms())
@settings(max_examples=10, deadline=None)
def test_the_rank_correlation_is_scipys(early, rng):
    final = rng.sample(range(100), len(early))
    found = spearman_interval(np.array(early, float), np.array(final, float), 0)
    assert found.mean == pytest.approx(spearmanr(early, final).statistic)
    assert -1 <= found.low <= found.high <= 1
    assert spearman_interval(np.array(early), np.array(early) ** 3, 0).mean == pytest.approx(1.0)


def test_a_score_that_is_the_same_everywhere_says_nothing():
    assert spearman_interval(np.zeros(5), np.arange(5.0), 0).mean == 0.0
