"""What rows of other layouts hold, and their conversions to fastpo's own columns: one function a layout.

A conversion takes a row, and whether its prompts are texts as they are (else they are turns of a chat), and gives
fastpo's columns; it raises `Unfit` for a row that it cannot read and `Tie` for one that prefers neither response.
"""

import ast
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fastpo.data.rows import RESPONSES

_CHAT_ROLES = ("system", "user", "assistant", "tool")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "observation": "tool"}
GOOD = {True: True, "true": True, "thumbs_up": True, "up": True, "good": True, "like": True, "positive": True,
        "desirable": True, False: False, "false": False, "thumbs_down": False, "down": False, "bad": False,
        "dislike": False, "negative": False, "undesirable": False}  # fmt: skip
# How a prompt ends that was made ready for its answer: such texts are taken as they are, not as a turn of a chat.
RENDERED = re.compile(
    r"((assistant|answer|response|output|tl;dr)\s*:|\[/inst\]|<\|[^|>]*\|>|<[^<>]*turn[^<>]*>\w*)\s*$", re.IGNORECASE
)


class Unfit(Exception):
    """A row that the conversion cannot read: what the report counts, and what is said of the row."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Tie(Exception):
    """A row that prefers neither response, or has too few of them: dropped and counted."""


def first_value(rows: Iterable[Mapping], name: str) -> Any:
    """The first value of a column that is there, and not empty if there is such a one."""
    values = [row[name] for row in rows if row.get(name) is not None]
    full = (value for value in values if not isinstance(value, str | list) or value)
    return next(full, values[0] if values else None)


def is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value) and not _stacked(value)


def _stacked(value: Any) -> bool:
    """Whether a list of objects became an object of lists, as by the feature Sequence of `datasets`."""
    if not isinstance(value, Mapping) or not {"role", "from", "response", "answer"} & set(value):
        return False
    lengths = {len(v) if isinstance(v, list) else -1 for v in value.values()}
    return len(lengths) == 1 and -1 not in lengths


def listed_objects(value: Any) -> Any:
    """A list of objects that stands as an object of lists, or of turns as JSON (or Python) text, as the list."""
    if _stacked(value):
        return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    turns = turns_in_text(value)
    return value if turns is None else turns


def turns_in_text(value: Any) -> list | None:
    """The turns of a conversation that stands as text; None for any other value."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{") or not value.rstrip().endswith("}]"):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            turns = read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        known = isinstance(turns, list) and all(is_turn(t) and role_of(t) in _CHAT_ROLES for t in turns)
        return turns if known and all({"content", "value", "tool_calls"} & set(t) for t in turns) else None
    return None


def holds(value: Any, shape: str) -> bool:
    value = listed_objects(value)
    many = isinstance(value, list | tuple) and len(value) > 0
    found = {
        "any": value is not None,
        "text": isinstance(value, str),
        "turn": is_turn(value),
        "turns": many and is_turn(value[0]),
        "answers": many and is_turn(value[0]) and role_of(value[0]) == "assistant",
        "answer": isinstance(value, str) or is_turn(value) or (many and is_turn(value[0])
                                                                and role_of(value[0]) == "assistant"),
        "dict": isinstance(value, Mapping),
        "dicts": many and isinstance(value[0], Mapping),
        "number": isinstance(value, int | float) and not isinstance(value, bool),
        "flag": isinstance(value, int | float | bool),
        "verdict": verdict_of(value) is not None,
        "word": isinstance(value, str) and verdict_of(value) is not None,
        "label": verdict_of(value) is not None or (isinstance(value, int) and value in (0, 1)),
        "two": many and len(value) == 2 and all(isinstance(item, str) for item in value),
        "ids": many and isinstance(value[0], int) and not isinstance(value[0], bool),
    }  # fmt: skip
    return found[shape]


# Parts of rows.


def text_of(row: Mapping, name: str) -> str:
    value = row.get(name)
    if value is None:
        raise Unfit(f"'{name}' is None", f"column '{name}' is None" if name in row else f"there is no column '{name}'")
    if not isinstance(value, str):
        raise Unfit(f"bad '{name}'", f"column '{name}' must be a text, not {shown(value)}")
    return value


def number_of(row: Mapping, name: str) -> float:
    value = row.get(name)
    if not isinstance(value, int | float) or value != value:
        raise Unfit(f"bad '{name}'", f"column '{name}' must be a number, not {shown(value)}")
    return value


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def verdict_of(value: Any) -> bool | None:
    if isinstance(value, str):
        value = value.strip().lower().replace(" ", "_")
    return GOOD.get(value) if isinstance(value, str | bool) else None


def role_of(turn: Mapping) -> Any:
    role = turn.get("role", turn.get("from"))
    return ROLES.get(role, role) if isinstance(role, str) else role


def turn_of(value: Any) -> dict:
    """One turn with `role` and `content`, whatever its keys were."""
    if not is_turn(value):
        raise Unfit("a turn without a role", f"a turn needs 'role' and 'content', found {shown(value)}")
    if value.get("role", value.get("from")) == "function_call":
        raise Unfit("a turn of 'function_call'", "a turn of 'function_call' has no one form: give it as 'tool_calls'")
    rest = {key: item for key, item in value.items() if key not in ("from", "value", "role", "content")
            and item is not None}  # fmt: skip
    content = value.get("content", value.get("value"))
    if isinstance(content, list | tuple) and content and all(isinstance(p, Mapping) and p.get("type") == "text"
                                                             for p in content):  # fmt: skip
        content = "".join(str(part.get("text") or "") for part in content)
    return {"role": role_of(value), "content": content, **(rest if "role" in value else {})}


def turns_of(value: Any, name: str) -> list[dict]:
    value = listed_objects(value)
    if not isinstance(value, list | tuple):
        raise Unfit(f"bad '{name}'", f"column '{name}' must be a list of turns, not {shown(value)}")
    return [turn_of(turn) for turn in value]


def user(text: str, system: Any = None) -> list[dict]:
    begin = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    return [*begin, {"role": "user", "content": text}]


def bot(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def answer_of(value: Any, name: str) -> list[dict]:
    """A response as turns: from its text, its one turn, or its turns."""
    value = listed_objects(value)
    if isinstance(value, str):
        return bot(value)
    if is_turn(value):
        return [turn_of(value)]
    if value is None:
        raise Unfit(f"'{name}' is None", f"column '{name}' is None")
    return turns_of(value, name)


def pair_of(prompt: Any, chosen: str, rejected: str, as_text: bool) -> dict:
    """A pair of texts after a prompt: texts as they are, or turns of a chat."""
    if as_text:
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    asked = user(prompt) if isinstance(prompt, str) else prompt
    return {"prompt": asked, "chosen": bot(chosen), "rejected": bot(rejected)}


def of_two(prompt: str, first: str, second: str, better: Callable[[Mapping], int], name: str) -> Callable:
    """A conversion of a prompt and two responses; `better` is -1 for the first, 1 for the second, 0 for a tie."""

    def convert(row: Mapping, as_text: bool) -> dict:
        verdict = better(row)
        if verdict == 0:
            raise Tie(f"tie in '{name}'")
        chosen, rejected = (first, second) if verdict < 0 else (second, first)
        asked = turns_of(row.get(prompt), prompt) if not isinstance(row.get(prompt), str) else text_of(row, prompt)
        if isinstance(asked, str) and "<extra_id_1>" in asked:
            asked = steerlm(asked)
        return pair_of(asked, text_of(row, chosen), text_of(row, rejected), as_text)

    return convert


def steerlm(prompt: str) -> list[dict]:
    """HelpSteer's prompts of several turns, which its markers part."""
    first, *rest = re.split(r"\n?<extra_id_1>(User|Assistant)\n?", prompt)
    roles = [role.lower() for role in rest[::2]]
    turns = [("user", first), *zip(roles, rest[1::2], strict=True)]
    return [{"role": role, "content": text.strip("\n")} for role, text in turns if text.strip()]


def sign(name: str) -> Callable[[Mapping], int]:
    return lambda row: (lambda v: (v > 0) - (v < 0))(number_of(row, name))


def is_first(name: str, first: int) -> Callable[[Mapping], int]:
    """`name` holds which response is better: `first`, or the other of 0 and 1."""

    def better(row: Mapping) -> int:
        value = number_of(row, name)
        if value not in (0, 1):
            raise Unfit(f"bad '{name}'", f"column '{name}' must be 0 or 1, not {shown(value)}")
        return -1 if value == first else 1

    return better


def winner_of(row: Mapping) -> int:
    """Arena's verdict, as a word or as three flags."""
    if "winner" not in row:
        flags = [number_of(row, f"winner_{name}") for name in ("model_a", "model_b")]
        return int(flags[1] > flags[0]) - int(flags[0] > flags[1])
    value = str(row["winner"]).strip().lower()
    found = {"model_a": -1, "a": -1, "model_b": 1, "b": 1}.get(value, 0 if "tie" in value or "both" in value else None)
    if found is None:
        raise Unfit("bad 'winner'", f"column 'winner' must be model_a, model_b or a tie, not {shown(row['winner'])}")
    return found


def arena(row: Mapping, as_text: bool) -> dict:
    verdict = winner_of(row)
    if verdict == 0:
        raise Tie("tie in 'winner'")
    sides = [turns_of(row.get(f"conversation_{side}"), f"conversation_{side}") for side in "ab"]
    chosen, rejected = sides if verdict < 0 else sides[::-1]
    return {"chosen": chosen, "rejected": rejected}


def arena_texts(row: Mapping, as_text: bool) -> dict:
    """Arena's rows of texts; those of several turns are lists as JSON text."""
    verdict = winner_of(row)
    if verdict == 0:
        raise Tie("tie in 'winner'")
    asked, first, second = (listed(row, name) for name in ("prompt", "response_a", "response_b"))
    if not len(asked) == len(first) == len(second):
        raise Unfit("turns without their answers", f"{len(asked)} prompts have {len(first)} and {len(second)} answers")
    sides = [[turn for q, a in zip(asked, answers, strict=True) for turn in (*user(q), *bot(a))]
             for answers in (first, second)]  # fmt: skip
    chosen, rejected = sides if verdict < 0 else sides[::-1]
    return {"chosen": chosen, "rejected": rejected}


def listed(row: Mapping, name: str) -> list[str]:
    value = row.get(name)
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            value = [value]
    parts = list(value) if isinstance(value, list | tuple) else [text_of(row, name)]
    if not all(isinstance(part, str) for part in parts):
        raise Unfit(f"'{name}' is None", f"column '{name}' has a turn that is no text: {shown(value)}")
    return parts


def ultrafeedback(row: Mapping, as_text: bool) -> dict:
    entries = listed_objects(row.get("completions")) or ()
    if len(entries) < 2:
        raise Tie("fewer than two responses")
    responses = []
    for k, entry in enumerate(entries):
        scores = [entry[name] for name in ("overall_score", "fine-grained_score") if entry.get(name) is not None]
        if not scores:
            raise Unfit("no score", f"response {k} has neither 'overall_score' nor 'fine-grained_score'")
        responses.append({"text": text_of(entry, "response"), "score": scores[0]})
    return {"prompt": user(text_of(row, "instruction")), RESPONSES: responses}


def nectar(row: Mapping, as_text: bool) -> dict:
    prompt = text_of(row, "prompt")
    entries = listed_objects(row.get("answers")) or ()
    if len(entries) < 2:
        raise Tie("fewer than two responses")
    responses = [{"text": text_of(entry, "answer"), "score": -number_of(entry, "rank")} for entry in entries]
    return {"prompt": prompt if as_text else user(prompt), RESPONSES: responses}


def system_pair(prompt: str, chosen: str = "chosen", rejected: str = "rejected") -> Callable:
    def convert(row: Mapping, as_text: bool) -> dict:
        asked = user(text_of(row, prompt), row.get("system"))
        return pair_of(asked, text_of(row, chosen), text_of(row, rejected), False)

    return convert


def alpaca_prompt(row: Mapping) -> list[dict]:
    """The prompt of alpaca rows: a system text, earlier rounds, the instruction and its input, each on a line."""
    asked = [part for part in (text_of(row, "instruction"), row.get("input")) if isinstance(part, str) and part]
    *system, last = user("\n".join(asked), row.get("system"))
    rounds = [turn for q, a in row.get("history") or () for turn in (*user(q), *bot(a))]
    return [*system, *rounds, last]


def conversation_pair(column: str) -> Callable:
    def convert(row: Mapping, as_text: bool) -> dict:
        prompt = with_system(turns_of(row.get(column), column), row)
        return {"prompt": prompt, "chosen": answer_of(row.get("chosen"), "chosen"),
                "rejected": answer_of(row.get("rejected"), "rejected")}  # fmt: skip

    return convert


def with_system(turns: list[dict], row: Mapping) -> list[dict]:
    system = row.get("system")
    begins = bool(turns) and turns[0]["role"] == "system"
    return turns if begins or not isinstance(system, str) or not system.strip() else [*user("", system)[:1], *turns]


def swift(row: Mapping, as_text: bool) -> dict:
    *prompt, last = turns_of(row.get("messages"), "messages") or [{"role": None}]
    if last["role"] != "assistant":
        raise Unfit("no response", "'messages' must end with the assistant's turn, which is the chosen response")
    return {"prompt": prompt, "chosen": [last], "rejected": bot(text_of(row, "rejected_response"))}


def swift_messages(row: Mapping, as_text: bool) -> dict:
    names = {"chosen": "messages", "rejected": "rejected_messages"}
    return {ours: turns_of(row.get(name), name) for ours, name in names.items()}


def openai(row: Mapping, as_text: bool) -> dict:
    given = row.get("input")
    if not isinstance(given, Mapping):
        raise Unfit("bad 'input'", f"column 'input' must be an object with 'messages', not {shown(given)}")
    out = {"prompt": turns_of(given.get("messages"), "input.messages"),
           "chosen": answer_of(row.get("preferred_output"), "preferred_output"),
           "rejected": answer_of(row.get("non_preferred_output"), "non_preferred_output")}  # fmt: skip
    return out | ({"tools": given["tools"]} if given.get("tools") else {})


def webgpt(row: Mapping, as_text: bool) -> dict:
    scores = [number_of(row, f"score_{k}") for k in (0, 1)]
    if scores[0] == scores[1]:
        raise Tie("tie in 'score_0', 'score_1'")
    best = int(scores[1] > scores[0])
    question = text_of(row["question"], "full_text")
    return pair_of(question, text_of(row, f"answer_{best}"), text_of(row, f"answer_{1 - best}"), False)


def wrapped(column: str) -> Callable:
    """A conversation (or a text) as the prompt, and responses that are given otherwise."""

    def convert(row: Mapping, as_text: bool) -> dict:
        prompt = row.get(column)
        prompt = user(text_of(row, column), row.get("system")) if isinstance(prompt, str) else turns_of(prompt, column)
        return {"prompt": prompt, **{name: answer_of(row.get(name), name) for name in ("chosen", "rejected")}}

    return convert


def plain_turns(row: Mapping, as_text: bool) -> dict:
    """Conversations of other keys, and one turn where a list of them is meant."""
    names = [name for name in ("prompt", "chosen", "rejected", "completion") if row.get(name) is not None]
    return {name: answer_of(row[name], name) if name != "prompt" else turns_of(row[name], name) for name in names}


def split_turns(row: Mapping, column: str) -> tuple[list[dict], list[dict]]:
    """A conversation as the turns before the assistant's first and those from it on."""
    turns = with_system(turns_of(row.get(column), column), row)
    at = next((k for k, turn in enumerate(turns) if turn["role"] == "assistant"), None)
    if at is None:
        raise Unfit("no turn of the assistant", f"'{column}' has no turn of the assistant to train on")
    while turns[-1]["role"] != "assistant":  # what follows the last response is context of nothing
        turns.pop()
    return turns[:at], turns[at:]


def sft_turns(column: str) -> Callable:
    def convert(row: Mapping, as_text: bool) -> dict:
        prompt, completion = split_turns(row, column)
        return {"prompt": prompt, "completion": completion}

    return convert


def kto_turns(column: str, label: str) -> Callable:
    def convert(row: Mapping, as_text: bool) -> dict:
        *prompt, last = with_system(turns_of(row.get(column), column), row) or [{"role": None}]
        if last["role"] != "assistant":
            raise Unfit("no response", f"'{column}' must end with the assistant's turn, which is labelled")
        return {"prompt": prompt, "completion": [last], "label": row.get(label)}

    return convert


def kto_verdict(response: str, label: str) -> Callable:
    def convert(row: Mapping, as_text: bool) -> dict:
        verdict = verdict_of(row.get(label))
        if verdict is None and label == "label" and row.get(label) in (0, 1):
            verdict = bool(row[label])
        if verdict is None:
            raise Unfit(f"bad '{label}'", f"column '{label}' must say good or bad, not {shown(row.get(label))}")
        prompt, said = row.get("prompt"), row.get(response)
        if response != "completion" and not as_text and isinstance(prompt, str):
            prompt, said = user(prompt), answer_of(said, response)
        return {"prompt": prompt, "completion": said, "label": verdict}

    return convert


def asked(prompt: str, response: str) -> Callable:
    def convert(row: Mapping, as_text: bool) -> dict:
        asked, said = text_of(row, prompt), text_of(row, response)
        if as_text:
            return {"prompt": asked, "completion": said}
        return {"prompt": user(asked, row.get("system")), "completion": bot(said)}

    return convert


def token_ids(row: Mapping, as_text: bool) -> dict:
    """Token ids, of which the first that is trained begins the response; what is not trained after it weighs 0."""
    ids = list(row.get("input_ids") or ())
    trained = [True] * len(ids)
    for name, mark in (("labels", -100), ("completion_mask", 0), ("assistant_masks", 0)):
        mask = row.get(name)
        if mask is not None:
            if len(mask) != len(ids):
                raise Unfit(f"bad '{name}'", f"'{name}' has {len(mask)} entries and 'input_ids' {len(ids)}")
            trained = [old and entry != mark for old, entry in zip(trained, mask, strict=True)]
    if trained:
        trained[0] = False  # nothing predicts the first token: it is the context of the second
    if True not in trained:
        raise Unfit("no token to train on", "'input_ids' has no token to train on")
    at = trained.index(True)
    out = {"prompt": ids[:at], "completion": ids[at:]}
    return out if all(trained[at:]) else out | {"token_weights": [float(yes) for yes in trained[at:]]}


def rendered_with_system(rows: Sequence[Mapping]) -> bool:
    """Whether prompts beside a column 'system' were made ready before, with the system text in them."""
    prompt, system = first_value(rows, "prompt"), first_value(rows, "system")
    return RENDERED.search(prompt) is not None or "<|" in prompt or (bool(system) and system in prompt)


def in_both(name: str) -> Callable[[Sequence[Mapping]], bool]:
    """Whether chosen and rejected begin with the text of column `name`: the prompt is inside both."""

    def inside(rows: Sequence[Mapping]) -> bool:
        text, *pair = (first_value(rows, column) for column in (name, "chosen", "rejected"))
        return text.strip() in os.path.commonprefix(pair)

    return inside


def no_foreign(names: Sequence[str]) -> Callable[[Sequence[Mapping]], bool]:
    """Whether all are fastpo's own: lists of turns without the key 'from', or texts."""

    def own(rows: Sequence[Mapping]) -> bool:
        values = [first_value(rows, name) for name in names]
        texts = [name for name in names if isinstance(first_value(rows, name), str)]
        as_text = [all(turns_in_text(row[name]) is not None for row in rows if row.get(name) is not None)
                   for name in texts]  # fmt: skip
        foreign = any(
            is_turn(v) or _stacked(v) or (holds(v, "turns") and "from" in listed_objects(v)[0]) for v in values
        )
        return not all(as_text) or not (foreign or as_text)

    return own


def renamed(**names: str) -> Callable:
    return lambda row, as_text: {ours: row.get(theirs) for ours, theirs in names.items()}
