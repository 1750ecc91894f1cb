"""No noise in train mode: what is random there is switched off, and what remains is found before the first step."""

import copy
import inspect
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fastpo.data import Example
from fastpo.data.packing import PackedBatch, collate
from fastpo.errors import ConfigError
from fastpo.models.policy import Policy

_NAMES = re.compile(r"drop|jitter")  # attention_dropout, resid_pdrop, layerdrop, router_jitter_noise, moe_jitter_eps
# Routers that draw their experts in train mode, by class; and attributes of theirs that are thresholds, not noise.
_SAMPLING = {"PhimoeTopKRouter", "PhimoeSparseMoeBlock"}
_THRESHOLDS = {("PhimoeTopKRouter", "router_jitter_noise")}


def disable_dropout(model: nn.Module) -> None:
    """Every dropout probability and router jitter to zero: the modules', those that they keep as a number, and those
    that they read from the configuration, which itself stays as it is, for it is saved."""
    outer = {id(model), id(model.get_base_model() if hasattr(model, "get_base_model") else model)}  # type: ignore[operator]
    quiet: dict[int, Any] = {}
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and _NAMES.search(name) and (kind, name) not in _THRESHOLDS:
                setattr(module, name, 0.0)
        if kind in _SAMPLING:
            module.register_forward_pre_hook(_as_in_eval_mode)
        names = _read_from_config(module)
        if names and id(module) not in outer:
            config = module.config
            module.config = quiet.setdefault(id(config), _quiet(config))


def _as_in_eval_mode(module: nn.Module, _inputs: Any) -> None:
    module.training = False


def _read_from_config(module: nn.Module) -> set[str]:
    """Names of noise that the module's methods take from its configuration when they are called."""
    config = vars(module).get("config")
    found: set[str] = set()
    if config is None or type(module).__module__.startswith("torch."):
        return found
    noisy = {n for n, v in getattr(config, "__dict__", {}).items() if isinstance(v, float) and v and _NAMES.search(n)}
    for name, method in vars(type(module)).items() if noisy else ():
        if not inspect.isfunction(method) or name == "__init__":
            continue
        try:
            source = inspect.getsource(inspect.unwrap(method))
        except (OSError, TypeError):
            return noisy
        found |= {n for n in noisy if re.search(rf"config\.{n}\b", source)}
    return found


def _quiet(config: Any) -> Any:
    """The same configuration to whoever reads or writes it, but for its noise, which reads 0."""
    noisy = {n for n, v in vars(config).items() if isinstance(v, float) and _NAMES.search(n)}

    class Quiet(type(config)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            if name in noisy:
                return 0.0
            if name == "__deepcopy__":
                return lambda memo: _quiet(copy.deepcopy(config, memo))
            return getattr(config, name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(config, name, value)

    return object.__new__(Quiet)


def check_quiet(policy: Policy, examples: Sequence[Example]) -> None:
    """ConfigError where rows run twice in train mode do not give the same log-probabilities twice.

    Random states are left as they were, and are two different ones in the two runs. On a GPU, where sums may be in
    another order each time, half a spacing of the dtype is allowed.
    """
    model = policy.model
    device = policy.causal_lm.get_input_embeddings().weight.device
    modes = [(m, m.training) for m in model.modules()]
    eps = 2.0**-9 if policy.low_precision or torch.is_autocast_enabled(device.type) else 2.0**-20
    states = random.getstate(), np.random.get_state()  # fork_rng knows PyTorch's alone
    model.train()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []), policy.attach():
            batch = collate(examples, range(len(examples))).to(device)
            first, second = _with_two_seeds(policy, batch)
            allowed = eps * (1 + first.abs()) if device.type == "cuda" else torch.zeros_like(first)
            if not ((first - second).abs() > allowed).any():
                return
            where = _first_difference(policy, batch)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, training in modes:
            module.training = training
    kind = f", first behind {where} ({type(policy.causal_lm.get_submodule(where)).__name__})" if where else ""
    unit = "reward" if policy.scores else "token"
    raise ConfigError(
        f"{type(policy.causal_lm).__name__} is random in train mode though disable_dropout is on: the same rows run "
        f"twice differ by up to {float((first - second).abs().max()):.2g} a {unit}{kind}; switch its noise off in the "
        "model, or pass disable_dropout=False"
    )


def _with_two_seeds(policy: Policy, batch: PackedBatch, each: Callable[[], None] = lambda: None) -> tuple[Tensor, ...]:
    """What losses read, fp64, of a batch run twice, each time under another seed and after a call of `each`."""
    runs = []
    for seed in (1, 2):
        each()
        torch.manual_seed(seed)
        runs.append(policy.read(batch).double())
    return tuple(runs)


def _first_difference(policy: Policy, batch: PackedBatch) -> str:
    """The name of the first module of the trunk whose outputs differ between two runs; "" where none does."""
    names = {m: n for n, m in policy.causal_lm.named_modules()}
    traces: list[list[tuple[str, Tensor]]] = []

    def note(module: nn.Module, _inputs: Any, out: Any) -> None:
        out = out[0] if isinstance(out, tuple | list) and out else out
        if isinstance(out, Tensor) and out.is_floating_point():
            traces[-1].append((names[module], out.detach().double().sum()))

    handles = [m.register_forward_hook(note) for m in policy.trunk.modules() if m in names]
    try:
        _with_two_seeds(policy, batch, each=lambda: traces.append([]))
    finally:
        for handle in handles:
            handle.remove()
    return next((a[0] for a, b in zip(*traces, strict=False) if a[0] != b[0] or not torch.equal(a[1], b[1])), "")
