"""Export to ONNX, in fp32 and int8."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from raymask.core.errors import UserError, first_line
from raymask.data.hf_config import max_seq_length
from raymask.data.task import load_dataset, tokenize_dataset
from raymask.data.types import TaskData
from raymask.export.selected import SelectedModel, logits, megabytes, outputs_allclose, sizes
from raymask.export.shrink import shrink as shrunk
from raymask.train.losses import TASK_LOSSES
from raymask.train.trainer import Trainer

ONNX, INT8 = "model.onnx", "model-int8.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LIMIT = 2**31 - 2**24  # bytes of weights: a protobuf message holds less than 2**31
SHAPES = ((1, 1), (3, 7), (8, 32))  # rows and tokens of the batches that outputs are compared on


# --- writing ---------------------------------------------------------------------------------------------------------


def write_onnx(selected: SelectedModel, folder: Path, *, int8: bool = False, shrink: bool = False) -> list[str]:
    """Write the model in fp32 with torch's exporter, for batches of any size and length, and compare its outputs.

    Args:
        selected: The selected model.
        folder: The folder to fill.
        int8: Also write a file with int8 weights, and compare its metrics on `test` with fp32's.
        shrink: Remove dead neurons and attention heads first.

    Returns:
        Lines about what was written and checked.

    Raises:
        UserError: When a package is missing, the model cannot be exported, or its outputs differ.
    """
    missing = missing_packages()
    if missing:
        raise UserError(f"--to onnx: needs {', '.join(missing)}: pip install 'raymask[onnx]'")
    data = load_test_rows(selected) if int8 else None
    module, lines = selected.module, []
    if shrink:
        module, removed = shrunk(module)
        lines.append(f"Dead units removed, which changes no output: {removed}")
    batches = samples(selected)
    to_onnx(module, batches[-1], folder / ONNX)
    max_error = require_close(OnnxModel(folder / ONNX, module.config), selected.module, batches)
    lines += [
        sizes({ONNX: folder / ONNX}, selected),
        f"Checked: ONNX Runtime's outputs differ from torch's by {max_error:.1g} at most, in batches of "
        f"{', '.join(' x '.join(map(str, batch['input_ids'].shape)) for batch in batches)} tokens of random words",
    ]
    if data is not None:
        quantize(folder / ONNX, folder / INT8)
        lines.append(sizes({INT8: folder / INT8}, selected))
        fp32, int8_metrics = (
            compute_test_metrics(OnnxModel(folder / name, module.config), data) for name in (ONNX, INT8)
        )
        lines.append(
            f"On `test`: {', '.join(f'{name} fp32 {fp32[name]:.4f} -> int8 {int8_metrics[name]:.4f}' for name in fp32)}"
        )
    selected.write_files(folder)
    return lines


def missing_packages() -> list[str]:
    """The packages that ONNX export needs and that are not installed."""
    return [name for name in PACKAGES if find_spec(name) is None]


class Logits(nn.Module):
    """A transformers model that returns only its logits and takes no cache.

    Attributes:
        module: The transformers model.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Logits of a batch, `[rows, classes]` or `[rows, tokens, vocabulary]`.

        Args:
            input_ids: Token ids, int64 `[rows, tokens]`.
            attention_mask: 1 for tokens, 0 for padding, int64 `[rows, tokens]`.
            token_type_ids: Segment ids, int64 `[rows, tokens]`; None for models without them.
        """
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        outputs = self.module(input_ids=input_ids, attention_mask=attention_mask, **types)
        return outputs.logits  # type: ignore[no-any-return]


def to_onnx(module: Any, batch: dict[str, Tensor], path: Path) -> None:
    """Write a module as ONNX in fp32.

    Args:
        module: A transformers model.
        batch: Example inputs by name, int64 `[rows, tokens]` with at least 2 of both; the file's inputs have its names.
        path: The file to write.

    Raises:
        UserError: When the weights do not fit into a file, or torch cannot export the model.
    """
    size = 4 * sum(parameter.numel() for parameter in module.parameters())
    if size > LIMIT:
        raise UserError(f"--to onnx: an ONNX file holds 2 GB, and the weights take {megabytes(size)} in fp32")
    module = copy.deepcopy(module).float()
    module.config.use_cache = False
    module.set_attn_implementation("eager")  # plain matrix products, which runtimes can fuse
    axes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens")}
    try:
        with silenced():
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
                node.metadata_props.clear()  # they hold stack traces with paths of this machine
            program.save(path, external_data=False)
    except Exception as error:  # noqa: BLE001 - torch's exporter raises its own exceptions
        raise UserError(
            f"--to onnx: torch cannot export {module.config.model_type}: {first_line(error.__cause__ or error)}"
        ) from None


def quantize(source: Path, target: Path) -> None:
    """Write an ONNX file with int8 weights, one scale per output unit; activations are quantized dynamically."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with silenced():
        quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)


@contextmanager
def silenced() -> Iterator[None]:
    """Suppress warnings and logs of torch and onnxruntime, which concern their internals only."""
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
    """An ONNX file run by ONNX Runtime on as many threads as torch has, with the call of a transformers model.

    Attributes:
        session: The runtime's session.
        config: The transformers configuration.
        device_anchor: An empty parameter; code that asks for a model's device finds the CPU.
    """

    def __init__(self, path: Path, config: Any) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.config = config
        self.device_anchor = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, **batch: Tensor) -> SimpleNamespace:
        """An object with the batch's `logits`, float32."""
        [outputs] = self.session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
        return SimpleNamespace(logits=torch.from_numpy(outputs))


def samples(selected: SelectedModel) -> list[dict[str, Tensor]]:
    """Batches of random words, one per entry of SHAPES; their rows get shorter from the first to the last."""
    longest = max_seq_length(selected.module.config)
    return [selected.rows(torch.linspace(min(length, longest), 1, count).long().tolist()) for count, length in SHAPES]


def require_close(model: nn.Module, original: Any, batches: Iterable[dict[str, Tensor]]) -> float:
    """Compare two models' outputs.

    Args:
        model: The ONNX file.
        original: The torch model.
        batches: Inputs.

    Returns:
        The largest difference.

    Raises:
        UserError: It is more than rounding, or ONNX Runtime cannot run the file.
    """
    original, max_error = copy.deepcopy(original).float(), 0.0
    for batch in batches:
        try:
            outputs = logits(model, batch)
        except Exception as error:  # noqa: BLE001 - onnxruntime raises its own exceptions
            raise UserError(
                f"--to onnx: ONNX Runtime does not run the file of {original.config.model_type} on rows of another "
                f"number or length than it was made from: {first_line(error)}"
            ) from None
        close, difference = outputs_allclose(outputs, logits(original, batch))
        max_error = max(max_error, difference)
        if not close:
            raise UserError(f"--to onnx: ONNX Runtime's outputs differ from torch's by {max_error:.1e}")
    return max_error


def load_test_rows(selected: SelectedModel) -> TaskData:
    """The task's tokenized data. Raises UserError when its files have changed since the search."""
    config = selected.module.config
    data = tokenize_dataset(load_dataset(selected.spec, config), selected.tokenizer, config)
    if data.fingerprint() != selected.result.levels[-1].data_fingerprint:
        raise UserError("--int8: the task's files have changed since the search: restore them, or leave out --int8")
    return data


def compute_test_metrics(model: nn.Module, data: TaskData) -> dict[str, float]:
    """A model's metrics on `test`."""
    outputs = Trainer(model, TASK_LOSSES[data.kind], data.padding).predict(data.test)
    return data.test_metrics(outputs.numpy())
