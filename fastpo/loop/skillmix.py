"""Instruct-SkillMix, arXiv:2408.14774: instructions and answers that need several skills at once, for supervision.

    topics.jsonl, skills.jsonl, types.jsonl   where they are not given: the model's own lists of skills and of kinds of
                                              requests
    lists.json      those lists
    generate.jsonl, generate-again.jsonl, critique.jsonl, refine.jsonl, refine-again.jsonl   one chat an item: write,
                    again where it was cut off, criticise, improve, again where that was cut off
    rows.jsonl      {id, prompt, completion, skills, type}, for loss_type=sft

What the last turn gives is taken; where it cannot be read, or was cut off, the turn before it, and so on. Of an item
without any turn that can be read there is no row.
"""

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpo.errors import ConfigError, DataError, TrainingError, shown
from fastpo.loop.config import Options
from fastpo.loop.config import section as read_section
from fastpo.loop.teacher import Encode, Teacher
from fastpo.loop.written import Template, check_templates, numbered, unrepeated, without_thoughts
from fastpo.sampling.items import Failure, Response, Sampler, Turn, seed_of
from fastpo.sampling.parts import read_json, write_json, write_lines

_ASKED = ("generate", "generate-again", "refine", "refine-again")  # turns that give an instruction and its response
_FORM = re.compile(
    r"^[#*\s]*Instruction[*:\s]*\n(?P<instruction>.*?)^[#*\s]*Response[*:\s]*\n(?P<response>.*)\Z",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)
_HEAD = re.compile(r"^#+[*\s]*(?:Instruction|Response)[*:\s]*$", re.MULTILINE | re.IGNORECASE)
_TEMPLATES: Mapping[str, Sequence[str]] = {
    "topics": ("count",), "skills": ("count", "topic"), "query_types": ("count",), "generate": ("skills", "type"),
    "cut_off": (), "critique": (), "refine_mix": (),
}  # fmt: skip


@dataclass(frozen=True)
class SkillMix:
    """The options of `skillmix`."""

    skills: Any = None  # a list, or a file: a JSON list or a line each; None: the model is asked
    types: Any = None  # the same of kinds of requests
    topics: int = 20  # the model is asked for
    skills_per_topic: int = 10
    query_types: int = 20
    n: int = 1000  # items
    k: int = 2  # skills of an item
    turns: bool = True  # rows are conversations; false: texts
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 2048
    templates: Options = field(default_factory=dict)  # files in the place of the built-in ones
    teacher: Options = field(default_factory=dict)  # for those who make the sampler


def templates_of(options: SkillMix) -> dict[str, Template]:
    """What a reply depends on, by name."""
    check_templates(options.templates, _TEMPLATES, "prepare.skillmix")
    return {name: Template(name, words, options.templates) for name, words in _TEMPLATES.items()}


def skillmix(
    spec: Mapping[str, Any], teacher: Sampler, folder: Path, *, encode: Encode | None, seed: Any, max_failed: float
) -> dict[str, Any]:
    """Writes rows.jsonl; returns counts. TrainingError where skills are too few or no row is left."""
    options: SkillMix = read_section(SkillMix, spec, "prepare.skillmix")
    for name in ("topics", "skills_per_topic", "query_types", "n", "k", "max_tokens"):
        if getattr(options, name) < 1:
            raise ConfigError(f"prepare.skillmix.{name} must be 1 or more, not {getattr(options, name)}")
    templates = templates_of(options)
    asking = Teacher(
        teacher, folder, "skillmix", encode=encode, seed=seed, max_failed=max_failed, temperature=options.temperature,
        top_p=options.top_p, max_tokens=options.max_tokens,
    )  # fmt: skip
    skills, types = _lists(options, asking, templates)
    if len(skills) < options.k:
        raise TrainingError(f"prepare.skillmix: {len(skills)} skills are too few for k={options.k} ({asking.said()})")
    if not types:
        raise TrainingError(f"prepare.skillmix: there is no query type ({asking.said()})")
    write_json(folder / "lists.json", {"skills": skills, "types": types})
    mixes = [mix(skills, types, options.k, i, seed) for i in range(options.n)]
    chats = _chats(mixes, asking, templates)

    rows, seen = [], set()
    for i, ((drawn, kind), replies) in enumerate(zip(mixes, chats, strict=True)):
        found = _read(replies, asking.counts)
        if found is None:
            continue
        instruction, response = found
        if (plain := " ".join(instruction.lower().split())) in seen:
            asking.counts["rows: repeated instruction"] += 1
            continue
        seen.add(plain)
        prompt: Any = [{"role": "user", "content": instruction}] if options.turns else instruction
        answer: Any = [{"role": "assistant", "content": response}] if options.turns else response
        rows.append({"id": f"mix-{i:06d}", "prompt": prompt, "completion": answer, "skills": drawn, "type": kind})
    if not rows:
        raise TrainingError(f"prepare.skillmix: no row is left of {options.n:,} items ({asking.said()})")
    write_lines(folder / "rows.jsonl", rows)
    return {"items": options.n, "rows": len(rows), "skills": len(skills), "types": len(types),
            **dict(sorted(asking.counts.items()))}  # fmt: skip


def mix(skills: Sequence[str], types: Sequence[str], k: int, i: int, seed: Any) -> tuple[list[str], str]:
    """(k skills by chance, the query type) of item i; every type comes once before one comes again."""
    drawn = random.Random(seed_of(seed, "skills", i)).sample(list(skills), k)
    cycle, place = divmod(i, len(types))
    order = list(types)
    random.Random(seed_of(seed, "types", cycle)).shuffle(order)
    return drawn, order[place]


def _lists(options: SkillMix, asking: Teacher, templates: Mapping[str, Template]) -> tuple[list[str], list[str]]:
    """Skills and query types, given or the model's."""
    if options.skills is not None:
        skills = _given(options.skills, "skills")
    else:
        request = asking.request("topics", "topics", templates["topics"](count=str(options.topics)))
        topics = (asking.texts("topics", asking.ask("topics", [request])[0]) or [])[: options.topics]
        count = str(options.skills_per_topic)
        requests = [asking.request(topic, "skills", templates["skills"](count=count, topic=topic)) for topic in topics]
        replies = asking.ask("skills", requests)
        skills = unrepeated([s for reply in replies for s in (asking.texts("skills", reply) or [])])
    if options.types is not None:
        return skills, _given(options.types, "types")
    request = asking.request("types", "types", templates["query_types"](count=str(options.query_types)))
    return skills, asking.texts("types", asking.ask("types", [request])[0]) or []


def _given(value: Any, name: str) -> list[str]:
    """A list of texts, or a file with one."""
    where = f"prepare.skillmix.{name}"
    if isinstance(value, str | Path):
        path = Path(value)
        try:
            value = read_json(path) if path.suffix == ".json" else path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise DataError(f"{where}={str(path)!r} cannot be read: {error}") from error
        if value is None:
            raise DataError(f"{where}={str(path)!r}: there is no such file")
    if not isinstance(value, Sequence) or not all(isinstance(text, str) for text in value):
        raise ConfigError(f"{where} must be a list of texts or a file with one, not {shown(value, 60)}")
    found = unrepeated(list(value))
    if not found:
        raise DataError(f"{where} is empty")
    return found


def _chats(
    mixes: Sequence[tuple[list[str], str]], asking: Teacher, templates: Mapping[str, Template]
) -> list[dict[str, Response]]:
    """The model's replies by turn, of every item; a chat ends where a turn fails."""
    names = [f"mix-{i:06d}" for i in range(len(mixes))]
    chats: list[list[Turn]] = [[] for _ in mixes]
    replies: list[dict[str, Response]] = [{} for _ in mixes]
    going = set(range(len(mixes)))

    def turn(name: str, who: Sequence[int], text: Any) -> None:
        requests = []
        for i in who:
            chats[i].append({"role": "user", "content": text(i)})
            requests.append(asking.request(names[i], name, chats[i]))
        for i, answer in zip(who, asking.ask(name, requests) if requests else [], strict=True):
            if isinstance(answer, Failure):
                going.discard(i)
                continue
            replies[i][name] = answer
            chats[i].append({"role": "assistant", "content": without_thoughts(answer.text)})

    def cut_off(name: str) -> list[int]:
        found = [i for i in sorted(going) if not replies[i][name].finished]
        if found:
            asking.counts[f"{name}: cut off"] += len(found)
        return found

    turn("generate", sorted(going), lambda i: templates["generate"](skills=numbered(mixes[i][0]), type=mixes[i][1]))
    turn("generate-again", cut_off("generate"), lambda i: templates["cut_off"]())
    turn("critique", sorted(going), lambda i: templates["critique"]())
    turn("refine", sorted(going), lambda i: templates["refine_mix"]())
    turn("refine-again", cut_off("refine"), lambda i: templates["cut_off"]())
    return replies


def _read(replies: Mapping[str, Response], counts: Counter[str]) -> tuple[str, str] | None:
    """(instruction, response) of the last turn that has them."""
    given = [name for name in reversed(_ASKED) if name in replies]
    for name in given:
        found = read_form(replies[name].text) if replies[name].finished else None
        if found is not None:
            counts[f"rows: from {name}"] += 1
            if name not in ("refine", "refine-again"):
                counts["rows: fallbacks"] += 1
            return found
    counts["rows: unparsed" if given else "rows: no reply"] += 1
    return None


def read_form(reply: str) -> tuple[str, str] | None:
    """What stands under the headings Instruction and Response; None where they are not there once each, or empty."""
    match = _FORM.search(without_thoughts(reply))
    if match is None:
        return None
    instruction, response = match["instruction"].strip(), match["response"].strip()
    if not instruction or not response or _HEAD.search(instruction) or _HEAD.search(response):
        return None
    return instruction, response
