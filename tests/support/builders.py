"""Builders of tiny models, task files and worker contexts."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch

from raymask.api import apply_mask, draw_mask
from raymask.core.errors import UserError
from raymask.core.masking.masks import digest, pack_bits
from raymask.core.protocols import Executor
from raymask.core.records import Candidate, EvalPoint, Evaluation, FinetuneResult, LevelRecord, Result
from raymask.core.spec import QUICKSTART, Spec, Task
from raymask.core.successive_halving import SuccessiveHalving
from raymask.core.tasks import Snapshot
from raymask.core.tensors import PackedTensors, pack
from raymask.data import quickstart
from raymask.data.causal_lm import Documents, group_texts
from raymask.data.hf_config import max_seq_length, vocab_size
from raymask.data.tokenize import tokenize
from raymask.data.types import Examples, RawDataset
from raymask.export.selected import SelectedModel
from raymask.train.context import WorkerContext
from raymask.train.model import build_model, inspect_model, state_tensors

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": SIZE,
    "roberta": SIZE,
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "electra": SIZE | {"embedding_size": 8},
    "albert": SIZE | {"embedding_size": 8},
    "deberta-v2": SIZE | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8},
}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": SIZE | {"num_key_value_heads": 1, "tie_word_embeddings": False},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
}
WITHOUT_TYPES = ("roberta", "distilbert")


def tiny_tokenizer(family: str = "bert") -> Any:
    """The quickstart's words, with token types where the family has them."""
    tokenizer = quickstart.tokenizer()
    if family in DECODERS:
        tokenizer.eos_token = quickstart.SEP
    types = [] if family in WITHOUT_TYPES or family in DECODERS else ["token_type_ids"]
    tokenizer.model_input_names = ["input_ids", *types, "attention_mask"]
    return tokenizer


def tiny_config(family: str = "bert", **changes: Any) -> Any:
    """Two layers, 16 wide; weights drawn wide enough that the outputs differ from row to row."""
    from transformers import AutoConfig

    shared = {
        "vocab_size": len(tiny_tokenizer()),
        "max_position_embeddings": 72,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    if family in DECODERS:
        shared |= {"bos_token_id": None, "eos_token_id": 3}
    return AutoConfig.for_model(family, **shared | (FAMILIES | DECODERS).get(family, SIZE) | changes)


def tiny_model(folder: Path, family: str = "bert", *, head: bool = True, seed: int = 0, **changes: Any) -> Path:
    """Save a random classifier or decoder, or its blocks alone, with a tokenizer; returns the folder."""
    config = tiny_config(family, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module: Any = build_model(config, kind=kind_of(family))
    (module if head else module.base_model).save_pretrained(folder)
    tiny_tokenizer(family).save_pretrained(folder)
    return folder


def kind_of(family: str) -> str:
    """What tests train a family for."""
    return "causal-lm" if family in DECODERS else "classification"


def reviews(count: int, seed: int = 0) -> tuple[list[str], list[int]]:
    """`count` short texts, one label after the other: 1 when their last word is a kind one, 0 when not."""
    rng = random.Random(seed)
    labels = [row % 2 for row in range(count)]
    parts = (quickstart.FILM, quickstart.FILM_VERBS)
    return [" ".join([*map(rng.choice, parts), rng.choice(quickstart.ADJECTIVES[label])]) for label in labels], labels


def tiny_corpus(regression: bool = False, rows: Sequence[int] = (48, 16, 12)) -> RawDataset:
    """Reviews; a regression's targets count the words as well."""

    def split(count: int, seed: int) -> Examples:
        texts, labels = reviews(count, seed)
        targets = [label + len(text.split()) / 4 for label, text in zip(labels, texts, strict=True)]
        return Examples((texts,), np.array(targets, np.float32) if regression else np.array(labels, np.int64))

    train, validation, test = (split(count, seed) for seed, count in enumerate(rows))
    classes, metrics = ((), ("pearson", "spearman")) if regression else (("bad", "good"), ("accuracy",))
    return RawDataset(train, validation, test, {"": (0, rows[2])}, classes, metrics, 64)


def tiny_documents(count: int = 120, **keys: Any) -> Documents:
    """Reviews, joined and cut into rows of 16 tokens."""
    task = Task(kind="causal-lm", train="train.txt", test="report.txt", **{"max_length": 16} | keys)
    return Documents(task, 0, reviews(count)[0], reviews(count // 4, 1)[0])


def tiny_context(
    family: str = "bert", *, regression: bool = False, rows: Sequence[int] = (48, 16, 12), **settings: Any
) -> WorkerContext:
    """A worker's job of a few steps; `settings` are sections of the spec, merged into its own."""
    sections: dict[str, Any] = {
        "model": {"name": QUICKSTART},
        "task": QUICKSTART,
        "levels": [0.5, 0.75],
        "candidates": {"count": 3, "sampling_ratios": [0.01]},
        "early_eval": {"batch_size": 16, "eval_steps": 1, "learning_rate": 0.01},
        "finetune": {"batch_size": 16, "epochs": 2, "learning_rate": 0.01},
        "distill": False,
        "precision": "fp32",
    }
    for name, section in settings.items():
        sections[name] = sections.get(name, {}) | section if isinstance(section, dict) else section
    corpus = tiny_documents() if family in DECODERS else tiny_corpus(regression, rows)
    tokenizer = tiny_tokenizer(family)
    spec = Spec.model_validate(sections)
    model = spec.model.model_copy(update={"name": family})
    settings = {"kind": corpus.kind, "gradient_checkpointing": spec.gradient_checkpointing}
    source = inspect_model(model, tiny_config(family), corpus.classes, **settings)
    limits = max_seq_length(source.config), vocab_size(source.config)
    data = group_texts(corpus, tokenizer, *limits) if isinstance(corpus, Documents) else tokenize(corpus, tokenizer)
    return WorkerContext(spec, source, data)


def random_weights(config: Any, seed: int, kind: str = "classification") -> PackedTensors:
    """Weights of a new model of this configuration."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return pack(state_tensors(build_model(config, kind=kind)))


def tiny_snapshot(job: WorkerContext, seed: int = 0) -> Snapshot:
    """Random weights to start from, and others to learn from when the job distils."""
    teacher = random_weights(job.config, 100, job.data.kind) if job.spec.uses_teacher else None
    return Snapshot(f"random {seed}", random_weights(job.config, seed, job.data.kind), teacher=teacher)


def run_halving(
    executor: Executor, parent: Snapshot, pool: Sequence[Candidate], rungs: Sequence[float] = (1.0,)
) -> Iterator[Evaluation]:
    """Early evaluation of a pool whose candidates have one parent."""
    halving = SuccessiveHalving(pool, rungs)
    while eval_tasks := halving.ask():
        evaluation = executor.evaluate({1: parent}, eval_tasks)
        halving.tell(evaluation)
        yield evaluation
    executor.cancel()


def write_table(path: Path, columns: dict[str, Any]) -> Path:
    """A CSV, JSON lines or Parquet file, by its ending; folders on the way are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()), encoding="utf-8")
    return path


def refused(call: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """The message of the UserError that a call ends with."""
    with pytest.raises(UserError) as raised:
        call(*arguments, **options)
    return str(raised.value)


def tiny_selected(family: str = "bert", density: float = 0.0625, **changes: Any) -> SelectedModel:
    """What a search of a random model would have selected, without a search: its magnitude mask."""
    job = tiny_context(family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = build_model(tiny_config(family, **changes), kind=kind_of(family)).eval()
    mask = draw_mask(module, density)
    apply_mask(module, mask)
    kept, total = (
        sum(int(count) for count in counts)
        for counts in zip(*((m.sum(), m.numel()) for m in mask.values()), strict=True)
    )
    winner = Evaluation(candidate=Candidate(level=1, index=0, seed=0, density=density))
    tuned = FinetuneResult(
        curve=(EvalPoint(step=1, loss=1.0, metric=0.0),), best=0, started=0.0, seconds=0.0, worker=""
    )
    level = LevelRecord(
        level=1,
        density=density,
        num_kept=kept,
        num_prunable=total,
        winner=winner,
        num_evaluated=1,
        num_failed=0,
        gain=None,
        finetune_result=tuned,
        test_metrics={},
        digest=digest(pack_bits(mask)),
        parent_key="dense-0-0123456789abcdef",
        data_fingerprint="",
    )
    result = Result(
        run="",
        model=family,
        task="",
        kind=kind_of(family),
        metrics=(),
        models=(),
        sizes={},
        gain=None,
        levels=(level,),
        baseline_levels=(),
        rows_scored=(0, 0),
        seconds={},
        timeline=(),
        export="",
    )
    return SelectedModel(
        result, job.spec, module, tiny_tokenizer(family), mask, {"config.json": module.config.to_json_string().encode()}
    )
