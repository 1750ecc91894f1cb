"""Rows of K responses: `prompt` and `responses`, an entry each, and which pairs are formed of them.

An entry has `text` (after a prompt that is a conversation: one turn of the assistant) or `messages` (the turns after
the prompt), and as the run needs them `score`, `win_prob` (against the previous policy), `ref_logps`, `prev_logps`;
`greedy`: true marks the reference's greedy response; other keys may hold anything. Responses are compared by score, or
by win_prob where there are no scores. A response goes through the model once, however many pairs it is in, and not at
all where it is in none that the run reads.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastpo.data import arrow
from fastpo.data.rows import (
    BOUNDS,
    GREEDY,
    RESPONSES,
    InvalidRow,
    KWay,
    NoPair,
    Row,
    Schema,
    check_text,
    form_of,
    read_number,
    read_texts,
    refuse_images,
    says_nothing,
    template_kwargs,
    with_greedy,
)
from fastpo.errors import DataError, nearest, quoted

PAIRS = "pairs"  # of pair_policy=explicit: [winner, loser] lists of places in `responses`
OF_PAIRS = ("weight", "margin")  # a number of the row that all its pairs have
_ROUNDING = 1e-9  # 0.9 - 0.8 is a margin of 0.1

# Keys of an entry: bounds, and the columns of pairs in whose place they stand.
_NUMBERS = {
    "score": (BOUNDS["chosen_score"], ("chosen_score",)),
    "win_prob": (BOUNDS["win_prob"], ("win_prob_chosen",)),
    "ref_logps": (BOUNDS["ref_chosen_logps"], ("ref_chosen_logps",)),
    "prev_logps": (BOUNDS["prev_chosen_logps"], ("prev_chosen_logps",)),
}


@dataclass(frozen=True)
class Forming:
    """Which pairs rows of K responses give, as TrainConfig's `pair_policy` and `pair_margin` say.

    best_worst: the best against the worst, the first of either where several are; all: every two that differ; margin:
    every two that differ by `margin` or more; explicit: the row's column `pairs`. Ties are never pairs. With `whole`,
    for losses of lists, the responses that are in no pair are used too.
    """

    policy: str = "best_worst"
    margin: float | None = None
    whole: bool = False

    def pairs(self, values: Sequence[float]) -> list[tuple[int, int]]:
        """(preferred, other) of responses with these scores or win probabilities; empty where none is formed."""
        if self.policy == "best_worst":
            best, worst = values.index(max(values)), values.index(min(values))
            return [(best, worst)] if values[best] > values[worst] else []
        least = (self.margin or 0.0) - _ROUNDING
        return [(i, j) for i, a in enumerate(values) for j, b in enumerate(values) if a > b and a - b >= least]


BEST_WORST = Forming()


def is_kway(columns: Collection[str], rows: Sequence[Mapping]) -> bool:
    """Whether rows have K responses, by the first that has any; DataError where they are pairs at the same time."""
    if RESPONSES not in columns:
        return False
    both = [name for name in ("chosen", "rejected") if name in columns]
    first = next((row[RESPONSES] for row in rows if _there(row.get(RESPONSES))), None)
    if both and isinstance(first, list | tuple) and isinstance(first[0], Mapping):
        raise DataError(f"the data have '{RESPONSES}' and {quoted(both)}: leave out one of them")
    return not both


def _there(responses: Any) -> bool:
    return responses is not None and (not hasattr(responses, "__len__") or len(responses) > 0)


def read_schema(
    columns: Collection[str], rows: Sequence[Mapping], wanted: Collection[str] | None, forming: Forming
) -> Schema:
    """The form of all rows from the first of them; `wanted` are optional columns, by the names that pairs have."""
    if "prompt" not in columns:
        close = nearest("prompt", columns, 0.6)
        hint = f": did you mean '{close}'? Rename it to 'prompt'" if close else ""
        raise DataError(f"rows with '{RESPONSES}' need the column 'prompt', missing from {quoted(columns)}{hint}")
    refuse_images(columns)

    def want(name: str) -> bool:
        return wanted is None or name in wanted

    at, first = next(
        ((k, row) for k, row in enumerate(rows) if row.get("prompt") is not None and _there(row.get(RESPONSES))),
        (0, {}),
    )
    if not first:
        raise DataError(f"the first {len(rows)} rows have no '{RESPONSES}', or no prompt")
    forms = {"prompt": form_of(first.get("prompt"), "prompt", at)}
    if forms["prompt"] == "ids":
        raise DataError(f"row {at}: rows with '{RESPONSES}' need a prompt of text or turns, not token ids")
    if forming.policy == "explicit" and PAIRS not in columns:
        raise DataError(f"pair_policy=explicit reads the column '{PAIRS}', missing from {quoted(columns)}")
    given = {key for entry in _entries(first, at) for key, value in entry.items() if value is not None}
    rank = next((name for name in ("score", "win_prob") if name in given), None)
    if rank is None and forming.policy != "explicit":
        near = {name: nearest(name, given, 0.5) for name in ("score", "win_prob")}
        hint = next((f": rename '{close}' to '{name}'?" for name, close in near.items() if close), "")
        raise DataError(
            f"pair_policy={forming.policy} compares responses by 'score' or 'win_prob', and those of row {at} have "
            f"only {quoted(sorted(given))}{hint}"
        )
    read = [name for name, (_, stands_for) in _NUMBERS.items() if name in given and any(map(want, stands_for))]
    win_probs = "win_prob" in read
    if rank is not None and forming.policy != "explicit" and rank not in read:
        read.append(rank)
    row_numbers = tuple(name for name in ("weight", "margin", "ref_greedy_logps") if name in columns and want(name))
    greedy = wanted is not None and GREEDY in wanted
    plan = KWay(forming.policy, forming.margin or 0.0, forming.whole, rank, tuple(read), win_probs, greedy)
    return Schema("preference", forms["prompt"] == "chat", True, forms, row_numbers, kway=plan)


def parse_row(raw: Mapping, number: int, schema: Schema) -> Row:
    """Checks one row and forms its pairs, as rows.parse_row does for pairs. Its completions are those in use."""
    plan = schema.kway
    assert plan is not None
    prompt = read_texts(raw, number, schema.forms)["prompt"]
    if schema.conversational and not prompt:
        raise InvalidRow("empty prompt", f"row {number}: the prompt is empty")
    entries = _entries(raw, number)
    if len(entries) < 2:
        message = f"row {number}: a preference needs two responses or more, '{RESPONSES}' has {len(entries)}"
        raise InvalidRow("fewer than two responses", message)
    texts = [_completion(entry, f"row {number}: response {k}", schema) for k, entry in enumerate(entries)]
    for k, text in enumerate(texts):
        if says_nothing(text):
            raise InvalidRow("empty completion", f"row {number}: response {k} is empty")
        if text in texts[:k]:
            message = f"row {number}: responses {texts.index(text)} and {k} are identical"
            raise InvalidRow("identical responses", message)
    found = {name: [_number(entry, name, f"row {number}: response {k}") for k, entry in enumerate(entries)]
             for name in plan.numbers}  # fmt: skip
    of_row = {name: read_number(raw.get(name), BOUNDS[name], name, f"row {number}: column '{name}'")
              for name in schema.numbers if name in OF_PAIRS or raw.get(name) is not None}  # fmt: skip
    if plan.policy == "explicit":
        pairs = _explicit(raw, number, len(entries))
    else:
        pairs = Forming(plan.policy, plan.margin).pairs(found[str(plan.rank)])
    if not pairs:
        why = {"margin": f"no two differ by {plan.margin:g} in {plan.rank}", "explicit": f"'{PAIRS}' is empty"}
        reason = f"no pair ({why.get(plan.policy, f'all have the same {plan.rank}')})"
        raise NoPair(reason, f"row {number}: {reason}")

    greedy = [k for k, entry in enumerate(entries) if entry.get(GREEDY) is True]
    if len(greedy) > 1:
        raise InvalidRow("several greedy responses", f"row {number}: responses {greedy} all say '{GREEDY}'")
    used = range(len(entries)) if plan.whole else dict.fromkeys(k for pair in pairs for k in pair)
    places = [*used, *(k for k in greedy if plan.greedy and k not in used)]
    at = {k: place for place, k in enumerate(places)}
    of_pairs = {name: [of_row[name]] * len(pairs) for name in OF_PAIRS if name in of_row}
    if plan.win_probs:
        probs = found["win_prob"]
        of_pairs["win_prob_chosen"] = [probs[winner] for winner, _ in pairs]
        of_pairs["win_prob_rejected"] = [probs[loser] for _, loser in pairs]
    of_responses = {name: [values[k] for k in places] for name, values in found.items() if name != "win_prob"}
    row = Row(
        number, prompt, tuple(texts[k] for k in places), template_kwargs(raw, number),
        [(at[winner], at[loser]) for winner, loser in pairs], of_pairs, of_responses, offered=len(entries),
        greedy=at[greedy[0]] if greedy and plan.greedy else None,
    )  # fmt: skip
    if not plan.greedy or greedy:
        return row
    if raw.get(GREEDY) is None:
        message = f"row {number} has neither '{GREEDY}', the reference's greedy response, nor a response marked so"
        raise InvalidRow("no greedy response", message)
    text = _completion({"text" if isinstance(raw[GREEDY], str) else "messages": raw[GREEDY]},
                       f"row {number}: '{GREEDY}'", schema)  # fmt: skip
    if says_nothing(text):
        raise InvalidRow("empty completion", f"row {number}: '{GREEDY}' is empty")
    if text in texts and texts.index(text) not in at:
        k = texts.index(text)
        columns = {name: [*values, found[name][k]] for name, values in of_responses.items()}
        return row._replace(completions=(*row.completions, text), greedy=len(places), response_columns=columns)
    return with_greedy(row, text, of_row.get("ref_greedy_logps"))


def refuse_loss(loss_name: str, key: str, single: bool) -> None:
    """DataError for a loss that reads what the responses lack."""
    if single and key == "win_prob":
        raise DataError(
            f"loss_type={loss_name!r} reads win_prob as P(chosen beats rejected), which is a pair's: give rows of "
            "prompt, chosen and rejected"
        )
    raise DataError(f"loss_type={loss_name!r} needs '{key}' in every entry of '{RESPONSES}'")


def _entries(raw: Mapping, number: int) -> Sequence[Mapping]:
    entries = raw.get(RESPONSES)
    if entries is None:
        raise InvalidRow(f"'{RESPONSES}' is None", f"row {number} has no '{RESPONSES}'")
    if not isinstance(entries, list | tuple) or not all(isinstance(entry, Mapping) for entry in entries):
        raise DataError(f"row {number}: '{RESPONSES}' must be a list of objects with 'text' or 'messages'")
    return entries


def _completion(entry: Mapping, what: str, schema: Schema) -> Any:
    """The entry's text or turns, in the form of the prompt."""
    given = [name for name in ("text", "messages") if entry.get(name) is not None]
    if len(given) != 1:
        close = None if given else nearest("text", entry, 0.5) or nearest("messages", entry, 0.5)
        hint = f": did you mean '{close}'?" if close else f", found {quoted(entry)}"
        raise DataError(f"{what} needs 'text' or 'messages'{', not both' if given else hint}")
    value = entry[given[0]]
    if given == ["text"]:
        if not isinstance(value, str):
            raise DataError(f"{what}: 'text' must be a text, not a {type(value).__name__} (turns go in 'messages')")
        check_text(value, what)
        return [{"role": "assistant", "content": value}] * bool(value) if schema.conversational else value
    if not isinstance(value, list | tuple) or (value and not isinstance(value[0], Mapping)):
        raise DataError(f"{what}: 'messages' must be a list of turns, not a {type(value).__name__}")
    if value and "role" not in value[0]:
        raise DataError(f"{what}: the turns of 'messages' need 'role' and 'content', found {quoted(value[0])}")
    if not schema.conversational:
        raise DataError(f"{what} has 'messages' where the prompt is a text: give 'text', or the prompt as turns")
    return list(arrow.without_nulls(value))


def _number(entry: Mapping, name: str, what: str) -> float:
    if entry.get(name) is None:
        raise InvalidRow(f"'{name}' is missing", f"{what} has no '{name}'")
    return read_number(entry[name], _NUMBERS[name][0], name, f"{what}: '{name}'")


def _explicit(raw: Mapping, number: int, k: int) -> list[tuple[int, int]]:
    """The row's own pairs, each once."""
    pairs = raw.get(PAIRS)
    what = f"row {number}: column '{PAIRS}'"
    if not isinstance(pairs, list | tuple):
        raise InvalidRow(f"bad '{PAIRS}'", f"{what} must be a list of [winner, loser], not {pairs!r}")
    for pair in pairs:
        whole = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(i) is int for i in pair)
        if not whole or pair[0] == pair[1]:
            raise InvalidRow(f"bad '{PAIRS}'", f"{what} has {pair!r}, which is no [winner, loser] of two responses")
        if not all(0 <= i < k for i in pair):
            raise InvalidRow(f"bad '{PAIRS}'", f"{what} has {pair!r}, and the {k} responses are numbered 0 to {k - 1}")
    return list(dict.fromkeys((i, j) for i, j in pairs))
