"""Exported masks, drawn again from the recipe beside them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.builders import refused, tiny_selected
from support.specs import decoder_spec as spec_of
from torch import nn

import raymask
from raymask.core.masking.masks import digest, pack_bits, unpack_bits
from raymask.core.spec import MaskOptions as Where
from raymask.export.formats import export_run
from raymask.export.masks import RECIPE, parent_file, write_masks
from raymask.export.selected import read_selected
from raymask.runs.run_dir import MASK, RunDir, sha256, tensors_to_bits
from raymask.train.model import build_model


def check_redrawn(run: Path, folder: Path) -> None:
    """Every level's mask, drawn from the file that the recipe names, has the level's digest."""
    selected = read_selected(RunDir(run))
    levels = json.loads((folder / RECIPE).read_text())["levels"]
    assert [level["digest"] for level in levels] == [level.digest for level in selected.result.levels]
    for level in levels:
        parent = run / level["drawn_from"]["file"]
        assert sha256(parent).startswith(level["drawn_from"]["sha256_begins"])
        model: nn.Module = build_model(selected.module.config, kind=selected.result.kind)
        model.load_state_dict(load_file(parent), strict=False)
        assert digest(pack_bits(raymask.draw_mask(model, **level["draw_mask"]))) == level["digest"]


def test_all_masks_are_drawn_again_from_the_weights_of_the_run(finished: Path, tmp_path: Path) -> None:
    lines = export_run(finished, "masks", tmp_path / "out")
    check_redrawn(finished, tmp_path / "out")
    levels = json.loads((tmp_path / "out" / RECIPE).read_text())["levels"]
    assert any("seed" in level["draw_mask"] for level in levels)  # a random one among them
    assert lines[1] == "recipe.json: the arguments with which raymask.draw_mask draws every level's mask again"


def test_so_they_are_with_an_allocation_a_pattern_and_turned_layers(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "gpt2") | {"mask": {"allocation": "global", "pattern": "4x1"}, "imp": {"run": False}}
    spec["model"] = {"name": spec["model"], "include": ["*.c_fc.*", "*.c_attn.*"], "exclude": ["*.0.mlp.*"]}
    raymask.search(spec, tmp_path / "run", in_process=True)
    export_run(tmp_path / "run", "masks")
    check_redrawn(tmp_path / "run", tmp_path / "run" / "export-masks")


def test_the_mask_is_the_selected_one(finished: Path, tmp_path: Path) -> None:
    lines = export_run(finished, "masks", tmp_path / "out")
    selected = read_selected(RunDir(finished))
    mask = unpack_bits(tensors_to_bits(load_file(tmp_path / "out" / MASK)))
    assert mask.keys() == selected.mask.keys()
    assert all(torch.equal(mask[name], kept) for name, kept in selected.mask.items())
    size = (tmp_path / "out" / MASK).stat().st_size
    assert lines[0] == f"{MASK}: {size / 1e6:.3f} MB, one bit for each of 16,384 weights"
    assert lines[2] == f"Checked: the mask in the file has the selected mask's digest, {digest(pack_bits(mask))}"


@pytest.mark.parametrize(
    ("parent", "file"),
    [
        ("dense-0-0123456789abcdef", "dense/model.safetensors"),
        ("search-0-0123456789abcdef", "level-0/model.safetensors"),
        ("branch-2-3-0123456789abcdef", "branch-2/level-3/model.safetensors"),
    ],
)
def test_a_parent_is_found_by_its_key(parent: str, file: str) -> None:
    assert parent_file(parent) == {"file": file, "sha256_begins": "0123456789abcdef"}


def test_scores_that_need_the_task_are_said_not_to_be_redrawn(tmp_path: Path) -> None:
    selected = tiny_selected()
    spec = selected.spec.model_copy(update={"mask": Where(score="wanda")})
    lines = write_masks(replace(selected, spec=spec), tmp_path)
    assert lines[1] == "recipe.json: the winners. wanda needs rows of the task, so only a search draws them again"
    [level] = json.loads((tmp_path / RECIPE).read_text())["levels"]
    assert level["draw_mask"] is None


def test_a_mask_that_is_read_as_another_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymask.export.masks.digest", lambda packed: "another")
    assert "the file does not hold the mask that was written" in refused(write_masks, tiny_selected(), tmp_path)
