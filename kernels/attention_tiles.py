"""Device functions of the tree attention: which tiles of queries and keys there are, and what one adds.

Dims, tables and reference are those of kernels/attention.py. Tiles of which every query sees every key are computed
without masks (`MASKED` is False), the others with: the diagonal, ends, borders of chains and of a window.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastpo.kernels.online_softmax import _tanh

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_NOWHERE = tl.constexpr(1 << 30)  # a chain that begins after every token: who is in it sees nothing


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr):
    """a b in fp32; UPCAST is for the interpreter, whose dot of 16-bit operands is wrong."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _load_tile(
    ptr, first, stop, stride_t, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Rows first + [0, ROWS) of a [T, size] matrix, columns [0, COLUMNS), 0 outside. Not MASKED: all rows are before
    `stop`; EVEN: COLUMNS is `size`."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    if MASKED:
        at = ptr + (first + rows).to(tl.int64)[:, None] * stride_t + columns[None, :]
    else:
        at = (ptr + first.to(tl.int64) * stride_t) + (rows[:, None] * stride_t + columns[None, :])
    if MASKED and EVEN:
        return tl.load(at, mask=(rows < stop - first)[:, None], other=0.0)
    elif MASKED:
        return tl.load(at, mask=(rows < stop - first)[:, None] & (columns < size)[None, :], other=0.0)
    elif EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=(columns < size)[None, :], other=0.0)


@triton.jit
def _store_rows(ptr, x, offs, stop, offs_d, size, stride_t):
    mask = (offs < stop)[:, None] & (offs_d < size)[None, :]
    tl.store(ptr + offs.to(tl.int64)[:, None] * stride_t + offs_d[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _score_rule(products, scale, softcap):
    """(scores in units of log 2, d score / d (scale * product) without that unit)."""
    if softcap is not None:
        t, _ = _tanh(products * (scale / softcap))  # whose slope is a register more, which sm_80 has not
        return t * (softcap * _LOG2E), 1.0 - t * t
    else:
        return products * (scale * _LOG2E), 1.0


@triton.jit
def _seen_range(of_prompt, offs_q, start, prompt_stop, k_stop, window):
    """(first, last) key that each query sees in its prompt or in its own chain; none where last < first."""
    first = tl.where(of_prompt, 0, start)
    # Where the query lies, or would lie if it followed its prompt.
    at = tl.where(of_prompt, offs_q - start + prompt_stop, offs_q)
    if window is not None:
        first = tl.maximum(first, at - window + 1)
    return first, tl.minimum(at, k_stop - 1)


@triton.jit
def _plain_tiles(low, n, first, stop, BLOCK: tl.constexpr):
    """[a, b) of n tiles from `low` on: those that lie in [first, stop) whole."""
    a = tl.minimum(tl.cdiv(tl.maximum(first - low, 0), BLOCK), n)
    return a, tl.maximum((stop - low) // BLOCK, a)


@triton.jit
def _key_tiles(
    q_start, q_stop, own_start, prompt_start, prompt_stop, offs_q, chain_start_ptr, window, BLOCK_K: tl.constexpr
):
    """Tiles of keys for a block of queries: (first prompt key, tiles [a, b) of these n that all queries see whole, n;
    first key of their own, and the same)."""
    first_start = tl.load(chain_start_ptr + q_start)
    last_start = tl.load(chain_start_ptr + q_stop - 1)
    prompt_first, own_first = prompt_start, last_start
    if window is not None:
        # The query nearest to the prompt says where the window over the prompt begins, the farthest what all see.
        start = tl.load(chain_start_ptr + offs_q, mask=offs_q < q_stop, other=_NOWHERE)
        nearest = prompt_stop + tl.min(tl.where(start == _NOWHERE, _NOWHERE, offs_q - start), axis=0)
        prompt_start = tl.maximum(prompt_start, nearest - window + 1)
        own_start = tl.maximum(own_start, q_start - window + 1)
        prompt_first = prompt_stop + q_stop - first_start - window
        own_first = tl.maximum(last_start, q_stop - window)
    n_prompt = tl.cdiv(tl.maximum(prompt_stop - prompt_start, 0), BLOCK_K)
    n_own = tl.cdiv(q_stop - own_start, BLOCK_K)
    a, b = _plain_tiles(prompt_start, n_prompt, prompt_first, prompt_stop, BLOCK_K)
    c, d = _plain_tiles(own_start, n_own, own_first, q_start + 1, BLOCK_K)
    return prompt_start, a, b, n_prompt, own_start, c, d, n_own


@triton.jit
def _masked_tile(i, a, b, n, c, d):
    """The i-th tile of two rows of tiles without [a, b) of the first, which has n, and [c, d) of the second: (whether
    it is of the first, its number there)."""
    i += tl.where(i >= a, b - a, 0)
    i += tl.where(i >= n + c, d - c, 0)
    return i < n, tl.where(i < n, i, i - n)


@triton.jit
def _fwd_tile(
    m, s, acc, q, k_ptr, v_ptr, first, stop, of_prompt, offs_q, start, prompt_stop, window, head_size, value_size,
    stride_kt, stride_vt, scale, softcap, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_E: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(maximum, sum, accumulator) with the keys of a tile, some of which not every query sees where MASKED."""
    k = _load_hoisted(k_ptr, first, stop, stride_kt, head_size, BLOCK_K, BLOCK_D, MASKED, EVEN_D, not EVEN_D)
    v = _load_hoisted(v_ptr, first, stop, stride_vt, value_size, BLOCK_K, BLOCK_E, MASKED, EVEN_E, True)
    scores, _ = _score_rule(_dot(q, tl.trans(k), UPCAST), scale, softcap)
    if MASKED:
        offs_k = first + tl.arange(0, BLOCK_K)
        low, high = _seen_range(of_prompt, offs_q, start, prompt_stop, stop, window)
        seen = (offs_k[None, :] >= low[:, None]) & (offs_k[None, :] <= high[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, axis=1))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # never inf - inf
    p = tl.exp2(scores - m_safe[:, None])
    keep = tl.exp2(m - m_safe)
    s = s * keep + tl.sum(p, axis=1)
    acc = acc * keep[:, None] + _dot(p.to(v.dtype), v, UPCAST)
    return m_new, s, acc


@triton.jit
def _dq_tile(
    dq, q, dout, lse, delta, k_ptr, v_ptr, first, stop, of_prompt, offs_q, start, prompt_stop, window, head_size,
    value_size, stride_kt, stride_vt, scale, softcap, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, EVEN_D: tl.constexpr, EVEN_E: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    k = _load_tile(k_ptr, first, stop, stride_kt, head_size, BLOCK_K, BLOCK_D, MASKED, EVEN_D)
    v = _load_tile(v_ptr, first, stop, stride_vt, value_size, BLOCK_K, BLOCK_E, MASKED, EVEN_E)
    scores, slope = _score_rule(_dot(q, tl.trans(k), UPCAST), scale, softcap)
    scores -= lse[:, None]
    if MASKED:
        # Before the exponential: of a score that the softmax never saw it might be infinite.
        offs_k = first + tl.arange(0, BLOCK_K)
        low, high = _seen_range(of_prompt, offs_q, start, prompt_stop, stop, window)
        seen = (offs_k[None, :] >= low[:, None]) & (offs_k[None, :] <= high[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    dp = _dot(dout, tl.trans(v), UPCAST)
    ds = tl.exp2(scores) * (dp - delta[:, None]) * slope
    return dq + _dot(ds.to(k.dtype), k, UPCAST)


@triton.jit
def _dkv_tile(
    dk, dv, k, v, dout_ptr, q_ptr, lse_ptr, delta_ptr, chain_start_ptr, first, stop, of_branch, offs_k, prompt_stop,
    k_stop, window, head_size, value_size, stride_gt, stride_qt, scale, softcap, BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, EVEN_D: tl.constexpr, EVEN_E: tl.constexpr, UPCAST: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    offs_q = first + tl.arange(0, BLOCK_Q)
    q = _load_hoisted(q_ptr, first, stop, stride_qt, head_size, BLOCK_Q, BLOCK_D, MASKED, EVEN_D, True)
    dout = _load_tile(dout_ptr, first, stop, stride_gt, value_size, BLOCK_Q, BLOCK_E, MASKED, EVEN_E)
    if MASKED:
        lse = tl.load(lse_ptr + offs_q, mask=offs_q < stop, other=0.0) * _LOG2E
        delta = tl.load(delta_ptr + offs_q, mask=offs_q < stop, other=0.0)
    else:
        lse = tl.load(lse_ptr + offs_q) * _LOG2E
        delta = tl.load(delta_ptr + offs_q)
    scores, slope = _score_rule(_dot(k, tl.trans(q), UPCAST), scale, softcap)  # [BLOCK_K, BLOCK_Q]
    scores -= lse[None, :]
    if MASKED:
        start = tl.load(chain_start_ptr + offs_q, mask=offs_q < stop, other=_NOWHERE)
        low, high = _seen_range(of_branch, offs_q, start, prompt_stop, k_stop, window)
        seen = (offs_k[:, None] >= low[None, :]) & (offs_k[:, None] <= high[None, :])
        scores = tl.where(seen, scores, float("-inf"))
    p = tl.exp2(scores)
    dv += _dot(p.to(dout.dtype), dout, UPCAST)
    dp = _dot(v, tl.trans(dout), UPCAST)
    ds = p * (dp - delta[None, :]) * slope
    return dk + _dot(ds.to(q.dtype), q, UPCAST), dv


@triton.jit
def _load_hoisted(
    ptr, first, stop, stride_t, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
    EVEN: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    """_load_tile, whose offsets inside the tile are worked out once where it is MASKED too, with HOIST. Chosen for what
    two matrices of a loop need together: with none hoisted some cases spill, with both there are fewer programs."""
    if MASKED and HOIST:
        rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        at = (ptr + first.to(tl.int64) * stride_t) + (rows[:, None] * stride_t + columns[None, :])
        return tl.load(at, mask=(rows < stop - first)[:, None] & (columns < size)[None, :], other=0.0)
    else:
        return _load_tile(ptr, first, stop, stride_t, size, ROWS, COLUMNS, MASKED, EVEN)
