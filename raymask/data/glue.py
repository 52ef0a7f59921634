"""GLUE tasks, from the hub or from a folder of Parquet files.

The public validation set of a GLUE task is raymask's `test`: the labels of GLUE's own test set are not public.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from raymask.core.errors import UserError, first_line
from raymask.core.spec import Task
from raymask.data.files import Columns, from_dataset, read_columns
from raymask.data.types import RawTask

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


def read_glue(task: Task, name: str, test_only: bool = False) -> RawTask:
    """Read one of the eight tasks, from the hub or from `<folder>/<name>/<split>.parquet`.

    Args:
        task: The spec's task section; `task.folder` is None for the hub.
        name: The task's name without `glue/`.
        test_only: Read `test` alone.

    Raises:
        UserError: The files or the dataset cannot be read.
    """
    subsets = ("matched", "mismatched") if name == "mnli" else ("",)
    splits = {"test": ["validation" + (f"_{subset}" if subset else "") for subset in subsets]}
    if not test_only:
        splits["train"] = ["train"]
    columns = (*GLUE_COLUMNS[name], "label")
    if task.folder is not None:
        folder = Path(task.folder) / name
        tables = {
            split: [read_columns(folder / f"{file}.parquet", columns) for file in files]
            for split, files in splits.items()
        }
    else:
        tables = fetch_glue(name, splits, columns)
    classes = GLUE_CLASSES.get(name, ())
    kind = "classification" if classes else "regression"
    metrics, max_length = GLUE_METRICS.get(name, ("accuracy",)), 64 if name in SHORT_TASKS else 128
    return RawTask(tables, GLUE_COLUMNS[name], "label", classes, kind, subsets, metrics, max_length)


def fetch_glue(name: str, splits: Mapping[str, Sequence[str]], columns: Sequence[str]) -> dict[str, list[Columns]]:
    """Load a task's splits from the hub, with `datasets`.

    Args:
        name: The task's name without `glue/`.
        splits: Names of GLUE's splits by raymask's.
        columns: The columns to read.

    Raises:
        UserError: They cannot be loaded.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(HUB_DATASET, name)
    except Exception as error:  # noqa: BLE001 - hub, network and cache each raise their own errors
        raise UserError(
            f"task.name: glue/{name} cannot be loaded from the hub ({first_line(error)}). Without a network, set "
            f"task.folder to a folder that holds {name}/<split>.parquet"
        ) from None
    return {
        split: [from_dataset(dataset[part], columns, f"glue/{name} {part}") for part in parts]
        for split, parts in splits.items()
    }
