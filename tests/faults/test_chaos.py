"""Two minutes of jobs/chaos.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

CHAOS = ROOT / "jobs" / "chaos.py"
MINUTES = 1.5  # the last round and the undisturbed search take the rest of two minutes


def seed_of_the_commit() -> int:
    """Other faults at other moments for every commit; 0 outside of a repository."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return int(head.stdout.strip()[:8], 16) if head.returncode == 0 else 0


@pytest.mark.timeout(900)
def test_every_fault_ends_with_the_undisturbed_outcome(tmp_path: Path) -> None:
    """As a user runs it, on two raylets, as many rounds as fit; `-s` or a failure shows seed and faults."""
    report, seed = tmp_path / "report.json", seed_of_the_commit()
    words = ["--minutes", str(MINUTES), "--seed", str(seed), "--json", str(report), "--workdir", str(tmp_path)]
    print(f"python jobs/chaos.py --minutes {MINUTES} --seed {seed}")
    done = subprocess.run([sys.executable, str(CHAOS), *words], capture_output=True, text=True, timeout=800)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["seed"] == seed
    assert found["rounds"]
    expected = {name: value for name, value in found["undisturbed"].items() if name.endswith(" mask")}
    assert len(expected) == 4
    for played in found["rounds"]:
        assert played["survived"], played
        assert played["did"], played
        assert {name: value for name, value in played["outcome"].items() if name.endswith(" mask")} == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json"]
