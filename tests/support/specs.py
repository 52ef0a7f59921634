"""Specs of searches that take seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.builders import reviews, tiny_model, write_table

from raymask.core.spec import QUICKSTART

SEARCH: dict[str, Any] = {
    "model": QUICKSTART,
    "task": QUICKSTART,
    "levels": [0.5, 0.9375],
    "candidates": {"count": 2, "sampling_ratios": [0.01]},
    "dense": {"epochs": 1},
    "early_eval": {"epochs": 0.1, "eval_steps": 2, "score_window": 2, "max_rows": 50},
    "finetune": {"epochs": 0.2},
    "imp": {"run": False},
    "distill": False,
    "precision": "fp32",
}
"""The quickstart, pruned to 1/16 in two levels."""


def decoder_spec(folder: Path, family: str, **sections: Any) -> dict[str, Any]:
    """A search of a few seconds; its files are written into the folder."""
    write_table(folder / "train.csv", {"text": reviews(400)[0]})
    (folder / "report.txt").write_text("\n".join(reviews(60, 1)[0]), encoding="utf-8")
    files = {"train": str(folder / "train.csv"), "test": str(folder / "report.txt")}
    return {
        "model": str(tiny_model(folder / family, family)),
        "task": {"kind": "causal-lm", "max_length": 16, **files},
        "levels": [0.5, 0.75],
        "candidates": {"count": 2, "sampling_ratios": [0.02]},
        "dense": {"epochs": 2, "learning_rate": 3e-3, "distill_epochs": 0.5},
        "early_eval": {"epochs": 0.5, "batch_size": 16, "eval_steps": 2, "score_window": 2},
        "finetune": {"epochs": 1, "batch_size": 16, "learning_rate": 3e-3},
        "precision": "fp32",
    } | sections
