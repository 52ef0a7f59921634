"""Own files of a fine-tuned checkpoint: what `check` says of them, what `eval` reads, and what both refuse."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.builders import refused, reviews, tiny_model, tiny_tokenizer, write_table

from raymask.commands.check import show_data
from raymask.commands.evaluate import eval_spec, evaluate, show_evaluation
from raymask.config import make_spec
from raymask.core import stats
from raymask.core.spec import Spec, Task
from raymask.data.load import load_raw_dataset
from raymask.data.tokenize import encode
from raymask.data.types import Examples
from raymask.driver.setup import prepare, require_distinct_splits
from raymask.runs.run_dir import RunDir


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that calls its outputs GOOD and BAD."""
    return tiny_model(tmp_path_factory.mktemp("named") / "model", id2label={0: "GOOD", 1: "BAD"})


def spec_of(folder: Path, model: Path, labels: tuple[Any, ...], test: tuple[Any, ...] = (), **task: Any) -> Spec:
    """A fine-tuned checkpoint and two CSV files whose labels take turns."""
    files = {}
    for split, values, rows in (("train", labels, 40), ("test", test or labels, 12)):
        columns = {"text": reviews(rows)[0], "label": [str(values[row % len(values)]) for row in range(rows)]}
        files[split] = str(write_table(folder / f"{split}.csv", columns))
    return make_spec({"model": str(model), "task": files | {"text": "text"} | task, "dense": {"epochs": 0}})


def said_of(spec: Spec) -> str:
    """What `check` says of the task."""
    console = Console(file=io.StringIO(), width=400)
    show_data(console, prepare(spec))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


# --- check -----------------------------------------------------------------------------------------------------------


def test_check_says_which_label_is_which_output_and_of_which_class_f1_is(tmp_path: Path, named: Path) -> None:
    said = said_of(spec_of(tmp_path, named, (0, 1), metrics=["f1"]))
    assert "2 classes (0 = GOOD (0 in the rows), 1 = BAD (1 in the rows)), f1 of 'BAD'; rows:" in said
    said = said_of(spec_of(tmp_path, named, ("bad", "good"), metrics=["f1"], positive="bad"))
    assert "2 classes (0 = GOOD (good in the rows), 1 = BAD (bad in the rows)), f1 of 'BAD'; rows:" in said


def test_check_says_which_class_has_no_row_of_train(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", num_labels=3, id2label={0: "c", 1: "a", 2: "b"})
    said = said_of(spec_of(tmp_path, model, ("a", "b"), ("a", "b", "c"), metrics=["f1"]))
    assert "3 classes (0 = c (no row of train), 1 = a, 2 = b), f1; rows:" in said


# --- eval ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test"), [((0, 1), (0, 1)), (("bad", "GOOD"), ("bad", "GOOD")), (("BAD", "GOOD"), ("BAD",))]
)
def test_eval_reads_the_test_rows_alone(
    tmp_path: Path, named: Path, train: tuple[Any, ...], test: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 20)
    spec = spec_of(tmp_path, named, train, test, metrics=["accuracy", "f1"])
    whole = evaluate(prepare(spec))
    (tmp_path / "train.csv").unlink()
    setup = prepare(spec, test_only=True)
    assert (len(setup.context.data.train), len(setup.context.data.validation)) == (0, 0)
    assert evaluate(setup) == whole


def test_eval_says_of_which_class_f1_is(tmp_path: Path, named: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "RESAMPLES", 20)
    spec = spec_of(tmp_path, named, ("bad", "good"))
    keys = {"train": "none.csv", "test": spec.task.test, "text": "text", "metrics": "[f1]"}
    overrides = [f"task.{key}={value}" for key, value in keys.items()]
    (tmp_path / "spec.yaml").write_text("model: m\ntask: {train: a, test: a, text: a}\n")
    console = Console(file=io.StringIO(), width=200)
    show_evaluation(console, str(named), str(tmp_path / "spec.yaml"), overrides)
    assert "f1 of 'GOOD'" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_language_model_s_train_is_not_read_either(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text(" ".join(reviews(9)[0]))
    task = {"kind": "causal-lm", "train": "none.txt", "test": str(tmp_path / "test.txt"), "max_length": 16}
    spec = make_spec({"model": str(tiny_model(tmp_path / "model", "llama")), "task": task, "dense": {"epochs": 0}})
    data = prepare(spec, test_only=True).context.data
    assert (len(data.train), len(data.validation)) == (0, 0)
    assert len(data.test) > 1


# --- rows and files that cannot be used ------------------------------------------------------------------------------


def test_a_row_without_tokens_is_refused_with_its_file_and_row(tmp_path: Path) -> None:
    """Where the tokenizer adds nothing: with [CLS] and [SEP] an empty text is a row like any other."""
    texts, labels = reviews(20)
    columns = {"text": [*texts[:9], "", *texts[10:]], "label": labels}
    paths = [str(write_table(tmp_path / f"{split}.csv", columns)) for split in ("train", "test")]
    dataset = load_raw_dataset(Task(train=paths[0], test=paths[1], text="text", validation_share=0.5), 0)
    bare = tiny_tokenizer()
    bare.backend_tokenizer.post_processor = None
    for split in (dataset.train, dataset.validation, dataset.test):
        encode(split, tiny_tokenizer(), 64)
    refusals = [
        refused(encode, split, bare, 64)
        for split in (dataset.train, dataset.validation, dataset.test)
        if "" in split.columns[0]
    ]
    assert refusals == [f"{path}: row 10: has no tokens: its text is empty. Take the row out" for path in paths]


def test_rows_keep_their_numbers_when_some_are_taken() -> None:
    examples = Examples((["a", "b", "c", "d"],), np.arange(4), "t.csv").take(np.array([1, 3])).take(np.array([1]))
    assert (examples.columns, examples.place(0)) == ((["d"],), "t.csv: row 4")


def test_a_regression_reads_whole_numbers_and_fractions_of_csv_alike(tmp_path: Path) -> None:
    train = write_table(tmp_path / "train.csv", {"text": reviews(20)[0], "label": [row % 6 for row in range(20)]})
    test = write_table(tmp_path / "test.csv", {"text": ["a", "b"], "label": [0.5, 1.5]})
    task = Task(train=str(train), test=str(test), text="text", kind="regression")
    assert load_raw_dataset(task, 0).test.labels.tolist() == [0.5, 1.5]


# --- paths -----------------------------------------------------------------------------------------------------------


def test_a_tilde_is_the_home_in_every_path_of_a_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    files = {split: f"~/{split}.csv" for split in ("train", "validation", "test")}
    spec = make_spec({"model": "~/model", "task": files | {"text": "text"}})
    assert [spec.model.name, spec.task.train, spec.task.validation, spec.task.test] == [
        f"{tmp_path}/{name}" for name in ("model", "train.csv", "validation.csv", "test.csv")
    ]
    glue = make_spec({"model": "org/model", "task": {"name": "glue/mrpc", "folder": "~/glue"}})
    assert (glue.model.name, glue.task.folder) == ("org/model", f"{tmp_path}/glue")
    assert eval_spec("~/model", "glue/mrpc").model.name == f"{tmp_path}/model"
    same = spec.task.model_copy(update={"test": f"{tmp_path}/train.csv"})
    assert "task.test: is the file of task.train" in refused(require_distinct_splits, same)


def test_a_run_directory_may_have_blanks_and_any_script_in_its_name(tmp_path: Path, named: Path) -> None:
    store = RunDir(tmp_path / "mein Lauf é 漢字 #1 100%")
    spec = spec_of(tmp_path, named, (0, 1))
    store.write_spec(spec)
    assert store.read_spec() == spec
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["mein Lauf é 漢字 #1 100%"]
