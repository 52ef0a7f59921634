"""Tokenization of classification and regression tasks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from raymask.core.errors import UserError
from raymask.data.types import Examples, RawDataset, TaskData, TokenizedSplit

MAX_UNKNOWN_SHARE = 0.7  # of the tokens, with special tokens


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
    require_known_words(train, tokenizer)
    return TaskData(train, validation, test, corpus.subsets, corpus.metrics, corpus.kind)


def require_known_ids(splits: Sequence[TokenizedSplit], vocabulary: int) -> None:
    """Check that all token ids are below `vocabulary`, the number of ids that the model knows.

    Raises:
        UserError: One is not.
    """
    largest = max(int(rows.ids.max()) for rows in splits)
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
    """Tokenize one split; `limit` is the longest row, in tokens."""
    encoded = tokenizer(
        *with_separator(examples.columns, tokenizer),
        truncation=True,
        max_length=limit,
        padding=False,
        return_attention_mask=False,
    )
    ids = encoded["input_ids"]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
    types = encoded.get("token_type_ids")
    return TokenizedSplit(
        np.concatenate(ids).astype(np.int32),
        None if types is None else np.concatenate(types).astype(np.int8),
        offsets,
        examples.labels,
    )


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
