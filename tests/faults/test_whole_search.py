"""A whole search by the command line on Ray, from its first line to the exported model."""

from __future__ import annotations

import csv
import json
from importlib import invalidate_caches
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support.cli import raymask, refused_command, typed, write_search
from support.documents import block
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from raymask.core.records import Result
from raymask.data.metrics import compute_metrics
from raymask.runs.run_dir import RunDir


def test_a_search_prints_its_table_exports_and_is_shown_again(tmp_path: Path) -> None:
    """The export is loaded by transformers alone and scores what the table says.

    Masks are drawn by functions of one's own, from a module in the current folder, which nothing needs afterwards.
    """
    module = tmp_path / "my_masks.py"
    module.write_text(block("python-own-functions", "python"))
    spec = write_search(tmp_path, **yaml.safe_load(block("spec-own-functions", "yaml")))
    done = raymask("search", spec, "--run", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\x1b" not in done.stdout
    for part in ("dense", "IMP", "raymask", "95 % interval", "ready to load, in run/export"):
        assert part in done.stdout
    result = RunDir(tmp_path / "run").read_result()
    assert result is not None
    assert [row.name for row in result.models] == ["dense", "IMP", "raymask"]
    check_export(tmp_path, result)

    module.unlink()
    shown = typed("show", "run", cwd=tmp_path)
    assert result.levels[-1].digest in shown.stdout, shown.stderr
    said = refused_command("search", spec, "--run", "run", cwd=tmp_path)
    assert "mask.score: there is no module 'my_masks', neither installed nor in the current folder" in said
    module.write_text(block("python-own-functions", "python"))
    invalidate_caches()
    again = typed("search", spec, "--run", "run", cwd=tmp_path)
    assert again.returncode == 0
    assert "early evaluation" not in again.stdout.split("Took")[0]
    assert result.levels[-1].digest in again.stdout
    as_json = json.loads(typed("show", "run", "--json", cwd=tmp_path).stdout)
    assert Result.model_validate(as_json["result"]) == result
    assert as_json["starts"][0]["versions"]["ray"]
    assert as_json == json.loads((tmp_path / "run" / "report.json").read_text()) | {"written": as_json["written"]}
    compared = typed("compare", "run", "--html", "page.html", cwd=tmp_path)
    assert compared.returncode == 0, compared.stderr
    assert "Side by side" in compared.stdout
    assert "<title>run</title>" in (tmp_path / "page.html").read_text()
    assert "none: is not a run directory" in refused_command("compare", "run", "none", cwd=tmp_path)
    other = refused_command("search", spec, "--run", "run", "--set", "seed=9", cwd=tmp_path)
    assert "seed: 0 there, 9 now" in other


def check_export(folder: Path, result: Result) -> None:
    """A plain checkpoint: exact zeros, no sparsity_config, a tokenizer, and the reported score."""
    export = folder / "run" / "export"
    module = AutoModelForSequenceClassification.from_pretrained(export).eval()
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert "sparsity" not in (export / "config.json").read_text()
    zeros = sum(int((weight == 0).sum()) for name, weight in module.named_parameters() if "encoder" in name)
    last = result.levels[-1]
    assert zeros >= last.num_prunable - last.num_kept
    with (folder / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    with torch.no_grad():
        logits = module(**tokenizer([row["review"] for row in rows], padding=True, return_tensors="pt")).logits
    found = compute_metrics(("accuracy",), logits.numpy(), np.array([int(row["stars"]) for row in rows]))["accuracy"]
    assert found == pytest.approx(result.models[-1].test_metrics["accuracy"])
    card = (export / "README.md").read_text()
    assert last.digest in card
    assert f"{result.models[-1].test_metrics['accuracy']:.4f}" in card
