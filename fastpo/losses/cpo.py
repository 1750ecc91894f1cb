"""TRL's further losses of its CPO trainer: a margin without a reference, beside the NLL of the chosen response.

As the functions of losses/functions.py, with their notation; `cpo` itself and `cpo_simpo` are there.
"""

import torch
from torch import Tensor

from fastpo.losses.functions import Gradient, Pairs, _both, _d_nll, _nll, _per_token


def cpo_hinge(x: Pairs, *, beta: float, cpo_alpha: float = 0.0, nll_reduction: str = "seq_sum") -> Tensor:
    """max(0, 1 - beta (lw - ll)) + alpha NLL(chosen). SLiC's hinge, 2305.10425, and CPO's NLL; alpha is `cpo_alpha`."""
    margin = beta * (x.chosen_logps - x.rejected_logps)
    return torch.relu(1 - margin) + _nll(x, cpo_alpha, nll_reduction)


def d_cpo_hinge(x: Pairs, *, beta: float, cpo_alpha: float = 0.0, nll_reduction: str = "seq_sum") -> Gradient:
    """c_w = -beta [beta (lw - ll) < 1] - nll, c_l = beta [beta (lw - ll) < 1]."""
    margin = beta * (x.chosen_logps - x.rejected_logps)
    chosen, rejected = _both(-beta * (margin < 1).to(margin.dtype))
    return chosen + _d_nll(x, cpo_alpha, nll_reduction), rejected


def cpo_ipo(x: Pairs, *, beta: float, cpo_alpha: float = 0.0, nll_reduction: str = "seq_sum") -> Tensor:
    """(lw/n_w - ll/n_l - 1/(2 tau))^2 + alpha NLL(chosen). IPO, 2310.12036, without a reference and with CPO's NLL; tau
    is `beta`, alpha `cpo_alpha`.
    """
    return (x.mean_margin - 1 / (2 * beta)) ** 2 + _nll(x, cpo_alpha, nll_reduction)


def d_cpo_ipo(x: Pairs, *, beta: float, cpo_alpha: float = 0.0, nll_reduction: str = "seq_sum") -> Gradient:
    """d the squared difference; c_w = 2 d / n_w - nll, c_l = -2 d / n_l."""
    chosen, rejected = _per_token(x, 2 * (x.mean_margin - 1 / (2 * beta)))
    return chosen + _d_nll(x, cpo_alpha, nll_reduction), rejected
