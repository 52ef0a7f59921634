"""Longest rows and padding tokens of model families."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from support.builders import refused, tiny_config, tiny_tokenizer
from transformers import AutoConfig

from raymask.data.hf_config import PADDED_POSITIONS, max_seq_length, pad_token_id
from raymask.data.padding import set_padding
from raymask.data.types import TokenizedSplit
from raymask.train.model import build_model

PAD, UNK, MASK, EOS = 0, 1, 4, 3  # of the tiny tokenizer


# Positions.


@pytest.mark.parametrize("family", sorted(PADDED_POSITIONS))
def test_families_that_number_positions_from_their_padding_have_fewer(family: str) -> None:
    assert max_seq_length(AutoConfig.for_model(family, max_position_embeddings=514, pad_token_id=1)) == 512


@pytest.mark.parametrize(
    ("family", "changes", "longest"),
    [
        ("bert", {"max_position_embeddings": 512}, 512),
        ("distilbert", {"max_position_embeddings": 512, "pad_token_id": 7}, 512),
        ("modernbert", {}, 8192),  # its padding token is 50283
        ("gpt2", {"n_positions": 1024, "pad_token_id": 50256}, 1024),
        ("qwen2", {"pad_token_id": 151643}, 32768),
        ("bart", {"pad_token_id": 1}, 1024),
        ("led", {}, 1024),  # the decoder's limit
        ("xlnet", {}, sys.maxsize),  # it states -1
        ("t5", {}, sys.maxsize),
        ("bloom", {}, sys.maxsize),
        ("gemma3", {"text_config": {"max_position_embeddings": 777}}, 777),
    ],
)
def test_other_families_take_as_many_tokens_as_they_state(family: str, changes: dict[str, Any], longest: int) -> None:
    assert max_seq_length(AutoConfig.for_model(family, **changes)) == longest


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bert", {"pad_token_id": 5}),
        ("electra", {}),
        ("albert", {}),
        ("distilbert", {}),
        ("gpt2", {"pad_token_id": 3}),
        ("roberta", {"pad_token_id": 1}),
        ("mpnet", {"pad_token_id": 1}),
        ("camembert", {"pad_token_id": 5}),
    ],
)
def test_the_longest_row_runs_and_one_token_more_does_not(family: str, changes: dict[str, Any]) -> None:
    config = tiny_config(family, **changes)
    module, longest = build_model(config).eval(), max_seq_length(config)
    module(input_ids=torch.full((1, longest), 7))
    with pytest.raises((IndexError, RuntimeError)):
        module(input_ids=torch.full((1, longest + 1), 7))


# Padding.


def rows_that_end_with(*tokens: int) -> TokenizedSplit:
    """Rows of two tokens."""
    ids = np.array([[7, token] for token in tokens], np.int32)
    return TokenizedSplit(ids.reshape(-1), None, np.arange(len(ids) + 1) * 2, np.zeros(len(ids), np.int64))


def padded(in_config: int | None, in_tokenizer: int | None, *last_tokens: int, vocabulary: int = 50) -> tuple[int, ...]:
    """The padding of a search, and what configuration and tokenizer say of it afterwards."""
    config, tokenizer = tiny_config("gpt2", vocab_size=vocabulary, pad_token_id=in_config), tiny_tokenizer("gpt2")
    tokenizer.pad_token = None if in_tokenizer is None else tokenizer.convert_ids_to_tokens(in_tokenizer)
    chosen = set_padding(config, tokenizer, [rows_that_end_with(8, *last_tokens), rows_that_end_with(9)])
    return chosen, config.pad_token_id, tokenizer.pad_token_id


@pytest.mark.parametrize(
    ("in_config", "in_tokenizer", "last_tokens", "chosen"),
    [
        (MASK, MASK, (), MASK),
        (MASK, None, (), MASK),
        (None, MASK, (), MASK),
        (-1, MASK, (), MASK),
        (EOS, EOS, (EOS,), EOS),  # as the user has trained it
        (None, None, (), EOS),
        (None, None, (EOS,), UNK),
        (-1, None, (), EOS),
    ],
)
def test_configuration_and_tokenizer_agree_on_a_padding_token(
    in_config: int | None, in_tokenizer: int | None, last_tokens: tuple[int, ...], chosen: int
) -> None:
    assert padded(in_config, in_tokenizer, *last_tokens) == (chosen,) * 3


def test_a_padding_token_of_minus_one_is_none() -> None:
    assert pad_token_id(tiny_config("llama", pad_token_id=-1)) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PAD, MASK), r"config.json pads with token 0, the tokenizer with 4 (\[MASK\]), so that the model would take"),
        ((None, MASK, 8), "the padding token has id 4, the model knows ids below 4: resize its embeddings"),
        ((None, None, EOS, UNK), "neither config.json nor the tokenizer names a padding token"),
    ],
)
def test_padding_that_cannot_be_told_from_text_is_refused(arguments: tuple[int, ...], message: str) -> None:
    vocabulary = 4 if "below 4" in message else 50
    said = refused(padded, *arguments, vocabulary=vocabulary)
    assert said.startswith("model.name: " + message.replace("\\", ""))
