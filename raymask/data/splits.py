"""The split of `train` into training rows and `validation`, for classification and regression."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from sklearn.model_selection import train_test_split

from raymask.core import seeds
from raymask.core.errors import UserError
from raymask.core.seeds import derive
from raymask.core.spec import Task
from raymask.data.types import Examples


def split_validation(train: Examples, task: Task, classes: tuple[str, ...], seed: int) -> tuple[Examples, Examples]:
    """Split `train` into training rows and `validation`, stratified by label. The seed alone decides.

    Args:
        train: All rows of `train`.
        task: Gives the size of `validation` (validation_share, validation_rows), and a name for messages.
        classes: Labels of the classes in the order of their numbers; empty for a regression.
        seed: The spec's seed.

    Returns:
        The training rows and `validation`, both in their original order.

    Raises:
        UserError: All labels are equal, a class has one row only, or there are too few rows.
    """
    where = task.train or f"{task.name} train"
    labels = train.labels
    size = min(max(round(len(labels) * task.validation_share), 2), task.validation_rows)
    counts = require_several_labels(train, where, classes)
    if classes:
        require_two_rows(train, classes)
        size = max(size, len(counts))
    if len(labels) - size < 2:
        raise UserError(f"{where}: {len(labels)} rows are too few to split off {size} for validation")
    train_rows, validation_rows = train_test_split(
        np.arange(len(labels)),
        test_size=size,
        random_state=derive(seed, seeds.VALIDATION) % 2**32,
        # by label: with an existing classifier's numbers the split would differ
        stratify=np.argsort(np.argsort(classes))[labels] if classes else quantile_strata(labels, size),
    )

    return train.take(np.sort(train_rows)), train.take(np.sort(validation_rows))


def require_two_rows(train: Examples, classes: Sequence[str]) -> None:
    """Check that every class of the rows has two of them, one to train on and one for `validation`.

    Args:
        train: All rows of `train`.
        classes: Labels of the classes in the order of their numbers.

    Raises:
        UserError: A class has one row only.
    """
    numbers, rows, counts = np.unique(train.labels, return_index=True, return_counts=True)
    if counts.min() < 2:
        alone = int(counts.argmin())
        label, advice = classes[numbers[alone]], ""
        if re.fullmatch(r"[+-]?\d*\.\d+", label):
            advice = ". To predict numbers, set task.kind: regression"
        raise UserError(
            f"{train.place(rows[alone])}: class {label!r} has this row only, and two are needed, one for train and one "
            f"for validation{advice}"
        )


def require_several_labels(train: Examples, where: str, classes: Sequence[str]) -> np.ndarray:
    """Check that there is something to learn.

    Args:
        train: Training rows.
        where: The file, for the message.
        classes: Labels of the classes in the order of their numbers; empty for a regression.

    Returns:
        int64 [distinct labels], how many rows have each.

    Raises:
        UserError: All labels are equal.
    """
    labels, counts = np.unique(train.labels, return_counts=True)
    if len(counts) < 2:
        label = repr(classes[labels[0]]) if classes else labels[0]
        raise UserError(f"{where}: every row has the same label, {label}: there is nothing to learn")
    return counts


def quantile_strata(labels: np.ndarray, size: int) -> np.ndarray:
    """Strata of a regression: quantiles of the labels.

    Args:
        labels: float32 [rows].
        size: Rows of `validation`.

    Returns:
        int64 [rows], the stratum of each row: fifths, or fewer quantiles if there are few rows.
    """
    strata = max(1, min(5, size, len(labels) // 2))
    rank = np.argsort(np.argsort(labels, kind="stable"), kind="stable")
    return rank * strata // len(labels)
