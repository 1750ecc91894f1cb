"""Rows that name their loss: the column `loss` holds one of the entries of `loss_type`, which alone trains the row.

A row has the columns that its own loss reads. One of sft has a `completion`, or trains on its `chosen` response, or of
K responses on those that win a pair; the others do not go through the model.
"""

import numbers
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from fastpo.data import kway
from fastpo.data.example import Example
from fastpo.data.rows import (
    ANY,
    BOUNDS,
    DEGREE_OF,
    GREEDY,
    LOSS,
    RESPONSE_COLUMNS,
    RESPONSES,
    TOKEN_COLUMNS,
    InvalidRow,
    Row,
    Schema,
    parse_row,
    read_number,
    read_token_weights,
)
from fastpo.errors import ConfigError, DataError, nearest, quoted
from fastpo.losses.table import DEGREE, SFT, canonical_name

Losses = Mapping[str, Collection[str]]  # of each entry of loss_type, by the table's name: the optional columns it reads


def are_named(rows: Sequence[Mapping]) -> bool:
    """Whether the first rows name their loss; a column of that name may hold other things."""
    return any(isinstance(row.get(LOSS), str) for row in rows)


def as_pairs(rows: Sequence[Mapping]) -> list[Mapping]:
    """The first rows, of which those of one response are pairs of the same: what says the form of all of them."""
    out: list[Mapping] = []
    for row in rows:
        if row.get(LOSS) in (SFT, DEGREE):
            one = row.get("chosen") if row.get("completion") is None else row["completion"]
            row = {**row, "chosen": one, "rejected": one if row.get("rejected") is None else row["rejected"]}
        out.append(row)
    return out


@dataclass(frozen=True)
class ByLoss:
    """Parses rows that name one of `losses`, each by what its loss reads; `schema` is that of all of them."""

    schema: Schema
    losses: Losses
    degrees: int = 0  # of degree_aux

    def __call__(self, raw: Mapping, number: int) -> Row:
        loss = self._name(raw, number)
        if len(self.losses) == 1:
            return parse(raw, number, self.schema)
        if loss == SFT:
            return self._sft(raw, number)._replace(loss=SFT)
        if loss == DEGREE:
            return self._of_degree(raw, number)
        if self.schema.kind == "sft":
            raise DataError(f"row {number} names the loss {loss!r}, and the data have neither pairs nor '{RESPONSES}'")
        return parse(raw, number, self._schemas[loss])._replace(loss=loss)

    @cached_property
    def _schemas(self) -> dict[str, Schema]:
        """The schema of the rows of each loss."""
        out = {}
        for loss, columns in self.losses.items():
            numbers = tuple(name for name in self.schema.numbers if name == "weight" or name in columns)
            forms = {name: form for name, form in self.schema.forms.items() if name != GREEDY or GREEDY in columns}
            plan = None if self.schema.kway is None else kway.narrowed(self.schema.kway, columns)
            out[loss] = replace(self.schema, numbers=numbers, forms=forms, kway=plan)
        return out

    def _name(self, raw: Mapping, number: int) -> str:
        name = raw.get(LOSS)
        if name is None:
            raise InvalidRow(f"'{LOSS}' is None", f"row {number} names no '{LOSS}', which other rows do")
        try:
            loss = canonical_name(name) if isinstance(name, str) else ""
        except ConfigError:
            loss = ""
        if loss not in self.losses:
            close = nearest(name, self.losses, 0.4) if isinstance(name, str) else None
            hint = f"did you mean '{close}'?" if close else f"it has {quoted(self.losses)}"
            raise DataError(f"row {number}: '{LOSS}' is {name!r}, which is not in loss_type; {hint}")
        return loss

    def _of_degree(self, raw: Mapping, number: int) -> Row:
        """A row of one response and its degree."""
        entries = raw.get(RESPONSES)
        if raw.get("completion") is None and not (isinstance(entries, list | tuple) and len(entries) == 1):
            message = f"row {number}: 'completion' is None, and the row's loss is {DEGREE}"
            raise InvalidRow("no response of a degree", message)
        degree = raw.get(DEGREE_OF)
        if isinstance(degree, bool) or not isinstance(degree, numbers.Real) or degree not in range(self.degrees):
            message = f"row {number}: '{DEGREE_OF}' must be a whole number from 0 to {self.degrees - 1}, not {degree!r}"
            raise InvalidRow(f"bad '{DEGREE_OF}'", f"{message} ({DEGREE} has degrees={self.degrees})")
        row = self._sft(raw, number, DEGREE)
        return row._replace(loss=DEGREE, response_columns={**row.response_columns, DEGREE_OF: [float(degree)]})

    def _sft(self, raw: Mapping, number: int, loss: str = SFT) -> Row:
        """A row of responses without pairs."""
        schema, value, cut = self._schemas[loss], raw.get("completion"), False
        weights: tuple[list[float], ...] = ()
        if value is None and schema.kway is not None:
            entries = raw.get(RESPONSES)
            if not isinstance(entries, list | tuple) or len(entries) != 1 or not isinstance(entries[0], Mapping):
                return winners(kway.parse_row(raw, number, schema))
            value = kway.completion(entries[0], f"row {number}: response 0", schema, raw)
            cut = entries[0].get(kway.FINISHED) is False
        elif value is None:
            if not schema.explicit_prompt:
                return winners(parse_row(raw, number, schema))
            value = raw.get("chosen")
            if value is None:
                message = f"row {number}: 'completion' and 'chosen' are None, and the row's loss is sft"
                raise InvalidRow("no response to train on", message)
            if schema.token_weights and raw.get(TOKEN_COLUMNS[0]) is not None:
                weights = (read_token_weights(raw, TOKEN_COLUMNS[0], number),)
        elif not schema.explicit_prompt:
            raise DataError(f"row {number} has a 'completion', which needs the column 'prompt' beside it")
        row = parse_row({**raw, "completion": value}, number, self._single)
        row = row._replace(token_weights=weights or row.token_weights, unfinished=int(cut))
        weight = raw.get("weight")
        if weight is None and "weight" not in schema.numbers:
            return row
        weight = read_number(weight, BOUNDS["weight"], "weight", f"row {number}: column 'weight'")
        return row._replace(response_columns={"weight": [weight]})

    @cached_property
    def _single(self) -> Schema:
        """Of prompts with one response."""
        forms = self.schema.forms
        form = ANY if self.schema.kway is not None else forms.get("chosen") or forms["completion"]
        given = {name: forms[name] for name in forms if name == "prompt"}
        return replace(self.schema, kind="sft", forms={**given, "completion": form}, kway=None, numbers=(),
                       token_weights=False)  # fmt: skip


def parse(raw: Mapping, number: int, schema: Schema) -> Row:
    """A row of pairs, of K responses or of one; InvalidRow, or DataError."""
    return parse_row(raw, number, schema) if schema.kway is None else kway.parse_row(raw, number, schema)


def winners(row: Row) -> Row:
    """The responses that win a pair, without the pairs: what a row of sft trains on."""
    given = row.pair_columns.get("weight", [])
    weights: dict[int, float] = {}  # of each winner that of its first pair, as in an sft term of pairs
    for (winner, _), weight in zip(row.pairs, given or [1.0] * len(row.pairs), strict=True):
        weights.setdefault(winner, weight)
    places, cut = list(weights), 0
    if row.offer is not None:
        ends = {id(c): open_ for c, open_ in zip(row.offer.completions, row.offer.unfinished, strict=True)}
        cut = sum(ends[id(row.completions[k])] for k in places)
    return row._replace(
        completions=tuple(row.completions[k] for k in places), pairs=(), pair_columns={}, greedy=None, unfinished=cut,
        response_columns={"weight": list(weights.values())} if given else {}, loss=SFT,
        token_weights=tuple(row.token_weights[k] for k in places) if row.token_weights else (),
    )  # fmt: skip


def fill_columns(examples: Sequence[Example], losses: Losses) -> None:
    """0 as the reference's sums of rows whose loss reads none, where others have them."""
    for name, of_pair in RESPONSE_COLUMNS.items():
        if name != "score" and any(name in e.response_columns for e in examples):
            for example in examples:
                if example.loss is not None and of_pair[0] not in losses[example.loss]:
                    example.response_columns[name] = [0.0] * len(example.responses)
