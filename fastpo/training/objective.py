"""What a run minimises: its weighted loss terms, of one micro-batch of a step."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from fastpo.data import prepare as data
from fastpo.data.packing import PackedBatch, nll_count
from fastpo.losses.table import ORDER, SFT, Term
from fastpo.training.metrics import PAIR_METRICS, fused_pair_loss, has_kernel, nll_sum, pair_inputs, pair_metrics
from fastpo.training.stepwide import Statistics


class Objective:
    """The terms of `losses.resolve_terms`, summed. Those of pairs come first in the metrics, the sft terms apart."""

    def __init__(self, terms: Sequence[Term]):
        self.pair_terms = [t for t in terms if t.loss is not None]
        self.sft_terms = [t for t in terms if t.name == SFT]

    def __call__(
        self, logp: Tensor, batch: PackedBatch, stats: Statistics, pair_count: int, nlls: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """This micro-batch's share of the step's loss, and its metrics [len(PAIR_METRICS)], both on the device.
        `pair_count` and `nlls`: what the whole step's losses, and each sft term, are means over."""
        total = logp.new_zeros(())
        metrics = logp.new_zeros(len(PAIR_METRICS))
        for term, count in zip(self.sft_terms, nlls, strict=True):
            nll = nll_sum(logp, batch, term.hyper["nll_reduction"], term.reads_prompt)
            total = total + term.weight / (count or 1) * nll
        if self.pair_terms:
            share, metrics = self.of_pairs(logp, batch, stats)
            total = total + share / pair_count
        return total, metrics

    def nll_counts(self, examples: Iterable[data.Example]) -> list[float]:
        """What each sft term is a mean over, of these examples."""
        rows = list(examples)
        return [sum(nll_count(e, t.hyper["nll_reduction"], t.reads_prompt) for e in rows) for t in self.sft_terms]

    def of_pairs(self, logp: Tensor, batch: PackedBatch, stats: Statistics) -> tuple[Tensor, Tensor]:
        """sum over terms and pairs of weight * loss, and the metrics as sums over pairs."""
        total, metrics, x = logp.new_zeros(()), None, None
        for term in self.pair_terms:
            if has_kernel(term, logp, batch):
                share, of_launch = fused_pair_loss(term, logp, batch)
                metrics = of_launch if term is self.pair_terms[0] else metrics
            else:
                x = pair_inputs(logp, batch) if x is None else x
                if term.loss.of_step == ORDER:
                    share = stats.ordered_loss(x, term, batch)
                else:
                    of_each = stats.loss(term, x, logp, batch)
                    share = (of_each if batch.label is not None else batch.pair_weight * of_each).sum()
            total = total + term.weight * share
        if metrics is None:
            metrics = pair_metrics(x._replace(kl=stats.kl), self.pair_terms[0])
        return total, metrics
