"""What a run of a loss per token logs of a packed batch, by TRL's names: its KL and how much of it was clipped."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpo.losses.token_functions import gamma_weights
from fastpo.losses.tokens import TokenLoss, Tokens, exp, kl, log_ratio

CLIPPED = ("grpo", "dr_grpo", "dapo", "bnpo", "gspo", "luspo", "gmpo", "rloo")


class TokenMetrics(NamedTuple):
    """To be combined over micro-batches and ranks: each scalar []."""

    means: dict[str, tuple[Tensor, Tensor]]  # (sum, count)
    lowest: dict[str, Tensor]  # inf where there is nothing
    highest: dict[str, Tensor]  # -inf


@torch.no_grad()
def token_metrics(loss: TokenLoss, x: Tokens, **hyper: Any) -> TokenMetrics:
    """`kl` where beta is above 0; `clip_ratio/{low,high,region}_mean`, `clip_ratio/low_min` and `clip_ratio/high_max`
    over responses; `cispo_clip_ratio`; `vespo/phi_seq_mean`. A mean is over tokens that count, or over all responses
    where the ratio is one of a response.

    As TRL 1.16's trainers, over whatever is combined instead of one micro-batch.
    """
    hyper = loss.hyper(**hyper)
    level = "sum" if loss.name == "rloo" else str(hyper.get("importance_sampling_level", "token"))
    log_r, a, counts = log_ratio(x, level), x.advantages, x.counts
    out = TokenMetrics({}, {}, {})
    if hyper["beta"] and not loss.own_kl:
        values, _ = kl(x, hyper["kl_estimator"])
        if hyper["use_bias_correction_kl"]:
            values = values * exp(log_ratio(x, str(hyper.get("importance_sampling_level", "token"))))
        out.means["kl"] = (values * counts).sum(), counts.sum()
    elif hyper["beta"]:
        out.means["kl"] = ((x.logp - x.ref_logp) * counts).sum(), counts.sum()
    if loss.name in CLIPPED:
        low = hyper["epsilon"]
        high = low if hyper["epsilon_high"] is None else hyper["epsilon_high"]
        r = log_r if loss.name == "gmpo" else exp(log_r) - 1
        if hyper.get("delta") is not None:
            r = r.clamp(max=hyper["delta"] - 1)
        below, above = ((r < -low) & (a < 0)).to(r.dtype), ((r > high) & (a > 0)).to(r.dtype)
        for name, clipped in (("low", below), ("high", above), ("region", below + above)):
            out.means[f"clip_ratio/{name}_mean"] = _mean(x, clipped, level)
        out.lowest["clip_ratio/low_min"] = _of_responses(x, below, level).nan_to_num(nan=math.inf).amin()
        out.highest["clip_ratio/high_max"] = _of_responses(x, above, level).nan_to_num(nan=-math.inf).amax()
    elif loss.name == "cispo":
        out.means["cispo_clip_ratio"] = _mean(x, ((exp(log_r) > hyper["epsilon_high"]) & (a > 0)).to(a.dtype), level)
    elif loss.name == "vespo":
        phi = gamma_weights(x, **{k: v for k, v in hyper.items() if k.startswith("vespo_")})
        out.means["vespo/phi_seq_mean"] = phi.sum(), torch.ones_like(phi).sum()
    return out


def _of_responses(x: Tokens, values: Tensor, level: str) -> Tensor:
    """The mean over each response's tokens that count, [S], NaN without one; of a response's ratio its own value."""
    if level == "token":
        return x.total(values * x.counts) / x.total(x.counts)
    return x.total(values) / x.offsets.diff()


def _mean(x: Tokens, values: Tensor, level: str) -> tuple[Tensor, Tensor]:
    if level == "token":
        return (values * x.counts).sum(), x.counts.sum()
    own = _of_responses(x, values, level).nan_to_num(nan=0.0)
    return own.sum(), torch.ones_like(own).sum()
