"""The command line: as a process of its own, and in this process, which saves the imports."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from support.builders import reviews, tiny_model, write_table
from support.paths import RAYMASK

from raymask.cli import main

Done = subprocess.CompletedProcess[str]


def raymask(*words: str | Path, cwd: Path | None = None) -> Done:
    """The command as a user runs it."""
    return subprocess.run([RAYMASK, *map(str, words)], capture_output=True, text=True, cwd=cwd, timeout=280)


def typed(*words: str | Path, cwd: Path | None = None) -> Done:
    """The same command in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "path", list(sys.path)),
        chdir(cwd or Path.cwd()),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            run_main(*words)
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(words, code, out.getvalue(), err.getvalue())


def run_main(*words: str | Path) -> None:
    """The command in this process, with its output on `sys.stdout`; it ends with SystemExit."""
    with mock.patch.object(sys, "argv", ["raymask", *map(str, words)]), mock.patch.dict(os.environ):
        main()


def refused_command(*words: str | Path, cwd: Path | None = None) -> str:
    """What the command says on stderr when it ends with exit code 2, one message and no traceback."""
    done = typed(*words, cwd=cwd)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("raymask: "), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def write_search(folder: Path, **sections: Any) -> Path:
    """A spec of two levels with a random tiny model and 60 rows, all absolute paths; sections replace its own."""
    for name, rows in (("train", 60), ("report", 20)):
        texts, labels = reviews(rows, len(name))
        write_table(folder / f"{name}.csv", {"review": texts, "stars": labels})
    files = {"train": str(folder / "train.csv"), "test": str(folder / "report.csv")}
    spec = {
        "model": str(tiny_model(folder / "model")),
        "task": {**files, "text": "review", "label": "stars"},
        "levels": [0.5, 0.75],
        "candidates": {"count": 2, "sampling_ratios": [0.02]},
        "dense": {"epochs": 2, "batch_size": 8, "learning_rate": 0.01},
        "early_eval": {"epochs": 1, "batch_size": 8, "eval_steps": 1, "score_window": 2, "learning_rate": 0.01},
        "finetune": {"epochs": 1, "batch_size": 8, "learning_rate": 0.01},
        "distill": False,
        "precision": "fp32",
    }
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec | sections))
    return path
