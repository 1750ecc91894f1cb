"""The options under `measure`: of each its default and what it may be, checked before anything is asked of a judge."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastpo.errors import ConfigError, did_you_mean, quoted, shown


@dataclass(frozen=True)
class Option:
    """`right`: whether a value will do; `what`: what it must be, in words. `names`, where they are given, are the texts
    of which it must be one, or several (`many`). `none`: whether None will do."""

    default: Any
    what: str = ""
    right: Callable[[Any], bool] = lambda value: True
    names: Sequence[str] = ()
    many: bool = False
    none: bool = False


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    return is_whole(value) and value >= 1


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


RESAMPLES = Option(
    1000, "a whole number: 0, for no interval, or 2 and more",
    lambda value: is_whole(value) and value >= 0 and value != 1,
)  # fmt: skip
ALLOW_MISSING = Option(False, "true or false", lambda value: isinstance(value, bool))
COUNT = "a whole number, 1 or more"  # what is_count asks for


def checked(measure: str, options: Mapping[str, Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every option; ConfigError for the first that is unknown or wrong."""
    for name, value in given.items():
        if name not in options:
            known = f", only {', '.join(options)}" if options else ""
            raise ConfigError(f"measure: {measure} has no option {name!r}{known}{did_you_mean(str(name), options)}")
        _check(f"measure.{name}", options[name], value)
    return {name: option.default for name, option in options.items()} | dict(given)


def _check(name: str, option: Option, value: Any) -> None:
    if value is None and option.none:
        return
    if not option.names:
        if not option.right(value):
            raise ConfigError(f"{name} must be {option.what}, not {shown(value)}")
        return
    for one in value if option.many and isinstance(value, list | tuple) else [value]:
        if not isinstance(one, str) or one not in option.names:
            near = did_you_mean(one, option.names) if isinstance(one, str) else ""
            raise ConfigError(f"{name} {shown(one)} is none of {quoted(option.names)}{near}")
