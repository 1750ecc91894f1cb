"""Host tensors to the device while it computes; neither the host nor the computation waits.

Little that runs in a training step asks a GPU for an answer (tests/training/test_no_sync.py names what does), so the
host is ahead of it: when a micro-batch's `backward()` returns, its kernels are queued and still running, and the next
one is collated and pinned meanwhile, by the plain order of the loop. Its copies go through a stream of their own,
beside the kernels; in the stream of the computation they would stand in line behind them.

On a CPU there is no such gap: a thread that collates ahead would take a core from the computation.
"""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor


def to_device(tensors: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """Host tensors on `device`, for work that is queued on its current stream from here on."""
    if device.type != "cuda":
        return [t.to(device) for t in tensors]
    copies, compute = _copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copies):
        # The allocator of pinned memory holds a block back until its copy is done.
        moved = [t.pin_memory().to(device, non_blocking=True) for t in tensors]
    compute.wait_stream(copies)
    for t in moved:  # allocated on one stream, read on another: not given away before that has read it
        t.record_stream(compute)
    return moved


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
