"""Export of a pruned model in compact form, and its loader.

model.sparse.safetensors   for each pruned matrix the positions of its kept weights, uint8, <name>:gaps or <name>:bits,
                           and the weights themselves, <name>:values; all other tensors as they are
              its metadata format, kind of task, shapes of the pruned matrices, and SHA-256 over all of this
config.json ...            as in the checkpoint
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from raymask.core.errors import UserError, first_line
from raymask.core.masking.masks import Mask
from raymask.export.delta import Code, decode, encode_mask
from raymask.export.selected import SelectedModel, logits, outputs_allclose, sizes, sizes_of_prunable
from raymask.runs.run_dir import write_tensors
from raymask.train.fsdp import init_empty_weights
from raymask.train.model import build_model, quiet, state_tensors
from raymask.train.prunable import matrices

SPARSE = "model.sparse.safetensors"
SPARSE_FORMAT = "raymask-sparse-1"
CODES: tuple[Code, ...] = ("gaps", "bits")


# --- writing ---------------------------------------------------------------------------------------------------------


def write_sparse(selected: SelectedModel, folder: Path, *, values: str = "exact") -> list[str]:
    """Write the model in compact form, load it again, and compare it with the original.

    Args:
        selected: The selected model.
        folder: The folder to fill.
        values: "exact" keeps the checkpoint's dtype, "fp16" rounds all weights to fp16.

    Returns:
        Lines about what was written and checked.

    Raises:
        UserError: When a weight is too large for fp16, fp16 saves nothing, or the loaded model differs.
    """
    tensors = with_plain_zeros(selected)
    stored = {name: in_fp16(name, tensor) for name, tensor in tensors.items()} if values == "fp16" else tensors
    packed = save(folder / SPARSE, stored, selected.mask, selected.result.kind)
    selected.write_files(folder)
    loaded = load_sparse(folder, trust_remote_code=selected.spec.model.trust_remote_code)
    require_same(state_tensors(loaded), {name: stored[name].to(tensors[name].dtype) for name in tensors})
    rows = selected.rows()
    outputs, original = logits(loaded, rows), logits(selected.module, rows)
    close, max_error = outputs_allclose(outputs, original)
    if values == "exact" and not close:  # another memory alignment changes the rounding only
        raise UserError(f"{SPARSE}: outputs of the loaded model differ by {max_error:.1e} from the original's")
    same = "bit for bit" if values == "exact" else "rounded to fp16"
    return [
        sizes({SPARSE: folder / SPARSE}, selected),
        sizes_of_prunable(packed, selected),
        f"Checked: the loaded model's weights are the original's, {same}; its outputs on {len(original)} rows of "
        f"random words differ by {max_error:.1g} at most",
    ]


def with_plain_zeros(selected: SelectedModel) -> dict[str, Tensor]:
    """The model's tensors with pruned entries set to 0.0; a negative weight that was pruned is -0.0 in them."""
    tensors = selected.tensors()
    return tensors | {name: tensors[name].masked_fill(~kept, 0) for name, kept in selected.mask.items()}


def in_fp16(name: str, tensor: Tensor) -> Tensor:
    """A tensor rounded to fp16. Raises UserError when a value is too large, or when fp16 saves nothing."""
    if not tensor.is_floating_point():
        return tensor
    if tensor.element_size() <= 2:
        raise UserError("--values: the model's weights already take two bytes each: leave out --values fp16")
    rounded = tensor.half()
    if not bool(torch.isfinite(rounded).all()):
        raise UserError(
            f"--values: {name} has a weight of {float(tensor.abs().max()):.3g}, and fp16 ends at 65504: leave out "
            "--values fp16"
        )
    return rounded


def save(path: Path, tensors: Mapping[str, Tensor], mask: Mask, kind: str) -> int:
    """Write the compact file.

    Args:
        path: The file to write.
        tensors: All tensors by name.
        mask: Bool mask by the names of the pruned matrices.
        kind: The kind of task.

    Returns:
        The number of bytes that the pruned matrices take in the file.

    Raises:
        OSError: When the file cannot be written.
    """
    packed: dict[str, Tensor] = {}
    for name, kept in mask.items():
        code, codes = encode_mask(kept)
        packed |= {f"{name}:{code}": codes, f"{name}:values": tensors[name][kept]}
    rest = {name: tensor.contiguous() for name, tensor in tensors.items() if name not in mask}
    shapes = {name: list(kept.shape) for name, kept in mask.items()}
    metadata = {"format": SPARSE_FORMAT, "kind": kind, "shapes": json.dumps(shapes)}
    write_tensors(path, packed | rest, metadata | {"sha256": content_digest(packed | rest, metadata)})
    return sum(tensor.numel() * tensor.element_size() for tensor in packed.values())


def content_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over tensors with their names, dtypes and shapes, and over format, kind and shapes of the metadata."""
    state = hashlib.sha256(json.dumps([metadata[key] for key in ("format", "kind", "shapes")]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(bits(tensor).numpy().data)
    return state.hexdigest()


def require_same(loaded: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise UserError when tensors are not the same, bit for bit."""
    for name in loaded.keys() | expected.keys():
        if name not in loaded or name not in expected or not torch.equal(bits(loaded[name]), bits(expected[name])):
            raise UserError(f"{SPARSE}: {name} differs from the original when it is loaded again")


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes, uint8."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


# --- loading ---------------------------------------------------------------------------------------------------------


def load_sparse(path: str | Path, *, csr: bool = False, trust_remote_code: bool = False) -> nn.Module:
    """Load the model from a folder that `raymask export --to sparse` wrote.

    Args:
        path: The folder.
        csr: Keep the weights of pruned layers as sparse CSR matrices and multiply by these, for latency on a CPU.
            Outputs are the same up to rounding. Such a model is for inference only and cannot be saved.
        trust_remote_code: Whether the model may run code of its own.

    Returns:
        A transformers model, in eval mode, on the CPU.

    Raises:
        raymask.UserError: When there is no such folder, it is damaged, or `csr` is set and its weights are not float32.
    """
    from transformers import AutoConfig

    folder = Path(path)
    tensors, metadata = read(folder / SPARSE)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        with quiet(), init_empty_weights():
            module = build_model(config, trust_remote_code, kind=metadata["kind"])
        fill(module, tensors)
    except Exception as error:  # noqa: BLE001 - transformers raises its own exceptions
        advice = "; trust_remote_code=True allows its own code" if "custom code" in str(error) else ""
        raise UserError(
            f"{folder}: {SPARSE} is undamaged, but does not load as a model: {first_line(error)}{advice}"
        ) from None
    module.eval()
    if csr:
        for name in json.loads(metadata["shapes"]):
            make_sparse(module, name)
    return module


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the compact file and check its hash.

    Args:
        path: The file.

    Returns:
        All tensors by name with the pruned matrices unpacked, and the metadata.

    Raises:
        UserError: When there is no such file, or it is damaged or of another format.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; `raymask export RUN --to sparse` writes it")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is damaged ({first_line(error)}); write it again with `raymask export`") from None
    if metadata.get("format") != SPARSE_FORMAT:
        raise UserError(
            f"{path}: has a format that this version of raymask does not read; write it again with `raymask export`"
        )
    if content_digest(tensors, metadata) != metadata.get("sha256"):
        raise UserError(f"{path}: is damaged (its hash differs); write it again with `raymask export`")
    shapes: dict[str, list[int]] = json.loads(metadata["shapes"])
    return tensors_of(tensors, shapes), metadata


def tensors_of(stored: dict[str, Tensor], shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """The stored tensors with the pruned matrices, those in `shapes`, unpacked."""
    tensors = dict(stored)
    for name, shape in shapes.items():
        values = tensors.pop(f"{name}:values")
        [code] = [code for code in CODES if f"{name}:{code}" in tensors]
        indices = decode(code, tensors.pop(f"{name}:{code}"))
        tensors[name] = values.new_zeros(shape)
        tensors[name].view(-1)[indices] = values
    return tensors


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors into a module on the meta device, in the module's dtypes.

    Raises:
        ValueError: When the module's tensors have other names.
    """
    empty = state_tensors(module)
    if empty.keys() != tensors.keys():
        raise ValueError(
            f"{min(empty.keys() ^ tensors.keys())} is in only one of the model of config.json and the file"
        )
    converted = {name: tensor.to(empty[name].dtype) for name, tensor in tensors.items()}
    module.load_state_dict(converted, strict=False, assign=True)  # the file has tied weights under one name only
    module.tie_weights()  # type: ignore[operator]


def make_sparse(module: nn.Module, name: str) -> None:
    """Replace the layer of a weight by a SparseLinear, in place. Weights of experts, which torch has no CSR for, stay.

    Raises:
        UserError: The weight is not float32.
    """
    path, weight = name.removesuffix(".weight"), matrices(module, [name])[name]
    if weight.dim() > 2:
        return
    if weight.dtype != torch.float32:
        raise UserError(f"csr: {name} is {str(weight.dtype).removeprefix('torch.')}; CSR weights must be float32")
    bias: Any = module.get_submodule(path).bias
    module.set_submodule(path, SparseLinear(weight, bias))


class SparseLinear(nn.Module):
    """A linear layer with a sparse CSR weight; for inference on a CPU.

    Attributes:
        weight: CSR matrix, float32 `[n_out, n_in]`.
        bias: Float32 `[n_out]`, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
            self.weight = weight.to_sparse_csr()
        self.bias = bias

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs `[..., n_out]` of inputs `[..., n_in]`."""
        outputs = (self.weight @ inputs.reshape(-1, inputs.shape[-1]).T).T
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.reshape(*inputs.shape[:-1], -1)
