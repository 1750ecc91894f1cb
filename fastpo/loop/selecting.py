"""From scored responses to pairs: the rules of the papers, each a function of one prompt's responses and their numbers.

`gather` makes the items that are scored: truncated, empty and overlong responses go, equal ones become one with their
count. `Selector` makes a row for `fastpo.train` of a scored item, or says why there is none.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastpo.errors import ConfigError, did_you_mean
from fastpo.loop.config import Select
from fastpo.sampling.items import Dropped, Item, Response, Scores, seed_of

Pair = tuple[int, int, float]  # winner, loser, weight
_ROUNDING = 1e-9
GREEDY = "greedy"  # the source of the greedy response, which no pair is made of


def gather(item: Item, select: Select, drop_truncated: bool, counts: Counter[str]) -> Item:
    """The item with the responses that are worth a judgement; what went is counted by reason."""
    kept: dict[tuple[str, bool], Response] = {}  # the greedy response is its own, whatever was sampled
    for response in item.responses:
        if drop_truncated and not response.finished:
            counts["truncated"] += response.count
        elif len(response.text.strip()) < select.min_chars:
            counts["too short"] += response.count
        elif select.max_chars is not None and len(response.text) > select.max_chars:
            counts["too long"] += response.count
        elif (key := (response.text, response.source == GREEDY)) in kept:
            kept[key] = replace(kept[key], count=kept[key].count + response.count)
            counts["duplicates merged"] += response.count
        else:
            kept[key] = response
    return item.with_responses(list(kept.values()))


@dataclass(frozen=True)
class Ranked:
    """One prompt's responses that have a verdict. `places` are theirs among the item's responses."""

    item: Item
    responses: Sequence[Response]
    values: Sequence[float]  # what they are compared by
    wins: Sequence[Sequence[float | None]] | None  # [K, K]
    places: Sequence[int]

    def probability(self, i: int, j: int) -> float | None:
        """P(i beats j), as measured; of scores by the logistic function."""
        if self.wins is not None:
            return self.wins[i][j]
        return _sigmoid(self.values[i] - self.values[j])

    def counts(self, i: int, j: int) -> int:
        """How many pairs of samples are this one."""
        return self.responses[i].count * self.responses[j].count

    def of_source(self, name: str | None) -> list[int]:
        return [k for k, r in enumerate(self.responses) if name is None or r.source == name]


Policy = Callable[[Ranked, Select, random.Random], list[Pair] | Dropped]


def best_worst(ranked: Ranked, select: Select, rng: random.Random) -> list[Pair] | Dropped:
    """The best against the worst; the first of either where several are."""
    values = ranked.values
    return _if_apart(ranked, values.index(max(values)), values.index(min(values)), select)


def max_random(ranked: Ranked, select: Select, rng: random.Random) -> list[Pair] | Dropped:
    """The best against another one, drawn."""
    best = ranked.values.index(max(ranked.values))
    others = [k for k, value in enumerate(ranked.values) if value < ranked.values[best]]
    return _if_apart(ranked, best, rng.choice(others), select) if others else Dropped("all tie")


def max_max(ranked: Ranked, select: Select, rng: random.Random) -> list[Pair] | Dropped:
    """The best against the second best."""
    best = ranked.values.index(max(ranked.values))
    others = [(value, -k) for k, value in enumerate(ranked.values) if value < ranked.values[best]]
    return _if_apart(ranked, best, -max(others)[1], select) if others else Dropped("all tie")


def all_pairs(ranked: Ranked, select: Select, rng: random.Random) -> list[Pair] | Dropped:
    """Every two that differ by the margin, weighted by how often they were sampled. With soft labels every two that
    were compared, in both orders, weighted by P."""
    pairs: list[Pair] = []
    size = len(ranked.responses)
    if select.labels == "soft":
        for i in range(size):
            for j in range(size):
                p = ranked.probability(i, j)
                if i != j and p:
                    pairs.append((i, j, ranked.counts(i, j) * p))
        return pairs or Dropped("no pair was compared")
    for i in range(size):
        for j in range(size):
            gap = ranked.values[i] - ranked.values[j]
            if gap > 0 and gap >= _margin(ranked, i, select) - _ROUNDING and _good(ranked, i, select):
                pairs.append((i, j, float(ranked.counts(i, j))))
    if not pairs:
        return _why_none(ranked, select)
    # Best winner first, then the widest gap: what max_pairs leaves.
    pairs.sort(key=lambda pair: (-ranked.values[pair[0]], ranked.values[pair[1]]))
    return pairs


def tournament(ranked: Ranked, select: Select, rng: random.Random) -> list[Pair] | Dropped:
    """INPO's: the winner of the winners' bracket against the loser of the losers', kept if it wins that match too."""
    if ranked.wins is None:
        raise ConfigError("select.policy=tournament needs a scorer of pairs; of scores take best_worst")
    winner, loser = bracket(len(ranked.responses), ranked.probability)
    if winner is None or loser is None:
        return Dropped("a match of the tournament failed")
    p = ranked.probability(winner, loser)
    if p is None:
        return Dropped("a match of the tournament failed")
    if p <= 0.5:
        return Dropped("the tournament's winner does not beat its loser")
    return [(winner, loser, 1.0)]


def bracket(size: int, probability: Callable[[int, int], float | None]) -> tuple[int | None, int | None]:
    """(winner, loser) of a knock-out among `size` in their order: a tie goes to the first; losers of the first round
    meet among themselves for the last place. None where a match has no verdict."""

    def match(i: int, j: int) -> tuple[int, int] | None:
        p = probability(i, j)
        return None if p is None else (i, j) if p >= 0.5 else (j, i)

    def run(field: list[int], keep: int) -> int | None:
        while len(field) > 1:
            after = [] if len(field) % 2 == 0 else [field[-1]]
            rest = field[:-1] if after else field
            results = [match(i, j) for i, j in zip(rest[::2], rest[1::2])]
            if any(r is None for r in results):
                return None
            field = [r[keep] for r in results if r is not None] + after
        return field[0] if field else None

    first = list(range(size))
    odd = [first.pop()] if size % 2 else []
    results = [match(i, j) for i, j in zip(first[::2], first[1::2])]
    if any(r is None for r in results):
        return None, None
    winners, losers = [r[0] for r in results if r], [r[1] for r in results if r]
    return run(winners + odd, 0), run(losers, 1)


def explicit(ranked: Ranked, select: Select, rng: random.Random) -> list[Pair] | Dropped:
    """By construction: each response of `chosen_source` against each of `rejected_source`; `max_pairs` of them."""
    chosen, rejected = ranked.of_source(select.chosen_source), ranked.of_source(select.rejected_source)
    pairs = [(i, j, 1.0) for i, j in zip(chosen, rejected)]
    return pairs or Dropped("no pair of the two sources")


def refinement(ranked: Ranked, select: Select, rng: random.Random) -> list[Pair] | Dropped:
    """A rule in a judge's place: the last refinement beats the first answer."""
    order = sorted(range(len(ranked.responses)), key=lambda k: int(ranked.responses[k].meta.get("round", 0)))
    last, first = order[-1], order[0]
    if ranked.responses[last].meta.get("round", 0) == ranked.responses[first].meta.get("round", 0):
        return Dropped("no refinement")
    return [(last, first, 1.0)]


POLICIES: dict[str, Policy] = {
    "best_worst": best_worst, "max_min": best_worst, "max_random": max_random, "max_max": max_max, "all": all_pairs,
    "margin": all_pairs, "tournament": tournament, "explicit": explicit, "refinement": refinement,
}  # fmt: skip
WITHOUT_SCORES = ("explicit", "refinement")  # what is compared follows from how it was sampled


class Selector:
    """Rows of scored items by the options `select`."""

    def __init__(
        self, select: Select, seed: int = 0, alpha: float = 0.0, greedy: bool = False, whole: bool = False,
        win_probs: bool = True,
    ):  # fmt: skip
        """alpha: the penalty per character, where `select.length_penalty` is a number or has been found. greedy:
        whether a row needs a greedy response. whole: rows have all responses, not only those in pairs. win_probs:
        responses have the probability that they beat the others."""
        if select.policy not in POLICIES:
            raise ConfigError(f"select.policy: no {select.policy!r}{did_you_mean(select.policy, POLICIES)}")
        self.options, self.seed, self.alpha, self.greedy = select, seed, alpha, greedy
        self.whole, self.win_probs = whole, win_probs

    def select(self, item: Item, scores: Scores | None) -> dict[str, Any] | Dropped:
        """A row of fastpo.train with `responses` and `pairs` [winner, loser, weight]; or why there is none."""
        select = self.options
        every = [k for k, response in enumerate(item.responses) if response.source != GREEDY]
        if len(every) < 2:
            return Dropped("fewer than two different responses")
        if self.greedy and len(every) == len(item.responses):
            return Dropped("no greedy response that is whole")
        if scores is None:
            ranked = Ranked(item, [item.responses[k] for k in every], [0.0] * len(every), None, every)
        else:
            ranked = self.rank(item, scores)
            if len(ranked.responses) < select.min_valid:
                return Dropped(f"fewer than {select.min_valid} responses have a verdict")
        pairs = POLICIES[select.policy](ranked, select, random.Random(seed_of(self.seed, item.id)))
        if isinstance(pairs, Dropped):
            return pairs
        if select.max_pairs is not None:
            pairs = pairs[: select.max_pairs]
        return self._row(ranked, scores, pairs)

    def rank(self, item: Item, scores: Scores) -> Ranked:
        """The responses with a verdict, compared by score less the length's penalty, or by win probability."""
        select, counts = self.options, [r.count for r in item.responses]
        wins = scores.wins
        if wins is not None and select.soften:
            wins = softened(item, wins, select.soften)
            scores = replace(scores, wins=wins)
        values: list[float | None]
        if wins is None:
            values = list(scores.values)
        else:
            values = [scores.win_prob(k, counts, itself=select.itself) for k in range(len(counts))]
        places = [k for k, v in enumerate(values) if v is not None and item.responses[k].source != GREEDY]
        kept = [item.responses[k] for k in places]
        numbers = [float(values[k]) - self.alpha * len(item.responses[k].text) for k in places]
        if select.repeated_ngrams is not None and numbers:
            worst = min(numbers)
            numbers = [worst - 1 if repeats(r.text, select.repeated_ngrams) else v for r, v in zip(kept, numbers)]
        matrix = None if wins is None else [[wins[i][j] for j in places] for i in places]
        return Ranked(item, kept, numbers, matrix, places)

    def _row(self, ranked: Ranked, scores: Scores | None, pairs: Sequence[Pair]) -> dict[str, Any]:
        item, select = ranked.item, self.options
        mean = sum(weight for *_, weight in pairs) / len(pairs)
        used = range(len(ranked.responses)) if self.whole else sorted({k for pair in pairs for k in pair[:2]})
        at = {k: place for place, k in enumerate(used)}
        responses = []
        for k in used:
            entry = _entry(ranked.responses[k])
            if scores is not None:
                entry["score"] = ranked.values[k]
            if ranked.wins is not None:
                entry["win_prob"] = ranked.values[k]
            elif scores is not None and self.win_probs:
                others = [ranked.probability(k, j) for j in range(len(ranked.responses)) if j != k or select.itself]
                entry["win_prob"] = sum(p for p in others if p is not None) / len(others)
            responses.append(entry)
        for response in item.responses:
            if response.source == GREEDY:
                same = next((entry for entry in responses if entry["text"] == response.text), None)
                if same is None:
                    responses.append(same := _entry(response))
                same["greedy"] = True
        row: dict[str, Any] = {"id": item.id, "prompt": item.prompt}
        if item.prompt_ids is not None:
            row["prompt_ids"] = list(item.prompt_ids)
        even = all(weight == pairs[0][2] for *_, weight in pairs)
        row["responses"] = responses
        row["pairs"] = [[at[i], at[j]] if even else [at[i], at[j], weight / mean] for i, j, weight in pairs]
        if select.rows == "pairs" and scores is not None:
            row["probabilities"] = [[ranked.probability(i, j) for j in used] for i in used]
        return row


def _entry(response: Response) -> dict[str, Any]:
    """As fastpo.train takes it."""
    entry: dict[str, Any] = {"text": response.text, "source": response.source}
    if response.token_ids is not None:
        entry |= {"token_ids": list(response.token_ids), "finished": response.finished}
    return entry


def softened(item: Item, wins: Sequence[Sequence[float | None]], amount: float) -> list[list[float | None]]:
    """Win probabilities drawn towards 1/2 by the overlap of the two texts: P' = 1/2 + (P - 1/2)(1 - amount overlap)."""
    texts = [Counter(r.text.lower().split()) for r in item.responses]
    return [
        [None if p is None else 0.5 + (p - 0.5) * (1 - amount * overlap(texts[i], texts[j])) for j, p in enumerate(row)]
        for i, row in enumerate(wins)
    ]


def overlap(a: Counter[str], b: Counter[str]) -> float:
    """F1 of the words that two texts share, in [0, 1]."""
    shared = (a & b).total()
    return 2 * shared / (a.total() + b.total()) if shared else 0.0


def repeats(text: str, times: int, size: int = 4) -> bool:
    """Whether some run of `size` words occurs `times` times or more."""
    words = text.split()
    grams = Counter(tuple(words[k : k + size]) for k in range(len(words) - size + 1))
    return bool(grams) and max(grams.values()) >= times


def distinct_ngrams(texts: Sequence[str], size: int = 3) -> float:
    """Share of different runs of `size` words among all of them; 1 where there are none."""
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = text.split()
        grams.update(tuple(words[k : k + size]) for k in range(len(words) - size + 1))
    return len(grams) / grams.total() if grams else 1.0


def as_pairs(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of two responses in the place of one with K: for losses that read a pair's own win probability."""
    out = []
    for pair in row["pairs"]:
        i, j = pair[0], pair[1]
        won, lost = row["responses"][i], row["responses"][j]
        made = {
            "id": row["id"], "prompt": row.get("prompt_ids", row["prompt"]),
            "chosen": won.get("token_ids", won["text"]), "rejected": lost.get("token_ids", lost["text"]),
        }  # fmt: skip
        if "probabilities" in row:
            made["win_prob"] = row["probabilities"][i][j]
        if len(pair) > 2:
            made["weight"] = pair[2]
        out.append(made)
    return out


def _margin(ranked: Ranked, winner: int, select: Select) -> float:
    sampled = ranked.responses[winner].token_ids is not None or ranked.responses[winner].source != "gold"
    if sampled and select.margin_if_chosen_sampled is not None:
        return select.margin_if_chosen_sampled
    return select.margin


def _good(ranked: Ranked, winner: int, select: Select) -> bool:
    return select.min_chosen is None or ranked.values[winner] >= select.min_chosen - _ROUNDING


def _if_apart(ranked: Ranked, i: int, j: int, select: Select) -> list[Pair] | Dropped:
    gap = ranked.values[i] - ranked.values[j]
    if gap > 0 and gap >= _margin(ranked, i, select) - _ROUNDING and _good(ranked, i, select):
        return [(i, j, 1.0)]
    return _why_none(ranked, select)


def _why_none(ranked: Ranked, select: Select) -> Dropped:
    if max(ranked.values) - min(ranked.values) <= 0:
        return Dropped("all tie")
    if select.min_chosen is not None and max(ranked.values) < select.min_chosen - _ROUNDING:
        return Dropped(f"no response reaches min_chosen={select.min_chosen:g}")
    return Dropped("below the margin")


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
