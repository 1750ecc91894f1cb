"""Triton tree attention: causal chains packed end to end, and branches that continue the prompt of another chain.

T = packed tokens, H = query heads, G = key and value heads (H a multiple of G), D = head size of queries and keys,
E = head size of values. Inputs are fp32, bf16 or fp16, the softmax fp32, products of fp32 inputs in full fp32; one cast
at the store. Which tokens see which is in small integer tables that `fastpo.models.layout` computes on the host:
    chain_start [T]       the first token of each token's chain
    query blocks [NQ, 5]  first token, end, where its own keys begin, the prompt [first, end) that all of it continues
    key blocks [NK, 6]    first token, end, where the queries of its own chains end, the branch [first, end) to which
                          all of it is a prompt, and the end of that prompt
A block of queries runs over the blocks of its prompt and of its own chains, a block of keys over the queries that see
it; so every result is written once by one program, nothing is atomic, and the results are deterministic. First come the
tiles of which every query sees every key, without any mask, then the others: the diagonal, ends, borders of chains and
of a window.
Reference: `reference.tree_attention`. Algorithm: FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpo.kernels.attention_tiles import (
    _LN2,
    _LOG2E,
    _NOWHERE,
    _dkv_tile,
    _dq_tile,
    _fwd_tile,
    _key_tiles,
    _load_tile,
    _masked_tile,
    _plain_tiles,
    _store_rows,
)
from fastpo.kernels.online_softmax import device_guard

# Of fp32, where an NVIDIA GPU holds operands in registers, larger heads spill them.
MAX_HEAD_SIZE = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}


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
    EVEN_D: tl.constexpr,
    EVEN_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    block_ptr = blocks_ptr + tl.program_id(0) * 5
    q_start, q_stop, own_start = tl.load(block_ptr), tl.load(block_ptr + 1), tl.load(block_ptr + 2)
    prompt_start, prompt_stop = tl.load(block_ptr + 3), tl.load(block_ptr + 4)
    offs_q, offs_e = q_start + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_E)
    k_ptr += head // GROUP * stride_kh
    v_ptr += head // GROUP * stride_vh
    q = _load_tile(q_ptr + head * stride_qh, q_start, q_stop, stride_qt, head_size, BLOCK_Q, BLOCK_D, True, EVEN_D)
    prompt_low, a, b, n_prompt, own_low, c, d, n_own = _key_tiles(
        q_start, q_stop, own_start, prompt_start, prompt_stop, offs_q, chain_start_ptr, window, BLOCK_K
    )

    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_E], tl.float32)
    for i in range(0, b - a + d - c):
        of_prompt = i < b - a
        first = tl.where(of_prompt, prompt_low + (a + i) * BLOCK_K, own_low + (c + i - (b - a)) * BLOCK_K)
        m, s, acc = _fwd_tile(
            m, s, acc, q, k_ptr, v_ptr, first, q_stop, of_prompt, offs_q, None, prompt_stop, window, head_size,
            value_size, stride_kt, stride_vt, scale, softcap, BLOCK_K, BLOCK_D, BLOCK_E, EVEN_D, EVEN_E, UPCAST, False,
        )  # fmt: skip
    start = tl.load(chain_start_ptr + offs_q, mask=offs_q < q_stop, other=_NOWHERE)  # not before: it takes registers
    for i in range(0, n_prompt + n_own - (b - a + d - c)):
        of_prompt, tile = _masked_tile(i, a, b, n_prompt, c, d)
        first = tl.where(of_prompt, prompt_low, own_low) + tile * BLOCK_K
        stop = tl.where(of_prompt, prompt_stop, q_stop)
        m, s, acc = _fwd_tile(
            m, s, acc, q, k_ptr, v_ptr, first, stop, of_prompt, offs_q, start, prompt_stop, window, head_size,
            value_size, stride_kt, stride_vt, scale, softcap, BLOCK_K, BLOCK_D, BLOCK_E, EVEN_D, EVEN_E, UPCAST, True,
        )  # fmt: skip

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
    EVEN_D: tl.constexpr,
    EVEN_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    block_ptr = blocks_ptr + tl.program_id(0) * 5
    q_start, q_stop, own_start = tl.load(block_ptr), tl.load(block_ptr + 1), tl.load(block_ptr + 2)
    prompt_start, prompt_stop = tl.load(block_ptr + 3), tl.load(block_ptr + 4)
    offs_q, offs_d = q_start + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    mask_q = offs_q < q_stop
    k_ptr += head // GROUP * stride_kh
    v_ptr += head // GROUP * stride_vh
    q = _load_tile(q_ptr + head * stride_qh, q_start, q_stop, stride_qt, head_size, BLOCK_Q, BLOCK_D, True, EVEN_D)
    dout_ptr += head * stride_gh
    out_ptr += head * stride_oh
    dout = _load_tile(dout_ptr, q_start, q_stop, stride_gt, value_size, BLOCK_Q, BLOCK_E, True, EVEN_E)
    out = _load_tile(out_ptr, q_start, q_stop, stride_ot, value_size, BLOCK_Q, BLOCK_E, True, EVEN_E)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + head * n_tokens + offs_q, delta, mask=mask_q)
    lse = tl.load(lse_ptr + head * n_tokens + offs_q, mask=mask_q, other=0.0) * _LOG2E
    prompt_low, a, b, n_prompt, own_low, c, d, n_own = _key_tiles(
        q_start, q_stop, own_start, prompt_start, prompt_stop, offs_q, chain_start_ptr, window, BLOCK_K
    )

    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for i in range(0, b - a + d - c):
        of_prompt = i < b - a
        first = tl.where(of_prompt, prompt_low + (a + i) * BLOCK_K, own_low + (c + i - (b - a)) * BLOCK_K)
        dq = _dq_tile(
            dq, q, dout, lse, delta, k_ptr, v_ptr, first, q_stop, of_prompt, offs_q, None, prompt_stop, window,
            head_size, value_size, stride_kt, stride_vt, scale, softcap, BLOCK_K, BLOCK_D, BLOCK_E, EVEN_D, EVEN_E,
            UPCAST, False,
        )  # fmt: skip
    start = tl.load(chain_start_ptr + offs_q, mask=offs_q < q_stop, other=_NOWHERE)  # not before: it takes registers
    for i in range(0, n_prompt + n_own - (b - a + d - c)):
        of_prompt, tile = _masked_tile(i, a, b, n_prompt, c, d)
        first = tl.where(of_prompt, prompt_low, own_low) + tile * BLOCK_K
        stop = tl.where(of_prompt, prompt_stop, q_stop)
        dq = _dq_tile(
            dq, q, dout, lse, delta, k_ptr, v_ptr, first, stop, of_prompt, offs_q, start, prompt_stop, window,
            head_size, value_size, stride_kt, stride_vt, scale, softcap, BLOCK_K, BLOCK_D, BLOCK_E, EVEN_D, EVEN_E,
            UPCAST, True,
        )  # fmt: skip
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
    EVEN_D: tl.constexpr,
    EVEN_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    kv_head = tl.program_id(1).to(tl.int64)
    block_ptr = blocks_ptr + tl.program_id(0) * 6
    k_start, k_stop, own_stop = tl.load(block_ptr), tl.load(block_ptr + 1), tl.load(block_ptr + 2)
    branch_start, branch_stop, prompt_stop = tl.load(block_ptr + 3), tl.load(block_ptr + 4), tl.load(block_ptr + 5)
    offs_k = k_start + tl.arange(0, BLOCK_K)
    offs_d, offs_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    k = _load_tile(k_ptr + kv_head * stride_kh, k_start, k_stop, stride_kt, head_size, BLOCK_K, BLOCK_D, True, EVEN_D)
    v = _load_tile(v_ptr + kv_head * stride_vh, k_start, k_stop, stride_vt, value_size, BLOCK_K, BLOCK_E, True, EVEN_E)
    plain_stop = own_stop
    if window is not None:
        own_stop = tl.minimum(own_stop, k_stop + window - 1)
        plain_stop = tl.minimum(own_stop, k_start + window)
        # Beyond the window of the branch's first token, nobody in the branch sees this block.
        branch_stop = tl.where(prompt_stop - k_stop + 1 < window, branch_stop, branch_start)
    # Tiles of queries of which each sees each of these keys: of the branch, where no window ends between; of one's own
    # chain from the last key on, where the keys are of one chain.
    n_branch, n_own = tl.cdiv(branch_stop - branch_start, BLOCK_Q), tl.cdiv(own_stop - k_start, BLOCK_Q)
    b = (branch_stop - branch_start) // BLOCK_Q if window is None else 0
    plain_stop = tl.where(tl.load(chain_start_ptr + k_stop - 1) <= k_start, plain_stop, k_start)
    c, d = _plain_tiles(k_start, n_own, k_stop - 1, plain_stop, BLOCK_Q)
    n_plain = b + d - c
    n_masked = n_branch + n_own - n_plain

    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_E], tl.float32)
    for step in range(0, GROUP * n_plain):
        head = kv_head * GROUP + step // n_plain
        i = step % n_plain
        of_branch = i < b
        first = tl.where(of_branch, branch_start + i * BLOCK_Q, k_start + (c + i - b) * BLOCK_Q)
        dk, dv = _dkv_tile(
            dk, dv, k, v, dout_ptr + head * stride_gh, q_ptr + head * stride_qh, lse_ptr + head * n_tokens,
            delta_ptr + head * n_tokens, chain_start_ptr, first, own_stop, of_branch, offs_k, prompt_stop, k_stop,
            window, head_size, value_size, stride_gt, stride_qt, scale, softcap, BLOCK_Q, BLOCK_D, BLOCK_E, EVEN_D,
            EVEN_E, UPCAST, False,
        )  # fmt: skip
    for step in range(0, GROUP * n_masked):
        head = kv_head * GROUP + step // n_masked
        of_branch, tile = _masked_tile(step % n_masked, 0, b, n_branch, c, d)
        first = tl.where(of_branch, branch_start, k_start) + tile * BLOCK_Q
        stop = tl.where(of_branch, branch_stop, own_stop)
        dk, dv = _dkv_tile(
            dk, dv, k, v, dout_ptr + head * stride_gh, q_ptr + head * stride_qh, lse_ptr + head * n_tokens,
            delta_ptr + head * n_tokens, chain_start_ptr, first, stop, of_branch, offs_k, prompt_stop, k_stop,
            window, head_size, value_size, stride_gt, stride_qt, scale, softcap, BLOCK_Q, BLOCK_D, BLOCK_E, EVEN_D,
            EVEN_E, UPCAST, True,
        )  # fmt: skip
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
    (False, 256): TreeConfig(Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(16, 32, 4, 1)),
    (True, 64): TreeConfig(Tile(32, 32, 4, 1), Tile(32, 16, 4, 1), Tile(32, 32, 4, 1)),
    (True, 128): TreeConfig(Tile(32, 16, 4, 1), Tile(32, 16, 4, 1), Tile(32, 16, 4, 1)),
}


_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


def softcapped(config: TreeConfig, dtype: torch.dtype, head_size: int) -> TreeConfig:
    """The tiles for scores with a soft cap, which takes registers that some cases do not have under Triton 3.6, and
    others from 3.8 on. The host's tables do not depend on what changes."""
    fp32, size = dtype == torch.float32, _padded(head_size)
    if _VERSION < (3, 7) and not fp32 and size == 64:
        return config._replace(dkv=config.dkv._replace(stages=1))
    if _VERSION >= (3, 8) and torch.version.hip is None:
        if not fp32 and size == 256:
            return config._replace(dq=config.dq._replace(keys=16))
        if fp32 and size == 64:
            return config._replace(dkv=config.dkv._replace(queries=16, warps=16))
    return config


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
    # Offsets inside a tile, of at most 128 tokens, are of 32 bits.
    assert all(x.stride(0) < 1 << 24 for x in (query, key, value)), "tokens must be less than 2^24 elements apart"
    assert tables.chain_start.shape == (tokens,) and all(x.dtype == torch.int32 for x in tables)
    assert all(x.is_contiguous() for x in tables)
    constants = {
        "GROUP": heads // kv_heads,
        "BLOCK_D": _padded(head_size),
        "BLOCK_E": _padded(value_size),
        "EVEN_D": _padded(head_size) == head_size,
        "EVEN_E": _padded(value_size) == value_size,
        "UPCAST": os.environ.get("TRITON_INTERPRET", "0") == "1",
        "enable_fp_fusion": True,
    }
    scalars = (float(scale), softcap if softcap is None else float(softcap), window)
    config = tree_config(head_size, value_size, query.dtype)
    if softcap is not None:
        config = softcapped(config, query.dtype, head_size)
    return (tokens, head_size, value_size), scalars, constants, config


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
