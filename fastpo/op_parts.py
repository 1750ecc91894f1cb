"""What the custom ops share: checked targets, gradients only where they are asked for, and only once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from fastpo.backends import IGNORE_INDEX
from fastpo.errors import FastpoError

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


def once_only(ctx: Any, *grads: Tensor) -> None:
    """Refuses a second derivative."""
    raise RuntimeError("fastpo ops are differentiable once: their gradients come from closed forms without a graph")
