"""What is done to a model around training: dropout off, checkpointing on, modes and devices put back as they were."""

import contextlib
import logging
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import enable_full_determinism
from transformers.modeling_layers import GradientCheckpointingLayer

from fastpo.config.train_config import TrainConfig
from fastpo.data import Example
from fastpo.errors import ConfigError, DataError, UnsupportedModelError
from fastpo.models.adapters import is_quantized
from fastpo.models.compiled import compiled_layers
from fastpo.models.policy import Policy

log = logging.getLogger("fastpo")


def set_numerics(config: TrainConfig) -> None:
    """PyTorch's global switches that the configuration names."""
    if config.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    if config.full_determinism:
        enable_full_determinism(config.seed)


@contextlib.contextmanager
def training_mode(policy: Policy, config: TrainConfig) -> Iterator[None]:
    """The model as training needs it: packed attention, train mode, checkpointing; put back afterwards."""
    model = policy.model
    policy.fused.on &= config.use_liger_kernel is not False
    was_training = model.training
    model.train()
    already = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    if config.gradient_checkpointing and not getattr(policy.causal_lm, "supports_gradient_checkpointing", True):
        log.warning("%s does not support gradient_checkpointing: off", type(policy.causal_lm).__name__)
        already = True
    if config.gradient_checkpointing and not already:
        _checkpointing(policy.causal_lm, {"use_reentrant": False, **(config.gradient_checkpointing_kwargs or {})})
    try:
        with policy.attach(), contextlib.ExitStack() as stack:
            count = config.gradient_checkpointing_layers
            if isinstance(count, int):  # else all of them
                stack.enter_context(first_layers_checkpointed(policy, count))
            if config.torch_compile:
                stack.enter_context(compiled_layers(policy, config))
            if config.activation_offloading:
                stack.enter_context(offloading(policy))
            yield
    finally:
        model.train(was_training)
        if config.gradient_checkpointing and not already:
            _checkpointing(policy.causal_lm, None)


def _checkpointing(model: nn.Module, kwargs: dict | None) -> None:
    """Switch it on with `kwargs`, or off; transformers 5.12 renamed the methods."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if kwargs is None:
        getattr(model, f"{name}_checkpointing_disable")()
        model.disable_input_require_grads()  # type: ignore[operator]  # which enabling it has hooked into the embeddings
    else:
        getattr(model, f"{name}_checkpointing_enable")(kwargs)


def layers_to_checkpoint(policy: Policy) -> list[GradientCheckpointingLayer]:
    """The layers that are checkpointed one by one; none where the model does not support it, or does it otherwise."""
    if not getattr(policy.causal_lm, "supports_gradient_checkpointing", True):
        return []
    return [m for m in policy.trunk.modules() if isinstance(m, GradientCheckpointingLayer)]


def checkpoint_all(policy: Policy) -> None:
    """From now on every layer is checkpointed, inside `training_mode`, whose end puts the flags back."""
    for layer in layers_to_checkpoint(policy):
        layer.gradient_checkpointing = True


@contextlib.contextmanager
def first_layers_checkpointed(policy: Policy, count: int) -> Iterator[None]:
    """Of the layers that are checkpointed, only the first `count` inside the block."""
    layers = [m for m in policy.trunk.modules() if isinstance(m, GradientCheckpointingLayer)]
    name = type(policy.causal_lm).__name__
    if not layers:
        raise UnsupportedModelError(f"{name} does not checkpoint its layers one by one: gradient_checkpointing_layers")
    if count > len(layers):
        raise ConfigError(f"gradient_checkpointing_layers={count}, but {name} has {len(layers)} layers")
    before = [layer.gradient_checkpointing for layer in layers]
    for i, layer in enumerate(layers):
        layer.gradient_checkpointing = i < count
    try:
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer.gradient_checkpointing = flag


@dataclass(slots=True, weakref_slot=True)
class _Copy:
    """A tensor in host memory, and where it came from."""

    values: Tensor
    device: torch.device


def check_offloading(config: TrainConfig, device: torch.device) -> None:
    """ConfigError where there is nothing to offload from."""
    if config.activation_offloading and device.type == "cpu":
        raise ConfigError("activation_offloading moves activations from a GPU to host memory: leave it out on a CPU")
    if config.activation_offloading and config.fsdp != "no":  # gathered weights would travel too
        raise ConfigError(
            "activation_offloading does not go with fsdp: use gradient_checkpointing, or fsdp_cpu_offload"
        )


OFFLOADED_BYTES = 64 << 10  # smaller tensors stay: a copy costs its launch, however few its bytes


@contextlib.contextmanager
def offloading(policy: Policy) -> Iterator[None]:
    """What the trunk saves for its backward pass is kept in host memory, each tensor once, and brought back for it.

    Weights stay where they are. With gradient checkpointing these are the inputs of the layers. The copies run in the
    stream of the computation, so they are exact without events, and cost their time.
    """
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    # Three projections save one input: by its storage while that lives, and place therein.
    copies: dict[tuple, tuple[weakref.ref, weakref.ref]] = {}

    def pack(tensor: Tensor) -> Tensor | _Copy:
        storage = tensor.untyped_storage()
        if tensor.nbytes < OFFLOADED_BYTES or storage.data_ptr() in weights or tensor.layout != torch.strided:
            return tensor
        key = (
            storage.data_ptr(),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor._version,
        )
        source, known = copies.get(key, (None, None))
        if source is not None and source() is storage and (copy := known()) is not None:
            return copy
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copy = _Copy(host.copy_(tensor.detach(), non_blocking=True), tensor.device)
        copies[key] = (weakref.ref(storage), weakref.ref(copy))
        return copy

    def unpack(saved: Tensor | _Copy) -> Tensor:
        return saved.values.to(saved.device, non_blocking=True) if isinstance(saved, _Copy) else saved

    entered: list[saved_tensors_hooks] = []

    def enter(*_: Any) -> None:
        copies.clear()
        entered.append(saved_tensors_hooks(pack, unpack))
        entered[-1].__enter__()

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    # always_call: hooks that outlive a forward pass that failed would offload the head's tensors too.
    handles = [policy.trunk.register_forward_pre_hook(enter),
               policy.trunk.register_forward_hook(leave, always_call=True)]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block. Every module's own mode is put back: a frozen part may be in eval mode while the rest
    trains."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A reference model where and how it is needed; put back afterwards, so that it holds no device memory."""
    home = next(model.parameters()).device
    with eval_mode(model):
        if not is_quantized(model):
            model.to(device)
        try:
            yield
        finally:
            if not is_quantized(model):
                model.to(home)


def check_ids(policy: Policy, examples: Sequence[Example], name: str) -> None:
    """Token ids and positions must exist in the model: on a GPU the look-up of one that does not is a lost context."""
    rows = policy.causal_lm.get_input_embeddings().weight.shape[0]
    # By their identity: what stands in for responses that are not drawn yet is the same in all rows.
    arrays = {id(ids): ids for e in examples for ids in (e.prompt_ids, *e.responses)}
    largest = max(int(ids.max()) for ids in arrays.values())
    if largest >= rows:
        raise DataError(
            f"the {name} data hold token id {largest}, but the model has {rows} embeddings: "
            "call model.resize_token_embeddings(len(tokenizer)), or use the model's own tokenizer"
        )
    positions = ("wpe", "embed_positions")
    learnt = [
        module.num_embeddings
        for path, module in policy.trunk.named_modules()
        if path.rpartition(".")[2] in positions and isinstance(module, nn.Embedding)
    ]
    longest = max(len(e.prompt_of(k)) + len(r) for e in examples for k, r in enumerate(e.responses))
    if learnt and longest > min(learnt):
        raise DataError(
            f"the {name} data hold a row of {longest} tokens, the model has {min(learnt)} positions: set max_length"
        )


def interval(value: float, total: int) -> int:
    """Steps; below 1 a share of all steps, as in transformers."""
    return max(1, math.ceil(value * total) if value < 1 else int(value))
