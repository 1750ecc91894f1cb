"""The fixed policies of a run as models that can be run: given ones, the base below an adapter, the policy's start."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError
from fastpo.models.loading import load_model
from fastpo.models.modes import check_ids, eval_mode, on_device
from fastpo.models.policy import Policy
from fastpo.reference.cache import cache_key, model_fingerprint
from fastpo.reference.roles import Given, Role, Sets
from fastpo.training.distributed import Engine, World, shard


@dataclass(frozen=True)
class Start:
    """The policy as training begins: the fixed policy of a role for which no model is given."""

    engine: Engine  # the policy that is trained
    fingerprint: str  # of its weights at the start; of the base's, where `is_base`
    dtype: torch.dtype  # as loaded
    name: str | None = None  # the name or path that it was given by
    is_base: bool = False  # a new adapter's reference: the policy with the adapter off, whatever was trained since
    is_exact: bool = True  # whether the policy computes in training, at its first step, what it does as the reference


class Policies:
    """Makes the model of a role ready to run, and puts it back. `verify(engine)` is called on every model given."""

    def __init__(
        self,
        given: Given,
        start: Start,
        config: TrainConfig,
        world: World,
        *,
        autocast_dtype: torch.dtype | None = None,
        verify: Callable[[Engine], object] = lambda engine: None,
    ):
        self.given, self.start, self.config, self.world = given, start, config, world
        self.autocast_dtype, self.verify = autocast_dtype, verify

    def of(self, role: Role, sets: Sets, stack: contextlib.ExitStack) -> tuple[Engine, str]:
        """(the role's policy on the device, its fingerprint); the policy itself where training has not begun and no
        model is given. `sets`: what it will read. Until `stack` is left.
        """
        if self.given[role] is not None:
            return self.load(role, sets, stack)
        if self.start.is_base:
            # A new adapter's reference is the base model; one that was trained before is its own, as in TRL.
            stack.enter_context(self.start.engine.policy.model.disable_adapter())  # type: ignore[operator]
        return self.start.engine, self.start.fingerprint

    def load(self, role: Role, sets: Sets, stack: contextlib.ExitStack) -> tuple[Engine, str]:
        """The model given on the device or split as the policy is, and its fingerprint."""
        config, model, device = self.config, self.given[role], self.world.device
        sharded = config.fsdp != "no"
        if isinstance(model, str | os.PathLike):
            home = torch.device("cpu") if sharded else device
            model = load_model(os.fspath(model), dtype=config.dtype or str(self.start.dtype), device=home,
                               trust_remote_code=config.trust_remote_code)  # fmt: skip
        elif not isinstance(model, nn.Module):
            raise ConfigError(f"{role.model} must be a model, or its name or path, not {model!r}")
        elif sharded and any(isinstance(p, DTensor) for p in model.parameters()):
            raise ConfigError(
                f"{role.model} is a model that fsdp has split for another purpose: pass a copy, or its path"
            )
        policy = Policy(model, fused=config.use_liger_kernel is not False)
        for name, examples in sets.items():
            check_ids(policy, examples, f"{name} (for {role.model})")
        fingerprint = self.world.first(lambda: model_fingerprint(model))
        if sharded:
            return self._split(policy, stack), fingerprint
        stack.enter_context(on_device(model, device))
        return Engine(policy), fingerprint

    def again(self, stack: contextlib.ExitStack) -> Engine:
        """The policy loaded again by its name, if that still gives the weights that the run began with."""
        config, name = self.config, self.start.name
        assert name is not None
        home = torch.device("cpu") if config.fsdp != "no" else self.world.device
        model = load_model(name, dtype=config.dtype, device=home, trust_remote_code=config.trust_remote_code,
                           model_init_kwargs=config.model_init_kwargs)  # fmt: skip
        if self.world.first(lambda: model_fingerprint(model)) != self.start.fingerprint:
            raise ConfigError(
                f"Cannot compute reference log-probs for a dataset passed to evaluate(): {name!r} is no longer "
                "what the run began with; pass the rows as eval_dataset, or ref_model"
            )
        policy = Policy(model, fused=config.use_liger_kernel is not False)
        return self._split(policy, stack) if config.fsdp != "no" else Engine(policy)

    def _split(self, policy: Policy, stack: contextlib.ExitStack) -> Engine:
        policy.model.requires_grad_(False)  # else its shards would be fp32, for an optimiser that never comes
        stack.enter_context(eval_mode(policy.model))
        return shard(policy, self.config, self.world, self.autocast_dtype)

    def key(self, fingerprint: str) -> str:
        """What decides the numbers of a model of this fingerprint here: its weights, and what they are computed in."""
        device = self.world.device.type
        tf32 = "|tf32" if device == "cuda" and torch.backends.cuda.matmul.allow_tf32 else ""
        return cache_key(fingerprint, f"{self.autocast_dtype or 'as loaded'}|{device}{tf32}")
