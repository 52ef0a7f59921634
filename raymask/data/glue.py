"""GLUE tasks, from the hub or from a folder of Parquet files.

The public validation set of a GLUE task is raymask's `test`: the labels of GLUE's own test set are not public.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from raymask.core.errors import UserError, first_line
from raymask.core.spec import Task
from raymask.data.files import read_file
from raymask.data.labels import align_labels, make_examples
from raymask.data.types import Examples, RawTask

HUB_DATASET = "nyu-mll/glue"
SHORT_TASKS = ("cola", "sst2")  # at most 64 tokens a row; the others 128


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


def read_glue(task: Task, name: str, order: Sequence[str]) -> RawTask:
    """Read one of the eight tasks, from the hub or from `<folder>/<name>/<split>.parquet`.

    Args:
        task: The spec's task section; `task.folder` is None for the hub.
        name: The task's name without `glue/`.
        order: Class names as an existing classifier numbers them, empty if there is none. The labels are renumbered to
            match.

    Raises:
        UserError: The files or the dataset cannot be read, or `order` has other names than the task.
    """
    subset_names = ("matched", "mismatched") if name == "mnli" else ("",)
    splits = ("train", *("validation" + (f"_{subset}" if subset else "") for subset in subset_names))
    if task.folder is not None:
        tables = {split: read_file(Path(task.folder) / name / f"{split}.parquet") for split in splits}
    else:
        tables = fetch_glue(name, splits)
    glue_classes = GLUE_CLASSES.get(name, ())
    examples = {
        split: make_examples(table, GLUE_COLUMNS[name], "label", glue_classes, f"glue/{name} {split}", numbers=True)
        for split, table in tables.items()
    }
    classes = align_labels(glue_classes, order)
    if classes != glue_classes:
        new_numbers = np.array([classes.index(label) for label in glue_classes])
        examples = {split: Examples(rows.columns, new_numbers[rows.labels]) for split, rows in examples.items()}
    test_splits = [examples[split] for split in splits[1:]]
    test = Examples(
        tuple([text for rows in test_splits for text in rows.columns[i]] for i in range(len(GLUE_COLUMNS[name]))),
        np.concatenate([rows.labels for rows in test_splits]),
    )
    bounds = np.cumsum([0, *(len(rows.labels) for rows in test_splits)]).tolist()
    subsets = {subset: (bounds[i], bounds[i + 1]) for i, subset in enumerate(subset_names)}
    metrics = GLUE_METRICS.get(name, ("accuracy",))
    return RawTask(examples["train"], test, subsets, classes, metrics, 64 if name in SHORT_TASKS else 128)


def fetch_glue(name: str, splits: Sequence[str]) -> dict[str, pa.Table]:
    """Load a task's splits from the hub, with `datasets`.

    Raises:
        UserError: They cannot be loaded.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(HUB_DATASET, name)
        return {split: dataset[split].data.table for split in splits}
    except Exception as error:  # noqa: BLE001 - hub, network and cache each raise their own errors
        raise UserError(
            f"task.name: glue/{name} cannot be loaded from the hub ({first_line(error)}). Without a network, set "
            f"task.folder to a folder that holds {name}/<split>.parquet"
        ) from None
