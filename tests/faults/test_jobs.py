"""Scripts that search or train, at the smallest sizes at which they run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from support.callbacks import private_ray
from support.cli import write_search
from support.paths import ROOT
from transformers import AutoModel, AutoTokenizer

JOBS = ROOT / "jobs"
BENCHMARKS = JOBS / "benchmarks"


def test_tune_noise_runs_and_the_same_command_prints_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(JOBS / "experiments"))
    noise = import_module("tune_noise")
    spec = write_search(tmp_path, levels=[0.5], candidates={"count": 1, "sampling_ratios": [0.02]}, imp={"run": False})
    words = ["--run", str(tmp_path / "noise"), "--exponents", "2", "9", "--ratios", "0.02", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", ["tune_noise.py", str(spec), *words])
    tables = []
    with private_ray():
        for _ in range(2):
            noise.main()
            tables.append(capsys.readouterr().out.partition("loss on validation at the last level")[2])
    assert tables[0] == tables[1]
    assert tables[0].count("one seed only") == 1


def findings(name: str, *arguments: str) -> list[dict[str, object]]:
    """What a benchmark prints."""
    done = subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", "--quick", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_the_benchmark_of_memory_looks_at_every_process_of_a_search() -> None:
    [found] = findings("billion")
    assert found["met"]
    assert 0.2 < found["ours"] < found["theirs"]
    parts = dict(re.findall(r"(driver|worker|Ray) (\d+\.\d)", str(found["note"])))
    assert float(parts["driver"]) > 0
    assert float(parts["Ray"]) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_runs_on_a_cpu_when_told_to() -> None:
    assert len(findings("gpu", "--device", "cpu", "--in-process")) >= 5


def test_the_training_benchmark_runs(tmp_path: Path, minilm: Path, glue: Path) -> None:
    """With one of MiniLM's six layers."""
    AutoModel.from_pretrained(minilm, num_hidden_layers=1).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(minilm).save_pretrained(tmp_path)
    assert len(findings("training", "--model", str(tmp_path), "--glue", str(glue))) == 4
