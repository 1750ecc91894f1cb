"""The formulas of the fused preference kernel: elementary functions, margins, losses with their derivatives.

Notation as in fastpo/losses/functions.py: lw, ll the sums that the loss reads of chosen and rejected, rw, rl those of
the reference, a = lw - rw, b = ll - rl, n lengths, s the sigmoid. All fp32 scalars. The capitals are the words of a
`pair_losses.Recipe`: constexprs, so that what a loss does not need is not compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl

_MAX_EXPONENT = tl.constexpr(80.0)  # as in fastpo/losses/functions.py: beyond it an exponential stands still
_HIGHEST = tl.constexpr(-1e-6)  # mean log-probability from which ORPO's odds are constant
_LN2 = tl.constexpr(0.6931471805599453)


# --------------------------------------------------------------------------------------------- elementary functions


@triton.jit
def _log1p(x):
    """log(1 + x) for -1/2 <= x <= 1 with full relative precision: 2 atanh(x / (2 + x)) as its series, whose argument is
    at most 1/3. No hardware logarithm is accurate next to 1."""
    r = x / (2.0 + x)
    t = r * r
    series = 1.0 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t * (1 / 13))))))
    return 2.0 * r * series


@triton.jit
def _expm1(x):
    """e^x - 1 with full relative precision: its series up to 1/2, where the next term is below fp32's rounding."""
    series = 1 / 40320 + x * (1 / 362880)
    series = 1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * series))
    series = x * (1.0 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * series))))
    return tl.where(tl.abs(x) <= 0.5, series, tl.exp(x) - 1.0)


@triton.jit
def _softplus(u):
    """log(1 + e^u) = -log s(-u)"""
    return tl.where(u > 0, u, 0.0) + _log1p(tl.exp(-tl.abs(u)))


@triton.jit
def _sigmoid(u):
    e = tl.exp(-tl.abs(u))
    return tl.where(u >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _relu(u):
    return tl.where(u <= 0, 0.0, u)  # NaN stays NaN, which tl.maximum would hide


@triton.jit
def _step(u):
    return tl.where(u > 0, 1.0, 0.0)


@triton.jit
def _exp(z):
    return tl.exp(tl.where(z > _MAX_EXPONENT, _MAX_EXPONENT, z))


@triton.jit
def _d_exp(z):
    return tl.where(z > _MAX_EXPONENT, 0.0, tl.exp(tl.where(z > _MAX_EXPONENT, 0.0, z)))


# --------------------------------------------------------------------------------------- margins: what a loss compares


@triton.jit
def _score(x, a, n, extra, MARGIN: tl.constexpr):
    """(score of one response, its derivative in its sum x); a margin is the difference of two. a: x less reference."""
    if MARGIN == "means":
        score = a / n
        slope = 1.0 / n
    elif MARGIN == "forward_kl":  # f-DPO, arXiv 2309.16240: f'(e^a) without constants
        score = -_exp(-a)
        slope = _d_exp(-a)
    elif MARGIN == "js":
        score = -_softplus(-a)
        slope = _sigmoid(-a)
    elif MARGIN == "alpha":
        score = _exp(extra * a) / extra
        slope = _d_exp(extra * a)
    elif MARGIN == "power":  # AlphaPO, arXiv 2501.03884
        z = -extra * (x / n)
        score = -_expm1(tl.where(z > _MAX_EXPONENT, _MAX_EXPONENT, z)) / extra
        slope = _d_exp(z) / n
    elif MARGIN == "odds":  # ORPO, arXiv 2403.07691: p - log(1 - e^p), whose slope is 1 / (1 - e^p)
        p = x / n
        kept = tl.where(p > _HIGHEST, _HIGHEST, p)
        rest = -_expm1(kept)
        near = kept > -_LN2
        log_rest = tl.where(near, tl.log(rest), _log1p(-tl.exp(tl.where(near, -_LN2, kept))))
        score = kept - log_rest
        slope = tl.where(p > _HIGHEST, 0.0, 1.0 / rest) / n
    else:
        score = a
        slope = 1.0
    return score, slope


@triton.jit
def _margin(lw, ll, a, b, n_w, n_l, k_w, k_l, extra, MARGIN: tl.constexpr):
    """(margin, its derivative in lw, its derivative in -ll); k_w, k_l: sums of the further number per token."""
    score_w, slope_w = _score(lw, a, n_w, extra, MARGIN)
    score_l, slope_l = _score(ll, b, n_l, extra, MARGIN)
    margin = score_w - score_l
    if MARGIN == "positive":  # DPOP, arXiv 2402.13228
        margin -= extra * _relu(-a)
        slope_w = 1.0 + extra * _step(-a)
    elif MARGIN == "lengths":  # R-DPO, arXiv 2403.19159
        margin += extra * (n_w - n_l)
    elif MARGIN == "token_kl" or MARGIN == "rejected_kl":  # TDPO, arXiv 2404.11999
        margin -= extra * (k_l - k_w)
    return margin, slope_w, slope_l


# ------------------------------------------------------------------------------------------------ losses of one margin


@triton.jit
def _logistic(u, e, SMOOTH: tl.constexpr):
    """(1 - e) softplus(-u) + e softplus(u), and its derivative in u."""
    small = tl.exp(-tl.abs(u))
    tail = _log1p(small)
    s = tl.where(u >= 0, 1.0, small) / (1.0 + small)
    s_neg = tl.where(u >= 0, small, 1.0) / (1.0 + small)
    loss = tl.where(u < 0, -u, 0.0) + tail
    slope = -s_neg
    if SMOOTH:
        loss = (1.0 - e) * loss + e * (tl.where(u > 0, u, 0.0) + tail)
        slope = e * s - (1.0 - e) * s_neg
    return loss, slope


@triton.jit
def _of_margin(u, smoothing, extra, SHAPE: tl.constexpr, SMOOTH: tl.constexpr):
    """(loss, its derivative in u)"""
    if SHAPE == "logistic":
        loss, slope = _logistic(u, smoothing, SMOOTH)
    elif SHAPE == "hinge":
        loss = _relu(-u)
        slope = -_step(-u)
    elif SHAPE == "truncated":
        slope = -2.0 * _relu(-u)
        loss = 0.25 * slope * slope
    elif SHAPE == "square":
        loss = u * u
        slope = 2.0 * u
    elif SHAPE == "exponential":
        loss = _exp(-u)
        slope = -_d_exp(-u)
    elif SHAPE == "savage":
        s_neg = _sigmoid(-u)
        loss = s_neg * s_neg
        slope = -2.0 * loss * _sigmoid(u)
    elif SHAPE == "exo":  # arXiv 2402.00856 eq. 16; smoothing is log(e), extra log(1 - e)
        s = _sigmoid(u)
        s_neg = _sigmoid(-u)
        loss = s * (-_softplus(-u) - extra) + s_neg * (-_softplus(u) - smoothing)
        slope = s * s_neg * (u - extra + smoothing)
    else:  # arXiv 2406.08414 eq. 5; extra is tau
        tl.static_assert(SHAPE == "discopop")
        v = u / extra
        s_neg = _sigmoid(-v)
        exponent = -_softplus(-v) - u  # of s(v) e^(-u), in one exponential that does not overflow
        loss = s_neg * _softplus(-u) + _exp(exponent)
        slope = _d_exp(exponent) * (s_neg / extra - 1.0)
        slope -= _sigmoid(v) * s_neg / extra * _softplus(-u) + s_neg * _sigmoid(-u)
    return loss, slope


@triton.jit
def _of_each(a, b, p_w, p_l, beta, offset, extra, SHAPE: tl.constexpr):
    """(loss, derivative in a, derivative in b) of losses that judge each response on its own."""
    u = beta * a - offset
    v = beta * b - offset
    if SHAPE == "nca":  # arXiv 2402.05369
        loss = _softplus(-u) + 0.5 * _softplus(u) + 0.5 * _softplus(v)
        dw = beta * (0.5 * _sigmoid(u) - _sigmoid(-u))
        dl = 0.5 * beta * _sigmoid(v)
    elif SHAPE == "bco":  # arXiv 2404.04656
        loss = _softplus(-u) + _softplus(v)
        dw = -beta * _sigmoid(-u)
        dl = beta * _sigmoid(v)
    elif SHAPE == "apo_zero":  # arXiv 2408.06266 eq. 7
        loss = _sigmoid(-u) + _sigmoid(v)
        dw = -beta * _sigmoid(u) * _sigmoid(-u)
        dl = beta * _sigmoid(v) * _sigmoid(-v)
    elif SHAPE == "apo_down":  # eq. 8
        d = beta * (a - b)
        loss = _sigmoid(u) + _sigmoid(-d)
        dl = beta * _sigmoid(d) * _sigmoid(-d)
        dw = beta * _sigmoid(u) * _sigmoid(-u) - dl
    else:  # arXiv 2405.00675 eq. 4.7; extra is the factor 1/2, or 1 for TRL's sppo_hard
        tl.static_assert(SHAPE == "sppo")
        x = a - (p_w - 0.5) / beta
        y = b - (p_l - 0.5) / beta
        loss = extra * (x * x + y * y)
        dw = 2.0 * extra * x
        dl = 2.0 * extra * y
    return loss, dw, dl


@triton.jit
def pair_loss(
    lw,
    ll,
    rw,
    rl,
    n_w,
    n_l,
    k_w,
    k_l,
    p_w,
    p_l,
    scale,
    offset,
    smoothing,
    extra,
    nll_coef,
    SHAPE: tl.constexpr,
    MARGIN: tl.constexpr,
    LABELS: tl.constexpr,
    WEIGHTING: tl.constexpr,
    NLL: tl.constexpr,
):
    """(loss, dloss/dlw, dloss/dll)"""
    a = lw - rw
    b = ll - rl
    if SHAPE == "nca" or SHAPE == "bco" or SHAPE == "apo_zero" or SHAPE == "apo_down" or SHAPE == "sppo":
        loss, dw, dl = _of_each(a, b, p_w, p_l, scale, offset, extra, SHAPE)
    else:
        if LABELS == "soft":
            smoothing = p_l
        elif LABELS == "scored":
            smoothing = _sigmoid(extra * (p_l - p_w))
        margin, slope_w, slope_l = _margin(lw, ll, a, b, n_w, n_l, k_w, k_l, extra, MARGIN)
        loss, slope = _of_margin(scale * margin - offset, smoothing, extra, SHAPE, LABELS != "sure")
        if MARGIN == "odds":  # ORPO's lambda weighs the loss
            loss *= extra
            slope *= extra
        dw = scale * slope * slope_w
        dl = -scale * slope * slope_l
    if WEIGHTING != "none":  # WPO, arXiv 2406.11827: without gradient
        weight = tl.exp((lw - k_w) / n_w + (ll - k_l) / n_l)
        if WEIGHTING == "wpo_clamped":
            weight = tl.where(weight > 1.0, 1.0, weight)
        loss *= weight
        dw *= weight
        dl *= weight
    if NLL != "none":
        coef = nll_coef / n_w if NLL == "mean" else nll_coef
        loss -= coef * lw
        dw -= coef
    return loss, dw, dl
