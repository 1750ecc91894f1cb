"""Forward and backward of the head op, one pair of functions per backend: tensors in, tensors out, no autograd.

N = head rows, D = hidden, V = vocabulary. Every backend walks tiles [rows, columns] of the logits; GEMMs are the
vendor's and keep the input dtype, the row arithmetic is fp32 (fp64 for fp64 inputs).

With z = softcap(logit_scale * raw), raw = hidden W^T + b, the row gradient is U = d logp / d raw = (onehot - P) * dz/draw
[N, V], whatever the loss: dX = c * (U W), dW = U^T (c * X), dbias = U^T c for the upstream c [N].

regime   forward keeps            GEMMs
none     nothing                  1
frozen   U W [N, D]               2
kept     U [N, V] (input dtype)   3
sliced   row statistics [3, N]    4, a vocabulary slice at a time
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100

# Scratch of one tile of logits in the accumulation dtype. On a CPU 4 MiB stay in the caches (L2 + L3) between the GEMM
# that writes a tile and the pass that reads it.
CPU_TILE_BYTES = 4 << 20
DEVICE_TILE_BYTES = 256 << 20
CPU_TILE_ROWS = 1024
DEVICE_TILE_ROWS = 8192


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
    saved: Tensor  # by regime: [0], [N, D], [N, V], [0]
    stats: Tensor  # [3, N] where the backward needs the rows' statistics, else [0]


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tiles(rows: int, columns: int, device: torch.device, itemsize: int) -> Iterator[tuple[slice, list[slice]]]:
    """Row blocks, each with its column slices; the scratch of a tile does not depend on rows or columns."""
    on_cpu = device.type == "cpu"
    block = min(rows, CPU_TILE_ROWS if on_cpu else DEVICE_TILE_ROWS)
    budget = CPU_TILE_BYTES if on_cpu else DEVICE_TILE_BYTES
    width = max(128, budget // (max(block, 1) * itemsize) // 128 * 128)
    columns_of = [slice(v, min(v + width, columns)) for v in range(0, columns, width)]
    for r in range(0, rows, max(block, 1)):
        yield slice(r, min(r + block, rows)), columns_of


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


def _target_slope(head: Head, z_target: Tensor) -> Tensor | float:
    """dz/draw at the target."""
    if head.softcap is None:
        return head.logit_scale
    return (1 - (z_target / head.softcap).square()) * head.logit_scale


def _finish_rows(m: Tensor, others: Tensor, z_target: Tensor, ez: Tensor, live: Tensor) -> tuple[Tensor, ...]:
    """Row sums without the target -> (logp, total, entropy), all [rows]; exact also where p(target) is nearly 1.

    m is the shift, others = sum of exp(z - m), ez = sum of (z - m) exp(z - m), both over the columns but the target's.
    """
    gap = z_target - m
    e_target = gap.exp()
    total = others + e_target
    logp = torch.where(e_target > others, -torch.log1p(others / e_target), gap - total.log())
    ez = ez + torch.where(e_target > 0, gap * e_target, 0.0)
    return logp.where(live, 0.0), total, total.log() - ez / total


def torch_forward(head: Head, regime: str, entropy: bool) -> Kept:
    """Any device, any floating dtype, plain PyTorch: an online softmax over vocabulary tiles."""
    n, v_size, acc = head.hidden.shape[0], head.weight.shape[0], acc_dtype(head.hidden.dtype)
    new = head.hidden.new_empty
    saved = new(n, v_size) if regime == "kept" else new(head.hidden.shape if regime == "frozen" else 0, dtype=acc)
    logp, stats, entropies = new(n, dtype=acc), new(3, n, dtype=acc), new(n if entropy else 0, dtype=acc)
    for r, columns in _tiles(n, v_size, head.hidden.device, acc.itemsize):
        block = head._replace(hidden=head.hidden[r], target=head.target[r])
        logp[r], stats[:, r], row_entropy = _torch_forward_rows(block, columns, regime, saved[r])
        if entropy:
            entropies[r] = row_entropy
    return Kept(logp, entropies, saved, stats if regime == "sliced" else new(0, dtype=acc))


def _torch_forward_rows(head: Head, columns: list[slice], regime: str, saved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One block of rows: (logp [rows], stats [3, rows], entropy [rows]); fills `saved` as the regime asks."""
    x, y = head.hidden, head.target
    m = x.new_full((len(y), 1), -torch.inf, dtype=acc_dtype(x.dtype))
    z_target, others, ez = m, torch.zeros_like(m), torch.zeros_like(m)  # an ignored row keeps z_target = -inf
    if regime == "frozen":
        saved.zero_()
    for v in columns:
        raw = torch.mm(x, head.weight[v].t(), out=saved[:, v] if regime == "kept" else None)
        z, slope = _rule(head, raw, v)
        column, inside = _target_column(y, v)
        z_target = torch.where(inside, z.gather(1, column), z_target)
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
            saved.mul_(decay).add_(torch.mm(e.to(x.dtype), head.weight[v]))
        m = m_new
    live = y != IGNORE_INDEX
    m, others, ez, z_target = (t.squeeze(1) for t in (m, others, ez, z_target))
    logp, total, entropy = _finish_rows(m, others, z_target, ez, live)
    stats = torch.stack([m, total, others])
    if regime == "frozen":
        saved.mul_(-1.0 if head.softcap is not None else -head.logit_scale)
        target_rows = head.weight[y.where(live, 0)].to(saved.dtype)
        saved.add_(target_rows.mul_((others * _target_slope(head, z_target.where(live, 0.0))).unsqueeze(1)))
        saved.mul_((live / total).unsqueeze(1))
    if regime == "kept":
        for v in columns:
            saved[:, v] = _torch_tile_grad(head, saved[:, v], stats, v)
    return logp, stats, entropy


def _torch_tile_grad(head: Head, raw: Tensor, stats: Tensor, v: slice) -> Tensor:
    """raw [rows, columns] -> U of that tile in the dtype of raw."""
    m, total, others = stats.unsqueeze(2)
    z, slope = _rule(head, raw, v)
    column, inside = _target_column(head.target, v)
    u = torch.exp(z - m) / -total
    u.scatter_(1, column, torch.where(inside, others / total, u.gather(1, column)))
    return u.mul_(head.logit_scale if slope is None else slope).to(raw.dtype)


def kept_backward(head: Head, grad: Tensor, saved: Tensor, need: list[bool]) -> tuple[Tensor | None, ...]:
    """Gradients from U [N, V] for the upstream grad [N], one GEMM each: grad scales [N, D] operands, never N x V."""
    c = grad.unsqueeze(1)
    dhidden = (torch.mm(saved, head.weight) * c).to(saved.dtype) if need[0] else None
    dweight = torch.mm(saved.t(), (head.hidden * c).to(saved.dtype)) if need[1] else None
    dbias = torch.mv(saved.t(), grad.to(saved.dtype)) if need[2] else None
    return dhidden, dweight, dbias


def torch_sliced_backward(
    head: Head, grad: Tensor, stats: Tensor, need: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients from recomputed tiles; each slice of dweight is written once, dhidden accumulates in fp32."""
    x, w, acc = head.hidden, head.weight, acc_dtype(head.hidden.dtype)
    dhidden = torch.zeros_like(x, dtype=acc) if need[0] else None
    dweight = torch.empty_like(w, memory_format=torch.contiguous_format) if need[1] else None
    dbias = w.new_empty(w.shape[0]) if need[2] else None
    cx = (x * grad.unsqueeze(1)).to(x.dtype) if need[1] else None
    tiles = list(_tiles(x.shape[0], w.shape[0], x.device, acc.itemsize))
    for v in tiles[0][1]:
        dw = w.new_zeros(v.stop - v.start, w.shape[1], dtype=acc) if need[1] else None
        db = w.new_zeros(v.stop - v.start, dtype=acc) if need[2] else None
        for r, _ in tiles:
            raw = torch.mm(x[r], w[v].t())
            u = _torch_tile_grad(head._replace(target=head.target[r]), raw, stats[:, r], v)
            if dhidden is not None:
                dhidden[r] += torch.mm(u, w[v])
            if cx is not None:
                dw = torch.mm(u.t(), cx[r]) if len(tiles) == 1 else dw.add_(torch.mm(u.t(), cx[r]))
            if db is not None:
                db += torch.mv(u.t().to(acc), grad[r])
        if dweight is not None:
            dweight[v] = dw
        if dbias is not None:
            dbias[v] = db
    if dhidden is not None:
        dhidden = dhidden.mul_(grad.unsqueeze(1)).to(x.dtype)
    return dhidden, dweight, dbias
