"""Reward models: a scalar head on a causal trunk, as transformers' ...ForSequenceClassification with one label has it.

The reward of a response is `hidden W^T + b` at its last token, which for transformers is the last that is not the
padding token: where an end of sequence pads too, the token before the end. models/verify_scalar.py holds it against the
model's own forward.

T = packed tokens, S = responses, D = hidden.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastpo.data.example import Example
from fastpo.data.packing import PackedBatch
from fastpo.errors import ConfigError, UnsupportedModelError
from fastpo.models.policy import Policy, decoder_of, unwrap_head

log = logging.getLogger("fastpo")

HEAD = "score"  # the head's attribute in transformers' causal sequence classifiers
_LOADING = "AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)"


class RewardModel(Policy):
    """A causal sequence classifier of one label, with or without a PEFT adapter, seen as a number for each response.

    UnsupportedModelError for another model, and ConfigError for more labels than one.
    """

    scores = True

    @staticmethod
    def _taken(model: nn.Module) -> PreTrainedModel:
        inner = decoder_of(model)
        name, labels = type(inner).__name__, getattr(inner.config, "num_labels", 1)
        if getattr(inner, HEAD, None) is None:
            if inner.get_output_embeddings() is not None:
                raise UnsupportedModelError(
                    f"{name} has a language model's head, and loss_type=reward trains a scalar one: load it with "
                    f"{_LOADING}, or give its name or path, which brings a new head"
                )
            raise UnsupportedModelError(
                f"{name} has no linear head `{HEAD}` on the last token's hidden state, as transformers' causal "
                "sequence classifiers have: its responses cannot be packed"
            )
        if labels != 1:
            raise ConfigError(f"{name} has num_labels={labels}, and a reward is one number: load it with {_LOADING}")
        return inner

    def _logit_rule(self) -> tuple[float | None, float]:
        return None, 1.0

    def _head_module(self) -> Any:
        return getattr(self.causal_lm, HEAD)

    @property
    def pad_token_id(self) -> int | None:
        """The token that transformers takes for padding where it looks for the last one."""
        return self.causal_lm.config.get_text_config().pad_token_id

    def place(self, examples: Sequence[Example]) -> None:
        """Sets where the rows' responses are scored, and that they pass the trunk whole."""
        pad = self.pad_token_id
        for example in examples:
            example.whole = True
            example.scored_at = tuple(
                scored_at(example.prompt_of(k), response, pad) for k, response in enumerate(example.responses)
            )

    def read(self, batch: PackedBatch, **options: Any) -> Tensor:
        """The rewards [S] of a batch of rows that `place` has seen, in fp32, in fp64 of a model in that."""
        assert batch.scored_rows is not None
        head = self.head()
        hidden = self.hidden(batch).index_select(0, batch.scored_rows).to(head.weight.device)  # [S, D]
        with torch.autocast(hidden.device.type, enabled=False):  # a number a response costs nothing in fp32
            wide = torch.promote_types(torch.promote_types(hidden.dtype, head.weight.dtype), torch.float32)
            bias = None if head.bias is None else head.bias.to(wide)
            return nn.functional.linear(hidden.to(wide), head.weight.to(wide), bias).squeeze(-1)


def scored_at(prompt: np.ndarray, response: np.ndarray, pad: int | None) -> int:
    """The token of prompt and response, counted from the prompt's first, whose logits transformers takes for the row's:
    the last one that is not `pad`; the first where all are."""
    if pad is None:
        return len(prompt) + len(response) - 1
    for ids, start in ((response, len(prompt)), (prompt, 0)):
        real = np.flatnonzero(ids != pad)
        if len(real):
            return start + int(real[-1])
    return 0


def has_scalar_head(model: Any) -> bool:
    """Whether a model, in a PEFT wrapper or not, is one of a `score` head and no language model's."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return (
        isinstance(inner, PreTrainedModel)
        and getattr(inner, HEAD, None) is not None
        and inner.get_output_embeddings() is None
    )


def policy_of(model: nn.Module, fused: bool = True) -> Policy:
    """The policy that a model is by its head."""
    return RewardModel(model, fused) if has_scalar_head(model) else Policy(model, fused)


def settle_padding(model: Any, tokenizer: Any) -> None:
    """Tokenizer and model agree on the padding token, as in TRL: the tokenizer's, or its end of sequence where it has
    none. The model's own passes look for the last token before it. In place; ConfigError where there is neither."""
    if getattr(tokenizer, "pad_token_id", None) is None:
        if getattr(tokenizer, "eos_token", None) is None:
            raise ConfigError(
                "the tokenizer has no padding token and no end of sequence, and a reward model reads the last token "
                "before the padding: set tokenizer.pad_token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    ends = getattr(tokenizer, "eos_token_id", None)
    if ends is not None and ends == tokenizer.pad_token_id:
        log.info("the end of sequence is the padding token too: rewards are read at the token before the end, where "
                 "transformers looks for them")  # fmt: skip


def head_is_new(model: Any) -> bool:
    """Whether the head is one that loading drew at random, and no adapter has brought one."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(inner, "fastpo_new_head", False) and not hasattr(getattr(inner, HEAD, None), "modules_to_save")


def check_head_is_trained(policy: Policy) -> None:
    """ConfigError where an adapter leaves a new head as it was drawn; a warning where it leaves a trained one."""
    head = unwrap_head(policy.causal_lm, getattr(policy.causal_lm, HEAD))
    if head.weight.requires_grad:
        policy.causal_lm.fastpo_new_head = False  # from here on it is trained
        return
    advice = f"set task_type='SEQ_CLS' or modules_to_save=['{HEAD}'] in peft_config"
    if getattr(policy.causal_lm, "fastpo_new_head", False):
        raise ConfigError(f"the adapter leaves the scalar head at its random start: {advice}")
    log.warning("the scalar head is not trained: %s trains it", advice)
