"""Examples of README and docs/: they run as they stand, but for folders and what makes them long."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from support.cli import typed
from support.clusters import LocalCluster, clean_environ
from support.documents import block
from support.projects import project_in
from transformers import AutoModelForSequenceClassification


def replaced(text: str, changes: dict[str, str]) -> str:
    """The text with every occurrence of what is certainly in it replaced."""
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def test_the_python_examples_run(tmp_path: Path) -> None:
    """In one interpreter, one after the other; the first is a whole search, on a Ray of its own."""
    whole, pieces, own = (block(f"python-{name}", "python") for name in ("search", "pieces", "testing"))
    (tmp_path / "my_masks.py").write_text(block("python-own-functions", "python"))
    kept = "assert all(int((model.get_parameter(n) != 0).sum()) == m.numel() // 16 for n, m in mask.items())"
    drawn = "assert all(int(m.sum()) == m.numel() // 16 for m in mask.values())"
    code = "\n".join((replaced(whole, {'"epochs": 24': '"epochs": 1'}), pieces, kept, own, drawn))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=clean_environ(), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout


def test_the_example_for_a_sparse_file_runs(finished: Path, tmp_path: Path) -> None:
    """On the quickstart's export: both models answer as the exported checkpoint does."""
    done = typed("export", finished, "--to", "sparse", "--out", tmp_path / "export-sparse")
    assert done.returncode == 0, done.stderr
    text = block("python-load-sparse", "python")
    code = replaced(text, {"runs/quickstart/export-sparse": str(tmp_path / "export-sparse")})
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102 - our own
    plain = AutoModelForSequenceClassification.from_pretrained(finished / "export").eval()
    ids = torch.arange(1, 9).view(1, -1)
    with torch.no_grad():
        expected, loaded, fast = (module(ids).logits for module in (plain, names["model"], names["fast"]))
    assert torch.equal(loaded, expected)
    torch.testing.assert_close(fast, expected, rtol=1e-4, atol=1e-5)


def test_the_example_for_tune_runs(tmp_path: Path) -> None:
    """On a Ray of its own, by Tune's own means."""
    text = block("python-tune", "python")
    quick = '"task": "quickstart", "dense": {"epochs": 1}, "candidates": {"count": 1}, "early_eval": {"epochs": 0.2}'
    changes = {"/tmp/tuning": str(tmp_path / "tuning"), '"task": "quickstart"': quick, "samples=2": "samples=1"}  # noqa: S108
    code = replaced(text, changes)
    environ = clean_environ() | {"RAY_AUTH_MODE": "disabled"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.strip().splitlines()[-1]
    assert "'finetune.learning_rate'" in said
    assert said.endswith("/run")
    assert f" {tmp_path}/tuning/rates/" in said


def test_the_commands_for_a_cluster_run_as_they_stand(cluster: LocalCluster, tmp_path: Path) -> None:
    """One after the other in one shell, from a folder in which jobs/quickstart.yaml is a shorter search.

    On the cluster of all tests: that `up` starts one, prints the environment, and `down` ends it is shown by
    support/clusters.py, which does so.
    """
    first, *lines, last = block("cluster-commands", "bash").splitlines()
    assert (first.split("#")[0].strip(), last) == ('eval "$(cluster/local/up)"', "cluster/local/down")
    script = replaced(
        "\n".join(lines),
        {
            "/tmp/quickstart": str(tmp_path / "run"),  # noqa: S108
            " here ": f" {tmp_path / 'here'} ",
            "JOB": f"$(sed -n 's/: submitted.*//p' {tmp_path}/said)",
        },
    )
    script = re.sub(r"(raymask submit [^#\n]*)", rf"\1 | tee {tmp_path}/said ", script)
    project = project_in(tmp_path)
    (project / "jobs").mkdir()
    (project / "spec.yaml").rename(project / "jobs" / "quickstart.yaml")
    done = subprocess.run(
        ["bash", "-ec", f"set -o pipefail; {script}"],
        cwd=project,
        env=cluster.environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for part in (": submitted; its run", "ready to load, in", ": SUCCEEDED", "has already ended", "files of"):
        assert part in done.stdout, part
    assert (tmp_path / "here" / "export" / "config.json").exists()
