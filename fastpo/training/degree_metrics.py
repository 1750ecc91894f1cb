"""The term of degrees in a step: its loss, and what is logged of it.

E = responses of a degree.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpo.data.packing import PackedBatch
from fastpo.losses.functions import Pairs
from fastpo.losses.table import Term
from fastpo.models.degree_head import LOGITS

DEGREE_SUMS = 3  # cross-entropy, degrees that are the likeliest by the head, responses


def degree_sum(term: Term, batch: PackedBatch) -> Tensor:
    """Weighted losses of the batch's responses of a degree, summed; differentiable in the head's logits. -> []"""
    assert term.loss is not None and batch.degrees is not None and batch.degree_weight is not None
    x = Pairs(batch.rows[LOGITS], None, degree=batch.degrees[:, 1])
    return (batch.degree_weight * term.loss.fn(x, **term.hyper)).sum()


def degree_sums(batch: PackedBatch) -> Tensor:
    """Sums over the batch's responses of a degree, unweighted. -> [DEGREE_SUMS] fp32"""
    logits, degree = batch.rows[LOGITS].detach().float(), batch.degrees[:, 1]
    loss = torch.nn.functional.cross_entropy(logits, degree, reduction="sum")
    right = (logits.argmax(1) == degree).sum()
    return torch.stack([loss, right.to(loss), loss.new_full((), len(degree))])


def degree_means(sums: Sequence[float]) -> dict[str, float]:
    """What a log line says; nothing where no response has a degree."""
    loss, right, count = sums
    return {"degree/loss": loss / count, "degree/accuracy": right / count} if count else {}
