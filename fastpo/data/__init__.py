"""Rows: read, recognised, made into token ids, selected, packed."""

from fastpo.data.example import Example
from fastpo.data.prepare import describe_example, mismatched, prepare_examples, require_columns, unpair
from fastpo.data.report import DataReport

__all__ = [
    "DataReport",
    "Example",
    "describe_example",
    "mismatched",
    "prepare_examples",
    "require_columns",
    "unpair",
]
