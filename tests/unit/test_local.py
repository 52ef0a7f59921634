"""Are the two seams served by one process, without Ray, and without a trace in the caller?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from support.builders import climbed

from raymask.config import make_spec
from raymask.core.recipe import finetune_stage, resolve
from raymask.core.records import Candidate, Climb, Evaluation, Settling, Snapshot
from raymask.driver import local
from raymask.driver.search import Plan, prepare
from raymask.report.terminal import Silent
from raymask.train.worker import MachineFault, Worker

SPEC = {
    "model": "quickstart",
    "task": "quickstart",
    "levels": [0.5],
    "candidates": {"count": 2, "ratios": [0.02]},
    "probe": {"epochs": 0.1, "batch_size": 32, "eval_every": 5, "last": 2},
    "finetune": {"epochs": 0.1, "batch_size": 32},
    "distill": False,
    "precision": "fp32",
}


@dataclass
class Ear(Silent):
    """A Watch that writes down the progress it is told."""

    shares: dict[str, list[float]] = field(default_factory=dict)

    def running(self, shares: Mapping[str, float]) -> None:
        for name, share in shares.items():
            self.shares.setdefault(name, []).append(share)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return prepare(make_spec(SPEC))


def result(evaluation: Evaluation) -> Evaluation:
    return evaluation.model_copy(update={"started": 0.0, "seconds": 0.0, "worker": ""})


def evaluate_all(plan: Plan, parent: Snapshot, candidates: tuple[Candidate, ...]) -> dict[int, Evaluation]:
    with local.workers(plan.job, Silent()) as (evaluate, _):
        return {evaluation.candidate.index: result(evaluation) for evaluation in climbed(evaluate, parent, candidates)}


def test_every_candidate_is_evaluated_once_and_the_order_does_not_matter(
    plan: Plan, parent: Snapshot, pool: tuple[Candidate, ...]
) -> None:
    forwards = evaluate_all(plan, parent, pool)
    assert sorted(forwards) == [0, 1, 2]
    assert all(evaluation.ok for evaluation in forwards.values())
    assert evaluate_all(plan, parent, pool[::-1]) == forwards
    assert evaluate_all(plan, parent, pool[1:2]) == {1: forwards[1]}
    assert forwards[0].distance == 0.0
    assert len({evaluation.digest for evaluation in forwards.values()}) == 3


def test_what_was_scored_is_what_is_fine_tuned(plan: Plan, parent: Snapshot, pool: tuple[Candidate, ...]) -> None:
    stage = finetune_stage(resolve(plan.job.spec), 1)
    found = evaluate_all(plan, parent, pool)
    work = [(parent, Settling(candidate.name, candidate, stage, found[candidate.index].digest)) for candidate in pool]
    before = parent.weights.buffer.copy()
    with local.workers(plan.job, Silent()) as (_, fine_tune):
        tuned = dict(fine_tune(work))
        again = dict(fine_tune(work[::-1]))
    assert sorted(tuned) == [0, 1, 2]
    for index, checkpoint in tuned.items():
        assert checkpoint.digest == found[index].digest
        assert np.array_equal(checkpoint.weights.buffer, again[2 - index].weights.buffer)
        assert np.array_equal(checkpoint.logits, again[2 - index].logits)
    assert np.array_equal(parent.weights.buffer, before)


def test_results_arrive_while_others_are_still_to_come(
    plan: Plan, parent: Snapshot, pool: tuple[Candidate, ...]
) -> None:
    ear = Ear()
    with local.workers(plan.job, ear) as (evaluate, _):
        first = next(iter(climbed(evaluate, parent, pool)))
    assert first.candidate == pool[0]
    assert set(ear.shares) == {"control"}


def test_memory_that_runs_out_is_a_failed_record_and_the_others_go_on(
    plan: Plan, parent: Snapshot, pool: tuple[Candidate, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate_all(plan, parent, pool)
    probe = Worker.probe

    def hungry(self: Worker, parent: Snapshot, climb: Climb, paused: Snapshot | None) -> Any:
        if climb.candidate.index == 1:
            raise MachineFault("out of memory: no room for 3 tensors")
        return probe(self, parent, climb, paused)

    monkeypatch.setattr(Worker, "probe", hungry)
    found = evaluate_all(plan, parent, pool)
    assert found[1].error == "out of memory: no room for 3 tensors"
    assert found[1].score is None
    assert found[1].machine
    assert (found[0], found[2]) == (expected[0], expected[2])


def test_progress_is_told_and_rises_to_the_end(plan: Plan, parent: Snapshot, pool: tuple[Candidate, ...]) -> None:
    ear = Ear()
    stage = finetune_stage(resolve(plan.job.spec), 1)
    with local.workers(plan.job, ear) as (evaluate, fine_tune):
        list(climbed(evaluate, parent, pool))
        list(fine_tune([(parent, Settling("selected (candidate 1)", pool[1], stage, None))]))
    assert list(ear.shares) == ["control", "candidate 1", "candidate 2", "selected (candidate 1)"]
    for told in ear.shares.values():
        assert told == sorted(told)
        assert len(set(told)) > 2
        assert told[-1] == 1.0


def test_the_callers_threads_and_random_numbers_are_untouched(
    plan: Plan, parent: Snapshot, pool: tuple[Candidate, ...]
) -> None:
    stage = finetune_stage(resolve(plan.job.spec), 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()
        with local.workers(plan.job, Silent()) as (evaluate, fine_tune):
            for evaluation in climbed(evaluate, parent, pool):
                assert "1 threads" in evaluation.worker
                assert torch.get_num_threads() == 3
            list(fine_tune([(parent, Settling("control", pool[0], stage, None))]))
        assert torch.get_num_threads() == 3
        assert torch.equal(torch.get_rng_state(), state)
        assert np.array_equal(np.random.get_state()[1], legacy)
    finally:
        torch.set_num_threads(threads)
