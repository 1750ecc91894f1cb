"""Losses of rewards: numbers of a scalar head, one a response, in the place of log-probabilities.

As fastpo/losses/functions.py, with its notation: lw and ll are the rewards of the chosen and the rejected response, m
the pair's margin.
"""

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


def _above_margin(x: Pairs) -> Tensor:
    z = x.chosen_logps - x.rejected_logps
    return z if x.margin is None else z - x.margin
