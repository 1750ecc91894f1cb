"""Rows with `prompt_ids`: token ids as a policy had and sampled them, trained as they are.

What a policy sampled is not what its text is tokenised to, and where `max_new_tokens` cut it off it has no end. So
nothing is appended to responses that are ids, nothing is tokenised anew and no template is applied. Responses of the
same row that are texts (an answer from elsewhere) are made into ids after the prompt's text or turns, as ever, and then
follow `prompt_ids` too.
"""

import os
from dataclasses import replace
from typing import Any

from fastpo.data.encoding import Encoded, Encoder
from fastpo.data.report import DataReport
from fastpo.data.rows import InvalidRow, Row, is_ids


def texts_of(row: Row) -> Row | None:
    """The row with those responses alone that are texts or turns; None where there are none. Other rows as they are."""
    if row.prompt_ids is None:
        return row
    texts = tuple(completion for completion in row.completions if not is_ids(completion))
    # Without ids of its own the prompt is tokenised, whatever the responses are.
    return row._replace(completions=texts) if texts or not row.prompt_ids else None


def with_texts(row: Row, texts: Row) -> Row:
    """`row` with the prompt and the texts of `texts`, which `texts_of` gave of it."""
    if row.prompt_ids is None:
        return texts
    new = iter(texts.completions)
    completions = tuple(completion if is_ids(completion) else next(new) for completion in row.completions)
    return row._replace(prompt=texts.prompt, completions=completions)


def joined(encoded: Encoded, encoder: Encoder, report: DataReport) -> Encoded:
    """The ids of prompt + response of every response of a row with `prompt_ids`; `encoded` has those of its texts.

    A text's ids are those behind the prompt's; where tokens merge across that boundary it is tokenised apart.
    """
    row = encoded.row
    prompt = list(row.prompt_ids or encoded.ids[0])
    ids: list[list[int]] = [prompt]
    trained: list[list[bool] | None] = []
    place, moved = 0, False
    for completion in row.completions:
        if is_ids(completion):
            ids.append([*prompt, *completion])
            trained.append(None)
            continue
        place += 1
        whole, mask, start = encoded.ids[place], encoded.trained[place - 1], len(prompt)
        if whole[:start] != prompt:
            moved, start = True, len(encoded.ids[0])
        if whole[:start] != prompt and whole[:start] != encoded.ids[0]:
            tail = _tail(encoded, place, encoder)
            if tail is None or mask is not None:
                message = f"row {row.number}: a text's tokens do not begin with those of its prompt, so that they " \
                          "cannot follow 'prompt_ids': give it as 'token_ids'"  # fmt: skip
                raise InvalidRow("a text that does not follow prompt_ids", message)
        else:
            tail = whole[start:]
        ids.append([*prompt, *tail])
        trained.append(None if mask is None else [False] * len(prompt) + mask[start:])
    report.other_prompts += moved
    return replace(encoded, ids=ids, trained=trained)


def _tail(encoded: Encoded, place: int, encoder: Encoder) -> Any:
    """The ids of what a text adds to its prompt's, tokenised apart; None where there are only ids to go by."""
    if not encoded.texts:
        return None
    prompt, whole = encoded.texts[0], encoded.texts[place]
    return encoder.apart(whole[len(os.path.commonprefix([prompt, whole])) :])
