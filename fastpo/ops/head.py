"""The ops of the head: fused linear log-probabilities, and the preference loss over them.

N = head rows (completion tokens), D = hidden, V = vocabulary, S = responses, P = pairs. 16-bit inputs: GEMMs in the
input dtype, row arithmetic and results in fp32. Definitions: `kernels/reference.py`; cost regimes: `ops/backends.py`.
All are `torch.library` ops, so they compile without a graph break.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpo import losses
from fastpo.kernels import reference
from fastpo.kernels.pair_losses import RECIPES, Recipe, recipe
from fastpo.ops import backends, parts, vocab_ops
from fastpo.ops import grad_filter as filters
from fastpo.ops.backends import Head, acc_dtype
from fastpo.ops.inputs import autocast, check_inputs, check_softcap, choose_backend, fits_budget, regime_of
from fastpo.ops.parts import OpError


def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *, softcap: float | None, logit_scale: float,
    return_entropy: bool, return_top1: bool, memory_budget: int | None, backend: str, grad_filter: float,
    return_dropped: bool,
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    """`fastpo.ops.linear_logprob`, which says what it takes and gives, of plain tensors and a whole vocabulary."""
    hidden, weight, bias = autocast(hidden, weight, bias)
    check_softcap(softcap)
    backend = check_inputs(hidden, weight, target, bias, memory_budget, backend)
    if not 0 <= grad_filter < 1:
        raise OpError(f"grad_filter must be in [0, 1), a share of each row's probability, not {grad_filter}")
    regime = regime_of(hidden, weight, bias, memory_budget)
    numbers = return_entropy or return_top1
    if grad_filter and regime != "none":
        logp, entropy, top1, dropped, _, _, _ = filters.filtered_logprob(
            hidden, weight, target.long(), bias, softcap, logit_scale, backend, grad_filter,
            fits_budget(hidden, weight, memory_budget), numbers,
        )  # fmt: skip
    else:
        logp, entropy, top1, _, _ = _linear_logprob(
            hidden, weight, target.long(), bias, softcap, logit_scale, regime, backend, numbers
        )
        dropped = torch.zeros_like(logp) if return_dropped else logp
    asked = zip((return_entropy, return_top1, return_dropped), (entropy, top1, dropped.detach()))
    further = [tensor for wanted, tensor in asked if wanted]
    return (logp, *further) if further else logp


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
    hidden, weight, bias = map(parts.detached, autocast(hidden, weight, bias))
    check_softcap(softcap)
    target = hidden.new_zeros(hidden.shape[:1], dtype=torch.int64) if target is None else target
    check_inputs(hidden, weight, target, bias, None, "torch")
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
    hidden, weight, bias = autocast(hidden, weight, bias)
    ref_hidden, ref_weight, ref_bias = map(parts.detached, autocast(ref_hidden, ref_weight, ref_bias))
    check_softcap(softcap)
    check_softcap(ref_softcap)
    target = hidden.new_zeros(hidden.shape[:1], dtype=torch.int64) if target is None else target
    check_inputs(hidden, weight, target, bias, None, "torch")
    check_inputs(ref_hidden, ref_weight, target, ref_bias, None, "torch")
    if weight.shape[0] != ref_weight.shape[0]:
        raise OpError(f"the vocabularies differ: weight {list(weight.shape)}, ref_weight {list(ref_weight.shape)}")
    if hidden.device != ref_hidden.device:
        raise OpError(f"hidden is on {hidden.device} and ref_hidden on {ref_hidden.device}")
    kl, _ = vocab_ops.token_kl_op(
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, target.long(), softcap, logit_scale, ref_softcap,
        ref_logit_scale,
    )  # fmt: skip
    return kl


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp [N], entropy and top1 [N] or [0], saved, stats [k, N]); see ops/backends.py for what each regime saves."""
    head = Head(hidden, weight, target, bias, softcap, logit_scale)
    parts.check_targets(target, weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        kept = backends.FORWARD[backend](head, regime, entropy)
    return kept[:5]


@_linear_logprob.register_fake
def _(hidden, weight, target, bias, softcap, logit_scale, regime, backend, entropy):
    n, acc = hidden.shape[0], acc_dtype(hidden.dtype)
    saved = {
        "frozen": lambda: torch.empty_like(hidden, dtype=acc, memory_format=torch.contiguous_format),
        "kept": lambda: hidden.new_empty(n, backends.saved_columns(weight.shape[0], backend)),
    }.get(regime, lambda: hidden.new_empty(0, dtype=acc))()
    stats_dtype = backends.stats_dtype(hidden.dtype, regime, backend)
    stats = hidden.new_empty(backends.stats_rows(regime, backend), n, dtype=stats_dtype)
    entropies, top1 = (hidden.new_empty(n if entropy else 0, dtype=acc) for _ in range(2))
    return hidden.new_empty(n, dtype=acc), entropies, top1, saved, stats


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
    grad = parts.live(grad, target)
    with torch.autocast(grad.device.type, enabled=False):
        if regime == "kept":
            grads = backends.kept_backward(head, grad, saved, stats, need)
        else:
            grads = backends.SLICED_BACKWARD[backend](head, grad, stats, need)
    return parts.as_outputs(hidden, grads)


@_linear_logprob_backward.register_fake
def _(grad, hidden, weight, target, bias, saved, stats, softcap, logit_scale, regime, backend, need):
    return parts.fake_gradients(hidden, weight, need)


@torch.library.custom_op("fastpo::scaled", mutates_args=())
def _scaled(saved: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient that the forward formed, times the upstream one of each row (or the only one), in `dtype`."""
    factor = factor.reshape(factor.shape + (1,) * (saved.dim() - factor.dim()))
    return torch.mul(saved, factor, out=saved.new_empty(saved.shape, dtype=dtype))


@_scaled.register_fake
def _(saved, factor, dtype):
    return saved.new_empty(saved.shape, dtype=dtype)


for _op in (_linear_logprob_backward, _scaled):
    _op.register_autograd(parts.once_only)


def _setup_linear_logprob(ctx, inputs, output) -> None:
    hidden, weight, target, bias, *options, _ = inputs
    _, entropy, top1, saved, stats = output
    # A frozen head's `saved` stays differentiable in name, so that a second derivative meets once_only.
    ctx.mark_non_differentiable(entropy, top1, stats, *([] if options[2] == "frozen" else [saved]))
    ctx.set_materialize_grads(False)  # else autograd makes zeros of the size of `saved` for the backward
    ctx.options, ctx.dtype = options, hidden.dtype
    if options[2] == "frozen":  # neither hidden nor weight is needed again
        ctx.save_for_backward(saved, target)
    else:
        ctx.save_for_backward(hidden, weight, target, bias, saved, stats)


def _backward_linear_logprob(ctx, grad, *_):
    if grad is None or ctx.options[2] != "frozen":
        return parts.gradients(ctx, _linear_logprob_backward, grad, (0, 1, 3))
    saved, target = ctx.saved_tensors
    return _scaled(saved, parts.live(grad, target), ctx.dtype), *[None] * (len(ctx.needs_input_grad) - 1)


_linear_logprob.register_autograd(_backward_linear_logprob, setup_context=_setup_linear_logprob)


# ------------------------------------------------------------------------------------------------- preference losses

FUSED_LOSSES = tuple(RECIPES)  # what `preference_loss` knows; fastpo.losses has more


class PreferenceOutput(NamedTuple):
    """Per-pair results, detached, each [P]; and the metrics."""

    losses: Tensor  # unweighted
    chosen_logps: Tensor  # sums over the response
    rejected_logps: Tensor
    ref_chosen_logps: Tensor  # 0 without a reference
    ref_rejected_logps: Tensor
    metrics: Tensor  # [9] sums over the pairs, in the order of fastpo.training.metrics.PAIR_METRICS


class PreferenceInputs(NamedTuple):
    """The tensors of `preference_loss`."""

    logp: Tensor
    rows: Tensor | None
    ref_logp: Tensor | None
    ref_response_logps: Tensor | None
    prev_logp: Tensor | None
    prev_response_logps: Tensor | None
    token_weight: Tensor | None
    drawn_rows: Tensor | None
    response_offsets: Tensor
    pairs: Tensor
    weight: Tensor
    win_prob_chosen: Tensor | None
    win_prob_rejected: Tensor | None


def preference_loss(
    logp: Tensor,  # [N]
    ref_logp: Tensor | None,  # [N]
    response_offsets: Tensor,  # [S + 1] int32
    pairs: Tensor,  # [P, 2] int32: preferred, other
    weight: Tensor,  # [P]
    win_prob_chosen: Tensor | None = None,  # [P]: P(it beats the previous policy), or P(chosen beats rejected)
    win_prob_rejected: Tensor | None = None,  # [P]
    *,
    loss_type: str,
    unique: bool = False,
    ref_response_logps: Tensor | None = None,  # [S], instead of ref_logp
    prev_logp: Tensor | None = None,  # [N]: of the previous policy, for a loss that mixes it with the reference
    prev_response_logps: Tensor | None = None,  # [S], instead of prev_logp
    rows: Tensor | None = None,  # [N]: WPO's log sum_v p_v^2, or TDPO's KL, which gets a gradient
    token_weight: Tensor | None = None,  # [N]; a token of weight 2 counts as two
    drawn_rows: Tensor | None = None,  # [K] int64: SamPO's tokens, pair by pair, chosen's and then rejected's
    backend: str = "auto",
    **hyper: Any,
) -> tuple[Tensor, PreferenceOutput]:
    """(sum over pairs of weight * loss, differentiable once in logp and rows; what it was made of).

    `loss_type` and `hyper` are those of `fastpo.losses.LOSSES`, defaults included; FUSED_LOSSES lists the losses that a
    pair's own numbers determine. unique=True promises that every response is in exactly one pair, which lets a GPU do
    everything in one launch. Without prev_*, the reference is taken for the mixture. OpError for tensors that do not
    fit, ConfigError for hyper-parameters.
    """
    loss_type = losses.canonical_name(loss_type)
    if loss_type not in RECIPES:
        raise OpError(
            f"{loss_type} is no function of single pairs, as {', '.join(FUSED_LOSSES)} are; its own function is "
            f"fastpo.losses.LOSSES[{loss_type!r}]"
        )
    loss = losses.LOSSES[loss_type]
    hyper = loss.hyper(**hyper)
    x = PreferenceInputs(
        logp, rows, ref_logp, ref_response_logps, prev_logp, prev_response_logps, token_weight, drawn_rows,
        response_offsets, pairs, weight, win_prob_chosen, win_prob_rejected,
    )  # fmt: skip
    _check_preference(loss, hyper, x)
    made = recipe(loss_type, **hyper)
    if made is None and backend == "auto":
        backend = "torch"
    if choose_backend(backend, logp) != "triton":
        return plain_preference_loss(loss_type, hyper, x)
    if made is None:
        raise OpError(f"{loss_type} with this NLL has no kernel (see fastpo/kernels/pair_losses.py); use 'auto'")
    words, numbers = " ".join(made.words), list(map(float, made.numbers))
    total, metrics, terms, _, _ = _preference_loss(*x, words, numbers, loss.length, unique)
    return total, PreferenceOutput._make([*terms.unbind(), metrics])


def has_kernel(loss_type: str, hyper: Mapping[str, Any]) -> bool:
    """Whether `preference_loss` can take the fused kernel for this loss, on a machine that has it."""
    return recipe(loss_type, **hyper) is not None


def _check_preference(loss: losses.Loss, hyper: dict[str, Any], x: PreferenceInputs) -> None:
    """Refuse tensors that do not fit, and say what the loss lacks."""
    if x.logp.dim() != 1 or x.pairs.dim() != 2 or x.pairs.shape[1] != 2 or x.weight.shape != x.pairs.shape[:1]:
        shapes = [list(t.shape) for t in (x.logp, x.pairs, x.weight)]
        raise OpError(f"logp, pairs and weight must be [N], [P, 2] and [P], not {', '.join(map(str, shapes))}")
    if x.response_offsets.dim() != 1 or x.response_offsets.numel() == 0:
        raise OpError(f"response_offsets must be [S + 1], not {list(x.response_offsets.shape)}")
    responses = x.response_offsets[1:]
    of_shape = {
        "logp": (x.logp, ("rows", "ref_logp", "prev_logp", "token_weight")),
        "the responses": (responses, ("ref_response_logps", "prev_response_logps")),
        "weight": (x.weight, ("win_prob_chosen", "win_prob_rejected")),
    }
    for of, (like, names) in of_shape.items():
        for name in names:
            given = getattr(x, name)
            if given is not None and given.shape != like.shape:
                raise OpError(f"{name} {list(given.shape)} must have the shape of {of} {list(like.shape)}")
    for who in ("ref", "prev"):
        if getattr(x, f"{who}_logp") is not None and getattr(x, f"{who}_response_logps") is not None:
            raise OpError(f"{who}_* comes per token ({who}_logp) or per response ({who}_response_logps), not both")
    for tensor in x:
        if tensor is not None and tensor.device != x.logp.device:
            raise OpError(f"tensors are on several devices: {x.logp.device} and {tensor.device}")
    needed = loss.needed(hyper)
    if loss.pair_prob and x.win_prob_chosen is None:
        raise OpError(f"{loss.name} needs win_prob_chosen, which is P(chosen beats rejected)")
    if loss.win_prob and (x.win_prob_chosen is None or x.win_prob_rejected is None):
        raise OpError(f"{loss.name} needs win_prob_chosen and win_prob_rejected")
    if ("chosen_kl" in needed or "chosen_log_sum_sq" in needed) and x.rows is None:
        raise OpError(f"{loss.name} needs rows: {'token_kl' if 'chosen_kl' in needed else 'log_sum_sq'} of each token")
    if (loss.drawn or "chosen_tail_logps" in needed) and x.ref_response_logps is not None:
        raise OpError(f"{loss.name} needs the reference per token: give ref_logp instead of ref_response_logps")
    if loss.drawn != (x.drawn_rows is not None):
        raise OpError(f"{loss.name} {'needs' if loss.drawn else 'reads no'} drawn_rows")
    if "prompt_logps" in needed:
        raise OpError(f"{loss.name} here has no NLL of the prompt: set disable_prompt_loss, or {loss.nll}=0")


def plain_preference_loss(
    loss_type: str,
    hyper: Mapping[str, Any],
    x: PreferenceInputs,
    segment_sum: Callable[[Tensor, Tensor], Tensor] = losses.segment_sum,
) -> tuple[Tensor, PreferenceOutput]:
    """`preference_loss` by autograd's own ops and the table's function. `segment_sum` as in kernels/reference.py."""
    loss = losses.LOSSES[loss_type]
    pairs, n = table_inputs(loss, x, segment_sum)
    whole = [n[name] for name in ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")]
    of_each = loss.fn(pairs, **hyper)
    with torch.no_grad():
        has_ref = x.ref_logp is not None or x.ref_response_logps is not None
        refs = whole[2:] if has_ref else (None, None)
        rewards = reference.pair_rewards(*whole[:2], *refs, n["chosen_len"], n["rejected_len"], mean=loss.length)
        ones = torch.ones_like(of_each)
        metrics = torch.stack([*rewards, *whole[:2], ones, ones, 0 * ones, ones]).sum(1)
    return (x.weight * of_each).sum(), PreferenceOutput._make([*(t.detach() for t in (of_each, *whole)), metrics])


def table_inputs(
    loss: losses.Loss, x: PreferenceInputs, segment_sum: Callable[[Tensor, Tensor], Tensor] = losses.segment_sum
) -> tuple[losses.Pairs, dict[str, Tensor]]:
    """What the table's function reads of these tensors, differentiable; and all of `reference.pair_numbers`."""
    n = reference.pair_numbers(
        x.logp, x.ref_logp, x.response_offsets, x.pairs, ref_response_logps=x.ref_response_logps,
        prev_logp=x.prev_logp, prev_response_logps=x.prev_response_logps, rows=x.rows, token_weight=x.token_weight,
        drawn_rows=x.drawn_rows, segment_sum=segment_sum,
    )  # fmt: skip
    given = {name: values for name, values in n.items() if name in losses.Pairs._fields}
    kind = "kl" if "chosen_kl" in loss.needs else "log_sum_sq"
    given |= {f"{side}_{kind}": n.get(f"{side}_rows") for side in ("chosen", "rejected")}
    if loss.drawn:
        given |= {name.replace("_drawn", ""): values for name, values in n.items() if "_drawn" in name}
    return losses.Pairs(**given, win_prob_chosen=x.win_prob_chosen, win_prob_rejected=x.win_prob_rejected), n


@torch.library.custom_op("fastpo::preference_loss", mutates_args=())
def _preference_loss(
    logp: Tensor,
    rows: Tensor | None,
    ref_logp: Tensor | None,
    ref_response_logps: Tensor | None,
    prev_logp: Tensor | None,
    prev_response_logps: Tensor | None,
    token_weight: Tensor | None,
    drawn_rows: Tensor | None,
    response_offsets: Tensor,
    pairs: Tensor,
    weight: Tensor,
    win_prob_chosen: Tensor | None,
    win_prob_rejected: Tensor | None,
    words: str,
    numbers: list[float],
    mean_rewards: bool,
    unique: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(total, metrics [9], terms [5, P], dtotal/dlogp [N], dtotal/drows [N] or [0]) by the fused Triton kernel; `words`
    and `numbers` are a Recipe's."""
    from fastpo.kernels.preference import preference_fwd

    if parts.looks_at(logp):
        _check_pairs(response_offsets, pairs, logp.numel(), unique)

    def fp32(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.float().contiguous()

    result = preference_fwd(
        fp32(logp), fp32(ref_logp), response_offsets.int().contiguous(), pairs.int().contiguous(), fp32(weight),
        fp32(win_prob_chosen), fp32(win_prob_rejected), loss_type=Recipe(*words.split(), *numbers), unique=unique,
        ref_response_logps=fp32(ref_response_logps), prev_logp=fp32(prev_logp),
        prev_response_logps=fp32(prev_response_logps), rows=fp32(rows), token_weight=fp32(token_weight),
        drawn_rows=None if drawn_rows is None else drawn_rows.long().contiguous(), mean_rewards=mean_rewards,
    )  # fmt: skip
    drows = logp.new_empty(0, dtype=torch.float32) if result.drows is None else result.drows
    return result.objective.sum(), result.metrics.sum(1), result.shown, result.dlogp, drows


def _check_pairs(response_offsets: Tensor, pairs: Tensor, rows: int, unique: bool) -> None:
    """The kernel reads and writes where these say, and nothing elsewhere."""
    responses = response_offsets.numel() - 1
    if response_offsets[0] != 0 or response_offsets[-1] != rows or (response_offsets.diff() < 0).any():
        raise OpError(f"response_offsets must ascend from 0 to the {rows} rows of logp")
    if ((pairs < 0) | (pairs >= responses)).any():
        raise OpError(f"pairs must be indices of the {responses} responses")
    if unique and len(pairs.unique()) != responses:
        raise OpError("unique=True, but not every response is in exactly one pair")


@_preference_loss.register_fake
def _(logp, rows, ref, ref_r, prev, prev_r, token_weight, drawn, offsets, pairs, weight, wins, losses_, words, *_):
    fp32 = {"dtype": torch.float32}
    of_rows = logp.shape if Recipe(*words.split()).has_row_gradient else 0
    return (
        weight.new_empty((), **fp32), logp.new_empty(9, **fp32), logp.new_empty(5, pairs.shape[0], **fp32),
        logp.new_empty(logp.shape, **fp32), logp.new_empty(of_rows, **fp32),
    )  # fmt: skip


def _setup_preference_loss(ctx, inputs, output) -> None:
    _, metrics, terms, dlogp, drows = output
    ctx.mark_non_differentiable(metrics, terms)  # not dlogp and drows: a second derivative shall meet once_only
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:2]]
    ctx.inputs = len(inputs)
    ctx.save_for_backward(dlogp, drows)


def _backward_preference_loss(ctx, grad, *_):
    grads = [None, None]
    for i, saved in enumerate(ctx.saved_tensors):
        if grad is not None and ctx.needs_input_grad[i] and saved.numel():
            grads[i] = _scaled(saved, grad, ctx.dtypes[i])
    return *grads, *[None] * (ctx.inputs - 2)


_preference_loss.register_autograd(_backward_preference_loss, setup_context=_setup_preference_loss)
parts.reverse_mode_only(_linear_logprob, _linear_logprob_backward, _scaled, _preference_loss)
