"""Schedules of levels: each falls to the sparsity that was asked for."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymask.core.schedules import SCHEDULES, cubic, linear


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@given(st.floats(0.01, 0.999), st.integers(1, 50))
def test_every_schedule_rises_strictly_to_exactly_the_final_sparsity(schedule, sparsity, steps):
    levels = schedule(sparsity, steps)
    assert len(levels) == steps
    assert levels[-1] == sparsity
    assert levels[0] > 0
    assert all(before < after for before, after in pairwise(levels))


def test_the_cubic_schedule_in_four_steps_is_the_reference_s_to_its_rounding():
    assert cubic(0.9375, 4) == pytest.approx((0.54, 0.83, 0.92, 0.9375), abs=0.01)
    assert cubic(0.8, 2) == pytest.approx((0.7, 0.8))


def test_the_linear_schedule_takes_equal_steps():
    assert linear(0.8, 4) == pytest.approx((0.2, 0.4, 0.6, 0.8))


@given(st.floats(0.01, 0.999), st.integers(2, 50))
def test_the_cubic_schedule_takes_less_with_every_level(sparsity, steps):
    levels = (0.0, *cubic(sparsity, steps))
    taken = [after - before for before, after in pairwise(levels)]
    assert taken == sorted(taken, reverse=True)
