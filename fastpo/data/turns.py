"""Responses of several turns: which of their characters and tokens the assistant writes.

By the marks of the template's `{% generation %}` where it has them. Else by turn, for any template: each turn gets a
mark behind its words, so that it is found in what the template writes of the whole. What stands between the turns is
told apart by what the template writes of the beginnings: a generation prompt is no part of the assistant's turn, and
what closes its turn is.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastpo.data.content import CALLS, Turns, is_models

Spans = list[tuple[int, int]]  # [first character, one past the last) in the whole text

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Unclear(Exception):
    """The turns cannot be told apart in what the template writes."""


def needs_mask(completion: Turns) -> bool:
    """Whether somebody else's turns are among those of a response."""
    return not all(map(is_models, completion))


def marks_generation(template: Any, tools: Any) -> bool:
    """Whether the chat template (a text, or texts by name) says itself what the assistant writes."""
    if isinstance(template, Mapping):
        template = template.get("tool_use" if tools and "tool_use" in template else "default")
    return isinstance(template, str) and _GENERATION.search(template) is not None


def models_spans(turns: Turns, first: int, whole: str, render: Callable[[Turns, bool], str]) -> Spans:
    """Where in `whole`, the rendered `turns`, stand those that the assistant writes, from number `first` on.

    A first one begins with the text: what is before the response is cut off by its boundary. `render` takes turns and
    whether to add a generation prompt. Raises Unclear where a turn is not found.
    """
    stem = next(s for k in range(1_000_000) if (s := f"zq{k}y") not in whole)
    marks = [f"{stem}{k}z" for k in range(len(turns))]
    given = [_mark(turn, marks[k]) if k >= first - 1 else turn for k, turn in enumerate(turns)]
    text = render(given, False)
    unseen = [k for k in range(max(first - 1, 0), len(turns)) if marks[k] not in text]
    if unseen:  # calls that the template does not write
        for k in unseen:
            given[k] = _mark_content(turns[k], marks[k])
        text = render(given, False)

    def without(written: str) -> str:
        for mark in marks:
            written = written.replace(mark, "")
        return written

    if without(text) != whole:
        raise Unclear("the template writes its turns differently when their words are")

    def after(k: int, written: str) -> int:
        # The name of a call may stand again with its answer, behind it.
        if marks[k] not in written or (written.count(marks[k]) > 1 and not any(turns[k].get(key) for key in CALLS)):
            raise Unclear(f"turn {k} of the conversation is not found in what the template writes")
        return written.index(marks[k]) + len(marks[k])

    seen = [k for k, mark in enumerate(marks) if mark in text]  # a template may leave out whole turns
    spans = []
    for k in seen:
        if k < first or not is_models(turns[k]):
            continue
        start, end = 0, len(text)
        if k > first:
            last = max((j for j in seen if j < k), default=first)
            opened, at = render(given[:k], True), after(last, text)
            start = at + _common(text[at:], opened[after(last, opened) :])
        if k + 1 < len(turns):
            closed, at = render(given[: k + 1], False), after(k, text)
            end = at + _common(text[at:], closed[after(k, closed) :])
        spans.append((start, end))
    return [(len(without(text[:start])), len(without(text[:end]))) for start, end in spans]


def _common(a: str, b: str) -> int:
    return len(os.path.commonprefix([a, b]))


def _mark(turn: Mapping[str, Any], mark: str) -> dict:
    """The turn with `mark` behind its last words: in the last of its tool calls, or at the end of its content."""
    for key in CALLS:
        calls = turn.get(key)
        if isinstance(calls, list | tuple) and calls:
            return {**turn, key: [*calls[:-1], _mark_call(calls[-1], mark)]}
        if isinstance(calls, Mapping):
            return {**turn, key: _mark_call(calls, mark)}
    return _mark_content(turn, mark)


def _mark_content(turn: Mapping[str, Any], mark: str) -> dict:
    content = turn.get("content")
    if isinstance(content, list | tuple) and content:
        last = content[-1]
        part = _behind(last, mark) if isinstance(last, str) else {**last, "text": _behind(last["text"], mark)}
        return {**turn, "content": [*content[:-1], part]}
    return {**turn, "content": _behind(content or "", mark)}


def _mark_call(call: Any, mark: str) -> Any:
    if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
        return {**call, "function": _mark_call(call["function"], mark)}
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise Unclear("a tool call has no name")
    return {**call, "name": call["name"] + mark}


def _behind(text: str, mark: str) -> str:
    """Before the spaces at the end, which a template may cut off."""
    end = len(text.rstrip())
    return f"{text[:end]}{mark}{text[end:]}"


def trained_tokens(offsets: Sequence[Sequence[int]], spans: Spans) -> list[bool]:
    """Of tokens by their characters [first, one past the last): which are of `spans`. One across a start is, one across
    an end is not."""
    return [any(begin < stop <= end for begin, end in spans) for _, stop in offsets]


def trained_ids(
    turns: Turns, first: int, whole: Sequence[int], ids: Callable[[Turns, bool], Sequence[int]]
) -> list[bool]:
    """As `models_spans`, for tokenizers that turn conversations into ids directly: by ids of growing beginnings."""
    out = [False] * len(whole)
    for k in range(first, len(turns)):
        if not is_models(turns[k]):
            continue
        start = 0 if k == first else _begins(whole, ids(turns[:k], True))
        end = len(whole) if k + 1 == len(turns) else _begins(whole, ids(turns[: k + 1], False))
        out[start:end] = [True] * (end - start)
    return out


def _begins(whole: Sequence[int], beginning: Sequence[int]) -> int:
    if list(whole[: len(beginning)]) != list(beginning):
        raise Unclear("the tokenizer writes the first turns differently when others follow")
    return len(beginning)
