"""What is sent to an OpenAI-compatible server and what its choices say, in the forms that servers have.

Every setting that decides the distribution is sent, the neutral ones too: vLLM and SGLang take what is left out from
the checkpoint's generation_config.json, llama.cpp from its own defaults. Token ids come back in one of three places:
the choice's `token_ids` (vLLM, SGLang, of `return_token_ids`), the log-probabilities' tokens written "token_id:123"
(vLLM, of `return_tokens_as_token_ids`), or their `id` (llama.cpp).
"""

import json
import math
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastpo.errors import ConfigError
from fastpo.sampling.drawing import before_stop
from fastpo.sampling.items import Failure, Request, Response

_ID = "token_id:"
# What they add to OpenAI's fields; servers that know none of them ignore them, or refuse the request.
_IDS = {"return_token_ids": True, "return_tokens_as_token_ids": True}


@dataclass(frozen=True)
class Form:
    """One way to ask."""

    chat: bool = False  # /chat/completions, else /completions
    ids: bool = False  # the prompt as token ids
    dialect: str = "plain"  # "extended": with the fields of vLLM, SGLang and llama.cpp; "transformers": of its `serve`

    @property
    def path(self) -> str:
        return "/chat/completions" if self.chat else "/completions"

    @property
    def says(self) -> str:
        fields = {"extended": " and further fields", "plain": "", "transformers": " and generation_config"}
        return ("token ids" if self.ids else "messages" if self.chat else "a text") + fields[self.dialect]

    def body(self, request: Request, n: int, model: str, text: str, stop_ids: Sequence[int] = ()) -> dict[str, Any]:
        """The JSON of n samples of a request. `text`: its prompt as a text. `stop_ids`: ends unknown to the server."""
        if self.dialect == "plain" and (further := _further(request)):
            raise ConfigError(
                f"sample.{further[0]}: this server takes OpenAI's fields alone, which have none; leave it out"
            )
        body: dict[str, Any] = {
            "model": model, "n": n, "max_tokens": request.max_tokens, "temperature": request.temperature,
            "top_p": request.top_p, "seed": request.seed,
        }  # fmt: skip
        if request.stop:
            body["stop"] = list(request.stop)
        if self.chat:
            body |= {"messages": self._messages(request), "logprobs": True}
        else:
            body |= {"prompt": list(request.prompt_ids) if self.ids else text, "logprobs": 1}
        if self.dialect == "extended":
            body |= {"top_k": request.top_k or -1, "min_p": request.min_p,
                     "repetition_penalty": request.repetition_penalty, **_IDS}  # fmt: skip
            if self.chat:  # SGLang's, which has the ids of its log-probabilities there
                body["return_meta_info"] = True
            if stop_ids:
                body["stop_token_ids"] = list(stop_ids)
            if not (self.ids or self.chat):
                body["add_special_tokens"] = False
        elif self.dialect == "transformers":
            # Its temperature alone does not make it sample, and it has no top_k; logprobs and n it ignores.
            settings: dict[str, Any] = {"do_sample": request.temperature > 0, "top_k": request.top_k,
                                        "min_p": request.min_p or None,
                                        "repetition_penalty": request.repetition_penalty}  # fmt: skip
            if request.temperature == 0:  # with which it would be refused
                del body["temperature"], body["top_p"], settings["top_k"], settings["min_p"]
            body["generation_config"] = json.dumps(settings)
            for name in ("logprobs", "n"):
                del body[name]
        return body

    def _messages(self, request: Request) -> list[dict[str, str]]:
        if isinstance(request.prompt, str):
            raise ConfigError("the server is asked with messages, and the prompts are texts: give them as turns")
        if request.prompt and request.prompt[-1]["role"] == "assistant":
            raise ConfigError("the server is asked with messages, and a prompt ends in the assistant's turn")
        return [dict(turn) for turn in request.prompt]


def forms(tokens: str, request: Request) -> list[Form]:
    """Those of a mode ("auto", "ids", "text", "chat") that can ask for a request, the best first."""
    dialects = ("extended", *(() if _further(request) else ("plain",)), "transformers")
    ids = [Form(ids=True, dialect=dialect) for dialect in dialects[:-1]]
    text = [Form(dialect=dialect) for dialect in dialects]
    chat = [Form(chat=True, dialect=dialect) for dialect in dialects]
    if tokens == "auto" and (isinstance(request.prompt, str) or request.prompt[-1]["role"] == "assistant"):
        chat = []
    return {"ids": ids, "text": text, "chat": chat, "auto": [*ids, *text, *chat]}[tokens]


def _further(request: Request) -> list[str]:
    """The settings of a request that OpenAI's fields do not have."""
    asked = {"top_k": request.top_k > 0, "min_p": request.min_p > 0,
             "repetition_penalty": request.repetition_penalty != 1}  # fmt: skip
    return [name for name, is_so in asked.items() if is_so]


THOUGHTS = "thoughts"  # in the meta of a response: what a server gives apart from the text
_THOUGHTS = ("reasoning_content", "reasoning")  # as vLLM, SGLang, DeepSeek and others call it


@dataclass(frozen=True)
class Reader:
    """Choices to responses."""

    ends: Collection[int]  # tokens that end the policy's answers
    raw_logps: bool  # whether the server's log-probabilities are of the policy as it is, at any temperature

    def read(self, choice: Any, request: Request) -> Response | Failure:
        """A response of a choice as it came, or why it is none; nothing is added to it."""
        if not isinstance(choice, Mapping):
            return Failure("unparsed", str(choice)[:500])
        message = choice.get("message") or {}
        text = choice.get("text", message.get("content"))
        reason = choice.get("finish_reason")
        if reason == "content_filter" or message.get("refusal"):
            return Failure("refused", str(message.get("refusal") or "content_filter")[:500])
        if reason not in ("stop", "length"):
            return Failure("unparsed", f"finish_reason {reason!r}, text {str(text)[:300]!r}")
        ids, logps = sampled_tokens(choice)
        # An empty answer that the server calls ended is one: the policy ended at once.
        if not isinstance(text, str) or not (text or ids or reason == "stop"):
            return Failure("unparsed", f"no text, finish_reason {reason!r}")
        finished = reason == "stop" or (bool(ids) and ids[-1] in self.ends)
        # The end was sampled and is not among the ids: so they are not all that was sampled.
        if ids and finished and ids[-1] not in self.ends and not _by_stop_string(choice, request, text):
            ids, logps = None, None
        neutral = request.temperature == 1 and request.top_p == 1 and not _further(request)
        if not (ids and (self.raw_logps or neutral)):
            logps = None
        logp = None if logps is None or any(map(math.isnan, logps)) else sum(logps)
        thoughts = next((t for name in _THOUGHTS if isinstance(t := message.get(name), str) and t.strip()), None)
        return Response(before_stop(text, request.stop), None if ids is None else tuple(ids), finished, logp,
                        request.source, meta={} if thoughts is None else {THOUGHTS: thoughts},
                        token_logps=None if logps is None else array("d", logps))  # fmt: skip


def sampled_tokens(choice: Mapping[str, Any]) -> tuple[list[int] | None, list[float] | None]:
    """(ids, log-probability of each) as far as a choice has them; both of one length, or None. NaN where a server that
    gives log-probabilities gives none for a token."""
    ids = choice.get("token_ids")
    if ids is None and isinstance(choice.get("message"), Mapping):
        ids = choice["message"].get("token_ids")
    found = choice.get("logprobs") or {}
    content = found.get("content") if isinstance(found, Mapping) else None
    if isinstance(content, Sequence) and content:  # of chats, and of llama.cpp
        tokens = [entry.get("token") for entry in content]
        logps = [entry.get("logprob") for entry in content]
        if ids is None and all(type(entry.get("id")) is int for entry in content):
            ids = [entry["id"] for entry in content]
    else:
        tokens = (found.get("tokens") if isinstance(found, Mapping) else None) or []
        logps = (found.get("token_logprobs") if isinstance(found, Mapping) else None) or []
    if ids is None and tokens and all(isinstance(t, str) and t[len(_ID) :].isdecimal() for t in tokens):
        ids = [int(t.removeprefix(_ID)) for t in tokens] if all(t.startswith(_ID) for t in tokens) else None
    meta = choice.get("meta_info")
    triples = meta.get("output_token_logprobs") if isinstance(meta, Mapping) else None
    if isinstance(triples, Sequence) and triples and all(isinstance(t, Sequence) and len(t) >= 2 for t in triples):
        logps = [t[0] for t in triples]  # SGLang's: (log-probability, id, text)
        ids = [t[1] for t in triples] if ids is None else ids
    if not (isinstance(ids, list) and ids and all(type(i) is int for i in ids)):
        return None, None
    numbers = [float(x) if isinstance(x, int | float) and not isinstance(x, bool) else math.nan for x in logps]
    return ids, numbers if len(numbers) == len(ids) and not all(map(math.isnan, numbers)) else None


def _by_stop_string(choice: Mapping[str, Any], request: Request, text: str) -> bool:
    """Whether an answer ended at one of the stop strings: as vLLM and SGLang say, or as the text shows."""
    why = choice.get("stop_reason", choice.get("matched_stop"))
    return (isinstance(why, str) and why in request.stop) or any(s in text for s in request.stop)
