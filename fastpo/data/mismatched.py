"""Prompts with completions of other rows: what KTO estimates its KL from."""

import logging
from collections.abc import Sequence

import numpy as np

from fastpo.data.example import Example
from fastpo.errors import DataError

logger = logging.getLogger(__name__)


def mismatched(examples: Sequence[Example], max_length: int | None) -> list[Example]:
    """Each row's prompt with the completion of the next row of another prompt, as KTO estimates its KL from.

    The next in the data, not in the step, so that the reference scores each of them once. Where all rows have one
    prompt it is the next row's, as in TRL, and a warning says so. Raises DataError for a single row.
    """
    n = len(examples)
    if n == 1:
        raise DataError("kto estimates a KL from completions of other rows, and there is only one")
    others: list[Example | None] = [None] * n
    other = None
    # Backwards, twice around: a row of the same prompt as the next one has its other, however many they are.
    for i in reversed(range(2 * n)):
        example, after = examples[i % n], examples[(i + 1) % n]
        other = other if np.array_equal(example.prompt_ids, after.prompt_ids) else after
        others[i % n] = other
    if other is None:
        logger.warning("all rows have the same prompt: kto's KL is estimated from other completions of it, which makes "
                       "it larger than that of completions of other prompts")  # fmt: skip
    out = []
    for i, (example, found) in enumerate(zip(examples, others, strict=True)):
        other = found or examples[(i + 1) % n]
        room = None if max_length is None else max_length - len(example.prompt_ids)
        weights = None if other.token_weights is None else [other.token_weights[0][:room]]
        out.append(Example(example.prompt_ids, [other.responses[0][:room]], token_weights=weights))
    return out
