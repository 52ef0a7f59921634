"""Class names, class numbers and regression targets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raymask.core.errors import UserError
from raymask.data.files import column, text_column
from raymask.data.types import Examples


def find_classes(table: pa.Table, label: str, where: str) -> tuple[str, ...]:
    """The distinct values of the label column as class names, sorted; numbers in numeric order.

    Args:
        table: The rows of `train`.
        label: The label column.
        where: The table's name in messages.

    Raises:
        UserError: The column cannot hold classes, or a label is empty.
    """
    values = column(table, label, where)
    if not (
        pa.types.is_string(values.type)
        or pa.types.is_large_string(values.type)
        or pa.types.is_integer(values.type)
        or pa.types.is_boolean(values.type)
    ):
        raise UserError(
            f"{where}: {label} holds {values.type}: classes are whole numbers or texts. To predict numbers, set "
            "task.kind: regression"
        )
    classes = tuple(str(value) for value in sorted(values.unique().to_pylist()))
    if "" in classes:
        raise UserError(f"{where}: row {values.to_pylist().index('') + 1}: {label} is empty")
    return classes


def has_default_labels(order: Sequence[str]) -> bool:
    """Whether all class names are transformers' placeholders (LABEL_0, LABEL_1, ...), or there are none."""
    return all(re.fullmatch(r"LABEL_\d+", name) for name in order)


def require_names(order: Sequence[str], classes: Sequence[str]) -> None:
    """Check that an existing classifier names its classes if the task's classes are words.

    Args:
        order: Class names of the classifier, empty if there is none.
        classes: Class names of the task.

    Raises:
        UserError: The classifier has placeholder names only, so its outputs cannot be matched with the classes.
    """
    words = [name for name in classes if not name.removeprefix("-").isdigit()]
    if order and has_default_labels(order) and words:
        raise UserError(
            "the model is taken as fine-tuned (eval, and dense.epochs: 0), but its config.json does not say which of "
            f"its outputs is which class: write the names there as id2label, in their order ({', '.join(classes)}?)"
        )


def align_labels(classes: tuple[str, ...], order: Sequence[str]) -> tuple[str, ...]:
    """Order a task's classes as an existing classifier numbers them. Upper and lower case are the same.

    Args:
        classes: Class names of the task.
        order: Class names of the classifier. Without any, or with placeholders only, `classes` stay as they are.

    Raises:
        UserError: The classifier has other names, so its outputs cannot be matched with the classes.
    """
    if has_default_labels(order):
        return classes
    task_names = {name.casefold(): name for name in classes}
    model_names = [name.casefold() for name in order]
    if sorted(model_names) != sorted(task_names):
        raise UserError(
            f"the model is taken as fine-tuned (eval, and dense.epochs: 0), but its classes are {', '.join(order)} and "
            f"the task's are {', '.join(classes)}: rename one of them, or fine-tune it here (dense.epochs: 3)"
        )
    return tuple(task_names[name] for name in model_names)


def make_examples(
    table: pa.Table, columns: Sequence[str], label: str, classes: tuple[str, ...], where: str, numbers: bool = False
) -> Examples:
    """Texts and labels of one split.

    Args:
        table: The rows.
        columns: One or two text columns.
        label: The label column.
        classes: Class names in the order of their numbers; empty for a regression.
        where: The table's name in messages.
        numbers: The label column holds class numbers instead of class names.

    Raises:
        UserError: A column cannot be used, or a label is no class, or in a regression no finite number.
    """
    texts = [text_column(table, name, where) for name in columns]
    values = column(table, label, where).to_pylist()
    if not classes:
        return Examples(tuple(texts), regression_targets(values, label, where))
    names = [str(i) for i in range(len(classes))] if numbers else classes
    class_numbers = {name: i for i, name in enumerate(names)}
    keys = [str(value) for value in values]
    unknown = next((row for row, key in enumerate(keys) if key not in class_numbers), None)
    if unknown is not None:
        raise UserError(
            f"{where}: row {unknown + 1}: {label} is {values[unknown]!r}, but the classes are {', '.join(names)}"
        )
    return Examples(tuple(texts), np.array([class_numbers[key] for key in keys], np.int64))


def regression_targets(values: list[Any], label: str, where: str) -> np.ndarray:
    """Labels as regression targets, float32 [rows].

    Raises:
        UserError: A label is no finite float32 number.
    """
    largest = float(np.finfo(np.float32).max)
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= largest:
            raise UserError(f"{where}: row {row + 1}: {label} is {value!r}; a regression needs numbers")
    return np.array(values, np.float32)
