"""Small records and tensors of a level, as a search would write them."""

from __future__ import annotations

import numpy as np
import torch

from raymask.core.masks import digest, pack_bits
from raymask.core.records import Candidate, Checkpoint, Evaluation, FineTuned, Level, Point
from raymask.core.tensors import pack
from raymask.store import SEARCH, RunDir


def evaluation(index: int) -> Evaluation:
    return Evaluation(candidate=Candidate(level=1, index=index, seed=index, density=0.5), score=index / 3)


def checkpoint() -> Checkpoint:
    bits = pack_bits({"a": torch.tensor([[True, False, True]]), "b": torch.tensor([False])})
    return Checkpoint(
        weights=pack({"a": torch.tensor([[1.0, 0.0, 2.0]]), "b": torch.tensor([0.0])}),
        optimizer=pack({"step": torch.tensor(3.0), "exp_avg/a": torch.zeros(1, 3)}),
        mask=bits,
        digest=digest(bits),
        kept=2,
        total=4,
        finetuned=FineTuned(curve=(Point(step=1, loss=0.5, metric=0.9),), best=0, started=0.0, seconds=1.0, worker="w"),
        logits=np.array([[0.25, -1.0]], np.float32),
    )


def write(store: RunDir, lineage: str = SEARCH, level: int = 1) -> Level:
    done = checkpoint()
    record = Level(
        level=level,
        density=0.5,
        kept=done.kept,
        total=done.total,
        winner=evaluation(0),
        evaluated=1,
        failed=0,
        gain=None,
        finetuned=done.finetuned,
        report={"accuracy": 0.5},
        digest=done.digest,
        parent="p",
        data="d",
    )
    return store.write_level(lineage, level, done, record)
