"""A batch through transformers' generate, and the logits of a second model after the same tokens.

Both have their keys and values in a cache made here: a prompt that several rows have goes through the model once, and
a token more is not a copy of all tokens before it. R = rows, V = vocabulary.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fastpo.errors import ConfigError
from fastpo.sampling.drawing import Draw, Ended

ROOM = 128  # tokens by which the memory of keys and values grows
# Tokens of prompts that must be spared for the one forward pass more. Of 32 rows of 4 prompts and 12x192 on a CPU: 420
# spared cost 3%, 868 gained 2%, 7,140 (prompts of 256 tokens, answers of 64) a third of the time.
_WORTH = 512


def decode(model: Any, draw: Draw, device: torch.device) -> None:
    """Draws the answers to all rows of `draw`, padded on the left. In eval mode, without gradients."""
    rows, pad = draw.rows, draw.pad
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    if draw.mix is not None:
        draw.mix.begin(rows, mask)
    cache = prefilled(model, rows, ids, mask)
    # use_cache: the model's configuration has it off where layers are recomputed in training.
    settings = GenerationConfig(do_sample=False, use_cache=True, max_new_tokens=max(draw.rooms), pad_token_id=pad)
    model.generate(
        input_ids=ids, attention_mask=mask, generation_config=settings,
        logits_processor=LogitsProcessorList([draw]), stopping_criteria=StoppingCriteriaList([Ended(draw)]),
        **({} if cache is None else {"past_key_values": cache}),
    )  # fmt: skip


class Mixture:
    """(1 - c) of the policy's logits and c of the reference's, which has a KV cache of its own over the same tokens.

    The reference is `model` inside `within()`, which is entered for each of its forward passes.
    """

    def __init__(self, model: Any, within: Callable[[], AbstractContextManager[Any]], coef: float):
        self.model, self.within, self.coef = model, within, coef
        self._rows: Sequence[tuple[int, ...]] = ()
        self._mask = torch.empty(0)
        self._cache: Cache | None = None
        self._past = 0  # tokens in the cache

    def begin(self, rows: Sequence[tuple[int, ...]], mask: Tensor) -> None:
        """rows: the prompts; mask [R, tokens]: 0 where one is padded, on the left."""
        self._rows, self._mask, self._cache, self._past = rows, mask, None, 0

    def __call__(self, input_ids: Tensor, own: Tensor) -> Tensor:
        """input_ids [R, tokens], all of them at every step; own [R, V], the policy's logits; the mixed ones [R, V]."""
        with self.within():
            other = self._logits(input_ids).to(own.device)
        if other.shape != own.shape:
            raise ConfigError(
                f"the reference has {other.shape[-1]} tokens and the policy {own.shape[-1]}: they have no mixture"
            )
        return torch.lerp(own, other, self.coef)

    def _logits(self, input_ids: Tensor) -> Tensor:
        """Of the token that follows, in fp32 [R, V]."""
        device = self.model.get_input_embeddings().weight.device
        ids, mask = input_ids.to(device), self._mask.to(device)
        if self._past == 0:
            self._cache = prefilled(self.model, self._rows, ids, mask)
            self._past = 0 if self._cache is None else self._cache.get_seq_length()
        mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], dim=1)
        out = _forward(self.model, ids[:, self._past :], mask, self._cache)
        self._cache, self._mask, self._past = getattr(out, "past_key_values", None), mask, ids.shape[1]
        if self._cache is None:
            raise ConfigError(f"{type(self.model).__name__} keeps no keys and values between tokens: no mixture of it")
        return out.logits[:, -1].float()


def prefilled(model: Any, rows: Sequence[tuple[int, ...]], ids: Tensor, mask: Tensor) -> Cache | None:
    """A cache for the rows [R, tokens] padded on the left: empty, or, where rows are alike, with all of their tokens
    but the last, each different row computed once. None of a model that has another kind of cache."""
    if not getattr(model, "_supports_default_dynamic_cache", lambda: False)():
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [Roomy() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    places: dict[tuple[int, ...], int] = {}
    index = [places.setdefault(tuple(row), len(places)) for row in rows]
    spared = (len(rows) - len(places)) * (ids.shape[1] - 1)
    known = bool(cache.layers) and all(type(layer) in (Roomy, DynamicSlidingWindowLayer) for layer in cache.layers)
    if spared < _WORTH or not known or "logits_to_keep" not in _takes(model):
        return cache
    first = torch.tensor([index.index(place) for place in range(len(places))], device=ids.device)
    _forward(model, ids[first, :-1], mask[first, :-1], cache)
    cache.batch_select_indices(torch.tensor(index, device=ids.device))
    return cache


def _forward(model: Any, ids: Tensor, mask: Tensor, cache: Cache | None) -> Any:
    """ids [R, new], mask [R, tokens]: the tokens in the cache and the new ones; the model's output."""
    takes = _takes(model)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in takes:
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    if "logits_to_keep" in takes:
        given["logits_to_keep"] = 1
    if cache is not None:
        given["past_key_values"] = cache
    return model(**given, use_cache=True, return_dict=True)


def _takes(model: Any) -> set[str]:
    """The arguments of its forward; of a PEFT model those of the model inside."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(inner.forward).parameters)


class Roomy(DynamicLayer):
    """Keys and values [R, heads, tokens, size] at the head of memory that has room for more."""

    keys: Any
    values: Any
    is_initialized: bool

    def __init__(self) -> None:
        super().__init__()
        self._room: tuple[Tensor, Tensor] | None = None
        self._held: Tensor | None = None  # the keys as they were left: others are a selection, of other memory

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values [R, heads, new, size]; returns all of them."""
        past = self.get_seq_length() if self.is_initialized else 0
        total = past + key_states.shape[-2]
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        if self._room is None or self.keys is not self._held or total > self._room[0].shape[-2]:
            larger = []
            for new, old in ((key_states, self.keys), (value_states, self.values)):
                room = new.new_empty(*new.shape[:-2], total + ROOM, new.shape[-1])
                if past:
                    room[..., :past, :] = old
                larger.append(room)
            self._room = larger[0], larger[1]
        keys, values = self._room
        keys[..., past:total, :] = key_states
        values[..., past:total, :] = value_states
        self.keys, self.values = keys[..., :total, :], values[..., :total, :]
        self._held = self.keys
        return self.keys, self.values
