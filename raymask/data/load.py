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
from raymask.core.spec import METRICS_BY_KIND, QUICKSTART, Task
from raymask.data import quickstart
from raymask.data.files import Columns, read_columns, text_column
from raymask.data.glue import read_glue
from raymask.data.labels import number_classes, regression_targets
from raymask.data.splits import require_several_labels, split_validation
from raymask.data.types import Classes, Examples, RawDataset, RawTask


def load_raw_dataset(task: Task, seed: int, order: Sequence[str] = (), *, test_only: bool = False) -> RawDataset:
    """Read a task's texts, and split off `validation` where it has no file of its own.

    Args:
        task: The spec's task section.
        seed: The spec's seed.
        order: Class names as an existing classifier numbers them, empty if there is none.
        test_only: Read `test` alone, and leave the other splits without rows.

    Raises:
        UserError: A file, column or label cannot be used; the message names file and row.
    """
    raw = read_task(task, seed, test_only)
    if raw.kind == "classification":
        classes, labels = number_classes(raw, order, task.positive)
    else:
        classes = Classes()
        labels = {split: [regression_targets(table, raw.label) for table in raw.splits[split]] for split in raw.splits}
    splits = {split: join_examples(raw, split, labels[split]) for split in raw.splits}
    test = splits["test"]
    if test_only:
        train = validation = test.take(np.arange(0))
    elif "validation" in splits:
        train, validation = splits["train"], splits["validation"]
        require_several_labels(train, task.train or "", classes.labels)
    else:
        train, validation = split_validation(splits["train"], task, classes.labels, seed)
    bounds = np.cumsum([0, *map(len, labels["test"])]).tolist()
    return RawDataset(
        train,
        validation,
        test,
        {subset: (bounds[i], bounds[i + 1]) for i, subset in enumerate(raw.subsets)},
        classes.names,
        task.metrics or raw.metrics,
        task.max_length or raw.max_length,
        classes.labels,
        classes.positive,
    )


def join_examples(raw: RawTask, split: str, labels: Sequence[np.ndarray]) -> Examples:
    """Texts and labels of all tables of a split; `labels` has an array for each.

    Raises:
        UserError: A text cannot be used.
    """
    tables = raw.splits[split]
    texts = (tuple(text for table in tables for text in text_column(table, name)) for name in raw.text)
    return Examples(tuple(map(list, texts)), np.concatenate(labels), " and ".join(table.where for table in tables))


def read_task(task: Task, seed: int, test_only: bool) -> RawTask:
    """Read the quickstart's sentences, a GLUE task, or the user's own files; arguments as in `load_raw_dataset`.

    Raises:
        UserError: A file or column cannot be used.
    """
    if task.name == QUICKSTART:
        return quickstart_task(derive(seed, seeds.QUICKSTART_ROWS))
    if task.name is not None:
        return read_glue(task, task.name.removeprefix("glue/"), test_only)
    paths = {"train": task.train, "validation": task.validation, "test": task.test}
    columns = (*task.text, task.label)
    splits = {
        split: [read_columns(Path(path), columns)]
        for split, path in paths.items()
        if path is not None and (split == "test" or not test_only)
    }
    declared = (table.class_names.get(task.label, ()) for tables in splits.values() for table in tables)
    metrics = METRICS_BY_KIND[task.kind][:1] if task.kind == "classification" else METRICS_BY_KIND[task.kind]
    return RawTask(splits, task.text, task.label, next(filter(None, declared), ()), task.kind, ("",), metrics, 128)


def quickstart_task(seed: int) -> RawTask:
    """The quickstart's sentences as a task; `seed` is that of the sentences."""
    sentences = quickstart.sentences(seed)
    splits = {
        split: [Columns(f"quickstart {split}", dict(zip(("text", "label"), sentences[name], strict=True)))]
        for split, name in (("train", "train"), ("test", "report"))
    }
    return RawTask(splits, ("text",), "label", quickstart.CLASSES, "classification", ("",), ("accuracy",), 64)
