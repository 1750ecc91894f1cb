"""Losses per token in training: what they read of a batch of responses that the policy gave, and their metrics.

N = head rows (completion tokens), S = responses.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpo.data.packing import PackedBatch
from fastpo.losses.table import Term
from fastpo.losses.tokens import TokenLoss, Tokens, Totals, kl, log_ratio
from fastpo.models.policy import ENTROPY

# Names in PackedBatch.tokens and Example.token_columns, beside data.example.REF_LOGP: of the policy that sampled, of
# the sampler itself, what corrects for the difference of the two; which tokens count, in all and in the policy term.
OLD_LOGP, SAMPLER_LOGP, CORRECTION = "old_logp", "sampler_logp", "correction"
MASK, POLICY_MASK = "mask", "policy_mask"

# Of a step: KL to the reference summed over tokens, how many tokens or responses are clipped from below and from above,
# and of its responses the least and the largest part that is.
POLICY_SUMS = 5


def token_inputs(logp: Tensor, batch: PackedBatch) -> Tokens:
    """What losses per token read, differentiable in `logp` [N]."""
    assert batch.advantage is not None
    of = batch.tokens.get
    return Tokens(logp, batch.advantage, batch.response_offsets, of(OLD_LOGP), batch.ref_logp, of(CORRECTION),
                  of(SAMPLER_LOGP), of(MASK), of(POLICY_MASK))  # fmt: skip


def policy_loss(term: Term, x: Tokens, totals: Totals) -> Tensor:
    """The batch's share of the step's loss, differentiable. -> []"""
    assert isinstance(term.loss, TokenLoss)
    return term.loss.of(x, totals, **term.hyper)


def entropy_bonus(batch: PackedBatch, totals: Totals) -> Tensor:
    """The batch's share of the mean entropy of the step's tokens, differentiable. -> []"""
    entropy = batch.rows[ENTROPY]
    for mask in (batch.tokens.get(MASK), batch.tokens.get(POLICY_MASK)):
        entropy = entropy if mask is None else entropy * mask
    return entropy.sum() / max(totals.tokens, 1.0)


def no_policy_sums(device: torch.device) -> Tensor:
    """Of no token."""
    return torch.tensor([0.0, 0.0, 0.0, torch.inf, -torch.inf], device=device)


@torch.no_grad()
def policy_sums(term: Term, x: Tokens) -> Tensor:
    """Of a batch [POLICY_SUMS] fp32; a token is clipped where its ratio is outside the range and the advantage would
    take it further, as TRL counts them; where ratios are of whole responses, those are counted."""
    (low, high), level = clip_range(term), _level(term)
    ratio, counts, advantages = log_ratio(x, level).exp(), x.counts, x.advantages
    divergence = x.logp.new_zeros(())
    if x.ref_logp is not None and term.beta:
        of_each = kl(x, term.hyper.get("kl_estimator", "k3"))[0]
        if term.hyper.get("use_bias_correction_kl"):
            of_each = of_each * ratio
        divergence = (of_each * counts).sum()
    if term.hyper.get("delta") is not None:
        ratio = ratio.clamp(max=term.hyper["delta"])
    below, above = ((ratio < low) & (advantages < 0)) * counts, ((ratio > high) & (advantages > 0)) * counts
    lengths = x.length(counts)
    lows, highs = x.total(below) / lengths, x.total(above) / lengths
    counted = (below.sum(), above.sum()) if level == "token" else (lows.sum(), highs.sum())
    return torch.stack([divergence, *counted, lows.amin(), highs.amax()]).float()


def _level(term: Term) -> str:
    """Of what a ratio is that may be clipped."""
    return "sum" if term.name == "rloo" else str(term.hyper.get("importance_sampling_level", "token"))


def clip_range(term: Term) -> tuple[float, float]:
    """Of ratios; without bounds where a loss clips none."""
    low, high = term.hyper.get("epsilon"), term.hyper.get("epsilon_high")
    if low is None:
        return -math.inf, math.inf if high is None else high
    high = low if high is None else high
    return (math.exp(-low), math.exp(high)) if term.name == "gmpo" else (1 - low, 1 + high)


def joined(a: Tensor, b: Tensor) -> Tensor:
    """The sums of two parts of a step."""
    return torch.cat([a[:3] + b[:3], torch.minimum(a[3:4], b[3:4]), torch.maximum(a[4:], b[4:])])


def policy_of_ranks(sums: Tensor, totals: Totals | None, terms: Sequence[Term], world: Any) -> Tensor:
    """A step's means [POLICY_SUMS], of this rank's sums; tokens that did not go through the model are not clipped."""
    assert totals is not None
    least, most = sums[3:4], sums[4:].clone()
    world.max_(most)
    least = -world.max_(-least)
    clipped = totals.tokens if all(_level(t) == "token" for t in terms) else totals.responses
    of_step = world.sum_(sums[:3].clone()) / sums.new_tensor([totals.tokens, clipped, clipped]).clamp(min=1.0)
    extremes = torch.cat([least, most])
    return torch.cat([of_step, torch.where(torch.isfinite(extremes), extremes, 0.0)])


def policy_means(sums: Sequence[float], steps: float, terms: Sequence[Term]) -> dict[str, float]:
    """TRL's keys, from means of steps that are summed over `steps`."""
    if not steps:
        return {}
    kl, low, high, least, most = (value / steps for value in sums)
    out = {"kl": kl} if any(t.beta for t in terms) else {}
    if all(clip_range(t)[1] == math.inf for t in terms):
        return out
    if all(clip_range(t)[0] == -math.inf for t in terms):
        return out | {"cispo_clip_ratio": high}
    return out | {"clip_ratio/low_mean": low, "clip_ratio/low_min": least, "clip_ratio/high_mean": high,
                  "clip_ratio/high_max": most, "clip_ratio/region_mean": low + high}  # fmt: skip
