"""Columns of files and datasets, as plain values in the order of the rows.

Nothing is inferred: a CSV cell is the text that stands there. Only the columns that a task names are read.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import reprlib
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet

from raymask.core.errors import UserError, first_line

UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
MAX_LISTED = 10  # names in a message


@dataclass(frozen=True)
class Columns:
    """Some columns of one file or split.

    Attributes:
        where: Its name in messages.
        values: The values of all rows by column: str in a CSV file, elsewhere also int, float, bool, None and others.
        class_names: By column, the names of the numbers that a `datasets.ClassLabel` column holds.
    """

    where: str
    values: dict[str, list[Any]]
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)


def read_columns(path: Path, names: Sequence[str]) -> Columns:
    """Read columns of a file, or of a folder that `datasets.Dataset.save_to_disk` wrote.

    Args:
        path: The file; its ending gives the format.
        names: The columns to read.

    Raises:
        UserError: The file has another ending, cannot be read, has no rows, or lacks a column.
    """
    with readable(path):
        path.stat()
    if path.is_dir() and ending_of(path) not in READERS:
        columns = read_saved_dataset(path, names)
    else:
        reader = READERS.get(ending_of(path))
        if reader is None:
            raise UserError(f"{path}: the ending must be one of {', '.join(READERS)}; .txt goes with a causal-lm only")
        with readable(path):
            columns = reader(path, names)
    if not any(columns.values.values()):
        raise UserError(f"{path}: has no rows")
    return columns


def ending_of(path: Path) -> str:
    """The ending that gives a file's format, in lower case and without .gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the errors of reading a file, in the block, into a UserError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file{relative_to_cwd(path)}") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or "it is damaged, or another kind of file"
        raise UserError(f"{path}: cannot be read as {ending_of(path)[1:]}: {reason}") from None


def relative_to_cwd(path: Path) -> str:
    """The end of a message about a relative path: the directory it is relative to. Empty for an absolute path."""
    return "" if path.is_absolute() else f" (the path is relative to {Path.cwd()})"


@contextmanager
def open_text(path: Path, newline: str | None = "") -> Iterator[TextIO]:
    """Open a text file, compressed or not, for the block.

    UTF-16 is known by its mark. Everything else is read as UTF-8. Other bytes become lone surrogates, which
    `require_utf8` finds: so they matter only in what a task reads.

    Args:
        path: The file.
        newline: As of `open`; by default line ends stay as they are.
    """
    opener: Callable[..., Any] = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rb") as file:
        encoding = "utf-16" if file.peek(2).startswith(UTF_16_MARKS) else "utf-8-sig"
        yield io.TextIOWrapper(file, encoding, errors="surrogateescape", newline=newline)


def read_csv(path: Path, names: Sequence[str], delimiter: str = ",") -> Columns:
    """Read columns of a CSV file with a header. Arguments and errors as in `read_columns`."""
    columns = Columns(str(path), {name: [] for name in names})
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with open_text(path) as file:
            read_cells(csv.reader(file, delimiter=delimiter, strict=True), columns)
    finally:
        csv.field_size_limit(limit)
    return columns


def read_cells(lines: Iterator[list[str]], columns: Columns) -> None:
    """Append the cells of CSV lines, the header first, to the columns that have their names.

    Raises:
        UserError: A row has too many or too few cells, or a quotation mark is not closed.
    """
    row, lines = 0, filter(None, lines)  # a line without a cell is no row
    try:
        header = next(lines, None)
        if header is None:
            raise UserError(f"{columns.where}: has no rows")
        require_columns(header, [*columns.values], columns.where)
        targets = [(header.index(name), values) for name, values in columns.values.items()]
        for row, cells in enumerate(lines, 1):
            if len(cells) != len(header):
                raise UserError(f"{columns.where}: row {row}: has {len(cells)} cells, and the header has {len(header)}")
            for index, values in targets:
                values.append(cells[index])
    except csv.Error:
        raise UserError(
            f"{columns.where}: row {row + 1}: a quotation mark is not closed, or stands alone in a quoted cell, where "
            'it is written twice ("")'
        ) from None


def read_tsv(path: Path, names: Sequence[str]) -> Columns:
    """Read columns of a file with tabs between the cells. Arguments and errors as in `read_columns`."""
    return read_csv(path, names, delimiter="\t")


def read_json(path: Path, names: Sequence[str]) -> Columns:
    """Read columns of JSON lines, or of one array of objects. Arguments and errors as in `read_columns`."""
    columns, known = Columns(str(path), {name: [] for name in names}), dict[str, Any]()
    with open_text(path) as file:
        for row, record in enumerate(json_records(file, str(path)), 1):
            if not isinstance(record, dict):
                raise UserError(f"{path}: row {row}: is {reprlib.repr(record)}, and an object is wanted")
            for name, values in columns.values.items():
                values.append(record.get(name))
            known |= record
    if known:
        require_columns([*known], names, str(path))
    return columns


def json_records(file: TextIO, where: str) -> Iterator[Any]:
    """The values of JSON lines, or those of one array.

    Args:
        file: The file.
        where: Its name in messages.

    Raises:
        UserError: A line is not valid JSON, or the array is not.
    """
    lines = (line for line in file if line.strip())
    first = next(lines, "")
    if first.lstrip().startswith("["):
        try:
            yield from json.loads(first + "".join(lines))
        except ValueError as error:
            raise UserError(f"{where}: begins an array of objects and is not valid JSON: {first_line(error)}") from None
        return
    for row, line in enumerate(chain(filter(None, [first]), lines), 1):
        try:
            yield json.loads(line)
        except ValueError:
            raise UserError(
                f"{where}: row {row}: is not valid JSON: one object a line is wanted, or one array of objects"
            ) from None


def read_parquet(path: Path, names: Sequence[str]) -> Columns:
    """Read columns of a Parquet file, or of a folder of them. Arguments and errors as in `read_columns`."""
    # without a file system Arrow would take a name such as "a:b.parquet" for a URI, and folders for columns
    dataset = pyarrow.parquet.ParquetDataset(path, filesystem=pyarrow.fs.LocalFileSystem(), partitioning=None)
    require_columns(dataset.schema.names, names, str(path))
    return from_arrow(dataset.read(columns=list(names)), names, str(path))


READERS: dict[str, Callable[[Path, Sequence[str]], Columns]] = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".jsonl": read_json,
    ".json": read_json,
    ".parquet": read_parquet,
}


def read_saved_dataset(path: Path, names: Sequence[str]) -> Columns:
    """Read columns of a folder that `Dataset.save_to_disk` wrote. Arguments and errors as in `read_columns`."""
    import datasets

    splits = sorted(folder.name for folder in path.iterdir() if (folder / "state.json").is_file())
    if splits:
        raise UserError(f"{path}: holds the splits {', '.join(splits)}: name one of its folders, {path / splits[0]}")
    if not (path / "state.json").is_file():
        raise UserError(f"{path}: is a folder, and only one that `Dataset.save_to_disk` wrote can be read")
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # noqa: BLE001 - datasets and Arrow each raise their own errors
        raise UserError(f"{path}: cannot be read as a saved dataset: {first_line(error)}") from None
    return from_dataset(dataset, names, str(path))


def from_dataset(dataset: Any, names: Sequence[str], where: str) -> Columns:
    """Columns of a `datasets.Dataset`.

    Args:
        dataset: The dataset.
        names: The columns.
        where: Its name in messages.

    Raises:
        UserError: It lacks a column.
    """
    require_columns(dataset.column_names, names, where)
    table = dataset.select_columns(list(names)).with_format("arrow")[:]
    return from_arrow(table.replace_schema_metadata(dataset.features.arrow_schema.metadata), names, where)


def from_arrow(table: pa.Table, names: Sequence[str], where: str) -> Columns:
    """Columns of an Arrow table. Names of classes are read from the metadata that `datasets` writes."""
    features = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    class_names = {
        name: tuple(features[name]["names"])
        for name in names
        if isinstance(features.get(name), dict) and features[name].get("_type") == "ClassLabel"
    }
    return Columns(where, {name: plain_values(table[name]) for name in names}, class_names)


def plain_values(column: pa.ChunkedArray) -> list[Any]:
    """The values of an Arrow column; bytes of a text that are not UTF-8 become lone surrogates."""
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        values = column.cast(pa.large_binary()).to_pylist()
        return [value and value.decode(errors="surrogateescape") for value in values]


def require_columns(known: Sequence[str], names: Sequence[str], where: str) -> None:
    """Check that a table has all columns of `names`, each once.

    Args:
        known: The table's columns.
        names: The columns that it must have.
        where: The table's name in the message.

    Raises:
        UserError: Columns are missing, and the message lists them all; or a column occurs twice.
    """
    missing = [repr(name) for name in names if name not in known]
    if missing:
        raise UserError(f"{where}: has no column {' and none '.join(missing)}; its columns are {quoted(known)}")
    twice = next((name for name in names if known.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: has more than one column {twice!r}")


def quoted(names: Iterable[str]) -> str:
    """Names in quotes, as a list in a message; at most MAX_LISTED of them."""
    listed = [repr(name) for name in names]
    more = [f"and {len(listed) - MAX_LISTED} more"] if len(listed) > MAX_LISTED else []
    return ", ".join(listed[:MAX_LISTED] + more)


def text_column(columns: Columns, name: str) -> list[str]:
    """One column of texts.

    Raises:
        UserError: A value is no text, or not UTF-8.
    """
    for row, value in enumerate(columns.values[name], 1):
        if isinstance(value, str) and value.isascii():
            continue
        where = f"{columns.where}: row {row}: {name!r}"
        if not isinstance(value, str):
            problem = "is empty" if value is None else f"is {reprlib.repr(value)}, not text"
            raise UserError(f"{where} {problem}; task.text names the columns to read")
        require_utf8(value, where)
    return columns.values[name]


def require_utf8(text: str, where: str) -> None:
    """Raise UserError, which begins with `where`, when a text has lone surrogates: bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where} is not UTF-8: convert the file, for instance with iconv -f WINDOWS-1252 -t UTF-8"
        ) from None
