"""The prompts of a run: read, numbered, without repetitions, and cut into one disjoint part for each iteration."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from fastpo.data.sources import load_rows
from fastpo.errors import ConfigError, DataError, nearest, quoted
from fastpo.sampling.items import Item, digest, prompt_text, seed_of

PROMPT = "prompt"


def read_prompts(source: Any, what: str = "prompts") -> list[Item]:
    """Items without responses, in the order of the source; further columns are their `meta`.

    `source`: what fastpo.train takes as data, with a column `prompt`, a text or turns; `id` names a prompt, else its
    content does. A prompt that was there already is left out. DataError for a row without prompt, two of one id.
    """
    items: dict[str, Item] = {}
    contents: set[str] = set()
    for number, row in enumerate(load_rows(source)):
        row = {"prompt": row} if isinstance(row, str) else row
        prompt = row.get(PROMPT)
        if prompt is None:
            close = nearest(PROMPT, row, 0.5)
            hint = f": rename {close!r} to 'prompt'" if close else f", found {quoted(row)}"
            raise DataError(f"{what}: row {number} has no 'prompt'{hint}")
        if not isinstance(prompt, str):
            prompt = [{"role": turn["role"], "content": turn["content"]} for turn in _turns(prompt, number, what)]
        if not prompt_text(prompt).strip():
            raise DataError(f"{what}: row {number} has an empty prompt")
        content = digest(prompt)
        if content in contents:
            continue
        contents.add(content)
        name = str(row["id"]) if row.get("id") is not None else content[:16]
        if name in items:
            raise DataError(f"{what}: row {number} has the id {name!r} of another prompt")
        rest = {key: value for key, value in row.items() if key not in (PROMPT, "id") and value is not None}
        items[name] = Item(name, prompt, meta=rest)
    if not items:
        raise DataError(f"{what}: there are none")
    return list(items.values())


def _turns(prompt: Any, number: int, what: str) -> Sequence[Mapping[str, str]]:
    if not isinstance(prompt, Sequence) or not all(
        isinstance(turn, Mapping) and {"role", "content"} <= set(turn) for turn in prompt
    ):
        raise DataError(f"{what}: the prompt of row {number} must be a text or turns with role and content")
    return prompt


def part_of(
    items: Sequence[Item], iteration: int, iterations: int, size: int | None, seed: int, reuse: bool = False
) -> list[Item]:
    """The prompts of one iteration, from 1 on: no prompt is in two of them, unless they are drawn anew in each
    (`reuse`). ConfigError where there are too few."""
    parts = 1 if reuse else iterations
    size = len(items) // parts if size is None else size
    if size * parts > len(items) or size < 1:
        raise ConfigError(
            f"{len(items):,} different prompts are too few for {iterations} disjoint iterations of {max(size, 1):,}: "
            f"set prompts_per_iteration to {len(items) // parts:,} or less, iterations to "
            f"{len(items) // max(size, 1):,} or less, or reuse_prompts=true"
        )
    order = list(range(len(items)))
    random.Random(seed_of(seed, iteration) if reuse else seed).shuffle(order)
    first = 0 if reuse else (iteration - 1) * size
    return [items[k] for k in order[first : first + size]]


def to_json(item: Item) -> dict[str, Any]:
    """A line of prompts.jsonl."""
    line: dict[str, Any] = {"id": item.id, PROMPT: item.prompt}
    if item.prompt_ids is not None:
        line["prompt_ids"] = list(item.prompt_ids)
    return line | ({"meta": dict(item.meta)} if item.meta else {})


def from_json(line: Mapping[str, Any]) -> Item:
    ids = line.get("prompt_ids")
    return Item(line["id"], line[PROMPT], None if ids is None else tuple(ids), meta=line.get("meta", {}))


def extra_responses(spec: Mapping[str, Any], items: Sequence[Item]) -> dict[str, list[tuple[str, str]]]:
    """(source, text) of the responses from outside, by the prompt's id: of a column of the prompts (`column:NAME`), or
    of a file with `id` (or `prompt`) and `text`."""
    out: dict[str, list[tuple[str, str]]] = {}
    by_content = {digest(item.prompt): item.id for item in items}
    for source, where in spec.items():
        if isinstance(where, str) and where.startswith("column:"):
            name = where.removeprefix("column:")
            found = [(item.id, _text(item.meta[name])) for item in items if name in item.meta]
            if not found:
                raise DataError(f"extra_responses.{source}: the prompts have no column {name!r}")
        else:
            found = []
            for number, row in enumerate(load_rows(where)):
                text = row.get("text", row.get("completion"))
                if text is None or ("id" not in row and PROMPT not in row):
                    raise DataError(f"extra_responses.{source}: row {number} needs 'id' or 'prompt', and 'text'")
                own = str(row["id"]) if "id" in row else by_content.get(digest(row[PROMPT]))
                if own is not None:
                    found.append((own, _text(text)))
        for own, text in found:
            out.setdefault(own, []).append((source, text))
    return out


def _text(value: Any) -> str:
    """A text, or the content of a conversation's last turn."""
    return str(value) if isinstance(value, str) else str(value[-1]["content"])
