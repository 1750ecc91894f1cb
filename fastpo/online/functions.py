"""Reward functions with TRL's signature: called with all responses of a step at once, and prompt by prompt where that
fails. What they log is kept only of calls whose values are used.
"""

import asyncio
import functools
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastpo.errors import ConfigError, did_you_mean, one_line, shown
from fastpo.online.asking import NOT_COLUMNS
from fastpo.sampling.items import Response, Verdict
from fastpo.scoring.scoring import RAW, number

log = logging.getLogger("fastpo")
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
_OF_RESPONSES = {"prompts", "completions", "completion_ids"}
Wait = Callable[[Awaitable[Any]], Awaitable[Any]]
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def callable_name(function: Any) -> str:
    """As TRL names it: of a partial the inner function's, of an object without a name its class's."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def is_async(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    call = getattr(function, "__call__", None)  # noqa: B004  of an object, whose class may have an async one
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def is_of_trl(function: Any) -> bool:
    """Whether it names something that TRL hands out for all responses at once."""
    try:
        return bool(_OF_RESPONSES & set(inspect.signature(function).parameters))
    except (TypeError, ValueError):
        return False


def is_of_the_loop(function: Any) -> bool:
    """Whether it takes one response, as the loop's do: (prompt, response, meta). TRL hands out no `prompt`."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    required = {n for n, p in parameters.items() if p.default is p.empty and p.kind not in _VARIADIC}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return not is_of_trl(function) and ("prompt" in required or ("response" in required and not anything))


@dataclass
class Batch:
    """The responses of a step as TRL's functions see them, a list over responses each."""

    groups: list[list[int]]  # the places of each prompt's responses
    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int] | None]
    columns: dict[str, list[Any]]
    state: Any

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[Response]], state: Any) -> "Batch":
        names = dict.fromkeys(k for row in rows for k in row if k not in (*NOT_COLUMNS, *GIVEN))
        batch = cls([], [], [], [], {name: [] for name in names}, state)
        for row, group in zip(rows, groups, strict=True):
            start = len(batch.prompts)
            batch.groups.append(list(range(start, start + len(group))))
            prompt = row["prompt"]
            for response in group:
                as_turns = not isinstance(prompt, str)
                batch.prompts.append([dict(turn) for turn in prompt] if as_turns else prompt)
                answer = [{"role": "assistant", "content": response.text}] if as_turns else response.text
                batch.completions.append(answer)
                batch.completion_ids.append(None if response.token_ids is None else list(response.token_ids))
                for name, values in batch.columns.items():
                    values.append(row.get(name))
        return batch


@dataclass
class Found:
    """What one reward function says of R responses."""

    values: list[float | None]  # [R]
    reasons: list[str]  # [R]: why there is no number, "" where there is one
    raw: dict[str, str] = field(default_factory=dict)  # by reason, what came first in its place
    extra: dict[str, list[Any]] = field(default_factory=dict)  # columns of log_extra, [R] each
    logged: dict[str, list[float]] = field(default_factory=dict)  # what log_metric was given

    @classmethod
    def empty(cls, count: int) -> "Found":
        return cls([None] * count, [""] * count)

    def put(self, place: int, verdict: Verdict | float) -> None:
        if isinstance(verdict, Verdict) and verdict.value is None:
            self.values[place], self.reasons[place] = None, verdict.status
            self.raw.setdefault(verdict.status, verdict.raw)
        else:
            self.values[place] = float(verdict.value if isinstance(verdict, Verdict) else verdict)  # type: ignore[arg-type]
            self.reasons[place] = ""


class _Call:
    """One call of a function about some responses."""

    def __init__(self, function: "RewardFunction", batch: Batch, places: Sequence[int]):
        self.function, self.places = function, list(places)
        self.extra: dict[str, list[Any]] = {}
        self.logged: dict[str, list[Any]] = {}
        every: dict[str, Any] = {name: [values[p] for p in places] for name, values in batch.columns.items()}
        every |= {
            "prompts": [batch.prompts[p] for p in places],
            "completions": [batch.completions[p] for p in places],
            "completion_ids": [batch.completion_ids[p] for p in places],
            "trainer_state": batch.state,
            "log_extra": lambda column, values: self.extra.setdefault(str(column), []).extend(values),
            "log_metric": lambda name, value: self.logged.setdefault(str(name), []).append(value),
        }
        self.given = every if function.takes is None else {k: v for k, v in every.items() if k in function.takes}
        for lacking in sorted(function.needs - set(self.given)):
            self.given[lacking] = [None] * len(self.places)  # a column that these rows do not have, and others may

    def values(self, result: Any) -> list[float | Verdict] | Verdict:
        """One value or failure a response, of what the function returned; a Verdict where that is no list of them."""
        if isinstance(result, str | bytes | Mapping) or not isinstance(result, Iterable):
            return Verdict.failed("not_a_list", shown(result, 200))
        values = list(result)
        if len(values) != len(self.places):
            return Verdict.failed("wrong_count", f"{len(values)} values for {len(self.places)} responses")
        return [number(value) for value in values]


class RewardFunction:
    """A function `f(prompts, completions, completion_ids, **columns, trainer_state, log_extra, log_metric)` -> a value
    for each, None where it does not apply; sync or async. One without `**kwargs` is given what it names."""

    def __init__(self, name: str, function: Callable[..., Any]):
        self.name, self.function, self.is_async = name, function, is_async(function)
        self._warned: set[str] = set()
        self.takes: set[str] | None = None
        self.needs: set[str] = set()
        try:
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError):  # of C
            return
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            self.takes = set(parameters)
        self.needs = {n for n, p in parameters.items() if p.default is p.empty and p.kind not in _VARIADIC}
        only = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_ONLY]
        if only:
            raise ConfigError(f"reward function {name!r}: {only[0]!r} is taken by position, and is given by name")

    def check(self, columns: Iterable[str]) -> None:
        """ConfigError where it needs a column that the data do not have."""
        there = [*columns, *GIVEN]
        for lacking in sorted(self.needs - set(there)):
            own = [c for c in there if c not in (*GIVEN, *NOT_COLUMNS)]
            raise ConfigError(
                f"reward function {self.name!r} needs a column {lacking!r}, and the rows have, beside the prompt, "
                f"{', '.join(own) or 'none'}{did_you_mean(lacking, own)}"
            )

    async def ask(self, batch: Batch, wait: Wait) -> Found:
        """All responses at once; where that fails, the responses of one prompt after another."""
        everything = [place for group in batch.groups for place in group]
        found = Found.empty(len(everything))
        if not everything:
            return found
        groups = [group for group in batch.groups if group]
        failed = await self._call(batch, everything, found, wait)
        if failed is None:
            return found
        for group in groups:
            own = await self._call(batch, group, found, wait) if len(groups) > 1 else failed
            for place in group if own is not None else ():
                found.put(place, own)
        return found

    async def _call(self, batch: Batch, places: Sequence[int], found: Found, wait: Wait) -> Verdict | None:
        """Fills in what the function says of these; or the failure of the whole call, of which nothing is kept."""
        call = _Call(self, batch, places)
        try:
            result = self.function(**call.given)
            if inspect.isawaitable(result):
                result = await wait(result)
            values = call.values(result)
        except Exception as error:  # a user's function may raise anything
            return Verdict.failed("error", one_line(error)[:RAW])
        if isinstance(values, Verdict):
            return values
        for place, value in zip(places, values):
            found.put(place, value)
        self._keep_logs(call, found)
        return None

    def _keep_logs(self, call: _Call, found: Found) -> None:
        for column, values in call.extra.items():
            if len(values) != len(call.places):
                self._warn(column, f"{len(values)} values of {column!r} for {len(call.places)} responses")
                continue
            whole = found.extra.setdefault(column, [None] * len(found.values))
            for place, value in zip(call.places, values):
                whole[place] = value
        for name, values in call.logged.items():
            numbers = [n for n in map(number, values) if isinstance(n, float)]
            if len(numbers) < len(values):
                self._warn(name, f"{shown(values, 60)} as the metric {name!r}")
            if numbers:
                found.logged.setdefault(name, []).extend(numbers)

    def _warn(self, name: str, what: str) -> None:
        """Once a name: a function that logs something wrong does so at every step."""
        if name not in self._warned:
            self._warned.add(name)
            log.warning("reward function %r logged %s, which is not kept", self.name, what)


class Loop:
    """An event loop in a thread of its own, the same for all steps: clients that a function keeps belong to it."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def ask(self, functions: Sequence[RewardFunction], batch: Batch) -> list[Found]:
        """Of each: the sync ones in their order, in this thread, and then the async ones together."""
        found = {f.name: _at_once(f.ask(batch, self._blocking)) for f in functions if not f.is_async}
        waiting = [f for f in functions if f.is_async]
        if waiting:
            found |= zip([f.name for f in waiting], self._run(*(f.ask(batch, _await) for f in waiting)))
        return [found[f.name] for f in functions]

    def _run(self, *waiting: Awaitable[Any]) -> list[Any]:
        async def everything() -> list[Any]:
            return list(await asyncio.gather(*waiting))

        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="fastpo-rewards", daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(everything(), self._loop).result()

    async def _blocking(self, waiting: Awaitable[Any]) -> Any:
        """Of a function that does not look async, and returns what is to be waited for."""
        return self._run(waiting)[0]

    def close(self) -> None:
        if self._loop is None or self._thread is None:
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._loop = self._thread = None


async def _await(waiting: Awaitable[Any]) -> Any:
    return await waiting


def _at_once(coroutine: Coroutine[Any, Any, Found]) -> Found:
    """What a coroutine that never waits returns, in this thread: time limits by signals need the main one."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError("a sync function waited")
