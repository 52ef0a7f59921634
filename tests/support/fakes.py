"""Fakes of the two seams, by which the level loop runs without training anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from raymask.config import make_spec
from raymask.core.masks import digest, pack_bits
from raymask.core.records import Candidate, Checkpoint, Climb, Evaluation, FineTuned, Point, Settling, Snapshot
from raymask.core.tensors import pack
from raymask.driver.search import Plan, prepare, prune
from raymask.report.terminal import Silent
from raymask.store import RunDir

LEVELS = (0.5, 0.9)
BASE = {
    "model": "quickstart",
    "task": "quickstart",
    "levels": list(LEVELS),
    "candidates": {"count": 3},
    "dense": {"epochs": 1},
    "distill": False,
}


class Killed(BaseException):
    """The driver ends here, as by kill -9."""


def plan_of(**changes: object) -> Plan:
    return prepare(make_spec({**BASE, **changes}))


@dataclass
class Fakes:
    """Both seams, in a few lines: scores are given by candidate index, and everything asked for is written down.

    `metrics`: after fine-tuning, by the candidate's index; 0.5 where there is none.

    Level N starts at 10 N seconds, with candidate i at 10 N + i; fine-tunings follow from 10 N + 4. Each takes one.
    """

    plan: Plan
    scores: Sequence[float | None] = (0.1, 0.2, 0.4, 0.3)
    machine: bool = False
    metrics: Sequence[float] = ()
    lives: int = 10**6
    evaluated: list[tuple[str, Candidate]] = field(default_factory=list)
    tuned: list[tuple[Snapshot, Settling]] = field(default_factory=list)

    def spend_a_life(self) -> None:
        self.lives -= 1
        if self.lives < 0:
            raise Killed

    def evaluate(self, parents: Mapping[int, Snapshot], wanted: Callable[[], Iterable[Climb]]) -> Iterator[Evaluation]:
        """The least worthwhile first, which must make no difference."""
        while climbs := list(wanted()):
            self.spend_a_life()
            candidate, rung, order = climbs[-1].candidate, climbs[-1].rung, climbs[-1].order
            self.evaluated.append((parents[candidate.parent].key, candidate))
            score = self.scores[candidate.index]
            if score is None:
                yield Evaluation(candidate=candidate, rung=rung, order=order, error="it broke", machine=self.machine)
                continue
            losses = np.full(len(self.plan.job.data.select), 1 - score, np.float32)
            yield Evaluation(
                candidate=candidate,
                rung=rung,
                order=order,
                score=score,
                curve=(Point(step=1, loss=1 - score, metric=score),),
                row_losses=losses.tobytes(),
                distance=0.0,
                digest=f"{candidate.level}-{candidate.index}",
                started=10.0 * candidate.level + candidate.index,
                seconds=1.0,
                worker="fake/1 cpu",
            )

    def fine_tune(self, work: Sequence[tuple[Snapshot, Settling]]) -> Iterator[tuple[int, Checkpoint]]:
        for index, (parent, settling) in reversed(list(enumerate(work))):
            self.spend_a_life()
            self.tuned.append((parent, settling))
            index_of = settling.candidate.index
            metric = self.metrics[index_of] if index_of < len(self.metrics) else 0.5
            bits = pack_bits({"w": torch.arange(8) < 8 * settling.candidate.density})
            yield (
                index,
                Checkpoint(
                    weights=parent.weights,
                    optimizer=pack({"step": torch.tensor(float(len(self.tuned)))}),
                    mask=bits,
                    digest=digest(bits),
                    kept=4,
                    total=8,
                    finetuned=FineTuned(
                        curve=(Point(step=1, loss=0.5, metric=metric),),
                        best=0,
                        started=10.0 * settling.candidate.level + 4 + index,
                        seconds=1.0,
                        worker="fake/1 cpu",
                    ),
                    logits=np.zeros((len(self.plan.job.data.report), 2), np.float32),
                ),
            )

    def run(self, store: RunDir) -> None:
        if not store.has_work():
            store.write_spec(self.plan.recipe.spec)
        prune(self.plan, store, self.evaluate, self.fine_tune, Silent())
