"""The losses: one table of them, their functions, what they read of a step."""

from fastpo.losses.table import (
    ALIASES,
    LOSSES,
    SFT,
    Loss,
    Pairs,
    Term,
    canonical_name,
    resolve_terms,
    segment_sum,
)

__all__ = [
    "ALIASES",
    "LOSSES",
    "Loss",
    "Pairs",
    "SFT",
    "Term",
    "canonical_name",
    "resolve_terms",
    "segment_sum",
]
