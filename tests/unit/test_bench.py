"""Benchmarks of a run's models: what is measured, and what is said of it."""

from __future__ import annotations

import io
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console
from support.builders import refused
from torch import nn

from raymask.commands import bench
from raymask.commands.bench import (
    CSR,
    SELECTED,
    SHRUNK,
    Variant,
    bench_table,
    measure,
    outputs_match,
    speed_verdict,
)
from raymask.core.lineage import DENSE
from raymask.export import onnx
from raymask.export.selected import logits, read_selected
from raymask.runs.run_dir import MODEL, RunDir

RUNTIMES = ("onnx", "onnxscript", "onnxruntime", "openvino")
MISSING = [name for name in RUNTIMES if find_spec(name) is None]


def shown(*arguments: Any, **options: Any) -> str:
    """What a bench prints."""
    console = Console(file=io.StringIO(), width=200)
    bench.show_bench(console, *arguments, **options)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def forms_of(seconds: dict[str, float], runtime: str = "torch") -> list[Variant]:
    """Forms that took so long for batches of one."""
    module = nn.Identity()
    return [
        Variant(name, runtime, module, module, 4, seconds={1: taken}, spread={1: (0.9 * taken, 1.1 * taken)})
        for name, taken in seconds.items()
    ]


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few repetitions, however unsteady."""
    monkeypatch.setattr(bench, "REPEATS", 2)
    monkeypatch.setattr(bench, "MIN_REPEATS", 2)


def test_the_dense_model_is_the_one_before_the_first_mask(finished: Path) -> None:
    store = RunDir(finished)
    selected = read_selected(store)
    models = bench.load_fp32_models(selected, store)
    for name, tensor in store.read_tensors(DENSE, 0, MODEL).items():
        assert torch.equal(models[DENSE].get_parameter(name), tensor), name
    batch = selected.rows()
    with torch.no_grad():
        assert torch.equal(logits(models[SELECTED], batch), logits(selected.module, batch))
        assert not torch.allclose(logits(models[DENSE], batch), logits(selected.module, batch))


def test_csr_weights_take_the_memory_of_what_is_kept(finished: Path) -> None:
    store = RunDir(finished)
    selected = read_selected(store)
    dense, whole, sparse = bench.torch_variants(bench.load_fp32_models(selected, store), selected.mask, [])
    last = selected.result.levels[-1]
    assert dense.size == whole.size == 4 * sum(each.numel() for each in selected.module.parameters())
    rows = sum(len(kept) + 1 for kept in selected.mask.values())
    kept = sum(int(selected.module.get_parameter(name).count_nonzero()) for name in selected.mask)
    assert sparse.size == whole.size - 4 * last.num_prunable + (4 + 8) * kept + 8 * rows


# --- what is said ----------------------------------------------------------------------------------------------------


def test_what_sparsity_is_worth_is_said_by_runtime() -> None:
    forms = [
        *forms_of({DENSE: 1.0, SELECTED: 1.1, CSR: 0.5}),
        *forms_of({DENSE: 0.4, SELECTED: 0.4, SHRUNK: 0.8}, "OpenVINO"),
        *forms_of({SELECTED: 0.1}, "of which there is no dense model"),
    ]
    assert speed_verdict(forms, 1) == (
        "Batch of 1, against the dense model by the same runtime. Faster: torch, CSR 2.00x. Within noise (20%): torch "
        "0.91x; OpenVINO 1.00x. Slower: OpenVINO, shrunk 0.50x."
    )


def test_that_nothing_is_faster_is_said() -> None:
    assert speed_verdict(forms_of({DENSE: 1.0, SELECTED: 0.9, CSR: 1.5}), 1) == (
        "Batch of 1, against the dense model by the same runtime. Sparsity makes nothing faster here. Within noise "
        "(20%): torch 1.11x. Slower: torch, CSR 0.67x."
    )


def test_what_is_not_steady_gets_no_verdict() -> None:
    forms = [
        *forms_of({DENSE: 1.0, SELECTED: 0.3, CSR: 1.1}),
        *forms_of({DENSE: 1.0, SHRUNK: 0.9}, "OpenVINO"),
    ]
    forms[1].spread = {1: (0.2, 0.9)}
    assert speed_verdict(forms, 1) == (
        "Batch of 1, against the dense model by the same runtime. Within noise (20%): torch, CSR 0.91x; OpenVINO, "
        "shrunk 1.11x. Not steady, so not comparable: torch 3.33x."
    )
    forms[1].spread = {1: (0.2, 0.8)}  # unsteady, and faster all the same
    assert "Faster: torch 3.33x. Within" in speed_verdict(forms, 1)
    forms[2].seconds, forms[2].spread = {1: 1.5}, {1: (1.05, 1.6)}
    assert speed_verdict(forms, 1).endswith("Not steady, so not comparable: torch, CSR 0.67x.")


def test_ratios_are_to_dense_torch_and_to_dense_there() -> None:
    forms = [*forms_of({DENSE: 0.8}), *forms_of({DENSE: 0.4, SELECTED: 0.1}, "OpenVINO")]
    assert [list(bench.cells(form, forms)) for form in forms] == [
        ["800.0", "1.00x", ""],
        ["400.0", "2.00x", ""],
        ["100.0", "8.00x", "4.00x"],
    ]
    assert bench_table(forms, 5).row_count == 3


class Slow(nn.Module):
    """Takes from a list how long each second call takes, by a clock that stands still otherwise."""

    def __init__(self, clock: list[float], taken: list[float]) -> None:
        super().__init__()
        self.clock, self.taken, self.calls = clock, taken, 0

    def forward(self, **batch: torch.Tensor) -> None:
        self.calls += 1
        if self.calls % 2 == 0:
            self.clock[0] += self.taken[self.calls // 2 - 1]


@pytest.mark.parametrize(("threads", "advice"), [(1, ""), (2, ", or with OMP_NUM_THREADS=1")])
def test_times_are_medians_and_what_was_not_steady_is_said(
    threads: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(bench, "MAX_SECONDS", 0.0)
    steady, busy = Slow(clock, [1, 1, 1, 9, 1]), Slow(clock, [1, 2, 3, 4, 5])
    forms = [Variant(name, "torch", module, module, 4) for name, module in (("dense", steady), ("raymask", busy))]
    said = measure(forms, {"input_ids": torch.zeros(7, 2)})
    assert [form.seconds for form in forms] == [{7: 1.0}, {7: 3.0}]
    assert [form.spread for form in forms] == [{7: (1.0, 1.0)}, {7: (2.0, 4.0)}]
    assert said == [
        "Batch of 7: 1 of 2 were not steady; torch, raymask took 2000.0 to 4000.0 ms (quartiles). Something else "
        f"keeps this machine busy: measure again{advice}"
    ]


def test_a_run_without_its_dense_model_is_refused(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "dense")
    said = f"{tmp_path / 'run'}: its dense model does not exist: bench needs all files of the run"
    assert refused(shown, str(tmp_path / "run")) == said


def test_another_model_is_not_measured(finished: Path) -> None:
    store = RunDir(finished)
    selected = read_selected(store)
    models = bench.load_fp32_models(selected, store)
    notes: list[str] = []
    with torch.no_grad():
        right = Variant(SELECTED, "torch", models[SELECTED], models[SELECTED], 4)
        wrong = Variant(SELECTED, "torch", models[DENSE], models[SELECTED], 4)
        about = Variant(SELECTED, "torch", models[DENSE], models[SELECTED], 4, exact=False)
        assert [outputs_match(form, selected.rows(), notes) for form in (right, wrong, about)] == [True, False, True]
    assert notes == [f"Not measured: raymask by torch, whose outputs differ by {wrong.max_error:.1g}"]


def test_a_form_that_fails_is_a_note(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunDir(finished)
    selected = read_selected(store)
    models = bench.load_fp32_models(selected, store)
    notes: list[str] = []
    monkeypatch.setattr(bench, "make_sparse", mock.Mock(side_effect=RuntimeError("no CSR")))
    assert [form.model for form in bench.torch_variants(models, selected.mask, notes)] == [DENSE, SELECTED]
    broken = mock.Mock(side_effect=RuntimeError("static shape"))
    assert not outputs_match(Variant(SELECTED, "OpenVINO", broken, models[SELECTED], 4), selected.rows(), notes)
    assert notes == [
        "Not measured: raymask, CSR by torch. no CSR",
        "Not measured: raymask by OpenVINO, which fails. static shape",
    ]


@pytest.mark.usefixtures("quickly")
def test_what_is_not_installed_is_said(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    said = shown(str(finished), [1], 4)
    assert (
        "Not measured: ONNX Runtime, OpenVINO; onnx, onnxscript, onnxruntime missing: pip install 'raymask[onnx]'"
        in said
    )
    assert "│ torch" in said
    assert "│ ONNX" not in said


@pytest.mark.usefixtures("quickly")
@pytest.mark.skipif(bool(onnx.missing_packages()), reason="not installed: ONNX")
def test_what_cannot_be_exported_or_shrunk_is_said(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    monkeypatch.setattr(onnx, "LIMIT", 10)
    monkeypatch.setattr("raymask.export.shrink.LAYOUTS", {})
    said = shown(str(finished), [1], 4)
    assert "Not measured: OpenVINO, which is not installed: pip install openvino\n" in said
    assert "Not measured: raymask, shrunk. --shrink: supports" in said
    assert "Not measured: ONNX Runtime, OpenVINO. --to onnx: an ONNX file holds 2 GB" in said


def test_rows_that_are_too_long_are_refused(finished: Path) -> None:
    assert refused(shown, str(finished), [1], 1000) == "--length: the model takes at most 64 tokens, not 1000"


@pytest.mark.skipif("openvino" in MISSING, reason="not installed: openvino")
def test_openvino_sends_no_telemetry(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        bench.OpenVinoModel(tmp_path / "there is none.onnx", {})
    assert sys.modules["openvino_telemetry"] is None
