"""Losses per token in training: what they read of a batch of responses that the policy gave, and their metrics.

N = head rows (completion tokens), S = responses.
"""

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

# Sums over a step's tokens: KL to the reference, tokens clipped from below and from above; of its responses the least
# and the largest part that is.
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
    take it further, as TRL counts them."""
    low, high = clip_range(term)
    ratio, counts, advantages = log_ratio(x, _level(term)).exp(), x.counts, x.advantages
    below, above = ((ratio < low) & (advantages < 0)) * counts, ((ratio > high) & (advantages > 0)) * counts
    divergence = x.logp.new_zeros(())
    if x.ref_logp is not None and term.beta:
        divergence = (kl(x, term.hyper.get("kl_estimator", "k3"))[0] * counts).sum()
    lengths = x.length(counts)
    least, most = (x.total(below) / lengths).amin(), (x.total(above) / lengths).amax()
    return torch.stack([divergence, below.sum(), above.sum(), least, most]).float()


def _level(term: Term) -> str:
    return str(term.hyper.get("importance_sampling_level", "token"))


def clip_range(term: Term) -> tuple[float, float]:
    """Of ratios; without bounds where a loss clips none."""
    low = term.hyper.get("epsilon")
    if low is None:
        return -torch.inf, torch.inf
    high = term.hyper.get("epsilon_high")
    return 1 - low, 1 + (low if high is None else high)


def joined(a: Tensor, b: Tensor) -> Tensor:
    """The sums of two parts of a step."""
    return torch.cat([a[:3] + b[:3], torch.minimum(a[3:4], b[3:4]), torch.maximum(a[4:], b[4:])])


def policy_of_ranks(sums: Tensor, totals: Totals | None, world: Any) -> Tensor:
    """A step's means [POLICY_SUMS], of this rank's sums; tokens that did not go through the model are not clipped."""
    assert totals is not None
    least, most = sums[3:4], sums[4:].clone()
    world.max_(most)
    least = -world.max_(-least)
    of_step = world.sum_(sums[:3].clone()) / max(totals.tokens, 1.0)
    extremes = torch.cat([least, most])
    return torch.cat([of_step, torch.where(torch.isfinite(extremes), extremes, 0.0)])


def policy_means(sums: Sequence[float], steps: float, terms: Sequence[Term]) -> dict[str, float]:
    """TRL's keys, from means over a step's tokens that are summed over `steps`."""
    if not steps:
        return {}
    kl, low, high, least, most = (value / steps for value in sums)
    out = {"kl": kl} if any(t.beta for t in terms) else {}
    if all(clip_range(t)[1] == torch.inf for t in terms):
        return out
    return out | {"clip_ratio/low_mean": low, "clip_ratio/low_min": least, "clip_ratio/high_mean": high,
                  "clip_ratio/high_max": most, "clip_ratio/region_mean": low + high}  # fmt: skip
