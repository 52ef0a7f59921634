"""Small records and tensors of a level, as a search would write them."""

from __future__ import annotations

import numpy as np
import torch

from raymask.core.lineage import SEARCH
from raymask.core.masking.masks import digest, pack_bits
from raymask.core.records import Candidate, EvalPoint, Evaluation, FinetuneResult, LevelRecord
from raymask.core.tasks import Checkpoint
from raymask.core.tensors import pack
from raymask.runs.run_dir import RunDir


def evaluation(index: int) -> Evaluation:
    return Evaluation(candidate=Candidate(level=1, index=index, seed=index, density=0.5), score=index / 3)


def checkpoint() -> Checkpoint:
    bits = pack_bits({"a": torch.tensor([[True, False, True]]), "b": torch.tensor([False])})
    return Checkpoint(
        weights=pack({"a": torch.tensor([[1.0, 0.0, 2.0]]), "b": torch.tensor([0.0])}),
        optimizer=pack({"step": torch.tensor(3.0), "exp_avg/a": torch.zeros(1, 3)}),
        mask=bits,
        digest=digest(bits),
        num_kept=2,
        num_prunable=4,
        finetune_result=FinetuneResult(
            curve=(EvalPoint(step=1, loss=0.5, metric=0.9),), best=0, started=0.0, seconds=1.0, worker="w"
        ),
        test_outputs=np.array([[0.25, -1.0]], np.float32),
    )


def write(store: RunDir, lineage: str = SEARCH, level: int = 1) -> LevelRecord:
    done = checkpoint()
    record = LevelRecord(
        level=level,
        density=0.5,
        num_kept=done.num_kept,
        num_prunable=done.num_prunable,
        winner=evaluation(0),
        num_evaluated=1,
        num_failed=0,
        gain=None,
        finetune_result=done.finetune_result,
        test_metrics={"accuracy": 0.5},
        digest=done.digest,
        parent_key="p",
        data_fingerprint="d",
    )
    return store.write_level(lineage, level, done, record)
