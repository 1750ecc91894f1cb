"""What every measure is: which prompts it reads, what it asks of a judge, and the figure that comes of it."""

import abc
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpo.errors import ConfigError
from fastpo.evals.asked import standard_error, wilson
from fastpo.evals.inputs import prompts_of
from fastpo.evals.measure_options import Option, checked
from fastpo.sampling.items import Item, Response, Unit

Z = 1.96  # of 95 %
Answers = Mapping[str, Mapping[str, Sequence[Response]]]  # by model, by prompt


@dataclass
class Asked:
    """What an evaluation is of."""

    models: list[str]
    baselines: list[str]
    items: list[Any]  # Items; of WildBench and RewardBench their own
    answers: Answers
    scorer: Any
    both: bool
    seed: int
    max_failed: float
    every: list[Any] = field(default_factory=list)  # the prompts before `limit`

    @property
    def baseline(self) -> str | None:
        return self.baselines[0] if self.baselines else None

    @property
    def rivals(self) -> list[str]:
        """The models that are compared with the baseline."""
        return [name for name in self.models if name not in self.baselines]

    def text(self, model: str, name: str) -> str | None:
        """The answer of a model to a prompt; None where there is none."""
        own = self.answers[model].get(name)
        return own[0].text if own else None


def mean_of(values: Sequence[float], scale: float = 1.0) -> dict[str, Any]:
    """A mean over prompts, its standard error and what holds 95 %.

    Of zeros, halves and ones Wilson's interval, which does not shrink to nothing where all are alike: ties vary less
    than wins and losses of the same mean, so that it holds at least as much. Else 1.96 standard errors either way, of
    shares not beyond 0 and 1.
    """
    if not values:
        return {"value": None, "error": None, "interval": None, "prompts": 0}
    mean, count = statistics.fmean(values), len(values)
    error = standard_error(values)
    if set(values) <= {0.0, 0.5, 1.0}:
        edges = list(wilson(mean, count))
    else:
        edges = [] if error is None else [mean - Z * error, mean + Z * error]
    if all(0 <= value <= 1 for value in values):
        edges = [min(1.0, max(0.0, edge)) for edge in edges]
    interval = [scale * edge for edge in edges] or None
    return {"value": scale * mean, "error": None if error is None else scale * error, "interval": interval,
            "prompts": count}  # fmt: skip


class Measure(abc.ABC):
    """One of the names. `options`: its own."""

    name = ""
    figure = ""  # what `value` is
    even: float | None = None  # the value of models that are alike
    options: Mapping[str, Option] = {}
    own_judge = ""  # of `judging.judge_of`
    compares = True  # with a baseline
    of_judge = False  # the judge itself: the answers are the rows'
    both = False  # pairs in both orders, unless the options say otherwise
    limit: int | None = None

    def __init__(self, given: Mapping[str, Any]):
        self.given = checked(self.name, self.options, given)

    def prompts(self, source: Any) -> list[Any]:
        return prompts_of(source)

    def items(self, asked: Asked) -> list[Item]:
        """The prompts as their answers are asked for."""
        return asked.items

    def baseline(self, items: Sequence[Any]) -> Any:
        """What is compared with where the options do not say."""
        return None

    def of_unit(self, unit: str) -> tuple[str, float | None]:
        """(what `value` is, the value of models that are alike) where the judge is of such units."""
        return self.figure, self.even

    def check(self, asked: Asked) -> None:
        """ConfigError for what does not fit together."""
        if self.compares and not asked.baselines:
            raise ConfigError(f"{self.name} compares with a baseline: give baseline, a policy or a file of answers")
        if self.compares and not asked.rivals:
            raise ConfigError(f"{self.name}: the baseline is the only model")

    @abc.abstractmethod
    def units(self, asked: Asked) -> Iterator[Unit]:
        """What the judge is asked."""

    @abc.abstractmethod
    def judge(self, asked: Asked, folder: Path) -> dict[str, Any]:
        """Asks what is not in the folder yet; counts."""

    @abc.abstractmethod
    def verdicts(self, asked: Asked, folder: Path) -> Iterator[dict[str, Any]]:
        """Lines of verdicts.jsonl."""

    @abc.abstractmethod
    def figures(self, asked: Asked, folder: Path) -> dict[str, dict[str, Any]]:
        """By model: value, error, interval, and what belongs to them."""

    def of_annotations(self, source: Any, prompts: Any, seed: int, baseline: Any = None) -> dict[str, dict[str, Any]]:
        """The same of a file in the measure's own format; `baseline` is the arena's, by name."""
        raise ConfigError(f"{self.name} has no annotations of its own: give verdicts, in the form of verdicts.jsonl")


def plus_minus(value: float | None, error: float | None) -> dict[str, Any]:
    interval = None if value is None or error is None else [value - Z * error, value + Z * error]
    return {"value": value, "error": error, "interval": interval}
