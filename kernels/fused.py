"""Fused forward of the head: hidden W^T and the softmax statistics of its rows in one kernel, logits never in memory.

N = head rows (completion tokens), D = hidden, V = vocabulary. A persistent kernel walks tiles [BLOCK_N, BLOCK_V] of the
logits: tensor cores accumulate one in fp32, then each of its rows leaves (max, sum of exp, sum for the entropy) behind,
and the row whose target lies in it the target's logit. `combine` merges the tiles of a row in a fixed order, so nothing
is atomic, results repeat bitwise, and no row depends on how many others came with it. For regimes that need no matrix
of gradients. bf16 and fp16; fp32 is left to the vendor's GEMM. Reference: `reference.linear_logprob`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastpo.kernels.online_softmax import (
    _logit,
    _shift,
    combine,
    device_guard,
    kernel_rule,
    multiprocessors,
)

# The interpreter's tl.dot returns garbage for bf16 (Triton 3.6 to 3.9); the kernel widens its operands there.
INTERPRETED = triton.knobs.runtime.interpret
GROUP_N = 16  # row blocks that share the blocks of W in flight: at D = 4,096, 16 MiB of hidden stay in the L2 cache


class FusedConfig(NamedTuple):
    """Tiles and pipeline of the fused forward."""

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_D: int
    num_warps: int
    num_stages: int
    tma: bool = False  # tiles come by tensor descriptors, where D allows
    flatten: bool = False  # the two loops as one: a tile's first loads run under the softmax of the one before
    warp_specialize: bool = False  # loads, tensor cores and softmax in warps of their own


@triton.jit
def _tile_of(tile, n_blocks_n, n_blocks_v, GROUP_N: tl.constexpr):
    """(row block, vocabulary block): GROUP_N row blocks by all of the vocabulary, row blocks fastest, so that the
    programs at work together share a few blocks of W and the group's rows, which stay in the L2 cache."""
    per_group = GROUP_N * n_blocks_v
    first = tile // per_group * GROUP_N
    height = tl.minimum(n_blocks_n - first, GROUP_N)
    within = tile % per_group
    return first + within % height, within // height


@triton.jit
def _load_tile(
    x, row0, d0, offs_row, n_rows, n_dim, stride, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, TMA: tl.constexpr
):
    """Tile [BLOCK, BLOCK_D] of a matrix; past D zeros. By pointers, rows past the end repeat the first; no one reads
    what comes of them."""
    if TMA:
        tile = x.load([row0, d0])
    else:
        offs_d = d0 + tl.arange(0, BLOCK_D)
        rows = tl.where(offs_row < n_rows, offs_row, 0).to(tl.int64)
        ptrs = x + rows[:, None] * stride + offs_d[None, :]
        if EVEN_D:
            tile = tl.load(ptrs)
        else:
            tile = tl.load(ptrs, mask=offs_d[None, :] < n_dim, other=0.0)
    return tile


@triton.jit(do_not_specialize=["n_rows"])
def _fused_logprob_fwd_kernel(
    x,  # hidden [N, D], pointer or descriptor
    w,  # weight [V, D], pointer or descriptor
    target_ptr,  # [N] int
    bias_ptr,  # [V] or None
    x_ptr,  # [blocks of V, N] fp32, out
    s_ptr,  # [blocks of V, N] fp32, out
    e_ptr,  # [blocks of V, N] fp32, out, or None
    x_target_ptr,  # [N] fp32, out; unwritten where the target is not in [0, V)
    n_rows,
    n_cols,
    n_dim,
    stride_xn,
    stride_wv,
    inner,  # a KernelRule
    bits,
    NEGATIVE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
    EVEN_D: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    n_blocks_n = tl.cdiv(n_rows, BLOCK_N)
    n_blocks_v = tl.cdiv(n_cols, BLOCK_V)
    n_blocks_d = tl.cdiv(n_dim, BLOCK_D)
    for tile in tl.range(
        tl.program_id(0),
        n_blocks_n * n_blocks_v,
        tl.num_programs(0),
        flatten=FLATTEN,
        warp_specialize=WARP_SPECIALIZE,
    ):
        block_n, block_v = _tile_of(tile, n_blocks_n, n_blocks_v, GROUP_N)
        row0 = block_n * BLOCK_N
        col0 = block_v * BLOCK_V
        offs_n = row0 + tl.arange(0, BLOCK_N)
        offs_v = col0 + tl.arange(0, BLOCK_V)
        acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for k in range(n_blocks_d):
            d0 = k * BLOCK_D
            x_tile = _load_tile(x, row0, d0, offs_n, n_rows, n_dim, stride_xn, BLOCK_D, EVEN_D, TMA)
            w_tile = _load_tile(w, col0, d0, offs_v, n_cols, n_dim, stride_wv, BLOCK_D, EVEN_D, TMA)
            if UPCAST:
                x_tile = x_tile.to(tl.float32)
                w_tile = w_tile.to(tl.float32)
            acc = tl.dot(x_tile, w_tile.T, acc)
        bias = None
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + offs_v, mask=offs_v < n_cols, other=0.0).to(tl.float32)[None, :]
        # Not in base 2: Triton 3.7's warp specialisation for sm_100 fails on a second exp2 in the tile.
        x_logit, _ = _logit(acc, bias, inner, NEGATIVE, False)
        x_logit = tl.where(offs_v[None, :] < n_cols, x_logit, float("-inf"))
        x_max = tl.max(x_logit, axis=1)
        above = tl.fma(x_logit, bits, -_shift(x_max, bits)[:, None])
        p = tl.exp2(above)
        mask_n = offs_n < n_rows
        out = block_v.to(tl.int64) * n_rows + offs_n
        tl.store(x_ptr + out, x_max, mask=mask_n)
        tl.store(s_ptr + out, tl.sum(p, axis=1), mask=mask_n)
        if e_ptr is not None:
            e = tl.sum(tl.where(p == 0.0, 0.0, above * p), axis=1)
            tl.store(e_ptr + out, e, mask=mask_n)
        target = tl.load(target_ptr + offs_n, mask=mask_n, other=-1)
        hit = (target >= col0) & (target < col0 + BLOCK_V) & (target < n_cols)
        at_target = offs_v[None, :] == target.to(tl.int32)[:, None]
        tl.store(x_target_ptr + offs_n, tl.sum(tl.where(at_target, x_logit, 0.0), axis=1), mask=mask_n & hit)


def chip(device: torch.device) -> str:
    """`sm_90`, `gfx942`, or the device's type where it is no GPU."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


# Per chip: (plain logits, logits with a bias, a soft cap or the entropy). The softmax of a tile keeps all of it in
# registers, and the options need more of them than a 128 x 256 tile leaves. Chosen so that nothing spills and the
# shared memory fits (bench/aot.py); not measured: no GPU was at hand. Warp specialisation only where Triton up to 3.7
# does it: on sm_90 it ignores the request with 8 warps and fails to compile with 4. Of 3.9's on sm_100 the registers
# spill and the shared memory does not fit, nor do 256 columns fit the registers without it, nor 128 rows with options.
_SPECIALIZES = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
_SM_100 = FusedConfig(128, 128, 64, 8, 4, True, True, _SPECIALIZES)
_SM_100_NARROW = _SM_100 if _SPECIALIZES else _SM_100._replace(BLOCK_N=64)
CONFIGS = {
    "sm_80": (FusedConfig(128, 256, 64, 8, 3), FusedConfig(128, 128, 64, 8, 3)),
    "sm_90": (FusedConfig(128, 256, 64, 8, 4, tma=True, flatten=True), FusedConfig(128, 128, 64, 8, 4, True, True)),
    "sm_100": (_SM_100._replace(BLOCK_V=256 if _SPECIALIZES else 128), _SM_100_NARROW),
    "gfx942": (FusedConfig(128, 256, 64, 8, 2), FusedConfig(128, 128, 64, 8, 2)),
}
UNKNOWN = FusedConfig(128, 128, 32, 8, 3)  # 48 KiB of shared memory, which every chip with tensor cores has
RAGGED = FusedConfig(64, 128, 32, 8, 1)  # masks on D, or rows that are not whole 16-byte loads


def takes(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the fused forward can read these: bf16 or fp16, with D the inner dimension in memory of both."""
    return hidden.dtype in (torch.bfloat16, torch.float16) and hidden.stride(1) == 1 == weight.stride(1)


def _aligned(matrix: Tensor) -> bool:
    """Rows that start on 16-byte boundaries: what descriptors and 16-byte loads need."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0 and matrix.numel() > 0


def fused_config(hidden: Tensor, weight: Tensor, plain: bool) -> FusedConfig:
    """The configuration for these operands on their chip. A mask on an odd V takes registers as the logits' options
    do; pointers load 16 bytes at a time, without a mask, where D is whole blocks and the strides divide by 16."""
    if not (_aligned(hidden) and _aligned(weight)):
        return RAGGED
    wide, narrow = CONFIGS.get(chip(hidden.device), (UNKNOWN, UNKNOWN))
    config = wide if plain and weight.shape[0] % 16 == 0 else narrow
    whole = hidden.shape[1] % config.BLOCK_D == hidden.stride(0) % 16 == weight.stride(0) % 16 == 0
    return config if config.tma or whole else RAGGED


def fused_partial_bytes(n_cols: int) -> int:
    """Upper bound of the scratch memory per row of `fused_logprob_fwd`."""
    return 12 * -(-n_cols // 128)


def fused_logprob_fwd(
    hidden: Tensor,  # [N, D] bf16 | fp16, inner stride 1
    weight: Tensor,  # [V, D], inner stride 1
    target: Tensor,  # [N] int
    bias: Tensor | None,  # [V]
    *,
    softcap: float | None,
    logit_scale: float,
    entropy: bool = False,
    top1: Tensor | None = None,  # [N] fp32, out
    norm: Tensor | None = None,  # [2, N] fp32, out
    config: FusedConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logp, lse, entropy | None), each [N] fp32, of logits that are never rounded nor stored. A -100 row has logp 0;
    a target outside the vocabulary gives NaN. `top1` and `norm` as in `logprob_row_fwd`. `config` None: the chip's."""
    (n, d), v = hidden.shape, weight.shape[0]
    assert takes(hidden, weight) and weight.shape == (v, d) and v > 0, (
        f"hidden and weight must be bf16 or fp16 [N, D] and [V, D] with inner stride 1, got {hidden.dtype} "
        f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
    )
    assert target.shape == (n,) and target.is_contiguous(), f"target must be contiguous [N], got {tuple(target.shape)}"
    assert bias is None or (bias.shape == (v,) and bias.is_contiguous()), "bias must be contiguous [V]"
    assert top1 is None or (top1.shape == (n,) and top1.is_contiguous()), "top1 must be contiguous [N]"
    logp, lse = (torch.empty(n, dtype=torch.float32, device=hidden.device) for _ in range(2))
    ent = torch.empty_like(logp) if entropy else None
    if n == 0:
        return logp, lse, ent
    c = config or fused_config(hidden, weight, bias is None and softcap is None and not entropy)
    parts = -(-v // c.BLOCK_V)
    partial = torch.empty(2 + entropy, parts, n, dtype=torch.float32, device=hidden.device)
    x_max, s, e = partial[0], partial[1], partial[2] if entropy else None
    x_target = torch.empty_like(logp)
    rule = kernel_rule(softcap, logit_scale)
    operands = (hidden, weight)
    if c.tma:
        blocks = (c.BLOCK_N, c.BLOCK_V)
        operands = tuple(TensorDescriptor.from_tensor(t, [b, c.BLOCK_D]) for t, b in zip(operands, blocks))
    tiles = -(-n // c.BLOCK_N) * parts
    with device_guard(hidden):
        _fused_logprob_fwd_kernel[(min(tiles, multiprocessors(hidden.device)),)](
            *operands,
            target,
            bias,
            x_max,
            s,
            e,
            x_target,
            n,
            v,
            d,
            hidden.stride(0),
            weight.stride(0),
            rule.inner,
            rule.bits,
            NEGATIVE=rule.negative,
            BLOCK_N=c.BLOCK_N,
            BLOCK_V=c.BLOCK_V,
            BLOCK_D=c.BLOCK_D,
            GROUP_N=GROUP_N,
            EVEN_D=d % c.BLOCK_D == 0,
            TMA=c.tma,
            FLATTEN=c.flatten,
            WARP_SPECIALIZE=c.warp_specialize,
            UPCAST=INTERPRETED,
            num_warps=c.num_warps,
            num_stages=c.num_stages,
            enable_fp_fusion=True,
        )
    combine(x_max, s, e, None, x_target, target, v, rule.bits, logp, lse, ent, None, top1, norm)
    return logp, lse, ent
