"""Specs from YAML files and overrides."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from raymask.core.errors import UserError
from raymask.core.presets import PRESETS
from raymask.core.spec import Spec

SPEC_IS = "a spec is a mapping of keys to values, at least `model:` and `task:`"


RENAMED_KEYS = {
    "candidates.ratios": "candidates.sampling_ratios",
    "checkpointing": "gradient_checkpointing",
    "dense.shards": "dense.data_parallel",
    "early_eval.eval_every": "early_eval.eval_steps",
    "early_eval.last": "early_eval.score_window",
    "early_eval.rows": "early_eval.max_rows",
    "finetune.shards": "finetune.data_parallel",
    "probe": "early_eval",
    "task.report": "task.test",
    "task.select_rows": "task.validation_rows",
    "task.select_share": "task.validation_share",
    "workers.deadline": "workers.timeout",
    "workers.gang": "workers.fsdp",
    "workers.retries": "workers.max_retries",
    "workers.wait": "workers.scale_up_timeout",
}
"""Keys of specs from before 0.1.0, for messages. The release after next may drop this table."""


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> Spec:
    """Read a spec from a YAML file.

    Args:
        path: Path of the file.
        overrides: `section.key=value` each, with YAML values.

    Returns:
        The spec.

    Raises:
        UserError: The file cannot be read, or the spec has mistakes; the message lists them all.
    """
    return make_spec(load_data(path, overrides), source=" --set ".join([str(path), *overrides]))


def parse_spec(text: str, overrides: Sequence[str] = (), *, source: str = "spec") -> Spec:
    """Read a spec from YAML text, as `load_spec` does from a file; errors begin with `source`."""
    return make_spec(apply_overrides(parse_mapping(text, source, SPEC_IS), overrides), source=source)


def load_data(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML spec with its overrides as plain data, not validated. Raises UserError as `load_spec`."""
    return apply_overrides(load_mapping(path, SPEC_IS), overrides)


def load_mapping(path: str | Path, what: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        path: Path of the file.
        what: What the file should hold, for the error.

    Returns:
        The mapping.

    Raises:
        UserError: The file cannot be read, is not valid YAML, or holds no mapping.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; the repository's jobs/ has specs to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return parse_mapping(text, str(path), what)


def parse_mapping(text: str, source: str, what: str) -> dict[str, Any]:
    """Read a mapping from YAML text, as `load_mapping` does from a file; errors begin with `source`."""
    try:
        data = yaml.load(text, UniqueKeys)  # noqa: S506 - a SafeLoader that also refuses a key given twice
    except (yaml.YAMLError, ValueError) as error:  # a date that does not exist is a ValueError
        raise UserError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{source}: {what}")
    return data


def make_spec(data: Mapping[str, Any], *, source: str = "spec") -> Spec:
    """Validate plain data as a spec.

    Args:
        data: The spec's keys; numbers and arrays may be numpy's, and names and files `Path`s. A `preset` gives the
            values of keys that are not there.
        source: Where the data comes from, for the error.

    Returns:
        The spec.

    Raises:
        UserError: The spec has mistakes; the message lists them all.
    """
    keys: dict[str, Any] = to_plain(data)
    preset, mistakes = keys.pop("preset", None), []
    if isinstance(preset, str) and preset in PRESETS:
        keys = merge(PRESETS[preset], keys)
    elif preset is not None:
        mistakes.append(f"preset: there is no preset {preset!r}; known are {', '.join(PRESETS)}")
    try:
        spec = Spec.model_validate(keys)
    except ValidationError as error:
        mistakes += [format_error(mistake) for mistake in error.errors()]
    require_none(mistakes, source)
    return spec


def to_plain(value: Any) -> Any:
    """A value of a spec without numpy's types and paths: what YAML would hold in their place."""
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if hasattr(value, "tolist"):  # a number or an array of numpy's, which need not be imported for that
        return value.tolist()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def require_none(mistakes: Sequence[str], source: str) -> None:
    """Raise UserError that lists all mistakes, if there are any."""
    if mistakes:
        listed = f" {mistakes[0]}" if len(mistakes) == 1 else "".join(f"\n  - {mistake}" for mistake in mistakes)
        raise UserError(f"{source}:{listed}")


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply overrides to a spec's data.

    Args:
        data: The spec's keys.
        overrides: `section.key=value` each, with YAML values.

    Returns:
        A new mapping.

    Raises:
        UserError: An override is not valid.
    """
    result = dict(data)
    for override in overrides:
        path, equals, value = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise UserError(f"--set {override}: write it as key=value, for instance --set candidates.count=16")
        try:
            parsed = yaml.load(value, UniqueKeys)  # noqa: S506 - see above
        except (yaml.YAMLError, ValueError):
            raise UserError(f"--set {override}: the value is not valid YAML") from None
        set_nested(result, keys, parsed, f"--set {override}")
    return result


def apply_choices(data: Mapping[str, Any], choices: Mapping[str, Any]) -> dict[str, Any]:
    """Apply a trial's choices to a spec's data.

    Args:
        data: The spec's keys.
        choices: Values by dotted key, as in `--set`, or by section a mapping of its keys.

    Returns:
        A new mapping.

    Raises:
        UserError: A key lies under a value that has no keys.
    """
    result = dict(data)
    for key, value in choices.items():
        nested = isinstance(value, Mapping) and key != "levels"  # levels is set as a whole: its keys exclude each other
        for path, inner in [(f"{key}.{name}", inner) for name, inner in value.items()] if nested else [(key, value)]:
            set_nested(result, path.split("."), inner, path)
    return result


def set_nested(data: dict[str, Any], keys: Sequence[str], value: Any, source: str) -> None:
    """Set one key of nested mappings, in place. The mappings inside `data` are copied, not changed.

    Args:
        data: The outermost mapping.
        keys: The parts of the dotted key.
        value: Its value.
        source: What the error begins with.

    Raises:
        UserError: A part of the key holds a value that has no keys.
    """
    for depth, key in enumerate(keys[:-1]):
        inner = data.get(key)
        if isinstance(inner, str) and key in ("model", "task") and depth == 0:
            inner = {"name": inner}
        if not isinstance(inner, (dict, list, type(None))):
            raise UserError(f"{source}: {key} is {inner!r}, which has no keys")
        data[key] = dict(inner) if isinstance(inner, dict) else {}
        data = data[key]
    data[keys[-1]] = value


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two specs' data: a section's keys in `above` override one by one, any other value as a whole."""
    merged = dict(below)
    for key, value in above.items():
        value_below = merged.get(key)
        if key != "levels" and isinstance(value, Mapping) and isinstance(value_below, Mapping):
            value = {**value_below, **value}
        merged[key] = value
    return merged


def format_error(mistake: Any, of: type[BaseModel] = Spec) -> str:
    """Format one pydantic error as `key: what is wrong`, with the likely spelling of an unknown key.

    Args:
        mistake: One of `ValidationError.errors()`.
        of: The model that was validated.

    Returns:
        One line of text.
    """
    path = tuple(mistake["loc"])
    where = ".".join(str(part) for part in path)
    if mistake["type"] == "extra_forbidden":
        if where in RENAMED_KEYS:
            return f"{where}: there is no such key; it is called {RENAMED_KEYS[where]} now"
        known = sibling_keys(path, of)
        close = get_close_matches(str(path[-1]), known, n=1)
        return f"{where}: there is no such key; " + (
            f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
        )
    if mistake["type"] == "missing":
        return f"{where}: is missing"
    message = mistake["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if mistake["type"] == "model_type":
        message = f"has keys of its own, {', '.join(sibling_keys((*path, ''), of))}"
    given = mistake.get("input")
    shown = f" (it is {given!r})" if isinstance(given, (str, int, float, bool)) else ""
    return f"{where}: {message}{shown}" if where else message


def sibling_keys(path: Sequence[Any], section: type[BaseModel]) -> list[str]:
    """Known keys of the mapping, inside `section`, that `path` lies in; empty where it lies in no section."""
    for part in path[:-1]:
        inner = section.model_fields[part].annotation if part in section.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        section = inner
    return [*section.model_fields, *(["preset"] if section is Spec else [])]


MERGE = "tag:yaml.org,2002:merge"  # the key <<, which may be given twice


class UniqueKeys(yaml.SafeLoader):
    """A safe YAML loader that refuses a duplicate key, and reads 1e-4 as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping; raise ConstructorError for a key given twice."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # the base class refuses it
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
