"""Is the selected model faster on this machine, in which form and by which runtime, and how large is it?"""

from __future__ import annotations

import copy
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from raymask.core.errors import UserError
from raymask.export.onnx import INT8, ONNX, OnnxModel, missing_packages, quantize, sample, samples, to_onnx
from raymask.export.selected import Selected, compared, logits, read_selected
from raymask.export.shrink import shrink
from raymask.export.sparse import SparseLinear, make_sparse
from raymask.report.terminal import say
from raymask.store import DENSE, MODEL, RunDir
from raymask.train.model import positions

BATCHES, LENGTH = (1, 16), 128
NOISE = 1.2
"""Latencies are told apart when one is more than so many times the other."""
REPEATS, FEW, SECONDS = 30, 5, 60.0
"""How often each form is timed; at least FEW times, and no more once a batch size took so many seconds."""
RUNTIMES = ("torch", "ONNX Runtime", "ONNX Runtime int8", "OpenVINO")
DENSE_FORM, SELECTED, SHRUNK = "dense", "selected", "selected, shrunk"
CSR, OPTION = "selected, CSR", "selected, option"
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}  # OpenVINO computes in bf16 otherwise, where the processor can
LEGEND = (
    "MB: of weights, in memory for torch, else of the file. Differs: outputs from torch's with the same weights, at "
    "most; ~ is approximate. To torch: times as fast as the dense model in torch. To dense: as the dense model in the "
    "same runtime. CSR: pruned layers multiply by sparse matrices. Shrunk: without dead neurons and heads. Option: "
    "OpenVINO's for sparse weights."
)


@dataclass
class Form:
    """A model as a runtime runs it.

    `call`: called as transformers' models are. `original`: in torch, whose outputs are the right ones. `size`: bytes of
    its weights in memory for torch, else of its file. `exact`: outputs differ from the original's by rounding only.
    `strayed`: by how much they do at most. `seconds`: the median latency by rows of a batch. `spread`: the
    lower and the upper quartile.
    """

    model: str
    runtime: str
    call: nn.Module
    original: nn.Module
    size: int
    exact: bool = True
    strayed: float = 0.0
    seconds: dict[int, float] = field(default_factory=dict)
    spread: dict[int, tuple[float, float]] = field(default_factory=dict)


def show_bench(console: Console, run: str, batches: Sequence[int] = (), length: int | None = None) -> None:
    """Measure the dense and the selected model of a finished run in all forms that this machine can run.

    `batches`: rows at once; `length`: tokens of a row. Raises UserError when the run is not finished, or the model
    takes no such rows.
    """
    store = RunDir(run)
    selected = read_selected(store)
    longest = positions(selected.module.config, selected.result.kind)
    if length is not None and length > longest:
        raise UserError(f"--length: the model takes {longest} tokens at most, not {length}")
    length = min(LENGTH, longest) if length is None else length
    notes: list[str] = []
    with TemporaryDirectory() as folder, torch.no_grad():
        models = in_fp32(selected, store)
        made = [*torch_forms(models, selected.mask), *onnx_forms(models, selected, Path(folder), notes)]
        forms = [form for runtime in RUNTIMES for form in made if form.runtime == runtime]
        for rows in sorted(set(batches or BATCHES)):
            batch = sample(selected, rows, length) | {"attention_mask": torch.ones(rows, length, dtype=torch.int64)}
            forms = [form for form in forms if agrees(form, batch, notes)]
            notes += measure(forms, batch)
    console.print(bench_table(forms, length))
    say(console, LEGEND)
    for line in [*(verdict(forms, rows) for rows in forms[0].seconds), *notes]:
        say(console, line)


# --- forms -----------------------------------------------------------------------------------------------------------


def in_fp32(selected: Selected, store: RunDir) -> dict[str, Any]:
    """The dense model and the selected one, both in fp32. Raises UserError when the run no longer has the dense one."""
    if not store.has_level(DENSE, 0):
        raise UserError(f"{store.uri}: its dense model is gone: bench takes a run as the search left it")
    found: dict[str, Any] = {name: copy.deepcopy(selected.module) for name in (DENSE_FORM, SELECTED)}
    dense = store.read_tensors(DENSE, 0, MODEL)  # which names tied weights once
    found[DENSE_FORM].load_state_dict(dense, strict=False)
    for module in found.values():
        module.float().config.use_cache = False
    return found


def torch_forms(models: dict[str, Any], mask: Iterable[str]) -> Iterator[Form]:
    """By torch alone; `mask`: names of the weights that can be CSR matrices."""
    for name, module in models.items():
        yield Form(name, "torch", module, module, weight_bytes(module))
    sparse = copy.deepcopy(models[SELECTED])
    for name in mask:
        make_sparse(sparse, name)
    yield Form(CSR, "torch", sparse, models[SELECTED], weight_bytes(sparse))


def weight_bytes(module: nn.Module) -> int:
    """What a module's weights take in memory."""
    tensors: list[Tensor] = [*module.parameters()]
    for layer in module.modules():
        if isinstance(layer, SparseLinear):
            tensors += [layer.weight.crow_indices(), layer.weight.col_indices(), layer.weight.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def onnx_forms(models: dict[str, Any], selected: Selected, folder: Path, notes: list[str]) -> Iterator[Form]:
    """By the runtimes that take a file of ONNX; `notes` gets what is not measured, and why."""
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
        original = models[DENSE_FORM if name == DENSE_FORM else SELECTED]
        path, low = folder / f"{name}-{ONNX}", folder / f"{name}-{INT8}"
        try:
            to_onnx(module, samples(selected)[-1], path)
        except UserError as error:
            notes.append(f"Not measured: ONNX Runtime, OpenVINO. {error}")
            return
        quantize(path, low)
        size = path.stat().st_size
        yield Form(name, "ONNX Runtime", OnnxModel(path, module.config), original, size)
        yield Form(name, "ONNX Runtime int8", OnnxModel(low, module.config), original, low.stat().st_size, exact=False)
        if find_spec("openvino"):
            yield Form(name, "OpenVINO", OpenVinoModel(path, EXACT), original, size)
        if find_spec("openvino") and name == SELECTED:
            settings = EXACT | {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": "0.5"}
            yield Form(OPTION, "OpenVINO", OpenVinoModel(path, settings), original, size)


class OpenVinoModel(nn.Module):
    """A file of ONNX, run by OpenVINO on as many threads as torch has, and called as the model itself is."""

    def __init__(self, path: Path, settings: dict[str, str]) -> None:
        super().__init__()
        # the import reports itself to its makers through this package, and does without where there is none
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        import openvino

        core = openvino.Core()
        asked = {"INFERENCE_NUM_THREADS": str(torch.get_num_threads()), "PERFORMANCE_HINT": "LATENCY"} | settings
        self.compiled = core.compile_model(core.read_model(path), "CPU", asked)

    def forward(self, **batch: Tensor) -> SimpleNamespace:
        found = self.compiled({name: tensor.numpy() for name, tensor in batch.items()})["logits"]
        return SimpleNamespace(logits=torch.from_numpy(found.copy()))


# --- measuring -------------------------------------------------------------------------------------------------------


def agrees(form: Form, batch: dict[str, Tensor], notes: list[str]) -> bool:
    """Whether a form's outputs are the original's, or about them; what is another model is not measured."""
    alike, apart = compared(logits(form.call, batch), logits(form.original, batch))
    form.strayed = max(form.strayed, apart)
    same = alike or not form.exact
    if not same:
        notes.append(f"Not measured: {form.model} by {form.runtime}, whose outputs differ by {form.strayed:.1g}")
    return same


def measure(forms: Sequence[Form], batch: dict[str, Tensor]) -> list[str]:
    """Time all forms in turn, so that what else the machine does hits them alike; says whether it did."""
    times: list[list[float]] = [[] for _ in forms]
    rows, started = len(batch["input_ids"]), time.perf_counter()
    while len(times[0]) < FEW or (len(times[0]) < REPEATS and time.perf_counter() - started < SECONDS):
        for form, taken in zip(forms, times, strict=True):
            form.call(**batch)  # another's threads may still spin, and its weights fill the caches
            begun = time.perf_counter()
            form.call(**batch)
            taken.append(time.perf_counter() - begun)
    unsteady = []
    for form, taken in zip(forms, times, strict=True):
        low, form.seconds[rows], high = quantiles(taken, method="inclusive")
        form.spread[rows] = low, high
        if high > NOISE * low:
            unsteady.append(f"{form.runtime}, {form.model} took {1e3 * low:.1f} to {1e3 * high:.1f} ms (quartiles)")
    if not unsteady:
        return []
    advice = "measure again" + (", or with OMP_NUM_THREADS=1" if torch.get_num_threads() > 1 else "")
    return [
        f"Batch of {rows}: {len(unsteady)} of {len(forms)} were not steady; {unsteady[0]}. Something else keeps this "
        f"machine busy: {advice}"
    ]


def rival(form: Form, forms: Sequence[Form]) -> Form | None:
    """The dense model by the same runtime, which tells what sparsity is worth there."""
    return next((other for other in forms if (other.model, other.runtime) == (DENSE_FORM, form.runtime)), None)


# --- saying ----------------------------------------------------------------------------------------------------------


def bench_table(forms: Sequence[Form], length: int) -> Table:
    """All forms by runtime; the first one is the dense model in torch."""
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
    for rows in forms[0].seconds:
        for heading in (f"{rows} row{'s' * (rows > 1)}", "to torch", "to dense"):
            table.add_column(heading, justify="right")
    for form, following in zip(forms, [*forms[1:], None], strict=True):
        strayed = f"{'' if form.exact else '~'}{form.strayed:.0e}" if form.call is not form.original else ""
        ends = following is None or following.runtime != form.runtime
        figures = (f"{form.size / 1e6:.1f}", strayed, *cells(form, forms))
        table.add_row(form.runtime, form.model, *figures, end_section=ends)
    return table


def cells(form: Form, forms: Sequence[Form]) -> Iterator[str]:
    """By batch size: a form's latency, and how many times as fast as the dense model it is."""
    other = rival(form, forms)
    for rows, seconds in form.seconds.items():
        yield f"{1e3 * seconds:.1f}"
        yield f"{forms[0].seconds[rows] / seconds:.2f}x"
        yield "" if other is None or form.model == DENSE_FORM else f"{other.seconds[rows] / seconds:.2f}x"


def verdict(forms: Sequence[Form], rows: int) -> str:
    """What sparsity is worth at a batch size: each form of the selected model held against the dense one there."""
    noise = f"Within noise ({NOISE - 1:.0%})"
    said: dict[str, list[str]] = {"Faster": [], noise: [], "Slower": [], "Not steady, so not told apart": []}
    faster, same, slower, unsteady = said.values()
    for form in forms:
        other = rival(form, forms)
        if form.model == DENSE_FORM or other is None:
            continue
        ratio = other.seconds[rows] / form.seconds[rows]
        kind = faster if ratio > NOISE else slower if ratio < 1 / NOISE else same
        (low, high), (low_there, high_there) = form.spread[rows], other.spread[rows]
        if kind is not same and low <= high_there and low_there <= high:
            kind = unsteady
        kind.append(f"{form.runtime}{form.model.removeprefix(SELECTED)} {ratio:.2f}x")
    lists = ". ".join(f"{kind}: {'; '.join(found)}" for kind, found in said.items() if found)
    nothing = "" if faster or unsteady else "Sparsity makes nothing faster here. "
    return f"Batch of {rows}, against the dense model by the same runtime. {nothing}{lists}."
