"""Which rows does a language model train on, choose by and report on?

Documents are joined, an end-of-text token between two where the tokenizer has one, and cut into rows of one length;
`select` is a stretch of train's rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raymask.core import seeds
from raymask.core.errors import UserError, first_line
from raymask.core.seeds import derive
from raymask.core.spec import DATASET, MEASURES, Task
from raymask.train.data import READERS, Data, Rows, read_file, require_known, seen_from, text_column

LENGTH = 128  # tokens of a row, unless the task says otherwise
AT_ONCE = 1000  # documents that are tokenized together
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Documents:
    """A language model's task before tokenization: the documents of train, and of `report`."""

    task: Task
    seed: int
    train: list[str]
    report: list[str]
    kind: str = "causal-lm"
    classes: tuple[str, ...] = ()


def load_documents(task: Task, seed: int) -> Documents:
    """Read a task's texts. Raises UserError for files and columns that cannot be used."""
    if task.name is not None:
        train, report = fetch(task.name)
        return Documents(task, seed, train, report)
    assert task.train is not None
    assert task.report is not None
    train, report = (read_documents(Path(path), *task.text) for path in (task.train, task.report))
    return Documents(task, seed, train, report)


def fetch(name: str) -> tuple[list[str], list[str]]:
    """The documents of a hub dataset's two splits, through `datasets`."""
    import datasets

    match = re.fullmatch(DATASET, name)
    assert match is not None, "the spec has seen to it"
    try:
        found = datasets.load_dataset(*match.groups())
    except Exception as error:  # noqa: BLE001 - hub, network and cache each raise their own kinds
        raise UserError(
            f"task.name: {name} cannot be loaded from the hub ({first_line(error)}). Without a network, give "
            "task.train and task.report"
        ) from None
    if missing := [split for split in SPLITS if split not in found]:
        raise UserError(
            f"task.name: {name} has no split {missing[0]}; its splits are {', '.join(found)}: save two of them as "
            "files, and give task.train and task.report"
        )
    train, report = (text_column(found[split].data.table, "text", f"{name} {split}") for split in SPLITS)
    return train, report


def read_documents(path: Path, name: str = "text") -> list[str]:
    """A .txt file is one document; of a table each row is one, in the column of this `name`."""
    if path.suffix.lower() in READERS:
        return text_column(read_file(path, {name: pa.string()}), name, str(path))
    if path.suffix.lower() != ".txt":
        raise UserError(f"{path}: the ending must be one of .txt, {', '.join(READERS)}")
    try:
        return [path.read_text(encoding="utf-8")]
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file{seen_from(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {first_line(error)}") from None


def cut(documents: Documents, tokenizer: Any, positions: int, vocabulary: int) -> Data:
    """Token ids of all three splits, in rows of the task's length, or of the model's `positions`.

    Raises UserError for texts that are too short, and when the tokenizer gives ids that the model's `vocabulary` does
    not have.
    """
    task = documents.task
    length = min(task.max_length or LENGTH, positions)
    rows, report = (
        to_rows(np.concatenate([*tokens(texts, tokenizer)]), length) for texts in (documents.train, documents.report)
    )
    if not len(report):
        raise UserError(f"{task.report or f'{task.name} validation'}: has fewer than two tokens")
    train, select = carve(rows, task, length, documents.seed)
    require_known((rows, report), vocabulary)
    parts, padding = {"": (0, len(report))}, tokenizer.pad_token_id or 0
    return Data(train, select, report, parts, MEASURES["causal-lm"], documents.kind, padding)


def tokens(texts: list[str], tokenizer: Any) -> Iterator[np.ndarray]:
    """All token ids of the texts, int32, in pieces: those without any are left out."""
    between = np.array([], np.int32)
    yield between
    for start in range(0, len(texts), AT_ONCE):
        for ids in tokenizer(texts[start : start + AT_ONCE], add_special_tokens=False, verbose=False)["input_ids"]:
            if ids:
                yield between
                yield np.array(ids, np.int32)
                between = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], np.int32)


def to_rows(ids: np.ndarray, length: int) -> Rows:
    """Rows of so many tokens, one after the other; the last one may be shorter, but has two. Labels say nothing."""
    ids = ids[: len(ids) - (len(ids) % length == 1)]
    offsets = np.array([*range(0, len(ids), length), len(ids)], np.int64)
    return Rows(ids, None, offsets, np.zeros(len(offsets) - 1, np.int64))


def carve(rows: Rows, task: Task, length: int, seed: int) -> tuple[Rows, Rows]:
    """Split train into what is trained on and `select`, a stretch of rows somewhere in it, from the seed alone."""
    size = min(max(round(len(rows) * task.select_share), 2), task.select_rows)
    if len(rows) - size < 2:
        raise UserError(
            f"{task.train or f'{task.name} train'}: {len(rows)} rows of {length} tokens are too few to carve {size} "
            "out of them: give more text, or a smaller task.max_length"
        )
    start = int(np.random.default_rng(derive(seed, seeds.VALIDATION)).integers(0, len(rows) - size + 1))
    chosen = np.arange(start, start + size)
    return rows.take(np.setdiff1d(np.arange(len(rows)), chosen)), rows.take(chosen)
