"""Pairs from outside, of whatever layout `fastpo.train` reads, as prompt, better and worse answer."""

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastpo.data import kway
from fastpo.data.kway import BEST_WORST
from fastpo.data.layouts import read_as
from fastpo.data.rows import InvalidRow, Schema, parse_row, read_schema
from fastpo.data.sources import column_names, first_rows, head_rows, load_rows
from fastpo.errors import DataError
from fastpo.sampling.items import Prompt, digest

_FIRST = 1000  # rows that say what all are


@dataclass(frozen=True)
class PairOf:
    """One preference. `id` is the row's, or follows from its content."""

    id: str
    prompt: Prompt
    chosen: str
    rejected: str


def read_pairs(source: Any, what: str, counts: Counter[str]) -> list[PairOf]:
    """In the order of the rows; `counts` gets what was left out, by reason. DataError where there is none."""
    rows = [_as_texts(row) for row in load_rows(source)]
    if not rows:
        raise DataError(f"{what}: there are no rows")
    names = column_names(rows)
    try:
        reading = read_as(names, head_rows(rows), "preference", ())
        given, first = reading.names(names), reading.first(first_rows(rows, set(names), _FIRST))
        if kway.is_kway(given, first):
            forming = replace(BEST_WORST, policy="explicit") if kway.PAIRS in given else BEST_WORST
            schema = kway.read_schema(given, first, (), forming)
        else:
            schema = read_schema(given, first, "preference", ())
    except DataError as error:
        raise DataError(f"{what}: {error}") from error
    if schema.token_ids:
        raise DataError(f"{what}: these are token ids, and a model is to read the pairs: give texts or conversations")
    out: dict[str, PairOf] = {}
    for number, raw in enumerate(rows):
        try:
            found = list(_pairs(reading(raw, number), number, schema))
        except InvalidRow as error:
            counts[error.reason] += 1
            continue
        for n, (prompt, chosen, rejected) in enumerate(found):
            own = str(raw["id"]) if raw.get("id") is not None else digest([prompt, chosen, rejected])[:16]
            name = own if len(found) == 1 else f"{own}/{n}"
            if name in out:
                counts["repeated"] += 1
            elif chosen is None or rejected is None:
                counts["answers of several turns"] += 1
            else:
                out[name] = PairOf(name, prompt, chosen, rejected)
    if not out:
        why = ", ".join(f"{reason}: {n}" for reason, n in counts.items()) or "there are no rows"
        raise DataError(f"{what}: no pair can be read ({why})")
    return list(out.values())


def _as_texts(row: Mapping) -> dict[str, Any]:
    """Without the token ids beside texts, which training would read in their place: people's words are wanted here."""
    out = {name: value for name, value in row.items() if not (name.endswith("_ids") and name[:-4] in row)}
    if "prompt" in row and isinstance(row.get("responses"), list):
        out["responses"] = [
            {k: v for k, v in entry.items() if k != "token_ids"} if "text" in entry or "messages" in entry else entry
            for entry in row["responses"]
        ]
    return out


def _pairs(raw: Mapping, number: int, schema: Schema) -> list[tuple[Any, str | None, str | None]]:
    row = parse_row(raw, number, schema) if schema.kway is None else kway.parse_row(raw, number, schema)
    prompt = row.prompt if isinstance(row.prompt, str) else [dict(turn) for turn in row.prompt]
    return [(prompt, _text(row.completions[i]), _text(row.completions[j])) for i, j in row.pairs]


def _text(completion: Any) -> str | None:
    if isinstance(completion, str):
        return completion
    return str(completion[0]["content"]) if len(completion) == 1 else None


def drawn(pairs: list[PairOf], n: int | None, seed: int) -> list[PairOf]:
    """So many of them by chance, in their order."""
    if n is None or n >= len(pairs):
        return pairs
    return [pairs[k] for k in sorted(random.Random(seed).sample(range(len(pairs)), n))]
