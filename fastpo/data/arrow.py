"""What Arrow does to rows, undone: nulls that it writes into every object, and columns of JSON text.

Arrow has one type for a column, so objects of different keys become objects of all of their keys, the missing ones
null. So that a list, JSON lines, a Dataset and Parquet give the same token ids, keys whose value is null are left out
of turns, tools and template arguments wherever they come from. Where keys have values of several types, `datasets` 5.2
writes them as JSON text, in columns of Arrow's extension type for it, at any depth.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

_JSON = "arrow.json"


def without_nulls(value: Any) -> Any:
    """`value` without the keys, at any depth, whose value is None; the same object where there are none."""
    if isinstance(value, Mapping):
        kept = {key: without_nulls(v) for key, v in value.items() if v is not None}
        return value if len(kept) == len(value) and all(kept[key] is value[key] for key in kept) else kept
    if isinstance(value, list | tuple):
        items = [without_nulls(item) for item in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else items
    return value


def table_rows(table: Any) -> list[dict]:
    """The rows of a `pyarrow.Table` as Python objects, columns of JSON text read."""
    rows = table.to_pylist()
    for column in table.schema:
        decode = _decoder(column)
        if decode is not None:
            for row in rows:
                row[column.name] = decode(row[column.name])
    return rows


def _decoder(field: Any) -> Callable[[Any], Any] | None:
    """What makes a value of `field`, a `pyarrow.Field`, out of what Arrow gives; None where they are the same."""
    kind = field.type
    marked = (field.metadata or {}).get(b"ARROW:extension:name", b"").decode()  # unknown to pyarrow below 19
    if marked == _JSON or getattr(kind, "extension_name", None) == _JSON:
        return lambda value: json.loads(value) if isinstance(value, str) else value
    if hasattr(kind, "value_field") and not hasattr(kind, "key_field"):  # the lists
        inner = _decoder(kind.value_field)
        return None if inner is None else lambda value: value if value is None else [inner(item) for item in value]
    if hasattr(kind, "fields"):  # pyarrow's StructType
        of_keys = {item.name: decode for item in kind.fields if (decode := _decoder(item)) is not None}

        def read(value: Any) -> Any:
            return value if value is None else value | {key: decode(value[key]) for key, decode in of_keys.items()}

        return read if of_keys else None
    return None
