"""Rows: read, recognised, made into token ids, selected, packed."""

from fastpo.data.prepare import (
    DataReport,
    Example,
    describe_example,
    mismatched,
    prepare_examples,
    require_columns,
    unpair,
)

__all__ = [
    "DataReport",
    "Example",
    "describe_example",
    "mismatched",
    "prepare_examples",
    "require_columns",
    "unpair",
]
