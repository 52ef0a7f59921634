"""`raymask eval` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

from support.cli import refused_command, typed

from raymask.runs.run_dir import RunDir


def test_it_prints_the_result_s_figures_and_where_they_lie(finished: Path) -> None:
    result = RunDir(finished).read_result()
    assert result is not None
    selected = result.models[-1]
    found = selected.intervals["accuracy"]
    words = ("eval", finished / "export", "--task", finished / "spec.yaml")
    done = typed(*words)
    assert done.returncode == 0, done.stderr
    for part in (f"{selected.test_metrics['accuracy']:.4f}", f"{found.low:.4f} to {found.high:.4f}"):
        assert part in done.stdout
    assert "1,000 rows of `test`. Exact zeros: 93.75% of the prunable weights, " in done.stdout
    said = json.loads(typed(*words, "--json").stdout)
    assert (said["rows"], said["test_metrics"]) == (1000, selected.test_metrics)
    assert said["intervals"] == {"accuracy": found.model_dump()}


def test_a_task_that_is_none_is_said(tmp_path: Path) -> None:
    said = refused_command("eval", tmp_path, "--task", "glue/mrcp")
    assert "--task: task: no task is called 'glue/mrcp'" in said
    assert "there is no such file" in refused_command("eval", tmp_path, "--task", tmp_path / "no.yaml")
