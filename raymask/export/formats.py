"""In which forms can a finished search be had, and where do they go?"""

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
from raymask.storage import Folder, Storage, counts
from raymask.store import RunDir
from raymask.version import __version__

MARK = "raymask.json"
"""A folder with this file is an export, which another one may replace."""
FORMATS: dict[str, Callable[..., list[str]]] = {
    "hf": write_hf,
    "sparse": write_sparse,
    "onnx": write_onnx,
    "masks": write_masks,
}
"""By their names for --to: (selected, folder, *, options of its own) -> lines that say what was written and checked."""


def export_run(run: str | Path, to: str, out: str | Path | None = None, **options: Any) -> list[str]:
    """Write a finished run in the format `to` into the folder `out`, else `export-<to>` of the run; lines to print.

    It appears whole or not at all, in an object store file by file. `options`: those of the format, as far as given.
    Raises UserError when there is no such format or option, the run is not finished, or something else is in the place.
    """
    if to not in FORMATS:
        raise UserError(f"--to: no format is called {to!r}; known are {', '.join(FORMATS)}")
    require_known(options, to)
    store = RunDir(run)
    storage, name = (store.storage, f"export-{to}") if out is None else outside(out)
    require_free(storage, name)
    selected = read_selected(store)
    with storage.writing_folder(name) as folder:
        lines = FORMATS[to](selected, folder, **options)
        mark = {"format": to, **options, "raymask": __version__, "mask": selected.result.levels[-1].digest}
        (folder / MARK).write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")
    return [*lines, f"All of it is in {storage.at(name)}"]


def require_known(options: Mapping[str, Any], to: str) -> None:
    """Raise UserError when a format has no such option."""
    parameters = inspect.signature(FORMATS[to]).parameters.values()
    known = [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            has = f"has only {', '.join(f'--{name}' for name in known)}" if known else "has no options"
            raise UserError(f"--{option}: --to {to} {has}")


def outside(out: str | Path) -> tuple[Storage, str]:
    """A local folder as a name in the storage that it lies in. Raises UserError for a URI."""
    if "://" in str(out):
        raise UserError("--out: takes a local folder, no URI. Without --out it goes where the run is")
    path = Path(out).expanduser().absolute()
    if not counts(path.name):  # what is in it would go unseen
        raise UserError(f"--out: {path.name} is a name that raymask keeps to itself: choose another")
    return Folder(path.parent, "--out"), path.name


def require_free(storage: Storage, name: str) -> None:
    """Raise UserError when something that is no export of ours is in the place."""
    there = storage.has(name) or any(True for _ in storage.names(name))
    if there and not storage.has(f"{name}/{MARK}"):
        raise UserError(f"{storage.at(name)}: is there already, and no export of raymask's: choose another with --out")
