"""Rows of K responses: `prompt` and `responses`, an entry each, and which pairs are formed of them.

An entry has `text` (after a prompt that is a conversation: one turn of the assistant), `messages` (the turns after the
prompt) or `token_ids` (as sampled after `prompt_ids`; a text or turns beside them are not read), and as the run needs
them `score`, `win_prob` (against the previous policy), `ref_logps`, `prev_logps`; `greedy`: true marks the reference's
greedy response, `finished`: false one that was cut off; other keys may hold anything. Responses are compared by score,
or by win_prob where there are no scores. A response goes through the model once, however many pairs it is in, and not
at all where it is in none that the run reads.

Equal responses are one: with the mean of their numbers, each weighing as often as its `count` says it was given.
"""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastpo.data import arrow
from fastpo.data.rows import (
    BOUNDS,
    GREEDY,
    MOST,
    PROMPT_IDS,
    RESPONSES,
    InvalidRow,
    KWay,
    NoPair,
    Row,
    Schema,
    Unfinished,
    check_text,
    form_of,
    has_prompt_ids,
    is_ids,
    prompt_form,
    read_ids,
    read_number,
    read_prompt_ids,
    read_texts,
    refuse_images,
    says_nothing,
    template_kwargs,
    with_greedy,
    without_prompt,
)
from fastpo.errors import DataError, nearest, quoted

TOKEN_IDS, FINISHED, COUNT = "token_ids", "finished", "count"  # of an entry
PAIRS = "pairs"  # of pair_policy=explicit: [winner, loser] or [winner, loser, weight], places in `responses`
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
    exact = has_prompt_ids(columns, rows)
    if "prompt" not in columns and not exact:
        close = nearest("prompt", columns, 0.6)
        hint = f": did you mean '{close}'? Rename it to 'prompt'" if close else ""
        raise DataError(f"rows with '{RESPONSES}' need the column 'prompt', missing from {quoted(columns)}{hint}")
    refuse_images(columns)

    def want(name: str) -> bool:
        return wanted is None or name in wanted

    prompt = PROMPT_IDS if exact else "prompt"
    at, first = next(
        ((k, row) for k, row in enumerate(rows) if row.get(prompt) is not None and _there(row.get(RESPONSES))),
        (0, {}),
    )
    if not first:
        raise DataError(f"the first {len(rows)} rows have no '{RESPONSES}', or no prompt")
    forms = prompt_form(rows) if exact else {"prompt": form_of(first.get("prompt"), "prompt", at)}
    if forms.get("prompt") == "ids":
        forms, exact = {}, True
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
    return Schema("preference", forms.get("prompt") == "chat", True, forms, row_numbers, kway=plan,
                  prompt_ids=prompt if exact else None)  # fmt: skip


def narrowed(plan: KWay, columns: Collection[str]) -> KWay:
    """What is read of rows whose loss reads these optional columns alone, by the names that pairs have."""
    read = {name for name, (_, stands_for) in _NUMBERS.items() if any(column in columns for column in stands_for)}
    return replace(
        plan, numbers=tuple(name for name in plan.numbers if name in read or name == plan.rank),
        win_probs=plan.win_probs and "win_prob" in read, greedy=plan.greedy and GREEDY in columns,
    )  # fmt: skip


@dataclass(frozen=True)
class Offer:
    """All that a row of K responses has to form its pairs of; lists of one entry a response."""

    row: Row  # without responses
    completions: list[Any]
    counts: list[int]  # how often each was given
    numbers: Mapping[str, list[float]]
    of_row: Mapping[str, float]
    marked: list[int]  # those that say they are the reference's greedy response
    unfinished: list[bool]
    pairs: Mapping[tuple[int, int], float] | None  # the row's own, with their weights
    given: int  # entries
    greedy: Any = None  # the column, where it is read and no response is marked
    weighted: bool = False  # whether the row's own pairs have weights

    def merge(self, keys: Sequence[Hashable]) -> "Offer":
        """Those of the same key as one response."""
        first: dict[Hashable, int] = {}
        at = [first.setdefault(key, len(first)) for key in keys]
        groups: list[list[int]] = [[] for _ in first]
        for k, place in enumerate(at):
            groups[place].append(k)

        def mean(values: Sequence[float], group: list[int]) -> float:
            if len({values[k] for k in group}) == 1:
                return values[group[0]]
            counts = [self.counts[k] for k in group]
            return sum(values[k] * count for k, count in zip(group, counts, strict=True)) / sum(counts)

        pairs: dict[tuple[int, int], float] = {}
        for (i, j), weight in (self.pairs or {}).items():
            if at[i] != at[j]:  # of two that are one, each with its weight, or one of weight 1
                before = pairs.get((at[i], at[j]), 0.0)
                pairs[at[i], at[j]] = before + weight if self.weighted else 1.0
        return replace(
            self, completions=[self.completions[group[0]] for group in groups],
            counts=[sum(self.counts[k] for k in group) for group in groups],
            numbers={name: [mean(values, group) for group in groups] for name, values in self.numbers.items()},
            marked=sorted({at[k] for k in self.marked}), unfinished=[self.unfinished[group[0]] for group in groups],
            pairs=None if self.pairs is None else pairs,
        )  # fmt: skip


def parse_row(raw: Mapping, number: int, schema: Schema) -> Row:
    """Checks one row and forms its pairs, as rows.parse_row does for pairs. Its completions are those in use."""
    plan = schema.kway
    assert plan is not None
    prompt_ids = read_prompt_ids(raw, number, schema)
    prompt = read_texts(raw, number, schema.forms, prompt_ids is not None).get("prompt", "")
    if schema.conversational and not prompt and prompt_ids is None:
        raise InvalidRow("empty prompt", f"row {number}: the prompt is empty")
    entries = _entries(raw, number)
    what = [f"row {number}: response {k}" for k in range(len(entries))]
    counts = [_count(entry, of) for entry, of in zip(entries, what, strict=True)]
    if sum(counts) < 2:
        message = f"row {number}: a preference needs two responses or more, '{RESPONSES}' has {len(entries)}"
        raise InvalidRow("fewer than two responses", message)
    completions = [completion(entry, of, schema, raw) for entry, of in zip(entries, what, strict=True)]
    for response, of in zip(completions, what, strict=True):
        if says_nothing(response):
            raise InvalidRow("empty completion", f"{of} is empty")
    if prompt_ids is None and any(map(is_ids, completions)):
        prompt_ids = []  # those of the prompt's text
    found = {name: [_number(entry, name, of) for entry, of in zip(entries, what, strict=True)]
             for name in plan.numbers}  # fmt: skip
    of_row = {name: read_number(raw.get(name), BOUNDS[name], name, f"row {number}: column '{name}'")
              for name in schema.numbers if name in OF_PAIRS or raw.get(name) is not None}  # fmt: skip
    marked = [k for k, entry in enumerate(entries) if entry.get(GREEDY) is True]
    greedy = None
    if plan.greedy and not marked and raw.get(GREEDY) is not None:
        key = "text" if isinstance(raw[GREEDY], str) else TOKEN_IDS if is_ids(raw[GREEDY]) else "messages"
        greedy = completion({key: raw[GREEDY]}, f"row {number}: '{GREEDY}'", schema, raw)
        if says_nothing(greedy):
            raise InvalidRow("empty completion", f"row {number}: '{GREEDY}' is empty")
    pairs, weighted = _explicit(raw, number, len(entries)) if plan.policy == "explicit" else (None, False)
    base = Row(number, prompt, (), template_kwargs(raw, number), prompt_ids=prompt_ids)
    offer = Offer(
        base, completions, counts, found, of_row, marked, [entry.get(FINISHED) is False for entry in entries],
        pairs, len(entries), greedy, weighted,
    )  # fmt: skip
    same = [next(j for j, other in enumerate(completions) if _same(other, c)) for c in completions]
    return _formed(offer.merge(same) if same != list(range(len(same))) else offer, plan)


def whole(row: Row) -> Row:
    """A row with all of its responses and no pairs."""
    return row.offer.row._replace(completions=tuple(row.offer.completions))


def merged(row: Row, keys: Sequence[Hashable], schema: Schema) -> Row:
    """A row whose pairs are formed anew, responses of the same key being one: one key for each of those of `whole`."""
    assert schema.kway is not None
    return _formed(row.offer.merge(keys), schema.kway)


def _formed(offer: Offer, plan: KWay) -> Row:
    """The row with the pairs of its responses, and those in use; NoPair where there are none."""
    number, completions, found = offer.row.number, offer.completions, offer.numbers
    if len(completions) < 2:
        reason = "fewer than two distinct responses"
        raise NoPair(reason, f"row {number}: {reason}")
    own = offer.pairs
    pairs = Forming(plan.policy, plan.margin).pairs(found[str(plan.rank)]) if own is None else list(own)
    if not pairs:
        why = {"margin": f"no two differ by {plan.margin:g} in {plan.rank}", "explicit": f"'{PAIRS}' is empty"}
        reason = f"no pair ({why.get(plan.policy, f'all have the same {plan.rank}')})"
        raise NoPair(reason, f"row {number}: {reason}")
    greedy, of_row = offer.marked, offer.of_row
    if len(greedy) > 1:
        raise InvalidRow("several greedy responses", f"row {number}: responses {greedy} all say '{GREEDY}'")
    used = range(len(completions)) if plan.whole else dict.fromkeys(k for pair in pairs for k in pair)
    places = [*used, *(k for k in greedy if plan.greedy and k not in used)]
    at = {k: place for place, k in enumerate(places)}
    of_pairs = {name: [of_row[name]] * len(pairs) for name in OF_PAIRS if name in of_row}
    if offer.weighted:
        of_pairs["weight"] = [of_row.get("weight", 1.0) * (own[pair] if own else 1.0) for pair in pairs]
    if plan.win_probs:
        probs = found["win_prob"]
        of_pairs["win_prob_chosen"] = [probs[winner] for winner, _ in pairs]
        of_pairs["win_prob_rejected"] = [probs[loser] for _, loser in pairs]
    of_responses = {name: [values[k] for k in places] for name, values in found.items() if name != "win_prob"}
    row = offer.row._replace(
        completions=tuple(completions[k] for k in places), pairs=[(at[winner], at[loser]) for winner, loser in pairs],
        pair_columns=of_pairs, response_columns=of_responses, offered=offer.given, offer=offer,
        greedy=at[greedy[0]] if greedy and plan.greedy else None, merged=offer.given - len(completions),
        unfinished=sum(offer.unfinished[k] for k in places),
    )  # fmt: skip
    if not plan.greedy or greedy:
        return row
    if offer.greedy is None:
        message = f"row {number} has neither '{GREEDY}', the reference's greedy response, nor a response marked so"
        raise InvalidRow("no greedy response", message)
    k = next((k for k, other in enumerate(completions) if _same(other, offer.greedy)), None)
    if k is not None and k not in at:
        columns = {name: [*values, found[name][k]] for name, values in of_responses.items()}
        return row._replace(
            completions=(*row.completions, completions[k]), greedy=len(places), response_columns=columns
        )
    return with_greedy(row, offer.greedy, of_row.get("ref_greedy_logps"))


def _same(a: Any, b: Any) -> bool:
    """Whether two completions are the same text, the same turns or the same token ids; an end is part of a text."""
    return type(a) is type(b) and a == b


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


def completion(entry: Mapping, what: str, schema: Schema, raw: Mapping) -> Any:
    """The entry's token ids, or its text or turns in the form of the prompt."""
    finished = entry.get(FINISHED)
    if finished is not None and not isinstance(finished, bool):
        raise InvalidRow(f"bad '{FINISHED}'", f"{what}: '{FINISHED}' must be true or false, not {finished!r}")
    if entry.get(TOKEN_IDS) is not None:
        if schema.prompt_ids is None and schema.conversational:
            raise DataError(f"{what} has '{TOKEN_IDS}', and the prompt is a conversation: give its ids too, as the "
                            f"column '{PROMPT_IDS}'")  # fmt: skip
        return read_ids(entry[TOKEN_IDS], f"{what}: '{TOKEN_IDS}'")
    given = [name for name in ("text", "messages") if entry.get(name) is not None]
    if len(given) != 1:
        keys = [key for key, value in entry.items() if value is not None]
        near = (nearest(name, keys, 0.5) for name in ("text", "messages", TOKEN_IDS))
        close = None if given else next(filter(None, near), None)
        hint = f": did you mean '{close}'?" if close else f", found {quoted(keys)}"
        raise DataError(f"{what} needs 'text', 'messages' or '{TOKEN_IDS}'{', not both' if given else hint}")
    value = entry[given[0]]
    if given == ["text"] and not isinstance(value, str):
        raise DataError(f"{what}: 'text' must be a text, not a {type(value).__name__} (turns go in 'messages')")
    if schema.prompt_ids is not None and (not schema.forms or raw.get("prompt") is None):
        raise InvalidRow("a text without 'prompt'", without_prompt(what, "text" if given == ["text"] else "chat"))
    if finished is False and schema.conversational:
        message = f"{what} is not '{FINISHED}', and a chat template would end it: give its '{TOKEN_IDS}'"
        raise InvalidRow("unfinished turns", message)
    if given == ["text"]:
        check_text(value, what)
        if schema.conversational:
            return [{"role": "assistant", "content": value}] * bool(value)
        return Unfinished(value) if finished is False else value
    if not isinstance(value, list | tuple) or (value and not isinstance(value[0], Mapping)):
        raise DataError(f"{what}: 'messages' must be a list of turns, not a {type(value).__name__}")
    if value and "role" not in value[0]:
        raise DataError(f"{what}: the turns of 'messages' need 'role' and 'content', found {quoted(value[0])}")
    if not schema.conversational:
        raise DataError(f"{what} has 'messages' where the prompt is a text: give 'text', or the prompt as turns")
    return list(arrow.without_nulls(value))


def _count(entry: Mapping, what: str) -> int:
    """How often the policy gave the response."""
    value = entry.get(COUNT)
    if value is None:
        return 1
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or not 1 <= value <= MOST \
            or value != int(value):  # fmt: skip
        raise InvalidRow(f"bad '{COUNT}'", f"{what}: '{COUNT}' must be a whole number from 1 on, not {value!r}")
    return int(value)


def _number(entry: Mapping, name: str, what: str) -> float:
    if entry.get(name) is None:
        raise InvalidRow(f"'{name}' is missing", f"{what} has no '{name}'")
    return read_number(entry[name], _NUMBERS[name][0], name, f"{what}: '{name}'")


def _explicit(raw: Mapping, number: int, k: int) -> tuple[dict[tuple[int, int], float], bool]:
    """(the row's own pairs with their weights, whether any is given); a pair that is there twice counts once, or with
    the sum of its weights."""
    pairs = raw.get(PAIRS)
    what = f"row {number}: column '{PAIRS}'"
    if not isinstance(pairs, list | tuple):
        raise InvalidRow(f"bad '{PAIRS}'", f"{what} must be a list of [winner, loser], not {pairs!r}")
    out: dict[tuple[int, int], float] = {}
    weighted = any(isinstance(pair, list | tuple) and len(pair) == 3 for pair in pairs)
    for pair in pairs:
        # Arrow has a list's numbers as one type: places come as floats beside a weight.
        whole = isinstance(pair, list | tuple) and len(pair) in (2, 3) and all(map(_is_place, pair[:2]))
        if not whole or pair[0] == pair[1]:
            raise InvalidRow(f"bad '{PAIRS}'", f"{what} has {pair!r}, which is no [winner, loser] of two responses")
        if not all(0 <= i < k for i in pair[:2]):
            raise InvalidRow(f"bad '{PAIRS}'", f"{what} has {pair!r}, and the {k} responses are numbered 0 to {k - 1}")
        i, j = int(pair[0]), int(pair[1])
        weight = read_number(pair[2], BOUNDS["weight"], "weight", f"{what}: {pair!r}") if len(pair) == 3 else 1.0
        out[i, j] = out.get((i, j), 0.0) + weight if weighted else 1.0
    return out, weighted


def _is_place(value: Any) -> bool:
    return type(value) is int or (type(value) is float and value.is_integer())
