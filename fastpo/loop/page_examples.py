"""The part of the run's page that people read: prompts, answers and judgements. Everything in it is escaped here."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from fastpo.loop.examples import Answer, Example, HeldOut, Judgement, examples_of, held_out
from fastpo.loop.run_files import RunFiles, mapping
from fastpo.report.charts import number as shown_number
from fastpo.report.pieces import section
from fastpo.sampling.items import POLICY

# Bounds, in characters and counts. What is cut says so.
ANSWER, PROMPT, RAW = 1200, 1000, 600
ANSWERS, JUDGEMENTS, POLICIES, ITERATIONS = 12, 10, 6, 10


def held_out_section(run: RunFiles) -> str:
    policies = [one for one in run.iterations if (one.folder / "eval" / "answers.jsonl").is_file()]
    left = policies[1 : 1 + max(0, len(policies) - POLICIES)]
    shown = policies[:1] + policies[1 + len(left) :]
    examples = held_out(run, shown)
    if not examples:
        return ""
    between = f" {len(left)} policies between are left out." if left else ""
    note = (
        f'<p class="said">{len(examples)} held-out prompts, drawn by the seed, with the answer of each '
        f"policy.{between}</p>"
    )
    return section("Held-out answers", note + "".join(_held_out_example(one) for one in examples))


def _held_out_example(one: HeldOut) -> str:
    answers = "".join(answer_part(answer, f"<b>{escape(name)}</b>") for name, answer in one.answers.items())
    said = "".join(
        judgement_part(j, lambda place: ("this answer", "the other policy's")[min(place, 1)], f"{name}: ")
        for name, found in one.judgements.items()
        for j in found[: max(1, JUDGEMENTS // len(one.judgements))]
    )
    return (
        f'<article class="example">{prompt_part(one.prompt, one.id, "h3")}<ol class="answers side">{answers}</ol>'
        f"{folded(said)}</article>"
    )


def examples_section(run: RunFiles) -> str:
    """The prompts of each iteration, the newest ones open."""
    with_samples = [one for one in run.trained if any((one.folder / name).is_dir() for name in ("samples", "tree"))]
    left = with_samples[1 : 1 + max(0, len(with_samples) - ITERATIONS)]
    parts = []
    for one in with_samples:
        if one in left:
            continue
        found = examples_of(run, one)
        if found:
            of = run.sampled_from(one)
            title = f"Iteration {one.number}" + (f", answers of {of}" if of else "")
            parts.append((title, "".join(_example(example) for example in found), len(found)))
    if not parts:
        return ""
    folded = "".join(
        f"<details{' open' if k == len(parts) - 1 else ''}><summary><h3>{escape(title)}</h3> {count} prompts</summary>"
        f"{body}</details>"
        for k, (title, body, count) in enumerate(parts)
    )
    between = f" Iterations {left[0].number} to {left[-1].number} are left out." if left else ""
    note = (
        '<p class="said">A few prompts of each iteration, drawn by the seed, with all their different answers, best '
        f"first.{between}</p>"
    )
    return section("Samples and judgements", note + folded)


def _example(one: Example) -> str:
    def rank(place: int) -> tuple[bool, float, int]:
        answer = one.answers[place]
        value = answer.win_prob if answer.score is None else answer.score
        return (bool(answer.left_out), float("inf") if value is None else -value, place)

    order = sorted(range(len(one.answers)), key=rank)
    numbered = {place: k for k, place in enumerate(order, 1)}
    shown = order[:ANSWERS]
    answers = "".join(answer_part(one.answers[p], f"<b>{numbered[p]}</b>", numbered) for p in shown)
    if len(order) > len(shown):
        answers += f'<li class="more">{len(order) - len(shown)} more answers are in the files.</li>'
    said = "".join(judgement_part(j, lambda p: str(numbered.get(p, p + 1))) for j in one.judgements[:JUDGEMENTS])
    if len(one.judgements) > JUDGEMENTS:
        said += f'<li class="more">{len(one.judgements) - JUDGEMENTS} more are in the files.</li>'
    none = '<p class="none">No row was made of it.</p>' if one.row is False else ""
    return (
        f'<article class="example">{prompt_part(one.prompt, one.id, "h4")}{none}<ol class="answers">{answers}</ol>'
        f"{folded(said)}</article>"
    )


def prompt_part(prompt: Any, name: str, level: str) -> str:
    if prompt is None:
        return f'<p class="who">prompt {escape(cut(name, 80))}, whose text is not in the run\'s folder</p>'
    turns = [("", prompt)] if isinstance(prompt, str) else list(_turns(prompt))
    room = max(80, PROMPT // max(1, len(turns)))
    body = "".join(
        f'<div class="prompt" dir="auto">{f"<b>{escape(role)}</b> " if role else ""}{escape(cut(content, room))}</div>'
        for role, content in turns[-8:]
    )
    early = f'<p class="who">{len(turns) - 8} turns before</p>' if len(turns) > 8 else ""
    return f"<{level}>Prompt <small>{escape(cut(name, 80))}</small></{level}>{early}{body}"


def _turns(prompt: Any) -> Iterable[tuple[str, str]]:
    if not isinstance(prompt, Sequence):
        yield "", json.dumps(prompt, ensure_ascii=False, default=str)
        return
    for turn in prompt:
        yield str(mapping(turn).get("role", "")), str(mapping(turn).get("content", turn))


def answer_part(answer: Answer, name: str, numbered: Mapping[int, int] | None = None) -> str:
    facts = []
    if answer.score is not None:
        facts.append(f"score {shown_number(answer.score)}")
    if answer.win_prob is not None:
        facts.append(f"{'win probability' if numbered else 'P(wins)'} {shown_number(answer.win_prob)}")
    if answer.tokens is not None:
        facts.append(f"{answer.tokens:,} tokens")
    if answer.note:
        facts.append(answer.note)
    if answer.count > 1:
        facts.append(f"given {answer.count:,} times")
    if answer.source != POLICY:
        facts.append(f"source {answer.source}")
    kind, tags = "", ""
    if answer.beats and answer.loses:
        kind = "between"
        tags = '<span class="tag both">chosen and rejected</span>'
    elif answer.beats:
        kind = "chosen"
        tags = f'<span class="tag finished">chosen{_over(answer.beats, numbered)}</span>'
    elif answer.loses:
        kind = "rejected"
        tags = f'<span class="tag failed">rejected{_over(answer.loses, numbered, "under")}</span>'
    if answer.left_out:
        reason = "cut off" if answer.left_out == "truncated" else answer.left_out
        tags += f'<span class="tag stopped">{escape(reason)}{", not judged" if numbered else ""}</span>'
    text = cut(answer.text, ANSWER)
    body = escape(text) if text.strip() else "<em>nothing but white space</em>"
    return (
        f'<li class="{kind}"><p class="who">{name} {tags}{escape(", ".join(facts))}</p>'
        f'<div class="text" dir="auto">{body}</div></li>'
    )


def _over(places: Sequence[int], numbered: Mapping[int, int] | None, word: str = "over") -> str:
    if not numbered:
        return ""
    found = sorted({numbered[p] for p in places if p in numbered})
    return f" {word} {', '.join(map(str, found[:6]))}{', …' if len(found) > 6 else ''}" if found else ""


def judgement_part(one: Judgement, name: Callable[[int], str], before: str = "") -> str:
    if len(one.places) == 2:
        of = f"{name(one.places[0])} shown first, {name(one.places[1])} second"
    else:
        of = f"on {name(one.places[0])}" if one.places else "on all"
    if one.value is None:
        value = f"failed ({one.status})" if one.status else "failed"
    elif isinstance(one.value, list):
        value = ", ".join("–" if v is None else shown_number(v) for v in one.value)
    else:
        value = f"P(first is better) {shown_number(one.value)}" if len(one.places) == 2 else shown_number(one.value)
    raw = f'<pre dir="auto">{escape(cut(one.raw, RAW))}</pre>' if one.raw else ""
    return f'<li><p class="who">{escape(before)}{escape(one.scorer)} {escape(of)}: <b>{escape(value)}</b></p>{raw}</li>'


def folded(said: str) -> str:
    return f'<details><summary>What the scorers said</summary><ul class="said">{said}</ul></details>' if said else ""


def cut(text: str, most: int) -> str:
    """At most so many characters, with a word on what is not shown."""
    if len(text) <= most + 40:
        return text
    return f"{text[:most]} … ({len(text) - most:,} more characters)"


STYLE = """
summary h3 { display: inline; color: var(--text); }
.example { border-top: 1px solid var(--rule); padding: 16px 0 8px; margin-top: 12px; }
.example h3, .example h4 { margin: 0 0 6px; font-size: 14px; } .example h4 small { font-weight: 400; font-size: 12px; }
.prompt, .text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.prompt { max-width: 90ch; margin-bottom: 8px; } .prompt b { color: var(--soft); font-weight: 600; font-size: 13px; }
.who { margin: 0 0 4px; color: var(--soft); font-size: 13px; } .who b { color: var(--text); margin-right: 4px; }
.none { margin: 0 0 8px; color: var(--warn); font-size: 13.5px; }
.answers { list-style: none; margin: 0; padding: 0; display: grid; gap: 10px;
  grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); }
.answers.side { grid-template-columns: repeat(auto-fill, minmax(min(270px, 100%), 1fr)); }
.answers li { background: var(--card); border-left: 3px solid var(--rule); border-radius: 4px; padding: 8px 12px;
  min-width: 0; }
.answers .chosen { border-color: var(--good); } .answers .rejected { border-color: var(--bad); }
.answers .between { border-color: var(--soft); } .answers .more, .said .more { color: var(--soft); font-size: 13px; }
.text { font-size: 14px; line-height: 1.45; }
.tag { display: inline-block; padding: 0 7px; margin-right: 6px; border-radius: 4px; font-weight: 600;
  font-size: 12px; }
.both { color: var(--text); background: var(--rule); }
ul.said { list-style: none; margin: 8px 0 0; padding: 0; display: grid; gap: 8px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); border-radius: 4px; padding: 8px 12px;
  margin: 4px 0 0; font-size: 12.5px; line-height: 1.45; unicode-bidi: isolate; max-width: 110ch; }
"""
