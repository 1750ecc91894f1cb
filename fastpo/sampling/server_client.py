"""Requests to an OpenAI-compatible server, of one address or several: the openai client, retried by one rule.

tenacity counts the attempts. Answers are JSON as it came. The event loop has a thread of its own: a notebook has a loop
running already, inside which nothing could be waited for.
"""

import asyncio
import email.utils
import json
import os
import random
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastpo.errors import ConfigError, shown
from fastpo.sampling.server_process import root_of

_LONGEST_WAIT = 120.0  # seconds that a Retry-After is heeded for, and those between two attempts
_DOWN = 5.0  # seconds for which an address that refused a connection is asked last
_RETRIED = (408, 409, 425, 429)  # and every status from 500 on
_AFTER_TIMEOUT = 2  # attempts where a request times out: each takes as long again


class Unanswered(Exception):
    """No answer, after all attempts.

    `status`: as Failure's: "timeout", "refused" (the request itself), "error" (the server or the connection),
    "unparsed" (no JSON). `code`: HTTP's, None where there was no answer at all.
    """

    def __init__(self, status: str, said: str, code: int | None = None):
        super().__init__(said)
        self.status, self.said, self.code = status, said, code

    @property
    def raw(self) -> str:
        return self.said if self.code is None else f"{self.code} {self.said}"

    @property
    def nobody(self) -> bool:
        """Whether there was no server at the address."""
        return self.status == "error" and self.code is None


@dataclass
class _Address:
    url: str
    client: Any
    busy: int = 0
    down_until: float = 0.0


class Client:
    """`urls`: up to and with /v1. `timeout`: seconds of an attempt. `wait`: seconds before the second attempt, twice as
    many before each further one, in part at random. `lost`: called where a connection fails; may raise.

    ConfigError where openai or tenacity is not installed, and for what is no address.
    """

    def __init__(
        self, urls: Sequence[str], *, timeout: float, attempts: int, wait: float = 1.0, api_key: str | None = None,
        headers: Mapping[str, str] | None = None, lost: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        self._openai, self._tenacity = packages()
        for name, value in (("attempts", attempts), ("timeout", timeout)):
            if not value > 0:
                raise ConfigError(f"{name}={shown(value)}: expected a number above 0")
        for url in urls:
            root_of(url)
        self.attempts, self.wait, self._lost = attempts, wait, lost
        self._random = random.Random()  # not the process's, whose draws others count on
        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self._addresses = [
            _Address(url, self._openai.AsyncOpenAI(api_key=key, base_url=url, max_retries=0, timeout=timeout,
                                                   default_headers=dict(headers or {})))
            for url in urls
        ]  # fmt: skip
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fastpo client", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Starts it in the client's loop; returns its concurrent.futures.Future."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Cancels what is under way and closes the connections."""
        self.submit(self._end()).result(timeout=30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=30)
        self._loop.close()

    async def _end(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for address in self._addresses:
            await address.client.close()

    # ---- inside the loop

    async def get(self, path: str) -> Any:
        """The JSON at a path of the first address; None where there is none."""
        try:
            return json.loads(await self._addresses[0].client.get(path, cast_to=str))
        except (self._openai.OpenAIError, ValueError):
            return None

    async def post(self, path: str, body: Mapping[str, Any], attempts: int | None = None) -> dict[str, Any]:
        """The JSON object of an answer, of the address that is the least busy at each attempt; Unanswered else."""
        retrying = self._tenacity.AsyncRetrying(
            stop=lambda state: _enough(state, attempts or self.attempts), wait=self._pause,
            retry=self._tenacity.retry_if_exception(_may_retry), reraise=True,
        )  # fmt: skip
        return await retrying(self._once, path, body)

    async def tell(self, path: str, body: Mapping[str, Any]) -> list[Any]:
        """Posts to a path beside /v1 of every address, once; their JSON, None where an answer is none."""
        return list(await asyncio.gather(*(self._tell(address, path, body) for address in self._addresses)))

    async def _tell(self, address: _Address, path: str, body: Mapping[str, Any]) -> Any:
        text = await self._asked(address, root_of(address.url) + path, body)
        try:
            return json.loads(text)
        except ValueError:
            return None

    async def _once(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        now = time.monotonic()
        address = min(self._addresses, key=lambda a: (a.down_until > now, a.busy, a.down_until))
        text = await self._asked(address, path, body)
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise Unanswered("unparsed", f"no JSON object: {text[:500]}")
        return answer

    async def _asked(self, address: _Address, path: str, body: Mapping[str, Any]) -> str:
        """What one address says; Unanswered else. path: of the address, or whole."""
        address.busy += 1
        try:
            return str(await address.client.post(path, cast_to=str, body=dict(body)))
        except self._openai.APITimeoutError as error:
            raise Unanswered("timeout", _said(error)) from error
        except self._openai.APIConnectionError as error:
            address.down_until = time.monotonic() + _DOWN
            self._lost()
            raise Unanswered("error", f"no connection to {address.url}: {_said(error)}") from error
        except self._openai.APIStatusError as error:
            busy = error.status_code >= 500 or error.status_code in _RETRIED
            raise Unanswered("error" if busy else "refused", _said(error), error.status_code) from error
        finally:
            address.busy -= 1

    def _pause(self, state: Any) -> float:
        """Seconds before the next attempt: what the server says, else by the rule."""
        asked = _retry_after(state.outcome.exception())
        if asked is not None:
            return min(asked, _LONGEST_WAIT)
        return min(self.wait * (2.0 ** (state.attempt_number - 1) + self._random.random()), _LONGEST_WAIT)


def packages() -> tuple[Any, Any]:
    """openai and tenacity; ConfigError says how to install them."""
    try:
        import openai
        import tenacity
    except ModuleNotFoundError as error:
        raise ConfigError(f"asking a server needs {error.name}: pip install 'fastpo[loop]'") from None
    return openai, tenacity


def _may_retry(error: BaseException) -> bool:
    return isinstance(error, Unanswered) and error.status != "refused"


def _enough(state: Any, attempts: int) -> bool:
    timed_out = getattr(state.outcome.exception(), "status", None) == "timeout"
    return state.attempt_number >= (min(attempts, _AFTER_TIMEOUT) if timed_out else attempts)


def _said(error: BaseException) -> str:
    """What a server or the connection said, in one line."""
    text = getattr(getattr(error, "response", None), "text", None)
    return " ".join(str(text or f"{error} {error.__cause__ or ''}").split())[:500]


def _retry_after(error: BaseException | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date."""
    headers = getattr(getattr(getattr(error, "__cause__", None), "response", None), "headers", None) or {}
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
