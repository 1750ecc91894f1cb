"""Device functions of the row kernels (logprob.py): a pass over the logits of one row for its statistics, and one that
writes the row's gradient over them. What x, bits and m are: online_softmax.py.

V = vocabulary. A block is [LANES, VEC] columns; a lane's are in one thread.
"""

import triton
import triton.language as tl

from fastpo.kernels.online_softmax import _FLOOR, _NO_COLUMN, _logit, _rescale


@triton.jit
def _load_logits(
    row_ptr,
    bias_ptr,
    cols,
    n_cols,
    inner,
    NEGATIVE: tl.constexpr,
    MASKED: tl.constexpr,
    EVICT: tl.constexpr,
):
    """One block of one row: (x, slope), columns past V at -inf. Only the last block is masked: an unmasked load is one
    16-byte access whatever V is."""
    bias = None
    if MASKED:
        mask = cols < n_cols
        raw = tl.load(row_ptr + cols, mask=mask, other=0.0, eviction_policy=EVICT)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        x, slope = _logit(raw, bias, inner, NEGATIVE)
        x = tl.where(mask, x, float("-inf"))
    else:
        raw = tl.load(row_ptr + cols, eviction_policy=EVICT)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + cols).to(tl.float32)
        x, slope = _logit(raw, bias, inner, NEGATIVE)
    return x, slope


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
def _accumulate(x, cols, bits, x_max, m, s, e, i, PEAK: tl.constexpr, ENTROPY: tl.constexpr, ARGMAX: tl.constexpr):
    """Adds x [LANES, VEC] to the lanes' online softmax: largest x x_max, first column i that has it, shift m, and the
    sums s and e of it."""
    x_block = tl.max(x, axis=1)
    if ARGMAX:  # a lane's columns ascend from block to block, so only a larger maximum moves i
        first = tl.min(tl.where(x == x_block[:, None], cols, _NO_COLUMN), axis=1)
        i = tl.where(x_block > x_max, first, i)
    if PEAK:
        x_max = tl.maximum(x_max, x_block)
    # Of the product as it was rounded, which is what `_shift` makes of x_max; and so never below the floor.
    m_new = tl.maximum(m, x_block * bits)
    above = tl.fma(x, bits, -m_new[:, None])
    p = tl.exp2(above)
    if ENTROPY:
        s, e = _rescale(m, s, e, m_new)
        e += tl.sum(tl.where(p == 0.0, 0.0, above * p), axis=1)
    else:
        s *= tl.exp2(m - m_new)
    return x_max, m_new, s + tl.sum(p, axis=1), e, i


@triton.jit
def _row_stats(
    row_ptr,
    bias_ptr,
    begin,
    end,
    inner,
    bits,
    NEGATIVE: tl.constexpr,
    PEAK: tl.constexpr,
    ENTROPY: tl.constexpr,
    ARGMAX: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """(x_max if PEAK, m, s, e if ENTROPY, i if ARGMAX) of the columns begin to end of one row. Every lane keeps its own
    maximum over its own 16-byte vectors, so warps run through the row without meeting; the price is one more
    exponential per VEC logits."""
    LANES: tl.constexpr = BLOCK_V // VEC
    offs_v = _block_columns(BLOCK_V, VEC, ALIGNED)
    x_max = tl.full([LANES], float("-inf"), tl.float32)
    m = tl.full([LANES], _FLOOR, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    e = tl.zeros([LANES], tl.float32)
    i = begin + tl.min(offs_v, axis=1)
    tail = begin + (end - begin) // BLOCK_V * BLOCK_V
    for start in range(begin, tail, BLOCK_V):
        cols = start + offs_v
        x, _ = _load_logits(row_ptr, bias_ptr, cols, end, inner, NEGATIVE, False, "evict_last")
        x_max, m, s, e, i = _accumulate(x, cols, bits, x_max, m, s, e, i, PEAK, ENTROPY, ARGMAX)
    if tail < end:
        cols = tail + offs_v
        x, _ = _load_logits(row_ptr, bias_ptr, cols, end, inner, NEGATIVE, True, "evict_last")
        x_max, m, s, e, i = _accumulate(x, cols, bits, x_max, m, s, e, i, PEAK, ENTROPY, ARGMAX)
    m_row = tl.max(m, axis=0)
    s, e = _rescale(m, s, e, m_row)
    x_row = tl.max(x_max, axis=0)
    i_row = tl.min(tl.where(x_max == x_row, i, _NO_COLUMN), axis=0)
    return x_row, m_row, tl.sum(s, axis=0), tl.sum(e, axis=0), i_row


@triton.jit
def _store_grad(
    row_ptr, x, slope, cols, end, bits, shift, gain, NEGATIVE: tl.constexpr, FOLDED: tl.constexpr, MASKED: tl.constexpr
):
    """Stores -softmax dz/draw for one block."""
    p = tl.exp2(tl.fma(x, bits, -shift))
    if not FOLDED:
        u = p * gain
    elif NEGATIVE:
        u = p
    else:
        u = p * -1.0  # no instruction: a sign of the store's conversion
    u = (u * slope).to(row_ptr.dtype.element_ty)
    if MASKED:
        tl.store(row_ptr + cols, u, mask=cols < end)
    else:
        tl.store(row_ptr + cols, u)


@triton.jit
def _store_zeros(row_ptr, begin, end, BLOCK_V: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    offs_v = _block_columns(BLOCK_V, VEC, ALIGNED)
    zeros = tl.zeros([BLOCK_V // VEC, VEC], row_ptr.dtype.element_ty)
    for start in range(begin, end, BLOCK_V):
        cols = start + offs_v
        tl.store(row_ptr + cols, zeros, mask=cols < end)


@triton.jit
def _row_grad(
    row_ptr,
    bias_ptr,
    begin,
    end,
    target,  # this row's, in the columns of row_ptr; outside [begin, end) there is none
    p_target,
    slope_target,  # (dz/draw) / logit_scale at the target
    m,
    s,
    inner,
    bits,
    logit_scale,
    NEGATIVE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Overwrites the columns begin to end of one row with U, from their end to their start: what the first pass read
    last is still in cache. The target's, which the others take for one of them, is stored last.

    softmax = 2^(x bits - m) / s. In 16 bits 1 / s and the scale are folded into the shift: that rounds by less than the
    store does. In fp32 they are a factor.
    """
    FOLDED: tl.constexpr = row_ptr.dtype.element_ty.primitive_bitwidth == 16
    gain = -logit_scale / s
    shift = m
    if FOLDED:
        shift = m + (tl.log2(s) - tl.log2(tl.abs(logit_scale)))
    offs_v = _block_columns(BLOCK_V, VEC, ALIGNED)
    tail = begin + (end - begin) // BLOCK_V * BLOCK_V
    if tail < end:
        cols = tail + offs_v
        x, slope = _load_logits(row_ptr, bias_ptr, cols, end, inner, NEGATIVE, True, "evict_first")
        _store_grad(row_ptr, x, slope, cols, end, bits, shift, gain, NEGATIVE, FOLDED, True)
    for done in range(0, tail - begin, BLOCK_V):
        cols = tail - BLOCK_V - done + offs_v
        x, slope = _load_logits(row_ptr, bias_ptr, cols, end, inner, NEGATIVE, False, "evict_first")
        _store_grad(row_ptr, x, slope, cols, end, bits, shift, gain, NEGATIVE, FOLDED, False)
    tl.debug_barrier()  # another thread may have written there
    u = (1.0 - p_target) * (logit_scale * slope_target)
    tl.store(row_ptr + target, u.to(row_ptr.dtype.element_ty), mask=(target >= begin) & (target < end))


@triton.jit
def _target_logit(row_ptr, bias_ptr, target, n_cols, inner, NEGATIVE: tl.constexpr):
    """(hit, x and slope at the target); a target outside [0, V) reads nothing."""
    hit = (target >= 0) & (target < n_cols)
    raw = tl.load(row_ptr + target, mask=hit, other=0.0)
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + target, mask=hit, other=0.0).to(tl.float32)
    x, slope = _logit(raw, bias, inner, NEGATIVE)
    return hit, x, slope
