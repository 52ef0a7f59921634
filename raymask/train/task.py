"""Which rows does a spec's task have, whatever its kind?"""

from __future__ import annotations

from typing import Any

from raymask.core.spec import Spec
from raymask.train.data import Corpus, Data, load_corpus, tokenize
from raymask.train.documents import Documents, cut, load_documents
from raymask.train.model import class_names, positions, vocabulary


def read_texts(spec: Spec, config: Any) -> Corpus | Documents:
    """The task's texts; of a model that is fine-tuned already the configuration numbers the classes."""
    if spec.task.kind == "causal-lm":
        return load_documents(spec.task, spec.seed)
    return load_corpus(spec.task, spec.seed, class_names(config) if spec.dense.epochs == 0 else ())


def to_tokens(texts: Corpus | Documents, tokenizer: Any, config: Any) -> Data:
    """All three splits as token ids that fit the model of this configuration."""
    limits = positions(config, texts.kind), vocabulary(config)
    return cut(texts, tokenizer, *limits) if isinstance(texts, Documents) else tokenize(texts, tokenizer, *limits)
