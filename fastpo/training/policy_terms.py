"""Losses per token in training: what they read of a batch of responses that the policy gave, and their metrics.

N = head rows (completion tokens), S = responses.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpo.data.packing import PackedBatch
from fastpo.losses.table import Term
from fastpo.losses.token_metrics import token_metrics
from fastpo.losses.tokens import TokenLoss, Tokens, Totals
from fastpo.models.policy import ENTROPY

# Names in PackedBatch.tokens and Example.token_columns, beside data.example.REF_LOGP: of the policy that sampled, of
# the sampler itself, what corrects for the difference of the two; which tokens count, in all and in the policy term.
OLD_LOGP, SAMPLER_LOGP, CORRECTION = "old_logp", "sampler_logp", "correction"
MASK, POLICY_MASK = "mask", "policy_mask"


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


def entropy_sum(batch: PackedBatch) -> Tensor:
    """Of the batch's tokens that have a policy term, differentiable. -> []"""
    entropy = batch.rows[ENTROPY]
    for mask in (batch.tokens.get(MASK), batch.tokens.get(POLICY_MASK)):
        entropy = entropy if mask is None else entropy * mask
    return entropy.sum()


class PolicyMetrics:
    """What a run of a loss per token logs of its steps, under TRL's names (losses/token_metrics.py).

    Responses that did not go through the model, since nothing of them trains, count as responses that are not clipped.
    """

    def __init__(self, term: Term):
        assert isinstance(term.loss, TokenLoss)
        self.loss, self.hyper = term.loss, dict(term.hyper)
        one = torch.zeros(1)
        nothing = Tokens(one, one, torch.tensor([0, 1]), ref_logp=one)
        found = token_metrics(self.loss, nothing, **self.hyper)
        self.means, self.lowest, self.highest = list(found.means), list(found.lowest), list(found.highest)
        self.names = [*self.means, *self.lowest, *self.highest]
        self.of_responses = self.loss.name == "rloo" or self.hyper.get("importance_sampling_level") == "sequence"

    # Sums are those of the means, how many responses they are of, the lowest numbers and the highest. [1 + len(names)]

    def nothing(self, device: torch.device) -> Tensor:
        """Sums of no batch."""
        low, high = [torch.inf] * len(self.lowest), [-torch.inf] * len(self.highest)
        return torch.tensor([0.0] * (len(self.means) + 1) + low + high, device=device)

    def sums(self, x: Tokens) -> Tensor:
        """Of a batch, fp32."""
        found = token_metrics(self.loss, x, **self.hyper)
        parts = [found.means[name][0] for name in self.means] + [x.logp.new_tensor(x.advantage.numel())]
        parts += [found.lowest[name] for name in self.lowest] + [found.highest[name] for name in self.highest]
        return torch.stack(parts).float()

    def joined(self, a: Tensor, b: Tensor) -> Tensor:
        """The sums of two parts of a step."""
        n, m = len(self.means) + 1, len(self.means) + 1 + len(self.lowest)
        return torch.cat([a[:n] + b[:n], torch.minimum(a[n:m], b[n:m]), torch.maximum(a[m:], b[m:])])

    def of_step(self, sums: Tensor, totals: Totals, world: Any) -> Tensor:
        """A step's numbers [len(names)], of this rank's sums. Every rank calls it."""
        n, m = len(self.means) + 1, len(self.means) + 1 + len(self.lowest)
        total = world.sum_(sums[:n].clone())
        counts = total.new_tensor(
            [totals.responses if self.of_responses and name != "kl" else totals.tokens for name in self.means]
        )
        if self.loss.name == "vespo":  # a weight is known of what went through the model alone
            counts[self.means.index("vespo/phi_seq_mean")] = total[-1]
        means = total[:-1] / counts.clamp(min=1.0)
        out = torch.cat([means, -world.max_(-sums[n:m]), world.max_(sums[m:].clone())])
        return torch.where(torch.isfinite(out), out, 0.0)


def policy_metrics(terms: Sequence[Term]) -> PolicyMetrics | None:
    """Of the run's loss per token, if it has one: it stands alone."""
    return next((PolicyMetrics(t) for t in terms if t.of_tokens), None)
