"""Unit tests start neither a process nor Ray: those that do lie in tests/processes, tests/cli or tests/ray."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import NoReturn

import pytest

from raymask.core import stats


@pytest.fixture(autouse=True)
def _nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> NoReturn:
        pytest.fail(f"a unit test starts a process or Ray: {arguments[1:]}")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    if "ray" in sys.modules:
        monkeypatch.setattr(sys.modules["ray"], "init", refuse)


@pytest.fixture(scope="module")
def few_resamples() -> Iterator[None]:
    """Fewer bootstrap resamples, enough where no interval's width matters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "RESAMPLES", 50)
        yield
