"""Facts read from a transformers configuration."""

from __future__ import annotations

import sys
from typing import Any

PADDED_POSITIONS = frozenset(
    {
        "camembert",
        "data2vec-text",
        "esm",
        "ibert",
        "layoutlmv3",
        "lilt",
        "longformer",
        "luke",
        "markuplm",
        "mpnet",
        "prophetnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
"""Model types that make position ids from the input ids: these begin at pad_token_id + 1."""

LIMITS = ("max_position_embeddings", "max_encoder_position_embeddings", "max_decoder_position_embeddings")


def text_config(config: Any) -> Any:
    """The configuration of the part that reads text; the configuration itself unless there are several parts."""
    return config.get_text_config()


def max_seq_length(config: Any) -> int:
    """The longest sequence that a model of this configuration takes, in tokens; sys.maxsize if none is stated."""
    text = text_config(config)
    stated = [getattr(text, name, None) or 0 for name in LIMITS]
    limit = min((int(length) for length in stated if length > 0), default=sys.maxsize)
    unused = (pad_token_id(config) or 0) + 1 if text.model_type in PADDED_POSITIONS else 0
    return limit - unused


def pad_token_id(config: Any) -> int | None:
    """The padding token that a model of this configuration knows; None if it knows none, which some write as -1."""
    padding = getattr(text_config(config), "pad_token_id", None)
    return None if padding is None or padding < 0 else int(padding)


def vocab_size(config: Any) -> int:
    """The number of token ids that a model of this configuration knows; sys.maxsize where it is not stated."""
    return int(getattr(text_config(config), "vocab_size", None) or sys.maxsize)


def class_names(config: Any) -> tuple[str, ...]:
    """The class names of a checkpoint's classifier, in the order of their numbers."""
    return tuple(str(name) for _, name in sorted((config.id2label or {}).items()))
