"""ONNX files: the same model for batches of any size, and the cost of int8."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from support.builders import DECODERS, FAMILIES, kind_of, refused, tiny_config, tiny_context, tiny_tokenizer
from torch import nn

from raymask.export import onnx, shrink
from raymask.export.formats import export_run
from raymask.export.onnx import INT8, ONNX, PACKAGES, OnnxModel, compute_test_metrics, require_close, samples, to_onnx
from raymask.export.selected import MODEL_CARD, SelectedModel, read_selected
from raymask.runs.run_dir import RunDir
from raymask.train.model import build_model

MISSING = [name for name in PACKAGES if find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


def random_selected(family: str) -> SelectedModel:
    """What is exported of a model of one layer with new weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = {"gpt2": "n_layer", "distilbert": "n_layers"}.get(family, "num_hidden_layers")
        module = build_model(tiny_config(family, **{layers: 1}), kind=kind_of(family)).eval()
    result: Any = SimpleNamespace(kind=kind_of(family))
    return SelectedModel(result, None, module, tiny_tokenizer(family), {}, {})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished run in all that --to onnx makes, and what it says."""
    folder = tmp_path_factory.mktemp("onnx") / "out"
    return folder, export_run(finished, "onnx", folder, int8=True, shrink=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[SelectedModel, Path]]:
    """A function (family) -> a random model, and its file."""

    @cache
    def write(family: str) -> tuple[SelectedModel, Path]:
        selected, path = random_selected(family), tmp_path_factory.mktemp(family) / ONNX
        to_onnx(selected.module, samples(selected)[-1], path)
        return selected, path

    return write


@needs_onnx
@pytest.mark.parametrize("family", ["deberta-v2", "gpt2"])
def test_batches_of_any_shape_come_out_the_same(
    written: Callable[[str], tuple[SelectedModel, Path]], family: str
) -> None:
    selected, path = written(family)
    assert require_close(OnnxModel(path, selected.module.config), selected.module, samples(selected)) < 1e-5
    assert str(Path(torch.__file__).parent).encode() not in path.read_bytes()
    if family in DECODERS:
        assert getattr(selected.module.config, "use_cache", True)  # what was exported was a copy


def test_batches_have_the_tokenizer_s_names_and_rows_of_several_lengths() -> None:
    for family in FAMILIES:
        selected = random_selected(family)
        *_, batch = samples(selected)
        pairs = "token_type_ids" in batch
        assert sorted(batch) == sorted(selected.tokenizer.model_input_names)
        assert batch["attention_mask"].sum(1).tolist() == [32, 27, 23, 18, 14, 9, *((5, 5) if pairs else (5, 3))]


@needs_onnx
def test_what_is_written_is_said(exported: tuple[Path, list[str]], finished: Path) -> None:
    folder, lines = exported
    selected = read_selected(RunDir(finished))
    assert {path.name for path in folder.iterdir()} == {
        ONNX,
        INT8,
        "raymask.json",
        *(selected.files.keys() - {MODEL_CARD}),
    }
    removed = shrink.shrink(selected.module)[1]
    assert lines[0] == f"Dead units removed, which changes no output: {removed}"
    assert lines[1].startswith("model.onnx: 0.")
    assert re.fullmatch(
        r"Checked: ONNX Runtime's outputs differ from torch's by \de-0\d at most, in batches of 1 x 3, 3 x 7, 8 x 32 "
        "tokens of random words",
        lines[2],
    )
    assert lines[3].startswith("model-int8.onnx: 0.")
    assert (folder / INT8).stat().st_size < (folder / ONNX).stat().st_size


@needs_onnx
def test_int8_is_measured_on_test_and_fp32_is_what_the_search_measured(
    exported: tuple[Path, list[str]], finished: Path
) -> None:
    folder, lines = exported
    selected = read_selected(RunDir(finished))
    before = selected.result.levels[-1].test_metrics["accuracy"]
    int8 = compute_test_metrics(OnnxModel(folder / INT8, selected.module.config), onnx.load_test_rows(selected))[
        "accuracy"
    ]
    assert lines[4] == f"On `test`: accuracy fp32 {before:.4f} -> int8 {int8:.4f}"
    original = require_close(OnnxModel(folder / ONNX, selected.module.config), selected.module, samples(selected))
    assert original < 1e-5
    assert str(Path(torch.__file__).parent).encode() not in (folder / ONNX).read_bytes()
    assert "differ from torch's by" in refused(
        require_close, OnnxModel(folder / INT8, selected.module.config), selected.module, samples(selected)
    )


@needs_onnx
def test_a_decoder_s_perplexity_is_measured(written: Callable[[str], tuple[SelectedModel, Path]]) -> None:
    (selected, path), data = written("gpt2"), tiny_context("gpt2").data
    found = compute_test_metrics(OnnxModel(path, selected.module.config), data)
    assert found == pytest.approx(compute_test_metrics(selected.module, data), rel=1e-4)
    assert list(found) == ["perplexity"]


@needs_onnx
def test_a_shrunk_file_has_the_small_widths_and_weights_in_bf16_are_exported_in_fp32(tmp_path: Path) -> None:
    import onnx as package

    selected = random_selected("bert")
    selected.module.bfloat16()
    with torch.no_grad():
        selected.module.get_parameter("bert.encoder.layer.0.intermediate.dense.weight")[5:] = 0
    small, _ = shrink.shrink(selected.module)
    width = len(small.get_parameter("bert.encoder.layer.0.intermediate.dense.weight"))
    assert width <= 5
    onnx.write_onnx(selected, tmp_path, shrink=True)
    initializers = package.load(tmp_path / ONNX).graph.initializer
    assert {(16, width), (width, 16)} <= {tuple(each.dims) for each in initializers}
    assert require_close(OnnxModel(tmp_path / ONNX, selected.module.config), selected.module, samples(selected)) < 1e-5
    assert next(selected.module.parameters()).dtype == torch.bfloat16


# --- what is refused -------------------------------------------------------------------------------------------------


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch, finished: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name != "onnx" else find_spec("torch"))
    said = refused(export_run, finished, "onnx", tmp_path / "out")
    assert said == "--to onnx: needs onnxscript, onnxruntime: pip install 'raymask[onnx]'"


def test_a_model_that_is_too_large_for_a_file_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnx, "LIMIT", 1000)
    selected = random_selected("bert")
    size = 4 * sum(parameter.numel() for parameter in selected.module.parameters()) / 1e6
    said = f"--to onnx: an ONNX file holds 2 GB, and the weights take {size:.3f} MB in fp32"
    assert refused(to_onnx, selected.module, samples(selected)[-1], tmp_path / ONNX) == said


@needs_onnx
def test_a_model_that_torch_cannot_export_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def forward(self: Any, **batch: Any) -> None:
        raise ValueError("it looks at its inputs")

    selected = random_selected("bert")
    monkeypatch.setattr(type(selected.module), "forward", forward)
    said = refused(to_onnx, selected.module, samples(selected)[-1], tmp_path / ONNX)
    assert said.startswith("--to onnx: torch cannot export bert: ")
    assert "it looks at its inputs" in said


def test_another_model_s_outputs_are_refused() -> None:
    selected, other = random_selected("bert"), random_selected("bert")
    with torch.no_grad():
        nn.init.ones_(other.module.classifier.bias)  # type: ignore[union-attr, arg-type]
    said = refused(require_close, other.module, selected.module, samples(selected))
    assert said == "--to onnx: ONNX Runtime's outputs differ from torch's by 1.0e+00"


def test_a_file_that_does_not_run_on_other_rows_is_refused() -> None:
    selected = random_selected("bert")
    said = refused(require_close, mock.Mock(side_effect=RuntimeError("idx=-1")), selected.module, samples(selected))
    assert said == (
        "--to onnx: ONNX Runtime does not run the file of bert on rows of another number or length than it was made "
        "from: idx=-1"
    )


def test_int8_is_not_measured_on_other_rows(finished: Path) -> None:
    selected = read_selected(RunDir(finished))
    last = selected.result.levels[-1].model_copy(update={"data_fingerprint": "another"})
    other = dataclasses.replace(selected, result=selected.result.model_copy(update={"levels": (last,)}))
    said = "--int8: the task's files have changed since the search: restore them, or leave out --int8"
    assert refused(onnx.load_test_rows, other) == said
