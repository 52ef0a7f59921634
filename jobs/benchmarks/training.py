"""Speed of training a candidate, cost of its mask, and what a cached teacher saves."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import numpy as np
import reference
import torch
from harness import Finding, best_of, options, task, tell
from torch import nn
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

from raymask.core.masking.masks import Mask
from raymask.core.recipe import early_eval_config, propose_candidates, resolve
from raymask.core.spec import Spec
from raymask.core.tasks import Snapshot
from raymask.core.tensors import copy_into
from raymask.driver.setup import SearchSetup, prepare
from raymask.train import trainer
from raymask.train.device import computes_bf16, isolated_torch_state
from raymask.train.model import load_weights
from raymask.train.worker import Worker

THREADS = 2
SPEC = {"levels": [0.9375], "candidates": {"count": 8}, "precision": "auto", "workers": {"cpus": float(THREADS)}}


class Bench:
    """A worker at the start of a level, and the three ways to train a candidate for `steps` steps from there."""

    def __init__(self, chosen: Any, distill: bool) -> None:
        self.spec = Spec.model_validate({**SPEC, "model": chosen.model, "task": task(chosen), "distill": distill})
        self.search_setup: SearchSetup = prepare(self.spec)
        self.rows = self.search_setup.context.data.train
        self.stage = early_eval_config(self.spec)
        steps = 4 if chosen.quick else 16
        self.stage = self.stage.model_copy(
            update={"epochs": steps / trainer.steps_per_epoch(self.stage, len(self.rows))}
        )
        self.steps = trainer.num_steps(self.stage, len(self.rows))
        self.worker = Worker(self.search_setup.context, "cpu")
        weights = load_weights(self.spec.model, self.search_setup.model_info.config, 0, False)
        self.parent = Snapshot("parent", weights, teacher=weights if distill else None)
        self.candidates = propose_candidates(resolve(self.spec), 1)
        with isolated_torch_state(self.spec, self.worker.device):
            self.mask, _ = self.worker.reset(self.parent, self.candidates[1])

    def ours(self, mask: Mask) -> None:
        """The candidate stage's own loop."""
        with isolated_torch_state(self.spec, self.worker.device):
            copy_into(self.parent.weights, self.worker.named_tensors)
            optimizer = self.worker.optimizer(self.parent)
            teacher = self.worker.teacher_outputs(self.parent, self.stage, 0, 0, cache=False)
            train = self.worker.context.data.train
            list(self.worker.trainer.train(train, self.stage, optimizer, mask, seed=0, teacher=teacher))

    def reset(self, module: nn.Module) -> nn.Module:
        """Another model of the same kind at the parent's weights."""
        module.load_state_dict(self.parent.weights.views(), strict=False)
        return module

    def trainer(self, module: nn.Module, folder: str) -> None:
        """transformers.Trainer on the same rows."""
        stage = self.stage
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            bf16=computes_bf16(self.spec.precision, self.worker.device),
            per_device_train_batch_size=stage.batch_size,
            max_steps=self.steps,
            learning_rate=stage.learning_rate,
            optim="adamw_torch_fused",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        collator = DataCollatorWithPadding(self.search_setup.tokenizer)
        trainer = Trainer(self.reset(module), arguments, train_dataset=self.examples, data_collator=collator)
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    @cached_property
    def examples(self) -> list[dict[str, list[int] | int]]:
        """The rows as Trainer takes them."""
        rows, ends = self.rows, self.rows.offsets
        return [
            {
                "input_ids": rows.ids[ends[i] : ends[i + 1]].tolist(),
                **({} if rows.types is None else {"token_type_ids": rows.types[ends[i] : ends[i + 1]].tolist()}),
                "attention_mask": [1] * int(ends[i + 1] - ends[i]),
                "labels": int(rows.labels[i]),
            }
            for i in range(len(rows))
        ]

    def plain(self, module: nn.Module) -> None:
        """The reference's loop, masked."""
        reference.train(
            self.reset(module),
            self.rows,
            padding=self.search_setup.context.data.padding,
            steps=self.steps,
            batch_size=self.stage.batch_size,
            learning_rate=self.stage.learning_rate,
            warmup=self.stage.warmup,
            constant=False,
            mask=self.mask,
            autocast=self.worker.trainer.autocast,
            rng=np.random.default_rng(0),
        )


def throughput(bench: Bench, times: int) -> None:
    """Examples a second: ours, Trainer's, the plain loop's, and ours without a mask."""
    from raymask.train.model import build_model

    sdpa = build_model(bench.search_setup.context.config)
    eager = build_model(bench.search_setup.context.config, show_attention=True)
    assert bench.examples, "made before anything is timed: a user's data are there already"
    with tempfile.TemporaryDirectory() as folder:
        sides: list[Callable[[], None]] = [
            partial(bench.ours, bench.mask),
            partial(bench.ours, {}),
            partial(bench.trainer, sdpa, folder),
            partial(bench.plain, eager),
        ]
        seconds = best_of(times, *sides)
    trained = bench.steps * bench.stage.batch_size
    masked, free, trainer, plain = (trained / found for found in seconds)
    what = "training a candidate, MiniLM-L6 on MRPC, batch 64"
    note = f"{bench.steps} steps, the fastest of {times} runs a side, taken in turns, {THREADS} threads, "
    note += "bf16" if computes_bf16(bench.spec.precision, bench.worker.device) else "fp32"
    unit = "examples/s"
    ratio = masked / trainer
    tell(Finding(what, "transformers.Trainer", masked, trainer, unit, ratio, "1.3x", ratio >= 1.3, note))
    ratio = masked / plain
    tell(Finding(what, "the reference's loop, written plainly", masked, plain, unit, ratio, "3x", ratio >= 3, note))
    cost = seconds[0] / seconds[1] - 1
    what = f"masking, share of a step: {cost:.1%}"
    tell(Finding(what, "the same loop without masks", masked, free, unit, masked / free, "<= 3 %", cost <= 0.03, note))


def teaching(bench: Bench) -> None:
    """Seconds of a distilled candidate: the worker's first of a level, and its next."""
    found = []
    for candidate in bench.candidates[1:3]:
        with isolated_torch_state(bench.spec, bench.worker.device):
            mask, _ = bench.worker.reset(bench.parent, candidate)
            optimizer = bench.worker.optimizer(bench.parent)
            started = time.perf_counter()
            teacher = bench.worker.teacher_outputs(bench.parent, bench.stage, 0, 0, cache=True)
            train = bench.worker.context.data.train
            list(bench.worker.trainer.train(train, bench.stage, optimizer, mask, seed=0, teacher=teacher))
            found.append(time.perf_counter() - started)
    first, further = found
    tell(
        Finding(
            "distilled training of a level's further candidate",
            "its first, which runs the teacher",
            further,
            first,
            "s",
            first / further,
            "states what it saves",
            further < first,
            f"{1 - further / first:.0%} of the time saved",
        )
    )


if __name__ == "__main__":
    chosen = options(__doc__)
    torch.set_num_threads(THREADS)
    throughput(Bench(chosen, distill=False), 1 if chosen.quick else 3)
    teaching(Bench(chosen, distill=True))
