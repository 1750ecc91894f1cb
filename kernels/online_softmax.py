"""What the row kernels and the fused forward share: the logit rule, and the merge of partial softmax statistics.

N = head rows (completion tokens), V = vocabulary. A part of a row leaves its maximum m, s = sum exp(z - m) and, for the
entropy, e = sum (z - m) exp(z - m); parts are merged in a fixed order, in fp32, without atomics.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

IGNORE_INDEX = -100
_IGNORE = tl.constexpr(IGNORE_INDEX)
_NO_COLUMN = tl.constexpr(2**31 - 1)
COMBINE_BLOCK = 32  # rows, and parts a step: 128 bytes of consecutive rows in every access, 8 elements a thread


@triton.jit
def _tanh(x):
    """tanh to 2 ulp: an odd polynomial below 0.6, where 1 - 2 / (1 + e^2x) would cancel; portable, unlike libdevice."""
    t = x * x
    poly = -0.33333298 + t * (0.13331924 + t * (-0.05378383 + t * (0.02079597 - t * 0.00589516)))
    magnitude = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.abs(x)))
    return tl.where(tl.abs(x) < 0.6, x + x * t * poly, tl.where(x < 0, -magnitude, magnitude))


@triton.jit
def _logit_rule(raw, bias, softcap, logit_scale):
    """(z, dz/draw) in fp32."""
    z = (raw.to(tl.float32) + bias) * logit_scale
    slope = logit_scale
    if softcap is not None:
        t = _tanh(z * (1.0 / softcap))  # the scalar division leaves the loop
        z = softcap * t
        slope = logit_scale * (1.0 - t * t)
    return z, slope


@triton.jit
def _rescale(m, s, e, m_new):
    """(s, e) of a partial softmax with maximum m, restated for the maximum m_new >= m (finite)."""
    # exp(-1000) is 0. Of a part masked with the least finite number, shift * s would be infinite, and times 0 NaN.
    shift = tl.where(m == float("-inf"), 0.0, tl.maximum(m - m_new, -1000.0))
    keep = tl.exp(m - m_new)
    return s * keep, (e + shift * s) * keep


@triton.jit
def _finite(m):
    """m, or 0 where no finite logit has been seen yet, so that z - m is never inf - inf."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit(do_not_specialize=["n_rows", "n_parts"])
def _logprob_combine_kernel(
    m_ptr,  # [parts, N] fp32
    s_ptr,  # [parts, N] fp32
    e_ptr,  # [parts, N] fp32 or None
    i_ptr,  # [parts, N] int32 or None
    t_logit_ptr,  # [N] fp32, read where the target is in [0, V)
    target_ptr,  # [N] int
    logp_ptr,  # [N] fp32, out
    lse_ptr,  # [N] fp32, out
    entropy_ptr,  # [N] fp32, out, or None
    argmax_ptr,  # [N] int, out, or None
    top1_ptr,  # [N] fp32, out, or None
    n_rows,
    n_parts,
    n_cols,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Merges the parts of BLOCK_N rows, BLOCK_S at a time in their order."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n_rows
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_N], tl.float32)
    e = tl.zeros([BLOCK_N], tl.float32)
    i = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, n_parts, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        offs = offs_s.to(tl.int64)[:, None] * n_rows + offs_n[None, :]
        mask = (offs_s < n_parts)[:, None] & mask_n[None, :]
        m_part = tl.load(m_ptr + offs, mask=mask, other=float("-inf"))
        s_part = tl.load(s_ptr + offs, mask=mask, other=0.0)
        e_part = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
        if e_ptr is not None:
            e_part = tl.load(e_ptr + offs, mask=mask, other=0.0)
        m_block = tl.max(m_part, axis=0)
        if i_ptr is not None:
            i_part = tl.load(i_ptr + offs, mask=mask, other=_NO_COLUMN)
            first = tl.min(tl.where(m_part == m_block[None, :], i_part, _NO_COLUMN), axis=0)
            i = tl.where(m_block > m, first, i)
        m_new = tl.maximum(m, m_block)
        m_safe = _finite(m_new)
        s_part, e_part = _rescale(m_part, s_part, e_part, m_safe[None, :])
        s, e = _rescale(m, s, e, m_safe)
        s += tl.sum(s_part, axis=0)
        e += tl.sum(e_part, axis=0)
        m = m_new
    log_s = tl.log(s)
    target = tl.load(target_ptr + offs_n, mask=mask_n, other=_IGNORE).to(tl.int64)
    hit = (target >= 0) & (target < n_cols)
    t_logit = tl.load(t_logit_ptr + offs_n, mask=mask_n & hit, other=float("nan"))
    live = target != _IGNORE
    logp = t_logit - m - log_s
    tl.store(logp_ptr + offs_n, tl.where(live, logp, 0.0), mask=mask_n)
    tl.store(lse_ptr + offs_n, m + log_s, mask=mask_n)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + offs_n, log_s - e / s, mask=mask_n)
    if argmax_ptr is not None:
        tl.store(argmax_ptr + offs_n, i, mask=mask_n)
    if top1_ptr is not None:
        # Only a NaN differs from itself: one logit makes it the row's log-probability.
        tl.store(top1_ptr + offs_n, tl.where(live & (t_logit >= m) & (logp == logp), 1.0, 0.0), mask=mask_n)


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors (compute units) of the device; 1 in the interpreter, which runs programs one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def combine(
    m: Tensor,  # [parts, N] fp32
    s: Tensor,  # [parts, N] fp32
    e: Tensor | None,  # [parts, N] fp32
    columns: Tensor | None,  # [parts, N] int32, each part's first column with its maximum
    t_logit: Tensor,  # [N] fp32
    target: Tensor,  # [N] int
    n_cols: int,
    logp: Tensor,  # [N] fp32, out
    lse: Tensor,  # [N] fp32, out
    entropy: Tensor | None,  # [N] fp32, out
    argmax: Tensor | None,  # [N] int, out
    top1: Tensor | None,  # [N] fp32, out
) -> None:
    """Statistics of parts of a row, in ascending order of columns, to those of the row."""
    parts, n = m.shape
    with device_guard(m):
        _logprob_combine_kernel[(-(-n // COMBINE_BLOCK),)](
            m,
            s,
            e,
            columns,
            t_logit,
            target,
            logp,
            lse,
            entropy,
            argmax,
            top1,
            n,
            parts,
            n_cols,
            BLOCK_N=COMBINE_BLOCK,
            BLOCK_S=COMBINE_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
