"""Allocations: shares of what a level keeps, to the weight, from level to level."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymask.core.masking.allocations import ALLOCATIONS, erk, global_allocation, uniform
from raymask.testing import check_allocation
from raymask.testing.masking import check_budgets, check_nested

shapes = st.dictionaries(
    st.text(max_size=3), st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=6
)
densities = st.floats(1e-3, 1.0)
BERT = {"query": (768, 768), "up": (3072, 768), "down": (768, 3072)}


@pytest.mark.parametrize("allocation", ALLOCATIONS.values(), ids=ALLOCATIONS.keys())
@given(shapes=shapes, density=densities)
def test_every_matrix_has_one_budget_and_together_they_keep_what_was_asked(allocation, shapes, density):
    check_budgets(allocation, shapes, density)


@pytest.mark.parametrize("allocation", ALLOCATIONS.values(), ids=ALLOCATIONS.keys())
@given(shapes=shapes, first=densities, second=densities)
def test_a_lower_density_gives_no_budget_more(allocation, shapes, first, second):
    check_nested(allocation, shapes, min(first, second), max(first, second))


@pytest.mark.parametrize("allocation", ALLOCATIONS.values(), ids=ALLOCATIONS.keys())
def test_every_allocation_keeps_the_rules(allocation):
    check_allocation(allocation)


@pytest.mark.parametrize("allocation", [uniform, erk])
@given(shapes=shapes, density=densities, data=st.data())
def test_the_order_of_matrices_does_not_matter(allocation, shapes, density, data):
    shuffled = dict(data.draw(st.permutations(list(shapes.items()))))
    assert allocation(shuffled, density) == pytest.approx(allocation(shapes, density))


@pytest.mark.parametrize("allocation", ALLOCATIONS.values(), ids=ALLOCATIONS.keys())
def test_no_matrices_have_no_budgets(allocation):
    assert allocation({}, 0.5) == {}


def test_erk_is_in_proportion_to_the_lines_over_the_entries():
    shares = erk(BERT, 1 / 16)
    assert shares["query",] / shares["up",] == pytest.approx((1536 / 768**2) / (3840 / (768 * 3072)))
    assert shares["up",] == shares["down",]


def test_erk_leaves_a_small_matrix_whole_and_the_others_pay_in_proportion():
    shares = erk({"small": (4, 4), "up": (64, 16), "square": (64, 64)}, 0.5)
    assert shares["small",] == 1.0
    assert shares["up",] / shares["square",] == pytest.approx((80 / 1024) / (128 / 4096))
    assert 16 + 1024 * shares["up",] + 4096 * shares["square",] == pytest.approx(0.5 * 5136)


def test_global_is_one_contest():
    assert global_allocation(BERT, 0.1) == {("query", "up", "down"): 0.1}
