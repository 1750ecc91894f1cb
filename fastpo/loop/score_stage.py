"""The work of the score stage: which units are asked, in which order, what is written, and the table that comes of it.

Verdicts are lines of `NAME/part-0000.jsonl`: {id, i, j, value, status, raw, key}; i and j as they were shown. A stage
that was cut short asks what is not there, and once more what failed; of several lines on one unit the last holds. When
all is asked, `NAME/scorer.json` says how: unit, plan, both orders, and what was settled over the whole stage.
"""

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from fastpo.errors import ConfigError, TrainingError, did_you_mean
from fastpo.loop.selecting import bracket
from fastpo.loop.verdicts import VerdictCache
from fastpo.sampling.items import POLICY, Item, Scores, Unit, Verdict, digest
from fastpo.sampling.parts import Part, read_json, read_lines, write_json, write_lines
from fastpo.scoring.judges import cache_key
from fastpo.scoring.scoring import RAW, BothOrders, Ensemble, of_both_orders

Pair = tuple[int, int]
Shown = tuple[int | None, int | None]  # i and j of a unit, as they were shown
Value = float | tuple[float | None, ...] | None
PLANS = ("all", "tournament", "against")
CHUNK = 256  # units that an exact scorer is asked together, with all of a prompt's
WINDOW = 2048  # of one that asks servers


# ---- which units


def tournament_matches(count: int, known: Mapping[Pair, float | None]) -> list[Pair]:
    """The matches of the next round of the knock-out that `selecting.bracket` is, among `count` responses, that are not
    in `known` (P(i beats j), None of a failed one); at last the best against the worst; [] at the end.

    11 matches of 8 responses (INPO, arXiv:2407.00617). Everything follows from the verdicts so far, so that it goes on
    where it was cut short.
    """
    missing: list[Pair] = []

    def probability(i: int, j: int) -> float | None:
        if (i, j) in known:
            return known[i, j]
        if (j, i) in known:
            p = known[j, i]
            return None if p is None else 1.0 - p
        missing.append((i, j))
        return None

    best, worst = bracket(count, probability)
    if not missing and best is not None and worst is not None and best != worst:
        probability(best, worst)
    return missing


def matches(item: Item, plan: str, known: Mapping[Pair, float | None]) -> list[Pair]:
    """The pairs of this round, each once, without its other order; [] when the plan is at its end.

    `all`: every pair. `against`, or `against:SOURCE`: every pair in which a response of this source ("policy") is.
    `tournament`: see tournament_matches. `known`: P of the pairs that have a verdict.
    """
    plan, _, source = plan.partition(":")
    count = len(item.responses)
    if plan == "tournament":
        return tournament_matches(count, known) if count > 1 else []
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    if plan == "against":
        of = [response.source == (source or POLICY) for response in item.responses]
        pairs = [(i, j) for i, j in pairs if of[i] or of[j]]
    return [pair for pair in pairs if pair not in known]


def check_plan(plan: str) -> None:
    if plan.partition(":")[0] not in PLANS or (":" in plan and not plan.startswith("against:")):
        raise ConfigError(
            f"plan={plan!r} is none of {', '.join(PLANS)}, against:SOURCE{did_you_mean(plan.partition(':')[0], PLANS)}"
        )


def plan_units(
    item: Item, scorer: Any, plan: str = "all", both_orders: bool = True,
    known: Mapping[Pair, float | None] | None = None,
) -> list[Unit]:  # fmt: skip
    """The units of one round: of a pair scorer, the pairs that are to be asked after those in `known`, each in both
    orders; of others the one round that there is."""
    if scorer.unit == "response":
        return [Unit(item, i) for i in range(len(item.responses))]
    if scorer.unit == "list":
        return [Unit(item)] if item.responses else []
    units = []
    for i, j in matches(item, plan, known or {}):
        units.append(Unit(item, i, j))
        if both_orders:
            units.append(Unit(item, j, i))
    return units


def planned(items: Iterable[Item], scorer: Any, plan: str = "all", both_orders: bool | None = None) -> int:
    """How many units these items make, before anything is asked; of a tournament without failures."""
    check_plan(plan)
    asked, both = _asked(scorer, both_orders)
    total = 0
    for item in items:
        count = len(item.responses)
        if asked.unit == "pair" and plan == "tournament":
            known: dict[Pair, float | None] = {}
            while missing := matches(item, plan, known):
                known |= dict.fromkeys(missing, 1.0)
            total += len(known) * (1 + both)
        elif asked.unit == "pair":
            total += len(matches(item, plan, {})) * (1 + both)
        else:
            total += count if asked.unit == "response" else bool(count)
    return total


def _asked(scorer: Any, both_orders: bool | None) -> tuple[Any, bool]:
    """(the scorer that is asked, whether in both orders)."""
    inner = scorer.inner if isinstance(scorer, BothOrders) else scorer
    both = isinstance(scorer, BothOrders) if both_orders is None else both_orders
    return inner, both and inner.unit == "pair"


# ---- the stage


def score_stage(
    scorer: Any,
    items: Iterable[Item],
    folder: Path,
    *,
    cache: VerdictCache | bool = True,
    plan: str = "all",
    both_orders: bool | None = None,
    bar: bool | None = None,
    max_failed: float = 0.02,
) -> dict[str, Any]:
    """Ask the scorer about these items, or about what is left of them; returns counts.

    * `folder`: of all scorers; this one's files are in `folder/NAME`. Those of an ensemble's members are beside it.
    * `cache`: True: the user's own, for scorers whose verdicts are worth keeping; False: none.
    * `both_orders`: None: of a BothOrders.
    * `max_failed`: the share of units that may fail. TrainingError beyond it, with the counts by status and three of
      the replies: as soon as it is sure, or at the end.
    * `bar`: None: where the terminal is one.

    Counts: `units`, `ok`, `failed`, `statuses` of the failed, `asked` and `from_cache` (by this call); of pairs in both
    orders `orders`, as `position_bias` has it.
    """
    check_plan(plan)
    if not 0 <= max_failed <= 1:
        raise ConfigError(f"max_failed={max_failed!r}: expected a share in [0, 1]")
    items = items if isinstance(items, Sequence) else list(items)
    given: dict[str, Any] = {"plan": plan, "both_orders": both_orders, "bar": bar, "max_failed": max_failed}
    if isinstance(scorer, Ensemble):
        return _ensemble_stage(scorer, items, folder, cache=cache, **given)
    if cache is True and (getattr(scorer, "cached", False) or hasattr(scorer, "kept")):
        with VerdictCache() as own:
            return _one_stage(scorer, items, folder, cache=own, **given)
    return _one_stage(scorer, items, folder, cache=cache if isinstance(cache, VerdictCache) else None, **given)


def _one_stage(
    scorer: Any, items: Sequence[Item], folder: Path, *, cache: VerdictCache | None, plan: str,
    both_orders: bool | None, bar: bool | None, max_failed: float,
) -> dict[str, Any]:  # fmt: skip
    asked, both = _asked(scorer, both_orders)
    show = sys.stderr.isatty() if bar is None else bar
    total = planned(items, scorer, plan, both)
    part = Part(folder / scorer.name / "part-0000.jsonl")
    with part, tqdm(total=total, desc=f"score {scorer.name}", disable=not show, dynamic_ncols=True) as shown:
        stage = _Stage(asked, part, cache, both, total, max_failed, shown)
        stage.take_lines()
        try:
            stage.run(items, plan)
        except _OtherJudge:
            stage.forget()
            stage.run(items, plan)
    counts = stage.counts()
    settled: dict[str, Any] = {}
    if getattr(asked, "settles", False):
        settled = asked.settle({i.id: scores_of(stage.of.get(i.id, {}), i, asked.unit, both) for i in items}, items)
    if both:
        counts["orders"] = position_bias(stage.of)
    _say(folder, scorer, asked.unit, counts, lines=stage.line_key, plan=plan, both_orders=both, settled=settled)
    if stage.forgotten:
        counts["of_another_judge"] = stage.forgotten
    return counts


def unit_stage(
    scorer: Any, units: Sequence[Unit], folder: Path, *, bar: bool | None = None, max_failed: float = 0.02,
) -> tuple[dict[tuple[str, int | None, int | None], Verdict], dict[str, Any]]:  # fmt: skip
    """The same of units that the caller has chosen, each in one order: (verdicts by the units' keys, counts)."""
    show = sys.stderr.isatty() if bar is None else bar
    part = Part(folder / scorer.name / "part-0000.jsonl")
    with (
        VerdictCache() if getattr(scorer, "cached", False) or hasattr(scorer, "kept") else nullcontext() as cache,
        part,
        tqdm(total=len(units), desc=f"score {scorer.name}", disable=not show, dynamic_ncols=True) as shown,
    ):
        stage = _Stage(scorer, part, cache, False, len(units), max_failed, shown)
        stage.take_lines()
        try:
            stage.ask(units)
        except _OtherJudge:
            stage.forget()
            stage.ask(units)
    counts = stage.counts()
    _say(folder, scorer, scorer.unit, counts, lines=stage.line_key, plan="given", both_orders=False, settled={})
    return {unit.key: as_verdict(stage.of[unit.item.id][unit.i, unit.j]) for unit in units}, counts


def _ensemble_stage(scorer: Ensemble, items: Sequence[Item], folder: Path, **given: Any) -> dict[str, Any]:
    """The members' stages, then the ensemble's lines at once."""
    counts = {name: score_stage(member, items, folder, **given) for name, member in scorer.members.items()}
    table, moments = scorer.combine({name: read_scores(folder, name, items) for name in scorer.members})
    key = digest(dict(scorer.key))[:8]
    lines, units, failed = [], 0, 0
    for item in items:
        scores = table[item.id]
        for i, value in enumerate(scores.values):
            status = "ok" if value is not None else "member_failed"
            spread = scores.spread[i] if scores.spread else None
            lines.append({"id": item.id, "i": i, "j": None, "value": value, "status": status, "raw": "", "key": key,
                          "spread": spread})  # fmt: skip
            units += 1
            failed += value is None
    if failed > given["max_failed"] * units:
        raise TrainingError(
            f"scorer {scorer.name!r} has no value for {failed} of {units} responses, more than max_failed="
            f"{given['max_failed']:g} allows: in each fewer than {scorer.least} of its members have one"
        )
    write_lines(folder / scorer.name / "part-0000.jsonl", lines)
    found = {"units": units, "ok": units - failed, "failed": failed,
             "statuses": {"member_failed": failed} if failed else {}}  # fmt: skip
    _say(folder, scorer, "response", found, lines=key, plan="all", both_orders=False, settled={"members": moments})
    asked = {n: sum(of[n] for of in counts.values()) for n in ("asked", "from_cache")}
    return {**found, **asked, "members": counts}


def _say(folder: Path, scorer: Any, unit: str, counts: Mapping[str, Any], **more: Any) -> None:
    """How it was judged, for who reads the lines: written last."""
    kept = {k: v for k, v in counts.items() if k not in ("asked", "from_cache")}
    said = {"name": scorer.name, "unit": unit, "key": dict(scorer.key), **more, "counts": kept}
    write_json(folder / scorer.name / "scorer.json", said)


class _OtherJudge(Exception):
    """The lines that are there are of another model than the one that answers now."""


class _Stage:
    """One call of `score_stage`."""

    def __init__(
        self, scorer: Any, part: Part, cache: VerdictCache | None, both: bool, total: int, max_failed: float, bar: Any
    ):
        self.scorer, self.part, self.cache, self.both, self.bar = scorer, part, cache, both, bar
        self.total, self.max_failed = total, max_failed
        self.exact = bool(getattr(scorer, "exact", False))
        # Of each item, by what was shown: a value, or the status of a failure. Millions of them: no more than that.
        self.of: dict[str, dict[Shown, Any]] = {}
        self.again: set[tuple[str, int | None, int | None]] = set()  # failed before this call, not asked again yet
        self.raws: dict[str, list[str]] = {}  # of the first three failures of each status
        self.done = self.failed = self.asked = self.from_cache = self.forgotten = 0
        self.key = digest(dict(scorer.key))[:8]
        self.line_key = self.key  # and, behind a dash, what a judge's server says of itself, where that is known
        self.asking = False
        if hasattr(scorer, "kept"):
            scorer.kept = cache
        self.keeps = cache is not None and bool(getattr(scorer, "cached", False))
        self.identity: Mapping[str, Any] = {}

    # ---- what is there

    def take_lines(self) -> None:
        """The lines that are there, as far as the judge that wrote the last of them wrote them."""
        lines, self.part.lines = self.part.lines, []
        ours = [line for line in lines if str(line.get("key", "")).partition("-")[0] == self.key]
        if ours:
            self.line_key = ours[-1]["key"]
            ours = [line for line in ours if line["key"] == self.line_key]
        self.forgotten = len(lines) - len(ours)
        for line in ours:
            self._put(line["id"], line["i"], line["j"], _read(line))
        for name, of in self.of.items():
            self.again |= {(name, i, j) for (i, j), value in of.items() if isinstance(value, str)}

    def forget(self) -> None:
        """What another judge said."""
        self.forgotten += sum(map(len, self.of.values()))
        self.of, self.again, self.asking = {}, set(), True
        self.done = self.failed = 0
        self.bar.reset()

    def _begin_to_ask(self) -> None:
        """Learn who answers: only now, for a stage that has all its verdicts needs no server."""
        if self.identity:
            return
        self.identity = dict(getattr(self.scorer, "identity", None) or self.scorer.key)
        own = digest(self.identity)[:8]
        before = self.line_key
        self.line_key = self.key if own == self.key else f"{self.key}-{own}"
        tails = {before.partition("-")[2], self.line_key.partition("-")[2]}
        if self.of and "" in tails:
            self.line_key = before  # one of them did not say who it is
        elif self.of and len(tails) > 1:
            raise _OtherJudge

    def _put(self, name: str, i: int | None, j: int | None, value: Any) -> None:
        self.of.setdefault(name, {})[_pair(i, j)] = value

    # ---- asking

    def run(self, items: Sequence[Item], plan: str) -> None:
        """Round by round: of a tournament, the next follows from the one before, and of others there is one."""
        adaptive = plan == "tournament" and self.scorer.unit == "pair"
        played: dict[str, dict[Pair, float | None]] = {}
        while True:
            units = (u for i in items for u in plan_units(i, self.scorer, plan, self.both, played.get(i.id)))
            before = self.done
            for chunk in _chunks(units, CHUNK if self.exact else WINDOW):
                self._ask(chunk)
                for unit in chunk if adaptive else ():
                    of = played.setdefault(unit.item.id, {})
                    if (unit.j, unit.i) not in of:
                        of[unit.i, unit.j] = self._p(unit)
            if not adaptive or self.done == before:
                break
        self._check(self.done)

    def ask(self, units: Iterable[Unit]) -> None:
        for chunk in _chunks(units, CHUNK if self.exact else WINDOW):
            self._ask(chunk)
        self._check(self.done)

    def _p(self, unit: Unit) -> float | None:
        of = self.of[unit.item.id]
        first = _number(of[unit.i, unit.j])
        return of_both_orders(first, _number(of[unit.j, unit.i])) if self.both else first

    def _ask(self, chunk: Sequence[Unit]) -> None:
        left = [u for u in chunk if u.key in self.again or (u.i, u.j) not in self.of.get(u.item.id, {})]
        self.done += len(chunk) - len(left)
        self.bar.update(len(chunk) - len(left))
        if not left:
            return
        self._begin_to_ask()
        keys = {u.key: cache_key(self.identity, self.scorer.content(u)) for u in chunk} if self.keeps else {}
        kept = self.cache.get(list(keys.values())) if self.cache is not None and keys else {}
        if self.exact:
            # All of the chunk, whatever is known of it: a model's last bits depend on what it is asked together.
            verdicts = {key: kept[cached] for key, cached in keys.items() if cached in kept}
            if len(verdicts) == len(chunk):
                self.from_cache += len(left)
            else:
                verdicts = {unit.key: verdict for unit, verdict in self.scorer.score(chunk)}
                self.asked += len(left)
                self._keep({keys[key]: verdict for key, verdict in verdicts.items()} if keys else {})
            self._write([(unit, verdicts[unit.key]) for unit in left])
            return
        rest = []
        for unit in left:
            verdict = kept.get(keys.get(unit.key, ""))
            if verdict is None:
                rest.append(unit)
            else:
                self.from_cache += 1
                self._write([(unit, verdict)])
        for unit, verdict in self.scorer.score(rest) if rest else ():
            self.asked += 1
            self._keep({keys[unit.key]: verdict} if keys else {})
            self._write([(unit, verdict)])

    def _keep(self, verdicts: Mapping[str, Verdict]) -> None:
        if self.cache is not None and verdicts:
            self.cache.put(verdicts)

    def _write(self, verdicts: Sequence[tuple[Unit, Verdict]]) -> None:
        """Lines first, then what follows from them."""
        lines = []
        for unit, verdict in verdicts:
            value = verdict.status if verdict.value is None else verdict.value
            if unit.key not in self.again or self.of[unit.item.id][unit.i, unit.j] != value:
                lines.append({
                    "id": unit.item.id, "i": unit.i, "j": unit.j, "value": verdict.value, "status": verdict.status,
                    "raw": verdict.raw[:RAW], "key": self.line_key,
                })  # fmt: skip
            self.again.discard(unit.key)
            self._put(*unit.key, value)
        self.part.add(lines)
        self.done += len(verdicts)
        self.bar.update(len(verdicts))
        for _, verdict in verdicts:
            if verdict.value is None:
                self.failed += 1
                some = self.raws.setdefault(verdict.status, [])
                if len(some) < 3:
                    some.append(f"{verdict.status}: {' '.join(verdict.raw.split())[:300]!r}")
        if self.failed:
            self._check(max(self.total, self.done))

    def _check(self, total: int) -> None:
        if self.failed > self.max_failed * total:
            statuses = ", ".join(f"{n} {status}" for status, n in self.counts()["statuses"].items())
            # Of each status one, before a second of any.
            some = [raw for of_status in itertools.zip_longest(*self.raws.values()) for raw in of_status if raw]
            raise TrainingError(
                f"scorer {self.scorer.name!r} failed on {self.failed} of {total} units, more than max_failed="
                f"{self.max_failed:g} allows: {statuses}. Replies: {' | '.join(some[:3])}"
            )

    def counts(self) -> dict[str, Any]:
        statuses: dict[str, int] = {}
        units = 0
        for of in self.of.values():
            units += len(of)
            for value in of.values():
                if isinstance(value, str):
                    statuses[value] = statuses.get(value, 0) + 1
        failed = sum(statuses.values())
        return {"units": units, "ok": units - failed, "failed": failed, "statuses": dict(sorted(statuses.items())),
                "asked": self.asked, "from_cache": self.from_cache}  # fmt: skip


_pairs: dict[Shown, Shown] = {}


def _pair(i: int | None, j: int | None) -> Shown:
    """The same tuple for all items."""
    return _pairs.setdefault((i, j), (i, j))


def _read(line: Mapping[str, Any]) -> Any:
    """A line's value, or the status of a failure."""
    value = line["value"]
    return line["status"] if value is None else tuple(value) if isinstance(value, list) else value


def as_verdict(value: Any) -> Verdict:
    """Of a value of `read_verdicts`; None: there is none."""
    return Verdict.failed(value or "no verdict") if value is None or isinstance(value, str) else Verdict(value)


def _number(value: Any) -> float | None:
    return None if isinstance(value, str) else value


def _chunks(units: Iterable[Unit], size: int) -> Iterator[list[Unit]]:
    """Neighbours that are asked together, never a part of an item's."""
    chunk: list[Unit] = []
    for unit in units:
        if len(chunk) >= size and unit.item is not chunk[-1].item:
            yield chunk
            chunk = []
        chunk.append(unit)
    if chunk:
        yield chunk


# ---- the table


def pair_values(verdicts: Mapping[Shown, Any], both: bool) -> dict[Pair, float | None]:
    """P(i beats j) of each pair, of verdicts by (i, j) as they were shown; None where it failed, of two orders where
    one did. With `both` a pair of which one order is there is left out."""
    known: dict[Pair, float | None] = {}
    for (i, j), value in verdicts.items():
        assert i is not None and j is not None
        if not both:
            known[i, j] = _number(value)
        elif (j, i) in verdicts and (j, i) not in known:
            known[i, j] = of_both_orders(_number(value), _number(verdicts[j, i]))
    return known


def scores_of(verdicts: Mapping[Shown, Any], item: Item, unit: str, both: bool) -> Scores:
    """One item's scores, of its verdicts by (i, j) as they were shown (a status in place of a value: failed).

    Of pairs: `wins` as measured, transposed cells 1 - P, None where not asked or failed; `values` are the row means
    without itself. Of two orders P is their mean, and `agreement` what they differ by.
    """
    count = len(item.responses)
    if unit == "response":
        return Scores([_number(verdicts.get((i, None))) for i in range(count)])
    if unit == "list":
        values = verdicts.get((None, None))
        return Scores(list(values) if isinstance(values, tuple) else [None] * count)
    wins: list[list[float | None]] = [[None] * count for _ in range(count)]
    known = pair_values(verdicts, both)
    for (i, j), p in known.items():
        wins[i][j] = p
        if (j, i) not in known:
            wins[j][i] = None if p is None else 1.0 - p
    scores = Scores([], wins)
    scores.values = [scores.win_prob(k, itself=False) for k in range(count)]
    if both:
        scores.agreement = [abs(ab - (1.0 - ba)) for ab, ba in _two_orders(verdicts)]
    return scores


def _two_orders(verdicts: Mapping[Shown, Any]) -> Iterator[tuple[float, float]]:
    """(P(i beats j) with i first, P(j beats i) with j first) of the pairs that have both."""
    for (i, j), ab in verdicts.items():
        ba = verdicts.get((j, i))
        if i is not None and j is not None and i < j and ba is not None and not isinstance(ab, str):
            if not isinstance(ba, str):
                yield ab, ba


def read_scores(folder: Path, name: str, items: Iterable[Item], *, wins: bool = False) -> dict[str, Scores]:
    """The table of a scorer whose stage is done, by item id; ConfigError where it is not.

    `wins`: give response and list scorers P(i beats j) = sigmoid(s_i - s_j) too.
    """
    said = _said(folder, name)
    spreads: dict[str, dict[Shown, Any]] = {}
    found = read_verdicts(folder, name, spreads)
    table = {}
    for item in items:
        scores = scores_of(found.get(item.id, {}), item, said["unit"], said["both_orders"])
        if alpha := said["settled"].get("alpha"):
            scores.values = [
                None if v is None else v - alpha * len(r.text) for v, r in zip(scores.values, item.responses)
            ]  # fmt: skip
        if spread := spreads.get(item.id):
            scores.spread = [spread.get((i, None)) for i in range(len(item.responses))]
        if wins and scores.wins is None:
            scores.wins = wins_of(scores.values)
        table[item.id] = scores
    return table


def read_verdicts(
    folder: Path, name: str, spreads: dict[str, dict[Shown, Any]] | None = None
) -> dict[str, dict[Shown, Any]]:
    """Of each item its verdicts by (i, j) as they were shown: a number, a tuple of a list's, or a failure's status.
    Spreads of an ensemble are put into `spreads`."""
    said = _said(folder, name)
    found: dict[str, dict[Shown, Any]] = {}
    for line in read_lines(folder / name / "part-0000.jsonl"):
        if line["key"] == said["lines"]:
            found.setdefault(line["id"], {})[_pair(line["i"], line["j"])] = _read(line)
            if spreads is not None and "spread" in line:
                spreads.setdefault(line["id"], {})[_pair(line["i"], line["j"])] = line["spread"]
    return found


def _said(folder: Path, name: str) -> dict[str, Any]:
    said = read_json(folder / name / "scorer.json")
    if said is None:
        raise ConfigError(f"{folder / name}: there are no scores of {name!r} that are done")
    return said


def wins_of(values: Sequence[float | None]) -> list[list[float | None]]:
    """P(i beats j) = sigmoid(s_i - s_j) [K, K], a half on the diagonal; None where one of them is."""
    return [[None if a is None or b is None else _sigmoid(a - b) for b in values] for a in values]


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def position_bias(verdicts: Mapping[str, Mapping[Shown, Any]]) -> dict[str, Any]:
    """How much of a judge's verdicts is the order: of pairs that have a verdict in both orders, by item as
    `read_verdicts` gives them.

    `pairs`; `agree`: the share in which both orders name the same one; `by_position`: the share in which both name what
    was shown first, or both what was shown second (`first` of them the first); the others have a tie in one order.
    `gap`: the mean of |p_ab - (1 - p_ba)|. All shares are None where there are no pairs.
    """
    pairs = agree = by_position = first = 0
    gap = 0.0
    for of in verdicts.values():
        for ab, ba in _two_orders(of):
            pairs += 1
            gap += abs(ab - (1.0 - ba))
            agree += (ab - 0.5) * (ba - 0.5) < 0 or ab == ba == 0.5
            by_position += (ab - 0.5) * (ba - 0.5) > 0
            first += ab > 0.5 and ba > 0.5
    return {"pairs": pairs, "agree": agree / pairs if pairs else None,
            "by_position": by_position / pairs if pairs else None, "first": first / pairs if pairs else None,
            "gap": gap / pairs if pairs else None}  # fmt: skip
