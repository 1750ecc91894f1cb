"""Losses of what a head beside the language model's says of a response, in the place of log-probabilities: a reward,
one number, or the logits of its degree.

As fastpo/losses/functions.py, with its notation: lw and ll are the rewards of the chosen and the rejected response, m
the pair's margin.
"""

import torch
from torch import Tensor

from fastpo.losses.functions import Gradient, Pairs, _d_logistic, _logistic


def reward(x: Pairs, *, center_rewards_coefficient: float = 0.0) -> Tensor:
    """-log s(lw - ll - m) + c (lw + ll)^2, of rewards lw, ll and a margin m (0 without one). Bradley-Terry, as
    InstructGPT's reward model, 2203.02155; m as Llama 2's, 2307.09288; c, `center_rewards_coefficient`, 2312.09244.
    """
    out = _logistic(_above_margin(x))
    if center_rewards_coefficient:
        out = out + center_rewards_coefficient * (x.chosen_logps + x.rejected_logps) ** 2
    return out


def d_reward(x: Pairs, *, center_rewards_coefficient: float = 0.0) -> Gradient:
    """z = lw - ll - m; c_w = -s(-z) + 2 c (lw + ll), c_l = s(-z) + 2 c (lw + ll)."""
    g = _d_logistic(_above_margin(x))
    pull = 2 * center_rewards_coefficient * (x.chosen_logps + x.rejected_logps)
    return g + pull, pull - g


def degree_aux(x: Pairs, *, degrees: int = 4) -> Tensor:
    """-log softmax(z)_d of a response's logits z [D], by a linear head at the hidden state of its last token, and its
    degree d, from 0 (whole) to D - 1, `degrees` in all. The preference-degree term of SPO, 2409.17791; added to a loss
    of pairs.
    """
    return -x.chosen_logps.log_softmax(-1).gather(1, _degree(x)[:, None])[:, 0]


def d_degree_aux(x: Pairs, *, degrees: int = 4) -> Gradient:
    """dL/dz_k = softmax(z)_k - 1[k = d]."""
    return x.chosen_logps.softmax(-1) - torch.nn.functional.one_hot(_degree(x), x.chosen_logps.shape[1]), None


def _degree(x: Pairs) -> Tensor:
    assert x.degree is not None
    return x.degree.long()


def _above_margin(x: Pairs) -> Tensor:
    z = x.chosen_logps - x.rejected_logps
    return z if x.margin is None else z - x.margin
