"""What measures share: verdicts gathered, rows refused by name and count, standard errors by resampling."""

import math
import os
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastpo.data.sources import column_names, load_rows
from fastpo.errors import DataError, did_you_mean, quoted, shown
from fastpo.sampling.items import Scorer, Unit, Verdict

_NAMED = 5  # names that a message gives
DRAWS = 1000  # of a bootstrap

Term = tuple[float, np.ndarray, np.ndarray]  # weight, numerator [N], denominator [N] by prompt


def named(names: Iterable[Any]) -> str:
    """The first of the names, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(shown(name, 60) for name in names[:_NAMED]) + rest


def refuse(what: str, bad: Sequence[Any], of: int, advice: str = "", *, who: str = "") -> None:
    """DataError where `bad` is not empty: whose they are, how many of how many, and which, the first of them by
    name."""
    if bad:
        raise DataError(f"{who}{': ' if who else ''}{len(bad)} of {of} {what}: {named(bad)}{advice}")


def refuse_repeated(what: str, ids: Sequence[str], *, who: str = "") -> None:
    """DataError for ids that occur more than once."""
    refuse(what, [name for name, count in Counter(ids).items() if count > 1], len(set(ids)), who=who)


def rows_of(source: Any, what: str, columns: Iterable[str], **options: Any) -> list[Mapping[str, Any]]:
    """Rows of a list, a data frame, a file or a data set by name; DataError in one line where it cannot be had."""
    try:
        rows = load_rows(source, **options)
    except DataError as error:
        if not isinstance(source, str | os.PathLike) or Path(source).exists():
            raise DataError(f"{what} cannot be read: {error}") from error
        raise DataError(f"{what} are not here: {error}; give the rows, or the path of a file of them") from error
    rows = list(rows)
    if not rows:
        raise DataError(f"{what}: no rows")
    known = column_names(rows)
    for column in columns:
        if column not in known:
            raise DataError(f"{what} have no column {column!r}, only {quoted(known)}{did_you_mean(column, known)}")
        refuse(f"rows of {what} have no {column!r}; numbers of the rows", _lacking(rows, column), len(rows))
    return rows


def _lacking(rows: Sequence[Mapping[str, Any]], column: str) -> list[int]:
    return [number for number, row in enumerate(rows) if row.get(column) is None]


def value_of(verdict: Verdict) -> float | None:
    """The number of a verdict on one response or one pair."""
    return None if verdict.value is None or isinstance(verdict.value, tuple) else float(verdict.value)


def verdicts(scorer: Scorer, units: Sequence[Unit]) -> list[Verdict]:
    """A verdict for each unit, in their order; a unit that the scorer leaves out has failed ("no verdict")."""
    found = {unit.key: verdict for unit, verdict in scorer.score(units)}
    return [found.get(unit.key) or Verdict.failed("no verdict") for unit in units]


def standard_error(values: Sequence[float]) -> float | None:
    """Of a mean; of one value there is none."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def wilson(share: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval (1927) of a share of `count` draws: it does not shrink to nothing where all are alike."""
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return (max(0.0, middle - half) if share > 0 else 0.0), (min(1.0, middle + half) if share < 1 else 1.0)


def resampled(terms: Sequence[Term], seed: int = 0, draws: int = DRAWS) -> float | None:
    """Standard error of sum_k weight_k * sum(numerator_k) / sum(denominator_k) by resampling the N prompts.

    One draw resamples all terms alike, so figures of the same prompts keep what they have in common. None for fewer
    than two prompts or draws.
    """
    if not terms or len(terms[0][1]) < 2 or draws < 2:
        return None
    count = len(terms[0][1])
    rng = np.random.default_rng(seed)
    times = rng.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)  # [draws, N]
    total = np.zeros(draws)
    with np.errstate(invalid="ignore", divide="ignore"):
        for weight, numerator, denominator in terms:
            total += weight * (times @ numerator) / (times @ denominator)
    total = total[np.isfinite(total)]  # a draw without any prompt of a task has no figure
    return float(np.std(total, ddof=1)) if len(total) > 1 else None
