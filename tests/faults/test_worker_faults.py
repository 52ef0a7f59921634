"""Workers that die, hang or do not start: what a search makes of it, with real processes on one private Ray."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from support.builders import run_halving, tiny_context, tiny_snapshot
from support.callbacks import (
    Killer,
    RecordingCallback,
    assert_same,
    by_place,
    pid_of,
    private_ray,
    wait_until,
    worker_pids,
)

from raymask.core.callbacks import Callback
from raymask.core.errors import UserError
from raymask.core.recipe import finetune_config, propose_candidates, resolve
from raymask.core.records import Candidate
from raymask.core.tasks import FinetuneTask, Snapshot
from raymask.executor import actor_pool, local_executor, ray_executor
from raymask.train.context import WorkerContext

import psutil  # isort: skip - Ray brings it along, so it is found once Ray is imported

EARLY_EVAL = {"epochs": 40.0, "eval_steps": 50}
JOB = tiny_context(early_eval=EARLY_EVAL)
STAGE = finetune_config(resolve(JOB.spec), 1).model_copy(update={"epochs": 40.0})
ONE = {"cpus": 0.5, "count": 1}

pytestmark = pytest.mark.usefixtures("one_cpu", "attentive")


@pytest.fixture(scope="module")
def one_cpu() -> Iterator[None]:
    with private_ray():
        yield


@pytest.fixture
def attentive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that looks more often, so that a short early evaluation has a middle."""
    monkeypatch.setattr(actor_pool, "POLL_INTERVAL_S", 0.05)


@pytest.fixture(scope="module")
def parent() -> Snapshot:
    return tiny_snapshot(JOB)


@pytest.fixture(scope="module")
def pool() -> tuple[Candidate, ...]:
    return propose_candidates(resolve(JOB.spec), 1)


@contextmanager
def hired(job: WorkerContext, callback: RecordingCallback) -> Iterator[ray_executor.RayExecutor]:
    """An executor on the Ray that runs already, when the workers of the test before are gone."""
    wait_until(lambda: not worker_pids())
    with ray_executor.RayExecutor(job, callback, None) as executor:
        yield executor


def test_a_worker_killed_in_the_middle_of_an_early_evaluation_is_replaced_on_every_rung(
    parent: Snapshot, pool: tuple[Candidate, ...]
) -> None:
    rungs = [0.5, 1.0]
    job = tiny_context(early_eval=EARLY_EVAL | {"rungs": rungs}, workers=ONE)
    with local_executor.LocalExecutor(job, Callback()) as executor:
        expected = by_place(run_halving(executor, parent, pool[:2], rungs))
    killer, found = Killer(), []
    with hired(job, killer) as executor:
        for evaluation in run_halving(executor, parent, pool[:2], rungs):
            found.append(evaluation)
            if evaluation.candidate.index == 1 and evaluation.rung == 0:
                killer.times = 2  # from here on it is on the next rung
    assert by_place(found) == expected
    assert len(killer.hit) == 2
    assert [note.partition(":")[0] for note in killer.troubles] == ["candidate 1"] * 2
    assert all(note.endswith("trying again elsewhere") for note in killer.troubles)


def test_a_candidate_whose_workers_die_again_and_again_is_recorded_and_the_others_go_on(
    parent: Snapshot, pool: tuple[Candidate, ...]
) -> None:
    killer = Killer(times=2)
    with hired(tiny_context(early_eval=EARLY_EVAL, workers=ONE | {"max_retries": 1}), killer) as executor:
        found = by_place(run_halving(executor, parent, pool[:3]))
    assert len(killer.hit) == 2
    assert [found[index, 0].ok for index in range(3)] == [True, False, True]
    assert "its workers failed 2 times; the last one: " in str(found[1, 0].error)


def test_a_hanging_candidate_is_ended_at_its_timeout_and_the_others_get_a_fresh_worker(
    parent: Snapshot, pool: tuple[Candidate, ...]
) -> None:
    killer = Killer(signal=signal.SIGSTOP)  # from here on the candidate makes no step any more
    job = tiny_context(early_eval=EARLY_EVAL, workers=ONE | {"timeout": 10})
    try:
        with hired(job, killer) as executor:
            found = {evaluation.candidate.index: evaluation for evaluation in run_halving(executor, parent, pool[:3])}
    finally:
        for pid in killer.hit:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGCONT)
    [stopped] = killer.hit
    assert found[1].error == "took longer than the timeout of 10 s (workers.timeout)"
    assert found[0].ok
    assert found[2].ok
    assert pid_of(found[0]) == stopped != pid_of(found[2])
    assert killer.troubles == []


def test_a_worker_killed_while_idle_is_nobody_s_fault_and_one_killed_in_a_fine_tuning_is_replaced(
    parent: Snapshot, pool: tuple[Candidate, ...]
) -> None:
    work = [(parent, FinetuneTask("IMP", pool[0], STAGE))]
    with local_executor.LocalExecutor(JOB, Callback()) as executor:
        expected = by_place(run_halving(executor, parent, pool[:1]))
        [(_, checkpoint)] = executor.finetune(work)
    killer = Killer(name="IMP")
    with hired(tiny_context(early_eval=EARLY_EVAL, workers=ONE), killer) as executor:
        list(run_halving(executor, parent, pool[:1]))
        [idle] = worker_pids()
        os.kill(idle, signal.SIGKILL)
        wait_until(lambda: idle not in worker_pids())
        assert by_place(run_halving(executor, parent, pool[:1])) == expected
        assert killer.troubles == []
        [(_, found)] = executor.finetune(work)
    assert len(killer.hit) == 1
    [note] = killer.troubles
    assert note.startswith("IMP: its worker was lost")
    assert_same(found, checkpoint)


def test_a_shared_fine_tuning_that_loses_a_member_is_done_again_by_fresh_workers(
    parent: Snapshot, pool: tuple[Candidate, ...]
) -> None:
    stage = STAGE.model_copy(update={"data_parallel": 2})
    work = [(parent, FinetuneTask("selected", pool[1], stage))]
    with local_executor.LocalExecutor(JOB, Callback()) as executor:
        [(_, expected)] = executor.finetune(work)
    killer = Killer(name="selected", together=1)
    with hired(tiny_context(early_eval=EARLY_EVAL, workers={"cpus": 0.5, "count": 2}), killer) as executor:
        [(_, found)] = executor.finetune(work)
    assert len(killer.hit) == 1
    assert [note.partition(":")[0] for note in killer.troubles] == ["selected"]
    assert len(found.finetune_result.helper_workers) == 1
    assert_same(found, expected)


def test_a_worker_of_several_processes_with_a_sharded_model_is_replaced_as_a_whole(
    parent: Snapshot, pool: tuple[Candidate, ...]
) -> None:
    """The same masks, and to rounding the same scores where nothing drops out."""
    plain = tiny_context(early_eval=EARLY_EVAL, workers={"cpus": 0.5, "count": 1, "fsdp": 2})
    config = copy.deepcopy(plain.config)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    job = replace(plain, model=replace(plain.model, config=config))
    with local_executor.LocalExecutor(job, Callback()) as executor:
        expected = by_place(run_halving(executor, parent, pool[:2]))
    killer = Killer(together=1)
    with hired(job, killer) as executor:
        found = by_place(run_halving(executor, parent, pool[:2]))
        stage = STAGE.model_copy(update={"epochs": 2.0})
        [(_, checkpoint)] = executor.finetune(
            [(parent, FinetuneTask("selected", pool[1], stage, expected[1, 0].digest))]
        )
    assert len(killer.hit) == 1
    assert [note.partition(":")[0] for note in killer.troubles] == ["candidate 1"]
    for place, evaluation in found.items():
        assert evaluation.ok
        assert evaluation.digest == expected[place].digest
        assert evaluation.score == pytest.approx(expected[place].score, rel=1e-2)
    assert checkpoint.digest == expected[1, 0].digest
    assert checkpoint.finetune_result.helper_workers == ()


def test_workers_that_cannot_start_end_the_search_with_the_last_reason(
    parent: Snapshot, pool: tuple[Candidate, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actor_pool, "MAX_FAILED_STARTS", 1)
    plain, ear = tiny_context(workers=ONE), RecordingCallback()
    nothing_known = replace(plain, model=replace(plain.model, config=dict))
    with (
        hired(nothing_known, ear) as executor,
        pytest.raises(UserError, match=r"1 workers in a row did not start; the last one said: TypeError: cannot set"),
    ):
        list(run_halving(executor, parent, pool))
    [note] = ear.troubles
    assert "TypeError: cannot set 'use_cache'" in note
