"""The errors that a user can cause, each one line long: what was wrong, and the nearest right thing."""

import difflib
from collections.abc import Iterable
from typing import Any

LONGEST = 2000  # characters of a message, of which the middle is left out where it has more


class FastpoError(ValueError):
    """A user's mistake. The command line prints its message without a traceback and exits with 2.

    The message is one line, whatever was put into it: a path with a line break, another library's paragraph.
    """

    def __init__(self, message: object = "", *rest: object) -> None:
        super().__init__(_cut(" ".join(str(message).split()), LONGEST), *rest)


class ConfigError(FastpoError):
    """An option that is unknown, out of range, or not honoured by fastpo."""


class DataError(FastpoError):
    """Rows that cannot be trained on."""


class UnsupportedModelError(FastpoError):
    """A model whose rule from hidden states to log-probabilities fastpo does not reproduce."""


class DeviceError(FastpoError):
    """A device that was asked for and is not there."""


class TrainingError(FastpoError):
    """A run that must stop: non-finite steps, or a start that contradicts its own closed form."""


def shown(value: Any, most: int = 120) -> str:
    """A value as a message shows it: its repr, in one line of at most `most` characters, whatever its repr does."""
    try:
        text = repr(value)
    except Exception:  # ten to the 5000th has too many digits for Python; a user's class may do anything
        text = f"a {type(value).__name__}"
    return _cut(" ".join(text.split()), most)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most * 2 // 3]} ... {text[-most // 4 :]}"


def nearest(name: str, candidates: Iterable[str], cutoff: float) -> str | None:
    """The candidate that `name` most probably stands for: the same words in another order, or else its spelling."""
    by_lower = {str(candidate).lower(): candidate for candidate in candidates}
    for lower, candidate in by_lower.items():
        if sorted(lower.split("_")) == sorted(name.lower().split("_")):
            return candidate
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[close[0]] if close else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest that there is, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
