"""Search space of a tuning: a YAML file that says how spec keys vary between trials.

candidates.exponent: {uniform: [2, 10]}                  any number between the two
finetune.learning_rate: {loguniform: [1e-5, 1e-3]}       the same, uniform in the logarithm
candidates.count: {randint: [4, 16]}                     an integer, both ends included
candidates.sampling_ratios: {choice: [[0.005], [0.005, 0.02]]}    one of these values
early_eval.score: {grid: [loss, metric]}                      each of these values, with every sample of the other keys
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from raymask.config import apply_choices, format_error, load_mapping, make_spec, require_none
from raymask.core.errors import UserError
from raymask.core.spec import Section

Number = Annotated[float, Field(strict=True)]

Integer = Annotated[int, Field(strict=True)]

Values = Annotated[list[Any], Field(min_length=1)]


class Domain(Section):
    """How one key varies. Exactly one attribute is given.

    Attributes:
        uniform: Lower and upper end of a range of numbers.
        loguniform: The same, uniform in the logarithm; both ends above 0.
        randint: Smallest and largest integer.
        choice: Values, one of which is drawn.
        grid: Values that are all tried.
    """

    uniform: tuple[Number, Number] | None = None
    loguniform: tuple[Number, Number] | None = None
    randint: tuple[Integer, Integer] | None = None
    choice: Values | None = None
    grid: Values | None = None

    @model_validator(mode="after")
    def check_single_kind(self) -> Domain:
        """Check that one attribute is given and that a range is not empty."""
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
    def values_to_check(self) -> list[Any]:
        """The values to validate: all of a list, or the ends of a range, because what lies between is valid too."""
        return list(self.choice or self.grid or self.uniform or self.loguniform or self.randint or ())


SearchSpace = dict[str, Domain]
"""Domain by dotted spec key."""


def load_space(path: str | Path, data: Mapping[str, Any]) -> SearchSpace:
    """Read a search space and check every value that it may give to the spec.

    Args:
        path: The YAML file.
        data: The spec as plain data.

    Raises:
        UserError: Keys or values are wrong; the message names all of them.
    """
    space: SearchSpace = {}
    mistakes = []
    for key, entry in load_mapping(path, "a space is a mapping of spec keys to how they vary").items():
        if not isinstance(entry, dict):
            mistakes.append(f"{key}: say how it varies, for instance {{choice: [1, 2]}} or {{uniform: [2, 10]}}")
            continue
        try:
            space[str(key)] = Domain.model_validate(entry)
        except ValidationError as error:
            mistakes += [f"{key}: {format_error(mistake, Domain)}" for mistake in error.errors()]
    for key, domain in space.items():
        for value in domain.values_to_check:
            mistake = spec_error(data, {key: value}, key if isinstance(value, Mapping) else f"{key}={value}")
            if mistake:
                mistakes.append(mistake)
                break
    require_none(mistakes, str(path))
    if not space:
        raise UserError(f"{path}: nothing varies: give at least one spec key, such as candidates.exponent")
    first_values = {key: domain.values_to_check[0] for key, domain in space.items()}
    mistake = spec_error(data, first_values, "the first values, taken together")
    require_none([mistake] if mistake else [], str(path))
    return space


def spec_error(data: Mapping[str, Any], choices: Mapping[str, Any], source: str) -> str | None:
    """What is wrong with a spec after choices are applied.

    Args:
        data: The spec as plain data.
        choices: Value by dotted key.
        source: What the message names as the origin of the values.

    Returns:
        The message; None when the spec is valid.
    """
    try:
        make_spec(apply_choices(data, choices), source=source)
    except UserError as error:
        return str(error)
    return None
