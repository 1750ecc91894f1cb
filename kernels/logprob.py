"""Triton row kernels of the head: logits to log-probabilities, and to the gradient's matrix in place.

N = head rows (completion tokens), V = vocabulary. Logits come from a vendor GEMM in fp32, bf16 or fp16; the arithmetic
here is fp32 with one cast at the store. One program owns one row, so nothing is atomic and results are deterministic.
    z = softcap(logit_scale * (raw + bias))     logp = z[target] - lse(z)
    U = d logp / d raw = (onehot(target) - softmax(z)) dz/draw
hence dX = c * (U W), dW = U^T (c * X), dbias = U^T c for any upstream c [N]. Reference: `reference.row_logprob`.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

IGNORE_INDEX = -100
_IGNORE = tl.constexpr(IGNORE_INDEX)


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
def _load_logits(
    row_ptr,
    bias_ptr,
    cols,
    n_cols,
    softcap,
    logit_scale,
    MASKED: tl.constexpr,
    EVICT: tl.constexpr,
):
    """One block of one row: (z, dz/draw), columns past V at -inf. Only the last block is masked: an unmasked
    load is one 16-byte access whatever V is."""
    bias = 0.0
    if MASKED:
        mask = cols < n_cols
        raw = tl.load(row_ptr + cols, mask=mask, other=0.0, eviction_policy=EVICT)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        z, slope = _logit_rule(raw, bias, softcap, logit_scale)
        z = tl.where(mask, z, float("-inf"))
    else:
        raw = tl.load(row_ptr + cols, eviction_policy=EVICT)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + cols).to(tl.float32)
        z, slope = _logit_rule(raw, bias, softcap, logit_scale)
    return z, slope


@triton.jit
def _block_columns(BLOCK_V: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Columns [LANES, VEC] of one block, a lane's in one thread: VEC neighbours where rows start on 16 bytes, so that
    they come in one access; else LANES apart, so that neighbouring threads still read neighbouring elements."""
    LANES: tl.constexpr = BLOCK_V // VEC
    lanes = tl.arange(0, LANES)[:, None]
    if ALIGNED:
        return lanes * VEC + tl.arange(0, VEC)[None, :]
    else:
        return lanes + tl.arange(0, VEC)[None, :] * LANES


@triton.jit
def _rescale(m, s, e, m_new):
    """(s, e) of a partial softmax with maximum m, restated for the maximum m_new >= m (finite)."""
    shift = tl.where(m == float("-inf"), 0.0, m - m_new)
    keep = tl.exp(m - m_new)
    return s * keep, (e + shift * s) * keep


@triton.jit
def _finite(m):
    """m, or 0 where no finite logit has been seen yet, so that z - m is never inf - inf."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _accumulate(z, m, s, e, ENTROPY: tl.constexpr):
    """Adds z [LANES, VEC] to the lanes' online softmax: maximum m, s = sum exp(z - m), e = sum (z - m) exp(z - m)."""
    m_new = tl.maximum(m, tl.max(z, axis=1))
    m_safe = _finite(m_new)
    shifted = z - m_safe[:, None]
    p = tl.exp(shifted)
    if ENTROPY:
        s, e = _rescale(m, s, e, m_safe)
        e += tl.sum(tl.where(shifted == float("-inf"), 0.0, shifted * p), axis=1)
    else:
        s *= tl.exp(m - m_safe)
    return m_new, s + tl.sum(p, axis=1), e


@triton.jit
def _row_stats(
    row_ptr,
    bias_ptr,
    n_cols,
    softcap,
    logit_scale,
    ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """(m, s, e) of one row. Every lane keeps its own maximum over its own 16-byte vectors, so warps run through the row
    without meeting; the price is one more exp per VEC logits."""
    LANES: tl.constexpr = BLOCK_V // VEC
    offs_v = _block_columns(BLOCK_V, VEC, ALIGNED)
    m = tl.full([LANES], float("-inf"), tl.float32)
    s = tl.zeros([LANES], tl.float32)
    e = tl.zeros([LANES], tl.float32)
    n_full = n_cols // BLOCK_V * BLOCK_V
    for start in range(0, n_full, BLOCK_V):
        z, _ = _load_logits(row_ptr, bias_ptr, start + offs_v, n_cols, softcap, logit_scale, False, "evict_last")
        m, s, e = _accumulate(z, m, s, e, ENTROPY)
    if n_full < n_cols:
        z, _ = _load_logits(row_ptr, bias_ptr, n_full + offs_v, n_cols, softcap, logit_scale, True, "evict_last")
        m, s, e = _accumulate(z, m, s, e, ENTROPY)
    m_row = tl.max(m, axis=0)
    s, e = _rescale(m, s, e, _finite(m_row))
    return m_row, tl.sum(s, axis=0), tl.sum(e, axis=0)


@triton.jit
def _store_grad(row_ptr, z, slope, cols, n_cols, target, shift, factor, MASKED: tl.constexpr):
    """Stores U for one block, with softmax = exp(z - shift) * factor; a -100 row (factor 0 and no target) stores 0."""
    p = tl.exp(z - shift) * factor
    u = tl.where(cols == target, 1.0 - p, -p) * slope
    u = tl.where(factor == 0.0, 0.0, u).to(row_ptr.dtype.element_ty)
    if MASKED:
        tl.store(row_ptr + cols, u, mask=cols < n_cols)
    else:
        tl.store(row_ptr + cols, u)


@triton.jit
def _row_grad(
    row_ptr,
    bias_ptr,
    n_cols,
    target,
    shift,
    factor,
    softcap,
    logit_scale,
    BLOCK_V: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Overwrites one row with U, from its end to its start: what the first pass read last is still in cache."""
    target = tl.where((target >= 0) & (target < n_cols), target, -1).to(tl.int32)
    offs_v = _block_columns(BLOCK_V, VEC, ALIGNED)
    n_full = n_cols // BLOCK_V * BLOCK_V
    if n_full < n_cols:
        cols = n_full + offs_v
        z, slope = _load_logits(row_ptr, bias_ptr, cols, n_cols, softcap, logit_scale, True, "evict_first")
        _store_grad(row_ptr, z, slope, cols, n_cols, target, shift, factor, True)
    for done in range(0, n_full, BLOCK_V):
        cols = n_full - BLOCK_V - done + offs_v
        z, slope = _load_logits(row_ptr, bias_ptr, cols, n_cols, softcap, logit_scale, False, "evict_first")
        _store_grad(row_ptr, z, slope, cols, n_cols, target, shift, factor, False)


@triton.jit
def _target_logit(row_ptr, bias_ptr, target, n_cols, softcap, logit_scale):
    """(hit, z[target]); a target outside [0, V) reads nothing."""
    hit = (target >= 0) & (target < n_cols)
    raw = tl.load(row_ptr + target, mask=hit, other=0.0)
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + target, mask=hit, other=0.0).to(tl.float32)
    z, _ = _logit_rule(raw, bias, softcap, logit_scale)
    return hit, z


@triton.jit
def _logprob_row_fwd_kernel(
    logits_ptr,  # [N, V], raw logits in; U out when WRITE_GRAD
    target_ptr,  # [N] int
    bias_ptr,  # [V] or None
    logp_ptr,  # [N] fp32, out
    lse_ptr,  # [N] fp32, out
    entropy_ptr,  # [N] fp32, out, or None
    n_cols,
    stride_ln,
    softcap,  # or None
    logit_scale,
    WRITE_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    pid_n = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + pid_n * stride_ln
    target = tl.load(target_ptr + pid_n).to(tl.int64)
    # Read before the second pass overwrites it; the reductions below are the barrier in between.
    hit, z_target = _target_logit(row_ptr, bias_ptr, target, n_cols, softcap, logit_scale)
    live = target != _IGNORE

    m, s, e = _row_stats(
        row_ptr, bias_ptr, n_cols, softcap, logit_scale, entropy_ptr is not None, BLOCK_V, VEC, ALIGNED
    )
    log_s = tl.log(s)
    # A target outside the vocabulary is NaN, never a plausible number. (z - m) - log s keeps the digits that
    # z - lse loses when the logits share a large offset.
    logp = tl.where(hit, z_target - m - log_s, float("nan"))
    tl.store(logp_ptr + pid_n, tl.where(live, logp, 0.0))
    tl.store(lse_ptr + pid_n, m + log_s)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + pid_n, log_s - e / s)
    if WRITE_GRAD:
        factor = tl.where(live, 1.0 / s, 0.0)
        _row_grad(row_ptr, bias_ptr, n_cols, target, m, factor, softcap, logit_scale, BLOCK_V, VEC, ALIGNED)


@triton.jit
def _logprob_slice_fwd_kernel(
    logits_ptr,  # [N, Vs]
    target_ptr,  # [N] int
    bias_ptr,  # [Vs] or None
    m_ptr,  # [N] fp32, in and out
    s_ptr,  # [N] fp32, in and out
    t_logit_ptr,  # [N] fp32, in and out
    e_acc_ptr,  # [N] fp32, in and out, or None
    n_cols,
    stride_ln,
    col_offset,
    softcap,
    logit_scale,
    BLOCK_V: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    pid_n = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + pid_n * stride_ln
    target = tl.load(target_ptr + pid_n).to(tl.int64) - col_offset
    hit, z_target = _target_logit(row_ptr, bias_ptr, target, n_cols, softcap, logit_scale)
    tl.store(t_logit_ptr + pid_n, z_target, mask=hit)
    m_old = tl.load(m_ptr + pid_n)
    s_old = tl.load(s_ptr + pid_n)
    e_old = 0.0
    if e_acc_ptr is not None:
        e_old = tl.load(e_acc_ptr + pid_n)

    m, s, e = _row_stats(row_ptr, bias_ptr, n_cols, softcap, logit_scale, e_acc_ptr is not None, BLOCK_V, VEC, ALIGNED)
    m_new = tl.maximum(m, m_old)
    m_safe = _finite(m_new)
    s, e = _rescale(m, s, e, m_safe)
    s_old, e_old = _rescale(m_old, s_old, e_old, m_safe)
    tl.store(m_ptr + pid_n, m_new)
    tl.store(s_ptr + pid_n, s + s_old)
    if e_acc_ptr is not None:
        tl.store(e_acc_ptr + pid_n, e + e_old)


@triton.jit
def _logprob_slice_grad_kernel(
    logits_ptr,  # [N, Vs], raw logits in, U out
    target_ptr,  # [N] int
    lse_ptr,  # [N] fp32, of the whole rows
    bias_ptr,  # [Vs] or None
    n_cols,
    stride_ln,
    col_offset,
    softcap,
    logit_scale,
    BLOCK_V: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    pid_n = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + pid_n * stride_ln
    target = tl.load(target_ptr + pid_n).to(tl.int64)
    lse = tl.load(lse_ptr + pid_n)
    factor = tl.where(target != _IGNORE, 1.0, 0.0)
    _row_grad(
        row_ptr,
        bias_ptr,
        n_cols,
        target - col_offset,
        lse,
        factor,
        softcap,
        logit_scale,
        BLOCK_V,
        VEC,
        ALIGNED,
    )


class SliceState(NamedTuple):
    """Online softmax of N rows whose vocabulary comes in slices; every tensor is [N] fp32."""

    m: Tensor  # maximum so far
    s: Tensor  # sum of exp(z - m)
    t_logit: Tensor  # logit of the target, NaN until its slice has come
    e_acc: Tensor | None  # sum of (z - m) exp(z - m), for the entropy


def row_config(n_cols: int, itemsize: int, aligned: bool, has_bias: bool, warp_size: int) -> tuple[int, int, int]:
    """(BLOCK_V, VEC, num_warps). Reasoned from the hardware's figures, not measured: no GPU was at hand.

    Every thread has two 16-byte loads in flight, which hides HBM latency with one block on a multiprocessor (32 KiB in
    flight; Little's law asks for about 20 KiB at 3.35 TB/s). Long rows take 1,024 threads, so that few rows are open at
    once and the second pass finds much of its row in the L2 cache (128,256 bf16 logits are 250 KiB; one row on each of
    132 multiprocessors is 33 MiB of an H100's 50).

    Two cases would spill: rows that do not start on 16 bytes are read by elements, with an address each; a bias is a
    load of its own. They take one vector a thread, the former never more than 512 threads, both together half a vector
    (then Triton 3.7 and 3.9 spill nothing; 3.6 still keeps 8 bytes on the stack on sm_80)."""
    threads = 128 if n_cols <= 4096 else 256 if n_cols <= 16384 else 512 if n_cols <= 65536 or not aligned else 1024
    vec = 16 // itemsize if aligned or not has_bias else 8 // itemsize
    vectors = 2 if aligned and not has_bias else 1
    return vectors * vec * threads, vec, threads // warp_size


def empty_logits(n_rows: int, n_cols: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Uninitialised [n_rows, n_cols] for a GEMM's `out=`, with the row stride padded to 16 elements: every row starts
    on a 16-byte boundary, so the kernels (and the GEMM) use vector accesses at V = 50257 too."""
    return torch.empty(n_rows, -(-n_cols // 16) * 16, dtype=dtype, device=device)[:, :n_cols]


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _launch_args(logits: Tensor, target: Tensor, bias: Tensor | None, softcap: float | None) -> dict:
    assert logits.dim() == 2 and logits.dtype in (torch.float32, torch.bfloat16, torch.float16), (
        f"logits must be [N, V] fp32, bf16 or fp16, got {logits.dtype} {tuple(logits.shape)}"
    )
    n, v = logits.shape
    assert v > 0 and (v == 1 or logits.stride(1) == 1), f"logits need inner stride 1, got {logits.stride()}"
    assert target.shape == (n,) and target.is_contiguous(), f"target must be contiguous [N], got {tuple(target.shape)}"
    assert bias is None or (bias.shape == (v,) and bias.is_contiguous()), "bias must be contiguous [V]"
    assert softcap is None or softcap > 0, f"softcap must be positive, got {softcap}"
    # In elements: Triton specialises a stride on divisibility by 16, whatever the element's size.
    aligned = logits.data_ptr() % 16 == 0 and logits.stride(0) % 16 == 0
    block_v, vec, num_warps = row_config(
        v, logits.element_size(), aligned, bias is not None, 64 if torch.version.hip else 32
    )
    # FMA contraction is asked for: it was Triton's default up to 3.9, which warns when it is left unsaid.
    return {"BLOCK_V": block_v, "VEC": vec, "ALIGNED": aligned, "num_warps": num_warps, "enable_fp_fusion": True}


def logprob_row_fwd(
    logits: Tensor,  # [N, V] fp32 | bf16 | fp16, inner stride 1; overwritten when write == "grad"
    target: Tensor,  # [N] int
    bias: Tensor | None,  # [V]
    *,
    softcap: float | None,
    logit_scale: float,
    entropy: bool = False,
    write: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logp, lse, entropy | None), each [N] fp32; write="grad" turns the logits into U. A -100 row has logp 0, U 0."""
    assert write in (None, "grad"), f"write must be None or 'grad', got {write!r}"
    args = _launch_args(logits, target, bias, softcap)
    n, v = logits.shape
    logp = logits.new_empty(n, dtype=torch.float32)
    lse = torch.empty_like(logp)
    ent = torch.empty_like(logp) if entropy else None
    if n == 0:
        return logp, lse, ent
    with device_guard(logits):
        _logprob_row_fwd_kernel[(n,)](
            logits,
            target,
            bias,
            logp,
            lse,
            ent,
            v,
            logits.stride(0),
            softcap,
            float(logit_scale),
            WRITE_GRAD=write == "grad",
            **args,
        )
    return logp, lse, ent


def logprob_slice_init(n_rows: int, device: torch.device | str, entropy: bool = False) -> SliceState:
    """The state before the first slice."""
    zeros = torch.zeros(n_rows, dtype=torch.float32, device=device)
    m, t_logit = torch.full_like(zeros, float("-inf")), torch.full_like(zeros, float("nan"))
    return SliceState(m, zeros, t_logit, zeros.clone() if entropy else None)


def logprob_slice_fwd(
    logits: Tensor,  # [N, Vs], the columns col_offset .. col_offset + Vs
    target: Tensor,  # [N] int, in the whole vocabulary
    bias: Tensor | None,  # [Vs], the slice's own
    state: SliceState,  # updated in place
    *,
    softcap: float | None,
    logit_scale: float,
    col_offset: int,
) -> None:
    """Adds one vocabulary slice to the rows' online softmax."""
    args = _launch_args(logits, target, bias, softcap)
    n, v = logits.shape
    if n == 0:
        return
    with device_guard(logits):
        _logprob_slice_fwd_kernel[(n,)](
            logits, target, bias, *state, v, logits.stride(0), col_offset, softcap, float(logit_scale), **args
        )


def logprob_slice_finish(state: SliceState, target: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logp, lse, entropy | None), each [N] fp32, after the last slice."""
    log_s = state.s.log()
    logp = torch.where(target == IGNORE_INDEX, 0.0, state.t_logit - state.m - log_s)
    entropy = None if state.e_acc is None else log_s - state.e_acc / state.s
    return logp, state.m + log_s, entropy


def logprob_slice_grad(
    logits: Tensor,  # [N, Vs] raw logits in, U out
    target: Tensor,  # [N] int, in the whole vocabulary
    lse: Tensor,  # [N] fp32, of the whole rows
    bias: Tensor | None,  # [Vs], the slice's own
    *,
    softcap: float | None,
    logit_scale: float,
    col_offset: int,
) -> None:
    """Overwrites one vocabulary slice of recomputed logits with its columns of U."""
    args = _launch_args(logits, target, bias, softcap)
    n, v = logits.shape
    assert lse.shape == (n,) and lse.dtype == torch.float32, f"lse must be [N] fp32, got {lse.dtype} {tuple(lse.shape)}"
    if n == 0:
        return
    with device_guard(logits):
        _logprob_slice_grad_kernel[(n,)](
            logits, target, lse, bias, v, logits.stride(0), col_offset, softcap, float(logit_scale), **args
        )
