"""What rows must hold: the form of the columns, and the checks of every row.

Text columns (`prompt`, `chosen`, `rejected`, `completion`) are texts or conversations (turns with `role` and
`content`). The first row decides, as in TRL, and a row that differs is an error.
"""

import datetime
import json
import math
import numbers
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastpo.data import arrow
from fastpo.errors import DataError, nearest, quoted

COMPLETIONS = {"preference": ("chosen", "rejected"), "sft": ("completion",), "unpaired": ("completion",)}
LABEL = "label"  # of unpaired rows: whether the completion is desirable
RESPONSES = "responses"  # of rows with K responses: their entries (fastpo/data/kway.py)
GREEDY = "greedy"  # the reference's greedy response, beside the pair or the responses
PROMPT_IDS = "prompt_ids"  # the prompt as the policy had it: responses after it may be token ids (fastpo/data/exact.py)
DEGREE_OF = "degree"  # of rows of degree_aux: how much of the response is gone
LOSS = "loss"  # which entry of the run's loss_type trains the row
_FORM_NAMES = {"text": "a text", "chat": "a conversation", "ids": "a list of token ids"}
_IDS_AFTER_TURNS = (
    f"is a list of token ids, and the prompt is a conversation: give its ids too, as the column '{PROMPT_IDS}'"
)
ANY = "any"  # form of the responses after `prompt_ids`: token ids, or what the prompt is

# No number of a row is larger: losses are computed in fp32, which ends at 3e38, and the norm of a gradient squares what
# a weight or a score multiplies. A billion leaves room for that, and no log-probability, score or weight needs more.
MOST = 1e9
# Optional columns of preference rows: lowest and highest value. A sum of log-probabilities may round to just above 0.
BOUNDS = {
    "weight": (0.0, MOST),
    "margin": (-MOST, MOST),  # of a reward model
    "win_prob": (0.0, 1.0),
    "win_prob_chosen": (0.0, 1.0),
    "win_prob_rejected": (0.0, 1.0),
    "chosen_score": (-MOST, MOST),
    "rejected_score": (-MOST, MOST),
    "ref_chosen_logps": (-MOST, 1e-3),
    "ref_rejected_logps": (-MOST, 1e-3),
    "ref_greedy_logps": (-MOST, 1e-3),
    "prev_chosen_logps": (-MOST, 1e-3),
    "prev_rejected_logps": (-MOST, 1e-3),
}
PAIR_COLUMNS = ("weight", "margin", "win_prob", "win_prob_chosen", "win_prob_rejected")
RESPONSE_COLUMNS = {
    "score": ("chosen_score", "rejected_score"),
    "ref_logps": ("ref_chosen_logps", "ref_rejected_logps"),
    "prev_logps": ("prev_chosen_logps", "prev_rejected_logps"),
}
TOKEN_COLUMNS = ("chosen_token_weights", "rejected_token_weights")  # a list each, one number a token
SFT_WEIGHTS = "token_weights"  # the same of sft rows that are token ids, which a layout's conversion writes
PASSED = (
    *BOUNDS,
    *TOKEN_COLUMNS,
    GREEDY,
    LOSS,
    DEGREE_OF,
    "tools",
    "chat_template_kwargs",
)  # through a layout's conversion as they are
_TOGETHER = (*RESPONSE_COLUMNS.values(), ("win_prob_chosen", "win_prob_rejected"), TOKEN_COLUMNS)


class InvalidRow(Exception):
    """A row that the option `invalid` refuses or drops; `reason` is what the report counts."""

    always_dropped = False

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class NoPair(InvalidRow):
    """A row of K responses of which no pair is formed: no mistake, so dropped and counted in any case."""

    always_dropped = True


class Unfinished(str):
    """A text that its writer did not end: no end of sequence is appended to it."""


class Row(NamedTuple):
    """One row that passed the checks."""

    number: int
    prompt: Any  # str or list of turns
    completions: tuple  # the same, one for each response
    template_kwargs: dict
    pairs: Sequence[tuple[int, int]] = ()  # (preferred, other): indices into completions
    pair_columns: Mapping[str, list[float]] = {}  # one value a pair
    response_columns: Mapping[str, list[float]] = {}  # one value a response
    token_weights: tuple[list[float], ...] = ()  # one list for each response, where the data have them
    greedy: int | None = None  # which completion is the reference's greedy response
    offered: int = 0  # responses that a row of K has, of which the completions are those in use
    prompt_ids: Sequence[int] | None = None  # where completions may be token ids; empty: those of the prompt's text
    offer: Any = None  # all that a row of K has, kway.Offer
    merged: int = 0  # of the responses offered: how many were the same as one before them
    unfinished: int = 0  # of the completions: how many the policy did not end
    loss: str | None = None  # that trains it, where rows name theirs

    @property
    def compared(self) -> int:
        """Completions that preferences are about: all but a greedy response that is in no pair, the last then."""
        apart = self.greedy is not None and all(self.greedy not in pair for pair in self.pairs)
        return len(self.completions) - apart


@dataclass(frozen=True)
class Schema:
    """What the columns and the first row say about all rows."""

    kind: str
    conversational: bool
    explicit_prompt: bool  # the prompt is read from its column
    forms: dict[str, str]  # text columns that are read -> "text" or "chat"
    numbers: tuple[str, ...]  # optional columns that are read
    token_weights: bool = False  # whether TOKEN_COLUMNS are read
    kway: "KWay | None" = None  # how rows of K responses are read
    apart: bool = False  # pairs are two unpaired rows each
    language: bool = False  # every token is trained, the first one apart: the prompt is empty
    prompt_ids: str | None = None  # the column that is the prompt as token ids, where responses need not be ids
    # Where rows name their loss: the optional columns that the rows of each read.
    losses: Mapping[str, Collection[str]] = field(default_factory=dict)

    @property
    def token_ids(self) -> bool:
        """Whether rows are token ids, which no tokenizer sees."""
        return "ids" in self.forms.values()

    @property
    def completions(self) -> tuple[str, ...]:
        return (*COMPLETIONS[self.kind], *((GREEDY,) if GREEDY in self.forms else ()))


@dataclass(frozen=True)
class KWay:
    """What is read of rows with K responses, and which pairs are formed (fastpo/data/kway.py)."""

    policy: str
    margin: float
    whole: bool  # every response is used, not only those in pairs
    rank: str | None  # what responses are compared by: score or win_prob
    numbers: tuple[str, ...]  # read of every response
    win_probs: bool  # whether a loss reads the win probabilities too
    greedy: bool  # whether the reference's greedy response is read


def read_schema(columns: list[str], rows: list[Mapping], kind: str, wanted: Collection[str] | None) -> Schema:
    """The form of all rows from the column names and the first rows; `wanted` are the optional columns to read."""
    required = {"sft": ("prompt", "completion"), "unpaired": ("prompt", "completion", LABEL)}.get(
        kind, COMPLETIONS[kind]
    )
    exact = has_prompt_ids(columns, rows)
    for name in (name for name in required if not (exact and name == "prompt")):
        if name not in columns:
            raise DataError(_missing_column(name, required, columns, kind))
    if kind == "preference" and "prompt" not in columns and not exact:
        close = nearest("prompt", columns, 0.85)
        if close:
            raise DataError(
                f"no column 'prompt' but '{close}': did you mean 'prompt'? (if the prompt is the common beginning of "
                "chosen and rejected, remove that column)"
            )
    refuse_images(columns)
    greedy = kind == "preference" and GREEDY in columns and (wanted is None or GREEDY in wanted)
    if greedy and "prompt" not in columns and not exact:
        raise DataError(f"the column '{GREEDY}' needs 'prompt' beside it")
    if kind == "preference":
        for pair in _TOGETHER:
            given = [name for name in pair if name in columns and (wanted is None or name in wanted)]
            if len(given) == 1:
                lacking = pair[1 - pair.index(given[0])]
                raise DataError(f"the column '{given[0]}' needs '{lacking}' beside it")

    texts = [name for name in ("prompt", *COMPLETIONS[kind], *((GREEDY,) if greedy else ())) if name in columns]
    at, first = first_whole(rows, texts)
    explicit = "prompt" in columns or exact
    if exact:
        forms = {**prompt_form(rows), **{name: ANY for name in texts if name != "prompt"}}
    else:
        forms = {name: form_of(first.get(name), name, at) for name in texts}
    if kind == "preference" and forms.get("prompt") == "text" and forms["chosen"] == "chat":
        # A common layout: the prompt's text in its own column, and whole conversations that contain it as a turn.
        del forms["prompt"]
        explicit = False
    ids = next((name for name, form in forms.items() if form == "ids" and name != "prompt"), None)
    if ids and forms.get("prompt") == "chat":
        raise DataError(f"row {at}: '{ids}' {_IDS_AFTER_TURNS}")
    if ids and forms.get("prompt") == "text":  # of which the ids are the tokenizer's
        forms = {name: "text" if name == "prompt" else ANY for name in forms}
    elif len(set(forms.values())) > 1 and not exact:
        found = ", ".join(f"'{name}' is {_FORM_NAMES[form]}" for name, form in forms.items())
        raise DataError(f"row {at}: the columns must all be texts or all be conversations: {found}")
    if kind == "preference" and not explicit and "chat" not in forms.values():
        _refuse_apart(columns, rows)
    optional = BOUNDS if kind == "preference" else ()
    numbers_read = tuple(name for name in optional if name in columns and (wanted is None or name in wanted))
    weighs = kind == "preference" and TOKEN_COLUMNS[0] in columns and (wanted is None or TOKEN_COLUMNS[0] in wanted)
    return Schema(kind, "chat" in forms.values(), explicit, forms, numbers_read, weighs,
                  prompt_ids=PROMPT_IDS if exact else None)  # fmt: skip


def has_prompt_ids(columns: Collection[str], rows: Sequence[Mapping]) -> bool:
    """Whether prompts are given as token ids, by the first of the rows."""
    return PROMPT_IDS in columns and any(row.get(PROMPT_IDS) is not None for row in rows)


def prompt_form(rows: Sequence[Mapping]) -> dict[str, str]:
    """The form of the texts or turns that stand beside `prompt_ids`; empty where there are none."""
    number, first = next(((k, row) for k, row in enumerate(rows) if row.get("prompt") is not None), (0, {}))
    form = form_of(first["prompt"], "prompt", number) if first else "ids"
    return {} if form == "ids" else {"prompt": form}


def _refuse_apart(columns: Sequence[str], rows: Sequence[Mapping]) -> None:
    """DataError where pairs of texts begin with nothing in common and another column of text may be their prompt."""
    pairs = [(r["chosen"], r["rejected"]) for r in rows[:100]
             if isinstance(r.get("chosen"), str) and isinstance(r.get("rejected"), str)]  # fmt: skip
    apart = sum(common_length(a, b) <= min(len(a), len(b)) // 10 for a, b in pairs if a != b)
    others = [name for name in columns if name not in (*PASSED, "chosen", "rejected")
              and any(isinstance(row.get(name), str) and row[name] for row in rows[:100])]  # fmt: skip
    if others and 2 * apart > len(pairs):
        raise DataError(
            f"'chosen' and 'rejected' do not begin with the same prompt, and there is no column 'prompt': if it is in "
            f"{' or '.join(f'{name!r}' for name in others)}, dataset.rename_column({others[0]!r}, 'prompt'); if there "
            f"is none, dataset.remove_columns({others!r})"
        )


def first_whole(rows: Sequence[Mapping], names: Sequence[str]) -> tuple[int, Mapping]:
    """The first row that has all of `names`, and its number; the first of all where there is none."""
    for number, row in enumerate(rows):
        if all(row.get(name) is not None for name in names):
            return number, row
    return 0, rows[0] if rows else {}


def refuse_images(columns: Collection[str]) -> None:
    """DataError for columns of images, video or sound."""
    for name in ("image", "images", "video", "videos", "audio", "audios"):
        if name in columns:
            raise DataError(f"the column '{name}' is not supported: fastpo trains on text only")


def _missing_column(name: str, required: Sequence[str], columns: list[str], kind: str) -> str:
    message = f"{kind} rows need the columns {quoted(required)}; '{name}' is missing from {quoted(columns)}"
    others = [column for column in columns if column not in required]
    close = nearest(name, others, 0.6)
    if close:
        return f"{message}: did you mean '{close}'? Rename it to '{name}': dataset.rename_column({close!r}, {name!r})"
    if kind == "unpaired" and RESPONSES in columns:
        return f"{message}: rows of K responses are for losses of pairs and lists"
    if kind == "sft" and "chosen" in columns:
        return f"{message}: to train on the chosen responses rename 'chosen' to 'completion'"
    if kind == "preference" and "completion" in columns:
        fits = "'kto' or 'bco'" if LABEL in columns else "'sft'"
        return f"{message}: rows with 'completion' are for loss_type={fits}"
    return f"{message}: rename the column that holds it, or bring the rows into a layout that docs/data.md lists"


def form_of(value: Any, name: str, number: int) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list | tuple):
        if not value or (isinstance(value[0], Mapping) and "role" in value[0]):
            return "chat"
        if isinstance(value[0], int) and not isinstance(value[0], bool):
            return "ids"
        if isinstance(value[0], Mapping):
            raise DataError(
                f"row {number}: the turns of '{name}' need the keys 'role' and 'content', found {quoted(value[0])}"
            )
    found = f"a list of {type(value[0]).__name__}" if isinstance(value, list | tuple) else f"a {type(value).__name__}"
    message = f"row {number}: column '{name}' must be a text or a list of turns, found {found}"
    if isinstance(value, numbers.Number | datetime.date | datetime.time | datetime.timedelta):
        if isinstance(value, numbers.Number):
            message += (
                f" ({_shortened(value)}): the column holds numbers. Where `datasets` made them of a CSV's texts, "
                f"load it with features=datasets.Features({{'{name}': datasets.Value('string'), ...}}); else write "
                f"them as texts: dataset.cast_column('{name}', datasets.Value('string'))"
            )
        else:
            message += (
                f" ({_shortened(value)}): the column holds dates or times. Where `datasets` made them of a JSON file's "
                "texts, pass the file's path itself, whose texts stay as they are (with features= or a cast "
                "'2024-01-02' becomes '2024-01-02 00:00:00')"
            )
    raise DataError(message)


def parse_row(raw: Mapping, number: int, schema: Schema) -> Row:
    """Checks one row; InvalidRow for what may be dropped, DataError for what breaks the form of the others."""
    prompt_ids = read_prompt_ids(raw, number, schema)
    values = read_texts(raw, number, schema.forms, prompt_ids is not None)
    completions = [values[name] for name in schema.completions]
    for name, completion in zip(schema.completions, completions, strict=True):
        if says_nothing(completion):
            raise InvalidRow("empty completion", f"row {number}: '{name}' is empty")
    if schema.kind == "preference" and not schema.apart and completions[0] == completions[1]:
        raise InvalidRow("identical pair", f"row {number}: 'chosen' and 'rejected' are identical")
    if schema.explicit_prompt:
        prompt = values.get("prompt", "")  # of rows with prompt_ids it may be missing
    else:
        prompt, *completions = extract_prompt(*completions)
    if schema.conversational and not prompt and prompt_ids is None:
        hint = "" if schema.explicit_prompt else ": chosen and rejected share no turns, so give it as a list of turns"
        raise InvalidRow("empty prompt", f"row {number}: the prompt is empty{hint}")
    for name, value in values.items():
        if is_ids(value):
            read_ids(value, f"row {number}: '{name}'")
    if prompt_ids is None and not schema.token_ids and any(map(is_ids, completions)):
        if schema.conversational:
            raise DataError(f"row {number}: a response {_IDS_AFTER_TURNS}")
        prompt_ids = []
    found = {name: _number(raw, name, number) for name in schema.numbers}
    weights = tuple(read_token_weights(raw, name, number) for name in TOKEN_COLUMNS) if schema.token_weights else ()
    row = Row(number, prompt, tuple(completions), template_kwargs(raw, number), token_weights=weights,
              prompt_ids=prompt_ids)  # fmt: skip
    if schema.kind == "unpaired":
        return row._replace(response_columns={LABEL: [_label(raw, number)]})
    if schema.kind == "sft" and schema.token_ids and raw.get(SFT_WEIGHTS) is not None:
        return row._replace(token_weights=(read_token_weights(raw, SFT_WEIGHTS, number),))
    if schema.kind != "preference":
        return row
    of_responses = {name: [found[column] for column in pair] for name, pair in RESPONSE_COLUMNS.items()
                    if pair[0] in found}  # fmt: skip
    of_pairs = {name: [found[name]] for name in PAIR_COLUMNS if name in found}
    row = row._replace(pairs=((0, 1),), pair_columns=of_pairs, response_columns=of_responses)
    return row if GREEDY not in schema.forms else with_greedy(row, completions[2], found.get("ref_greedy_logps"))


def with_greedy(row: Row, greedy: Any, ref_logp: float | None) -> Row:
    """`row` with the reference's greedy response: one of its own, or one more behind them."""
    own = row.completions[: 2 if row.offered == 0 else None]
    if greedy in own:
        return row._replace(completions=own, greedy=own.index(greedy))
    more = {name: math.nan for name in row.response_columns}  # which no loss of a greedy response reads
    if "ref_logps" in row.response_columns:
        if ref_logp is None:
            raise DataError(f"row {row.number}: the responses' ref_logps need 'ref_greedy_logps' beside them")
        more["ref_logps"] = ref_logp
    columns = {name: [*values, more[name]] for name, values in row.response_columns.items()}
    weights = (*row.token_weights, []) if row.token_weights else ()  # [] stands for ones
    return row._replace(completions=(*own, greedy), greedy=len(own), response_columns=columns, token_weights=weights)


def read_texts(raw: Mapping, number: int, forms: Mapping[str, str], exact: bool = False) -> dict[str, Any]:
    """The text columns of a row, each of the form that it has in the rows before. `exact`: the row has `prompt_ids`,
    beside which its prompt may be missing."""
    values = {}
    for name, expected in forms.items():
        if exact and name == "prompt" and raw.get(name) is None:
            continue
        if name not in raw:
            close = nearest(name, [key for key in raw if key not in forms], 0.6)
            hint = f": did you mean '{close}'?" if close else f", only {quoted(raw)}"
            raise DataError(f"row {number} has no column '{name}'{hint}")
        if raw[name] is None:
            raise InvalidRow(f"'{name}' is None", f"row {number}: column '{name}' is None")
        values[name] = arrow.without_nulls(raw[name])
        form = form_of(values[name], name, number)
        if expected == ANY:
            if form == "ids" or (not values[name] and form == "chat"):
                continue
            if "prompt" not in values:
                raise InvalidRow("a text without 'prompt'", without_prompt(f"row {number}: column '{name}'", form))
            expected = forms["prompt"]
            where = f"where the prompt is {_FORM_NAMES[expected]}"
        else:
            where = f"where it is {_FORM_NAMES[expected]} in the rows before"
        if form != expected:
            raise DataError(f"row {number}: column '{name}' is {_FORM_NAMES[form]}, {where}")
        if form == "text":
            check_text(values[name], f"row {number}: column '{name}'")
    return values


def check_text(text: str, what: str) -> None:
    """InvalidRow for a text that no tokenizer takes: with half of a surrogate pair, as from JSON's \\ud83d."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            message = f"{what} is not valid Unicode: a lone surrogate {text[error.start]!r} at character {error.start}"
            raise InvalidRow("not valid Unicode", message) from None


def extract_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected) of two texts or conversations that begin with the same prompt.

    As in TRL: the prompt is the longest common beginning, less one trailing space; where one of the two is the
    beginning of the other, its last character (or turn) stays with the responses.
    """
    shared = common_length(chosen, rejected)
    if shared == min(len(chosen), len(rejected)):
        shared -= 1
    elif shared and chosen[shared - 1] == " ":
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def common_length(a: Sequence, b: Sequence) -> int:
    """Length of the longest common beginning; halving compares slices in C, ten times faster than a loop."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def says_nothing(completion: Any) -> bool:
    if isinstance(completion, str) or (completion and isinstance(completion[0], int)):
        return not completion
    turns = [turn for turn in completion if isinstance(turn, Mapping)]
    given = [value for turn in turns for key, value in turn.items() if key != "role" and value is not None]
    return not any(value or not isinstance(value, str | list | tuple | Mapping | int | float) for value in given)


def is_ids(completion: Any) -> bool:
    """Whether a completion is token ids, not a text or turns."""
    return not isinstance(completion, str) and len(completion) > 0 and isinstance(completion[0], int)


def read_ids(value: Any, what: str) -> list[int]:
    """Token ids, at least one, or InvalidRow that says `what`."""
    if not isinstance(value, list | tuple):
        raise InvalidRow("bad token ids", f"{what} must be a list of token ids, not {_shortened(value)}")
    if not value:
        raise InvalidRow("no token ids", f"{what} has no token ids")
    if set(map(type, value)) != {int} or min(value) < 0 or max(value) >= 2**31:
        wrong = next(i for i in value if type(i) is not int or not 0 <= i < 2**31)
        raise InvalidRow("bad token ids", f"{what} has {_shortened(wrong)}, which is no token id")
    return list(value)


def read_prompt_ids(raw: Mapping, number: int, schema: Schema) -> list[int] | None:
    """The prompt's ids where the rows have them; every row must."""
    if schema.prompt_ids is None:
        if raw.get(PROMPT_IDS) is not None:
            raise DataError(f"row {number} has '{PROMPT_IDS}', which the rows before have not")
        return None
    if raw.get(schema.prompt_ids) is None:
        message = f"row {number} has no '{schema.prompt_ids}', which the rows before have"
        raise InvalidRow(f"'{schema.prompt_ids}' is None", message)
    return read_ids(raw[schema.prompt_ids], f"row {number}: column '{schema.prompt_ids}'")


def without_prompt(what: str, form: str = "text") -> str:
    """What to say of a text or turns after a prompt of which there are only ids."""
    return (f"{what} is {_FORM_NAMES[form]}, and the row has no 'prompt' that it was written after: give 'prompt' "
            f"beside '{PROMPT_IDS}', or the response's token ids")  # fmt: skip


def read_token_weights(raw: Mapping, name: str, number: int) -> list[float]:
    value = raw.get(name)
    if isinstance(value, Sequence) and not isinstance(value, str):
        real = all(isinstance(w, numbers.Real) and not isinstance(w, bool) for w in value)
        if real and all(0 <= w <= MOST for w in value) and any(value):
            return [float(w) for w in value]
    expected = f"a list of numbers from 0 to {MOST:g}, not all 0"
    raise InvalidRow(f"bad '{name}'", f"row {number}: column '{name}' must be {expected}, not {_shortened(value)}")


def _label(raw: Mapping, number: int) -> float:
    value = raw.get(LABEL)
    if not isinstance(value, numbers.Real) or value not in (True, False):
        raise InvalidRow(
            f"bad '{LABEL}'", f"row {number}: column '{LABEL}' must be true or false, not {_shortened(value)}"
        )
    return float(value)


def _shortened(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # more digits than Python writes
        return f"a {type(value).__name__} of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _number(raw: Mapping, name: str, number: int) -> float:
    return read_number(raw.get(name), BOUNDS[name], name, f"row {number}: column '{name}'")


def read_number(value: Any, bounds: tuple[float, float], name: str, what: str) -> float:
    """A finite number within bounds as a float, or InvalidRow that counts as bad `name` and says `what`."""
    low, high = bounds
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if real and low <= value <= high:  # compared before it is a float, which integers of 400 digits are none of
        return float(value)
    if abs(low) < MOST and high < MOST and high != 1e-3:
        expected = f"a number from {low:g} to {high:g}"
    else:
        expected = (
            "a finite number" + ", at least 0" * (low == 0) + ", at most 0 (a sum of log-probabilities)" * (high < 1)
        )
        if real and abs(value) > MOST and value not in (math.inf, -math.inf):
            expected += f" and within {MOST:g}, past which fp32 overflows in a step"
    raise InvalidRow(f"bad '{name}'", f"{what} is {_shortened(value)}, expected {expected}")


def template_kwargs(raw: Mapping, number: int) -> dict:
    tools, kwargs = raw.get("tools"), raw.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise DataError(f"row {number}: column 'tools' is not JSON: {error}") from None
    else:
        tools = arrow.without_nulls(tools)
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"row {number}: column 'tools' must be a list, or a list as JSON text")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise DataError(f"row {number}: column 'chat_template_kwargs' must be a dict, found a {type(kwargs).__name__}")
    return {"tools": tools, **arrow.without_nulls(kwargs or {})}
