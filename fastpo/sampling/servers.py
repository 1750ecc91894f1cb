"""Samples of any OpenAI-compatible server.

What it can do is found with the first request: token ids in and out, or texts. Choices are counted, and those that lack
are asked one by one; what fails is retried by one rule, and then it is a Failure with what came instead. Not exact: a
server's batches depend on what else it is asked, so the same seed gives the same texts only now and then.
"""

import asyncio
import json
import logging
import os
import queue
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from fastpo.data.encoding import Encoder
from fastpo.errors import ConfigError, TrainingError, shown
from fastpo.models.loading import load_tokenizer
from fastpo.sampling.items import Failure, Request, Response, digest
from fastpo.sampling.server_client import Client, Unanswered, packages
from fastpo.sampling.server_forms import Form, Reader, forms, sampled_tokens
from fastpo.sampling.server_process import START_TIMEOUT, ServerProcess, root_of
from fastpo.sampling.server_refresh import Reload, reloads
from fastpo.training.samples import end_ids

log = logging.getLogger("fastpo")

CONCURRENCY, TIMEOUT, ATTEMPTS = 64, 600.0, 6
_MODES = ("auto", "ids", "text", "chat")
_NOBODY = 8  # requests in a row that found no server: it is gone, not busy
# Servers whose log-probabilities are those before temperature, top_p and top_k, and how /models calls their owner.
_RAW_LOGPS, _OWNERS = ("vllm", "llama.cpp"), {"llamacpp": "llama.cpp", "vllm": "vllm", "sglang": "sglang"}


class ServerSampler:
    """A Sampler of a server that holds the policy.

    * `policy`: its folder or name: whose tokenizer and ends are meant, and what {model} of `command` is.
    * `base_url`: an address or several, as http://localhost:8000/v1; the least busy is asked, another where one fails.
    * `model`: as the server calls it (default: with `command` the policy, else the first of its list).
    * `command`: starts the server at the first address, within `start_timeout` seconds; `close` ends it. It writes
      to `log_path`.
    * `tokens`: "auto", or which way to ask: "ids", "text" (of the template), "chat" (messages).
    * `concurrency`: requests under way. `timeout`, `attempts`, `wait`, `api_key` (default: OPENAI_API_KEY), `headers`:
      as Client's.

    `found` says, once it was asked, which engine, model and way it is. `update` gives it new weights. ConfigError where
    openai or tenacity is not installed, nobody answers, or no way of asking is taken.
    """

    exact = False

    def __init__(
        self, policy: str | os.PathLike[str], tokenizer: Any = None, *, base_url: str | Sequence[str],
        model: str | None = None, command: str | None = None, log_path: Path | str = "server.log",
        start_timeout: float = START_TIMEOUT, tokens: str = "auto", concurrency: int = CONCURRENCY,
        timeout: float = TIMEOUT, attempts: int = ATTEMPTS, wait: float = 1.0, api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):  # fmt: skip
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
        packages()
        self.policy, self.model, self.tokens = os.fspath(policy), model, tokens
        self._first, self._named = self.policy, model  # whose tokenizer and ends are meant, and what the user said
        self._reloads: tuple[Reload, ...] | None = None  # None: not known yet
        self.command, self.log_path, self.start_timeout = command, Path(log_path), start_timeout
        self.concurrency = concurrency
        self._of_client = dict(timeout=timeout, attempts=attempts, wait=wait, api_key=api_key, headers=headers)
        self._tokenizer = tokenizer
        self._process: ServerProcess | None = None
        self._client: Client | None = None
        self._form: Form | None = None
        self._reader: Reader | None = None
        self._counts_n = True  # whether the server gives as many choices as it is asked for
        self._nobody = 0
        self._said: set[str] = set()
        self.found: dict[str, Any] = {}

    @cached_property
    def tokenizer(self) -> Any:
        """None of a model that is not here and is asked with messages alone: the server has its own."""
        if self._tokenizer is None and self.tokens == "chat" and not os.path.isdir(self._first):
            return None
        return load_tokenizer(self._first) if self._tokenizer is None else self._tokenizer

    @property
    def key(self) -> Mapping[str, Any]:
        """What is asked for. Where the server is does not count, and what it turned out to be is in `found`."""
        return {"engine": "openai", "model": self.model or self.policy, "tokens": self.tokens,
                "template": digest(getattr(self.tokenizer, "chat_template", None)),
                **({} if self.policy == self._first else {"weights": self.policy})}  # fmt: skip

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """All that differ in the seed and in k alone: one request to the server, for as many choices."""
        groups: dict[Any, list[Request]] = {}
        for request in requests:  # an id and a source stand for their prompt
            name = replace(request, k=0, seed=0, prompt="", prompt_ids=())
            groups.setdefault(name, []).append(request)
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
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        future = self._started().submit(self._all(requests, answers.put))
        future.add_done_callback(lambda _: answers.put(None))
        try:
            while (answer := answers.get()) is not None:
                yield answer
            future.result()
        finally:
            future.cancel()

    def update(self, folder: str | os.PathLike[str]) -> str:
        """From the next request on the server has the weights in the folder, a whole checkpoint that it sees.

        Loaded by what its engine has for that (server_refresh.py); else a server of `command` is started anew with the
        folder. Says which of both it was. That it serves the new weights is seen from its log-probabilities alone:
        `check_sampler`. ConfigError for a server that can do neither, TrainingError where nobody answers. Not while it
        is asked.
        """
        folder = os.path.abspath(folder)
        if not os.path.exists(os.path.join(folder, "config.json")):
            raise ConfigError(f"{folder} has no config.json: a server is given a whole checkpoint, an adapter merged")
        if self._client is None and self.command is not None:  # the server is started when it is first asked
            self.policy = folder
            return "started with it"
        client = self._started()
        if self._reloads is None:
            self._reloads = reloads(self.found.get("engine") or client.submit(self._listed()).result()[0])
        said = []
        for way in self._reloads:
            try:
                client.submit(way.tell(client, folder)).result()
            except Unanswered as error:
                if error.nobody or error.status == "timeout":
                    raise TrainingError(f"no server answers at {', '.join(self.urls)}: {error.said}") from None
                said.append(f"{way.path}: {error.raw[:200]}")
                continue
            self.policy, self._reloads = folder, (way,)
            return f"loaded by {way.path}"
        why = "; ".join(said) or "it has no way of loading weights that fastpo knows"
        if self.command is None or len(self.urls) > 1:
            raise ConfigError(
                f"the server at {', '.join(self.urls)} cannot be given new weights ({why}): start vLLM with "
                "VLLM_SERVER_DEV_MODE=1, or SGLang, or give sample.command with one address"
            )
        self._say("restart", "sample: the server is started anew for new weights, because it loads none (%s)", why)
        self._reloads = ()
        process, self._process = self._process, None
        if process is not None:
            process.close()
        self.policy = folder
        self._process = self._start_process()
        if self._form is not None:
            self.model = self.found["model"] = self._named or folder
        return "started anew"

    def close(self) -> None:
        """Closes connections, and ends the server that it started."""
        client, self._client = self._client, None
        process, self._process = self._process, None
        try:
            if client is not None:
                client.close()
        finally:
            if process is not None:
                process.close()

    # ---- what the server can do

    def _started(self) -> Client:
        if self._client is None:
            if self.command is not None:
                self._process = self._start_process()
            self._client = Client(self.urls, lost=self._check_process, **self._of_client)  # type: ignore[arg-type]
        return self._client

    def _start_process(self) -> ServerProcess:
        assert self.command is not None
        return ServerProcess(self.command, self.policy, self.urls[0], self.log_path, timeout=self.start_timeout)

    async def _probe(self, request: Request) -> None:
        """Finds with one request, of two tokens, how this server is asked: the first way that it takes."""
        assert self._client is not None
        engine, listed = await self._listed()
        self.model = self.model or (self.policy if self.command else listed) or self.policy
        asked, refusals, strict = replace(request, max_tokens=2), [], False
        for form in forms(self.tokens, request):
            if strict and form.dialect != "transformers":  # it refuses every field that it does not know
                continue
            body = form.body(asked, 1, self.model, self._text(asked, form), self._more_ends)
            try:
                answer = await self._client.post(form.path, body, attempts=2)
            except Unanswered as error:
                if error.nobody or error.status == "timeout":
                    raise ConfigError(f"no server answers at {', '.join(self.urls)}: {error.said}") from None
                if error.code in (401, 403):
                    raise ConfigError(f"{self.urls[0]} refuses the api_key: {error.raw}") from None
                strict |= "Unexpected fields in the request" in error.said
                refusals.append(f"{form.path} with {form.says}: {error.raw[:200]}")
                continue
            choices, seen = answer.get("choices"), _prompt_tokens(answer)
            if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
                refusals.append(f"{form.path} with {form.says}: no choices in {json.dumps(answer)[:200]}")
            elif form.ids and seen is not None and seen != len(request.prompt_ids):
                refusals.append(f"{form.path} with token ids: {len(request.prompt_ids)} ids became {seen} tokens")
            else:
                self._settle(form, "transformers" if form.dialect == "transformers" else engine, choices[0])
                self._compare_prompt(seen, request)
                return
        raise ConfigError(f"{self.urls[0]} takes no request that fastpo knows: {'; '.join(refusals) or 'none fits'}")

    def _settle(self, form: Form, engine: str, first: Mapping[str, Any]) -> None:
        ids, logps = sampled_tokens(first)
        self._form = form
        self._reader = Reader({*self._own_ends, *self._more_ends}, engine in _RAW_LOGPS)
        prompt = "ids" if form.ids else "messages" if form.chat else "text"
        self.found = {"engine": engine, "model": self.model, "prompt": prompt, "logps": logps is not None,
                      "tokens": "ids" if form.ids and ids else "text"}  # fmt: skip
        where = f"sample: {engine} at {', '.join(self.urls)}, model {self.model}"
        if self.found["tokens"] == "ids":
            log.info("%s: token ids in and out%s", where, "" if logps else ", without log-probabilities")
        elif self.tokenizer is None:
            log.info("%s: messages", where)
        else:
            why = f"its prompt is {'messages' if form.chat else 'a text'}" if ids else "it gives no token ids"
            log.warning(
                "%s: the samples are not exact to the token, because %s%s", where, why,
                "" if ids else "; training tokenises the texts anew",
            )  # fmt: skip

    @cached_property
    def _own_ends(self) -> list[int]:
        if self.tokenizer is None:
            return []
        try:
            settings = GenerationConfig.from_pretrained(self._first)
        except (OSError, ValueError):  # a policy without such a file
            settings = None
        return end_ids(settings, self.tokenizer)

    @cached_property
    def _more_ends(self) -> list[int]:
        """The tokens with which the chat template ends the assistant's turn, where the server does not know them."""
        if not getattr(self.tokenizer, "chat_template", None):
            return []
        found = {token for token in Encoder(self.tokenizer, True).ending_ids if token is not None}
        return sorted(found - {*self._own_ends})

    async def _listed(self) -> tuple[str, str | None]:
        """(engine, model) of the server's list of models, as far as it says."""
        assert self._client is not None
        try:
            first = (await self._client.get("/models"))["data"][0]
            return _OWNERS.get(str(first.get("owned_by")).lower(), "openai"), str(first["id"])
        except (LookupError, TypeError, AttributeError):
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
            if len(choices) == 1:
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

    async def _choices(self, request: Request, n: int) -> list[Any] | Failure:
        """What came of n samples, in the order of their index; or why nothing did, after all attempts."""
        assert self._client is not None and self._form is not None and self.model is not None
        body = self._form.body(request, n, self.model, self._text(request, self._form), self._more_ends)
        try:
            answer = await self._client.post(self._form.path, body)
        except Unanswered as error:
            self._nobody = self._nobody + 1 if error.nobody else 0
            if self._nobody >= _NOBODY:
                raise TrainingError(
                    f"no server answers any more at {', '.join(self.urls)}: {error.said}; start it, and start again: "
                    "what there is of responses is kept"
                ) from None
            return Failure(error.status, error.raw)
        self._nobody = 0
        choices = answer.get("choices")
        if not isinstance(choices, list):
            return Failure("unparsed", json.dumps(answer)[:500])
        self._compare_prompt(_prompt_tokens(answer), request)
        return sorted(choices, key=_index)

    def _read(self, choice: Any, request: Request) -> Response | Failure:
        assert self._reader is not None
        answer = self._reader.read(choice, request)
        if self.found["tokens"] == "ids" and isinstance(answer, Response) and answer.token_ids is None:
            self._say("ids", "sample: of some responses the server gives no token ids, or not that of their end; these "
                      "are texts, which training tokenises anew")  # fmt: skip
        return answer

    def _check_process(self) -> None:
        """TrainingError where the server that was started has ended."""
        died = self._process.died() if self._process is not None else None
        if died is not None:
            raise TrainingError(f"sample.command: {died}")

    # ---- prompts

    def _text(self, request: Request, form: Form) -> str:
        """The prompt as the text of its ids, for a form that asks with one. Of a first BOS that the server adds again,
        which it does unless it is told not to, the text has none."""
        if form.ids or form.chat:
            return ""
        whole = self.tokenizer.decode(list(request.prompt_ids), skip_special_tokens=False)
        bos = getattr(self.tokenizer, "bos_token", None)
        if form.dialect != "extended" and bos and whole.startswith(bos) and self._adds_bos:
            return whole.removeprefix(bos)
        return whole

    @cached_property
    def _adds_bos(self) -> bool:
        return self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]

    def _compare_prompt(self, seen: int | None, request: Request) -> None:
        if seen is not None and self.tokenizer is not None and seen != len(request.prompt_ids):
            self._say(
                "prompt", "sample: the server counts %d tokens in a prompt where the policy's tokenizer has %d (prompt "
                "%s): it has another tokenizer or chat template, or adds special tokens; what it samples is not what "
                "training takes for this prompt's answers", seen, len(request.prompt_ids), request.id,
            )  # fmt: skip

    def _say(self, what: str, message: str, *values: object) -> None:
        if what not in self._said:
            self._said.add(what)
            log.warning(message, *values)


def _index(choice: Any) -> int:
    found = choice.get("index") if isinstance(choice, Mapping) else None
    return found if isinstance(found, int) else 0


def _prompt_tokens(answer: Mapping[str, Any]) -> int | None:
    usage = answer.get("usage")
    found = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
    return found if isinstance(found, int) and found > 0 else None
