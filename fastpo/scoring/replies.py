"""What judges write, read: a verdict of a pair, a score, a list of scores, yes or no.

Each function gives numbers, or a Failure that says why there is none: `empty`, `refused`, `unparsed`, `wrong_count`,
`out_of_range`. A reply that contradicts itself is unparsed. Nothing is guessed.
"""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from fastpo.sampling.items import Failure

VERSION = 1  # of these rules, in the keys of judges; to be raised where a reply would be read otherwise

# P(the first is better) of each label.
PAIR_LABELS = {
    "A++": 1.0, "A+": 0.75, "A=B": 0.5, "B+": 0.25, "B++": 0.0,
    "A>>B": 1.0, "A>B": 0.75, "B>A": 0.25, "B>>A": 0.0,
    "A": 1.0, "B": 0.0, "Tie": 0.5,
}  # fmt: skip
_IN_BRACKETS = PAIR_LABELS | {"C": 0.5}  # [[C]]: a tie
_LABELS = "|".join(re.escape(label) for label in sorted(PAIR_LABELS, key=len, reverse=True))
_END = r"(?![\w+=>]|\s*(?:/|or\b|and\b))"  # no label goes on here, and no other follows
_AFTER = r"\s*[\"'*`]*\s*[:=]\s*[\"'*`(\[]*\s*"  # `Verdict: A`, `"choice": "A"`, `**Verdict**: A`
_NAMED_PAIR = re.compile(
    rf"\b(?i:verdict|choice|winner|preference|better){_AFTER}(?i:(?:answer|response|assistant)[ _])?"
    rf"(?:((?i:tie)|{_LABELS}){_END})"
)
_BRACKETED_PAIR = re.compile(rf"\[\[\s*((?i:tie)|{_LABELS}|C)\s*\]\]")
_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_NO_RANGE = r"(?![\w.]*\d|\s*(?:-|\u2013|to\b|or\b)\s*\d)"  # `7-8`
_NAMED_SCORE = re.compile(
    rf"\b(?i:score|rating|grade){_AFTER}({_NUMBER}){_NO_RANGE}\s*(?:(?:/|(?i:out of))\s*({_NUMBER}))?"
)
_BRACKETED_SCORE = re.compile(rf"\[\[\s*({_NUMBER})\s*\]\]")
_YES_NO = re.compile(r"^[\"'*`\[\s]*(yes|no)[\"'*`\]]*(?=\s*(?:[.,:;!\n\u2013\u2014-]|$))", re.IGNORECASE)
_NAMED_YES_NO = re.compile(rf"\b(?i:verdict|answer){_AFTER}((?i:yes|no))\b")
_THOUGHT = re.compile(r"^\s*<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
FENCED = re.compile(r"^```[a-zA-Z]*\s*\n(.*?)\n?```$", re.DOTALL)
_LINE = re.compile(
    rf"^[-*\s]*(?:(?i:answer|response|assistant|score)?[ _#]*\[?(\d+)\]?\s*[.:)=-])\s*({_NUMBER})\s*$"
)  # fmt: skip
_REFUSAL = re.compile(
    r"^\W*(?:i'?m sorry|i am sorry|sorry|i apologi[sz]e|i can(?:no|')t|i can not|i am (?:not able|unable)|"
    r"i'?m (?:not able|unable)|i won'?t|i will not|as an ai\b|unfortunately,? i)", re.IGNORECASE
)  # fmt: skip


def answer_of(reply: str) -> str | Failure:
    """The reply without the thoughts that a model writes before it; a Failure where nothing is left."""
    text = _THOUGHT.sub("", reply, count=1).strip()
    if re.match(r"<think(?:ing)?>", text, re.IGNORECASE):
        return Failure("unparsed", reply)  # thoughts without an end
    return text or Failure("empty", reply)


def is_refusal(reply: str) -> bool:
    """Whether a reply begins with an excuse."""
    text = answer_of(reply)
    return isinstance(text, str) and _REFUSAL.match(text.replace("\u2019", "'")) is not None


def _nothing(reply: str) -> Failure:
    return Failure("refused" if is_refusal(reply) else "unparsed", reply)


def _only(found: Sequence[float], reply: str) -> float | Failure:
    """The value that all mentions agree on."""
    if not found:
        return _nothing(reply)
    return found[0] if len(set(found)) == 1 else Failure("unparsed", reply)


def read_pair(reply: str) -> float | Failure:
    """P(the first is better): a label in [[ ]], or after `Verdict:`, `choice:` and the like, or the whole reply."""
    text = answer_of(reply)
    if isinstance(text, Failure):
        return text
    named = [m[1] for m in _BRACKETED_PAIR.finditer(text)] + [m[1] for m in _NAMED_PAIR.finditer(text)]
    whole = text.strip("\"'*`.()[] \n")
    if not named and (whole in PAIR_LABELS or whole.lower() == "tie"):
        named = [whole]
    return _only([_IN_BRACKETS["Tie" if label.lower() == "tie" else label] for label in named], reply)


def read_score(reply: str, low: float, high: float) -> float | Failure:
    """A number of the scale: in [[ ]], after `Score:` and the like (also `7/10`, of a scale that ends there), or the
    whole reply."""
    text = answer_of(reply)
    if isinstance(text, Failure):
        return text
    named = [m[1] for m in _BRACKETED_SCORE.finditer(text)]
    for m in _NAMED_SCORE.finditer(text):
        if m[2] is not None and float(m[2]) != high:
            return Failure("unparsed", reply)  # of another scale
        named.append(m[1])
    whole = text.strip("\"'*`.()[] \n")
    if not named and re.fullmatch(_NUMBER, whole):
        named = [whole]
    value = _only([float(n) for n in named], reply)
    if isinstance(value, Failure):
        return value
    return value if low <= value <= high else Failure("out_of_range", reply)


def read_yes_no(reply: str) -> float | Failure:
    """1 or 0: `Yes` or `No` at the beginning, or after `Verdict:`."""
    text = answer_of(reply)
    if isinstance(text, Failure):
        return text
    named = [m[1] for m in _NAMED_YES_NO.finditer(text)]
    if not named and (first := _YES_NO.match(text)):
        named = [first[1]]
    return _only([float(word.lower() == "yes") for word in named], reply)


def read_list(
    reply: str, count: int, low: float, high: float, *, prose: bool = False
) -> tuple[float | None, ...] | Failure:
    """`count` numbers of the scale, in the order of the responses; JSON's null is None.

    JSON: a list of numbers, or of objects with `score` and perhaps `answer`, `response`, `index` or `id` from 1, which
    then decides the order; or an object with such a list. Or a line each, `2: 5`, the numbers in front being 1 to
    `count` in any order. Other text around it is a failure, or with `prose` allowed where it holds just one list.
    """
    text = answer_of(reply)
    if isinstance(text, Failure):
        return text
    fenced = FENCED.match(text)
    found = _of_json(fenced[1] if fenced else text)
    if found is None:
        found = _of_lines(text, strict=not prose)
    if found is None and prose:
        lists = [scored for part in lists_in(text) if (scored := _of_json(part)) is not None]
        found = lists[0] if len(lists) == 1 else None
    if found is None:
        return _nothing(reply)
    if (
        len(found) != count
        or any(i is not None for i, _ in found)
        and {i for i, _ in found} != set(range(1, count + 1))
    ):
        return Failure("wrong_count", reply)
    ordered = found if found and found[0][0] is None else sorted(found, key=lambda pair: pair[0] or 0)
    values = tuple(value for _, value in ordered)
    if any(value is not None and not low <= value <= high for value in values):
        return Failure("out_of_range", reply)
    return values if any(value is not None for value in values) else Failure("unparsed", reply)


Found = list[tuple[int | None, float | None]]  # the number of the response where it is given, its score


def whole_list(text: str) -> Any:
    """The JSON that a text is, or the one list in it where it is an object; None where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list)]
        return lists[0] if len(lists) == 1 else None
    return value


def _of_json(text: str) -> Found | None:
    value = whole_list(text)
    if not isinstance(value, list) or not value:
        return None
    found: Found = []
    for entry in value:
        index: Any = None
        if isinstance(entry, dict):
            index = next((entry[k] for k in ("answer", "response", "index", "id") if k in entry), None)
            if "score" not in entry or (index is not None and type(index) is not int):
                return None
            entry = entry["score"]
        if entry is not None and (type(entry) not in (int, float) or not math.isfinite(entry)):
            return None
        found.append((index, None if entry is None else float(entry)))
    given = [index for index, _ in found]
    return found if all(i is None for i in given) or all(i is not None for i in given) else None


def _of_lines(text: str, strict: bool) -> Found | None:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    matches = [m for line in lines if (m := _LINE.match(line))]
    if not matches or (strict and len(matches) < len(lines)):
        return None
    return [(int(m[1]), float(m[2])) for m in matches]


def lists_in(text: str) -> list[str]:
    """Every outermost [ ] of the text that is JSON."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while (start := text.find("[", at)) >= 0:
        try:
            _, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            at = start + 1
            continue
        found.append(text[start:end])
        at = end
    return found
