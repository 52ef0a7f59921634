"""Keys that had another name before 0.1.0."""

from __future__ import annotations

from typing import Any

import pytest
from support.builders import refused

from raymask.config import RENAMED_KEYS, make_spec, set_nested
from raymask.core.spec import Spec


@pytest.mark.parametrize("old", RENAMED_KEYS)
def test_an_old_key_is_refused_with_its_new_name(old: str) -> None:
    data: dict[str, Any] = {"model": "m", "task": {"name": "glue/mrpc"}}
    set_nested(data, old.split("."), 1, old)
    assert f"{old}: there is no such key; it is called {RENAMED_KEYS[old]} now" in refused(make_spec, data)


@pytest.mark.parametrize("new", RENAMED_KEYS.values())
def test_every_new_name_is_a_key(new: str) -> None:
    section: Any = Spec
    for part in new.split("."):
        assert part in section.model_fields, new
        section = section.model_fields[part].annotation
