"""Attention of packed trees, forward and exact backward, over whichever kernel does one part of it.

A chain attends causally to itself, a branch also to its prompt. These are separate calls, merged by their log-sum-exp:
    lse = log(exp(lse_1) + exp(lse_2))        out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2
FlashAttention's backward reads the scores' probabilities as exp(score - lse) and the outputs only in sum(dout * out);
given the merged two, each call's backward is its exact part of the whole gradient (arXiv 2307.08691, section 3.1).
Kernels that do this: PyTorch's CPU flash kernel, PyTorch's varlen FlashAttention, the flash_attn package. The Triton
kernels of kernels/attention.py see prompt and chain at once and merge nothing.

T = packed tokens, H = query heads, G = key and value heads, D = head size, E = head size of values. Tensors are
token-major: [T, heads, size]; log-sum-exps are [T, H] in fp32 or wider.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastpo.models.layout import Layout


class Call(Protocol):
    """Attention of some queries on some keys."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """(out, log-sum-exp), fresh tensors."""

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dquery, dkey, dvalue), fresh tensors, given the output and log-sum-exp of the whole softmax."""


class OnPrompt(NamedTuple):
    """Branches on their prompts. Rows are a slice, or an index in which no row comes twice."""

    branch: slice | Tensor
    prompt: slice | Tensor
    call: Call


class TreeAttention(torch.autograd.Function):
    """Every chain on itself by one call, every branch on its prompt by others -> [T, H, E]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, on_themselves: Call, on_prompts: tuple[OnPrompt, ...]
    ) -> Tensor:
        out, lse = on_themselves.forward(query, key, value)
        for branch, prompt, call in on_prompts:
            part, part_lse = call.forward(query[branch], key[prompt], value[prompt])
            own, own_lse = out[branch], lse[branch]
            whole = torch.logaddexp(own_lse, part_lse)
            share, part_share = ((x - whole).exp().unsqueeze(-1) for x in (own_lse, part_lse))
            out[branch] = (own * share + part * part_share).to(out.dtype)
            lse[branch] = whole
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.calls = on_themselves, on_prompts
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        on_themselves, on_prompts = ctx.calls
        dquery, dkey, dvalue = on_themselves.backward(dout, query, key, value, out, lse)
        for branch, prompt, call in on_prompts:
            parts = call.backward(dout[branch], query[branch], key[prompt], value[prompt], out[branch], lse[branch])
            dquery[branch] += parts[0]
            dkey[prompt] += parts[1]
            dvalue[prompt] += parts[2]
        return dquery, dkey, dvalue, None, None


# ---- FlashAttention on a GPU


class VarlenKernel(NamedTuple):
    """FlashAttention over sequences end to end; log-sum-exps are [H, T] here, as the kernels have them."""

    forward: Callable[..., tuple[Tensor, Tensor]]  # (q, k, v, problem) -> (out, lse)
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]  # (dout, q, k, v, out, lse, problem) -> (dq, dk, dv)


class VarlenProblem(NamedTuple):
    cu_q: Tensor  # [sequences + 1] int32
    cu_k: Tensor  # [sequences + 1] int32
    max_q: int
    max_k: int
    causal: bool
    scale: float
    softcap: float  # 0 for none


@dataclass(frozen=True, slots=True)
class _VarlenCall:
    kernel: VarlenKernel
    problem: VarlenProblem

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = self.kernel.forward(query, key, value, self.problem)
        return out, lse.t()

    def backward(self, dout: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, out, lse = others
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        return self.kernel.backward(dout, query, key, value, out, lse.t().contiguous(), self.problem)


def varlen_tree_attention(
    kernel: str,  # of VARLEN_KERNELS
    query: Tensor,  # [T, H, D], D at most 256 and a multiple of 8
    key: Tensor,  # [T, G, D]
    value: Tensor,  # [T, G, D]
    layout: Layout,
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """FlashAttention in two calls, without windows, sinks and dropout -> [T, H, D]."""
    t = layout.varlen_tables(query.device)
    longest = layout.longest_chain
    flash, cap = VARLEN_KERNELS[kernel], softcap or 0.0
    chains = VarlenProblem(t.cu_seqlens, t.cu_seqlens, longest, longest, True, scale, cap)
    on_prompts: tuple[OnPrompt, ...] = ()
    if layout.branches:
        # Gathered rather than addressed in place: between the branches lie tokens that have no prompt.
        longest = max(b.stop - b.start for b in layout.branches)
        longest_prompt = max(b.prompt_stop - b.prompt for b in layout.branches)
        prompts = VarlenProblem(t.cu_branches, t.cu_prompts, longest, longest_prompt, False, scale, cap)
        on_prompts = (OnPrompt(t.branch_rows, t.prompt_rows, _VarlenCall(flash, prompts)),)
    return TreeAttention.apply(query, key, value, _VarlenCall(flash, chains), on_prompts)


def _torch_forward(q: Tensor, k: Tensor, v: Tensor, p: VarlenProblem) -> tuple[Tensor, Tensor]:
    """What torch.nn.attention.varlen calls; its own function gives no way to hand the merged output to the backward."""
    assert not p.softcap
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, p.cu_q, p.cu_k, p.max_q, p.max_k, 0.0, p.causal, False,
        scale=p.scale, window_size_left=-1, window_size_right=0 if p.causal else -1,
    )  # fmt: skip
    return out, lse


def _torch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, p: VarlenProblem
) -> tuple[Tensor, Tensor, Tensor]:
    # Two states of a random generator, which are read only with dropout.
    state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse, p.cu_q, p.cu_k, p.max_q, p.max_k, 0.0, p.causal, state, unused,
        scale=p.scale, window_size_left=-1, window_size_right=0 if p.causal else -1,
    )  # fmt: skip


def _package_forward(q: Tensor, k: Tensor, v: Tensor, p: VarlenProblem) -> tuple[Tensor, Tensor]:
    """The flash_attn package, 2.7 and later."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    out, lse, *_ = _flash_attn_varlen_forward(
        q, k, v, p.cu_q, p.cu_k, p.max_q, p.max_k, 0.0, p.scale, p.causal,
        window_size_left=-1, window_size_right=-1, softcap=p.softcap, alibi_slopes=None, return_softmax=False,
    )  # fmt: skip
    return out, lse


def _package_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, p: VarlenProblem
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _flash_attn_varlen_backward(
        dout, q, k, v, out, lse, dq, dk, dv, p.cu_q, p.cu_k, p.max_q, p.max_k, 0.0, p.scale, p.causal,
        window_size_left=-1, window_size_right=-1, softcap=p.softcap, alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(), rng_state=None,
    )  # fmt: skip
    return dq, dk, dv


VARLEN_KERNELS = {
    "flash_attn": VarlenKernel(_package_forward, _package_backward),
    "varlen": VarlenKernel(_torch_forward, _torch_backward),
}


# ---- Triton


class _TritonTreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sink: Tensor | None, tables: Any, rules: dict[str, Any]
    ) -> Tensor:
        from fastpo.kernels import attention

        out, lse = attention.tree_attention_fwd(query, key, value, tables, sink=sink, **rules)
        ctx.save_for_backward(query, key, value, sink, out, lse)
        ctx.tables, ctx.rules = tables, rules
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        from fastpo.kernels import attention

        query, key, value, sink, out, lse = ctx.saved_tensors
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        grads = attention.tree_attention_bwd(dout, query, key, value, out, lse, ctx.tables, sink=sink, **ctx.rules)
        return *grads, None, None


def triton_tree_attention(
    query: Tensor,  # [T, H, D], D and E at most 256, in fp32 128
    key: Tensor,  # [T, G, D]
    value: Tensor,  # [T, G, E]
    layout: Layout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,  # [H]
) -> Tensor:
    """One kernel over prompts and chains -> [T, H, E]."""
    from fastpo.kernels import attention

    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    config = attention.tree_config(query.shape[2], value.shape[2], query.dtype)
    tables = layout.tree_blocks(query.device, config.fwd.queries, config.dq.queries, config.dkv.keys)
    rules = {"scale": scale, "window": window, "softcap": softcap}
    return _TritonTreeAttention.apply(query, key, value, sink, tables, rules)


# ---- PyTorch's flash kernel on a CPU


def cpu_tree_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scale: float) -> Tensor:
    """[T, H, D], [T, G, D], [T, G, D] -> [T, H, D], without windows, soft cap, sinks and dropout.

    Against a loop over `scaled_dot_product_attention` it keeps one output instead of two, repeats no key or value head,
    and runs short chains together.
    """
    plan = _plan(layout.cu_seqlens, query.shape[1] * query.shape[2])
    on_prompt = _CpuOnPrompt(scale)
    on_prompts = tuple(
        OnPrompt(slice(b.start, b.stop), slice(b.prompt, b.prompt_stop), on_prompt) for b in layout.branches
    )
    return TreeAttention.apply(query, key, value, _CpuChains(plan, scale), on_prompts)


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Chains that share one kernel call, shorter ones padded at the end; a lone chain is a view and is not copied."""

    size: int
    length: int  # of the longest
    start: int  # of the lone chain
    source: Tensor | None = None  # [size * length], the token of each place; padding reads any token
    sink: Tensor | None = None  # [size * length], the same, padding writes to row T
    padding: Tensor | None = None  # [K], places that hold no token; None without any


@functools.lru_cache(maxsize=256)
def _plan(cu_seqlens: tuple[int, ...], width: int) -> tuple[_Group, ...]:
    """Which chains share a call. Padding is exact: with causal attention no token sees what comes after it.

    A call of its own costs a chain about 60 us (forward and backward: dispatch, views, a parallel region); sharing one
    costs copies and padding. Measured on Zen 4, per unit of width (H * Dh) / 64: 0.2 us a copied token, and attention
    of 0.3 + 0.0125 * L us a token. 200 chains of 8 to 16 tokens, width 128: 8 ms together, 13 ms one by one.
    """
    starts = cu_seqlens[:-1]
    lengths = [b - a for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
    order = sorted((i for i in range(len(lengths)) if lengths[i]), key=lambda i: -lengths[i])
    shared: list[list[int]] = []
    for i in order:
        longest = lengths[shared[-1][0]] if shared else 0
        pad = longest - lengths[i]
        cost_us = width / 64 * (0.2 * longest + pad * (0.3 + 0.0125 * (longest + lengths[i])))
        if shared and cost_us < 60:
            shared[-1].append(i)
        else:
            shared.append([i])
    return tuple(_group([starts[i] for i in g], [lengths[i] for i in g], cu_seqlens[-1]) for g in shared)


def _group(starts: list[int], lengths: list[int], total: int) -> _Group:
    length = lengths[0]
    if len(starts) == 1:
        return _Group(1, length, starts[0])
    place = torch.arange(length).expand(len(starts), length)
    inside = place < torch.tensor(lengths)[:, None]
    first = torch.tensor(starts)[:, None]
    source = torch.where(inside, first + place, first).flatten()
    sink = torch.where(inside, first + place, total).flatten()
    padding = (~inside).flatten().nonzero().flatten()
    return _Group(len(starts), length, starts[0], source, sink, padding if len(padding) else None)


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_NO_WEIGHT = 1e30  # a log-sum-exp under which every score's exponential is 0


@dataclass(frozen=True, slots=True)
class _CpuChains:
    """Every chain on itself, writing straight into packed outputs, whose row T takes the padding."""

    plan: tuple[_Group, ...]
    scale: float

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        tokens, heads, size = query.shape
        out = query.new_empty(tokens + 1, heads, size)
        lse = query.new_empty(tokens + 1, heads, 1, dtype=torch.promote_types(query.dtype, torch.float32))
        for group in self.plan:
            result, group_lse = _flash(*(_take(x, group) for x in (query, key, value)), 0.0, True, scale=self.scale)
            _put(out, result, group)
            _put(lse, group_lse.unsqueeze(-1), group)
        return out[:tokens], lse[:tokens].squeeze(-1)

    def backward(self, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dout, query, key, value, out, lse = tensors
        tokens = len(query)
        grads = [x.new_empty(tokens + 1, *x.shape[1:]) for x in (query, key, value)]
        for group in self.plan:
            do, q, k, v, o, group_lse = (_take(x, group) for x in (dout, query, key, value, out, lse.unsqueeze(-1)))
            if group.padding is not None:  # padded queries must add nothing to the real keys and values
                do.transpose(1, 2).flatten(0, 1).index_fill_(0, group.padding, 0.0)
                # Not another token's, of which an exponential might be infinite.
                group_lse.transpose(1, 2).flatten(0, 1).index_fill_(0, group.padding, _NO_WEIGHT)
            parts = _flash_backward(do, q, k, v, o, group_lse.squeeze(-1), 0.0, True, scale=self.scale)
            for grad, part in zip(grads, parts, strict=True):
                _put(grad, part, group)
        dquery, dkey, dvalue = (g[:tokens] for g in grads)
        return dquery, dkey, dvalue


@dataclass(frozen=True, slots=True)
class _CpuOnPrompt:
    scale: float

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = _flash(*map(_head_major, (query, key, value)), 0.0, False, scale=self.scale)
        return out[0].transpose(0, 1), lse[0].t()

    def backward(self, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *rows, lse = tensors
        parts = _flash_backward(*map(_head_major, rows), lse.t().unsqueeze(0), 0.0, False, scale=self.scale)
        dquery, dkey, dvalue = (g[0].transpose(0, 1) for g in parts)
        return dquery, dkey, dvalue


def _head_major(x: Tensor) -> Tensor:
    """[T, heads, D] -> [1, heads, T, D]."""
    return x.transpose(0, 1).unsqueeze(0)


def _take(x: Tensor, group: _Group) -> Tensor:
    """[T, heads, D] -> [size, heads, length, D]."""
    if group.source is None:
        return _head_major(x[group.start : group.start + group.length])
    rows = x.index_select(0, group.source)  # [size * length, heads, D]
    return rows.view(group.size, group.length, *rows.shape[1:]).transpose(1, 2)


def _put(out: Tensor, part: Tensor, group: _Group) -> None:
    """part [size, heads, length, D] into out [T + 1, heads, D]."""
    part = part.transpose(1, 2)
    if group.sink is None:
        out[group.start : group.start + group.length] = part[0]
    else:
        out.index_copy_(0, group.sink, part.reshape(-1, *part.shape[2:]))
