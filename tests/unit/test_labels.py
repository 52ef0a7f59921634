"""Classes: their order, their match with a checkpoint's outputs, and the positive one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.builders import refused

from raymask.data.files import Columns
from raymask.data.labels import number_classes, regression_targets
from raymask.data.metrics import compute_metrics
from raymask.data.types import Classes, RawTask

UNNAMED = ("LABEL_0", "LABEL_1", "LABEL_2")


def task_of(train: Sequence[Any], test: Sequence[Any] = (), declared: tuple[str, ...] = ()) -> RawTask:
    splits = {"train": [Columns("train.csv", {"y": [*train]})], "test": [Columns("test.csv", {"y": [*test]})]}
    return RawTask(splits, (), "y", declared, "classification", ("",), (), 128)


def classes_of(
    train: Sequence[Any], order: Sequence[str] = (), declared: tuple[str, ...] = (), positive: str | None = None
) -> Classes:
    return number_classes(task_of(train, (), declared), order, positive)[0]


# The order of the classes of a new classifier.


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        ([*map(str, range(12))], [*map(str, range(12))]),
        ([10, 9, -1], ["-1", "9", "10"]),
        (["10.0", "9.0"], ["9.0", "10.0"]),
        ([1.0, 0.0], ["0", "1"]),
        (["01", "1", "2"], ["01", "1", "2"]),
        (["010", "002", "001"], ["001", "002", "010"]),
        (["10", "9", "a"], ["10", "9", "a"]),
        (["1.9", "1.10"], ["1.10", "1.9"]),
        (["null", "NA", "None", "nan", "true"], ["NA", "None", "nan", "null", "true"]),
        ([True, False], ["False", "True"]),
        (["9" * 5000, "1"], ["1", "9" * 5000]),
    ],
)
def test_numbers_are_in_numeric_order_and_words_stay_as_they_stand(labels: list[Any], order: list[str]) -> None:
    assert classes_of(labels) == Classes(tuple(order), tuple(order), len(order) - 1)


@given(st.lists(st.integers(-50, 50), min_size=2, unique=True))
def test_the_order_of_numbers_does_not_depend_on_how_they_are_stored(numbers: list[int]) -> None:
    expected = tuple(map(str, sorted(numbers)))
    stored: list[Sequence[Any]] = [numbers, [*map(str, numbers)], [*map(float, numbers)]]
    assert {classes_of(labels).names for labels in stored} == {expected}


def test_declared_classes_keep_their_order_and_are_read_by_number_and_by_name() -> None:
    task = task_of([1, 0, 1], ["spam", "1"], ("spam", "ham"))
    classes, numbers = number_classes(task, (), None)
    assert classes == Classes(("spam", "ham"), ("spam", "ham"), 1)
    assert [numbers["train"][0].tolist(), numbers["test"][0].tolist()] == [[1, 0, 1], [0, 1]]


def test_each_file_says_what_its_own_numbers_mean() -> None:
    """Two saved datasets that number the classes in another order."""
    task = task_of([0, 1], [0, 1], ("spam", "ham"))
    task.splits["test"] = [Columns("test.parquet", {"y": [0, 1]}, {"y": ("ham", "spam")})]
    classes, numbers = number_classes(task, (), None)
    assert classes.names == ("spam", "ham")
    assert [numbers["train"][0].tolist(), numbers["test"][0].tolist()] == [[0, 1], [1, 0]]


# Their match with the outputs of a checkpoint.


@pytest.mark.parametrize(
    ("labels", "declared", "order", "names", "class_labels"),
    [
        # by name
        (["b", "a"], (), ("b", "a"), "b a", "b a"),
        (["neg", "POS"], (), ("NEG", "Pos"), "NEG Pos", "neg POS"),
        (["a", "b"], (), ("c", "b", "a"), "c b a", "c b a"),
        (["A", "a"], (), ("a", "b", "A"), "a b A", "a b A"),
        (["001", "010"], (), ("1", "2", "10"), "1 2 10", "001 2 010"),
        ([1, 2], (), ("2", "1"), "2 1", "2 1"),
        (["LABEL_2", "LABEL_0"], (), UNNAMED, "LABEL_0 LABEL_1 LABEL_2", "LABEL_0 LABEL_1 LABEL_2"),
        ([1, 0], ("spam", "ham"), ("Ham", "Spam"), "Ham Spam", "ham spam"),
        # by number
        ([0, 1], (), ("NEGATIVE", "POSITIVE"), "NEGATIVE POSITIVE", "0 1"),
        (["0", "2"], (), UNNAMED, "0 1 2", "0 1 2"),
        (["0.0", "1.0"], (), ("NO", "YES"), "NO YES", "0.0 1.0"),
        ([1, 0], ("spam", "ham"), UNNAMED[:2], "spam ham", "spam ham"),
        ([1, 0], ("0", "1"), ("NO", "YES"), "NO YES", "0 1"),
    ],
)
def test_labels_are_matched_with_outputs_by_name_and_else_by_number(
    labels: list[Any], declared: tuple[str, ...], order: tuple[str, ...], names: str, class_labels: str
) -> None:
    classes = classes_of(labels, order, declared)
    assert (classes.names, classes.labels) == (tuple(names.split()), tuple(class_labels.split()))


@pytest.mark.parametrize(
    ("labels", "declared", "order", "said"),
    [
        ([1, 2], (), UNNAMED, "say which of its outputs is which class: write the names there as id2label, in their"),
        (["1", "2"], (), UNNAMED, "in their order ('1', '2'?)"),
        ([-1, 0, 1], (), UNNAMED, "in their order ('-1', '0', '1'?)"),
        (["0", "00"], (), UNNAMED, "in their order ('0', '00'?)"),
        (["no", "yes"], (), UNNAMED, "in their order ('no', 'yes'?)"),
        ([0, 1], ("no", "yes"), UNNAMED, "in their order ('no', 'yes'?)"),
        (
            [0, 1, 2, 3],
            (),
            UNNAMED,
            "the task has 4 classes ('0', '1', '2', '3'), and its config.json has 'LABEL_0', 'LABEL_1',",
        ),
        ([0, 1], (), ("1", "2"), "train.csv: row 1: 'y' is '0', but the classes of the model, which is taken as"),
        ([1, 2], (), ("bad", "good"), "its classes are 'bad', 'good' and the task's are '1', '2'"),
        ([0, 1], ("no", "yes"), ("bad", "good"), "its classes are 'bad', 'good' and the task's are 'no', 'yes'"),
        (
            ["b", "a", "c"],
            (),
            ("a", "b"),
            "train.csv: row 3: 'y' is 'c', but the classes of the model, which is taken as fine-tuned (eval, and "
            "dense.epochs: 0), are 'a', 'b': correct it, or fine-tune the model here (dense.epochs: 3)",
        ),
    ],
)
def test_a_doubt_about_which_output_is_which_class_is_refused(
    labels: list[Any], declared: tuple[str, ...], order: tuple[str, ...], said: str
) -> None:
    message = refused(classes_of, labels, order, declared)
    assert "taken as fine-tuned (eval, and dense.epochs: 0)" in message
    assert said in message


def test_the_first_label_that_the_checkpoint_lacks_is_that_of_train() -> None:
    message = refused(number_classes, task_of(["b", "x"], ["y"]), ("a", "b"), None)
    assert message.startswith("train.csv: row 2: 'y' is 'x', but the classes of the model, ")


def test_a_class_that_train_lacks_is_that_of_the_checkpoint() -> None:
    classes, numbers = number_classes(task_of(["a", "b"], ["c", "a"]), ("c", "b", "a"), None)
    assert classes.names == ("c", "b", "a")
    assert [numbers["train"][0].tolist(), numbers["test"][0].tolist()] == [[2, 1], [0, 2]]


# The positive class.


@pytest.mark.parametrize(
    ("labels", "declared", "positive"),
    [
        ([0, 1], (), "1"),
        (["no", "yes"], (), "yes"),
        (["10", "9"], (), "10"),
        ([0, 1], ("spam", "ham"), "ham"),
    ],
)
def test_the_positive_class_is_the_last_in_the_task_s_own_order(
    labels: list[Any], declared: tuple[str, ...], positive: str
) -> None:
    classes = classes_of(labels, (), declared)
    assert classes.labels[classes.positive] == positive


@given(st.lists(st.booleans(), min_size=2), st.booleans(), st.sampled_from([None, "no", "yes"]), st.integers(0, 99))
def test_metrics_are_the_same_however_a_checkpoint_numbers_the_classes(
    truth: list[bool], flip: bool, positive: str | None, seed: int
) -> None:
    said = np.random.default_rng(seed).integers(0, 2, len(truth))
    rows = [("no", "yes")[yes] for yes in (*truth, False, True)]
    order = ("yes", "no") if flip else ("no", "yes")
    classes, numbers = number_classes(task_of(rows), order, positive)
    answers = np.eye(2)[[order.index(("no", "yes")[yes]) for yes in said]]
    found = compute_metrics(("f1", "matthews"), answers, numbers["train"][0][:-2], classes.positive)
    sought, given = (np.array(answer) == (positive != "no") for answer in (truth, said))
    assert found["f1"] == pytest.approx(2 * (sought & given).sum() / max(1, sought.sum() + given.sum()))
    assert found["matthews"] == pytest.approx(
        np.corrcoef(truth, said)[0, 1] if len({*truth}) == len({*said}) == 2 else 0
    )


@pytest.mark.parametrize(("positive", "number"), [("0", 0), ("HAM", 0), ("1", 1), ("SPAM", 1)])
def test_the_positive_class_may_be_given_by_label_or_name(positive: str, number: int) -> None:
    assert classes_of([1, 0], ("HAM", "SPAM"), positive=positive).positive == number


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["no", "yes"], "task.positive: is 'maybe', but the classes are 'no', 'yes'; in a spec, put it in quotes"),
        (["a", "b", "maybe"], "task.positive: goes with two classes, not with 3 ('a', 'b', 'maybe'): take it out"),
    ],
)
def test_a_positive_class_that_there_is_not_is_refused(labels: list[str], said: str) -> None:
    assert refused(classes_of, labels, positive="maybe") == said


# Labels that cannot be used.


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "is empty"),
        ("", "is empty"),
        (float("nan"), "is empty"),
        (0.5, "is 0.5: classes are whole numbers or texts. To predict numbers, set task.kind: regression"),
        ([1], "is [1]: classes are whole numbers or texts. To predict numbers, set task.kind: regression"),
        ("caf\udce9", "is not UTF-8: convert the file, for instance with iconv -f WINDOWS-1252 -t UTF-8"),
    ],
)
def test_a_label_of_no_class_is_refused_with_its_row(value: Any, said: str) -> None:
    assert refused(classes_of, [0, 1, value]) == f"train.csv: row 3: 'y' {said}"


def test_the_first_label_that_train_does_not_have_is_refused_with_its_row() -> None:
    said = "test.csv: row 2: 'y' is 'N/A', but the classes are '0', '1'"
    assert refused(number_classes, task_of([0, 1], ["1", "N/A", "n/a"]), (), None) == said


@pytest.mark.parametrize("number", [-1, 2])
def test_a_number_that_no_declared_class_has_is_refused(number: int) -> None:
    said = f"train.csv: row 2: 'y' is {number}, but the classes are 0 = spam, 1 = ham"
    assert refused(classes_of, [0, number], (), ("spam", "ham")) == said


# The targets of a regression.


def test_targets_are_the_numbers_that_the_cells_say() -> None:
    cells = ["0", "0.5", " -1e3 ", 2, 2.5, "+7"]
    assert regression_targets(Columns("t", {"y": cells}), "y").tolist() == [0, 0.5, -1000, 2, 2.5, 7]


@pytest.mark.parametrize("value", ["0,5", "NA", "", None, "1_000", True, "inf", "1e39", 10**400, [1]])
def test_the_first_target_that_is_no_number_is_refused_with_its_row(value: Any) -> None:
    message = refused(regression_targets, Columns("t.csv", {"y": [0, value, "x"]}), "y")
    assert message.startswith("t.csv: row 2: 'y' is ")
    assert message.endswith("; a regression needs numbers, such as 0.5")
