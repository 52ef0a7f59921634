"""Tables read from CSV, JSON lines and Parquet files, and checks of their columns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from raymask.core.errors import UserError, first_line

READERS = {
    ".csv": pyarrow.csv.read_csv,
    ".jsonl": pyarrow.json.read_json,
    ".json": pyarrow.json.read_json,
    ".parquet": pyarrow.parquet.read_table,
}


def read_file(path: Path, types: dict[str, pa.DataType] | None = None) -> pa.Table:
    """Read a CSV, JSON lines or Parquet file.

    Args:
        path: The file; its ending gives the format.
        types: Column types of a CSV file by name. A type that is not given is inferred from the values.

    Raises:
        UserError: The file has another ending, cannot be read, or has no rows.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: the ending must be one of {', '.join(READERS)}")
    if types and reader is pyarrow.csv.read_csv:
        reader = partial(reader, convert_options=pyarrow.csv.ConvertOptions(column_types=types))
    try:
        table = reader(path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file{relative_to_cwd(path)}") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as {path.suffix[1:]}: {first_line(error)}") from None
    if table.num_rows == 0:
        raise UserError(f"{path}: has no rows")
    return table


def relative_to_cwd(path: Path) -> str:
    """The end of a message about a relative path: the directory it is relative to. Empty for an absolute path."""
    return "" if path.is_absolute() else f" (the path is relative to {Path.cwd()})"


def require_columns(table: pa.Table, names: Sequence[str], where: str) -> None:
    """Check that a table has all columns of `names`.

    Args:
        table: The table.
        names: The columns that it must have.
        where: The table's name in the message.

    Raises:
        UserError: Columns are missing; the message lists all of them.
    """
    missing = [repr(name) for name in names if name not in table.column_names]
    if missing:
        raise UserError(
            f"{where}: has no column {' and none '.join(missing)}; its columns are {', '.join(table.column_names)}"
        )


def column(table: pa.Table, name: str, where: str) -> pa.ChunkedArray:
    """One column without nulls; `where` is the table's name in messages.

    Raises:
        UserError: The column is missing, occurs twice, or has a null.
    """
    require_columns(table, (name,), where)
    if table.column_names.count(name) > 1:
        raise UserError(f"{where}: has more than one column {name!r}")
    values = table[name]
    if values.null_count:
        row = int(pc.index(pc.is_null(values), True).as_py())
        raise UserError(f"{where}: row {row + 1}: {name} is empty")
    return values


def text_column(table: pa.Table, name: str, where: str) -> list[str]:
    """One column of texts; `where` is the table's name in messages.

    Raises:
        UserError: The column holds something else, or `column` refuses it.
    """
    values = column(table, name, where)
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise UserError(f"{where}: {name} holds {values.type}, not text; task.text names the columns to read")
    return values.to_pylist()  # type: ignore[no-any-return]
