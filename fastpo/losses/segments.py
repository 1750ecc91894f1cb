"""Sums over runs of rows, and their counterpart."""

import torch
from torch import Tensor


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sums of `values` [N] between consecutive `offsets` [S + 1]; deterministic and differentiable. -> [S]

    A segment is summed in order, one value after another: hence in fp64.
    """
    return torch.segment_reduce(values.double(), "sum", offsets=offsets.long(), initial=0).to(values.dtype)


def segment_ids(offsets: Tensor, rows: int) -> Tensor:
    """The segment of each of `rows` rows, given `offsets` [S + 1] -> [N] int64; `values[ids]` spreads [S] over [N]."""
    lengths = offsets.long().diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=offsets.device), lengths, output_size=rows)
