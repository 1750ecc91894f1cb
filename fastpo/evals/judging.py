"""Whom an evaluation asks: scorers of the loop by their section, a benchmark's own judge, a file of verdicts; what they
would cost; and their verdicts as lines.
"""

import copy
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastpo.errors import ConfigError
from fastpo.evals import pairwise
from fastpo.evals.asked import refuse
from fastpo.evals.text_judge import TextJudge
from fastpo.evals.wildbench_judge import WildBenchJudge
from fastpo.loop.score_stage import as_verdict, read_verdicts, unit_stage
from fastpo.sampling.items import Failure, Scorer, Unit, Verdict, digest, prompt_text
from fastpo.sampling.parts import lines_so_far, read_json, read_lines
from fastpo.scoring.scorers import make_scorer
from fastpo.scoring.scoring import BaseScorer, BothOrders, Ensemble, FunctionScorer

log = logging.getLogger("fastpo")
CHARACTERS = 4  # of a token, where none is counted
FIVE = {"A>>B": 1.0, "A>B": 0.75, "A=B": 0.5, "B>A": 0.25, "B>>A": 0.0}  # P(the first is better)


class ArenaJudge(TextJudge):
    """A language model that gives one of Arena-Hard's five verdicts on a pair (pairwise.py); a backend of text."""

    unit, benchmark = "pair", "Arena-Hard"

    @property
    def key(self) -> Mapping[str, Any]:
        return {"arena": pairwise.template(), "reads": pairwise.READS, "judge": dict(self.backend.key)}

    def content(self, unit: Unit) -> str:
        return pairwise.question(prompt_text(unit.item.prompt), *(response.text for response in unit.responses))

    def value(self, reply: str) -> float | Failure:
        found = pairwise.read_verdict(reply)
        return found if isinstance(found, Failure) else FIVE[found]


class FileJudge(BaseScorer):
    """Verdicts that are there, by prompt and by the names of the models in the order in which they were shown.

    Of several answers of a model to a prompt the verdicts stand in their order. `both`: whether any pair is there in
    both orders.
    """

    name = "verdicts"

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        self.of: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
        for row in rows:
            self.of.setdefault((row["id"], *row["shown"]), []).append(row)
        self.unit = "pair" if any(len(row["shown"]) == 2 for row in rows) else "response"
        self.both = any(self._other(name) in self.of for name in self.of if len(name) == 3)
        self._key = {"verdicts": digest(list(rows))}

    @property
    def key(self) -> Mapping[str, Any]:
        return self._key

    def second(self, prompt: str, model: str, baseline: str, drawn: bool) -> bool:
        """Whether the model's answer was shown after the baseline's, of a pair that is there in one order; else as
        `drawn`."""
        first, second = (prompt, model, baseline) in self.of, (prompt, baseline, model) in self.of
        return second if first != second else drawn

    def check(self, units: Sequence[Unit], *, one_will_do: bool) -> None:
        """DataError for units without a verdict, or with more than one, by name and count. `one_will_do`: each pair may
        be judged in one order."""
        asked = Counter(map(_shown, units))
        lacking = [name for name, count in asked.items() if len(self.of.get(name, ())) < count]
        one_order = one_will_do and not self.both and all(self._other(name) in self.of for name in lacking)
        refuse("verdicts are missing", [" / ".join(name) for name in lacking], len(units),
               "; both_orders: false takes each pair in the order that is there" if one_order else "")  # fmt: skip
        twice = [name for name, count in asked.items() if len(self.of[name]) > count]
        refuse("verdicts are there more than once", [" / ".join(name) for name in twice], len(units))

    def refuse_others(self, units: Sequence[Unit], known: Collection[str]) -> None:
        """DataError for verdicts on what nobody asks about, by name and count; those of the `known` prompts that are
        not among the units' were left out by `limit`, and are only counted."""
        prompts = {unit.item.id for unit in units}
        pairs = {frozenset(_shown(unit)[1:]) for unit in units}
        rest = [name for name in self.of if name[0] in prompts or name[0] not in known]
        strange = [name for name in rest if name[0] not in prompts or frozenset(name[1:]) not in pairs]
        what = "verdicts are of prompts or models that nobody asks about"
        refuse(what, [" / ".join(name) for name in strange], len(self.of))
        if left_out := len(self.of) - len(rest):
            log.info("%d of %d verdicts are of prompts that limit leaves out", left_out, len(self.of))

    @staticmethod
    def _other(name: tuple[str, ...]) -> tuple[str, ...]:
        return (name[0], *name[:0:-1])

    def score(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Verdict]]:
        for unit in units:
            own, rows = unit.responses[0].source, self.of.get(_shown(unit), [])
            before = unit.item.responses[: unit.i] if unit.j is None else ()
            place = sum(response.source == own for response in before)
            row: Mapping[str, Any] = rows[place] if place < len(rows) else {"status": "no verdict"}
            failed = row.get("value") is None
            yield unit, Verdict.failed(row.get("status", "failed")) if failed else Verdict(row["value"])


def _shown(unit: Unit) -> tuple[str, ...]:
    return (unit.item.id, *(response.source for response in unit.responses))


def judge_of(given: Any, policies: Mapping[str, str], where: Path, own: str = "") -> Any:
    """The scorer of a section, a function, or an object that is one. `own`: "wildbench" or "arena" for a language model
    without a template of its own, which is asked as the benchmark asks."""
    if hasattr(given, "score"):
        return given.inner if isinstance(given, BothOrders) else given
    spec = {"kind": "function", "function": given} if callable(given) else given
    if not isinstance(spec, Mapping):
        raise ConfigError("judge must be a scorer's section, a function or a scorer")
    made = make_scorer("judge", spec, policies, where)
    made = made.inner if isinstance(made, BothOrders) else made
    asks = own and spec.get("kind") == "judge" and "path" not in spec
    if asks and spec.get("template") is None and spec.get("by", "text") == "text":
        if own == "arena" and made.unit == "pair":
            return ArenaJudge("judge", made.backend)
        if own == "wildbench" and made.unit in ("pair", "response"):
            return WildBenchJudge("judge", made.backend, made.unit)
    return made


class Kept:
    """A scorer whose verdicts stay in a folder's file, and across runs: asked again, it asks what is not there.

    `counts`: of the last call; `lines`: of all units that were asked, in the form of verdicts.jsonl. `done`: all has
    been asked, and the file is only read. `quarters`: P is taken to the nearest of 0, 1/4, 1/2, 3/4 and 1.
    """

    def __init__(
        self, inner: Any, folder: Path, names: Callable[[Unit], list[str]], max_failed: float, *, done: bool = False,
        quarters: bool = False,
    ):  # fmt: skip
        self.inner, self.folder, self.names, self.max_failed, self.done = inner, folder, names, max_failed, done
        self.name, self.unit, self.quarters = inner.name, inner.unit, quarters
        self.exact = bool(getattr(inner, "exact", False))
        self.counts: dict[str, Any] = {}
        self.lines: list[dict[str, Any]] = []

    @property
    def key(self) -> Mapping[str, Any]:
        return self.inner.key

    @property
    def settles(self) -> bool:
        return bool(getattr(self.inner, "settles", False))

    def settle(self, *given: Any) -> Any:
        return self.inner.settle(*given)

    def score(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Verdict]]:
        if not units:
            return
        if self.done:
            said = read_verdicts(self.folder, self.name)
            found = {unit.key: as_verdict(said.get(unit.item.id, {}).get((unit.i, unit.j))) for unit in units}
        else:
            found, self.counts = unit_stage(self.inner, units, self.folder, max_failed=self.max_failed)
        self.lines = list(lines_of(self.folder, self.name, {unit.key: self.names(unit) for unit in units}))
        for unit in units:
            verdict = found[unit.key]
            if self.quarters and isinstance(verdict.value, float):
                verdict = Verdict(round(4 * verdict.value) / 4)
            yield unit, verdict

    def close(self) -> None:
        self.inner.close()


def kept(scorer: Any, folder: Path, names: Callable[[Unit], list[str]], max_failed: float, done: bool) -> Any:
    """`Kept`, of an ensemble its members."""
    if not isinstance(scorer, Ensemble):
        return Kept(scorer, folder, names, max_failed, done=done)
    members = {name: Kept(member, folder, names, max_failed, done=done) for name, member in scorer.members.items()}
    made = copy.copy(scorer)
    made.members = members
    return made


def lines_of(folder: Path, name: str, names: Mapping[Any, Sequence[str]]) -> Iterator[dict[str, Any]]:
    """Lines of verdicts.jsonl, the last of each unit of a judge's file: `names` are those that were shown, by the
    unit's key."""
    said = read_json(folder / name / "scorer.json")
    last = {}
    for line in read_lines(folder / name / "part-0000.jsonl"):
        if line["key"] == said["lines"]:
            last[line["id"], line["i"], line["j"]] = line
    for key, shown in names.items():
        line = last.get(key)
        if line is not None:
            yield {"id": line["id"], "shown": list(shown), "judge": name, "value": line["value"],
                   "status": line["status"], "raw": line["raw"]}  # fmt: skip


def scorers_in(scorer: Any) -> list[Any]:
    """Those that are asked: of an ensemble its members."""
    return list(scorer.members.values()) if isinstance(scorer, Ensemble) else [scorer]


class Cost(NamedTuple):
    """What a judge has still to say: its calls, about how many tokens it is shown and at most writes (of language
    models); `done`: calls that are behind it."""

    calls: int
    shown: int
    written: int
    done: int


def cost(scorer: Any, units: Iterable[Unit], done: Counter[Any] | None = None) -> Cost:
    """Of functions and files no tokens. `done`: what `verdicts_so_far` gives."""
    left, calls, characters, written, behind = Counter(done or {}), 0, 0, 0, 0
    for unit in units:
        for one in scorers_in(scorer):
            key = _key(one.name, *unit.key)
            if left[key]:
                left[key] -= 1
                behind += 1
                continue
            calls += 1
            characters += 0 if isinstance(one, FunctionScorer | FileJudge) else _characters(one, unit)
            written += _reply_tokens(one)
    return Cost(calls, characters // CHARACTERS, written, behind)


def verdicts_so_far(scorer: Any, folder: Path) -> Counter[Any]:
    """How many verdicts on a unit, whichever was shown first, are in the files of a stage that has not ended."""
    found: Counter[Any] = Counter()
    for one in scorers_in(scorer):
        paths = [path for path in folder.rglob("part-0000.jsonl") if path.parent.name == one.name]
        own = digest(dict(one.key))[:8] if paths else ""
        for path in paths:
            lines = [line for line in lines_so_far(path) if line["key"].partition("-")[0] == own]
            last = {(line["id"], line["i"], line["j"]): line["value"] for line in lines}
            found.update(_key(one.name, *unit) for unit, value in last.items() if value is not None)
    return found


def _key(scorer: str, name: str, i: int | None, j: int | None) -> tuple[str, str, frozenset[int | None]]:
    return scorer, name, frozenset((i, j))


def _reply_tokens(scorer: Any) -> int:
    """The most that a language model writes of one verdict; 0 of one that only says how probable labels are."""
    backend = getattr(scorer, "backend", None)
    if getattr(backend, "by", None) != "text":
        return 0
    attempts = 2 if backend.temperature > 0 else 1  # a reply that cannot be read is asked for once more
    return attempts * int(backend.decoding["max_tokens"])


def _characters(scorer: Scorer, unit: Unit) -> int:
    content = scorer.content(unit) if hasattr(scorer, "content") else None
    if isinstance(content, str):
        return len(content)
    return len(prompt_text(unit.item.prompt)) + sum(len(response.text) for response in unit.responses)
