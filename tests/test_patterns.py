"""Does a pattern keep exactly what it should, ties and odd shapes included?"""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raymask.core.patterns import PATTERNS, budget, nth_largest, unstructured
from raymask.core.scorers import magnitude

densities = st.floats(0.0, 1.0)
few_values = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]), max_size=60)  # ties are the rule
any_values = st.lists(st.floats(0.0, width=32, allow_nan=False, allow_infinity=False), max_size=60)


def slow_unstructured(scores, density):
    """The same choice made by sorting: the largest first, equal ones in memory order, zeros never."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: budget(len(scores), density)]
    return [i in order and scores[i] > 0 for i in range(len(scores))]


@given(st.one_of(few_values, any_values), densities)
def test_unstructured_agrees_with_a_sort(scores, density):
    mask = unstructured(torch.tensor(scores, dtype=torch.float32), density)
    assert mask.tolist() == slow_unstructured(scores, density)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
@given(st.one_of(few_values, any_values), densities)
def test_every_pattern_fills_its_budget_unless_zeros_forbid_it(pattern, scores, density):
    scores = torch.tensor(scores, dtype=torch.float32)
    mask = pattern(scores, density)
    assert mask.dtype == torch.bool
    assert mask.shape == scores.shape
    assert mask.sum() == min(budget(len(scores), density), int((scores > 0).sum()))
    assert not mask[scores == 0].any()


@given(few_values.filter(bool), st.data())
def test_nth_largest_agrees_with_a_sort(values, data):
    n = data.draw(st.integers(1, len(values)))
    assert nth_largest(torch.tensor(values), n) == sorted(values, reverse=True)[n - 1]


@given(seed=st.integers(0, 2**32), spread=st.sampled_from([3, 100, 10**6]), period=st.sampled_from([1, 64, 128]))
def test_nth_largest_of_a_large_tensor_is_exact_even_where_its_sample_misleads(seed, spread, period):
    rng = torch.Generator().manual_seed(seed)
    values = torch.randint(spread, (20_000,), generator=rng).float()
    values[::period] += spread * int(torch.randint(-1, 2, (), generator=rng))  # what is sampled lies elsewhere
    ranked = values.sort(descending=True).values
    for n in (1, 2, 1250, 10_000, 19_999, 20_000):
        assert nth_largest(values, n) == ranked[n - 1]


def test_ties_at_the_boundary_are_kept_from_the_front_in_memory_order():
    scores = torch.tensor([[1.0, 2.0, 1.0], [1.0, 3.0, 1.0]])
    assert unstructured(scores, 4 / 6).tolist() == [[True, True, True], [False, True, False]]


def test_ties_of_a_transposed_matrix_follow_its_own_rows():
    scores = torch.ones(2, 3).T
    assert unstructured(scores, 0.5).tolist() == [[True, True], [True, False], [False, False]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_count_is_exact_for_weights_of_every_float_type(gaussian, dtype):
    weight = gaussian(64, 48).to(dtype)
    mask = unstructured(magnitude(weight), 1 / 16)
    assert mask.sum() == 64 * 48 // 16
    assert weight.abs()[mask].min() >= weight.abs()[~mask].max()


def test_a_matrix_of_zeros_keeps_nothing():
    assert not unstructured(torch.zeros(7, 5), 0.5).any()


def test_a_row_of_zeros_stays_empty_while_the_others_fill_the_budget(gaussian):
    scores = gaussian(8, 10).abs()
    scores[3] = 0
    mask = unstructured(scores, 0.5)
    assert mask.sum() == 40
    assert not mask[3].any()


def test_where_zeros_leave_fewer_than_the_budget_all_that_live_are_kept(gaussian):
    scores = gaussian(10, 10).abs()
    scores[:, 2:] = 0
    assert torch.equal(unstructured(scores, 0.5), scores > 0)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_an_empty_tensor_has_an_empty_mask(shape):
    mask = unstructured(torch.zeros(shape), 0.5)
    assert mask.shape == shape
    assert mask.dtype == torch.bool


def test_a_vector_a_cube_and_a_number_are_matrices_like_any_other():
    assert unstructured(torch.tensor([3.0, 1.0, 2.0]), 2 / 3).tolist() == [True, False, True]
    assert unstructured(torch.arange(8.0).view(2, 2, 2), 0.5).tolist() == [
        [[False] * 2] * 2,
        [[True] * 2] * 2,
    ]
    assert unstructured(torch.tensor(2.0), 1.0).item() is True


def test_the_scores_are_left_alone(gaussian):
    scores = gaussian(9, 9).abs()
    before = scores.clone()
    unstructured(scores, 0.3)
    assert torch.equal(scores, before)


def test_a_matrix_of_more_than_16_million_entries_is_cut_exactly(gaussian):
    scores = gaussian(4100, 4100).abs()
    mask = unstructured(scores, 1 / 16)
    assert int(mask.sum()) == budget(4100 * 4100, 1 / 16) == 1_050_625
    assert scores[mask].min() > scores[~mask].max()


@given(st.integers(0, 2**20), st.integers(0, 100))
def test_a_density_written_in_percent_keeps_its_exact_share_rounded_down(entries, percent):
    exact = Fraction(percent, 100) * entries // 1
    assert budget(entries, percent / 100) == exact
    assert budget(entries, 1.0 - (100 - percent) / 100) == exact


@given(st.integers(0, 2**14), st.integers(0, 100))
def test_a_budget_forgives_float_error_where_the_share_is_a_whole_number(hundreds, percent):
    assert budget(100 * hundreds, percent / 100) == percent * hundreds
    assert budget(100 * hundreds, 1.0 - (100 - percent) / 100) == percent * hundreds


def test_a_tenth_of_thirty_is_three_however_it_was_computed():
    assert 30 * (1.0 - 0.9) < 3
    assert budget(30, 1.0 - 0.9) == budget(30, 0.1) == 3


def test_a_budget_is_never_over_for_the_matrices_of_a_large_language_model():
    assert budget(11008 * 4096, 0.22) == 9_919_528  # exactly 9919528.96
    assert budget(2**31, 0.3) == 644_245_094  # exactly 644245094.4
    assert budget(2**31 - 2, 0.5) == 2**30 - 1


@given(st.integers(0, 2**32), densities)
def test_a_budget_lies_between_nothing_and_everything(entries, density):
    assert 0 <= budget(entries, density) <= entries
    assert budget(entries, 0.0) == 0
    assert budget(entries, 1.0) == entries
