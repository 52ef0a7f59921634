"""Runs of searches by fakes, with their reports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.fakes import Fakes, Killed, setup_of

from raymask.driver.result import build_result
from raymask.runs.run_dir import RunDir

TREE = {"levels": [0.5, 0.6, 0.7], "select": {"keep": 2, "beam": True}, "early_eval": {"rungs": [0.5, 1.0]}}


def run_of(path: Path, lives: int | None = None, **changes: Any) -> RunDir:
    """A search by fakes, whole or killed after so many pieces of work."""
    search_setup, store = setup_of(**changes), RunDir(path)
    scores = (0.1, 0.2, None, 0.3) if "select" not in changes else tuple(0.1 + index / 100 for index in range(8))
    fakes = Fakes(search_setup, scores=scores, **({} if lives is None else {"lives": lives}))
    store.write_spec(search_setup.recipe.spec)
    if lives is None:
        fakes.run(store)
        build_result(search_setup, store, 61.0)
    else:
        with pytest.raises(Killed):
            fakes.run(store)
    return store


def text_of(store: RunDir, name: str) -> str:
    return store.storage.read(name).decode()


def embedded(html: str) -> list[Any]:
    """The plots that a page draws."""
    found = re.search(r"^const plots = (.*);$", html, re.MULTILINE)
    assert found
    return list(json.loads(found[1]))
