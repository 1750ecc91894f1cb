"""Several data sets as one: what is given, what each contributes, and in which order.

A mixture is a list of paths or data sets, of (data set, weight) pairs, or of mappings as TRL's `datasets` has them; or
a mapping of names to any of these. Weights are shares of the mixture: the set that is scarcest for its share is used
whole, no row stands twice. `weight` takes a seeded choice of the rows, `fraction` the first ones, as in TRL.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fastpo.data.example import Example, even_weights
from fastpo.data.report import DataReport
from fastpo.data.row_loss import Losses, fill_columns
from fastpo.data.rows import LOSS, RESPONSE_COLUMNS
from fastpo.data.sources import Stream, column_names
from fastpo.errors import DataError, nearest, quoted

_OF_ROWS = {"prompt", "chosen", "completion", "messages", "conversations", "text", "instruction", "responses"}
KEYS = ("path", "dataset", "weight", "fraction", "split", "name", "columns", "data_dir", "data_files")


@dataclass(frozen=True)
class Part:
    """One data set of a mixture."""

    label: str
    dataset: Any
    weight: float | None = None
    first: bool = False  # the first rows are taken (fraction), not a seeded choice (weight)
    split: str | None = None
    config_name: str | None = None
    columns: tuple[str, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)  # data_dir and data_files of datasets.load_dataset


def parts_of(dataset: Any) -> list[Part] | None:
    """The parts of a mixture; None for one data set. DataError for a mixture that is not well-formed."""
    if isinstance(dataset, Mapping) and not hasattr(dataset, "column_names") and dataset:
        if not all(_names_data(value) for value in dataset.values()):
            return None
        parts = [_part(value, str(name)) for name, value in dataset.items()]
    elif isinstance(dataset, list | tuple) and dataset and all(_names_data(item) for item in dataset):
        parts = [_part(item, None) for item in dataset]
    else:
        return None
    weighed = [part.weight is not None for part in parts]
    if any(weighed) and not all(weighed):
        raise DataError(
            f"give all data sets of a mixture a weight, or none: {parts[weighed.index(False)].label} has none"
        )
    labels = [part.label for part in parts]
    return [replace(part, label=f"{part.label} ({k})") if labels.count(part.label) > 1 else part
            for k, part in enumerate(parts)]  # fmt: skip


def _names_data(item: Any) -> bool:
    """Whether an item of a list or mapping stands for a data set, and is neither a row nor a column of rows."""
    if isinstance(item, Mapping):
        known = len(set(item) & set(KEYS))
        return ("path" in item or "dataset" in item) and 2 * known >= len(item) and not set(item) & _OF_ROWS
    if isinstance(item, tuple | list):
        return len(item) == 2 and _names_data(item[0]) and isinstance(item[1], int | float)
    return isinstance(item, str | os.PathLike) or hasattr(item, "column_names") or hasattr(item, "to_dict")


def _part(item: Any, name: str | None) -> Part:
    weight: Any = None
    given: Mapping[str, Any] = {}
    if isinstance(item, tuple | list):
        item, weight = item
    if isinstance(item, Mapping):
        given = item
        for key in given:
            if key not in KEYS:
                close = nearest(key, KEYS, 0.6)
                hint = f": did you mean '{close}'?" if close else f", known are {quoted(KEYS)}"
                raise DataError(f"unknown key '{key}' in a data set of the mixture{hint}")
        if ("path" in given) == ("dataset" in given):
            raise DataError("a data set of a mixture needs 'path' or 'dataset', one of them")
        item = given["path"] if "path" in given else given["dataset"]
        if weight is None:
            weight = given.get("weight", given.get("fraction"))
        if given.get("weight") is not None and given.get("fraction") is not None:
            raise DataError("a data set of a mixture has 'weight' and 'fraction': give one")
    label = name or (os.fspath(item) if isinstance(item, str | os.PathLike) else type(item).__name__)
    if weight is not None and (
        isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= 1e9
    ):
        raise DataError(f"the weight of {label} must be a positive number, not {weight!r}")
    columns = given.get("columns")
    options = {key: given[key] for key in ("data_dir", "data_files") if given.get(key) is not None}
    return Part(label, item, weight, given.get("fraction") is not None, given.get("split"), given.get("name"),
                None if columns is None else tuple(columns), options)  # fmt: skip


def paths_of(dataset: Any) -> list[str]:
    """The names of all data sets that are given by name."""
    parts = parts_of(dataset)
    found = [dataset] if parts is None else [part.dataset for part in parts]
    return [os.fspath(item) for item in found if isinstance(item, str | os.PathLike)]


def described(dataset: Any) -> dict[str, Any]:
    """A mixture of named data sets as a YAML file has it: {"train_dataset": [{path, weight, ...}]}, else {}."""
    out = []
    for part in parts_of(dataset) or ():
        if not isinstance(part.dataset, str | os.PathLike):
            return {}
        kept = {"name": part.config_name, "split": part.split, "fraction" if part.first else "weight": part.weight,
                "columns": list(part.columns) if part.columns else None, **part.options}  # fmt: skip
        out.append({"path": os.fspath(part.dataset), **{key: v for key, v in kept.items() if v is not None}})
    return {"train_dataset": out} if out else {}


def select_columns(rows: Any, part: Part) -> Any:
    """`rows` with the part's columns alone; DataError for a column that is not there."""
    if part.columns is None:
        return rows
    missing = [name for name in part.columns if name not in column_names(rows)]
    if missing:
        raise DataError(f"{part.label} has no column '{missing[0]}', only {quoted(column_names(rows))}")
    if isinstance(rows, Stream):
        return Stream(({k: row[k] for k in part.columns if k in row} for row in rows), rows.kind, rows.endless)
    if isinstance(rows, list):
        return [{name: row[name] for name in part.columns if name in row} for row in rows]
    return rows.select_columns(list(part.columns))


def shares(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many of each set's examples stand for these weights, as many in all as the scarcest set allows."""
    whole = sum(weights)
    total = min(size * whole / weight for size, weight in zip(sizes, weights, strict=True))
    return [min(size, round(total * weight / whole)) for size, weight in zip(sizes, weights, strict=True)]


def mix(
    parts: Sequence[Part],
    prepared: Sequence[tuple[list[Example], DataReport]],
    seed: int,
    wanted: Collection[str],
    losses: Losses | None = None,
) -> tuple[list[Example], DataReport]:
    """One list of examples of all parts, and what became of the rows of each.

    `wanted` are the optional columns that the run reads: those that some parts lack are an error, but `weight`, which
    is 1 where it is not given. `losses`: those that rows may name, in all parts or in none.
    """
    sets = [examples for examples, _ in prepared]
    if any(examples[0].loss for examples in sets):
        _check_named(parts, sets)
    else:
        _check_forms(parts, sets)
        _even_columns(parts, sets, wanted)
    rng = np.random.default_rng(seed)
    counts = [len(examples) for examples in sets]
    chosen = [list(range(count)) for count in counts]
    weights = [part.weight for part in parts]
    if all(weight is not None for weight in weights):
        counts = shares(counts, [float(weight or 0) for weight in weights])
        for k, (part, count) in enumerate(zip(parts, counts, strict=True)):
            if count == 0:
                raise DataError(f"a weight of {part.weight:g} leaves none of the {len(sets[k])} rows of {part.label}")
            chosen[k] = list(range(count)) if part.first else sorted(rng.permutation(len(sets[k]))[:count].tolist())
        order = rng.permutation(np.repeat(np.arange(len(parts)), counts)).tolist()
    else:
        order = [k for k, count in enumerate(counts) for _ in range(count)]
    report = DataReport(max_length=prepared[0][1].max_length)
    names: dict[str, None] = {}
    for part, (_, own) in zip(parts, prepared, strict=True):
        report.add(own)
        names.update(dict.fromkeys(own.columns))
        report.warnings += [f"{part.label}: {message}" for message in own.warnings]
    report.columns = list(names)
    report.reading = "; ".join(f"{part.label} {own.reading}" for part, (_, own) in zip(parts, prepared, strict=True)
                               if own.reading)  # fmt: skip
    report.mixed = ", ".join(f"{count} of {len(examples)} from {part.label}"
                             for part, count, examples in zip(parts, counts, sets, strict=True))  # fmt: skip
    rest = [iter(places) for places in chosen]
    picked = [(k, next(rest[k])) for k in order]
    report.kept_rows = [prepared[k][1].kept_rows[place] for k, place in picked]
    mixed = [sets[k][place] for k, place in picked]
    even_weights(mixed)
    fill_columns(mixed, losses or {})
    return mixed, report


def _check_named(parts: Sequence[Part], sets: Sequence[Sequence[Example]]) -> None:
    lacking = [part.label for part, examples in zip(parts, sets, strict=True) if examples[0].loss is None]
    if lacking:
        raise DataError(f"the rows of {lacking[0]} name no '{LOSS}', which those of other data sets do")


def _check_forms(parts: Sequence[Part], sets: Sequence[Sequence[Example]]) -> None:
    paired = [bool(examples[0].pairs) for examples in sets]
    if len(set(paired)) > 1:
        raise DataError(
            f"{parts[paired.index(True)].label} has pairs and {parts[paired.index(False)].label} has single "
            "completions: a mixture needs one of the two"
        )


def _even_columns(parts: Sequence[Part], sets: Sequence[Sequence[Example]], wanted: Collection[str]) -> None:
    """The same optional columns in all parts: `weight` is filled, what no loss reads is left out, the rest refused."""
    for attribute in ("pair_columns", "response_columns"):
        held = [set(getattr(examples[0], attribute)) for examples in sets]
        for name in sorted(set.union(*held) - set.intersection(*held)):
            of_data = RESPONSE_COLUMNS.get(name, (name,))
            if name != "weight" and any(column in wanted for column in of_data):
                has = next(p.label for p, own in zip(parts, held, strict=True) if name in own)
                lacks = next(p.label for p, own in zip(parts, held, strict=True) if name not in own)
                raise DataError(f"{has} has {quoted(of_data)} and {lacks} has not: give it in all, or leave it out")
            for examples, own in zip(sets, held, strict=True):
                for example in examples:
                    if name == "weight" and name not in own:
                        example.pair_columns[name] = [1.0] * len(example.pairs)
                    elif name != "weight":
                        getattr(example, attribute).pop(name, None)
