"""Rewards of the responses that a step drew: TRL's reward functions, reward models, and the loop's scorers.

What could not be judged has no number: such responses are left out, and counted by function and reason.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fastpo.errors import ConfigError, TrainingError, did_you_mean, shown
from fastpo.online.asking import as_scorer, items_of, verdicts, wins_of
from fastpo.online.functions import (
    Batch,
    Found,
    Loop,
    RewardFunction,
    callable_name,
    is_async,
    is_of_the_loop,
    is_of_trl,
)
from fastpo.sampling.items import Item, Response, Scores, Unit, Verdict
from fastpo.scoring.policy_scorers import RewardModelScorer
from fastpo.scoring.scorers import make_scorer
from fastpo.scoring.scoring import Ensemble, FunctionScorer, load_function, number

UNJUDGED = "no reward function applies"
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass
class Judged:
    """What was found of R responses, prompt after prompt, by F reward functions."""

    values: np.ndarray  # [R, F] fp64; NaN where a function does not apply, and everywhere in a row that is left out
    used: np.ndarray  # [R] bool
    left_out: Counter[str] = field(default_factory=Counter)  # responses by "function: reason"
    said: dict[str, str] = field(default_factory=dict)  # by the same, what came first in place of a number
    logged: dict[str, float] = field(default_factory=dict)  # log_metric: the mean of what was given
    extra: dict[str, list[Any]] = field(default_factory=dict)  # log_extra: [R] each, None where nothing was given
    broken: str | None = None  # nothing could be judged, and this function never judged anything

    def check(self) -> None:
        """TrainingError where a reward function is broken. Several processes ask this of all of them, together."""
        if self.broken is not None:
            raise TrainingError(self.broken)

    def line(self) -> str:
        """For a log: what was left out and why; "" where nothing was."""
        return line_of(self.left_out, self.said, int((~self.used).sum()), len(self.used), "responses")


def line_of(left_out: Mapping[str, int], said: Mapping[str, str], count: int, total: int, what: str) -> str:
    if not left_out:
        return ""
    reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(left_out.items()))
    first = next((f"; the first said {text[:200]!r}" for _, text in sorted(said.items()) if text), "")
    return f"{count} of {total} {what} could not be judged and are left out: {reasons}{first}"


class Rewards:
    """Reward functions by name. Of several processes each judges its own responses.

    * `reward_funcs`: one, or a list of: a function of TRL's signature, sync or async, or of the loop's (prompt,
      response, meta); a text "module:name" or "file.py:name" of one; a reward model in memory, or by path or name; a
      section of the loop's scorers (a mapping with `kind`); a scorer; a pairwise judge of TRL. Or a mapping of these by
      names. Of a scorer of pairs the reward is the share of the prompt's other responses that a response beats.
    * `reward_processing_classes`: tokenizers of the reward models, one for each function; None: the model's own.
    * `weights`: one for each function (default: 1).
    * `policies`, `where`: as `make_scorer` has them. `device`: of reward models; None: of those by path a GPU where
      there is one, of those in memory where they are.

    `names`: of a function its own, of a model the last part of its path; a later one of the same name gets a number.
    ConfigError for what is none of these; reward models are loaded here.
    """

    def __init__(
        self, reward_funcs: Any, reward_processing_classes: Any = None, weights: Sequence[float] | None = None, *,
        policies: Mapping[str, str] | None = None, where: Path = Path(), device: str | None = None,
    ):  # fmt: skip
        self._policies, self._where, self._device = dict(policies or {}), Path(where), device
        given = _listed(reward_funcs)
        if not given:
            raise ConfigError("no reward: reward_funcs has a function, a reward model or a scorer for each reward")
        self._sections = {name: spec for name, spec in given if name is not None}
        classes = _classes(reward_processing_classes, len(given))
        self.parts: list[Any] = []  # RewardFunctions and scorers
        self._one_order: set[int] = set()  # parts that judge pairs as they stand
        self.names: list[str] = []
        try:
            for (name, entry), tokenizer in zip(given, classes, strict=True):
                self._add(name, entry, tokenizer)
            self.weights = _weights(weights, len(given))  # [F] fp64
        except BaseException:
            self.close()
            raise
        self._judged = [False] * len(self.parts)
        self._loop = Loop()

    # ---- what is given

    def _add(self, name: str | None, entry: Any, tokenizer: Any) -> None:
        name, part = self._part(name, entry, tokenizer)
        named, n = name, 1
        while named in self.names:
            n += 1
            named = f"{name}_{n}"
        if isinstance(part, RewardFunction):
            part.name = named
        if isinstance(entry, Mapping) and entry.get("both_orders") is False:
            self._one_order.add(len(self.parts))
        self.names.append(named)
        self.parts.append(part)
        if isinstance(part, RewardModelScorer):
            part.load()
        check_alone(named, part)

    def _part(self, name: str | None, entry: Any, tokenizer: Any) -> tuple[str, Any]:
        if isinstance(entry, str | Path):
            return self._of_text(name, str(entry), tokenizer)
        if isinstance(entry, Mapping):
            named = name or _name_of(entry)
            if entry.get("kind") == "function" and set(entry) <= {"kind", "function", "unit"}:
                function = entry.get("function")
                if function is not None and entry.get("unit", "response") == "response":
                    function = self._function(function)
                    if is_of_trl(function):
                        return named, RewardFunction(named, function)  # with all that TRL hands out
            return named, make_scorer(named, entry, self._policies, self._where, others=self._sections)
        if isinstance(entry, nn.Module):
            path = str(getattr(getattr(entry, "config", None), "_name_or_path", "") or "")
            named = name or _last(path) or type(entry).__name__
            return named, self._model(named, path, tokenizer, entry)
        scorer = as_scorer(entry)
        if scorer is not None:
            return name or scorer.name, scorer
        if callable(entry):
            return self._of_function(name or callable_name(entry), entry)
        raise ConfigError(
            f"reward_funcs has {shown(entry, 60)}: expected a function, a reward model, its path, or a scorer's section"
        )

    def _function(self, given: Any) -> Any:
        """A function, or one by name; of a file that is found from the working directory, or from `where`."""
        if isinstance(given, str) and ".py:" in given:
            path = given.rpartition(":")[0]
            return load_function(given, Path() if Path(path).exists() else self._where)[0]
        return load_function(given)[0]

    def _of_function(self, name: str, function: Any) -> tuple[str, Any]:
        if is_of_the_loop(function):
            if is_async(function):
                raise ConfigError(f"reward function {name!r}: an async one takes (prompts, completions, **columns)")
            return name, FunctionScorer(name, function)
        return name, RewardFunction(name, function)

    def _of_text(self, name: str | None, text: str, tokenizer: Any) -> tuple[str, Any]:
        known = text in self._policies or Path(text).exists() or (self._where / text).exists()
        if not known and (".py:" in text or _FUNCTION.fullmatch(text)):
            return self._of_function(name or text.rpartition(":")[2], self._function(text))
        if not known and "/" not in text:
            near = did_you_mean(text, self._policies)
            raise ConfigError(
                f"reward_funcs: {text!r} is no path of a reward model and no policy{near}; "
                "a function is named 'module:name' or 'file.py:name'"
            )
        path = self._policies.get(text, text)
        if not Path(path).exists() and (self._where / path).exists():
            path = str(self._where / path)
        named = name or _last(text)
        return named, self._model(named, path, tokenizer, None)

    def _model(self, name: str, path: str, tokenizer: Any, model: Any) -> RewardModelScorer:
        return RewardModelScorer(name, path, device=self._device, model=model, tokenizer=tokenizer)

    def check(self, columns: Iterable[str]) -> None:
        """ConfigError where a function needs a column that the data do not have."""
        columns = list(columns)
        for part in self.parts:
            if isinstance(part, RewardFunction):
                part.check(columns)

    # ---- judging

    def __call__(
        self, rows: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[Response]], state: Any = None, *,
        stop: bool = True,
    ) -> Judged:  # fmt: skip
        """Judge the responses `groups[n]` to `rows[n]["prompt"]`; the rows' other columns go to the functions.

        A function that gives None to all responses of a prompt does not apply to it, and the others count. A response
        that one of the functions could not judge is left out, whatever the others say of it.

        TrainingError where nothing could be judged and a function failed on everything, here and before. With `stop`
        False it is left in `Judged.broken`: one process must not stop while the others wait for it.
        """
        found = self._found(rows, groups, state)
        places, start = [], 0
        for group in groups:
            places.append(range(start, start + len(group)))
            start += len(group)
        judged = Judged(np.full((start, len(self.parts)), np.nan), np.zeros(start, bool))
        failing = np.zeros((start, len(self.parts)), bool)  # [R, F]
        for f, (name, of_part) in enumerate(zip(self.names, found, strict=True)):
            for of_group in places:
                if all(of_part.reasons[r] == "none" for r in of_group):
                    continue  # it does not apply to this prompt
                for r in of_group:
                    value, reason = of_part.values[r], of_part.reasons[r]
                    if value is not None:
                        judged.values[r, f] = value
                        self._judged[f] = True
                        continue
                    failing[r, f] = True
                    judged.left_out[f"{name}: {reason}"] += 1
                    judged.said.setdefault(f"{name}: {reason}", of_part.raw.get(reason, ""))
        bad = failing.any(axis=1)
        judged.values[bad] = np.nan
        unjudged = ~bad & np.isnan(judged.values).all(axis=1)
        judged.used = ~bad & ~unjudged
        if unjudged.any():
            judged.left_out[UNJUDGED] += int(unjudged.sum())
        _put_logs(judged, self.names, found)
        self._find_broken(judged, failing)
        if stop:
            judged.check()
        return judged

    def _find_broken(self, judged: Judged, failing: np.ndarray) -> None:
        if not len(judged.used) or judged.used.any():
            return
        for f, name in enumerate(self.names):
            if failing[:, f].all() and not self._judged[f]:
                reason = next(r for r in judged.left_out if r.startswith(f"{name}: "))
                said = judged.said.get(reason, "")
                judged.broken = (
                    f"reward function {name!r} could not judge any of {len(judged.used)} responses, nor any before: "
                    f"{reason.removeprefix(f'{name}: ')}{f', {said}' if said else ''}"
                )
                return

    def _found(
        self, rows: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[Response]], state: Any
    ) -> list[Found]:
        """One a part; scorers are asked first, in their order."""
        items = items_of(rows, groups)
        of_scorers = {
            n: column_of(part, items, n not in self._one_order)
            for n, part in enumerate(self.parts) if not isinstance(part, RewardFunction)
        }  # fmt: skip
        functions = [p for p in self.parts if isinstance(p, RewardFunction)]
        of_functions = iter(self._loop.ask(functions, Batch.of(rows, groups, state)) if functions else ())
        return [of_scorers[n] if n in of_scorers else next(of_functions) for n in range(len(self.parts))]

    def totals(self, judged: Judged) -> np.ndarray:
        """[R] fp64: the weighted sum over the functions that apply; NaN of what is left out."""
        return np.where(judged.used, np.nansum(judged.values * self.weights, axis=1), np.nan)

    def close(self) -> None:
        """Let go of models, connections and the thread of async functions."""
        for part in self.parts:
            if not isinstance(part, RewardFunction) and hasattr(part, "close"):
                part.close()
        if hasattr(self, "_loop"):
            self._loop.close()

    def __enter__(self) -> "Rewards":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---- scorers as columns


def column_of(scorer: Any, items: Sequence[Item], both: bool = True) -> Found:
    """What a scorer of the loop says of every response of these items, one after another. both: orders of a pair."""
    found = Found.empty(sum(len(item.responses) for item in items))
    if isinstance(scorer, Ensemble):
        _of_ensemble(scorer, items, found)
    elif scorer.unit == "pair":
        _of_pairs(scorer, items, both, found)
    else:
        _of_responses(scorer, items, found)
    return found


def _of_responses(scorer: Any, items: Sequence[Item], found: Found) -> None:
    whole = scorer.unit == "list"
    if whole:
        units = [Unit(item) for item in items if item.responses]
    else:
        units = [Unit(item, k) for item in items for k in range(len(item.responses))]
    of = verdicts(scorer, units)
    alpha = getattr(scorer, "alpha", 0) if getattr(scorer, "settles", False) else 0
    place = 0
    for item in items:
        for k, response in enumerate(item.responses):
            verdict = of[item.id, None if whole else k, None]
            value = verdict.value[k] if isinstance(verdict.value, tuple) else verdict.value
            if value is not None:
                found.put(place, value - alpha * len(response.text))
            else:
                found.put(place, Verdict.failed("none" if verdict.value is not None else verdict.status, verdict.raw))
            place += 1


def _of_pairs(scorer: Any, items: Sequence[Item], both: bool, found: Found) -> None:
    place = 0
    for wins in wins_of(scorer, items, both)[0]:
        for rate, reason in zip(wins.rates(), wins.reasons, strict=True):
            found.put(place, Verdict.failed(reason, wins.raw.get(reason, "")) if rate is None else rate)
            place += 1


def _of_ensemble(scorer: Ensemble, items: Sequence[Item], found: Found) -> None:
    tables: dict[str, dict[str, Scores]] = {}
    for name, member in scorer.members.items():
        values = iter(column_of(member, items).values)
        tables[name] = {item.id: Scores([next(values) for _ in item.responses]) for item in items}
    combined, _ = scorer.combine(tables)
    for place, value in enumerate(value for item in items for value in combined[item.id].values):
        found.put(place, Verdict.failed("member_failed") if value is None else value)


def check_alone(name: str, part: Any) -> None:
    """ConfigError where a scorer reads all judgements of a stage of the loop: here that would depend on the step's size
    and on the processes."""
    if isinstance(part, Ensemble):
        if part.normalised:
            raise ConfigError(
                f"scorer {name!r}: an ensemble normalises over a stage, and a run has none: set normalise: false, or "
                "give its members as reward_funcs with multi_objective_aggregation=normalize_then_sum"
            )
        for member in part.members.values():
            check_alone(name, member)
    if getattr(part, "alpha", None) == "auto":
        raise ConfigError(f"scorer {name!r}: alpha: auto is found over a stage, and a run has none: set a number")


# ---- what was given


def _listed(reward_funcs: Any) -> list[tuple[str | None, Any]]:
    """(a name or None, the entry) of each."""
    if reward_funcs is None:
        return []
    if isinstance(reward_funcs, Mapping) and "kind" not in reward_funcs:
        return [(str(name), entry) for name, entry in reward_funcs.items()]
    if isinstance(reward_funcs, list | tuple):
        return [(None, entry) for entry in reward_funcs]
    return [(None, reward_funcs)]


def _classes(given: Any, count: int) -> list[Any]:
    if given is None:
        return [None] * count
    classes = list(given) if isinstance(given, list | tuple) else [given]
    if len(classes) != count:
        raise ConfigError(f"reward_processing_classes has {len(classes)} entries for {count} reward functions")
    return classes


def _weights(given: Any, count: int) -> np.ndarray:
    if given is None:
        return np.ones(count)
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise ConfigError(f"reward_weights={shown(given, 60)}: expected a list of numbers")
    found = [number(value) for value in given]
    if len(found) != count:
        raise ConfigError(f"reward_weights has {len(found)} weights for {count} reward functions")
    for value in found:
        if isinstance(value, Verdict):
            raise ConfigError(f"reward_weights has {value.raw}, which is no finite number")
    if not any(found):
        raise ConfigError("reward_weights are all 0: there would be no reward")
    return np.array(found, dtype=np.float64)


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _name_of(section: Mapping[str, Any]) -> str:
    """Of a section without a name: the function, the verifier, the model, or the kind."""
    kind = str(section.get("kind"))
    of_kind = {"function": "function", "verifier": "verifier", "reward_model": "model"}.get(kind)
    value = section.get(of_kind) if of_kind else None
    if isinstance(value, str):
        return _last(value) if kind == "reward_model" else value.rpartition(":")[2]
    return callable_name(value) if callable(value) else kind


def _put_logs(judged: Judged, names: Sequence[str], found: Sequence[Found]) -> None:
    """A column that two functions log with other values gets the second one's name before it."""
    extra: dict[str, list[Any]] = {}
    logged: dict[str, list[float]] = {}
    for name, of_part in zip(names, found):
        for column, values in of_part.extra.items():
            if column in extra and _differ(extra[column], values):
                column = f"{name}/{column}"
            extra.setdefault(column, values)
        for metric, numbers in of_part.logged.items():
            logged.setdefault(metric, []).extend(numbers)
    judged.extra = dict(sorted(extra.items()))
    judged.logged = {metric: math.fsum(values) / len(values) for metric, values in sorted(logged.items())}


def _differ(one: list[Any], other: list[Any]) -> bool:
    return any(a is not b and repr(a) != repr(b) for a, b in zip(one, other))
