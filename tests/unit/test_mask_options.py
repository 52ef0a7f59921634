"""Whole searches with every option of the mask section, level by level and in the export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.builders import reviews, tiny_model, write_table

import raymask
from raymask.commands.check import planned_levels
from raymask.config import make_spec
from raymask.core.lineage import IMP, SEARCH
from raymask.core.records import Result
from raymask.driver.setup import prepare
from raymask.runs.run_dir import MASK, RunDir

LEVELS = (0.5, 0.75)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a search of a tiny model."""
    folder = tmp_path_factory.mktemp("where")
    files = {}
    for split, rows in (("train", 60), ("test", 20)):
        texts, labels = reviews(rows)
        files[split] = str(write_table(folder / f"{split}.csv", {"text": texts, "label": labels}))
    return {
        "model": str(tiny_model(folder / "model")),
        "task": files | {"text": "text", "label": "label"},
        "levels": list(LEVELS),
        "candidates": {"count": 1, "sampling_ratios": [0.02]},
        "dense": {"epochs": 0},
        "early_eval": {"epochs": 0.5},
        "finetune": {"epochs": 0.5},
        "distill": False,
        "precision": "fp32",
    }


def searched(run: Path, spec: dict[str, Any], **mask: str) -> tuple[Result, dict[str, torch.Tensor]]:
    """The result, and by name where the export's pruned matrices are not zero; levels nest in both lineages."""
    result = raymask.search(spec | {"mask": mask}, run, in_process=True)
    foretold = planned_levels(prepare(make_spec(spec | {"mask": mask}))).columns[2].cells
    assert list(foretold) == [f"{level.num_kept:,}" for level in result.levels]
    store = RunDir(run)
    for lineage, levels in ((SEARCH, result.levels), (IMP, result.baseline_levels)):
        for level in levels:
            assert level.sparsity == pytest.approx(LEVELS[level.level - 1], abs=0.001)
        first, second = (store.read_weights(lineage, level).views() for level in (1, 2))
        names = [name for name in store.read_tensors(lineage, 2, MASK) if ":" not in name]
        assert all(not ((second[name] != 0) & (first[name] == 0)).any() for name in names)
    weights = load_file(run / "export" / "model.safetensors")
    return result, {name: weights[name] != 0 for name in names}


def test_n_of_m_by_wanda(spec: dict[str, Any], tmp_path: Path) -> None:
    _, kept = searched(tmp_path / "run", spec, pattern="n:4", score="wanda")
    assert all(bool((bits.view(-1, 4).sum(1) == 1).all()) for bits in kept.values())


def test_blocks_in_one_contest_by_saliency(spec: dict[str, Any], tmp_path: Path) -> None:
    _, kept = searched(tmp_path / "run", spec, pattern="8x1", allocation="global", score="saliency")
    for bits in kept.values():
        assert set(bits.view(-1, 8, bits.shape[1]).sum(1).view(-1).tolist()) <= {0, 8}
    assert len({round(float(bits.float().mean()), 2) for bits in kept.values()}) > 2


def test_erk(spec: dict[str, Any], tmp_path: Path) -> None:
    result, kept = searched(tmp_path / "run", spec, allocation="erk")
    shares = {tuple(bits.shape): round(float(bits.float().mean()), 2) for bits in kept.values()}
    assert shares[min(shares)] > shares[max(shares)], "small matrices keep more of themselves"
    assert raymask.search(spec | {"mask": {"allocation": "erk"}}, tmp_path / "run", in_process=True) == result
