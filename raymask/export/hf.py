"""Export to a plain Hugging Face checkpoint with exact zeros, packed masks and a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from raymask.core.errors import UserError
from raymask.core.masking.masks import pack_bits
from raymask.core.records import Result
from raymask.export.model_card import model_card
from raymask.export.selected import MODEL_CARD, SelectedModel, load_exported, sizes
from raymask.runs.run_dir import EXPORT, MASK, MODEL, RunDir, bits_to_tensors, sha256, write_tensors
from raymask.train.model import ModelInfo, build_model, quiet, state_tensors


def export(
    run_dir: RunDir, source: ModelInfo, tokenizer: Any, result: Result, lineage: str, trust_remote_code: bool
) -> dict[str, str]:
    """Write `export/` from a lineage's last level; the folder appears complete or not at all.

    Args:
        run_dir: The run directory.
        source: The model's configuration and kind of task.
        tokenizer: The transformers tokenizer.
        result: The search's result, for the model card.
        lineage: The lineage whose last level is exported.
        trust_remote_code: Whether the model may run code of its own.

    Returns:
        SHA-256 of the safetensors files by name.
    """
    last = result.levels[-1].level
    module = build_model(source.config, trust_remote_code, kind=source.kind)
    # not strict: the file has tied weights under one name only
    module.load_state_dict(run_dir.read_tensors(lineage, last, MODEL), strict=False)
    mask = run_dir.read_tensors(lineage, last, MASK)
    with run_dir.storage.writing_folder(EXPORT) as folder:
        save_module(module, folder)
        tokenizer.save_pretrained(folder)
        write_tensors(folder / MASK, mask)
        (folder / MODEL_CARD).write_text(model_card(result), encoding="utf-8")
        return {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def save_module(module: nn.Module, folder: Path) -> None:
    """Write weights and configuration as transformers does. Raises OSError when the files cannot be written."""
    try:
        with quiet():
            module.save_pretrained(folder)  # type: ignore[operator]
    except SafetensorError as error:  # what safetensors raises when the disk is full
        raise OSError(str(error)) from None


def write_hf(selected: SelectedModel, folder: Path) -> list[str]:
    """Write the checkpoint of `export/` to another folder.

    Args:
        selected: The selected model.
        folder: The folder to fill.

    Returns:
        Lines about what was written and checked.

    Raises:
        UserError: When transformers loads other tensors than were written.
    """
    save_module(selected.module, folder)
    write_tensors(folder / MASK, bits_to_tensors(pack_bits(selected.mask)))
    selected.write_files(folder, card=True)
    loaded = state_tensors(load_exported(folder, selected.spec, selected.result.kind))
    expected = selected.tensors()
    if loaded.keys() != expected.keys() or not all(torch.equal(loaded[name], expected[name]) for name in expected):
        raise UserError(f"{folder}: transformers loads other tensors than were written")
    last = selected.result.levels[-1]
    return [
        sizes({MODEL: folder / MODEL}, selected) + "; zeros take as much space as other numbers",
        f"Checked: transformers loads the same tensors. Of {last.num_prunable:,} weights in its prunable matrices "
        f"{last.num_prunable - last.num_kept:,} or more are exact zeros",
    ]
