"""The model of a run: loaded or as it was passed, with its adapter, on its device, without dropout; and its policy."""

from typing import Any

import torch
from torch import nn
from transformers import set_seed

from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError
from fastpo.models import adapters
from fastpo.models.degree_head import DegreeHead
from fastpo.models.loading import load_model
from fastpo.models.noise import disable_dropout
from fastpo.models.policy import Policy
from fastpo.models.scalar_head import RewardModel, check_head_is_trained, settle_padding
from fastpo.models.trunk import freeze_towers
from fastpo.training.inputs import Origin
from fastpo.training.objective import Objective


def take_model(
    origin: Origin, config: TrainConfig, device: torch.device, peft_config: Any, quantization_config: Any,
    tokenizer: Any,
) -> nn.Module:  # fmt: skip
    """ConfigError for options that do not go with the model. tokenizer: which a reward model pads with."""
    home = torch.device("cpu") if config.fsdp != "no" else device  # FSDP moves its shards itself
    if quantization_config is not None and peft_config is None and adapters.saved_adapter(origin.model_name) is None:
        raise ConfigError("a quantised model cannot be trained itself: pass peft_config (--use-peft) for an adapter")
    model = origin.model
    if origin.by_name:
        if config.scalar_head:
            set_seed(config.seed)  # of a new head, whatever was drawn before: as TRL's, and a resumed run's
        model = load_model(
            origin.model_name, dtype=config.dtype, device=home, trust_remote_code=config.trust_remote_code,
            quantization_config=quantization_config, model_init_kwargs=config.model_init_kwargs,
            scalar_head=config.scalar_head,
        )  # fmt: skip
    elif quantization_config is not None or config.model_init_kwargs or config.dtype:
        raise ConfigError("quantization_config, model_init_kwargs and dtype need a model given by name or path")
    if peft_config is not None:
        if hasattr(model, "peft_config"):
            raise ConfigError("peft_config is given, but the model has an adapter already")
        model = adapters.with_adapter(model, peft_config)
    if config.scalar_head:
        check_head_is_trained(RewardModel(model))
        settle_padding(model, tokenizer)
    adapters.check_quantized(model)
    adapters.check_adapter_base(model)
    if config.save_merged:
        adapters.check_mergeable(model, sharded=config.fsdp != "no")
    if not adapters.is_quantized(model):
        model.to(home)
    if config.disable_dropout:
        disable_dropout(model)
    return model


def as_policy(model: nn.Module, config: TrainConfig, device: torch.device, objective: Objective) -> Policy:
    """The policy around it, with what the losses bring beside it; it refuses what it cannot train before anything is
    changed for good."""
    policy = RewardModel(model) if config.scalar_head else Policy(model)
    policy.fused.choose(policy.causal_lm, config, device)
    freeze_towers(model)
    if objective.degrees:
        weight = policy.head().weight  # [V, D]
        policy.degree_head = DegreeHead(objective.degrees, weight.shape[1], config.seed, weight)
    return policy
