"""report.html of an evaluation: figures, lengths, what failed, and answers side by side with what the judge said."""

import random
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastpo.loop.examples import Answer, Judgement
from fastpo.loop.page_examples import STYLE, answer_part, folded, judgement_part, prompt_part
from fastpo.report.charts import number as shown_number
from fastpo.report.pieces import document, flat, grid, save, section, table
from fastpo.sampling.items import seed_of

EXAMPLES = 12  # prompts to read
_COUNTS = {"units": "judgements", "asked": "asked by the run that ended", "from_cache": "kept from other runs"}
_OF_THE_HEAD = ("value", "error", "interval", "answers", "best", "note")


def write_page(
    folder: Path, result: Mapping[str, Any], answers: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Mapping[str, Any]], seed: int,
) -> None:  # fmt: skip
    """Write `report.html` into the folder, of the contents of result.json, answers.jsonl and verdicts.jsonl."""
    sections = [
        _head(result),
        section("Figures", _figures(result)),
        section("Answers", _lengths(result)),
        section("Verdicts", _counts(result)),
        section("To read", _examples(answers, verdicts, seed)),
        section("Settings", table(flat(_settings(result)))),
        f"<footer>Written by fastpo, {time.strftime('%Y-%m-%d %H:%M %Z')}</footer>",
    ]
    save(
        folder / "report.html",
        document(f"{result['name']}: {folder.resolve().name}", "\n".join(filter(None, sections)), STYLE),
    )


def _head(result: Mapping[str, Any]) -> str:
    tiles = "".join(
        f"<div><b>{escape(_value(found))}</b><span>{escape(name)}{_best(found)}; {_interval(found)}</span></div>"
        for name, found in list(result["figures"].items())[:8]
    )
    against = ", ".join(result.get("baselines", {}))
    facts = {"Figure": result["figure"], "Against": against, "Prompts": result["counts"].get("prompts")}
    shown = "".join(f"<dt>{k}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items() if v)
    title = f"<h1>{escape(result['name'])}</h1>"
    return f'<header>{title}<dl class="facts">{shown}</dl><div class="tiles">{tiles}</div></header>'


def _best(found: Mapping[str, Any]) -> str:
    return ", the best" if found.get("best") else ""


def _value(found: Mapping[str, Any]) -> str:
    return "none" if found["value"] is None else shown_number(found["value"])


def _interval(found: Mapping[str, Any]) -> str:
    given = found.get("interval")
    return "–" if not given else f"{shown_number(given[0])} to {shown_number(given[1])}"


def _figures(result: Mapping[str, Any]) -> str:
    rows = [[name + _best(found), _value(found), _interval(found)] for name, found in result["figures"].items()]
    whole = grid(["", "figure", "95 %"], rows, counts=True)
    noted = {name: found["note"] for name, found in result["figures"].items() if found.get("note")}
    whole += "".join(f'<p class="said">{escape(name)}: {escape(note)}.</p>' for name, note in noted.items())
    for name, found in result["figures"].items():
        rest = {k: v for k, v in found.items() if k not in _OF_THE_HEAD and v is not None}
        if rest:
            whole += f"<details><summary>All of {escape(name)}</summary>{table(_rows(rest))}</details>"
    return whole


def _rows(values: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    """Nested mappings as rows of dotted names."""
    for key, value in values.items():
        name = f"{before}{key}".replace("_", " ")
        if isinstance(value, Mapping) and value:
            yield from _rows(value, f"{name}: ")
        else:
            yield name, value


def _lengths(result: Mapping[str, Any]) -> str:
    every = {name: found["answers"] for name, found in {**result["figures"], **result.get("baselines", {})}.items()
             if "answers" in found}  # fmt: skip
    if not every:
        return ""
    head = list(next(iter(every.values())))
    return grid(
        ["", *head], [[name, *(_number(found[key]) for key in head)] for name, found in every.items()], counts=True
    )


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else shown_number(value)


def _counts(result: Mapping[str, Any]) -> str:
    counts = result["counts"].get("verdicts", {})
    rows = [(_COUNTS.get(k, k), v) for k, v in counts.items() if isinstance(v, int)]
    rows += [(f"failed: {status}", n) for status, n in counts.get("statuses", {}).items()]
    orders = counts.get("orders") or {}
    rows += [(f"in both orders: {name.replace('_', ' ')}", value) for name, value in orders.items()]
    return table(rows)


def _settings(result: Mapping[str, Any]) -> dict[str, Any]:
    models = {f"model {name}": path for name, path in result.get("models", {}).items()}
    judge = {f"judge: {key}": value for key, value in result.get("judge", {}).items()}
    return {**models, **judge, **result["options"], **result["versions"]}


def _examples(answers: Sequence[Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]], seed: int) -> str:
    """Some prompts, drawn by the seed."""
    names = list(dict.fromkeys(line["id"] for line in answers))
    chosen = set(random.Random(seed_of(seed, "evaluate", "page")).sample(names, min(EXAMPLES, len(names))))
    found = {name: ([], []) for name in names if name in chosen}  # type: dict[str, tuple[list[Any], list[Any]]]
    for place, lines in enumerate((answers, verdicts)):
        for line in lines:
            if line["id"] in found:
                found[line["id"]][place].append(line)
    note = f'<p class="said">{len(found)} prompts, drawn by the seed; all are in answers.jsonl and verdicts.jsonl.</p>'
    return note + "".join(_example(*lines) for lines in found.values()) if found else ""


def _example(answers: Sequence[Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]]) -> str:
    scores = {line["shown"][0]: line["value"] for line in verdicts if len(line["shown"]) == 1}
    alone = {line["model"] for line in answers if [a["model"] for a in answers].count(line["model"]) == 1}
    shown = ""
    for line in answers:
        score = scores.get(line["model"]) if line["model"] in alone else None
        cut_off = "" if line["finished"] else "truncated"
        facts = f"{len(line['text']):,} characters"
        answer = Answer(line["text"], tokens=line["tokens"], score=score, left_out=cut_off, note=facts)
        shown += answer_part(answer, f"<b>{escape(line['model'])}</b>")
    said = "".join(_said(line) for line in verdicts)
    prompt = prompt_part(answers[0]["prompt"], answers[0]["id"], "h3")
    return f'<article class="example">{prompt}<ol class="answers side">{shown}</ol>{folded(said)}</article>'


def _said(line: Mapping[str, Any]) -> str:
    names = line["shown"]
    places = tuple(range(len(names))) if len(names) < 3 else ()
    one = Judgement(line["judge"], places, line["value"], line["status"], line["raw"])
    return judgement_part(one, lambda place: names[place])
