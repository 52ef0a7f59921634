"""What did a search select? Its model, mask and tokenizer, read from the export that it ended with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from raymask.core.errors import UserError, first_line
from raymask.core.masks import Mask, digest, unpack_bits
from raymask.core.records import Result
from raymask.core.spec import Spec
from raymask.store import EXPORT, MASK, RunDir, packed_bits, sha256
from raymask.train.model import DTYPES, auto_class, persistent, quiet, vocabulary

CARD = "README.md"


@dataclass(frozen=True)
class Selected:
    """The selected model of a finished search.

    `module`: on the CPU, in eval mode, in the spec's dtype, exactly zero where `mask` is False. `mask`: by parameter
    name, the way round in which the module keeps its weights. `files`: configuration and tokenizer as they are in the
    export, by name, and its model card.
    """

    result: Result
    spec: Spec
    module: nn.Module
    tokenizer: Any
    mask: Mask
    files: dict[str, bytes]

    def write_files(self, folder: Path, *, card: bool = False) -> None:
        """Configuration and tokenizer; with the `card` of a checkpoint that transformers loads."""
        for name, content in self.files.items():
            if name == CARD and not card:
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and saved buffers by name, each once; they alias the module's."""
        return {name: tensor.detach() for name, tensor in persistent(self.module).items()}

    def rows(self, count: int = 8, length: int = 16) -> dict[str, Tensor]:
        """Rows of tokens drawn from seed 0, int64 (count, length), to compare outputs on."""
        rng = torch.Generator().manual_seed(0)
        known = min(vocabulary(self.module.config), len(self.tokenizer))
        ids = torch.randint(known, (count, length), generator=rng)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def read_selected(store: RunDir) -> Selected:
    """What a finished search selected. Raises UserError when it is not finished, or its export is not what it was."""
    spec, result = store.read_spec(), store.read_result()
    if result is None:
        what = "wait for it" if store.storage.busy() else "`raymask search` with the same spec goes on"
        raise UserError(f"{store.uri}: the search is not finished; {what}")
    again = "`raymask search` with the same spec and --run writes it again"
    if not store.has_export():
        raise UserError(f"{store.export_uri}: is gone; {again}")
    try:
        with store.storage.reading_folder(EXPORT) as folder:
            for name, expected in result.files.items():
                if sha256(folder / name) != expected:
                    raise ValueError(f"{name} is not what was written: its hash differs")
            bits = packed_bits(load_file(folder / MASK))
            module, tokenizer = load_exported(folder, spec, result.kind), load_tokenizer(folder, spec)
            paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
            files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(paths)}
        mask = unpack_bits(bits)
        require_masked(module, mask)
        if digest(bits) != result.levels[-1].digest:
            raise ValueError("its mask is another one")
    except UserError:  # of the storage
        raise
    except Exception as error:  # noqa: BLE001 - transformers, tokenizers and safetensors each raise their own kinds
        raise UserError(f"{store.export_uri}: is damaged ({first_line(error)}). Delete it, and {again}") from None
    return Selected(result, spec, module, tokenizer, mask, files)


def load_exported(folder: Path, spec: Spec, kind: str) -> nn.Module:
    """A checkpoint of ours by transformers, in eval mode; safetensors only. Raises ValueError when weights are missing,
    and whatever transformers raises."""
    with quiet():
        module, report = auto_class(kind).from_pretrained(
            folder,
            dtype=DTYPES[spec.model.dtype],
            trust_remote_code=spec.model.trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    if report["missing_keys"]:
        raise ValueError(f"it has no weights for {', '.join(sorted(report['missing_keys']))}")
    return module.eval()  # type: ignore[no-any-return]


def load_tokenizer(folder: Path, spec: Spec) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=spec.model.trust_remote_code, local_files_only=True)


def require_masked(module: nn.Module, mask: Mask) -> None:
    """Raise ValueError when a weight that the mask prunes is not zero."""
    for name, kept in mask.items():
        if bool(module.get_parameter(name).detach()[~kept].any()):
            raise ValueError(f"{name} is not zero where the mask prunes it")


def sizes(files: Mapping[str, Path], selected: Selected) -> str:
    """What some files take, in words, against the dense model in fp32."""
    size = sum(path.stat().st_size for path in files.values())
    dense = 4 * sum(tensor.numel() for tensor in selected.tensors().values())
    return f"{' + '.join(files)}: {megabytes(size)}, {dense / size:.1f}x smaller than dense fp32, {megabytes(dense)}"


def sizes_of_prunable(size: int, selected: Selected) -> str:
    """What the prunable matrices take, in words, against the same in dense fp32."""
    dense = 4 * selected.result.levels[-1].total
    return f"The prunable matrices take {megabytes(size)} of it, {dense / size:.1f}x smaller than {megabytes(dense)}"


@torch.no_grad()
def logits(module: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    """What a model says of rows of tokens, float32."""
    return module(**rows).logits.float()  # type: ignore[no-any-return]


def compared(found: Tensor, expected: Tensor) -> tuple[bool, float]:
    """Whether outputs differ by rounding only, and by how much at most."""
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-4), float((found - expected).abs().max())


def megabytes(size: float) -> str:
    return f"{size / 1e6:.{1 if size >= 1e6 else 3}f} MB"
