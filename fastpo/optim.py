"""Gradients and optimisers: fp32 accumulation, one norm, steps that a non-finite gradient skips; the schedules."""

import math
import re

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from fastpo.config import TrainConfig


class Gradients:
    """Accumulation in fp32 whatever the weights' dtype, one norm, one step that a non-finite gradient skips.

    fp32 weights accumulate in `.grad` as usual. 16-bit weights would round the running sum at every micro-batch, so
    theirs is kept in fp32 buffers and rounded once; no buffer where a step is one micro-batch.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        self.buffers: dict[nn.Parameter, Tensor] = {}
        self.active = False
        narrow = [p for p in parameters if p.dtype in (torch.bfloat16, torch.float16)]
        self.hooks = [p.register_post_accumulate_grad_hook(self._collect) for p in narrow]

    def _collect(self, p: Tensor) -> None:
        if not self.active or p.grad is None:
            return
        if p in self.buffers:
            self.buffers[p] += p.grad
        else:
            self.buffers[p] = p.grad.float()
        p.grad = None

    def close(self) -> None:
        """Leave the parameters as they were found."""
        for hook in self.hooks:
            hook.remove()
        for p in self.parameters:
            p.grad = None

    def begin(self, micro_batches: int) -> None:
        for p in self.parameters:
            p.grad = None
        self.buffers.clear()
        self.active = micro_batches > 1

    def clip_(self, max_norm: float) -> Tensor:
        """The gradients' 2-norm, before they are scaled down to `max_norm` (0: not at all)."""
        grads = [self.buffers.get(p, p.grad) for p in self.parameters]
        grads = [g for g in grads if g is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if max_norm > 0 and grads:
            torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        for p, buffer in self.buffers.items():
            p.grad = buffer.to(p.dtype)
        return norm

    def step_(self, optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
        """Step unless `finite` is false. Fused optimisers skip on the device; the others need to know on the host."""
        if finite.is_cuda and getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.grad_scale = None  # type: ignore[attr-defined]
            optimizer.found_inf = (~finite).float().reshape(1)  # type: ignore[attr-defined]
            optimizer.step()
        elif finite:
            optimizer.step()


# transformers' rule of what is not decayed.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser that `config.optim` names over the trainable parameters; biases and norms are not decayed."""
    norms = {name for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            exempt = name.rpartition(".")[0] in norms or _NO_DECAY.search(name.lower())
            (kept if exempt else decayed).append(p)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    lr = config.learning_rate
    if config.optim == "rmsprop":
        return torch.optim.RMSprop(groups, lr=lr)
    if config.optim == "sgd":
        return torch.optim.SGD(groups, lr=lr)
    fused = config.optim == "adamw_torch_fused"
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=config.adam_epsilon, fused=fused or None)


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """transformers' schedule of that name over `steps` optimiser steps."""
    warmup = config.warmup_steps if config.warmup_ratio is None else config.warmup_ratio
    warmup = int(warmup) if warmup >= 1 else math.ceil(steps * warmup)
    return get_scheduler(
        config.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=steps,
        scheduler_specific_kwargs=config.lr_scheduler_kwargs,
    )  # fmt: skip
