"""A search of a model of a billion parameters on a machine with 24 GB: memory, and where the time goes.

A decoder with random weights, of the shape of LLaMA, on a few of the quickstart's sentences: two steps of everything.
What is measured is one `raymask search`, its Ray and its worker with it. It takes about ten minutes and 10 GB of disk.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from harness import Finding, tell
from memory import proportional

from raymask.core.records import Result
from raymask.data import quickstart
from raymask.report.text import duration
from raymask.runs.run_dir import RunDir
from raymask.train.model import quiet

GB = 1e9
MACHINE = 24.0  # GB
EVERY = 0.5  # seconds
LAYERS = {"billion": 16, "hundred-million": 2}
WIDTH, SENTENCES, LENGTH = 2048, 100, 32
TRAINING = {"epochs": 0.5, "batch_size": 8, "learning_rate": 1e-3}  # of about 32 rows of so many tokens: two steps
SPEC: dict[str, Any] = {
    "levels": [0.5],
    "candidates": {"count": 2},
    "dense": {"epochs": 0},
    "early_eval": TRAINING | {"eval_steps": 1},
    "finetune": TRAINING,
    "imp": {"run": False},
    "distill": False,
    "optimizer": {"name": "adafactor"},
    "gradient_checkpointing": True,
    "workers": {"count": 1, "cpus": 2, "gpus": 0},
}


def write_model(folder: Path, layers: int, width: int) -> int:
    """A new model in bf16 with a tokenizer, a file a GB; returns its parameters. What kind it is, is said here only."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = quickstart.tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        dtype=torch.bfloat16,
    )
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        module = LlamaForCausalLM._from_config(config)
        module.save_pretrained(folder, max_shard_size="1GB")
        tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in module.parameters())


def write_task(folder: Path) -> dict[str, Any]:
    """The quickstart's first sentences as files, and the spec's task."""
    files = {split: folder / f"{split}.txt" for split in ("train", "report")}
    for split, file in files.items():
        texts, _ = quickstart.sentences(0)[split]
        file.write_text("\n".join(texts[:SENTENCES]), encoding="utf-8")
    return {
        "train": str(files["train"]),
        "test": str(files["report"]),
        "kind": "causal-lm",
        "max_length": LENGTH,
        "validation_share": 0.2,
    }


@dataclass(frozen=True)
class Look:
    """Bytes in proportional set size at a Unix `time`, by whose they are; `files`: pages of files, which may go."""

    time: float
    parts: Mapping[str, int]
    files: int

    @property
    def whole(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GB:.1f}" for name, size in self.parts.items())
        return f"{self.whole / GB:.1f} GB ({parts}; pages of files {self.files / GB:.1f})"


def look(root: psutil.Process) -> Look:
    """At a driver and all that it has started: the driver, its worker, what they share, and the rest."""
    parts, files = Counter({"driver": 0, "worker": 0, "store": 0, "Ray": 0}), 0
    for process in [root, *root.children(recursive=True)]:
        with suppress(psutil.Error, OSError):  # it may just have ended
            share = proportional(process.pid)
            whose = (
                "driver" if process == root else "worker" if process.name().startswith("ray::WorkerActor") else "Ray"
            )
            parts[whose] += share["Pss"] - share["Pss_Shmem"] - share["Pss_File"]
            parts["store"] += share["Pss_Shmem"]
            files += share["Pss_File"]
    return Look(time.time(), parts, files)


def searched(folder: Path, spec: Mapping[str, Any]) -> list[Look]:
    """Run a search in `folder`, and look at it until it ends. Raises SystemExit when it fails."""
    (folder / "spec.yaml").write_text(yaml.safe_dump(dict(spec)), encoding="utf-8")
    command = [sys.executable, "-m", "raymask", "search", "spec.yaml", "--run", "run"]
    looks = []
    with (folder / "log").open("w") as log, psutil.Popen(command, cwd=folder, stdout=log, stderr=log) as running:
        while running.poll() is None:
            with suppress(psutil.Error):
                looks.append(look(running))
            time.sleep(EVERY)
    if running.returncode:
        sys.exit((folder / "log").read_text(encoding="utf-8"))
    return looks


def phases(looks: list[Look], result: Result) -> dict[str, list[Look]]:
    """The looks by what a worker did then; between the pieces of work, and after them, by what had been last."""
    spans = [(span.started, span.phase if span.level else "dense model, no steps") for span in result.timeline]
    found: dict[str, list[Look]] = {}
    for seen in looks:
        begun = [phase for started, phase in spans if started <= seen.time]
        found.setdefault(begun[-1] if begun else "before the first piece of work", []).append(seen)
    return found


def report(layers: int, width: int) -> None:
    """A finding for the memory of a whole search, and a line for each of its phases."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        # aside, so that its memory is back before the search asks for it
        with ProcessPoolExecutor(1, get_context("spawn")) as aside:
            parameters = aside.submit(write_model, folder / "model", layers, width).result()
        spec = SPEC | {"model": {"name": "model", "dtype": "bf16"}, "task": write_task(folder)}
        started = time.monotonic()
        looks = searched(folder, spec)
        seconds = time.monotonic() - started
        result = RunDir(folder / "run").read_result()
        assert result is not None
    for phase, seen in phases(looks, result).items():
        worked = result.seconds.get(phase)
        spent = f", {duration(worked)} of a worker" if worked else ""
        print(f"  {phase}: {duration(seen[-1].time - seen[0].time)}{spent}, at most {max(seen, key=lambda s: s.whole)}")
    peak = max(looks, key=lambda seen: seen.whole)
    what = f"a whole search of a decoder of {parameters / 1e6:,.0f} M parameters, two random masks, two steps each"
    note = f"in bf16, with Adafactor and checkpointing, {seconds:.0f} s, every {EVERY:g} s PSS of all processes: {peak}"
    used, machine = (peak.whole + peak.files) / GB, f"a machine of {MACHINE:.0f} GB"
    tell(Finding(what, machine, used, MACHINE, "GB", MACHINE / used, "fits", used < MACHINE, note))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=LAYERS, default="billion")
    parser.add_argument("--quick", action="store_true", help="sizes at which it only shows that it runs")
    chosen = parser.parse_args()
    report(2 if chosen.quick else LAYERS[chosen.size], 64 if chosen.quick else WIDTH)
