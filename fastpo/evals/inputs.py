"""What an evaluation reads: prompts in the formats of the benchmarks, answers, verdicts. Refused by name and count."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastpo.data.sources import load_rows
from fastpo.errors import ConfigError, DataError, did_you_mean, quoted
from fastpo.evals.asked import refuse, refuse_repeated, rows_of
from fastpo.evals.options import COLUMN, Source
from fastpo.loop.prompts import PROMPT, read_prompts
from fastpo.sampling.items import Item, Response, digest, prompt_text, seed_of

_IDS, _PROMPTS, _TEXTS = ("id", "session_id"), (PROMPT, "instruction"), ("text", "output", "completion", "response")
_MODELS = ("model", "generator")
UNKNOWN_END = "unknown end"  # in the meta of an answer of which nobody says whether it ended by itself


def prompts_of(source: Any) -> list[Item]:
    """Items without responses: rows with `prompt`, or AlpacaEval's `instruction`; the other columns are their `meta`.

    DataError for prompts and ids that occur more than once.
    """
    if source is None:
        raise ConfigError("an evaluation needs prompts: a file or rows")
    given = load_rows(source) if not _texts(source) else [{PROMPT: text} for text in source]
    rows = []
    for row in given:
        row = dict(row)
        if PROMPT not in row and "instruction" in row:
            row[PROMPT] = row.pop("instruction")
        rows.append(row)
    known = [row[PROMPT] for row in rows if isinstance(row.get(PROMPT), str | list | tuple)]
    refuse_repeated("prompts occur more than once", [_name(prompt) for prompt in known])
    refuse_repeated(
        "ids of prompts occur more than once", [str(row["id"]) for row in rows if row.get("id") is not None]
    )
    return read_prompts(rows)


def _texts(source: Any) -> bool:
    return isinstance(source, list | tuple) and bool(source) and all(isinstance(one, str) for one in source)


def _name(prompt: Any) -> str:
    try:
        return prompt_text(prompt)
    except (KeyError, TypeError, AttributeError):  # what is no prompt is the reader's to say
        return digest(repr(prompt))


def drawn(items: Sequence[Any], limit: int | None, seed: int) -> list[Any]:
    """So many of them, in their order."""
    if limit is None or limit >= len(items):
        return list(items)
    chosen = random.Random(seed_of(seed, "evaluate", "limit")).sample(range(len(items)), limit)
    return [items[k] for k in sorted(chosen)]


def answers_of(source: Source, items: Sequence[Item], known: Sequence[Item] | None = None) -> dict[str, list[Response]]:
    """The answers that are there, by the prompt's id.

    Of a column of the prompts; a mapping by id; texts in the order of the prompts; rows or a file with `id` (or
    `session_id`, `prompt`, `instruction`) and `text` (or `output`, `completion`, `response`; WildBench's lists of one
    text too). `known`: prompts that may have answers beside those of `items`.
    DataError for prompts without an answer or with two, and for answers to other prompts.
    """
    name, given = source.name, source.answers
    ends: dict[str, bool] = {}
    if isinstance(given, str) and given.startswith(COLUMN):
        column = given.removeprefix(COLUMN)
        found = {item.id: item.meta[column] for item in items if column in item.meta}
    elif isinstance(given, Mapping):
        found = {str(key): value for key, value in given.items()}
    elif _texts(given):
        whole = items if known is None else known
        if len(given) != len(whole):
            raise DataError(f"{name}: {len(given)} answers to {len(whole)} prompts")
        found = {item.id: text for item, text in zip(whole, given)}
    else:
        found = _of_rows(source, items if known is None else known, ends)
    refuse(f"answers of {name} are no texts", [k for k, v in found.items() if not isinstance(v, str)], len(found))
    strange = set(found) - {item.id for item in (items if known is None else known)}
    refuse(f"answers of {name} are to other prompts", [key for key in found if key in strange], len(found))
    refuse(f"prompts have no answer of {name}", [item.id for item in items if item.id not in found], len(items))
    return {
        item.id: [Response(found[item.id], source=name, finished=ends.get(item.id, True),
                           meta={} if item.id in ends else {UNKNOWN_END: True})]
        for item in items
    }  # fmt: skip


def _of_rows(source: Source, items: Sequence[Item], ends: dict[str, bool]) -> dict[str, Any]:
    """Texts by the prompts' ids; `ends` gets whether they ended by themselves, of rows that say so."""
    name = source.name
    rows = rows_of(source.answers, f"the answers of {name}", ())
    models = {str(row[c]) for row in rows for c in _MODELS if row.get(c) is not None}
    if len(models) > 1 or source.of is not None:
        if source.of not in models:
            raise DataError(
                f"the answers of {name} are of {quoted(sorted(models)[:5])}: say which, {{answers: FILE, model: NAME}}"
            )
        rows = [row for row in rows if any(row.get(c) == source.of for c in _MODELS)]
    by_prompt = {_name(item.prompt): item.id for item in items}
    ids, texts = [], []
    for row in rows:
        own = next((str(row[c]) for c in _IDS if row.get(c) is not None), None)
        if own is None:
            asked = next((_name(row[c]) for c in _PROMPTS if row.get(c) is not None), None)
            own = by_prompt.get(asked, asked) if asked is not None else None
        text = next((row[c] for c in _TEXTS if row.get(c) is not None), None)
        if own is not None and isinstance(row.get("finished"), bool):
            ends[own] = row["finished"]
        ids.append(own)
        texts.append(text[0] if isinstance(text, list) and len(text) == 1 else text)
    refuse(f"answers of {name} have neither id nor prompt; numbers of the rows",
           [n for n, own in enumerate(ids) if own is None], len(rows))  # fmt: skip
    refuse(f"answers of {name} have no text ({', '.join(_TEXTS)})",
           [own for own, text in zip(ids, texts) if text is None], len(rows))  # fmt: skip
    refuse_repeated(f"prompts have more than one answer of {name}", ids)
    return dict(zip(ids, texts))


def verdict_rows(source: Any) -> list[dict[str, Any]]:
    """Rows of verdicts.jsonl: `id`, `shown` (the models' names as they were shown), `value`, `status` where it failed.
    Of a file with the verdicts of several judges {verdicts: FILE, judge: NAME}.

    DataError for rows that lack one, names that are none, values that are no numbers or, of pairs, not in [0, 1].
    """
    source, judge = _judge_of(source)
    rows = [dict(row) for row in rows_of(source, "the verdicts", ("id", "shown"))]
    judges = list(dict.fromkeys(str(row["judge"]) for row in rows if row.get("judge") is not None))
    if judge is not None and judge not in judges:
        raise DataError(
            f"no verdicts of the judge {judge!r}, only of {quoted(judges[:5])}{did_you_mean(judge, judges)}"
        )
    if judge is None and len(judges) > 1:
        raise DataError(f"the verdicts are of {quoted(judges[:5])}: say which, {{verdicts: FILE, judge: NAME}}")
    rows = [row for row in rows if judge is None or row.get("judge") == judge]
    refuse("verdicts have no names of one or two models under shown",
           [f"{row['id']}: {row['shown']!r}" for row in rows if not _named(row["shown"])], len(rows))  # fmt: skip
    bad = []
    for row in rows:
        row["id"], row["shown"] = str(row["id"]), _names(row["shown"])
        value = row.get("value")
        right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        right = right and (len(row["shown"]) == 1 or 0 <= value <= 1)
        if not (right or (value is None and row.get("status", "ok") != "ok")):
            bad.append(f"{row['id']} {' / '.join(row['shown'])}: {value!r}")
    refuse("verdicts are none (a number, of pairs in [0, 1], or a status)", bad, len(rows))
    return rows


def _judge_of(source: Any) -> tuple[Any, str | None]:
    """(where the verdicts are, whose)."""
    if not isinstance(source, Mapping):
        return source, None
    for key in source:
        if key not in ("verdicts", "judge"):
            raise ConfigError(f"verdicts has no option {key!r}{did_you_mean(str(key), ('verdicts', 'judge'))}")
    if source.get("verdicts") is None or source.get("judge") is None:
        raise ConfigError("verdicts of one of several judges are {verdicts: FILE, judge: NAME}")
    return source["verdicts"], str(source["judge"])


def _named(given: Any) -> bool:
    names = [given] if isinstance(given, str) else given
    return isinstance(names, list | tuple) and 1 <= len(names) <= 2 and all(isinstance(n, str) for n in names)


def _names(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def with_names(items: Sequence[Item], answers: Mapping[str, Mapping[str, Sequence[Response]]]) -> list[Item]:
    """Each prompt with the answers of all models that have one, in their order."""
    return [
        item.with_responses([replace(r, source=name) for name, own in answers.items() for r in own.get(item.id, ())])
        for item in items
    ]  # fmt: skip


def there(value: Any) -> dict[str, Path]:
    """The file or folder that an option names, where it is one of this machine."""
    return {"given": Path(value)} if isinstance(value, str | Path) and Path(value).exists() else {}
