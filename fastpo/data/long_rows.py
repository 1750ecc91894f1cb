"""Responses that are longer than max_length, left out instead of cut: what a scalar head scores has its end."""

from dataclasses import replace
from typing import Any

from fastpo.data.encoding import Encoded

TOO_LONG = "longer than max_length"


def without_long(encoded: Encoded, max_length: int) -> Encoded | None:
    """The row without responses that have more tokens than `max_length`, prompt included, and without their pairs; None
    where no pair is left."""
    row = encoded.row
    prompt, *wholes = encoded.ids
    kept = [k for k, whole in enumerate(wholes) if len(whole) <= max_length]
    if len(kept) == len(wholes):
        return encoded
    formed = [n for n, pair in enumerate(row.pairs) if set(pair) <= set(kept)]
    used = {k for n in formed for k in row.pairs[n]}
    kept = [k for k in kept if k in used]
    if not kept:
        return None
    at = {k: place for place, k in enumerate(kept)}

    def of_kept(values: Any) -> Any:
        return type(values)(values[k] for k in kept) if values else values

    row = row._replace(
        completions=of_kept(row.completions), token_weights=of_kept(row.token_weights), greedy=None,
        pairs=[(at[winner], at[loser]) for winner, loser in (row.pairs[n] for n in formed)],
        pair_columns={name: [values[n] for n in formed] for name, values in row.pair_columns.items()},
        response_columns={name: of_kept(values) for name, values in row.response_columns.items()},
    )  # fmt: skip
    ids = [prompt, *(wholes[k] for k in kept)]
    return replace(encoded, row=row, ids=ids, trained=of_kept(encoded.trained))
