"""Searches that are killed and continued, or stopped by a signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from support.cli import raymask, write_search
from support.paths import RAYMASK

import raymask as library
from raymask.core.records import Result
from raymask.runs.run_dir import RunDir

SLOW = {
    "candidates": {"count": 3, "sampling_ratios": [0.02]},
    "levels": [0.5, 0.9],
    "dense": {"epochs": 2, "batch_size": 8, "learning_rate": 0.003},
    "early_eval": {
        "epochs": 8,
        "batch_size": 8,
        "eval_steps": 5,
        "score_window": 2,
        "learning_rate": 0.003,
        "rungs": [0.5, 1.0],
    },
    "finetune": {"epochs": 8, "batch_size": 8, "learning_rate": 0.003},
    "select": {"keep": 2, "beam": True},
    "imp": {"run": True, "epochs": 8},
}
"""Rungs, a beam and the baseline's lineage, each stage long enough to be killed in."""
MOMENTS = (
    "level 1/2, sparsity 50.00%: fine-tuning",  # branches and the baseline
    "of branch 2 after 50%: score",  # in a rung of a beam's level
)


def test_kill_9_again_and_again_and_the_same_command_find_the_same_tree(tmp_path: Path) -> None:
    """On Ray, compared with a search that ran undisturbed in one process."""
    spec, run = write_search(tmp_path, **SLOW), tmp_path / "run"
    known: dict[str, bytes] = {}
    for moment in MOMENTS:
        kill_at(moment, ["search", str(spec), "--run", str(run)])
        require_kept(run, known)
        known = written(run)
        assert not RunDir(run).read_result()
    done = raymask("search", spec, "--run", run)
    assert done.returncode == 0, done.stdout + done.stderr
    require_kept(run, known)
    result = RunDir(run).read_result()
    assert result is not None
    undisturbed = library.search(spec, tmp_path / "undisturbed", in_process=True)
    assert len(undisturbed.other_levels) == 2
    assert len(undisturbed.baseline_levels) == 2
    assert tree_of(result) == tree_of(undisturbed)


def kill_at(moment: str, words: list[str]) -> None:
    """Run the command, and kill it soon after it says something."""
    victim = subprocess.Popen([RAYMASK, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert victim.stdout is not None
    for line in victim.stdout:
        if moment in line:
            break
    else:
        pytest.fail(f"the search ended before it said {moment!r}")
    time.sleep(0.1)
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL, "it had ended before it was killed"


def tree_of(result: Result) -> list[Any]:
    """What must be the same in every search of a spec."""
    levels = [*result.levels, *result.other_levels, *result.baseline_levels]
    winners = [level.winner.model_copy(update={"started": 0.0, "seconds": 0.0, "worker": ""}) for level in levels]
    return [*winners, *((level.digest, level.gain, level.win_probability) for level in levels), result.models]


def written(run: Path) -> dict[str, bytes]:
    """The whole lines of every journal, and every finished level's record, by file."""
    found = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("level.json")}
    for path in run.rglob("evaluations.jsonl"):
        data = path.read_bytes()
        found[str(path.relative_to(run))] = data[: data.rfind(b"\n") + 1]
    return found


def require_kept(run: Path, known: dict[str, bytes]) -> None:
    """What was finished is as it was, and no candidate is evaluated twice at one rung."""
    for name, data in known.items():
        assert (run / name).read_bytes().startswith(data), f"{name} was written anew"
    lines = [line for name, data in written(run).items() if name.endswith("jsonl") for line in data.splitlines()]
    records = [json.loads(line) for line in lines]
    keys = [
        (*(record["candidate"][key] for key in ("level", "parent_branch", "index")), record["rung"])
        for record in records
    ]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(("how", "where"), [(signal.SIGINT, ["--in-process"]), (signal.SIGTERM, [])])
def test_ctrl_c_or_the_end_of_a_job_ends_at_once_and_says_how_to_go_on(
    tmp_path: Path, how: signal.Signals, where: list[str]
) -> None:
    spec = write_search(tmp_path, dense={"epochs": 10_000, "batch_size": 8})
    command = [RAYMASK, "search", str(spec), *where, "--run", str(tmp_path / "run")]
    victim = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    for line in victim.stdout:
        if "fine-tuning" in line:
            break
    victim.send_signal(how)
    _, said = victim.communicate(timeout=60)
    assert victim.returncode == 130
    assert said.strip() == "raymask: stopped. Run the same command again to continue"
