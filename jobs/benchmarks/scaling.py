"""How much faster are two workers than one, at many candidates and at one fine-tuning?"""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

from harness import Finding, climbed, options, task, tell

from raymask.core.recipe import finetune_stage, propose, resolve
from raymask.core.records import Candidate, Climb, Settling, Snapshot
from raymask.core.spec import Spec
from raymask.driver import remote
from raymask.driver.search import prepare
from raymask.report.terminal import Silent
from raymask.train.model import load_weights
from raymask.train.worker import Job, Worker

WORKERS = 2


def job_of(chosen: Any, workers: int, candidates: int, epochs: float) -> tuple[Job, Snapshot, tuple[Candidate, ...]]:
    """One level's candidates, a parent to start from, and the job for so many workers of one thread."""
    spec = Spec.model_validate(
        {
            "model": chosen.model,
            "task": task(chosen),
            "levels": [0.9375],
            "candidates": {"count": candidates - 1},
            "probe": {"epochs": epochs, "eval_every": 10},
            "distill": False,
            "workers": {"cpus": 1.0, "count": workers},
        }
    )
    plan = prepare(spec)
    parent = Snapshot("parent", load_weights(spec.model, plan.source.config, 0, False))
    return plan.job, parent, propose(resolve(spec), 1)


def stage(chosen: Any, workers: int, candidates: int, epochs: float) -> float:
    """Seconds of a level's early evaluation on so many workers that have started and evaluated before."""
    job, parent, pool = job_of(chosen, workers, candidates, epochs)
    with remote.workers(job, Silent(), None) as (evaluate, _):
        list(climbed(evaluate, parent, pool[:workers]))
        started = time.perf_counter()
        found = list(climbed(evaluate, parent, pool))
        assert all(evaluation.ok for evaluation in found)
        return time.perf_counter() - started


def together(chosen: Any, workers: int, shards: int, epochs: float) -> float:
    """Seconds of one fine-tuning in batches of so many shards, on workers that have started and trained before."""
    job, parent, pool = job_of(chosen, workers, 2, epochs)
    whole = finetune_stage(resolve(job.spec), 1).model_copy(update={"epochs": epochs, "shards": shards})
    short = whole.model_copy(update={"epochs": epochs / 10})
    with remote.workers(job, Silent(), None) as (_, fine_tune):
        list(fine_tune([(parent, Settling("warm-up", pool[1], short))]))
        started = time.perf_counter()
        [(_, found)] = fine_tune([(parent, Settling("fine-tuning", pool[1], whole))])
        assert len(found.finetuned.helpers) == min(workers, shards) - 1
        return time.perf_counter() - started


def alone(chosen: Any, candidates: int, epochs: float, start: Any, seconds: Any) -> None:
    """The same work in a process that shares nothing with another."""
    job, parent, pool = job_of(chosen, 1, candidates, epochs)
    worker = Worker(job, "cpu")
    worker.probe(parent, Climb(pool[0]))
    start.wait()
    began = time.perf_counter()
    for candidate in pool:
        worker.probe(parent, Climb(candidate))
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
    note += f"included; one worker with finetune.shards: 2, which has the same result to the bit: {cut:.1f} s"
    what = "one fine-tuning on 2 workers, MiniLM-L6, finetune.shards: 2"
    tell(Finding(what, "1 worker", both, whole, "s", whole / both, "states what it saves", both < whole, note))
