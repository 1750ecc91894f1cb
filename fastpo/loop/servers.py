"""Samples of any OpenAI-compatible server, of one address or several.

What it can do is found with the first request: token ids in and out, or texts. Choices are counted, and those that lack
are asked one by one; what fails is retried by one rule, and then it is a Failure with what came instead. Not exact: a
server's batches depend on what else it is asked, so the same seed gives the same texts only now and then.
"""

import asyncio
import email.utils
import json
import logging
import os
import queue
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from fastpo.data.encoding import Encoder
from fastpo.errors import ConfigError, TrainingError, shown
from fastpo.loop.items import Failure, Request, Response, digest
from fastpo.loop.server_forms import Form, Reader
from fastpo.loop.server_process import START_TIMEOUT, ServerProcess, root_of
from fastpo.models.loading import load_tokenizer
from fastpo.training.samples import end_ids

log = logging.getLogger("fastpo")

CONCURRENCY, TIMEOUT, ATTEMPTS = 64, 600.0, 6
_MODES = ("auto", "ids", "text", "chat")
_LONGEST_WAIT = 120.0  # seconds that a Retry-After is heeded for
_DOWN = 5.0  # seconds for which an address that refused a connection is asked last
_NOBODY = 8  # groups of requests in a row that found no server: it is gone, not busy
_RETRIED = (408, 409, 425, 429)  # and every 5xx
# Servers whose log-probabilities are those before temperature, top_p and top_k, and how /models calls their owner.
_RAW_LOGPS, _OWNERS = ("vllm", "llama.cpp"), {"llamacpp": "llama.cpp", "vllm": "vllm", "sglang": "sglang"}


@dataclass
class _Server:
    """One address, and how it does."""

    url: str
    client: Any
    busy: int = 0
    down_until: float = 0.0


class ServerSampler:
    """A Sampler of a server that holds the policy.

    * `policy`: its folder or name: whose tokenizer and ends are meant, and what {model} of `command` is.
    * `base_url`: one address or several, as http://localhost:8000/v1; the least busy is asked, the next where one fails.
    * `model`: as the server calls it (default: the first of its list, else `policy`).
    * `command`: starts the server at the first address, which is stopped in `close`; its log is `log_path`.
    * `tokens`: "auto", or which way to ask: "ids", "text" (of the template), "chat" (messages).
    * `concurrency`, `timeout` (seconds of a request), `attempts`, `api_key` (default: OPENAI_API_KEY), `headers`.

    `found` says, once it was asked, which engine, model and way it is. ConfigError where openai or tenacity is not
    installed, nobody answers, or no way of asking is taken.
    """

    exact = False

    def __init__(
        self, policy: str | os.PathLike[str], tokenizer: Any = None, *, base_url: str | Sequence[str],
        model: str | None = None, command: str | None = None, log_path: Path | str = "server.log",
        start_timeout: float = START_TIMEOUT, tokens: str = "auto", concurrency: int = CONCURRENCY,
        timeout: float = TIMEOUT, attempts: int = ATTEMPTS, wait: float = 1.0, api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):  # fmt: skip
        """wait: seconds before the first retry; doubled for each further one, with a random part."""
        self.urls = (base_url,) if isinstance(base_url, str) else tuple(base_url)
        if not self.urls:
            raise ConfigError("sample.base_url is empty: give the server's address, as http://localhost:8000/v1")
        for url in self.urls:
            root_of(url)
        if tokens not in _MODES:
            raise ConfigError(f"sample.tokens={shown(tokens)}: expected one of {', '.join(_MODES)}")
        for name, value in (("concurrency", concurrency), ("attempts", attempts)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"sample.{name} must be a whole number from 1 on, not {shown(value)}")
        self._openai, self._tenacity = _packages()
        self.policy, self.model, self.tokens = os.fspath(policy), model, tokens
        self.command, self.log_path, self.start_timeout = command, Path(log_path), start_timeout
        self.concurrency, self.timeout, self.attempts, self.wait = concurrency, timeout, attempts, wait
        self._tokenizer, self._api_key, self._headers = tokenizer, api_key, dict(headers or {})
        self._process: ServerProcess | None = None
        self._loop: _Loop | None = None
        self._servers: list[_Server] = []
        self._form: Form | None = None
        self._reader: Reader | None = None
        self._counts_n = True  # whether the server gives as many choices as it is asked for
        self._nobody = 0
        self._said: set[str] = set()
        self.found: dict[str, Any] = {}

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.policy) if self._tokenizer is None else self._tokenizer

    @cached_property
    def key(self) -> Mapping[str, Any]:
        """What is asked for. Where the server is does not count, and what it turned out to be is in `found`."""
        return {"engine": "openai", "model": self.model or self.policy, "tokens": self.tokens,
                "template": digest(getattr(self.tokenizer, "chat_template", None))}  # fmt: skip

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """All that differ in the seed and in k alone: one request to the server, with as many choices."""
        groups: dict[Request, list[Request]] = {}
        for request in requests:
            groups.setdefault(replace(request, k=0, seed=0), []).append(request)
        return list(groups.values())

    def sample(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Response | Failure]]:
        """As they come. TrainingError where the server ends, or nobody answers any more."""
        if not requests:
            return
        contrasted = next((r for r in requests if r.contrast_ids is not None), None)
        if contrasted is not None:
            raise ConfigError(
                f"source {contrasted.source!r} mixes the logits of two prompts, which a server cannot: take "
                "sample.engine=local for it"
            )
        loop = self._started()
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        future = loop.submit(self._all(requests, answers.put))
        future.add_done_callback(lambda _: answers.put(None))
        try:
            while (answer := answers.get()) is not None:
                yield answer
            future.result()
        finally:
            future.cancel()

    def close(self) -> None:
        """Closes connections, and ends the server that it started."""
        loop, self._loop = self._loop, None
        if loop is not None:
            servers, self._servers = self._servers, []
            loop.submit(_closed(servers)).result(timeout=30)
            loop.close()
        process, self._process = self._process, None
        if process is not None:
            process.close()

    # ---- start

    def _started(self) -> "_Loop":
        if self._loop is not None:
            return self._loop
        if self.command is not None:
            self._process = ServerProcess(
                self.command, self.policy, self.urls[0], self.log_path, timeout=self.start_timeout
            )
        key = self._api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self._loop = _Loop()
        for url in self.urls:
            client = self._openai.AsyncOpenAI(
                api_key=key, base_url=url, max_retries=0, timeout=self.timeout, default_headers=self._headers
            )
            self._servers.append(_Server(url, client))
        return self._loop

    async def _probe(self, request: Request) -> None:
        """Finds with one request, of two tokens, how this server is asked: the first way that it takes."""
        engine, listed = await self._listed()
        self.model = self.model or (self.policy if self.command else listed) or self.policy
        ways = [way for way in _ways(self.tokens) if not (way.chat and isinstance(request.prompt, str))]
        asked, refusals, unknown = replace(request, max_tokens=2), [], False
        for form in ways:
            if unknown and form.dialect != "transformers":  # it takes no field but those that it knows
                continue
            if form.dialect == "plain" and request.top_k:
                continue
            body = form.body(asked, 1, self.model, self._text(asked))
            try:
                answer = await self._post(form, body, attempts=2)
            except self._openai.APIStatusError as error:
                if error.status_code in (401, 403):
                    raise ConfigError(f"{self.urls[0]} refuses the api_key: {_said(error)}") from None
                unknown |= "Unexpected fields in the request" in _said(error)
                refusals.append(f"{form.path} with {_way(form)}: {error.status_code} {_said(error)[:200]}")
                continue
            except self._openai.APIConnectionError as error:
                raise ConfigError(f"no server answers at {', '.join(self.urls)}: {_said(error)}") from None
            choices = answer.get("choices")
            first = choices[0] if isinstance(choices, list) and choices else None
            if first is None:
                refusals.append(f"{form.path} with {_way(form)}: no choices in {json.dumps(answer)[:200]}")
                continue
            seen = _prompt_tokens(answer)
            if form.ids and seen is not None and seen != len(request.prompt_ids):
                refusals.append(f"{form.path} with token ids: {seen} prompt tokens of {len(request.prompt_ids)}")
                continue
            self._settle(form, "transformers" if form.dialect == "transformers" else engine, first, seen, request)
            return
        raise ConfigError(f"{self.urls[0]} takes no request that fastpo knows: {'; '.join(refusals) or 'none fits'}")

    def _settle(self, form: Form, engine: str, first: Any, seen: int | None, request: Request) -> None:
        raw = engine in _RAW_LOGPS
        answer = Reader(self._ends(request), raw).read(first, replace(request, temperature=1.0, top_p=1.0, top_k=0))
        gives = isinstance(answer, Response) and answer.token_ids is not None
        logps = isinstance(answer, Response) and answer.logp is not None
        self._form, self._reader = form, Reader(self._ends(request), raw)
        self.found = {"engine": engine, "model": self.model, "tokens": "ids" if form.ids and gives else "text",
                      "prompt": "ids" if form.ids else "messages" if form.chat else "text", "logps": logps}  # fmt: skip
        where = f"sample: {engine} at {', '.join(self.urls)}, model {self.model}"
        if form.ids and gives:
            log.info("%s: token ids in and out%s", where, "" if logps else ", without log-probabilities")
        else:
            log.warning(
                "%s: the samples are not exact to the token, because %s; training tokenises the texts anew", where,
                "it gives no token ids" if not gives else f"the prompt goes to it as {self.found['prompt']}",
            )  # fmt: skip
        self._compare_prompt(seen, request)

    def _ends(self, request: Request) -> set[int]:
        ends = set(self._own_ends)
        return ends if isinstance(request.prompt, str) else ends | self._turn_ends

    @cached_property
    def _own_ends(self) -> list[int]:
        try:
            settings = GenerationConfig.from_pretrained(self.policy)
        except (OSError, ValueError):  # a policy without such a file
            settings = None
        return end_ids(settings, self.tokenizer)

    @cached_property
    def _turn_ends(self) -> set[int]:
        return {token for token in Encoder(self.tokenizer, True).ending_ids if token is not None}

    async def _listed(self) -> tuple[str, str | None]:
        """(engine, model) of the server's list of models, as far as it says."""
        try:
            text = await self._servers[0].client.get("/models", cast_to=str)
            first = json.loads(text)["data"][0]
            return _OWNERS.get(str(first.get("owned_by")).lower(), "openai"), str(first["id"])
        except (self._openai.OpenAIError, ValueError, LookupError, TypeError, AttributeError):
            return "openai", None

    # ---- asking

    async def _all(self, requests: Sequence[Request], put: Any) -> None:
        """Groups by `concurrency` workers, so that no more than these are in memory as tasks."""
        if self._form is None:
            await self._probe(min(requests, key=lambda r: len(r.prompt_ids)))
        groups = iter(self.batches(requests))

        async def work() -> None:
            for group in groups:
                async for answer in self._group(group):
                    put(answer)

        tasks = [asyncio.create_task(work()) for _ in range(min(self.concurrency, len(requests)))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _group(self, group: Sequence[Request]) -> AsyncIterator[tuple[Request, Response | Failure]]:
        """One answer to each. Choices that lack are asked one by one, each with its own seed."""
        rest = list(group)
        if self._counts_n and len(group) > 1:
            choices = await self._choices(group[0], len(group))
            if isinstance(choices, Failure):
                for request in group:
                    yield request, choices
                return
            if len(choices) == 1:  # a server without `n`: told by it, not by one that lost some
                self._counts_n = False
                self._say("n", "sample: the server gives one choice where %d were asked for; they are asked one by "
                          "one", len(group))  # fmt: skip
            for choice in choices[: len(group)]:
                request = rest.pop(0)
                yield request, self._read(choice, request)
        for request in rest:
            alone = await self._choices(request, 1)
            if isinstance(alone, Failure):
                yield request, alone
            else:
                yield request, self._read(alone[0], request) if alone else Failure("unparsed", "no choices")

    def _read(self, choice: Any, request: Request) -> Response | Failure:
        assert self._reader is not None
        answer = self._reader.read(choice, request)
        if self.found["tokens"] == "ids" and isinstance(answer, Response) and answer.token_ids is None:
            self._say("ids", "sample: of some responses the server gives no token ids, or none of their end; these are "
                      "texts, which training tokenises anew")  # fmt: skip
        return answer

    async def _choices(self, request: Request, n: int) -> list[Any] | Failure:
        """What came of n samples, in the order of their index; or why nothing did, after the retries."""
        assert self._form is not None and self.model is not None
        try:
            body = self._form.body(request, n, self.model, self._text(request))
            answer = await self._post(self._form, body)
        except self._openai.APITimeoutError as error:
            return self._failed(Failure("timeout", _said(error)))
        except self._openai.APIConnectionError as error:
            self._nobody += 1
            self._check_there(_said(error))
            return self._failed(Failure("error", f"connection: {_said(error)}"))
        except self._openai.APIStatusError as error:
            refused = error.status_code < 500 and error.status_code not in _RETRIED
            return self._failed(Failure("refused" if refused else "error", f"{error.status_code} {_said(error)}"))
        except _NoJson as error:
            return self._failed(Failure("unparsed", str(error)))
        self._nobody = 0
        choices = answer.get("choices")
        if not isinstance(choices, list):
            return self._failed(Failure("unparsed", json.dumps(answer)[:500]))
        self._compare_prompt(_prompt_tokens(answer), request)
        return sorted(choices, key=_index)

    def _failed(self, failure: Failure) -> Failure:
        log.debug("sample: %s: %s", failure.status, failure.raw)
        return failure

    async def _post(self, form: Form, body: Mapping[str, Any], attempts: int | None = None) -> dict[str, Any]:
        """The JSON of an answer, after at most so many attempts, each at the address that is the least busy."""
        retrying = self._tenacity.AsyncRetrying(
            stop=self._tenacity.stop_after_attempt(attempts or self.attempts), wait=self._pause,
            retry=self._tenacity.retry_if_exception(self._may_retry), reraise=True,
        )  # fmt: skip
        async for attempt in retrying:
            with attempt:
                server = self._least_busy()
                server.busy += 1
                try:
                    text = await server.client.post(form.path, cast_to=str, body=dict(body))
                except self._openai.APIConnectionError as error:
                    if not isinstance(error, self._openai.APITimeoutError):
                        server.down_until = time.monotonic() + _DOWN
                    self._check_there(_said(error))
                    raise
                finally:
                    server.busy -= 1
                try:
                    answer = json.loads(text)
                except ValueError:
                    raise _NoJson(text[:500]) from None
                if not isinstance(answer, dict):
                    raise _NoJson(text[:500])
                return answer
        raise AssertionError("tenacity ends with an answer or raises")

    def _least_busy(self) -> _Server:
        now = time.monotonic()
        return min(self._servers, key=lambda s: (s.down_until > now, s.busy, s.down_until))

    def _may_retry(self, error: BaseException) -> bool:
        if isinstance(error, self._openai.APIStatusError):
            return error.status_code >= 500 or error.status_code in _RETRIED
        return isinstance(error, self._openai.APIConnectionError | _NoJson)

    def _pause(self, state: Any) -> float:
        """Seconds before the next attempt: what the server says, else twice as many each time, in part at random."""
        asked = _retry_after(state.outcome.exception())
        if asked is not None:
            return min(asked, _LONGEST_WAIT)
        return self._tenacity.wait_exponential_jitter(self.wait, max=60 * self.wait, jitter=self.wait)(state)

    def _check_there(self, why: str) -> None:
        """TrainingError where the server that was started has ended, or nobody has answered for a while."""
        died = self._process.died() if self._process is not None else None
        if died is not None:
            raise TrainingError(f"sample.command: {died}")
        if self._nobody >= _NOBODY:
            raise TrainingError(f"no server answers any more at {', '.join(self.urls)}: {why}; start it and go on")

    # ---- prompts

    def _text(self, request: Request) -> str:
        """The prompt as a text that becomes its ids: with the special tokens, less a first one that every server that
        tokenises by itself adds again."""
        if self._form is None or not (self._form.ids or self._form.chat):
            whole = self.tokenizer.decode(list(request.prompt_ids), skip_special_tokens=False)
            bos = getattr(self.tokenizer, "bos_token", None)
            extended = self._form is not None and self._form.dialect == "extended"
            if not extended and bos and whole.startswith(bos) and self._adds_bos:
                return whole[len(bos) :]
            return whole
        return ""

    @cached_property
    def _adds_bos(self) -> bool:
        return self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]

    def _compare_prompt(self, seen: int | None, request: Request) -> None:
        if seen is not None and seen != len(request.prompt_ids):
            self._say(
                "prompt", "sample: the server counts %d tokens in a prompt where the policy's tokenizer has %d (prompt "
                "%s): it has another tokenizer or chat template, or adds special tokens; what it samples is not what "
                "training takes for this prompt's answers", seen, len(request.prompt_ids), request.id,
            )  # fmt: skip

    def _say(self, what: str, message: str, *values: object) -> None:
        if what not in self._said:
            self._said.add(what)
            log.warning(message, *values)


class _NoJson(Exception):
    """An answer with status 200 that is no JSON object."""


class _Loop:
    """An event loop in a thread of its own: a notebook has one running already, in which nothing could be waited for."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fastpo-sampler", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=30)
        self._loop.close()


async def _closed(servers: Iterable[_Server]) -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    for server in servers:
        await server.client.close()


def _packages() -> tuple[Any, Any]:
    try:
        import openai
        import tenacity
    except ModuleNotFoundError as error:
        raise ConfigError(f"sampling from a server needs {error.name}: pip install 'fastpo[loop]'") from None
    return openai, tenacity


def _ways(tokens: str) -> list[Form]:
    """The forms of a mode, the best first."""
    ids = [Form(ids=True, dialect="extended"), Form(ids=True)]
    text = [Form(dialect=dialect) for dialect in ("extended", "plain", "transformers")]
    chat = [Form(chat=True, dialect=dialect) for dialect in ("extended", "plain", "transformers")]
    return {"ids": ids, "text": text, "chat": chat, "auto": [*ids, *text, *chat]}[tokens]


def _way(form: Form) -> str:
    fields = {"extended": " and further fields", "plain": "", "transformers": " and generation_config"}[form.dialect]
    return ("token ids" if form.ids else "messages" if form.chat else "a text") + fields


def _index(choice: Any) -> int:
    found = choice.get("index") if isinstance(choice, Mapping) else None
    return found if isinstance(found, int) else 0


def _prompt_tokens(answer: Mapping[str, Any]) -> int | None:
    usage = answer.get("usage")
    found = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
    return found if isinstance(found, int) and found > 0 else None


def _said(error: BaseException) -> str:
    """What a server or the connection said, in one line."""
    response = getattr(error, "response", None)
    text = getattr(response, "text", None) or " ".join(filter(None, (str(error), str(error.__cause__ or ""))))
    return " ".join(str(text).split())[:500]


def _retry_after(error: BaseException | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
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
