"""A batch through transformers' generate, and the logits of a second model after the same tokens.

R = rows, V = vocabulary.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from fastpo.errors import ConfigError
from fastpo.sampling.drawing import Draw, Ended


def decode(model: Any, draw: Draw, device: torch.device) -> None:
    """Draws the answers to all rows of `draw`, padded on the left. In eval mode, without gradients."""
    rows, pad = draw.rows, draw.pad
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    if draw.mix is not None:
        draw.mix.begin(mask)
    # use_cache: the model's configuration has it off where layers are recomputed in training.
    settings = GenerationConfig(do_sample=False, use_cache=True, max_new_tokens=max(draw.rooms), pad_token_id=pad)
    model.generate(
        input_ids=ids, attention_mask=mask, generation_config=settings,
        logits_processor=LogitsProcessorList([draw]), stopping_criteria=StoppingCriteriaList([Ended(draw)]),
    )  # fmt: skip


class Mixture:
    """(1 - c) of the policy's logits and c of the reference's, which has a KV cache of its own over the same tokens.

    The reference is `model` inside `within()`, which is entered for each of its forward passes.
    """

    def __init__(self, model: Any, within: Callable[[], AbstractContextManager[Any]], coef: float):
        self.model, self.within, self.coef = model, within, coef
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._takes = inspect.signature(inner.forward).parameters
        self._mask = torch.empty(0)
        self._cache: Any = None

    def begin(self, mask: Tensor) -> None:
        """mask [R, tokens]: 0 where a row is padded, on the left."""
        self._mask, self._cache = mask, None

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
        more = input_ids.shape[1] - self._mask.shape[1]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), more)], dim=1)
        new = input_ids.shape[1] if self._cache is None else more
        given: dict[str, Any] = {"input_ids": input_ids[:, -new:], "attention_mask": self._mask}
        if "position_ids" in self._takes:
            given["position_ids"] = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]
        given = {name: tensor.to(device) for name, tensor in given.items()}
        if "logits_to_keep" in self._takes:
            given["logits_to_keep"] = 1
        if self._cache is not None:
            given["past_key_values"] = self._cache
        out = self.model(**given, use_cache=True, return_dict=True)
        self._cache = getattr(out, "past_key_values", None)
        if self._cache is None:
            raise ConfigError(f"{type(self.model).__name__} keeps no keys and values between tokens: no mixture of it")
        return out.logits[:, -1].float()
