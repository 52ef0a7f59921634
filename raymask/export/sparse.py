"""How is a pruned model stored in little room, and loaded again?

model.sparse.safetensors   of each pruned matrix where its kept weights are, uint8, <name>:gaps or <name>:bits,
                           and these weights, <name>:values; all other tensors as they are
              its metadata format, kind of task, shapes of the pruned matrices, SHA-256 over all that
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
from raymask.core.gaps import Code, decode, encode
from raymask.core.masks import Mask
from raymask.export.selected import Selected, compared, logits, sizes, sizes_of_prunable
from raymask.store import write_tensors
from raymask.train.model import build, matrices, persistent, quiet
from raymask.train.sharding import without_parameters

SPARSE = "model.sparse.safetensors"
FORMAT = "raymask-sparse-1"
CODES: tuple[Code, ...] = ("gaps", "bits")


# --- writing ---------------------------------------------------------------------------------------------------------


def write_sparse(selected: Selected, folder: Path, *, values: str = "exact") -> list[str]:
    """The model in little room, loaded again and compared with the original.

    `values`: "exact", in the checkpoint's dtype, or "fp16", to which then all weights are rounded. Raises UserError
    when one of them is too large for that, or nothing is gained by it.
    """
    tensors = with_plain_zeros(selected)
    stored = {name: in_fp16(name, tensor) for name, tensor in tensors.items()} if values == "fp16" else tensors
    packed = save(folder / SPARSE, stored, selected.mask, selected.result.kind)
    selected.write_files(folder)
    again = load_sparse(folder, trust_remote_code=selected.spec.model.trust_remote_code)
    require_same(persistent(again), {name: stored[name].to(tensors[name].dtype) for name in tensors})
    rows = selected.rows()
    found, original = logits(again, rows), logits(selected.module, rows)
    alike, strayed = compared(found, original)
    if values == "exact" and not alike:  # memory lies otherwise
        raise UserError(f"{SPARSE}: outputs of what was loaded again differ by {strayed:.1e} from the original's")
    same = "bit for bit" if values == "exact" else "rounded to fp16"
    return [
        sizes({SPARSE: folder / SPARSE}, selected),
        sizes_of_prunable(packed, selected),
        f"Checked: loaded again, its weights are the original's, {same}; its outputs on {len(original)} rows of random "
        f"tokens differ by {strayed:.1g} at most",
    ]


def with_plain_zeros(selected: Selected) -> dict[str, Tensor]:
    """The model's tensors; what is pruned from below zero is -0.0 in them, of which the sign is no weight's."""
    tensors = selected.tensors()
    return tensors | {name: tensors[name].masked_fill(~kept, 0) for name, kept in selected.mask.items()}


def in_fp16(name: str, tensor: Tensor) -> Tensor:
    """The nearest numbers in fp16. Raises UserError when there are none, or they take as much room."""
    if not tensor.is_floating_point():
        return tensor
    if tensor.element_size() <= 2:
        raise UserError("--values: the model's weights take two bytes as they are: leave fp16 out")
    found = tensor.half()
    if not bool(torch.isfinite(found).all()):
        raise UserError(
            f"--values: {name} has a weight of {float(tensor.abs().max()):.3g}, and fp16 ends at 65504: leave it out"
        )
    return found


def save(path: Path, tensors: Mapping[str, Tensor], mask: Mask, kind: str) -> int:
    """Write the file; returns how many bytes the pruned matrices take in it. Raises OSError."""
    packed: dict[str, Tensor] = {}
    for name, kept in mask.items():
        code, places = encode(kept)
        packed |= {f"{name}:{code}": places, f"{name}:values": tensors[name][kept]}
    rest = {name: tensor.contiguous() for name, tensor in tensors.items() if name not in mask}
    shapes = {name: list(kept.shape) for name, kept in mask.items()}
    head = {"format": FORMAT, "kind": kind, "shapes": json.dumps(shapes)}
    write_tensors(path, packed | rest, head | {"sha256": digest(packed | rest, head)})
    return sum(tensor.numel() * tensor.element_size() for tensor in packed.values())


def digest(tensors: Mapping[str, Tensor], head: Mapping[str, str]) -> str:
    """SHA-256 over tensors with their names, dtypes and shapes, and over what the metadata says."""
    state = hashlib.sha256(json.dumps([head[key] for key in ("format", "kind", "shapes")]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(bits(tensor).numpy().data)
    return state.hexdigest()


def require_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise UserError when tensors are not the same, bit for bit."""
    for name in found.keys() | expected.keys():
        if name not in found or name not in expected or not torch.equal(bits(found[name]), bits(expected[name])):
            raise UserError(f"{SPARSE}: {name} is another one when it is loaded again")


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes, uint8."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


# --- loading ---------------------------------------------------------------------------------------------------------


def load_sparse(path: str | Path, *, csr: bool = False, trust_remote_code: bool = False) -> nn.Module:
    """The model in a folder that `raymask export --to sparse` wrote: one of transformers', in eval mode, on the CPU.

    `csr`: its pruned layers keep their weights as sparse CSR matrices and multiply with these, for latency on a CPU;
    outputs are the same but for rounding. Such a model is for inference and cannot be saved.
    Raises raymask.UserError when there is no such folder, it is damaged, or its weights are bf16 and `csr` is wanted.
    """
    from transformers import AutoConfig

    folder = Path(path)
    tensors, head = read(folder / SPARSE)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        with quiet(), without_parameters():
            module = build(config, trust_remote_code, kind=head["kind"])
        fill(module, tensors)
    except Exception as error:  # noqa: BLE001 - transformers raises its own kinds
        advice = "; trust_remote_code=True runs code of its own" if "custom code" in str(error) else ""
        raise UserError(f"{folder}: its {SPARSE} is whole, but makes no model: {first_line(error)}{advice}") from None
    module.eval()
    if csr:
        for name in json.loads(head["shapes"]):
            make_sparse(module, name)
    return module


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors by name, pruned matrices unpacked, and the metadata. Raises UserError when they are not whole."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; `raymask export RUN --to sparse` writes it")
    try:
        with safe_open(path, "pt") as file:
            head = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is damaged ({first_line(error)}); write it again with `raymask export`") from None
    if head.get("format") != FORMAT:
        raise UserError(f"{path}: is not what this version of raymask writes; write it again with `raymask export`")
    if digest(tensors, head) != head.get("sha256"):
        raise UserError(f"{path}: is damaged (its hash differs); write it again with `raymask export`")
    shapes: dict[str, list[int]] = json.loads(head["shapes"])
    return tensors_of(tensors, shapes), head


def tensors_of(stored: dict[str, Tensor], shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """What is stored, with the matrices of these shapes unpacked."""
    found = dict(stored)
    for name, shape in shapes.items():
        values = found.pop(f"{name}:values")
        [code] = [code for code in CODES if f"{name}:{code}" in found]
        places = decode(code, found.pop(f"{name}:{code}"))
        found[name] = values.new_zeros(shape)
        found[name].view(-1)[places] = values
    return found


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module without parameters these, in its own dtypes. Raises ValueError when it needs others."""
    empty = persistent(module)
    if empty.keys() != tensors.keys():
        raise ValueError(f"{min(empty.keys() ^ tensors.keys())} is not in both, config.json's model and the file")
    own = {name: tensor.to(empty[name].dtype) for name, tensor in tensors.items()}
    module.load_state_dict(own, strict=False, assign=True)  # which names tied weights once
    module.tie_weights()  # type: ignore[operator]


def make_sparse(module: nn.Module, name: str) -> None:
    """Let the layer of this weight multiply by a CSR matrix. Raises UserError when its dtype has no such product."""
    path, weight = name.removesuffix(".weight"), matrices(module, [name])[name]
    if weight.dtype != torch.float32:
        raise UserError(f"csr: {name} is {str(weight.dtype).removeprefix('torch.')}; CSR weights must be float32")
    bias: Any = module.get_submodule(path).bias
    module.set_submodule(path, SparseLinear(weight, bias))


class SparseLinear(nn.Module):
    """A linear layer that multiplies by a sparse matrix, (n_out, n_in) float32; for inference on a CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
            self.weight = weight.to_sparse_csr()
        self.bias = bias

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        """(..., n_in) -> (..., n_out)"""
        outputs = (self.weight @ inputs.reshape(-1, inputs.shape[-1]).T).T
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.reshape(*inputs.shape[:-1], -1)
