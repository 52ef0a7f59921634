"""What leaves a search? A plain Hugging Face checkpoint with exact zeros, packed masks, and a model card."""

from __future__ import annotations

from safetensors import SafetensorError

from raymask.core.records import Result
from raymask.report.card import model_card
from raymask.store import EXPORT, MASK, MODEL, RunDir, write_tensors
from raymask.train.model import Source, build, quiet


def export(store: RunDir, source: Source, result: Result, lineage: str) -> None:
    """Write `export/` from a lineage's last level; it appears whole or not at all."""
    last = result.levels[-1].level
    module = build(source.config, kind=source.kind)
    module.load_state_dict(store.read_tensors(lineage, last, MODEL), strict=False)  # which names tied weights once
    mask = store.read_tensors(lineage, last, MASK)
    with store.storage.writing_folder(EXPORT) as folder:
        try:
            with quiet():
                module.save_pretrained(folder)  # type: ignore[operator]
        except SafetensorError as error:  # a full disk, to safetensors
            raise OSError(str(error)) from None
        source.tokenizer.save_pretrained(folder)
        write_tensors(folder / MASK, mask)
        (folder / "README.md").write_text(model_card(result), encoding="utf-8")
