"""Gradients and optimisers: fp32 accumulation, one norm, steps that a non-finite gradient skips; the schedules."""

import math
import re

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from fastpo.config import TrainConfig


class Gradients:
    """fp32 gradients whatever the weights' dtype, one norm, one step that a non-finite gradient skips.

    fp32 weights accumulate in `.grad` as usual. 16-bit weights would round the running sum at every micro-batch, so
    theirs is kept in fp32 buffers. `masters` also keeps an fp32 copy of each 16-bit weight, which the optimiser steps:
    at a learning rate of 1e-6 most updates are below a bf16 weight's spacing, and would be lost. It costs 4 bytes a
    trainable parameter, besides fp32 moments.
    """

    def __init__(self, parameters: list[nn.Parameter], masters: bool):
        self.parameters = parameters
        narrow = [p for p in parameters if p.dtype in (torch.bfloat16, torch.float16)]
        self.masters: dict[Tensor, nn.Parameter] = {}  # by parameter
        if masters:
            self.masters = {p: nn.Parameter(p.detach().float()) for p in narrow}
        self.buffers: dict[Tensor, Tensor] = {}  # by parameter, fp32
        self.single = False
        self.optimizer: torch.optim.Optimizer | None = None
        self.hooks = [p.register_post_accumulate_grad_hook(self._collect) for p in narrow]

    def stepped(self, p: nn.Parameter) -> nn.Parameter:
        """What the optimiser updates for a parameter: its fp32 copy, or itself."""
        return self.masters.get(p, p)

    def _collect(self, p: Tensor) -> None:
        """A 16-bit gradient has been formed: into fp32 with it, unless the optimiser wants just this one in 16 bits."""
        if p.grad is None or (self.single and p not in self.masters):
            return
        if p in self.buffers:
            self.buffers[p] += p.grad
        else:
            self.buffers[p] = p.grad.float()
        p.grad = None

    def begin(self, micro_batches: int) -> None:
        """Forget the last step's gradients; a step of one micro-batch needs no accumulation."""
        self._forget()
        self.single = micro_batches == 1

    def _forget(self) -> None:
        for p in self.parameters:
            p.grad = None
            self.stepped(p).grad = None
        self.buffers.clear()

    def close(self) -> None:
        """Leave parameters and optimiser as they were found."""
        for hook in self.hooks:
            hook.remove()
        self._forget()
        for name in ("found_inf", "grad_scale"):
            vars(self.optimizer or self).pop(name, None)

    def clip_(self, max_norm: float) -> Tensor:
        """The gradients' 2-norm in fp32, before they are scaled down to `max_norm` (0 or less: not at all)."""
        grads = [self.buffers.get(p, p.grad) for p in self.parameters]
        grads = [g for g in grads if g is not None]
        if not grads:
            return torch.zeros(())
        norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
        norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
        if max_norm > 0:
            torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        for p in list(self.buffers):
            stepped = self.masters.get(p, p)
            stepped.grad = self.buffers.pop(p).to(stepped.dtype)
        return norm

    def step_(self, optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
        """Step unless `finite` is false. Fused optimisers skip on the device; the others ask the host, and so wait."""
        self.optimizer = optimizer
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.grad_scale = None  # type: ignore[attr-defined]
            optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            optimizer.step()
        elif finite:
            optimizer.step()
        if self.masters:
            with torch.no_grad():
                torch._foreach_copy_(list(self.masters), list(self.masters.values()))


# transformers' rule of what is not decayed.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def build_optimizer(model: nn.Module, config: TrainConfig, gradients: Gradients) -> torch.optim.Optimizer:
    """The optimiser that `config.optim` names over the trainable parameters; biases and norms are not decayed."""
    norms = {name for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            exempt = name.rpartition(".")[0] in norms or _NO_DECAY.search(name.lower())
            (kept if exempt else decayed).append(gradients.stepped(p))
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    lr = config.learning_rate
    if config.optim == "rmsprop":
        return torch.optim.RMSprop(groups, lr=lr)
    if config.optim == "sgd":
        return torch.optim.SGD(groups, lr=lr, fused=True)
    fused = config.optim == "adamw_torch_fused"
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=config.adam_epsilon, fused=fused or None)


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """transformers' schedule of that name over `steps` optimiser steps."""
    warmup = config.warmup_ratio or config.warmup_steps
    warmup = int(warmup) if warmup >= 1 else math.ceil(steps * warmup)
    return get_scheduler(
        config.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=steps,
        scheduler_specific_kwargs=config.lr_scheduler_kwargs,
    )  # fmt: skip
