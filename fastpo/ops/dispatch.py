"""`linear_logprob` and `linear_logprob_entropy` as programs call them: of plain tensors by ops/head.py and
ops/entropy.py, of DTensors or a vocabulary that is split over processes by ops/vocab_parallel.py and
ops/vocab_entropy.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastpo.ops import entropy, head


def linear_logprob(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N] int
    bias: Tensor | None = None,  # [V]
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    return_top1: bool = False,
    memory_budget: int | None = None,
    backend: str = "auto",
    grad_filter: float = 0.0,
    return_dropped: bool = False,
    vocab_parallel: Any = None,
) -> Tensor | tuple[Tensor, ...]:
    """log_softmax(softcap(logit_scale * (hidden W^T + b)))[target] -> logp [N], or (logp, entropy [N]), fp32 or fp64.

    Differentiable once in hidden, weight and bias; the entropy is detached, `linear_logprob_entropy` gives one with a
    gradient; rows with target -100 give 0. One N x V matrix in the input dtype is kept for the backward where it fits
    `memory_budget` bytes (default: `default_memory_budget`); over that, and with 0, the backward recomputes it a
    vocabulary slice at a time.

    return_top1 adds an output after the entropy, from the same pass: 1 where no logit is above the target's, else 0
    [N], detached; ties are 1, rows with target -100 or a NaN are 0.

    grad_filter, in [0, 1): the backward leaves out each row's least likely tiles of the vocabulary, never its target's,
    that hold at most this much of the row's probability; the error that this allows is in ops/grad_filter.py. A matrix
    N x V is then kept by `memory_budget` with a frozen head too; on a GPU it runs plain PyTorch operations and the
    backward waits for the device twice. 0.0 is the exact gradient. return_dropped adds an output, the last: the mass
    left out [N], detached, 0 where no gradient is asked for.

    Targets outside the vocabulary: OpError on a CPU, and on a GPU with FASTPO_CHECK_INPUTS=1; else NaN. DTensors, and
    `vocab_parallel` (the group, mesh or VocabParallel over which the vocabulary is split): docs/vocab-parallel.md.
    """
    options: dict[str, Any] = {
        "softcap": softcap, "logit_scale": logit_scale, "return_entropy": return_entropy,
        "memory_budget": memory_budget, "backend": backend, "grad_filter": grad_filter,
        "return_top1": return_top1, "return_dropped": return_dropped,
    }  # fmt: skip
    if vocab_parallel is not None or _any_dtensor(hidden, weight, target, bias):
        from fastpo.ops import vocab_parallel as several  # torch.distributed.tensor takes a while

        hidden, weight, target, bias, split = several.local_tensors(hidden, weight, target, bias, vocab_parallel)
        if split is not None:
            return several.linear_logprob(hidden, weight, target, bias, split, **options)
    return head.linear_logprob(hidden, weight, target, bias, **options)


def linear_logprob_entropy(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N] int
    bias: Tensor | None = None,  # [V]
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_top1: bool = False,
    memory_budget: int | None = None,
    backend: str = "auto",
    vocab_parallel: Any = None,
) -> tuple[Tensor, ...]:
    """(logp [N] as of `linear_logprob`, entropy [N] of each row's distribution), fp32 or fp64, without the logits.

    Both are differentiable once in hidden, weight and bias, the entropy by dH/dz_v = -p_v (log p_v + H); rows with
    target -100 are 0 in both and get no gradient. The logits [N, V] are kept in the input dtype for the backward where
    they fit `memory_budget` bytes (default: `default_memory_budget`), with a frozen head too; over that, and with 0,
    they are formed again a vocabulary slice at a time. return_top1 adds what it adds to `linear_logprob`, detached.

    Targets outside the vocabulary, DTensors and `vocab_parallel` as in `linear_logprob`. OpError for shapes, dtypes or
    devices that do not fit.
    """
    options: dict[str, Any] = {
        "softcap": softcap, "logit_scale": logit_scale, "return_top1": return_top1, "memory_budget": memory_budget,
        "backend": backend,
    }  # fmt: skip
    if vocab_parallel is not None or _any_dtensor(hidden, weight, target, bias):
        from fastpo.ops import vocab_entropy
        from fastpo.ops import vocab_parallel as several

        hidden, weight, target, bias, split = several.local_tensors(hidden, weight, target, bias, vocab_parallel)
        if split is not None:
            return vocab_entropy.linear_logprob_entropy(hidden, weight, target, bias, split, **options)
    return entropy.linear_logprob_entropy(hidden, weight, target, bias, **options)


def _any_dtensor(*tensors: Tensor | None) -> bool:
    return any(hasattr(t, "device_mesh") for t in tensors)
