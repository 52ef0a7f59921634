"""Class names, class numbers and regression targets.

A class has a label, which the rows call it by, and a name, which the model calls it by. They differ where rows with
numbers meet a checkpoint with words.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from raymask.core.errors import UserError
from raymask.data.files import Columns, quoted, require_utf8
from raymask.data.types import Classes, RawTask

LARGEST_TARGET = float(np.finfo(np.float32).max)


def number_classes(
    raw: RawTask, order: Sequence[str], positive: str | None
) -> tuple[Classes, dict[str, list[np.ndarray]]]:
    """Find a classification's classes, and number the labels of its rows.

    A new classifier has the classes of `train`. A fine-tuned one has its own, and the rows may lack some of them.

    Args:
        raw: The task.
        order: Class names as a fine-tuned classifier numbers them, empty if there is none.
        positive: The spec's task.positive.

    Returns:
        The classes, and class numbers by split and table, int64 [rows].

    Raises:
        UserError: A label is no class, or the classifier's outputs cannot be matched with the classes.
    """
    labels = {split: [read_labels(table, raw) for table in tables] for split, tables in raw.splits.items()}
    places: dict[str, str] = {}
    for split in [*labels] if order or "train" not in labels else ["train"]:
        for table, table_labels in zip(raw.splits[split], labels[split], strict=True):
            for label, row in first_rows(table_labels).items():
                places.setdefault(label, f"{table.where}: row {row}")
    if order:
        names, class_labels = match_classes(places, raw, order)
    else:
        names = class_labels = raw.classes or sort_labels(places)
    numbers = {
        split: [
            class_numbers(table_labels, class_labels, table.where, raw.label)
            for table, table_labels in zip(raw.splits[split], labels[split], strict=True)
        ]
        for split in labels
    }
    return Classes(names, class_labels, positive_class(names, class_labels, raw.classes, positive)), numbers


def read_labels(table: Columns, raw: RawTask) -> list[str]:
    """The labels of the rows as texts. Numbers of declared classes become their names.

    Args:
        table: The rows.
        raw: Their task.

    Raises:
        UserError: A label is empty, or cannot be that of a class.
    """
    values, declared = table.values[raw.label], table.class_names.get(raw.label, raw.classes)
    labels = [value if isinstance(value, str) else label_text(value, declared) for value in values]
    if declared and all(whole_number(name) is None for name in declared):
        named = {str(number): name for number, name in enumerate(declared)}
        labels = [named.get(label, label) for label in labels]
    for label, row in first_rows(labels).items():
        where = f"{table.where}: row {row}: {raw.label!r}"
        if not label:
            refuse_label(values[row - 1], where, declared)
        require_utf8(label, where)
    return labels


def label_text(value: Any, declared: Sequence[str]) -> str:
    """A label that is no text as text: a whole number, or the class that has it where classes are declared.

    Empty if it cannot be that of a class.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas makes 0.0 of 0 where cells were empty
    if not isinstance(value, int):
        return ""
    if declared and not isinstance(value, bool):
        return declared[value] if 0 <= value < len(declared) else ""
    return str(value)


def first_rows(labels: Sequence[str]) -> dict[str, int]:
    """The first row of each label, from 1."""
    rows: dict[str, int] = {}
    for row, label in enumerate(labels, 1):
        rows.setdefault(label, row)
    return rows


def refuse_label(value: Any, where: str, declared: Sequence[str]) -> NoReturn:
    """Raise UserError for a label that cannot be that of a class.

    Args:
        value: The label.
        where: File, row and column, for the message.
        declared: Class names in the order of their numbers in the rows; empty where none are declared.
    """
    if value is None or value == "" or value != value:
        raise UserError(f"{where} is empty")
    if declared and isinstance(value, int):
        listed = ", ".join(f"{number} = {name}" for number, name in enumerate(declared))
        raise UserError(f"{where} is {value}, but the classes are {listed}")
    raise UserError(
        f"{where} is {reprlib.repr(value)}: classes are whole numbers or texts. To predict numbers, set "
        "task.kind: regression"
    )


def class_numbers(labels: Sequence[str], classes: Sequence[str], where: str, column: str) -> np.ndarray:
    """Labels as class numbers, int64 [rows].

    Args:
        labels: The rows' labels.
        classes: The labels of all classes, in the order of their numbers.
        where: The rows' name in the message.
        column: The label column.

    Raises:
        UserError: A label is that of no class.
    """
    numbers = {label: number for number, label in enumerate(classes)}
    for label, row in first_rows(labels).items():
        if label not in numbers:
            raise UserError(
                f"{where}: row {row}: {column!r} is {reprlib.repr(label)}, but the classes are {quoted(classes)}"
            )
    return np.array([numbers[label] for label in labels], np.int64)


def whole_number(text: str) -> int | None:
    """The whole number that a text says, also as 2.0; None if it says none."""
    match = re.fullmatch(r"([+-]?[0-9]{1,18})(\.0+)?", text)
    return int(match[1]) if match else None


def sort_labels(labels: Collection[str], declared: Sequence[str] = ()) -> tuple[str, ...]:
    """Labels in the declared order; without one numbers in numeric order, and other labels in that of their letters."""
    if declared and all(label in declared for label in labels):
        return tuple(sorted(labels, key=declared.index))
    numbers = {label: whole_number(label) for label in labels}
    if None in numbers.values():
        return tuple(sorted(labels))
    return tuple(sorted(labels, key=lambda label: (numbers[label], label)))


def has_default_labels(order: Sequence[str]) -> bool:
    """Whether all class names are transformers' placeholders (LABEL_0, LABEL_1, ...)."""
    return all(re.fullmatch(r"LABEL_\d+", name) for name in order)


def match_classes(
    places: Mapping[str, str], raw: RawTask, order: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Match the labels of the rows with the outputs of a fine-tuned classifier, by name or else by number.

    Args:
        places: The labels of the rows, each with the place of its first row for the message.
        raw: The task.
        order: Class names of the classifier.

    Returns:
        Class names and labels, both in the order of the classifier's outputs. A class without a row has a label too.

    Raises:
        UserError: There is a doubt about which output is which class.
    """
    labels = sort_labels(places, raw.classes)
    matched = match_by_name(labels, order) or match_by_number(labels, raw.classes, order)
    if matched is None:
        refuse_classes(places, labels, order, raw.label)
    return matched if has_default_labels(order) else tuple(order), matched


def match_by_name(labels: Sequence[str], order: Sequence[str]) -> tuple[str, ...] | None:
    """The labels in the order of class names that are equal: to the letter, in any case, or as numbers.

    A class without a row has its name as label. None if a label has no equal name, or several have.
    """
    keys: tuple[Callable[[str], str | int | None], ...] = (str, str.casefold, whole_number)
    for key in keys:
        by_key = {key(label): label for label in labels}
        names = [key(name) for name in order]
        if len(by_key) == len(labels) and len({*names}) == len(names) and None not in by_key and {*by_key} <= {*names}:
            return tuple(by_key.get(key(name), name) for name in order)
    return None


def match_by_number(labels: Sequence[str], declared: Sequence[str], order: Sequence[str]) -> tuple[str, ...] | None:
    """The labels in the order of the outputs that they number from 0.

    Labels are numbers themselves, or their classes are declared in the order of their numbers. None if that leaves a
    doubt: no label is 0, one is too large, or the classifier has names that say something else.
    """
    if any(whole_number(name) is None for name in declared):
        known = all(label in declared for label in labels) and len(declared) == len(order)
        return tuple(declared) if known and has_default_labels(order) else None
    by_number = {whole_number(label): label for label in labels}
    if any(whole_number(name) is not None for name in order) or len(by_number) < len(labels) or 0 not in by_number:
        return None
    if not by_number.keys() <= {*range(len(order))}:
        return None
    return tuple(by_number.get(number, str(number)) for number in range(len(order)))


def refuse_classes(places: Mapping[str, str], labels: Sequence[str], order: Sequence[str], column: str) -> NoReturn:
    """Raise UserError for labels that cannot be matched with a classifier's outputs.

    Args:
        places: Where the first row of each label is.
        labels: The labels in their order.
        order: Class names of the classifier.
        column: The label column.
    """
    but = "the model is taken as fine-tuned (eval, and dense.epochs: 0), but"
    if has_default_labels(order) and len(labels) > len(order):
        raise UserError(
            f"{but} the task has {len(labels)} classes ({quoted(labels)}), and its config.json has {quoted(order)}: "
            "its head was made for other classes. Fine-tune it here (dense.epochs: 3)"
        )
    if has_default_labels(order):
        raise UserError(
            f"{but} its config.json does not say which of its outputs is which class: write the names there as "
            f"id2label, in their order ({quoted(labels)}?)"
        )
    unknown = [label for label in places if label.casefold() not in {name.casefold() for name in order}]
    if len(unknown) < len(labels):
        label = unknown[0] if unknown else labels[0]
        raise UserError(
            f"{places[label]}: {column!r} is {reprlib.repr(label)}, but the classes of the model, which is taken as "
            f"fine-tuned (eval, and dense.epochs: 0), are {quoted(order)}: correct it, or fine-tune the model here "
            "(dense.epochs: 3)"
        )
    raise UserError(
        f"{but} its classes are {quoted(order)} and the task's are {quoted(labels)}: rename one of them, or fine-tune "
        "it here (dense.epochs: 3)"
    )


def positive_class(names: Sequence[str], labels: Sequence[str], declared: Sequence[str], positive: str | None) -> int:
    """The number of the class that F1 is of, where there are two.

    It depends on what the classes are called, never on how a checkpoint numbers them.

    Args:
        names: The classes' names.
        labels: The classes' labels, in the same order.
        declared: Class names in the order of their numbers in the rows; empty where none are declared.
        positive: The spec's task.positive, a label or a name; None for the last label of the task's own order.

    Raises:
        UserError: There is no such class, or there are not two classes.
    """
    if positive is None:
        return labels.index(sort_labels(labels, declared)[-1])
    if len(labels) != 2:
        raise UserError(f"task.positive: goes with two classes, not with {len(labels)} ({quoted(labels)}): take it out")
    for known in (labels, names):
        if positive in known:
            return known.index(positive)
    raise UserError(
        f"task.positive: is {positive!r}, but the classes are {quoted(labels)}; in a spec, put it in quotes"
    )


def regression_targets(columns: Columns, label: str) -> np.ndarray:
    """Labels as regression targets, float32 [rows].

    Raises:
        UserError: A label is no finite float32 number.
    """
    targets = [target(value) for value in columns.values[label]]
    wrong = next((index for index, value in enumerate(targets) if value is None), None)
    if wrong is not None:
        value = columns.values[label][wrong]
        said = "empty" if value is None or value == "" else reprlib.repr(value)
        raise UserError(
            f"{columns.where}: row {wrong + 1}: {label!r} is {said}; a regression needs numbers, such as 0.5"
        )
    return np.array(targets, np.float32)


def target(value: Any) -> float | None:
    """A value as a regression target; None if it is no finite float32 number."""
    if isinstance(value, bool) or (isinstance(value, str) and "_" in value):  # Python reads 1_000 as a number
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) <= LARGEST_TARGET else None
