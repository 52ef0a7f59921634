"""`raymask bench` as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cli import refused_command, typed

from raymask.commands import bench
from raymask.export import onnx


def test_it_prints_the_table_of_the_rows_that_are_asked_for(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "REPEATS", 2)
    monkeypatch.setattr(bench, "MIN_REPEATS", 2)
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    done = typed("bench", finished, "--batch", "2", "--length", "5")
    assert done.returncode == 0, done.stderr
    assert "2 rows" in done.stdout
    assert "rows of 5 tokens" in done.stdout.replace("\n", " ")
    assert done.stderr == ""


def test_rows_that_are_too_long_are_refused(finished: Path) -> None:
    said = refused_command("bench", finished, "--length", "1000")
    assert "--length: the model takes at most 64 tokens, not 1000" in said
