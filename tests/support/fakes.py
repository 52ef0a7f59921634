"""A fake executor, by which the level loop runs without training anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch

from raymask.config import make_spec
from raymask.core.callbacks import Callback
from raymask.core.masking.masks import digest, pack_bits
from raymask.core.records import Candidate, EvalPoint, Evaluation, FinetuneResult
from raymask.core.tasks import Checkpoint, EvalTask, FinetuneTask, Snapshot
from raymask.core.tensors import pack
from raymask.driver.search import LevelLoop
from raymask.driver.setup import SearchSetup, prepare
from raymask.runs.run_dir import RunDir

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


def setup_of(**changes: object) -> SearchSetup:
    return prepare(make_spec({**BASE, **changes}))


@dataclass
class Fakes:
    """An executor in a few lines: scores are given by candidate index, and everything asked for is written down.

    `metrics`: after fine-tuning, by the candidate's index; 0.5 where there is none.

    Level N starts at 10 N seconds, with candidate i at 10 N + i; fine-tunings follow from 10 N + 4. Each takes one.
    """

    search_setup: SearchSetup
    scores: Sequence[float | None] = (0.1, 0.2, 0.4, 0.3)
    machine: bool = False
    metrics: Sequence[float] = ()
    lives: int = 10**6
    evaluated: list[tuple[str, Candidate]] = field(default_factory=list)
    tuned: list[tuple[Snapshot, FinetuneTask]] = field(default_factory=list)

    def spend_a_life(self) -> None:
        self.lives -= 1
        if self.lives < 0:
            raise Killed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def cancel(self) -> None:
        pass

    def evaluate(self, parents: Mapping[int, Snapshot], tasks: Sequence[EvalTask]) -> Evaluation:
        """The least worthwhile first, which must make no difference."""
        self.spend_a_life()
        candidate, rung, order = tasks[-1].candidate, tasks[-1].rung, tasks[-1].repeat
        self.evaluated.append((parents[candidate.parent_branch].key, candidate))
        score = self.scores[candidate.index]
        if score is None:
            return Evaluation(
                candidate=candidate, rung=rung, repeat=order, error="it broke", system_failure=self.machine
            )
        losses = np.full(len(self.search_setup.context.data.validation), 1 - score, np.float32)
        return Evaluation(
            candidate=candidate,
            rung=rung,
            repeat=order,
            score=score,
            curve=(EvalPoint(step=1, loss=1 - score, metric=score),),
            row_losses=losses.tobytes(),
            distance=0.0,
            digest=f"{candidate.level}-{candidate.index}",
            started=10.0 * candidate.level + candidate.index,
            seconds=1.0,
            worker="fake/1 cpu",
        )

    def finetune(self, tasks: Sequence[tuple[Snapshot, FinetuneTask]]) -> Iterator[tuple[int, Checkpoint]]:
        for index, (parent, finetune_task) in reversed(list(enumerate(tasks))):
            self.spend_a_life()
            self.tuned.append((parent, finetune_task))
            index_of = finetune_task.candidate.index
            metric = self.metrics[index_of] if index_of < len(self.metrics) else 0.5
            bits = pack_bits({"w": torch.arange(8) < 8 * finetune_task.candidate.density})
            yield (
                index,
                Checkpoint(
                    weights=parent.weights,
                    optimizer=pack({"step": torch.tensor(float(len(self.tuned)))}),
                    mask=bits,
                    digest=digest(bits),
                    num_kept=4,
                    num_prunable=8,
                    finetune_result=FinetuneResult(
                        curve=(EvalPoint(step=1, loss=0.5, metric=metric),),
                        best=0,
                        started=10.0 * finetune_task.candidate.level + 4 + index,
                        seconds=1.0,
                        worker="fake/1 cpu",
                    ),
                    test_outputs=np.zeros((len(self.search_setup.context.data.test), 2), np.float32),
                ),
            )

    def run(self, store: RunDir) -> None:
        if not store.has_progress():
            store.write_spec(self.search_setup.recipe.spec)
        LevelLoop(self.search_setup, store, self, Callback()).run()
