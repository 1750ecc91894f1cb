"""Preferences between the responses that a step drew, for the online preference losses: by rewards or by a judge."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastpo.errors import ConfigError, TrainingError, did_you_mean, shown
from fastpo.online.asking import Orders, as_scorer, items_of, wins_of
from fastpo.online.rewards import Judged, Rewards, line_of
from fastpo.sampling.items import Response, Verdict
from fastpo.scoring.scorers import make_scorer
from fastpo.scoring.scoring import number

Comparison = Literal["bradley_terry", "hard"]
COMPARISONS = ("bradley_terry", "hard")


@dataclass
class Preferred:
    """Who beats whom among the responses of each prompt."""

    wins: list[np.ndarray]  # [G, G] fp64 a prompt: P(row beats column), 1/2 of itself; NaN where it was not judged
    used: np.ndarray  # [R] bool: judged against at least one other response of its prompt
    left_out: Counter[str] = field(default_factory=Counter)  # by "judge: reason" pairs, of rewards responses
    said: dict[str, str] = field(default_factory=dict)  # by the same, what came first in place of a number
    rewards: np.ndarray | None = None  # [R] fp64: the weighted sum less the penalty; NaN: left out; None: of a judge
    judged: Judged | None = None  # of rewards
    orders: Orders | None = None  # of a judge that was asked in both orders
    broken: str | None = None

    def check(self) -> None:
        """TrainingError where the judge is broken. Several processes ask this of all of them, together."""
        if self.broken is not None:
            raise TrainingError(self.broken)

    def line(self) -> str:
        """For a log: what was left out and why; "" where nothing was."""
        if self.judged is not None:
            return self.judged.line()
        pairs = sum(len(w) * (len(w) - 1) // 2 for w in self.wins)
        return line_of(self.left_out, self.said, sum(self.left_out.values()), pairs, "pairs")


class Preferences:
    """P(one response beats another) within each prompt's responses. Of several processes each judges its own.

    * `rewards`: by the difference of two weighted rewards. `comparison`: "bradley_terry", its sigmoid, or "hard", 1 for
      the higher, 1/2 for equal ones. `missing_eos_penalty` is subtracted from the reward of what did not end by itself.
    * `judge`: a section of the loop's scorers, a scorer, or a pairwise judge of TRL, in place of rewards. Pairs are
      asked in both orders, unless `both_orders` (or the section's) is False. A scorer of single responses is a reward.

    One of the two; it is closed with this. ConfigError for both, neither, and options of the other.
    """

    def __init__(
        self, rewards: Rewards | None = None, judge: Any = None, *, comparison: Comparison = "bradley_terry",
        missing_eos_penalty: float | None = None, both_orders: bool | None = None,
        policies: Mapping[str, str] | None = None, where: Path = Path(),
    ):  # fmt: skip
        if (rewards is None) == (judge is None):
            raise ConfigError("preferences come of reward_funcs or of a judge: give one of them")
        if comparison not in COMPARISONS:
            near = did_you_mean(str(comparison), COMPARISONS)
            raise ConfigError(f"comparison={comparison!r} is none of {', '.join(COMPARISONS)}{near}")
        self.rewards, self.comparison, self.scorer = rewards, comparison, None
        if judge is not None:
            scorer = self._scorer(judge, dict(policies or {}), Path(where))
            if scorer.unit == "pair":
                self.scorer = scorer
            else:
                self.rewards = Rewards([scorer])
        of_section = judge.get("both_orders") if isinstance(judge, Mapping) else None
        self.both_orders = (of_section if both_orders is None else both_orders) is not False
        self.penalty = self._penalty(missing_eos_penalty)
        self._judged = False

    def _scorer(self, judge: Any, policies: Mapping[str, str], where: Path) -> Any:
        if isinstance(judge, Mapping):
            return make_scorer(str(judge.get("kind", "judge")), judge, policies, where)
        scorer = as_scorer(judge)
        if scorer is None:
            raise ConfigError(
                f"judge={shown(judge, 60)}: expected a scorer's section, a scorer, or an object with "
                "judge(prompts, completions)"
            )
        return scorer

    def _penalty(self, given: Any) -> float:
        if given is None:
            return 0.0
        value = number(given)
        if isinstance(value, Verdict) or value < 0:
            raise ConfigError(f"missing_eos_penalty={shown(given, 60)}: expected a number from 0 on")
        if self.scorer is not None:
            raise ConfigError("missing_eos_penalty is subtracted from rewards, and a judge of pairs gives none")
        return value

    def __call__(
        self, rows: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[Response]], state: Any = None, *,
        stop: bool = True,
    ) -> Preferred:  # fmt: skip
        """Compare the responses `groups[n]` to `rows[n]["prompt"]`; TrainingError and `stop` as in `Rewards`."""
        found = self._by_rewards(rows, groups, state) if self.rewards is not None else self._by_judge(rows, groups)
        if stop:
            found.check()
        return found

    def _by_rewards(
        self, rows: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[Response]], state: Any
    ) -> Preferred:
        assert self.rewards is not None
        judged = self.rewards(rows, groups, state, stop=False)
        finished = np.array([response.finished for group in groups for response in group], dtype=bool)
        rewards = self.rewards.totals(judged) - self.penalty * ~finished  # [R]
        wins, used, start = [], [], 0
        for group in groups:
            of_group = compared(rewards[start : start + len(group)], self.comparison)
            wins.append(of_group)
            used.append(_has_other(of_group))
            start += len(group)
        return Preferred(
            wins, np.concatenate(used) if used else np.zeros(0, bool), judged.left_out, judged.said, rewards, judged,
            broken=judged.broken,
        )  # fmt: skip

    def _by_judge(self, rows: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[Response]]) -> Preferred:
        assert self.scorer is not None
        of, orders = wins_of(self.scorer, items_of(rows, groups), self.both_orders)
        used = [_has_other(wins.p) for wins in of]
        found = Preferred([wins.p for wins in of], np.concatenate(used) if used else np.zeros(0, bool))
        name = self.scorer.name
        for wins in of:
            for reason, count in wins.failed.items():
                found.left_out[f"{name}: {reason}"] += count
                found.said.setdefault(f"{name}: {reason}", wins.raw.get(reason, ""))
        found.orders = orders if self.both_orders else None
        self._judged = self._judged or bool(found.used.any())
        if found.left_out and not self._judged:
            reason, said = next(iter(found.said.items()))
            found.broken = (
                f"judge {name!r} could not judge any of {sum(found.left_out.values())} pairs, nor any before: "
                f"{reason.removeprefix(f'{name}: ')}{f', {said}' if said else ''}"
            )
        return found

    def close(self) -> None:
        """Let go of models and connections."""
        if self.rewards is not None:
            self.rewards.close()
        if self.scorer is not None:
            self.scorer.close()

    def __enter__(self) -> "Preferences":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def compared(rewards: np.ndarray, comparison: Comparison = "bradley_terry") -> np.ndarray:
    """[G, G] fp64: P(row beats column) of rewards [G], NaN of those that have none. wins + wins.T is 1 exactly."""
    count = len(rewards)
    wins = np.full((count, count), np.nan)
    for i in range(count):
        for j in range(i, count):
            if np.isnan(rewards[i]) or np.isnan(rewards[j]):
                continue
            gap = float(rewards[i] - rewards[j])
            if i == j:
                p = 0.5
            elif comparison == "hard":
                p = 0.5 + 0.5 * ((gap > 0) - (gap < 0))
            else:
                p = 1.0 / (1.0 + math.exp(-gap)) if gap >= 0 else math.exp(gap) / (1.0 + math.exp(gap))
            wins[i, j], wins[j, i] = p, 1.0 - p
    return wins


def _has_other(wins: np.ndarray) -> np.ndarray:
    """[G] bool: of each response, whether there is a number against another one."""
    others = ~np.isnan(wins)
    np.fill_diagonal(others, False)
    return others.any(axis=1)
