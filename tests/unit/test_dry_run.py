"""Dry runs: what is tried before a search, and what is refused."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from support.builders import (
    SIZE,
    random_weights,
    refused,
    tiny_config,
    tiny_context,
)
from support.fakes import setup_of
from transformers import AutoConfig

from raymask.core.errors import UserError
from raymask.core.spec import Model
from raymask.data.types import TokenizedSplit
from raymask.driver import setup as driver
from raymask.train import dry_run as dry
from raymask.train.context import BACKWARD_FACTOR, WorkerContext
from raymask.train.device import free_memory
from raymask.train.dry_run import MAX_BATCH_EFFECT, DryRun, dry_run, extreme_rows
from raymask.train.model import inspect_model

STACKS = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
STACKS |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "eos_token_id": 3}


def context_of(config: Any, **settings: Any) -> WorkerContext:
    """A worker's context for a classifier of any configuration, with the tiny tokenizer's rows."""
    base = tiny_context(rows=(12, 6, 6), **settings)
    info = inspect_model(Model(name=config.model_type), config, ("bad", "good"))
    rows = {name: ragged(getattr(base.data, name)) for name in ("train", "validation", "test")}
    data = replace(base.data, padding=config.pad_token_id or 0, **rows)
    return WorkerContext(base.spec, info, data)


def ragged(rows: TokenizedSplit) -> TokenizedSplit:
    """The rows without token types, every second one without some words before its last token."""
    ids = [list(rows.ids[start:end]) for start, end in pairwise(rows.offsets)]
    ids = [row if index % 2 else [row[0], row[-1]] for index, row in enumerate(ids)]
    offsets = np.cumsum([0, *map(len, ids)])
    return TokenizedSplit(np.concatenate(ids).astype(np.int32), None, offsets, rows.labels)


def tried(context: WorkerContext) -> DryRun:
    return dry_run(context, random_weights(context.config, 0, context.data.kind))


def sized(family: str, **changes: Any) -> Any:
    return AutoConfig.for_model(
        family, **{"vocab_size": 72, "pad_token_id": 0, "initializer_range": 0.2, "init_std": 0.2} | changes
    )


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("distill", [False, True])
def test_a_model_that_works_passes(family: str, distill: bool) -> None:
    found = tried(tiny_context(family, distill=distill))
    assert found.precision == "fp32"
    assert found.batch_effect < 1e-4
    assert found.error is None


@pytest.mark.parametrize(
    "config",
    [
        sized("bart", **STACKS, max_position_embeddings=72),
        sized("t5", d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, eos_token_id=3, decoder_start_token_id=0),
    ],
    ids=lambda config: config.model_type,
)
def test_encoders_with_decoders_can_be_distilled(config: Any) -> None:
    assert tried(context_of(config, distill=True)).batch_effect < 1e-4


def test_outputs_that_depend_on_padding_are_told() -> None:
    assert tried(context_of(sized("fnet", **SIZE))).batch_effect > MAX_BATCH_EFFECT


def test_padding_that_the_model_takes_for_text_is_seen() -> None:
    context = context_of(tiny_config("gpt2", pad_token_id=4))
    assert tried(context).batch_effect < 1e-4
    assert tried(replace(context, data=replace(context.data, padding=5))).batch_effect > MAX_BATCH_EFFECT


class Breaks:
    """A worker that fails with some settings of the spec."""

    def __init__(self, precisions: set[str], distill: set[bool]) -> None:
        self.precisions, self.distill = precisions, distill

    def __call__(self, context: WorkerContext, weights: Any) -> DryRun:
        if context.spec.precision in self.precisions:
            raise RuntimeError("no kernel\nsecond line")
        if context.spec.distill in self.distill:
            raise TypeError("no attentions")
        return DryRun(context.spec.precision, 0.0, 8)


@pytest.mark.parametrize(
    ("precision", "breaks", "found"),
    [
        ("auto", Breaks({"bf16"}, set()), DryRun("fp32", 0.0, 8, "RuntimeError: no kernel")),
        ("auto", Breaks(set(), set()), DryRun("auto", 0.0, 8)),
        ("fp32", Breaks({"bf16"}, set()), DryRun("fp32", 0.0, 8)),
        ("bf16", Breaks({"bf16"}, set()), "(RuntimeError: no kernel). It does not with precision: fp32"),
        ("auto", Breaks(set(), {True}), "(TypeError: no attentions). It does not with distill: false"),
        ("auto", Breaks({"bf16"}, {True}), "(RuntimeError: no kernel). It does not with distill: false"),
        ("bf16", Breaks({"bf16"}, {True}), ". It does not with precision: fp32, distill: false"),
        ("fp32", Breaks(set(), {True, False}), "bert fails on the task's rows: TypeError: no attentions"),
    ],
)
def test_what_fails_is_refused_with_what_to_change(
    monkeypatch: pytest.MonkeyPatch, precision: str, breaks: Breaks, found: DryRun | str
) -> None:
    monkeypatch.setattr(dry, "run_steps", breaks)
    context = tiny_context(distill=True, precision=precision)
    context = replace(context, spec=context.spec.model_copy(update={"model": Model(name="bert")}))
    if isinstance(found, DryRun):
        assert dry_run(context, None) == found  # type: ignore[arg-type]
    else:
        assert refused(dry_run, context, None).endswith(found)


class Stateful:
    """A worker whose model gives other outputs for good once it has seen a short row."""

    def __init__(self, change: float) -> None:
        self.change, self.short_seen = change, False
        self.context = tiny_context(rows=(12, 6, 6))
        self.trainer = self.without_autocast = self

    def predict(self, rows: TokenizedSplit) -> torch.Tensor:
        self.short_seen |= bool(rows.lengths.max() < 4)
        return torch.from_numpy(rows.lengths[:, None] + self.change * self.short_seen).float()


def test_a_model_that_changes_with_the_rows_it_has_seen_is_refused() -> None:
    rows = ragged(tiny_context(rows=(12, 6, 6)).data.test)
    assert dry.batch_effect(Stateful(0.0), rows) == 0.0  # type: ignore[arg-type]
    message = refused(dry.batch_effect, Stateful(0.1), rows)
    assert message.startswith("model.name: quickstart gives a row other outputs once it has seen shorter ones, so that")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (DryRun("fp32", 0.0, 8), []),
        (
            DryRun("fp32", 0.0, 8, "RuntimeError: no kernel"),
            ["quickstart fails in bf16 (RuntimeError: no kernel): it "],
        ),
        (
            DryRun("auto", 0.5, 8),
            ["warning: the outputs of quickstart for a row depend on the rows beside it"],
        ),
    ],
)
def test_what_a_dry_run_finds_is_told_and_the_workers_follow_it(
    monkeypatch: pytest.MonkeyPatch, found: DryRun, said: list[str]
) -> None:
    monkeypatch.setattr(driver, "dry_run", lambda context, weights: found)
    lines: list[str] = []
    before = setup_of()
    after = driver.apply_dry_run(before, lines.append)
    assert after.context.spec.precision == found.precision
    assert after.context.activation_bytes in (8, 16)
    assert after.recipe == before.recipe
    assert [line.startswith(start) for line, start in zip(lines, said, strict=True)] == [True] * len(said)


def test_a_model_that_does_not_fit_here_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "free_memory", lambda: 2**28)
    monkeypatch.setattr(driver, "dry_run", None)
    lines: list[str] = []
    before = setup_of()
    assert driver.apply_dry_run(before, lines.append) is before
    assert lines == ["not tried before the search: a few steps take 0.5 GiB, 0.2 are free here"]


def test_free_memory_is_some_of_what_the_machine_has() -> None:
    assert 2**20 < free_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def equal_rows(length: int) -> TokenizedSplit:
    """Four rows of this length."""
    return TokenizedSplit(np.full(4 * length, 7, np.int32), None, np.arange(5) * length, np.array([0, 1, 0, 1]))


def test_what_a_step_keeps_grows_with_the_length_of_rows() -> None:
    context = tiny_context(rows=(12, 6, 6))
    short, long = (
        tried(replace(context, data=replace(context.data, train=equal_rows(length)))).activation_bytes
        for length in (16, 32)
    )
    assert 1.8 < long / short < 3  # attention grows with the square
    hidden = 4 * 16 * 16  # bytes of one layer's hidden states of a short row
    assert short > 20 * hidden


def test_memory_grows_with_the_batch_by_what_a_step_keeps_of_a_row() -> None:
    small, large = (tiny_context(early_eval={"batch_size": size}) for size in (32, 48))
    sizes = [replace(each, activation_bytes=2**20).peak_host_memory(on_gpu=False) for each in (small, large)]
    assert sizes[1] - sizes[0] == BACKWARD_FACTOR * 2**20 * 16


def test_a_mistake_that_has_a_message_of_its_own_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry, "run_steps", mock.Mock(side_effect=UserError("mask.score: wanda")))
    assert refused(tried, tiny_context()) == "mask.score: wanda"


def test_a_loss_that_is_not_finite_is_a_failure() -> None:
    context = tiny_context(rows=(12, 6, 6))
    weights = random_weights(context.config, 0)
    weights.views()["classifier.bias"].fill_(float("inf"))
    assert refused(dry_run, context, weights).endswith("FloatingPointError: the loss is nan")


def test_the_shortest_and_the_longest_rows_are_tried() -> None:
    rows = tiny_context(rows=(40, 6, 6)).data.train
    few = extreme_rows(rows)
    assert len(few) == 4
    assert few.lengths.min() == rows.lengths.min()
    assert few.lengths.max() == rows.lengths.max()
    assert len(extreme_rows(few.take(np.array([0])))) == 1
