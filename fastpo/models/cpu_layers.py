"""A decoder's elementwise layers on a CPU, each in one pass of compiled code (csrc/layers.inc) and one backward.

What Liger's kernels are to a GPU: RMSNorm, rotary embeddings and SiLU of the gate times up take several passes each as
transformers writes them, with fp32 copies between. Here memory holds the model's dtype, arithmetic is fp32, and results
are rounded once. A layer is replaced only where a trial on random numbers shows that its class computes just this.

T = tokens, H = heads, D = head size, M = columns.
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from transformers.modeling_layers import GradientCheckpointingLayer

from fastpo.ops import backends

NAMES = ("rms_norm", "rope", "swiglu")  # as Liger calls them

_DTYPES = (torch.float32, torch.bfloat16)
_LANES = 16  # kLanes of csrc/tile.inc
_CHUNK = 32  # kLayerRows of csrc/ext.cpp
_RMS_NORM, _SILU_MUL, _ROTARY = range(3)  # LayerKind of csrc/ext.cpp
_kinds: tuple[type, ...] = (Tensor, nn.Parameter)  # that are read through a pointer
_ROPE = "apply_rotary_pos_emb"  # transformers' name for it, in every family's file


def _pass(
    kind: int, x: Tensor, w: Tensor, *, y: Tensor, dy: Tensor | None = None, dx: Tensor | None = None,
    dw: Tensor | None = None, rstd: Tensor | None = None, sums: Tensor | None = None, rows: int, cols: int,
    heads: int = 1, ld: tuple[int, ...] = (0, 0, 0), eps: float = 0.0, offset: float = 0.0, back: bool = False,
) -> None:  # fmt: skip
    if isinstance(x, FakeTensor):
        return
    pointers = (0 if t is None else t.data_ptr() for t in (x, w, dy, y, dx, dw, rstd, sums))
    half = (t.dtype == torch.bfloat16 for t in (x, w, y))
    backends.compiled.layer_pass(
        kind, *pointers, rows, cols, heads, *ld, eps, offset, *half, back, torch.get_num_threads()
    )  # fmt: skip


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, dtype: torch.dtype) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        rows, cols = x.numel() // x.shape[-1], x.shape[-1]
        y, rstd = torch.empty(x.shape, dtype=dtype), torch.empty(rows, dtype=torch.float32)
        _pass(_RMS_NORM, x, weight, y=y, rstd=rstd, rows=rows, cols=cols, eps=eps, offset=offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset, ctx.dtype = offset, dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        rows, cols = rstd.numel(), x.shape[-1]
        dy, dx = dy.to(ctx.dtype).contiguous(), torch.empty_like(x)
        sums = torch.empty(-(-rows // _CHUNK), cols) if ctx.needs_input_grad[1] else None
        _pass(_RMS_NORM, x, weight, y=dy, dy=dy, dx=dx, rstd=rstd, sums=sums, rows=rows, cols=cols, offset=ctx.offset)
        return dx, None if sums is None else sums.sum(0).to(weight.dtype), None, None, None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        y = torch.empty(gate.shape, dtype=gate.dtype)
        rows, cols, ld = _as_rows(gate, up)
        _pass(_SILU_MUL, gate, up, y=y, rows=rows, cols=cols, ld=(*ld, 0))
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dy = dy.to(gate.dtype).contiguous()
        dgate, dup = torch.empty(gate.shape, dtype=gate.dtype), torch.empty(gate.shape, dtype=gate.dtype)
        rows, cols, ld = _as_rows(gate, up)
        _pass(_SILU_MUL, gate, up, y=dy, dy=dy, dx=dgate, dw=dup, rows=rows, cols=cols, ld=(*ld, cols))
        return dgate, dup


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, back=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _turn(dy, *ctx.saved_tensors, back=True), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """x [1, H, T, D], any strides but the last; cos and sin [1, T, D] -> the same shape, token-major in memory."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    _, heads, tokens, size = x.shape
    y = torch.empty(1, tokens, heads, size, dtype=x.dtype)
    ld = (x.stride(2), x.stride(1), 0)
    _pass(_ROTARY, x, cos, y=y, dy=sin, rows=tokens, cols=size, heads=heads, ld=ld, back=back)
    return y.transpose(1, 2)


def _as_rows(*tensors: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """(rows, columns, distances of rows) of tensors [..., M] whose rows lie at equal distances."""
    cols = tensors[0].shape[-1]
    return tensors[0].numel() // cols, cols, tuple(t.stride(-2) if t.dim() > 1 else cols for t in tensors)


def _dense(*tensors: Tensor, multiple: int = _LANES) -> bool:
    """Whether all are plain fp32 or bf16 tensors of a CPU whose last dimension compiled code can walk through."""
    return all(
        type(t) in _kinds and t.device.type == "cpu" and t.dtype in _DTYPES and t.numel() > 0
        and t.stride(-1) == 1 and t.shape[-1] % multiple == 0
        for t in tensors
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dimension -> [..., M] in `dtype` (default: x's)."""
    return _RMSNorm.apply(x, weight, eps, offset, dtype or x.dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [..., M] each, of one dtype."""
    return _SiluMul.apply(gate, up)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [1, H, T, D] and k [1, G, T, D] turned by the angles of their tokens, cos and sin [1, T, D]."""
    return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)


# ---- which of a model's layers compute just this


def available() -> bool:
    return backends.compiled is not None


@contextlib.contextmanager
def of_fake_tensors() -> Iterator[None]:
    """Inside, fake tensors take the fused layers too, without their arithmetic: the memory they hold can be counted."""
    global _kinds
    before, _kinds = _kinds, (*_kinds, FakeTensor)
    try:
        yield
    finally:
        _kinds = before


class FusedLayers:
    """The layers of a trunk that compute what is fused here, in place of their own while it is `on`; no name of the
    model's changes. `without`: of NAMES, what stays."""

    def __init__(self, trunk: nn.Module, without: Collection[str] = ()):
        self._forwards: list[tuple[nn.Module, Callable[..., Tensor]]] = []
        self._files: dict[str, Any] = {}  # of families, with their own rotary function
        if not available():
            return
        layers = [m for m in trunk.modules() if isinstance(m, GradientCheckpointingLayer)]
        inner = {id(m) for layer in layers for m in layer.modules()}
        for module in trunk.modules():
            forward = None if "forward" in vars(module) else _fused_forward(module, id(module) in inner, without)
            if forward is not None:  # and nobody else has replaced it
                self._forwards.append((module, forward))
            file = type(module).__module__
            if "rope" not in without and file not in self._files and _turns_halves(file):
                self._files[file] = getattr(sys.modules[file], _ROPE)

    def switch(self, on: bool) -> None:
        for module, forward in self._forwards:
            if on:
                module.forward = forward
            else:
                vars(module).pop("forward", None)
        for file, original in self._files.items():
            setattr(sys.modules[file], _ROPE, _rotary_or(original) if on else original)


def _fused_forward(module: Any, inner: bool, without: Collection[str]) -> Callable[..., Tensor] | None:
    """In place of a module's method, bound to it: a deep copy that a callback makes has its own."""
    kind: Any = type(module)
    if kind.__name__.endswith("RMSNorm"):
        if "rms_norm" in without or (rule := _norm_rule(kind, _eps(module))) is None:
            return None
        eps, offset = rule

        def norm(self: Any, x: Tensor) -> Tensor:
            mixed = x.dtype == torch.bfloat16 != self.weight.dtype
            if torch.compiler.is_compiling() or mixed or not _dense(x, self.weight):
                return kind.forward(self, x)
            # The matrix multiplies that read it would cast it, each for itself.
            cast = inner and torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
            return rms_norm(x, self.weight, eps, offset, torch.bfloat16 if cast else None)

        return MethodType(norm, module)
    if "swiglu" not in without and _is_gated_mlp(kind, module):

        def mlp(self: Any, x: Tensor) -> Tensor:
            if torch.compiler.is_compiling():  # torch_compile fuses by itself, and does not see through compiled code
                return kind.forward(self, x)
            gate, up = self.gate_proj(x), self.up_proj(x)
            if not _dense(gate, up) or gate.dtype != up.dtype:
                return self.down_proj(self.act_fn(gate) * up)
            return self.down_proj(silu_mul(gate.contiguous(), up.contiguous()))

        return MethodType(mlp, module)
    return None


def _eps(module: nn.Module) -> float | None:
    return next((e for n in ("variance_epsilon", "eps") if isinstance(e := getattr(module, n, None), float)), None)


def _stand_in(kind: Any, **attributes: Any) -> Any:
    """An instance of a class with these attributes and submodules alone."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def _trial(function: Callable[..., Any]) -> Callable[..., Any]:
    """Made once, on real numbers in fp32, whatever mode its first caller is in."""

    @functools.cache
    def run(*args: Any) -> Any:
        with torch.no_grad(), unset_fake_temporarily(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
            return function(*args)

    return run


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _agree(ours: Tensor, theirs: Any) -> bool:
    return isinstance(theirs, Tensor) and ours.shape == theirs.shape and torch.allclose(ours, theirs, 1e-5, 1e-6)


@_trial
def _norm_rule(kind: Any, eps: float | None) -> tuple[float, float] | None:
    """(eps, what is added to the weight) of a class of RMSNorms; None where it computes something else."""
    if eps is None:
        return None
    x, weight = _numbers(3, 32), _numbers(32) + 1
    module = _stand_in(kind, weight=nn.Parameter(weight), variance_epsilon=eps, eps=eps)
    try:
        theirs = module.eval()(x * 0.01)  # small, so that eps tells
    except Exception:  # it needs more than that: then it is another
        return None
    found = [offset for offset in (0.0, 1.0) if _agree(rms_norm(x * 0.01, weight, eps, offset), theirs)]
    return (eps, found[0]) if found else None


def _is_gated_mlp(kind: Any, module: nn.Module) -> bool:
    names = {name for name, _ in module.named_children()}
    if not {"gate_proj", "up_proj", "down_proj"} <= names or not hasattr(module, "act_fn"):
        return False
    return type(module.act_fn) in (nn.SiLU, _silu()) and _multiplies(kind, nn.SiLU)


def _silu() -> type:
    from transformers.activations import ACT2FN

    return type(ACT2FN["silu"])


@_trial
def _multiplies(kind: Any, activation: Any) -> bool:
    """Whether a class of MLPs is down(act(gate(x)) * up(x)) and no more."""
    if list(inspect.signature(kind.forward).parameters)[2:]:
        return False
    # Without the random numbers that nn.Linear begins with: a run's are not to depend on what has been tried.
    gate, up, down = (nn.utils.skip_init(nn.Linear, 32, 32, bias=False) for _ in range(3))
    for i, linear in enumerate((gate, up, down)):
        linear.weight.copy_(_numbers(3, 32, 32)[i])
    module = _stand_in(kind, gate_proj=gate, up_proj=up, down_proj=down, act_fn=activation())
    x = _numbers(3, 32)
    try:
        theirs = module.eval()(x)
    except Exception:  # it reads what is not there: then it is another
        return False
    return _agree(down(silu_mul(gate(x), up(x))), theirs)


@_trial
def _turns_halves(file: str) -> bool:
    """Whether a family's file has rotary embeddings of whole heads by their halves."""
    function = getattr(sys.modules.get(file), _ROPE, None)
    if function is None:
        return False
    q, k = _numbers(1, 3, 5, 32), _numbers(2, 1, 2, 5, 32)[1]
    cos, sin = _numbers(2, 1, 5, 32)
    try:
        theirs = function(q, k, cos, sin)
    except Exception:  # other arguments, other angles
        return False
    return isinstance(theirs, tuple) and len(theirs) == 2 and all(map(_agree, rotary(q, k, cos, sin), theirs))


def _rotary_or(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        plain = not (args or kwargs or torch.compiler.is_compiling())
        if (
            plain and q.dim() == 4 and cos.dim() == 3 and len(q) == len(cos) == 1
            and _dense(q, k, cos, sin, multiple=2 * _LANES) and q.dtype == k.dtype and cos.dtype == sin.dtype
            and q.shape[-1] == k.shape[-1] == cos.shape[-1] and cos.shape == sin.shape
        ):  # fmt: skip
            return rotary(q, k, cos.contiguous(), sin.contiguous())
        return original(q, k, cos, sin, *args, **kwargs)

    return apply_rotary_pos_emb
