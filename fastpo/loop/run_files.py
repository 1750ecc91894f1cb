"""What the files of a run's folder say, read for people: whatever is there of them, a run in the middle included.

Nothing here raises for what a file holds. What cannot be read is left out, and `RunFiles.unreadable` says so.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastpo.errors import FastpoError, one_line
from fastpo.loop import config as configs
from fastpo.loop.config import LoopConfig

ORDER = ("prompts", "sample", "refine", "score", "select", "search", "train", "eval")  # others go first


@dataclass
class IterationFiles:
    """One iteration's folder; the start's is that of iteration 0, which is only measured."""

    number: int
    folder: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)  # manifests by name
    rows: dict[str, Any] = field(default_factory=dict)  # rows.json
    eval: dict[str, Any] = field(default_factory=dict)  # eval.json
    warnings: list[str] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)  # of training

    @property
    def made(self) -> str:
        """The policy that comes of it, by name."""
        return f"iterate-{self.number}" if self.number else "start"

    def counts(self, stage: str) -> Mapping[str, Any]:
        """What a stage that is done counted."""
        return mapping(self.stages.get(stage, {}).get("counts"))

    def options(self, stage: str) -> Mapping[str, Any]:
        return mapping(self.stages.get(stage, {}).get("options"))

    def seconds(self) -> dict[str, float]:
        found = {name: number(stage, "seconds") for name, stage in self.stages.items()}
        return {name: value for name, value in found.items() if value is not None}

    def done(self, stage: str) -> bool:
        return self.stages.get(stage, {}).get("state") == "done"

    def begun(self) -> str | None:
        """The stage that was begun and is not done."""
        return next((name for name, stage in self.stages.items() if stage.get("state") != "done"), None)


@dataclass
class RunFiles:
    """A run's folder."""

    folder: Path
    options: dict[str, Any]  # iterate.json
    iterations: list[IterationFiles]  # those that are there, the start's too, in order
    unreadable: list[str]
    prepared: IterationFiles | None = None  # the stages before the first iteration

    @property
    def trained(self) -> list[IterationFiles]:
        """Without the start's."""
        return [one for one in self.iterations if one.number]

    @property
    def planned(self) -> int:
        """How many iterations the run is to have."""
        given = self.options.get("iterations")
        there = max((one.number for one in self.iterations), default=0)
        return max(given, there) if isinstance(given, int) else there

    def config(self, iteration: int) -> LoopConfig | None:
        """The options of an iteration; None where iterate.json is not of this version."""
        try:
            return configs.build(self.options).in_iteration(max(iteration, 1))
        except (FastpoError, TypeError, ValueError, AttributeError):
            return None

    def policies(self) -> dict[str, str]:
        """Path by name: start, before, and what the iterations have made."""
        found = {name: self.options.get(key) for name, key in (("start", "model"), ("before", "before"))}
        out = {name: str(path) for name, path in found.items() if path is not None}
        return out | {one.made: str(one.folder / "train") for one in self.trained if one.done("train")}

    def name_of(self, path: Any) -> str:
        """A policy's name by its path, which is its own name where it is none of the run's."""
        names = {p: name for name, p in self.policies().items()}
        names |= {str(one.folder / "train"): one.made for one in self.trained}
        return names.get(str(path), str(path))

    def sampled_from(self, one: IterationFiles) -> str:
        """Name of the policy that an iteration samples and trains from; empty where it is not known."""
        stages = [one.options(stage) for stage in ("train", "search", "sample")]
        path = next((options["policy"] for options in stages if "policy" in options), None)
        return self.name_of(path) if path is not None and one.number else ""


def read_run(folder: Path) -> RunFiles:
    """Manifests, counts, figures, warnings and training curves; of samples and judgements see examples.py."""
    unreadable: list[str] = []
    options = mapping(_json(folder / "iterate.json", unreadable))
    iterations = []
    for path in sorted(folder.glob("iter-*")):
        digits = path.name.removeprefix("iter-")
        if path.is_dir() and digits.isdecimal():
            iterations.append(_read_iteration(path, int(digits), unreadable))
    before = folder / "prepare"
    prepared = _read_iteration(before, 0, unreadable) if (before / "stages").is_dir() else None
    return RunFiles(folder, dict(options), iterations, unreadable, prepared)


def _read_iteration(folder: Path, number: int, unreadable: list[str]) -> IterationFiles:
    stages = {}
    for path in sorted((folder / "stages").glob("*.json"), key=lambda p: in_order(p.stem)):
        found = mapping(_json(path, unreadable))
        if found:
            stages[path.stem] = dict(found)
    warnings = _json(folder / "warnings.json", unreadable)
    return IterationFiles(
        number, folder, stages, dict(mapping(_json(folder / "rows.json", unreadable))),
        dict(mapping(_json(folder / "eval.json", unreadable))),
        [str(one) for one in warnings] if isinstance(warnings, list) else [],
        _metrics(folder / "train" / "metrics.jsonl"),
    )  # fmt: skip


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The numbers of each line that has a step; None of one that is not finite."""
    found = []
    for line in lines(path):
        step = number(line, "step")
        if step is not None:
            given = {key: number(line, key) for key, value in line.items() if isinstance(value, int | float)}
            found.append({**given, "step": step})
    return found


def in_order(stage: str) -> tuple[int, str]:
    """What stages are sorted by."""
    return (ORDER.index(stage) if stage in ORDER else -1, stage)


def _json(path: Path, unreadable: list[str]) -> Any:
    """None where the file is not there, or is no JSON, which is noted."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        unreadable.append(f"{path}: {one_line(error)}")
        return None


def lines(path: Path, prefixes: Sequence[bytes] = ()) -> Iterator[dict[str, Any]]:
    """The lines that are JSON objects; with prefixes, of those that begin with one of them, the others unparsed."""
    try:
        if not prefixes:
            yield from _objects(path, ())
            return
        stat = path.stat()
        yield from _found(path, stat.st_size, stat.st_mtime_ns, tuple(prefixes))
    except OSError:
        return


@lru_cache(maxsize=512)
def _found(path: Path, size: int, changed: int, prefixes: tuple[bytes, ...]) -> list[dict[str, Any]]:
    """Kept while the file stays as it is: a run writes its page again and again, over files of gigabytes."""
    return list(_objects(path, prefixes))


def _objects(path: Path, prefixes: tuple[bytes, ...]) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for line in file:
            if prefixes and not line.startswith(prefixes):
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(found, dict):
                yield found


def parts(folder: Path) -> list[Path]:
    """Of a stage whose lines are in files of parts."""
    return sorted(folder.glob("part-*.jsonl"))


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def number(values: Mapping[str, Any], name: str) -> float | None:
    """A finite number of a mapping, or None."""
    return finite(values.get(name))


def finite(value: Any) -> float | None:
    """As a float; None of what is no number, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None
