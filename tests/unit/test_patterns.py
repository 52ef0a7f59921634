"""Patterns: what they keep, ties and odd shapes included."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.selections import largest, unstructured

from raymask.core.masking.patterns import PATTERNS, Pattern, kth_largest, num_kept, parse_pattern, topk_mask
from raymask.core.masking.scorers import magnitude
from raymask.testing import check_pattern

densities = st.floats(0.0, 1.0)
few_values = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]), max_size=60)  # ties are the rule
any_values = st.lists(st.floats(0.0, width=32, allow_nan=False, allow_infinity=False), max_size=60)


def slow_unstructured(scores, density):
    """The same choice made by sorting: the largest first, equal ones in memory order, zeros never."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: num_kept(len(scores), density)]
    return [i in order and scores[i] > 0 for i in range(len(scores))]


@given(st.one_of(few_values, any_values), densities)
def test_unstructured_agrees_with_a_sort(scores, density):
    mask = unstructured(torch.tensor(scores, dtype=torch.float32), density)
    assert mask.tolist() == slow_unstructured(scores, density)


EXAMPLES = {
    r"unstructured": ["unstructured"],
    r"n:([2-9]|[1-9]\d+)": ["n:2", "n:4", "n:12"],
    r"([1-9]\d*)x([1-9]\d*)": ["1x1", "2x3", "4x4", "12x1"],
}
NAMES = [name for examples in EXAMPLES.values() for name in examples]


def test_every_way_to_write_a_pattern_has_examples_here():
    assert EXAMPLES.keys() == PATTERNS.keys()


@st.composite
def tied_matrices(draw):
    """float32 scores, 12 x 24, full of ties and of zeros: every pattern here fits."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.randint(draw(st.integers(1, 5)), (12, 24), generator=rng).float()


def squares(pattern, shape):
    """Flat indices of every element's weights, in the order of `to_groups`: `[n_groups, n_elements, n_weights]`."""
    (rows, columns), (height, width) = pattern.block, shape
    grid = torch.arange(height * width).view(shape)
    parts = [part for band in grid.split(rows) for part in band.split(columns, 1)]
    return torch.stack([part.reshape(-1) for part in parts]).view(-1, pattern.group or len(parts), rows * columns)


@pytest.mark.parametrize("name", NAMES)
@given(scores=tied_matrices(), density=densities)
def test_every_pattern_keeps_what_a_sort_of_its_contestants_keeps(name, scores, density):
    pattern = parse_pattern(name)
    mask = largest(pattern, scores, density)
    assert (mask.dtype, mask.shape) == (torch.bool, scores.shape)
    for group in squares(pattern, scores.shape):
        sums = scores.view(-1)[group].sum(1)
        kept = mask.view(-1)[group]
        assert torch.equal(kept.all(1), kept.any(1)), "a block is kept or pruned as one"
        assert kept.all(1).tolist() == slow_unstructured(sums.tolist(), density)


@pytest.mark.parametrize("name", NAMES)
def test_every_pattern_keeps_the_rules(name):
    check_pattern(parse_pattern(name))


@pytest.mark.parametrize(
    ("name", "shape", "fits"),
    [
        ("unstructured", (3, 5), True),
        ("unstructured", (), True),
        ("n:4", (3, 8), True),
        ("n:4", (4, 6), False),
        ("n:4", (8,), True),
        ("4x2", (8, 6), True),
        ("4x2", (6, 6), False),
        ("4x2", (8, 5), False),
        ("4x2", (8,), False),
    ],
)
def test_a_pattern_fits_matrices_that_it_divides(name, shape, fits):
    assert parse_pattern(name).divides(shape) is fits


def test_neighbours_compete_along_the_input_dimension():
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0, 9.0, 8.0, 7.0, 6.0]])
    columns = scores.view(4, 2)
    assert largest(parse_pattern("n:4"), scores, 0.5).int().tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]]
    assert largest(parse_pattern("n:4"), scores, 0.25).int().tolist() == [[0, 0, 0, 1, 1, 0, 0, 0]]
    assert largest(parse_pattern("n:2"), columns, 0.5).int().tolist() == [
        [0, 1],
        [0, 1],
        [1, 0],
        [1, 0],
    ]


def test_the_name_of_a_pattern_says_its_numbers():
    assert parse_pattern("unstructured") == Pattern()
    assert parse_pattern("n:16") == Pattern(group=16)
    assert parse_pattern("16x1") == Pattern(block=(16, 1))


@pytest.mark.parametrize(("name", "size", "level"), [("2:4", 4, "0.5"), ("1:4", 4, "0.75"), ("4:8", 8, "0.5")])
def test_a_pattern_with_its_n_is_answered_with_what_to_write(name, size, level):
    with pytest.raises(
        ValueError, match=f"^{name} is written n:{size}, and the levels say how many of {size} are"
    ) as it:
        parse_pattern(name)
    assert str(it.value).endswith(f"kept: levels: [{level}]")


@pytest.mark.parametrize("name", ["", "n:1", "n:0", "n:m", "4x", "0x4", "4x4x4", "diagonal", "2:0"])
def test_an_unknown_pattern_is_answered_with_the_known_ones(name):
    with pytest.raises(
        ValueError, match=r"^no pattern is called '.*'; known are unstructured, n:M such as n:4, and RxC"
    ):
        parse_pattern(name)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32), st.data())
def test_many_groups_are_selected_as_each_by_itself(n_groups, n_elements, seed, data):
    scores = torch.randint(4, (n_groups, n_elements), generator=torch.Generator().manual_seed(seed)).float()
    k = data.draw(st.integers(0, n_elements))
    assert torch.equal(topk_mask(scores, k), torch.cat([topk_mask(group[None], k) for group in scores]))


@given(few_values.filter(bool), st.data())
def test_nth_largest_agrees_with_a_sort(values, data):
    n = data.draw(st.integers(1, len(values)))
    assert kth_largest(torch.tensor([values]), n) == sorted(values, reverse=True)[n - 1]


@given(seed=st.integers(0, 2**32), spread=st.sampled_from([3, 100, 10**6]), period=st.sampled_from([1, 64, 128]))
def test_nth_largest_of_a_large_tensor_is_exact_even_where_its_sample_misleads(seed, spread, period):
    rng = torch.Generator().manual_seed(seed)
    values = torch.randint(spread, (20_000,), generator=rng).float()
    values[::period] += spread * int(torch.randint(-1, 2, (), generator=rng))  # what is sampled lies elsewhere
    ranked = values.sort(descending=True).values
    for n in (1, 2, 1250, 10_000, 19_999, 20_000):
        assert kth_largest(values[None], n) == ranked[n - 1]


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
    assert int(mask.sum()) == num_kept(4100 * 4100, 1 / 16) == 1_050_625
    assert scores[mask].min() > scores[~mask].max()


@given(st.integers(0, 2**20), st.integers(0, 100))
def test_a_density_written_in_percent_keeps_its_exact_share_rounded_down(entries, percent):
    exact = Fraction(percent, 100) * entries // 1
    assert num_kept(entries, percent / 100) == exact
    assert num_kept(entries, 1.0 - (100 - percent) / 100) == exact


@given(st.integers(0, 2**14), st.integers(0, 100))
def test_a_budget_forgives_float_error_where_the_share_is_a_whole_number(hundreds, percent):
    assert num_kept(100 * hundreds, percent / 100) == percent * hundreds
    assert num_kept(100 * hundreds, 1.0 - (100 - percent) / 100) == percent * hundreds


def test_a_tenth_of_thirty_is_three_however_it_was_computed():
    assert 30 * (1.0 - 0.9) < 3
    assert num_kept(30, 1.0 - 0.9) == num_kept(30, 0.1) == 3


def test_a_budget_is_never_over_for_the_matrices_of_a_large_language_model():
    assert num_kept(11008 * 4096, 0.22) == 9_919_528  # exactly 9919528.96
    assert num_kept(2**31, 0.3) == 644_245_094  # exactly 644245094.4
    assert num_kept(2**31 - 2, 0.5) == 2**30 - 1


@given(st.integers(0, 2**32), densities)
def test_a_budget_lies_between_nothing_and_everything(entries, density):
    assert 0 <= num_kept(entries, density) <= entries
    assert num_kept(entries, 0.0) == 0
    assert num_kept(entries, 1.0) == entries
