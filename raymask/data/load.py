"""Loading of classification and regression tasks.

A task has three splits. `train` is trained on. The search makes every choice by `validation`, which is the user's own
file or split off from `train`. `test` is GLUE's public validation set or the user's own file, and no choice depends on
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from raymask.core import seeds
from raymask.core.seeds import derive
from raymask.core.spec import QUICKSTART, Task
from raymask.data import quickstart
from raymask.data.files import read_file, require_columns
from raymask.data.glue import read_glue
from raymask.data.labels import align_labels, find_classes, make_examples, require_names
from raymask.data.splits import require_several_labels, split_validation
from raymask.data.types import Examples, RawDataset, RawTask


def load_raw_dataset(task: Task, seed: int, order: Sequence[str] = ()) -> RawDataset:
    """Read a task's texts, and split off `validation` where it has no file of its own.

    Args:
        task: The spec's task section.
        seed: The spec's seed.
        order: Class names as an existing classifier numbers them, empty if there is none.

    Raises:
        UserError: A file, column or label cannot be used; the message names file and row.
    """
    raw = read_task(task, seed, order)
    if raw.validation is None:
        train, validation = split_validation(raw.train, task, raw.classes, seed)
    else:
        train, validation = raw.train, raw.validation
        require_several_labels(train, task.train or "")
    return RawDataset(
        train,
        validation,
        raw.test,
        raw.subsets,
        raw.classes,
        task.metrics or raw.metrics,
        task.max_length or raw.max_length,
    )


def read_task(task: Task, seed: int, order: Sequence[str]) -> RawTask:
    """Read the quickstart's sentences, a GLUE task, or the user's own files; arguments as in `load_corpus`.

    Raises:
        UserError: A file, column or label cannot be used.
    """
    if task.name == QUICKSTART:
        sentences = quickstart.sentences(derive(seed, seeds.QUICKSTART))
        train, test = (
            Examples((sentences[split][0],), np.array(sentences[split][1], np.int64)) for split in ("train", "report")
        )
        return RawTask(train, test, {"": (0, len(test.labels))}, ("negative", "positive"), ("accuracy",), 64)
    if task.name is not None:
        return read_glue(task, task.name.removeprefix("glue/"), order)
    assert task.train is not None
    assert task.test is not None
    tables = {task.train: read_file(Path(task.train))}
    columns = (*task.text, task.label)
    # The columns of the other files get the types of train: alone, a CSV file may be read as other types.
    types = {field.name: field.type for field in tables[task.train].schema if field.name in columns}
    others = [path for path in (task.validation, task.test) if path is not None]
    tables |= {path: read_file(Path(path), types) for path in others}
    for path, table in tables.items():
        require_columns(table, columns, path)
    classes: tuple[str, ...] = ()
    if task.kind == "classification":
        class_names = find_classes(tables[task.train], task.label, task.train)
        require_names(order, class_names)
        classes = align_labels(class_names, order)
    examples = {path: make_examples(table, task.text, task.label, classes, path) for path, table in tables.items()}
    test, validation = examples[task.test], examples[task.validation] if task.validation else None
    metrics = ("accuracy",) if classes else ("pearson", "spearman")
    return RawTask(examples[task.train], test, {"": (0, len(test.labels))}, classes, metrics, 128, validation)
