"""How a policy is measured on held-out prompts: its greedy answers scored, and against those of another policy."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fastpo.sampling.items import Item, Response, Scorer, Scores


def compared(item: Item, answer: Response, other: Response | None, scorer: Scorer) -> Item:
    """What the scorer is asked: the answer alone, or with the other policy's where it compares."""
    if scorer.unit == "response" or other is None:
        return item.with_responses([answer])
    return item.with_responses([answer, other])


def figures(scores: Mapping[str, Scores], others: Mapping[str, Scores] | None, items: int) -> dict[str, Any]:
    """Mean score with its standard error, win rate with its own, and how many judgements failed.

    A scorer of pairs gives P(the answer beats the other policy's). Of scores, the better wins and a tie is a half.
    """
    values = [s.values[0] for s in scores.values() if s.wins is None and s.values and s.values[0] is not None]
    wins = [s.wins[0][1] for s in scores.values() if s.wins is not None and len(s.wins) > 1]
    known = [w for w in wins if w is not None]
    if others is not None and not known:
        for name, one in scores.items():
            other = others.get(name)
            a, b = one.values[0], None if other is None else other.values[0]
            if a is not None and b is not None:
                known.append(0.5 + 0.5 * ((a > b) - (a < b)))
    out: dict[str, Any] = {"prompts": items, "failed": items - max(len(values), len(known))}
    if values:
        out |= {"score": statistics.fmean(values), "score error": _error(values)}
    if known:
        out |= {"win rate": statistics.fmean(known), "win rate error": _error(known)}
    return out


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
