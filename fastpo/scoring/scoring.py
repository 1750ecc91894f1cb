"""Scorers of plain Python: functions, rules, both orders of a pair, ensembles. Judges are in judges.py, reward models
and ratios of policies in policy_scorers.py.

A failed judgement is a `Verdict` without a number: an exception, None, NaN, an infinity, something that is no number, a
probability outside [0, 1], too few or too many values. Nothing here makes a number of it.
"""

import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import numbers
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fastpo.errors import ConfigError, did_you_mean, one_line, shown
from fastpo.sampling.items import Item, Prompt, Scores, Unit, Verdict

RAW = 2000  # characters that are kept of what a judge said
UnitKind = Literal["response", "pair", "list"]


class BaseScorer:
    """What the score stage asks of a scorer beside the protocol.

    * `exact`: the same units, asked together, give the same verdicts, whenever: they are asked in batches that the
      plan decides, so that a run that was killed ends with the same bytes.
    * `cached`: verdicts are worth keeping across runs.
    """

    name: str
    unit: UnitKind = "response"
    exact = True
    cached = False
    settles = False

    @property
    def key(self) -> Mapping[str, Any]:
        raise NotImplementedError

    @property
    def identity(self) -> Mapping[str, Any]:
        """`key`, and what only the judge itself can say of who it is: the key of kept verdicts."""
        return self.key

    def content(self, unit: Unit) -> Any:
        """JSON of all that the verdict depends on beside `key`."""
        return {"prompt": _plain(unit.item.prompt), "responses": [r.text for r in unit.responses],
                "meta": dict(unit.item.meta)}  # fmt: skip

    def score(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Verdict]]:
        raise NotImplementedError

    def settle(self, table: Mapping[str, Scores], items: Iterable[Item]) -> dict[str, Any]:
        """Asked of a scorer with `settles`, once all units have a verdict: facts that hold for the whole stage. `alpha`
        is a penalty per character, which the table is read with."""
        return {}

    def close(self) -> None:
        """Nothing is held."""


def _plain(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt]


# ---- values


def number(value: Any) -> float | Verdict:
    """A finite float of a number or truth value, of Python, NumPy or PyTorch; or the verdict that it is none."""
    if value is None:
        return Verdict.failed("none", "None")
    if not isinstance(value, numbers.Real) and getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()  # a tensor without dimensions, a NumPy truth value
    if not isinstance(value, numbers.Real):
        return Verdict.failed("not_a_number", shown(value, 200))
    try:
        result = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return Verdict.failed("not_finite", shown(value, 200))
    return result if math.isfinite(result) else Verdict.failed("not_finite", repr(result))


def verdict_of(value: Any, unit: Unit, kind: UnitKind, raw: str = "") -> Verdict:
    """A scorer's value as a verdict on this unit; of a list, None and what is no number stay None in their places."""
    if kind == "list":
        count = len(unit.responses)
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
            return Verdict.failed("not_a_list", raw or shown(value, 200))
        values = list(value)
        if len(values) != count:
            return Verdict.failed("wrong_count", raw or f"{len(values)} values for {count} responses")
        found = [number(v) for v in values]
        if all(isinstance(v, Verdict) for v in found):
            return Verdict.failed(found[0].status if found else "none", raw or shown(values, 200))  # type: ignore[union-attr]
        return Verdict(tuple(None if isinstance(v, Verdict) else v for v in found), raw=raw)
    result = number(value)
    if isinstance(result, Verdict):
        return Verdict.failed(result.status, raw or result.raw)
    if kind == "pair" and not 0 <= result <= 1:
        return Verdict.failed("out_of_range", raw or f"P = {result!r}")
    return Verdict(result, raw=raw)


# ---- functions

_BY_UNIT: dict[str, tuple[str, ...]] = {
    "response": ("prompt", "response", "meta"),
    "pair": ("prompt", "first", "second", "meta"),
    "list": ("prompt", "responses", "meta"),
}


def _unit_of(function: Callable[..., Any]) -> UnitKind:
    """What a function judges, by the names of its parameters."""
    try:
        names = set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin
        return "response"
    if {"response", "completions"} & names:
        return "response"
    return "pair" if {"first", "second"} <= names else "list" if "responses" in names else "response"


class FunctionScorer(BaseScorer):
    """A Python function.

    * `function`: a callable, "module:name", or "file.py:name" (from `where`).
    * `unit`: None: as the parameters are named, `first` and `second`, or `responses`; else a response.
    * `f(prompt, response, meta) -> float | None`, for `unit="pair"` `f(prompt, first, second, meta)` -> P(first beats
      second), for `unit="list"` `f(prompt, responses, meta)` -> a value for each. The parameters are given by these
      names, or by position to a function that has others. Responses are texts; `meta` are the prompt's other columns.
    * TRL's reward functions, known by a parameter `completions`: `f(prompts, completions, **columns) -> list`, called
      with all responses of one prompt. As there, completions of a prompt of turns are lists of one turn.

    `key`: a hash of the function's source with its defaults, and of the whole file where it is named by a text.
    """

    def __init__(
        self, name: str, function: Callable[..., Any] | str, *, unit: UnitKind | None = None,
        key: Mapping[str, Any] | None = None, where: Path = Path(),
    ):  # fmt: skip
        if unit is not None and unit not in _BY_UNIT:
            raise ConfigError(f"unit={unit!r}: expected response, pair or list{did_you_mean(str(unit), _BY_UNIT)}")
        found, of_file = load_function(function, where)
        unit = unit or _unit_of(found)
        self.name, self.unit, self.function = name, unit, found
        self._key = dict(key) if key is not None else {"function": _source_key(found)} | of_file | {"unit": unit}
        self._call = self._binding()

    @property
    def key(self) -> Mapping[str, Any]:
        return self._key

    def _binding(self) -> Callable[..., Any] | None:
        """How one unit is given to the function; None where all responses of a prompt are given to TRL's kind."""
        known = _BY_UNIT[self.unit]
        try:
            parameters = inspect.signature(self.function).parameters
        except (TypeError, ValueError):  # a builtin
            return lambda *values: self.function(*values)
        required = [n for n, p in parameters.items() if p.default is p.empty and p.kind not in _VARIADIC]
        self._all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if "completions" in parameters:
            if self.unit != "response":
                raise ConfigError(
                    f"scorer {self.name!r}: a function of completions scores responses, not a {self.unit}"
                )
            self._columns, self._required = set(parameters), set(required)
            return None
        by_name = [n for n in known if n in parameters and parameters[n].kind is not inspect.Parameter.POSITIONAL_ONLY]
        if set(required) <= set(by_name) and (by_name or self._all):
            given = known if self._all else by_name
            return lambda *values: self.function(**{n: v for n, v in zip(known, values) if n in given})
        positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(required) <= len(known) <= len(positional) or any(
            p.kind is p.VAR_POSITIONAL for p in parameters.values()
        ):
            return lambda *values: self.function(*values)
        raise ConfigError(
            f"scorer {self.name!r}: {getattr(self.function, '__name__', 'the function')}({', '.join(parameters)}) "
            f"cannot be called: expected ({', '.join(known)}) or (prompts, completions, **columns)"
        )

    def score(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Verdict]]:
        if self._call is None:
            for same in _by_item(units):
                yield from zip(same, self._of_completions(same))
            return
        for unit in units:
            item = unit.item
            texts = [response.text for response in unit.responses]
            shown_as: Any = (texts,) if self.unit == "list" else tuple(texts)
            try:
                value = self._call(_plain(item.prompt), *shown_as, dict(item.meta))
            except Exception as error:  # a user's function may raise anything
                yield unit, Verdict.failed("error", one_line(error)[:RAW])
                continue
            yield unit, verdict_of(value, unit, self.unit)

    def _of_completions(self, units: Sequence[Unit]) -> list[Verdict]:
        item = units[0].item
        prompt, count = _plain(item.prompt), len(units)
        responses = [unit.responses[0] for unit in units]
        as_turns = not isinstance(prompt, str)
        columns: dict[str, Any] = {name: [value] * count for name, value in item.meta.items()}
        columns["prompts"] = [prompt] * count
        columns["completions"] = [
            [{"role": "assistant", "content": r.text}] if as_turns else r.text for r in responses
        ]  # fmt: skip
        if all(r.token_ids is not None for r in responses):
            columns["completion_ids"] = [list(r.token_ids or ()) for r in responses]
        lacking = sorted(self._required - set(columns))
        if lacking:
            return [Verdict.failed("error", f"the prompt {item.id!r} has no column {lacking[0]!r}")] * count
        given = columns if self._all else {n: v for n, v in columns.items() if n in self._columns}
        try:
            values = self.function(**given)
            values = list(values)
        except Exception as error:
            return [Verdict.failed("error", one_line(error)[:RAW])] * count
        if len(values) != count:
            return [Verdict.failed("wrong_count", f"{len(values)} values for {count} completions")] * count
        return [verdict_of(value, unit, "response") for unit, value in zip(units, values)]


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _by_item(units: Sequence[Unit]) -> Iterator[list[Unit]]:
    """Neighbours of one item together."""
    same: list[Unit] = []
    for unit in units:
        if same and unit.item is not same[0].item:
            yield same
            same = []
        same.append(unit)
    if same:
        yield same


def load_function(
    function: Callable[..., Any] | str, where: Path = Path()
) -> tuple[Callable[..., Any], dict[str, str]]:
    """(the function, the hash of the file that it was named in)."""
    if callable(function):
        return function, {}
    source, _, attribute = str(function).rpartition(":")
    if not source or not attribute:
        raise ConfigError(f"function={function!r}: expected a callable, 'module:name' or 'file.py:name'")
    try:
        if source.endswith(".py"):
            path = (where / source).resolve()
            if not path.is_file():
                raise ConfigError(f"function={function!r}: there is no file {path}")
            named = f"fastpo_scorer_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
            spec = importlib.util.spec_from_file_location(named, path)
            assert spec is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[named] = module  # where pickle and dataclasses look for it
            # Not by the loader: bytecode that it finds counts as this source's where size and second are the same.
            exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
        else:
            module = importlib.import_module(source)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"function={function!r} cannot be imported: {one_line(error)}") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        near = did_you_mean(attribute, [n for n in vars(module) if callable(getattr(module, n))])
        raise ConfigError(f"function={function!r}: {source} has no function {attribute!r}{near}")
    file = getattr(module, "__file__", None)
    return found, ({"file": hashlib.sha256(Path(file).read_bytes()).hexdigest()} if file else {})


def _source_key(function: Callable[..., Any]) -> dict[str, str]:
    """A name and a hash of what the function is: its source, its defaults, the plain values that it closes over."""
    bare: Any = inspect.unwrap(function)
    while hasattr(bare, "func"):  # functools.partial
        bare = bare.func
    target = bare if inspect.isroutine(bare) or inspect.isclass(bare) else type(bare)
    digest = hashlib.sha256()
    try:
        digest.update(inspect.getsource(target).encode())
    except (OSError, TypeError):  # from a terminal, or of C
        code = getattr(bare, "__code__", None)
        digest.update(code.co_code + repr(code.co_consts).encode() if code else repr(target).encode())
    cells = [c.cell_contents for c in getattr(bare, "__closure__", None) or () if _has_contents(c)]
    given = [getattr(bare, "__defaults__", None), getattr(function, "args", None), getattr(function, "keywords", None)]
    digest.update(repr([v for v in (*given, *cells) if _is_plain(v)]).encode())
    return {"name": getattr(target, "__qualname__", str(target)), "source": digest.hexdigest()}


def _has_contents(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # of a name that has no value yet
        return False


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, str | int | float | bool)


# ---- both orders


def of_both_orders(first: float | None, second: float | None) -> float | None:
    """P(i beats j) of P(i beats j) with i shown first, and P(j beats i) with j shown first; None where one failed."""
    return None if first is None or second is None else (first + 1.0 - second) / 2


class BothOrders(BaseScorer):
    """A pair scorer asked both ways: (p_ab + 1 - p_ba)/2, and a failure where one of the two failed.

    The score stage asks its `inner` and keeps both verdicts; `score` here asks both and gives one verdict, whose `raw`
    is JSON of the two.
    """

    unit: UnitKind = "pair"

    def __init__(self, inner: Any):
        if inner.unit != "pair":
            raise ConfigError(f"scorer {inner.name!r} judges a {inner.unit}: only a pair has two orders")
        self.inner, self.name = inner, inner.name
        self.exact, self.cached = getattr(inner, "exact", False), getattr(inner, "cached", False)

    @property
    def key(self) -> Mapping[str, Any]:
        return {"both_orders": dict(self.inner.key)}

    def score(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Verdict]]:
        asked = [u for unit in units for u in (unit, Unit(unit.item, unit.j, unit.i))]
        found = {unit.key: verdict for unit, verdict in self.inner.score(asked)}
        for unit in units:
            yield unit, both_verdict(found[unit.key], found[(unit.item.id, unit.j, unit.i)])

    def close(self) -> None:
        self.inner.close()


def both_verdict(ab: Verdict, ba: Verdict) -> Verdict:
    """One verdict on (a, b) of the two."""
    failed = next((v for v in (ab, ba) if v.value is None), None)
    if failed is not None:
        return failed
    raw = json.dumps({"ab": {"p": ab.value, "raw": ab.raw}, "ba": {"p": ba.value, "raw": ba.raw}})
    return Verdict(of_both_orders(ab.value, ba.value), raw=raw)  # type: ignore[arg-type]


# ---- rules


class Rules(BaseScorer):
    """AutoRule's reward (arXiv:2506.15651): the mean over rules of whether a response follows each, 0 or 1.

    `rules`: functions as a FunctionScorer takes them (a callable, or a text "module:name" under `function`), or texts,
    which need a `judge` that answers yes or no (`judges.Judge` with mode "rule"). A rule of which no verdict could be
    had is a failure of the whole: the mean of the others is another number.
    """

    def __init__(
        self, name: str, rules: Sequence[Callable[..., Any] | Mapping[str, str] | str], judge: Any = None,
        where: Path = Path(),
    ):  # fmt: skip
        self.name, self.judge = name, judge
        if not rules:
            raise ConfigError(f"scorer {name!r} has no rules")
        self.members: list[FunctionScorer | str] = [
            rule if isinstance(rule, str) else FunctionScorer(f"{name}[{n}]", _rule_function(rule), where=where)
            for n, rule in enumerate(rules)
        ]  # fmt: skip
        self.texts = [m for m in self.members if isinstance(m, str)]
        if self.texts and judge is None:
            raise ConfigError(f"scorer {name!r}: the rule {shown(self.texts[0], 60)} is a text, which needs a judge")
        self.exact = not self.texts or judge.exact
        self.cached = bool(self.texts)

    @property
    def key(self) -> Mapping[str, Any]:
        return self._key_with("key")

    @property
    def identity(self) -> Mapping[str, Any]:
        return self._key_with("identity")

    def _key_with(self, of_judge: str) -> dict[str, Any]:
        members = [m if isinstance(m, str) else dict(m.key) for m in self.members]
        return {"rules": members} | ({"judge": dict(getattr(self.judge, of_judge))} if self.texts else {})

    def score(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Verdict]]:
        said: list[dict[str, Verdict]] = [{} for _ in units]
        if not self.texts:
            yield from ((unit, self._mean(unit, {})) for unit in units)
            return
        asked = [(n, rule) for n in range(len(units)) for rule in dict.fromkeys(self.texts)]
        for place, verdict in self.judge.ask_rules([(units[n], rule) for n, rule in asked]):
            n, rule = asked[place]
            said[n][rule] = verdict
            if len(said[n]) == len(set(self.texts)):
                yield units[n], self._mean(units[n], said[n])

    def _mean(self, unit: Unit, said: Mapping[str, Verdict]) -> Verdict:
        total, answers = 0.0, []
        for member in self.members:
            if isinstance(member, str):
                rule, verdict = member, said[member]
            else:
                [(_, verdict)] = member.score([unit])
                rule = member.name
            if verdict.value is None:
                return Verdict.failed(verdict.status, f"{rule[:200]}: {verdict.raw}"[:RAW])
            if not 0 <= verdict.value <= 1:  # type: ignore[operator]
                return Verdict.failed("out_of_range", f"{rule[:200]}: {verdict.value}, expected 0 to 1")
            total += verdict.value  # type: ignore[operator]
            answers.append(verdict.value)
        return Verdict(total / len(answers), raw=json.dumps(answers))

    def close(self) -> None:
        if self.judge is not None:
            self.judge.close()


def _rule_function(rule: Any) -> Any:
    if not isinstance(rule, Mapping):
        return rule
    if set(rule) != {"function"}:
        raise ConfigError(f"a rule is a text, or {{function: 'module:name'}}, not {shown(rule, 80)}")
    return rule["function"]


# ---- ensembles


class Ensemble(BaseScorer):
    """One table of several scorers' tables: `mean`, `sum` (both with weights), `wco` (the least) or `uwo` (mean less
    `coefficient` times the variance), arXiv:2310.02743.

    * `members`: scorers by name.
    * `normalise`: True, False, or the names of those members that are: (value - mean)/standard deviation over all
      values of the stage; a member that never differs is 0 everywhere.
    * `min_valid`: how many members need a number for there to be one; None: all of them. Where fewer than all are
      there, the rule is over those. Not with `sum`, where the sum of some is another number.
    * variances are over the members, 1/k; `unbiased`: 1/(k - 1). The standard deviation is kept as the spread.

    Of members that judge pairs the row means are taken. The score stage asks the members, each with files of its own,
    and combines their tables.
    """

    def __init__(
        self, name: str, members: Mapping[str, Any], rule: str = "mean", *, coefficient: float = 0.5,
        unbiased: bool = False, normalise: bool | Sequence[str] = True, weights: Mapping[str, float] | None = None,
        min_valid: int | None = None,
    ):  # fmt: skip
        rules = ("mean", "sum", "wco", "uwo")
        if rule not in rules:
            raise ConfigError(f"ensemble: rule {rule!r} is none of {', '.join(rules)}{did_you_mean(str(rule), rules)}")
        if not members or name in members:
            raise ConfigError(f"scorer {name!r}: an ensemble needs other scorers as members")
        weights = dict(weights or {})
        for what, names in (("weights", weights), ("normalise", [] if isinstance(normalise, bool) else normalise)):
            for member in names:
                if member not in members:
                    near = did_you_mean(str(member), members)
                    raise ConfigError(f"ensemble: {what} name {member!r}, no member{near}")
        wrong = [w for w in weights.values() if not isinstance(number(w), float)]
        if wrong:
            raise ConfigError(f"ensemble: the weight {wrong[0]!r} is no finite number")
        if weights and rule in ("wco", "uwo"):
            raise ConfigError(f"ensemble: rule {rule} has no weights")
        if rule == "mean" and not all(w > 0 for w in weights.values()):
            raise ConfigError("ensemble: the weights of a mean must be above 0; rule sum takes any")
        if rule == "sum" and min_valid is not None and min_valid < len(members):
            raise ConfigError("ensemble: min_valid does not go with rule sum: a sum of some members is another number")
        least = len(members) if min_valid is None else min_valid
        if not 1 <= least <= len(members) or (unbiased and rule == "uwo" and least < 2):
            raise ConfigError(f"ensemble: min_valid={min_valid} of {len(members)} members")
        self.name, self.members = name, dict(members)
        self.rule, self.coefficient, self.unbiased = rule, coefficient, unbiased
        self.normalised = set(members if normalise is True else normalise or ())
        self.weights = {name: float(weights.get(name, 1.0)) for name in members}
        self.least = least

    @property
    def key(self) -> Mapping[str, Any]:
        return {"ensemble": {n: dict(m.key) for n, m in self.members.items()}, "rule": self.rule,
                "coefficient": self.coefficient, "unbiased": self.unbiased, "normalised": sorted(self.normalised),
                "weights": self.weights, "min_valid": self.least}  # fmt: skip

    def score(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Verdict]]:
        """Not unit by unit: what is normalised is so over all of them."""
        raise ConfigError(f"scorer {self.name!r}: an ensemble combines tables; score_stage asks its members")

    def close(self) -> None:
        for member in self.members.values():
            member.close()

    def combine(self, tables: Mapping[str, Mapping[str, Scores]]) -> tuple[dict[str, Scores], dict[str, Any]]:
        """(the table, each member's mean and standard deviation over the stage) of one table a member."""
        missing = [name for name in self.members if name not in tables]
        if missing:
            raise ConfigError(f"ensemble: no scorer {missing[0]!r}{did_you_mean(missing[0], tables)}")
        given = {name: tables[name] for name in self.members}
        moments = {name: _moments(table) for name, table in given.items()}
        combined = {}
        for item in next(iter(given.values())):
            columns = [[self._normal(name, v, moments) for v in table[item].values] for name, table in given.items()]
            found = [self._one(of_response) for of_response in zip(*columns, strict=True)]
            combined[item] = Scores([value for value, _ in found], spread=[spread for _, spread in found])
        facts = {name: {"mean": m, "std": s, "normalised": name in self.normalised} for name, (m, s) in moments.items()}
        return combined, facts

    def _normal(self, name: str, value: float | None, moments: Mapping[str, tuple[float, float]]) -> float | None:
        if value is None or name not in self.normalised:
            return value
        mean, std = moments[name]
        return (value - mean) / std if std > 0 else 0.0

    def _one(self, of_members: Sequence[float | None]) -> tuple[float | None, float | None]:
        """(the rule's value, the standard deviation) of one response."""
        there = [(v, self.weights[name]) for name, v in zip(self.members, of_members) if v is not None]
        if len(there) < self.least:
            return None, None
        values = [v for v, _ in there]
        mean = math.fsum(values) / len(values)
        squares = math.fsum((v - mean) ** 2 for v in values)
        spread = math.sqrt(squares / len(values))
        if self.rule == "wco":
            return min(values), spread
        if self.rule == "uwo":
            return mean - self.coefficient * squares / (len(values) - self.unbiased), spread
        weighted, total = math.fsum(v * w for v, w in there), math.fsum(w for _, w in there)
        if self.rule == "sum":
            return weighted, spread
        return weighted / total, spread


def _moments(table: Mapping[str, Scores]) -> tuple[float, float]:
    """(mean, standard deviation 1/N) of all numbers of a table."""
    values = [v for scores in table.values() for v in scores.values if v is not None]
    if not values:
        return 0.0, 0.0
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
