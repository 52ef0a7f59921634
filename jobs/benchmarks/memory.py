"""Memory of one node's workers, and whether they share one copy of the parent."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from harness import Finding, options, run_halving, tell

from raymask.config import make_spec
from raymask.core.callbacks import Callback
from raymask.core.masking.noise import Noise
from raymask.core.records import Candidate
from raymask.core.tasks import Snapshot
from raymask.core.tensors import pack
from raymask.driver.setup import prepare
from raymask.executor import ray_executor
from raymask.train.context import WorkerContext
from raymask.train.model import ModelInfo, build_model, inspect_model, state_tensors

SMALL = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
MB = 1e6
SLACK = 0.05  # of the parent that the store may take beyond it: the job, pages that are not full


@dataclass(frozen=True)
class Memory:
    """Bytes in proportional set size: of the workers without the store, and of the store, once for the node."""

    workers: int
    store: int

    @property
    def whole(self) -> int:
        return self.workers + self.store


def bert(count: int, changes: dict[str, int]) -> tuple[WorkerContext, int]:
    """A job for `count` workers, a few steps on a few rows with a BERT of this shape; and its parameters."""
    from transformers import BertConfig

    spec = make_spec(
        {
            "model": "quickstart",
            "task": {"name": "quickstart", "validation_rows": 8},
            "early_eval": {"epochs": 0.01, "batch_size": 8, "eval_steps": 2},
            "distill": False,
            "workers": {"count": count, "cpus": 1 / count, "gpus": 0},
        }
    )
    search_setup = prepare(spec)
    source = inspect_model(spec.model, BertConfig(**changes), search_setup.dataset.classes)
    # It asks for the least memory that a worker can: all are to fit here, and what they take is the question.
    return WorkerContext(spec, of_size(source, 0), search_setup.context.data), source.sizes.whole


def of_size(model: ModelInfo, parameters: int) -> ModelInfo:
    """The model as if it had so many parameters, from which a worker's memory is estimated."""
    return replace(model, sizes=replace(model.sizes, whole=parameters))


def parent_of(config: Any) -> Snapshot:
    """Random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Snapshot("parent", pack(state_tensors(build_model(config))))


def measure(job: WorkerContext, parent: Snapshot) -> Memory:
    """On a Ray of their own, when every worker has evaluated at least one candidate."""
    count = job.spec.workers.count or 1
    seen: set[str] = set()
    pool = [
        Candidate(level=1, index=index, seed=index, density=0.5, noise=Noise(exponent=5.0, sampling_ratio=3e-4))
        for index in range(count)
    ]
    with ray_executor.RayExecutor(job, Callback(), None) as executor:
        while len(seen) < count:
            for found in run_halving(executor, parent, pool):
                assert found.ok, found.error
                seen.add(found.worker)
        return look()


def look() -> Memory:
    """The workers among this process's children, and the store as all who map it share it."""
    workers = store = 0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):  # it may just have ended
            share = proportional(process.pid)
            store += share["Pss_Shmem"]
            if process.name().startswith("ray::WorkerActor"):
                workers += share["Pss"] - share["Pss_Shmem"]
    return Memory(workers, store)


def proportional(pid: int) -> dict[str, int]:
    """Bytes by the names of smaps_rollup."""
    lines = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]]
    return {name.rstrip(":"): 1024 * int(value) for name, value, _ in lines}


def report(counts: list[int], changes: dict[str, int]) -> None:
    """A finding for each number of workers, and one for what a further one takes."""
    found: dict[int, Memory] = {}
    for count in counts:
        job, parameters = bert(count, changes)
        parent = parent_of(job.config)
        size = parent.weights.buffer.nbytes
        found[count] = measure(job, parent)
        tell_parent(count, found[count], size, parameters)
    asked = replace(job, model=of_size(job.model, parameters)).peak_host_memory(on_gpu=False)
    tell_growth(found[counts[0]], found[counts[-1]], counts[-1] - counts[0], size, asked)


def tell_parent(count: int, found: Memory, size: int, parameters: int) -> None:
    """What of the workers' memory is the parent, whose weights are `size` bytes."""
    what = f"a parent of {parameters / 1e6:.0f} M parameters in a node's memory, workers that have used it: {count}"
    note = (
        f"PSS of the object store, counted once; with the workers it is {found.whole / MB:,.0f} MB, the parent alone "
        f"{size / MB:,.0f} MB"
    )
    met = found.store <= (1 + SLACK) * size
    copies = count * size
    tell(Finding(what, "a copy each", found.store / MB, copies / MB, "MB", copies / found.store, "one copy", met, note))


def tell_growth(first: Memory, last: Memory, workers: int, size: int, asked: int) -> None:
    """What each of `workers` more takes; it asks Ray for `asked` bytes."""
    grown, shared = (last.whole - first.whole) / workers, (last.store - first.store) / workers
    note = (
        f"Python, torch, its live model and what malloc keeps for its next early evaluation; "
        f"{shared / MB:,.0f} MB of the store. "
        f"A worker asks Ray for {asked / MB:,.0f} MB, for its peak"
    )
    met = shared <= SLACK * size
    theirs = grown + size
    what, bar = "memory of each further worker", "no parent in it"
    tell(Finding(what, "with a parent each", grown / MB, theirs / MB, "MB", theirs / grown, bar, met, note))


if __name__ == "__main__":
    quick = options(__doc__).quick
    report([1, 2] if quick else [1, 2, 3], SMALL if quick else {})
