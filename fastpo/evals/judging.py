"""Whom an evaluation asks: scorers of the loop by their section, a benchmark's own judge, a file of verdicts; what they
would cost; and their verdicts as lines.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastpo.errors import ConfigError
from fastpo.evals import pairwise
from fastpo.evals.asked import refuse
from fastpo.evals.text_judge import TextJudge
from fastpo.evals.wildbench_judge import WildBenchJudge
from fastpo.loop.score_stage import as_verdict, read_verdicts, unit_stage
from fastpo.sampling.items import Failure, Scorer, Unit, Verdict, digest, prompt_text
from fastpo.sampling.parts import read_json, read_lines
from fastpo.scoring.scorers import make_scorer
from fastpo.scoring.scoring import BaseScorer, BothOrders, Ensemble, FunctionScorer

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
    """Verdicts that are there, by prompt and by the names of the models that were shown.

    `both`: whether all pairs are there in both orders; a pair that has one order has the other too, as 1 - P.
    """

    name = "verdicts"

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        self.of = {(row["id"], *row["shown"]): row for row in rows}
        self.unit = "pair" if any(len(row["shown"]) == 2 for row in rows) else "response"
        self.both = self.unit == "pair" and all((i, *names[::-1]) in self.of for i, *names in self.of)

    @property
    def key(self) -> Mapping[str, Any]:
        return {"verdicts": digest(list(self.of.values()))}

    def check(self, units: Sequence[Unit]) -> None:
        """DataError for units without a verdict, by name and count."""
        lacking = [_shown(unit) for unit in units if self._of(unit) is None]
        refuse("verdicts are missing", [" / ".join(name) for name in lacking], len(units))

    def _of(self, unit: Unit) -> Verdict | None:
        name = _shown(unit)
        if name in self.of:
            row = self.of[name]
            return Verdict.failed(row.get("status", "failed")) if row.get("value") is None else Verdict(row["value"])
        other = self.of.get((name[0], *name[:0:-1]))
        if other is None or self.both or len(name) < 3:
            return None
        return (
            Verdict.failed(other.get("status", "failed")) if other.get("value") is None else Verdict(1 - other["value"])
        )

    def score(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Verdict]]:
        for unit in units:
            yield unit, self._of(unit) or Verdict.failed("no verdict")


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
    made = object.__new__(type(scorer))
    made.__dict__ |= {**vars(scorer), "members": members}
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


def cost(scorer: Any, units: Iterable[Unit]) -> tuple[int, int]:
    """(calls, about how many tokens they show) of a judge; functions and files show none."""
    calls = characters = 0
    reading = [s for s in scorers_in(scorer) if not isinstance(s, FunctionScorer | FileJudge)]
    for unit in units:
        calls += len(scorers_in(scorer))
        characters += sum(_characters(one, unit) for one in reading)
    return calls, characters // CHARACTERS


def _characters(scorer: Scorer, unit: Unit) -> int:
    content = scorer.content(unit) if hasattr(scorer, "content") else None
    if isinstance(content, str):
        return len(content)
    return len(prompt_text(unit.item.prompt)) + sum(len(response.text) for response in unit.responses)
