"""`torch_compile`: each layer of the trunk through torch.compile, with packed attention called from between its graphs.

Attention is the one graph break that must be: it works by the host's list of chain lengths, another for every batch,
and would be compiled anew for each. What lies before and after it in a layer is compiled once for all layers alike,
for any number of tokens; with `token_bucket` once for each of the few sizes that occur.

The model stays as it is: no wrapper enters its names, so checkpoints are those of a run without. Gradient checkpointing
recomputes the compiled layer. Only forward passes that carry fastpo's layout are compiled; generate() and the forward
passes of callbacks run the layers as they came. So does the reference's pass, which other runs share through the cache.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError, UnsupportedModelError, shown
from fastpo.models import attention
from fastpo.models.policy import Policy

# Compiled versions of one layer's code: of each kind of layer, with gradients and without, and for each size of
# `token_bucket`. PyTorch's own limit of 8 would run the others uncompiled.
VERSIONS = 64


@contextlib.contextmanager
def compiled_layers(policy: Policy, config: TrainConfig) -> Iterator[None]:
    """Inside, the trunk's layers are compiled as `config` says; ConfigError for a backend that PyTorch lacks."""
    backend = check_backend(config)
    if policy.unpacked:
        name = type(policy.causal_lm).__name__
        raise ConfigError(f"torch_compile compiles packed layers, and {name} runs unpacked: leave it out")
    layers = [m for m in policy.trunk.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        name = type(policy.causal_lm).__name__
        raise UnsupportedModelError(f"{name} has no layers that torch_compile knows: leave it out")
    options: dict[str, Any] = {"backend": backend, "dynamic": not config.token_bucket}
    if config.torch_compile_mode is not None:
        options["mode"] = config.torch_compile_mode
    uncompiled = torch.compiler.disable(attention.packed_attention, reason="works by the host's list of lengths")
    AttentionInterface.register(attention.NAME, uncompiled)
    for layer in layers:
        layer.forward = _forward(layer, options)
    try:
        with torch._dynamo.config.patch(recompile_limit=VERSIONS):
            yield
    finally:
        for layer in layers:
            del layer.forward
        attention.register()


def check_backend(config: TrainConfig) -> str:
    """torch.compile's backend that is asked for; ConfigError for one that PyTorch lacks."""
    import torch._dynamo  # not before it is asked for: it takes a second to import

    backend = config.torch_compile_backend or "inductor"
    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        raise ConfigError(f"torch_compile_backend={shown(backend)} is unknown to PyTorch: it has {', '.join(known)}")
    return backend


def _forward(layer: nn.Module, options: dict[str, Any]) -> Callable[..., Tensor]:
    """In place of the layer's method: the same, compiled where it is packed."""
    as_it_came, method, inside = layer.forward, type(layer).forward, False
    # transformers 5.23 checkpoints in `forward`, around the method that the model's code defines (and once more for a
    # subclass); before, it did so around the call. It is the inner method that is compiled: PyTorch compiles nothing
    # through a checkpoint.
    while method.__code__.co_name == "forward_with_checkpointing":
        method, inside = method.__wrapped__, True  # type: ignore[attr-defined]
    compiled = torch.compile(MethodType(method, layer), **options)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        if "fastpo_layout" not in kwargs:
            return as_it_came(*args, **kwargs)
        if inside and layer.gradient_checkpointing and layer.training:
            return layer._gradient_checkpointing_func(functools.partial(compiled, **kwargs), *args)  # type: ignore[operator]
        return compiled(*args, **kwargs)

    return forward
