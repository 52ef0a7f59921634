"""Evaluation of a model: the same figures as in a search, and messages about what cannot be measured."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from support.builders import refused, reviews, tiny_model, write_table
from support.specs import decoder_spec

import raymask
from raymask.commands.evaluate import eval_spec, evaluate, show_evaluation
from raymask.core import stats
from raymask.core.records import ModelMetrics, Result
from raymask.driver.setup import prepare
from raymask.export.formats import export_run
from raymask.runs.run_dir import MODEL, RunDir

Sections = dict[str, Any]
SpecOf = Callable[[Path], Sections]
FEW = 50  # resamples


def measured(model: Path, task: Path | str, *overrides: str) -> ModelMetrics:
    return evaluate(prepare(eval_spec(str(model), str(task), overrides)))


def result_of(run: Path) -> Result:
    found = RunDir(run).read_result()
    assert found is not None
    return found


def tiny_spec(folder: Path, task: Sections) -> Sections:
    """A search of seconds, with a teacher, so that the model shows its attention."""
    return {
        "model": str(tiny_model(folder / "model", head=False)),
        "task": task,
        "levels": [0.5, 0.75],
        "candidates": {"count": 1, "sampling_ratios": [0.02]},
        "dense": {"epochs": 1, "learning_rate": 3e-3, "distill_epochs": 0.5},
        "early_eval": {"epochs": 0.5, "eval_steps": 2, "score_window": 2},
        "finetune": {"epochs": 1, "batch_size": 16, "learning_rate": 3e-3},
        "seed": 5,
    }


def own_files(folder: Path, kind: str) -> Sections:
    texts, labels = reviews(200)
    targets = [label + len(text.split()) / 4 for label, text in zip(labels, texts, strict=True)]
    column = targets if kind == "regression" else labels
    files = {
        split: str(write_table(folder / f"{split}.csv", {"text": texts[part], "label": column[part]}))
        for split, part in (("train", slice(150)), ("test", slice(150, 200)))
    }
    return files | {"text": "text", "label": "label", "kind": kind}


def with_labels(folder: Path) -> Sections:
    return tiny_spec(folder, own_files(folder, "classification"))


def with_numbers(folder: Path) -> Sections:
    return tiny_spec(folder, own_files(folder, "regression"))


def with_tokens(folder: Path) -> Sections:
    return decoder_spec(folder, "llama", distill=False)


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the runs below were made with."""
    monkeypatch.setattr(stats, "RESAMPLES", FEW)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[SpecOf], Path]:
    """A function (spec_of) -> the run of the search of such a spec, beside its files. Only ever read it."""

    @cache
    def run(spec_of: SpecOf) -> Path:
        folder = tmp_path_factory.mktemp(spec_of.__name__)
        with mock.patch.object(stats, "RESAMPLES", FEW):
            raymask.search(spec_of(folder), folder / "run", in_process=True)
        return folder / "run"

    return run


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize("spec_of", [with_labels, with_numbers, with_tokens])
def test_every_model_of_a_run_has_the_figures_that_its_result_states(
    searched: Callable[[SpecOf], Path], spec_of: SpecOf, tmp_path: Path
) -> None:
    """To the last digit, intervals included: the selected one exported twice, and the dense one in its place."""
    run = searched(spec_of)
    dense, *_, selected = result_of(run).models
    export_run(run, "sparse", tmp_path / "sparse")
    for folder in (run / "export", tmp_path / "sparse"):
        row = measured(folder, run / "spec.yaml")
        assert (row.test_metrics, row.intervals, row.constant_prediction) == (
            selected.test_metrics,
            selected.intervals,
            selected.constant_prediction,
        )
        assert row.sparsity["prunable"] == selected.sparsity["prunable"]
        assert row.sparsity["encoder"] >= selected.sparsity["encoder"]
    shutil.copytree(run / "export", tmp_path / "dense")
    shutil.copy(run / "dense" / MODEL, tmp_path / "dense" / MODEL)
    row = measured(tmp_path / "dense", run / "spec.yaml")
    assert (row.test_metrics, row.intervals) == (dense.test_metrics, dense.intervals)
    assert row.sparsity["prunable"] == 0


def test_zeros_are_counted_in_all_three_denominators(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "export", tmp_path / "model")
    weights = load_file(tmp_path / "model" / MODEL)
    zeroed = {name: torch.full_like(tensor, float("query" not in name)) for name, tensor in weights.items()}
    save_file(zeroed, tmp_path / "model" / MODEL, metadata={"format": "pt"})
    found = measured(tmp_path / "model", "quickstart").sparsity
    matrices = {name: tensor for name, tensor in weights.items() if tensor.dim() == 2 and ".layer." in name}
    queries = {name: tensor for name, tensor in weights.items() if "query" in name}

    def size(tensors: dict[str, torch.Tensor]) -> int:
        return sum(tensor.numel() for tensor in tensors.values())

    bias = {name: tensor for name, tensor in queries.items() if tensor.dim() == 1}
    assert bias
    assert found == {
        "prunable": (size(queries) - size(bias)) / size(matrices),
        "encoder": size(queries) / size({name: tensor for name, tensor in weights.items() if ".layer." in name}),
        "whole": size(queries) / size(weights),
    }


def test_a_model_that_tells_no_rows_apart_is_said_to(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "export", tmp_path / "model")
    weights = load_file(tmp_path / "model" / MODEL)
    weights["classifier.bias"] = torch.tensor([0.0, 100.0])
    save_file(weights, tmp_path / "model" / MODEL, metadata={"format": "pt"})
    console = Console(file=io.StringIO(), width=200)
    show_evaluation(console, str(tmp_path / "model"), "quickstart")
    assert console.file.getvalue().endswith(  # type: ignore[attr-defined]
        f"{tmp_path / 'model'} predicts 'positive' for every row of `test`: its metrics are those of a "
        "constant prediction.\n"
    )


@pytest.mark.usefixtures("few_resamples")
def test_a_task_s_name_will_do(tmp_path: Path) -> None:
    """Of what a run's spec says beside it nothing matters here; the files and the length are set."""
    texts, labels = reviews(120)
    for split, part in (("train", slice(80)), ("validation", slice(80, 120))):
        columns = {"sentence1": texts[part], "sentence2": texts[part][::-1], "label": labels[part]}
        write_table(tmp_path / "glue" / "mrpc" / f"{split}.parquet", columns)
    keys = {"name": "glue/mrpc", "folder": str(tmp_path / "glue"), "max_length": 12}
    run = tmp_path / "run"
    result = raymask.search(tiny_spec(tmp_path, keys) | {"seed": 0}, run, in_process=True)
    row = measured(run / "export", "glue/mrpc", f"task.folder={tmp_path / 'glue'}", "task.max_length=12")
    assert row.test_metrics == result.models[-1].test_metrics
    assert set(row.test_metrics) == {"accuracy", "f1"}


def test_of_a_spec_only_the_model_and_what_is_pruned_make_no_difference(tmp_path: Path) -> None:
    text = "model: {name: other, revision: abc, dtype: bf16}\ntask: glue/stsb\nlevels: [0.9]\nmask: {pattern: 9x9}\n"
    (tmp_path / "spec.yaml").write_text(text + "distill: false\n")
    spec = eval_spec("mine", str(tmp_path / "spec.yaml"), ["seed=3"])
    assert (spec.model.name, spec.model.revision, spec.model.dtype) == ("mine", None, "bf16")
    assert (spec.task.name, spec.distill, spec.seed, spec.dense.epochs) == ("glue/stsb", False, 3, 0)
    assert spec.mask.pattern == "unstructured"
    assert eval_spec("other", str(tmp_path / "spec.yaml")).model.revision == "abc"
    assert eval_spec("mine", "glue/mrpc", ["model.revision=abc"]).model.revision == "abc"


# --- what cannot be measured -----------------------------------------------------------------------------------------


def test_a_model_that_is_not_fine_tuned_is_refused(tmp_path: Path) -> None:
    said = refused(measured, tiny_model(tmp_path, head=False), "quickstart")
    assert "is taken as fine-tuned (eval, and dense.epochs: 0), but it lacks classifier.bias" in said


def test_a_model_of_another_task_is_refused_though_its_weights_could_be_spread_out(
    finished: Path, searched: Callable[[SpecOf], Path], tmp_path: Path
) -> None:
    """One output fits two of another task in torch's sense."""
    run = searched(with_numbers)
    assert result_of(run).kind == "regression"
    export_run(run, "sparse", tmp_path / "sparse")
    said = refused(measured, tmp_path / "sparse", "quickstart")
    assert (
        "the task has 2 classes ('negative', 'positive'), and its config.json has 'LABEL_0': its head was made" in said
    )
    export_run(finished, "sparse", tmp_path / "out")
    said = refused(measured, tmp_path / "out", run / "spec.yaml")
    assert "was made for another task: its classifier.weight has shape (2, 32), this one needs (1, 32)" in said
    said = refused(measured, finished / "export", run / "spec.yaml")
    assert "has shape (2,), this task needs (1,). Its head was made for other classes" in said
    task = ["task.kind=causal-lm", f"task.train={run.parent}/train.csv", f"task.test={run.parent}/train.csv"]
    (tmp_path / "lm.yaml").write_text("model: m\ntask: {kind: causal-lm, train: a.txt, test: a.txt}\n")
    said = refused(measured, tmp_path / "out", tmp_path / "lm.yaml", *task)
    assert "was made for another task: it has no " in said


def test_outputs_that_are_no_numbers_are_no_prediction(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "export", tmp_path / "model")
    weights = load_file(tmp_path / "model" / MODEL)
    weights["classifier.weight"][0] = 3e38  # a number, and its products are none
    save_file(weights, tmp_path / "model" / MODEL, metadata={"format": "pt"})
    said = refused(measured, tmp_path / "model", "quickstart")
    assert said == f"model.name: {tmp_path / 'model'} has outputs on `test` that are not finite"
