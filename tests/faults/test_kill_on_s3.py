"""A driver that is killed and continued, with its run directory in an object store."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs
from support.cli import typed
from support.paths import RAYMASK
from support.projects import project_in
from support.s3_server import BUCKET, S3Server

from raymask.config import load_spec
from raymask.core.records import Result
from raymask.driver.search import search
from raymask.runs import object_storage, storage
from raymask.runs.local_storage import LocalStorage
from raymask.runs.run_dir import RunDir

SLOW = ("early_eval.epochs=60", "early_eval.eval_steps=60")
"""Every candidate takes about half a second."""


def found(result: Result) -> list[Any]:
    return [(level.digest, level.winner.candidate, level.winner.score) for level in result.levels]


def test_kill_9_in_the_middle_of_a_level_on_s3_and_the_same_command_find_the_same_mask(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed as a process, continued here, where a dead driver is noticed in two seconds."""
    monkeypatch.setattr(object_storage, "MAX_HEARTBEAT_POLLS", 2)
    monkeypatch.chdir(project_in(tmp_path))
    undisturbed = search(load_spec("spec.yaml", SLOW), tmp_path / "local", in_process=True)
    uri, root, filesystem = s3.uri(tmp_path.name), f"{BUCKET}/{tmp_path.name}", s3.filesystem()

    def files() -> dict[str, bytes]:
        names = s3.names(tmp_path.name)
        return {name: s3.read(f"{tmp_path.name}/{name}") for name in names if storage.is_run_file(name)}

    def fetched(name: str) -> Path:
        fs.copy_files(root, str(tmp_path / name), filesystem, fs.LocalFileSystem())
        return tmp_path / name

    overrides = [word for override in SLOW for word in ("--set", override)]
    words = ["search", "spec.yaml", "--in-process", "--run", uri, *overrides]
    victim = subprocess.Popen([RAYMASK, *words], stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    said = iter(victim.stdout.readline, "")
    assert any("level 2/2, sparsity 75.00%: early evaluation" in line for line in said)
    assert any("score" in line for line in said)
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    known = files()
    journals = {name: data for name, data in known.items() if name.endswith("evaluations.jsonl")}
    assert sorted(journals) == ["level-1/evaluations.jsonl", "level-2/evaluations.jsonl"]
    assert 1 <= journals["level-2/evaluations.jsonl"].count(b"\n") < 3
    copy = fetched("copy")
    assert f"{copy}: stopped" in typed("show", copy).stdout

    done = typed(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is held by another driver: checking for 2 s whether it is alive" in done.stdout
    assert undisturbed.levels[-1].digest in done.stdout
    after = files()
    assert all(after[name].startswith(data) for name, data in journals.items())
    assert all(after[name] == data for name, data in known.items() if name.endswith(("level.json", ".safetensors")))
    store = RunDir(uri)
    result = store.read_result()
    assert result is not None
    for level in (1, 2):
        keys = [evaluation.candidate for evaluation in store.evaluations(level)]
        assert len(keys) == len(set(keys)) == after[f"level-{level}/evaluations.jsonl"].count(b"\n") == 3
    assert found(result) == found(undisturbed)
    assert result.models == undisturbed.models
    assert sorted(after) == sorted(LocalStorage(tmp_path / "local").names())

    assert undisturbed.levels[-1].digest in typed("show", uri).stdout
    finished = fetched("finished")
    shown = typed("show", finished).stdout
    assert undisturbed.levels[-1].digest in shown
    assert f"{finished}: finished" in shown
