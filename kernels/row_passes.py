"""Device functions of the row kernels (logprob.py): a pass over the logits of one row for its statistics, and one that
writes the row's gradient over them.

V = vocabulary. A block is [LANES, VEC] columns; a lane's are in one thread.
"""

import triton
import triton.language as tl

from fastpo.kernels.online_softmax import _NO_COLUMN, _finite, _logit_rule, _rescale


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
def _accumulate(z, cols, m, s, e, i, ENTROPY: tl.constexpr, ARGMAX: tl.constexpr):
    """Adds z [LANES, VEC] to the lanes' online softmax: maximum m, first column i that has it, s = sum exp(z - m),
    e = sum (z - m) exp(z - m)."""
    m_block = tl.max(z, axis=1)
    if ARGMAX:  # a lane's columns ascend from block to block, so only a larger maximum moves i
        first = tl.min(tl.where(z == m_block[:, None], cols, _NO_COLUMN), axis=1)
        i = tl.where(m_block > m, first, i)
    m_new = tl.maximum(m, m_block)
    m_safe = _finite(m_new)
    shifted = z - m_safe[:, None]
    p = tl.exp(shifted)
    if ENTROPY:
        s, e = _rescale(m, s, e, m_safe)
        e += tl.sum(tl.where(shifted == float("-inf"), 0.0, shifted * p), axis=1)
    else:
        s *= tl.exp(m - m_safe)
    return m_new, s + tl.sum(p, axis=1), e, i


@triton.jit
def _row_stats(
    row_ptr,
    bias_ptr,
    begin,
    end,
    softcap,
    logit_scale,
    ENTROPY: tl.constexpr,
    ARGMAX: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """(m, s, e, i) of the columns begin to end of one row. Every lane keeps its own maximum over its own 16-byte
    vectors, so warps run through the row without meeting; the price is one more exp per VEC logits."""
    LANES: tl.constexpr = BLOCK_V // VEC
    offs_v = _block_columns(BLOCK_V, VEC, ALIGNED)
    m = tl.full([LANES], float("-inf"), tl.float32)
    s = tl.zeros([LANES], tl.float32)
    e = tl.zeros([LANES], tl.float32)
    i = begin + tl.min(offs_v, axis=1)
    tail = begin + (end - begin) // BLOCK_V * BLOCK_V
    for start in range(begin, tail, BLOCK_V):
        cols = start + offs_v
        z, _ = _load_logits(row_ptr, bias_ptr, cols, end, softcap, logit_scale, False, "evict_last")
        m, s, e, i = _accumulate(z, cols, m, s, e, i, ENTROPY, ARGMAX)
    if tail < end:
        cols = tail + offs_v
        z, _ = _load_logits(row_ptr, bias_ptr, cols, end, softcap, logit_scale, True, "evict_last")
        m, s, e, i = _accumulate(z, cols, m, s, e, i, ENTROPY, ARGMAX)
    m_row = tl.max(m, axis=0)
    s, e = _rescale(m, s, e, _finite(m_row))
    i_row = tl.min(tl.where(m == m_row, i, _NO_COLUMN), axis=0)
    return m_row, tl.sum(s, axis=0), tl.sum(e, axis=0), i_row


@triton.jit
def _store_grad(row_ptr, z, slope, cols, end, target, u_target, shift, factor, MASKED: tl.constexpr):
    """Stores U for one block, with softmax = exp(z - shift) * factor; a -100 row (factor 0 and no target) stores 0.
    u_target is 1 - softmax(z)[target] where the caller knows it, else None."""
    p = tl.exp(z - shift) * factor
    if u_target is not None:
        u = tl.where(cols == target, u_target, -p) * slope
    else:
        u = tl.where(cols == target, 1.0 - p, -p) * slope
    u = tl.where(factor == 0.0, 0.0, u).to(row_ptr.dtype.element_ty)
    if MASKED:
        tl.store(row_ptr + cols, u, mask=cols < end)
    else:
        tl.store(row_ptr + cols, u)


@triton.jit
def _row_grad(
    row_ptr,
    bias_ptr,
    begin,
    end,
    n_cols,
    target,
    u_target,
    shift,
    factor,
    softcap,
    logit_scale,
    BLOCK_V: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Overwrites the columns begin to end of one row with U, from their end to their start: what the first pass read
    last is still in cache."""
    target = tl.where((target >= 0) & (target < n_cols), target, -1).to(tl.int32)
    offs_v = _block_columns(BLOCK_V, VEC, ALIGNED)
    tail = begin + (end - begin) // BLOCK_V * BLOCK_V
    if tail < end:
        cols = tail + offs_v
        z, slope = _load_logits(row_ptr, bias_ptr, cols, end, softcap, logit_scale, True, "evict_first")
        _store_grad(row_ptr, z, slope, cols, end, target, u_target, shift, factor, True)
    for done in range(0, tail - begin, BLOCK_V):
        cols = tail - BLOCK_V - done + offs_v
        z, slope = _load_logits(row_ptr, bias_ptr, cols, end, softcap, logit_scale, False, "evict_first")
        _store_grad(row_ptr, z, slope, cols, end, target, u_target, shift, factor, False)


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
