"""The policy terms of the losses per token: `name(x, ...)` gives l_t [N], `d_name(x, g, ...)` dL/dlogp [N] of
sum_t g_t l_t, without autograd. Docstrings are what docs/losses.md prints, so they hold the formula and the paper.

Notation: p the policy's probability of a token, q that of the policy that sampled, A the advantage of its response, n
the response's tokens; r = p/q, or with importance_sampling_level=sequence (prod p/q)^(1/n) of the response, of which
the gradient goes to each of its tokens by 1/n; e `epsilon`, E `epsilon_high` (e where unset); sg() is constant.
"""

import math

import torch
from torch import Tensor

from fastpo.losses.tokens import Tokens, d_exp, exp, log_ratio, pull_back

# VESPO's bounds of a token's log-ratio and of a response's, as its authors' code and TRL have them.
_TOKEN_BOUND, _LOWEST, _HIGHEST = 20.0, math.log(1e-8), 20.0


def reinforce(x: Tokens) -> Tensor:
    """-A log p, summed over the response. REINFORCE with a baseline, as in 2402.14740: no ratio and no clipping, so a
    second update on the same responses is not corrected for.
    """
    return -x.advantages * x.logp


def d_reinforce(x: Tokens, g: Tensor) -> Tensor:
    """-A."""
    return -x.advantages * g


# ------------------------------------------------------------------------------------------------ clipped surrogates


def _bounds(x: Tokens, epsilon: float, epsilon_high: float | None, delta: float | None) -> tuple[Tensor, Tensor]:
    """Between which values min(min(r, delta) A, clip(r, 1 - e, 1 + E) A) follows r: they depend on the sign of A."""
    high = 1 + (epsilon if epsilon_high is None else epsilon_high)
    up = high if delta is None else min(high, delta)
    down = math.inf if delta is None else max(high, delta)
    positive = x.advantages >= 0
    return _either(positive, -math.inf, 1 - epsilon, x), _either(positive, up, down, x)


def _either(condition: Tensor, yes: float, no: float, x: Tokens) -> Tensor:
    """torch.where of two numbers in the dtype of the log-probabilities; its own is float32."""
    numbers = torch.tensor([no, yes], dtype=x.logp.dtype, device=condition.device)
    return numbers[condition.long()]


def _clipped(
    x: Tokens, log_r: Tensor, epsilon: float, epsilon_high: float | None, delta: float | None
) -> tuple[Tensor, Tensor]:
    """(-min(min(r, delta) A, clip(r, 1 - e, 1 + E) A), its derivative by log r), [N]; at a bound it follows r."""
    r, (low, high) = exp(log_r), _bounds(x, epsilon, epsilon_high, delta)
    live = (r >= low) & (r <= high)
    value = torch.where(live, r, torch.minimum(torch.maximum(r.detach(), low), high))
    return -x.advantages * value, torch.where(live, -x.advantages * d_exp(log_r.detach()), 0.0)


def grpo(
    x: Tokens, *, epsilon: float, epsilon_high: float | None, delta: float | None, importance_sampling_level: str
) -> Tensor:
    """-min(r A, clip(r, 1 - e, 1 + E) A), mean over each response's tokens, then over the responses. GRPO, 2402.03300.
    With `delta` the first r is min(r, delta): INTELLECT-2's two-sided clip, 2505.07291.
    """
    return _clipped(x, log_ratio(x, importance_sampling_level), epsilon, epsilon_high, delta)[0]


def d_grpo(
    x: Tokens, g: Tensor, *, epsilon: float, epsilon_high: float | None, delta: float | None,
    importance_sampling_level: str,
) -> Tensor:  # fmt: skip
    """-r A where r is not clipped: A > 0 and r <= min(1 + E, delta), or A < 0 and 1 - e <= r <= max(1 + E, delta), no
    end without delta. Else 0.
    """
    _, slope = _clipped(x, log_ratio(x, importance_sampling_level), epsilon, epsilon_high, delta)
    return pull_back(x, g * slope, importance_sampling_level)


def dr_grpo(
    x: Tokens, *, epsilon: float, epsilon_high: float | None, delta: float | None, importance_sampling_level: str
) -> Tensor:
    """grpo's term, summed over all tokens and divided by responses times `max_completion_length`. Dr. GRPO, 2503.20783:
    neither a response's length nor the spread of its group's rewards scales it (`scale_rewards` none).
    """
    return grpo(
        x, epsilon=epsilon, epsilon_high=epsilon_high, delta=delta, importance_sampling_level=importance_sampling_level
    )


def dapo(
    x: Tokens, *, epsilon: float, epsilon_high: float | None, delta: float | None, importance_sampling_level: str
) -> Tensor:
    """grpo's term with E > e, mean over all tokens of the step. DAPO, 2503.14476; its over-long shaping and
    dynamic sampling concern rewards and groups, not the loss.
    """
    return grpo(
        x, epsilon=epsilon, epsilon_high=epsilon_high, delta=delta, importance_sampling_level=importance_sampling_level
    )


def bnpo(
    x: Tokens, *, epsilon: float, epsilon_high: float | None, delta: float | None, importance_sampling_level: str
) -> Tensor:
    """grpo's term, mean over all tokens of the step: TRL's `bnpo`, which is a mean over a micro-batch. The paper of
    that name, 2506.02864, normalises rewards by a Beta distribution instead.
    """
    return grpo(
        x, epsilon=epsilon, epsilon_high=epsilon_high, delta=delta, importance_sampling_level=importance_sampling_level
    )


def gspo(
    x: Tokens, *, epsilon: float, epsilon_high: float | None, delta: float | None, importance_sampling_level: str
) -> Tensor:
    """grpo's term with the response's ratio r = (prod p/q)^(1/n), mean over the responses. GSPO, 2507.18071."""
    return grpo(
        x, epsilon=epsilon, epsilon_high=epsilon_high, delta=delta, importance_sampling_level=importance_sampling_level
    )


def luspo(
    x: Tokens, *, epsilon: float, epsilon_high: float | None, delta: float | None, importance_sampling_level: str
) -> Tensor:
    """gspo's term times the response's length n, mean over the responses: each of its n tokens counts. LUSPO,
    2602.05261.
    """
    return grpo(
        x, epsilon=epsilon, epsilon_high=epsilon_high, delta=delta, importance_sampling_level=importance_sampling_level
    )


def rloo(x: Tokens, *, epsilon: float, epsilon_high: float | None) -> Tensor:
    """-min(R A, clip(R, 1 - e, 1 + E) A), R = prod p/q of the whole response, mean over the responses. RLOO,
    2402.14740: its A is the reward less the mean of the other responses' rewards. The ratio and its clip are TRL's; at
    p = q the gradient is the paper's, -A of each token. l_t is 1/n of its response's.
    """
    value, _ = _clipped(x, log_ratio(x, "sum"), epsilon, epsilon_high, None)
    return value / x.length(x.counts)[x.response]


def d_rloo(x: Tokens, g: Tensor, *, epsilon: float, epsilon_high: float | None) -> Tensor:
    """-R A where R is not clipped, as grpo; else 0."""
    _, slope = _clipped(x, log_ratio(x, "sum"), epsilon, epsilon_high, None)
    return pull_back(x, g * slope / x.length(x.counts)[x.response], "sum")


def gmpo(x: Tokens, *, epsilon: float, epsilon_high: float | None) -> Tensor:
    """-A (prod c)^(1/n), log c = min(log r, E) where A > 0, max(log r, -e) else: each token clipped by its logarithm
    before the geometric mean over the response; mean over the responses. GMPO, 2507.20673.
    """
    return -x.advantages * exp(_geometric(x, epsilon, epsilon_high)[0])


def d_gmpo(x: Tokens, g: Tensor, *, epsilon: float, epsilon_high: float | None) -> Tensor:
    """-A (prod c)^(1/n)/n for each token that is not clipped, 0 for those that are."""
    mean, live = _geometric(x, epsilon, epsilon_high)
    return (x.total(-g * x.advantages * d_exp(mean)) / x.length(x.kept))[x.response] * x.kept * live


def _geometric(x: Tokens, epsilon: float, epsilon_high: float | None) -> tuple[Tensor, Tensor]:
    """(log of the geometric mean of the clipped ratios, 1 where a token is not clipped), [N]."""
    high = epsilon if epsilon_high is None else epsilon_high
    change, positive = x.change, x.advantages > 0
    live = torch.where(positive, change <= high, change >= -epsilon)
    bound = _either(positive, high, -epsilon, x)
    clipped = torch.where(live, change, bound)
    return (x.total(clipped * x.kept) / x.length(x.kept))[x.response], live.to(change.dtype)


# ------------------------------------------------------------------------------------------------- weights and gates


def cispo(x: Tokens, *, epsilon_high: float, importance_sampling_level: str) -> Tensor:
    """-sg(min(r, E)) A log p, mean over all tokens of the step: the ratio is clipped as a weight, and no token loses
    its gradient. CISPO, 2506.13585. E, `epsilon_high`, bounds the ratio itself, as in TRL and ScaleRL, 2510.13786.
    """
    return (
        d_cispo(
            x, torch.ones_like(x.logp), epsilon_high=epsilon_high, importance_sampling_level=importance_sampling_level
        )
        * x.logp
    )


@torch.no_grad()
def d_cispo(x: Tokens, g: Tensor, *, epsilon_high: float, importance_sampling_level: str) -> Tensor:
    """-min(r, E) A."""
    return -g * exp(log_ratio(x, importance_sampling_level)).clamp(max=epsilon_high) * x.advantages


def sapo(
    x: Tokens, *, sapo_temperature_pos: float, sapo_temperature_neg: float, importance_sampling_level: str
) -> Tensor:
    """-A (4/t) s(t (r - 1)), s the sigmoid, t `sapo_temperature_pos` where A > 0 and `sapo_temperature_neg` else; mean
    over each response's tokens, then over the responses. SAPO, 2511.20347: a soft gate for the clip.
    """
    t = _either(x.advantages > 0, sapo_temperature_pos, sapo_temperature_neg, x)
    return -x.advantages * torch.sigmoid(t * (exp(log_ratio(x, importance_sampling_level)) - 1)) * 4 / t


def d_sapo(
    x: Tokens, g: Tensor, *, sapo_temperature_pos: float, sapo_temperature_neg: float, importance_sampling_level: str
) -> Tensor:
    """-4 A r s(u) s(-u), u = t (r - 1)."""
    t = _either(x.advantages > 0, sapo_temperature_pos, sapo_temperature_neg, x)
    log_r = log_ratio(x, importance_sampling_level)
    u = t * (exp(log_r) - 1)
    slope = -4 * x.advantages * torch.sigmoid(u) * torch.sigmoid(-u) * d_exp(log_r)
    return pull_back(x, g * slope, importance_sampling_level)


def vespo(
    x: Tokens, *, vespo_k_pos: float, vespo_lambda_pos: float, vespo_k_neg: float, vespo_lambda_neg: float,
    importance_sampling_level: str,
) -> Tensor:  # fmt: skip
    """-sg(f(w)) A log p, f(w) = w^k e^(L (1 - w)), w = prod p/q of the response, mean over all tokens of the step; k
    and L are `vespo_k_*` and `vespo_lambda_*`, pos where A >= 0. VESPO, 2602.10693. A correction for the sampler
    multiplies w. Only the KL reads the level. As TRL, a token's log-ratio lies within 20, log w in [log 1e-8, 20].
    """
    hyper = dict(
        vespo_k_pos=vespo_k_pos, vespo_lambda_pos=vespo_lambda_pos, vespo_k_neg=vespo_k_neg,
        vespo_lambda_neg=vespo_lambda_neg,
    )  # fmt: skip
    return -gamma_weights(x, **hyper)[x.response] * x.advantages * x.logp


def d_vespo(
    x: Tokens, g: Tensor, *, vespo_k_pos: float, vespo_lambda_pos: float, vespo_k_neg: float, vespo_lambda_neg: float,
    importance_sampling_level: str,
) -> Tensor:  # fmt: skip
    """-f(w) A."""
    hyper = dict(
        vespo_k_pos=vespo_k_pos, vespo_lambda_pos=vespo_lambda_pos, vespo_k_neg=vespo_k_neg,
        vespo_lambda_neg=vespo_lambda_neg,
    )  # fmt: skip
    return -g * gamma_weights(x, **hyper)[x.response] * x.advantages


@torch.no_grad()
def gamma_weights(
    x: Tokens, *, vespo_k_pos: float, vespo_lambda_pos: float, vespo_k_neg: float, vespo_lambda_neg: float
) -> Tensor:
    """VESPO's f(w) of each response, [S]."""
    log_w = x.total(x.change.clamp(-_TOKEN_BOUND, _TOKEN_BOUND))
    if x.correction is not None:
        by = torch.log(x.correction.detach().to(log_w.dtype)).clamp(_LOWEST, _HIGHEST)
        of_tokens = by.shape == x.logp.shape
        log_w = log_w + (x.total(torch.where(x.counts > 0, by, 0.0)) if of_tokens else by)
    log_w = log_w.clamp(_LOWEST, _HIGHEST)
    positive = x.advantage.detach() >= 0
    k = _either(positive, vespo_k_pos, vespo_k_neg, x)
    scale = _either(positive, max(vespo_lambda_pos, 1e-4), max(vespo_lambda_neg, 1e-4), x)
    return torch.exp(scale + k * log_w - scale * torch.exp(log_w)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


# ------------------------------------------------------------------------------------------------------------ Nash-MD


def nash_md(x: Tokens, *, beta: float, kl_level: str) -> Tensor:
    """(-A + beta sg(D)) log p, A = P(y beats y') - 1/2 for y of the policy and y' of the mixture, summed over the
    response. Nash-MD's policy gradient, 2312.00886: D is the log-ratio of the whole response to the reference; with
    kl_level=token each token's own, as TRL had it.
    """
    return d_nash_md(x, torch.ones_like(x.logp), beta=beta, kl_level=kl_level) * x.logp


@torch.no_grad()
def d_nash_md(x: Tokens, g: Tensor, *, beta: float, kl_level: str) -> Tensor:
    """-A + beta D."""
    if not beta:
        return -g * x.advantages
    assert x.ref_logp is not None
    apart = torch.where(x.counts > 0, x.logp - x.ref_logp.to(x.logp.dtype), 0.0)
    apart = apart if kl_level == "token" else x.total(apart)[x.response]
    return g * (beta * apart - x.advantages)
