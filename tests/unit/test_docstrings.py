"""Docstrings: their lists of arguments and attributes name what is there, in its order."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from support.measures import Function, parameters
from support.paths import ROOT

MODULES = {path.relative_to(ROOT).as_posix(): path for path in sorted((ROOT / "raymask").rglob("*.py"))}


def listed(node: ast.AST, section: str) -> list[str] | None:
    """Names that a section of a docstring lists, None where there is no such section."""
    docstring = ast.get_docstring(node) or ""  # type: ignore[arg-type]
    found = re.search(rf"^{section}:\n((?: {{4}}.*\n?|\n)+)", docstring, re.MULTILINE)
    return re.findall(r"^ {4}(\*{0,2}\w+)(?: \([^)]*\))?:", found[1], re.MULTILINE) if found else None


def mistakes(tree: ast.Module) -> Iterator[str]:
    """What the docstrings of a module list and what is there, where these differ."""
    for node in ast.walk(tree):
        if isinstance(node, Function) and (names := listed(node, "Args")) is not None and names != parameters(node):
            yield f"{node.name}: Args are {', '.join(parameters(node))}, listed are {', '.join(names)}"
        elif isinstance(node, ast.ClassDef):
            yield from mistakes_of_class(node)


def mistakes_of_class(node: ast.ClassDef) -> Iterator[str]:
    init = [method for method in node.body if isinstance(method, Function) and method.name == "__init__"]
    arguments, attributes = listed(node, "Args"), listed(node, "Attributes")
    if arguments is not None and arguments != [name for method in init for name in parameters(method)]:
        yield f"{node.name}: Args are not those of __init__: {', '.join(arguments)}"
    fields = [
        field.target.id
        for field in node.body
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and "ClassVar" not in ast.unparse(field)
    ]
    if attributes is not None and fields and attributes != fields:
        yield f"{node.name}: Attributes are {', '.join(fields)}, listed are {', '.join(attributes)}"
    elif attributes is not None and (unknown := set(attributes) - set(fields) - assigned(node)):
        yield f"{node.name}: there is no attribute {', '.join(sorted(unknown))}"


def assigned(node: ast.ClassDef) -> set[str]:
    """Attributes that a class without fields has: assigned to `self`, or properties."""
    attributes = {
        inner.attr
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and ast.unparse(inner.value) == "self"
    }
    properties = {
        method.name
        for method in node.body
        if isinstance(method, Function) and any("property" in ast.unparse(name) for name in method.decorator_list)
    }
    return attributes | properties


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_list_what_is_there(name: str) -> None:
    assert list(mistakes(ast.parse(MODULES[name].read_text(encoding="utf-8")))) == []


def test_each_kind_of_mistake_is_found() -> None:
    code = '''
def f(a, *b, c):
    """F.

    Args:
        a: A.
            More: of it.
        c: C.
        *b: B.
    """

class Fields(Record):
    """Fields.

    Attributes:
        x (int): X.
        z: Z.
    """

    x: int
    y: ClassVar[int] = 1

class Assigned:
    """Assigned.

    Args:
        other: Other.

    Attributes:
        size: Size.
        width: Width.
        height: Height.
    """

    def __init__(self, name):
        self.size: int = 0

    @property
    def width(self): ...
'''
    assert list(mistakes(ast.parse(code))) == [
        "f: Args are a, *b, c, listed are a, c, *b",
        "Fields: Attributes are x, listed are x, z",
        "Assigned: Args are not those of __init__: other",
        "Assigned: there is no attribute height",
    ]
