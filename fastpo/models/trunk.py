"""Which part of a model text rows reach: its trunk, its embeddings and its head.

Of a model that sees images or hears, text rows train the language part; everything outside it is frozen
(`freeze_towers`).
"""

import logging
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fastpo.errors import UnsupportedModelError

log = logging.getLogger("fastpo")


def trunk_of(causal_lm: PreTrainedModel) -> nn.Module:
    """The module from token ids to the last hidden states: all but the head, and of a multimodal model the text."""
    composite = causal_lm.config.get_text_config(decoder=True) is not causal_lm.config
    trunk = causal_lm.get_decoder() if composite else _below(causal_lm)
    while isinstance(trunk, PreTrainedModel) and trunk.get_output_embeddings() is not None:
        trunk = _below(trunk)  # a decoder that is itself a causal model
    if trunk is None:
        raise UnsupportedModelError(
            f"{type(causal_lm).__name__} has no trunk apart from its head (base_model_prefix "
            f"'{causal_lm.base_model_prefix}'); fastpo cannot run the head on completion tokens only"
        )
    return trunk


def _below(model: PreTrainedModel) -> nn.Module | None:
    """The model around which `model` puts its head, if there is one."""
    inner = getattr(model, model.base_model_prefix, None)
    if inner is None and (inner := model.get_decoder()) is model:
        # Llama 4's text model has the prefix of its multimodal one.
        children = [module for module in model.children() if isinstance(module, PreTrainedModel)]
        inner = children[0] if len(children) == 1 else None
    return inner


def towers(model: Any) -> list[str]:
    """Names of the largest modules, and of single parameters, that lie outside the text's trunk, its embeddings and its
    head: encoders of images and sound, and what carries their output over. Empty for a text model."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    language = _language(causal_lm)
    return list(_outside(causal_lm, "", language)) if language else []


def _language(causal_lm: Any) -> set[int]:
    """Ids of the parameters that text rows reach; empty where the model is none that fastpo can train."""
    if not isinstance(causal_lm, PreTrainedModel) or causal_lm.get_output_embeddings() is None:
        return set()
    parts = (trunk_of(causal_lm), causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings())
    return {id(p) for part in parts for p in part.parameters()}


def _outside(module: nn.Module, prefix: str, language: set[int]) -> Iterator[str]:
    for name, parameter in module._parameters.items():
        if parameter is not None and id(parameter) not in language:
            yield prefix + name
    for name, child in module.named_children():
        ids = {id(p) for p in child.parameters()}
        if ids and not ids & language:
            yield prefix + name
        elif ids - language:
            yield from _outside(child, f"{prefix}{name}.", language)


def freeze_towers(model: Any) -> list[str]:
    """Set requires_grad to False for all that text rows cannot train; returns the names of what was not frozen yet."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    language = _language(causal_lm)
    if not language:
        return []
    outside = [p for p in causal_lm.parameters() if p.requires_grad and id(p) not in language]
    names = list(_outside(causal_lm, "", language)) if outside else []
    for parameter in outside:
        parameter.requires_grad_(False)
    if names:
        log.info("text rows do not train %s: frozen, and saved as they are", ", ".join(names))
    return names
