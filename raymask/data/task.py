"""Loading and tokenization of a spec's task, of any kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from raymask.core.spec import Spec
from raymask.data.causal_lm import Documents, group_texts, load_documents
from raymask.data.hf_config import class_names, max_seq_length, vocab_size
from raymask.data.load import load_raw_dataset
from raymask.data.padding import set_padding
from raymask.data.tokenize import tokenize
from raymask.data.types import RawDataset, TaskData


def load_dataset(spec: Spec, config: Any, *, test_only: bool = False) -> RawDataset | Documents:
    """Read the texts of a spec's task.

    Args:
        spec: The spec.
        config: The model's transformers configuration. It gives the order of the classes if the model is already
            fine-tuned (dense.epochs: 0).
        test_only: Read `test` alone, and leave the other splits without rows.

    Raises:
        UserError: A file, column or label cannot be used.
    """
    if spec.task.kind == "causal-lm":
        return load_documents(spec.task, spec.seed, test_only=test_only)
    order = class_names(config) if spec.dense.epochs == 0 else ()
    return load_raw_dataset(spec.task, spec.seed, order, test_only=test_only)


def tokenize_dataset(texts: RawDataset | Documents, tokenizer: Any, config: Any) -> TaskData:
    """Tokenize all three splits for the model of this configuration.

    For a classification or regression, configuration and tokenizer are changed in place to agree on a padding token.
    For a language model any token pads: it is masked, and stands behind the text.

    Raises:
        UserError: Texts and tokenizer, or tokenizer and model, do not match, or texts are too short.
    """
    limits = max_seq_length(config), vocab_size(config)
    if isinstance(texts, Documents):
        return group_texts(texts, tokenizer, *limits)
    data = tokenize(texts, tokenizer, *limits)
    return replace(data, padding=set_padding(config, tokenizer, (data.train, data.validation, data.test)))
