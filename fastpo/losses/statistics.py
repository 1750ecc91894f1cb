"""Losses that read more than a pair's own numbers: a previous policy, the whole batch, unpaired or K responses, ...

As fastpo/losses/functions.py, with its notation. They take their statistics as arguments; docs/losses.md says which of
them `fastpo.train` forms.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpo.losses.functions import Gradient, Pairs, _both, _d_logistic, _logistic, _slope, d_dpo, dpo

# ----------------------------------------------------------------------------- previous policy: DNO, INPO, SELM, XPO


def dno(x: Pairs, *, beta: float, score_scale: float = 1.0) -> Tensor:
    """-z log s(beta delta) - (1 - z) log s(-beta delta), z = s(k (p_w - p_l)). DNO, 2404.03715 eq. 8 and 12.

    The reference is the previous iterate, p each response's probability of beating it, beta the paper's eta, k
    `score_scale`.
    """
    return _logistic(beta * x.delta, torch.sigmoid(score_scale * (x.win_prob_rejected - x.win_prob_chosen)))


def d_dno(x: Pairs, *, beta: float, score_scale: float = 1.0) -> Gradient:
    """c_w = -c_l = beta (s(beta delta) - z)."""
    smoothing = torch.sigmoid(score_scale * (x.win_prob_rejected - x.win_prob_chosen))
    return _both(beta * _d_logistic(beta * x.delta, smoothing))


def dno_prct(x: Pairs, *, beta: float) -> Tensor:
    """-log s(beta delta), the reference being the previous iterate. DNO-Prct, 2404.03715 eq. 13."""
    return _logistic(beta * x.delta)


def d_dno_prct(x: Pairs, *, beta: float) -> Gradient:
    """c_w = -c_l = -beta s(-beta delta)."""
    return d_dpo(x, beta=beta)


def dno_reg(x: Pairs, *, beta: float, kappa: float, score_scale: float = 1.0) -> Tensor:
    """dno, or dno_prct where there are no win probabilities, with the reference (1 - kappa) t + kappa r.

    Regularised DNO, 2404.03715 appendix A: t is the previous policy's log-probability, r the reference's, kappa =
    tau/eta.
    """
    mixed = _mixed_reference(x, kappa)
    return dno_prct(mixed, beta=beta) if x.win_prob_chosen is None else dno(mixed, beta=beta, score_scale=score_scale)


def d_dno_reg(x: Pairs, *, beta: float, kappa: float, score_scale: float = 1.0) -> Gradient:
    """dno's, or dno_prct's, with delta on the mixed reference."""
    mixed = _mixed_reference(x, kappa)
    return d_dpo(mixed, beta=beta) if x.win_prob_chosen is None else d_dno(mixed, beta=beta, score_scale=score_scale)


def _mixed_reference(x: Pairs, kappa: float) -> Pairs:
    return x._replace(
        ref_chosen_logps=(1 - kappa) * x.prev_chosen_logps + kappa * x.ref_chosen_logps,
        ref_rejected_logps=(1 - kappa) * x.prev_rejected_logps + kappa * x.ref_rejected_logps,
    )


def inpo(x: Pairs, *, eta: float, kappa: float) -> Tensor:
    """(h - 1/(2 eta))^2, h = (lw - ll) - kappa (rw - rl) - (1 - kappa) (tw - tl). INPO, 2407.00617 eq. 8.

    kappa = tau/eta.
    """
    return (_mixed_reference(x, kappa).delta - 1 / (2 * eta)) ** 2


def d_inpo(x: Pairs, *, eta: float, kappa: float) -> Gradient:
    """c_w = -c_l = 2 (h - 1/(2 eta))."""
    return _both(2 * (_mixed_reference(x, kappa).delta - 1 / (2 * eta)))


def selm(x: Pairs, *, beta: float, alpha: float) -> Tensor:
    """-log s(beta delta) + alpha beta (lg - rg), g the reference's greedy response. SELM, 2405.19332 eq. 4.2."""
    return dpo(x, beta=beta) + alpha * beta * (x.greedy_logps - x.ref_greedy_logps)


def d_selm(x: Pairs, *, beta: float, alpha: float) -> Gradient:
    """dpo's; and c_g = alpha beta of the greedy response, which is pushed down."""
    return d_dpo(x, beta=beta)


def xpo(x: Pairs, *, beta: float, alpha: float) -> Tensor:
    """-log s(beta delta) + alpha log pi(y), y the response of the pair that was sampled from the reference,
    which is pushed down. XPO, 2405.21046.
    """
    return dpo(x, beta=beta) + alpha * torch.where(x.chosen_of_reference, x.chosen_logps, x.rejected_logps)


def d_xpo(x: Pairs, *, beta: float, alpha: float) -> Gradient:
    """dpo's, with alpha added to that of the reference's sample."""
    chosen, rejected = d_dpo(x, beta=beta)
    assert rejected is not None
    of_reference = x.chosen_of_reference.to(chosen.dtype)
    return chosen + alpha * of_reference, rejected + alpha * (1 - of_reference)


# ------------------------------------------------------------------------------------- DPO on other sums, or weighted


def wpo(x: Pairs, *, beta: float, clamp_weight: bool = True) -> Tensor:
    """min(1, w_w w_l) (-log s(beta delta)), w = exp(mean_t(log p_t - log sum_v p_v^2)), detached. WPO, 2406.11827."""
    return _wpo_weight(x, clamp_weight) * dpo(x, beta=beta)


def d_wpo(x: Pairs, *, beta: float, clamp_weight: bool = True) -> Gradient:
    """dpo's times the weight."""
    weight = _wpo_weight(x, clamp_weight)
    return _both(weight * d_dpo(x, beta=beta)[0])


def _wpo_weight(x: Pairs, clamp_weight: bool) -> Tensor:
    chosen = (x.chosen_logps - x.chosen_log_sum_sq) / x.chosen_len
    rejected = (x.rejected_logps - x.rejected_log_sum_sq) / x.rejected_len
    weight = torch.exp((chosen + rejected).detach())
    return weight.clamp(max=1.0) if clamp_weight else weight


def ld_dpo(x: Pairs, *, beta: float, ld_alpha: float) -> Tensor:
    """dpo with the tokens past min(n_w, n_l) weighted by alpha, for policy and reference. LD-DPO, 2409.06411."""
    return dpo(_without_tails(x, ld_alpha), beta=beta)


def d_ld_dpo(x: Pairs, *, beta: float, ld_alpha: float) -> Gradient:
    """dpo's, on the weighted sums; a token of the tail gets alpha times its response's."""
    return d_dpo(_without_tails(x, ld_alpha), beta=beta)


def _without_tails(x: Pairs, ld_alpha: float) -> Pairs:
    less = 1 - ld_alpha
    return x._replace(
        chosen_logps=x.chosen_logps - less * x.chosen_tail_logps,
        rejected_logps=x.rejected_logps - less * x.rejected_tail_logps,
        ref_chosen_logps=x.ref_chosen_logps - less * x.ref_chosen_tail_logps,
        ref_rejected_logps=x.ref_rejected_logps - less * x.ref_rejected_tail_logps,
    )


def sampo(x: Pairs, *, beta: float) -> Tensor:
    """dpo on sums over min(n_w, n_l) tokens of each response, drawn once for policy and reference. SamPO, 2406.10957.

    The four log-probabilities given are those sums.
    """
    return dpo(x, beta=beta)


def d_sampo(x: Pairs, *, beta: float) -> Gradient:
    """dpo's, for the tokens drawn; 0 for the others."""
    return d_dpo(x, beta=beta)


def tdpo1(x: Pairs, *, beta: float) -> Tensor:
    """-log s(beta (delta - (D_l - D_w))), D = sum_t KL(reference || policy). TDPO, 2404.11999."""
    return _logistic(beta * (x.delta - (x.rejected_kl - x.chosen_kl)))


def d_tdpo1(x: Pairs, *, beta: float) -> Gradient:
    """u the argument of s; c_w = -c_l = -beta s(-u); and the same two for D_w and D_l."""
    return _both(beta * _d_logistic(beta * (x.delta - (x.rejected_kl - x.chosen_kl))))


def tdpo2(x: Pairs, *, beta: float, alpha: float) -> Tensor:
    """-log s(beta (delta - alpha (D_l - D_w))), no gradient through D_w. TDPO2, 2404.11999."""
    return _logistic(beta * (x.delta - alpha * (x.rejected_kl - x.chosen_kl.detach())))


def d_tdpo2(x: Pairs, *, beta: float, alpha: float) -> Gradient:
    """u the argument of s; c_w = -c_l = -beta s(-u); and alpha beta s(-u) for D_l."""
    return _both(beta * _d_logistic(beta * (x.delta - alpha * (x.rejected_kl - x.chosen_kl))))


# ---------------------------------------------------------------------------------------------------- whole batches


def aot(x: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """dpo on sorted margins: of the i-th smallest lw - ll minus the i-th smallest rw - rl. AOT, 2406.05882.

    The sort is over the pairs given, which should be the whole step; losses come in that order.
    """
    policy = (x.chosen_logps - x.rejected_logps).sort(stable=True).values
    reference = (x.ref_chosen_logps - x.ref_rejected_logps).sort(stable=True).values
    return _logistic(beta * (policy - reference), label_smoothing)


def d_aot(x: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Gradient:
    """c_w = -c_l = beta (s(z) - (1 - e)) of a pair's place in the order of lw - ll."""
    policy = (x.chosen_logps - x.rejected_logps).sort(stable=True)
    reference = (x.ref_chosen_logps - x.ref_rejected_logps).sort(stable=True).values
    g = beta * _d_logistic(beta * (policy.values - reference), label_smoothing)
    return _both(torch.empty_like(g).scatter_(0, policy.indices, g))


def aot_unpaired(x: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """dpo on the i-th smallest a minus the i-th smallest b. AOT, 2406.05882, unpaired; as many chosen as rejected."""
    a, b = (t.sort(stable=True).values for t in (x.chosen_logratios, x.rejected_logratios))
    return _logistic(beta * (a - b), label_smoothing)


def d_aot_unpaired(x: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Gradient:
    """c = +-beta (s(z) - (1 - e)) of a response's place in the order of its log-ratios."""
    a, b = (t.sort(stable=True) for t in (x.chosen_logratios, x.rejected_logratios))
    g = beta * _d_logistic(beta * (a.values - b.values), label_smoothing)
    return torch.empty_like(g).scatter_(0, a.indices, g), torch.empty_like(g).scatter_(0, b.indices, -g)


def kto(x: Pairs, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Tensor:
    """lambda_D s(beta (z0 - a)) if desirable, lambda_U s(beta (a - z0)) if not; z0 = max(0, kl). KTO, 2402.01306.

    Unpaired: log-probabilities, `ref_chosen_logps` and `label` are [S]; `kl` is the mean log-ratio of mismatched
    prompts and responses over the whole step, without gradient.
    """
    weight, u = _kto_terms(x, beta, desirable_weight, undesirable_weight)
    return weight * torch.sigmoid(-u)


def d_kto(x: Pairs, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Gradient:
    """c = -lambda_D beta s'(beta (a - z0)) if desirable, lambda_U beta s'(beta (z0 - a)) if not."""
    weight, u = _kto_terms(x, beta, desirable_weight, undesirable_weight)
    return torch.where(x.label, -weight, weight) * beta * _slope(u), None


def _kto_terms(x: Pairs, beta: float, desirable: float, undesirable: float) -> tuple[Tensor, Tensor]:
    a = x.chosen_logratios
    u = beta * (a - x.kl.detach().clamp(min=0))
    weight = torch.where(x.label, torch.full_like(a, desirable), torch.full_like(a, undesirable)).detach()
    return weight, torch.where(x.label, u, -u)


def apo_zero_unpaired(
    x: Pairs, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """lambda_D s(-beta a) if desirable, lambda_U s(beta a) if not. APO-zero, 2408.06266 eq. 7, of single responses.

    Unpaired: log-probabilities, `ref_chosen_logps` and `label` are [S]. It is kto with z0 = 0: nothing of the step.
    """
    return kto(_without_kl(x), beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)


def d_apo_zero_unpaired(
    x: Pairs, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Gradient:
    """c = -lambda_D beta s'(beta a) if desirable, lambda_U beta s'(beta a) if not."""
    return d_kto(_without_kl(x), beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)


def _without_kl(x: Pairs) -> Pairs:
    return x._replace(kl=x.chosen_logps.new_zeros(()))


def bco(x: Pairs, *, beta: float) -> Tensor:
    """-log s(beta a - d) if desirable, -log s(-(beta a - d)) if not; d the running mean of beta a. BCO, 2404.04656.

    Unpaired: log-probabilities, `ref_chosen_logps` and `label` are [S]; d is `reward_mean`, without gradient.
    """
    u = beta * x.chosen_logratios - x.reward_mean.detach()
    return -logsigmoid(torch.where(x.label, u, -u))


def d_bco(x: Pairs, *, beta: float) -> Gradient:
    """c = -beta s(-(beta a - d)) if desirable, beta s(beta a - d) if not."""
    u = beta * x.chosen_logratios - x.reward_mean
    return torch.where(x.label, -beta * torch.sigmoid(-u), beta * torch.sigmoid(u)), None


# ------------------------------------------------------------------------------------------------------- K responses


def exo_rw(x: Pairs, *, beta: float, beta_r: float) -> Tensor:
    """KL(softmax_k(beta a_k) || softmax_k(r_k/beta_r)). EXO with rewards, 2402.00856.

    K responses: log-probabilities, `ref_chosen_logps` and `scores` are [P, K].
    """
    p, gap = _exo_terms(x, beta, beta_r)
    return (p * gap).sum(-1)


def d_exo_rw(x: Pairs, *, beta: float, beta_r: float) -> Gradient:
    """c_j = beta p_j [(log p_j - log q_j) - L]."""
    p, gap = _exo_terms(x, beta, beta_r)
    return beta * p * (gap - (p * gap).sum(-1, keepdim=True)), None


def _exo_terms(x: Pairs, beta: float, beta_r: float) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(beta * x.chosen_logratios, -1)
    return log_p.exp(), log_p - torch.log_softmax(x.scores / beta_r, -1)


def infonca(x: Pairs, *, beta: float, temperature: float) -> Tensor:
    """-sum_k w_k log softmax_k(beta a), w = softmax(r/T). InfoNCA, 2402.05369.

    K responses: log-probabilities, `ref_chosen_logps` and `scores` are [P, K].
    """
    weight = torch.softmax(x.scores / temperature, -1)
    return -(weight * torch.log_softmax(beta * x.chosen_logratios, -1)).sum(-1)


def d_infonca(x: Pairs, *, beta: float, temperature: float) -> Gradient:
    """c_j = beta (softmax_j(beta a) - w_j)."""
    weight = torch.softmax(x.scores / temperature, -1)
    return beta * (torch.softmax(beta * x.chosen_logratios, -1) - weight), None


def nca_rw(x: Pairs, *, beta: float, temperature: float) -> Tensor:
    """-sum_k w_k log s(beta a_k) - (1/K) sum_k log s(-beta a_k), w = softmax(r/T). NCA with rewards, 2402.05369.

    K responses: log-probabilities, `ref_chosen_logps` and `scores` are [P, K].
    """
    weight, u = torch.softmax(x.scores / temperature, -1), beta * x.chosen_logratios
    return -(weight * logsigmoid(u)).sum(-1) - logsigmoid(-u).mean(-1)


def d_nca_rw(x: Pairs, *, beta: float, temperature: float) -> Gradient:
    """c_j = beta (s(beta a_j)/K - w_j s(-beta a_j))."""
    weight, u = torch.softmax(x.scores / temperature, -1), beta * x.chosen_logratios
    return beta * (torch.sigmoid(u) / u.shape[-1] - weight * torch.sigmoid(-u)), None
