"""Data sets: the rows of train, validation and test, and messages about unusable files."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from datasets.table import InMemoryTable
from hypothesis import given
from hypothesis import strategies as st
from support.builders import refused, reviews, tiny_corpus, tiny_tokenizer, write_table
from tokenizers.processors import TemplateProcessing

from raymask.core.spec import Task
from raymask.data.glue import GLUE_CLASSES
from raymask.data.load import load_raw_dataset
from raymask.data.splits import split_validation
from raymask.data.tokenize import tokenize
from raymask.data.types import Examples, RawDataset, TokenizedSplit

ENDINGS = (".csv", ".jsonl", ".json", ".parquet")
TRAIN = {"sentence": [f"row {row}" for row in range(20)], "label": [row % 2 for row in range(20)]}
TEST = {"sentence": ["one", "two", "three"], "label": [1, 0, 1]}
SPLITS = ("train", "validation", "test")


def own_task(folder, train=TRAIN, test=TEST, ending=".parquet", **settings):
    """A task of two files, written into the folder."""
    paths = [write_table(folder / f"{name}{ending}", columns) for name, columns in (("train", train), ("test", test))]
    return Task(train=str(paths[0]), test=str(paths[1]), **{"text": "sentence"} | settings)


def glue_task(folder, name, **splits):
    """A GLUE task of made-up splits."""
    for split, columns in splits.items():
        write_table(folder / name / f"{split}.parquet", columns)
    return Task(name=f"glue/{name}", folder=str(folder))


def pairs(count, labels, start=0):
    """Columns of `count` made-up MNLI rows."""
    numbers = range(start, start + count)
    return {
        "premise": [f"premise {row}" for row in numbers],
        "hypothesis": [f"hypothesis {row}" for row in numbers],
        "label": [row % labels for row in numbers],
    }


def all_rows(corpus):
    """(texts..., label) of train and validation together, sorted."""
    both = (corpus.train, corpus.validation)
    return sorted(row for texts in both for row in zip(*texts.columns, texts.labels.tolist(), strict=True))


def chosen(corpus):
    """The texts of validation."""
    return corpus.validation.columns[0]


# Own files.


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("labels", "classes"),
    [((10, 9), ("9", "10")), (("no", "yes"), ("no", "yes")), ((True, False), ("False", "True"))],
    ids=["int", "str", "bool"],
)
def test_every_kind_of_file_and_label_is_read(tmp_path, ending, labels, classes):
    train = TRAIN | {"label": [labels[row] for row in TRAIN["label"]]}
    test = TEST | {"label": [labels[row] for row in TEST["label"]]}
    corpus = load_raw_dataset(own_task(tmp_path, train, test, ending), seed=0)
    numbers = [classes.index(str(label)) for label in train["label"]]
    test_numbers = [classes.index(str(label)) for label in test["label"]]
    if ending == ".csv":
        classes = tuple(name.lower() for name in classes)  # Arrow writes true, and so it stands there
    assert corpus.classes == classes
    assert corpus.outputs == 2
    assert all_rows(corpus) == sorted(zip(TRAIN["sentence"], numbers, strict=True))
    assert corpus.test.columns == (["one", "two", "three"],)
    assert corpus.test.labels.tolist() == test_numbers
    assert corpus.test.labels.dtype == np.int64


@pytest.mark.parametrize("ending", ENDINGS)
def test_two_texts_stay_together(tmp_path, ending):
    train, test = pairs(20, 3), pairs(5, 3, start=20)
    task = own_task(tmp_path, train, test, ending, text=("hypothesis", "premise"))
    corpus = load_raw_dataset(task, seed=0)
    assert all_rows(corpus) == sorted(zip(train["hypothesis"], train["premise"], train["label"], strict=True))
    assert corpus.test.columns == (test["hypothesis"], test["premise"])


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", [int, float])
def test_a_regression_is_read_as_real_numbers(tmp_path, ending, kind):
    train = TRAIN | {"label": [kind(row) / kind(2) if kind is float else row for row in range(20)]}
    corpus = load_raw_dataset(own_task(tmp_path, train, TEST, ending, kind="regression"), seed=0)
    assert all_rows(corpus) == sorted(zip(train["sentence"], train["label"], strict=True))
    assert corpus.train.labels.dtype == corpus.test.labels.dtype == np.float32
    assert (corpus.classes, corpus.outputs, corpus.metrics) == ((), 1, ("pearson", "spearman"))


def test_other_columns_than_the_defaults_can_be_named(tmp_path):
    train = {"idx": list(range(20)), "body": TRAIN["sentence"], "stars": TRAIN["label"]}
    test = {"body": TEST["sentence"], "stars": TEST["label"], "more": [0.0] * 3}
    corpus = load_raw_dataset(own_task(tmp_path, train, test, text="body", label="stars"), seed=0)
    assert all_rows(corpus) == sorted(zip(train["body"], train["stars"], strict=True))


def test_own_files_are_measured_by_accuracy_at_128_tokens_unless_said_otherwise(tmp_path):
    corpus = load_raw_dataset(own_task(tmp_path), seed=0)
    assert (corpus.metrics, corpus.max_length) == (("accuracy",), 128)
    corpus = load_raw_dataset(own_task(tmp_path, metrics=("f1", "matthews"), max_length=32), seed=0)
    assert (corpus.metrics, corpus.max_length) == (("f1", "matthews"), 32)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_text_may_have_commas_quotes_line_breaks_and_any_script(tmp_path, ending):
    strange = ['she said "no", twice', "two\nlines", "naïve 漢字 🙂", " spaces ", "", "null", "12", "1.5", "NA"]
    train = {"sentence": strange + TRAIN["sentence"], "label": [row % 2 for row in range(29)]}
    corpus = load_raw_dataset(own_task(tmp_path, train, ending=ending), seed=0)
    assert all_rows(corpus) == sorted(zip(train["sentence"], train["label"], strict=True))


@pytest.mark.parametrize("words", [("true", "false", "maybe"), ("01", "02", "none")])
def test_labels_of_a_csv_file_mean_the_same_in_both_files(tmp_path, words):
    train = TRAIN | {"label": [words[row % 3] for row in range(20)]}
    test = TEST | {"label": [words[0], words[1], words[0]]}  # alone, these look like other types than text
    corpus = load_raw_dataset(own_task(tmp_path, train, test, ".csv"), seed=0)
    assert corpus.classes == tuple(sorted(words))
    assert [corpus.classes[number] for number in corpus.test.labels] == test["label"]


def test_a_column_that_nobody_asked_for_may_hold_anything(tmp_path):
    train, test = TRAIN | {"note": [""] * 20}, TEST | {"note": ["late", "", "1"]}
    assert len(load_raw_dataset(own_task(tmp_path, train, test, ".csv"), seed=0).test.labels) == 3


def test_a_regression_is_validated_on_rows_from_all_over_its_range():
    labels = np.linspace(0, 1, 100, dtype=np.float32)
    _, validation = split_validation(Examples(([""] * 100,), labels), task_of(kind="regression"), (), 0)
    assert sorted(validation.labels * 5 // 1) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_an_ending_may_be_in_capitals(tmp_path):
    task = own_task(tmp_path)
    loud = (tmp_path / "train.parquet").rename(tmp_path / "TRAIN.PARQUET")
    assert len(load_raw_dataset(task.model_copy(update={"train": str(loud)}), seed=0).test.labels) == 3


# GLUE.


@pytest.mark.parametrize(
    ("name", "rows", "validated", "tested", "metrics", "length"),
    [
        ("mrpc", 3668, 367, 408, ("accuracy", "f1"), 128),
        ("stsb", 5749, 575, 1500, ("pearson", "spearman"), 128),
        ("sst2", 67349, 2000, 872, ("accuracy",), 64),
    ],
)
def test_the_real_glue_tasks_have_their_rows_metrics_and_lengths(glue, name, rows, validated, tested, metrics, length):
    corpus = load_raw_dataset(Task(name=f"glue/{name}", folder=str(glue)), seed=0)
    assert [len(getattr(corpus, split).labels) for split in SPLITS] == [rows - validated, validated, tested]
    assert (corpus.metrics, corpus.max_length) == (metrics, length)
    assert corpus.classes == GLUE_CLASSES.get(name, ())
    assert corpus.subsets == {"": (0, tested)}
    assert len(corpus.train.columns) == (1 if name == "sst2" else 2)
    if corpus.classes:
        train, validation = (
            np.bincount(texts.labels) / len(texts.labels) for texts in (corpus.train, corpus.validation)
        )
        assert train == pytest.approx(validation, abs=1 / validated)


def test_mnli_tests_matched_and_mismatched_apart(tmp_path):
    matched, mismatched = pairs(4, 3, start=100), pairs(6, 3, start=200)
    task = glue_task(tmp_path, "mnli", train=pairs(30, 3), validation_matched=matched, validation_mismatched=mismatched)
    corpus = load_raw_dataset(task, seed=0)
    assert corpus.subsets == {"matched": (0, 4), "mismatched": (4, 10)}
    assert corpus.test.columns[0] == matched["premise"] + mismatched["premise"]
    assert corpus.classes == ("entailment", "neutral", "contradiction")

    data = tokenize(corpus, tiny_tokenizer())
    logits = np.eye(3)[corpus.test.labels]
    logits[[0, 4, 5, 6]] = np.eye(3)[(corpus.test.labels[[0, 4, 5, 6]] + 1) % 3]  # one of 4 and three of 6 are wrong
    assert data.test_metrics(logits) == pytest.approx({"matched accuracy": 0.75, "mismatched accuracy": 0.5})
    found = data.test_metrics(logits, np.array([0, 0, 1, 7, 7, 7]))
    assert found == pytest.approx({"matched accuracy": 1 / 3, "mismatched accuracy": 1.0})


def test_the_test_split_of_glue_can_be_read_alone(tmp_path):
    parts = {"validation_matched": pairs(4, 3), "validation_mismatched": pairs(6, 3)}
    task = glue_task(tmp_path, "mnli", **parts)
    corpus = load_raw_dataset(task, 0, ("LABEL_0", "LABEL_1", "LABEL_2"), test_only=True)
    assert [len(getattr(corpus, split).labels) for split in SPLITS] == [0, 0, 10]
    assert corpus.classes == ("entailment", "neutral", "contradiction")
    data = tokenize(corpus, tiny_tokenizer())
    assert data.test_metrics(np.eye(3)[corpus.test.labels]) == {"matched accuracy": 1.0, "mismatched accuracy": 1.0}


def test_a_task_of_one_part_is_measured_without_a_prefix():
    data = tokenize(tiny_corpus(), tiny_tokenizer())
    perfect = np.eye(2)[data.test.labels]
    assert data.test_metrics(perfect) == {"accuracy": 1.0}
    assert data.test_metrics(1 - perfect, np.array([3, 4])) == {"accuracy": 0.0}


# The order of the classes.


def test_own_classes_are_numbered_as_an_existing_classifier_numbers_them(tmp_path):
    train = TRAIN | {"label": ["good" if row else "bad" for row in TRAIN["label"]]}
    test = TEST | {"label": ["good", "bad", "good"]}
    task = own_task(tmp_path, train, test)
    plain, turned = load_raw_dataset(task, seed=0), load_raw_dataset(task, seed=0, order=("good", "bad"))
    assert (plain.classes, plain.test.labels.tolist()) == (("bad", "good"), [1, 0, 1])
    assert (turned.classes, turned.test.labels.tolist()) == (("good", "bad"), [0, 1, 0])
    assert all_rows(turned) == sorted((text, 1 - label) for text, label in all_rows(plain))


def test_glue_classes_are_numbered_as_an_existing_classifier_numbers_them(tmp_path):
    splits = {"train": pairs(30, 3), "validation_matched": pairs(3, 3), "validation_mismatched": pairs(3, 3)}
    task = glue_task(tmp_path, "mnli", **splits)
    order = ("contradiction", "entailment", "neutral")
    corpus = load_raw_dataset(task, seed=0, order=order)
    assert corpus.classes == order
    assert corpus.test.labels.tolist() == [1, 2, 0, 1, 2, 0]
    assert all(label == (int(premise.split()[1]) + 1) % 3 for premise, _, label in all_rows(corpus))


def test_the_hub_gives_the_same_as_the_folder(glue, monkeypatch):
    def from_files(repository, name):
        assert (repository, name) == ("nyu-mll/glue", "mrpc")
        splits = ("train", "validation")
        return DatasetDict(
            {
                split: Dataset(InMemoryTable(pyarrow.parquet.read_table(glue / name / f"{split}.parquet")))
                for split in splits
            }
        )

    monkeypatch.setattr("datasets.load_dataset", from_files)
    hub = load_raw_dataset(Task(name="glue/mrpc"), seed=0)
    folder = load_raw_dataset(Task(name="glue/mrpc", folder=str(glue)), seed=0)
    assert (hub.test.columns, hub.train.columns) == (folder.test.columns, folder.train.columns)
    assert np.array_equal(hub.validation.labels, folder.validation.labels)


def test_case_does_not_matter_to_the_order_of_classes_and_the_checkpoint_s_spelling_stays(tmp_path):
    train = TRAIN | {"label": ["good" if row else "bad" for row in TRAIN["label"]]}
    task = own_task(tmp_path, train, TEST | {"label": ["good", "bad", "good"]})
    assert load_raw_dataset(task, seed=0, order=("GOOD", "Bad")).classes == ("GOOD", "Bad")


def test_a_classifier_without_names_for_words_is_refused_rather_than_guessed(tmp_path):
    names = {0: "refund", 1: "praise"}
    texts, labels = reviews(40)
    for split in ("train", "test"):
        write_table(tmp_path / f"{split}.csv", {"text": texts, "label": [names[label] for label in labels]})
    task = Task(train=str(tmp_path / "train.csv"), test=str(tmp_path / "test.csv"), text=("text",))
    assert load_raw_dataset(task, 0).classes == ("praise", "refund")
    message = refused(load_raw_dataset, task, 0, ("LABEL_0", "LABEL_1"))
    assert "its config.json does not say which of its outputs is which class" in message
    assert message.endswith("write the names there as id2label, in their order ('praise', 'refund'?)")


def test_a_tokenizer_that_knows_nothing_of_the_texts_is_refused():
    """What transformers makes of a folder without a tokenizer's files."""
    strange = tiny_tokenizer()
    corpus = tiny_corpus()
    spoilt = replace(corpus, train=replace(corpus.train, columns=(["zxqj wvut plmk " * 3] * len(corpus.train.labels),)))
    message = refused(tokenize, spoilt, strange)
    known = f"which has {len(strange):,}: is it for another language"
    assert message.startswith(f"model.name: 82% of the texts' tokens are unknown to its tokenizer, {known}")
    assert "was it not saved with the model" in message
    tokenize(corpus, strange)


def test_a_classifier_without_names_does_not_number_the_classes(tmp_path):
    corpus = load_raw_dataset(own_task(tmp_path), seed=0, order=("LABEL_0", "LABEL_1"))
    assert corpus.classes == ("0", "1")


# How validation is split off train.


@st.composite
def splits_of_train(draw):
    """Labels with at least two rows a class, and the keys of a task that say how much is split off."""
    counts = draw(st.lists(st.integers(2, 40), min_size=2, max_size=4))
    labels = draw(st.permutations([number for number, count in enumerate(counts) for _ in range(count)]))
    keys = {"validation_share": draw(st.floats(0.01, 0.5)), "validation_rows": draw(st.integers(2, 30))}
    return np.array(labels), keys


CLASSES = tuple("abcdefghij")


def task_of(**keys):
    return Task(train="train.csv", test="test.csv", text="sentence", **keys)


@given(splits_of_train(), st.booleans(), st.integers(0, 2**62))
def test_validation_and_train_share_out_the_rows(split, stratified, seed):
    labels, keys = split
    whole = Examples(([str(row) for row in range(len(labels))],), labels)
    train, validation = split_validation(whole, task_of(**keys), CLASSES if stratified else (), seed)
    rows = [int(text) for text in (*train.columns[0], *validation.columns[0])]
    assert sorted(rows) == list(range(len(labels)))
    assert np.array_equal(labels[rows], [*train.labels, *validation.labels])
    asked = min(max(round(len(labels) * keys["validation_share"]), 2), keys["validation_rows"])
    assert len(validation.labels) == (max(asked, len(set(labels))) if stratified else asked)


@given(splits_of_train(), st.integers(0, 2**62))
def test_a_stratified_validation_has_every_class_by_its_share(split, seed):
    labels, keys = split
    train, validation = split_validation(Examples(([""] * len(labels),), labels), task_of(**keys), CLASSES, seed)
    fair = np.bincount(labels) * len(validation.labels) / len(labels)
    assert np.abs(np.bincount(validation.labels, minlength=len(fair)) - fair).max() < 1
    assert set(train.labels) == set(labels)


def test_the_seed_alone_decides_what_is_in_validation(tmp_path):
    task = own_task(tmp_path, validation_share=0.3)
    np.random.seed(1)
    first = chosen(load_raw_dataset(task, seed=3))
    np.random.seed(2)
    assert chosen(load_raw_dataset(task, seed=3)) == first
    assert chosen(load_raw_dataset(task, seed=4)) != first
    named = own_task(tmp_path / "named", TRAIN | {"label": ["ab"[row] for row in TRAIN["label"]]}, validation_share=0.3)
    named = named.model_copy(update={"test": named.train})
    assert chosen(load_raw_dataset(named, seed=3)) == first


def test_an_existing_classifier_s_order_does_not_change_what_is_in_validation(tmp_path):
    uneven = TRAIN | {"label": [int(row % 5 == 0) for row in range(20)]}
    task = own_task(tmp_path, uneven, validation_share=0.3)
    assert chosen(load_raw_dataset(task, seed=3, order=("1", "0"))) == chosen(load_raw_dataset(task, seed=3))


def test_validation_keeps_the_order_of_the_file(tmp_path):
    corpus = load_raw_dataset(own_task(tmp_path, validation_share=0.5), seed=0)
    for split in (corpus.train, corpus.validation):
        numbers = [int(text.split()[1]) for text in split.columns[0]]
        assert numbers == sorted(numbers)


# Token ids.


def corpus_of(texts, max_length=64):
    """A corpus with these texts in every split."""
    split = Examples(texts, np.arange(len(texts[0]), dtype=np.int64) % 2)
    return RawDataset(split, split, split, {"": (0, len(texts[0]))}, ("a", "b"), ("accuracy",), max_length)


def test_a_row_is_the_tokenizer_s_own_ids():
    tokenizer = tiny_tokenizer()
    texts, more = reviews(5)[0], reviews(5, seed=1)[0]
    rows = tokenize(corpus_of((texts, more)), tokenizer).train
    assert len(rows) == 5
    for row, pair in enumerate(zip(texts, more, strict=True)):
        expected, inside = tokenizer(*pair), slice(rows.offsets[row], rows.offsets[row + 1])
        assert rows.ids[inside].tolist() == expected["input_ids"]
        assert rows.types[inside].tolist() == expected["token_type_ids"]
        assert rows.lengths[row] == len(expected["input_ids"])
    assert set(rows.types) == {0, 1}
    assert (rows.ids.dtype, rows.types.dtype) == (np.int32, np.int8)


def test_rows_are_the_same_however_many_are_tokenized_in_one_call(monkeypatch):
    tokenizer, corpus = tiny_tokenizer(), corpus_of((reviews(20)[0], reviews(20, seed=1)[0]))
    whole = tokenize(corpus, tokenizer)
    monkeypatch.setattr("raymask.data.tokenize.TOKENIZER_BATCH", 7)
    assert tokenize(corpus, tokenizer).fingerprint() == whole.fingerprint()


@pytest.mark.parametrize(("asked", "known", "found"), [(8, 64, 8), (64, 10, 10), (64, int(1e30), 22)])
def test_rows_are_cut_at_the_task_s_length_or_the_tokenizer_s(asked, known, found):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = known
    short, long = "the film", " ".join(["superb"] * 20)
    rows = tokenize(corpus_of(([short, long],), asked), tokenizer).train
    assert rows.lengths.tolist() == [4, found]
    assert rows.ids[-1] == tokenizer.sep_token_id
    assert tokenize(corpus_of(([short, long],), asked), tokenizer, positions=9).train.lengths.max() == min(found, 9)


def test_ids_that_the_model_does_not_know_are_refused():
    message = refused(tokenize, tiny_corpus(), tiny_tokenizer(), vocabulary=10)
    assert message.startswith("model.name: the tokenizer gives token id ")
    assert message.endswith("the model knows ids below 10: they do not belong together")


def test_the_longer_of_two_texts_is_cut_first():
    tokenizer = tiny_tokenizer()
    rows = tokenize(corpus_of((["the film"], [" ".join(["superb"] * 20)]), 10), tokenizer).train
    assert tokenizer.decode(rows.ids) == "[CLS] the film [SEP] superb superb superb superb superb [SEP]"


def test_a_model_without_token_types_gets_none():
    assert tokenize(tiny_corpus(), tiny_tokenizer("roberta")).train.types is None


@pytest.mark.parametrize("template", [None, "$A", "$A [SEP]"])
def test_two_texts_have_a_separator_between_them(template):
    tokenizer = tiny_tokenizer("gpt2")
    if template is not None:  # as decoders' tokenizers have: nothing, or one token however many texts there are
        single = {"single": template, "pair": template.replace("$A", "$A $B")}
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(**single, special_tokens=[("[SEP]", 3)])
    rows = tokenize(corpus_of((["the film"], ["superb"]), 16), tokenizer).train
    words = tokenizer.decode(rows.ids).removeprefix("[CLS] ").removesuffix(" [SEP]")
    assert words == "the film [SEP] superb"


@pytest.mark.parametrize("regression", [False, True])
def test_data_knows_what_it_is_measured_by(regression):
    data = tokenize(tiny_corpus(regression), tiny_tokenizer())
    assert data.kind == ("regression" if regression else "classification")
    assert data.metrics == tiny_corpus(regression).metrics
    assert [len(getattr(data, split)) for split in SPLITS] == [48, 16, 12]


@pytest.mark.parametrize("regression", [False, True])
def test_the_fingerprint_changes_with_every_token_label_and_boundary(regression):
    data = tokenize(tiny_corpus(regression), tiny_tokenizer())
    fingerprints = {data.fingerprint()}
    for split in SPLITS:
        rows = getattr(data, split)
        for name, place in (("ids", 7), ("ids", -1), ("labels", 3), ("offsets", 1)):
            array = getattr(rows, name).copy()
            array[place] += 1
            fingerprints.add(replace(data, **{split: replace(rows, **{name: array})}).fingerprint())
    assert len(fingerprints) == 1 + 3 * 4
    assert tokenize(tiny_corpus(regression), tiny_tokenizer()).fingerprint() == data.fingerprint()


def test_the_fingerprint_changes_when_a_row_moves_to_another_split():
    data = tokenize(tiny_corpus(rows=(16, 16, 16)), tiny_tokenizer())
    assert replace(data, train=data.validation, validation=data.train).fingerprint() != data.fingerprint()


# Files that cannot be used.


def test_a_missing_file_is_named(tmp_path):
    task = own_task(tmp_path)
    (tmp_path / "test.parquet").unlink()
    assert refused(load_raw_dataset, task, 0) == f"{task.test}: there is no such file"


def test_where_a_relative_path_begins_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = own_task(tmp_path).model_copy(update={"test": "none.csv"})
    assert refused(load_raw_dataset, task, 0) == f"none.csv: there is no such file (the path is relative to {tmp_path})"


def test_an_unknown_ending_is_refused_with_the_known_ones(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("sentence,label\n")
    task = own_task(tmp_path).model_copy(update={"train": str(path)})
    assert refused(load_raw_dataset, task, 0) == (
        f"{path}: the ending must be one of .csv, .tsv, .jsonl, .json, .parquet; .txt goes with a causal-lm only"
    )


@pytest.mark.parametrize(
    ("ending", "text", "reason"),
    [
        (".csv", "sentence,label\none,1\none,1,too,many\n", "row 2: has 4 cells, and the header has 2"),
        (".csv", "sentence,label\none,1\n\none\n", "row 2: has 1 cells, and the header has 2"),
        (".csv", 'sentence,label\none,1\n"two,1\n', "row 2: a quotation mark is not closed, or stands alone in"),
        (".csv", "", "has no rows"),
        (".jsonl", '{"sentence": "one", "label"\n', "row 1: is not valid JSON: one object a line is wanted, or one"),
        (".jsonl", '{"sentence": "one", "label": 1}\n\n[1]\n', "row 2: is [1], and an object is wanted"),
        (".json", '[{"sentence": "one"},\n{"label" 1}]', "begins an array of objects and is not valid JSON: Expecting"),
        (".jsonl", "", "has no rows"),
        (".parquet", "PARsentence", "cannot be read as parquet: it is damaged, or another kind of file"),
        (".parquet", "", "cannot be read as parquet: it is damaged, or another kind of file"),
    ],
)
def test_a_broken_file_is_refused_with_its_row(tmp_path, ending, text, reason):
    task = own_task(tmp_path, ending=ending)
    (tmp_path / f"train{ending}").write_text(text)
    message = refused(load_raw_dataset, task, 0)
    assert message.startswith(f"{task.train}: {reason}")
    assert len(message.splitlines()) == 1


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    task = own_task(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    task = task.model_copy(update={"train": str(tmp_path / "folder.csv")})
    assert refused(load_raw_dataset, task, 0) == f"{task.train}: cannot be read as csv: Is a directory"


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_file_without_rows_is_refused(tmp_path, ending):
    task = own_task(tmp_path, test={"sentence": [], "label": []}, ending=ending)
    assert refused(load_raw_dataset, task, 0) == f"{task.test}: has no rows"


@pytest.mark.parametrize(
    ("keys", "missing"),
    [
        ({"text": "body"}, "'body'"),
        ({"label": "stars"}, "'stars'"),
        ({"text": ["body", "sentence"], "label": "stars"}, "'body' and none 'stars'"),
    ],
)
def test_a_missing_column_is_refused_with_those_that_are_there(tmp_path, keys, missing):
    task = own_task(tmp_path, **keys)
    assert (
        refused(load_raw_dataset, task, 0)
        == f"{task.train}: has no column {missing}; its columns are 'sentence', 'label'"
    )


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    task = own_task(tmp_path, ending=".csv")
    (tmp_path / "train.csv").write_text("sentence,sentence,label\n" + "one,two,0\none,two,1\n" * 10)
    assert refused(load_raw_dataset, task, 0) == f"{task.train}: has more than one column 'sentence'"


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", ["sentence", "label"])
def test_an_empty_cell_is_refused_with_its_row(tmp_path, ending, name):
    task = own_task(tmp_path, TRAIN | {name: [*TRAIN[name][:2], None, *TRAIN[name][3:]]}, ending=ending)
    assert refused(load_raw_dataset, task, 0).startswith(f"{task.train}: row 3: {name!r} is empty")


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_an_empty_number_of_a_csv_file_is_refused_with_its_row(tmp_path, kind):
    task = own_task(tmp_path, test=TEST | {"label": [1, None, 0]}, ending=".csv", kind=kind)
    assert refused(load_raw_dataset, task, 0).startswith(f"{task.test}: row 2: 'label' is empty")


def test_an_empty_word_for_a_class_is_refused_with_its_row(tmp_path):
    task = own_task(tmp_path, TRAIN | {"label": ["yes", "no", "", *["yes"] * 17]}, ending=".csv")
    assert refused(load_raw_dataset, task, 0) == f"{task.train}: row 3: 'label' is empty"


def test_a_text_column_of_numbers_is_refused(tmp_path):
    task = own_task(tmp_path, TRAIN | {"sentence": list(range(20))})
    expected = f"{task.train}: row 1: 'sentence' is 0, not text; task.text names the columns to read"
    assert refused(load_raw_dataset, task, 0) == expected


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_fractions_as_classes_are_refused_with_the_advice_to_regress(tmp_path, ending):
    task = own_task(tmp_path, TRAIN | {"label": [row + 0.5 for row in TRAIN["label"]]}, ending=ending)
    assert refused(load_raw_dataset, task, 0) == (
        f"{task.train}: row 1: 'label' is 0.5: classes are whole numbers or texts. To predict numbers, set "
        "task.kind: regression"
    )


def test_a_label_that_train_does_not_know_is_refused_with_its_row(tmp_path):
    train = TRAIN | {"label": ["yes" if row else "no" for row in TRAIN["label"]]}
    task = own_task(tmp_path, train, TEST | {"label": ["no", "yes", "maybe"]})
    assert refused(load_raw_dataset, task, 0) == (
        f"{task.test}: row 3: 'label' is 'maybe', but the classes are 'no', 'yes'"
    )


@pytest.mark.parametrize("label", [-1, 3])
def test_a_glue_label_out_of_range_is_refused_with_its_row(tmp_path, label):
    strange = pairs(5, 3) | {"label": [0, label, 1, 2, 0]}
    task = glue_task(
        tmp_path, "mnli", train=pairs(30, 3), validation_matched=pairs(3, 3), validation_mismatched=strange
    )
    expected = (
        f"{tmp_path}/mnli/validation_mismatched.parquet: row 2: 'label' is {label}, but the classes are "
        "0 = entailment, 1 = neutral, 2 = contradiction"
    )
    assert refused(load_raw_dataset, task, 0) == expected


def test_a_split_that_a_glue_folder_lacks_is_named(tmp_path):
    task = glue_task(tmp_path, "rte", train=pairs(30, 2))
    assert refused(load_raw_dataset, task, 0) == f"{tmp_path}/rte/validation.parquet: there is no such file"


def test_a_glue_file_without_its_columns_is_refused(tmp_path):
    task = glue_task(tmp_path, "rte", train=pairs(30, 2), validation=pairs(3, 2))
    expected = (
        f"{tmp_path}/rte/validation.parquet: has no column 'sentence1' and none 'sentence2'; its columns are "
        "'premise', 'hypothesis', 'label'"
    )
    assert refused(load_raw_dataset, task, 0) == expected


def test_one_class_only_is_refused(tmp_path):
    task = own_task(tmp_path, TRAIN | {"label": [1] * 20}, TEST | {"label": [1] * 3})
    assert (
        refused(load_raw_dataset, task, 0)
        == f"{task.train}: every row has the same label, '1': there is nothing to learn"
    )


@pytest.mark.parametrize(("label", "advice"), [("2", ""), ("0.25", ". To predict numbers, set task.kind: regression")])
def test_a_class_of_one_row_is_refused_with_its_name_and_row(tmp_path, label, advice):
    labels = [*map(str, TRAIN["label"])]
    task = own_task(tmp_path, TRAIN | {"label": [*labels[:4], label, *labels[5:]]}, ending=".csv")
    assert refused(load_raw_dataset, task, 0) == (
        f"{task.train}: row 5: class '{label}' has this row only, and two are needed, one for train and one for "
        f"validation{advice}"
    )


def test_too_few_rows_are_refused(tmp_path):
    task = own_task(tmp_path, TEST, TEST, kind="regression")
    assert refused(load_raw_dataset, task, 0) == f"{task.train}: 3 rows are too few to split off 2 for validation"


def test_a_constant_target_is_refused(tmp_path):
    task = own_task(tmp_path, TRAIN | {"label": [0.5] * 20}, kind="regression")
    assert (
        refused(load_raw_dataset, task, 0)
        == f"{task.train}: every row has the same label, 0.5: there is nothing to learn"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300], ids=str)
def test_a_target_that_is_not_finite_in_float32_is_refused_with_its_row(tmp_path, value):
    task = own_task(tmp_path, TRAIN | {"label": [0.5, value, *map(float, range(18))]}, kind="regression")
    assert refused(load_raw_dataset, task, 0) == (
        f"{task.train}: row 2: 'label' is {value}; a regression needs numbers, such as 0.5"
    )


@pytest.mark.parametrize("value", ["five", True])
def test_a_target_that_is_no_number_is_refused_with_its_row(tmp_path, value):
    task = own_task(tmp_path, TRAIN | {"label": [value] * 20}, kind="regression")
    assert refused(load_raw_dataset, task, 0) == (
        f"{task.train}: row 1: 'label' is {value!r}; a regression needs numbers, such as 0.5"
    )


def test_an_unreachable_hub_is_answered_with_the_way_around_it():
    message = refused(load_raw_dataset, Task(name="glue/rte"), 0)
    assert message.startswith("task.name: glue/rte cannot be loaded from the hub (")
    assert message.endswith("set task.folder to a folder that holds rte/<split>.parquet")
    assert len(message.splitlines()) == 1


@given(
    texts=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=5), min_size=1, max_size=30),
    count=st.integers(1, 40),
    seed=st.integers(0, 99),
    typed=st.booleans(),
)
def test_a_sample_holds_whole_rows_in_their_order(texts, count, seed, typed):
    def unpacked(rows):
        ends = rows.offsets
        return [
            (rows.ids[a:b].tolist(), None if rows.types is None else rows.types[a:b].tolist(), int(label))
            for a, b, label in zip(ends, ends[1:], rows.labels, strict=False)
        ]

    ids = np.array([token for text in texts for token in text], np.int32)
    rows = TokenizedSplit(
        ids,
        (ids % 2).astype(np.int8) if typed else None,
        np.cumsum([0, *map(len, texts)]),
        np.arange(len(texts)),
    )
    found = unpacked(rows.sample(count, seed))
    assert len(found) == min(count, len(texts))
    assert [row for row in unpacked(rows) if row in found] == found
    assert unpacked(rows.sample(count, seed)) == found
