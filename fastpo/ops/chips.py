"""What differs between GPUs: whether Triton compiles for one, and which forward of the head is faster on it."""

from __future__ import annotations

import functools
import os
import warnings

import torch
from torch import Tensor

from fastpo.errors import FastpoError

# Where the fused forward (kernels/fused.py) measured faster than the vendor's GEMM and the row kernel. Nothing has been
# measured yet: no GPU was at hand, so every chip, and every one not named here, takes GEMM and row kernel.
FUSED_FORWARD = {"sm_80": False, "sm_90": False, "sm_100": False, "gfx942": False}
FUSED_FORWARD_VARIABLE = "FASTPO_FUSED_FORWARD"  # 0 or 1: not by the table


class ChipError(FastpoError):
    """A setting for the GPU that makes no sense."""


def use_fused_forward(hidden: Tensor, weight: Tensor) -> bool:
    """Whether log-probabilities without gradients come from the fused kernel: by FASTPO_FUSED_FORWARD, or the chip's
    entry. fp32, and matrices whose inner dimension is not D, always take the GEMM."""
    from fastpo.kernels import fused

    setting = os.environ.get(FUSED_FORWARD_VARIABLE, "")
    if setting not in ("", "0", "1"):
        raise ChipError(f"{FUSED_FORWARD_VARIABLE} must be 0, 1 or unset, not {setting!r}")
    wanted = setting == "1" if setting else FUSED_FORWARD.get(fused.chip(hidden.device), False)
    return wanted and fused.takes(hidden, weight)


def triton_compiles(index: int) -> bool:
    """Whether Triton compiles for CUDA device `index`; a warning, once, where it does not. True while torch.compile
    traces, which cannot look into Triton, and whose own kernels for a GPU are Triton's."""
    return torch.compiler.is_compiling() or _triton_compiles(index)


@functools.cache
def _triton_compiles(index: int) -> bool:
    try:
        _compile_probe(index)
    except Exception as error:  # Triton raises whatever its passes, ptxas or the C compiler end with
        name = torch.cuda.get_device_name(index)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"Triton does not compile for {name}, so head, losses and tree attention run on plain PyTorch, which is "
            f"slower ({reason}); a newer triton may know this GPU",
            stacklevel=2,
        )
        return False
    return True


def _compile_probe(index: int) -> None:
    """Compiles one row kernel for the device; nothing is launched."""
    from fastpo.kernels import logprob

    with torch.cuda.device(index):
        logprob.compile_only()
