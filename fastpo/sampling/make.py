"""Which sampler answers for a policy, and the ids of a prompt as the policy sees them."""

import contextlib
import gc
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch

from fastpo.data.encoding import Encoder
from fastpo.errors import ConfigError, did_you_mean, quoted
from fastpo.sampling.items import Prompt, Sampler
from fastpo.sampling.local_sampler import LOADING, LocalSampler
from fastpo.sampling.ray_sampler import RaySampler
from fastpo.sampling.servers import ServerSampler

_ENGINES: Mapping[str, type] = {"local": LocalSampler, "openai": ServerSampler, "ray": RaySampler}
_AT_ONCE = 4096  # prompts that go to the tokenizer together
# Arguments that are not the user's to set.
_OURS = ("self", "model", "policy", "tokenizer", "log_path", "loading", "processor")


class Section(Protocol):
    """What says which sampler it is: an engine's name and its options."""

    @property
    def engine(self) -> str: ...
    @property
    def options(self) -> Mapping[str, Any]: ...


def make_sampler(
    sample: Section, policy: str | os.PathLike[str], tokenizer: Any = None, folder: Path | str = "."
) -> Sampler:
    """The sampler that `sample.engine` names, with `sample.options`, of a policy by name or path.

    folder: of the log of a server that it starts. ConfigError names an engine or an option that there is not.
    """
    check_options(sample)
    options = dict(sample.options)
    if sample.engine == "local":
        return LocalSampler(policy, tokenizer, **options)
    if sample.engine == "ray":
        return RaySampler(policy, tokenizer, **options)
    if "base_url" not in options:
        raise ConfigError("sample.engine=openai needs sample.base_url, the address of a server, up to and with /v1")
    return ServerSampler(policy, tokenizer, log_path=Path(folder) / "server.log", **options)


def check_options(sample: Section, where: str = "sample") -> None:
    """ConfigError for an engine that there is not, and for an option that neither it nor the section has."""
    if sample.engine not in _ENGINES:
        near = did_you_mean(sample.engine, _ENGINES)
        raise ConfigError(f"{where}.engine={sample.engine!r}: expected one of {quoted(_ENGINES)}{near}")
    known = [name for name in inspect.signature(_ENGINES[sample.engine]).parameters if name not in _OURS]
    known += {"local": LOADING, "openai": ("model",)}.get(sample.engine, ())
    for name in sample.options:
        if name not in known:
            others = [n for n in _ENGINES if n != sample.engine and name in inspect.signature(_ENGINES[n]).parameters]
            near = did_you_mean(name, [*getattr(sample, "__dict__", ()), *known])
            of = f" (it is one of {where}.engine={others[0]})" if others else near
            raise ConfigError(f"{where}.{name}: {where}.engine={sample.engine} has no such option{of}")


@contextlib.contextmanager
def lent(made: Sampler) -> Iterator[Sampler]:
    """A sampler that is closed at the end, and its memory free."""
    try:
        yield made
    finally:
        made.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def prompt_ids(tokenizer: Any, prompt: Prompt, template_kwargs: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    """The ids of a prompt up to the answer, the same that training has for it.

    Turns go through the chat template with the generation prompt, or are continued where the last is the assistant's;
    a text gets the special tokens that the tokenizer puts before a text. DataError where the template refuses it.
    """
    return prompts_ids(tokenizer, [prompt], template_kwargs)[0]


def prompts_ids(
    tokenizer: Any, prompts: Sequence[Prompt], template_kwargs: Mapping[str, Any] | None = None
) -> list[tuple[int, ...]]:
    """Those of many, a few thousand at a time."""
    out: list[tuple[int, ...]] = [()] * len(prompts)
    template = str(getattr(tokenizer, "chat_template", None))
    for text in (True, False):
        places = [k for k, prompt in enumerate(prompts) if isinstance(prompt, str) is text]
        for start in range(0, len(places), _AT_ONCE):
            some = places[start : start + _AT_ONCE]
            found = _encoder(tokenizer, not text, template).prompt_ids(
                [prompts[k] for k in some], template_kwargs or {}
            )
            for k, ids in zip(some, found, strict=True):
                out[k] = tuple(ids)
    return out


@lru_cache(maxsize=4)
def _encoder(tokenizer: Any, conversational: bool, template: str) -> Encoder:
    """Kept, because it looks into the tokenizer first. template: for one that is set anew."""
    return Encoder(tokenizer, conversational)
