"""Functions that a spec names: by their name in a table, or by import path."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from pkgutil import resolve_name
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., object])

IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""`module:function`, such as `my_package.samplers:gumbel`."""


def is_import_path(name: str) -> bool:
    """Whether a name is an import path, which no name in a table is."""
    return IMPORT_PATH.fullmatch(name) is not None


def get_function(table: Mapping[str, Function], name: str, kind: str) -> Function:
    """The function that a spec names.

    Args:
        table: Functions by name.
        name: A name in the table, or the import path of any other function.
        kind: What the function is, for the error.

    Returns:
        The function.

    Raises:
        ValueError: The table does not have the name, or the function cannot be imported.
    """
    if name in table:
        return table[name]
    if not is_import_path(name):
        raise ValueError(
            f"no {kind} is called {name!r}; known are {', '.join(table)}, and one of your own as module:function"
        )
    function: Function = import_function(name)
    return function


def import_function(path: str) -> Any:
    """Import a function from an installed module, or from one in the current folder.

    Args:
        path: The import path.

    Returns:
        The function.

    Raises:
        ValueError: The module cannot be imported, also not by workers, or has no such function.
    """
    module, _, function = path.partition(":")
    if module == "__main__":
        raise ValueError(f"workers cannot import '__main__': put {function!r} into a file of its own, and name that")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # of a command only the folder that it lies in is there
    try:
        found = resolve_name(path)
    except Exception as error:  # noqa: BLE001 - a module may raise anything while it is imported
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            reason = f"there is no module {error.name!r}, neither installed nor in the current folder"
        elif module in sys.modules and isinstance(error, AttributeError):
            reason = f"module {module!r} has no {function!r}"
        else:
            reason = f"importing {module!r} fails: {type(error).__name__}: {error}"
        raise ValueError(reason) from None
    if not callable(found):
        raise ValueError(f"{function!r} of module {module!r} is no function but {found!r}")
    return found
