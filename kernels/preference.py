"""Fused preference kernel: token log-probabilities to losses, coefficients and per-token gradients, one launch.

N = head rows (completion tokens), S = responses, P = pairs. All arithmetic in fp32. One program owns one pair: it sums
both responses, evaluates the loss and its two derivatives in closed form, and writes every token's gradient. No
atomics. The loss formulas are those of `reference.pair_losses`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpo.kernels.logprob import device_guard

LOSS_IDS = {"dpo": 0, "ipo": 1, "simpo": 2, "sppo": 3, "sppo_hard": 4, "hinge": 5, "robust": 6}
_DPO = tl.constexpr(LOSS_IDS["dpo"])
_IPO = tl.constexpr(LOSS_IDS["ipo"])
_SIMPO = tl.constexpr(LOSS_IDS["simpo"])
_SPPO = tl.constexpr(LOSS_IDS["sppo"])
_SPPO_HARD = tl.constexpr(LOSS_IDS["sppo_hard"])
_HINGE = tl.constexpr(LOSS_IDS["hinge"])
_ROBUST = tl.constexpr(LOSS_IDS["robust"])
_NO_REF, _TOKEN_REF, _RESPONSE_REF = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

BLOCK_N = 1024  # tokens a step: most responses are one step, and 4 warps read 8 tokens a thread
BLOCK_P = 256  # pairs a step when the pairs of a response are gathered
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _log1p_exp(u):
    """log(1 + e) for e = exp(-|u|) <= 1, with full relative precision: 2 atanh(e / (2 + e)) as its series, whose
    argument is at most 1/3. No hardware logarithm is accurate next to 1."""
    e = tl.exp(-tl.abs(u))
    r = e / (2.0 + e)
    t = r * r
    series = 1.0 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t * (1 / 13))))))
    return 2.0 * r * series


@triton.jit
def _logistic(u, label_smoothing, SIGN: tl.constexpr, SMOOTH: tl.constexpr):
    """(1 - eps) softplus(-u) + SIGN eps softplus(u), and its derivative in u."""
    tail = _log1p_exp(u)
    e = tl.exp(-tl.abs(u))
    small = e / (1.0 + e)
    large = 1.0 / (1.0 + e)
    sigmoid = tl.where(u >= 0, large, small)
    sigmoid_neg = tl.where(u >= 0, small, large)
    loss = tl.maximum(-u, 0.0) + tail
    slope = -sigmoid_neg
    if SMOOTH:
        loss = (1.0 - label_smoothing) * loss + SIGN * label_smoothing * (tl.maximum(u, 0.0) + tail)
        slope = (1.0 - label_smoothing) * slope + SIGN * label_smoothing * sigmoid
    return loss, slope


@triton.jit
def _pair_loss(
    lw,
    ll,
    rw,
    rl,
    n_w,
    n_l,
    p_w,
    p_l,
    beta,
    label_smoothing,
    gamma_beta_ratio,
    LOSS: tl.constexpr,
    IPO_MEAN: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """(loss, dloss/dlw, dloss/dll); for length-normalised losses these already hold the 1 / length."""
    a = lw - rw
    b = ll - rl
    if LOSS == _DPO:
        loss, slope = _logistic(beta * (a - b), label_smoothing, 1.0, SMOOTH)
        dw = beta * slope
        dl = -dw
    elif LOSS == _ROBUST:
        loss, slope = _logistic(beta * (a - b), label_smoothing, -1.0, SMOOTH)
        scale = 1.0 / (1.0 - 2.0 * label_smoothing)
        loss *= scale
        dw = beta * slope * scale
        dl = -dw
    elif LOSS == _HINGE:
        margin = 1.0 - beta * (a - b)
        loss = tl.maximum(margin, 0.0)
        dw = tl.where(margin > 0, -beta, 0.0)
        dl = -dw
    elif LOSS == _IPO:
        if IPO_MEAN:
            residual = a / n_w - b / n_l - 0.5 / beta
            dw = 2.0 * residual / n_w
            dl = -2.0 * residual / n_l
        else:
            residual = a - b - 0.5 / beta
            dw = 2.0 * residual
            dl = -dw
        loss = residual * residual
    elif LOSS == _SIMPO:
        z = beta * (lw / n_w - ll / n_l - gamma_beta_ratio)
        loss, slope = _logistic(z, label_smoothing, 1.0, SMOOTH)
        dw = beta * slope / n_w
        dl = -beta * slope / n_l
    elif LOSS == _SPPO:
        dw = a - (p_w - 0.5) / beta
        dl = b - (p_l - 0.5) / beta
        loss = 0.5 * (dw * dw + dl * dl)
    else:
        tl.static_assert(LOSS == _SPPO_HARD)
        dw = a - 0.5 / beta
        dl = b + 0.5 / beta
        loss = dw * dw + dl * dl
        dw *= 2.0
        dl *= 2.0
    return loss, dw, dl


@triton.jit
def _segment_sum(x_ptr, begin, end, BLOCK_N: tl.constexpr):
    acc = tl.zeros([BLOCK_N], tl.float32)
    for start in range(begin, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        acc += tl.load(x_ptr + offs_n, mask=offs_n < end, other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit
def _segment_fill(x_ptr, begin, end, value, BLOCK_N: tl.constexpr):
    for start in range(begin, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        tl.store(x_ptr + offs_n, tl.zeros([BLOCK_N], tl.float32) + value, mask=offs_n < end)


@triton.jit
def _ref_sum(ref_ptr, response, begin, end, REF: tl.constexpr, BLOCK_N: tl.constexpr):
    if REF == _TOKEN_REF:
        total = _segment_sum(ref_ptr, begin, end, BLOCK_N)
    elif REF == _RESPONSE_REF:
        total = tl.load(ref_ptr + response)
    else:
        total = 0.0
    return total


@triton.jit
def _preference_fwd_kernel(
    logp_ptr,  # [N]
    ref_ptr,  # [N], [S] or None, see REF
    response_offsets_ptr,  # [S + 1] int32
    pairs_ptr,  # [P, 2] int32
    weight_ptr,  # [P]
    win_prob_chosen_ptr,  # [P] or None
    win_prob_rejected_ptr,  # [P] or None
    losses_ptr,  # [P], out
    coef_ptr,  # [P, 2], out
    chosen_logps_ptr,  # [P], out
    rejected_logps_ptr,  # [P], out
    ref_chosen_logps_ptr,  # [P], out
    ref_rejected_logps_ptr,  # [P], out
    dlogp_ptr,  # [N], out, or None when a second launch writes it
    beta,
    label_smoothing,
    gamma_beta_ratio,
    LOSS: tl.constexpr,
    REF: tl.constexpr,
    IPO_MEAN: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid_p = tl.program_id(0).to(tl.int64)
    chosen = tl.load(pairs_ptr + 2 * pid_p)
    rejected = tl.load(pairs_ptr + 2 * pid_p + 1)
    begin_w = tl.load(response_offsets_ptr + chosen)
    end_w = tl.load(response_offsets_ptr + chosen + 1)
    begin_l = tl.load(response_offsets_ptr + rejected)
    end_l = tl.load(response_offsets_ptr + rejected + 1)

    lw = _segment_sum(logp_ptr, begin_w, end_w, BLOCK_N)
    ll = _segment_sum(logp_ptr, begin_l, end_l, BLOCK_N)
    rw = _ref_sum(ref_ptr, chosen, begin_w, end_w, REF, BLOCK_N)
    rl = _ref_sum(ref_ptr, rejected, begin_l, end_l, REF, BLOCK_N)
    n_w = tl.maximum(end_w - begin_w, 1).to(tl.float32)
    n_l = tl.maximum(end_l - begin_l, 1).to(tl.float32)
    p_w = 0.0
    p_l = 0.0
    if LOSS == _SPPO:
        p_w = tl.load(win_prob_chosen_ptr + pid_p)
        p_l = tl.load(win_prob_rejected_ptr + pid_p)
    loss, dw, dl = _pair_loss(
        lw, ll, rw, rl, n_w, n_l, p_w, p_l, beta, label_smoothing, gamma_beta_ratio, LOSS, IPO_MEAN, SMOOTH
    )
    weight = tl.load(weight_ptr + pid_p)
    dw *= weight
    dl *= weight

    tl.store(losses_ptr + pid_p, loss)
    tl.store(coef_ptr + 2 * pid_p, dw)
    tl.store(coef_ptr + 2 * pid_p + 1, dl)
    tl.store(chosen_logps_ptr + pid_p, lw)
    tl.store(rejected_logps_ptr + pid_p, ll)
    tl.store(ref_chosen_logps_ptr + pid_p, rw)
    tl.store(ref_rejected_logps_ptr + pid_p, rl)
    if dlogp_ptr is not None:
        _segment_fill(dlogp_ptr, begin_w, end_w, dw, BLOCK_N)
        _segment_fill(dlogp_ptr, begin_l, end_l, dl, BLOCK_N)


@triton.jit(do_not_specialize=["n_pairs"])
def _preference_dlogp_kernel(
    coef_ptr,  # [P, 2]
    pairs_ptr,  # [P, 2] int32
    response_offsets_ptr,  # [S + 1] int32
    dlogp_ptr,  # [N], out
    n_pairs,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program a response: sums the coefficients of its pairs in a fixed order, 0 for a response in no pair."""
    pid_s = tl.program_id(0)
    acc = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, n_pairs, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask_p = offs_p < n_pairs
        chosen = tl.load(pairs_ptr + 2 * offs_p, mask=mask_p, other=-1)
        rejected = tl.load(pairs_ptr + 2 * offs_p + 1, mask=mask_p, other=-1)
        acc += tl.load(coef_ptr + 2 * offs_p, mask=chosen == pid_s, other=0.0)
        acc += tl.load(coef_ptr + 2 * offs_p + 1, mask=rejected == pid_s, other=0.0)
    begin = tl.load(response_offsets_ptr + pid_s)
    end = tl.load(response_offsets_ptr + pid_s + 1)
    _segment_fill(dlogp_ptr, begin, end, tl.sum(acc, axis=0), BLOCK_N)


class PreferenceResult(NamedTuple):
    """What one launch computes, all fp32."""

    losses: Tensor  # [P], unweighted
    coef: Tensor  # [P, 2], weight * dloss/d(sum of log-probs) of the chosen and rejected response
    chosen_logps: Tensor  # [P], sums over the response
    rejected_logps: Tensor  # [P]
    ref_chosen_logps: Tensor  # [P], 0 without a reference
    ref_rejected_logps: Tensor  # [P]
    dlogp: Tensor  # [N], gradient of sum_p weight_p loss_p


def _check(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor is not None:
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.device == device, (
            f"{name} must be {dtype} {shape} on {device}, got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )
        assert tensor.is_contiguous(), f"{name} must be contiguous"


def preference_fwd(
    logp: Tensor,  # [N] fp32
    ref_logp: Tensor | None,  # [N] fp32
    response_offsets: Tensor,  # [S + 1] int32
    pairs: Tensor,  # [P, 2] int32: preferred, other
    weight: Tensor,  # [P] fp32
    win_prob_chosen: Tensor | None = None,  # [P] fp32, sppo
    win_prob_rejected: Tensor | None = None,  # [P] fp32, sppo
    *,
    loss_type: str,
    beta: float,
    label_smoothing: float = 0.0,
    gamma_beta_ratio: float = 0.0,
    ipo_mean: bool = True,
    unique: bool = False,
    ref_response_logps: Tensor | None = None,  # [S] fp32, instead of ref_logp
) -> PreferenceResult:
    """Losses, coefficients, response sums and dlogp. unique=True promises that every response is in exactly one pair:
    one launch then does everything; otherwise a second one gathers each response's coefficients.

    Only dpo, simpo and robust read `label_smoothing`, only simpo `gamma_beta_ratio`, only ipo `ipo_mean` (beta = tau).
    """
    n, s, p = logp.numel(), response_offsets.numel() - 1, pairs.shape[0]
    assert loss_type in LOSS_IDS, f"loss_type must be one of {', '.join(LOSS_IDS)}, got {loss_type!r}"
    assert ref_logp is None or ref_response_logps is None, "a reference comes per token or per response, not both"
    assert loss_type != "sppo" or (win_prob_chosen is not None and win_prob_rejected is not None), (
        "sppo needs win_prob_chosen and win_prob_rejected"
    )
    assert not unique or s == 2 * p, f"unique=True means S = 2 P, got {s} responses and {p} pairs"
    _check("logp", logp, (n,), torch.float32, logp.device)
    _check("ref_logp", ref_logp, (n,), torch.float32, logp.device)
    _check("ref_response_logps", ref_response_logps, (s,), torch.float32, logp.device)
    _check("response_offsets", response_offsets, (s + 1,), torch.int32, logp.device)
    _check("pairs", pairs, (p, 2), torch.int32, logp.device)
    for name, tensor in (
        ("weight", weight),
        ("win_prob_chosen", win_prob_chosen),
        ("win_prob_rejected", win_prob_rejected),
    ):
        _check(name, tensor, (p,), torch.float32, logp.device)

    losses, coef, *sums = (logp.new_empty(shape) for shape in ((p,), (p, 2), (p,), (p,), (p,), (p,)))
    dlogp = torch.empty_like(logp) if p else torch.zeros_like(logp)
    result = PreferenceResult._make([losses, coef, *sums, dlogp])
    if p == 0:
        return result
    if ref_logp is not None:
        ref, ref_kind = ref_logp, _TOKEN_REF
    else:
        ref, ref_kind = ref_response_logps, _NO_REF if ref_response_logps is None else _RESPONSE_REF
    with device_guard(logp):
        _preference_fwd_kernel[(p,)](
            logp,
            ref,
            response_offsets,
            pairs,
            weight,
            win_prob_chosen,
            win_prob_rejected,
            losses,
            coef,
            *sums,
            dlogp if unique else None,
            float(beta),
            float(label_smoothing),
            float(gamma_beta_ratio),
            LOSS=LOSS_IDS[loss_type],
            REF=ref_kind.value,
            IPO_MEAN=ipo_mean,
            SMOOTH=label_smoothing != 0,
            BLOCK_N=BLOCK_N,
            **OPTIONS,
        )
        if not unique:
            _preference_dlogp_kernel[(s,)](
                coef, pairs, response_offsets, dlogp, p, BLOCK_P=BLOCK_P, BLOCK_N=BLOCK_N, **OPTIONS
            )
    return result
