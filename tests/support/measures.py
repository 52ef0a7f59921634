"""Measures of the code, with their limits: `make measures` prints them and exits with 1 when one is broken."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_SEARCH_LINES = 220  # of driver/search.py, which is read first
MAX_LINES = 45  # of a function, without its docstring
MAX_PARAMETERS = 8  # of a function; `self` and `cls` are not counted
PUBLIC_API = "api.py"  # its functions may have more parameters: people give them by name
COMMANDS = "cli.py"  # its functions are named as the commands are
SAME_THING = ("search", "draw_mask")  # names that the public API passes on to a function of the same name

Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> None:
    root = Path(__file__).resolve().parents[2] / "raymask"
    modules = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in root.rglob("*.py")}
    broken = measures(dict(sorted(modules.items())))
    for line in broken:
        print(line)
    print(f"{len(broken)} limits broken" if broken else "no limit is broken")
    sys.exit(bool(broken))


def measures(modules: dict[str, str]) -> list[str]:
    """A line for each limit that is broken, from the source of the modules by path."""
    trees = {path: ast.parse(source) for path, source in modules.items()}
    broken = [line for path, tree in trees.items() for line in long_functions(path, tree)]
    num_lines = len(modules.get("driver/search.py", "").splitlines())
    if num_lines > MAX_SEARCH_LINES:
        broken.insert(0, f"driver/search.py: {num_lines} lines, at most {MAX_SEARCH_LINES}")
    return [*broken, *duplicate_names(trees)]


def long_functions(path: str, tree: ast.Module) -> Iterator[str]:
    """Functions with too many lines or parameters."""
    for node in ast.walk(tree):
        if isinstance(node, Function):
            num_lines, num_parameters = lines(node), len(parameters(node))
            if num_lines > MAX_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {num_lines} lines, at most {MAX_LINES}"
            if num_parameters > MAX_PARAMETERS and path != PUBLIC_API:
                yield f"{path}:{node.lineno}: {node.name} has {num_parameters} parameters, at most {MAX_PARAMETERS}"


def lines(function: Function) -> int:
    """Lines of a function without its docstring."""
    first = function.body[0]
    docstring = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(function) is not None else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def parameters(function: Function) -> list[str]:
    """Parameters of a function as a docstring names them, without `self` and `cls`."""
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [argument.arg for argument in arguments.kwonlyargs]
    names += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return [name for name in names if name not in ("self", "cls")]


def duplicate_names(trees: dict[str, ast.Module]) -> list[str]:
    """Public names that two modules define."""
    places: dict[str, list[str]] = {}
    for path, tree in trees.items():
        for name in sorted(public_names(tree)) if path != COMMANDS else ():
            places.setdefault(name, []).append(path)
    return [
        f"{name} is defined in {', '.join(paths)}"
        for name, paths in sorted(places.items())
        if len(paths) > 1 and name not in SAME_THING
    ]


def public_names(tree: ast.Module) -> set[str]:
    """Names that a module defines at its top level, imports and names with an underscore left out."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name for name in names if not name.startswith("_")}


if __name__ == "__main__":
    main()
