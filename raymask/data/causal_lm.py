"""Language-model data: documents, joined and cut into rows of tokens.

An end-of-text token separates two documents if the tokenizer has one. All rows have the same length. `validation` is
the user's own file, or a contiguous range of the rows of `train`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raymask.core import seeds
from raymask.core.errors import UserError, first_line
from raymask.core.seeds import derive
from raymask.core.spec import DATASET, METRICS_BY_KIND, Task
from raymask.data.files import (
    ending_of,
    from_dataset,
    open_text,
    read_columns,
    readable,
    require_utf8,
    text_column,
)
from raymask.data.tokenize import TOKENIZER_BATCH, require_known_ids
from raymask.data.types import TaskData, TokenizedSplit

BLOCK_SIZE = 128  # tokens a row, where the task has no max_length
HUB_SPLITS = ("train", "validation")  # become train and test


@dataclass(frozen=True)
class Documents:
    """A language-model task before tokenization.

    Attributes:
        task: The spec's task section.
        seed: The spec's seed.
        train: Documents of `train`, before `validation` is split off; None where `test` alone is read.
        test: Documents of `test`.
        validation: Documents of the user's own `validation` file; None if there is none.
        kind: The spec's task.kind.
        classes: Always empty: the labels of a language model are its tokens.
    """

    task: Task
    seed: int
    train: list[str] | None
    test: list[str]
    validation: list[str] | None = None
    kind: str = "causal-lm"
    classes: tuple[str, ...] = ()


def load_documents(task: Task, seed: int, *, test_only: bool = False) -> Documents:
    """Read the documents of a task, from the hub or from files.

    Args:
        task: The spec's task section.
        seed: The spec's seed.
        test_only: Read `test` alone, and leave the other splits without rows.

    Raises:
        UserError: A dataset, file or column cannot be used.
    """
    if task.name is not None:
        *before, test = fetch_documents(task.name, HUB_SPLITS[test_only:])
        return Documents(task, seed, before[0] if before else None, test)
    paths = (
        {"test": task.test} if test_only else {"train": task.train, "test": task.test, "validation": task.validation}
    )
    texts = {split: read_documents(Path(path), *task.text) for split, path in paths.items() if path is not None}
    return Documents(task, seed, texts.get("train"), texts["test"], texts.get("validation"))


def fetch_documents(name: str, splits: Sequence[str] = HUB_SPLITS) -> list[list[str]]:
    """Load the documents of splits from the hub, with `datasets`.

    The dataset's public `validation` split is used as `test`.

    Args:
        name: `hub/<id>` or `hub/<id>:<configuration>`.
        splits: The dataset's splits to load.

    Raises:
        UserError: The dataset cannot be loaded, or has no such split or no text column.
    """
    import datasets

    match = re.fullmatch(DATASET, name)
    assert match is not None, "the spec has checked it"
    try:
        dataset = datasets.load_dataset(*match.groups())
    except Exception as error:  # noqa: BLE001 - hub, network and cache each raise their own errors
        raise UserError(
            f"task.name: {name} cannot be loaded from the hub ({first_line(error)}). Without a network, give "
            "task.train and task.test"
        ) from None
    if missing := [split for split in splits if split not in dataset]:
        raise UserError(
            f"task.name: {name} has no split {missing[0]}; its splits are {', '.join(dataset)}: save two of them as "
            "files, and give task.train and task.test"
        )
    return [text_column(from_dataset(dataset[split], ("text",), f"{name} {split}"), "text") for split in splits]


def read_documents(path: Path, name: str = "text") -> list[str]:
    """Read the documents of one file: a .txt file is one document, a table has one a row.

    Args:
        path: A .txt file or a table.
        name: The text column of a table.

    Raises:
        UserError: The file or the column cannot be read.
    """
    if ending_of(path) != ".txt":
        return text_column(read_columns(path, (name,)), name)
    with readable(path), open_text(path, newline=None) as file:
        lines = file.readlines()
    for number, line in enumerate(lines, 1):
        require_utf8(line, f"{path}: line {number}")
    return ["".join(lines)]


def group_texts(documents: Documents, tokenizer: Any, positions: int, vocabulary: int) -> TaskData:
    """Tokenize the documents and cut the tokens into the rows of all three splits.

    Args:
        documents: The documents of `train` and `test`.
        tokenizer: A transformers tokenizer.
        positions: The longest sequence that the model takes, in tokens. A row has the task's max_length
            (BLOCK_SIZE by default), but never more than this.
        vocabulary: The number of token ids that the model knows.

    Raises:
        UserError: The texts are too short, or the tokenizer gives an id that the model does not know.
    """
    task = documents.task
    length = min(task.max_length or BLOCK_SIZE, positions)

    def read_rows(texts: list[str]) -> TokenizedSplit:
        return cut_rows(np.concatenate([*token_chunks(texts, tokenizer)]), length)

    test = read_rows(documents.test)
    train = validation = read_rows(documents.train or [])
    if documents.validation is not None:
        validation = read_rows(documents.validation)
    elif documents.train is not None:
        train, validation = split_validation_range(train, task, length, documents.seed)
    for rows, texts, path in (
        (validation, documents.validation, task.validation),
        (test, documents.test, task.test or f"{task.name} validation"),
    ):
        if texts is not None and not len(rows):
            raise UserError(f"{path}: has fewer than two tokens")
    require_known_ids((train, validation, test), vocabulary)
    subsets = {"": (0, len(test))}
    return TaskData(train, validation, test, subsets, METRICS_BY_KIND["causal-lm"], documents.kind)


def token_chunks(texts: list[str], tokenizer: Any) -> Iterator[np.ndarray]:
    """Tokenize texts one after the other.

    Yields:
        int32 token ids: those of a text, or the separator between two. Texts without tokens are skipped.
    """
    separator = np.array([], np.int32)
    yield separator  # np.concatenate needs at least one array
    for start in range(0, len(texts), TOKENIZER_BATCH):
        for ids in tokenizer(texts[start : start + TOKENIZER_BATCH], add_special_tokens=False, verbose=False)[
            "input_ids"
        ]:
            if ids:
                yield separator
                yield np.array(ids, np.int32)
                separator = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], np.int32)


def cut_rows(ids: np.ndarray, length: int) -> TokenizedSplit:
    """Cut token ids, int32 [tokens], into rows of `length` tokens. The labels are all 0 and unused.

    The last row may be shorter. A last row of one token is dropped: there is nothing to predict in it.
    """
    ids = ids[: len(ids) - (len(ids) % length == 1)]
    offsets = np.array([*range(0, len(ids), length), len(ids)], np.int64)
    return TokenizedSplit(ids, None, offsets, np.zeros(len(offsets) - 1, np.int64))


def split_validation_range(
    rows: TokenizedSplit, task: Task, length: int, seed: int
) -> tuple[TokenizedSplit, TokenizedSplit]:
    """Split `train` into training rows and `validation`, a contiguous range whose position depends on the seed alone.

    Args:
        rows: All rows of `train`.
        task: Gives the size of `validation` (validation_share, validation_rows), and a name for messages.
        length: Tokens a row, for messages.
        seed: The spec's seed.

    Returns:
        The training rows and `validation`, both in their original order.

    Raises:
        UserError: Fewer than two rows are left to train on.
    """
    size = min(max(round(len(rows) * task.validation_share), 2), task.validation_rows)
    if len(rows) - size < 2:
        raise UserError(
            f"{task.train or f'{task.name} train'}: {len(rows)} rows of {length} tokens are too few to split off "
            f"{size} for validation: give more text, or a smaller task.max_length"
        )
    start = int(np.random.default_rng(derive(seed, seeds.VALIDATION)).integers(0, len(rows) - size + 1))
    indices = np.arange(start, start + size)
    return rows.take(np.setdiff1d(np.arange(len(rows)), indices)), rows.take(indices)
