"""One option of another project: its status here, its default there, what to say about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastpo.config.bounds import plain

HONOURED, RENAMED, REFUSED, NO_EFFECT = "honoured", "renamed", "refused", "without meaning"


@dataclass(frozen=True)
class Option:
    """One option: its status, TRL's default, a note or the reason, its name here."""

    status: str
    default: Any = None
    note: str = ""
    to: str | None = None
    off: tuple = (False, "", [], {})  # values of a refused option that ask for nothing, beside None and its default
    values: Mapping[Any, Any] = field(default_factory=dict)  # of a renamed option: its values here; None: says nothing

    def harmless(self, value: Any) -> bool:
        """Whether a refused option's value leaves the training as it is."""
        value = plain(value)
        return any(
            not differ(value, other) and isinstance(value, bool) == isinstance(other, bool)
            for other in (None, self.default, *self.off)
        )


def differ(value: Any, other: Any) -> bool:
    """Whether two values are not equal; arrays, and what cannot be compared, differ from all but themselves."""
    if value is other:
        return False
    try:
        return not bool(value == other)
    except Exception:  # an array's truth, a user's class
        return True


def same(default: Any = None, note: str = "") -> Option:
    return Option(HONOURED, default, note)


def to(name: str, default: Any = None, note: str = "", values: Mapping[Any, Any] | None = None) -> Option:
    return Option(RENAMED, default, note, to=name, values=values or {})


def no(reason: str, default: Any = None, off: tuple = (False, "", [], {})) -> Option:
    return Option(REFUSED, default, reason, off=off)


def nothing(reason: str, default: Any = None) -> Option:
    return Option(NO_EFFECT, default, reason)
