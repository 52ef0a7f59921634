"""Time of a whole search against the method's procedure in one process."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import reference
import torch
from harness import Finding, options, task, tell
from torch import Tensor, nn

import raymask
from raymask.core.masking import masks
from raymask.core.recipe import dense_config, early_eval_config, finetune_config, propose_candidates, resolve
from raymask.core.records import TrainConfig
from raymask.core.spec import Spec
from raymask.driver.setup import prepare
from raymask.report.text import duration
from raymask.report.timeline import timeline
from raymask.train.device import autocast_factory, computes_bf16
from raymask.train.model import build_model, load_weights

THREADS = 2
FULL = {
    "levels": [0.9375],
    "candidates": {"count": 3},
    "dense": {"epochs": 0.5, "learning_rate": 1e-4, "batch_size": 64},
    "early_eval": {"epochs": 0.5, "eval_steps": 8, "score_window": 3},
    "finetune": {"epochs": 1.0, "learning_rate": 1e-4},
    "imp": {"epochs": 1.0},
    "distill": False,
}
QUICK = FULL | {
    "candidates": {"count": 1},
    "dense": {"epochs": 0.02, "batch_size": 16},
    "early_eval": {"epochs": 0.02, "eval_steps": 1, "batch_size": 16},
    "finetune": {"epochs": 0.02, "batch_size": 16},
    "imp": {"epochs": 0.02},
}


class Plain:
    """The method in one process: its sampler, its padding, its loop, one candidate after another."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.recipe = spec, resolve(spec)
        self.search_setup = prepare(spec)
        self.data = self.search_setup.context.data
        self.autocast = autocast_factory(spec.precision, torch.device("cpu"))
        self.module = build_model(self.search_setup.model_info.config, show_attention=True)
        weights = load_weights(spec.model, self.search_setup.model_info.config, 0, False).views()
        self.module.load_state_dict(weights, strict=False)
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def timed(self, purpose: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[purpose] += time.perf_counter() - started

    def train(
        self, module: nn.Module, stage: TrainConfig, mask: dict[str, Tensor], looks: int
    ) -> list[tuple[float, float]]:
        """Train in place, evaluating on validation every so many steps, and once where there are fewer."""
        per_epoch = -(-len(self.data.train) // stage.batch_size)
        steps = max(1, round(stage.epochs * per_epoch))
        curve: list[tuple[float, float]] = []

        def look(step: int) -> None:
            if step % looks == 0 or (step == steps and not curve):
                with self.timed("looks"):
                    found = reference.evaluate(module, self.data.validation, self.data.padding, self.autocast)
                curve.append(found)

        reference.train(
            module,
            self.data.train,
            padding=self.data.padding,
            steps=steps,
            batch_size=stage.batch_size,
            learning_rate=stage.learning_rate,
            warmup=stage.warmup,
            constant=stage.schedule == "constant",
            mask=mask,
            autocast=self.autocast,
            rng=np.random.default_rng(0),
            look=look,
        )
        return curve

    def draw(self, level: int, index: int, parent: nn.Module) -> dict[str, Tensor]:
        """A candidate's mask; index 0 is the magnitude mask."""
        candidate = propose_candidates(self.recipe, level)[index]
        weights = {name: parent.get_parameter(name).detach() for name in self.search_setup.model_info.prunable}
        if candidate.noise is None:
            return masks.draw_mask(weights, candidate.density)
        rng = torch.Generator().manual_seed(candidate.seed)
        noise = candidate.noise
        return {
            name: reference.voted(weight, candidate.density, noise.exponent, noise.sampling_ratio, rng)
            for name, weight in weights.items()
        }

    def prune(self, pool: list[int], epochs: float) -> None:
        """Level by level: evaluate the pool early, fine-tune the best from the parent."""
        module = deepcopy(self.module)
        for level in range(1, len(self.recipe.densities) + 1):
            scores = []
            for index in pool:
                with self.timed("masks"):
                    mask = self.draw(level, index, module)
                if len(pool) > 1:
                    early_eval = self.spec.early_eval
                    with self.timed("early evaluation"):
                        curve = self.train(deepcopy(module), early_eval_config(self.spec), mask, early_eval.eval_steps)
                    scores.append((-float(np.mean([loss for loss, _ in curve[-early_eval.score_window :]])), mask))
            winner = max(scores, key=lambda scored: scored[0])[1] if scores else mask
            stage = finetune_config(self.recipe, level).model_copy(update={"epochs": epochs})
            with self.timed("fine-tuning"):
                self.train(module, stage, winner, -(-len(self.data.train) // stage.batch_size))

    def search(self) -> float:
        """Seconds for the dense model, the search, and the baseline."""
        started = time.perf_counter()
        stage = dense_config(self.spec)
        with self.timed("dense"):
            self.train(self.module, stage, {}, -(-len(self.data.train) // stage.batch_size))
        self.prune(list(range(self.spec.candidates.count + 1)), self.spec.finetune.epochs)
        self.prune([0], self.spec.imp.epochs or self.spec.finetune.epochs)
        return time.perf_counter() - started


def ours(spec: Spec) -> tuple[float, list[str]]:
    """Seconds of the search on two workers, Ray's start and end included, and where they went."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        result = raymask.search(spec, run=Path(folder) / "run")
        return time.perf_counter() - started, timeline(result.timeline)


if __name__ == "__main__":
    chosen = options(__doc__)
    settings: dict[str, Any] = QUICK if chosen.quick else FULL
    spec = Spec.model_validate({**settings, "model": chosen.model, "task": task(chosen)})
    fast, lines = ours(spec)
    print("\n".join(lines))
    torch.set_num_threads(THREADS)
    plain = Plain(spec)
    slow = plain.search()
    print("the plain procedure: " + ", ".join(f"{what} {duration(spent)}" for what, spent in plain.seconds.items()))
    precision = "bf16" if computes_bf16(spec.precision, torch.device("cpu")) else "fp32"
    note = f"{len(resolve(spec).densities)} levels, magnitude mask + {spec.candidates.count}, the same epochs and "
    note += "evaluations, "
    note += f"{precision} on both sides; 2 workers of one thread against {THREADS} threads; Ray's start is in ours"
    what = "a whole search, MiniLM-L6 on MRPC"
    ratio = slow / fast
    tell(
        Finding(what, "the method's procedure, one process", fast, slow, "s", ratio, ">= 5x, aim 8x", ratio >= 5, note)
    )
