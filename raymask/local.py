"""How are the two seams served by this process alone, without Ray?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from raymask.core.records import Candidate, Checkpoint, Evaluate, Evaluation, FineTune, Settling, Snapshot, Watch
from raymask.train.worker import MACHINE_FAULTS, Job, Worker


@contextmanager
def workers(job: Job, watch: Watch) -> Iterator[tuple[Evaluate, FineTune]]:
    """One worker here: on the GPU when there is one and the spec does not say `gpus: 0`, else on the CPU."""
    device = "cuda" if torch.cuda.is_available() and job.spec.workers.gpus != 0 else "cpu"
    worker = Worker(job, device)

    def show(name: str, share: float) -> None:
        watch.running({name: share})

    def evaluate(snapshot: Snapshot, candidates: Sequence[Candidate]) -> Iterator[Evaluation]:
        for candidate in candidates:
            worker.tell = partial(show, candidate.name)
            try:
                yield worker.probe(snapshot, candidate)
            except MACHINE_FAULTS as error:  # there is no other machine to try
                yield Evaluation(candidate=candidate, error=f"out of memory: {error}", worker=worker.name)

    def fine_tune(work: Sequence[tuple[Snapshot, Settling]]) -> Iterator[tuple[int, Checkpoint]]:
        for index, (parent, settling) in enumerate(work):
            worker.tell = partial(show, settling.name)
            yield index, worker.settle(parent, settling)

    yield evaluate, fine_tune
