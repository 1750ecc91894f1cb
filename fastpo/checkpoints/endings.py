"""Where the trained model stops: its configuration names the ids at which the responses that it learnt end."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fastpo.data import Example

ROWS = 4096  # of the data, evenly spread: what all of them end with shows in these
SHARE = 0.05  # of the responses; a token that ends fewer is a stray one
BEHIND = 3  # tokens of white space that a template may put behind the end of a turn


def align(model: Any, tokenizer: Any, examples: Sequence[Example]) -> dict[str, Any]:
    """Name the ids of the data's ends, and the tokenizer's, in the model's config and generation config, in place, as
    transformers' Trainer does with the tokenizer's alone; returns what has changed.

    An id is added to those that already stop the model, none is taken away; what the tokenizer has not is left.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    generation = getattr(model, "generation_config", None)
    ends = ending_ids(tokenizer, examples)
    own = getattr(tokenizer, "eos_token_id", None)
    wanted = list(dict.fromkeys([*ends, *([own] if own is not None else [])]))
    changed: dict[str, Any] = {}
    if wanted:
        before = getattr(config, "eos_token_id", None)
        kept = before if isinstance(before, list) else []  # one id is replaced, as by transformers
        _set(config, "eos_token_id", before, [*wanted, *kept], changed, "config")
        if generation is not None:
            before = getattr(generation, "eos_token_id", None)
            _set(generation, "eos_token_id", before, [*wanted, *_listed(before)], changed, "generation_config")
    for name in ("bos_token_id", "pad_token_id"):
        number = getattr(tokenizer, name, None)
        for owner, label in ((config, "config"), (generation, "generation_config")):
            if number is not None and owner is not None and getattr(owner, name, None) != number:
                setattr(owner, name, number)
                changed[f"{label}.{name}"] = number
    return changed


def _set(owner: Any, name: str, before: Any, ids: list[int], changed: dict[str, Any], label: str) -> None:
    ids = list(dict.fromkeys(ids))
    if set(ids) == set(_listed(before)):
        return
    value = ids if len(ids) > 1 else ids[0]
    setattr(owner, name, value)
    changed[f"{label}.{name}"] = value


def _listed(ids: Any) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [ids]


def ending_ids(tokenizer: Any, examples: Sequence[Example]) -> list[int]:
    """The special tokens with which the responses end, the most frequent first.

    White space that a template puts behind the end of a turn is looked through. A response that was cut at max_length
    ends with none, and says nothing.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    eos = getattr(tokenizer, "eos_token_id", None)
    roles = ("bos", "unk", "pad", "cls", "mask")
    never = {getattr(tokenizer, f"{role}_token_id", None) for role in roles} - {eos}
    special = {number for number, token in added.items() if token.special} - never | {eos}
    blank: dict[int, bool] = {}

    def is_blank(number: int) -> bool:
        if number not in blank:
            blank[number] = number not in special and not tokenizer.decode([number]).strip()
        return blank[number]

    found: Counter[int] = Counter()
    for example in examples[:: max(1, len(examples) // ROWS)]:
        for response in example.responses:
            tail = response[-1 - BEHIND :].tolist()
            while tail and is_blank(tail[-1]):
                tail.pop()
            if tail and tail[-1] in special:
                found[tail[-1]] += 1
    total = found.total()
    return [number for number, count in found.most_common() if count >= SHARE * total]
