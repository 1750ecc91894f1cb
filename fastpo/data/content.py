"""What a conversation holds, and whether the chat template writes it.

A template takes what it knows and passes over the rest in silence: tool calls, reasoning, tools, list parts, names.
`Form` gives it turns as it wants them; `lost` says which given pieces are not in what it wrote.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fastpo.data.rows import InvalidRow, Row
from fastpo.errors import quoted

Turn = Mapping[str, Any]
Turns = Sequence[Turn]
Render = Callable[[Turns], str]

# Roles whose turns the model does not write. Other names than "assistant" are some template's own for it.
NOT_THE_MODEL = frozenset(
    "user human system developer tool tools function ipython observation environment tool_response context document"
    " documents".split()
)
CALLS = ("tool_calls", "function_call")
REASONING = ("reasoning_content", "thinking", "reasoning")  # one thing to transformers, which fills in the others
_TEXT_PARTS = ("text", "input_text", "output_text")
# Bookkeeping of requests and answers, which a template may leave out and no model needs.
_UNSPOKEN = frozenset("role type id tool_call_id index call_id".split())
_THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)>(.*?)</\1>|\[THINK\](.*?)\[/THINK\]", re.DOTALL)


def is_models(turn: Turn) -> bool:
    """Whether the turn is one that the model writes."""
    return str(turn.get("role")).lower() not in NOT_THE_MODEL


def check(row: Row) -> None:
    """InvalidRow unless every turn of a conversation has a role and a content of texts."""
    parts = [("the prompt", row.prompt), *((f"response {k}", turns) for k, turns in enumerate(row.completions))]
    for name, turns in parts:
        for place, turn in enumerate(turns):
            if reason := _fault(turn):
                raise InvalidRow(reason[0], f"row {row.number}: turn {place} of {name} {reason[1]}")


def check_responses(row: Row) -> None:
    """InvalidRow unless every response has a turn of the assistant."""
    for k, turns in enumerate(row.completions):
        if not any(map(is_models, turns)):
            message = f"response {k} has no turn of the assistant, only of {quoted({str(t['role']): 0 for t in turns})}"
            raise InvalidRow("a response without a turn of the assistant", f"row {row.number}: {message}")


def _fault(turn: Any) -> tuple[str, str] | None:
    """(reason, sentence) where a turn is none that can be trained on."""
    if not isinstance(turn, Mapping):
        return "bad turns", f"is a {type(turn).__name__}, not an object with 'role' and 'content'"
    if not isinstance(turn.get("role"), str) or not turn["role"]:
        return "bad turns", f"needs a 'role', a text; it has {quoted(turn)}"
    content = turn.get("content")
    if content is None:
        if any(turn.get(key) for key in (*CALLS, *REASONING)):
            return None
        others = [key for key in turn if key != "role"]
        # A template's own keys may say it all (Gemma's tool_responses); a lone text under a wrong name says nothing.
        if any(isinstance(turn[key], list | Mapping) and turn[key] for key in others):
            return None
        return "a turn without content", "has no 'content'" + (f", only {quoted(others)}" if others else "")
    if isinstance(content, str):
        return None
    if isinstance(content, Mapping) or not isinstance(content, list | tuple):
        return "bad turns", f"has a {type(content).__name__} as 'content', not a text or a list of parts"
    for part in content:
        if isinstance(part, str):
            continue
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = isinstance(part, Mapping) and isinstance(part.get("text"), str)
        if not text or (kind is not None and kind not in _TEXT_PARTS):
            if kind in _TEXT_PARTS or kind is None:
                return "bad turns", f"has a part without a text: {quoted(part)}"
            return "a part that is not text", f"has a part of type '{kind}': fastpo trains on text only"
    return None


# ---- repeated prompts, and prompts that the response continues


def without_prompt(row: Row) -> Row:
    """`row` without the prompt's turns where the responses repeat them, with their system text where only they have it.

    A prompt beside whole conversations: the last of its turns, from one of the user or system on, that are the first of
    a response are no part of it.
    """
    if not row.prompt:
        return row
    prompt = list(row.prompt)
    lead = 0
    while row.completions[0][lead : lead + 1] and row.completions[0][lead].get("role") == "system":
        lead += 1
    if lead and prompt[0].get("role") != "system":
        system = list(row.completions[0][:lead])
        whole = [*system, *prompt]
        if all(list(turns[: len(whole)]) == whole for turns in row.completions):
            prompt = whole
    cut = []
    for turns in row.completions:
        most = min(len(prompt), len(turns))
        repeated = next((n for n in range(most, 0, -1) if list(turns[:n]) == prompt[-n:] and not is_models(turns[0])),
                        0)  # fmt: skip
        if repeated == len(turns):
            raise InvalidRow("empty completion", f"row {row.number}: a response only repeats the prompt")
        cut.append(turns[repeated:])
    if prompt == row.prompt and all(map(_same, cut, row.completions)):
        return row
    return row._replace(prompt=prompt, completions=tuple(cut))


def _same(a: Sequence, b: Sequence) -> bool:
    return len(a) == len(b)


def continued(row: Row) -> tuple[Row, bool]:
    """The row with its responses' first turns joined to the prompt's last one, and whether they were.

    So where the prompt ends in a turn that the assistant began and the responses go on in it: the prompt keeps its
    beginning, and each completion opens with the whole turn.
    """
    last = row.prompt[-1]
    opens = [turns[0] for turns in row.completions]
    if not is_models(last) or any(last.get(key) for key in CALLS) or not all(map(is_models, opens)):
        return row, False
    begun = last.get("content", "")
    if not begun and not any(last.get(key) for key in REASONING):
        return row._replace(prompt=row.prompt[:-1]), False  # nothing was begun: what the generation prompt says
    completions = []
    for turns in row.completions:
        joined = {**last, **turns[0], "content": _joined(begun, turns[0].get("content", ""))}
        completions.append([joined, *turns[1:]])
    return row._replace(completions=tuple(completions)), True


def _joined(a: Any, b: Any) -> Any:
    return a + b if isinstance(a, str) and isinstance(b, str) else text_of(a) + text_of(b)


# ---- turns as a template wants them


def text_of(content: Any) -> str:
    """A content as one text: its parts in lines, as servers that speak to templates of texts join them."""
    return content if isinstance(content, str) else "\n".join(_texts(content))


def _texts(content: Any) -> list[str]:
    if content is None or isinstance(content, str):
        return [content] if content else []
    return [part if isinstance(part, str) else part["text"] for part in content]


def _calls(turn: Turn) -> Iterator[tuple[Any, Mapping]]:
    """(call, what holds its name and arguments) of the turn's tool calls."""
    for key in CALLS:
        found = turn.get(key)
        for call in found if isinstance(found, list | tuple) else [found] if isinstance(found, Mapping) else []:
            if isinstance(call, Mapping):
                inner = call.get("function")
                yield call, inner if isinstance(inner, Mapping) else call


class Form(NamedTuple):
    """How turns are given to a template."""

    contents: str = "given"  # lists of parts as they are; or "texts", "user parts" (those of the user), "parts"
    arguments: str = "given"  # tool arguments as they are; or as "objects" or "texts" of JSON
    blanks: str = "given"  # turns without a content as they are; or with an "empty" one

    def __call__(self, turns: Turns) -> list[dict]:
        return [self._turn(turn) for turn in turns]

    def beside(self, other: "Form") -> "Form":
        """The form that changes what either of the two changes."""
        return Form(*(a if a != "given" else b for a, b in zip(self, other, strict=True)))

    def _turn(self, turn: Turn) -> dict:
        out = dict(turn)
        content = out.get("content")
        if content is None and self.blanks != "given":
            out["content"] = content = ""
        if content is not None and self.contents != "given":
            as_parts = self.contents == "parts" or (self.contents == "user parts" and turn["role"] == "user")
            texts = [content] if isinstance(content, str) else _texts(content)
            out["content"] = [{"type": "text", "text": text} for text in texts] if as_parts else text_of(content)
        if self.arguments != "given":
            for key in CALLS:
                found = out.get(key)
                if isinstance(found, list | tuple):
                    out[key] = [self._call(call) for call in found]
                elif isinstance(found, Mapping):
                    out[key] = self._call(found)
        return out

    def _call(self, call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": self._call(call["function"])}
        arguments = call.get("arguments")
        if self.arguments == "objects" and isinstance(arguments, str):
            return {**call, "arguments": _parsed(arguments)}
        if self.arguments == "texts" and isinstance(arguments, Mapping):
            return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
        return call


def _parsed(arguments: str) -> Any:
    """The object that `arguments` is the JSON text of, or the text where it is none."""
    try:
        found = json.loads(arguments) if arguments.strip() else {}
    except ValueError:
        return arguments
    return found if isinstance(found, dict) else arguments


def choose_form(turns: Turns, render: Render) -> Form:
    """The form in which the template writes the turns' texts and tool arguments, by trying.

    As they are given, if that fails none of them; tool arguments as objects first, as servers give them to it.
    """
    form = Form()
    if any(turn.get("content") is None for turn in turns):  # calls alone: many templates need a text beside them
        tries = [Form(arguments=kind, blanks=blanks) for blanks in ("given", "empty") for kind in ("objects", "texts")]
        form = Form(blanks=next((tried.blanks for tried in tries if _renders(tried(turns), render)), "given"))
    if any(isinstance(call.get("arguments"), str | Mapping) for turn in turns for _, call in _calls(turn)):
        kinds = ("objects", "texts")
        lists = any(isinstance(turn.get("content"), list | tuple) for turn in turns)
        flat = form._replace(contents="texts" if lists else "given")
        written = [_writes_arguments(turns, render, flat._replace(arguments=kind)) for kind in kinds]
        form = form._replace(arguments=kinds[written[1] > written[0]])
    if _writes_texts(turns, render, form):
        return form
    lists = any(isinstance(turn.get("content"), list | tuple) for turn in turns)
    ways = (*(("texts",) if lists else ()), "user parts", "parts")
    best = next((way for way in ways if _writes_texts(turns, render, form._replace(contents=way))), None)
    return form._replace(contents=best or ("texts" if lists else "given"))


def _renders(turns: Turns, render: Render) -> bool:
    try:
        render(turns)
    except Exception:  # whatever a template raises, jinja's errors and Python's alike
        return False
    return True


def _writes_texts(turns: Turns, render: Render, form: Form) -> bool:
    """Whether every text of the turns is in what the template writes, and no list as Python or JSON shows it."""
    turns = form(turns)
    try:
        written = render(turns)
    except Exception:  # whatever a template raises, jinja's errors and Python's alike
        return False
    for turn in turns:
        content = turn.get("content")
        if content is None:
            continue
        if not isinstance(content, str) and any(sign in written for sign in _signs(content)):
            return False
        if not all(has_text(written, text) for _, text in _spoken(turn)):
            return False
    return True


def _signs(content: Any) -> list[str]:
    return [str(content), json.dumps(content, ensure_ascii=False)] if content else []


def _writes_arguments(turns: Turns, render: Render, form: Form) -> int:
    """2 where the arguments are written as they should be, 1 where not, 0 where the template fails on them."""
    turns = form(turns)
    try:
        written = render(turns)
    except Exception:  # as above
        return 0
    for turn in turns:
        for _, call in _calls(turn):
            arguments = call.get("arguments")
            if not arguments:
                continue
            if isinstance(arguments, str):
                escaped = json.dumps(arguments, ensure_ascii=False)[1:-1]
                if arguments.strip() not in written or (escaped != arguments and escaped in written):
                    return 1
            else:
                as_python = str(arguments)
                if as_python in written and as_python != json.dumps(arguments, ensure_ascii=False):
                    return 1
    return 2


# ---- which pieces a template wrote


def has_text(written: str, text: str) -> bool:
    """Whether `text`, its outer spaces aside, is in what a template wrote, as it is or inside JSON."""
    text = text.strip()
    return text in written or json.dumps(text, ensure_ascii=False)[1:-1] in written


def _spoken(turn: Turn) -> Iterator[tuple[str, str]]:
    """(kind, text) of a turn's content; what stands in marks of thought in an assistant's is its reasoning."""
    kind = {"system": "system text", "developer": "system text"}.get(turn["role"], f"text of {turn['role']} turns")
    for text in _texts(turn.get("content")):
        if not is_models(turn):
            yield kind, text
            continue
        at = 0
        for match in _THOUGHT.finditer(text):
            if text[at : match.start()].strip():
                yield kind, text[at : match.start()]
            if (match[2] or match[3] or "").strip():
                yield "reasoning", match[2] or match[3]
            at = match.end()
        if text[at:].strip():
            yield kind, text[at:]


def is_plain(turns: Turns, kwargs: Mapping[str, Any]) -> bool:
    """Whether there is nothing but texts and roles, of which each is found by its own words."""
    return not kwargs.get("tools") and all(
        turn.keys() <= {"role", "content"}
        and isinstance(turn.get("content", ""), str)
        and not (is_models(turn) and _THOUGHT.search(turn.get("content", "")))
        for turn in turns
    )


class Marked(NamedTuple):
    """A conversation with a mark behind each of its words that can be looked for, and which mark stands for what."""

    turns: list[dict]
    tools: Any
    marks: list[tuple[int, str, str]]  # (turn, or -1 for the tools; kind; mark)


def marked(turns: Turns, tools: Any) -> Marked:
    """Each piece of `turns` and `tools` with a mark of its own, none of which occurs in them."""
    said = json.dumps([list(turns), tools], ensure_ascii=False, default=str)
    stem = next(s for k in range(1_000_000) if (s := f"zq{k}x") not in said)
    number = next(n for n in range(71_300_000, 10**9, 100_000) if str(n)[:4] not in said)
    marks: list[tuple[int, str, str]] = []

    def text(value: str, place: int, kind: str) -> str:
        end = len(value.rstrip())
        marks.append((place, kind, f"{stem}{len(marks)}z"))
        return f"{value[:end]}{marks[-1][2]}{value[end:]}"

    def leaves(value: Any, place: int, kind: str) -> Any:
        if isinstance(value, str):
            return text(value, place, kind)
        if isinstance(value, int | float) and not isinstance(value, bool):
            marks.append((place, kind, str(number + len(marks))))
            return number + len(marks) - 1
        if isinstance(value, Mapping):
            return {key: v if key in _UNSPOKEN else leaves(v, place, kind) for key, v in value.items()}
        return [leaves(v, place, kind) for v in value] if isinstance(value, list | tuple) else value

    def call(value: Any, place: int) -> Any:
        if isinstance(value, list | tuple):
            return [call(item, place) for item in value]
        if not isinstance(value, Mapping):
            return value
        parsed = _parsed(value["arguments"]) if isinstance(value.get("arguments"), str) else None
        inner = isinstance(value.get("function"), Mapping)
        own = {key: v for key, v in value.items()
               if not (key == "arguments" and parsed is not None) and not (key == "function" and inner)}  # fmt: skip
        out = {**value, **leaves(own, place, "tool calls")}
        if parsed is not None:
            found = leaves(parsed, place, "tool calls")
            out["arguments"] = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
        if inner:
            out["function"] = call(value["function"], place)
        return out

    def spoken(value: str, place: int, turn: Turn) -> str:
        out, rest = [], value
        for kind, piece in _spoken({"role": turn["role"], "content": value}):
            before, rest = rest.split(piece, 1)
            out += [before, text(piece, place, kind)]
        return "".join(out) + rest

    def content(value: Any, place: int, turn: Turn) -> Any:
        if isinstance(value, str):
            return spoken(value, place, turn)
        parts = []
        for part in value:
            given = part if isinstance(part, str) else part["text"]
            parts.append(spoken(given, place, turn) if isinstance(part, str)
                         else {**part, "text": spoken(given, place, turn)})  # fmt: skip
        return parts

    out = []
    for place, turn in enumerate(turns):
        new = dict(turn)
        reasoned = [key for key in REASONING if isinstance(turn.get(key), str) and turn[key].strip()]
        for key, value in turn.items():
            if key == "content":
                new[key] = content(value, place, turn)
            elif key in CALLS:
                new[key] = call(value, place)
            elif key in reasoned:
                new[key] = text(value, place, "reasoning") if key == reasoned[0] else new[reasoned[0]]
            elif key not in _UNSPOKEN:
                new[key] = leaves(value, place, "names of turns" if key == "name" else f"'{key}' of turns")
        out.append(new)
    shown = [_tool(tool, lambda value: text(value, -1, "tools")) for tool in tools] if tools else tools
    return Marked(out, shown, marks)


def _tool(tool: Any, mark: Callable[[str], str]) -> Any:
    """A tool's schema with its name marked; its types and descriptions are the template's to set."""
    if not isinstance(tool, Mapping):
        return tool
    if isinstance(tool.get("function"), Mapping):
        return {**tool, "function": _tool(tool["function"], mark)}
    return {**tool, "name": mark(tool["name"])} if isinstance(tool.get("name"), str) else tool


def lost(
    turns: Turns, first: int, kwargs: Mapping[str, Any], written: str, render: Callable[[Turns, Any], str]
) -> tuple[dict[str, str], bool]:
    """What of a conversation is not in `written`, what the template made of it, and whether its response says anything.

    -> ({kind: an example}, whether a piece of the assistant's turns from number `first` on is there). `render` takes
    turns and tools.
    """
    tools = kwargs.get("tools")
    missing: dict[str, str] = {}
    says = False
    if is_plain(turns, kwargs):
        for place, turn in enumerate(turns):
            for kind, text in _spoken(turn):
                found = has_text(written, text)
                says |= found and place >= first and is_models(turn)
                if not found:
                    missing.setdefault(_kind(kind, place, first), text)
        return missing, says
    trial = marked(turns, tools)
    try:
        shown = render(trial.turns, trial.tools)
    except Exception:  # a template that checks what it is given: nothing can be said of the pieces
        return {}, True
    for place, kind, mark in trial.marks:
        found = mark in shown
        says |= found and place >= first and is_models(turns[place])
        if not found:
            missing.setdefault(_kind(kind, place, first), "")
    return missing, says


def _kind(kind: str, place: int, first: int) -> str:
    return "reasoning of earlier turns" if kind == "reasoning" and place < first else kind


def emptied(turns: Turns, first: int, begun: Any = "") -> list[dict]:
    """The conversation with nothing in the assistant's turns from number `first` on but what it began that one with."""
    return [{"role": turn["role"], "content": begun if place == first else ""}
            if place >= first and is_models(turn) else dict(turn)
            for place, turn in enumerate(turns)]  # fmt: skip


def eats_prompt(prompt: Turns, prompt_text: str, whole: str, boundary: int) -> str | None:
    """A text of the prompt's turns that stands behind `boundary` in `whole` alone, so that it would be trained on."""
    texts = [text.strip() for turn in prompt for text in _texts(turn.get("content")) if text.strip()]
    for text in texts:
        needed = sum(other.count(text) for other in texts)
        if whole[:boundary].count(text) < needed <= whole.count(text) and text in prompt_text:
            return text
    return None
