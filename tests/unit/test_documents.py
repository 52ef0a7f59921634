"""Texts of a language model: joined, cut into rows of one length, and refused where they cannot be read."""

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from support.builders import refused, reviews, tiny_documents, tiny_tokenizer, write_table

from raymask.core.spec import Task
from raymask.data import causal_lm
from raymask.data.causal_lm import Documents, group_texts, load_documents

TEXTS = ["the film was dull", "", "this movie seemed\nlively, quite", " the plot "]
WIKITEXT = "hub/Salesforce/wikitext:wikitext-2-raw-v1"


class Numbers:
    """A tokenizer of texts that are numbers."""

    pad_token_id = None

    def __init__(self, end=None):
        self.eos_token_id = end

    def __call__(self, texts, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def task_of(**keys):
    return Task(kind="causal-lm", **{"train": "train.txt", "test": "test.txt"} | keys)


def counted(counts, **keys):
    """Documents of so many tokens, numbered through from 1, which test repeats."""
    numbers = iter(range(1, sum(counts) + 1))
    texts = [" ".join(str(next(numbers)) for _ in range(count)) for count in counts]
    return Documents(task_of(**keys), 0, texts, texts)


def rows_of(rows):
    return [rows.ids[start:end].tolist() for start, end in zip(rows.offsets, rows.offsets[1:], strict=False)]


# Files.


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("name", ["text", "body"])
def test_each_row_of_a_table_is_a_document(tmp_path, ending, name):
    texts = [*TEXTS, "12", "1.5"]
    paths = [str(write_table(tmp_path / f"{split}{ending}", {"id": [*range(6)], name: texts})) for split in ("a", "b")]
    task = task_of(train=paths[0], test=paths[1], text=() if name == "text" else name)
    found = load_documents(task, 0)
    assert found.train == found.test == texts


def test_numbers_of_a_csv_file_are_texts(tmp_path):
    path = write_table(tmp_path / "a.csv", {"text": ["7", "8"]})
    assert load_documents(task_of(train=str(path), test=str(path)), 0).train == ["7", "8"]


def test_a_text_file_is_one_document(tmp_path):
    text = "one\n\ntwo, naïve 漢字 🙂\n"
    (tmp_path / "a.txt").write_text(text.replace("\n", "\r\n"), encoding="utf-8-sig", newline="")
    write_table(tmp_path / "b.jsonl", {"text": TEXTS})
    found = load_documents(task_of(train=str(tmp_path / "a.txt"), test=str(tmp_path / "b.jsonl")), 0)
    assert (found.train, found.test) == ([text], TEXTS)


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"one\ncaf\xe9\n")
    (tmp_path / "book.pdf").write_bytes(b"%PDF")
    write_table(tmp_path / "other.csv", {"body": ["a"]})
    write_table(tmp_path / "numbers.parquet", {"text": [1.5]})

    def said(name):
        return refused(load_documents, task_of(train=str(tmp_path / name), test="none.txt"), 0)

    assert said("none.txt") == f"{tmp_path / 'none.txt'}: there is no such file"
    assert said("bytes.txt") == (
        f"{tmp_path / 'bytes.txt'}: line 2 is not UTF-8: convert the file, for instance with iconv -f WINDOWS-1252 -t "
        "UTF-8"
    )
    assert said("book.pdf") == (
        f"{tmp_path / 'book.pdf'}: the ending must be one of .csv, .tsv, .jsonl, .json, .parquet; .txt goes with a "
        "causal-lm only"
    )
    assert said("other.csv") == f"{tmp_path / 'other.csv'}: has no column 'text'; its columns are 'body'"
    assert said("numbers.parquet") == (
        f"{tmp_path / 'numbers.parquet'}: row 1: 'text' is 1.5, not text; task.text names the columns to read"
    )


# The hub.


def hub_of(**splits):
    return DatasetDict({split: Dataset.from_dict({"text": texts}) for split, texts in splits.items()})


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        (WIKITEXT, ("Salesforce/wikitext", "wikitext-2-raw-v1")),
        ("hub/stas/openwebtext-10k", ("stas/openwebtext-10k", None)),
    ],
)
def test_a_dataset_of_the_hub_is_read_by_its_splits(monkeypatch, name, asked):
    calls = []
    found = hub_of(train=TEXTS, validation=["a"], test=["b"])
    monkeypatch.setattr("datasets.load_dataset", lambda *given: calls.append(given) or found)
    read = load_documents(Task(kind="causal-lm", name=name), 0)
    assert calls == [asked]
    assert (read.train, read.test) == (TEXTS, ["a"])


def test_of_a_dataset_the_split_for_the_test_can_be_read_alone(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *given: hub_of(validation=["a", "b"]))
    read = load_documents(Task(kind="causal-lm", name=WIKITEXT), 0, test_only=True)
    assert (read.train, read.validation, read.test) == (None, None, ["a", "b"])


def test_a_dataset_without_a_split_is_refused_with_those_it_has(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *given: hub_of(train=["a"], test=["b"]))
    assert refused(load_documents, Task(kind="causal-lm", name=WIKITEXT), 0) == (
        f"task.name: {WIKITEXT} has no split validation; its splits are train, test: save two of them as files, and "
        "give task.train and task.test"
    )


def test_a_dataset_without_texts_is_refused(monkeypatch):
    found = DatasetDict({split: Dataset.from_dict({"content": ["a"]}) for split in ("train", "validation")})
    monkeypatch.setattr("datasets.load_dataset", lambda *given: found)
    said = refused(load_documents, Task(kind="causal-lm", name=WIKITEXT), 0)
    assert said == f"{WIKITEXT} train: has no column 'text'; its columns are 'content'"


def test_an_unreachable_hub_is_answered_with_the_way_around_it():
    message = refused(load_documents, Task(kind="causal-lm", name=WIKITEXT), 0)
    assert message.startswith(f"task.name: {WIKITEXT} cannot be loaded from the hub (")
    assert message.endswith("Without a network, give task.train and task.test")
    assert len(message.splitlines()) == 1


# Rows.


@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=30).filter(lambda counts: sum(counts) > 40),
    length=st.integers(4, 9),
    end=st.sampled_from([None, 0]),
)
def test_every_token_is_in_one_row_in_its_order(counts, length, end):
    data = group_texts(counted(counts, max_length=length), Numbers(end), 100, 10**6)
    rows = rows_of(data.test)
    tokens = [token for row in rows for token in row]
    numbers = [token for token in tokens if token != end]
    total = sum(counts)
    assert numbers == list(range(1, total + 1))[: len(numbers)]
    assert len(numbers) >= total - 1
    assert tokens.count(0) == (0 if end is None else sum(count > 0 for count in counts) - 1)
    assert {len(row) for row in rows[:-1]} <= {length}
    assert 2 <= len(rows[-1]) <= length


@given(rows=st.integers(5, 60), share=st.floats(0.01, 0.5), most=st.integers(2, 9), seed=st.integers(0, 50))
def test_validation_is_a_range_of_train_s_rows(rows, share, most, seed):
    source = counted([rows * 5], max_length=5, validation_share=share, validation_rows=most)
    data = group_texts(Documents(source.task, seed, source.train, source.test), Numbers(), 100, 10**6)
    whole, train, validation = rows_of(data.test), rows_of(data.train), rows_of(data.validation)
    assert len(validation) == min(max(round(rows * share), 2), most)
    start = whole.index(validation[0])
    assert whole[start : start + len(validation)] == validation
    assert whole[:start] + whole[start + len(validation) :] == train


def test_where_validation_is_follows_from_the_seed():
    source = counted([500], max_length=5)
    found = [
        group_texts(Documents(source.task, seed, source.train, source.test), Numbers(), 100, 999) for seed in (1, 1, 2)
    ]
    assert np.array_equal(found[0].validation.ids, found[1].validation.ids)
    assert not np.array_equal(found[0].validation.ids, found[2].validation.ids)


@pytest.mark.parametrize(
    ("asked", "positions", "length"), [(None, 1000, 128), (256, 1000, 256), (None, 64, 64), (256, 64, 64)]
)
def test_rows_are_as_long_as_asked_for_and_as_the_model_can_read(asked, positions, length):
    data = group_texts(counted([3000], max_length=asked), Numbers(), positions, 10**6)
    assert (data.kind, data.metrics, data.subsets) == ("causal-lm", ("perplexity",), {"": (0, len(data.test))})
    assert data.train.lengths.max() == length


def test_pieces_of_many_documents_are_one_text(monkeypatch):
    tokenizer = tiny_tokenizer("llama")
    whole = group_texts(tiny_documents(), tokenizer, 100, 100)
    monkeypatch.setattr(causal_lm, "TOKENIZER_BATCH", 7)
    assert group_texts(tiny_documents(), tokenizer, 100, 100).fingerprint() == whole.fingerprint()
    assert (whole.test.ids == tokenizer.eos_token_id).sum() == 30 - 1
    assert tokenizer.cls_token_id not in whole.train.ids


@pytest.mark.parametrize("texts", [[], [""], ["film"]])
def test_a_test_file_without_two_tokens_is_refused(texts):
    short = Documents(task_of(), 0, reviews(200)[0], texts)
    assert refused(group_texts, short, tiny_tokenizer("llama"), 100, 100) == "test.txt: has fewer than two tokens"
    short = Documents(Task(kind="causal-lm", name=WIKITEXT), 0, reviews(200)[0], texts)
    assert (
        refused(group_texts, short, tiny_tokenizer("llama"), 100, 100)
        == f"{WIKITEXT} validation: has fewer than two tokens"
    )


@pytest.mark.parametrize("tokens", [0, 1, 2, 12])
def test_too_little_to_train_on_is_refused(tokens):
    short = Documents(task_of(max_length=4), 0, ["1 " * tokens], ["1 2"])
    assert refused(group_texts, short, Numbers(), 100, 100) == (
        f"train.txt: {-(-tokens // 4) if tokens > 1 else 0} rows of 4 tokens are too few to split off 2 for "
        "validation: give more text, or a smaller task.max_length"
    )


def test_a_tokenizer_of_another_model_is_refused():
    assert refused(group_texts, counted([500]), Numbers(), 100, 400) == (
        "model.name: the tokenizer gives token id 500, the model knows ids below 400: they do not belong together"
    )
