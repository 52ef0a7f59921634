"""Imports: what is loaded when, as only a new interpreter can show."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.cli import write_search

CODE = """
import sys
from contextlib import contextmanager

def loaded(*names):
    return {name.split(".")[0] for name in sys.modules} & set(names)

@contextmanager
def checked(name):
    try:
        yield
    except Exception as error:
        print(f"{name}: {error!r}", file=sys.stderr)
    else:
        print(name)

with checked("package"):
    import raymask
    assert not loaded("torch", "ray"), loaded("torch", "ray")
with checked("pieces"):
    from torch import nn
    raymask.draw_mask(nn.Sequential(nn.Linear(4, 4)), 0.5, include=["*"])
    assert not loaded("ray")
with checked("workers"):
    from raymask.executor import local_executor
    assert not loaded("ray")
with checked("search"):
    from raymask.config import load_spec
    result = raymask.search(load_spec(sys.argv[1]), sys.argv[2], in_process=True)
    assert all(level.num_evaluated == 3 for level in result.levels), result.levels
    assert not loaded("ray")
"""


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """One interpreter that checks after every step what is loaded; it prints the names of what holds."""
    folder = tmp_path_factory.mktemp("imports")
    words = [sys.executable, "-c", CODE, str(write_search(folder)), str(folder / "run")]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=250)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("package", id="the package alone loads no torch"),
        pytest.param("pieces", id="the pieces load no Ray"),
        pytest.param("workers", id="workers in one process load no Ray"),
        pytest.param("search", id="a search in one process loads no Ray"),
    ],
)
def test_nothing_is_loaded_before_it_is_needed(held: subprocess.CompletedProcess[str], name: str) -> None:
    assert name in held.stdout.splitlines(), held.stderr
