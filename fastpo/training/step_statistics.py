"""What single losses read of a whole step, as numbers: filled by stepwide.py, read by the objective."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastpo.data.packing import PackedBatch
from fastpo.data.prefetch import to_device
from fastpo.losses.table import Pairs, Term
from fastpo.losses.tokens import Totals
from fastpo.training.metrics import list_loss
from fastpo.training.row_statistics import term_inputs


@dataclass
class Statistics:
    """Of one step, or of one evaluation; detached, on the device."""

    kl: Tensor | None = None  # []: mean log-ratio of mismatched prompts and completions
    ratio_mean: Tensor | None = None  # []: running mean of the log-ratios
    pair_at: dict[int, int] = field(default_factory=dict)  # row -> place of its first pair in what follows
    coefficients: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # term -> dL/dlw, dL/dll, each [P]
    means: dict[str, Tensor] = field(default_factory=dict)  # term -> mean loss of the step's pairs, []
    totals: Totals | None = None  # of responses that the policy gave as it trains
    entropy_coef: float = 0.0  # of the bonus for their entropy
    entropy_tokens: float = 0.0  # of which tokens that is the mean
    watches_entropy: bool = False  # whether the coefficient follows the entropy
    router: Tensor | None = None  # [2 E + 1]: training/router_loss.py's sums, where the step is several micro-batches

    def of_term(self, x: Pairs, term: Term) -> Pairs:
        """`x` with what the term's loss reads of the step."""
        mean = None if self.ratio_mean is None else term.beta * self.ratio_mean
        return x._replace(kl=self.kl, reward_mean=mean)

    def loss(self, term: Term, x: Pairs, logp: Tensor, batch: PackedBatch, at: Tensor | None = None) -> Tensor:
        """The term's loss of each pair, each unpaired response, or each row's list of responses; of pairs alone those
        at the places `at`. -> [P]"""
        if term.loss.shape == "lists":
            return list_loss(term, logp, batch)
        x = self.of_term(term_inputs(term, x, logp, batch), term)
        if at is not None:
            x = Pairs(*(c.index_select(0, at) if isinstance(c, Tensor) and c.dim() else c for c in x))
        return term.loss.fn(x, **term.hyper)

    def ordered_loss(self, x: Pairs, term: Term, batch: PackedBatch) -> Tensor:
        """The batch's share of a loss over the order of all pairs: its value, and its gradient for these pairs."""
        at = [self.pair_at[row] + k for row, n in zip(batch.examples, batch.row_pairs, strict=True) for k in range(n)]
        (index,) = to_device([torch.tensor(at)], x.chosen_logps.device)
        chosen, rejected = (c.index_select(0, index) for c in self.coefficients[term.name])
        slope = (chosen * x.chosen_logps + rejected * x.rejected_logps).sum()
        return slope + (self.means[term.name] * len(at) - slope).detach()
