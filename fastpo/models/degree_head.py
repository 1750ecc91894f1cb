"""The linear head of `degree_aux`: beside a language model, no part of it, and none of what is saved as the model.

E = responses of a degree, D = hidden.
"""

import torch
from torch import Tensor, nn

FILE = "degree_head.safetensors"  # beside the model's files: weight [degrees, D] and bias [degrees]
LOGITS = "degree_logits"  # name in PackedBatch.rows


class DegreeHead(nn.Module):
    """`hidden W^T + b` at the last token of a response; computed in fp32, in fp64 of a model in that."""

    def __init__(self, degrees: int, size: int, seed: int, like: Tensor):
        """seed: of its start, the same on every rank and device. like: a tensor of the model's dtype and device."""
        super().__init__()
        dtype = torch.promote_types(like.dtype, torch.float32)
        start = torch.randn(degrees, size, generator=torch.Generator().manual_seed(seed)) / size**0.5
        self.weight = nn.Parameter(start.to(like.device, dtype))
        self.bias = nn.Parameter(torch.zeros(degrees, device=like.device, dtype=dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [E, degrees] of hidden states [E, D]."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return nn.functional.linear(hidden.to(self.weight), self.weight, self.bias)
