"""AdamW for 16-bit weights on a CPU, in one pass over memory by compiled code (csrc/adamw.inc).

PyTorch's fused AdamW wants fp32 gradients beside fp32 weights, so that a 16-bit gradient is copied, scaled and
stepped, and the result copied into the model's weight: four passes. Here one reads it as it is and writes both weights.
"""

import math

import torch
from torch import Tensor, nn

from fastpo.ops import backends


class CpuAdamW(torch.optim.AdamW):
    """torch.optim.AdamW, with a step of one parameter that reads and writes 16 bits.

    State and options are torch.optim.AdamW's, so that checkpoints are alike.
    """

    @torch.no_grad()
    def step_one(self, master: nn.Parameter, grad: Tensor, weight: Tensor, scale: float) -> None:
        """Steps an fp32 copy by a gradient in fp32 or bf16 times `scale`, and writes the bf16 weight; `can_step` says
        of what. `step` leaves the copy alone, which has no gradient of its own."""
        group = next(g for g in self.param_groups if any(p is master for p in g["params"]))
        state = self.state[master]
        if not state:  # as torch.optim.AdamW begins
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(master, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(master, memory_format=torch.preserve_format)
        state["step"] += 1
        step, lr, (beta1, beta2) = int(state["step"]), float(group["lr"]), group["betas"]
        backends.compiled.adamw(
            weight.data_ptr(), grad.data_ptr(), master.data_ptr(), state["exp_avg"].data_ptr(),
            state["exp_avg_sq"].data_ptr(), master.numel(), grad.dtype == torch.bfloat16, scale,
            1 - lr * group["weight_decay"], 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1**step),
            1 / math.sqrt(1 - beta2**step), group["eps"], torch.get_num_threads(),
        )  # fmt: skip


def can_step(master: Tensor, grad: Tensor, weight: Tensor) -> bool:
    """Whether `CpuAdamW.give` takes them: dense, of one order in memory, on the CPU."""
    return (
        master.device.type == weight.device.type == grad.device.type == "cpu"
        and master.dtype == torch.float32
        and weight.dtype == torch.bfloat16
        and grad.dtype in (torch.float32, torch.bfloat16)
        and all(x.is_contiguous() for x in (master, grad, weight))
    )


def available() -> bool:
    return backends.compiled is not None


def norm(grads: list[Tensor]) -> Tensor | None:
    """The 2-norm of fp32 and bf16 gradients on a CPU, [] fp32; None of others."""
    if not (available() and all(map(_is_plain, grads))):
        return None
    threads = torch.get_num_threads()
    squares = (
        backends.compiled.sum_of_squares(g.data_ptr(), g.numel(), g.dtype == torch.bfloat16, threads) for g in grads
    )
    return torch.tensor(math.sqrt(math.fsum(squares)), dtype=torch.float32)


def _is_plain(grad: Tensor) -> bool:
    dtypes = (torch.float32, torch.bfloat16)
    return type(grad) is Tensor and grad.device.type == "cpu" and grad.dtype in dtypes and grad.is_contiguous()
