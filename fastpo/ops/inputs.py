"""What every op of the head settles before it runs: that its inputs fit, the backend, the cost regime.

N = head rows (completion tokens), D = hidden, V = vocabulary.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from fastpo.ops import backends, casts, chips
from fastpo.ops.parts import OpError

GIB = 1 << 30
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NATIVE_DTYPES = {"triton": DTYPES[:3], "cpu": DTYPES[:2], "torch": DTYPES}
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # Triton kernels on CPU tensors, for tests


def available_backends() -> list[str]:
    """Backends that run on this machine: `triton` on GPUs, `cpu` (compiled, fp32 and bf16), `torch` anywhere."""
    triton = HAS_TRITON and (torch.cuda.is_available() or INTERPRETED)
    found = {"triton": triton, "cpu": backends.compiled is not None, "torch": True}
    return [name for name in found if found[name]]


def default_memory_budget(weight: Tensor) -> int:
    """Bytes the N x V matrix may take: the larger of 1 GiB and an fp32 gradient of `weight` [V, D]."""
    return max(GIB, 4 * weight.shape[0] * weight.shape[1])


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where it is on; fp64 stays. A parameter's cast is kept (`casts.keeping`)."""
    device_type = next(t for t in tensors if t is not None).device.type
    if not (_autocast_available(device_type) and torch.is_autocast_enabled(device_type)):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t is None or t.dtype == torch.float64 else casts.cast(t, dtype) for t in tensors)


@torch.compiler.assume_constant_result  # PyTorch 2.11 cannot trace the question
def _autocast_available(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def check_softcap(softcap: float | None) -> None:
    if softcap is not None and not softcap > 0:
        raise OpError(f"softcap must be positive or None, not {softcap}")


def check_inputs(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, memory_budget: int | None, backend: str
) -> str:
    """Refuse what the ops cannot take; the backend to use."""
    if any(hasattr(t, "device_mesh") for t in (hidden, weight, target, bias)):
        raise OpError(
            "only linear_logprob and linear_logprob_entropy take DTensors: pass weight.full_tensor(), and the rows of "
            "this rank"
        )
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise OpError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [N, D] and [V, D]")
    if weight.shape[0] == 0:
        raise OpError("weight has no rows: the vocabulary is empty")
    if target.shape != hidden.shape[:1]:
        raise OpError(f"target {list(target.shape)} must be [N] = {list(hidden.shape[:1])}")
    if target.dtype.is_floating_point or target.dtype.is_complex or target.dtype == torch.bool:
        raise OpError(f"target must be an integer tensor, not {target.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise OpError(f"bias {list(bias.shape)} must be [V] = {list(weight.shape[:1])}")
    tensors = [t for t in (hidden, weight, bias) if t is not None]
    if hidden.dtype not in DTYPES or any(t.dtype != hidden.dtype for t in tensors):
        raise OpError(f"hidden, weight and bias must share one floating dtype, not {[str(t.dtype) for t in tensors]}")
    if any(t.device != hidden.device for t in (*tensors, target)):
        raise OpError(f"tensors are on several devices: {[str(t.device) for t in (*tensors, target)]}")
    if memory_budget is not None and memory_budget < 0:
        raise OpError(f"memory_budget must be at least 0 bytes, not {memory_budget}")
    return choose_backend(backend, hidden)


def choose_backend(backend: str, tensor: Tensor) -> str:
    """The backend to use: the one asked for, or the best one for the tensor's device and dtype."""
    on_cpu = tensor.device.type == "cpu"
    if backend == "auto":
        native = "torch"
        if on_cpu and backends.compiled is not None:
            native = "cpu"
        elif tensor.device.type == "cuda" and HAS_TRITON and chips.triton_compiles(tensor.device.index):
            native = "triton"
        return native if tensor.dtype in NATIVE_DTYPES[native] else "torch"
    if backend not in available_backends():
        raise OpError(f"backend {backend!r} is not available here; one of auto, {', '.join(available_backends())}")
    on_right_device = {"cpu": on_cpu, "triton": not on_cpu or INTERPRETED, "torch": True}[backend]
    if tensor.dtype not in NATIVE_DTYPES[backend] or not on_right_device:
        raise OpError(f"backend {backend!r} does not take {tensor.dtype} on {tensor.device.type}; use 'auto'")
    return backend


def regime_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, memory_budget: int | None) -> str:
    """Decided outside the op, inside which grad mode always reads False: none, frozen, kept or sliced."""
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not torch.is_grad_enabled() or not (hidden.requires_grad or trained):
        return "none"
    if not trained:
        return "frozen"
    return "kept" if fits_budget(hidden, weight, memory_budget) else "sliced"


def fits_budget(hidden: Tensor, weight: Tensor, memory_budget: int | None) -> bool:
    """Whether an N x V matrix in the input dtype is within the budget."""
    budget = default_memory_budget(weight) if memory_budget is None else memory_budget
    return hidden.shape[0] * weight.shape[0] * hidden.dtype.itemsize <= budget
