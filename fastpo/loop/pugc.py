"""PUGC, arXiv:2506.04463: prompts from texts that people wrote, each with its text as what a good answer says.

queries.jsonl   of each text: what somebody would ask to whom this text is the answer
filter.jsonl    of each query: whether its text answers it
prompts.jsonl   {id, prompt, reference_text}, for `prompts` of the loop and a judge that reads the reference
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpo.data.sources import load_rows
from fastpo.errors import ConfigError, DataError, TrainingError, nearest, quoted
from fastpo.loop.config import Options
from fastpo.loop.config import section as read_section
from fastpo.loop.teacher import Encode, Teacher
from fastpo.loop.written import Template, check_templates, without_thoughts
from fastpo.sampling.items import Failure, Sampler, digest
from fastpo.sampling.parts import write_lines
from fastpo.scoring.replies import is_refusal, read_yes_no

_NONE = "NONE"  # what the template asks to write where a text answers nothing


@dataclass(frozen=True)
class Queries:
    """The options of `queries`."""

    texts: Any = None  # a file of rows
    column: str = "text"  # that holds the text
    min_chars: int = 1
    max_chars: int | None = None  # longer ones are left out
    filter: bool = True  # queries that their text does not answer are left out
    turns: bool = True  # prompts are conversations; false: texts
    temperature: float = 0.8
    top_p: float = 1.0
    max_tokens: int = 512
    templates: Options = field(default_factory=dict)  # files in the place of the built-in ones
    teacher: Options = field(default_factory=dict)  # for those who make the sampler


def templates_of(options: Queries) -> dict[str, Template]:
    """What a reply depends on, by name."""
    words = {"query": ("text",), "answers": ("query", "text")}
    check_templates(options.templates, words, "prepare.queries")
    return {name: Template(name, slots, options.templates) for name, slots in words.items()}


def queries(
    spec: Mapping[str, Any], teacher: Sampler, folder: Path, *, encode: Encode | None, seed: Any, max_failed: float
) -> dict[str, Any]:
    """Writes prompts.jsonl; returns counts. DataError where there is no text, TrainingError where no query is left."""
    options: Queries = read_section(Queries, spec, "prepare.queries")
    if options.texts is None:
        raise ConfigError("prepare.queries needs texts, a file of what people wrote")
    asking_for, checking = templates_of(options).values()
    asking = Teacher(
        teacher, folder, "queries", encode=encode, seed=seed, max_failed=max_failed, temperature=options.temperature,
        top_p=options.top_p, max_tokens=options.max_tokens,
    )  # fmt: skip
    texts, counts = _texts(options, asking), asking.counts
    given = len(texts)

    requests = [asking.request(name, "query", asking_for(text=text)) for name, text in texts.items()]
    found: dict[str, str] = {}
    seen: set[str] = set()
    for name, answer in zip(texts, asking.ask("queries", requests), strict=True):
        whole = asking.whole("queries", answer)
        query = "" if whole is None else _bare(without_thoughts(whole.text))
        if whole is None:
            continue
        if not query:
            counts["queries: empty"] += 1
        elif query.strip(".").upper() == _NONE:
            counts["queries: the text answers nothing"] += 1
        elif is_refusal(query):
            counts["queries: refused"] += 1
        elif (plain := " ".join(query.lower().split())) in seen:
            counts["queries: repeated"] += 1
        else:
            seen.add(plain)
            found[name] = query

    if options.filter:
        requests = [
            asking.request(name, "filter", checking(query=query, text=texts[name])) for name, query in found.items()
        ]
        for name, answer in zip(list(found), asking.ask("filter", requests), strict=True):
            said = answer if isinstance(answer, Failure) else read_yes_no(answer.text)
            if said == 1:
                continue
            del found[name]
            if said == 0:
                counts["filter: the text does not answer it"] += 1
            elif isinstance(said, Failure) and said is not answer:
                counts[f"filter: {said.status}"] += 1
    if not found:
        raise TrainingError(f"prepare.queries: no query is left of {given:,} texts ({asking.said()})")
    write_lines(folder / "prompts.jsonl", (
        {"id": name, "prompt": [{"role": "user", "content": query}] if options.turns else query,
         "reference_text": texts[name]} for name, query in found.items()
    ))  # fmt: skip
    return {"texts": given, "prompts": len(found), **dict(sorted(counts.items()))}


def _texts(options: Queries, asking: Teacher) -> dict[str, str]:
    """By id, each once."""
    out: dict[str, str] = {}
    seen: set[str] = set()
    for number, row in enumerate(load_rows(options.texts)):
        text = row.get(options.column)
        if not isinstance(text, str):
            near = nearest(options.column, row, 0.5)
            hint = f": did you mean column={near}?" if near else f", only {quoted(row)}"
            raise DataError(f"prepare.queries.texts: row {number} has no text in {options.column!r}{hint}")
        if len(text.strip()) < max(1, options.min_chars):
            asking.counts["texts: too short"] += 1
        elif options.max_chars is not None and len(text) > options.max_chars:
            asking.counts["texts: too long"] += 1
        elif (content := digest(text)) in seen:
            asking.counts["texts: repeated"] += 1
        else:
            seen.add(content)
            name = str(row["id"]) if row.get("id") is not None else content[:16]
            if name in out:
                raise DataError(f"prepare.queries.texts: row {number} has the id {name!r} of another text")
            out[name] = text
    if not out:
        raise DataError(f"prepare.queries.texts: there is no text ({asking.said()})")
    return out


def _bare(query: str) -> str:
    """Without quotation marks around the whole."""
    query = query.strip()
    for opening, closing in (('"', '"'), ("\u201c", "\u201d"), ("'", "'")):
        if len(query) > 1 and query[0] == opening and query[-1] == closing and opening not in query[1:-1]:
            return query[1:-1].strip()
    return query
