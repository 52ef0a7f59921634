"""Does it work on a real pre-trained model and a real task?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import raymask
from raymask.train.metrics import measure

pytestmark = [pytest.mark.ray, pytest.mark.long]


@pytest.mark.faults
def test_minilm_on_mrpc_exports_what_it_reports(minilm: Path, glue: Path, tmp_path: Path) -> None:
    """One level at 16x, a control and two random masks, a few steps each; then the export, by transformers alone."""
    spec = {
        "model": str(minilm),
        "task": {"name": "glue/mrpc", "folder": str(glue), "select_rows": 64},
        "levels": [0.9375],
        "candidates": {"count": 2, "ratios": [3e-4]},
        "dense": {"epochs": 0.15, "distill_epochs": 0, "learning_rate": 1e-4},
        "probe": {"epochs": 0.05},
        "finetune": {"epochs": 0.1, "learning_rate": 1e-4},
    }
    result = raymask.search(spec, tmp_path / "run")
    dense, control, selected = result.rows
    assert set(dense.report) == {"accuracy", "f1"}
    assert selected.sparsity["prunable"] == control.sparsity["prunable"] == pytest.approx(0.9375)
    assert 0.43 < selected.sparsity["whole"] < 0.45  # embeddings stay dense
    assert result.levels[0].evaluated == 3
    assert result.gain is not None

    folder = tmp_path / "run" / "export"
    module = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = pq.read_table(glue / "mrpc" / "validation.parquet").to_pydict()
    logits = []
    with torch.no_grad():
        for start in range(0, len(rows["label"]), 32):
            pair = (rows[name][start : start + 32] for name in ("sentence1", "sentence2"))
            batch = tokenizer(*pair, truncation=True, max_length=128, padding=True, return_tensors="pt")
            logits.append(module(**batch).logits.numpy())
    found = measure(("accuracy", "f1"), np.concatenate(logits), np.array(rows["label"]))
    assert found == pytest.approx(selected.report, abs=0.003)  # one row of 408 may fall on the other side
