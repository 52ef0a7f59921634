"""How are the two seams served by this process alone, without Ray?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from raymask.core.errors import UserError
from raymask.core.records import Checkpoint, Climb, Evaluate, Evaluation, FineTune, Place, Settling, Snapshot, Watch
from raymask.core.spec import Spec
from raymask.train.worker import Job, MachineFault, Worker


@contextmanager
def workers(job: Job, watch: Watch) -> Iterator[tuple[Evaluate, FineTune]]:
    """One worker here. There are no deadlines: a process cannot end itself and go on."""
    worker = Worker(job, device_for(job.spec))

    def show(name: str, share: float) -> None:
        watch.running({name: share})

    def evaluate(parents: Mapping[int, Snapshot], wanted: Callable[[], Iterable[Climb]]) -> Iterator[Evaluation]:
        paused: dict[Place, Snapshot | None] = {}
        while climb := next(iter(wanted()), None):
            candidate, rung, order = climb.candidate, climb.rung, climb.order
            worker.tell = partial(show, candidate.name)
            try:
                below = paused.pop(climb.below, None)
                evaluation, paused[climb.place] = worker.probe(parents[candidate.parent], climb, below)
            except MachineFault as error:  # there is no other machine to try
                evaluation = Evaluation(
                    candidate=candidate, rung=rung, order=order, error=str(error), machine=True, worker=worker.name
                )
            yield evaluation
            useful = {above.below for above in wanted()}
            paused = {place: state for place, state in paused.items() if place in useful}

    def fine_tune(work: Sequence[tuple[Snapshot, Settling]]) -> Iterator[tuple[int, Checkpoint]]:
        for index, (parent, settling) in enumerate(work):
            worker.tell = partial(show, settling.name)
            try:
                checkpoint = worker.settle(parent, settling)
                assert checkpoint is not None, "whoever is alone has it"
                yield index, checkpoint
            except MachineFault as error:
                raise UserError(f"{settling.name}: {error}. The same command goes on from here") from None

    yield evaluate, fine_tune


def device_for(spec: Spec) -> str:
    """The GPU when there is one and the spec does not say `gpus: 0`, else the CPU."""
    return "cuda" if torch.cuda.is_available() and spec.workers.gpus != 0 else "cpu"
