"""What passes between the stages of an iteration: prompts, responses, what is asked of scorers, and their verdicts.

A failed judgement is None everywhere, never a number. Everything here can be written to a line of JSON and read back.
"""

import hashlib
import json
import math
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

Turn = Mapping[str, str]
Prompt = str | Sequence[Turn]  # a text, or turns with role and content
POLICY = "policy"  # the source of a response that the current policy gave as it is


@dataclass(frozen=True, slots=True)
class Response:
    """One answer to a prompt."""

    text: str
    token_ids: Sequence[int] | None = None  # as sampled, the end included; None for a text from outside
    finished: bool = True  # ended by itself, not by max_tokens
    logp: float | None = None  # sum over token_ids, the sampler's own
    source: str = POLICY  # "greedy", "refined-2", "gold", "negative", "iterate-1"
    count: int = 1  # how often it was given
    meta: Mapping[str, Any] = field(default_factory=dict)  # JSON: what a sampler notes of it; `parent` of a refinement
    # Of each of token_ids, the sampler's own, untempered; NaN where a server gave none for it; None: not known. `logp`
    # is their sum. Not compared: NaN is not equal to itself, and files of samples leave them out.
    token_logps: Sequence[float] | None = field(default=None, compare=False)

    def to_json(self) -> dict[str, Any]:
        given = {"text": self.text, "token_ids": None if self.token_ids is None else list(self.token_ids),
                 "finished": self.finished, "logp": self.logp, "source": self.source}  # fmt: skip
        given |= ({"count": self.count} if self.count > 1 else {}) | ({"meta": self.meta} if self.meta else {})
        if self.token_logps is not None:  # JSON has no NaN
            given["token_logps"] = [None if math.isnan(x) else x for x in self.token_logps]
        return given

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> "Response":
        ids, logps = line.get("token_ids"), line.get("token_logps")
        return cls(line["text"], None if ids is None else _compact(ids), line.get("finished", True), line.get("logp"),
                   line.get("source", POLICY), line.get("count", 1), line.get("meta", {}),
                   None if logps is None else array("d", [math.nan if x is None else x for x in logps]))  # fmt: skip


def _compact(ids: Sequence[int]) -> Sequence[int]:
    """A hundred ids are 200 or 400 bytes so, and 3,600 as Python's integers."""
    try:
        return array("H", ids)
    except OverflowError:  # a vocabulary of more than 65,536
        return array("i", ids)


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt, its responses, and what is known of it."""

    id: str
    prompt: Prompt
    prompt_ids: tuple[int, ...] | None = None  # as the policy sees it: the template applied, up to the answer
    responses: tuple[Response, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)  # the other columns of the prompt: answer, reference_text

    def with_responses(self, responses: Sequence[Response]) -> "Item":
        return replace(self, responses=tuple(responses))


@dataclass(frozen=True, slots=True)
class Request:
    """One response that is asked of a sampler; (id, source, k) names it."""

    id: str  # of the prompt
    k: int  # which of the responses of this source
    source: str
    prompt: Prompt  # with the variant's prefix, if it has one
    prompt_ids: tuple[int, ...]  # the same as the policy sees it
    seed: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    contrast_ids: tuple[int, ...] | None = None  # logits are mixed with those after this other prompt:
    contrast: float = 0.0  # (1 - contrast) logits(prompt_ids) + contrast logits(contrast_ids)
    min_p: float = 0.0  # tokens below this share of the likeliest one's probability are left out; 0: none
    repetition_penalty: float = 1.0  # of tokens of the prompt and the response: a logit l is l / it, or l * it below 0

    @property
    def unit(self) -> tuple[str, str, int]:
        return (self.id, self.source, self.k)


@dataclass(frozen=True, slots=True)
class Failure:
    """A response or a judgement that could not be had."""

    status: str  # "refused", "unparsed", "timeout", "error"
    raw: str = ""  # what came instead


class Sampler(Protocol):
    """Gives responses. `key` is JSON: all that decides what it gives, but the requests."""

    exact: bool  # the same requests give the same bytes, whenever and with whatever others they are asked

    @property
    def key(self) -> Mapping[str, Any]: ...

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """The requests as they are best asked together: a plan that depends on nothing but the requests."""

    def sample(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Response | Failure]]:
        """A response or a failure to each, in any order, as they come."""

    def close(self) -> None:
        """Let go of the model, of the connection, of the server that it started."""


@runtime_checkable
class Refresh(Protocol):
    """A sampler that is given new weights while it runs."""

    def update(self, folder: str | os.PathLike[str]) -> str:
        """From the next request on it has the weights in the folder; says how it came to them in a few words."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What is asked of a scorer about one item: a response (i), a pair (i shown first, j second), or all (neither)."""

    item: Item
    i: int | None = None
    j: int | None = None

    @property
    def key(self) -> tuple[str, int | None, int | None]:
        return (self.item.id, self.i, self.j)

    @property
    def responses(self) -> tuple[Response, ...]:
        """In the order in which they are shown."""
        if self.i is None:
            return self.item.responses
        return tuple(self.item.responses[k] for k in (self.i, self.j) if k is not None)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A scorer's answer to one unit: a number (of a response, or P(first beats second)), or one of each response."""

    value: float | tuple[float | None, ...] | None  # None: failed
    status: str = "ok"  # else as Failure's
    raw: str = ""  # what the judge said

    @classmethod
    def failed(cls, status: str, raw: str = "") -> "Verdict":
        return cls(None, status, raw)


class Scorer(Protocol):
    """Judges. `key` is JSON: all that decides its verdicts, but the units."""

    name: str
    unit: Literal["response", "pair", "list"]
    # response: any real number, higher is better; pair: P(first beats second), in [0, 1]; list: one number a response

    @property
    def key(self) -> Mapping[str, Any]: ...

    def score(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Verdict]]:
        """A verdict on each, in any order, as they come."""

    def close(self) -> None:
        """Let go of models and connections."""


@dataclass
class Scores:
    """What is known of one item's K responses: numbers, win probabilities, or both; None where a judgement failed."""

    values: list[float | None]  # [K]
    wins: list[list[float | None]] | None = None  # [K, K]: P(row beats column); None: not asked, or failed
    spread: list[float | None] | None = None  # [K]: standard deviation over an ensemble
    agreement: list[float] = field(default_factory=list)  # of pairs asked in both orders: |p_ab - (1 - p_ba)|

    def win_prob(self, k: int, counts: Sequence[int] | None = None, *, itself: bool = True) -> float | None:
        """Mean P(k beats one of the others), each as often as it was given; with a half for itself, or without."""
        if self.wins is None:
            return None
        total, weight = 0.0, 0
        for j, p in enumerate(self.wins[k]):
            of_it = counts[j] if counts else 1
            if j == k:
                times, p = (of_it if itself else of_it - 1), 0.5
            else:
                times = of_it
            if times and p is not None:
                total, weight = total + times * p, weight + times
        return total / weight if weight else None


@dataclass(frozen=True)
class Dropped:
    """A prompt of which no row is made, and why: a few words, which are counted."""

    reason: str


_canonical = json.JSONEncoder(sort_keys=True).encode  # made once: json.dumps with an option makes it at every call


def digest(value: Any) -> str:
    """SHA-256 of a value of JSON, in hexadecimal; the order of keys does not count."""
    return hashlib.sha256(_canonical(value).encode()).hexdigest()


def seed_of(*parts: Any) -> int:
    """A seed in [0, 2^31) from anything of JSON."""
    return int(digest(parts)[:8], 16) >> 1


def prompt_text(prompt: Prompt) -> str:
    """A prompt as people and judges read it: the text, or the content of each turn after its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
