"""What samplers and scorers answered, in a file that grows: asked once, whatever interrupts.

A line is one of sample_stage.py of a response, {id, source, k, scorer, value} of a judgement, and of a failure
{..., status, raw} in the place of what it should have been. Work that is a function of what
it has asked so far does the same when it is begun again: what is in the file is not asked again.

Of samplers and scorers that are exact the file has the same bytes after an interruption as without one: what is asked
goes in batches that depend on nothing else, and of a batch that was written in part all is asked and the rest added.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastpo.errors import TrainingError, shown
from fastpo.loop.sample_stage import answered, line_of
from fastpo.sampling.items import Failure, Request, Response, Sampler, Scorer, Unit, Verdict
from fastpo.sampling.parts import Part

log = logging.getLogger("fastpo")

Name = tuple[str, str, int, str]  # id, source, k; and which scorer was asked, or ""
_SURE = 20  # failures before work ends early: a few of little work say nothing
_RAW = 2000  # characters that are kept of what a judge said


class Answers:
    """The file of one piece of work; a context manager. TrainingError where more than the share `max_failed` failed.

    `asked`, `failed`: how many of all, of those that were asked since it was opened or were there already.
    """

    def __init__(self, path: Path, *, name: str, max_failed: float):
        self.name, self.max_failed = name, max_failed
        self._part = Part(path)
        self._known: dict[Name, dict[str, Any]] = {}
        for line in self._part.lines:
            if line.get("status") is None or _name(line) not in self._known:
                self._known[_name(line)] = line
        self._part.lines = []
        self.asked = 0
        self.failed: dict[Name, dict[str, Any]] = {}

    def __enter__(self) -> "Answers":
        self._part.__enter__()
        return self

    def __exit__(self, kind: Any, *raised: object) -> None:
        self._part.__exit__(kind, *raised)
        if kind is None and len(self.failed) > self.max_failed * self.asked:
            raise TrainingError(self._too_many())

    @property
    def counts(self) -> dict[str, Any]:
        return {"asked": self.asked, "failed": dict(sorted(Counter(x["status"] for x in self.failed.values()).items()))}

    def ask(self, sampler: Sampler, requests: Sequence[Request], desc: str | None = None) -> list[Response | Failure]:
        """The answer to each, in the order of the requests. `desc`: of a progress bar."""
        names = {request.unit: (*request.unit, "") for request in requests}
        if len(names) < len(requests):
            twice = next(unit for unit, n in Counter(r.unit for r in requests).items() if n > 1)
            raise ValueError(f"{self.name}: {twice} is asked twice")
        self.asked += len(requests)
        found = self._there(names.values(), sampler.exact)
        missing = [request for request in requests if names[request.unit] not in found]
        with tqdm(
            total=len(requests), initial=len(found), desc=desc, unit="reply", disable=None if desc else True
        ) as bar:
            for answers in answered(sampler, requests, missing):
                lines = [(names[r.unit], line_of(r, a)) for r, a in answers if names[r.unit] not in found]
                self._add(lines, found)
                bar.update(len(lines))
        return [_answer(found[names[request.unit]]) for request in requests]

    def judge(self, scorer: Scorer, units: Sequence[Unit], sources: Sequence[str]) -> list[Verdict]:
        """The verdict on one response each, in the order of the units. `sources` name them beside their item's id."""
        names = [(unit.item.id, source, 0, scorer.name) for unit, source in zip(units, sources, strict=True)]
        by_unit = {unit.key: name for unit, name in zip(units, names)}
        if len(by_unit) < len(units) or len(set(names)) < len(units):
            raise ValueError(f"{self.name}: a unit is asked twice")
        self.asked += len(units)
        exact = bool(getattr(scorer, "exact", False))
        found = self._there(names, exact)
        missing = [unit for unit, name in zip(units, names) if name not in found]
        if missing and exact:
            told = {by_unit[unit.key]: verdict for unit, verdict in scorer.score(units)}
            self._add([(name, _line(name, told[name])) for name in names if name not in found], found)
        elif missing:
            for unit, verdict in scorer.score(missing):
                name = by_unit[unit.key]
                self._add([(name, _line(name, verdict))], found)
        return [_verdict(found[name]) for name in names]

    def _there(self, names: Any, exact: bool) -> dict[Name, dict[str, Any]]:
        """What the file had of these. What is not exact may do better than it did: its failures are asked again."""
        found = {}
        for name in names:
            line = self._known.pop(name, None)
            if line is not None and (exact or "status" not in line):
                found[name] = line
                if "status" in line:
                    self.failed[name] = line
        return found

    def _add(self, lines: Sequence[tuple[Name, dict[str, Any]]], found: dict[Name, dict[str, Any]]) -> None:
        self._part.add(line for _, line in lines)
        found.update(lines)
        self.failed.update((name, line) for name, line in lines if "status" in line)
        if len(self.failed) > max(_SURE, self.max_failed * self.asked):
            raise TrainingError(self._too_many())

    def _too_many(self) -> str:
        counts = ", ".join(f"{n:,} {s}" for s, n in Counter(x["status"] for x in self.failed.values()).most_common())
        raw = "; ".join(f"{name[0]}: {shown(line['raw'], 200)}" for name, line in list(self.failed.items())[:3])
        return (
            f"{self.name}: {len(self.failed):,} of {self.asked:,} requests failed, more than "
            f"max_failed={self.max_failed:g}: {counts}. Replies: {raw}. What there is of answers is kept in "
            f"{self._part.path}; start again and only the rest is asked"
        )


def _name(line: Mapping[str, Any]) -> Name:
    return (line["id"], line["source"], line["k"], line.get("scorer", ""))


def _line(name: Name, verdict: Verdict) -> dict[str, Any]:
    line: dict[str, Any] = {"id": name[0], "source": name[1], "k": name[2], "scorer": name[3]}
    raw = {"raw": verdict.raw[:_RAW]} if verdict.raw else {}
    if verdict.value is None:
        return line | {"status": verdict.status, "raw": verdict.raw[:_RAW]}
    return line | {"value": verdict.value} | raw


def _answer(line: Mapping[str, Any]) -> Response | Failure:
    if "status" in line:
        return Failure(line["status"], line["raw"])
    return Response.from_json({**line, "source": line["source"]})


def _verdict(line: Mapping[str, Any]) -> Verdict:
    if "status" in line:
        return Verdict.failed(line["status"], line["raw"])
    return Verdict(line["value"], raw=line.get("raw", ""))
