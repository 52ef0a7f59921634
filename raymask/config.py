"""How does a YAML file, with overrides, become a Spec?"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from raymask.core.errors import UserError
from raymask.core.spec import PRESETS, Spec

SPEC_IS = "a spec is a mapping of keys to values, at least `model:` and `task:`"


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> Spec:
    """Read a YAML spec; `overrides` are `section.key=value` with YAML values. Raises UserError, naming all mistakes."""
    return make_spec(load_data(path, overrides), source=" --set ".join([str(path), *overrides]))


def parse_spec(text: str, overrides: Sequence[str] = (), *, source: str = "spec") -> Spec:
    """The same from a YAML text."""
    return make_spec(overridden(parse_mapping(text, source, SPEC_IS), overrides), source=source)


def load_data(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a YAML spec and its overrides say, still to be checked."""
    return overridden(load_mapping(path, SPEC_IS), overrides)


def load_mapping(path: str | Path, what: str) -> dict[str, Any]:
    """A YAML file's mapping; `what` says in an error what it should be. Raises UserError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; the repository's jobs/ has specs to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return parse_mapping(text, str(path), what)


def parse_mapping(text: str, source: str, what: str) -> dict[str, Any]:
    """The same from a text."""
    try:
        data = yaml.load(text, UniqueKeys)  # noqa: S506 - a SafeLoader that also refuses a key given twice
    except (yaml.YAMLError, ValueError) as error:  # a date that does not exist is a ValueError
        raise UserError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{source}: {what}")
    return data


def make_spec(data: Mapping[str, Any], *, source: str = "spec") -> Spec:
    """A Spec from plain data, its `preset` underneath. Raises UserError that lists every mistake at once."""
    data, mistakes = dict(data), []
    preset = data.pop("preset", None)
    if isinstance(preset, str) and preset in PRESETS:
        data = merge(PRESETS[preset], data)
    elif preset is not None:
        mistakes.append(f"preset: there is no preset {preset!r}; known are {', '.join(PRESETS)}")
    try:
        spec = Spec.model_validate(data)
    except ValidationError as error:
        mistakes += [describe(mistake) for mistake in error.errors()]
    require_none(mistakes, source)
    return spec


def require_none(mistakes: Sequence[str], source: str) -> None:
    """Raise UserError that lists them all."""
    if mistakes:
        listed = f" {mistakes[0]}" if len(mistakes) == 1 else "".join(f"\n  - {mistake}" for mistake in mistakes)
        raise UserError(f"{source}:{listed}")


def overridden(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`data` with each `section.key=value` over it."""
    found = dict(data)
    for override in overrides:
        path, equals, value = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise UserError(f"--set {override}: write it as key=value, for instance --set candidates.count=16")
        try:
            parsed = yaml.load(value, UniqueKeys)  # noqa: S506 - see above
        except (yaml.YAMLError, ValueError):
            raise UserError(f"--set {override}: the value is not valid YAML") from None
        put(found, keys, parsed, f"--set {override}")
    return found


def varied(data: Mapping[str, Any], choices: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with a trial's choices over it, each under a dotted key as in `--set`, or in its section's mapping."""
    found = dict(data)
    for key, value in choices.items():
        nested = isinstance(value, Mapping) and key != "levels"  # whose keys go together
        for path, inner in [(f"{key}.{name}", inner) for name, inner in value.items()] if nested else [(key, value)]:
            put(found, path.split("."), inner, path)
    return found


def put(data: dict[str, Any], keys: Sequence[str], value: Any, said: str) -> None:
    """Set a key, given as its parts; an error begins with what was `said`."""
    for depth, key in enumerate(keys[:-1]):
        inner = data.get(key)
        if isinstance(inner, str) and key in ("model", "task") and depth == 0:
            inner = {"name": inner}
        if not isinstance(inner, (dict, list, type(None))):
            raise UserError(f"{said}: {key} is {inner!r}, which has no keys")
        data[key] = dict(inner) if isinstance(inner, dict) else {}
        data = data[key]
    data[keys[-1]] = value


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two levels deep: a section's keys in `above` win one by one, anything else wins whole."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        if key != "levels" and isinstance(value, Mapping) and isinstance(under, Mapping):
            value = {**under, **value}
        merged[key] = value
    return merged


def describe(mistake: Any, of: type[BaseModel] = Spec) -> str:
    """One pydantic error as `key: what is wrong`, with the likely spelling for an unknown key."""
    path = tuple(mistake["loc"])
    where = ".".join(str(part) for part in path)
    if mistake["type"] == "extra_forbidden":
        known = keys_beside(path, of)
        close = get_close_matches(str(path[-1]), known, n=1)
        return f"{where}: there is no such key; " + (
            f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
        )
    if mistake["type"] == "missing":
        return f"{where}: is missing"
    message = mistake["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    given = mistake.get("input")
    shown = f" (it is {given!r})" if isinstance(given, (str, int, float, bool)) else ""
    return f"{where}: {message}{shown}" if where else message


def keys_beside(path: Sequence[Any], section: type[BaseModel]) -> list[str]:
    """The keys that the section of `path`, inside this one, knows."""
    for part in path[:-1]:
        inner = section.model_fields[part].annotation if part in section.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        section = inner
    return [*section.model_fields, *(["preset"] if section is Spec else [])]


MERGE = "tag:yaml.org,2002:merge"


class UniqueKeys(yaml.SafeLoader):
    """A safe YAML loader that refuses a key given twice, and reads 1e-4 as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # the loader itself refuses it
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"),
    list("-+.0123456789"),
)
