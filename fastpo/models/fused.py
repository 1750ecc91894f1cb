"""Which fused layers a trunk computes with in place of its own while it is attached: one switch, `use_liger_kernel`.

Norms, rotary embeddings and MLPs: Liger's kernels on a GPU (models/liger.py), fastpo's own on a CPU (cpu_layers.py).
LoRA on linear layers: lora_layers.py, on both.
"""

import logging
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError, did_you_mean
from fastpo.models import cpu_layers, liger, lora_layers

log = logging.getLogger("fastpo")


class Layers(Protocol):
    """Layers of a model that can be replaced and put back."""

    def switch(self, on: bool) -> None: ...


class Fused:
    """The choice, and while a trunk is attached its replaced layers."""

    def __init__(self, on: bool = True):
        self.on = on
        self.without: frozenset[str] = frozenset()  # of cpu_layers.NAMES
        self.liger: liger.LigerLayers | None = None
        self._layers: list[Layers] = []

    def choose(self, causal_lm: PreTrainedModel, config: TrainConfig, device: torch.device) -> None:
        """By the options, of a model that will run on `device`: ConfigError for what is asked for and cannot be."""
        wanted, kernels = config.use_liger_kernel, config.liger_kernel_config or {}
        self.on = wanted is not False
        if not self.on:
            return
        if device.type == "cpu":
            self.without = _without(kernels)
            if wanted and cpu_layers.available():
                log.info("use_liger_kernel: on a CPU these are fastpo's own fused layers, which are on in any case")
            elif wanted:
                log.warning("use_liger_kernel: a CPU's fused layers are compiled code, which is not built here")
            return
        if wanted is None and (config.torch_compile or not liger.knows(causal_lm)):  # which fuses by itself
            return
        layers = liger.LigerLayers(causal_lm, kernels, all_kernels=bool(wanted))
        if why := layers.disagrees(device):
            log.warning("liger-kernel's layers stay off: %s", why)
            return
        self.liger = layers
        log.info("liger-kernel's %s for %s (use_liger_kernel=False: none)", layers, causal_lm.config.model_type)

    def install(self, trunk: nn.Module) -> None:
        """Puts them in place; `remove` puts the model's own back."""
        if not self.on:
            return
        self._layers = [self.liger or cpu_layers.FusedLayers(trunk, self.without), lora_layers.FusedLoRA(trunk)]
        self.switch(True)

    def switch(self, on: bool) -> None:
        for layers in self._layers:
            layers.switch(on)

    def remove(self) -> None:
        self.switch(False)
        self._layers = []


def _without(kernels: Mapping[str, bool]) -> frozenset[str]:
    """The names of a CPU's layers that liger_kernel_config switches off."""
    for name in kernels:
        if name not in cpu_layers.NAMES:
            others = did_you_mean(name, cpu_layers.NAMES) or f": it has {', '.join(cpu_layers.NAMES)}"
            raise ConfigError(f"liger_kernel_config: a CPU has no kernel {name!r}{others}")
    return frozenset(name for name, on in kernels.items() if not on)
