"""The head op over several processes: a vocabulary split over ranks (tensor parallel), and weights that are DTensors.

N = head rows, D = hidden, V = vocabulary, V_r = the rows of it that rank r holds, R = ranks. Every rank has the same
hidden [N, D] and target [N], and its own weight [V_r, D] and bias [V_r].

Forward: each rank runs its backend (ops/backends.py) over its slice; one all-gather of four numbers a row (shift, sum,
log-probability of the target within the slice, entropy) gives every rank the same logp [N], bit for bit. With w the
share of a row's probability that the slice holds, logp = (log-probability within the slice) + log w. Backward: dweight
and dbias of the slice need nobody else; dhidden is summed over the ranks once, in the accumulation dtype.

A DTensor without `vocab_parallel` is sharded storage (FSDP2): gathered once, its gradient reduced once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from fastpo.ops import backends, parts
from fastpo.ops.backends import ELSEWHERE, IGNORE_INDEX, Head, acc_dtype
from fastpo.ops.inputs import autocast, check_inputs, check_softcap, regime_of
from fastpo.ops.parts import OpError


class VocabParallel(NamedTuple):
    """How the vocabulary is split over a process group; `VocabParallel.of_slice` makes one from each rank's slice."""

    group_name: str
    rank: int  # in the group
    starts: tuple[int, ...]  # of every rank, in the order of the group
    stops: tuple[int, ...]

    @classmethod
    def of_slice(cls, group: dist.ProcessGroup | DeviceMesh, start: int, stop: int) -> VocabParallel:
        """This rank holds the rows start .. stop - 1 of the vocabulary, perhaps none. Every rank of `group` calls it.

        Once, not per step: it asks every rank for its slice, and raises OpError on all of them if the slices overlap or
        leave a gap.
        """
        process_group = _process_group(group)
        slices: list[Any] = [None] * process_group.size()
        dist.all_gather_object(slices, (int(start), int(stop)), group=process_group)
        end = 0
        for first, last in sorted(slices):
            if first < 0 or last < first or (first != last and first != end):
                raise OpError(
                    f"the slices {slices} of the ranks do not tile a vocabulary: start and stop must cover it from 0, "
                    "each row once"
                )
            end = max(end, last)
        if end == 0:
            raise OpError(f"the slices {slices} of the ranks are all empty: the vocabulary is empty")
        starts, stops = zip(*slices)
        return cls(process_group.group_name, process_group.rank(), starts, stops)

    @property
    def start(self) -> int:
        return self.starts[self.rank]

    @property
    def stop(self) -> int:
        return self.stops[self.rank]

    @property
    def vocabulary(self) -> int:
        return max(self.stops)


def local_tensors(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    vocab_parallel: VocabParallel | DeviceMesh | dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, VocabParallel | None]:
    """Plain tensors of this rank, and how the vocabulary is split: None where weight and bias are whole, those of
    sharded storage gathered."""
    hidden, target = _whole(hidden, "hidden"), _whole(target, "target")
    weight, bias, split = _unshard(weight, bias, vocab_parallel)
    return hidden, weight, target, bias, split


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    split: VocabParallel,
    *,
    softcap: float | None,
    logit_scale: float,
    return_entropy: bool,
    memory_budget: int | None,
    backend: str,
    **rest: Any,
) -> Tensor | tuple[Tensor, ...]:
    """`fastpo.ops.linear_logprob` of what `local_tensors` gives where the vocabulary is split; called by it."""
    if any(rest.values()):
        asked = ", ".join(name for name, value in rest.items() if value)
        raise OpError(f"{asked} is not built for vocab_parallel; leave it out")
    hidden, weight, bias, backend = settled(hidden, weight, target, bias, split, softcap, memory_budget, backend)
    regime = regime_of(hidden, weight, bias, memory_budget)
    logp, entropy, _, _ = _vocab_parallel_logprob(
        hidden, weight, target.long(), bias, softcap, logit_scale, regime, backend, return_entropy,
        split.group_name, split.rank, list(split.starts), list(split.stops),
    )  # fmt: skip
    return (logp, entropy) if return_entropy else logp


def settled(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    split: VocabParallel,
    softcap: float | None,
    memory_budget: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor | None, str]:
    """(hidden, weight, bias in the dtype to compute in, backend); OpError for what an op over a split cannot take."""
    hidden, weight, bias = autocast(hidden, weight, bias)
    check_softcap(softcap)
    rows = split.stop - split.start
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape[:1] != (rows,):
            where = f"{split.start} to {split.stop} of the vocabulary"
            raise OpError(f"{name} {list(tensor.shape)} must have the {rows} rows of this rank's slice, {where}")
    # A slice may be empty, which a vocabulary may not: then one row is checked in its place.
    checked = [t if rows or t is None else t.new_empty(1, *t.shape[1:]) for t in (weight, bias)]
    backend = check_inputs(hidden, checked[0], target, checked[1], memory_budget, backend)
    if parts.CHECK_INPUTS and not torch.compiler.is_compiling():
        _check_replicated(hidden, target, split)
    return hidden, weight, bias, backend


def _process_group(group: dist.ProcessGroup | DeviceMesh) -> dist.ProcessGroup:
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names = group.mesh_dim_names or ""
            raise OpError(f"vocab_parallel is a mesh of {group.ndim} dimensions {names}: pass one, as mesh['tp']")
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup) or group.rank() < 0:
        raise OpError(f"vocab_parallel must be a group or a mesh that this rank is in, not {group!r}")
    return group


def _whole(tensor: Tensor, name: str) -> Tensor:
    """This rank's copy of a tensor that all ranks have."""
    if not isinstance(tensor, DTensor):
        return tensor
    if not all(p.is_replicate() for p in tensor.placements):
        raise OpError(
            f"{name} has the placements {tensor.placements}: redistribute it to Replicate(), or pass the rows of this "
            f"rank, {name}.to_local(), where ranks have rows of their own"
        )
    return tensor.to_local()


def _unshard(weight: Any, bias: Any, vocab_parallel: Any) -> tuple[Tensor, Tensor | None, VocabParallel | None]:
    """Plain weight and bias, whole or this rank's slice of the vocabulary, and how that is split."""
    given = [t for t in (weight, bias) if t is not None]
    sharded = [isinstance(t, DTensor) for t in given]
    if any(sharded) != all(sharded):
        raise OpError("weight and bias must both be DTensors, or neither")
    if not any(sharded):
        if vocab_parallel is not None and not isinstance(vocab_parallel, VocabParallel):
            raise OpError(
                "a plain weight does not say which slice of the vocabulary it is: "
                "vocab_parallel=fastpo.VocabParallel.of_slice(group, start, stop)"
            )
        return weight, bias, vocab_parallel
    if isinstance(vocab_parallel, VocabParallel):
        raise OpError("a DTensor weight knows its slice of the vocabulary: pass its mesh as vocab_parallel")
    mesh = weight.device_mesh
    if any(t.device_mesh != mesh or t.placements != weight.placements for t in given):
        raise OpError(f"weight and bias are placed differently: {[t.placements for t in given]}")
    kept = None if vocab_parallel is None else _mesh_dim(weight, _process_group(vocab_parallel))
    # Storage: gathered in one collective, and the gradient averaged over the ranks, as FSDP2 does with its own.
    placements = [Shard(0) if i == kept else Replicate() for i in range(mesh.ndim)]
    grads = [Shard(0) if i == kept else Partial("avg") for i in range(mesh.ndim)]
    # Autocast's dtype travels in the gather; gradients are reduced in the parameter's.
    dtypes = [autocast(t.to_local().detach())[0].dtype for t in given]
    weight, *rest = (
        t.redistribute(placements=placements, forward_dtype=dtype).to_local(grad_placements=grads)
        for t, dtype in zip(given, dtypes)
    )
    split = None
    if kept is not None:
        step = -(-given[0].shape[0] // mesh.size(kept))  # as torch.chunk does
        bounds = [min(r * step, given[0].shape[0]) for r in range(mesh.size(kept) + 1)]
        name = mesh.get_group(kept).group_name
        split = VocabParallel(name, mesh.get_local_rank(kept), tuple(bounds[:-1]), tuple(bounds[1:]))
    return weight, rest[0] if rest else None, split


def _mesh_dim(weight: DTensor, group: dist.ProcessGroup) -> int:
    """The dimension of the weight's mesh whose processes are `group`, along which the vocabulary is split."""
    mesh = weight.device_mesh
    names = [mesh.get_group(i).group_name for i in range(mesh.ndim)]
    if group.group_name not in names:
        raise OpError(
            f"vocab_parallel is a group of {group.size()} ranks that is no dimension of the weight's mesh {mesh}"
        )
    kept = names.index(group.group_name)
    if not weight.placements[kept].is_shard(0):
        raise OpError(
            f"vocab_parallel needs a weight [V, D] that is Shard(0) over the group, not {weight.placements[kept]}: "
            "ColwiseParallel() makes one; leave vocab_parallel out to gather it"
        )
    return kept


def _check_replicated(hidden: Tensor, target: Tensor, split: VocabParallel) -> None:
    """All ranks have the same rows: on request, for it costs two collectives and a synchronisation."""
    group = _group(split.group_name)
    shapes: list[Any] = [None] * group.size()
    dist.all_gather_object(shapes, (tuple(hidden.shape), str(hidden.dtype)), group=group)
    if any(shape != shapes[0] for shape in shapes):
        raise OpError(f"vocab_parallel: hidden must be the same on every rank of the group, and is {shapes}")
    wide = hidden.detach().double()
    mine = torch.stack([wide.sum(1), wide.abs().sum(1), target.double()])  # [3, N]
    sums, sizes, targets = _gather(mine, group).unbind(1)
    bad = (sums - sums[0]).abs() > torch.finfo(hidden.dtype).eps * sizes[0]
    for name, differ in (("hidden", bad.any(0)), ("target", (targets != targets[0]).any(0))):
        if differ.any():
            row = int(differ.nonzero()[0])
            raise OpError(f"vocab_parallel: {name}[{row}] differs between the ranks of the group; replicate it")


def _group(name: Any) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)


def _gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`tensor` of every rank -> [R, ...]."""
    out = tensor.new_empty(group.size(), *tensor.shape)
    dist.all_gather(list(out.unbind()), tensor.contiguous(), group=group)
    return out


class Rows(NamedTuple):
    """What the slices of all ranks make of a row, each [N] in the accumulation dtype, the same on every rank but `rest`
    and `share`."""

    logp: Tensor
    entropy: Tensor
    shift: Tensor  # sum exp(z) = total * exp(shift)
    total: Tensor
    share: Tensor  # of the probability, in this rank's slice
    rest: Tensor  # 1 - share, exact where that is small


def _merge(gathered: Tensor, rank: int, live: Tensor) -> Rows:
    """From shift, total, logp within the slice (inf where the target is not) and entropy of each rank [R, 4, N]."""
    shifts, totals, logps, entropies = gathered.unbind(1)  # [R, N]
    owner = logps != torch.inf
    nothing = (totals == 0) | (shifts == -torch.inf)  # a slice without columns, or of masked logits only
    logps, entropies = logps.masked_fill(nothing, -torch.inf), entropies.masked_fill(nothing, 0.0)
    shift = shifts.amax(0)
    logs = (shifts - shift) + totals.log()  # of each slice's part of the sum
    total = ((shifts - shift).exp() * totals).sum(0)
    mine = torch.zeros_like(owner)
    mine[rank] = True

    def rest_to_part(part: Tensor) -> Tensor:
        """log of the other slices' sum over this one's, which `part` [R, N] marks: a small 1 - p keeps its digits."""
        others = logs.masked_fill(part, -torch.inf).logsumexp(0)
        return others - logs.where(part, -torch.inf).amax(0)

    # A target outside the vocabulary has no owner: NaN, never a plausible number.
    picked = logps.where(owner, 0.0).sum(0).where(owner.any(0), torch.nan)
    gap = rest_to_part(owner)
    logp = (picked - torch.logaddexp(gap, torch.zeros_like(gap))).where(live, 0.0)
    gap = rest_to_part(mine)
    shares = (logs - total.log()).exp()
    entropy = (shares * entropies + torch.special.entr(shares)).sum(0)
    return Rows(logp, entropy, shift, total, (-gap).sigmoid(), gap.sigmoid())


def whole_rows(
    head: Head, regime: str, backend: str, entropy: bool, group_name: str, rank: int
) -> tuple[Rows | None, Tensor | None]:
    """(what the slices of all ranks make of the rows, None where there are none; what this rank's backend saved of its
    own, None where it has nothing). `head`: of the slice, with its own columns as targets."""
    n, v_size, acc = head.hidden.shape[0], head.weight.shape[0], acc_dtype(head.hidden.dtype)
    if n == 0:
        return None, None
    mine = head.hidden.new_zeros(4, n, dtype=acc)  # shift, total, logp, entropy
    mine[0], mine[2] = -torch.inf, torch.inf
    saved = None
    if v_size:
        kept = backends.FORWARD[backend](head, regime, entropy)
        saved = kept.saved
        mine[0], mine[1] = kept.shift, kept.total
        mine[2] = kept.logp.where(head.target >= 0, torch.inf)
        if entropy:
            mine[3] = kept.entropy
    return _merge(_gather(mine, _group(group_name)), rank, head.target != IGNORE_INDEX), saved


@torch.library.custom_op("fastpo::vocab_parallel_logprob", mutates_args=())
def _vocab_parallel_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    regime: str,
    backend: str,
    entropy: bool,
    group_name: str,
    rank: int,
    starts: list[int],
    stops: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `head._linear_logprob`, for this rank's slice; what it saves gives the gradients of whole rows."""
    parts.check_targets(target, max(stops))
    head = Head(hidden, weight, _local(target, starts[rank], weight.shape[0]), bias, softcap, logit_scale)
    with torch.autocast(hidden.device.type, enabled=False):
        rows, kept = whole_rows(head, "logits" if regime == "kept" else regime, backend, entropy, group_name, rank)
        if rows is None or kept is None:
            saved, stats = _nothing_saved(head, regime, backend)
        else:
            saved, stats = kept, _finish(head, rows, kept, regime, backend)
    if rows is None:
        logp, of_rows = (hidden.new_empty(0, dtype=acc_dtype(hidden.dtype)) for _ in range(2))
        return logp, of_rows, saved, stats
    return rows.logp, rows.entropy if entropy else rows.logp.new_empty(0), saved, stats


def _local(target: Tensor, start: int, v_size: int) -> Tensor:
    """Targets in a slice's own columns; ELSEWHERE for live rows whose target is not in it."""
    column = target - start
    here = (column >= 0) & (column < v_size)
    return column.where(here, torch.where(target == IGNORE_INDEX, IGNORE_INDEX, ELSEWHERE))


def _saved_stats(regime: str, backend: str) -> int:
    """Rows of the statistics that the backward needs: the matrix that is kept carries its own."""
    return backends.stats_rows(regime, backend) if regime == "sliced" else 0


def _nothing_saved(head: Head, regime: str, backend: str) -> tuple[Tensor, Tensor]:
    """(saved, stats) of a slice without rows of the vocabulary."""
    n, acc = head.hidden.shape[0], acc_dtype(head.hidden.dtype)
    saved = {
        "frozen": lambda: torch.zeros_like(head.hidden, dtype=acc, memory_format=torch.contiguous_format),
        "kept": lambda: head.hidden.new_zeros(n, backends.saved_columns(head.weight.shape[0], backend)),
    }.get(regime, lambda: head.hidden.new_empty(0, dtype=acc))()
    return saved, head.hidden.new_zeros(_saved_stats(regime, backend), n, dtype=acc)


def _finish(head: Head, rows: Rows, saved: Tensor, regime: str, backend: str) -> Tensor:
    """Turns what a slice kept into its part of whole rows, in place; the statistics for the backward."""
    live = head.target != IGNORE_INDEX
    others = -torch.expm1(rows.logp) * rows.total
    stats = torch.stack([rows.shift, rows.total, others])
    lse = rows.shift + rows.total.log()
    if regime == "sliced":
        return torch.stack([rows.shift, rows.total, rows.logp]) if backend == "triton" else stats
    if regime == "frozen":
        # U = share * (U within the slice) + rest * dz/draw in the column of a target that is here: no term cancels.
        saved.mul_(rows.share.unsqueeze(1))
        saved.masked_fill_((rows.share == 0).unsqueeze(1), 0.0)  # a slice of nothing but masked logits has NaN
        here = head.target >= 0
        slope = backends._target_slope(head, rows.logp + lse, live)
        factor = (rows.rest * slope).where(here, 0.0).unsqueeze(1)
        saved += head.weight[head.target.where(here, 0)].to(saved.dtype).mul_(factor)
    elif regime == "kept":
        _logits_to_grad(head, saved, stats, rows.logp, backend)
    return stats[:0].clone()


def _logits_to_grad(head: Head, saved: Tensor, stats: Tensor, logp: Tensor, backend: str) -> None:
    """Raw logits [N, V_r] -> U, in place, of rows whose statistics are known."""
    n, v_size = len(head.target), len(head.weight)
    if backend == "triton":
        from fastpo.kernels import logprob as kernels

        head = backends._contiguous(head)
        rule = {"softcap": head.softcap, "logit_scale": head.logit_scale}
        kernels.logprob_slice_grad(
            saved[:, :v_size], head.target, stats[:2], head.bias, col_offset=0, logp=logp, **rule
        )
    elif backend == "cpu":
        m, total, others = stats
        rows = torch.stack([m, others, m, others])
        backends._cpu_pass(backends._contiguous(head), saved, rows, slice(0, v_size),
                           factor=-head.logit_scale / total)  # fmt: skip
    else:
        for r, columns in backends._tiles(n, v_size, saved.device, 4 * stats.itemsize):
            block = head._replace(target=head.target[r])
            for v in columns:
                saved[r, v] = backends._torch_tile_grad(block, saved[r, v], stats[:, r], v)


@_vocab_parallel_logprob.register_fake
def _(hidden, weight, target, bias, softcap, logit_scale, regime, backend, entropy, *_):
    n, acc = hidden.shape[0], acc_dtype(hidden.dtype)
    saved, stats = _nothing_saved(Head(hidden, weight, target, bias, softcap, logit_scale), regime, backend)
    return hidden.new_empty(n, dtype=acc), hidden.new_empty(n if entropy else 0, dtype=acc), saved, stats


@torch.library.custom_op("fastpo::vocab_parallel_backward", mutates_args=())
def _vocab_parallel_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    saved: Tensor,
    stats: Tensor,
    softcap: float | None,
    logit_scale: float,
    regime: str,
    backend: str,
    group_name: str,
    start: int,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden [N, D], dweight [V_r, D], dbias [V_r]), each [0] where `need` does not ask."""
    head = Head(hidden, weight, _local(target, start, weight.shape[0]), bias, softcap, logit_scale)
    grad = parts.live(grad, target)
    grads: list[Tensor | None] = [None, None, None]
    with torch.autocast(grad.device.type, enabled=False):
        if hidden.shape[0] == 0 or weight.shape[0] == 0:
            shapes = (hidden.shape, weight.shape, weight.shape[:1])
            grads = [grad.new_zeros(shape) if asked else None for shape, asked in zip(shapes, need)]
        elif regime == "frozen":
            grads[0] = saved * grad.unsqueeze(1)
        elif regime == "kept":
            grads = list(backends.kept_backward(head, grad, saved, stats, need))
        else:
            grads = list(backends.SLICED_BACKWARD[backend](head, grad, stats, need))
    if need[0] and hidden.shape[0]:
        grads[0] = grads[0].contiguous()
        dist.all_reduce(grads[0], group=_group(group_name))
    return parts.as_outputs(hidden, grads)


@_vocab_parallel_backward.register_fake
def _(grad, hidden, weight, *rest):
    return parts.fake_gradients(hidden, weight, rest[-1])


def _setup(ctx, inputs, output) -> None:
    hidden, weight, target, bias, softcap, logit_scale, regime, backend, _, group_name, rank, starts, _ = inputs
    _, entropy, saved, stats = output
    ctx.mark_non_differentiable(entropy, saved, stats)
    ctx.set_materialize_grads(False)
    ctx.options = (softcap, logit_scale, regime, backend, group_name, starts[rank])
    ctx.save_for_backward(hidden, weight, target, bias, saved, stats)


def _backward(ctx, grad, *_):
    return parts.gradients(ctx, _vocab_parallel_backward, grad, (0, 1, 3))


_vocab_parallel_logprob.register_autograd(_backward, setup_context=_setup)
_vocab_parallel_backward.register_autograd(parts.once_only)
parts.reverse_mode_only(_vocab_parallel_logprob, _vocab_parallel_backward)
