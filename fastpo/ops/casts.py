"""Weights in the dtype that they are multiplied in, made once while they do not change.

Autocast keeps its casts of trained fp32 weights by itself, for as long as it is nested; what casts by its own rule (the
head's ops, LoRA layers) keeps them here. Nothing is kept outside `keeping`. One store for all threads: a checkpointed
layer is computed again in autograd's.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_depth = 0
# By (what, the tensors' ids, grad mode): the tensors, so that no other takes their ids; their versions; what was made.
_kept: dict[Hashable, tuple[tuple[Tensor, ...], tuple[int, ...], Any]] = {}
scratch: dict[int, Any] = {}  # what layers of one pass leave for each other; it may hold a pass's graph


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """Inside, in which weights do not change but by operations that PyTorch counts, each is cast once. Nests."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            clear()


def clear() -> None:
    """Lets go of what is kept."""
    _kept.clear()
    scratch.clear()


def once(what: Hashable, tensors: Sequence[Tensor], make: Callable[[], Any]) -> Any:
    """`make()`, which depends on `what` and on these tensors alone; inside `keeping`, what it returned before."""
    if _depth == 0 or any(t.is_inference() for t in tensors):
        return make()
    key = (what, tuple(map(id, tensors)), torch.is_grad_enabled())
    versions = tuple(t._version for t in tensors)
    found = _kept.get(key)
    if found is None or found[1] != versions:
        found = _kept[key] = tuple(tensors), versions, make()
    return found[2]


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`, differentiably; a parameter's cast is kept."""
    if tensor.dtype == dtype or torch.compiler.is_compiling() or not isinstance(tensor, nn.Parameter):
        return tensor.to(dtype)
    return once(dtype, (tensor,), lambda: tensor.to(dtype))
