"""Packed attention on a CPU by compiled code (csrc/attention.inc): whole trees, forward and backward, fp32 and bf16.

Scores, softmax and sums are in fp32 whatever the dtype; in bf16, P and dS are rounded to it before they are multiplied,
where the processor multiplies bf16 (csrc/attention_bf16.inc). A row's numbers depend on its own chain and prompt alone,
not on what else is packed, and not on the number of threads.

T = packed tokens, H = query heads, G = key and value heads, D = head size, C = chains.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastpo.models.layout import Layout, prompts_of_chains
from fastpo.ops import backends

_TOKENS = 128  # of a chain that one task of the forward takes
_ROWS = 64  # kRows of csrc/ext.cpp


class Tasks(NamedTuple):
    """The tables of csrc/attention.inc, int64; the dearest tasks come first, since threads take them in turn."""

    chains: Tensor  # [C, 4]: first token, end, and those of the prompt that it sees (0, 0 without); trees together
    forward: Tensor  # [tasks, 3]: chain, first token, end
    backward: Tensor  # [trees, 2]: first chain, the one that holds the others' prompts, and end
    seen: int  # keys that the longest task of the forward sees
    largest: int  # tokens of the largest tree


def tasks_of(layout: Layout) -> Tasks:
    """Made once a layout."""
    key = "cpu tasks"
    if key not in layout._tables:
        layout._tables[key] = _tasks(layout)
    return layout._tables[key]


def _tasks(layout: Layout) -> Tasks:
    prompts = prompts_of_chains(layout.cu_seqlens, layout.branches)
    chains = [(a, b, *prompts.get(a, (0, 0))) for a, b in itertools.pairwise(layout.cu_seqlens) if b > a]
    starts = [c[0] for c in chains]
    holder = np.searchsorted(starts, [c[2] if c[3] else c[0] for c in chains], "right") - 1  # whose tree a chain is in
    # The holder first: its prompt is none, and so smaller than any.
    order = sorted(range(len(chains)), key=lambda i: (holder[i], chains[i][3] > 0, chains[i][0]))
    chains = [chains[i] for i in order]
    bounds = [0, *(np.flatnonzero(np.diff(holder[order])) + 1).tolist(), len(chains)]
    forward = [
        (stop - a // 2 - first // 2 + prompt_stop - prompt, i, first, stop)
        for i, (a, b, prompt, prompt_stop) in enumerate(chains)
        for first, stop in ((t, min(t + _TOKENS, b)) for t in range(a, b, _TOKENS))
    ]
    forward.sort(key=lambda task: -task[0] * (task[3] - task[2]))
    trees = list(itertools.pairwise(bounds))
    work = [sum((b - a) * (d - c + (b - a) / 2) for a, b, c, d in chains[x:y]) for x, y in trees]
    trees = [trees[i] for i in np.argsort(-np.array(work), kind="stable")]
    return Tasks(
        torch.tensor(chains, dtype=torch.int64),
        torch.tensor([task[1:] for task in forward], dtype=torch.int64),
        torch.tensor(trees, dtype=torch.int64),
        max(stop - a + prompt_stop - prompt for a, stop, prompt, prompt_stop in chains),
        max(sum(b - a for a, b, *_ in chains[x:y]) for x, y in trees),
    )


def can_run(query: Tensor, key: Tensor, value: Tensor, scale: float) -> bool:
    """Whether the compiled code is here and made for such tensors."""
    size = query.shape[-1]
    return (
        backends.compiled is not None
        and query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype
        and query.dtype in (torch.float32, torch.bfloat16)
        and size == value.shape[-1]
        and size % 16 == 0
        and size <= 512
        and scale > 0
    )


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tasks: Tasks, scale: float) -> Tensor:
        out = query.new_empty(query.shape)
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        _run(tasks, scale, query, key, value, out, lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.tasks, ctx.scale = tasks, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grads = tuple(x.new_empty(x.shape) for x in (query, key, value))
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        _run(ctx.tasks, ctx.scale, query, key, value, out, lse, dout, *grads)
        return *grads, None, None


def _run(
    tasks: Tasks, scale: float, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    dout: Tensor | None = None, *grads: Tensor,
) -> None:  # fmt: skip
    heads, size = query.shape[1:]
    is_backward, is_bf16 = dout is not None, query.dtype == torch.bfloat16
    table = tasks.backward if is_backward else tasks.forward
    room = 5 * _ROWS * size + (4 * tasks.largest if is_backward else 2 * tasks.seen) * size
    strides = [s for x in (query, key, value, out if dout is None else dout) for s in x.stride()[:2]]
    backends.compiled.tree_attention(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(), lse.data_ptr(),
        0 if dout is None else dout.data_ptr(), *(g.data_ptr() for g in grads or (out,) * 3),
        tasks.chains.data_ptr(), table.data_ptr(), len(table), heads, key.shape[1], size, room, *strides,
        scale, is_bf16, torch.get_num_threads(),
    )  # fmt: skip


def compiled_tree_attention(
    query: Tensor,  # [T, H, D], D a multiple of 16
    key: Tensor,  # [T, G, D]
    value: Tensor,  # [T, G, D]
    layout: Layout,
    *,
    scale: float,
) -> Tensor:
    """Causal attention of each chain on itself and on its prompt -> [T, H, D]; `can_run` says of what."""
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    return _TreeAttention.apply(query, key, value, tasks_of(layout), scale)
