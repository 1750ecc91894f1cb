"""WildBench's judge: what it is shown (the conversation, its checklist, one answer or two) and how its reply is read.

The prompts are text files of our own words (fastpo/evals/templates/); the choices, the scale, the fields and the limits
are the benchmark's.
"""

import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from fastpo.errors import ConfigError, did_you_mean
from fastpo.evals.text_judge import TextJudge
from fastpo.evals.wildbench import MAX_WORDS, number_of, shortened
from fastpo.sampling.items import Failure, Prompt, Unit
from fastpo.scoring.judges import Backend
from fastpo.scoring.replies import FENCED, answer_of, is_refusal

VERSION = 1  # of how replies are read; in the key
CHOICES = {"A++": 1.0, "A+": 0.75, "A=B": 0.5, "B+": 0.25, "B++": 0.0}  # P(the first is better)
_SLOTS = {
    "pair": ("history", "query", "a", "b", "checklist"),
    "response": ("history", "query", "response", "checklist"),
}
_FILES = {"pair": "wildbench_pair", "response": "wildbench_score"}
_SLOT = re.compile(r"\{(\w+)\}")


class WildBenchJudge(TextJudge):
    """A scorer that asks a language model as WildBench does: pairs for WB-Reward, responses for WB-Score.

    * `backend`: of `fastpo.scoring.judges`, one that answers in text.
    * `template`: a file, or the text itself, with {history}, {query}, {checklist} and {a} and {b}, or {response}.
    * `max_words`: of the history and the last message; `compare` and `rate` cut the answers.
    """

    benchmark = "WildBench"

    def __init__(
        self, name: str, backend: Backend, unit: Literal["pair", "response"], *, template: str | None = None,
        max_words: int = MAX_WORDS, where: Path = Path(),
    ):  # fmt: skip
        if unit not in _SLOTS:
            raise ConfigError(f"scorer {name!r}: unit={unit!r}: expected pair or response")
        super().__init__(name, backend)
        self.unit, self.max_words = unit, max_words
        self.template = template_text(template, unit, where)
        named = set(_SLOT.findall(self.template))
        for slot in _SLOTS[unit]:
            if slot not in named:
                raise ConfigError(f"scorer {name!r}: the template has no {{{slot}}}: the judge would not see it")
        for slot in sorted(named - set(_SLOTS[unit])):
            near = did_you_mean(slot, _SLOTS[unit])
            raise ConfigError(f"scorer {name!r}: the template names {{{slot}}}, which WildBench does not have{near}")

    @property
    def key(self) -> Mapping[str, Any]:
        return {"wildbench": self.unit, "judge": dict(self.backend.key), "template": self.template,
                "max_words": self.max_words, "reads": VERSION}  # fmt: skip

    def content(self, unit: Unit) -> str:
        history, query = conversation(unit.item.prompt)
        texts = [response.text for response in unit.responses]
        slots = {
            "history": shortened(history, self.max_words), "query": shortened(query, self.max_words),
            "checklist": "".join(f"- {entry}\n" for entry in unit.item.meta.get("checklist") or ()).rstrip("\n"),
        }  # fmt: skip
        slots |= {"a": texts[0], "b": texts[1]} if self.unit == "pair" else {"response": texts[0]}
        # In one pass: what is put in is not looked at again.
        return _SLOT.sub(lambda m: slots[m[1]], self.template)

    def value(self, reply: str) -> float | Failure:
        """P(the first is better) of a pair, or a score from 1 to 10."""
        return read_choice(reply) if self.unit == "pair" else read_rating(reply)


def template_text(template: str | None, unit: str, where: Path) -> str:
    """The package's own, a file by its path (from `where`), or the text itself."""
    if template is None:
        folder = resources.files("fastpo.evals").joinpath("templates")
        return folder.joinpath(f"{_FILES[unit]}.txt").read_text(encoding="utf-8").removesuffix("\n")
    if "{" in template or "\n" in template:
        return template
    try:
        return (where / template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"template={template!r} cannot be read: {error}") from error


def conversation(prompt: Prompt) -> tuple[str, str]:
    """(what was said before, with who said it; the last message). What is of neither side is left out."""
    if isinstance(prompt, str):
        return "", prompt
    spoken = {"user": "USER", "assistant": "ASSISTANT"}
    before = [f"{spoken[turn['role']]}: {turn['content']}\n\n" for turn in prompt[:-1] if turn["role"] in spoken]
    return "".join(before), prompt[-1]["content"]


# ---- replies


def read_choice(reply: str) -> float | Failure:
    """P(the first is better) of the JSON object's `choice`, one of `CHOICES`."""
    value = _field(reply, "choice")
    if isinstance(value, Failure):
        return value
    choice = CHOICES.get(value.strip()) if isinstance(value, str) else None
    return Failure("unparsed", reply) if choice is None else choice


def read_rating(reply: str) -> float | Failure:
    """The JSON object's `score`: a number from 1 to 10, or its text."""
    value = _field(reply, "score")
    if isinstance(value, Failure):
        return value
    rating = number_of(value)
    if rating is None:
        return Failure("unparsed", reply)
    return rating if 1 <= rating <= 10 else Failure("out_of_range", reply)


def _field(reply: str, name: str) -> Any | Failure:
    """A field of the object that a reply is, alone or in a fence; of one that is no JSON, by its name where all that
    has this name agrees."""
    text = answer_of(reply)
    if isinstance(text, Failure):
        return text
    fenced = FENCED.match(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        found = set(re.findall(rf'"{name}"\s*:\s*(?:"([^"]*)"|(-?\d+(?:\.\d+)?))', text))
        if len(found) == 1:
            return "".join(found.pop())
        return Failure("refused" if is_refusal(reply) else "unparsed", reply)
    return value[name] if isinstance(value, dict) and name in value else Failure("unparsed", reply)
