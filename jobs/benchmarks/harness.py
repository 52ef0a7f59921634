"""What all benchmarks share: two sides in one run, words for people, JSON for programs."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from run import number

from raymask.core.protocols import Executor
from raymask.core.records import Candidate, Evaluation
from raymask.core.successive_halving import SuccessiveHalving
from raymask.core.tasks import Snapshot
from raymask.machine import usable_cpus

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Finding:
    """One line of the table of docs/performance.md: `ours` and `theirs` in `unit`, their `ratio`, and the `bar`."""

    what: str
    against: str
    ours: float
    theirs: float | None
    unit: str
    ratio: float | None
    bar: str
    met: bool
    note: str = ""


def tell(finding: Finding) -> None:
    """Print a finding in words, then as a JSON line."""
    ours, theirs = (number(value, finding.unit) for value in (finding.ours, finding.theirs))
    sides = f"{ours} against {theirs}" if theirs else ours
    ratio = f", {number(finding.ratio)} x" if finding.ratio is not None else ""
    print(
        f"{finding.what} | {finding.against}: {sides}{ratio} (bar: {finding.bar}; {'met' if finding.met else 'MISSED'})"
    )
    if finding.note:
        print(f"  {finding.note}")
    print(json.dumps(asdict(finding) | {"machine": machine()}), flush=True)


def run_halving(executor: Executor, parent: Snapshot, pool: Sequence[Candidate]) -> Iterator[Evaluation]:
    """Early evaluation of a pool whose candidates have one parent."""
    halving = SuccessiveHalving(pool, [1.0])
    while eval_tasks := halving.ask():
        evaluation = executor.evaluate({1: parent}, eval_tasks)
        halving.tell(evaluation)
        yield evaluation
    executor.cancel()


def machine() -> str:
    """What it was measured on, in words."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{usable_cpus()} cores of {names[0] if names else platform.processor()}{gpu}, torch {torch.__version__}"


def peak_memory(reset: bool = False) -> int:
    """Bytes of this process's memory at its peak since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def options(description: str | None) -> argparse.Namespace:
    """The command line that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default=MINILM, help="a 6-layer MiniLM: hub id, or folder")
    parser.add_argument("--glue", default=None, help="a folder with mrpc/train.parquet and so on; the hub without it")
    parser.add_argument("--quick", action="store_true", help="sizes at which it only shows that it runs")
    return parser.parse_args()


def task(options: argparse.Namespace) -> dict[str, Any]:
    """MRPC as a spec has it."""
    return {"name": "glue/mrpc", **({"folder": options.glue} if options.glue else {})}


def best_of(times: int, *sides: Callable[[], object]) -> list[float]:
    """The fastest of `times` runs of each side, in seconds, taken in turns: a busy moment hits both."""
    found: list[list[float]] = [[] for _ in sides]
    for _ in range(times):
        for side, seconds in zip(sides, found, strict=True):
            started = time.perf_counter()
            side()
            seconds.append(time.perf_counter() - started)
    return [min(seconds) for seconds in found]
