"""LocalExecutor serves all tasks from one process, without Ray, and without a trace in the caller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from support.builders import run_halving

from raymask.config import make_spec
from raymask.core.callbacks import Callback
from raymask.core.recipe import finetune_config, resolve
from raymask.core.records import Candidate, Evaluation
from raymask.core.tasks import EvalTask, FinetuneTask, Snapshot
from raymask.driver.setup import SearchSetup, prepare
from raymask.executor import local_executor
from raymask.train.failures import SystemFailure
from raymask.train.worker import Worker

SPEC = {
    "model": "quickstart",
    "task": "quickstart",
    "levels": [0.5],
    "candidates": {"count": 2, "sampling_ratios": [0.02]},
    "early_eval": {"epochs": 0.1, "batch_size": 32, "eval_steps": 5, "score_window": 2},
    "finetune": {"epochs": 0.1, "batch_size": 32},
    "distill": False,
    "precision": "fp32",
}


@dataclass
class RecordingCallback(Callback):
    """A Callback that writes down the progress it is told."""

    shares: dict[str, list[float]] = field(default_factory=dict)

    def on_progress(self, shares: Mapping[str, float]) -> None:
        for name, share in shares.items():
            self.shares.setdefault(name, []).append(share)


@pytest.fixture(scope="module")
def search_setup() -> SearchSetup:
    return prepare(make_spec(SPEC))


def result(evaluation: Evaluation) -> Evaluation:
    return evaluation.model_copy(update={"started": 0.0, "seconds": 0.0, "worker": ""})


def evaluate_all(
    search_setup: SearchSetup, parent: Snapshot, candidates: tuple[Candidate, ...]
) -> dict[int, Evaluation]:
    with local_executor.LocalExecutor(search_setup.context, Callback()) as executor:
        return {
            evaluation.candidate.index: result(evaluation) for evaluation in run_halving(executor, parent, candidates)
        }


def test_every_candidate_is_evaluated_once_and_the_order_does_not_matter(
    search_setup: SearchSetup, parent: Snapshot, pool: tuple[Candidate, ...]
) -> None:
    forwards = evaluate_all(search_setup, parent, pool)
    assert sorted(forwards) == [0, 1, 2]
    assert all(evaluation.ok for evaluation in forwards.values())
    assert evaluate_all(search_setup, parent, pool[::-1]) == forwards
    assert evaluate_all(search_setup, parent, pool[1:2]) == {1: forwards[1]}
    assert forwards[0].distance == 0.0
    assert len({evaluation.digest for evaluation in forwards.values()}) == 3


def test_what_was_scored_is_what_is_fine_tuned(
    search_setup: SearchSetup, parent: Snapshot, pool: tuple[Candidate, ...]
) -> None:
    config = finetune_config(resolve(search_setup.context.spec), 1)
    found = evaluate_all(search_setup, parent, pool)
    work = [
        (parent, FinetuneTask(candidate.name, candidate, config, found[candidate.index].digest)) for candidate in pool
    ]
    before = parent.weights.buffer.copy()
    with local_executor.LocalExecutor(search_setup.context, Callback()) as executor:
        tuned = dict(executor.finetune(work))
        again = dict(executor.finetune(work[::-1]))
    assert sorted(tuned) == [0, 1, 2]
    for index, checkpoint in tuned.items():
        assert checkpoint.digest == found[index].digest
        assert np.array_equal(checkpoint.weights.buffer, again[2 - index].weights.buffer)
        assert np.array_equal(checkpoint.test_outputs, again[2 - index].test_outputs)
    assert np.array_equal(parent.weights.buffer, before)


def test_results_arrive_while_others_are_still_to_come(
    search_setup: SearchSetup, parent: Snapshot, pool: tuple[Candidate, ...]
) -> None:
    ear = RecordingCallback()
    with local_executor.LocalExecutor(search_setup.context, ear) as executor:
        first = next(iter(run_halving(executor, parent, pool)))
    assert first.candidate == pool[0]
    assert set(ear.shares) == {"magnitude mask"}


def test_memory_that_runs_out_is_a_failed_record_and_the_others_go_on(
    search_setup: SearchSetup, parent: Snapshot, pool: tuple[Candidate, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate_all(search_setup, parent, pool)
    original = Worker.evaluate

    def hungry(self: Worker, parent: Snapshot, eval_task: EvalTask, paused: Snapshot | None) -> Any:
        if eval_task.candidate.index == 1:
            raise SystemFailure("out of memory: no room for 3 tensors")
        return original(self, parent, eval_task, paused)

    monkeypatch.setattr(Worker, "evaluate", hungry)
    found = evaluate_all(search_setup, parent, pool)
    assert found[1].error == "out of memory: no room for 3 tensors"
    assert found[1].score is None
    assert found[1].system_failure
    assert (found[0], found[2]) == (expected[0], expected[2])


def test_progress_is_told_and_rises_to_the_end(
    search_setup: SearchSetup, parent: Snapshot, pool: tuple[Candidate, ...]
) -> None:
    ear = RecordingCallback()
    config = finetune_config(resolve(search_setup.context.spec), 1)
    with local_executor.LocalExecutor(search_setup.context, ear) as executor:
        list(run_halving(executor, parent, pool))
        list(executor.finetune([(parent, FinetuneTask("raymask (candidate 1)", pool[1], config, None))]))
    assert list(ear.shares) == ["magnitude mask", "candidate 1", "candidate 2", "raymask (candidate 1)"]
    for told in ear.shares.values():
        assert told == sorted(told)
        assert len(set(told)) > 2
        assert told[-1] == 1.0


def test_the_callers_threads_and_random_numbers_are_untouched(
    search_setup: SearchSetup, parent: Snapshot, pool: tuple[Candidate, ...]
) -> None:
    config = finetune_config(resolve(search_setup.context.spec), 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()
        with local_executor.LocalExecutor(search_setup.context, Callback()) as executor:
            for evaluation in run_halving(executor, parent, pool):
                assert "1 threads" in evaluation.worker
                assert torch.get_num_threads() == 3
            list(executor.finetune([(parent, FinetuneTask("magnitude mask", pool[0], config, None))]))
        assert torch.get_num_threads() == 3
        assert torch.equal(torch.get_rng_state(), state)
        assert np.array_equal(np.random.get_state()[1], legacy)
    finally:
        torch.set_num_threads(threads)


def test_what_a_callback_raises_is_not_the_candidate_s_failure(
    search_setup: SearchSetup, parent: Snapshot, pool: tuple[Candidate, ...]
) -> None:
    class Broken(Callback):
        def on_progress(self, shares: Mapping[str, float]) -> None:
            raise ZeroDivisionError("in a callback")

    with (
        local_executor.LocalExecutor(search_setup.context, Broken()) as executor,
        pytest.raises(ZeroDivisionError, match="in a callback"),
    ):
        executor.evaluate({1: parent}, [EvalTask(pool[0])])
