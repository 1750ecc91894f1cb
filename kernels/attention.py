"""Triton tree attention: causal chains packed end to end, and branches that continue the prompt of another chain.

T = packed tokens, H = query heads, G = key and value heads (H a multiple of G), D = head size of queries and keys,
E = head size of values. Inputs are fp32, bf16 or fp16, the softmax fp32, products of fp32 inputs in full fp32; one cast
at the store. Which tokens see which is in small integer tables that `fastpo.models.layout` computes on the host:
    chain_start [T]       the first token of each token's chain
    query blocks [NQ, 5]  first token, end, where its own keys begin, the prompt [first, end) that all of it continues
    key blocks [NK, 6]    first token, end, where the queries of its own chains end, the branch [first, end) to which
                          all of it is a prompt, and the end of that prompt
A block of queries runs over the blocks of its prompt and then of its own chains, a block of keys over the queries that
see it; so every result is written once by one program, nothing is atomic, and the results are deterministic.
Reference: `reference.tree_attention`. Algorithm: FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpo.kernels.online_softmax import _tanh, device_guard

# Of fp32, where an NVIDIA GPU holds operands in registers, larger heads spill them.
MAX_HEAD_SIZE = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}
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
def _load_rows(ptr, offs, stop, offs_d, size, stride_t):
    """Rows [len(offs), len(offs_d)] of a [T, size] matrix, 0 outside it."""
    mask = (offs < stop)[:, None] & (offs_d < size)[None, :]
    return tl.load(ptr + offs.to(tl.int64)[:, None] * stride_t + offs_d[None, :], mask=mask, other=0.0)


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
def _key_ranges(q_start, q_stop, own_start, prompt_start, prompt_stop, offs_q, start, window, BLOCK_K: tl.constexpr):
    """(first prompt key, blocks of prompt keys, first own key, blocks of own keys) of a block of queries."""
    if window is not None:
        # The query nearest to the prompt says where the window over the prompt begins.
        nearest = prompt_stop + tl.min(tl.where(start == _NOWHERE, _NOWHERE, offs_q - start), axis=0)
        prompt_start = tl.maximum(prompt_start, nearest - window + 1)
        own_start = tl.maximum(own_start, q_start - window + 1)
    n_prompt = tl.cdiv(tl.maximum(prompt_stop - prompt_start, 0), BLOCK_K)
    return prompt_start, n_prompt, own_start, tl.cdiv(q_stop - own_start, BLOCK_K)


@triton.jit
def _tree_attention_fwd_kernel(
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, G, D]
    v_ptr,  # [T, G, E]
    sink_ptr,  # [H] or None
    chain_start_ptr,  # [T] int32
    blocks_ptr,  # [NQ, 5] int32
    out_ptr,  # [T, H, E], out
    lse_ptr,  # [H, T] fp32, out
    n_tokens,
    head_size,
    value_size,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    scale,
    softcap,  # or None
    window,  # tokens that a query sees, itself included, or None
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    block_ptr = blocks_ptr + tl.program_id(0) * 5
    q_start, q_stop, own_start = tl.load(block_ptr), tl.load(block_ptr + 1), tl.load(block_ptr + 2)
    prompt_start, prompt_stop = tl.load(block_ptr + 3), tl.load(block_ptr + 4)
    offs_q = q_start + tl.arange(0, BLOCK_Q)
    offs_d, offs_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    k_ptr += head // GROUP * stride_kh
    v_ptr += head // GROUP * stride_vh
    q = _load_rows(q_ptr + head * stride_qh, offs_q, q_stop, offs_d, head_size, stride_qt)
    start = tl.load(chain_start_ptr + offs_q, mask=offs_q < q_stop, other=_NOWHERE)
    prompt_low, n_prompt, own_low, n_own = _key_ranges(
        q_start, q_stop, own_start, prompt_start, prompt_stop, offs_q, start, window, BLOCK_K
    )

    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_E], tl.float32)
    for i in range(0, n_prompt + n_own):
        of_prompt = i < n_prompt
        first = tl.where(of_prompt, prompt_low + i * BLOCK_K, own_low + (i - n_prompt) * BLOCK_K)
        stop = tl.where(of_prompt, prompt_stop, q_stop)
        offs_k = first + tl.arange(0, BLOCK_K)
        k = _load_rows(k_ptr, offs_k, stop, offs_d, head_size, stride_kt)
        v = _load_rows(v_ptr, offs_k, stop, offs_e, value_size, stride_vt)
        scores, _ = _score_rule(_dot(q, tl.trans(k), UPCAST), scale, softcap)
        low, high = _seen_range(of_prompt, offs_q, start, prompt_stop, stop, window)
        seen = (offs_k[None, :] >= low[:, None]) & (offs_k[None, :] <= high[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # never inf - inf
        p = tl.exp2(scores - m_safe[:, None])
        keep = tl.exp2(m - m_safe)
        s = s * keep + tl.sum(p, axis=1)
        acc = acc * keep[:, None] + _dot(p.to(v.dtype), v, UPCAST)
        m = m_new

    if sink_ptr is not None:
        sink = tl.load(sink_ptr + head).to(tl.float32) * _LOG2E
        m_new = tl.maximum(m, sink)
        keep = tl.exp2(m - m_new)
        s = s * keep + tl.exp2(sink - m_new)
        acc = acc * keep[:, None]
        m = m_new
    s = tl.where(s == 0.0, 1.0, s)  # rows past the block's end
    _store_rows(out_ptr + head * stride_oh, acc / s[:, None], offs_q, q_stop, offs_e, value_size, stride_ot)
    tl.store(lse_ptr + head * n_tokens + offs_q, (m + tl.log2(s)) * _LN2, mask=offs_q < q_stop)


@triton.jit
def _tree_attention_dq_kernel(
    dout_ptr,  # [T, H, E]
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, G, D]
    v_ptr,  # [T, G, E]
    out_ptr,  # [T, H, E]
    lse_ptr,  # [H, T] fp32
    chain_start_ptr,  # [T] int32
    blocks_ptr,  # [NQ, 5] int32
    dq_ptr,  # [T, H, D], out
    delta_ptr,  # [H, T] fp32, out: sum of dout * out, which the kernel of the keys needs again
    n_tokens,
    head_size,
    value_size,
    stride_gt,
    stride_gh,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    stride_dt,
    stride_dh,
    scale,
    softcap,
    window,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    block_ptr = blocks_ptr + tl.program_id(0) * 5
    q_start, q_stop, own_start = tl.load(block_ptr), tl.load(block_ptr + 1), tl.load(block_ptr + 2)
    prompt_start, prompt_stop = tl.load(block_ptr + 3), tl.load(block_ptr + 4)
    offs_q = q_start + tl.arange(0, BLOCK_Q)
    mask_q = offs_q < q_stop
    offs_d, offs_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    k_ptr += head // GROUP * stride_kh
    v_ptr += head // GROUP * stride_vh
    q = _load_rows(q_ptr + head * stride_qh, offs_q, q_stop, offs_d, head_size, stride_qt)
    dout = _load_rows(dout_ptr + head * stride_gh, offs_q, q_stop, offs_e, value_size, stride_gt)
    out = _load_rows(out_ptr + head * stride_oh, offs_q, q_stop, offs_e, value_size, stride_ot)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + head * n_tokens + offs_q, delta, mask=mask_q)
    lse = tl.load(lse_ptr + head * n_tokens + offs_q, mask=mask_q, other=0.0) * _LOG2E
    start = tl.load(chain_start_ptr + offs_q, mask=mask_q, other=_NOWHERE)
    prompt_low, n_prompt, own_low, n_own = _key_ranges(
        q_start, q_stop, own_start, prompt_start, prompt_stop, offs_q, start, window, BLOCK_K
    )

    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for i in range(0, n_prompt + n_own):
        of_prompt = i < n_prompt
        first = tl.where(of_prompt, prompt_low + i * BLOCK_K, own_low + (i - n_prompt) * BLOCK_K)
        stop = tl.where(of_prompt, prompt_stop, q_stop)
        offs_k = first + tl.arange(0, BLOCK_K)
        k = _load_rows(k_ptr, offs_k, stop, offs_d, head_size, stride_kt)
        v = _load_rows(v_ptr, offs_k, stop, offs_e, value_size, stride_vt)
        scores, slope = _score_rule(_dot(q, tl.trans(k), UPCAST), scale, softcap)
        low, high = _seen_range(of_prompt, offs_q, start, prompt_stop, stop, window)
        seen = (offs_k[None, :] >= low[:, None]) & (offs_k[None, :] <= high[:, None])
        # Masked before the exponential: of a score that the softmax never saw it might be infinite.
        scores = tl.where(seen, scores - lse[:, None], float("-inf"))
        dp = _dot(dout, tl.trans(v), UPCAST)
        ds = tl.exp2(scores) * (dp - delta[:, None]) * slope
        dq += _dot(ds.to(k.dtype), k, UPCAST)
    _store_rows(dq_ptr + head * stride_dh, dq * scale, offs_q, q_stop, offs_d, head_size, stride_dt)


@triton.jit
def _tree_attention_dkv_kernel(
    dout_ptr,  # [T, H, E]
    q_ptr,  # [T, H, D]
    k_ptr,  # [T, G, D]
    v_ptr,  # [T, G, E]
    lse_ptr,  # [H, T] fp32
    delta_ptr,  # [H, T] fp32
    chain_start_ptr,  # [T] int32
    blocks_ptr,  # [NK, 6] int32
    dk_ptr,  # [T, G, D], out
    dv_ptr,  # [T, G, E], out
    n_tokens,
    head_size,
    value_size,
    stride_gt,
    stride_gh,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dkt,
    stride_dkh,
    stride_dvt,
    stride_dvh,
    scale,
    softcap,
    window,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    kv_head = tl.program_id(1).to(tl.int64)
    block_ptr = blocks_ptr + tl.program_id(0) * 6
    k_start, k_stop, own_stop = tl.load(block_ptr), tl.load(block_ptr + 1), tl.load(block_ptr + 2)
    branch_start, branch_stop, prompt_stop = tl.load(block_ptr + 3), tl.load(block_ptr + 4), tl.load(block_ptr + 5)
    offs_k = k_start + tl.arange(0, BLOCK_K)
    offs_d, offs_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    k = _load_rows(k_ptr + kv_head * stride_kh, offs_k, k_stop, offs_d, head_size, stride_kt)
    v = _load_rows(v_ptr + kv_head * stride_vh, offs_k, k_stop, offs_e, value_size, stride_vt)
    if window is not None:
        own_stop = tl.minimum(own_stop, k_stop + window - 1)
        # Beyond the window of the branch's first token, nobody in the branch sees this block.
        branch_stop = tl.where(prompt_stop - k_stop + 1 < window, branch_stop, branch_start)
    n_branch = tl.cdiv(branch_stop - branch_start, BLOCK_Q)
    n = n_branch + tl.cdiv(own_stop - k_start, BLOCK_Q)

    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_E], tl.float32)
    for step in range(0, GROUP * n):
        head = kv_head * GROUP + step // n
        i = step % n
        of_branch = i < n_branch
        first = tl.where(of_branch, branch_start + i * BLOCK_Q, k_start + (i - n_branch) * BLOCK_Q)
        stop = tl.where(of_branch, branch_stop, own_stop)
        offs_q = first + tl.arange(0, BLOCK_Q)
        mask_q = offs_q < stop
        q = _load_rows(q_ptr + head * stride_qh, offs_q, stop, offs_d, head_size, stride_qt)
        dout = _load_rows(dout_ptr + head * stride_gh, offs_q, stop, offs_e, value_size, stride_gt)
        lse = tl.load(lse_ptr + head * n_tokens + offs_q, mask=mask_q, other=0.0) * _LOG2E
        delta = tl.load(delta_ptr + head * n_tokens + offs_q, mask=mask_q, other=0.0)
        start = tl.load(chain_start_ptr + offs_q, mask=mask_q, other=_NOWHERE)
        scores, slope = _score_rule(_dot(k, tl.trans(q), UPCAST), scale, softcap)  # [BLOCK_K, BLOCK_Q]
        low, high = _seen_range(of_branch, offs_q, start, prompt_stop, k_stop, window)
        seen = (offs_k[:, None] >= low[None, :]) & (offs_k[:, None] <= high[None, :])
        scores = tl.where(seen, scores - lse[None, :], float("-inf"))
        p = tl.exp2(scores)
        dv += _dot(p.to(dout.dtype), dout, UPCAST)
        dp = _dot(v, tl.trans(dout), UPCAST)
        ds = p * (dp - delta[None, :]) * slope
        dk += _dot(ds.to(q.dtype), q, UPCAST)
    _store_rows(dk_ptr + kv_head * stride_dkh, dk * scale, offs_k, k_stop, offs_d, head_size, stride_dkt)
    _store_rows(dv_ptr + kv_head * stride_dvh, dv, offs_k, k_stop, offs_e, value_size, stride_dvt)


class TreeTables(NamedTuple):
    """Who sees whom, on the device of the tensors; made by `fastpo.models.layout` for the blocks of `tree_config`."""

    chain_start: Tensor  # [T] int32
    fwd_blocks: Tensor  # [NQ, 5] int32
    dq_blocks: Tensor  # [NQ, 5] int32
    dkv_blocks: Tensor  # [NK, 6] int32


class Tile(NamedTuple):
    """What one program of a kernel works on at a time."""

    queries: int
    keys: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        return {
            "BLOCK_Q": self.queries, "BLOCK_K": self.keys, "num_warps": self.warps, "num_stages": self.stages,
        }  # fmt: skip


class TreeConfig(NamedTuple):
    fwd: Tile
    dq: Tile
    dkv: Tile


def tree_config(head_size: int, value_size: int, dtype: torch.dtype) -> TreeConfig:
    """The largest tiles of a handful that spill no register to memory with every option on, found by compiling for
    sm_80, sm_90, sm_100 and gfx942 (bench/aot.py); not measured: no GPU was at hand."""
    size = max(_padded(head_size), _padded(value_size))
    size = 64 if size <= 64 else size
    tiles = _HIP_TILES if torch.version.hip is not None else _CUDA_TILES
    return tiles[dtype == torch.float32, size]


# (fp32, padded head size) -> tiles. NVIDIA has no tensor cores for full fp32: operands lie in registers. Keys in blocks
# of 32, which larger heads need in the third kernel, are too few for wgmma (Hopper) and tcgen05 (Blackwell): they run
# mma.sync there.
_CUDA_TILES = {
    (False, 64): TreeConfig(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(32, 64, 4, 2)),
    (False, 128): TreeConfig(Tile(64, 64, 4, 2), Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
    (False, 256): TreeConfig(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    (True, 64): TreeConfig(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    (True, 128): TreeConfig(Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(32, 16, 16, 1)),
}
_HIP_TILES = {
    (False, 64): TreeConfig(Tile(128, 32, 4, 1), Tile(64, 32, 4, 1), Tile(32, 32, 4, 1)),
    (False, 128): TreeConfig(Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(32, 32, 4, 1)),
    (False, 256): TreeConfig(Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(32, 32, 4, 1)),
    (True, 64): TreeConfig(Tile(32, 32, 4, 1), Tile(32, 16, 4, 1), Tile(32, 32, 4, 1)),
    (True, 128): TreeConfig(Tile(32, 16, 4, 1), Tile(32, 16, 4, 1), Tile(32, 16, 4, 1)),
}


def _padded(size: int) -> int:
    """Tiles are powers of two, and a matrix instruction takes no fewer than 16 columns."""
    return max(16, triton.next_power_of_2(size))


def _launch_args(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: TreeTables,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[tuple, tuple, dict, TreeConfig]:
    """(sizes, scalars, constants, config), after checking what the kernels assume."""
    tokens, heads, head_size = query.shape
    kv_heads, value_size = value.shape[1:]
    assert query.dtype in MAX_HEAD_SIZE and query.dtype == key.dtype == value.dtype, (
        query.dtype,
        key.dtype,
        value.dtype,
    )
    assert key.shape == (tokens, kv_heads, head_size) and value.shape[0] == tokens and heads % kv_heads == 0
    assert max(head_size, value_size) <= MAX_HEAD_SIZE[query.dtype], f"head size {head_size}, of values {value_size}"
    assert all(x.stride(2) == 1 for x in (query, key, value)), "inner strides must be 1"
    assert tables.chain_start.shape == (tokens,) and all(x.dtype == torch.int32 for x in tables)
    assert all(x.is_contiguous() for x in tables)
    constants = {
        "GROUP": heads // kv_heads,
        "BLOCK_D": _padded(head_size),
        "BLOCK_E": _padded(value_size),
        "UPCAST": os.environ.get("TRITON_INTERPRET", "0") == "1",
        "enable_fp_fusion": True,
    }
    scalars = (float(scale), softcap if softcap is None else float(softcap), window)
    return (tokens, head_size, value_size), scalars, constants, tree_config(head_size, value_size, query.dtype)


def _strides(*tensors: Tensor) -> list[int]:
    return [n for x in tensors for n in x.stride()[:2]]


def tree_attention_fwd(
    query: Tensor,  # [T, H, D]
    key: Tensor,  # [T, G, D]
    value: Tensor,  # [T, G, E]
    tables: TreeTables,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sink: Tensor | None = None,  # [H]
) -> tuple[Tensor, Tensor]:
    """(out [T, H, E] in the inputs' dtype, log-sum-exp of the scores [H, T] fp32, the sink included)."""
    sizes, scalars, constants, config = _launch_args(query, key, value, tables, scale, softcap, window)
    tokens, heads = query.shape[:2]
    assert sink is None or (sink.shape == (heads,) and sink.is_contiguous()), "sink must be contiguous [H]"
    out = torch.empty(tokens, heads, value.shape[2], dtype=query.dtype, device=query.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=query.device)
    with device_guard(query):
        _tree_attention_fwd_kernel[(len(tables.fwd_blocks), heads)](
            query, key, value, sink, tables.chain_start, tables.fwd_blocks, out, lse,
            *sizes, *_strides(query, key, value, out), *scalars, **config.fwd.constants, **constants,
        )  # fmt: skip
    return out, lse


def tree_attention_bwd(
    dout: Tensor,  # [T, H, E]
    query: Tensor,  # [T, H, D]
    key: Tensor,  # [T, G, D]
    value: Tensor,  # [T, G, E]
    out: Tensor,  # [T, H, E]
    lse: Tensor,  # [H, T] fp32
    tables: TreeTables,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sink: Tensor | None = None,  # [H]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dquery, dkey, dvalue, dsink | None), each in its input's dtype."""
    sizes, scalars, constants, config = _launch_args(query, key, value, tables, scale, softcap, window)
    assert dout.shape == out.shape and dout.dtype == query.dtype and dout.stride(2) == out.stride(2) == 1
    heads, kv_heads = query.shape[1], key.shape[1]
    # Not empty_like, which would keep the strides of a view.
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    delta = torch.empty_like(lse)
    with device_guard(query):
        _tree_attention_dq_kernel[(len(tables.dq_blocks), heads)](
            dout, query, key, value, out, lse, tables.chain_start, tables.dq_blocks, dq, delta,
            *sizes, *_strides(dout, query, key, value, out, dq), *scalars, **config.dq.constants, **constants,
        )  # fmt: skip
        _tree_attention_dkv_kernel[(len(tables.dkv_blocks), kv_heads)](
            dout, query, key, value, lse, delta, tables.chain_start, tables.dkv_blocks, dk, dv,
            *sizes, *_strides(dout, query, key, value, dk, dv), *scalars, **config.dkv.constants, **constants,
        )  # fmt: skip
    # A sink's probability has no value behind it: d loss / d sink = -sum of exp(sink - lse) * delta.
    dsink = None if sink is None else -((sink.float()[:, None] - lse).exp() * delta).sum(1).to(sink.dtype)
    return dq, dk, dv, dsink
