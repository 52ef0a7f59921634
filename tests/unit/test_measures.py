"""Measures of the code: each broken limit has a line, and what keeps to it has none."""

from __future__ import annotations

from support.measures import MAX_LINES, MAX_PARAMETERS, MAX_SEARCH_LINES, measures


def function(name: str, lines: int, parameters: int = 0) -> str:
    """The source of a function, with a docstring of two lines that does not count."""
    names = ", ".join(f"p{index}" for index in range(parameters))
    return f'def {name}({names}):\n    """One.\n    Two."""\n' + "    pass\n" * (lines - 1)


def test_a_search_module_and_functions_that_are_too_long_are_named() -> None:
    assert measures({"driver/search.py": "\n" * MAX_SEARCH_LINES, "a.py": function("f", MAX_LINES)}) == []
    long = {"a.py": function("f", MAX_LINES + 1), "driver/search.py": "\n" * (MAX_SEARCH_LINES + 1)}
    assert measures(long) == [
        "driver/search.py: 221 lines, at most 220",
        "a.py:1: f has 46 lines, at most 45",
    ]


def test_functions_with_too_many_parameters_are_named_outside_of_the_public_api() -> None:
    assert measures({"a.py": function("f", 2, MAX_PARAMETERS)}) == []
    assert measures({"api.py": function("f", 2, MAX_PARAMETERS + 1)}) == []
    method = "class C:\n    async def f(self, a, b, *c, d, e, f, g, h, **i): ...\n"
    assert measures({"a.py": method}) == ["a.py:2: f has 9 parameters, at most 8"]


def test_a_public_name_of_two_modules_is_named() -> None:
    both = {"a.py": "X = Y = 1\n_private = 2\ndef f(): ...\n", "b/c.py": "X: int = 2\n_private = 3\nimport Y\n"}
    assert measures(both | {"d.py": "class f: ...\n"}) == ["X is defined in a.py, b/c.py", "f is defined in a.py, d.py"]
    assert measures({"a.py": "def search(): ...\n", "cli.py": "X = 1\n", "b.py": "X = search = 1\n"}) == []
