"""What the row kernels and the fused forward share: the logit rule, and the merge of partial softmax statistics.

N = head rows (completion tokens), V = vocabulary. Kernels see a logit as z = x bits ln 2, so that exp(z - shift) is
one multiply-add and one base-2 exponential: x is the raw logit with its bias, of either sign, or the tanh of a soft
cap, and `bits` > 0 is what the rule leaves over. A part of a row leaves its largest x, s = sum 2^(x bits - m) and, for
the entropy, e = sum (x bits - m) 2^(x bits - m), where m = max(largest x bits, FLOOR), which whoever has that x finds
again; parts are merged in a fixed order, in fp32, without atomics.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

IGNORE_INDEX = -100
_IGNORE = tl.constexpr(IGNORE_INDEX)
_NO_COLUMN = tl.constexpr(2**31 - 1)
_LOG2E = tl.constexpr(1.4426950216293335)  # to fp32, and the rest
_LOG2E_REST = tl.constexpr(math.log2(math.e) - 1.4426950216293335)
_LN2 = tl.constexpr(math.log(2))
# Below every logit of a model, in bits. A part of nothing but -inf has this maximum, and a sum of 0: no inf - inf
# anywhere. So has one of logits masked with the least finite number; a row of only these is NaN.
FLOOR = -1e30
_FLOOR = tl.constexpr(FLOOR)
COMBINE_BLOCK = 32  # rows, and parts a step: 128 bytes of consecutive rows in every access, 8 elements a thread


class KernelRule(NamedTuple):
    """softcap(logit_scale * (raw + bias)) as the kernels compute it, in the order of their arguments."""

    inner: float | None  # x = tanh(inner (raw + bias)); None: x = raw + bias, or minus that
    bits: float  # z = x bits ln 2
    logit_scale: float  # dz/draw = logit_scale (1 - x^2), or logit_scale
    negative: bool  # x = -(raw + bias), for a negative scale

    @property
    def scalars(self) -> tuple[float | None, float, float]:
        return self[:3]


def kernel_rule(softcap: float | None, logit_scale: float) -> KernelRule:
    """The rule of the head for the kernels; products in fp64, each rounded once. A scale of 0 is the least positive
    number, of which -inf is no NaN."""
    scale = float(logit_scale)
    if softcap is None:
        return KernelRule(None, max(abs(scale) * math.log2(math.e), 2.0**-126), scale, scale < 0)
    return KernelRule(scale / softcap, softcap * math.log2(math.e), scale, False)


@triton.jit
def _tanh(x, BASE_2: tl.constexpr = True):
    """(tanh x, 1 - tanh^2 x), to 2 ulp each: below 0.6 tanh is an odd polynomial, where 1 - q of q = 2 / (1 + e^2|x|)
    would cancel; 1 - tanh^2 is q (2 - q), which keeps its digits where tanh is nearly 1. Portable, unlike libdevice."""
    t = x * x
    poly = -0.33333298 + t * (0.13331924 + t * (-0.05378383 + t * (0.02079597 - t * 0.00589516)))
    if BASE_2:
        q = 2.0 / (1.0 + tl.exp2(tl.abs(x) * (2.0 * _LOG2E)))
    else:
        q = 2.0 / (1.0 + tl.exp(2.0 * tl.abs(x)))
    magnitude = 1.0 - q
    return tl.where(tl.abs(x) < 0.6, x + x * t * poly, tl.where(x < 0, -magnitude, magnitude)), q * (2.0 - q)


@triton.jit
def _logit(raw, bias, inner, NEGATIVE: tl.constexpr, BASE_2: tl.constexpr = True):
    """(x, (dz/draw) / logit_scale) in fp32 of raw logits and of bias, or None."""
    x = raw.to(tl.float32)
    if bias is not None:
        x += bias
    slope = 1.0
    if inner is not None:
        x, slope = _tanh(x * inner, BASE_2)
    if NEGATIVE:
        x = -x
    return x, slope


@triton.jit
def _shift(x_max, bits):
    """m of a part whose largest x is this."""
    return tl.maximum(x_max * bits, _FLOOR)


@triton.jit
def _rescale(m, s, e, m_new):
    """(s, e) of a part with shift m, restated for the shift m_new >= m."""
    keep = tl.exp2(m - m_new)
    return s * keep, (e + (m - m_new) * s) * keep


@triton.jit
def _normaliser(m, s):
    """(shift, total) with sum exp(z) = total exp(shift): the digits of both, which their sum lse rounds away."""
    shift = m * _LN2
    return shift, s * tl.exp2(tl.fma(shift, -_LOG2E, m) - shift * _LOG2E_REST)


@triton.jit
def _in_bits(shift, total):
    """(m, s) again of a normaliser."""
    m = shift * _LOG2E
    return m, total * tl.exp2(tl.fma(shift, _LOG2E, -m) + shift * _LOG2E_REST)


@triton.jit
def _results(x_target, bits, m, s, e):
    """(logp of the target, lse, entropy) of whole rows. The multiply-add keeps the digits that z - lse loses when the
    logits share a large offset."""
    log2_s = tl.log2(s)
    logp = (tl.fma(x_target, bits, -m) - log2_s) * _LN2
    return logp, tl.fma(m, _LN2, log2_s * _LN2), (log2_s - e / s) * _LN2


@triton.jit
def _is_top1(x_target, x_max, logp, live):
    """1 where no logit is above the target's, else 0. Only a NaN differs from itself: one logit makes it the row's
    log-probability."""
    return tl.where(live & (x_target >= x_max) & (logp == logp), 1.0, 0.0)


@triton.jit(do_not_specialize=["n_rows", "n_parts"])
def _logprob_combine_kernel(
    x_ptr,  # [parts, N] fp32
    s_ptr,  # [parts, N] fp32
    e_ptr,  # [parts, N] fp32 or None
    i_ptr,  # [parts, N] int32 or None
    x_target_ptr,  # [N] fp32, read where the target is in [0, V)
    target_ptr,  # [N] int
    logp_ptr,  # [N] fp32, out
    lse_ptr,  # [N] fp32, out
    entropy_ptr,  # [N] fp32, out, or None
    argmax_ptr,  # [N] int, out, or None
    top1_ptr,  # [N] fp32, out, or None
    shift_ptr,  # [N] fp32, out, or None
    total_ptr,  # [N] fp32, out, or None
    n_rows,
    n_parts,
    n_cols,
    bits,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Merges the parts of BLOCK_N rows, BLOCK_S at a time in their order."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n_rows
    x_max = tl.full([BLOCK_N], float("-inf"), tl.float32)
    m = tl.full([BLOCK_N], _FLOOR, tl.float32)
    s = tl.zeros([BLOCK_N], tl.float32)
    e = tl.zeros([BLOCK_N], tl.float32)
    i = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, n_parts, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        offs = offs_s.to(tl.int64)[:, None] * n_rows + offs_n[None, :]
        mask = (offs_s < n_parts)[:, None] & mask_n[None, :]
        x_part = tl.load(x_ptr + offs, mask=mask, other=float("-inf"))
        s_part = tl.load(s_ptr + offs, mask=mask, other=0.0)
        e_part = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
        if e_ptr is not None:
            e_part = tl.load(e_ptr + offs, mask=mask, other=0.0)
        x_block = tl.max(x_part, axis=0)
        if i_ptr is not None:
            i_part = tl.load(i_ptr + offs, mask=mask, other=_NO_COLUMN)
            first = tl.min(tl.where(x_part == x_block[None, :], i_part, _NO_COLUMN), axis=0)
            i = tl.where(x_block > x_max, first, i)
        x_max = tl.maximum(x_max, x_block)
        m_new = _shift(x_max, bits)
        s_part, e_part = _rescale(_shift(x_part, bits), s_part, e_part, m_new[None, :])
        s, e = _rescale(m, s, e, m_new)
        s += tl.sum(s_part, axis=0)
        e += tl.sum(e_part, axis=0)
        m = m_new
    target = tl.load(target_ptr + offs_n, mask=mask_n, other=_IGNORE).to(tl.int64)
    hit = (target >= 0) & (target < n_cols)
    x_target = tl.load(x_target_ptr + offs_n, mask=mask_n & hit, other=float("nan"))
    live = target != _IGNORE
    logp, lse, entropy = _results(x_target, bits, m, s, e)
    tl.store(logp_ptr + offs_n, tl.where(live, logp, 0.0), mask=mask_n)
    tl.store(lse_ptr + offs_n, lse, mask=mask_n)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + offs_n, entropy, mask=mask_n)
    if argmax_ptr is not None:
        tl.store(argmax_ptr + offs_n, i, mask=mask_n)
    if top1_ptr is not None:
        tl.store(top1_ptr + offs_n, _is_top1(x_target, x_max, logp, live), mask=mask_n)
    if shift_ptr is not None:
        shift, total = _normaliser(m, s)
        tl.store(shift_ptr + offs_n, shift, mask=mask_n)
        tl.store(total_ptr + offs_n, total, mask=mask_n)


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors (compute units) of the device; 1 in the interpreter, which runs programs one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def combine(
    x_max: Tensor,  # [parts, N] fp32, each part's largest x
    s: Tensor,  # [parts, N] fp32
    e: Tensor | None,  # [parts, N] fp32
    columns: Tensor | None,  # [parts, N] int32, each part's first column with its largest x
    x_target: Tensor,  # [N] fp32
    target: Tensor,  # [N] int
    n_cols: int,
    bits: float,
    logp: Tensor,  # [N] fp32, out
    lse: Tensor,  # [N] fp32, out
    entropy: Tensor | None,  # [N] fp32, out
    argmax: Tensor | None,  # [N] int, out
    top1: Tensor | None,  # [N] fp32, out
    norm: Tensor | None,  # [2, N] fp32, out: shift and total
) -> None:
    """Statistics of parts of a row, in ascending order of columns, to those of the row."""
    parts, n = x_max.shape
    with device_guard(x_max):
        _logprob_combine_kernel[(-(-n // COMBINE_BLOCK),)](
            x_max,
            s,
            e,
            columns,
            x_target,
            target,
            logp,
            lse,
            entropy,
            argmax,
            top1,
            *((None, None) if norm is None else norm),
            n,
            parts,
            n_cols,
            bits,
            BLOCK_N=COMBINE_BLOCK,
            BLOCK_S=COMBINE_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
