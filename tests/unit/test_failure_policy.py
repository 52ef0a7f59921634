"""Failure policy: the whole table of decisions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymask.executor.failure_policy import Decision, Failure, FailurePolicy


@given(st.integers(0, 5), st.integers(1, 10))
def test_a_system_failure_is_retried_as_often_as_asked_and_then_recorded(retries: int, attempt: int) -> None:
    decision = FailurePolicy(retries, 5).decide(Failure(system=True, attempt=attempt))
    assert decision is (Decision.RETRY if attempt <= retries else Decision.RECORD)


@given(st.integers(0, 5), st.integers(1, 10), st.booleans())
def test_an_error_of_the_task_s_own_code_is_raised_at_once(retries: int, attempt: int, late: bool) -> None:
    assert FailurePolicy(retries, 5).decide(Failure(False, attempt, late)) is Decision.RAISE


@given(st.integers(0, 5), st.integers(0, 10))
def test_a_timeout_is_recorded_and_never_retried(retries: int, attempt: int) -> None:
    assert FailurePolicy(retries, 5).decide(Failure(True, attempt, timed_out=True)) is Decision.RECORD


@pytest.mark.parametrize(("failed", "decision"), [(1, Decision.RETRY), (4, Decision.RETRY), (5, Decision.RAISE)])
def test_workers_may_fail_to_start_a_few_times_in_a_row(failed: int, decision: Decision) -> None:
    assert FailurePolicy(0, 5).decide_start(failed) is decision
