"""The worker pool on a simulated Ray: retries, timeouts, dispatch, scaling and starvation in milliseconds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain, repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError
from support.callbacks import RecordingCallback
from support.fake_ray import FakeRay, Ref, Task

from raymask.core.errors import UserError
from raymask.executor import actor_pool
from raymask.train.failures import SystemFailure


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as found:
        yield found


def fake(patch: pytest.MonkeyPatch, *cpus: int, start_seconds: float = 1.0) -> FakeRay:
    ray = FakeRay(cpus, start_seconds)
    ray.install(patch)
    return ray


def failed(outcome: object) -> str:
    assert isinstance(outcome, actor_pool.TaskFailed)
    return outcome.reason


def test_tasks_are_dispatched_in_their_order_to_as_many_workers_as_there_is_room_for(patch: pytest.MonkeyPatch) -> None:
    ray = fake(patch, 2, 1)
    pool = ray.pool()
    results = ray.run(pool, [Task(key) for key in range(7)])
    assert results == dict.fromkeys(range(7), "done")
    assert ray.order == list(range(7))
    assert ray.most == 3
    pool.close()
    assert ray.living() == 0


@pytest.mark.parametrize("count", [1, 2])
def test_no_more_workers_than_asked_for(patch: pytest.MonkeyPatch, count: int) -> None:
    ray = fake(patch, 4)
    ray.run(ray.pool(count=count), [Task(key) for key in range(5)])
    assert ray.most == count


def test_workers_are_kept_for_the_next_round_and_dead_ones_are_nobody_s_fault(patch: pytest.MonkeyPatch) -> None:
    ray, ear = fake(patch, 2), RecordingCallback()
    pool = ray.pool(ear)
    ray.run(pool, [Task(0), Task(1)])
    assert ray.run(pool, [Task(2), Task(3)]) == {2: "done", 3: "done"}
    assert len(ray.actors) == 2
    ray.actors[0].die()
    assert ray.run(pool, [Task(4), Task(5)]) == {4: "done", 5: "done"}
    assert len(ray.actors) == 3
    assert ear.troubles == []


@pytest.mark.parametrize(
    "error", [RayActorError(), ObjectLostError("", None, ""), OutOfMemoryError("full"), SystemFailure("x")]
)
@pytest.mark.parametrize("retries", [0, 2])
def test_a_system_failure_is_retried_on_a_fresh_worker_as_often_as_asked(
    patch: pytest.MonkeyPatch, error: Exception, retries: int
) -> None:
    ray, ear = fake(patch, 1), RecordingCallback()
    pool = ray.pool(ear, max_retries=retries)
    results = ray.run(pool, [Task("good"), Task("bad", outcomes=(error,)), Task("last")])
    assert results["good"] == results["last"] == "done"
    assert failed(results["bad"]).startswith(f"its workers failed {retries + 1} times; the last one: ")
    assert ray.attempts["bad"] == retries + 1
    assert ray.order == ["good", *["bad"] * (retries + 1), "last"], "it is tried again before what comes after it"
    assert len(ray.actors) == retries + 2
    assert [note.partition(":")[0] for note in ear.troubles] == ["task bad"] * retries


def test_what_succeeds_at_the_last_attempt_has_succeeded(patch: pytest.MonkeyPatch) -> None:
    ray = fake(patch, 1)
    lost = RayActorError()
    assert ray.run(ray.pool(max_retries=2), [Task(0, outcomes=(lost, lost, "done"))]) == {0: "done"}


def test_failures_are_counted_by_task(patch: pytest.MonkeyPatch) -> None:
    ray = fake(patch, 1)
    tasks = [Task(key, outcomes=(RayActorError(), "done")) for key in range(4)]
    assert ray.run(ray.pool(max_retries=1), tasks) == dict.fromkeys(range(4), "done")


def test_failures_are_counted_anew_in_every_phase(patch: pytest.MonkeyPatch) -> None:
    ray = fake(patch, 1)
    pool = ray.pool(max_retries=1)
    for _ in range(3):
        ray.attempts.clear()
        assert ray.run(pool, [Task(0, outcomes=(RayActorError(), "done"))]) == {0: "done"}


def test_tasks_that_no_one_waits_for_end_with_their_phase(patch: pytest.MonkeyPatch) -> None:
    ray = fake(patch, 2)
    pool = ray.pool()
    assert pool.next_result([ray.call(Task(0)), ray.call(Task(1, seconds=99.0))]) == (0, "done")
    assert ray.living() == 2
    pool.cancel()
    assert ray.living() == 1
    assert ray.run(pool, [Task(1)]) == {1: "done"}


def test_workers_that_are_still_starting_end_with_the_pool(patch: pytest.MonkeyPatch) -> None:
    ray = fake(patch, 1, start_seconds=9.0)
    pool = ray.pool()
    ray.at(9.1, ray.add_node)
    ray.run(pool, [Task(0), Task(1)])
    assert len(pool.starting) == 1
    pool.close()
    assert ray.living() == 0


def test_an_error_of_the_task_s_own_code_ends_the_round_and_its_workers(patch: pytest.MonkeyPatch) -> None:
    ray = fake(patch, 2)
    pool = ray.pool()
    with pytest.raises(UserError, match="a mistake"):
        ray.run(pool, [Task(0, outcomes=(UserError("a mistake"),)), Task(1, seconds=9.0)])
    assert ray.attempts[0] == 1
    pool.close()
    assert ray.living() == 0


def test_what_is_past_its_timeout_is_ended_recorded_and_not_retried(patch: pytest.MonkeyPatch) -> None:
    ray, ear = fake(patch, 1), RecordingCallback()
    pool = ray.pool(ear)
    results = ray.run(pool, [Task("slow", seconds=1e6, timeout=10.0), Task("quick", timeout=10.0)])
    assert failed(results["slow"]) == "took longer than the timeout of 10 s (workers.timeout)"
    assert results["quick"] == "done"
    assert ray.attempts["slow"] == 1
    assert ray.now < 10.0 + 2 * (1.0 + 2 * actor_pool.POLL_INTERVAL_S) + 1.0
    assert len(ray.actors) == 2
    assert ear.troubles == []


def test_a_retry_has_its_whole_time_again(patch: pytest.MonkeyPatch) -> None:
    ray = fake(patch, 1)
    task = Task(0, seconds=8.0, timeout=10.0, outcomes=(RayActorError(), "done"))
    assert ray.run(ray.pool(), [task]) == {0: "done"}


def test_every_task_has_its_own_timeout(patch: pytest.MonkeyPatch) -> None:
    ray = fake(patch, 2)
    results = ray.run(ray.pool(), [Task(key, seconds=100.0, timeout=5.0) for key in range(3)])
    assert {failed(outcome) for outcome in results.values()} == {
        "took longer than the timeout of 5 s (workers.timeout)"
    }


def test_a_lost_node_s_tasks_are_done_elsewhere_and_a_late_node_gets_work(patch: pytest.MonkeyPatch) -> None:
    ray, ear = fake(patch, 1, 1), RecordingCallback()
    ray.at(5.5, lambda: ray.lose_node(1))
    ray.at(20.0, ray.add_node)
    results = ray.run(ray.pool(ear), [Task(key, seconds=2.0) for key in range(20)])
    assert results == dict.fromkeys(range(20), "done")
    assert len(ear.troubles) == 1
    assert any(actor.node == 2 and actor.refs for actor in ray.actors)
    assert ray.now < 1.0 + 20 * 2.0 * 0.8, "the late node did no work"


def test_no_room_for_any_worker_is_refused_at_once_unless_the_cluster_grows(patch: pytest.MonkeyPatch) -> None:
    ray, ear = fake(patch), RecordingCallback()
    with pytest.raises(UserError, match=r"no node can hold a worker: one asks for 1 CPUs.*workers\.scale_up_timeout"):
        ray.pool()
    ray.at(40.0, ray.add_node)
    assert ray.run(ray.pool(ear, scale_up_timeout=60.0), [Task(0), Task(1)]) == {0: "done", 1: "done"}
    waiting = [note for note in ear.notes if note.startswith("waiting for the cluster")]
    assert [round(float(note.split()[5]), -1) for note in waiting] == [20.0, 30.0]
    assert not any(actor.alive for actor, _ in ray.unplaced), "what has not started only makes the cluster grow"


def test_a_cluster_that_does_not_grow_is_waited_for_as_long_as_asked(patch: pytest.MonkeyPatch) -> None:
    ray = fake(patch)
    pool = ray.pool(scale_up_timeout=50.0)
    with pytest.raises(UserError, match="no node can hold a worker"):
        ray.run(pool, [Task(0)])
    assert 50.0 < ray.now < 50.0 + 2 * actor_pool.NO_WORKER_WARNING_S


def test_nodes_that_a_search_once_had_may_come_back(patch: pytest.MonkeyPatch) -> None:
    ray = fake(patch, 1)
    ray.at(3.0, lambda: ray.lose_node(0))
    ray.at(250.0, ray.add_node)
    assert ray.run(ray.pool(), [Task(key, seconds=5.0) for key in range(2)]) == {0: "done", 1: "done"}
    ray.at(ray.now + 1.0, lambda: ray.lose_node(0))
    ray.at(ray.now + 1.0, lambda: ray.lose_node(1))
    ray.cpus = {9: 1}
    pool = ray.pool()
    ray.cpus = {}
    with pytest.raises(UserError, match="no node can hold a worker"):
        ray.run(pool, [Task(2)])


def test_workers_that_cannot_start_end_the_search_with_the_last_reason(patch: pytest.MonkeyPatch) -> None:
    ray, ear = fake(patch, 1), RecordingCallback()
    ray.start_errors = repeat(ValueError("no such module"))
    with pytest.raises(UserError, match=r"5 workers in a row did not start; the last one said: no such module\. Is "):
        ray.run(ray.pool(ear), [Task(0)])
    assert len(ear.troubles) == len(ray.actors) == actor_pool.MAX_FAILED_STARTS


def test_failed_starts_count_in_a_row_only(patch: pytest.MonkeyPatch) -> None:
    ray = fake(patch, 1)
    ray.start_errors = iter([ValueError("busy")] * (actor_pool.MAX_FAILED_STARTS - 1))
    pool = ray.pool()
    for key in range(3):
        assert ray.run(pool, [Task(key, outcomes=(RayActorError(), "done"))]) == {key: "done"}
        ray.start_errors = iter([ValueError("busy")] * (actor_pool.MAX_FAILED_STARTS - 1))


def test_a_start_that_succeeds_ends_the_row_of_failed_starts_even_if_the_worker_does_nothing(
    patch: pytest.MonkeyPatch,
) -> None:
    ray, lost = fake(patch, 1), RayActorError()
    errors = [ValueError("busy")] * (actor_pool.MAX_FAILED_STARTS - 1)
    ray.start_errors = iter([*errors, None, *errors, None])
    assert ray.run(ray.pool(), [Task(0, outcomes=(lost, "done"))]) == {0: "done"}


def test_a_task_that_succeeds_ends_the_row_of_failed_starts(patch: pytest.MonkeyPatch) -> None:
    ray, ear = fake(patch, 2), RecordingCallback()
    errors = [ValueError("busy")] * (actor_pool.MAX_FAILED_STARTS - 1)
    ray.start_errors = iter([None, *errors, *errors])
    tasks = [Task(key, seconds=3.0) for key in range(8)]
    assert ray.run(ray.pool(ear), tasks) == dict.fromkeys(range(8), "done")
    assert len(ear.troubles) == len(errors) * 2


def test_idle_workers_share_a_task_and_all_end_with_it(patch: pytest.MonkeyPatch) -> None:
    ray = fake(patch, 5)
    pool = ray.pool()
    assert ray.run(pool, [Task(0, max_workers=4)]) == {0: "done"}
    assert ray.most == 4, "a shared task waits for all the workers that it can have"
    ray.run(pool, [Task(1, max_workers=4), Task(2, max_workers=4)])
    assert len(pool.idle) + len(pool.pinged) == ray.living()


def test_a_shared_task_that_loses_a_helper_is_done_again_by_fresh_workers(patch: pytest.MonkeyPatch) -> None:
    ray, ear = fake(patch, 2), RecordingCallback()
    ray.at(5.0, lambda: ray.actors[0].die())
    assert ray.run(ray.pool(ear), [Task(0, seconds=10.0, max_workers=2)]) == {0: "done"}
    assert ray.attempts[0] == 2
    assert len(ear.troubles) == 1
    assert not ray.actors[1].alive, "its partner would wait for it for ever"


def test_one_task_s_timeout_leaves_the_others_alone(patch: pytest.MonkeyPatch) -> None:
    ray, ear = fake(patch, 2), RecordingCallback()
    tasks = [Task("slow", seconds=1e6, timeout=5.0), Task("long", seconds=20.0, timeout=30.0)]
    assert ray.run(ray.pool(ear), tasks)["long"] == "done"
    assert ray.attempts["long"] == 1
    assert ear.troubles == []


def test_a_worker_that_finished_while_it_was_being_ended_has_done_its_work_and_is_not_used_again(
    patch: pytest.MonkeyPatch,
) -> None:
    ray = fake(patch, 1)
    pool, actor = ray.pool(), ray.start(None, None)
    for timed_out, kept in ((True, []), (False, [actor])):
        running = actor_pool.RunningTask(ray.call(Task(0)), [actor], 0.0, timed_out=timed_out)
        pool.running = {0: running}
        assert pool.on_task_done(running, Ref(0, "done", True)) == (0, "done")
        assert pool.idle == kept


def test_weights_are_put_again_when_an_object_was_lost(patch: pytest.MonkeyPatch) -> None:
    ray = fake(patch, 1)
    pool = ray.pool()
    pool.object_refs = {1: "weights"}
    ray.run(pool, [Task(0, outcomes=(RayActorError(), "done"))])
    assert pool.object_refs == {1: "weights"}, "what is not lost is not put again"
    ray.run(pool, [Task(1, outcomes=(ObjectLostError("", None, ""), "done"))])
    assert pool.object_refs == {}


def test_a_node_that_joins_gets_a_worker_which_is_kept_though_it_came_too_late(patch: pytest.MonkeyPatch) -> None:
    ray = fake(patch, 1, start_seconds=9.0)
    pool = ray.pool()
    ray.at(9.1, ray.add_node)
    ray.run(pool, [Task(0), Task(1)])
    assert len(ray.actors) == ray.living() == 2
    assert len(pool.starting) == 1
    before = ray.now
    ray.run(pool, [Task(2, seconds=20.0), Task(3, seconds=20.0)])
    assert len(ray.actors) == 2
    assert ray.now - before < 35.0, "the late worker did no work"


def test_on_a_cluster_that_grows_all_open_tasks_ask_for_a_worker(patch: pytest.MonkeyPatch) -> None:
    ray = fake(patch, 1)
    ray.run(ray.pool(scale_up_timeout=60.0), [Task(key, seconds=3.0) for key in range(3)])
    assert len(ray.actors) == 3


def test_workers_that_are_lost_with_their_node_while_they_start_are_no_failed_starts(patch: pytest.MonkeyPatch) -> None:
    ray = fake(patch, 1)
    ray.start_errors = iter([RayActorError()] * 2 * actor_pool.MAX_FAILED_STARTS)
    assert ray.run(ray.pool(), [Task(0)]) == {0: "done"}


def test_an_idle_worker_that_does_not_answer_any_more_is_replaced(patch: pytest.MonkeyPatch) -> None:
    ray, ear = fake(patch, 1), RecordingCallback()
    pool = ray.pool(ear)
    ray.run(pool, [Task(0)])
    ray.actors[0].hangs = True
    began = ray.now
    assert ray.run(pool, [Task(1)]) == {1: "done"}
    assert ray.now - began < actor_pool.ACTOR_PING_TIMEOUT_S + 10.0
    assert not ray.actors[0].alive


def test_whoever_has_not_answered_yet_ends_with_the_pool_too(patch: pytest.MonkeyPatch) -> None:
    ray = fake(patch, 2)
    pool = ray.pool()
    ray.run(pool, [Task(0), Task(1)])
    ray.actors[0].hangs = True
    ray.run(pool, [Task(2)])
    pool.close()
    assert ray.living() == 0


def test_a_lost_connection_to_ray_is_told_as_what_it_is(patch: pytest.MonkeyPatch) -> None:
    ray = fake(patch, 1)

    def gone(*_: object, **__: object) -> None:
        raise OSError("broken pipe")  # as Ray raises it: without a number

    patch.setattr(ray, "wait", gone)
    with pytest.raises(UserError, match=r"this machine's Ray node is gone \(broken pipe\).*goes on from here"):
        ray.run(ray.pool(), [Task(0)])


def test_an_oserror_of_the_machine_is_not_called_a_lost_connection(patch: pytest.MonkeyPatch) -> None:
    ray = fake(patch, 1)
    with pytest.raises(OSError, match="disk full"):
        ray.run(ray.pool(), [Task(0, outcomes=(OSError(28, "disk full"),))])


def test_a_helper_s_own_error_ends_the_round(patch: pytest.MonkeyPatch) -> None:
    ray = fake(patch, 2)
    pool = ray.pool()
    with pytest.raises(UserError, match="a mistake"):
        ray.run(pool, [Task(0, seconds=9.0, max_workers=2, helper_error=UserError("a mistake"))])
    assert ray.now < 9.0
    pool.close()
    assert ray.living() == 0


def test_progress_is_asked_for_and_told(patch: pytest.MonkeyPatch) -> None:
    ray, ear = fake(patch, 1), RecordingCallback()
    ray.run(ray.pool(ear), [Task(0, seconds=5.0)])
    assert {"task 0": 0.5} in ear.shares


def test_told_progress_never_falls_back(patch: pytest.MonkeyPatch) -> None:
    """A worker that is done with it, and has not been heard, says zero."""
    ray, ear = fake(patch, 1), RecordingCallback()
    ray.progress = chain([0.25, 0.5], repeat(0.0))
    ray.run(ray.pool(ear), [Task(0, seconds=9.0)])
    told = [shares["task 0"] for shares in ear.shares if shares]
    assert told == sorted(told)
    assert told[-1] == 0.5


@given(
    cpus=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    tasks=st.lists(st.tuples(st.floats(0.1, 30.0), st.sampled_from([1, 1, 2, 4])), min_size=1, max_size=12),
    retries=st.integers(0, 3),
    timeout=st.sampled_from([5.0, 1e9]),
    seed=st.integers(0, 10**6),
    faults=st.integers(0, 12),
)
def test_whatever_is_lost_every_task_ends_once_within_its_retries_and_nothing_is_left(
    cpus: list[int], tasks: list[tuple[float, int]], retries: int, timeout: float, seed: int, faults: int
) -> None:
    """Workers and nodes die and nodes join at any time; one node is never lost."""
    dice = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        ray, ear = fake(patch, *cpus), RecordingCallback()

        def disturb() -> None:
            kind = dice.choice(["worker", "worker", "node", "late node"])
            if kind == "worker" and ray.actors:
                dice.choice(ray.actors).die()
            elif kind == "node" and len(ray.cpus) > 1:
                ray.lose_node(max(ray.cpus))
            elif kind == "late node":
                ray.add_node()

        for _ in range(faults):
            ray.at(dice.uniform(0.0, 60.0), disturb)
        pool = ray.pool(ear, max_retries=retries)
        wanted = [Task(key, seconds, timeout=timeout, max_workers=most) for key, (seconds, most) in enumerate(tasks)]
        results = ray.run(pool, wanted)
        pool.close()
    assert sorted(results) == list(range(len(tasks)))
    for task in wanted:
        outcome, attempts = results[task.key], ray.attempts[task.key]
        assert 1 <= attempts <= retries + 1
        if outcome == "done":
            assert task.seconds <= timeout + 2 * actor_pool.POLL_INTERVAL_S
        elif "timeout" in failed(outcome):
            assert task.seconds > timeout
        else:
            assert attempts == retries + 1
            assert f"its workers failed {attempts} times" in failed(outcome)
    retried = sum(attempts - 1 for attempts in ray.attempts.values())
    assert sum("trying again elsewhere" in note for note in ear.notes) == retried
    assert ray.living() == 0
    assert not pool.running
    assert pool.pending.keys() == pool.starting.keys() | pool.pinged.keys()
