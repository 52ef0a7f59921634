"""Folder of a user: a spec, and a small model, rows and a sampler of one's own beside it."""

from __future__ import annotations

from pathlib import Path

from support.builders import reviews, tiny_model, write_table

SPEC = """
model: models/mine
task: {train: data/train.csv, test: ../shared/report.csv, text: review, label: stars}
levels: [0.5, 0.75]
candidates: {count: 2, sampling_ratios: [0.01], sampler: "project_masks:scaled"}
dense: {epochs: 0}
finetune: {epochs: 1}
distill: false
precision: fp32
"""

SAMPLER = """
import torch

def scaled(scores, k, exponent, num_votes):
    return lambda scores, rng: scores * (0.5 + torch.rand(scores.shape, generator=rng))
"""


def project_in(folder: Path) -> Path:
    """The folder `project` in this one: relative paths in its spec.yaml, one of which leads out of it."""
    tiny_model(folder / "project" / "models" / "mine")
    for name, rows in (("project/data/train.csv", 60), ("shared/report.csv", 20)):
        texts, labels = reviews(rows)
        write_table(folder / name, {"review": texts, "stars": labels})
    (folder / "project" / "spec.yaml").write_text(SPEC)
    (folder / "project" / "project_masks.py").write_text(SAMPLER)
    return folder / "project"
