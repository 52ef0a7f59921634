"""Which rows does a task train on, choose by and report on?

A task becomes three splits of token ids: `train`, `select` (carved out of train, for every choice that the search
makes) and `report` (GLUE's validation, or the user's own file, which no choice ever sees).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from sklearn.model_selection import train_test_split

from raymask.core import seeds
from raymask.core.errors import UserError, first_line
from raymask.core.seeds import derive
from raymask.core.spec import QUICKSTART, Task
from raymask.train import quickstart
from raymask.train.metrics import measure

HUB = "nyu-mll/glue"
GLUE_COLUMNS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "stsb": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
}
GLUE_CLASSES = {
    "cola": ("unacceptable", "acceptable"),
    "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qqp": ("not_duplicate", "duplicate"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
}
GLUE_METRICS = {
    "cola": ("matthews",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
}
MOSTLY = 0.7  # of the tokens, the special ones included
SHORT = ("cola", "sst2")  # at most 64 tokens; the others 128
READERS = {
    ".csv": pyarrow.csv.read_csv,
    ".jsonl": pyarrow.json.read_json,
    ".json": pyarrow.json.read_json,
    ".parquet": pyarrow.parquet.read_table,
}


@dataclass(frozen=True)
class Texts:
    """One split before tokenization: one or two texts a row, labels int64 (class numbers) or float32, (rows,)."""

    columns: tuple[list[str], ...]
    labels: np.ndarray


@dataclass(frozen=True)
class Corpus:
    """A task's texts. `classes` are names in the order of their numbers, empty for a regression.

    `parts` cuts `report` into named (start, end) ranges: MNLI's matched and mismatched; one range, "", elsewhere.
    """

    train: Texts
    select: Texts
    report: Texts
    parts: dict[str, tuple[int, int]]
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    max_length: int

    @property
    def outputs(self) -> int:
        return len(self.classes) or 1

    @property
    def kind(self) -> str:
        return "classification" if self.classes else "regression"


@dataclass(frozen=True)
class Rows:
    """One split as token ids: row i is `ids[offsets[i]:offsets[i + 1]]`, int32; `types`, int8, as long, or None."""

    ids: np.ndarray
    types: np.ndarray | None
    offsets: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def sample(self, count: int, seed: int) -> Rows:
        """At most `count` rows, drawn from the seed, in their order."""
        if count >= len(self):
            return self
        return self.take(np.sort(np.random.default_rng(seed).choice(len(self), count, replace=False)))

    def take(self, chosen: np.ndarray) -> Rows:
        """The rows of these numbers, which rise."""
        tokens = np.repeat(np.isin(np.arange(len(self)), chosen), self.lengths)
        return Rows(
            self.ids[tokens],
            None if self.types is None else self.types[tokens],
            np.concatenate([[0], np.cumsum(self.lengths[chosen])]),
            self.labels[chosen],
        )


@dataclass(frozen=True)
class Data:
    """The three splits as token ids, and what it takes to train and to measure on them. `kind`: a spec's task.kind."""

    train: Rows
    select: Rows
    report: Rows
    parts: dict[str, tuple[int, int]]
    metrics: tuple[str, ...]
    kind: str
    padding: int

    def digest(self) -> str:
        """Changes whenever a token, a label or a split does."""
        state = blake2b(digest_size=16)
        for rows in (self.train, self.select, self.report):
            for array in (rows.ids, rows.offsets, rows.labels):
                state.update(np.ascontiguousarray(array).data)
        return state.hexdigest()

    def measure_report(self, logits: np.ndarray, rows: np.ndarray | None = None) -> dict[str, float]:
        """The task's metrics on `report`, by part; on a resample of row numbers when given."""
        rows = np.arange(len(self.report)) if rows is None else rows
        found = {}
        for part, (start, end) in self.parts.items():
            inside = rows[(rows >= start) & (rows < end)]
            for name, value in measure(self.metrics, logits[inside], self.report.labels[inside]).items():
                found[f"{part} {name}".strip()] = value
        return found


@dataclass(frozen=True)
class Found:
    """A task as its files have it: what `Corpus` says, before `select` is carved out and the spec has its say."""

    train: Texts
    report: Texts
    parts: dict[str, tuple[int, int]]
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    max_length: int


def load_corpus(task: Task, seed: int, order: Sequence[str] = ()) -> Corpus:
    """Read a task's texts and carve out `select`; `order` are class names as an existing classifier numbers them.

    Raises UserError for files, columns and labels that cannot be used, naming file and row.
    """
    found = read_task(task, seed, order)
    train, select = carve(found.train, task, found.classes, seed)
    return Corpus(
        train,
        select,
        found.report,
        found.parts,
        found.classes,
        task.metrics or found.metrics,
        task.max_length or found.max_length,
    )


def read_task(task: Task, seed: int, order: Sequence[str]) -> Found:
    """The quickstart's sentences, one of GLUE's tasks, or the user's own files."""
    if task.name == QUICKSTART:
        made = quickstart.sentences(derive(seed, seeds.QUICKSTART))
        train, report = (Texts((made[split][0],), np.array(made[split][1], np.int64)) for split in ("train", "report"))
        return Found(train, report, {"": (0, len(report.labels))}, ("negative", "positive"), ("accuracy",), 64)
    if task.name is not None:
        return read_glue(task, task.name.removeprefix("glue/"), order)
    assert task.train is not None
    assert task.report is not None
    tables = {task.train: read_file(Path(task.train))}
    wanted = (*task.text, task.label)
    types = {field.name: field.type for field in tables[task.train].schema if field.name in wanted}
    tables[task.report] = read_file(Path(task.report), types)
    for path, table in tables.items():
        require_columns(table, wanted, path)
    classes: tuple[str, ...] = ()
    if task.kind == "classification":
        found = find_classes(tables[task.train], task.label, task.train)
        require_names(order, found)
        classes = ordered(found, order)
    train, report = (
        make_texts(tables[path], task.text, task.label, classes, path) for path in (task.train, task.report)
    )
    metrics = ("accuracy",) if classes else ("pearson", "spearman")
    return Found(train, report, {"": (0, len(report.labels))}, classes, metrics, 128)


def read_glue(task: Task, name: str, order: Sequence[str]) -> Found:
    """One of the eight, from the hub or from `<folder>/<name>/<split>.parquet`."""
    parts = ("matched", "mismatched") if name == "mnli" else ("",)
    splits = ("train", *("validation" + (f"_{part}" if part else "") for part in parts))
    if task.folder is not None:
        tables = {split: read_file(Path(task.folder) / name / f"{split}.parquet") for split in splits}
    else:
        tables = fetch_glue(name, splits)
    numbered = GLUE_CLASSES.get(name, ())
    texts = {
        split: make_texts(table, GLUE_COLUMNS[name], "label", numbered, f"glue/{name} {split}", numbers=True)
        for split, table in tables.items()
    }
    classes = ordered(numbered, order)
    if classes != numbered:
        renumber = np.array([classes.index(label) for label in numbered])
        texts = {split: Texts(found.columns, renumber[found.labels]) for split, found in texts.items()}
    reports = [texts[split] for split in splits[1:]]
    report = Texts(
        tuple([text for found in reports for text in found.columns[i]] for i in range(len(GLUE_COLUMNS[name]))),
        np.concatenate([found.labels for found in reports]),
    )
    ends = np.cumsum([0, *(len(found.labels) for found in reports)]).tolist()
    ranges = {part: (ends[i], ends[i + 1]) for i, part in enumerate(parts)}
    metrics = GLUE_METRICS.get(name, ("accuracy",))
    return Found(texts["train"], report, ranges, classes, metrics, 64 if name in SHORT else 128)


def fetch_glue(name: str, splits: Sequence[str]) -> dict[str, pa.Table]:
    """The task's splits from the hub, through `datasets`."""
    import datasets

    try:
        found = datasets.load_dataset(HUB, name)
        return {split: found[split].data.table for split in splits}
    except Exception as error:  # noqa: BLE001 - hub, network and cache each raise their own kinds
        raise UserError(
            f"task.name: glue/{name} cannot be loaded from the hub ({first_line(error)}). Without a network, set "
            f"task.folder to a folder that holds {name}/<split>.parquet"
        ) from None


def read_file(path: Path, types: dict[str, pa.DataType] | None = None) -> pa.Table:
    """A CSV, JSON lines or Parquet file; `types` of a CSV's columns, which are guessed where they are not given.

    Raises UserError when the file cannot be read or is empty.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: the ending must be one of {', '.join(READERS)}")
    if types and reader is pyarrow.csv.read_csv:
        reader = partial(reader, convert_options=pyarrow.csv.ConvertOptions(column_types=types))
    try:
        table = reader(path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file{seen_from(path)}") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as {path.suffix[1:]}: {first_line(error)}") from None
    if table.num_rows == 0:
        raise UserError(f"{path}: has no rows")
    return table


def seen_from(path: Path) -> str:
    """Where a relative path begins, to be told with it."""
    return "" if path.is_absolute() else f", seen from {Path.cwd()}"


def require_columns(table: pa.Table, names: Sequence[str], where: str) -> None:
    """Raise UserError that lists all columns that are missing."""
    missing = [repr(name) for name in names if name not in table.column_names]
    if missing:
        raise UserError(
            f"{where}: has no column {' and none '.join(missing)}; its columns are {', '.join(table.column_names)}"
        )


def column(table: pa.Table, name: str, where: str) -> pa.ChunkedArray:
    """One column without nulls. Raises UserError when it is missing, there twice, or has a null."""
    require_columns(table, (name,), where)
    if table.column_names.count(name) > 1:
        raise UserError(f"{where}: has more than one column {name!r}")
    found = table[name]
    if found.null_count:
        row = int(pc.index(pc.is_null(found), True).as_py())
        raise UserError(f"{where}: row {row + 1}: {name} is empty")
    return found


def text_column(table: pa.Table, name: str, where: str) -> list[str]:
    """One column of texts. Raises UserError when it holds something else."""
    found = column(table, name, where)
    if not (pa.types.is_string(found.type) or pa.types.is_large_string(found.type)):
        raise UserError(f"{where}: {name} holds {found.type}, not text; task.text names the columns to read")
    return found.to_pylist()  # type: ignore[no-any-return]


def find_classes(table: pa.Table, label: str, where: str) -> tuple[str, ...]:
    """The label column's distinct values as names, numbers in numeric order."""
    found = column(table, label, where)
    if not (
        pa.types.is_string(found.type)
        or pa.types.is_large_string(found.type)
        or pa.types.is_integer(found.type)
        or pa.types.is_boolean(found.type)
    ):
        raise UserError(
            f"{where}: {label} holds {found.type}: classes are whole numbers or texts. For numbers to be predicted "
            "set task.kind: regression"
        )
    classes = tuple(str(value) for value in sorted(found.unique().to_pylist()))
    if "" in classes:
        raise UserError(f"{where}: row {found.to_pylist().index('') + 1}: {label} is empty")
    return classes


def nameless(order: Sequence[str]) -> bool:
    """Whether these are no names of classes, but what transformers writes where there are none."""
    return all(re.fullmatch(r"LABEL_\d+", name) for name in order)


def require_names(order: Sequence[str], classes: Sequence[str]) -> None:
    """Raise UserError when an existing classifier has no names for classes that are words."""
    words = [name for name in classes if not name.removeprefix("-").isdigit()]
    if order and nameless(order) and words:
        raise UserError(
            "the model is taken as fine-tuned (eval, and dense.epochs: 0), but its config.json does not say which of "
            f"its outputs is which class: write the names there as id2label, in their order ({', '.join(classes)}?)"
        )


def ordered(classes: tuple[str, ...], order: Sequence[str]) -> tuple[str, ...]:
    """The classes as an existing classifier numbers them, whatever the case; as they are when it has no names for them.

    Raises UserError when it has other names: which of its outputs is which class could only be guessed.
    """
    if nameless(order):
        return classes
    mine = {name.casefold(): name for name in classes}
    theirs = [name.casefold() for name in order]
    if sorted(theirs) != sorted(mine):
        raise UserError(
            f"the model is taken as fine-tuned (eval, and dense.epochs: 0), but its classes are {', '.join(order)} and "
            f"the task's are {', '.join(classes)}: rename one of them, or fine-tune it here (dense.epochs: 3)"
        )
    return tuple(mine[name] for name in theirs)


def make_texts(
    table: pa.Table, columns: Sequence[str], label: str, classes: tuple[str, ...], where: str, numbers: bool = False
) -> Texts:
    """Texts and labels of one split. Labels are class names, or their `numbers`; without classes, real numbers."""
    texts = [text_column(table, name, where) for name in columns]
    found = column(table, label, where)
    values = found.to_pylist()
    if not classes:
        return Texts(tuple(texts), real_numbers(values, label, where))
    names = [str(i) for i in range(len(classes))] if numbers else classes
    known = {name: i for i, name in enumerate(names)}
    keys = [str(value) for value in values]
    strange = next((row for row, key in enumerate(keys) if key not in known), None)
    if strange is not None:
        raise UserError(
            f"{where}: row {strange + 1}: {label} is {values[strange]!r}, but the classes are {', '.join(names)}"
        )
    return Texts(tuple(texts), np.array([known[key] for key in keys], np.int64))


def real_numbers(values: list[Any], label: str, where: str) -> np.ndarray:
    """Regression targets, float32 (rows,), all finite."""
    largest = float(np.finfo(np.float32).max)
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= largest:
            raise UserError(f"{where}: row {row + 1}: {label} is {value!r}; a regression needs numbers")
    return np.array(values, np.float32)


def carve(train: Texts, task: Task, classes: tuple[str, ...], seed: int) -> tuple[Texts, Texts]:
    """Split train into what is trained on and `select`, with the classes' shares kept, from the seed alone."""
    where = task.train or f"{task.name} train"
    labels = train.labels
    size = min(max(round(len(labels) * task.select_share), 2), task.select_rows)
    _, counts = np.unique(labels, return_counts=True)
    if len(counts) < 2:
        raise UserError(f"{where}: every row has the same label: there is nothing to learn")
    if classes:
        if counts.min() < 2:
            raise UserError(f"{where}: a class has one row only; two are needed, one to train on and one to select by")
        size = max(size, len(counts))
    if len(labels) - size < 2:
        raise UserError(f"{where}: {len(labels)} rows are too few to carve {size} out of them")
    kept, chosen = train_test_split(
        np.arange(len(labels)),
        test_size=size,
        random_state=derive(seed, seeds.VALIDATION) % 2**32,
        # by name, since an existing classifier may number the classes otherwise
        stratify=np.array(classes)[labels] if classes else fifths(labels, size),
    )

    def take(rows: np.ndarray) -> Texts:
        rows = np.sort(rows)
        return Texts(tuple([texts[row] for row in rows] for texts in train.columns), labels[rows])

    return take(kept), take(chosen)


def fifths(labels: np.ndarray, size: int) -> np.ndarray:
    """Strata of a regression: fifths of the rows by label, fewer where there are few rows."""
    strata = max(1, min(5, size, len(labels) // 2))
    rank = np.argsort(np.argsort(labels, kind="stable"), kind="stable")
    return rank * strata // len(labels)


def tokenize(corpus: Corpus, tokenizer: Any, positions: int = sys.maxsize, vocabulary: int = sys.maxsize) -> Data:
    """Token ids of all three splits, cut at the task's length, the tokenizer's or the model's `positions`.

    Raises UserError when the tokenizer gives ids that the model's `vocabulary` does not have.
    """
    limit = min(corpus.max_length, tokenizer.model_max_length, positions)
    train, select, report = (to_rows(texts, tokenizer, limit) for texts in (corpus.train, corpus.select, corpus.report))
    require_known((train, select, report), vocabulary)
    require_words(train, tokenizer)
    return Data(train, select, report, corpus.parts, corpus.metrics, corpus.kind, tokenizer.pad_token_id or 0)


def require_known(splits: Sequence[Rows], vocabulary: int) -> None:
    """Raise UserError when a token id is one that the model does not have."""
    largest = max(int(rows.ids.max()) for rows in splits)
    if largest >= vocabulary:
        raise UserError(
            f"model.name: the tokenizer gives token id {largest}, the model knows ids below {vocabulary}: they do not "
            "belong together"
        )


def require_words(rows: Rows, tokenizer: Any) -> None:
    """Raise UserError when a tokenizer knows next to nothing of the texts, as one that was made from nothing does."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    share = float((rows.ids == unknown).mean()) if unknown is not None else 0.0
    if share > MOSTLY:
        raise UserError(
            f"model.name: {share:.0%} of the texts' tokens are unknown to its tokenizer, which has {len(tokenizer):,}: "
            "is it in another language, or was it not saved beside the model (tokenizer.save_pretrained)?"
        )


def to_rows(texts: Texts, tokenizer: Any, limit: int) -> Rows:
    """One split as token ids."""
    encoded = tokenizer(*texts.columns, truncation=True, max_length=limit, padding=False, return_attention_mask=False)
    ids = encoded["input_ids"]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
    types = encoded.get("token_type_ids")
    return Rows(
        np.concatenate(ids).astype(np.int32),
        None if types is None else np.concatenate(types).astype(np.int8),
        offsets,
        texts.labels,
    )
