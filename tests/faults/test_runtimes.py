"""Output of a whole bench and export: nothing of other runtimes' own."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from support.cli import raymask

MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime", "openvino") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


def test_a_bench_prints_its_table_alone(finished: Path) -> None:
    done = raymask("bench", finished, "--batch", "2", "--length", "5")
    assert done.returncode == 0, done.stderr
    assert "2 rows" in done.stdout
    assert done.stderr == ""


def test_an_export_to_onnx_prints_its_three_lines_alone(finished: Path, tmp_path: Path) -> None:
    done = raymask("export", finished, "--to", "onnx", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    assert done.stderr == ""
