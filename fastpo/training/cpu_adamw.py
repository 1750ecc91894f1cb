"""AdamW for 16-bit weights on a CPU, in one pass over memory by compiled code (csrc/adamw.inc).

PyTorch's fused AdamW wants fp32 gradients beside fp32 weights, so that a 16-bit gradient is copied, scaled and stepped,
and the result copied into the model's weight: four passes. Here one reads the gradient as it is and writes both weights.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastpo.ops import backends


class CpuAdamW(torch.optim.AdamW):
    """torch.optim.AdamW, of which `step` also takes what `give` handed over since the last one.

    State and options are torch.optim.AdamW's, so that checkpoints are alike.
    """

    _given: tuple[tuple[nn.Parameter, Tensor, Tensor, float], ...] = ()

    def give(self, master: nn.Parameter, grad: Tensor, weight: Tensor, scale: float) -> None:
        """To be stepped: an fp32 copy, the gradient in fp32 or bf16, times `scale`, and the bf16 weight to be written."""
        self._given += ((master, grad, weight, scale),)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        given, self._given = self._given, ()
        loss = super().step(closure)
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        for master, grad, weight, scale in given:
            self._step(group_of[master], master, grad, weight, scale)
        return loss

    def _step(self, group: dict[str, Any], master: nn.Parameter, grad: Tensor, weight: Tensor, scale: float) -> None:
        state = self.state[master]
        if not state:  # as torch.optim.AdamW begins
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(master, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(master, memory_format=torch.preserve_format)
        state["step"] += 1
        step, lr, (beta1, beta2) = int(state["step"]), float(group["lr"]), group["betas"]
        backends._C.adamw(
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
    return backends._C is not None


def norm(grads: list[Tensor]) -> Tensor | None:
    """The 2-norm of fp32 and bf16 gradients on a CPU, [] fp32; None of others."""
    plain = available() and all(
        type(g) is Tensor and g.device.type == "cpu" and g.dtype in (torch.float32, torch.bfloat16) and g.is_contiguous()
        for g in grads
    )  # fmt: skip
    if not plain:
        return None
    threads = torch.get_num_threads()
    squares = (backends._C.sum_of_squares(g.data_ptr(), g.numel(), g.dtype == torch.bfloat16, threads) for g in grads)
    return torch.tensor(math.sqrt(math.fsum(squares)), dtype=torch.float32)
