"""A real pre-trained model on a real task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import raymask
from raymask.data.metrics import compute_metrics

ROWS = 48


@pytest.fixture
def mrpc(glue: Path, tmp_path: Path) -> Path:
    """A few rows of the task, in the folder of a GLUE task."""
    folder = tmp_path / "glue"
    (folder / "mrpc").mkdir(parents=True)
    for split in ("train", "validation"):
        pq.write_table(pq.read_table(glue / "mrpc" / f"{split}.parquet")[:ROWS], folder / "mrpc" / f"{split}.parquet")
    return folder


@pytest.fixture
def two_layers(minilm: Path, tmp_path: Path) -> Path:
    """The first two of its six layers, which take a third of the time."""
    folder = tmp_path / "model"
    AutoModel.from_pretrained(minilm, num_hidden_layers=2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm).save_pretrained(folder)
    return folder


def test_minilm_on_mrpc_exports_what_it_reports(two_layers: Path, mrpc: Path, tmp_path: Path) -> None:
    """One level at 16x, a magnitude and a random mask, a step or two each; then the export, by transformers alone."""
    spec = {
        "model": str(two_layers),
        "task": {"name": "glue/mrpc", "folder": str(mrpc), "validation_rows": 16},
        "levels": [0.9375],
        "candidates": {"count": 1, "sampling_ratios": [3e-4]},
        "dense": {"epochs": 1, "distill_epochs": 0, "learning_rate": 1e-4},
        "early_eval": {"epochs": 0.5, "batch_size": 16},
        "finetune": {"epochs": 1, "learning_rate": 1e-4},
        "imp": {"run": False},
    }
    result = raymask.search(spec, tmp_path / "run", in_process=True)
    dense, selected = result.models
    assert set(dense.test_metrics) == {"accuracy", "f1"}
    assert selected.sparsity["prunable"] == pytest.approx(0.9375)
    assert 0.20 < selected.sparsity["whole"] < 0.23  # embeddings stay dense
    assert result.levels[0].num_evaluated == 2

    folder = tmp_path / "run" / "export"
    module = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    real, ours = AutoModel.from_pretrained(two_layers).embeddings, module.base_model.embeddings
    weights = real.word_embeddings.weight, ours.word_embeddings.weight
    assert torch.nn.functional.cosine_similarity(*weights).mean() > 0.99, "these are not the pre-trained weights"
    rows = pq.read_table(mrpc / "mrpc" / "validation.parquet").to_pydict()
    logits = []
    with torch.no_grad():
        for start in range(0, ROWS, 32):
            pair = (rows[name][start : start + 32] for name in ("sentence1", "sentence2"))
            batch = tokenizer(*pair, truncation=True, max_length=128, padding=True, return_tensors="pt")
            logits.append(module(**batch).logits.numpy())
    found = compute_metrics(("accuracy", "f1"), np.concatenate(logits), np.array(rows["label"]))
    assert found == pytest.approx(selected.test_metrics, abs=0.022)  # one row of 48 may fall on the other side
