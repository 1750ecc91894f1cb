"""A few prompts of a run to read: what was answered, what was said of it, what was made of it.

Which ones is drawn by the run's seed, so that a page that is written again shows the same. Only lines of these prompts
are parsed: the files of a large iteration have millions.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpo.errors import FastpoError
from fastpo.loop import prompts as prompt_files
from fastpo.loop.checks import sources_of
from fastpo.loop.config import LoopConfig, Select
from fastpo.loop.run_files import IterationFiles, RunFiles, finite, lines, mapping, number, parts
from fastpo.loop.selecting import gather
from fastpo.sampling.items import POLICY, Item, Prompt, Response, seed_of

PROMPTS, HELD_OUT = 6, 6  # of an iteration, of the evaluation


@dataclass
class Judgement:
    """One line of a scorer's: on a response, on two as they were shown, or on all."""

    scorer: str
    places: tuple[int, ...]  # among the example's answers; none: all of them
    value: float | list[float | None] | None  # a number, one of each, or None: failed
    status: str
    raw: str


@dataclass
class Answer:
    """A response with what became of it."""

    text: str
    source: str = POLICY
    tokens: int | None = None
    count: int = 1
    score: float | None = None
    win_prob: float | None = None
    beats: list[int] = field(default_factory=list)  # the answers that it was chosen over
    loses: list[int] = field(default_factory=list)
    left_out: str = ""  # why it was not judged
    note: str = ""  # of a step of a tree: its visits


@dataclass
class Example:
    """A prompt of an iteration."""

    id: str
    prompt: Prompt | None
    answers: list[Answer]
    judgements: list[Judgement]
    row: bool | None  # whether a row was made of it; None: not yet


@dataclass
class HeldOut:
    """A held-out prompt with the answer of each policy that was measured, by name."""

    id: str
    prompt: Prompt | None
    answers: dict[str, Answer]
    judgements: dict[str, list[Judgement]]


# ---- of an iteration


def examples_of(run: RunFiles, one: IterationFiles, most: int = PROMPTS) -> list[Example]:
    """Prompts that have answers, in the order of the file; after a tree search, beginnings of answers with the steps
    that follow them."""
    config = run.config(one.number)
    trees = next(iter(sorted(one.folder.glob("*/siblings.jsonl"))), None)
    path = one.folder / "prompts.jsonl" if trees is None else trees
    items = _drawn(path, most, seed_of(run.options.get("seed", 0), one.number, "examples"))
    names = [item.id for item in items]
    sources = [] if config is None else sources_of(config)
    sampled = _answers_by_id(parts(one.folder / "samples"), names, sources)
    outside = _outside(config, items)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for row in lines(one.folder / "rows.jsonl", [p for n in names for p in (*_prefixes(n), *_prefixes(f"{n}/goal-0"))]):
        own = str(row.get("id", "")).removesuffix("/goal-0")
        if own in rows and "replayed" not in row:
            rows[own].append(row)
    selected = one.done("select")
    if trees is not None:
        return [_steps(item, rows[item.id]) for item in items]
    found = []
    for item in items:
        whole = item.with_responses([*sampled.get(item.id, ()), *outside.get(item.id, ())])
        if whole.responses:
            found.append(_example(whole, config, one, rows[item.id], selected))
    return found


def _example(
    item: Item, config: LoopConfig | None, one: IterationFiles, rows: Sequence[Mapping[str, Any]], selected: bool
) -> Example:
    select = config.select if config is not None else Select()
    drop = config.sample.drop_truncated if config is not None else True
    judged = gather(item, select, drop, Counter())
    answers = [_answer(r) for r in judged.responses]
    judgements = []
    for folder in sorted(p for p in (one.folder / "scores").glob("*") if p.is_dir()):
        judgements += _judgements(folder, item.id)
    _score(answers, judgements)
    _mark(answers, judged, rows)
    known = {r.text for r in judged.responses}
    for response in item.responses:
        if response.text not in known:
            counts = Counter[str]()
            gather(item.with_responses([response]), select, drop, counts)
            answer = _answer(response)
            answer.left_out = next(iter(counts), "")
            answers.append(answer)
            known.add(response.text)
    return Example(item.id, item.prompt, answers, judgements, bool(rows) if selected or rows else None)


def _steps(item: Item, rows: Sequence[Mapping[str, Any]]) -> Example:
    """The children of a node, as answers to the prompt with what goes before them."""
    answers = [_answer(r) for r in item.responses]
    for answer, response in zip(answers, item.responses):
        answer.score, answer.count, answer.source = number(response.meta, "q"), 1, POLICY
        visits = number(response.meta, "visits")
        answer.note = "" if visits is None else f"{visits:,.0f} visits"
    _mark(answers, item, rows)
    return Example(item.id, item.prompt, answers, [], bool(rows))


def _answer(response: Response) -> Answer:
    tokens = None if response.token_ids is None else len(response.token_ids)
    return Answer(response.text, response.source, tokens, response.count)


def _mark(answers: Sequence[Answer], judged: Item, rows: Iterable[Mapping[str, Any]]) -> None:
    """Scores as the selector saw them, and which were chosen over which."""
    place = {r.text: k for k, r in enumerate(judged.responses)}
    by_ids = {tuple(r.token_ids): k for k, r in enumerate(judged.responses) if r.token_ids is not None}

    def find(entry: Any) -> int | None:
        if isinstance(entry, Mapping):
            return place.get(str(entry.get("text")))
        if isinstance(entry, str):
            return place.get(entry)
        return by_ids.get(tuple(entry)) if isinstance(entry, list) else None

    for row in rows:
        entries = row.get("responses", [row.get("chosen"), row.get("rejected")])
        if not isinstance(entries, list):
            continue
        places = [find(entry) for entry in entries]
        for entry, k in zip(entries, places):
            if k is not None and isinstance(entry, Mapping):
                score, win = number(entry, "score"), number(entry, "win_prob")
                answers[k].score = answers[k].score if score is None or score == win else score
                answers[k].win_prob = answers[k].win_prob if win is None else win
        for pair in _pairs(row):
            won, lost = (places[p] if p < len(places) else None for p in pair)
            if won is not None and lost is not None:
                answers[won].beats.append(lost)
                answers[lost].loses.append(won)


def _pairs(row: Mapping[str, Any]) -> list[tuple[int, int]]:
    found = row.get("pairs", [[0, 1]])
    if not isinstance(found, list):
        return []
    good = [p for p in found if isinstance(p, list) and len(p) > 1]
    return [(p[0], p[1]) for p in good if all(isinstance(k, int) and k >= 0 for k in p[:2])]


def _score(answers: Sequence[Answer], judgements: Iterable[Judgement]) -> None:
    """What the judgements say of each answer: its number, or its mean probability of beating another."""
    wins: dict[int, list[float]] = {}
    for one in judgements:
        if isinstance(one.value, list):
            for answer, value in zip(answers, [] if one.places else one.value):
                answer.score = value
        elif one.value is not None and len(one.places) == 1 and one.places[0] < len(answers):
            answers[one.places[0]].score = one.value
        elif one.value is not None and len(one.places) == 2:
            wins.setdefault(one.places[0], []).append(one.value)
            wins.setdefault(one.places[1], []).append(1 - one.value)
    for place, values in wins.items():
        if place < len(answers):
            answers[place].win_prob = sum(values) / len(values)


def _judgements(folder: Path, name: str) -> list[Judgement]:
    """The last on each unit, in the order in which they came."""
    found: dict[Any, Judgement] = {}
    for path in parts(folder):
        for line in lines(path, _prefixes(name)):
            places = tuple(p for p in (line.get("i"), line.get("j")) if isinstance(p, int) and p >= 0)
            value = line.get("value")
            value = [finite(v) for v in value] if isinstance(value, list) else finite(value)
            found[places] = Judgement(
                folder.name, places, value, str(line.get("status", "")), str(line.get("raw") or "")
            )
    return list(found.values())


def _answers_by_id(
    files: Iterable[Path], names: Sequence[str], sources: Sequence[str] = ()
) -> dict[str, list[Response]]:
    """Of each prompt its responses: part by part, each in the order of the sources, as the stages read them."""
    order = {source: place for place, source in enumerate(sources)}
    prefixes = [p for name in names for p in _prefixes(name)]
    out: dict[str, list[Response]] = {}
    for path in files:
        found: dict[str, dict[tuple[int, str, int], Response]] = {}
        for line in lines(path, prefixes):
            name, source, k = line.get("id"), str(line.get("source", POLICY)), line.get("k", 0)
            if name in names and isinstance(k, int) and isinstance(line.get("text"), str):
                found.setdefault(str(name), {})[order.get(source, len(order)), source, k] = _response(line)
        for name, own in found.items():
            out.setdefault(name, []).extend(own[place] for place in sorted(own))
    return out


def _response(line: Mapping[str, Any]) -> Response:
    ids = line.get("token_ids")
    if not (isinstance(ids, list) and all(isinstance(k, int) for k in ids)):
        ids = None
    count = line.get("count", 1)
    return Response(line["text"], ids, line.get("finished") is not False, source=str(line.get("source", POLICY)),
                    count=count if isinstance(count, int) else 1, meta=mapping(line.get("meta")))  # fmt: skip


def _outside(config: LoopConfig | None, items: Sequence[Item]) -> dict[str, list[Response]]:
    """Responses from columns and files; none where they cannot be read any more."""
    if config is None:
        return {}
    out: dict[str, list[Response]] = {}
    for source, where in config.extra_responses.items():
        try:
            found = prompt_files.extra_responses({source: where}, items)
        except (FastpoError, OSError, KeyError, TypeError, ValueError):  # no prompt of these has the column; no file
            continue
        for name, texts in found.items():
            out.setdefault(name, []).extend(Response(text, source=of) for of, text in texts)
    return out


# ---- of the evaluation


def held_out(run: RunFiles, policies: Sequence[IterationFiles], most: int = HELD_OUT) -> list[HeldOut]:
    """The same prompts for each of these."""
    measured = [one for one in policies if (one.folder / "eval" / "answers.jsonl").is_file()]
    if not measured:
        return []
    names = list(dict.fromkeys(str(line.get("id")) for line in lines(measured[0].folder / "eval" / "answers.jsonl")))
    drawn = set(_sample(len(names), most, seed_of(run.options.get("seed", 0), "held-out examples")))
    names = [name for k, name in enumerate(names) if k in drawn]
    prompts = _heldout_prompts(run, names)
    out = {name: HeldOut(name, prompts.get(name), {}, {}) for name in names}
    for one in measured:
        answers = _answers_by_id([one.folder / "eval" / "answers.jsonl"], names)
        scorers = sorted(p for p in (one.folder / "eval" / "scores").glob("*") if p.is_dir())
        for name, responses in answers.items():
            answer = _answer(responses[0])
            answer.left_out = "" if responses[0].finished else "truncated"
            said = [j for folder in scorers for j in _judgements(folder, name)]
            _score([answer], said)
            out[name].answers[one.made], out[name].judgements[one.made] = answer, said
    return [one for one in out.values() if one.answers]


def _heldout_prompts(run: RunFiles, names: Sequence[str]) -> dict[str, Prompt]:
    """Their texts, where the file of held-out prompts can be read from here."""
    source = run.options.get("eval", {}).get("prompts") if isinstance(run.options.get("eval"), Mapping) else None
    if source is None or (isinstance(source, str) and not Path(source).exists()):
        return {}  # no file of this machine: nothing is fetched for a page
    try:
        return {item.id: item.prompt for item in prompt_files.read_prompts(source, "eval.prompts") if item.id in names}
    except (FastpoError, OSError, KeyError, TypeError, ValueError, ImportError):
        return {}


# ---- lines


def _prefixes(name: str) -> list[bytes]:
    """How the lines of a prompt begin, whichever way they were written."""
    ways = {json.dumps(name), json.dumps(name, ensure_ascii=False)}
    encoded = [way.encode(errors="replace") for way in sorted(ways)]
    return [b'{"id":' + space + way + b"," for way in encoded for space in (b"", b" ")]


def _sample(size: int, most: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(size), min(size, most)))


def _drawn(path: Path, most: int, seed: int) -> list[Item]:
    """Some of the items of a file, drawn by the seed."""
    try:
        with open(path, "rb") as file:
            size = sum(1 for _ in file)
        wanted = set(_sample(size, most, seed))
        with open(path, "rb") as file:
            chosen = [line for k, line in enumerate(file) if k in wanted]
    except OSError:
        return []
    found = []
    for line in chosen:
        try:
            given = json.loads(line)
            item = prompt_files.from_json(given)
            responses = given.get("responses", ())  # of a node; a line of prompts has none
            found.append(item.with_responses([_response(r) for r in responses if isinstance(r.get("text"), str)]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return [item for item in found if isinstance(item.id, str)]
