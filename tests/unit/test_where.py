"""Does a whole search keep what its mask section asks for and `check` foretells, in every level and in the export?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import raymask
from raymask.check import level_table
from raymask.config import make_spec
from raymask.core.records import Result
from raymask.driver.search import prepare
from raymask.store import IMP, MASK, SEARCH, RunDir

SPEC: dict[str, Any] = {
    "model": "quickstart",
    "task": "quickstart",
    "levels": [0.5, 0.75],
    "candidates": {"count": 1, "ratios": [0.02]},
    "dense": {"epochs": 0.1},
    "probe": {"epochs": 0.02, "rows": 50},
    "finetune": {"epochs": 0.02},
    "distill": False,
    "precision": "fp32",
}


def searched(run: Path, **mask: str) -> tuple[Result, dict[str, torch.Tensor]]:
    """The result, and by name where the export's pruned matrices are not zero; levels nest in both lineages."""
    result = raymask.search(SPEC | {"mask": mask}, run, in_process=True)
    foretold = level_table(prepare(make_spec(SPEC | {"mask": mask}))).columns[2].cells
    assert list(foretold) == [f"{level.kept:,}" for level in result.levels]
    store = RunDir(run)
    for lineage, levels in ((SEARCH, result.levels), (IMP, result.imp)):
        for level in levels:
            assert level.sparsity == pytest.approx(SPEC["levels"][level.level - 1], abs=0.001)
        first, second = (store.read_weights(lineage, level).views() for level in (1, 2))
        names = [name for name in store.read_tensors(lineage, 2, MASK) if ":" not in name]
        assert all(not ((second[name] != 0) & (first[name] == 0)).any() for name in names)
    weights = load_file(run / "export" / "model.safetensors")
    return result, {name: weights[name] != 0 for name in names}


def test_n_of_m_by_wanda(tmp_path: Path) -> None:
    _, kept = searched(tmp_path / "run", pattern="n:4", score="wanda")
    assert all(bool((bits.view(-1, 4).sum(1) == 1).all()) for bits in kept.values())


def test_blocks_in_one_contest_by_saliency(tmp_path: Path) -> None:
    _, kept = searched(tmp_path / "run", pattern="8x1", allocation="global", score="saliency")
    for bits in kept.values():
        assert set(bits.view(-1, 8, bits.shape[1]).sum(1).view(-1).tolist()) <= {0, 8}
    assert len({round(float(bits.float().mean()), 2) for bits in kept.values()}) > 2


def test_erk(tmp_path: Path) -> None:
    result, kept = searched(tmp_path / "run", allocation="erk")
    shares = {tuple(bits.shape): round(float(bits.float().mean()), 2) for bits in kept.values()}
    assert shares[min(shares)] > shares[max(shares)], "small matrices keep more of themselves"
    assert raymask.search(SPEC | {"mask": {"allocation": "erk"}}, tmp_path / "run", in_process=True) == result
