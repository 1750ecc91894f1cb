"""Requests to a sampler: the ids of prompts as the policy sees them, and the rounds of refinement."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastpo.data.encoding import Encoder
from fastpo.data.report import DataReport
from fastpo.data.rows import InvalidRow, Row
from fastpo.errors import ConfigError, DataError
from fastpo.loop.items import POLICY, Item, Prompt, Request, Turn, seed_of

_CHUNK = 1000  # prompts that are tokenised in one call
# In the place of an answer: what a template writes of the prompt before one.
_ANSWER: Sequence[Turn] = ({"role": "assistant", "content": "a"},)


def prompt_ids(
    tokenizer: Any, prompt: Prompt, prefix: str | None = None, template_kwargs: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """The ids of a prompt up to the answer, the same that training has for it; `prefix` goes before it (with_prefix).

    Turns go through the chat template with the generation prompt, or are continued where the last is the assistant's;
    a text gets the special tokens that the tokenizer puts before a text. DataError where the template refuses it.
    """
    return encode_prompts(tokenizer, [with_prefix(prompt, prefix)], template_kwargs)[0]


def encode_prompts(
    tokenizer: Any, prompts: Sequence[Prompt], template_kwargs: Mapping[str, Any] | None = None
) -> list[tuple[int, ...]]:
    """`prompt_ids` of many, texts and turns in any order."""
    out: list[tuple[int, ...]] = [()] * len(prompts)
    for conversational in (False, True):
        places = [i for i, prompt in enumerate(prompts) if isinstance(prompt, str) is not conversational]
        if not places:
            continue
        encoder, report = Encoder(tokenizer, conversational), DataReport()
        answers = (_ANSWER,) if conversational else ()
        for start in range(0, len(places), _CHUNK):
            part = places[start : start + _CHUNK]
            rows = [Row(i, prompts[i] if not conversational else list(prompts[i]), answers, dict(template_kwargs or {}))
                    for i in part]  # fmt: skip
            try:
                for i, encoded in zip(part, encoder(rows, report), strict=True):
                    out[i] = tuple(encoded.ids[0])
            except InvalidRow as error:
                raise DataError(f"prompt {str(error).removeprefix('row ')}") from None
    return out


def with_prefix(prompt: Prompt, prefix: str | None) -> Prompt:
    """The prompt with a text before it: of turns in the system turn, before what that says, else before the text."""
    if not prefix:
        return prompt
    if isinstance(prompt, str):
        return prefix + prompt
    if prompt and prompt[0]["role"] == "system":
        return [{**prompt[0], "content": f"{prefix}\n\n{prompt[0]['content']}"}, *prompt[1:]]
    return [{"role": "system", "content": prefix}, *prompt]


def refinement(prompt: Prompt, answer: str, template: str) -> Prompt:
    """(x, y, z): the prompt, an answer to it, and what asks for a better one.

    Of turns, `template` is the user's next turn. Of a text, it is the whole new prompt and must hold `{response}`, and
    `{prompt}` where it repeats that. Both words are replaced in both.
    """
    if isinstance(prompt, str):
        if "{response}" not in template:
            raise ConfigError(
                "the prompts are texts, so the template of refinements must say where the answer goes: write {response} "
                "into it, and {prompt}"
            )
        return _filled(template, {"prompt": prompt, "response": answer})
    words = {"response": answer, "prompt": str(prompt[-1]["content"]) if prompt else ""}
    return [*prompt, {"role": "assistant", "content": answer}, {"role": "user", "content": _filled(template, words)}]


def _filled(template: str, words: Mapping[str, str]) -> str:
    """Each {word} replaced once; what is put in is not read again, and other braces stay."""
    first, *rest = template.split("{")
    out = [first]
    for piece in rest:
        name, closed, after = piece.partition("}")
        out.append(words[name] + after if closed and name in words else "{" + piece)
    return "".join(out)


def refined(round: int) -> str:
    """The source of the refinements of a round, from 1 on; of round 0, what they refine."""
    return f"refined-{round}" if round else POLICY


def refine_requests(
    items: Sequence[Item], template: str, round: int, *, tokenizer: Any, seed: int,
    template_kwargs: Mapping[str, Any] | None = None, **settings: Any,
) -> tuple[list[Request], dict[tuple[str, str, int], dict[str, Any]]]:  # fmt: skip
    """A refinement of every answer of the round before: of the policy's own in round 1, of `refined-1` in round 2.

    `settings` are Request's: temperature, max_tokens, ... Returns the requests, with k the place of the answer among
    those of its round, and by their units what is noted with a response: {"parent": its index in item.responses}.
    Empty answers are not refined.
    """
    asked: list[tuple[Item, int, int, Prompt]] = []
    for item in items:
        parents = [i for i, response in enumerate(item.responses) if response.source == refined(round - 1)]
        for k, i in enumerate(parents):
            if item.responses[i].text.strip():
                asked.append((item, k, i, refinement(item.prompt, item.responses[i].text, template)))
    ids = encode_prompts(tokenizer, [prompt for *_, prompt in asked], template_kwargs)
    source = refined(round)
    requests = [
        Request(item.id, k, source, prompt, own, seed_of(seed, item.id, source, k), **settings)
        for (item, k, _, prompt), own in zip(asked, ids, strict=True)
    ]
    return requests, {request.unit: {"parent": i} for request, (_, _, i, _) in zip(requests, asked, strict=True)}
