"""Speed of two workers against one, for many candidates and for one fine-tuning."""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

from harness import Finding, options, run_halving, task, tell

from raymask.core.callbacks import Callback
from raymask.core.recipe import finetune_config, propose_candidates, resolve
from raymask.core.records import Candidate
from raymask.core.spec import Spec
from raymask.core.tasks import EvalTask, FinetuneTask, Snapshot
from raymask.driver.setup import prepare
from raymask.executor import ray_executor
from raymask.train.context import WorkerContext
from raymask.train.model import load_weights
from raymask.train.worker import Worker

WORKERS = 2


def job_of(
    chosen: Any, workers: int, candidates: int, epochs: float
) -> tuple[WorkerContext, Snapshot, tuple[Candidate, ...]]:
    """One level's candidates, a parent to start from, and the job for so many workers of one thread."""
    spec = Spec.model_validate(
        {
            "model": chosen.model,
            "task": task(chosen),
            "levels": [0.9375],
            "candidates": {"count": candidates - 1},
            "early_eval": {"epochs": epochs, "eval_steps": 10},
            "distill": False,
            "workers": {"cpus": 1.0, "count": workers},
        }
    )
    search_setup = prepare(spec)
    parent = Snapshot("parent", load_weights(spec.model, search_setup.model_info.config, 0, False))
    return search_setup.context, parent, propose_candidates(resolve(spec), 1)


def stage(chosen: Any, workers: int, candidates: int, epochs: float) -> float:
    """Seconds of a level's early evaluation on so many workers that have started and evaluated before."""
    job, parent, pool = job_of(chosen, workers, candidates, epochs)
    with ray_executor.RayExecutor(job, Callback(), None) as executor:
        list(run_halving(executor, parent, pool[:workers]))
        started = time.perf_counter()
        found = list(run_halving(executor, parent, pool))
        assert all(evaluation.ok for evaluation in found)
        return time.perf_counter() - started


def together(chosen: Any, workers: int, shards: int, epochs: float) -> float:
    """Seconds of one fine-tuning in batches of so many shards, on workers that have started and trained before."""
    job, parent, pool = job_of(chosen, workers, 2, epochs)
    whole = finetune_config(resolve(job.spec), 1).model_copy(update={"epochs": epochs, "data_parallel": shards})
    short = whole.model_copy(update={"epochs": epochs / 10})
    with ray_executor.RayExecutor(job, Callback(), None) as executor:
        list(executor.finetune([(parent, FinetuneTask("warm-up", pool[1], short))]))
        started = time.perf_counter()
        [(_, found)] = executor.finetune([(parent, FinetuneTask("fine-tuning", pool[1], whole))])
        assert len(found.finetune_result.helper_workers) == min(workers, shards) - 1
        return time.perf_counter() - started


def alone(chosen: Any, candidates: int, epochs: float, start: Any, seconds: Any) -> None:
    """The same work in a process that shares nothing with another."""
    job, parent, pool = job_of(chosen, 1, candidates, epochs)
    worker = Worker(job, "cpu")
    worker.evaluate(parent, EvalTask(pool[0]))
    start.wait()
    began = time.perf_counter()
    for candidate in pool:
        worker.evaluate(parent, EvalTask(candidate))
    seconds.put(time.perf_counter() - began)


def side_by_side(chosen: Any, processes: int, candidates: int, epochs: float) -> float:
    """Candidates a second of so many independent processes."""
    context = multiprocessing.get_context("spawn")
    start, seconds = context.Barrier(processes), context.Queue()
    running = [
        context.Process(target=alone, args=(chosen, candidates, epochs, start, seconds)) for _ in range(processes)
    ]
    for process in running:
        process.start()
    slowest = max(seconds.get() for _ in running)
    for process in running:
        process.join()
    return processes * candidates / slowest


if __name__ == "__main__":
    chosen = options(__doc__)
    candidates, epochs = (4, 0.05) if chosen.quick else (8, 0.3)
    one, two = (stage(chosen, workers, candidates, epochs) for workers in (1, WORKERS))
    bound = side_by_side(chosen, WORKERS, candidates // 2, epochs) / side_by_side(chosen, 1, candidates // 2, epochs)
    ratio = one / two
    note = f"{candidates} candidates of {epochs:g} epochs on MRPC, one thread each, workers started before; "
    note += f"processes that share nothing but the machine reach {bound:.2f} x"
    what = "candidate stage on 2 workers, MiniLM-L6"
    tell(Finding(what, "1 worker", two, one, "s", ratio, "1.85x", ratio >= 1.85, note))
    epochs *= 2
    whole, cut = (together(chosen, 1, shards, epochs) for shards in (1, WORKERS))
    both = together(chosen, WORKERS, WORKERS, epochs)
    note = (
        f"{epochs:g} epochs on MRPC in batches of 64, one thread each, workers started before, looks and predictions "
    )
    note += f"included; one worker with finetune.data_parallel: 2, which has the same result to the bit: {cut:.1f} s"
    what = "one fine-tuning on 2 workers, MiniLM-L6, finetune.data_parallel: 2"
    tell(Finding(what, "1 worker", both, whole, "s", whole / both, "states what it saves", both < whole, note))
