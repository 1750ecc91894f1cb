"""What judges need of a server's client (server_client.py): a bound on how many requests are in flight, results as they
come, and failures as values.

Replies are JSON as it came: what a server leaves out, or says otherwise than it should, is for the caller to see.
"""

import asyncio
import functools
import os
import queue
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from fastpo.errors import ConfigError
from fastpo.sampling import server_client
from fastpo.sampling.items import Failure
from fastpo.sampling.server_process import root_of

T = TypeVar("T")
R = TypeVar("R")
WAIT = 1.0  # seconds before the second attempt
MODELS_TIMEOUT = 10.0  # seconds for the list of models, which is a courtesy


class Client:
    """One or more servers of the same models.

    * `base_url`: up to and with `/v1`; of several each request takes the least busy.
    * `api_key_env`: the environment's variable that holds the key (default: OPENAI_API_KEY, where it is set); local
      servers need none.
    * `timeout`: seconds of one attempt. `attempts`: how often a request is sent where the server is busy, fails, or
      does not answer. `concurrency`: requests in flight.

    Connections and the thread of their event loop are made when they are first used, and again after `close`.
    ConfigError where openai or tenacity is absent, for what is no address, and for a variable that is not set.
    """

    def __init__(
        self, base_url: str | Sequence[str], *, api_key_env: str | None = None, timeout: float = 600.0,
        attempts: int = 5, concurrency: int = 32,
    ):  # fmt: skip
        self.urls = [base_url] if isinstance(base_url, str) else list(base_url)
        if not self.urls:
            raise ConfigError("base_url names no server")
        if not (isinstance(concurrency, int) and concurrency > 0):
            raise ConfigError(f"concurrency={concurrency!r}: expected a whole number above 0")
        key = os.environ.get(api_key_env) if api_key_env else None
        if api_key_env and key is None:
            raise ConfigError(f"api_key_env={api_key_env!r}: this variable is not set in the environment")
        for name, value in (("attempts", attempts), ("timeout", timeout)):
            if not value > 0:
                raise ConfigError(f"{name}={value!r}: expected a number above 0")
        for url in self.urls:
            root_of(url)
        server_client.packages()
        self.concurrency = concurrency
        self._options: dict[str, Any] = {"timeout": timeout, "attempts": attempts, "api_key": key}
        self._open: tuple[server_client.Client, asyncio.Semaphore] | None = None

    def _server(self) -> tuple[server_client.Client, asyncio.Semaphore]:
        if self._open is None:
            inner = server_client.Client(self.urls, wait=WAIT, **self._options)
            self._open = inner, asyncio.Semaphore(self.concurrency)
        return self._open

    # ---- inside the loop

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any] | Failure:
        """The reply's JSON object, or a Failure: `timeout`, or `error` with what the server or the connection said."""
        inner, room = self._server()
        try:
            async with room:
                return await inner.post(path, body)
        except server_client.Unanswered as error:
            return Failure("timeout" if error.status == "timeout" else "error", error.raw)

    async def chat(self, body: Mapping[str, Any]) -> dict[str, Any] | Failure:
        """`post` to /chat/completions."""
        return await self.post("/chat/completions", body)

    async def completions(self, body: Mapping[str, Any]) -> dict[str, Any] | Failure:
        """`post` to /completions; `prompt` may be token ids where the server takes them."""
        return await self.post("/completions", body)

    # ---- from outside

    def each(self, work: Callable[[T], Awaitable[R]], things: Iterable[T]) -> Iterator[tuple[T, R]]:
        """(thing, `await work(thing)`) of each, as they are done; twice `concurrency` are begun at a time.

        An exception of one ends all. When the iterator is closed, what is in flight is cancelled.
        """
        done: queue.SimpleQueue[tuple[T, Any]] = queue.SimpleQueue()
        rest, running = iter(things), set()
        inner, _ = self._server()

        def begin() -> bool:
            for thing in rest:
                future = inner.submit(_awaited(work, thing))
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

    def models(self) -> list[dict[str, Any]]:
        """What the first server lists at /models; nothing where it lists none, fails, or does not answer soon."""
        inner, _ = self._server()
        try:
            listed = inner.submit(asyncio.wait_for(inner.get("/models"), MODELS_TIMEOUT)).result()
            return [m for m in listed["data"] if isinstance(m, dict) and isinstance(m.get("id"), str)]
        except (TimeoutError, TypeError, KeyError):
            return []

    def close(self) -> None:
        """End the connections and the thread."""
        if self._open is not None:
            inner, _ = self._open
            self._open = None
            inner.close()


def _put(done: Any, thing: Any, future: Any) -> None:
    done.put((thing, future))


async def _awaited(work: Callable[[T], Awaitable[R]], thing: T) -> R:
    return await work(thing)
