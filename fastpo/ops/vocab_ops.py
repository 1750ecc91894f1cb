"""Numbers of a row's whole distribution beside the log-probability of its target: tensors in, tensors out, no checks.

`log_sum_sq` (WPO) and `token_kl` (TDPO), public in ops/head.py and defined in kernels/reference.py.
Both walk tiles [rows, columns] of the logits as ops/backends.py does and keep nothing of size N x V: a backward
computes the tiles again. They are plain PyTorch on every device; there are no Triton or C++ kernels for them yet, so on
a GPU they cost more passes over a tile than `linear_logprob` does.

op           GEMMs of size N x V: forward, backward
log_sum_sq   1, none
token_kl     2 (policy, reference), 3 or 4: the same again, and one each for dhidden and dweight

N = head rows, D and E = hidden sizes of policy and reference, V = vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.ops import parts
from fastpo.ops.backends import IGNORE_INDEX, Head, _add_mm, _rule, _tiles, acc_dtype

TEMPORARIES = 4  # of a tile's size, in the accumulation dtype, alive at once


def _lse_step(m: Tensor, total: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An online log-sum-exp takes in one tile z [rows, columns]; (m, total, decay, exp(z - m)), m and total [rows, 1].

    A row may begin with nothing but masked logits (-inf): its maximum stays -inf and its sum 0 until one is finite.
    """
    m_new = torch.maximum(m, z.amax(1, keepdim=True))
    shift = m_new.where(m_new > -torch.inf, 0.0)
    decay = (m - shift).exp()
    e = (z - shift).exp_()
    return m_new, total * decay + e.sum(1, keepdim=True), decay, e


@torch.library.custom_op("fastpo::log_sum_sq", mutates_args=())
def log_sum_sq_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, softcap: float | None, logit_scale: float
) -> Tensor:
    """log sum_v p_v^2 [N] in the accumulation dtype; 0 where the target is -100."""
    head = Head(hidden, weight, target, bias, softcap, logit_scale)
    acc = acc_dtype(hidden.dtype)
    out = hidden.new_empty(hidden.shape[0], dtype=acc)
    with torch.autocast(hidden.device.type, enabled=False):
        for r, columns in _tiles(hidden.shape[0], weight.shape[0], hidden.device, TEMPORARIES * acc.itemsize):
            m = hidden.new_full((r.stop - r.start, 1), -torch.inf, dtype=acc)
            total, squares = torch.zeros_like(m), torch.zeros_like(m)
            for v in columns:
                z, _ = _rule(head, torch.mm(hidden[r], weight[v].t()), v)
                m, total, decay, e = _lse_step(m, total, z)
                squares = squares * decay.square() + e.square_().sum(1, keepdim=True)
            out[r] = (squares.log() - 2 * total.log()).squeeze(1)
    return out.where(target != IGNORE_INDEX, 0.0)


@log_sum_sq_op.register_fake
def _(hidden, weight, bias, target, softcap, logit_scale):
    return hidden.new_empty(hidden.shape[0], dtype=acc_dtype(hidden.dtype))


@torch.library.custom_op("fastpo::token_kl", mutates_args=())
def token_kl_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    target: Tensor,
    softcap: float | None,
    logit_scale: float,
    ref_softcap: float | None,
    ref_logit_scale: float,
) -> tuple[Tensor, Tensor]:
    """(KL(p_ref || p) [N], stats [4, N]) in the policy's accumulation dtype.

    Stats are maximum and sum of exp(z - maximum) of the policy, then of the reference: apart, for their log-sum-exp
    would round logits that are far from 0.
    With s = z - m_p and r = z_ref - m_ref, the maxima so far taken out, KL = sum_v e^r (r - s) / S_ref + log S_p - log
    S_ref: one pass over both, and logits far from 0 lose nothing.
    """
    policy = Head(hidden, weight, target, bias, softcap, logit_scale)
    reference = Head(ref_hidden, ref_weight, target, ref_bias, ref_softcap, ref_logit_scale)
    n, acc = hidden.shape[0], acc_dtype(hidden.dtype)
    out, stats = hidden.new_empty(n, dtype=acc), hidden.new_empty(4, n, dtype=acc)
    with torch.autocast(hidden.device.type, enabled=False):
        for r, columns in _tiles(n, weight.shape[0], hidden.device, 2 * TEMPORARIES * acc.itemsize):
            m = hidden.new_full((r.stop - r.start, 1), -torch.inf, dtype=acc)
            m_ref, total, total_ref, gap = m, torch.zeros_like(m), torch.zeros_like(m), torch.zeros_like(m)
            for v in columns:
                z, _ = _rule(policy, torch.mm(hidden[r], weight[v].t()), v)
                z_ref, _ = _rule(reference, torch.mm(ref_hidden[r], ref_weight[v].t()), v)
                z_ref = z_ref.to(acc)
                before, before_ref, before_total = m, m_ref, total_ref
                m, total, _, _ = _lse_step(m, total, z)
                m_ref, total_ref, decay, e = _lse_step(m_ref, total_ref, z_ref)
                # What is summed already was taken against the former maxima.
                moved = _difference(before_ref, m_ref) - _difference(before, m)
                gap = decay * (gap + moved * before_total)
                z_ref -= m_ref
                z_ref -= z - m
                gap += torch.where(e > 0, e.mul_(z_ref), 0.0).sum(1, keepdim=True)
            out[r] = (gap / total_ref + total.log() - total_ref.log()).squeeze(1)
            stats[:, r] = torch.cat([m, total, m_ref, total_ref], 1).t()
    return out.where(target != IGNORE_INDEX, 0.0), stats


def _difference(before: Tensor, after: Tensor) -> Tensor:
    """before - after of two maxima; 0 where the first was of nothing, for then nothing is summed."""
    return torch.where(before > -torch.inf, before - after, 0.0)


@token_kl_op.register_fake
def _(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, target, *_):
    n, acc = hidden.shape[0], acc_dtype(hidden.dtype)
    return hidden.new_empty(n, dtype=acc), hidden.new_empty(4, n, dtype=acc)


@torch.library.custom_op("fastpo::token_kl_backward", mutates_args=())
def _token_kl_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    target: Tensor,
    stats: Tensor,
    softcap: float | None,
    logit_scale: float,
    ref_softcap: float | None,
    ref_logit_scale: float,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden [N, D], dweight [V, D], dbias [V]), each [0] where `need` does not ask.

    dKL/draw = (p - p_ref) dz/draw, a vocabulary slice at a time: each slice of dweight is written once, dhidden
    accumulates in the accumulation dtype.
    """
    policy = Head(hidden, weight, target, bias, softcap, logit_scale)
    reference = Head(ref_hidden, ref_weight, target, ref_bias, ref_softcap, ref_logit_scale)
    acc = acc_dtype(hidden.dtype)
    grad = grad.where(target != IGNORE_INDEX, 0.0).to(acc)
    dhidden = torch.zeros_like(hidden, dtype=acc, memory_format=torch.contiguous_format) if need[0] else None
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if need[1] else None
    dbias = weight.new_empty(weight.shape[0]) if need[2] else None
    cx = (hidden * grad.unsqueeze(1)).to(hidden.dtype) if need[1] else None
    tiles = list(_tiles(hidden.shape[0], weight.shape[0], hidden.device, 2 * TEMPORARIES * acc.itemsize))
    with torch.autocast(hidden.device.type, enabled=False):
        for v in tiles[0][1] if tiles else [slice(0, weight.shape[0])]:
            dw = weight.new_zeros(v.stop - v.start, weight.shape[1], dtype=acc) if need[1] else None
            db = weight.new_zeros(v.stop - v.start, dtype=acc) if need[2] else None
            for r, _ in tiles:
                z, slope = _rule(policy, torch.mm(hidden[r], weight[v].t()), v)
                z_ref, _ = _rule(reference, torch.mm(ref_hidden[r], ref_weight[v].t()), v)
                m, total, m_ref, total_ref = stats[:, r].unsqueeze(2)
                u = (z - m).exp_().div_(total)
                u -= (z_ref.to(acc) - m_ref).exp_().div_(total_ref)
                u *= policy.logit_scale if slope is None else slope
                narrow = u.to(hidden.dtype)
                if dhidden is not None:
                    _add_mm(dhidden[r], narrow, weight[v])
                if cx is not None:
                    _add_mm(dw, narrow.t(), cx[r])
                if db is not None:
                    db += torch.mv(u.t(), grad[r])
            if dweight is not None:
                dweight[v] = dw
            if dbias is not None:
                dbias[v] = db
    if dhidden is not None:
        dhidden = dhidden.mul_(grad.unsqueeze(1)).to(hidden.dtype)
    return parts.as_outputs(hidden, (dhidden, dweight, dbias))


@_token_kl_backward.register_fake
def _(grad, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, target, stats, *rest):
    return parts.fake_gradients(hidden, weight, rest[-1])


def _setup_token_kl(ctx, inputs, output) -> None:
    *tensors, softcap, logit_scale, ref_softcap, ref_logit_scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.options = (softcap, logit_scale, ref_softcap, ref_logit_scale)
    ctx.save_for_backward(*tensors, output[1])


def _backward_token_kl(ctx, grad, *_):
    return parts.gradients(ctx, _token_kl_backward, grad, (0, 1, 2))


token_kl_op.register_autograd(_backward_token_kl, setup_context=_setup_token_kl)
_token_kl_backward.register_autograd(parts.once_only)
parts.reverse_mode_only(log_sum_sq_op, token_kl_op, _token_kl_backward)
