"""The token that pads batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from raymask.core.errors import UserError
from raymask.data.hf_config import pad_token_id, text_config, vocab_size
from raymask.data.types import TokenizedSplit


def set_padding(config: Any, tokenizer: Any, splits: Sequence[TokenizedSplit]) -> int:
    """Make configuration and tokenizer agree on a padding token, in place.

    Many classifiers read the class at the last token that is not padding, and some count positions from it. They know
    padding by the id in their configuration, so no other id may pad a row, and no row may end with it by itself.

    Args:
        config: The model's transformers configuration.
        tokenizer: The transformers tokenizer.
        splits: The task's rows. Where neither names a padding token, one is chosen that ends none of them.

    Returns:
        The id of the padding token.

    Raises:
        UserError: They name different tokens, the model does not know the id, or none can be chosen.
    """
    in_config, in_tokenizer = pad_token_id(config), tokenizer.pad_token_id
    if in_config is not None and in_tokenizer not in (None, in_config):
        raise UserError(
            f"model.name: config.json pads with token {in_config}, the tokenizer with {in_tokenizer} "
            f"({tokenizer.pad_token}), so that the model would take padding for text: write the same pad_token_id in "
            "config.json and pad_token in tokenizer_config.json"
        )
    padding = next((token for token in (in_config, in_tokenizer) if token is not None), None)
    if padding is None:
        padding = unused_special_token(tokenizer, splits, vocab_size(config))
    if padding >= vocab_size(config):
        raise UserError(
            f"model.name: the padding token has id {padding}, the model knows ids below {vocab_size(config)}: resize "
            "its embeddings (resize_token_embeddings), or take a token that it knows as pad_token"
        )
    text_config(config).pad_token_id = padding
    if in_tokenizer is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
    return padding


def unused_special_token(tokenizer: Any, splits: Sequence[TokenizedSplit], vocabulary: int) -> int:
    """The id of a special token that ends no row, so that padding with it changes none.

    Args:
        tokenizer: The transformers tokenizer.
        splits: The task's rows.
        vocabulary: The number of token ids that the model knows.

    Raises:
        UserError: There is none.
    """
    last_tokens = {int(token) for rows in splits for token in np.unique(rows.ids[rows.offsets[1:] - 1])}
    for token in (tokenizer.eos_token_id, tokenizer.unk_token_id):
        if token is not None and token < vocabulary and token not in last_tokens:
            return int(token)
    raise UserError(
        "model.name: neither config.json nor the tokenizer names a padding token, and the end-of-text token ends rows: "
        "set tokenizer.pad_token and config.pad_token_id to a token that ends no text, and save both again"
    )
