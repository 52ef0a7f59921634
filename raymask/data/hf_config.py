"""Facts read from a transformers configuration."""

from __future__ import annotations

import sys
from typing import Any


def max_seq_length(config: Any, kind: str = "classification") -> int:
    """The longest sequence, in tokens, that a model of this configuration certainly takes.

    Some encoders (RoBERTa) number positions from pad_token_id + 1, so this subtracts as much for every encoder. It is
    sys.maxsize or close to it where the configuration states no limit.

    Args:
        config: A transformers configuration.
        kind: The spec's task.kind; nothing is subtracted for "causal-lm".
    """
    limit = int(getattr(config, "max_position_embeddings", None) or sys.maxsize)
    return limit if kind == "causal-lm" else limit - 1 - (getattr(config, "pad_token_id", None) or 0)


def vocab_size(config: Any) -> int:
    """The number of token ids that a model of this configuration knows; sys.maxsize where it is not stated."""
    return int(getattr(config, "vocab_size", None) or sys.maxsize)


def class_names(config: Any) -> tuple[str, ...]:
    """The class names of a checkpoint's classifier, in the order of their numbers."""
    return tuple(str(name) for _, name in sorted((config.id2label or {}).items()))
