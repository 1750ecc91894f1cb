"""Log-probabilities and entropies of the head's rows, both with a gradient, without the logits.

N = head rows (completion tokens), D = hidden, V = vocabulary. With p the softmax of a row's logits z and H its entropy,
dH/dz_v = -p_v (log p_v + H). An upstream of a = dL/dlogp and h = dL/dH gives the row gradient

    U_v = (a (onehot_v - p_v) - h p_v (log p_v + H)) dz/draw        dX = U W    dW = U^T X    dbias = U^T 1

which, unlike that of `linear_logprob`, is not one matrix times a number of each row: U is formed when a and h are
known, in the backward, tile by tile. In terms of the statistics that the forward has (sum exp(z) = total exp(shift)),
with g = z - shift and its mean under p, which is log total - H,

    -p_v (a + h (log p_v + H)) = exp(g) (base + tilt g)     tilt = -h / total     base = -(a - h mean) / total

so a logit of a tile takes one multiply-add more than in the sliced backward of `linear_logprob`; its kept one has no
such pass. The target's element, a (1 - p) - h p (logp + H), is written apart and comes from the forward's logp: 1 - p
keeps its digits where p is nearly 1.

regime   forward keeps                    GEMMs, with a frozen head
none     nothing                          1
kept     logits [N, V] (input dtype)      3, 2
sliced   row statistics                   4, 3, a vocabulary slice at a time

The forward is that of ops/backends.py in all three backends. Definition: `kernels/reference.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpo.ops import backends, parts
from fastpo.ops.backends import (  # fmt: skip
    IGNORE_INDEX,
    Head,
    _add_mm,
    _contiguous,
    _rule,
    _slices,
    _target_column,
    _tiles,
    acc_dtype,
    saved_columns,
)
from fastpo.ops.inputs import autocast, check_inputs, check_softcap, fits_budget, regime_of

LEAST = -1e3  # of z - shift: exp of it is 0 in fp64 too, and 0 times it is no NaN

Tile = Callable[[slice, slice], Tensor]


def linear_logprob_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *, softcap: float | None, logit_scale: float,
    return_top1: bool, memory_budget: int | None, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`fastpo.ops.linear_logprob_entropy`, which says what it takes and gives, of plain tensors."""
    hidden, weight, bias = autocast(hidden, weight, bias)
    check_softcap(softcap)
    backend = check_inputs(hidden, weight, target, bias, memory_budget, backend)
    regime = entropy_regime(hidden, weight, bias, memory_budget)
    logp, entropy, top1, _, _ = _logprob_entropy(
        hidden, weight, target.long(), bias, softcap, logit_scale, regime, backend
    )
    return (logp, entropy, top1) if return_top1 else (logp, entropy)


def entropy_regime(hidden: Tensor, weight: Tensor, bias: Tensor | None, memory_budget: int | None) -> str:
    """`regime_of` without a regime of its own for a frozen head."""
    regime = regime_of(hidden, weight, bias, memory_budget)
    if regime == "frozen":
        regime = "kept" if fits_budget(hidden, weight, memory_budget) else "sliced"
    return regime


@torch.library.custom_op("fastpo::logprob_entropy", mutates_args=())
def _logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    regime: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy and top1 [N], logits [N, V] or [0], stats [4, N]: shift, total, logp, entropy)."""
    head = Head(hidden, weight, target, bias, softcap, logit_scale)
    parts.check_targets(target, weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        kept = backends.FORWARD[backend](head, "logits" if regime == "kept" else "none", True)
    stats = torch.stack([kept.shift, kept.total, kept.logp, kept.entropy])
    return kept.logp, kept.entropy.where(target != IGNORE_INDEX, 0.0), kept.top1, kept.saved, stats


@_logprob_entropy.register_fake
def _(hidden, weight, target, bias, softcap, logit_scale, regime, backend):
    n, acc = hidden.shape[0], acc_dtype(hidden.dtype)
    logp, entropy, top1 = (hidden.new_empty(n, dtype=acc) for _ in range(3))
    return logp, entropy, top1, empty_saved(hidden, weight, regime, backend), hidden.new_empty(4, n, dtype=acc)


def empty_saved(hidden: Tensor, weight: Tensor, regime: str, backend: str) -> Tensor:
    """Of the shape of what the forward saves."""
    if regime == "kept":
        return hidden.new_empty(hidden.shape[0], saved_columns(weight.shape[0], backend))
    return hidden.new_empty(0, dtype=acc_dtype(hidden.dtype))


@torch.library.custom_op("fastpo::logprob_entropy_backward", mutates_args=())
def _logprob_entropy_backward(
    grad: Tensor | None,
    entropy_grad: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    saved: Tensor,
    stats: Tensor,
    softcap: float | None,
    logit_scale: float,
    regime: str,
    backend: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden [N, D], dweight [V, D], dbias [V]), each [0] where `need` does not ask; for dL/dlogp and dL/dH [N], of
    which None is 0."""
    head = Head(hidden, weight, target, bias, softcap, logit_scale)
    with torch.autocast(hidden.device.type, enabled=False):
        grads = gradients(head, grad, entropy_grad, saved if regime == "kept" else None, stats, need, backend)
    return parts.as_outputs(hidden, grads)


@_logprob_entropy_backward.register_fake
def _(grad, entropy_grad, hidden, weight, target, bias, saved, stats, softcap, logit_scale, regime, backend, need):
    return parts.fake_gradients(hidden, weight, need)


def gradients(
    head: Head,
    grad: Tensor | None,
    entropy_grad: Tensor | None,
    saved: Tensor | None,
    stats: Tensor,
    need: list[bool],
    backend: str,
) -> tuple[Tensor | None, ...]:
    """dhidden [N, D] in the accumulation dtype, dweight [V, D] and dbias [V], None where `need` does not ask.

    Of a slice of the vocabulary too, for statistics of whole rows (ops/vocab_entropy.py); dhidden is then the slice's.

    Each slice of dweight is written once, dhidden accumulates. Elements of a tile are of the size of probabilities,
    for fp16's range: the larger upstream of a row, c, scales matrices [N, D]; the compiled pass, which takes no fp16,
    multiplies it in.
    """
    head = _contiguous(head)
    x, w, acc = head.hidden, head.weight, acc_dtype(head.hidden.dtype)
    a, h = (torch.zeros_like(stats[0]) if g is None else parts.live(g, head.target) for g in (grad, entropy_grad))
    if len(x) == 0:
        shapes = (x.shape, w.shape, w.shape[:1])
        return tuple(x.new_zeros(shape) if asked else None for shape, asked in zip(shapes, need))
    c = None
    if backend != "cpu":
        c = torch.maximum(a.abs(), h.abs())
        c = c.where(c > 0, 1.0)
        a, h, c = a / c, h / c, c.unsqueeze(1)
    dhidden = x.new_zeros(x.shape, dtype=acc) if need[0] else None
    dweight = w.new_empty(w.shape) if need[1] else None
    dbias = w.new_empty(len(w)) if need[2] else None
    right = x if c is None or not need[1] else (x * c).to(x.dtype)
    tile = TILES[backend](head, a, h, saved, stats)
    blocks, columns = _blocks(head, backend)
    for v in columns:
        several = len(blocks) > 1
        dw = w.new_zeros(v.stop - v.start, w.shape[1], dtype=acc) if need[1] and several else None
        db = w.new_zeros(v.stop - v.start, dtype=acc) if need[2] else None
        for r in blocks:
            u = tile(r, v)
            if dhidden is not None:
                _add_mm(dhidden[r], u, w[v])
            if dw is not None:
                _add_mm(dw, u.t(), right[r])
            elif dweight is not None:
                torch.mm(u.t(), right, out=dweight[v])
            if db is not None:
                db += u.sum(0, dtype=acc) if c is None else (u * c[r]).sum(0)
        if dweight is not None and dw is not None:
            dweight[v] = dw
        if dbias is not None:
            dbias[v] = db
    if dhidden is not None and c is not None:
        dhidden.mul_(c)
    return dhidden, dweight, dbias


def _blocks(head: Head, backend: str) -> tuple[list[slice], list[slice]]:
    """Blocks of rows, and slices of the vocabulary; in the Triton backend all rows at once."""
    x, v_size = head.hidden, len(head.weight)
    if backend == "triton":
        return [slice(0, len(x))], _slices(v_size, len(x) * x.element_size(), backends.DEVICE_TILE_BYTES)
    itemsize = 4 if backend == "cpu" else 4 * acc_dtype(x.dtype).itemsize
    tiles = list(_tiles(len(x), v_size, x.device, itemsize))
    return [r for r, _ in tiles], tiles[0][1]


def _coefficients(a: Tensor, h: Tensor, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(base, tilt, the target's element), each [N], for dz/draw = 1."""
    _, total, logp, entropy = stats
    mean = total.log() - entropy
    p = logp.exp()
    at = -torch.expm1(logp) * a - (p * h * (logp + entropy)).where(p > 0, 0.0)
    return (h * mean - a) / total, -h / total, at


def _torch_tiles(head: Head, a: Tensor, h: Tensor, saved: Tensor | None, stats: Tensor) -> Tile:
    base, tilt, at = (t.unsqueeze(1) for t in _coefficients(a, h, stats))
    shift = stats[0].unsqueeze(1)

    def tile(r: slice, v: slice) -> Tensor:
        raw = torch.mm(head.hidden[r], head.weight[v].t()) if saved is None else saved[r, v]
        z, slope = _rule(head, raw, v)
        column, inside = _target_column(head.target[r], v)
        g = z.sub_(shift[r])
        u = g.exp()
        u *= g.clamp_(min=LEAST).mul_(tilt[r]).add_(base[r])
        u.scatter_(1, column, torch.where(inside, at[r], u.gather(1, column)))
        return u.mul_(head.logit_scale if slope is None else slope).to(raw.dtype)

    return tile


def _cpu_tiles(head: Head, a: Tensor, h: Tensor, saved: Tensor | None, stats: Tensor) -> Tile:
    """The compiled pass, over the logits it is given or from those that are kept into scratch."""
    shift, rows = stats[0], torch.stack(_coefficients(a, h, stats)).mul_(head.logit_scale)
    scratch = head.hidden.new_empty(0)

    def tile(r: slice, v: slice) -> Tensor:
        nonlocal scratch
        shape = (r.stop - r.start, v.stop - v.start)
        size = shape[0] * shape[1]
        scratch = head.hidden.new_empty(size) if scratch.numel() < size else scratch  # the first tile is the largest
        out = scratch[:size].view(shape)
        raw = saved[r, v] if saved is not None else torch.mm(head.hidden[r], head.weight[v].t(), out=out)
        bias = 0 if head.bias is None else head.bias[v].data_ptr()
        backends.compiled.tilted_pass(
            raw.data_ptr(), out.data_ptr(), bias, head.target[r].data_ptr(), shift[r].data_ptr(),
            *(row.data_ptr() for row in rows[:, r]), raw.stride(0), out.stride(0), *shape, v.start,
            head.softcap or 0.0, head.logit_scale, raw.dtype == torch.bfloat16, torch.get_num_threads(),
        )  # fmt: skip
        return out

    return tile


def _triton_tiles(head: Head, a: Tensor, h: Tensor, saved: Tensor | None, stats: Tensor) -> Tile:
    """The row kernel, over the logits it is given or from those that are kept into scratch; of all rows."""
    from fastpo.kernels import entropy as kernels
    from fastpo.kernels import logprob

    x, w = head.hidden, head.weight
    upstream = torch.stack([a, h])
    scratch: Tensor | None = None

    def tile(r: slice, v: slice) -> Tensor:
        nonlocal scratch
        width = v.stop - v.start
        scratch = logprob.empty_logits(len(x), width, x.dtype, x.device) if scratch is None else scratch
        out = scratch[:, :width]
        raw = saved[:, v] if saved is not None else torch.mm(x, w[v].t(), out=out)
        bias = None if head.bias is None else head.bias[v]
        rule: dict[str, Any] = {"softcap": head.softcap, "logit_scale": head.logit_scale, "col_offset": v.start}
        kernels.logprob_entropy_grad(raw, head.target, stats, upstream, bias, out=out, **rule)
        return out

    return tile


TILES: dict[str, Callable[..., Tile]] = {"torch": _torch_tiles, "cpu": _cpu_tiles, "triton": _triton_tiles}


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target, bias, *options = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.options = options
    ctx.save_for_backward(hidden, weight, target, bias, *output[3:])


def backward_by(op: Callable[..., Any]) -> Callable[..., Any]:
    """The autograd formula of an op whose first outputs are logp and entropy; `op` forms the gradients."""

    def backward(ctx: Any, grad: Tensor | None, entropy_grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        either = entropy_grad if grad is None else grad
        return parts.gradients(ctx, lambda _, *rest: op(grad, entropy_grad, *rest), either, (0, 1, 3))

    return backward


_logprob_entropy.register_autograd(backward_by(_logprob_entropy_backward), setup_context=_setup)
_logprob_entropy_backward.register_autograd(parts.once_only)
parts.reverse_mode_only(_logprob_entropy, _logprob_entropy_backward)
