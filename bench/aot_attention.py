"""Launches of the tree attention's kernels, for compiling them ahead of time: what each test and bench/aot.py takes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastpo.kernels import attention
from fastpo.layout import Layout

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KERNELS = ("fwd", "dq", "dkv")
_ALL = {"window": 512, "softcap": 50.0, "sink": True}


def _launch(sizes: tuple[int, int], dtype: torch.dtype, *, group: int = 4, sink: bool = False, **rules) -> None:
    """One launch of each kernel on tensors that nothing reads."""
    query = torch.zeros(32, 2 * group, sizes[0], dtype=dtype)
    key, value = (torch.zeros(32, 2, size, dtype=dtype) for size in sizes)
    config = attention.tree_config(*sizes, dtype)
    layout = Layout.from_chains((0, 32))
    tables = layout.tree_blocks(query.device, config.fwd.queries, config.dq.queries, config.dkv.keys)
    given = {"scale": 0.1, "sink": torch.zeros(2 * group, dtype=dtype) if sink else None, **rules}
    out, lse = attention.tree_attention_fwd(query, key, value, tables, **given)
    attention.tree_attention_bwd(out, query, key, value, out, lse, tables, **given)


def _case(sizes: tuple[int, int], dtype: torch.dtype, **rules) -> Callable[[], None]:
    return lambda: _launch(sizes, dtype, **rules)


# Every class of tiles with and without all options; odd and uneven heads; each dtype.
_PROBLEMS = {
    "bf16-16": _case((16, 16), BF16),
    "bf16-64": _case((64, 64), BF16),
    "bf16-64-all": _case((64, 64), BF16, **_ALL),
    "bf16-80-ungrouped": _case((80, 80), BF16, group=1),
    "bf16-128": _case((128, 128), BF16),
    "fp16-128-all": _case((128, 128), FP16, **_ALL),
    "bf16-192-128": _case((192, 128), BF16),
    "bf16-256-all": _case((256, 256), BF16, **_ALL),
    "fp32-64-all": _case((64, 64), FP32, **_ALL),
    "fp32-128": _case((128, 128), FP32),
    "fp32-128-all": _case((128, 128), FP32, **_ALL),
}
# name -> (kernel, launch)
CASES = {f"tree-{k}-{name}": (f"_tree_attention_{k}_kernel", run) for name, run in _PROBLEMS.items() for k in KERNELS}
