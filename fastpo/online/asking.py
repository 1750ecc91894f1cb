"""Scorers asked about the responses that a step drew: a verdict on every unit, whatever a scorer raises, and who beats
whom.

A failed judgement has a reason and no number. What raises is asked again prompt by prompt, so that only those prompts
fail on which it raises.
"""

import inspect
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastpo.errors import ConfigError, one_line, shown
from fastpo.sampling.items import Item, Response, Scores, Unit, Verdict, prompt_text
from fastpo.scoring.scoring import RAW, BaseScorer, BothOrders, number, of_both_orders, verdict_of

NOT_COLUMNS = ("prompt", "completion", "completion_ids")  # what TRL hands to no reward function as a column


def items_of(rows: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[Response]]) -> list[Item]:
    """One item a prompt, by its place in the batch; the row's other columns are `meta`."""
    if len(rows) != len(groups):
        raise ValueError(f"{len(rows)} rows with {len(groups)} groups of responses")
    return [
        Item(str(n), row["prompt"], responses=tuple(group), meta={k: v for k, v in row.items() if k not in NOT_COLUMNS})
        for n, (row, group) in enumerate(zip(rows, groups))
    ]


def verdicts(scorer: Any, units: Sequence[Unit]) -> dict[Any, Verdict]:
    """A verdict by each unit's key. ConfigError passes: a model that cannot be loaded is no failed judgement."""
    wanted = {unit.key: unit for unit in units}
    found: dict[Any, Verdict] = {}

    def ask(some: Sequence[Unit]) -> Exception | None:
        try:
            for unit, verdict in scorer.score(some):
                if unit.key in wanted:
                    found[unit.key] = _checked(verdict, unit, scorer.unit)
        except ConfigError:
            raise
        except Exception as error:  # of a server's client, of a user's scorer
            return error
        return None

    error = ask(units) if units else None
    by_item: dict[str, list[Unit]] = {}
    for unit in units:
        by_item.setdefault(unit.item.id, []).append(unit)
    for of_item in by_item.values():
        lacking = [unit for unit in of_item if unit.key not in found]
        if lacking and error is not None and len(by_item) > 1:
            own = ask(lacking)
        else:
            own = error
        for unit in lacking:
            if unit.key not in found:
                found[unit.key] = Verdict.failed("error", one_line(own)[:RAW] if own else "no verdict on this unit")
    return found


def _checked(verdict: Verdict, unit: Unit, kind: Any) -> Verdict:
    """A verdict of a scorer that somebody else wrote may hold anything."""
    return verdict if verdict.value is None else verdict_of(verdict.value, unit, kind, verdict.raw)


# ---- pairs


@dataclass
class Wins:
    """Who beats whom among the responses of one prompt."""

    p: np.ndarray  # [G, G] fp64: P(row beats column); NaN where it was not judged
    failed: Counter[str] = field(default_factory=Counter)  # pairs by why they have no number
    reasons: list[str] = field(default_factory=list)  # [G]: why a response has none at all, "" where it has some
    raw: dict[str, str] = field(default_factory=dict)  # by reason, what the judge said first

    def rates(self) -> list[float | None]:
        """Of each response the mean of P(it beats another one) over those that it was judged against."""
        table = [[None if np.isnan(p) else float(p) for p in row] for row in self.p]
        scores = Scores([None] * len(table), wins=table)
        return [scores.win_prob(k, itself=False) for k in range(len(table))]


@dataclass
class Orders:
    """Of pairs that were judged in both orders: how many, and in how many both orders name what stood in one place."""

    pairs: int = 0
    by_position: int = 0


def wins_of(scorer: Any, items: Sequence[Item], both: bool = True) -> tuple[list[Wins], Orders]:
    """Every pair of every item. Equal texts are asked once, and one against the other is 1/2.

    `both`: in both orders, P = (p_ij + 1 - p_ji)/2, which fails where one of the two failed.
    """
    asked = scorer.inner if isinstance(scorer, BothOrders) else scorer
    units, distinct = [], []
    for item in items:
        first = {response.text: k for k, response in reversed(list(enumerate(item.responses)))}
        places = sorted(first.values())
        distinct.append([first[response.text] for response in item.responses])
        for n, i in enumerate(places):
            for j in places[n + 1 :]:
                units += [Unit(item, i, j), Unit(item, j, i)] if both else [Unit(item, i, j)]
    found = verdicts(asked, units)
    orders = Orders()
    return [_wins(item, same, found, both, orders) for item, same in zip(items, distinct)], orders


def _wins(item: Item, same: Sequence[int], found: Mapping[Any, Verdict], both: bool, orders: Orders) -> Wins:
    """`same`: of each response the place of the first one with its text."""
    count = len(same)
    wins = Wins(np.full((count, count), np.nan))
    why: list[str] = [""] * count
    for i in range(count):
        for j in range(i + 1, count):
            if same[i] == same[j]:
                wins.p[i, j] = wins.p[j, i] = 0.5
                continue
            a, b = sorted((same[i], same[j]))
            ab = found[item.id, a, b]
            ba = found[item.id, b, a] if both else None
            p = of_both_orders(ab.value, ba.value) if ba is not None else ab.value  # type: ignore[arg-type]
            if (i, j) == (a, b) and ba is not None and p is not None:
                orders.pairs += 1
                orders.by_position += (ab.value - 0.5) * (ba.value - 0.5) > 0  # type: ignore[operator]
            if p is None:
                bad = ab if ab.value is None or ba is None else ba
                wins.failed[bad.status] += 1
                wins.raw.setdefault(bad.status, bad.raw)
                why[i], why[j] = why[i] or bad.status, why[j] or bad.status
                continue
            assert isinstance(p, float)
            wins.p[i, j] = p if same[i] == a else 1.0 - p
            wins.p[j, i] = 1.0 - wins.p[i, j]
    judged = ~np.isnan(wins.p).all(axis=1) if count > 1 else np.zeros(count, bool)
    wins.reasons = ["" if ok else reason or "alone" for ok, reason in zip(judged, why)]
    wins.p[np.flatnonzero(judged), np.flatnonzero(judged)] = 0.5
    return wins


class TrlJudge(BaseScorer):
    """A pairwise judge of TRL as a scorer of pairs: an object with `judge(prompts, completions, shuffle_order)` that
    gives the place of the better of two texts, 0 or 1, and -1 where it failed. One that has `return_scores` is asked
    for P(first is better). It never shuffles: both orders are asked instead.

    TRL takes every rank but 0 for a win of the second, a failure too.
    """

    unit = "pair"
    exact = False

    def __init__(self, judge: Any):
        self.judge, self.name = judge, type(judge).__name__
        try:
            parameters = inspect.signature(judge.judge).parameters
        except (TypeError, ValueError):
            parameters = {}  # type: ignore[assignment]
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.soft = "return_scores" in parameters
        self.options = {"shuffle_order": False} if anything or "shuffle_order" in parameters else {}
        self.options |= {"return_scores": True} if self.soft else {}

    @property
    def key(self) -> Mapping[str, Any]:
        return {"trl_judge": f"{type(self.judge).__module__}.{self.name}"}

    def score(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Verdict]]:
        prompts = [prompt_text(unit.item.prompt) for unit in units]
        pairs = [[response.text for response in unit.responses] for unit in units]
        ranks = list(self.judge.judge(prompts, pairs, **self.options))
        if len(ranks) != len(units):
            raise ValueError(f"{len(ranks)} ranks for {len(units)} pairs")
        for unit, rank in zip(units, ranks):
            yield unit, self._verdict(rank)

    def _verdict(self, rank: Any) -> Verdict:
        value = number(rank)
        if isinstance(value, Verdict):
            return value
        if value == -1:
            return Verdict.failed("error", "the judge gave -1")
        if not (0 <= value <= 1 if self.soft else value in (0, 1)):
            return Verdict.failed("out_of_range", f"the judge gave {shown(rank, 60)}")
        return Verdict(value if self.soft else 1.0 - value, raw=json.dumps(value))


def as_scorer(value: Any) -> Any:
    """A scorer as it is, a judge of TRL as one; None for everything else."""
    if hasattr(value, "score") and hasattr(value, "unit"):
        return value
    return TrlJudge(value) if callable(getattr(value, "judge", None)) and not callable(value) else None
