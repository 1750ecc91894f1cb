"""Triton row kernel of the head where the entropy has a gradient too: logits to the gradient's matrix, tile by tile.

N = head rows (completion tokens), V = vocabulary. Logits in fp32, bf16 or fp16; the arithmetic is fp32 with one cast at
the store. With z = softcap(logit_scale * (raw + bias)), p = softmax(z), H = -sum p log p and the upstream a of the
target's log-probability and h of H, both [N],
    U_v = (a (onehot_v - p_v) - h p_v (log p_v + H)) dz/draw
The statistics of whole rows are the forward's (logprob.py, fused.py). x, bits and m: online_softmax.py; in bits
log p_v is x bits - m - log2 s. A kernel of its own, so that the one that writes the gradient of log-probabilities alone
has no instruction more. Reference: `reference.row_logprob_entropy`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpo.kernels.logprob import _check, _split_launch
from fastpo.kernels.online_softmax import _IGNORE, _LN2, _LOG2E, _in_bits, device_guard, kernel_rule
from fastpo.kernels.row_passes import _block_columns, _load_logits, _store_zeros, _target_logit

# Below every exponent of a number in fp32: 2 to it is 0, and it times 0 is no NaN, as -inf would be.
_LEAST = tl.constexpr(-1e4)


@triton.jit
def _store_tilted(
    row_ptr, out_ptr, bias_ptr, cols, end, inner, bits, m, base, tilt, NEGATIVE: tl.constexpr, MASKED: tl.constexpr
):
    """(base + tilt (x bits - m)) 2^(x bits - m) dz/draw / logit_scale of one block."""
    x, slope = _load_logits(row_ptr, bias_ptr, cols, end, inner, NEGATIVE, MASKED, "evict_first")
    above = tl.fma(x, bits, -m)
    u = tl.exp2(above) * tl.fma(tl.maximum(above, _LEAST), tilt, base)
    u = (u * slope).to(out_ptr.dtype.element_ty)
    if MASKED:
        tl.store(out_ptr + cols, u, mask=cols < end)
    else:
        tl.store(out_ptr + cols, u)


@triton.jit
def _logprob_entropy_grad_kernel(
    logits_ptr,  # [N, Vs], raw logits
    out_ptr,  # [N, Vs], U out; may be the logits
    target_ptr,  # [N] int
    shift_ptr,  # [N] fp32, of the whole rows, as all that follow
    total_ptr,  # [N] fp32
    logp_ptr,  # [N] fp32
    entropy_ptr,  # [N] fp32
    a_ptr,  # [N] fp32, dL/dlogp
    h_ptr,  # [N] fp32, dL/dH
    bias_ptr,  # [Vs] or None
    n_cols,
    width,  # columns of a split, whole blocks
    stride_ln,
    stride_on,
    col_offset,
    inner,
    bits,
    logit_scale,
    NEGATIVE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    pid_n = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * width
    end = tl.minimum(begin + width, n_cols)
    row_ptr = logits_ptr + pid_n * stride_ln
    out_row_ptr = out_ptr + pid_n * stride_on
    target = tl.load(target_ptr + pid_n).to(tl.int64)
    if target != _IGNORE:
        m, s = _in_bits(tl.load(shift_ptr + pid_n), tl.load(total_ptr + pid_n))
        logp = tl.load(logp_ptr + pid_n)
        entropy = tl.load(entropy_ptr + pid_n)
        a = tl.load(a_ptr + pid_n)
        h = tl.load(h_ptr + pid_n)
        target -= col_offset
        # Of this program's columns: another program's may be U already.
        mine = tl.where((target >= begin) & (target < end), target, -1)
        _, _, slope_target = _target_logit(row_ptr, bias_ptr, mine, end, inner, NEGATIVE)
        gain = -logit_scale / s
        tilt = gain * h * _LN2
        base = gain * a + tilt * (entropy * _LOG2E - tl.log2(s))
        tl.debug_barrier()  # before any thread overwrites the target's logit, all have read it
        offs_v = _block_columns(BLOCK_V, VEC, ALIGNED)
        tail = begin + (end - begin) // BLOCK_V * BLOCK_V
        if tail < end:
            _store_tilted(
                row_ptr, out_row_ptr, bias_ptr, tail + offs_v, end, inner, bits, m, base, tilt, NEGATIVE, True
            )
        for done in range(0, tail - begin, BLOCK_V):
            cols = tail - BLOCK_V - done + offs_v
            _store_tilted(row_ptr, out_row_ptr, bias_ptr, cols, end, inner, bits, m, base, tilt, NEGATIVE, False)
        tl.debug_barrier()  # another thread may have written there
        p = tl.exp2(logp * _LOG2E)
        spread = tl.where(p == 0.0, 0.0, p * (logp + entropy))
        u = (a * (1.0 - p) - h * spread) * (logit_scale * slope_target)
        tl.store(out_row_ptr + mine, u.to(out_ptr.dtype.element_ty), mask=mine >= 0)
    else:
        _store_zeros(out_row_ptr, begin, end, BLOCK_V, VEC, ALIGNED)


def logprob_entropy_grad(
    logits: Tensor,  # [N, Vs] raw logits, fp32 | bf16 | fp16, inner stride 1
    target: Tensor,  # [N] int, in the whole vocabulary
    stats: Tensor,  # [4, N] fp32, of whole rows: shift, total, logp, entropy; sum exp(z) = total exp(shift)
    upstream: Tensor,  # [2, N] fp32: dL/dlogp, dL/dentropy
    bias: Tensor | None,  # [Vs], the slice's own
    *,
    softcap: float | None,
    logit_scale: float,
    col_offset: int,
    out: Tensor,  # [N, Vs], U out, in the dtype of the logits; may be the logits themselves
) -> None:
    """U of one vocabulary slice. A -100 row has U 0, whatever its statistics and upstream are."""
    _check(logits, target, bias, softcap)
    n, v = logits.shape
    for name, tensor, rows in (("stats", stats, 4), ("upstream", upstream, 2)):
        assert tensor.shape == (rows, n) and tensor.dtype == torch.float32 and tensor.stride(1) == 1, (
            f"{name} must be [{rows}, {n}] fp32 with inner stride 1, got {tensor.dtype} {list(tensor.shape)}"
        )
    assert out.shape == logits.shape and out.dtype == logits.dtype and (v == 1 or out.stride(1) == 1), (
        f"out must be as the logits, {logits.dtype} {list(logits.shape)}, got {out.dtype} {list(out.shape)}"
    )
    if n == 0:
        return
    given = (_split_launch(t, bias) for t in (logits, out))
    splits, width, options = min(given, key=lambda launch: launch[2]["ALIGNED"])  # of that with the worse rows
    rule = kernel_rule(softcap, logit_scale)
    with device_guard(logits):
        _logprob_entropy_grad_kernel[(n, splits)](
            logits,
            out,
            target,
            *stats,
            *upstream,
            bias,
            v,
            width,
            logits.stride(0),
            out.stride(0),
            col_offset,
            *rule.scalars,
            NEGATIVE=rule.negative,
            **options,
        )
