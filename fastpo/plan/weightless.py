"""A training step over fake tensors, which have shapes and no memory: what lives after each of its operations.

The model is made of its configuration alone, and the step is the trainer's own code: trunk, checkpointing, adapters,
head op, hooks, fp32 accumulation, whatever the architecture. Not seen are the insides of single kernels. Packed
attention is taken to keep its inputs, its output and log-sum-exp, as FlashAttention and the CPU kernel do.
"""

import contextlib
import copy
import dataclasses
import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoConfig

from fastpo.config.train_config import TrainConfig
from fastpo.data import Example
from fastpo.data.packing import collate
from fastpo.errors import ConfigError
from fastpo.models import adapters, attention, cpu_layers
from fastpo.models.adapters import first_line
from fastpo.models.loading import empty_model, loading_dtype
from fastpo.models.modes import training_mode
from fastpo.models.policy import Policy
from fastpo.models.scalar_head import has_scalar_head, policy_of
from fastpo.models.trunk import freeze_towers
from fastpo.training.inputs import model_name
from fastpo.training.optim import NARROW, Gradients

CHAIN = 64  # tokens of a fake batch's chains: within the positions of any model


# ---- living bytes


class _Tracker(TorchDispatchMode):
    """Notes the bytes of all living storages that were made inside, after every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.known: set[int] = set()
        self.trace: list[int] = []
        self.at_head: list[int] = []  # places in the trace of the head op, forward and backward

    def add(self, tensor: Tensor, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.known:
            nbytes = storage.nbytes() if counts else 0
            self.known.add(key)
            self.live += nbytes
            weakref.finalize(storage, self._freed, key, nbytes).atexit = False

    def _freed(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.live -= nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        if str(func).startswith("fastpo.linear_logprob"):
            self.at_head.append(len(self.trace))
        self.trace.append(self.live)
        return out


class _PackedAttention(torch.autograd.Function):
    """What a packed attention kernel keeps and returns, and none of its arithmetic."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        _, heads, tokens, _ = query.shape
        out = query.new_empty(1, tokens, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(1, tokens, heads, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    dtype = attention.compute_dtype(query, value)
    return _PackedAttention.apply(query.to(dtype), key.to(dtype), value.to(dtype)), None


@contextlib.contextmanager
def _fake_attention() -> Iterator[None]:
    AttentionInterface.register(attention.NAME, _attention)
    try:
        yield
    finally:
        attention.register()


@contextlib.contextmanager
def _offloaded(trunk: nn.Module, wanted: bool, weights: set[int]) -> Iterator[None]:
    """activation_offloading without the host's side: what is saved leaves the device, and comes back when needed."""

    def pack(t: Tensor) -> Any:
        return t if t.untyped_storage()._cdata in weights else (t.shape, t.dtype)

    def unpack(saved: Any) -> Tensor:
        return saved if isinstance(saved, Tensor) else torch.empty(saved[0], dtype=saved[1])

    if not wanted:
        yield
        return
    hooks: list[saved_tensors_hooks] = []

    def enter(*_: Any) -> None:
        hooks.append(saved_tensors_hooks(pack, unpack))
        hooks[-1].__enter__()

    def leave(*_: Any) -> None:
        hooks.pop().__exit__(None, None, None)

    handles = [trunk.register_forward_pre_hook(enter), trunk.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---- a model without weights


@dataclass
class Blueprint:
    """A policy over fake tensors, and what its real weights take."""

    policy: Policy
    mode: FakeTensorMode
    weights: int  # bytes
    scratch: int = 0  # bytes: the largest quantised matrix in the dtype it computes in
    quantized: str = ""

    @classmethod
    def of_model(cls, model: nn.Module) -> "Blueprint":
        """Of a model in memory, which is not touched."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        if adapters.is_quantized(model):
            wrapped: Any = model
            inner: Any = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
            peft_config = next(iter(getattr(model, "peft_config", {}).values()), None)
            quantization = inner.config.quantization_config
            config = copy.deepcopy(inner.config)
            del config.quantization_config
            scalar = has_scalar_head(model)
            return cls._build(mode, config, inner.dtype, peft_config, quantization, scalar_head=scalar)
        weights = nbytes_of([*model.parameters(), *model.buffers()])
        with FakeCopyMode(mode):
            fake = copy.deepcopy(model)
        _without_memory(fake, mode)  # on the CPU, where the fake batch is
        return cls(policy_of(fake), mode, weights)

    @classmethod
    def of_name(
        cls, name: str, config: TrainConfig, peft_config: Any = None, quantization: Any = None, argument: str = "model"
    ) -> "Blueprint":  # fmt: skip
        """Of a model by name or path, from its configuration alone."""
        kwargs = {**(config.model_init_kwargs or {}), "trust_remote_code": config.trust_remote_code}
        where = name = model_name(argument, name) or name
        if adapter := adapters.saved_adapter(name):
            if peft_config is not None:
                raise ConfigError("peft_config is given, but the model has an adapter already")
            where, peft_config = adapter.base_model_name_or_path, adapter
            where = model_name(f"the base of the adapter {name!r}", where) or where
            peft_config.inference_mode = False
        parsed = loading_dtype(config.dtype, kwargs)
        for of_loading in ("attn_implementation", "device_map", "low_cpu_mem_usage", "max_memory"):
            kwargs.pop(of_loading, None)
        try:
            of_model = AutoConfig.from_pretrained(where, **kwargs)
        except Exception as error:  # a configuration may be wrong in any way
            raise ConfigError(f"{where!r} is no model that can be planned: {first_line(error)}") from error
        if not isinstance(parsed, torch.dtype):
            parsed = getattr(of_model, "dtype", None) or torch.float32
        quantization = quantization or getattr(of_model, "quantization_config", None)
        if hasattr(of_model, "quantization_config"):
            del of_model.quantization_config
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        scalar = config.scalar_head and argument == "model"
        return cls._build(mode, of_model, parsed, peft_config, quantization, config.trust_remote_code, where, scalar)

    @classmethod
    def _build(
        cls, mode: FakeTensorMode, of_model: Any, dtype: torch.dtype, peft_config: Any, quantization: Any,
        trust_remote_code: bool = False, where: str = "", scalar_head: bool = False,
    ) -> "Blueprint":  # fmt: skip
        try:
            with torch.device("meta"):
                model = empty_model(of_model, dtype, where, trust_remote_code, scalar_head)
        except (ValueError, ImportError) as error:
            what = "reward model" if scalar_head else "causal language model"
            raise ConfigError(f"no {what} of {of_model.model_type!r}: {first_line(error)}") from error
        weights = nbytes_of([*model.parameters(), *model.buffers()])
        scratch, kind = 0, ""
        if quantization is not None:
            saved, scratch, kind = _quantized(model, quantization)
            weights -= saved
            if peft_config is None:
                raise ConfigError("a quantised model cannot be trained itself: pass peft_config (--use-peft) for an "
                                  "adapter")  # fmt: skip
        before = nbytes_of([*model.parameters(), *model.buffers()])
        if peft_config is not None:
            peft_config = copy.deepcopy(peft_config)
            if hasattr(peft_config, "init_lora_weights"):
                peft_config.init_lora_weights = True  # others read the weights
            with torch.device("meta"):
                model = adapters.with_adapter(model, peft_config)
        weights += nbytes_of([*model.parameters(), *model.buffers()]) - before
        freeze_towers(model)
        _without_memory(model, mode)
        return cls(policy_of(model), mode, weights, scratch, kind)


def _without_memory(model: nn.Module, mode: FakeTensorMode) -> None:
    """Every parameter and buffer of a model without memory becomes a fake one on the CPU; tied ones stay tied."""
    fakes: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in fakes:
            with mode:
                new = torch.empty(tensor.shape, dtype=tensor.dtype)
                is_parameter = isinstance(tensor, nn.Parameter)
                fakes[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if is_parameter else new
        return fakes[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)  # type: ignore[assignment]
        for name, value in vars(module).items():  # a rotary embedding's first frequencies, which are no buffer
            if isinstance(value, Tensor):
                setattr(module, name, fake(value))


def nbytes_of(tensors: Sequence[Tensor]) -> int:
    """Of distinct storages: tied weights count once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _quantized(model: Any, quantization: Any) -> tuple[int, int, str]:
    """(bytes that quantising saves, bytes of the largest matrix while it computes, which kind) by bitsandbytes."""
    get = quantization.get if isinstance(quantization, Mapping) else functools.partial(_attribute, quantization)
    four, eight = get("load_in_4bit", False), get("load_in_8bit", False)
    if not (four or eight):
        raise ConfigError(f"a model quantised by {get('quant_method', 'this method')} cannot be planned: bitsandbytes")
    skip = get("llm_int8_skip_modules", None) or ["lm_head"]
    head = model.get_output_embeddings()
    linear = [m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head
              and not any(part in name.split(".") or name == part for part in skip)]  # fmt: skip
    count = sum(w.numel() for w in linear)
    if four:  # half a byte, and a scale for every 64: in fp32, or in 8 bits with a scale for every 256 of these
        each = 0.5 + (1 / 64 + 4 / (64 * 256) if get("bnb_4bit_use_double_quant", False) else 4 / 64)
        after = each * count
    else:
        after = count + 4 * sum(w.shape[0] for w in linear)
    largest = max((w.numel() * w.element_size() for w in linear), default=0)
    return int(sum(w.nbytes for w in linear) - after), largest if four else 0, "4 bits" if four else "8 bits"


def _attribute(owner: Any, name: str, default: Any) -> Any:
    return getattr(owner, name, default)


# ---- the run


@dataclass
class Run:
    masters: int
    gradients: int
    stepped: int  # numbers that the optimiser steps
    saved: int
    traces: dict[str, tuple[list[int], list[int]]]  # by regime: bytes after every operation, and after the head op's


def simulate(
    blueprint: Blueprint, config: TrainConfig, tokens: int, row_share: float, autocast: bool, *, on_cpu: bool,
    regimes: Sequence[str] = ("kept", "sliced"),
) -> Run:  # fmt: skip
    """A micro-batch of `tokens`, every gradient being there already, as in all micro-batches but a step's first.
    on_cpu: where it will run, with the layers that are fused there. regimes: of a trained head."""
    policy, mode = blueprint.policy, blueprint.mode
    model = policy.model
    if policy.unpacked:
        raise ConfigError(f"{type(policy.causal_lm).__name__} runs unpacked, which cannot be planned: set max_tokens")
    # Layers run as they are written: what a compiler leaves out of memory is more, and it has no fake tensors.
    plain = dataclasses.replace(
        config, activation_offloading=False, torch_compile=False, torch_compile_backend=None, torch_compile_mode=None
    )
    per_chain = max(1, round(CHAIN * row_share))
    prompt = np.ones(max(1, CHAIN + 1 - per_chain), np.int32)
    example = Example(prompt, [np.ones(CHAIN + 1 - len(prompt), np.int32)])
    policy.place([example])
    batch = collate([example], [0] * (tokens // CHAIN))
    moved: dict[str, Any] = {f.name: mode.from_tensor(value) for f in dataclasses.fields(batch)
                             if isinstance(value := getattr(batch, f.name), Tensor)}  # fmt: skip
    batch = dataclasses.replace(batch, **moved)
    tracker = _Tracker()
    weights = [*model.parameters(), *model.buffers()]
    for tensor in weights:
        tracker.add(tensor, counts=False)
    stored = {t.untyped_storage()._cdata for t in weights}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mode)
        stack.enter_context(_fake_attention())
        if on_cpu and not config.torch_compile:
            stack.enter_context(cpu_layers.of_fake_tensors())
        stack.enter_context(training_mode(policy, plain))
        stack.enter_context(_offloaded(policy.trunk, config.activation_offloading, stored))
        stack.enter_context(tracker)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        gradients = Gradients(trained, master_weights=config.master_weights, seed=0)
        masters = tracker.live
        gradients.begin(2, 1)
        for p in trained.values():
            if p.dtype in NARROW:
                gradients.buffers[p] = torch.zeros_like(p, dtype=torch.float32)
            else:
                p.grad = torch.zeros_like(p)
        base = tracker.live
        head = policy.head()
        saved, traces = 0, {}
        trains_head = head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad)
        budgets = {"kept": 1 << 62, "sliced": 0, "frozen": 0}
        for regime in regimes if trains_head else ("frozen",):
            tracker.trace.clear()
            tracker.at_head.clear()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logp = policy.read(batch, memory_budget=budgets[regime])
            saved = tracker.live - base
            logp.sum().backward()
            del logp
            trace = [nbytes - base for nbytes in tracker.trace]
            traces[regime] = trace, [trace[i] for i in tracker.at_head]
        out = Run(masters, base - masters, sum(p.numel() for p in trained.values()), saved, traces)
        gradients.close()
    return out
