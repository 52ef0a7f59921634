"""The user's own validation file, in the place of rows that are split off from train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.builders import refused, reviews, tiny_tokenizer, write_table

from raymask.commands.jobs import spec_paths
from raymask.config import make_spec
from raymask.core.spec import Task
from raymask.data.causal_lm import group_texts, load_documents
from raymask.data.load import load_raw_dataset
from raymask.driver.setup import require_distinct_splits


def own_task(folder: Path, **files: Any) -> Task:
    """Files of 40, 12 and 8 rows."""
    for seed, (split, rows) in enumerate({"train": 40, "validation": 12, "test": 8}.items()):
        texts, labels = reviews(rows, seed)
        write_table(folder / f"{split}.csv", {"text": texts, "label": labels})
    named = {split: str(folder / f"{split}.csv") for split in ("train", "validation", "test")}
    return Task.model_validate({"text": "text", **named} | files)


def test_train_is_left_whole_and_validation_is_the_file(tmp_path: Path) -> None:
    dataset = load_raw_dataset(own_task(tmp_path), 0)
    assert [len(split.labels) for split in (dataset.train, dataset.validation, dataset.test)] == [40, 12, 8]
    assert dataset.validation.columns == (reviews(12, 1)[0],)
    assert dataset.train.columns == (reviews(40, 0)[0],)


def test_the_seed_makes_no_difference(tmp_path: Path) -> None:
    task = own_task(tmp_path)
    one, other = load_raw_dataset(task, 0), load_raw_dataset(task, 1)
    assert one.validation.columns == other.validation.columns


def test_without_the_key_rows_are_split_off_from_train(tmp_path: Path) -> None:
    dataset = load_raw_dataset(own_task(tmp_path, validation=None), 0)
    assert len(dataset.train.labels) + len(dataset.validation.labels) == 40


def test_its_labels_are_numbered_as_those_of_train(tmp_path: Path) -> None:
    task = own_task(tmp_path)
    for split in ("train", "validation", "test"):
        texts, labels = reviews(12)
        write_table(tmp_path / f"{split}.csv", {"text": texts, "label": [("no", "yes")[label] for label in labels]})
    dataset = load_raw_dataset(task, 0)
    assert dataset.classes == ("no", "yes")
    assert np.array_equal(dataset.validation.labels, reviews(12)[1])


def test_a_label_that_train_does_not_have_is_said_with_the_file(tmp_path: Path) -> None:
    task = own_task(tmp_path)
    write_table(tmp_path / "validation.csv", {"text": ["a", "b"], "label": [0, 7]})
    assert f"{tmp_path / 'validation.csv'}: " in refused(load_raw_dataset, task, 0)


def test_all_labels_of_train_equal_is_refused_here_too(tmp_path: Path) -> None:
    task = own_task(tmp_path)
    for split in ("train", "validation", "test"):
        write_table(tmp_path / f"{split}.csv", {"text": ["a", "b"], "label": [1, 1]})
    assert "every row has the same label, '1': there is nothing to learn" in refused(load_raw_dataset, task, 0)


def test_a_language_model_has_one_too(tmp_path: Path) -> None:
    for split, rows in {"train": 40, "validation": 12, "test": 8}.items():
        (tmp_path / f"{split}.txt").write_text("\n".join(reviews(rows)[0]))
    files = {split: str(tmp_path / f"{split}.txt") for split in ("train", "validation", "test")}
    task = Task.model_validate({"kind": "causal-lm", "max_length": 16, **files})
    whole, split_off = (
        group_texts(load_documents(one, 0), tiny_tokenizer(), 64, 1000)
        for one in (task, task.model_copy(update={"validation": None}))
    )
    assert len(whole.train) == len(split_off.train) + len(split_off.validation)
    assert len(whole.validation) > 0
    (tmp_path / "validation.txt").write_text("")
    said = refused(group_texts, load_documents(task, 0), tiny_tokenizer(), 64, 1000)
    assert said == f"{tmp_path / 'validation.txt'}: has fewer than two tokens"


@pytest.mark.parametrize(
    ("same", "said"),
    [
        (
            ("train", "test"),
            "task.test: is the file of task.train: give a file with rows that the model is not trained on",
        ),
        (("train", "validation"), "task.validation: is the file of task.train"),
        (("validation", "test"), "task.test: is the file of task.validation"),
    ],
)
def test_no_two_splits_are_one_file(tmp_path: Path, same: tuple[str, str], said: str) -> None:
    task = own_task(tmp_path)
    require_distinct_splits(task)
    assert said in refused(require_distinct_splits, task.model_copy(update={same[1]: getattr(task, same[0])}))


def test_a_task_with_a_name_has_its_own() -> None:
    said = refused(make_spec, {"model": "m", "task": {"name": "glue/mrpc", "validation": "mine.csv"}})
    assert "take out train, validation, test, text and metrics" in said


def test_it_travels_with_a_job(tmp_path: Path) -> None:
    spec = make_spec({"model": "m", "task": own_task(tmp_path).model_dump(mode="json")})
    assert spec_paths(spec)["task.validation"] == str(tmp_path / "validation.csv")
