"""Whole searches with everything that saves memory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.builders import reviews, tiny_model, write_table
from transformers import AutoModelForSequenceClassification

import raymask
from raymask.config import make_spec
from raymask.core.lineage import DENSE, SEARCH
from raymask.core.records import Result
from raymask.driver.setup import prepare
from raymask.runs.run_dir import RunDir
from raymask.train.losses import TASK_LOSSES
from raymask.train.trainer import Trainer


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a search of a tiny model."""
    folder = tmp_path_factory.mktemp("large")
    files = {}
    for split, rows in (("train", 100), ("test", 40)):
        texts, labels = reviews(rows)
        files[split] = str(write_table(folder / f"{split}.csv", {"text": texts, "label": labels}))
    return {
        "model": {"name": str(tiny_model(folder / "model")), "dtype": "bf16"},
        "task": files | {"text": "text", "label": "label"},
        "levels": [0.5, 0.75],
        "candidates": {"count": 2, "sampling_ratios": [0.02]},
        "dense": {"epochs": 1, "batch_size": 16, "learning_rate": 0.02},
        "early_eval": {"epochs": 1, "batch_size": 16, "max_rows": 10, "eval_steps": 1, "rungs": [0.5, 1.0]},
        "finetune": {"epochs": 1, "batch_size": 16},
        "imp": {"run": False},
        "distill": False,
        "optimizer": {"name": "adafactor"},
        "gradient_checkpointing": True,
    }


@pytest.fixture(scope="module")
def found(spec: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    run = tmp_path_factory.mktemp("large") / "run"
    return run, raymask.search(spec, run, in_process=True)


def test_every_file_is_in_bf16_and_zero_where_the_mask_prunes(found: tuple[Path, Result]) -> None:
    run, result = found
    store = RunDir(run)
    for level in (1, 2):
        weights, state = (store.read_tensors(SEARCH, level, f"{name}.safetensors") for name in ("model", "optimizer"))
        assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.bfloat16}
        assert {key.partition("/")[0] for key in state} == {"step", "row_var", "col_var", "variance"}
        assert sum(tensor.numel() for tensor in state.values()) < 0.2 * sum(w.numel() for w in weights.values())
        pruned = [weights[key.partition("/")[2]] for key in state if key.startswith("row_var/bert.encoder")]
        zeros = sum(int((weight == 0).sum()) for weight in pruned)
        assert zeros >= result.levels[level - 1].num_prunable - result.levels[level - 1].num_kept
    steps = [float(store.read_tensors(*place, "optimizer.safetensors")["step"]) for place in ((DENSE, 0), (SEARCH, 2))]
    assert 0 < steps[0] < steps[1]


def test_transformers_alone_loads_the_export_in_bf16_and_answers_alike(
    found: tuple[Path, Result], spec: dict[str, Any]
) -> None:
    run, _ = found
    saved = load_file(run / "export" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    module = AutoModelForSequenceClassification.from_pretrained(run / "export").eval()
    assert module.dtype == torch.bfloat16
    data = prepare(make_spec(spec)).context.data
    logits = Trainer(module, TASK_LOSSES[data.kind], data.padding).predict(data.test)
    assert np.array_equal(logits.numpy(), RunDir(run).read_logits(SEARCH, 2))
    assert len(logits.unique()) > 10


def test_a_search_that_was_ended_finds_the_same(
    found: tuple[Path, Result], spec: dict[str, Any], tmp_path: Path
) -> None:
    run, result = found
    shutil.copytree(run, tmp_path / "run")
    for name in ("result.json", "level-2/level.json"):
        (tmp_path / "run" / name).unlink()
    journal = tmp_path / "run" / "level-2" / "evaluations.jsonl"
    journal.write_text(journal.read_text().split("\n")[0] + "\n")
    again = raymask.search(spec, tmp_path / "run", in_process=True)
    assert again.levels[-1].digest == result.levels[-1].digest
    assert again.levels[-1].files == result.levels[-1].files
    assert again.models == result.models
