"""Forward and backward of the head op, one pair of functions per backend: tensors in, tensors out, no autograd.

N = head rows, D = hidden, V = vocabulary. Every backend walks tiles [rows, columns] of the logits; GEMMs are the
vendor's and keep the input dtype, the row arithmetic is fp32 (fp64 for fp64 inputs).

With z = softcap(logit_scale * raw) and raw = hidden W^T + b, the row gradient U = d logp / d raw = (onehot - P) dz/draw
[N, V] is the same for every loss: dX = c * (U W), dW = U^T (c * X), dbias = U^T c for the upstream c [N].

regime   forward keeps            GEMMs
none     nothing                  1
frozen   U W [N, D]               2
kept     U [N, V] (input dtype)   3
sliced   row statistics           4, a vocabulary slice at a time

For a slice of the vocabulary (ops/vocab_parallel.py) a target of ELSEWHERE means a live row whose target is not in it,
and a regime more, "logits", keeps the raw logits [N, V], which become U once the statistics of whole rows are known.

In fp32 the `cpu` backend keeps E [N, V] and one factor per row, U = factor * E, which saves a pass over the matrix: E
is exp(z - m) (dz/draw) / logit_scale, with m the maximum that the row had in its first tile, and in the column of the
target minus the sum of the others; factor = -logit_scale / sum exp(z - m).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpo.ops import chips

IGNORE_INDEX = -100
ELSEWHERE = -1

# Scratch for one tile of logits, whatever N and V are. On a CPU a tile is two parallel regions (GEMM, pass); threads
# that meet less often lose less where cores are shared: that outweighs a tile that fits L2 (measured on two cores of an
# EPYC 9004). Tiles of the kept matrix need no scratch, so they are larger. On a GPU 512 MiB hold 2,048 bf16 rows of a
# vocabulary of 128,256; blocks of whole rows have no fewer than that, whatever V is: a GEMM of few rows reads all of
# the weight for little work.
CPU_TILE_BYTES = 16 << 20
CPU_KEPT_TILE_BYTES = 64 << 20
CPU_TILE_ROWS = 2048
DEVICE_TILE_BYTES = 512 << 20
DEVICE_TILE_ROWS = 8192
DEVICE_MIN_ROWS = 2048
DEVICE_ROW_STEP = 256  # blocks of whole rows are multiples of it: whole tiles of the vendor's GEMM


class Head(NamedTuple):
    """What a row of log-probabilities is made of."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [N] int64
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float


class Kept(NamedTuple):
    """Results of a forward pass."""

    logp: Tensor  # [N], accumulation dtype
    entropy: Tensor  # [N], or [0] when not asked for
    top1: Tensor  # [N]: 1 where no logit is above the target's, else 0; [0] when the entropy is not asked for
    saved: Tensor  # by regime: [0], [N, D], [N, V], [0]
    stats: Tensor  # [stats_rows(regime, backend), N]
    shift: Tensor  # [N], sum exp(z) = total * exp(shift)
    total: Tensor  # [N]


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def stats_rows(regime: str, backend: str) -> int:
    """How many numbers of each row the backward needs: (m, sum, sum without target; for Triton logp), or a factor."""
    if regime == "sliced":
        return 3
    return int(regime == "kept" and backend == "cpu")


def stats_dtype(dtype: torch.dtype, regime: str, backend: str) -> torch.dtype:
    return torch.float64 if (regime, backend) == ("kept", "cpu") else acc_dtype(dtype)


def saved_columns(vocabulary: int, backend: str) -> int:
    """Row length of the kept matrix: on a GPU rows start on 16-byte boundaries, for whole-vector reads at any V."""
    return -(-vocabulary // 16) * 16 if backend == "triton" else vocabulary


def load_extension():
    """The compiled module, or None where there is none or FASTPO_NO_CSRC is set."""
    if os.environ.get("FASTPO_NO_CSRC", "0") not in ("", "0"):
        return None
    try:
        from fastpo import _C
    except ImportError:
        return None
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu"
    _C.use_openmp_of(str(library.with_suffix(".dylib" if sys.platform == "darwin" else ".so")))
    return _C


_C = load_extension()


def _slices(columns: int, column_bytes: int, tile_bytes: int) -> list[slice]:
    """Column slices of about tile_bytes, for columns of column_bytes."""
    width = max(128, tile_bytes // max(column_bytes, 1) // 128 * 128)
    return [slice(v, min(v + width, columns)) for v in range(0, columns, width)]


def _tiles(
    rows: int, columns: int, device: torch.device, itemsize: int, kept: bool = False
) -> Iterator[tuple[slice, list[slice]]]:
    """Row blocks, each with its column slices; itemsize counts what one element of a tile takes in all."""
    if device.type == "cpu":
        step, tile_bytes = CPU_TILE_ROWS, CPU_KEPT_TILE_BYTES if kept else CPU_TILE_BYTES
    else:
        step, tile_bytes = DEVICE_TILE_ROWS, DEVICE_TILE_BYTES
    step = max(1, min(rows, step))
    for r in range(0, rows, step):
        yield slice(r, min(r + step, rows)), _slices(columns, step * itemsize, tile_bytes)


def _rule(head: Head, raw: Tensor, v: slice) -> tuple[Tensor, Tensor | None]:
    """raw logits of one tile -> (z in the accumulation dtype, dz/draw or None for the constant logit_scale)."""
    z = raw.to(acc_dtype(raw.dtype), copy=True)
    if head.bias is not None:
        z += head.bias[v].to(z.dtype)
    z *= head.logit_scale
    if head.softcap is None:
        return z, None
    z = z.div_(head.softcap).tanh_()
    slope = z.square().neg_().add_(1).mul_(head.logit_scale)
    return z.mul_(head.softcap), slope


def _target_column(target: Tensor, v: slice) -> tuple[Tensor, Tensor]:
    """(column of each row's target in the tile, clamped into it [rows, 1]; whether it is in the tile [rows, 1])."""
    column = (target - v.start).unsqueeze(1)
    width = v.stop - v.start
    return column.clamp(0, width - 1), (column >= 0) & (column < width)


def _target_slope(head: Head, z_target: Tensor, live: Tensor) -> Tensor | float:
    """dz/draw at the target, [N] or one number, where only its logit is known: in saturation by half of the digits."""
    if head.softcap is None:
        return head.logit_scale
    return (1 - (z_target.where(live, 0.0) / head.softcap).square()) * head.logit_scale


def _finish_frozen(head: Head, sums: Tensor, total: Tensor, target_grad: Tensor, live: Tensor) -> None:
    """In place: sums [N, D] = (exp(z - m) dz/draw) W without the target's column -> U W."""
    here = (head.target >= 0) & (head.target < len(head.weight))
    target_grad = target_grad.where(here, 0.0).unsqueeze(1)
    sums.neg_().add_(head.weight[head.target.where(here, 0)].to(sums.dtype).mul_(target_grad))
    sums.mul_((live / total).unsqueeze(1))


def _finish_rows(m: Tensor, others: Tensor, z_target: Tensor, ez: Tensor, live: Tensor) -> tuple[Tensor, ...]:
    """Row sums without the target -> (logp, total, entropy), all [rows]; exact also where p(target) is nearly 1.

    m is the shift, others = sum of exp(z - m), ez = sum of (z - m) exp(z - m), both over the columns but the target's.
    """
    gap = z_target - m
    e_target = gap.exp().masked_fill(z_target == -torch.inf, 0.0)  # where all is masked, gap is NaN
    total = others + e_target
    logp = torch.where(e_target > others, -torch.log1p(others / e_target), gap - total.log())
    ez = ez + torch.where(e_target > 0, gap * e_target, 0.0)
    return logp.where(live, 0.0), total, total.log() - ez / total


def _top1(z_target: Tensor, top: Tensor, logp: Tensor, live: Tensor) -> Tensor:
    """1 where no logit is above the target's, for the largest logit `top` of each row; as reference.row_top1. [rows]"""
    return ((z_target >= top) & live & ~logp.isnan()).to(logp.dtype)


def _new_saved(head: Head, regime: str) -> Tensor:
    if regime in ("kept", "logits"):
        return head.hidden.new_empty(head.hidden.shape[0], head.weight.shape[0])
    shape = head.hidden.shape if regime == "frozen" else (0,)
    return head.hidden.new_zeros(shape, dtype=acc_dtype(head.hidden.dtype))


def _mm_wide(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in `dtype`, without rounding in between where the vendor's GEMM can write a wider dtype than it reads."""
    if a.dtype == dtype or not a.is_cuda or torch.version.hip:
        return torch.mm(a, b).to(dtype)
    return torch.mm(a, b, out_dtype=dtype)


def _add_mm(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b, in the dtype of out, which may be wider."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif a.is_cuda and not torch.version.hip:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out += torch.mm(a, b)


def torch_forward(head: Head, regime: str, entropy: bool) -> Kept:
    """Any device, any floating dtype, plain PyTorch: an online softmax over vocabulary tiles."""
    n, v_size, acc = head.hidden.shape[0], head.weight.shape[0], acc_dtype(head.hidden.dtype)
    new = head.hidden.new_empty
    saved = _new_saved(head, regime)
    logp, stats = new(n, dtype=acc), new(3, n, dtype=acc)
    entropies, top1 = (new(n if entropy else 0, dtype=acc) for _ in range(2))
    for r, columns in _tiles(n, v_size, head.hidden.device, 4 * acc.itemsize):  # a tile has about four temporaries
        block = head._replace(hidden=head.hidden[r], target=head.target[r])
        logp[r], stats[:, r], *numbers = _torch_forward_rows(block, columns, regime, saved[r])
        if entropy:
            entropies[r], top1[r] = numbers
    # NaN, never a plausible number: where the op does not look at the targets, to save a synchronisation.
    outside = (head.target >= v_size) | ((head.target < 0) & (head.target != IGNORE_INDEX))
    logp.masked_fill_(outside, torch.nan)
    return Kept(logp, entropies, top1, saved, stats[: stats_rows(regime, "torch")].clone(), *stats[:2])


def _torch_forward_rows(head: Head, columns: list[slice], regime: str, saved: Tensor) -> tuple[Tensor, ...]:
    """One block of rows: (logp, stats [3, rows], entropy, top1), each [rows]; fills `saved` as the regime asks."""
    x, y = head.hidden, head.target
    m = x.new_full((len(y), 1), -torch.inf, dtype=acc_dtype(x.dtype))
    z_target, others, ez = m, torch.zeros_like(m), torch.zeros_like(m)  # an ignored row keeps z_target = -inf
    slope_target = torch.full_like(m, head.logit_scale)
    for v in columns:
        raw = torch.mm(x, head.weight[v].t(), out=saved[:, v] if regime in ("kept", "logits") else None)
        z, slope = _rule(head, raw, v)
        column, inside = _target_column(y, v)
        z_target = torch.where(inside, z.gather(1, column), z_target)
        if slope is not None:
            slope_target = torch.where(inside, slope.gather(1, column), slope_target)
        m_new = torch.maximum(m, z.amax(1, keepdim=True))
        shift = m_new.where(m_new > -torch.inf, 0.0)  # a row may begin with nothing but masked logits
        decay = (m - shift).exp()
        z -= shift
        e = z.exp()
        e.scatter_(1, column, e.gather(1, column).where(~inside, 0.0))
        ez = decay * (ez + (m - shift).clamp(min=-1e30) * others)
        ez += torch.where(e > 0, z * e, 0.0).sum(1, keepdim=True)
        others = others * decay + e.sum(1, keepdim=True)
        if regime == "frozen":
            e = e if slope is None else e.mul_(slope)
            share = e.sum(1, keepdim=True).clamp(min=torch.finfo(e.dtype).tiny)  # keeps e W in the range of fp16
            saved.mul_(decay).add_(_mm_wide(e.div_(share).to(x.dtype), head.weight[v], e.dtype).mul_(share))
        m = m_new
    live = y != IGNORE_INDEX
    m, others, ez, z_target, slope_target = (t.squeeze(1) for t in (m, others, ez, z_target, slope_target))
    logp, total, entropy = _finish_rows(m, others, z_target, ez, live)
    stats = torch.stack([m, total, others])
    if regime == "frozen":
        if slope is None:
            saved *= head.logit_scale
        _finish_frozen(head, saved, total, others * slope_target, live)
    if regime == "kept":
        for v in columns:
            saved[:, v] = _torch_tile_grad(head, saved[:, v], stats, v)
    return logp, stats, entropy, _top1(z_target, m, logp, live)


def _torch_tile_grad(head: Head, raw: Tensor, stats: Tensor, v: slice) -> Tensor:
    """raw [rows, columns] -> U of that tile in the dtype of raw."""
    m, total, others = stats.unsqueeze(2)
    z, slope = _rule(head, raw, v)
    column, inside = _target_column(head.target, v)
    u = torch.exp(z - m) / -total
    u.scatter_(1, column, torch.where(inside, others / total, u.gather(1, column)))
    return u.mul_(head.logit_scale if slope is None else slope).to(raw.dtype)


def kept_backward(
    head: Head, grad: Tensor, saved: Tensor, stats: Tensor, need: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients from the kept matrix [N, V], one GEMM each: row factors scale the [N, D] operands, never N x V.

    dhidden, here and in the sliced backwards, is in the accumulation dtype.
    """
    c = ((grad * stats[0]).to(grad.dtype) if stats.shape[0] else grad).unsqueeze(1)
    saved = saved[:, : head.weight.shape[0]]
    dhidden = dweight = dbias = None
    if need[0]:
        dhidden = _mm_wide(saved, head.weight, c.dtype).mul_(c)
    if need[1]:
        dweight = torch.mm(saved.t(), (head.hidden * c).to(saved.dtype), out=head.weight.new_empty(head.weight.shape))
    if need[2]:
        dbias = _column_sums(saved, c.squeeze(1))
    return dhidden, dweight, dbias


def _column_sums(matrix: Tensor, c: Tensor) -> Tensor:
    """matrix^T c [V] for matrix [N, V] and c [N], accumulated in the dtype of c."""
    out = matrix.new_empty(matrix.shape[1])
    tile_bytes = CPU_TILE_BYTES if matrix.device.type == "cpu" else DEVICE_TILE_BYTES
    for v in _slices(matrix.shape[1], matrix.shape[0] * c.dtype.itemsize, tile_bytes):
        out[v] = _weighted_sum(matrix[:, v], c)
    return out


def _weighted_sum(tile: Tensor, c: Tensor) -> Tensor:
    """tile^T c [columns] for tile [rows, columns] and c [rows], in the dtype of c. By PyTorch's sum, which adds sums of
    sums; a product with a vector adds row to row, with two to four times the error."""
    return (tile * c.unsqueeze(1)).sum(0)


def torch_sliced_backward(head: Head, grad: Tensor, stats: Tensor, need: list[bool]) -> tuple[Tensor | None, ...]:
    """Gradients from recomputed tiles; each slice of dweight is written once, dhidden accumulates in fp32."""
    x, w, acc = head.hidden, head.weight, acc_dtype(head.hidden.dtype)
    dhidden = torch.zeros_like(x, dtype=acc) if need[0] else None
    dweight = torch.empty_like(w, memory_format=torch.contiguous_format) if need[1] else None
    dbias = w.new_empty(w.shape[0]) if need[2] else None
    cx = (x * grad.unsqueeze(1)).to(x.dtype) if need[1] else None
    tiles = list(_tiles(x.shape[0], w.shape[0], x.device, 4 * acc.itemsize))
    for v in tiles[0][1]:
        dw = w.new_zeros(v.stop - v.start, w.shape[1], dtype=acc) if need[1] else None
        db = w.new_zeros(v.stop - v.start, dtype=acc) if need[2] else None
        for r, _ in tiles:
            raw = torch.mm(x[r], w[v].t())
            u = _torch_tile_grad(head._replace(target=head.target[r]), raw, stats[:, r], v)
            if dhidden is not None:
                _add_mm(dhidden[r], u, w[v])
            if cx is not None:
                dw = torch.mm(u.t(), cx[r]) if len(tiles) == 1 else dw.add_(torch.mm(u.t(), cx[r]))
            if db is not None:
                db += _weighted_sum(u, grad[r])
        if dweight is not None:
            dweight[v] = dw
        if dbias is not None:
            dbias[v] = db
    if dhidden is not None:
        dhidden.mul_(grad.unsqueeze(1))
    return dhidden, dweight, dbias


def _cpu_pass(
    head: Head,
    tile: Tensor,  # [rows, columns], raw logits in, E out when `keep`
    rows: Tensor | tuple[Tensor, ...],  # [4, rows]: m, others, z_target, ez
    v: slice,
    *,
    keep: bool = True,
    top: Tensor | None = None,  # [rows] fp32, the largest logit so far; only with it, `ez` is summed
    sums: Tensor | None = None,  # [rows, D] fp32, restated with the rows when their shift changes
    past: int = 0,  # columns of E before the tile, in the same rows, restated too
    factor: Tensor | None = None,  # [rows], for the backward
    slope: Tensor | None = None,  # [rows] fp32, out where there is a soft cap: (dz/draw) / logit_scale at the target
) -> None:
    """The compiled pass over one tile: forward E and the rows' sums; backward factor * E, for given m and others."""
    m, others, z_target, ez = (row.data_ptr() for row in rows)
    bias = 0 if head.bias is None else head.bias[v].data_ptr()
    sums_ptr, sums_columns = (0, 0) if sums is None else (sums.data_ptr(), sums.shape[1])
    _C.tile_pass(
        tile.data_ptr(), tile.data_ptr() if keep else 0, bias, head.target.data_ptr(), m, others, z_target,
        *((0, 0) if top is None else (ez, top.data_ptr())), sums_ptr, 0 if factor is None else factor.data_ptr(),
        0 if slope is None else slope.data_ptr(),
        tile.stride(0), tile.stride(0), *tile.shape, v.start, past, sums_columns,
        head.softcap or 0.0, head.logit_scale, tile.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip


def _contiguous(head: Head) -> Head:
    """What compiled code reads through a pointer, dense; the weight only ever goes through GEMMs."""
    bias = None if head.bias is None else head.bias.contiguous()
    return head._replace(hidden=head.hidden.contiguous(), target=head.target.contiguous(), bias=bias)


def cpu_forward(head: Head, regime: str, entropy: bool) -> Kept:
    """fp32 and bf16: after the GEMM of a tile one compiled pass over it, which writes E over the logits."""
    head = _contiguous(head)
    x, w = head.hidden, head.weight
    # In bf16 a row factor would be one more rounding of every element, the large one of the target among them: a second
    # pass writes U itself.
    keep_logits = x.dtype != torch.float32 or regime == "logits"
    saved = _new_saved(head, regime)
    rows = torch.empty(4, len(x), dtype=torch.float32)
    rows[0::2] = -torch.inf
    rows[1::2] = 0.0
    slope = rows.new_ones(len(x))
    top = rows.new_full((len(x) if entropy else 0,), -torch.inf)
    scratch = None
    for r, columns in _tiles(len(x), len(w), x.device, 4, kept=regime in ("kept", "logits")):
        block = head._replace(hidden=x[r], target=head.target[r])
        of_block = top[r] if entropy else None
        for v in columns:
            shape = (r.stop - r.start, v.stop - v.start)
            if regime in ("kept", "logits"):
                tile = saved[r, v]
            else:
                scratch = x.new_empty(shape).view(-1) if scratch is None else scratch
                tile = scratch[: shape[0] * shape[1]].view(shape)
            torch.mm(block.hidden, w[v].t(), out=tile)
            if regime == "frozen":
                _cpu_pass(block, tile, rows[:, r], v, top=of_block, sums=saved[r], slope=slope[r])
                _add_mm(saved[r], tile, w[v])
            else:
                keep = regime == "kept" and not keep_logits
                _cpu_pass(block, tile, rows[:, r], v, keep=keep, top=of_block, past=v.start, slope=slope[r])
    live = head.target != IGNORE_INDEX
    m, others, z_target, ez = rows
    logp, total, entropies = _finish_rows(m, others, z_target, ez, live)
    target_grad = others * slope
    stats = rows.new_empty(0, len(x))
    if regime == "frozen":
        _finish_frozen(head, saved.mul_(head.logit_scale), total, target_grad * head.logit_scale, live)
    elif regime == "kept":
        # One number for all of a row: its roundings would not average out in a sum over rows, as those of E do.
        e_target = (z_target.double() - m).exp().masked_fill(z_target == -torch.inf, 0.0)
        stats = (-head.logit_scale / (others.double() + e_target)).unsqueeze(0)
        if keep_logits:
            _cpu_pass(head, saved, torch.stack([m, others, m, others]), slice(0, len(w)), factor=stats[0].float())
            stats.fill_(1.0)
        else:
            column = head.target.where(live, 0).unsqueeze(1)
            saved.scatter_(1, column, -target_grad.unsqueeze(1))
    elif regime == "sliced":
        stats = torch.stack([m, total, others])
    entropies, top1 = (entropies, _top1(z_target, top, logp, live)) if entropy else (top, top.clone())
    return Kept(logp, entropies, top1, saved, stats, m, total)


def cpu_sliced_backward(head: Head, grad: Tensor, stats: Tensor, need: list[bool]) -> tuple[Tensor | None, ...]:
    """As `torch_sliced_backward`, with the compiled pass."""
    head = _contiguous(head)
    x, w = head.hidden, head.weight
    m, total, others = stats
    rows = torch.stack([m, others, m, others])
    factor = grad * (-head.logit_scale / total)
    dhidden = torch.zeros_like(x, dtype=torch.float32) if need[0] else None
    dweight = w.new_empty(w.shape) if need[1] else None
    dbias = w.new_empty(len(w)) if need[2] else None
    tiles = list(_tiles(len(x), len(w), x.device, 4))
    scratch = None
    for v in tiles[0][1] if tiles else []:
        dw = factor.new_zeros(v.stop - v.start, w.shape[1]) if need[1] and len(tiles) > 1 else None
        db = factor.new_zeros(v.stop - v.start)
        for r, _ in tiles:
            shape = (r.stop - r.start, v.stop - v.start)
            scratch = x.new_empty(shape).view(-1) if scratch is None else scratch
            tile = torch.mm(x[r], w[v].t(), out=scratch[: shape[0] * shape[1]].view(shape))
            _cpu_pass(head._replace(target=head.target[r]), tile, rows[:, r], v, factor=factor[r])
            if dhidden is not None:
                _add_mm(dhidden[r], tile, w[v])
            if dw is not None:
                _add_mm(dw, tile.t(), x[r])
            elif dweight is not None:
                torch.mm(tile.t(), x[r], out=dweight[v])
            if dbias is not None:
                db += tile.sum(0, dtype=db.dtype)
        if dw is not None:
            dweight[v] = dw
        if dbias is not None:
            dbias[v] = db
    return dhidden, dweight, dbias


def device_rows(n: int, row_bytes: int) -> int:
    """Rows of one block of whole rows of `row_bytes`. By shape alone, never by free memory: results would differ."""
    rows = DEVICE_TILE_BYTES // row_bytes // DEVICE_ROW_STEP * DEVICE_ROW_STEP
    return max(1, min(n, max(rows, DEVICE_MIN_ROWS)))


def triton_forward(head: Head, regime: str, entropy: bool) -> Kept:
    """GPUs, or the interpreter: vendor GEMM per block of whole rows, then the row kernel in place; where no matrix of
    gradients is asked for, and ops/chips.py says so, the fused kernel instead."""
    from fastpo.kernels import fused, logprob

    head = _contiguous(head)
    x, w = head.hidden, head.weight
    n, v_size = len(x), len(w)
    rule: dict[str, Any] = {"softcap": head.softcap, "logit_scale": head.logit_scale, "entropy": entropy}
    stats = x.new_empty(3, n, dtype=torch.float32)
    logp = x.new_empty(n, dtype=torch.float32)
    entropies, top1 = (logp.new_empty(n if entropy else 0) for _ in range(2))
    use_fused = regime in ("none", "sliced") and chips.use_fused_forward(x, w)
    block = device_rows(n, fused.fused_partial_bytes(v_size) if use_fused else v_size * x.element_size())
    saved = logp.new_empty(x.shape if regime == "frozen" else 0)
    if regime in ("kept", "logits"):
        saved, block = x.new_empty(n, saved_columns(v_size, "triton")), max(n, 1)
        logits = saved[:, :v_size]
        saved[:, v_size:] = 0.0
    elif not use_fused:
        logits = logprob.empty_logits(block, v_size, x.dtype, x.device)
    write = "grad" if regime in ("frozen", "kept") else None
    for begin in range(0, n, block):
        r = slice(begin, min(begin + block, n))
        rule |= {"top1": top1[r] if entropy else None, "norm": stats[:2, r]}
        if use_fused:
            rows = fused.fused_logprob_fwd(x[r], w, head.target[r], head.bias, **rule)
        else:
            u = torch.mm(x[r], w.t(), out=logits[: r.stop - begin])
            rows = logprob.logprob_row_fwd(u, head.target[r], head.bias, write=write, **rule)
        logp[r], _, row_entropy = rows
        if entropy:
            entropies[r] = row_entropy
        if regime == "frozen":
            saved[r] = _mm_wide(u, w, saved.dtype)
    stats[2] = logp
    kept_stats = stats.clone() if regime == "sliced" else logp.new_empty(0, n)
    return Kept(logp, entropies, top1, saved, kept_stats, *stats[:2])


def triton_sliced_backward(head: Head, grad: Tensor, stats: Tensor, need: list[bool]) -> tuple[Tensor | None, ...]:
    """Gradients from recomputed vocabulary slices of all rows."""
    from fastpo.kernels import logprob as kernels

    head = _contiguous(head)
    x, w = head.hidden, head.weight
    c = grad.unsqueeze(1)
    cx = (x * c).to(x.dtype) if need[1] else None
    dhidden = torch.zeros_like(x, dtype=torch.float32) if need[0] else None
    dweight = w.new_empty(w.shape) if need[1] else None
    dbias = w.new_empty(len(w)) if need[2] else None
    logits = None
    for v in _slices(len(w), len(x) * x.element_size(), DEVICE_TILE_BYTES):
        logits = kernels.empty_logits(len(x), v.stop - v.start, x.dtype, x.device) if logits is None else logits
        u = torch.mm(x, w[v].t(), out=logits[:, : v.stop - v.start])
        bias = None if head.bias is None else head.bias[v]
        rule = {"softcap": head.softcap, "logit_scale": head.logit_scale, "col_offset": v.start}
        kernels.logprob_slice_grad(u, head.target, stats[:2], bias, logp=stats[2], **rule)
        if dhidden is not None:
            _add_mm(dhidden, u, w[v])
        if cx is not None:
            torch.mm(u.t(), cx, out=dweight[v])
        if dbias is not None:
            dbias[v] = _column_sums(u, grad)
    return None if dhidden is None else dhidden.mul_(c), dweight, dbias


FORWARD = {"torch": torch_forward, "cpu": cpu_forward, "triton": triton_forward}
SLICED_BACKWARD = {"torch": torch_sliced_backward, "cpu": cpu_sliced_backward, "triton": triton_sliced_backward}
