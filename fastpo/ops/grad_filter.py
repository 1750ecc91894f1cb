"""The certified gradient filter: a backward that leaves out what is certain not to matter, row by row.

N = head rows, D = hidden, V = vocabulary, T = ceil(V / TILE_COLUMNS) tiles of the vocabulary.

The forward forms, for every row and tile, the tile's share of the row's probability (the sum of its softmax). Each row
then gives up its least likely tiles, smallest share first, while their sum stays within the budget `grad_filter`; the
tile of the row's target is never among them. The backward runs, for each tile, its GEMMs on the rows that kept it,
gathered, so that every row has a list of its own: a block of rows that decides together must keep what any of them
needs (docs/grad-filter.md has both measured).

What that does to the gradient is bounded. With p the row's softmax and S what the row gave up, delta = sum_S p is the
mass reported, and delta <= grad_filter. A row of onehot - P loses the entries -p_v, v in S, and nothing else changes:
its error in the L1 norm is delta, or |logit_scale| delta at most after the logit rule, whose slope is at most
|logit_scale|. So, for the upstream gradient c [N],

    |error of dhidden_i| <= |c_i| |logit_scale| delta_i max_{v in S_i} |W_v|
    sum_v |error of dweight_v| <= |logit_scale| sum_i |c_i| delta_i |hidden_i|
    sum_v |error of dbias_v| <= |logit_scale| sum_i |c_i| delta_i

Nothing is renormalised: p_v of the tiles that stay is the exact one. Cut Cross-Entropy (arXiv 2411.09009) drops a tile
where every |onehot - P| is below a threshold instead, so that a flat row may lose all of its tail, up to V times the
threshold.

Probabilities are those of the logits that the op computes, with the rounding of the input dtype in them. A row with a
NaN or an infinite logit gives up nothing, and its gradient is NaN as without a filter. A logit of -inf has probability
0, and no gradient either way.

The logits [N, V] are kept in the input dtype from forward to backward where they fit the memory budget (GEMMs: 1 + 2 s
for the share s of tiles that stay, 1 + s with a frozen head), else recomputed where they are needed (1 + 3 s, 1 + 2 s).
Compiled passes for the `cpu` backend; anything else, GPUs included, runs plain PyTorch operations, for the Triton
kernels know no lists of rows; that has not been run on a GPU yet. The lists depend on the data: the backward waits
for a GPU twice, for the rows of all lists and for their lengths.

`filtered_logprob` is the custom op that `ops.linear_logprob` calls for a filter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo.ops import backends, parts
from fastpo.ops.backends import IGNORE_INDEX, Head, _add_mm, _contiguous, _cpu_pass, _mm_wide, _tiles, acc_dtype

# Narrower tiles are given up more often and leave thinner GEMMs (docs/grad-filter.md).
TILE_COLUMNS = 512

# Sums of a tile and of a row round differently: shares count for this much more against the budget. Of fp32's 2^-24 it
# leaves room for exponents off by logits of 2^10.
MARGIN = 1 + 2.0**-14


class Filtered(NamedTuple):
    """Results of a forward pass."""

    logp: Tensor  # [N], accumulation dtype
    entropy: Tensor  # [N], or [0] when not asked for
    top1: Tensor  # [N], as backends.Kept has it
    dropped: Tensor  # [N], probability that the backward leaves out
    saved: Tensor  # [N, V] logits of the GEMM, or [0]
    stats: Tensor  # [3, N]: m, sum, sum without target
    keep: Tensor  # [N, T] bool, what the backward computes


def tile_count(vocabulary: int) -> int:
    return -(-vocabulary // TILE_COLUMNS)


def _tile_slices(v: slice) -> list[slice]:
    return [slice(a, min(a + TILE_COLUMNS, v.stop)) for a in range(v.start, v.stop, TILE_COLUMNS)]


def _row_blocks(rows: int, columns: int, device: torch.device, itemsize: int) -> list[tuple[slice, list[slice]]]:
    """Blocks of the forward's GEMMs as elsewhere, their columns in whole tiles of the filter."""
    blocks = []
    for r, slices in _tiles(rows, columns, device, itemsize):
        width = max(1, (slices[0].stop - slices[0].start) // TILE_COLUMNS) * TILE_COLUMNS
        blocks.append((r, [slice(v, min(v + width, columns)) for v in range(0, columns, width)]))
    return blocks


def forward(head: Head, mass: float, keep_logits: bool, entropy: bool, compiled: bool) -> Filtered:
    """Log-probabilities as of any backend, and which tiles the backward may leave out. `mass`: of each row, in (0, 1).

    compiled: the tensors are on the CPU, in fp32 or bf16, and the extension is there.
    """
    head = _contiguous(head)
    x, w, acc = head.hidden, head.weight, acc_dtype(head.hidden.dtype)
    n, v_size = len(x), len(w)
    tiles = tile_count(v_size)
    saved = x.new_empty(n, v_size) if keep_logits else x.new_empty(0)
    logp, dropped, stats = (x.new_empty(shape, dtype=acc) for shape in ((n,), (n,), (3, n)))
    entropies, top1 = (x.new_empty(n if entropy else 0, dtype=acc) for _ in range(2))
    keep = x.new_empty(n, tiles, dtype=torch.bool)
    scratch = None
    for r, columns in _row_blocks(n, v_size, x.device, x.element_size() if compiled else 4 * acc.itemsize):
        block = head._replace(hidden=x[r], target=head.target[r])
        rows = r.stop - r.start
        m, others, ez = (x.new_zeros(tiles, rows, dtype=acc) for _ in range(3))
        z_target, top = (x.new_full((rows,), -torch.inf, dtype=acc) for _ in range(2))
        m.fill_(-torch.inf)
        for v in columns:
            if keep_logits:
                raw = saved[r, v]
            else:
                shape = (rows, v.stop - v.start)
                scratch = x.new_empty(shape).view(-1) if scratch is None else scratch  # the first tile is the largest
                raw = scratch[: shape[0] * shape[1]].view(shape)
            torch.mm(block.hidden, w[v].t(), out=raw)
            if compiled:
                for t in _tile_slices(v):
                    i = t.start // TILE_COLUMNS
                    part = raw[:, t.start - v.start : t.stop - v.start]
                    numbers = (m[i], others[i], z_target, ez[i])
                    _cpu_pass(block, part, numbers, t, keep=False, top=top if entropy else None)
            else:
                i = slice(v.start // TILE_COLUMNS, -(-v.stop // TILE_COLUMNS))
                m[i], others[i], ez[i] = _tile_sums(block, raw, v, z_target)
                top = torch.maximum(top, m[i].amax(0))
        live = block.target != IGNORE_INDEX
        logp[r], stats[:, r], row_entropy, shares = _combine(m, others, ez, z_target, live)
        if entropy:
            entropies[r], top1[r] = row_entropy, backends._top1(z_target, top, logp[r], live)
        keep[r], dropped[r] = choose(shares, block.target, mass)
    # NaN, never a plausible number: where the op does not look at the targets, to save a synchronisation.
    logp.masked_fill_((head.target >= v_size) | ((head.target < 0) & (head.target != IGNORE_INDEX)), torch.nan)
    return Filtered(logp, entropies, top1, dropped, saved, stats, keep)


def _tile_sums(head: Head, raw: Tensor, v: slice, z_target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(m, others, ez), each [tiles, rows], of raw logits [rows, columns], as `_cpu_pass` has them; fills `z_target`."""
    z, _ = backends._rule(head, raw, v)
    column, inside = backends._target_column(head.target, v)
    picked = z.gather(1, column)
    z_target.copy_(torch.where(inside, picked, z_target.unsqueeze(1)).squeeze(1))
    z = F.pad(z, (0, -z.shape[1] % TILE_COLUMNS), value=-torch.inf)
    m = z.view(len(z), -1, TILE_COLUMNS).amax(2)
    z.scatter_(1, column, picked.where(~inside, -torch.inf))
    z = z.view(len(z), -1, TILE_COLUMNS).sub_(m.where(m > -torch.inf, 0.0).unsqueeze(2))
    e = z.exp()
    ez = torch.where(e > 0, z.mul_(e), 0.0).sum(2)
    return m.t(), e.sum(2).t(), ez.t()


def _combine(
    m: Tensor, others: Tensor, ez: Tensor, z_target: Tensor, live: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of tiles [T, rows], each with its own shift m -> (logp, stats [3, rows], entropy, shares [rows, T])."""
    top = m.amax(0)
    gap = m - top.where(top > -torch.inf, 0.0)
    decay = gap.exp()
    sums = decay * others
    total_others = sums.sum(0)
    ez = (decay * (ez + gap.clamp(min=-1e30) * others)).sum(0)
    logp, total, entropy = backends._finish_rows(top, total_others, z_target, ez, live)
    return logp, torch.stack([top, total, total_others]), entropy, (sums / total).t()


def choose(shares: Tensor, target: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """(which tiles stay [rows, T] bool, the share of the others [rows]) for shares [rows, T] and targets [rows].

    Smallest first, while the sum, taken in fp64 and a little up, is at most `mass`. NaN never is, and NaN in a row's
    total makes all of its shares NaN. Ignored rows keep nothing and lose nothing, unless their shares are NaN: then
    they are computed, as without a filter. A target outside the vocabulary has no tile of its own.
    """
    live = (target != IGNORE_INDEX).unsqueeze(1)
    own = (target // TILE_COLUMNS).clamp(0, shares.shape[1] - 1).unsqueeze(1)
    shares = shares.scatter(1, own, torch.where(live, torch.inf, shares.gather(1, own)))
    ascending, order = shares.sort(dim=1)
    skip = ascending.double().cumsum(1) * MARGIN <= mass
    dropped = torch.where(skip & live, ascending, 0.0).sum(1)
    keep = torch.ones_like(skip).scatter_(1, order, ~skip)
    return keep & (live | shares.isnan()), dropped


def backward(
    head: Head, grad: Tensor, saved: Tensor, stats: Tensor, keep: Tensor, need: list[bool], compiled: bool
) -> tuple[Tensor | None, ...]:
    """(dhidden, dweight, dbias), None where `need` does not ask, from the tiles in `keep`; for `grad` [N], 0 where
    rows are ignored."""
    head = _contiguous(head)
    x, w, acc = head.hidden, head.weight, acc_dtype(head.hidden.dtype)
    dhidden = x.new_zeros(x.shape, dtype=acc) if need[0] else None
    # Not in huge pages: written a narrow slice at a time, they cost up to 150 ms of 470 (V 32000, D 512, two cores).
    dweight = w.new_empty(w.shape) if need[1] else None
    dbias = w.new_empty(len(w)) if need[2] else None
    # The compiled pass writes c U, the plain one U.
    factor = grad * (-head.logit_scale / stats[1])
    state = torch.stack([stats[0], stats[2], factor] if compiled else [*stats, grad])
    right = x if compiled or not need[1] else (x * grad.unsqueeze(1)).to(x.dtype)
    # The rows of every tile, tile after tile; here alone the host waits for a device, for the lengths and in nonzero.
    lists = keep.t().nonzero()[:, 1].split(keep.sum(0).tolist())
    step = backends.CPU_TILE_ROWS if x.device.type == "cpu" else backends.DEVICE_TILE_ROWS
    for v, rows in zip(_tile_slices(slice(0, len(w))), lists):
        dw = db = None
        for part in rows.split(step):
            whole = len(part) == len(x)
            index = slice(None) if whole else part
            raw = saved[:, v].index_select(0, part) if saved.numel() else torch.mm(x[index], w[v].t())
            numbers = state if whole else state.index_select(1, part)
            block = head._replace(target=head.target[index])
            if compiled:
                u = raw
                shift, others = numbers[:2]
                _cpu_pass(block, u, (shift, others, shift, others), v, factor=numbers[2])
            else:
                u = backends._torch_tile_grad(block, raw, numbers[:3], v)
            if dhidden is not None and whole:
                _add_mm(dhidden, u, w[v])
            elif dhidden is not None:
                dhidden.index_add_(0, part, _mm_wide(u, w[v], acc))
            if dweight is not None and len(rows) <= step:
                torch.mm(u.t(), right[index], out=dweight[v])
            elif dweight is not None:
                dw = torch.zeros_like(w[v], dtype=acc) if dw is None else dw
                _add_mm(dw, u.t(), right[index])
            if dbias is not None:
                of_part = u.sum(0, dtype=acc) if compiled else backends._weighted_sum(u, numbers[3])
                db = of_part if db is None else db + of_part
        if dweight is not None and dw is not None:
            dweight[v] = dw
        if dbias is not None and db is not None:
            dbias[v] = db
    if dhidden is not None:
        dhidden = (dhidden if compiled else dhidden.mul_(grad.unsqueeze(1))).to(x.dtype)
    return dhidden, dweight, dbias


@torch.library.custom_op("fastpo::filtered_logprob", mutates_args=())
def filtered_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    backend: str,
    mass: float,
    keep_logits: bool,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp [N], entropy and top1 [N] or [0], dropped [N], logits [N, V] or [0], stats [3, N], keep [N, T])."""
    head = Head(hidden, weight, target, bias, softcap, logit_scale)
    parts.check_targets(target, weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        return forward(head, mass, keep_logits, entropy, compiled=backend == "cpu")[:]


@filtered_logprob.register_fake
def _(hidden, weight, target, bias, softcap, logit_scale, backend, mass, keep_logits, entropy):
    n, v_size, acc = hidden.shape[0], weight.shape[0], acc_dtype(hidden.dtype)
    logp, dropped, stats = (hidden.new_empty(shape, dtype=acc) for shape in ((n,), (n,), (3, n)))
    saved = hidden.new_empty((n, v_size) if keep_logits else 0)
    keep = hidden.new_empty(n, tile_count(v_size), dtype=torch.bool)
    entropies, top1 = (hidden.new_empty(n if entropy else 0, dtype=acc) for _ in range(2))
    return logp, entropies, top1, dropped, saved, stats, keep


@torch.library.custom_op("fastpo::filtered_logprob_backward", mutates_args=())
def _filtered_logprob_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    saved: Tensor,
    stats: Tensor,
    keep: Tensor,
    softcap: float | None,
    logit_scale: float,
    backend: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden [N, D], dweight [V, D], dbias [V]), each [0] where `need` does not ask."""
    head = Head(hidden, weight, target, bias, softcap, logit_scale)
    grad = parts.live(grad, target)
    with torch.autocast(grad.device.type, enabled=False):
        grads = backward(head, grad, saved, stats, keep, need, compiled=backend == "cpu")
    return parts.as_outputs(hidden, grads)


@_filtered_logprob_backward.register_fake
def _(grad, hidden, weight, target, bias, saved, stats, keep, softcap, logit_scale, backend, need):
    return parts.fake_gradients(hidden, weight, need)


_filtered_logprob_backward.register_autograd(parts.once_only)


def _setup(ctx, inputs, output) -> None:
    hidden, weight, target, bias, *options, _, _, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.options = options
    ctx.save_for_backward(hidden, weight, target, bias, *output[4:])


def _backward(ctx, grad, *_):
    return parts.gradients(ctx, _filtered_logprob_backward, grad, (0, 1, 3))


filtered_logprob.register_autograd(_backward, setup_context=_setup)
parts.reverse_mode_only(filtered_logprob, _filtered_logprob_backward)
