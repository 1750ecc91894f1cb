"""Requests to OpenAI-compatible servers: the openai client, tenacity's retries, and a bound on how many are in flight.

All replies are JSON as it came: what a server leaves out, or says otherwise than it should, is for the caller to see.
"""

import asyncio
import functools
import itertools
import os
import queue
import random
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from fastpo.errors import ConfigError, one_line
from fastpo.loop.items import Failure

T = TypeVar("T")
R = TypeVar("R")
WAIT = 1.0  # seconds before the second attempt; doubled with each further one
LONGEST_WAIT = 60.0
_BY_CHANCE = random.SystemRandom()  # not the process's generator, whose draws others count on
_AGAIN = (408, 409, 429)  # HTTP statuses that may be another one later, beside those from 500 on


class Client:
    """One or more servers of the same models.

    * `base_url`: up to and with `/v1`; of several each request takes the next one, also when it is repeated.
    * `api_key_env`: the environment's variable that holds the key; local servers need none.
    * `timeout`: seconds of one attempt. `attempts`: how often a request is sent where the server is busy, fails, or
      does not answer. `concurrency`: requests in flight.

    Its event loop runs in a thread of its own, so that it works inside others (notebooks). ConfigError where openai or
    tenacity is absent, and for a variable that is not set.
    """

    def __init__(
        self, base_url: str | Sequence[str], *, api_key_env: str | None = None, timeout: float = 600.0,
        attempts: int = 5, concurrency: int = 32, wait: float = WAIT,
    ):  # fmt: skip
        try:
            import openai
            import tenacity
        except ImportError:
            raise ConfigError(
                "a server's client needs openai and tenacity, which are not installed: pip install 'fastpo[loop]'"
            ) from None
        self.urls = [base_url] if isinstance(base_url, str) else list(base_url)
        if not self.urls or not all(str(url).startswith(("http://", "https://")) for url in self.urls):
            raise ConfigError(f"base_url={base_url!r}: expected addresses as http://127.0.0.1:8000/v1")
        for name, value in (("attempts", attempts), ("concurrency", concurrency), ("timeout", timeout)):
            if not value > 0:
                raise ConfigError(f"{name}={value!r}: expected a number above 0")
        key = os.environ.get(api_key_env) if api_key_env else "none"
        if key is None:
            raise ConfigError(f"api_key_env={api_key_env!r}: this variable is not set in the environment")
        self.timeout, self.attempts, self.concurrency, self.wait = timeout, int(attempts), int(concurrency), wait
        self._openai, self._tenacity = openai, tenacity
        self._clients = [
            openai.AsyncOpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=0) for url in self.urls
        ]
        self._next = itertools.cycle(self._clients)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fastpo client", daemon=True)
        self._thread.start()
        self._room = asyncio.Semaphore(self.concurrency)

    # ---- inside the loop

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The reply's JSON, or a Failure: `timeout`, or `error` with what the server or the connection said."""

        async def once() -> Any:
            async with self._room:
                return await next(self._next).post(path, cast_to=object, body=dict(body))

        return await self._tried(once, self.attempts)

    async def chat(self, body: Mapping[str, Any]) -> Any:
        """`post` to /chat/completions."""
        return await self.post("/chat/completions", body)

    async def completions(self, body: Mapping[str, Any]) -> Any:
        """`post` to /completions; `prompt` may be token ids where the server takes them."""
        return await self.post("/completions", body)

    async def _tried(self, once: Callable[[], Awaitable[Any]], attempts: int) -> Any:
        tenacity = self._tenacity
        again = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(attempts), retry=tenacity.retry_if_exception(self._transient),
            wait=self._waits, reraise=True,
        )  # fmt: skip
        try:
            return await again(once)
        except self._openai.APITimeoutError as error:
            return Failure("timeout", one_line(error))
        except self._openai.APIStatusError as error:
            return Failure("error", f"HTTP {error.status_code}: {' '.join(error.response.text.split())[:1500]}")
        except (self._openai.OpenAIError, ValueError) as error:  # a reply that calls itself JSON and is none
            return Failure("error", f"{one_line(error)}; {one_line(error.__cause__) if error.__cause__ else ''}")

    def _transient(self, error: BaseException) -> bool:
        if isinstance(error, self._openai.APIStatusError):
            return error.status_code >= 500 or error.status_code in _AGAIN
        return isinstance(error, self._openai.APIConnectionError)

    def _waits(self, state: Any) -> float:
        """Seconds: what the server asks for, or twice as long each time, with up to a half more by chance."""
        error = state.outcome.exception()
        asked = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
        try:
            return min(max(float(asked), 0.0), LONGEST_WAIT)
        except ValueError:
            doubled = min(self.wait * 2.0 ** (state.attempt_number - 1), LONGEST_WAIT)
            return doubled * (1 + _BY_CHANCE.random() / 2)

    # ---- from outside

    def each(self, work: Callable[[T], Awaitable[R]], things: Iterable[T]) -> Iterator[tuple[T, R]]:
        """(thing, `await work(thing)`) of each, as they are done; few more than `concurrency` are begun at a time.

        An exception of one ends all. When the iterator is closed, what is in flight is cancelled.
        """
        done: queue.SimpleQueue[tuple[T, Any]] = queue.SimpleQueue()
        rest, running = iter(things), set()

        def begin() -> bool:
            for thing in rest:
                future = asyncio.run_coroutine_threadsafe(_awaited(work, thing), self._loop)
                running.add(future)
                future.add_done_callback(functools.partial(_put, done, thing))
                return True
            return False

        try:
            for _ in range(2 * self.concurrency):
                if not begin():
                    break
            while running:
                thing, future = done.get()
                running.discard(future)
                begin()
                yield thing, future.result()
        finally:
            for future in running:
                future.cancel()

    def ask(self, coroutine: Callable[[], Awaitable[R]]) -> R:
        """`await coroutine()`, from outside the loop."""
        return asyncio.run_coroutine_threadsafe(_awaited(lambda _: coroutine(), None), self._loop).result()

    def models(self, timeout: float = 5.0) -> list[dict[str, Any]]:
        """What the first server lists at /models; nothing where it does not answer."""

        async def get() -> Any:
            return await self._clients[0].get("/models", cast_to=object, options={"timeout": timeout})

        try:
            listed = self.ask(get)
            return [m for m in listed["data"] if isinstance(m, dict) and isinstance(m.get("id"), str)]
        except Exception:  # a list is a courtesy: some servers have none, some fail on it
            return []

    def close(self) -> None:
        """End the connections and the thread."""
        if self._loop.is_closed():
            return

        async def end() -> None:
            for client in self._clients:
                await client.close()

        self.ask(end)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _put(done: Any, thing: Any, future: Any) -> None:
    done.put((thing, future))


async def _awaited(work: Callable[[T], Awaitable[R]], thing: T) -> R:
    return await work(thing)
