"""Export of a finished run in one of several formats."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raymask.core.errors import UserError
from raymask.export.hf import write_hf
from raymask.export.masks import write_masks
from raymask.export.onnx import write_onnx
from raymask.export.selected import read_selected
from raymask.export.sparse import write_sparse
from raymask.runs.local_storage import LocalStorage
from raymask.runs.open import open_storage
from raymask.runs.run_dir import RunDir
from raymask.runs.storage import Storage, is_run_file
from raymask.version import __version__

MARK = "raymask.json"
"""A folder with this file is an export of raymask's, which a later export may replace."""
FORMATS: dict[str, Callable[..., list[str]]] = {
    "hf": write_hf,
    "sparse": write_sparse,
    "onnx": write_onnx,
    "masks": write_masks,
}
"""Writers by the name for `--to`: (selected, folder, *, options) -> lines about what was written and checked."""


def export_run(run: str | Path, to: str, out: str | Path | None = None, **options: Any) -> list[str]:
    """Write a finished run in another format.

    The folder appears complete or not at all; in an object store it appears file by file.

    Args:
        run: The run directory, a path or a URI.
        to: The format, a key of FORMATS.
        out: A local folder; None: `export-<to>` in the run directory.
        **options: Options of the format; the others keep their defaults.

    Returns:
        Lines to print.

    Raises:
        UserError: When there is no such format or option, the run is not finished, or the folder holds something else.
    """
    if to not in FORMATS:
        raise UserError(f"--to: unknown format {to!r}; known are {', '.join(FORMATS)}")
    require_known_options(options, to)
    run_dir = RunDir(run)
    storage, name = (open_storage(run, option="--out"), f"export-{to}") if out is None else local_folder(out)
    require_free(storage, name)
    selected = read_selected(run_dir)
    with storage.writing_folder(name) as folder:
        lines = FORMATS[to](selected, folder, **options)
        mark = {"format": to, **options, "raymask": __version__, "mask": selected.result.levels[-1].digest}
        (folder / MARK).write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")
    return [*lines, f"Everything is in {storage.at(name)}"]


def require_known_options(options: Mapping[str, Any], to: str) -> None:
    """Raise UserError for an option that the format does not have."""
    parameters = inspect.signature(FORMATS[to]).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            has = f"has only {', '.join(f'--{name}' for name in known)}" if known else "has no options"
            raise UserError(f"--{option}: --to {to} {has}")


def local_folder(out: str | Path) -> tuple[Storage, str]:
    """The storage of a local folder's parent, and the folder's name in it.

    Raises:
        UserError: When `out` is a URI, or a name that raymask reserves for itself.
    """
    if "://" in str(out):
        raise UserError(
            "--out: must be a local folder, not a URI. Without --out the export goes into the run directory"
        )
    path = Path(out).expanduser().absolute()
    if not is_run_file(path.name):  # the storage would not list its files
        raise UserError(f"--out: raymask reserves the name {path.name}: choose another")
    return LocalStorage(path.parent, "--out"), path.name


def require_free(storage: Storage, name: str) -> None:
    """Raise UserError when the folder exists and is not an export of raymask's."""
    exists = storage.has(name) or any(True for _ in storage.names(name))
    if exists and not storage.has(f"{name}/{MARK}"):
        raise UserError(
            f"{storage.at(name)}: exists already and is not an export of raymask: choose another with --out"
        )
