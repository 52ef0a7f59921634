"""Time until a search's first candidate runs, and the cost of a kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import Finding, options, tell

RAYMASK = Path(sys.executable).with_name("raymask")
IMPORTS = "import ray, torch, transformers, raymask.executor.ray_executor, raymask.driver.search"


def lines(run: Path, level: int) -> list[str]:
    """A level's journal."""
    journal = run / f"level-{level}" / "evaluations.jsonl"
    return journal.read_text().splitlines() if journal.exists() else []


def begin(run: Path) -> subprocess.Popen[bytes]:
    """The quickstart, as a user starts it."""
    return subprocess.Popen([RAYMASK, "search", "--run", run], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


def undisturbed(run: Path) -> tuple[float, float, dict[str, Any]]:
    """Seconds until the first candidate ran, and until the end; and the result."""
    started = time.time()
    assert begin(run).wait() == 0
    wall = time.time() - started
    found = result(run)
    first = min(span["started"] for span in found["timeline"] if span["phase"] == "early evaluation")
    return first - started, wall, found


def killed(run: Path, level: int, done: int) -> tuple[float, list[str]]:
    """Seconds until a driver was killed with so many candidates of a level evaluated, and its journal then."""
    started = time.time()
    driver = begin(run)
    while len(lines(run, level)) < done:
        time.sleep(0.02)
        assert driver.poll() is None, "the search ended before it could be killed"
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    return time.time() - started, lines(run, level)


if __name__ == "__main__":
    options(__doc__)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
    imports = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        first, wall, whole = undisturbed(Path(folder) / "whole")
        what = "`raymask search` (quickstart) until its first candidate runs, after imports"
        note = f"imports {imports:.1f} s, before them; Ray's start and the dense model's training are in it"
        tell(Finding(what, "-", first - imports, None, "s", None, "<= 15 s", first - imports <= 15, note))
        run, level = Path(folder) / "killed", 2
        before, journal = killed(run, level, done=3)
        began = time.time()
        assert begin(run).wait() == 0
        after = time.time() - began
        again = result(run)
        kept = lines(run, level)[: len(journal)] == journal
        same = again["levels"][-1]["digest"] == whole["levels"][-1]["digest"]
        spent = [sum(span["seconds"] for span in found["timeline"]) for found in (whole, again)]
        note = f"killed after {before:.1f} s; nothing that had finished is repeated: {kept}, the same mask: {same}; "
        note += f"finished work {spent[1]:.1f} s of the workers' time against {spent[0]:.1f} s undisturbed"
        what = "resume after kill -9 (quickstart, level 2 of 4)"
        bar = "at most the running early evaluations are repeated"
        tell(Finding(what, "start from scratch", after, wall, "s", wall / after, bar, kept and same, note))
