"""Output of a whole bench and export: nothing of other runtimes' own."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.builders import reviews, tiny_model, write_table
from support.cli import raymask

from raymask import search
from raymask.commands.bench import CSR, DENSE, OPTION, SELECTED, SHRUNK

MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime", "openvino") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.fixture
def shallow(tmp_path: Path) -> Path:
    """The run of a search of a model of one layer, which is exported in half the time."""
    files = {}
    for split, rows in (("train", 60), ("test", 20)):
        texts, labels = reviews(rows)
        files[split] = str(write_table(tmp_path / f"{split}.csv", {"text": texts, "label": labels}))
    spec = {
        "model": str(tiny_model(tmp_path / "model", num_hidden_layers=1)),
        "task": files | {"text": "text", "label": "label"},
        "levels": [0.9375],
        "candidates": {"count": 0},
        "dense": {"epochs": 0},
        "finetune": {"epochs": 1},
        "distill": False,
        "precision": "fp32",
    }
    search(spec, tmp_path / "run", in_process=True)
    return tmp_path / "run"


def test_a_bench_prints_its_table_alone(shallow: Path) -> None:
    """Every form by every runtime."""
    done = raymask("bench", shallow, "--batch", "1", "--batch", "3", "--length", "12")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    cells = r"^│ (\S.*?) +│ (\S.*?) +│ +([\d.]+) │ +(\S*) +│ +([\d.]+) │ +([\d.]+)x │"
    rows = re.findall(cells, done.stdout, re.MULTILINE)
    everywhere = [DENSE, SELECTED, SHRUNK]
    assert [(runtime, model) for runtime, model, *_ in rows] == [
        *(("torch", model) for model in (DENSE, SELECTED, CSR)),
        *(("ONNX Runtime", model) for model in everywhere),
        *(("ONNX Runtime int8", model) for model in everywhere),
        *(("OpenVINO", model) for model in (DENSE, SELECTED, OPTION, SHRUNK)),
    ]
    for runtime, _, _, strayed, _, _ in rows:
        assert strayed.startswith("~") == runtime.endswith("int8")
    assert "Median latency in ms, rows of 12 tokens, 1 thread," in done.stdout
    assert done.stdout.count(", against the dense model by the same runtime") == 2
    assert "Not measured" not in done.stdout


def test_an_export_to_onnx_prints_its_three_lines_alone(finished: Path, tmp_path: Path) -> None:
    done = raymask("export", finished, "--to", "onnx", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    assert done.stderr == ""
