"""Benchmark of a finished run: latency and size of the dense and the selected model, by form and runtime."""

from __future__ import annotations

import copy
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import quantiles
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from raymask.core.errors import UserError, first_line
from raymask.core.lineage import DENSE
from raymask.core.records import RAYMASK
from raymask.data.hf_config import max_seq_length
from raymask.export.onnx import INT8, ONNX, OnnxModel, missing_packages, quantize, samples, to_onnx
from raymask.export.selected import SelectedModel, logits, outputs_allclose, read_selected
from raymask.export.shrink import shrink
from raymask.export.sparse import SparseLinear, make_sparse
from raymask.report.console import say
from raymask.runs.run_dir import MODEL, RunDir
from raymask.runs.storage import temporary

BATCHES, LENGTH = (1, 16), 128  # default batch sizes in rows, and tokens per row

NOISE = 1.2
"""Two latencies differ when one is more than NOISE times the other."""

REPEATS, MIN_REPEATS, MAX_SECONDS = 30, 5, 60.0
"""How often each variant is timed: REPEATS times; after SECONDS per batch size only until there are FEW timings."""

RUNTIMES = ("torch", "ONNX Runtime", "ONNX Runtime int8", "OpenVINO")

SELECTED, SHRUNK = RAYMASK, f"{RAYMASK}, shrunk"

CSR, OPTION = f"{RAYMASK}, CSR", f"{RAYMASK}, option"

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}  # without it OpenVINO computes in bf16 on processors that can

LEGEND = (
    "MB: size of the weights in memory for torch, size of the file otherwise. Differs: largest difference from torch's "
    "outputs with the same weights; ~ is approximate. To torch: speedup over the dense model in torch. To dense: "
    "speedup over the dense model in the same runtime. CSR: pruned layers multiply by sparse matrices. Shrunk: without "
    "dead neurons and heads. Option: OpenVINO's option for sparse weights."
)


@dataclass
class Variant:
    """A model in one form, run by one runtime.

    Attributes:
        model: The model's name in the table.
        runtime: One of RUNTIMES.
        call: The model, with the call of a transformers model.
        original: The torch model whose outputs are the reference.
        size: Bytes of its weights in memory for torch, otherwise of its file.
        exact: Whether its outputs may differ from the reference by rounding only.
        max_error: The largest difference from the reference that was seen.
        seconds: Median latency in seconds by batch size in rows.
        spread: Lower and upper quartile of the latency in seconds, by batch size.
    """

    model: str
    runtime: str
    call: nn.Module
    original: nn.Module
    size: int
    exact: bool = True
    max_error: float = 0.0
    seconds: dict[int, float] = field(default_factory=dict)
    spread: dict[int, tuple[float, float]] = field(default_factory=dict)


def show_bench(console: Console, run: str, batches: Sequence[int] = (), length: int | None = None) -> None:
    """Measure the dense and the selected model of a finished run in all forms that this machine can run.

    Args:
        console: Where the output goes.
        run: The run directory, a path or a URI.
        batches: Batch sizes in rows; empty: BATCHES.
        length: Tokens per row; None: LENGTH, or as many as the model takes.

    Raises:
        UserError: When the run is not finished, or the model does not take rows of this length.
    """
    run_dir = RunDir(run)
    selected = read_selected(run_dir)
    longest = max_seq_length(selected.module.config)
    if length is not None and length > longest:
        raise UserError(f"--length: the model takes at most {longest} tokens, not {length}")
    length = min(LENGTH, longest) if length is None else length
    notes: list[str] = []
    with temporary() as folder, torch.no_grad():
        models = load_fp32_models(selected, run_dir)
        unordered = [*torch_variants(models, selected.mask, notes), *onnx_variants(models, selected, folder, notes)]
        variants = [variant for runtime in RUNTIMES for variant in unordered if variant.runtime == runtime]
        for rows in sorted(set(batches or BATCHES)):
            batch = selected.rows([length] * rows)
            variants = [variant for variant in variants if outputs_match(variant, batch, notes)]
            notes += measure(variants, batch)
    console.print(bench_table(variants, length))
    say(console, LEGEND)
    for line in [*(speed_verdict(variants, rows) for rows in variants[0].seconds), *notes]:
        say(console, line)


# --- variants ---------------------------------------------------------------------------------------------------------


def load_fp32_models(selected: SelectedModel, run_dir: RunDir) -> dict[str, Any]:
    """The dense and the selected model by name, in fp32. Raises UserError when the run no longer has the dense one."""
    if not run_dir.has_level(DENSE, 0):
        raise UserError(f"{run_dir.uri}: its dense model does not exist: bench needs all files of the run")
    models: dict[str, Any] = {name: copy.deepcopy(selected.module) for name in (DENSE, SELECTED)}
    dense = run_dir.read_tensors(DENSE, 0, MODEL)
    models[DENSE].load_state_dict(dense, strict=False)  # the file has tied weights under one name only
    for module in models.values():
        module.float().config.use_cache = False
    return models


def torch_variants(models: dict[str, Any], mask: Iterable[str], notes: list[str]) -> Iterator[Variant]:
    """The variants that torch runs.

    Args:
        models: The dense and the selected model by name.
        mask: Names of the pruned weights, which become CSR matrices.
        notes: A line is added for whatever is not measured, with the reason.
    """
    for name, module in models.items():
        yield Variant(name, "torch", module, module, weight_bytes(module))
    sparse = copy.deepcopy(models[SELECTED])
    with note_errors(f"{CSR} by torch", notes):
        for name in mask:
            make_sparse(sparse, name)
        yield Variant(CSR, "torch", sparse, models[SELECTED], weight_bytes(sparse))


@contextmanager
def note_errors(form: str, notes: list[str]) -> Iterator[None]:
    """Run a block. An error in it becomes a note that this form is not measured, and does not end the benchmark."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - every runtime raises its own exceptions
        notes.append(f"Not measured: {form}. {first_line(error)}")


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights in memory."""
    tensors: list[Tensor] = [*module.parameters()]
    for layer in module.modules():
        if isinstance(layer, SparseLinear):
            tensors += [layer.weight.crow_indices(), layer.weight.col_indices(), layer.weight.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def onnx_variants(models: dict[str, Any], selected: SelectedModel, folder: Path, notes: list[str]) -> Iterator[Variant]:
    """The variants of the runtimes that read ONNX files.

    Args:
        models: The dense and the selected model by name.
        selected: The selected model of the run.
        folder: Where the files go.
        notes: A line is added for whatever is not measured, with the reason.
    """
    missing = missing_packages()
    if missing:
        notes.append(f"Not measured: ONNX Runtime, OpenVINO; {', '.join(missing)} missing: pip install 'raymask[onnx]'")
        return
    if find_spec("openvino") is None:
        notes.append("Not measured: OpenVINO, which is not installed: pip install openvino")
    try:
        models = models | {SHRUNK: shrink(models[SELECTED])[0]}
    except UserError as error:
        notes.append(f"Not measured: {SHRUNK}. {error}")
    for name, module in models.items():
        original = models[DENSE if name == DENSE else SELECTED]
        path, int8_path = folder / f"{name}-{ONNX}", folder / f"{name}-{INT8}"
        try:
            to_onnx(module, samples(selected)[-1], path)
        except UserError as error:
            notes.append(f"Not measured: ONNX Runtime, OpenVINO. {error}")
            return
        size = path.stat().st_size
        with note_errors(f"{name} by ONNX Runtime", notes):
            yield Variant(name, "ONNX Runtime", OnnxModel(path, module.config), original, size)
        with note_errors(f"{name} by ONNX Runtime int8", notes):
            quantize(path, int8_path)
            int8, int8_size = OnnxModel(int8_path, module.config), int8_path.stat().st_size
            yield Variant(name, "ONNX Runtime int8", int8, original, int8_size, exact=False)
        with note_errors(f"{name} by OpenVINO", notes):
            if find_spec("openvino"):
                yield Variant(name, "OpenVINO", OpenVinoModel(path, EXACT), original, size)
            if find_spec("openvino") and name == SELECTED:
                settings = EXACT | {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": "0.5"}
                yield Variant(OPTION, "OpenVINO", OpenVinoModel(path, settings), original, size)


class OpenVinoModel(nn.Module):
    """An ONNX file run by OpenVINO on as many threads as torch has, with the call of a transformers model.

    Attributes:
        compiled: The compiled model.
    """

    def __init__(self, path: Path, settings: dict[str, str]) -> None:
        super().__init__()
        # importing openvino sends telemetry through this package; with None it does not
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        import openvino

        core = openvino.Core()
        options = {"INFERENCE_NUM_THREADS": str(torch.get_num_threads()), "PERFORMANCE_HINT": "LATENCY"} | settings
        self.compiled = core.compile_model(core.read_model(path), "CPU", options)

    def forward(self, **batch: Tensor) -> SimpleNamespace:
        """An object with the batch's `logits`, float32."""
        outputs = self.compiled({name: tensor.numpy() for name, tensor in batch.items()})["logits"]
        return SimpleNamespace(logits=torch.from_numpy(outputs.copy()))


# --- measuring -------------------------------------------------------------------------------------------------------


def outputs_match(variant: Variant, batch: dict[str, Tensor], notes: list[str]) -> bool:
    """Whether a variant's outputs match the reference; one that fails, or should match and does not, is not measured.

    Args:
        variant: The variant; its `max_error` is updated.
        batch: Inputs by name, int64 `[rows, tokens]`.
        notes: A line is added when the variant fails or its outputs do not match.
    """
    try:
        outputs = logits(variant.call, batch)
    except Exception as error:  # noqa: BLE001 - every runtime raises its own exceptions
        notes.append(f"Not measured: {variant.model} by {variant.runtime}, which fails. {first_line(error)}")
        return False
    close, difference = outputs_allclose(outputs, logits(variant.original, batch))
    variant.max_error = max(variant.max_error, difference)
    matches = close or not variant.exact
    if not matches:
        notes.append(
            f"Not measured: {variant.model} by {variant.runtime}, whose outputs differ by {variant.max_error:.1g}"
        )
    return matches


def measure(variants: Sequence[Variant], batch: dict[str, Tensor]) -> list[str]:
    """Time all variants in turn, so that other load on the machine affects them alike.

    Args:
        variants: The variants; their `seconds` and `spread` get the results for the batch size.
        batch: Inputs by name, int64 `[rows, tokens]`.

    Returns:
        A line when some latencies were not steady; otherwise none.
    """
    times: list[list[float]] = [[] for _ in variants]
    rows, started = len(batch["input_ids"]), time.perf_counter()
    while len(times[0]) < MIN_REPEATS or (len(times[0]) < REPEATS and time.perf_counter() - started < MAX_SECONDS):
        for variant, latencies in zip(variants, times, strict=True):
            variant.call(
                **batch
            )  # warm-up: the previous variant's threads may still spin and its weights fill the caches
            begun = time.perf_counter()
            variant.call(**batch)
            latencies.append(time.perf_counter() - begun)
    unsteady = []
    for variant, latencies in zip(variants, times, strict=True):
        low, variant.seconds[rows], high = quantiles(latencies, method="inclusive")
        variant.spread[rows] = low, high
        if high > NOISE * low:
            unsteady.append(
                f"{variant.runtime}, {variant.model} took {1e3 * low:.1f} to {1e3 * high:.1f} ms (quartiles)"
            )
    if not unsteady:
        return []
    advice = "measure again" + (", or with OMP_NUM_THREADS=1" if torch.get_num_threads() > 1 else "")
    return [
        f"Batch of {rows}: {len(unsteady)} of {len(variants)} were not steady; {unsteady[0]}. Something else keeps "
        f"this machine busy: {advice}"
    ]


def dense_variant(variant: Variant, variants: Sequence[Variant]) -> Variant | None:
    """The dense model in the same runtime, which shows what sparsity gains there; None when it was not measured."""
    return next((other for other in variants if (other.model, other.runtime) == (DENSE, variant.runtime)), None)


# --- output ----------------------------------------------------------------------------------------------------------


def bench_table(variants: Sequence[Variant], length: int) -> Table:
    """The table of all variants by runtime.

    Args:
        variants: The variants; the first one is the dense model in torch.
        length: Tokens per row.
    """
    threads = torch.get_num_threads()
    table = Table(
        title=f"Median latency in ms, rows of {length} tokens, {threads} thread{'s' * (threads > 1)}, "
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        title_justify="left",
    )
    for heading in ("runtime", "model"):
        table.add_column(heading)
    for heading in ("MB", "differs"):
        table.add_column(heading, justify="right")
    for rows in variants[0].seconds:
        for heading in (f"{rows} row{'s' * (rows > 1)}", "to torch", "to dense"):
            table.add_column(heading, justify="right")
    for variant, following in zip(variants, [*variants[1:], None], strict=True):
        is_reference = variant.call is variant.original
        max_error = "" if is_reference else f"{'' if variant.exact else '~'}{variant.max_error:.0e}"
        is_last = following is None or following.runtime != variant.runtime
        numbers = (f"{variant.size / 1e6:.1f}", max_error, *cells(variant, variants))
        table.add_row(variant.runtime, variant.model, *numbers, end_section=is_last)
    return table


def cells(variant: Variant, variants: Sequence[Variant]) -> Iterator[str]:
    """By batch size: a variant's latency in ms, its speedup over dense torch, and over dense in the same runtime."""
    dense = dense_variant(variant, variants)
    for rows, seconds in variant.seconds.items():
        yield f"{1e3 * seconds:.1f}"
        yield f"{variants[0].seconds[rows] / seconds:.2f}x"
        yield "" if dense is None or variant.model == DENSE else f"{dense.seconds[rows] / seconds:.2f}x"


def speed_verdict(variants: Sequence[Variant], rows: int) -> str:
    """What sparsity gains at a batch size: each variant of the selected model against the dense one in its runtime.

    Args:
        variants: The measured variants.
        rows: The batch size.
    """
    noise = f"Within noise ({NOISE - 1:.0%})"
    groups: dict[str, list[str]] = {"Faster": [], noise: [], "Slower": [], "Not steady, so not comparable": []}
    faster, same, slower, unsteady = groups.values()
    for variant in variants:
        dense = dense_variant(variant, variants)
        if variant.model == DENSE or dense is None:
            continue
        ratio = dense.seconds[rows] / variant.seconds[rows]
        group = faster if ratio > NOISE else slower if ratio < 1 / NOISE else same
        (low, high), (dense_low, dense_high) = variant.spread[rows], dense.spread[rows]
        if group is not same and low <= dense_high and dense_low <= high:
            group = unsteady
        group.append(f"{variant.runtime}{variant.model.removeprefix(SELECTED)} {ratio:.2f}x")
    lists = ". ".join(f"{name}: {'; '.join(speedups)}" for name, speedups in groups.items() if speedups)
    nothing = "" if faster or unsteady else "Sparsity makes nothing faster here. "
    return f"Batch of {rows}, against the dense model by the same runtime. {nothing}{lists}."
