"""Training, masks and whole searches on one CUDA GPU, with nothing from the network."""

from __future__ import annotations

import argparse
import csv
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Finding, best_of, tell
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from raymask.api import search
from raymask.core.masking import masks
from raymask.core.masking.masks import Mask
from raymask.core.masking.noise import Noise
from raymask.core.masking.samplers import SampleFn
from raymask.core.records import Candidate, Result, TrainConfig
from raymask.core.spec import Spec
from raymask.core.tasks import Snapshot
from raymask.core.tensors import pack
from raymask.data import quickstart
from raymask.data.types import TaskData, TokenizedSplit
from raymask.train.context import WorkerContext
from raymask.train.device import autocast_factory, isolated_torch_state
from raymask.train.model import build_model, inspect_model, quiet, state_tensors
from raymask.train.worker import Worker

MRPC_ROWS = 3668
STAGE = TrainConfig(epochs=1.0, batch_size=64, learning_rate=2e-4, schedule="linear", warmup=0.1, distill=False)
CANDIDATE = Candidate(level=1, index=1, seed=1, density=1 / 16, noise=Noise(exponent=5.0, sampling_ratio=3e-4))
# Dense bf16 FLOP/s by words of the device's name; the first that fit count.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12}
PEAKS |= {"RTX 4090": 165e12}
ONE_WORKER: dict[str, dict[str, float]] = {"cuda": {"gpus": 1.0, "count": 1}, "cpu": {"gpus": 0.0, "count": 1}}
SMALL_WORKERS: dict[str, dict[str, float]] = {"cuda": {"gpus": 0.25, "count": 4}, "cpu": {"gpus": 0.0, "count": 2}}
# From random weights, and in minutes.
SEARCH = {"dense": {"epochs": 6.0, "learning_rate": 3e-4}, "finetune": {"epochs": 2.0}}
QUICK = {"levels": [0.5, 0.75], "candidates": {"count": 3}, "dense": {"epochs": 1.0}, "finetune": {"epochs": 1.0}}


def shapes(quick: bool) -> dict[str, BertConfig]:
    """The models by name, the smallest last."""
    if quick:
        tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        return {"a tiny BERT": BertConfig(**tiny, vocab_size=512)}
    minilm = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return {"BERT-base": BertConfig(), "MiniLM-L6": BertConfig(**minilm)}


def mrpc_lengths(count: int) -> np.ndarray:
    """Tokens a row, int64 (count,), distributed about as MRPC's."""
    return np.random.default_rng(0).normal(53, 15, count).round().clip(10, 128).astype(np.int64)


def mrpc_rows(count: int, vocabulary: int) -> TokenizedSplit:
    """Random tokens and labels, in rows as long as MRPC's."""
    rng, offsets = np.random.default_rng(1), np.concatenate([[0], np.cumsum(mrpc_lengths(count))])
    ids = rng.integers(5, vocabulary, offsets[-1]).astype(np.int32)
    return TokenizedSplit(ids, np.zeros(len(ids), np.int8), offsets, rng.integers(0, 2, count))


class Bench:
    """A worker on `device` with a new model of the configuration, one epoch of `count` rows, and CANDIDATE's mask."""

    def __init__(self, name: str, config: BertConfig, device: str, count: int) -> None:
        self.name = name
        self.spec = Spec.model_validate({"model": name, "task": "glue/mrpc", "distill": False})
        self.source = inspect_model(self.spec.model, config, ("different", "same"))
        self.rows = mrpc_rows(count, config.vocab_size)
        data = TaskData(self.rows, self.rows, self.rows, {"": (0, count)}, ("accuracy",), "classification", padding=0)
        self.worker = Worker(WorkerContext(self.spec, self.source, data), device)
        self.parent = Snapshot("random", pack(state_tensors(build_model(config))))
        with isolated_torch_state(self.spec, self.worker.device):
            self.mask, _ = self.worker.reset(self.parent, CANDIDATE)

    def train(self, mask: Mask, precision: str, *, as_search: bool = True) -> None:
        """One epoch in raymask's loop; with `as_search` on a search's kernels, deterministic on a GPU."""
        worker = self.worker
        trainer = replace(worker.trainer, autocast=autocast_factory(precision, worker.device))
        with isolated_torch_state(self.spec, worker.device) if as_search else nullcontext():
            list(trainer.train(worker.context.data.train, STAGE, worker.optimizer(self.parent), mask, seed=0))
            finish(worker.device)

    def flops(self) -> float:
        """FLOPs of one epoch: 6 P s + 12 L d s^2 a row of s real tokens; padding does not count.

        P: parameters of the L blocks, pruned ones included, since the kernels are dense; d: their width. The forward
        pass takes 2 P s, and 2 s^2 d a block for each of attention's two products; the backward pass twice that.
        """
        config, lengths = self.worker.context.config, self.rows.lengths.astype(float)
        linear = 6 * self.source.sizes.encoder * lengths.sum()
        return float(linear + 12 * config.num_hidden_layers * config.hidden_size * (lengths**2).sum())


def finish(device: torch.device) -> None:
    """Wait until the GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def training(bench: Bench, times: int) -> None:
    """Examples a second of a masked candidate in bf16, against no mask, fp32 and torch's own kernels; then FLOPs."""
    seconds = best_of(
        times,
        partial(bench.train, bench.mask, "bf16"),
        partial(bench.train, {}, "bf16"),
        partial(bench.train, bench.mask, "fp32"),
        partial(bench.train, bench.mask, "bf16", as_search=False),
    )
    masked, unmasked, fp32, plain = (len(bench.rows) / found for found in seconds)
    what, unit = f"training a masked candidate, {bench.name}, MRPC's lengths, batch 64, bf16", "examples/s"
    ratio, cost = masked / unmasked, unmasked / masked - 1
    note = (
        f"an epoch of {len(bench.rows):,} rows, no teacher, the fastest of {times}; masking adds {cost:.1%} to a step"
    )
    tell(Finding(what, "the same loop without masks", masked, unmasked, unit, ratio, "<= 3 %", cost <= 0.03, note))
    tell(Finding(what, "in fp32", masked, fp32, unit, masked / fp32, "faster", masked > fp32))
    ratio, note = masked / plain, f"raymask's choice, deterministic on a GPU, adds {plain / masked - 1:.1%} to a step"
    tell(Finding(what, "on torch's own choice of kernels", masked, plain, unit, ratio, "stated", True, note))
    utilisation(bench, seconds[0])


def utilisation(bench: Bench, seconds: float) -> None:
    """TFLOP/s of an epoch that took `seconds`, over the device's peak where it is known."""
    device = torch.cuda.get_device_name() if bench.worker.device.type == "cuda" else "the CPU"
    peak = next((flops / 1e12 for words, flops in PEAKS.items() if re.search(rf"\b{words}\b", device)), None)
    achieved = bench.flops() / seconds / 1e12
    ratio = achieved / peak if peak else None
    against = f"bf16 peak of {device}" if peak else f"{device}, whose peak is not in the table"
    note = f"model FLOPs utilisation {ratio:.1%}; " if ratio else ""
    note += f"6 P s + 12 L d s^2 a row of s real tokens, P = {bench.source.sizes.encoder / 1e6:.3g} million in blocks"
    tell(Finding(f"the same, {bench.name}", against, achieved, peak, "TFLOP/s", ratio, "stated", True, note))


def host_waits(bench: Bench) -> None:
    """How many times in a training step the host waits for the GPU, and in which lines."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        bench.train(bench.mask, "bf16")
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchronizing CUDA" in str(warning.message)]
    places = Counter(f"{Path(wait.filename).name}:{wait.lineno}" for wait in waits)
    steps = -(-len(bench.rows) // STAGE.batch_size)
    note = f"in {steps} steps: " + ", ".join(f"{count} at {place}" for place, count in places.most_common(5))
    what = f"host waits for the GPU, {bench.name}"
    tell(Finding(what, "none", len(waits) / steps, None, "a step", None, "stated", True, note))


def drawing(bench: Bench, times: int) -> None:
    """Seconds to draw a whole mask on the device and on the CPU: a level's first candidate, and a further one."""
    weights = bench.parent.weights.views()
    there = {name: weights[name] for name in bench.source.prunable}
    here = {name: weight.to(bench.worker.device) for name, weight in there.items()}
    sides = [(here, dict[object, SampleFn]()), (there, dict[object, SampleFn]())]
    for side in sides:
        draw(bench.spec, *side)  # warms up, and prepares what the level's further candidates share
    first = best_of(times, lambda: draw(bench.spec, here, {}), lambda: draw(bench.spec, there, {}))
    further = best_of(times, *(partial(draw, bench.spec, *side) for side in sides))
    name = f"drawing a whole mask of {bench.name} ({len(here)} matrices, density 1/16, r = 3e-4)"
    note = f"the fastest of {times}, taken in turns; {bench.spec.workers.threads} CPU thread"
    for which, (ours, theirs) in (("first of a level", first), ("further one", further)):
        tell(Finding(f"{name}, {which}", "the CPU", ours, theirs, "s", theirs / ours, "faster", ours < theirs, note))


def draw(spec: Spec, weights: Mapping[str, Tensor], prepared: dict[object, SampleFn]) -> None:
    """CANDIDATE's mask on the weights' device, as a worker there draws it."""
    device = next(iter(weights.values())).device
    with isolated_torch_state(spec, device):
        masks.draw_mask(weights, CANDIDATE.density, seed=CANDIDATE.seed, noise=CANDIDATE.noise, sampler_cache=prepared)
        finish(device)


def write_search(folder: Path, config: BertConfig, rows: int) -> dict[str, Any]:
    """A model and a task in files, and the spec's keys that name them.

    A row is as long as one of MRPC, and made of the quickstart's sentences of one label: that can be learnt soon.
    """
    words = (*quickstart.SPECIAL_TOKENS, *quickstart.vocabulary())
    with quiet():
        BertTokenizer({word: id for id, word in enumerate(words)}, model_max_length=128).save_pretrained(folder)
        BertForSequenceClassification(config).save_pretrained(folder)
    rng, made = np.random.default_rng(2), quickstart.sentences(0)
    for split, count in (("train", rows), ("report", rows // 9)):  # as in GLUE
        texts = [[text for text, label in zip(*made[split], strict=True) if label == wanted] for wanted in (0, 1)]
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label"))
            for row, length in enumerate(mrpc_lengths(count) - 2):  # [CLS] and [SEP] come on top
                review: list[str] = []
                while len(review) < length:
                    review += quickstart.words_of(str(rng.choice(texts[row % 2])))
                writer.writerow((" ".join(review[:length]), row % 2))
    files = {split: str(folder / f"{file}.csv") for split, file in (("train", "train"), ("test", "report"))}
    return {"model": str(folder), "task": files | {"text": "text"}}


def searches(name: str, config: BertConfig, device: str, *, quick: bool, in_process: bool) -> None:
    """Seconds of whole searches: in this process, on Ray, and on Ray with several workers on the device."""
    rows, settings = (128, QUICK) if quick else (MRPC_ROWS, SEARCH)
    with tempfile.TemporaryDirectory() as folder:
        asked = settings | write_search(Path(folder), config, rows)

        def timed(run: str, workers: dict[str, float], here: bool) -> tuple[float, Result]:
            torch.cuda.empty_cache()  # others on the GPU may need the memory
            started = time.perf_counter()
            result = search(asked | {"workers": workers}, Path(folder) / run, in_process=here)
            return time.perf_counter() - started, result

        one, many = ONE_WORKER[device], SMALL_WORKERS[device]
        alone, result = timed("alone", one, True)
        what = f"a whole search, {name}, {rows:,} rows of MRPC's lengths"
        spent = ", ".join(f"{purpose} {seconds:.1f} s" for purpose, seconds in result.seconds.items())
        scores = ", ".join(f"{row.name} {row.test_metrics['accuracy']:.3f}" for row in result.models)
        note = (
            f"{len(result.levels)} levels of {result.levels[0].num_evaluated} candidates: {spent}; accuracy: {scores}"
        )
        tell(Finding(f"{what}, without Ray", "nothing", alone, None, "s", None, "stated", True, note))
        if in_process:
            return
        single, result = timed("one", one, False)
        note = "with the start of Ray and of its worker"
        tell(Finding(f"{what}, on Ray", "without Ray", single, alone, "s", alone / single, "stated", True, note))
        wide, shared = timed("many", many, False)
        slow, fast = candidate_seconds(result), candidate_seconds(shared)
        note = f"{len({span.worker for span in shared.timeline})} workers came; levels from the second on, when all "
        note += f"have started; the whole search took {wide:.1f} s against {single:.1f} s"
        what, against = f"candidate stage, {name}, workers: {many}", f"workers: {one}"
        tell(Finding(what, against, fast, slow, "s", slow / fast, "faster", fast < slow, note))


def candidate_seconds(result: Result) -> float:
    """Seconds from a level's first candidate's start to its last one's end, summed over the levels from 2 on."""
    early = [span for span in result.timeline if span.phase == "early evaluation" and span.level > 1]
    began = {span.level: span.started for span in reversed(early)}  # the timeline is in the order of starts
    return sum(max(p.started + p.seconds for p in early if p.level == level) - began[level] for level in began)


def command_line() -> argparse.Namespace:
    """What to measure, and where; ends the program where that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in-process", action="store_true", help="leave out what needs Ray")
    parser.add_argument("--quick", action="store_true", help="sizes at which it only shows that it runs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only with --quick")
    chosen = parser.parse_args()
    if chosen.device == "cpu" and not chosen.quick:
        parser.error("--device cpu only shows that this runs: add --quick")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        advice = "run this with a GPU and a CUDA build of torch, or see that it runs with --quick --device cpu"
        parser.exit(2, f"no CUDA device was found (torch {torch.__version__}): {advice}\n")
    return chosen


def main() -> None:
    """All findings, one model after another."""
    chosen = command_line()
    models = shapes(chosen.quick)
    rows, times = (128, 2) if chosen.quick else (MRPC_ROWS, 3)
    for index, (name, config) in enumerate(models.items()):
        bench = Bench(name, config, chosen.device, rows)
        training(bench, times)
        if chosen.device == "cuda":
            host_waits(bench)
        if index == 0:
            drawing(bench, times)
    del bench
    searches(name, config, chosen.device, quick=chosen.quick, in_process=chosen.in_process)


if __name__ == "__main__":
    main()
