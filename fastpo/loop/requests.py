"""What is asked of a sampler in an iteration: of every prompt `n` responses, and those of further sources."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastpo.errors import ConfigError, did_you_mean
from fastpo.loop.config import Refine, Sample
from fastpo.sampling.items import POLICY, Item, Prompt, Request, Response, seed_of

EncodeAll = Callable[[Sequence[Prompt]], list[tuple[int, ...]]]
_KEYS = ("source", "n", "temperature", "top_p", "top_k", "max_tokens", "stop", "prefix", "contrast_prefix", "contrast")


def requests_of(items: Sequence[Item], sample: Sample, encode_all: EncodeAll, *seed: Any) -> list[Request]:
    """In the order of the prompts; `seed` and the request's name seed each."""
    sources: list[dict[str, Any]] = [{"source": POLICY, "n": sample.n}] if sample.n else []
    sources += [_checked(spec) for spec in sample.sources]
    known: dict[str, list[tuple[int, ...]]] = {}  # by prefix

    def ids_after(prefix: str) -> list[tuple[int, ...]]:
        if prefix not in known:
            there = [item.prompt_ids for item in items if item.prompt_ids is not None and not prefix]
            prompts = [prefixed(item.prompt, prefix) for item in items]
            known[prefix] = there if len(there) == len(items) else encode_all(prompts)
        return known[prefix]

    out = []
    for place, item in enumerate(items):
        for spec in sources:
            prefix, other = spec.get("prefix", ""), spec.get("contrast_prefix")
            prompt, ids = prefixed(item.prompt, prefix), ids_after(prefix)[place]
            contrast = None if other is None else ids_after(other)[place]
            for k in range(int(spec.get("n", 1))):
                out.append(
                    Request(
                        item.id, k, spec["source"], prompt, ids, seed_of(*seed, item.id, spec["source"], k),
                        spec.get("temperature", sample.temperature), spec.get("top_p", sample.top_p),
                        spec.get("top_k", sample.top_k), spec.get("max_tokens", sample.max_tokens),
                        tuple(spec.get("stop", sample.stop)), contrast, float(spec.get("contrast", 0.0)),
                    )
                )  # fmt: skip
    return out


def refinements(
    items: Sequence[Item], answers: Mapping[str, Sequence[Response]], round_: int, refine: Refine, sample: Sample,
    encode_all: EncodeAll, *seed: Any,
) -> list[Request]:  # fmt: skip
    """A better answer is asked for to every answer of the round before: (x, y, z)."""
    before = POLICY if round_ == 1 else f"refined-{round_ - 1}"
    temperature = sample.temperature if refine.temperature is None else refine.temperature
    asked = [(item.id, k, refined_prompt(item.prompt, answer.text, refine.template)) for item in items
             for k, answer in enumerate(r for r in answers.get(item.id, ()) if r.source == before)]  # fmt: skip
    out = []
    for (name, k, prompt), ids in zip(asked, encode_all([prompt for *_, prompt in asked]), strict=True):
        source = f"refined-{round_}"
        out.append(
            Request(name, k, source, prompt, ids, seed_of(*seed, name, source, k), temperature, sample.top_p,
                    sample.top_k, sample.max_tokens, tuple(sample.stop))
        )  # fmt: skip
    return out


def refined_prompt(prompt: Prompt, answer: str, template: str) -> Prompt:
    """(x, y, z): what asks for a better answer than `answer`."""
    if isinstance(prompt, str):
        return f"{prompt}{answer}{template}"
    return [*prompt, {"role": "assistant", "content": answer}, {"role": "user", "content": template}]


def prefixed(prompt: Prompt, prefix: str) -> Prompt:
    """The prompt after an instruction: before a text, in the system's turn of a conversation."""
    if not prefix:
        return prompt
    if isinstance(prompt, str):
        return f"{prefix}{prompt}"
    if prompt and prompt[0]["role"] == "system":
        return [{"role": "system", "content": f"{prefix}\n\n{prompt[0]['content']}"}, *prompt[1:]]
    return [{"role": "system", "content": prefix}, *prompt]


def _checked(spec: Mapping[str, Any]) -> dict[str, Any]:
    for name in spec:
        if name not in _KEYS:
            raise ConfigError(f"sample.sources: no option {name!r}{did_you_mean(str(name), _KEYS)}")
    return dict(spec)
