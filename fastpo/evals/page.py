"""report.html of an evaluation: figures, lengths, what failed, and answers side by side with what the judge said."""

import random
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastpo.evals import summary
from fastpo.loop.examples import Answer, Judgement
from fastpo.loop.page_examples import STYLE, answer_part, folded, judgement_part, prompt_part
from fastpo.report.charts import number as shown_number
from fastpo.report.pieces import document, grid, save, section, table
from fastpo.sampling.items import seed_of

EXAMPLES = 12  # prompts to read
# Names of result.json in words. Those that are not here are read as they are, without their underscores.
_WORDS = {
    "units": "judgements",
    "ok": "with a verdict",
    "failed": "failed",
    "asked": "asked of the judge",
    "from_cache": "kept from other runs",
    "of_another_judge": "of another judge, asked again",
    "value": "figure",
    "error": "standard error",
    "interval": "95% interval",
    "prompts": "prompts",
    "lc_standard_error": "standard error, length-controlled",
    "lc_interval": "95% interval, length-controlled",
    "lc_package_error": "standard error as the alpaca-eval package has it",
    "win_rate": "raw win rate, %",
    "raw_interval": "95% interval, raw",
    "standard_error": "standard error, raw",
    "discrete_win_rate": "win rate of wins and half the ties, %",
    "mean_length": "mean characters of an answer",
    "left_out": "prompts left out",
    "left_out_failed": "left out, no verdict",
    "length_controlled": "length-controlled win rate, %",
    "points_of_the_first": "points of the answer that is shown first, %",
    "pairs_left_out": "pairs left out, no verdict",
    "strength": "strength by Bradley-Terry",
    "task_macro": "mean of the tasks, weighted",
    "task_macro_error": "standard error of the mean of the tasks",
    "win_much": "won by much",
    "lose_much": "lost by much",
    "lose": "lost",
    "win": "won",
    "tie": "tie",
    "missing_preferences": "without a verdict",
    "missing_answers": "without an answer",
    "empty_answers": "empty answers",
    "both_orders": "pairs asked in both orders",
    "max_failed": "failures allowed",
    "level": "share that intervals hold",
    "limit": "prompts at most",
    "resamples": "draws of prompts for the interval",
    "weight": "wins of a clear verdict",
    "control": "controlled for",
    "category": "category",
    "form": "regression",
    "margin": "characters that make a slight win of the longer one a tie",
    "margins": "with other margins",
    "max_words": "words shown of an answer",
    "policy": "path",
    "function": "function",
    "kind": "kind",
}
_ORDERS = {
    "pairs": "pairs asked in both orders",
    "agree": "both orders name the same answer",
    "by_position": "both orders name the same place",
    "first": "both orders name what is shown first",
    "gap": "mean difference between the orders",
}
_STYLE = ".warnings + .tiles { margin-top: 12px; }\n"
_OF_THE_HEAD = (
    "value",
    "error",
    "interval",
    "answers",
    "best",
    "difference",
    "no_clear_difference",
    "note",
    "baseline",
)


def write_page(
    folder: Path, result: Mapping[str, Any], answers: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Mapping[str, Any]], seed: int,
) -> None:  # fmt: skip
    """Write `report.html` into the folder, of the contents of result.json, answers.jsonl and verdicts.jsonl."""
    models = [name for name in result["figures"] if name in result.get("models", {})]
    sections = [
        _head(result),
        section("Figures", _figures(result)),
        section("Answers", _lengths(result)),
        section("Verdicts", _counts(result)),
        section("To read", _examples(answers, verdicts, models, seed)),
        section("How it was measured", _how(result)),
        section("Settings", table(_rows({**result["options"], **result["versions"]}))),
        f"<footer>Written by fastpo, {time.strftime('%Y-%m-%d %H:%M %Z')}</footer>",
    ]
    save(
        folder / "report.html",
        document(f"{result['name']}: {folder.resolve().name}", "\n".join(filter(None, sections)), STYLE + _STYLE),
    )


def _head(result: Mapping[str, Any]) -> str:
    tiles = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(text)}</span></div>" for value, text in _tiles(result)[:8]
    )
    facts = {"Figure": result["figure"], "Against": ", ".join(result.get("baselines", {})),
             "Prompts": result["counts"].get("prompts")}  # fmt: skip
    shown = "".join(f"<dt>{k}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items() if v)
    title = f"<h1>{escape(result['name'])}</h1>"
    said = "".join(f"<p>{escape(line)}</p>" for line in summary.lines(result))
    warned = "".join(f"<li><p>{escape(line)}</p></li>" for line in summary.remarks(result))
    warned = f'<ul class="warnings">{warned}</ul>' if warned else ""
    return f'<header>{title}<dl class="facts">{shown}</dl>{said}{warned}<div class="tiles">{tiles}</div></header>'


def _tiles(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(number, what it is): paired differences first, for they say whether it helped."""
    first, then = [], []
    for name, found in result["figures"].items():
        apart = found.get("difference")
        if apart and apart["value"] is not None:
            first.append((summary.signed(apart["value"]), f"{name}, difference to {apart['to']}; {_interval(apart)}"))
        then.append((_value(found), f"{name}{_best(found)}; {_interval(found)}"))
    return first + then


def _best(found: Mapping[str, Any]) -> str:
    return ", the best" if found.get("best") else ""


def _value(found: Mapping[str, Any]) -> str:
    return "none" if found["value"] is None else shown_number(found["value"])


def _interval(found: Mapping[str, Any]) -> str:
    given = found.get("interval")
    return f"{shown_number(given[0])} to {shown_number(given[1])}" if given else "–"


def _figures(result: Mapping[str, Any]) -> str:
    rows = []
    for name, found in result["figures"].items():
        apart = found.get("difference")
        if apart and apart["value"] is not None:
            rows.append([f"{name}, difference to {apart['to']}", summary.signed(apart["value"]), _interval(apart)])
        rows.append([name + _best(found), _value(found), _interval(found)])
    whole = grid(["", result["figure"], "95% interval"], rows, counts=True)
    for name, found in result["figures"].items():
        rest = {k: v for k, v in found.items() if k not in _OF_THE_HEAD}
        shown = list(_rows(rest))
        if shown:
            whole += f"<details><summary>All of {escape(name)}</summary>{table(shown)}</details>"
    return whole


def _how(result: Mapping[str, Any]) -> str:
    given = result.get("how") or {}
    rows = [(f"judge: {name}", value) for name, value in _rows(given.get("judge", {}))]
    for model, found in given.get("models", {}).items():
        rows += [(f"{model}: {name}", value) for name, value in _rows(found)]
    asked = given.get("prompts")
    if asked:
        drawn = f", drawn from {asked['drawn from']:,}" if asked["drawn from"] != asked["number"] else ""
        rows.append(("prompts", f"{asked['number']:,}{drawn}: {asked['from'] or 'of the benchmark'}"))
    return table(rows)


def _rows(values: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    """Nested mappings as rows, names in words; what is empty or not known is left out, and numbers have four digits."""
    for key, value in values.items():
        name = f"{before}{_WORDS.get(key, key.replace('_', ' '))}"
        if isinstance(value, Mapping):
            yield from _rows(value, f"{name}: ")
        elif value is not None and value != [] and value != "":
            yield name, _rounded(value)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return shown_number(value)
    return [_rounded(one) for one in value] if isinstance(value, list) else value


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
    rows: list[tuple[str, Any]] = [(_WORDS.get(k, k.replace("_", " ")), v) for k, v in counts.items()
                                   if isinstance(v, int)]  # fmt: skip
    rows += [(f"failed: {status}", n) for status, n in counts.get("statuses", {}).items()]
    for name, value in (counts.get("orders") or {}).items():
        share = value is not None and name not in ("pairs", "gap")
        rows.append((_ORDERS.get(name, name), f"{value:.0%}" if share else _rounded(value)))
    return table(rows)


def _examples(
    answers: Sequence[Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]], models: Sequence[str], seed: int
) -> str:
    """Some prompts, drawn by the seed: those whose answers differ, half of them won and half lost where there are."""
    own: dict[str, tuple[list[Any], list[Any]]] = {}
    for place, lines in enumerate((answers, verdicts)):
        for line in lines:
            own.setdefault(line["id"], ([], []))[place].append(line)
    found = {name: lines for name, lines in own.items() if lines[0]}
    chosen = _chosen(found, models, random.Random(seed_of(seed, "evaluate", "page")))
    if not chosen:
        return ""
    note = (
        f"{len(chosen)} prompts, drawn by the seed: those first whose answers differ, wins and losses in equal parts "
        "where there are such"
    )
    shown = "".join(_example(*found[name]) for name in chosen)
    return f'<p class="said">{note}; all are in answers.jsonl and verdicts.jsonl.</p>{shown}'


def _chosen(found: Mapping[str, tuple[list[Any], list[Any]]], models: Sequence[str], draw: random.Random) -> list[str]:
    """Names of prompts: won and lost ones in turn, then other answers that differ, then the rest."""
    names = list(found)
    draw.shuffle(names)
    won = [name for name in names if _outcome(found[name][1], models) > 0]
    lost = [name for name in names if _outcome(found[name][1], models) < 0]
    both = [name for pair in zip(won, lost, strict=False) for name in pair]
    both += [name for name in won + lost if name not in both]
    differ = [name for name in names if len({line["text"] for line in found[name][0]}) > 1]
    return list(dict.fromkeys([*both, *differ, *names]))[:EXAMPLES]


def _outcome(verdicts: Sequence[Mapping[str, Any]], models: Sequence[str]) -> float:
    """Above 0 where the first model does better on a prompt than whom it is shown beside, or than the last model."""
    first = models[0] if models else None
    total, scores = 0.0, {}  # type: float, dict[str, float]
    for line in verdicts:
        value, shown = line["value"], line["shown"]
        if not isinstance(value, int | float):
            continue
        if len(shown) == 2 and first in shown:
            total += value - 0.5 if shown[0] == first else 0.5 - value
        elif len(shown) == 1:
            scores[shown[0]] = float(value)
    others = [value for name, value in scores.items() if name != first]
    return total + (scores[first] - others[-1] if first in scores and others else 0.0)


def _example(answers: Sequence[Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]]) -> str:
    scores = {line["shown"][0]: line["value"] for line in verdicts if len(line["shown"]) == 1}
    alone = {line["model"] for line in answers if [a["model"] for a in answers].count(line["model"]) == 1}
    shown = ""
    for line in answers:
        score = scores.get(line["model"]) if line["model"] in alone else None
        cut_off = "truncated" if line["finished"] is False else ""
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
