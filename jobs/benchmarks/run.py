"""Run the benchmarks one after another, and write the table of docs/performance.md from what they print.

    python jobs/benchmarks/run.py --model FOLDER --glue FOLDER [NAME ...]

Without names all that need no GPU. What was measured before of the others is kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

import pages  # noqa: E402 - a module of jobs/, which is no package

PAGE = HERE.parents[1] / "docs" / "performance.md"
RESULTS = HERE / "results.json"
ORDER = ("masks", "training", "driver", "memory", "scaling", "whole", "startup")
SCRIPT = "jobs/benchmarks/run.py"


def measure(name: str, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Run one benchmark, pass its output on, and return its findings. Raises SystemExit when it fails."""
    command = [sys.executable, "-u", str(HERE / f"{name}.py"), *arguments]
    found = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if line.startswith('{"what"'):
                found.append(json.loads(line))
            else:
                print(line, end="", flush=True)
    if running.returncode or not found:
        sys.exit(f"{name}.py ended with code {running.returncode} and {len(found)} findings")
    return found


def number(value: float | None, unit: str = "") -> str:
    """Three digits that count; nothing where nothing was measured."""
    if value is None:
        return ""
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}") + (f" {unit}" if unit else "")


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """The findings as Markdown, in the order of ORDER, and what they were measured on."""
    rows = [
        f"| {found['what']} | {number(found['ours'], found['unit'])} | {found['against']} | "
        f"{number(found['theirs'], found['unit'])} | {number(found['ratio'])} | {found['bar']} | "
        f"{'yes' if found['met'] else '**no**'} |"
        for name in results
        for found in results[name]
    ]
    machines = "; ".join(dict.fromkeys(found["machine"] for name in results for found in results[name]))
    heads = [
        "| what | raymask | measured against | that | ratio | bar | met |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*heads, *rows, "", f"Measured on {machines}."])


def write(results: dict[str, list[dict[str, Any]]]) -> None:
    """Put the findings into RESULTS and their table into PAGE."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    pages.write_table(PAGE, SCRIPT, table(results))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ORDER)}")
    parser.add_argument("--model", help="a 6-layer MiniLM: hub id, or folder")
    parser.add_argument("--glue", help="a folder with mrpc/train.parquet and so on; the hub without it")
    chosen = parser.parse_args()
    if set(chosen.names) - set(ORDER):
        parser.error(f"there are benchmarks called {', '.join(ORDER)}")
    given = [part for key in ("model", "glue") if getattr(chosen, key) for part in (f"--{key}", getattr(chosen, key))]
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in chosen.names or ORDER:
        known[name] = measure(name, given)
        write({name: known[name] for name in ORDER if name in known})
