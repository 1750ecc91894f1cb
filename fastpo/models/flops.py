"""The work of a model: FLOPs of what passes it, and the peak of the device that does it."""

from typing import Any

import torch

from fastpo.data.packing import PackedBatch

# Dense bf16 peaks in FLOP/s, from the vendors' data sheets; other devices report no mfu.
_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "B200": 2250e12,
               "L40S": 362e12, "MI300X": 1307e12}  # fmt: skip


class Flops:
    """Model FLOPs of the work done: 6 per parameter and token (4 if frozen), attention's scores, the head's rows."""

    def __init__(self, policy: Any, device: torch.device):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = next((peak for chip, peak in _PEAK_FLOPS.items() if chip in name), None)
        head = policy.head().weight
        embeddings = policy.model.get_input_embeddings().weight
        skip = {id(head), id(embeddings)}
        trunk = [p for p in policy.model.parameters() if id(p) not in skip]
        self.per_token = sum((6 if p.requires_grad else 4) * p.numel() for p in trunk)
        self.per_row = (6 if head.requires_grad else 4) * head.numel()
        config = policy.model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.layers = getattr(config, "num_hidden_layers", 0)
        self.attention = self.layers * getattr(config, "hidden_size", 0)
        # Of a mixture of experts a token passes a few.
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        experts = next((n for name in names if isinstance(n := getattr(config, name, None), int)), 0)
        share = (getattr(config, "num_experts_per_tok", None) or experts) / max(experts, 1)
        used = [p.numel() * (share if p.ndim == 3 and p.shape[0] == experts else 1.0) for p in trunk]
        self.active = sum(used)  # parameters of the trunk that a token passes
        self.active_per_token = sum((6 if p.requires_grad else 4) * n for p, n in zip(trunk, used, strict=True))
        self.reset()

    def reset(self) -> None:
        self.total = 0.0

    def add(self, batch: PackedBatch) -> None:
        tokens = batch.cu_seqlens[-1] - batch.padding
        chains = zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)
        squares = sum((b - a) ** 2 for a, b in chains if b <= tokens)
        squares += sum(2 * (b.stop - b.start) * (b.prompt_stop - b.prompt) for b in batch.branches)
        self.total += self.per_token * tokens + 6 * self.attention * squares
        self.total += self.per_row * (batch.target.numel() + (batch.prompts.target.numel() if batch.prompts else 0))
