"""What the custom ops share: checked targets, gradients only where they are asked for, and only once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch.autograd import forward_ad

from fastpo.errors import FastpoError
from fastpo.ops.backends import IGNORE_INDEX

# On a GPU the ops do not look at their inputs' values, which would wait for it; on request they do.
CHECK_INPUTS = os.environ.get("FASTPO_CHECK_INPUTS", "0") not in ("", "0")


class OpError(FastpoError):
    """A tensor or an option that an op cannot take."""


def looks_at(tensor: Tensor) -> bool:
    """Whether an op reads the values of its index tensors, which are where `tensor` is, to check them."""
    return tensor.device.type == "cpu" or CHECK_INPUTS


def check_targets(target: Tensor, vocabulary: int) -> None:
    """OpError for a target [N] outside the vocabulary, where it is looked at."""
    if not looks_at(target):
        return
    bad = ((target < 0) & (target != IGNORE_INDEX)) | (target >= vocabulary)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise OpError(f"target[{row}] = {int(target[row])} is outside the vocabulary of {vocabulary}")


def live(grad: Tensor, target: Tensor) -> Tensor:
    """The upstream gradient [N], 0 in rows that are ignored, whatever stands there."""
    return grad.where(target != IGNORE_INDEX, 0.0).contiguous()


def as_outputs(hidden: Tensor, grads: Iterable[Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden, dweight and dbias as a custom op returns them: in the dtype of `hidden`, [0] where there is none."""
    dhidden, dweight, dbias = (hidden.new_empty(0) if g is None else g.to(hidden.dtype) for g in grads)
    return dhidden, dweight, dbias


def fake_gradients(hidden: Tensor, weight: Tensor, need: Sequence[bool]) -> tuple[Tensor, ...]:
    """The shapes of `as_outputs`."""
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(hidden.new_empty(shape if asked else 0) for shape, asked in zip(shapes, need))


def gradients(
    ctx: Any, backward: Callable[..., Any], grad: Tensor | None, places: Sequence[int]
) -> tuple[Tensor | None, ...]:
    """One gradient per input of the op, of which hidden, weight and bias stand at `places`; `backward` is the custom op
    that forms these from `ctx`."""
    need = [ctx.needs_input_grad[i] for i in places]
    out: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if grad is not None:
        for i, asked, g in zip(places, need, backward(grad, *ctx.saved_tensors, *ctx.options, need)):
            out[i] = g if asked else None
    return tuple(out)


def reverse_mode_only(*ops: torch.library.CustomOpDef) -> None:
    """Makes forward-mode derivatives, and reverse ones by torch.func, an OpError of these ops.

    A custom op has no place for a forward formula. Without one PyTorch drops the tangents, under every torch.func
    transform alike, and the derivative comes out as 0. So the op's own autograd kernel is called by one that looks at
    the tangents first. Call it after `register_autograd`.
    """
    for op in ops:
        kernel = make_autograd_impl(op._opoverload, op)

        def checked(keyset: Any, *args: Any, kernel: Any = kernel, name: str = op._name, **kwargs: Any) -> Any:
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            if forward_ad._current_level >= 0 and any(_has_tangent(t) for t in tensors):
                raise OpError(f"fastpo.{name}: forward-mode derivatives are not implemented; use backward()")
            if any(t.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors):
                raise OpError(f"fastpo.{name}: torch.func.grad, vjp and jacrev are not implemented; use backward()")
            return kernel(keyset, *args, **kwargs)

        with warnings.catch_warnings():  # that a kernel is registered in the place of another
            warnings.simplefilter("ignore", UserWarning)
            op._lib.impl(op._name, checked, "Autograd", with_keyset=True, allow_override=True)


def detached(tensor: Tensor | None) -> Tensor | None:
    """The tensor without a gradient, in reverse mode; a tangent stays with it, for the op to refuse."""
    return tensor if tensor is None or forward_ad._current_level >= 0 else tensor.detach()


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


def once_only(ctx: Any, *grads: Tensor) -> None:
    """Refuses a second derivative."""
    raise RuntimeError("fastpo ops are differentiable once: their gradients come from closed forms without a graph")
