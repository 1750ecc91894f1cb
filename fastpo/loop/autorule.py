"""AutoRule, arXiv:2506.15651: rules that tell better from worse answers, found in preferences by a reasoning model.

Three rounds of questions, each in a file that grows (answers.py), and each reading the one before:

    justify.jsonl   of each pair: why one of the answers is better than the other, which stand in random order
    extract.jsonl   of each justification: the rules that it follows, as a JSON list
    merge.jsonl     of all rules: those that are left when what says the same is one, as a JSON list
    rules.json      the rules, a JSON list of texts, for the scorer of rules

Chosen here, where the paper is silent: which answer was preferred is told, or asked for (`preference: asked`), and then
explanations that end with the other one are left out; rules that are too many for one question are merged in groups.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpo.errors import ConfigError, TrainingError, did_you_mean, shown
from fastpo.loop.answers import Answers
from fastpo.loop.config import Options
from fastpo.loop.config import section as read_section
from fastpo.loop.pairs import PairOf, drawn, read_pairs
from fastpo.loop.teacher import Encode, Teacher
from fastpo.loop.written import Template, check_templates, numbered, unrepeated, without_thoughts
from fastpo.sampling.items import Failure, Response, Sampler, prompt_text, seed_of
from fastpo.sampling.parts import write_json
from fastpo.sampling.server_forms import THOUGHTS

_BETTER = re.compile(r"\bbetter\W{0,6}(?:answer|response)?\W{0,4}\b([AB])\b\W*$", re.IGNORECASE)


def templates_of(options: "AutoRule") -> dict[str, Template]:
    """What a reply depends on, by name."""
    told = options.preference == "told"
    words = {
        "justify" if told else "justify_asked": ("prompt", "a", "b", "preferred") if told else ("prompt", "a", "b"),
        "extract_rules": ("explanation",), "merge_rules": ("rules",),
    }  # fmt: skip
    check_templates(options.templates, words, "prepare.rules")
    return {name: Template(name, slots, options.templates) for name, slots in words.items()}


def _with_thoughts(reply: Response) -> str:
    """The chain of reasoning and what follows: a server may have taken the thoughts out of the text."""
    thoughts = reply.meta.get(THOUGHTS)
    return f"<think>{thoughts}</think>\n{reply.text}" if thoughts else reply.text


@dataclass(frozen=True)
class AutoRule:
    """The options of `rules`."""

    pairs: Any = None  # a file of preference pairs, in any layout that fastpo.train reads
    n: int = 256  # pairs that are looked at, drawn by the seed
    preference: str = "told"  # the model is told which answer was preferred; asked: it says so itself
    temperature: float = 0.6
    top_p: float = 1.0
    max_tokens: int = 4096
    group: int = 250  # rules in one question of the merge
    attempts: int = 3  # at each merge, where the reply cannot be read
    templates: Options = field(default_factory=dict)  # files in the place of the built-in ones
    teacher: Options = field(default_factory=dict)  # for those who make the sampler


def rules(
    spec: Mapping[str, Any], teacher: Sampler, folder: Path, *, encode: Encode | None, seed: Any, max_failed: float
) -> dict[str, Any]:
    """Writes rules.json; returns counts. TrainingError where no rule is found or a merge cannot be read."""
    options: AutoRule = read_section(AutoRule, spec, "prepare.rules")
    if options.pairs is None:
        raise ConfigError("prepare.rules needs pairs, a file of preferences that the rules are drawn from")
    if options.preference not in ("told", "asked"):
        raise ConfigError(
            f"prepare.rules.preference must be told or asked, not {shown(options.preference)}"
            f"{did_you_mean(str(options.preference), ('told', 'asked'))}"
        )
    for name in ("n", "group", "attempts", "max_tokens"):
        if getattr(options, name) < (2 if name == "group" else 1):
            raise ConfigError(f"prepare.rules.{name} is too small: {getattr(options, name)}")
    asking = Teacher(
        teacher, folder, "rules", encode=encode, seed=seed, max_failed=max_failed, temperature=options.temperature,
        top_p=options.top_p, max_tokens=options.max_tokens,
    )  # fmt: skip
    work = _Work(options, asking)
    pairs = drawn(read_pairs(options.pairs, "prepare.rules.pairs", asking.counts), options.n, seed_of(seed, "rules"))
    explained = work.justify(pairs)
    found = work.extract(explained)
    merged = work.merge(found)
    write_json(folder / "rules.json", merged)
    return {"pairs": len(pairs), "justified": len(explained), "different rules": len(found), "rules": len(merged),
            **dict(sorted(asking.counts.items()))}  # fmt: skip


class _Work:
    """The three rounds."""

    def __init__(self, options: AutoRule, asking: Teacher):
        self.options, self.asking, self.counts = options, asking, asking.counts
        self.why, self.extracting, self.merging = templates_of(options).values()

    def justify(self, pairs: Sequence[PairOf]) -> list[tuple[str, str]]:
        """(id, explanation) of every pair that got one."""
        asking, told = self.asking, self.options.preference == "told"
        first = {pair.id: random.Random(seed_of(asking.seed, "order", pair.id)).random() < 0.5 for pair in pairs}
        requests = []
        for pair in pairs:
            a, b = (pair.chosen, pair.rejected) if first[pair.id] else (pair.rejected, pair.chosen)
            which = {"preferred": "A" if first[pair.id] else "B"} if told else {}
            requests.append(
                asking.request(pair.id, "justify", self.why(prompt=prompt_text(pair.prompt), a=a, b=b, **which))
            )
        out = []
        for pair, answer in zip(pairs, asking.ask("justify", requests), strict=True):
            found = asking.whole("justify", answer)
            if found is None:
                continue
            if not found.text.strip():
                self.counts["justify: empty"] += 1
                continue
            if not told:
                better = _BETTER.search(without_thoughts(found.text))
                if better is None:
                    self.counts["justify: unparsed"] += 1
                    continue
                if (better[1].upper() == "A") is not first[pair.id]:
                    self.counts["justify: for the other answer"] += 1
                    continue
            out.append((pair.id, _with_thoughts(found)))
        if not out:
            raise TrainingError(f"prepare.rules: none of {len(pairs):,} pairs was explained ({asking.said()})")
        return out

    def extract(self, explained: Sequence[tuple[str, str]]) -> list[str]:
        """The rules of all explanations, equal ones once."""
        asking = self.asking
        requests = [asking.request(name, "extract", self.extracting(explanation=text)) for name, text in explained]
        found: list[str] = []
        for answer in asking.ask("extract", requests):
            texts = asking.texts("extract", answer)
            if texts == []:
                self.counts["extract: no rule"] += 1
            found += texts or []
        if not found:
            raise TrainingError(
                f"prepare.rules: no rule was found in {len(explained):,} explanations ({asking.said()})"
            )
        self.counts["extract: rules"] = len(found)
        return unrepeated(found)

    def merge(self, found: list[str]) -> list[str]:
        """One list, in which nothing is said twice. Of many rules first in groups, until they fit into one question."""
        if len(found) == 1:
            return found
        with self.asking.answers("merge", max_failed=1.0) as answers:
            level, size = 0, self.options.group
            while len(found) > size:
                groups = [found[start : start + size] for start in range(0, len(found), size)]
                before = len(found)
                found = unrepeated([rule for group in self._merged(answers, groups, level) for rule in group])
                level += 1
                if len(found) == before:  # they are as few as they get in groups
                    break
            return self._merged(answers, [found], level)[0]

    def _merged(self, answers: Answers, groups: Sequence[list[str]], level: int) -> list[list[str]]:
        """Each group's list. TrainingError where a reply cannot be read in any attempt."""
        asking = self.asking
        out: dict[int, list[str]] = {k: group for k, group in enumerate(groups) if len(group) == 1}
        last = ""
        for attempt in range(self.options.attempts):
            open_ = [k for k in range(len(groups)) if k not in out]
            requests = [asking.request(f"group-{k}", f"merge-{level}", self.merging(rules=numbered(groups[k])), attempt)
                        for k in open_]  # fmt: skip
            for k, answer in zip(open_, answers.ask(asking.sampler, requests, "merge"), strict=True):
                texts = asking.texts("merge", answer)
                if texts and len(texts) <= len(groups[k]):
                    out[k] = texts
                    continue
                if texts is not None:
                    self.counts["merge: more rules than there were" if texts else "merge: no rule"] += 1
                last = answer.raw if isinstance(answer, Failure) else answer.text
            if len(out) == len(groups):
                return [out[k] for k in range(len(groups))]
        raise TrainingError(
            f"prepare.rules: the rules could not be merged in {self.options.attempts} attempts ({asking.said()}); the "
            f"last reply: {shown(last, 200)}"
        )
