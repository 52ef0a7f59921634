"""Columns of files: the values that stand there, whatever the format, and what is wrong by file and row."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import given
from hypothesis import strategies as st
from support.builders import refused

from raymask.core.errors import UserError
from raymask.data.files import read_columns, require_utf8, text_column

WORDS = [
    "001",
    "1",
    "NA",
    "null",
    "",
    "1.10",
    "1e+05",
    "true",
    "two\nlines",
    'a "quote"',
    "a\r\nb",
    "naïve 漢字 🙂",
    " x ",
]
CONVERT = "is not UTF-8: convert the file, for instance with iconv -f WINDOWS-1252 -t UTF-8"


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    data = text.encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def csv_text(columns: dict[str, list[str]], delimiter: str = ",") -> str:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return file.getvalue()


def text_of(columns: dict[str, list[str]], ending: str) -> str:
    """The text of a file of this ending."""
    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return {
        "csv": csv_text(columns),
        "tsv": csv_text(columns, "\t"),
        "jsonl": "\n".join(map(json.dumps, records)),
        "json": json.dumps(records, indent=1),
    }[ending.split(".")[1]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".json", ".csv.gz", ".tsv.gz", ".jsonl.gz", ".json.gz"])
def test_every_cell_is_what_stands_there(tmp_path: Path, ending: str, encoding: str) -> None:
    path = write(tmp_path / f"rows{ending}", text_of({"id": WORDS, "text": WORDS[::-1]}, ending), encoding)
    assert read_columns(path, ("text", "id")).values == {"text": WORDS[::-1], "id": WORDS}


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), min_size=1), st.booleans())
def test_a_csv_file_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, cells: list[str], two: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    columns = {"text": cells} | ({"more": cells[::-1]} if two else {})
    write(path, csv_text(columns))
    assert read_columns(path, [*columns]).values == columns


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".json"])
def test_a_row_may_be_longer_than_any_block(tmp_path: Path, ending: str) -> None:
    texts = ["short", "good\nfood " * 300_000, "short"]
    path = write(tmp_path / f"rows{ending}", text_of({"text": texts}, ending))
    assert read_columns(path, ("text",)).values["text"] == texts


def test_a_line_end_in_a_cell_is_no_row_s_end_however_large_the_file(tmp_path: Path) -> None:
    texts = [f"{row}\n\n{'many words ' * 5}" for row in range(20_000)]
    path = write(tmp_path / "rows.csv", "\n" + csv_text({"text": texts}))  # an empty line is no row, nor a header
    assert path.stat().st_size > 2**20
    assert read_columns(path, ("text",)).values["text"] == texts


def test_a_column_that_no_one_asked_for_may_hold_anything(tmp_path: Path) -> None:
    """Other types from row to row, and bytes that are no text."""
    rows = [{"text": str(row), "id": row if row < 9 else f"x{row}"} for row in range(12)]
    path = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    assert read_columns(path, ("text",)).values["text"] == [*map(str, range(12))]
    (tmp_path / "rows.csv").write_bytes("text,town\nok,Z\xfcrich\n".encode("latin-1"))
    assert text_column(read_columns(tmp_path / "rows.csv", ("text",)), "text") == ["ok"]


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_other_encodings_are_refused_with_the_row_and_how_to_convert(tmp_path: Path, ending: str) -> None:
    text = "text\none\ncafé\n" if ending == ".csv" else '{"text": "one"}\n{"text": "café"}\n'
    path = write(tmp_path / f"rows{ending}", text, "latin-1")
    assert refused(text_column, read_columns(path, ("text",)), "text") == f"{path}: row 2: 'text' {CONVERT}"


def test_bytes_of_parquet_that_are_no_text_are_refused_with_the_row(tmp_path: Path) -> None:
    cells = pa.array([b"one", b"caf\xe9"], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 2, cells.buffers())
    pyarrow.parquet.write_table(pa.table({"text": strings}), tmp_path / "rows.parquet")
    columns = read_columns(tmp_path / "rows.parquet", ("text",))
    assert refused(text_column, columns, "text") == f"{tmp_path / 'rows.parquet'}: row 2: 'text' {CONVERT}"


def test_half_a_character_of_json_is_refused() -> None:
    assert refused(require_utf8, json.loads(r'"\ud83d"'), "a.jsonl: row 1") == f"a.jsonl: row 1 {CONVERT}"


def test_the_row_of_a_value_that_is_no_text_is_counted_from_one(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "\n".join(json.dumps({"text": 5 if row == 40 else "a"}) for row in range(60)))
    said = f"{path}: row 41: 'text' is 5, not text; task.text names the columns to read"
    assert refused(text_column, read_columns(path, ("text",)), "text") == said


def test_a_key_that_a_row_lacks_is_an_empty_cell_and_one_that_all_lack_no_column(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"text": "a"}\n\n{"other": 1, "text": null}\n{"other": 2}\n')
    assert read_columns(path, ("text", "other")).values == {"text": ["a", None, None], "other": [None, 1, 2]}
    said = f"{path}: has no column ' text'; its columns are 'text', 'other'"
    assert refused(read_columns, path, (" text",)) == said


@pytest.mark.parametrize(
    "kind",
    [
        pa.dictionary(pa.int32(), pa.string()),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
    ids=str,
)
def test_every_way_to_store_strings_in_parquet_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"a.b": pa.array(["x", "y", None, "x"]).cast(kind), "more": [1.5] * 4})
    (tmp_path / "label=1").mkdir()
    path = tmp_path / "label=1" / "s3:#1 é?.parquet"  # no part of the path is a column, or a URI's
    pyarrow.parquet.write_table(table, path)
    assert read_columns(path, ("a.b",)).values == {"a.b": ["x", "y", None, "x"]}
    assert "its columns are 'a.b', 'more'" in refused(read_columns, path, ("label",))


def test_a_folder_of_parquet_files_is_one_table(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").mkdir()
    for part in ("b", "a"):
        pyarrow.parquet.write_table(pa.table({"text": [part, "x"]}), tmp_path / "rows.parquet" / f"part-{part}.parquet")
    assert read_columns(tmp_path / "rows.parquet", ("text",)).values["text"] == ["a", "x", "b", "x"]


@pytest.fixture
def saved() -> Dataset:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["spam", "ham"])})
    dataset = Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 1]}, features)
    return dataset.select([2, 0])


def test_a_saved_dataset_and_its_parquet_file_say_what_their_numbers_mean(tmp_path: Path, saved: Dataset) -> None:
    saved.save_to_disk(tmp_path / "folder")
    saved.to_parquet(tmp_path / "rows.parquet")
    for path in (tmp_path / "folder", tmp_path / "rows.parquet"):
        columns = read_columns(path, ("text", "label"))
        assert columns.values == {"text": ["c", "a"], "label": [1, 0]}
        assert columns.class_names == {"label": ("spam", "ham")}


def test_folders_that_are_no_dataset_or_several_are_refused_with_what_to_name(tmp_path: Path, saved: Dataset) -> None:
    DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "all")
    said = f"{tmp_path}/all: holds the splits test, train: name one of its folders, {tmp_path}/all/test"
    assert refused(read_columns, tmp_path / "all", ("text",)) == said
    said = f"{tmp_path}: is a folder, and only one that `Dataset.save_to_disk` wrote can be read"
    assert refused(read_columns, tmp_path, ("text",)) == said
    (tmp_path / "all" / "train" / "dataset_info.json").unlink()
    assert "all/train: cannot be read as a saved dataset: " in refused(read_columns, tmp_path / "all/train", ("text",))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "has no rows"),
        (b"text\none\n", "cannot be read as csv: it is damaged, or another kind of file"),
        (
            gzip.compress(b"text\n" + b"one\n" * 99)[:-9],
            "cannot be read as csv: it is damaged, or another kind of file",
        ),
    ],
    ids=["empty", "plain", "cut"],
)
def test_a_damaged_gz_file_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(data)
    assert refused(read_columns, path, ("text",)) == f"{path}: {reason}"


PIECES = [
    b"text",
    b"label",
    b"a",
    b"1",
    b",",
    b"\t",
    b"\n",
    b"\r",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b" ",
    b"\xff\xfe",
    b"\xe9",
    b"\0",
]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".json", ".parquet", ".csv.gz"])
@given(st.lists(st.sampled_from(PIECES), max_size=12))
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, ending: str, pieces: list[bytes]
) -> None:
    path = tmp_path_factory.getbasetemp() / f"bytes{ending}"
    path.write_bytes(gzip.compress(b"".join(pieces)) if ending.endswith(".gz") else b"".join(pieces))
    try:
        columns = read_columns(path, ("text",))
        texts, said = text_column(columns, "text"), ""
    except UserError as error:
        texts, said = [], str(error)
    assert texts or said.startswith(f"{path}: ")


def test_a_long_list_of_columns_is_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", ",".join("abcdefghijkl") + "\n")
    assert refused(read_columns, path, ("text",)).endswith("'h', 'i', 'j', and 2 more")
