"""`raymask tune`: mistakes are said and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

from support.cli import raymask, refused_command

SPEC = {"model": "quickstart", "task": "quickstart", "levels": [0.5, 0.9], "candidates": {"count": 2}}


def test_mistakes_are_said_and_nothing_is_written(tmp_path: Path) -> None:
    spec, space = tmp_path / "spec.yaml", tmp_path / "space.yaml"
    spec.write_text(json.dumps(SPEC))

    def said(*words: str) -> str:
        return refused_command("tune", "spec.yaml", "space.yaml", *words, cwd=tmp_path)

    space.write_text("candidates.exponnet: {uniform: [2, 10]}")
    done = raymask("tune", "spec.yaml", "space.yaml", cwd=tmp_path)
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stderr
    assert "space.yaml: candidates.exponnet=2.0: candidates.exponnet: there is no such key" in done.stderr
    told = said("--set", "early_eval.epocs=1")
    assert "spec.yaml --set early_eval.epocs=1: early_eval.epocs: there is no such key; did you mean epochs?" in told
    space.unlink()
    assert "space.yaml: there is no such file" in said()
    space.write_text("levels: {choice: [[0.5], [0.9]]}")
    assert "with levels in the space" in said("--scheduler", "asha")
    assert "is not empty and not a tuning" in said("--run", ".")
    assert "the URI's options do not reach the trials: set the endpoint in $AWS_ENDPOINT_URL" in said(
        "--run", "s3://bucket/x?scheme=http"
    )
    assert "credentials do not belong in a URI" in said("--run", "s3://key:hunter2@bucket/x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["space.yaml", "spec.yaml"]
