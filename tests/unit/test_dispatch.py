"""Dispatch, scaling and waiting decisions against their definitions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raymask.executor.dispatch import (
    SharedTaskWait,
    Starvation,
    next_to_poll,
    num_workers_to_start,
    overdue,
    share_workers,
)

LIMITS = st.lists(st.integers(1, 16), max_size=12)


@given(LIMITS, st.integers(0, 40))
def test_every_task_in_line_gets_a_power_of_two_and_nobody_more_than_is_idle(limits: list[int], idle: int) -> None:
    counts = share_workers(limits, idle)
    assert len(counts) == min(len(limits), idle)
    assert sum(counts) <= idle
    for given_to, limit in zip(counts, limits, strict=False):
        assert 1 <= given_to <= limit
        assert given_to & (given_to - 1) == 0


@given(st.integers(1, 16), st.integers(1, 8), st.integers(0, 40))
def test_equal_tasks_share_evenly_to_a_power_of_two(limit: int, tasks: int, idle: int) -> None:
    counts = share_workers([limit] * tasks, idle)
    if idle >= tasks:
        fair = min(limit, idle // tasks)
        assert counts[0] * 2 > fair >= counts[0]
        assert counts == sorted(counts)  # what is left over goes to the later ones


def test_workers_are_shared_as_worked_out_by_hand() -> None:
    assert share_workers([4], 5) == [4]
    assert share_workers([4], 3) == [2]
    assert share_workers([4, 4], 5) == [2, 2]
    assert share_workers([1, 4], 5) == [1, 4]
    assert share_workers([1, 1, 1], 2) == [1, 1]
    assert share_workers([8], 0) == share_workers([], 3) == []


@given(LIMITS, st.integers(0, 20), st.integers(0, 20))
def test_no_more_workers_are_started_than_fit_or_have_work(limits: list[int], slots: int, workers: int) -> None:
    more = num_workers_to_start(limits, slots, workers)
    assert more >= 0
    assert more == 0 or workers + more == min(slots, sum(limits[:slots]))
    assert more > 0 or workers >= min(slots, sum(limits))


def test_a_deadline_has_passed_when_it_is_over() -> None:
    assert overdue({"a": 1.0, "b": 2.0, "c": 3.0}, 2.0) == {"a"}
    assert overdue({"a": 1.0, "b": 2.0}, 2.5) == {"a", "b"}


@given(st.integers(0, 30), st.integers(1, 9))
def test_all_running_tasks_are_asked_in_turn(tasks: int, limit: int) -> None:
    line = list(range(tasks))
    asked: list[int] = []
    for _ in range(-(-tasks // limit)):
        now, line = next_to_poll(line, [], limit)
        assert len(now) <= limit
        asked += now
    assert sorted(line) == list(range(tasks))
    assert set(asked) == set(range(tasks))
    assert all(asked.count(task) <= 1 + (tasks % limit > 0) for task in range(tasks))


def test_who_owes_an_answer_is_not_asked_again() -> None:
    assert next_to_poll([1, 2, 3, 4], [2], 3) == ([1, 3], [4, 1, 2, 3])


def test_shared_tasks_wait_for_workers_on_their_way_but_not_for_ever() -> None:
    wait = SharedTaskWait(limit=20.0)
    assert not wait.should_wait([1, 1], True, 0.0)
    assert not wait.should_wait([4], False, 0.0)
    assert wait.should_wait([1, 4], True, 0.0)
    assert wait.should_wait([4], True, 19.9)
    assert not wait.should_wait([4], True, 20.0)
    assert not wait.should_wait([4], False, 25.0)
    assert wait.should_wait([4], True, 30.0), "a new wait has its whole time"
    assert not wait.should_wait([], True, 31.0)


@given(st.lists(st.tuples(st.floats(0.1, 40.0), st.booleans()), max_size=30))
def test_starvation_is_warned_of_at_intervals_with_the_time_it_has_lasted(
    steps: list[tuple[float, bool]],
) -> None:
    starvation, now = Starvation(15.0, 0.0, 0.0), 0.0
    busy_at = warned_at = 0.0
    for step, busy in steps:
        now += step
        said = starvation.observe(busy, now)
        if busy:
            assert said is None
            busy_at = warned_at = now
        elif now - warned_at > 15.0:
            assert said == now - busy_at
            warned_at = now
        else:
            assert said is None
