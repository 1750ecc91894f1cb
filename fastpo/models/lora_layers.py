"""PEFT's LoRA on linear layers as few matrix multiplies in one dtype, forward and backward.

PEFT computes `base(x) + B(A(x)) * scaling` with x cast to the adapter's dtype and back: with fp32 adapters on a bf16
base, casts and sums of whole activations, and fp32 GEMMs. Here the adapter is cast to the dtype of the base's multiply,
once a step (ops/casts.py), with the scaling in A; A's of layers that read the same tensor (q, k, v; gate, up) are one
matrix; and B's product is added by the GEMM that makes it. The parameters, which stay PEFT's, get their gradients in
their own dtype.

What is not plain LoRA on a frozen `nn.Linear` (dropout at work, DoRA and other variants, several adapters, merged or
disabled ones, hooks inside, quantised bases) runs PEFT's forward: this is asked in every call.

T = tokens, D = inputs, O = outputs, r = rank, R = the sum of joined ranks.
"""

import contextlib
import functools
import logging
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.nn import functional as F

from fastpo.ops import casts

log = logging.getLogger("fastpo")

# Layers of one parent that families call with one tensor. Whether they do is seen in every call.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
_KINDS = (Tensor, nn.Parameter, FakeTensor)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def adapted(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """x W^T + bias + x (scale A)^T B^T in x's dtype: what the fused layers compute, as plain operations.

    x [..., D], weight [O, D], bias [O], a [r, D], b [O, r] -> [..., O].
    """
    y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    p = F.linear(x, (a * scale).to(x.dtype))
    y = torch.addmm(y.flatten(0, -2), p.flatten(0, -2), b.to(x.dtype).t()).view(y.shape)
    return y


# ---- the adapter of a layer as it stands


class _Adapter(NamedTuple):
    """The only active adapter of a layer, and the dtype that it multiplies in."""

    a: Tensor  # [r, D]
    b: Tensor  # [O, r]
    bias: Tensor | None  # B's [O]
    scale: float
    dtype: torch.dtype


def _linear(module: Any) -> bool:
    """Whether it is F.linear of a plain weight and no more."""
    return type(module) is nn.Linear and type(module.weight) in _KINDS and "forward" not in module.__dict__ and not any(
        getattr(module, hooks) for hooks in _HOOKS
    )  # fmt: skip


def _adapter(layer: Any, x: Tensor) -> _Adapter | None:
    """None where PEFT's forward is to run."""
    if layer.disable_adapters or layer.merged or not getattr(layer, "cast_input_dtype_enabled", True):
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or names[0] in getattr(layer, "lora_variant", ()):
        return None
    base, a, b, drop = layer.base_layer, *(of[names[0]] for of in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    if not (_linear(base) and _linear(a) and _linear(b)) or base.weight.requires_grad or a.bias is not None:
        return None
    if not isinstance(drop, nn.Identity) and not (type(drop) is nn.Dropout and (drop.p == 0 or not drop.training)):
        return None
    device = x.device
    if device.type not in ("cpu", "cuda") or any(w.device != device for w in (base.weight, a.weight, b.weight)):
        return None
    dtype = base.weight.dtype
    if torch.is_autocast_enabled(device.type):
        if torch.float64 in (x.dtype, dtype):
            return None
        dtype = torch.get_autocast_dtype(device.type)
    elif x.dtype != dtype:
        return None
    return _Adapter(a.weight, b.weight, b.bias, layer.scaling[names[0]], dtype)


def _bias(base: Tensor | None, adapter: _Adapter) -> Tensor | None:
    """The base's, and that of B (lora_bias), which is scaled with it; [O]."""
    if adapter.bias is None:
        return base
    own = adapter.bias * adapter.scale
    return own if base is None else base + own


# ---- forward and backward


def _joined(adapters: Sequence[_Adapter]) -> Tensor:
    """The scaled A's of layers that read one tensor, below one another [R, D], in the dtype of the multiply."""
    weights = [adapter.a for adapter in adapters]
    scales = tuple(adapter.scale for adapter in adapters)

    def make() -> Tensor:
        with torch.no_grad():
            return torch.cat([w.to(_wide(w.dtype)) * s for w, s in zip(weights, scales, strict=True)]).to(dtype)

    dtype = adapters[0].dtype
    return casts.once(("A", scales, dtype), weights, make)


def _narrow(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in the dtype of the multiply, without a gradient."""
    if weight.dtype == dtype:
        return weight.detach()
    return casts.once(("W", dtype), (weight,), lambda: weight.detach().to(dtype))


def _frozen(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A base's weight in the dtype of the multiply. On a GPU the cast is fast and a copy of the base would be large."""
    return _narrow(weight, dtype) if weight.device.type == "cpu" else weight.detach().to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b of the gradient of a weight: fp32 where the device's GEMM gives it, else the dtype of a and b."""
    if a.device.type == "cuda" and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def _gradient_of_b(p: Tensor, dy: Tensor, dtype: torch.dtype) -> Tensor:
    """dy^T p [O, r] of p [T, r] and dy [T, O], as (p^T dy)^T: the GEMM is faster with the long side last."""
    out = torch.empty(dy.shape[1], p.shape[1], dtype=dtype, device=dy.device)
    return out.copy_(_product(p.t(), dy).t())


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(x.device.type, enabled=False)


class _Leader(torch.autograd.Function):
    """A layer's result [..., O], and x A^T [T, r] of each layer that is joined to it and called after it."""

    @staticmethod
    def forward(
        ctx: Any, joined: Tensor, adapters: Sequence[_Adapter], x: Tensor, weight: Tensor, bias: Tensor | None,
        b: Tensor, *weights: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        dtype, ranks = joined.dtype, [w.shape[0] for w in weights]
        with _no_autocast(x):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            narrow = _narrow(b, dtype)
            p = torch.mm(rows, joined.t())  # [T, R]
            y = F.linear(rows, _frozen(weight, dtype), None if bias is None else bias.to(dtype))
            y.addmm_(p[:, : ranks[0]], narrow.t())
        ctx.save_for_backward(rows, p, weight)
        # Casts, not what was passed in: saved tensors may travel (activation_offloading), and these are kept anyway.
        ctx.joined, ctx.b, ctx.ranks, ctx.scales = joined, narrow, ranks, [adapter.scale for adapter in adapters]
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, bias.dtype if bias is not None else None, b.dtype, weights[0].dtype)
        ctx.set_materialize_grads(False)
        return y.view(*x.shape[:-1], -1), *p.split(ranks, 1)[1:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *dps: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, p, weight = ctx.saved_tensors
        of_x, of_weights = ctx.needs_input_grad[2], ctx.needs_input_grad[6:]
        dtype, r = rows.dtype, ctx.ranks[0]
        dx = dbias = db = None
        grads: list[Tensor | None] = [None] * len(of_weights)
        with _no_autocast(rows):
            dp = rows.new_empty(rows.shape[0], sum(ctx.ranks))  # [T, R]
            for part, grad in zip(dp.split(ctx.ranks, 1)[1:], dps, strict=True):
                part.zero_() if grad is None else part.copy_(grad)
            if dy is None:
                dp[:, :r].zero_()
            else:
                dy = dy.reshape(-1, dy.shape[-1]).to(dtype)
                torch.mm(dy, ctx.b, out=dp[:, :r])
                dbias = dy.sum(0, dtype=ctx.dtypes[1]) if ctx.needs_input_grad[4] else None
                db = _gradient_of_b(p[:, :r], dy, ctx.dtypes[2]) if ctx.needs_input_grad[5] else None
            if of_x:
                if dy is None:
                    dx = torch.mm(dp, ctx.joined)
                else:
                    dx = torch.mm(dy, _frozen(weight, dtype)).addmm_(dp, ctx.joined)
                dx = dx.view(ctx.shape).to(ctx.dtypes[0])
            if any(of_weights):
                parts = _product(dp.t(), rows).split(ctx.ranks)
                wide = _wide(ctx.dtypes[3])
                grads = [(g.to(wide) * s).to(ctx.dtypes[3]) if need else None
                         for g, s, need in zip(parts, ctx.scales, of_weights, strict=True)]  # fmt: skip
        return None, None, dx, None, dbias, db, *grads


class _Follower(torch.autograd.Function):
    """The result [..., O] of a layer whose p = x A^T [T, r] came with that of another one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, p: Tensor, b: Tensor) -> Tensor:
        dtype = p.dtype
        with _no_autocast(x):
            narrow = _narrow(b, dtype)
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            y = F.linear(rows, _frozen(weight, dtype), None if bias is None else bias.to(dtype))
            y.addmm_(p, narrow.t())
        ctx.save_for_backward(p, weight)
        ctx.b, ctx.shape, ctx.dtypes = narrow, x.shape, (x.dtype, bias.dtype if bias is not None else None, b.dtype)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        p, weight = ctx.saved_tensors
        of_x, _, of_bias, of_p, of_b = ctx.needs_input_grad
        with _no_autocast(p):
            dy = dy.reshape(-1, dy.shape[-1]).to(p.dtype)
            dx = torch.mm(dy, _frozen(weight, p.dtype)).view(ctx.shape).to(ctx.dtypes[0]) if of_x else None
            dbias = dy.sum(0, dtype=ctx.dtypes[1]) if of_bias else None
            dp = torch.mm(dy, ctx.b) if of_p else None
            db = _gradient_of_b(p, dy, ctx.dtypes[2]) if of_b else None
        return dx, None, dbias, dp, db


class _Waiting(NamedTuple):
    """What a layer's siblings need not compute again, of one tensor as it was."""

    x: weakref.ref
    state: tuple
    parts: dict[int, tuple[_Adapter, Tensor]]  # by the sibling's id: its adapter then, and its x A^T [T, r]


class _Group:
    """Layers that families call with one tensor."""

    def __init__(self, layers: Sequence[nn.Module]):
        self.layers = list(layers)

    def take(self, layer: nn.Module, x: Tensor, adapter: _Adapter) -> Tensor | None:
        """x A^T [T, r] of this layer if a sibling has computed it, of this very tensor in its present state."""
        waiting = casts.scratch.get(id(self))
        if waiting is None or id(layer) not in waiting.parts:
            return None
        if waiting.x() is not x or waiting.state != _state(x):
            return None
        then, p = waiting.parts.pop(id(layer))
        if not waiting.parts:
            del casts.scratch[id(self)]
        same = then.a is adapter.a and then.scale == adapter.scale and then.dtype == adapter.dtype
        return p if same else None

    def others(self, layer: nn.Module, x: Tensor, adapter: _Adapter) -> list[tuple[nn.Module, _Adapter]]:
        found = ((other, _adapter(other, x)) for other in self.layers if other is not layer)
        return [(other, own) for other, own in found if own is not None and own.dtype == adapter.dtype
                and own.a.dtype == adapter.a.dtype and own.a.shape[1] == adapter.a.shape[1]]  # fmt: skip

    def leave(self, x: Tensor, others: Sequence[tuple[nn.Module, _Adapter]], parts: Sequence[Tensor]) -> None:
        left = {id(other): (own, p) for (other, own), p in zip(others, parts, strict=True)}
        casts.scratch[id(self)] = _Waiting(weakref.ref(x), _state(x), left)


def _state(x: Tensor) -> tuple:
    return x._version, torch.is_grad_enabled()


class FusedLoRA:
    """The LoRA layers of a model, computed as above while it is `on`; no name of the model's changes."""

    def __init__(self, trunk: nn.Module):
        self.layers: list[Any] = []
        self.groups: dict[int, _Group] = {}  # by the layer's id: a deep copy that a callback makes is in none
        kind = _lora_linear()
        if kind is None:
            return
        for parent in trunk.modules():
            own = {n: m for n, m in parent.named_children() if type(m) is kind and "forward" not in vars(m)}
            self.layers += own.values()
            for names in _SIBLINGS:
                if len(siblings := [own[name] for name in names if name in own]) > 1:
                    group = _Group(siblings)
                    self.groups.update((id(layer), group) for layer in siblings)
        if self.layers and (why := _disagrees(next(trunk.parameters()).device.type)):
            log.warning("LoRA layers run as PEFT has them: fused ones %s", why)
            self.layers = []
        self.forward = _forward(kind, self.groups)  # once: torch_compile compiles anew for another

    def switch(self, on: bool) -> None:
        casts.scratch.clear()
        for layer in self.layers:
            if on:
                layer.forward = MethodType(self.forward, layer)
            else:
                vars(layer).pop("forward", None)


def _forward(kind: Any, groups: Mapping[int, _Group]) -> Callable[..., Tensor]:
    """In place of the method of a class of PEFT's."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = None if args or kwargs else _adapter(self, x)
        if adapter is None:
            return kind.forward(self, x, *args, **kwargs)
        base = self.base_layer
        bias = _bias(base.bias, adapter)
        if torch.compiler.is_compiling():  # it fuses by itself, and does not see from one layer to the next
            return adapted(x.to(adapter.dtype), base.weight, bias, adapter.a, adapter.b, adapter.scale)
        group = None if x.is_inference() else groups.get(id(self))
        if group is not None and (p := group.take(self, x, adapter)) is not None:
            return _Follower.apply(x, base.weight, bias, p, adapter.b)
        others = [] if group is None else group.others(self, x, adapter)
        adapters = [adapter, *(own for _, own in others)]
        weights = [own.a for own in adapters]
        y, *parts = _Leader.apply(_joined(adapters), adapters, x, base.weight, bias, adapter.b, *weights)
        if others:
            assert group is not None
            group.leave(x, others, parts)
        return y

    return forward


# ---- whether PEFT's layers compute just this


def _lora_linear() -> Any:
    """PEFT's class; None where nobody has imported it, so that no model can have it."""
    return getattr(sys.modules.get("peft.tuners.lora.layer"), "Linear", None)


@functools.cache
def _disagrees(device: str) -> str:
    """What is wrong with the fused layers beside PEFT's on random numbers, in fp32 and bf16; else ""."""
    import peft

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, size) for size in (48, 16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)

    # A run's random numbers are not to depend on what has been tried.
    with (
        torch.enable_grad(), unset_fake_temporarily(), torch.autocast(device, enabled=False), torch.device("cpu"),
        torch.random.fork_rng(devices=[]),
    ):  # fmt: skip
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "k_proj", "v_proj"],
                                 rank_pattern={"k_proj": 8}, init_lora_weights=False)  # fmt: skip
        model = peft.inject_adapter_in_model(config, Three()).to(device)
        numbers, upstream = torch.randn(7, 32, device=device), torch.randn(7, 80, device=device)
        learnt = [p for p in model.parameters() if p.requires_grad]

        def results(dtype: torch.dtype) -> list[Tensor]:
            for name, p in model.named_parameters():
                if "lora_" not in name:
                    p.data = p.data.to(dtype)
            x = numbers.to(dtype).requires_grad_()
            y = model(x)
            return [y.detach(), *torch.autograd.grad(y, [x, *learnt], upstream.to(dtype))]

        for dtype, limit in ((torch.float32, 2e-3), (torch.bfloat16, 5e-2)):
            fused = FusedLoRA.__new__(FusedLoRA)
            fused.layers = [model.q_proj, model.k_proj, model.v_proj]
            group = _Group(fused.layers)
            fused.forward = _forward(type(model.q_proj), {id(layer): group for layer in fused.layers})
            try:
                theirs = results(dtype)
                fused.switch(True)
                ours = results(dtype)
            except Exception as error:  # this PEFT's layers are made otherwise
                return f"fail on {dtype}: {type(error).__name__}"
            finally:
                fused.switch(False)
            if not all(a.dtype == b.dtype and (a - b).float().norm() <= limit * b.float().norm()
                       for a, b in zip(ours, theirs, strict=True)):  # fmt: skip
                return f"do not agree with them in {dtype}"
    return ""
