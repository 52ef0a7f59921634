"""Tokenization of classification and regression tasks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from raymask.core.errors import UserError
from raymask.data.types import Examples, RawDataset, TaskData, TokenizedSplit

MAX_UNKNOWN_SHARE = 0.7  # of the tokens, with special tokens
TOKENIZER_BATCH = 1000  # texts tokenized in one call


def tokenize(
    corpus: RawDataset, tokenizer: Any, positions: int = sys.maxsize, vocabulary: int = sys.maxsize
) -> TaskData:
    """Tokenize all three splits. Rows are truncated at the task's, the tokenizer's or the model's limit.

    Args:
        corpus: The texts.
        tokenizer: A transformers tokenizer.
        positions: The longest sequence that the model takes, in tokens.
        vocabulary: The number of token ids that the model knows.

    Raises:
        UserError: The tokenizer gives an id that the model does not know, or does not know most of the words.
    """
    limit = min(corpus.max_length, tokenizer.model_max_length, positions)
    train, validation, test = (
        encode(examples, tokenizer, limit) for examples in (corpus.train, corpus.validation, corpus.test)
    )
    require_known_ids((train, validation, test), vocabulary)
    require_known_words(train if len(train) else test, tokenizer)
    return TaskData(train, validation, test, corpus.subsets, corpus.metrics, corpus.kind, positive=corpus.positive)


def require_known_ids(splits: Sequence[TokenizedSplit], vocabulary: int) -> None:
    """Check that all token ids are below `vocabulary`, the number of ids that the model knows.

    Raises:
        UserError: One is not.
    """
    largest = max(int(rows.ids.max(initial=0)) for rows in splits)
    if largest >= vocabulary:
        raise UserError(
            f"model.name: the tokenizer gives token id {largest}, the model knows ids below {vocabulary}: they do not "
            "belong together"
        )


def require_known_words(rows: TokenizedSplit, tokenizer: Any) -> None:
    """Check that the tokenizer knows the texts' words. One that transformers creates without its files does not.

    Raises:
        UserError: More than MAX_UNKNOWN_SHARE of the tokens are unknown.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    share = float((rows.ids == unknown).mean()) if unknown is not None else 0.0
    if share > MAX_UNKNOWN_SHARE:
        raise UserError(
            f"model.name: {share:.0%} of the texts' tokens are unknown to its tokenizer, which has {len(tokenizer):,}: "
            "is it for another language, or was it not saved with the model (tokenizer.save_pretrained)?"
        )


def encode(examples: Examples, tokenizer: Any, limit: int) -> TokenizedSplit:
    """Tokenize one split; `limit` is the longest row, in tokens.

    Raises:
        UserError: A row has no tokens.
    """
    columns = with_separator(examples.columns, tokenizer)
    lengths, ids, types = [np.array([], np.int64)], [np.array([], np.int32)], []
    for start in range(0, len(examples.labels), TOKENIZER_BATCH):
        encoded = tokenizer(
            *(texts[start : start + TOKENIZER_BATCH] for texts in columns),
            truncation=True,
            max_length=limit,
            padding=False,
            return_attention_mask=False,
        )
        lengths.append(np.array([len(row) for row in encoded["input_ids"]]))
        ids.append(np.fromiter(chain.from_iterable(encoded["input_ids"]), np.int32))
        if "token_type_ids" in encoded:
            types.append(np.fromiter(chain.from_iterable(encoded["token_type_ids"]), np.int8))
    ends = np.cumsum(np.concatenate(lengths))
    empty = np.flatnonzero(np.concatenate(lengths) == 0)
    if len(empty):
        raise UserError(f"{examples.place(empty[0])}: has no tokens: its text is empty. Take the row out")
    offsets = np.concatenate([[0], ends]).astype(np.int64)
    return TokenizedSplit(np.concatenate(ids), np.concatenate(types) if types else None, offsets, examples.labels)


def with_separator(columns: tuple[list[str], ...], tokenizer: Any) -> tuple[list[str], ...]:
    """Columns of texts to tokenize together.

    Many decoders' tokenizers join two texts without a token between them. For these a separator is put before the
    second text, where truncation leaves it.
    """
    tokens_of_pair, tokens_of_one = (tokenizer.num_special_tokens_to_add(pair=pair) for pair in (True, False))
    if len(columns) < 2 or tokens_of_pair > tokens_of_one:
        return columns
    separator = tokenizer.sep_token or tokenizer.eos_token or "\n"
    return columns[0], [f"{separator}{text}" for text in columns[1]]
