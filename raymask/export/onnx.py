"""How does a model become a file of ONNX, and what does int8 cost it?"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from raymask.core.errors import UserError, first_line
from raymask.export.selected import Selected, compared, logits, megabytes, sizes
from raymask.export.shrink import shrink as shrunk
from raymask.train.data import Data
from raymask.train.loop import predict
from raymask.train.model import positions
from raymask.train.objectives import OBJECTIVES
from raymask.train.task import read_texts, to_tokens

ONNX, INT8 = "model.onnx", "model-int8.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LIMIT = 2**31 - 2**24  # bytes of weights: a message of protobuf ends at 2**31
SHAPES = ((1, 1), (3, 7), (8, 32))  # rows and tokens of the batches on which outputs are compared


# --- writing ---------------------------------------------------------------------------------------------------------


def write_onnx(selected: Selected, folder: Path, *, int8: bool = False, shrink: bool = False) -> list[str]:
    """The model in fp32 by torch's own exporter, for batches of any size and length, compared with torch's outputs.

    `int8`: another file with weights in int8, whose metrics on `report` are held against fp32's. `shrink`: without dead
    neurons and heads. Raises UserError for packages that are missing and models that cannot be exported.
    """
    missing = missing_packages()
    if missing:
        raise UserError(f"--to onnx: needs {', '.join(missing)}: pip install 'raymask[onnx]'")
    data = report_rows(selected) if int8 else None
    module, lines = selected.module, []
    if shrink:
        module, removed = shrunk(module)
        lines.append(f"Dead, and gone without a change to any output: {removed}")
    batches = samples(selected)
    to_onnx(module, batches[-1], folder / ONNX)
    strayed = difference(OnnxModel(folder / ONNX, module.config), selected.module, batches)
    lines += [
        sizes({ONNX: folder / ONNX}, selected),
        f"Checked: ONNX Runtime's outputs differ from torch's by {strayed:.1g} at most, in batches of "
        f"{', '.join(' x '.join(map(str, batch['input_ids'].shape)) for batch in batches)} random tokens",
    ]
    if data is not None:
        quantize(folder / ONNX, folder / INT8)
        lines.append(sizes({INT8: folder / INT8}, selected))
        fp32, low = (metrics(OnnxModel(folder / name, module.config), data) for name in (ONNX, INT8))
        lines.append(
            f"On `report`: {', '.join(f'{name} fp32 {fp32[name]:.4f} -> int8 {low[name]:.4f}' for name in fp32)}"
        )
    selected.write_files(folder)
    return lines


def missing_packages() -> list[str]:
    """Those that are needed and not installed."""
    return [name for name in PACKAGES if find_spec(name) is None]


class Logits(nn.Module):
    """A model of transformers that returns a tensor, and takes no cache."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        found = self.module(input_ids=input_ids, attention_mask=attention_mask, **types)
        return found.logits  # type: ignore[no-any-return]


def to_onnx(module: Any, batch: dict[str, Tensor], path: Path) -> None:
    """Write a module in fp32; its inputs are called as `batch`'s, int64 (rows, tokens), both at least 2.

    Raises UserError.
    """
    size = 4 * sum(parameter.numel() for parameter in module.parameters())
    if size > LIMIT:
        raise UserError(f"--to onnx: a file of ONNX holds 2 GB, and the weights take {megabytes(size)} in fp32")
    module = copy.deepcopy(module).float()
    module.config.use_cache = False
    module.set_attn_implementation("eager")  # plain products, which runtimes know how to fuse
    axes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens")}
    try:
        with without_remarks():
            program = torch.onnx.export(
                Logits(module),
                kwargs=batch,
                dynamo=True,
                dynamic_shapes=dict.fromkeys(batch, axes),
                output_names=["logits"],
                verbose=False,
            )
            assert program is not None
            for node in program.model.graph.all_nodes():
                node.metadata_props.clear()  # whose stack traces name folders of this machine
            program.save(path, external_data=False)
    except Exception as error:  # noqa: BLE001 - torch's exporter raises its own kinds
        raise UserError(
            f"--to onnx: torch cannot export {module.config.model_type}: {first_line(error.__cause__ or error)}"
        ) from None


def quantize(source: Path, target: Path) -> None:
    """Weights in int8, a scale for each output; activations are rounded as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with without_remarks():
        quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)


@contextmanager
def without_remarks() -> Iterator[None]:
    """Neither warnings nor logs: what torch and onnxruntime say is of their own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# --- checking --------------------------------------------------------------------------------------------------------


class OnnxModel(nn.Module):
    """A file of ONNX, run by ONNX Runtime on as many threads as torch has, and called as the model itself is."""

    def __init__(self, path: Path, config: Any) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.config = config
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # says that tensors are wanted on the CPU

    def forward(self, **batch: Tensor) -> SimpleNamespace:
        [found] = self.session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
        return SimpleNamespace(logits=torch.from_numpy(found))


def samples(selected: Selected) -> list[dict[str, Tensor]]:
    """Batches of random tokens with the tokenizer's names: rows of several lengths, of two texts each, padded."""
    longest = positions(selected.module.config, selected.result.kind)
    return [sample(selected, count, min(length, longest)) for count, length in SHAPES]


def sample(selected: Selected, count: int, length: int) -> dict[str, Tensor]:
    """One batch, int64 (count, length)."""
    batch, places = selected.rows(count, length), torch.arange(length)
    batch["attention_mask"] = (places < torch.linspace(length, 1, count).long()[:, None]).long()
    if "token_type_ids" in selected.tokenizer.model_input_names:
        batch["token_type_ids"] = (places >= length // 2).long().repeat(count, 1)
    return batch


def difference(model: nn.Module, original: nn.Module, batches: Iterable[dict[str, Tensor]]) -> float:
    """By how much two models' outputs differ at most. Raises UserError when it is more than rounding."""
    original, strayed = copy.deepcopy(original).float(), 0.0
    for batch in batches:
        alike, apart = compared(logits(model, batch), logits(original, batch))
        strayed = max(strayed, apart)
        if not alike:
            raise UserError(f"--to onnx: ONNX Runtime's outputs differ from torch's by {strayed:.1e}")
    return strayed


def report_rows(selected: Selected) -> Data:
    """The task's rows. Raises UserError when they are not those of the search."""
    config = selected.module.config
    data = to_tokens(read_texts(selected.spec, config), selected.tokenizer, config)
    if data.digest() != selected.result.levels[-1].data:
        raise UserError("--int8: the task's files have changed since the search: put them back, or leave it out")
    return data


def metrics(model: nn.Module, data: Data) -> dict[str, float]:
    """A model's metrics on `report`."""
    objective = OBJECTIVES[data.kind]
    answers = predict(model, data.report, padding=data.padding, autocast=nullcontext, objective=objective)
    return data.measure_report(answers.numpy())
