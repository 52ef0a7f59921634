"""How does a search become a plain Hugging Face checkpoint, with exact zeros, packed masks, and a model card?"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from raymask.core.errors import UserError
from raymask.core.masks import pack_bits
from raymask.core.records import Result
from raymask.export.selected import CARD, Selected, load_exported, sizes
from raymask.report.card import model_card
from raymask.store import EXPORT, MASK, MODEL, RunDir, flat_bits, sha256, write_tensors
from raymask.train.model import Source, build, persistent, quiet


def export(store: RunDir, source: Source, result: Result, lineage: str, trust_remote_code: bool) -> dict[str, str]:
    """Write `export/` from a lineage's last level; it appears whole or not at all. Returns the SHA-256 of its tensors'
    files by name."""
    last = result.levels[-1].level
    module = build(source.config, trust_remote_code, kind=source.kind)
    module.load_state_dict(store.read_tensors(lineage, last, MODEL), strict=False)  # which names tied weights once
    mask = store.read_tensors(lineage, last, MASK)
    with store.storage.writing_folder(EXPORT) as folder:
        save_module(module, folder)
        source.tokenizer.save_pretrained(folder)
        write_tensors(folder / MASK, mask)
        (folder / CARD).write_text(model_card(result), encoding="utf-8")
        return {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def save_module(module: nn.Module, folder: Path) -> None:
    """Weights and configuration, as transformers writes them. Raises OSError."""
    try:
        with quiet():
            module.save_pretrained(folder)  # type: ignore[operator]
    except SafetensorError as error:  # a full disk, to safetensors
        raise OSError(str(error)) from None


def write_hf(selected: Selected, folder: Path) -> list[str]:
    """The checkpoint again, wherever it is wanted; loaded by transformers, it has the same tensors."""
    save_module(selected.module, folder)
    write_tensors(folder / MASK, flat_bits(pack_bits(selected.mask)))
    selected.write_files(folder, card=True)
    again, whole = persistent(load_exported(folder, selected.spec, selected.result.kind)), selected.tensors()
    if again.keys() != whole.keys() or not all(torch.equal(again[name], whole[name]) for name in whole):
        raise UserError(f"{folder}: transformers does not read there what was written")
    last = selected.result.levels[-1]
    return [
        sizes({MODEL: folder / MODEL}, selected) + "; zeros take as much room as other numbers",
        f"Checked: transformers loads the same tensors from it; of {last.total:,} weights in its prunable matrices "
        f"{last.total - last.kept:,} or more are exact zeros",
    ]
