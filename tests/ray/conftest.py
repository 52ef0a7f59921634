"""The private Ray that the test files of this folder share, which ends before any other file's tests."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack

import pytest
import ray
from support.callbacks import private_ray

RUNNING = ExitStack()


@pytest.fixture(scope="module")
def one_cpu() -> None:
    """A private Ray with one CPU, on which two workers with half a CPU each find room."""
    if not ray.is_initialized():
        RUNNING.enter_context(private_ray())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None]:
    yield
    if nextitem is None or nextitem.path.parent != item.path.parent:
        RUNNING.close()
