"""`linear_logprob_entropy` over a vocabulary that is split over processes; ops/vocab_parallel.py has `linear_logprob`.

N = head rows, D = hidden, V_r = the rows of the vocabulary that rank r holds. Forward: one all-gather of four numbers a
row gives every rank the statistics of whole rows, the entropy among them. Backward: every rank forms the gradients of
its slice from these (ops/entropy.py); dhidden is summed over the ranks once, in the accumulation dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastpo.ops import entropy, parts
from fastpo.ops.backends import IGNORE_INDEX, Head, acc_dtype
from fastpo.ops.parts import OpError
from fastpo.ops.vocab_parallel import VocabParallel, _group, _local, settled, whole_rows


def linear_logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    split: VocabParallel,
    *,
    softcap: float | None,
    logit_scale: float,
    return_top1: bool,
    memory_budget: int | None,
    backend: str,
) -> tuple[Tensor, ...]:
    """`fastpo.ops.linear_logprob_entropy` of what `local_tensors` gives where the vocabulary is split."""
    if return_top1:
        raise OpError("return_top1 is not built for vocab_parallel; leave it out")
    hidden, weight, bias, backend = settled(hidden, weight, target, bias, split, softcap, memory_budget, backend)
    regime = entropy.entropy_regime(hidden, weight, bias, memory_budget)
    logp, of_rows, _, _ = _vocab_parallel_entropy(
        hidden, weight, target.long(), bias, softcap, logit_scale, regime, backend, split.group_name, split.rank,
        list(split.starts), list(split.stops),
    )  # fmt: skip
    return logp, of_rows


@torch.library.custom_op("fastpo::vocab_parallel_entropy", mutates_args=())
def _vocab_parallel_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    regime: str,
    backend: str,
    group_name: str,
    rank: int,
    starts: list[int],
    stops: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp [N], entropy [N], this rank's logits [N, V_r] or [0], stats [4, N] of whole rows)."""
    parts.check_targets(target, max(stops))
    head = Head(hidden, weight, _local(target, starts[rank], weight.shape[0]), bias, softcap, logit_scale)
    with torch.autocast(hidden.device.type, enabled=False):
        rows, kept = whole_rows(head, "logits" if regime == "kept" else "none", backend, True, group_name, rank)
    saved = entropy.empty_saved(hidden, weight, regime, backend) if kept is None else kept
    if rows is None:
        logp, of_rows = (hidden.new_empty(0, dtype=acc_dtype(hidden.dtype)) for _ in range(2))
        return logp, of_rows, saved, logp.new_empty(4, 0)
    stats = torch.stack([rows.shift, rows.total, rows.logp, rows.entropy])
    return rows.logp, rows.entropy.where(target != IGNORE_INDEX, 0.0), saved, stats


@_vocab_parallel_entropy.register_fake
def _(hidden, weight, target, bias, softcap, logit_scale, regime, backend, *_):
    n, acc = hidden.shape[0], acc_dtype(hidden.dtype)
    logp, of_rows = (hidden.new_empty(n, dtype=acc) for _ in range(2))
    return logp, of_rows, entropy.empty_saved(hidden, weight, regime, backend), hidden.new_empty(4, n, dtype=acc)


@torch.library.custom_op("fastpo::vocab_parallel_entropy_backward", mutates_args=())
def _vocab_parallel_entropy_backward(
    grad: Tensor | None,
    entropy_grad: Tensor | None,
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
    with torch.autocast(hidden.device.type, enabled=False):
        kept = saved if regime == "kept" else None
        grads = entropy.gradients(head, grad, entropy_grad, kept, stats, need, backend)
    if grads[0] is not None and hidden.shape[0]:
        dist.all_reduce(grads[0], group=_group(group_name))
    return parts.as_outputs(hidden, grads)


@_vocab_parallel_entropy_backward.register_fake
def _(grad, entropy_grad, hidden, weight, *rest):
    return parts.fake_gradients(hidden, weight, rest[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target, bias, softcap, logit_scale, regime, backend, group_name, rank, starts, _ = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.options = (softcap, logit_scale, regime, backend, group_name, starts[rank])
    ctx.save_for_backward(hidden, weight, target, bias, *output[2:])


_vocab_parallel_entropy.register_autograd(entropy.backward_by(_vocab_parallel_entropy_backward), setup_context=_setup)
_vocab_parallel_entropy_backward.register_autograd(parts.once_only)
parts.reverse_mode_only(_vocab_parallel_entropy, _vocab_parallel_entropy_backward)
