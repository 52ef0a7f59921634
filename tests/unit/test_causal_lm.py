"""Whole searches on a decoder, and the perplexity of their exports."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from support.builders import DECODERS, tiny_context, tiny_snapshot
from support.specs import decoder_spec
from transformers import AutoModelForCausalLM, AutoTokenizer

import raymask
from raymask.commands.check import show_check
from raymask.commands.show import show_run
from raymask.config import make_spec
from raymask.core.lineage import DENSE
from raymask.core.masking.masks import unpack_bits
from raymask.core.masking.scorers import SCORERS
from raymask.core.recipe import finetune_config, propose_candidates, resolve
from raymask.core.records import Result
from raymask.core.tasks import EvalTask, FinetuneTask
from raymask.report.console import show_result
from raymask.runs.run_dir import RunDir
from raymask.train.worker import Worker

LENGTH = 16


def plain_perplexity(folder: Path, text: str) -> float:
    """By transformers alone: every token of every row, from what stands before it in its row."""
    module, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    costs = []
    with torch.no_grad():
        for row in (torch.tensor(ids[start : start + LENGTH]) for start in range(0, len(ids), LENGTH)):
            costs += [
                -module(input_ids=row[None, :end]).logits[0, -1].log_softmax(-1)[row[end]].item()
                for end in range(1, len(row))
            ]
    return math.exp(np.mean(costs))


def said(result: Result) -> str:
    console = Console(file=io.StringIO(), width=160)
    show_result(console, result)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


SECTIONS: dict[str, dict[str, Any]] = {
    "llama": {"select": {"keep": 2}},
    "gpt2": {"dense": {"epochs": 0}, "distill": False, "mask": {"pattern": "n:4", "score": "wanda"}},
}


pytestmark = pytest.mark.usefixtures("few_resamples")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Any], Path, Result]]:
    """A function (family) -> the spec, the folder with the files and the `run`, and the result. Only ever read it."""

    @cache
    def search(family: str) -> tuple[dict[str, Any], Path, Result]:
        folder = tmp_path_factory.mktemp(family)
        spec = decoder_spec(folder, family, **SECTIONS[family])
        return spec, folder, raymask.search(spec, folder / "run", in_process=True)

    return search


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_is_searched_and_its_export_is_what_was_reported(
    searched: Callable[[str], tuple[dict[str, Any], Path, Result]], family: str
) -> None:
    spec, folder, result = searched(family)
    run = folder / "run"
    assert (result.kind, result.metrics) == ("causal-lm", ("perplexity",))
    dense, baseline, selected = (row.test_metrics["perplexity"] for row in result.models)
    text = (folder / "report.txt").read_text()
    assert plain_perplexity(run / "export", text) == pytest.approx(selected, rel=1e-5)
    if family == "gpt2":  # the dense model is the one that was given
        assert plain_perplexity(folder / family, text) == pytest.approx(dense, rel=1e-5)
    assert result.gain is not None
    assert result.gain.mean == pytest.approx(math.log(baseline) - math.log(selected))
    for level in result.levels:
        kept = level.finetune_result.best_eval
        assert kept.metric == pytest.approx(-kept.loss, rel=0.05)
        assert kept.sort_key == max(point.sort_key for point in level.finetune_result.curve)

    masks, weights = load_file(run / "export" / "mask.safetensors"), load_file(run / "export" / "model.safetensors")
    names = [name for name in masks if ":" not in name]
    assert len(names) == 2 * (7 if family == "llama" else 4)
    for name in names:
        kept = np.unpackbits(masks[name].numpy(), count=weights[name].numel()).reshape(masks[f"{name}:shape"].tolist())
        assert kept.shape == weights[name].shape
        assert not weights[name][torch.from_numpy(kept) == 0].any()
        assert kept.mean() == pytest.approx(0.25, abs=0.01)
        if family == "gpt2":  # of each four inputs, which Conv1D has in its rows
            assert (kept.reshape(-1, 4, kept.shape[1]).sum(1) == 1).all()

    card = (run / "export" / "README.md").read_text()
    assert "`AutoModelForCausalLM.from_pretrained(...)` loads it" in card
    assert "tags: [text-generation, pruned, raymask]" in card
    assert f"{selected:.4f}" in card
    shown = said(result)
    assert f"{selected:.4f}" in shown
    assert "-log(perplexity)" in shown
    assert all("encoder" not in text and "classifi" not in text for text in (card.lower(), shown))
    assert raymask.search(spec, run, in_process=True) == result


def test_a_check_and_an_unfinished_run_are_told_in_a_decoder_s_terms(
    searched: Callable[[str], tuple[dict[str, Any], Path, Result]], tmp_path: Path
) -> None:
    keys, folder, result = searched("gpt2")
    spec = make_spec(keys)
    console = Console(file=io.StringIO(), width=160)
    show_check(console, spec, None)
    checked = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("in the decoder; 8 matrices", "causal-lm, perplexity; rows: ", "zeros in decoder", "up to 16"):
        assert part in checked
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    show_run(console, str(tmp_path / "run"), False)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    kept = result.levels[-1].finetune_result.best_eval
    assert f" {math.exp(-kept.metric):.4f} " in next(line for line in shown.splitlines() if line.startswith("  2 of 2"))
    dense = RunDir(tmp_path / "run").read_level(DENSE, 0).finetune_result.best_eval
    assert f"sparsity 0.00%: validation loss {dense.loss:.4f}, perplexity {math.exp(-dense.metric):.4f}, " in shown


@pytest.mark.parametrize(("score", "distill"), [(score, score == "wanda") for score in SCORERS])
@pytest.mark.parametrize("family", DECODERS)
def test_a_worker_s_result_is_a_function_of_its_work_alone(family: str, score: str, distill: bool) -> None:
    job = tiny_context(family, mask={"score": score}, distill=distill, finetune={"epochs": 3})
    dense = tiny_snapshot(job)
    pool, stage = propose_candidates(resolve(job.spec), 1), finetune_config(resolve(job.spec), 1)
    first, other = Worker(job, "cpu"), Worker(job, "cpu")
    other.evaluate(dense, EvalTask(pool[2]))
    found, again = (worker.evaluate(dense, EvalTask(pool[1]))[0] for worker in (first, other))
    assert found.ok, found.error
    assert (found.digest, found.score, found.row_losses) == (again.digest, again.score, again.row_losses)
    assert len(found.losses()) == len(job.data.validation)
    assert found.curve[-1].agreement is None
    done = other.finetune(dense, FinetuneTask("search", pool[1], stage, found.digest))
    for name, kept in unpack_bits(done.mask).items():
        assert torch.equal(done.weights.views()[name] != 0, kept)
    losses = [point.loss for point in done.finetune_result.curve]
    assert distill or losses[-1] < losses[0]  # its teacher is a random model, which knows nothing of the texts
    assert done.test_outputs.shape == (len(job.data.test), 2)
    assert done.test_outputs[:, 1].tolist() == (job.data.test.lengths - 1).tolist()


def test_memory_counts_the_outputs_of_every_token() -> None:
    job, wide = (tiny_context("llama", early_eval={"batch_size": size}) for size in (16, 1000))
    outputs = 4 * job.config.vocab_size * 16
    assert wide.peak_host_memory(on_gpu=False) - job.peak_host_memory(on_gpu=False) == 4 * outputs * (1000 - 32)
    taught = tiny_context("llama", distill=True)
    assert taught.peak_host_memory(on_gpu=False) - job.peak_host_memory(on_gpu=False) > 2 * 32 * outputs


def test_nobody_generates_in_a_worker_and_everybody_may_with_the_export() -> None:
    job = tiny_context("llama")
    worker = Worker(job, "cpu")
    assert worker.module.config.use_cache is False
    assert job.config.use_cache is True


@pytest.mark.parametrize("distill", [False, True])
@pytest.mark.parametrize("family", DECODERS)
def test_activations_that_are_computed_again_change_no_bit(family: str, distill: bool) -> None:
    found = []
    for checkpointing in (False, True):
        job = tiny_context(family, distill=distill, gradient_checkpointing=checkpointing)
        stage = finetune_config(resolve(job.spec), 1)
        finetune_task = FinetuneTask("search", propose_candidates(resolve(job.spec), 1)[1], stage, None)
        found.append(Worker(job, "cpu").finetune(tiny_snapshot(job), finetune_task))
    assert np.array_equal(found[0].weights.buffer, found[1].weights.buffer)
    assert np.array_equal(found[0].test_outputs, found[1].test_outputs)


def test_a_decoder_s_weights_may_be_in_bf16(tmp_path: Path) -> None:
    spec = decoder_spec(
        tmp_path, "gpt2", optimizer={"name": "adafactor"}, gradient_checkpointing=True, precision="auto"
    )
    spec["model"] = {"name": spec["model"], "dtype": "bf16"}
    result = raymask.search(spec, tmp_path / "run", in_process=True)
    weights = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    text = (tmp_path / "report.txt").read_text()
    assert plain_perplexity(tmp_path / "run" / "export", text) == pytest.approx(
        result.models[-1].test_metrics["perplexity"], rel=0.02
    )
