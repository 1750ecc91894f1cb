"""Triton row kernels of the head: logits to log-probabilities, and to the gradient's matrix in place.

N = head rows (completion tokens), V = vocabulary. Logits come from a vendor GEMM in fp32, bf16 or fp16; the arithmetic
here is fp32 with one cast at the store. One program owns one row; where rows are too few to fill the chip several
programs share a row, and `combine` merges what they found in a fixed order. Nothing is atomic, results repeat bitwise.
    z = softcap(logit_scale * (raw + bias))     logp = z[target] - lse(z)
    U = d logp / d raw = (onehot(target) - softmax(z)) dz/draw
hence dX = c * (U W), dW = U^T (c * X), dbias = U^T c for any upstream c [N]. Reference: `reference.row_logprob`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpo.kernels.online_softmax import (
    _IGNORE,
    _LOG2E,
    FLOOR,
    IGNORE_INDEX,
    _in_bits,
    _is_top1,
    _normaliser,
    _rescale,
    _results,
    _shift,
    combine,
    device_guard,
    kernel_rule,
    multiprocessors,
)
from fastpo.kernels.row_passes import _row_grad, _row_stats, _store_zeros, _target_logit

# A row is cut into parts of at least this many columns: 8 KiB of bf16, two steps of 128 threads with two 16-byte loads.
MIN_SPLIT = 4096


@triton.jit
def _logprob_row_fwd_kernel(
    logits_ptr,  # [N, V], raw logits in; U out when WRITE_GRAD
    target_ptr,  # [N] int
    bias_ptr,  # [V] or None
    logp_ptr,  # [N] fp32, out
    lse_ptr,  # [N] fp32, out
    entropy_ptr,  # [N] fp32, out, or None
    argmax_ptr,  # [N] int, out, or None
    top1_ptr,  # [N] fp32, out, or None
    shift_ptr,  # [N] fp32, out, or None
    total_ptr,  # [N] fp32, out, or None
    n_cols,
    stride_ln,
    inner,  # a KernelRule
    bits,
    logit_scale,
    NEGATIVE: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    pid_n = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + pid_n * stride_ln
    target = tl.load(target_ptr + pid_n).to(tl.int64)
    # Read before the second pass overwrites it; the reductions below are the barrier in between.
    hit, x_target, slope_target = _target_logit(row_ptr, bias_ptr, target, n_cols, inner, NEGATIVE)
    live = target != _IGNORE

    x_max, m, s, e, i = _row_stats(
        row_ptr,
        bias_ptr,
        0,
        n_cols,
        inner,
        bits,
        NEGATIVE,
        (argmax_ptr is not None) or (top1_ptr is not None),
        entropy_ptr is not None,
        argmax_ptr is not None,
        BLOCK_V,
        VEC,
        ALIGNED,
    )
    logp, lse, entropy = _results(x_target, bits, m, s, e)
    logp = tl.where(hit, logp, float("nan"))  # of a target outside the vocabulary never a plausible number
    tl.store(logp_ptr + pid_n, tl.where(live, logp, 0.0))
    tl.store(lse_ptr + pid_n, lse)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + pid_n, entropy)
    if argmax_ptr is not None:
        tl.store(argmax_ptr + pid_n, i)
    if top1_ptr is not None:
        tl.store(top1_ptr + pid_n, _is_top1(x_target, x_max, logp, live))
    if shift_ptr is not None:
        shift, total = _normaliser(m, s)
        tl.store(shift_ptr + pid_n, shift)
        tl.store(total_ptr + pid_n, total)
    if WRITE_GRAD:
        if live:
            _row_grad(
                row_ptr,
                bias_ptr,
                0,
                n_cols,
                tl.where(hit, target, -1),
                tl.exp2(tl.fma(x_target, bits, -m)) / s,
                slope_target,
                m,
                s,
                inner,
                bits,
                logit_scale,
                NEGATIVE,
                BLOCK_V,
                VEC,
                ALIGNED,
            )
        else:
            _store_zeros(row_ptr, 0, n_cols, BLOCK_V, VEC, ALIGNED)


@triton.jit(do_not_specialize=["n_rows"])
def _logprob_split_fwd_kernel(
    logits_ptr,  # [N, V]
    target_ptr,  # [N] int
    bias_ptr,  # [V] or None
    x_ptr,  # [splits, N] fp32, out
    s_ptr,  # [splits, N] fp32, out
    e_ptr,  # [splits, N] fp32, out, or None
    i_ptr,  # [splits, N] int32, out, or None
    x_target_ptr,  # [N] fp32, out; unwritten where the target is not in [0, V)
    n_rows,
    n_cols,
    width,  # columns of a split, whole blocks
    stride_ln,
    inner,
    bits,
    NEGATIVE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One split of one row: its partial statistics; the first split reads the target's logit too."""
    pid_n = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row_ptr = logits_ptr + pid_n * stride_ln
    if split == 0:
        target = tl.load(target_ptr + pid_n).to(tl.int64)
        hit, x_target, _ = _target_logit(row_ptr, bias_ptr, target, n_cols, inner, NEGATIVE)
        tl.store(x_target_ptr + pid_n, x_target, mask=hit)
    begin = split * width
    x_max, _, s, e, i = _row_stats(
        row_ptr,
        bias_ptr,
        begin,
        tl.minimum(begin + width, n_cols),
        inner,
        bits,
        NEGATIVE,
        True,
        e_ptr is not None,
        i_ptr is not None,
        BLOCK_V,
        VEC,
        ALIGNED,
    )
    out = split.to(tl.int64) * n_rows + pid_n
    tl.store(x_ptr + out, x_max)
    tl.store(s_ptr + out, s)
    if e_ptr is not None:
        tl.store(e_ptr + out, e)
    if i_ptr is not None:
        tl.store(i_ptr + out, i)


@triton.jit
def _logprob_slice_fwd_kernel(
    logits_ptr,  # [N, Vs]
    target_ptr,  # [N] int
    bias_ptr,  # [Vs] or None
    x_ptr,  # [N] fp32, in and out
    s_ptr,  # [N] fp32, in and out
    x_target_ptr,  # [N] fp32, in and out
    e_acc_ptr,  # [N] fp32, in and out, or None
    n_cols,
    stride_ln,
    col_offset,
    inner,
    bits,
    NEGATIVE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    pid_n = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + pid_n * stride_ln
    target = tl.load(target_ptr + pid_n).to(tl.int64) - col_offset
    hit, x_target, _ = _target_logit(row_ptr, bias_ptr, target, n_cols, inner, NEGATIVE)
    tl.store(x_target_ptr + pid_n, x_target, mask=hit)
    x_old = tl.load(x_ptr + pid_n)
    s_old = tl.load(s_ptr + pid_n)
    e_old = 0.0
    if e_acc_ptr is not None:
        e_old = tl.load(e_acc_ptr + pid_n)

    x_max, m, s, e, _ = _row_stats(
        row_ptr,
        bias_ptr,
        0,
        n_cols,
        inner,
        bits,
        NEGATIVE,
        True,
        e_acc_ptr is not None,
        False,
        BLOCK_V,
        VEC,
        ALIGNED,
    )
    m_old = _shift(x_old, bits)
    m_new = tl.maximum(m, m_old)
    s, e = _rescale(m, s, e, m_new)
    s_old, e_old = _rescale(m_old, s_old, e_old, m_new)
    tl.store(x_ptr + pid_n, tl.maximum(x_max, x_old))
    tl.store(s_ptr + pid_n, s + s_old)
    if e_acc_ptr is not None:
        tl.store(e_acc_ptr + pid_n, e + e_old)


@triton.jit
def _logprob_slice_grad_kernel(
    logits_ptr,  # [N, Vs], raw logits in, U out
    target_ptr,  # [N] int
    shift_ptr,  # [N] fp32, of the whole rows
    total_ptr,  # [N] fp32, of the whole rows
    logp_ptr,  # [N] fp32, or None
    bias_ptr,  # [Vs] or None
    n_cols,
    width,  # columns of a split, whole blocks
    stride_ln,
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
    target = tl.load(target_ptr + pid_n).to(tl.int64)
    if target != _IGNORE:
        m, s = _in_bits(tl.load(shift_ptr + pid_n), tl.load(total_ptr + pid_n))
        target -= col_offset
        # Of this program's columns: another program's may be U already.
        mine = tl.where((target >= begin) & (target < end), target, -1)
        _, x_target, slope_target = _target_logit(row_ptr, bias_ptr, mine, end, inner, NEGATIVE)
        if logp_ptr is not None:
            p_target = tl.exp2(tl.load(logp_ptr + pid_n) * _LOG2E)
        else:
            p_target = tl.exp2(tl.fma(x_target, bits, -m)) / s
        tl.debug_barrier()  # before any thread overwrites the target's logit, all have read it
        _row_grad(
            row_ptr,
            bias_ptr,
            begin,
            end,
            mine,
            p_target,
            slope_target,
            m,
            s,
            inner,
            bits,
            logit_scale,
            NEGATIVE,
            BLOCK_V,
            VEC,
            ALIGNED,
        )
    else:
        _store_zeros(row_ptr, begin, end, BLOCK_V, VEC, ALIGNED)


class SliceState(NamedTuple):
    """Online softmax of N rows whose vocabulary comes in slices; every tensor is [N] fp32."""

    x_max: Tensor  # the largest x so far, and what comes of it: online_softmax.py
    s: Tensor
    x_target: Tensor  # NaN until the target's slice has come
    e_acc: Tensor | None


def row_config(n_cols: int, itemsize: int, aligned: bool, has_bias: bool, warp_size: int) -> tuple[int, int, int]:
    """(BLOCK_V, VEC, num_warps). Reasoned from the hardware's figures, not measured: no GPU was at hand.

    Every thread has two 16-byte loads in flight, which hides HBM latency with one block on a multiprocessor (32 KiB in
    flight; Little's law asks for about 20 KiB at 3.35 TB/s). Long rows take 1,024 threads, so that few rows are open at
    once: with 32 registers a thread two programs share a multiprocessor, and on an H100 264 rows of 128,256 bf16 logits
    are 65 MiB. Half of a row waits for its second look on average, 32 MiB of the 50 MB of L2 cache.

    Two cases would spill: rows that do not start on 16 bytes are read by elements, with an address each; a bias is a
    load of its own. They take one vector a thread, the former never more than 512 threads, nor a bias with an odd rest,
    whose mask spills under Triton 3.6; unaligned and with a bias half a vector and 256 threads."""
    threads = 128 if n_cols <= 4096 else 256 if n_cols <= 16384 else 512 if n_cols <= 65536 or not aligned else 1024
    if itemsize == 4:  # a fp32 row is twice as long, and 64 registers a thread would spill its entropy
        threads = min(threads, 512)
    if has_bias and n_cols % 16:
        threads = min(threads, 512)
    if not aligned and has_bias:
        threads = min(threads, 256)
    vec = 16 // itemsize if aligned or not has_bias else 8 // itemsize
    vectors = 2 if aligned and not has_bias else 1
    return vectors * vec * threads, vec, threads // warp_size


def empty_logits(n_rows: int, n_cols: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Uninitialised [n_rows, n_cols] for a GEMM's `out=`, with the row stride padded to 16 elements: every row starts
    on a 16-byte boundary, so the kernels (and the GEMM) use vector accesses at V = 50257 too."""
    return torch.empty(n_rows, -(-n_cols // 16) * 16, dtype=dtype, device=device)[:, :n_cols]


def split_columns(n_rows: int, n_cols: int, device: torch.device) -> tuple[int, int]:
    """(splits, columns of each) of a row. One, unless the rows leave multiprocessors idle: then about two programs for
    each of them, none under MIN_SPLIT columns. By shape and chip alone, so results repeat."""
    sms = multiprocessors(device)
    if n_rows >= sms:
        return 1, n_cols
    splits = max(1, min(-(-2 * sms // max(n_rows, 1)), n_cols // MIN_SPLIT))
    return splits, -(-n_cols // splits)


def _check(logits: Tensor, target: Tensor, bias: Tensor | None, softcap: float | None) -> None:
    assert logits.dim() == 2 and logits.dtype in (torch.float32, torch.bfloat16, torch.float16), (
        f"logits must be [N, V] fp32, bf16 or fp16, got {logits.dtype} {tuple(logits.shape)}"
    )
    n, v = logits.shape
    assert v > 0 and (v == 1 or logits.stride(1) == 1), f"logits need inner stride 1, got {logits.stride()}"
    assert target.shape == (n,) and target.is_contiguous(), f"target must be contiguous [N], got {tuple(target.shape)}"
    assert bias is None or (bias.shape == (v,) and bias.is_contiguous()), "bias must be contiguous [V]"
    assert softcap is None or softcap > 0, f"softcap must be positive, got {softcap}"


def _launch_options(logits: Tensor, bias: Tensor | None, width: int) -> dict:
    """Constants and options for programs that take `width` columns each."""
    # In elements: Triton specialises a stride on divisibility by 16, whatever the element's size.
    aligned = logits.data_ptr() % 16 == 0 and logits.stride(0) % 16 == 0
    block_v, vec, num_warps = row_config(
        width, logits.element_size(), aligned, bias is not None, 64 if torch.version.hip else 32
    )
    # FMA contraction is asked for: it was Triton's default up to 3.9, which warns when it is left unsaid.
    return {"BLOCK_V": block_v, "VEC": vec, "ALIGNED": aligned, "num_warps": num_warps, "enable_fp_fusion": True}


def _split_launch(logits: Tensor, bias: Tensor | None) -> tuple[int, int, dict]:
    """(splits, columns of each in whole blocks, launch options)."""
    n, v = logits.shape
    splits, width = split_columns(n, v, logits.device)
    options = _launch_options(logits, bias, width)
    width = -(-width // options["BLOCK_V"]) * options["BLOCK_V"]
    return -(-v // width), width, options


def logprob_row_fwd(
    logits: Tensor,  # [N, V] fp32 | bf16 | fp16, inner stride 1; overwritten when write == "grad"
    target: Tensor,  # [N] int
    bias: Tensor | None,  # [V]
    *,
    softcap: float | None,
    logit_scale: float,
    entropy: bool = False,
    write: str | None = None,
    argmax: Tensor | None = None,  # [N] int32 or int64, out
    top1: Tensor | None = None,  # [N] fp32, out
    norm: Tensor | None = None,  # [2, N] fp32, out
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logp, lse, entropy | None), each [N] fp32; write="grad" turns the logits into U. A -100 row has logp 0, U 0.

    `argmax` is filled with each row's first column of the largest logit; NaN logits are passed over there, their row's
    logp and lse are NaN. `top1` is filled with 1 where no logit is above the target's, else 0; `reference.row_top1`.
    `norm` is filled with (shift, total), of which sum exp(z) = total exp(shift). Few rows are split
    over several programs: three launches instead of one.
    """
    assert write in (None, "grad"), f"write must be None or 'grad', got {write!r}"
    _check(logits, target, bias, softcap)
    n, v = logits.shape
    for name, out in (("argmax", argmax), ("top1", top1)):
        assert out is None or (out.shape == (n,) and out.is_contiguous()), f"{name} must be contiguous [N]"
    assert norm is None or (norm.shape == (2, n) and norm.stride(1) == 1), "norm must be [2, N] with inner stride 1"
    logp = logits.new_empty(n, dtype=torch.float32)
    lse = torch.empty_like(logp)
    ent = torch.empty_like(logp) if entropy else None
    if n == 0:
        return logp, lse, ent
    splits, width, options = _split_launch(logits, bias)
    rule = kernel_rule(softcap, logit_scale)
    if splits > 1:
        partial = logp.new_empty(2 + entropy, splits, n)
        columns = None if argmax is None else torch.empty(splits, n, dtype=torch.int32, device=logits.device)
        x_target = torch.empty_like(logp)
        x_max, s, e = partial[0], partial[1], partial[2] if entropy else None
        with device_guard(logits):
            _logprob_split_fwd_kernel[(n, splits)](
                logits,
                target,
                bias,
                x_max,
                s,
                e,
                columns,
                x_target,
                n,
                v,
                width,
                logits.stride(0),
                rule.inner,
                rule.bits,
                NEGATIVE=rule.negative,
                **options,
            )
        norm = logp.new_empty(2, n) if norm is None and write == "grad" else norm
        combine(x_max, s, e, columns, x_target, target, v, rule.bits, logp, lse, ent, argmax, top1, norm)
        if write == "grad":
            given = {"softcap": softcap, "logit_scale": logit_scale}
            logprob_slice_grad(logits, target, norm, bias, **given, col_offset=0, logp=logp)
        return logp, lse, ent
    with device_guard(logits):
        _logprob_row_fwd_kernel[(n,)](
            logits,
            target,
            bias,
            logp,
            lse,
            ent,
            argmax,
            top1,
            *((None, None) if norm is None else norm),
            v,
            logits.stride(0),
            *rule.scalars,
            NEGATIVE=rule.negative,
            WRITE_GRAD=write == "grad",
            **options,
        )
    return logp, lse, ent


def logprob_slice_init(n_rows: int, device: torch.device | str, entropy: bool = False) -> SliceState:
    """The state before the first slice."""
    zeros = torch.zeros(n_rows, dtype=torch.float32, device=device)
    x_max, x_target = torch.full_like(zeros, float("-inf")), torch.full_like(zeros, float("nan"))
    return SliceState(x_max, zeros, x_target, zeros.clone() if entropy else None)


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
    _check(logits, target, bias, softcap)
    n, v = logits.shape
    if n == 0:
        return
    rule, options = kernel_rule(softcap, logit_scale), _launch_options(logits, bias, v)
    with device_guard(logits):
        _logprob_slice_fwd_kernel[(n,)](
            logits,
            target,
            bias,
            *state,
            v,
            logits.stride(0),
            col_offset,
            rule.inner,
            rule.bits,
            NEGATIVE=rule.negative,
            **options,
        )


def logprob_slice_finish(
    state: SliceState,
    target: Tensor,  # [N] int
    top1: Tensor | None = None,  # [N] fp32, out
    norm: Tensor | None = None,  # [2, N] fp32, out
    *,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logp, lse, entropy | None), each [N] fp32, after the last slice; `top1` and `norm` as in `logprob_row_fwd`, the
    rule as in every `logprob_slice_fwd`."""
    bits = torch.tensor(kernel_rule(softcap, logit_scale).bits, dtype=torch.float32).item()  # as the kernels have it
    m = (state.x_max * bits).clamp(min=FLOOR).double()
    log_s = state.s.double().log()
    logp = (state.x_target.double() * bits - m) * math.log(2) - log_s
    logp = torch.where(target == IGNORE_INDEX, 0.0, logp).float()
    if top1 is not None:
        top1.copy_((state.x_target >= state.x_max) & (target != IGNORE_INDEX) & ~logp.isnan())
    lse = m * math.log(2)
    if norm is not None:
        norm[0] = lse
        norm[1] = state.s * (lse - norm[0].double()).exp()
    entropy = None if state.e_acc is None else (log_s - state.e_acc / state.s * math.log(2)).float()
    return logp, (lse + log_s).float(), entropy


def logprob_slice_grad(
    logits: Tensor,  # [N, Vs] raw logits in, U out
    target: Tensor,  # [N] int, in the whole vocabulary
    norm: Tensor,  # [2, N] fp32: shift and total of the whole rows, sum exp(z) = total exp(shift)
    bias: Tensor | None,  # [Vs], the slice's own
    *,
    softcap: float | None,
    logit_scale: float,
    col_offset: int,
    logp: Tensor | None = None,  # [N] fp32
) -> None:
    """Overwrites one vocabulary slice of recomputed logits with its columns of U.

    With `logp` of the forward the target's element is 1 - exp(logp), whatever the recomputed logit is. That matters
    where p(target) is nearly 1 and the logits are rounded another way than in the forward (fp32 there, or another
    GEMM): one rounding of a bf16 logit of 30 is 0.06, of 1 - p as much, where 1 - p may be 1e-6.
    """
    _check(logits, target, bias, softcap)
    n, v = logits.shape
    for name, tensor, shape in (("norm", norm, (2, n)), ("logp", logp, (n,))):
        assert tensor is None or (tensor.shape == shape and tensor.dtype == torch.float32 and tensor.stride(-1) == 1), (
            f"{name} must be {list(shape)} fp32 with inner stride 1, got {tensor.dtype} {list(tensor.shape)}"
        )
    if n == 0:
        return
    splits, width, options = _split_launch(logits, bias)
    rule = kernel_rule(softcap, logit_scale)
    with device_guard(logits):
        _logprob_slice_grad_kernel[(n, splits)](
            logits,
            target,
            *norm,
            logp,
            bias,
            v,
            width,
            logits.stride(0),
            col_offset,
            *rule.scalars,
            NEGATIVE=rule.negative,
            **options,
        )


def compile_only() -> None:
    """Compiles the row kernel for the current device without a launch; raises what Triton raises."""
    block_v, vec, num_warps = row_config(32_000, 2, True, False, 64 if torch.version.hip else 32)
    fp32, rule = torch.float32, kernel_rule(None, 1.0)
    _logprob_row_fwd_kernel.warmup(
        torch.bfloat16,
        torch.int64,
        None,
        fp32,
        fp32,
        None,
        None,
        None,
        None,
        None,
        32_000,
        32_000,
        *rule.scalars,
        NEGATIVE=rule.negative,
        WRITE_GRAD=True,
        BLOCK_V=block_v,
        VEC=vec,
        ALIGNED=True,
        num_warps=num_warps,
        enable_fp_fusion=True,
        grid=(1,),
    )
