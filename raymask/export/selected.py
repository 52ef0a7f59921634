"""The selected model of a finished search: module, mask and tokenizer, read from its `export/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from raymask.core.errors import UserError, first_line
from raymask.core.masking.masks import Mask, digest, unpack_bits
from raymask.core.records import Result
from raymask.core.spec import Spec
from raymask.data.hf_config import pad_token_id, vocab_size
from raymask.data.types import TokenizedSplit
from raymask.runs.run_dir import EXPORT, MASK, RunDir, sha256, tensors_to_bits
from raymask.train.batches import collate
from raymask.train.model import DTYPES, auto_class, quiet, state_tensors

MODEL_CARD = "README.md"


@dataclass(frozen=True)
class SelectedModel:
    """The selected model of a finished search.

    Attributes:
        result: The search's result.
        spec: The search's spec.
        module: On the CPU, in eval mode, in the spec's dtype; exactly zero where `mask` is False.
        tokenizer: The transformers tokenizer.
        mask: Bool tensors by parameter name, in the shapes and orientation of the module's weights.
        files: Contents of the export's other files by name: configuration, tokenizer and model card.
    """

    result: Result
    spec: Spec
    module: nn.Module
    tokenizer: Any
    mask: Mask
    files: dict[str, bytes]

    def write_files(self, folder: Path, *, card: bool = False) -> None:
        """Write configuration and tokenizer, and with `card` the model card."""
        for name, content in self.files.items():
            if name == MODEL_CARD and not card:
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and saved buffers by name, tied ones once. They share memory with the module's."""
        return {name: tensor.detach() for name, tensor in state_tensors(self.module).items()}

    def rows(self, lengths: Sequence[int] = (16,) * 8) -> dict[str, Tensor]:
        """Random words from seed 0, tokenized as texts of the task are, to compare outputs on.

        Args:
            lengths: Tokens of each row. A classifier's row is longer if its special tokens and a word need more.

        Returns:
            Inputs by name, int64 `[rows, tokens]`, padded to the longest row.
        """
        rng, known = torch.Generator().manual_seed(0), min(vocab_size(self.module.config), len(self.tokenizer))
        # four times as many tokens as needed: written as text and read again they may be fewer
        encoded = [self.encode(torch.randint(known, (2, 4 * length), generator=rng), length) for length in lengths]
        ids = [row["input_ids"] for row in encoded]
        types = [row["token_type_ids"] for row in encoded if "token_type_ids" in row]
        rows = TokenizedSplit(
            np.concatenate(ids).astype(np.int32),
            np.concatenate(types).astype(np.int8) if types else None,
            np.cumsum([0, *map(len, ids)]),
            np.zeros(len(ids), np.int64),
        )
        batch = collate(rows, np.arange(len(rows)), pad_token_id(self.module.config) or 0)
        return {name: tensor for name, tensor in batch.items() if name != "labels"}

    def encode(self, tokens: Tensor, length: int) -> Mapping[str, Any]:
        """One row of `rows`.

        Args:
            tokens: Random token ids, int64 `[2, tokens]`. With token types they are a pair of texts.
            length: Tokens of the row.
        """
        if self.result.kind == "causal-lm":
            return {"input_ids": tokens[0, :length].numpy()}
        num_texts = 2 if "token_type_ids" in self.tokenizer.model_input_names else 1
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens[:num_texts]]
        least = self.tokenizer.num_special_tokens_to_add(pair=num_texts == 2) + num_texts
        return self.tokenizer(*texts, truncation=True, max_length=max(length, least))  # type: ignore[no-any-return]


def read_selected(run_dir: RunDir) -> SelectedModel:
    """Read the selected model of a finished search.

    Args:
        run_dir: The run directory.

    Returns:
        The selected model.

    Raises:
        UserError: When the search is not finished, or its export is missing or has changed since.
    """
    spec, result = run_dir.read_spec(), run_dir.read_result()
    if result is None:
        advice = "wait for it" if run_dir.storage.is_locked() else "`raymask search` with the same spec continues it"
        raise UserError(f"{run_dir.uri}: the search is not finished; {advice}")
    again = "`raymask search` with the same spec and --run writes it again"
    if not run_dir.has_export():
        raise UserError(f"{run_dir.export_uri}: does not exist; {again}")
    try:
        with run_dir.storage.reading_folder(EXPORT) as folder:
            for name, expected in result.files.items():
                if sha256(folder / name) != expected:
                    raise ValueError(f"the hash of {name} differs from that of the file that was written")
            bits = tensors_to_bits(load_file(folder / MASK))
            module, tokenizer = load_exported(folder, spec, result.kind), load_tokenizer(folder, spec)
            paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
            files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(paths)}
        mask = unpack_bits(bits)
        require_masked(module, mask)
        if digest(bits) != result.levels[-1].digest:
            raise ValueError("its mask is not the selected one")
    except UserError:  # raised by the storage
        raise
    except Exception as error:  # noqa: BLE001 - transformers, tokenizers and safetensors each raise their own exceptions
        raise UserError(f"{run_dir.export_uri}: is damaged ({first_line(error)}). Delete it, and {again}") from None
    return SelectedModel(result, spec, module, tokenizer, mask, files)


def load_exported(folder: Path, spec: Spec, kind: str) -> nn.Module:
    """Load a checkpoint that raymask wrote, with transformers, in eval mode; safetensors only.

    Args:
        folder: The checkpoint.
        spec: The search's spec; its dtype and `trust_remote_code` apply.
        kind: The kind of task.

    Raises:
        ValueError: When weights are missing. Exceptions of transformers pass through.
    """
    with quiet():
        module, loading_info = auto_class(kind).from_pretrained(
            folder,
            dtype=DTYPES[spec.model.dtype],
            trust_remote_code=spec.model.trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    if loading_info["missing_keys"]:
        raise ValueError(f"it has no weights for {', '.join(sorted(loading_info['missing_keys']))}")
    return module.eval()  # type: ignore[no-any-return]


def load_tokenizer(folder: Path, spec: Spec) -> Any:
    """The tokenizer of a checkpoint that raymask wrote. Exceptions of transformers pass through."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=spec.model.trust_remote_code, local_files_only=True)


def require_masked(module: nn.Module, mask: Mask) -> None:
    """Raise ValueError when a weight that the mask prunes is not zero."""
    for name, kept in mask.items():
        if bool(module.get_parameter(name).detach()[~kept].any()):
            raise ValueError(f"{name} is not zero where the mask prunes it")


def sizes(files: Mapping[str, Path], selected: SelectedModel) -> str:
    """A line with the total size of some files, and how much smaller that is than the dense model in fp32."""
    size = sum(path.stat().st_size for path in files.values())
    dense = 4 * sum(tensor.numel() for tensor in selected.tensors().values())
    return f"{' + '.join(files)}: {megabytes(size)}, {dense / size:.1f}x smaller than dense fp32, {megabytes(dense)}"


def sizes_of_prunable(size: int, selected: SelectedModel) -> str:
    """A line with the prunable matrices' size in bytes, and how much smaller that is than dense fp32."""
    dense = 4 * selected.result.levels[-1].num_prunable
    return f"The prunable matrices take {megabytes(size)} of it, {dense / size:.1f}x smaller than {megabytes(dense)}"


@torch.no_grad()
def logits(module: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    """A model's logits for a batch, float32."""
    return module(**rows).logits.float()  # type: ignore[no-any-return]


def outputs_allclose(outputs: Tensor, expected: Tensor) -> tuple[bool, float]:
    """Whether outputs differ by rounding only, and their largest absolute difference."""
    return torch.allclose(outputs, expected, rtol=1e-3, atol=1e-4), float((outputs - expected).abs().max())


def megabytes(size: float) -> str:
    """A size in bytes as text, in MB of 10^6 bytes."""
    return f"{size / 1e6:.{1 if size >= 1e6 else 3}f} MB"
