"""The losses of `fastpo.losses.LOSSES`: what each is of a pair, and its closed-form gradient beside it.

`name(x, ...)` gives losses [P]; `d_name(x, ...)` gives (dL/d chosen_logps, dL/d rejected_logps), each [P], of their
sum, without autograd. Docstrings are what docs/losses.md prints, so they hold the formula and the paper.

Notation: lw, ll the log-probabilities of chosen and rejected (sums over tokens), rw, rl those of the reference, tw, tl
of the previous policy; n_w, n_l lengths in tokens; a = lw - rw, b = ll - rl, delta = a - b; s the sigmoid, s'(u) =
s(u) s(-u); e label_smoothing. Lists of K responses are [P, K] and unpaired responses [S], both in the place of chosen.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

MAX_EXPONENT = 80.0  # e^80 is near the end of float32; beyond it an exponential stands still, as in TRL


class Pairs(NamedTuple):
    """What a loss may read, each [P] unless noted; None where the data have none."""

    chosen_logps: Tensor
    rejected_logps: Tensor | None
    ref_chosen_logps: Tensor | None = None
    ref_rejected_logps: Tensor | None = None
    chosen_len: Tensor | None = None
    rejected_len: Tensor | None = None
    win_prob_chosen: Tensor | None = None  # P(beats the previous policy), or win_prob, P(chosen beats rejected)
    win_prob_rejected: Tensor | None = None  # its counterpart, or 1 - win_prob
    prev_chosen_logps: Tensor | None = None
    prev_rejected_logps: Tensor | None = None
    chosen_tail_logps: Tensor | None = None  # sums over the tokens past the shorter response's length
    rejected_tail_logps: Tensor | None = None
    ref_chosen_tail_logps: Tensor | None = None
    ref_rejected_tail_logps: Tensor | None = None
    chosen_log_sum_sq: Tensor | None = None  # sum over tokens of log sum_v p_v^2
    rejected_log_sum_sq: Tensor | None = None
    chosen_kl: Tensor | None = None  # sum over tokens of KL(reference || policy)
    rejected_kl: Tensor | None = None
    prompt_logps: Tensor | None = None  # sum over the prompt's tokens
    prompt_len: Tensor | None = None
    greedy_logps: Tensor | None = None  # of the reference's greedy response, under the policy
    ref_greedy_logps: Tensor | None = None
    chosen_of_reference: Tensor | None = None  # bool: the chosen response is the reference's sample, not the policy's
    scores: Tensor | None = None  # [P, K]
    label: Tensor | None = None  # [S] bool: desirable
    kl: Tensor | None = None  # []: mean log-ratio of mismatched prompts and responses over the whole step
    reward_mean: Tensor | None = None  # []: running mean of the rewards
    margin: Tensor | None = None  # by which the chosen reward should be the larger
    degree: Tensor | None = None  # [E] int64: the degree of each response

    @property
    def chosen_logratios(self) -> Tensor:
        return self.chosen_logps - self.ref_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        return self.rejected_logps - self.ref_rejected_logps

    @property
    def delta(self) -> Tensor:
        return self.chosen_logratios - self.rejected_logratios

    @property
    def mean_margin(self) -> Tensor:
        """lw/n_w - ll/n_l"""
        return self.chosen_logps / self.chosen_len - self.rejected_logps / self.rejected_len

    @property
    def mean_delta(self) -> Tensor:
        """a/n_w - b/n_l"""
        return self.chosen_logratios / self.chosen_len - self.rejected_logratios / self.rejected_len


Gradient = tuple[Tensor, Tensor | None]


# --------------------------------------------------------------------------------------------------- shared pieces


def _logistic(z: Tensor, e: float | Tensor = 0.0) -> Tensor:
    if isinstance(e, float | int) and e == 0:
        return -logsigmoid(z)
    return -(1 - e) * logsigmoid(z) - e * logsigmoid(-z)


def _d_logistic(z: Tensor, e: float | Tensor = 0.0) -> Tensor:
    """s(z) - (1 - e), without the cancellation."""
    return e * torch.sigmoid(z) - (1 - e) * torch.sigmoid(-z)


def _slope(z: Tensor) -> Tensor:
    """s'(z)"""
    return torch.sigmoid(z) * torch.sigmoid(-z)


def _both(g: Tensor) -> Gradient:
    """A loss of the difference of two sums pulls them apart with equal force."""
    return g, -g


def _per_token(x: Pairs, g: Tensor) -> Gradient:
    return g / x.chosen_len, -g / x.rejected_len


def _at_most(z: Tensor, bound: float) -> Tensor:
    """min(z, bound), whose derivative at the bound is that from below: autograd's of `clamp` there is 1 up to PyTorch
    2.13 and 0 from 2.14 on. NaN stays NaN."""
    return torch.where(z > bound, bound, z)


def _exp(z: Tensor) -> Tensor:
    return torch.exp(_at_most(z, MAX_EXPONENT))


def _d_exp(z: Tensor) -> Tensor:
    return torch.where(z <= MAX_EXPONENT, _exp(z), 0.0)


def _nll(x: Pairs, weight: float, reduction: str, with_prompt: bool = False) -> Tensor | float:
    """weight times the negative log-likelihood of the chosen response; its mean over the pairs is the reduction's."""
    if not weight:
        return 0.0
    logps = x.chosen_logps + x.prompt_logps if with_prompt else x.chosen_logps
    return -weight * logps / _nll_divisor(x, reduction, with_prompt)


def _d_nll(x: Pairs, weight: float, reduction: str, with_prompt: bool = False) -> Tensor | float:
    return -weight / _nll_divisor(x, reduction, with_prompt) if weight else 0.0


def _nll_divisor(x: Pairs, reduction: str, with_prompt: bool) -> Tensor | float:
    if reduction == "seq_sum":
        return 1.0
    length = x.chosen_len + x.prompt_len if with_prompt else x.chosen_len
    return length if reduction == "seq_mean" else length.mean()


# ------------------------------------------------------------------------------------- the DPO family: margins of sums


def dpo(x: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log s(beta delta) - e log s(-beta delta). DPO, 2305.18290 eq. 7; with e > 0 conservative DPO (cDPO)."""
    return _logistic(beta * x.delta, label_smoothing)


def d_dpo(x: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Gradient:
    """c_w = -c_l = beta (s(beta delta) - (1 - e))."""
    return _both(beta * _d_logistic(beta * x.delta, label_smoothing))


def cdpo(x: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """-(1 - e) log s(beta delta) - e log s(-beta delta). Conservative DPO: dpo (2305.18290) with smoothed labels."""
    return dpo(x, beta=beta, label_smoothing=label_smoothing)


def robust(x: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """[-(1 - e) log s(beta delta) + e log s(-beta delta)] / (1 - 2e). Robust DPO, 2403.00409; may be negative."""
    return _logistic(beta * x.delta, _robust_smoothing(label_smoothing))


def d_robust(x: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Gradient:
    """c_w = -c_l = beta (s(beta delta) - (1 - e) / (1 - 2e))."""
    return _both(beta * _d_logistic(beta * x.delta, _robust_smoothing(label_smoothing)))


def _robust_smoothing(e: float) -> float:
    return -e / (1 - 2 * e)  # unbiased labels are cDPO's with a negative smoothing


def dpo_soft(x: Pairs, *, beta: float) -> Tensor:
    """-p log s(beta delta) - (1 - p) log s(-beta delta), p = P(chosen beats rejected). DPO, 2305.18290, soft labels."""
    return _logistic(beta * x.delta, 1 - x.win_prob_chosen)


def d_dpo_soft(x: Pairs, *, beta: float) -> Gradient:
    """c_w = -c_l = beta (s(beta delta) - p)."""
    return _both(beta * _d_logistic(beta * x.delta, 1 - x.win_prob_chosen))


def ipo(x: Pairs, *, beta: float, ipo_reduce: str = "mean") -> Tensor:
    """(d - 1/(2 tau))^2; d = delta (sum; 2310.12036 eq. 17) or the difference of token means (TRL). tau is `beta`."""
    d = x.mean_delta if ipo_reduce == "mean" else x.delta
    return (d - 1 / (2 * beta)) ** 2


def d_ipo(x: Pairs, *, beta: float, ipo_reduce: str = "mean") -> Gradient:
    """sum: c_w = -c_l = 2 (delta - 1/(2 tau)); mean: c_w = 2 (d - 1/(2 tau)) / n_w, c_l = -2 (d - 1/(2 tau)) / n_l."""
    if ipo_reduce == "mean":
        return _per_token(x, 2 * (x.mean_delta - 1 / (2 * beta)))
    return _both(2 * (x.delta - 1 / (2 * beta)))


def online_ipo(x: Pairs, *, beta: float) -> Tensor:
    """(delta - 1/(2 tau))^2 on pairs sampled from the policy as it trains. Online IPO, 2403.08635; tau is `beta`."""
    return ipo(x, beta=beta, ipo_reduce="sum")


def ipo_md(x: Pairs, *, beta: float) -> Tensor:
    """(delta - 1/(2 tau))^2 on pairs from the geometric mixture of policy and reference. IPO-MD, 2403.08635."""
    return ipo(x, beta=beta, ipo_reduce="sum")


def d_online_ipo(x: Pairs, *, beta: float) -> Gradient:
    """c_w = -c_l = 2 (delta - 1/(2 tau))."""
    return d_ipo(x, beta=beta, ipo_reduce="sum")


def hinge(x: Pairs, *, beta: float) -> Tensor:
    """max(0, 1 - beta delta). SLiC's normalised form as in RSO, 2309.06657."""
    return torch.relu(1 - beta * x.delta)


def d_hinge(x: Pairs, *, beta: float) -> Gradient:
    """c_w = -c_l = -beta where beta delta < 1, else 0."""
    return _both(-beta * (beta * x.delta < 1).to(x.delta.dtype))


def sigmoid_norm(x: Pairs, *, beta: float) -> Tensor:
    """-log s(beta (a/n_w - b/n_l)). Length-normalised DPO as in Tulu 3, 2411.15124."""
    return _logistic(beta * x.mean_delta)


def d_sigmoid_norm(x: Pairs, *, beta: float) -> Gradient:
    """u = beta (a/n_w - b/n_l); c_w = -(beta/n_w) s(-u), c_l = (beta/n_l) s(-u)."""
    return _per_token(x, beta * _d_logistic(beta * x.mean_delta))


def dpop(x: Pairs, *, beta: float, dpop_lambda: float) -> Tensor:
    """-log s(beta (delta - lambda max(0, rw - lw))). DPO-Positive, 2402.13228."""
    return _logistic(beta * (x.delta - dpop_lambda * torch.relu(-x.chosen_logratios)))


def d_dpop(x: Pairs, *, beta: float, dpop_lambda: float) -> Gradient:
    """u the argument of s; c_w = -beta s(-u) (1 + lambda [rw > lw]), c_l = beta s(-u)."""
    a = x.chosen_logratios
    g = beta * _d_logistic(beta * (x.delta - dpop_lambda * torch.relu(-a)))
    return g * (1 + dpop_lambda * (a < 0)), -g


def rdpo(x: Pairs, *, beta: float, alpha: float) -> Tensor:
    """-log s(beta delta + alpha (n_w - n_l)). Length-regularised DPO (R-DPO), 2403.19159."""
    return _logistic(beta * x.delta + alpha * (x.chosen_len - x.rejected_len))


def d_rdpo(x: Pairs, *, beta: float, alpha: float) -> Gradient:
    """u the argument of s; c_w = -c_l = -beta s(-u)."""
    return _both(beta * _d_logistic(beta * x.delta + alpha * (x.chosen_len - x.rejected_len)))


def exo_pair(x: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """q log(q/(1 - e)) + (1 - q) log((1 - q)/e), q = s(beta delta). EXO, 2402.00856 eq. 16."""
    u = beta * x.delta
    chosen = torch.sigmoid(u) * (logsigmoid(u) - math.log1p(-label_smoothing))
    return chosen + torch.sigmoid(-u) * (logsigmoid(-u) - math.log(label_smoothing))


def d_exo_pair(x: Pairs, *, beta: float, label_smoothing: float) -> Gradient:
    """c_w = -c_l = beta s'(beta delta) (beta delta - logit(1 - e))."""
    u = beta * x.delta
    return _both(beta * _slope(u) * (u - math.log1p(-label_smoothing) + math.log(label_smoothing)))


def discopop(x: Pairs, *, beta: float, discopop_tau: float) -> Tensor:
    """(1 - m) softplus(-u) + m e^(-u), u = beta delta, m = s(u/tau). DiscoPOP, 2406.08414 eq. 5."""
    u = beta * x.delta
    # m e^(-u) in one exponential: for tau < 1 it does not overflow, however wrong the pair.
    return torch.sigmoid(-u / discopop_tau) * -logsigmoid(u) + _exp(logsigmoid(u / discopop_tau) - u)


def d_discopop(x: Pairs, *, beta: float, discopop_tau: float) -> Gradient:
    """c_w = -c_l = beta [(m (1 - m)/tau) (e^(-u) - softplus(-u)) - (1 - m) s(-u) - m e^(-u)]."""
    u = beta * x.delta
    v = u / discopop_tau
    not_m = torch.sigmoid(-v)
    exponential = _d_exp(logsigmoid(v) - u)
    g = exponential * (not_m / discopop_tau - 1) + _slope(v) / discopop_tau * logsigmoid(u) - not_m * torch.sigmoid(-u)
    return _both(beta * g)


F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def fdpo(x: Pairs, *, beta: float, f_divergence_type: str, f_alpha_divergence_coef: float) -> Tensor:
    """-log s(beta (g(a) - g(b))), g(a) = f'(e^a): a, -e^(-a), log s(a), e^((k-1) a)/(k-1). f-DPO, 2309.16240."""
    options = f_divergence_type, f_alpha_divergence_coef
    return _logistic(beta * (_f_score(x.chosen_logratios, *options) - _f_score(x.rejected_logratios, *options)))


def d_fdpo(x: Pairs, *, beta: float, f_divergence_type: str, f_alpha_divergence_coef: float) -> Gradient:
    """u the argument of s; c_w = -beta s(-u) g'(a), c_l = beta s(-u) g'(b)."""
    options = f_divergence_type, f_alpha_divergence_coef
    a, b = x.chosen_logratios, x.rejected_logratios
    g = beta * _d_logistic(beta * (_f_score(a, *options) - _f_score(b, *options)))
    return g * _d_f_score(a, *options), -g * _d_f_score(b, *options)


def _f_score(a: Tensor, kind: str, coef: float) -> Tensor:
    """f'(e^a) without the constants, which cancel in a difference."""
    if kind == "forward_kl":
        return -_exp(-a)
    if kind == "js_divergence":
        return logsigmoid(a)
    if kind == "alpha_divergence" and abs(coef - 1) >= 1e-6:
        return _exp((coef - 1) * a) / (coef - 1)
    return a


def _d_f_score(a: Tensor, kind: str, coef: float) -> Tensor:
    if kind == "forward_kl":
        return _d_exp(-a)
    if kind == "js_divergence":
        return torch.sigmoid(-a)
    if kind == "alpha_divergence" and abs(coef - 1) >= 1e-6:
        return _d_exp((coef - 1) * a)
    return torch.ones_like(a)


# ---------------------------------------------------------------------------------------- GPO: convex f of beta delta


def gpo_logistic(x: Pairs, *, beta: float) -> Tensor:
    """log(1 + e^(-u)), u = beta delta. GPO, 2402.05749; it is dpo."""
    return _logistic(beta * x.delta)


def d_gpo_logistic(x: Pairs, *, beta: float) -> Gradient:
    """c_w = -c_l = -beta s(-u)."""
    return _both(beta * _d_logistic(beta * x.delta))


def gpo_exp(x: Pairs, *, beta: float) -> Tensor:
    """e^(-u), u = beta delta, the exponent at most 80. GPO, 2402.05749."""
    return _exp(-beta * x.delta)


def d_gpo_exp(x: Pairs, *, beta: float) -> Gradient:
    """c_w = -c_l = -beta e^(-u)."""
    return _both(-beta * _d_exp(-beta * x.delta))


def gpo_sq(x: Pairs, *, beta: float) -> Tensor:
    """(u - 1)^2, u = beta delta. GPO, 2402.05749; 4 tau^2 times ipo (sum) at beta = 2 tau."""
    return (beta * x.delta - 1) ** 2


def d_gpo_sq(x: Pairs, *, beta: float) -> Gradient:
    """c_w = -c_l = 2 beta (u - 1)."""
    return _both(2 * beta * (beta * x.delta - 1))


def gpo_hinge(x: Pairs, *, beta: float) -> Tensor:
    """max(0, 1 - u), u = beta delta. GPO, 2402.05749; it is hinge."""
    return hinge(x, beta=beta)


def gpo_tquad(x: Pairs, *, beta: float) -> Tensor:
    """max(0, 1 - u)^2, u = beta delta, the truncated quadratic. GPO, 2402.05749."""
    return torch.relu(1 - beta * x.delta) ** 2


def d_gpo_tquad(x: Pairs, *, beta: float) -> Gradient:
    """c_w = -c_l = -2 beta max(0, 1 - u)."""
    return _both(-2 * beta * torch.relu(1 - beta * x.delta))


def gpo_savage(x: Pairs, *, beta: float) -> Tensor:
    """s(-u)^2, u = beta delta, Savage's loss. GPO, 2402.05749."""
    return torch.sigmoid(-beta * x.delta) ** 2


def d_gpo_savage(x: Pairs, *, beta: float) -> Gradient:
    """c_w = -c_l = -2 beta s(-u) s'(u)."""
    u = beta * x.delta
    return _both(-2 * beta * torch.sigmoid(-u) * _slope(u))


# ----------------------------------------------------------------------- each response on its own: NCA, BCO, APO, SPPO


def nca_pair(x: Pairs, *, beta: float) -> Tensor:
    """-log s(beta a) - log s(-beta a)/2 - log s(-beta b)/2. NCA, 2402.05369."""
    a, b = beta * x.chosen_logratios, beta * x.rejected_logratios
    return -logsigmoid(a) - 0.5 * logsigmoid(-a) - 0.5 * logsigmoid(-b)


def d_nca_pair(x: Pairs, *, beta: float) -> Gradient:
    """c_w = beta (s(beta a)/2 - s(-beta a)), c_l = beta s(beta b)/2."""
    a, b = beta * x.chosen_logratios, beta * x.rejected_logratios
    return beta * (0.5 * torch.sigmoid(a) - torch.sigmoid(-a)), 0.5 * beta * torch.sigmoid(b)


def bco_pair(x: Pairs, *, beta: float, delta: float = 0.0) -> Tensor:
    """-log s(beta a - d) - log s(-(beta b - d)). BCO on pairs, 2404.04656, with a constant shift d (`delta`)."""
    return -logsigmoid(beta * x.chosen_logratios - delta) - logsigmoid(delta - beta * x.rejected_logratios)


def d_bco_pair(x: Pairs, *, beta: float, delta: float = 0.0) -> Gradient:
    """c_w = -beta s(-(beta a - d)), c_l = beta s(beta b - d)."""
    chosen = -beta * torch.sigmoid(delta - beta * x.chosen_logratios)
    return chosen, beta * torch.sigmoid(beta * x.rejected_logratios - delta)


def apo_zero(x: Pairs, *, beta: float) -> Tensor:
    """1 - s(beta a) + s(beta b). APO-zero, 2408.06266 eq. 7."""
    return torch.sigmoid(-beta * x.chosen_logratios) + torch.sigmoid(beta * x.rejected_logratios)


def d_apo_zero(x: Pairs, *, beta: float) -> Gradient:
    """c_w = -beta s'(beta a), c_l = beta s'(beta b)."""
    return -beta * _slope(beta * x.chosen_logratios), beta * _slope(beta * x.rejected_logratios)


def apo_down(x: Pairs, *, beta: float) -> Tensor:
    """s(beta a) + 1 - s(beta delta). APO-down, 2408.06266 eq. 8."""
    return torch.sigmoid(beta * x.chosen_logratios) + torch.sigmoid(-beta * x.delta)


def d_apo_down(x: Pairs, *, beta: float) -> Gradient:
    """c_w = beta s'(beta a) - beta s'(beta delta), c_l = beta s'(beta delta)."""
    pull = beta * _slope(beta * x.delta)
    return beta * _slope(beta * x.chosen_logratios) - pull, pull


def sppo(x: Pairs, *, beta: float) -> Tensor:
    """[(a - (p_w - 1/2)/beta)^2 + (b - (p_l - 1/2)/beta)^2] / 2. SPPO, 2405.00675 eq. 4.7.

    The reference is the previous iterate, p each response's probability of beating it, beta = 1/eta.
    """
    chosen, rejected = d_sppo(x, beta=beta)
    return 0.5 * (chosen**2 + rejected**2)


def d_sppo(x: Pairs, *, beta: float) -> Gradient:
    """c_w = a - (p_w - 1/2)/beta, c_l = b - (p_l - 1/2)/beta."""
    chosen = x.chosen_logratios - (x.win_prob_chosen - 0.5) / beta
    return chosen, x.rejected_logratios - (x.win_prob_rejected - 0.5) / beta


def sppo_single(x: Pairs, *, beta: float) -> Tensor:
    """[(a - (p - 1/2)/beta)^2 + (b + (p - 1/2)/beta)^2] / 2, p = P(chosen beats rejected). SPPO, 2405.00675, from one
    comparison, as the authors' code has it.
    """
    return sppo(x._replace(win_prob_rejected=1 - x.win_prob_chosen), beta=beta)


def d_sppo_single(x: Pairs, *, beta: float) -> Gradient:
    """c_w = a - (p - 1/2)/beta, c_l = b + (p - 1/2)/beta."""
    return d_sppo(x._replace(win_prob_rejected=1 - x.win_prob_chosen), beta=beta)


def sppo_hard(x: Pairs, *, beta: float) -> Tensor:
    """(a - 1/(2 beta))^2 + (b + 1/(2 beta))^2. TRL's `sppo_hard`: SPPO with p in {0, 1} and without its factor 1/2."""
    return (x.chosen_logratios - 0.5 / beta) ** 2 + (x.rejected_logratios + 0.5 / beta) ** 2


def d_sppo_hard(x: Pairs, *, beta: float) -> Gradient:
    """c_w = 2 (a - 1/(2 beta)), c_l = 2 (b + 1/(2 beta))."""
    return 2 * (x.chosen_logratios - 0.5 / beta), 2 * (x.rejected_logratios + 0.5 / beta)


# ------------------------------------------------------------------------------------- no reference, or an NLL beside


def simpo(x: Pairs, *, beta: float, gamma_beta_ratio: float, label_smoothing: float = 0.0) -> Tensor:
    """-log s(beta (mean log pi(chosen) - mean log pi(rejected) - gamma/beta)). SimPO, 2405.14734; no reference."""
    return _logistic(beta * (x.mean_margin - gamma_beta_ratio), label_smoothing)


def d_simpo(x: Pairs, *, beta: float, gamma_beta_ratio: float, label_smoothing: float = 0.0) -> Gradient:
    """z the argument of s; c_w = (beta/n_w) (s(z) - (1 - e)), c_l = -(beta/n_l) (s(z) - (1 - e))."""
    return _per_token(x, beta * _d_logistic(beta * (x.mean_margin - gamma_beta_ratio), label_smoothing))


def alphapo(x: Pairs, *, beta: float, alpha: float, gamma_beta_ratio: float) -> Tensor:
    """-log s(beta (r(lw/n_w) - r(ll/n_l)) - gamma), r(p) = (1 - e^(-alpha p))/alpha. AlphaPO, 2501.03884."""
    p, q = x.chosen_logps / x.chosen_len, x.rejected_logps / x.rejected_len
    return _logistic(beta * (_alpha_reward(p, alpha) - _alpha_reward(q, alpha) - gamma_beta_ratio))


def d_alphapo(x: Pairs, *, beta: float, alpha: float, gamma_beta_ratio: float) -> Gradient:
    """z the argument of s; c_w = -(beta/n_w) e^(-alpha lw/n_w) s(-z), c_l = (beta/n_l) e^(-alpha ll/n_l) s(-z)."""
    p, q = x.chosen_logps / x.chosen_len, x.rejected_logps / x.rejected_len
    g = beta * _d_logistic(beta * (_alpha_reward(p, alpha) - _alpha_reward(q, alpha) - gamma_beta_ratio))
    return g * _d_exp(-alpha * p) / x.chosen_len, -g * _d_exp(-alpha * q) / x.rejected_len


def _alpha_reward(p: Tensor, alpha: float) -> Tensor:
    return -torch.expm1(_at_most(-alpha * p, MAX_EXPONENT)) / alpha if alpha else p


def orpo(
    x: Pairs, *, beta: float, nll_coef: float = 0.0, nll_reduction: str = "seq_sum", disable_prompt_loss: bool = True
) -> Tensor:
    """NLL - lambda log s(log odds(lw/n_w) - log odds(ll/n_l)), odds(p) = e^p/(1 - e^p). ORPO, 2403.07691.

    lambda is `beta`, as in TRL. The NLL is that of prompt and chosen response; `disable_prompt_loss` leaves out the
    prompt. p is kept below -1e-6, where the odds would explode.
    """
    return -beta * logsigmoid(_log_odds_margin(x)) + _nll(x, nll_coef, nll_reduction, not disable_prompt_loss)


def d_orpo(
    x: Pairs, *, beta: float, nll_coef: float = 0.0, nll_reduction: str = "seq_sum", disable_prompt_loss: bool = True
) -> Gradient:
    """lo the argument of s; c_w = -lambda s(-lo) / (n_w (1 - e^p)) - nll, c_l = lambda s(-lo) / (n_l (1 - e^q))."""
    g = -beta * torch.sigmoid(-_log_odds_margin(x))
    nll = _d_nll(x, nll_coef, nll_reduction, not disable_prompt_loss)
    chosen = g * _d_log_odds(x.chosen_logps / x.chosen_len) / x.chosen_len
    return chosen + nll, -g * _d_log_odds(x.rejected_logps / x.rejected_len) / x.rejected_len


_HIGHEST = -1e-6  # mean log-probability from which the odds are taken as constant


def _log_odds_margin(x: Pairs) -> Tensor:
    return _log_odds(x.chosen_logps / x.chosen_len) - _log_odds(x.rejected_logps / x.rejected_len)


def _log_odds(p: Tensor) -> Tensor:
    p = _at_most(p, _HIGHEST)
    return p - torch.where(p > -math.log(2), torch.log(-torch.expm1(p)), torch.log1p(-torch.exp(p)))


def _d_log_odds(p: Tensor) -> Tensor:
    return torch.where(p <= _HIGHEST, -1 / torch.expm1(_at_most(p, _HIGHEST)), 0.0)


def cpo(
    x: Pairs, *, beta: float, label_smoothing: float = 0.0, cpo_alpha: float = 0.0, nll_reduction: str = "seq_sum"
) -> Tensor:
    """-log s(beta (lw - ll)) + alpha NLL(chosen). CPO, 2401.08417; alpha is `cpo_alpha`."""
    return _logistic(beta * (x.chosen_logps - x.rejected_logps), label_smoothing) + _nll(x, cpo_alpha, nll_reduction)


def d_cpo(
    x: Pairs, *, beta: float, label_smoothing: float = 0.0, cpo_alpha: float = 0.0, nll_reduction: str = "seq_sum"
) -> Gradient:
    """c_w = beta (s(beta (lw - ll)) - (1 - e)) - nll, c_l = -beta (s(beta (lw - ll)) - (1 - e))."""
    g = beta * _d_logistic(beta * (x.chosen_logps - x.rejected_logps), label_smoothing)
    return g + _d_nll(x, cpo_alpha, nll_reduction), -g


def cpo_simpo(
    x: Pairs, *, beta: float, gamma_beta_ratio: float, label_smoothing: float = 0.0, cpo_alpha: float = 0.0,
    nll_reduction: str = "seq_sum",
) -> Tensor:  # fmt: skip
    """simpo + alpha NLL(chosen). CPO-SimPO: SimPO, 2405.14734, with CPO's NLL; alpha is `cpo_alpha`."""
    loss = simpo(x, beta=beta, gamma_beta_ratio=gamma_beta_ratio, label_smoothing=label_smoothing)
    return loss + _nll(x, cpo_alpha, nll_reduction)


def d_cpo_simpo(
    x: Pairs, *, beta: float, gamma_beta_ratio: float, label_smoothing: float = 0.0, cpo_alpha: float = 0.0,
    nll_reduction: str = "seq_sum",
) -> Gradient:  # fmt: skip
    """simpo's, with -nll added to c_w."""
    chosen, rejected = d_simpo(x, beta=beta, gamma_beta_ratio=gamma_beta_ratio, label_smoothing=label_smoothing)
    return chosen + _d_nll(x, cpo_alpha, nll_reduction), rejected


def rpo(x: Pairs, *, beta: float, rpo_alpha: float = 0.0, nll_reduction: str = "seq_sum") -> Tensor:
    """-log s(beta delta) + eta NLL(chosen). RPO, 2405.16436; eta is `rpo_alpha`."""
    return _logistic(beta * x.delta) + _nll(x, rpo_alpha, nll_reduction)


def d_rpo(x: Pairs, *, beta: float, rpo_alpha: float = 0.0, nll_reduction: str = "seq_sum") -> Gradient:
    """c_w = -beta s(-beta delta) - nll, c_l = beta s(-beta delta)."""
    g = beta * _d_logistic(beta * x.delta)
    return g + _d_nll(x, rpo_alpha, nll_reduction), -g


def slic(x: Pairs, *, delta: float, lambda_coef: float = 0.0, nll_reduction: str = "seq_sum") -> Tensor:
    """max(0, d - lw + ll) + lambda NLL(chosen). SLiC-HF, 2305.10425; d is `delta`, lambda `lambda_coef`."""
    return torch.relu(delta - x.chosen_logps + x.rejected_logps) + _nll(x, lambda_coef, nll_reduction)


def d_slic(x: Pairs, *, delta: float, lambda_coef: float = 0.0, nll_reduction: str = "seq_sum") -> Gradient:
    """c_w = -[d - lw + ll > 0] - nll, c_l = [d - lw + ll > 0]."""
    g = (delta - x.chosen_logps + x.rejected_logps > 0).to(x.chosen_logps.dtype)
    return _d_nll(x, lambda_coef, nll_reduction) - g, g
