"""The public ops: fused linear log-probabilities and the preference loss over them.

N = head rows (completion tokens), D = hidden, V = vocabulary, S = responses, P = pairs. 16-bit inputs: GEMMs in the
input dtype, row arithmetic and results in fp32. Definitions: `kernels/reference.py`; cost regimes: `backends.py`. All
are `torch.library` ops, so they compile without a graph break.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpo import backends, chips, vocab_ops
from fastpo import grad_filter as filters
from fastpo.backends import IGNORE_INDEX, Head, acc_dtype
from fastpo.errors import FastpoError
from fastpo.kernels import reference

GIB = 1 << 30
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NATIVE_DTYPES = {"triton": DTYPES[:3], "cpu": DTYPES[:2], "torch": DTYPES}
HAS_TRITON = importlib.util.find_spec("triton") is not None
# On a GPU the ops do not look at their inputs' values, which would wait for it; on request they do.
CHECK_INPUTS = os.environ.get("FASTPO_CHECK_INPUTS", "0") not in ("", "0")
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # Triton kernels on CPU tensors, for tests


class OpError(FastpoError):
    """A tensor or an option that an op cannot take."""


def available_backends() -> list[str]:
    """Backends that run on this machine: `triton` on GPUs, `cpu` (compiled, fp32 and bf16), `torch` anywhere."""
    triton = HAS_TRITON and (torch.cuda.is_available() or INTERPRETED)
    found = {"triton": triton, "cpu": backends._C is not None, "torch": True}
    return [name for name in found if found[name]]


def default_memory_budget(weight: Tensor) -> int:
    """Bytes the N x V matrix may take: the larger of 1 GiB and an fp32 gradient of `weight` [V, D]."""
    return max(GIB, 4 * weight.shape[0] * weight.shape[1])


def linear_logprob(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N] int
    bias: Tensor | None = None,  # [V]
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    memory_budget: int | None = None,
    backend: str = "auto",
    grad_filter: float = 0.0,
    return_dropped: bool = False,
    vocab_parallel: Any = None,
) -> Tensor | tuple[Tensor, ...]:
    """log_softmax(softcap(logit_scale * (hidden W^T + b)))[target] -> logp [N], or (logp, entropy [N]), fp32 or fp64.

    Differentiable once in hidden, weight and bias; the entropy is detached; rows with target -100 give 0. One N x V
    matrix in the input dtype is kept for the backward where it fits `memory_budget` bytes (default:
    `default_memory_budget`); over that, and with 0, the backward recomputes it a vocabulary slice at a time.

    grad_filter, in [0, 1): the backward leaves out each row's least likely tiles of the vocabulary, never its target's,
    that hold at most this much of the row's probability; the error that this allows is in grad_filter.py. A matrix
    N x V is then kept by `memory_budget` with a frozen head too; on a GPU it runs plain PyTorch operations and the
    backward waits for the device once. 0.0 is the exact gradient. return_dropped adds an output, the last: the mass
    left out [N], detached, 0 where no gradient is asked for.

    Targets outside the vocabulary: OpError on a CPU, and on a GPU with FASTPO_CHECK_INPUTS=1; else NaN. DTensors, and
    `vocab_parallel` (the group, mesh or VocabParallel over which the vocabulary is split): docs/vocab-parallel.md.
    """
    if vocab_parallel is not None or any(hasattr(t, "device_mesh") for t in (hidden, weight, target, bias)):
        from fastpo import vocab_parallel as several

        if grad_filter or return_dropped:
            raise OpError("grad_filter is not there for DTensors and vocabularies split over processes; leave it out")
        return several.linear_logprob(
            hidden, weight, target, bias, vocab_parallel, softcap=softcap, logit_scale=logit_scale,
            return_entropy=return_entropy, memory_budget=memory_budget, backend=backend,
        )  # fmt: skip
    hidden, weight, bias = _autocast(hidden, weight, bias)
    _check_softcap(softcap)
    backend = _check(hidden, weight, target, bias, memory_budget, backend)
    if not 0 <= grad_filter < 1:
        raise OpError(f"grad_filter must be in [0, 1), a share of each row's probability, not {grad_filter}")
    regime = _regime(hidden, weight, bias, memory_budget)
    if grad_filter and regime != "none":
        logp, entropy, dropped, _, _, _ = _filtered_logprob(
            hidden, weight, target.long(), bias, softcap, logit_scale, backend, grad_filter,
            _fits(hidden, weight, memory_budget), return_entropy,
        )  # fmt: skip
    else:
        logp, entropy, _, _ = _linear_logprob(
            hidden, weight, target.long(), bias, softcap, logit_scale, regime, backend, return_entropy
        )
        dropped = torch.zeros_like(logp) if return_dropped else logp
    if return_entropy or return_dropped:
        return logp, *([entropy] if return_entropy else []), *([dropped.detach()] if return_dropped else [])
    return logp


def log_sum_sq(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None = None,  # [V]
    *,
    target: Tensor | None = None,  # [N] int
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """log sum_v p_v^2 of each row's distribution -> [N], fp32 or fp64, detached. WPO's weight, arXiv 2406.11827.

    p is the softmax of softcap(logit_scale * (hidden W^T + b)), of any float dtype; rows whose `target` is -100 give 0.
    One GEMM in tiles, nothing of size N x V is kept. Plain PyTorch on every device: no Triton kernel yet. OpError for
    shapes, dtypes or devices that do not fit.
    """
    hidden, weight, bias = (None if t is None else t.detach() for t in _autocast(hidden, weight, bias))
    _check_softcap(softcap)
    target = hidden.new_zeros(hidden.shape[:1], dtype=torch.int64) if target is None else target
    _check(hidden, weight, target, bias, None, "torch")
    return vocab_ops.log_sum_sq_op(hidden, weight, bias, target.long(), softcap, logit_scale)


def token_kl(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    ref_hidden: Tensor,  # [N, E]
    ref_weight: Tensor,  # [V, E]
    bias: Tensor | None = None,  # [V]
    ref_bias: Tensor | None = None,  # [V]
    *,
    target: Tensor | None = None,  # [N] int
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_softcap: float | None = None,
    ref_logit_scale: float = 1.0,
) -> Tensor:
    """KL(p_ref || p) of each row's two distributions -> [N], fp32 or fp64. TDPO, arXiv 2404.11999.

    Differentiable once in hidden, weight and bias, by the closed form p - p_ref on the logits; the reference gets no
    gradient. Each side has its own hidden size, dtype and logit rule, as in `linear_logprob`; rows whose `target` is
    -100 give 0. Tiles of the logits are formed in the forward and again in the backward: nothing of size N x V is ever
    alive. Plain PyTorch on every device: no Triton kernel yet. OpError for shapes, dtypes or devices that do not fit.
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)
    ref_hidden, ref_weight, ref_bias = (
        None if t is None else t.detach() for t in _autocast(ref_hidden, ref_weight, ref_bias)
    )
    _check_softcap(softcap)
    _check_softcap(ref_softcap)
    target = hidden.new_zeros(hidden.shape[:1], dtype=torch.int64) if target is None else target
    _check(hidden, weight, target, bias, None, "torch")
    _check(ref_hidden, ref_weight, target, ref_bias, None, "torch")
    if weight.shape[0] != ref_weight.shape[0]:
        raise OpError(f"the vocabularies differ: weight {list(weight.shape)}, ref_weight {list(ref_weight.shape)}")
    if hidden.device != ref_hidden.device:
        raise OpError(f"hidden is on {hidden.device} and ref_hidden on {ref_hidden.device}")
    kl, _ = vocab_ops.token_kl_op(
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, target.long(), softcap, logit_scale, ref_softcap,
        ref_logit_scale,
    )  # fmt: skip
    return kl


def _autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where it is on; fp64 stays."""
    device_type = next(t for t in tensors if t is not None).device.type
    if not (torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _check_softcap(softcap: float | None) -> None:
    if softcap is not None and not softcap > 0:
        raise OpError(f"softcap must be positive or None, not {softcap}")


def _check(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, memory_budget: int | None, backend: str
) -> str:
    """Refuse what the ops cannot take; the backend to use."""
    if any(hasattr(t, "device_mesh") for t in (hidden, weight, target, bias)):
        raise OpError("only linear_logprob takes DTensors: pass weight.full_tensor(), and the rows of this rank")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise OpError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [N, D] and [V, D]")
    if weight.shape[0] == 0:
        raise OpError("weight has no rows: the vocabulary is empty")
    if target.shape != hidden.shape[:1]:
        raise OpError(f"target {list(target.shape)} must be [N] = {list(hidden.shape[:1])}")
    if target.dtype.is_floating_point or target.dtype.is_complex or target.dtype == torch.bool:
        raise OpError(f"target must be an integer tensor, not {target.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise OpError(f"bias {list(bias.shape)} must be [V] = {list(weight.shape[:1])}")
    tensors = [t for t in (hidden, weight, bias) if t is not None]
    if hidden.dtype not in DTYPES or any(t.dtype != hidden.dtype for t in tensors):
        raise OpError(f"hidden, weight and bias must share one floating dtype, not {[str(t.dtype) for t in tensors]}")
    if any(t.device != hidden.device for t in (*tensors, target)):
        raise OpError(f"tensors are on several devices: {[str(t.device) for t in (*tensors, target)]}")
    if memory_budget is not None and memory_budget < 0:
        raise OpError(f"memory_budget must be at least 0 bytes, not {memory_budget}")
    return _choose(backend, hidden)


def _choose(backend: str, tensor: Tensor) -> str:
    """The backend to use: the one asked for, or the best one for the tensor's device and dtype."""
    on_cpu = tensor.device.type == "cpu"
    if backend == "auto":
        native = "torch"
        if on_cpu and backends._C is not None:
            native = "cpu"
        elif tensor.device.type == "cuda" and HAS_TRITON and chips.triton_compiles(tensor.device.index):
            native = "triton"
        return native if tensor.dtype in NATIVE_DTYPES[native] else "torch"
    if backend not in available_backends():
        raise OpError(f"backend {backend!r} is not available here; one of auto, {', '.join(available_backends())}")
    on_right_device = {"cpu": on_cpu, "triton": not on_cpu or INTERPRETED, "torch": True}[backend]
    if tensor.dtype not in NATIVE_DTYPES[backend] or not on_right_device:
        raise OpError(f"backend {backend!r} does not take {tensor.dtype} on {tensor.device.type}; use 'auto'")
    return backend


def _regime(hidden: Tensor, weight: Tensor, bias: Tensor | None, memory_budget: int | None) -> str:
    """Decided outside the op, inside which grad mode always reads False: none, frozen, kept or sliced."""
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not torch.is_grad_enabled() or not (hidden.requires_grad or trained):
        return "none"
    if not trained:
        return "frozen"
    return "kept" if _fits(hidden, weight, memory_budget) else "sliced"


def _fits(hidden: Tensor, weight: Tensor, memory_budget: int | None) -> bool:
    """Whether an N x V matrix in the input dtype is within the budget."""
    budget = default_memory_budget(weight) if memory_budget is None else memory_budget
    return hidden.shape[0] * weight.shape[0] * hidden.dtype.itemsize <= budget


@torch.library.custom_op("fastpo::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    regime: str,
    backend: str,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp [N], entropy [N] or [0], saved, stats [k, N]); see backends.py for what each regime saves."""
    head = Head(hidden, weight, target, bias, softcap, logit_scale)
    if target.device.type == "cpu" or CHECK_INPUTS:
        _check_range(target, weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        kept = backends.FORWARD[backend](head, regime, entropy)
    return kept.logp, kept.entropy, kept.saved, kept.stats


def _check_range(target: Tensor, vocabulary: int) -> None:
    bad = ((target < 0) & (target != IGNORE_INDEX)) | (target >= vocabulary)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise OpError(f"target[{row}] = {int(target[row])} is outside the vocabulary of {vocabulary}")


@_linear_logprob.register_fake
def _(hidden, weight, target, bias, softcap, logit_scale, regime, backend, entropy):
    n, acc = hidden.shape[0], acc_dtype(hidden.dtype)
    saved = {
        "frozen": lambda: torch.empty_like(hidden, dtype=acc, memory_format=torch.contiguous_format),
        "kept": lambda: hidden.new_empty(n, backends.saved_columns(weight.shape[0], backend)),
    }.get(regime, lambda: hidden.new_empty(0, dtype=acc))()
    stats = hidden.new_empty(backends.stats_rows(regime, backend), n, dtype=acc)
    return hidden.new_empty(n, dtype=acc), hidden.new_empty(n if entropy else 0, dtype=acc), saved, stats


@torch.library.custom_op("fastpo::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
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
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden [N, D], dweight [V, D], dbias [V]), each [0] where `need` does not ask; regimes kept and sliced."""
    head = Head(hidden, weight, target, bias, softcap, logit_scale)
    grad = grad.where(target != IGNORE_INDEX, 0.0).contiguous()
    with torch.autocast(grad.device.type, enabled=False):
        if regime == "kept":
            grads = backends.kept_backward(head, grad, saved, stats, need)
        else:
            grads = backends.SLICED_BACKWARD[backend](head, grad, stats, need)
    dhidden, dweight, dbias = (hidden.new_empty(0) if g is None else g.to(hidden.dtype) for g in grads)
    return dhidden, dweight, dbias


@_linear_logprob_backward.register_fake
def _(grad, hidden, weight, target, bias, saved, stats, softcap, logit_scale, regime, backend, need):
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(hidden.new_empty(shape if asked else 0) for shape, asked in zip(shapes, need))


@torch.library.custom_op("fastpo::scaled", mutates_args=())
def _scaled(saved: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient that the forward formed, times the upstream one of each row (or the only one), in `dtype`."""
    factor = factor.reshape(factor.shape + (1,) * (saved.dim() - factor.dim()))
    return torch.mul(saved, factor, out=saved.new_empty(saved.shape, dtype=dtype))


@_scaled.register_fake
def _(saved, factor, dtype):
    return saved.new_empty(saved.shape, dtype=dtype)


def _once_only(ctx, *grads):
    raise RuntimeError("fastpo ops are differentiable once: their gradients come from closed forms without a graph")


for _op in (_linear_logprob_backward, _scaled):
    _op.register_autograd(_once_only)


def _setup_linear_logprob(ctx, inputs, output) -> None:
    hidden, weight, target, bias, *options, _ = inputs
    _, entropy, saved, stats = output
    # A frozen head's `saved` stays differentiable in name, so that a second derivative meets _once_only.
    ctx.mark_non_differentiable(*([entropy, stats] if options[2] == "frozen" else [entropy, saved, stats]))
    ctx.set_materialize_grads(False)  # else autograd makes zeros of the size of `saved` for the backward
    ctx.options, ctx.dtype = options, hidden.dtype
    if options[2] == "frozen":  # neither hidden nor weight is needed again
        ctx.save_for_backward(saved)
    else:
        ctx.save_for_backward(hidden, weight, target, bias, saved, stats)


def _backward_linear_logprob(ctx, grad, *_):
    need = list(ctx.needs_input_grad)
    need = [need[0], need[1], need[3]]
    grads = [None, None, None]
    if grad is not None and ctx.options[2] == "frozen":
        grads[0] = _scaled(*ctx.saved_tensors, grad, ctx.dtype)
    elif grad is not None:
        grads = _linear_logprob_backward(grad, *ctx.saved_tensors, *ctx.options, need)
        grads = [g if asked else None for g, asked in zip(grads, need)]
    return grads[0], grads[1], None, grads[2], *[None] * (len(ctx.options) + 1)


_linear_logprob.register_autograd(_backward_linear_logprob, setup_context=_setup_linear_logprob)


@torch.library.custom_op("fastpo::filtered_logprob", mutates_args=())
def _filtered_logprob(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp [N], entropy [N] or [0], dropped [N], logits [N, V] or [0], stats [3, N], keep [N, T]): grad_filter.py."""
    head = Head(hidden, weight, target, bias, softcap, logit_scale)
    if target.device.type == "cpu":
        _check_range(target, weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        logp, entropies, dropped, saved, stats, keep = filters.forward(
            head, mass, keep_logits, entropy, compiled=backend == "cpu"
        )
    return logp, entropies, dropped, saved, stats, keep


@_filtered_logprob.register_fake
def _(hidden, weight, target, bias, softcap, logit_scale, backend, mass, keep_logits, entropy):
    n, v_size, acc = hidden.shape[0], weight.shape[0], acc_dtype(hidden.dtype)
    logp, dropped, stats = (hidden.new_empty(shape, dtype=acc) for shape in ((n,), (n,), (3, n)))
    saved = hidden.new_empty((n, v_size) if keep_logits else 0)
    keep = hidden.new_empty(n, filters.tile_count(v_size), dtype=torch.bool)
    return logp, hidden.new_empty(n if entropy else 0, dtype=acc), dropped, saved, stats, keep


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
    grad = grad.where(target != IGNORE_INDEX, 0.0).contiguous()
    with torch.autocast(grad.device.type, enabled=False):
        grads = filters.backward(head, grad, saved, stats, keep, need, compiled=backend == "cpu")
    dhidden, dweight, dbias = (hidden.new_empty(0) if g is None else g for g in grads)
    return dhidden, dweight, dbias


@_filtered_logprob_backward.register_fake
def _(grad, hidden, weight, target, bias, saved, stats, keep, softcap, logit_scale, backend, need):
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(hidden.new_empty(shape if asked else 0) for shape, asked in zip(shapes, need))


_filtered_logprob_backward.register_autograd(_once_only)


def _setup_filtered_logprob(ctx, inputs, output) -> None:
    hidden, weight, target, bias, *options, _, _, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.options = options
    ctx.save_for_backward(hidden, weight, target, bias, *output[3:])


def _backward_filtered_logprob(ctx, grad, *_):
    need = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    grads = [None, None, None]
    if grad is not None:
        grads = _filtered_logprob_backward(grad, *ctx.saved_tensors, *ctx.options, need)
        grads = [g if asked else None for g, asked in zip(grads, need)]
    return grads[0], grads[1], None, grads[2], *[None] * 6


_filtered_logprob.register_autograd(_backward_filtered_logprob, setup_context=_setup_filtered_logprob)


FUSED_LOSSES = reference.LOSS_TYPES  # what `preference_loss` knows; fastpo.losses has more


class PreferenceOutput(NamedTuple):
    """Per-pair results, detached, each [P]."""

    losses: Tensor  # unweighted
    chosen_logps: Tensor  # sums over the response
    rejected_logps: Tensor
    ref_chosen_logps: Tensor  # 0 without a reference
    ref_rejected_logps: Tensor


def preference_loss(
    logp: Tensor,  # [N]
    ref_logp: Tensor | None,  # [N]
    response_offsets: Tensor,  # [S + 1] int32
    pairs: Tensor,  # [P, 2] int32: preferred, other
    weight: Tensor,  # [P]
    win_prob_chosen: Tensor | None = None,  # [P], sppo
    win_prob_rejected: Tensor | None = None,  # [P], sppo
    *,
    loss_type: str,
    beta: float,
    label_smoothing: float = 0.0,
    gamma_beta_ratio: float = 0.0,
    ipo_mean: bool = True,
    unique: bool = False,
    ref_response_logps: Tensor | None = None,  # [S], instead of ref_logp
    backend: str = "auto",
) -> tuple[Tensor, PreferenceOutput]:
    """(sum over pairs of weight * loss, differentiable once in logp; what it was made of).

    unique=True promises that every response is in exactly one pair, which lets a GPU do everything in one launch.
    """
    if loss_type not in reference.LOSS_TYPES:
        raise OpError(f"unknown loss_type {loss_type!r}; one of {', '.join(reference.LOSS_TYPES)}")
    if logp.dim() != 1 or pairs.dim() != 2 or pairs.shape[1] != 2 or weight.shape != pairs.shape[:1]:
        shapes = [list(t.shape) for t in (logp, pairs, weight)]
        raise OpError(f"logp, pairs and weight must be [N], [P, 2] and [P], not {', '.join(map(str, shapes))}")
    if ref_logp is not None and ref_response_logps is not None:
        raise OpError("a reference comes per token (ref_logp) or per response (ref_response_logps), not both")
    if ref_logp is not None and ref_logp.shape != logp.shape:
        raise OpError(f"ref_logp {list(ref_logp.shape)} must have the shape of logp {list(logp.shape)}")
    if loss_type == "sppo" and (win_prob_chosen is None or win_prob_rejected is None):
        raise OpError("sppo needs win_prob_chosen and win_prob_rejected")
    hyper = (loss_type, beta, label_smoothing, gamma_beta_ratio, ipo_mean)
    tensors = (logp, ref_logp, ref_response_logps, response_offsets, pairs, weight, win_prob_chosen, win_prob_rejected)
    if _choose(backend, logp) == "triton":
        total, terms, _ = _preference_loss(*tensors, *hyper, unique)
    else:
        total, terms = _torch_preference_loss(*tensors, *hyper)
    return total, PreferenceOutput(*terms.unbind())


def _torch_preference_loss(
    logp: Tensor,
    ref_logp: Tensor | None,
    ref_response_logps: Tensor | None,
    response_offsets: Tensor,
    pairs: Tensor,
    weight: Tensor,
    win_prob_chosen: Tensor | None,
    win_prob_rejected: Tensor | None,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    gamma_beta_ratio: float,
    ipo_mean: bool,
) -> tuple[Tensor, Tensor]:
    """(total, terms [5, P]) by autograd's own ops. Segment sums run in a fixed order, so they are deterministic."""
    offsets = response_offsets.long()
    sums = _segment_sums(logp, offsets)
    if ref_response_logps is not None:
        ref_sums = ref_response_logps.to(logp.dtype)
    else:
        ref_sums = torch.zeros_like(sums) if ref_logp is None else _segment_sums(ref_logp.to(logp.dtype), offsets)
    chosen, rejected = pairs.long().unbind(1)
    lengths = offsets.diff().clamp(min=1).to(logp.dtype)
    terms = (sums[chosen], sums[rejected], ref_sums[chosen], ref_sums[rejected])
    losses = reference.pair_losses(
        loss_type, *terms, lengths[chosen], lengths[rejected], win_prob_chosen, win_prob_rejected,
        beta=beta, label_smoothing=label_smoothing, gamma_beta_ratio=gamma_beta_ratio, ipo_mean=ipo_mean,
    )  # fmt: skip
    return (weight * losses).sum(), torch.stack([losses, *terms]).detach()


def _segment_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """Sums of values [N] between consecutive offsets [S + 1] -> [S]. A segment's sum is sequential, hence in fp64."""
    return torch.segment_reduce(values.double(), "sum", offsets=offsets, initial=0).to(values.dtype)


@torch.library.custom_op("fastpo::preference_loss", mutates_args=())
def _preference_loss(
    logp: Tensor,
    ref_logp: Tensor | None,
    ref_response_logps: Tensor | None,
    response_offsets: Tensor,
    pairs: Tensor,
    weight: Tensor,
    win_prob_chosen: Tensor | None,
    win_prob_rejected: Tensor | None,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    gamma_beta_ratio: float,
    ipo_mean: bool,
    unique: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, terms [5, P], dtotal/dlogp [N]) by the fused Triton kernel."""
    from fastpo.kernels.preference import preference_fwd

    def fp32(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.float().contiguous()

    result = preference_fwd(
        fp32(logp), fp32(ref_logp), response_offsets.int().contiguous(), pairs.int().contiguous(), fp32(weight),
        fp32(win_prob_chosen), fp32(win_prob_rejected), loss_type=loss_type, beta=beta, label_smoothing=label_smoothing,
        gamma_beta_ratio=gamma_beta_ratio, ipo_mean=ipo_mean, unique=unique,
        ref_response_logps=fp32(ref_response_logps),
    )  # fmt: skip
    sums = (result.chosen_logps, result.rejected_logps, result.ref_chosen_logps, result.ref_rejected_logps)
    return (weight * result.losses).sum(), torch.stack([result.losses, *sums]), result.dlogp


@_preference_loss.register_fake
def _(logp, ref_logp, ref_response_logps, response_offsets, pairs, weight, *_):
    fp32 = {"dtype": torch.float32}
    return weight.new_empty((), **fp32), logp.new_empty(5, pairs.shape[0], **fp32), logp.new_empty(logp.shape, **fp32)


def _setup_preference_loss(ctx, inputs, output) -> None:
    _, terms, dlogp = output
    ctx.mark_non_differentiable(terms, dlogp)
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.inputs = inputs[0].dtype, len(inputs)
    ctx.save_for_backward(dlogp)


def _backward_preference_loss(ctx, grad, *_):
    dlogp = None if grad is None else _scaled(*ctx.saved_tensors, grad, ctx.dtype)
    return dlogp, *[None] * (ctx.inputs - 1)


_preference_loss.register_autograd(_backward_preference_loss, setup_context=_setup_preference_loss)
