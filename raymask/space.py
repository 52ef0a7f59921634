"""What may vary between the trials of a tuning? A YAML file says it, key by key.

candidates.exponent: {uniform: [2, 10]}                  any number in between
finetune.learning_rate: {loguniform: [1e-5, 1e-3]}       the same, every power of ten as likely as another
candidates.count: {randint: [4, 16]}                     a whole number, both ends included
candidates.ratios: {choice: [[0.005], [0.005, 0.02]]}    one of these
probe.score: {grid: [loss, metric]}                      each of these, with every sample of the others
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from raymask.config import describe, load_mapping, make_spec, require_none, varied
from raymask.core.errors import UserError
from raymask.core.spec import Section

Number = Annotated[float, Field(strict=True)]
Whole = Annotated[int, Field(strict=True)]
Values = Annotated[list[Any], Field(min_length=1)]


class Way(Section):
    """How one key varies: exactly one of these."""

    uniform: tuple[Number, Number] | None = None
    loguniform: tuple[Number, Number] | None = None
    randint: tuple[Whole, Whole] | None = None
    choice: Values | None = None
    grid: Values | None = None

    @model_validator(mode="after")
    def one_way(self) -> Way:
        if len(self.model_fields_set) != 1:
            raise ValueError(f"give one of {', '.join(type(self).model_fields)}")
        for name in ("uniform", "loguniform", "randint"):
            ends = getattr(self, name)
            if ends and ends[0] >= ends[1]:
                raise ValueError(f"{name}: the first number must be below the second, not {list(ends)}")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform: both numbers must be above 0, not {list(self.loguniform)}")
        return self

    @property
    def values(self) -> list[Any]:
        """All values of a list, the ends of a range: what lies in between is as good as they are."""
        return list(self.choice or self.grid or self.uniform or self.loguniform or self.randint or ())


Space = dict[str, Way]
"""Ways by dotted spec key."""


def load_space(path: str | Path, data: Mapping[str, Any]) -> Space:
    """Read a space for the spec that `data` says. Raises UserError, naming all mistakes in keys and in values."""
    found: Space = {}
    mistakes = []
    for key, way in load_mapping(path, "a space is a mapping of spec keys to how they vary").items():
        if not isinstance(way, dict):
            mistakes.append(f"{key}: say how it varies, for instance {{choice: [1, 2]}} or {{uniform: [2, 10]}}")
            continue
        try:
            found[str(key)] = Way.model_validate(way)
        except ValidationError as error:
            mistakes += [f"{key}: {describe(mistake, Way)}" for mistake in error.errors()]
    for key, valid in found.items():
        for value in valid.values:
            mistake = refusal(data, {key: value}, key if isinstance(value, Mapping) else f"{key}={value}")
            if mistake:
                mistakes.append(mistake)
                break
    require_none(mistakes, str(path))
    if not found:
        raise UserError(f"{path}: nothing varies: give at least one spec key, such as candidates.exponent")
    together = refusal(data, {key: way.values[0] for key, way in found.items()}, "the first values, taken together")
    require_none([together] if together else [], str(path))
    return found


def refusal(data: Mapping[str, Any], choices: Mapping[str, Any], source: str) -> str | None:
    """What is wrong with a spec that is varied so; None when nothing is."""
    try:
        make_spec(varied(data, choices), source=source)
    except UserError as error:
        return str(error)
    return None
