"""The driver's side of Ray without Ray: what the executor makes of the pool's results, and messages on a cluster."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator

import pytest
import ray
import torch
from ray.exceptions import ObjectLostError, OwnerDiedError, RayActorError
from support.builders import refused, run_halving, tiny_context, tiny_snapshot
from support.callbacks import RecordingCallback
from support.fake_ray import FakeRay

from raymask.core.callbacks import Callback
from raymask.core.errors import UserError
from raymask.core.recipe import finetune_config, propose_candidates, resolve
from raymask.core.records import Evaluation
from raymask.core.tasks import EvalTask, FinetuneTask, Snapshot
from raymask.core.tensors import pack
from raymask.executor import actor_pool, connection, local_executor, resources, worker_actor
from raymask.train.context import WorkerContext

RUNGS = [0.5, 1.0]


@pytest.fixture(scope="module")
def job() -> WorkerContext:
    return tiny_context(rows=(48, 400, 12))


@pytest.fixture(scope="module")
def parent(job: WorkerContext) -> Snapshot:
    return tiny_snapshot(job)


def fake(patch: pytest.MonkeyPatch, *cpus: int) -> FakeRay:
    ray = FakeRay(cpus)
    ray.install(patch)
    return ray


def test_an_early_evaluation_goes_on_where_it_paused(
    job: WorkerContext, parent: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated, pool = fake(monkeypatch, 1), propose_candidates(resolve(job.spec), 1)
    with simulated.executor(early_eval={"rungs": RUNGS}) as executor:
        evaluations = list(run_halving(executor, parent, pool, RUNGS))
    for place, below in zip(simulated.order, simulated.below, strict=True):
        index, rung, order = place
        assert below == ([("pause", (index, rung - 1, order))] if rung else [])
    assert {evaluation.rung for evaluation in evaluations} == {0, 1}


def test_pauses_of_which_no_candidate_can_make_use_are_forgotten(
    job: WorkerContext, parent: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is wanted on the next rung only later begins at its parent."""
    simulated, [candidate, other, *_] = fake(monkeypatch, 1), propose_candidates(resolve(job.spec), 1)
    with simulated.executor(early_eval={"rungs": RUNGS}) as executor:
        for eval_task in (EvalTask(candidate), EvalTask(other), EvalTask(candidate, 1)):
            executor.evaluate({1: parent}, [eval_task])
    assert simulated.below == [[], [], []]


def test_the_pause_of_an_evaluation_that_runs_is_kept_though_its_next_rung_is_not_wanted_yet(
    job: WorkerContext, parent: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated, [candidate, other, *_] = fake(monkeypatch, 2), propose_candidates(resolve(job.spec), 1)
    with simulated.executor(early_eval={"rungs": RUNGS}) as executor:
        executor.evaluate({1: parent}, [EvalTask(candidate), EvalTask(other)])
        executor.evaluate({1: parent}, [EvalTask(candidate, 1)])
        executor.evaluate({1: parent}, [EvalTask(candidate, 1), EvalTask(other, 1)])
        executor.evaluate({1: parent}, [EvalTask(other, 1)])
    assert [("pause", (other.index, 0, 0))] in simulated.below


def test_the_end_of_a_phase_ends_what_runs_and_forgets_its_pauses(
    job: WorkerContext, parent: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another level's candidates have the same numbers."""
    simulated, [candidate, other, *_] = fake(monkeypatch, 2), propose_candidates(resolve(job.spec), 1)
    [of_next_level, *_] = propose_candidates(resolve(job.spec), 2)
    with simulated.executor(early_eval={"rungs": RUNGS}) as executor:
        executor.evaluate({1: parent}, [EvalTask(candidate), EvalTask(other)])
        executor.cancel()
        assert simulated.living() == 1
        executor.evaluate({1: parent}, [EvalTask(of_next_level, 1)])
    assert simulated.below[-1] == []


def test_a_candidate_whose_machines_failed_is_recorded_as_the_machine_s_fault(
    job: WorkerContext, parent: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated, pool = fake(monkeypatch, 1), propose_candidates(resolve(job.spec), 1)
    fine = simulated.scored
    simulated.scored = lambda eval_task: RayActorError() if eval_task.candidate.index == 1 else fine(eval_task)
    with simulated.executor(workers={"max_retries": 1}) as executor:
        found = {evaluation.candidate.index: evaluation for evaluation in run_halving(executor, parent, pool)}
    assert [found[index].ok for index in sorted(found)] == [True, False, True, True]
    assert found[1].system_failure
    assert str(found[1].error).startswith("its workers failed 2 times; the last one: ")
    assert found[1].score is None
    assert simulated.living() == 0


def test_a_fine_tuning_that_may_not_be_repeated_ends_the_search_and_says_which(
    job: WorkerContext, parent: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated, [magnitude, *_] = fake(monkeypatch, 1), propose_candidates(resolve(job.spec), 1)
    simulated.finetuned = RayActorError()
    work = [(parent, FinetuneTask("IMP", magnitude, finetune_config(resolve(job.spec), 1)))]
    with (
        simulated.executor(workers={"max_retries": 0}) as executor,
        pytest.raises(UserError, match=r"IMP: its workers failed 1 times.*same command goes on from here"),
    ):
        list(executor.finetune(work))
    assert simulated.living() == 0


def test_a_worker_that_dies_between_two_phases_of_fine_tuning_is_no_failure(
    job: WorkerContext, parent: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated, [magnitude, *_] = fake(monkeypatch, 1), propose_candidates(resolve(job.spec), 1)
    work = [(parent, FinetuneTask("IMP", magnitude, finetune_config(resolve(job.spec), 1)))]
    callback = RecordingCallback()
    with simulated.executor(callback) as executor:
        list(executor.finetune(work))
        simulated.actors[0].die()
        assert list(executor.finetune(work)) == [(0, "checkpoint")]
    assert callback.troubles == []


@pytest.mark.parametrize(("epochs", "seconds", "ends"), [(0.1, 9.0, True), (3.0, 29.0, True), (3.0, 40.0, False)])
def test_a_fine_tuning_has_the_timeout_once_an_epoch(
    job: WorkerContext, parent: Snapshot, monkeypatch: pytest.MonkeyPatch, epochs: float, seconds: float, ends: bool
) -> None:
    simulated, [magnitude, *_] = fake(monkeypatch, 1), propose_candidates(resolve(job.spec), 1)
    simulated.finetune_seconds = seconds
    config = finetune_config(resolve(job.spec), 1).model_copy(update={"epochs": epochs})
    with simulated.executor(workers={"timeout": 10}) as executor:
        if ends:
            assert list(executor.finetune([(parent, FinetuneTask("x", magnitude, config))])) == [(0, "checkpoint")]
        else:
            told = refused(list, executor.finetune([(parent, FinetuneTask("x", magnitude, config))]))
            assert told.startswith("x: took longer than the timeout of 30 s (workers.timeout)")


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> Iterator[actor_pool.WorkerPool]:
    """A pool that only puts."""
    monkeypatch.setattr(ray, "put", lambda packed: f"a reference to {packed.index}")
    pool = object.__new__(actor_pool.WorkerPool)
    pool.callback, pool.object_refs = RecordingCallback(), {}
    return pool


def test_the_store_lets_go_of_weights_with_the_driver(shelf: actor_pool.WorkerPool) -> None:
    snapshot = Snapshot("first", pack({"w": torch.ones(3)}), pack({"step": torch.ones(())}))
    refs = shelf.put(snapshot)
    assert set(refs) == {"weights", "optimizer"}
    assert shelf.put(Snapshot("second", snapshot.weights)) == {"weights": refs["weights"]}
    assert len(shelf.object_refs) == 2
    del snapshot
    assert shelf.object_refs == {}


def test_what_the_store_has_is_not_put_again(shelf: actor_pool.WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    puts = Counter[int]()
    monkeypatch.setattr(ray, "put", lambda packed: puts.update([id(packed)]))
    snapshot = Snapshot("first", pack({"w": torch.ones(3)}), pack({"step": torch.ones(())}))
    for key in ("first", "second"):
        shelf.put(Snapshot(key, snapshot.weights, snapshot.optimizer))
    assert puts == {id(snapshot.weights): 1, id(snapshot.optimizer): 1}


def test_a_pause_that_is_lost_with_its_node_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(refs: list[object]) -> list[object]:
        for ref in refs:
            if isinstance(ref, Exception):
                raise ref
        return refs

    monkeypatch.setattr(ray, "get", get)
    assert worker_actor.get_if_alive([]) is None
    assert worker_actor.get_if_alive(["paused"]) == "paused"
    for lost in (ObjectLostError("0" * 56, None, ""), OwnerDiedError("0" * 56, None, "")):
        assert worker_actor.get_if_alive([lost]) is None


def test_what_travels_for_a_candidate_is_small(job: WorkerContext, parent: Snapshot) -> None:
    pool = propose_candidates(resolve(job.spec), 1)
    with local_executor.LocalExecutor(job, Callback()) as executor:
        evaluations: list[Evaluation] = list(run_halving(executor, parent, pool[:2]))
    assert all(len(ray.cloudpickle.dumps(candidate)) <= 2 * 2**10 for candidate in pool)
    assert all(len(ray.cloudpickle.dumps(evaluation)) <= 10 * 2**10 for evaluation in evaluations)


def test_memory_that_no_node_has_is_said_with_what_there_is() -> None:
    need = {"CPU": 1.0, "GPU": 0.0, "memory": 64 * 2.0**30}
    nodes = [{"CPU": 8.0, "memory": 2.0**34}, {"CPU": 4.0, "GPU": 1.0, "memory": 2.0**35}]
    said = refused(resources.require_capacity, need, nodes)
    assert "one asks for 1 CPUs, 0 GPUs, 64.0 GiB " in said
    assert "the nodes have 8 CPUs, 0 GPUs, 16.0" in said
    assert resources.num_worker_slots(need | {"memory": 2.0**33}, nodes) == 2 + 4


def test_half_a_cpu_makes_twice_as_many_workers() -> None:
    need = {"CPU": 0.5, "GPU": 0.0, "memory": 2.0**30}
    assert resources.num_worker_slots(need, [{"CPU": 2.0, "memory": 2.0**34}, {"CPU": 1.0, "memory": 2.0**34}]) == 6
    assert resources.num_worker_slots(need, [{"CPU": 2.0, "memory": 2.0**34}], group=3) == 1


def test_an_address_where_nothing_answers_is_an_error_that_names_it(job: WorkerContext) -> None:
    assert not ray.is_initialized()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        told = refused(connection.ray_connection(job, address).__enter__)  # Ray alone asks 20 times, for 14 minutes
    assert told.startswith(f"--address {address}: no Ray cluster answers there")


def test_of_many_busy_workers_a_few_are_asked_at_a_time_and_all_in_turn() -> None:
    asked_workers = Counter[int]()

    class Actor:
        def __init__(self, index: int) -> None:
            self.progress = self
            self.index = index

        def options(self, concurrency_group: str) -> Actor:
            return self

        def remote(self) -> object:
            asked_workers[self.index] += 1
            return object()

    pool = object.__new__(actor_pool.WorkerPool)
    pool.pending = {}
    tasks = [actor_pool.RemoteTask(index, "", 0.0, lambda actors: []) for index in range(20)]
    pool.running = {task.key: actor_pool.RunningTask(task, [Actor(task.key)], 0.0) for task in tasks}
    for _ in range(5):
        pool.poll_progress()
        for running in pool.running.values():
            running.is_polled = False  # all have answered
    assert dict(asked_workers) == dict.fromkeys(range(20), 2)
    pool.running[3].is_polled = True
    for _ in range(5):
        pool.poll_progress()
    assert asked_workers == Counter(dict.fromkeys(range(20), 3)) - Counter([3]), "who owes an answer is not asked again"
    assert set(pool.running) == set(range(20))
