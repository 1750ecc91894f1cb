"""Answers of the model to a few prompts of the data, while it trains."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from fastpo.data.prepare import Example
from fastpo.errors import ConfigError, did_you_mean, shown
from fastpo.models.modes import eval_mode
from fastpo.training.forward import Forward
from fastpo.training.memory import is_out_of_memory

MAX_NEW_TOKENS = 128
# What generate() takes too, and what the samples set themselves.
_OWN = {"inputs", "input_ids", "attention_mask", "streamer", "return_dict_in_generate", "num_return_sequences"}

# Numbers of tokens and beams that no device answers with in time.
_COUNTS, _MOST = ("max_new_tokens", "max_length", "num_beams", "num_beam_groups"), 1_000_000


def check_generation_kwargs(kwargs: dict[str, Any] | None) -> None:
    """ConfigError for an argument that generate() does not know, or that the samples set themselves."""
    known = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    for name in kwargs or {}:
        if name in _OWN:
            raise ConfigError(f"generation_kwargs: {name} is set by the samples; leave it out")
        if name not in known:
            raise ConfigError(f"generation_kwargs: generate() has no {shown(name)}{did_you_mean(name, known)}")
    for name in _COUNTS:
        value = (kwargs or {}).get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MOST:
            raise ConfigError(f"generation_kwargs: {name} must be from 1 to {_MOST:,}, not {shown(value)}")
    try:
        GenerationConfig(**kwargs or {}).validate()
    except Exception as error:
        raise ConfigError(f"generation_kwargs: {error}") from error


class Answers:
    """A policy's answers to the first prompts of `examples`, as it gives them at the time."""

    def __init__(self, forward: Forward, tokenizer: Any, examples: Sequence[Example], kwargs: dict[str, Any] | None):
        """kwargs: arguments of generate()."""
        self.forward, self.tokenizer, self.examples, self.kwargs = forward, tokenizer, examples, kwargs

    @torch.no_grad()
    def __call__(self, n: int, kwargs: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """To `n` prompts; with other arguments, if `kwargs` are given. Sharded ranks call it together."""
        policy = self.forward.policy

        def generate() -> list[dict[str, Any]]:
            with policy.detached(), self.forward.autocast():
                given = self.kwargs if kwargs is None else kwargs
                return generate_samples(policy.model, self.tokenizer, self.examples, n, given)

        return self.forward.engine(generate)


def generate_samples(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    n: int,
    kwargs: dict[str, Any] | None = None,
    *,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The model's answers to the first `n` examples' prompts, as JSON types, beside the data's chosen ones.

    Greedy unless `kwargs` (arguments of generate()) say otherwise; sampling is seeded, so that two evaluations differ
    by the model alone. One prompt at a time: padding on the left would change the numbers, and the answers with them.
    The random state, the modules' train and eval modes and the model's configuration are left as they were found.
    """
    kwargs = dict(kwargs or {})
    check_generation_kwargs(kwargs)
    device = model.get_input_embeddings().weight.device
    settings = _settings(model, tokenizer, kwargs)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    out = []
    with eval_mode(model), plain_generation(model), torch.no_grad(), _seeded(device, seed):
        for index, example in enumerate(examples[:n]):
            chosen = example.pairs[0][0] if example.pairs else 0
            prompt = example.prompt_of(chosen)
            ids = torch.from_numpy(prompt).long().to(device)[None]
            # Learnt positions end: beyond them lies an index error.
            room = positions - len(prompt) if positions else settings.max_new_tokens
            if "max_length" not in kwargs:
                settings.max_new_tokens = max(1, min(kwargs.get("max_new_tokens", MAX_NEW_TOKENS), room))
            try:
                tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise ConfigError(f"generation_kwargs: {' '.join(str(error).split())}") from error
            answer = tokens[0, ids.shape[1] :].tolist()
            out.append(
                {
                    "index": index,
                    "prompt": tokenizer.decode(prompt.tolist()),
                    "answer": tokenizer.decode(answer, skip_special_tokens=True),
                    "chosen": tokenizer.decode(example.responses[chosen].tolist(), skip_special_tokens=True),
                    "new_tokens": len(answer),
                    "ended": bool(answer) and answer[-1] in _ends(settings),
                }
            )
    return out


def _settings(model: Any, tokenizer: Any, kwargs: dict[str, Any]) -> GenerationConfig:
    """Greedy decoding to the end of the answer."""
    theirs = getattr(model, "generation_config", None)
    ends = end_ids(theirs, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    length = {} if "max_length" in kwargs else {"max_new_tokens": MAX_NEW_TOKENS}
    # use_cache: the model's configuration has it off where layers are recomputed in training.
    given = {
        "do_sample": False,
        "use_cache": True,
        "eos_token_id": ends or None,
        "pad_token_id": pad,
        **length,
        **kwargs,
    }
    return GenerationConfig(bos_token_id=getattr(theirs, "bos_token_id", None), **given)


def end_ids(settings: GenerationConfig | None, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: those of the checkpoint's settings, and the tokenizer's."""
    ends = _ends(settings)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    return ends


def _ends(settings: GenerationConfig | None) -> list[int]:
    ends = getattr(settings, "eos_token_id", None)
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


@contextmanager
def plain_generation(model: nn.Module) -> Iterator[None]:
    """generate() fills what it is not told from the checkpoint's own settings, a repetition penalty for one."""
    owners = [m for m in model.modules() if isinstance(getattr(m, "generation_config", None), GenerationConfig)]
    found = [(m, vars(m).get("generation_config")) for m in owners]
    for module, own in found:
        if own is not None:
            module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, own in found:
            if own is not None:
                module.generation_config = own
            else:  # set by PEFT on a wrapper that asks the model inside
                vars(module).pop("generation_config", None)


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
