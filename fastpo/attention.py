"""Attention over packed sequences, registered in transformers under the name "fastpo".

Many causal chains lie end to end in one row of T tokens; a token attends to its own chain, and where its response
shares a prompt with others, to that prompt: a `Branch`. They come as a `Layout` through the model's keyword arguments,
so that gradient checkpointing sees them again when it recomputes. No mask over the whole pack exists at any time.
Whatever a model asks for that is not computed exactly here is refused.

T = packed tokens, C = chains, H = query heads, G = key and value heads (H a multiple of G), L = tokens of one chain.
"""

import functools
import importlib.util
import inspect
import os
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from fastpo.errors import ConfigError, UnsupportedModelError
from fastpo.packing import Branch

NAME = "fastpo"
BACKENDS = ("flash_attn", "varlen", "sdpa")

# Keyword arguments that reach the attention function and do not change what it computes. Any other one that is set
# (a position bias, sparse indices, a cache) belongs to a kind of attention that is not computed here.
_HARMLESS = frozenset(
    "position_ids cache_position position_embeddings use_cache output_attentions output_hidden_states "
    "output_router_logits num_items_in_batch return_dict is_causal layer_idx deterministic logits_to_keep".split()
)
# Rows of the score matrix that are alive at a time in the two paths that form it (sliding window, soft cap or sinks).
_QUERY_BLOCK = 512


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where the causal chains of a packed row lie. Host integers; the device copy only where a kernel reads it."""

    cu_seqlens: tuple[int, ...]  # C + 1 boundaries
    max_seqlen: int  # the longest way from a token back to the beginning of its prompt
    cu_seqlens_device: Tensor | None = None  # [C + 1] int32
    branches: tuple[Branch, ...] = ()

    @classmethod
    def from_chains(cls, cu_seqlens: tuple[int, ...], device: torch.device, branches: tuple[Branch, ...] = ()) -> Self:
        """The layout of chains with boundaries `cu_seqlens` (0 first) for a model on `device`; no synchronisation."""
        boundaries = tuple(cu_seqlens)
        on_device = None
        if device.type == "cuda" and not branches:
            on_device = torch.tensor(boundaries, dtype=torch.int32, pin_memory=True).to(device, non_blocking=True)
        longest = max(_lengths(boundaries))
        prompts = _prompts(boundaries, branches)
        for chain, start in enumerate(boundaries[:-1]):
            if prompt := prompts.get(start):
                longest = max(longest, prompt[1] - prompt[0] + boundaries[chain + 1] - start)
        return cls(boundaries, longest, on_device, tuple(branches))

    @property
    def lengths(self) -> list[int]:
        return _lengths(self.cu_seqlens)


def _lengths(cu_seqlens: tuple[int, ...]) -> list[int]:
    return [b - a for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False)]


def _prompts(cu_seqlens: tuple[int, ...], branches: tuple[Branch, ...]) -> dict[int, tuple[int, int]]:
    """Where the chain that begins at a token has its prompt, of chains in branches."""
    starts = iter(sorted(branches))
    out: dict[int, tuple[int, int]] = {}
    branch = next(starts, None)
    for start in cu_seqlens[:-1]:
        while branch is not None and start >= branch.stop:
            branch = next(starts, None)
        if branch is not None and start >= branch.start:
            out[start] = (branch.prompt, branch.prompt_stop)
    return out


def register() -> None:
    """Make `attn_implementation="fastpo"` known to transformers.

    No mask function goes with it: transformers then builds no mask at all, and does not search the positions for packed
    sequences, which would ask the device for an answer at every forward.
    """
    AttentionInterface.register(NAME, packed_attention)


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, Dq]
    key: Tensor,  # [1, G, T, Dq]
    value: Tensor,  # [1, G, T, Dv]
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    fastpo_layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # [H], one logit a head that takes part in the softmax and has no value
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Causal attention within each chain of `fastpo_layout` -> ([1, T, H, Dv], None)."""
    _refuse_what_is_not_computed(module, query, key, attention_mask, fastpo_layout, kwargs)
    dtype = _compute_dtype(query, value)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    dropout = dropout if module.training else 0.0
    # A window that no chain outgrows is no window.
    window = sliding_window if sliding_window and sliding_window < fastpo_layout.max_seqlen else None
    softcap = softcap or None
    # Chains on shared prompts go through no varlen kernel yet: two calls and their merge are unmeasured on a GPU.
    backend = "sdpa" if fastpo_layout.branches else _choose_backend(query, value, dropout, softcap, s_aux)
    if backend == "sdpa":
        out = _segment_attention(query, key, value, fastpo_layout, scale, dropout, window, softcap, s_aux)
    else:
        out = _varlen_attention(backend, query, key, value, fastpo_layout, scale, dropout, window, softcap)
    return out, None


def _refuse_what_is_not_computed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    layout: Layout | None,
    kwargs: dict[str, object],
) -> None:
    name = type(module).__name__
    if layout is None:
        raise UnsupportedModelError(
            f"{name} was called without fastpo's layout: either the model does not hand keyword arguments to its "
            "attention, or it was called outside fastpo; use `with policy.detached():` around generate() and forward()"
        )
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise UnsupportedModelError(f"{name} is not causal; packed attention is for causal language models")
    if attention_mask is not None:
        raise UnsupportedModelError(f"{name} builds an attention mask of its own, which packed attention would ignore")
    unknown = sorted(k for k, v in kwargs.items() if k not in _HARMLESS and v is not None)
    if unknown:
        raise UnsupportedModelError(f"{name} asks its attention for {', '.join(unknown)}, which fastpo does not know")
    tokens = layout.cu_seqlens[-1]
    if query.shape[0] != 1 or query.shape[2] != tokens or key.shape[2] != tokens:
        shapes = f"queries {tuple(query.shape)}, keys {tuple(key.shape)}"
        raise UnsupportedModelError(f"{name}: {shapes} are not one packed row of {tokens} tokens")


def _compute_dtype(query: Tensor, value: Tensor) -> torch.dtype:
    """Rotary embeddings and norms may leave queries and keys in fp32 where the projections are in 16 bits."""
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type) and value.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return value.dtype


def _choose_backend(query: Tensor, value: Tensor, dropout: float, softcap: float | None, s_aux: Tensor | None) -> str:
    fits = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and s_aux is None
    fits = fits and max(query.shape[-1], value.shape[-1]) <= 256
    usable = {
        "flash_attn": lambda: fits and flash_attn_available(),
        # FlashAttention inside PyTorch: compute capability 8.0, neither soft cap nor dropout.
        "varlen": lambda: fits and softcap is None and dropout == 0.0 and _has_varlen(query.device),
        "sdpa": lambda: True,
    }
    forced = os.environ.get("FASTPO_ATTENTION")
    if forced:
        if forced not in BACKENDS:
            raise ConfigError(f"FASTPO_ATTENTION={forced}: expected one of {', '.join(BACKENDS)}")
        if not usable[forced]():
            raise ConfigError(
                f"FASTPO_ATTENTION={forced} cannot run here: {query.dtype} on {query.device}, head size "
                f"{query.shape[-1]}, softcap {softcap}, dropout {dropout}, sinks {s_aux is not None}"
            )
        return forced
    return next(name for name in BACKENDS if usable[name]())


@functools.cache
def flash_attn_available() -> bool:
    """Whether the flash_attn package is installed and imports."""
    if importlib.util.find_spec("flash_attn") is None:
        return False
    try:
        import flash_attn  # noqa: F401
    except (ImportError, OSError) as error:  # built for another PyTorch
        import warnings

        warnings.warn(f"flash_attn is installed but does not import ({error}); using PyTorch's attention", stacklevel=2)
        return False
    return hasattr(flash_attn, "flash_attn_varlen_func")


@functools.cache
def _has_varlen(device: torch.device) -> bool:
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def _varlen_attention(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    # One head size for all three, a multiple of 8: zeros add nothing to the scores, and their columns are cut off.
    head_v = value.shape[-1]
    head = -(-max(query.shape[-1], head_v) // 8) * 8
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, head]
    # F.pad copies even where there is nothing to add.
    q, k, v = (x if x.shape[-1] == head else F.pad(x, (0, head - x.shape[-1])) for x in (q, k, v))
    cu_seqlens = layout.cu_seqlens_device.to(q.device, non_blocking=True)  # a model may span devices
    window_size = (-1, 0) if window is None else (window - 1, 0)  # tokens before, tokens after
    if backend == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        out = flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            layout.max_seqlen,
            layout.max_seqlen,
            dropout_p=dropout,
            softmax_scale=scale,
            causal=True,
            window_size=window_size,
            softcap=softcap or 0.0,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
    else:
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            layout.max_seqlen,
            layout.max_seqlen,
            scale=scale,
            window_size=window_size,
            **_gqa(q.shape[1] != k.shape[1]),
        )
    return out[..., :head_v].unsqueeze(0)


@functools.cache
def _gqa(grouped: bool) -> dict[str, Any]:
    """PyTorch 2.11's varlen_attn takes grouped heads as they come; from 2.12 on it wants to be told."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if grouped and "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Chain by chain, anywhere and in any dtype -> [1, T, H, Dv]."""
    plain = window is None and softcap is None and s_aux is None and dropout == 0.0
    if plain and query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        return _CpuAttention.apply(query, key, value, layout.cu_seqlens, layout.branches, scale)
    if query.shape[1] != key.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    outputs = []
    prompts = _prompts(layout.cu_seqlens, layout.branches)
    # One split is one concatenation in the backward; slices would each make a gradient of all T tokens.
    chains = zip(*(x.split(layout.lengths, dim=2) for x in (query, key, value)), strict=True)
    for start, (q, k, v) in zip(layout.cu_seqlens, chains, strict=False):
        if start in prompts and q.shape[2]:
            first, stop = prompts[start]
            k, v = (torch.cat([x[:, :, first:stop], own], 2) for x, own in ((key, k), (value, v)))
            out = _blocked_attention(q, k, v, scale, dropout, window, softcap, s_aux)
        elif softcap is None and s_aux is None and (window is None or window >= q.shape[2]):
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale)
        else:
            out = _blocked_attention(q, k, v, scale, dropout, window, softcap, s_aux)
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _blocked_attention(
    query: Tensor,  # [1, H, L, Dq]
    key: Tensor,  # [1, H, P + L, Dq], P tokens of a prompt before the chain
    value: Tensor,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """One chain in blocks of queries, each with the keys that it can see, so that memory is linear in L."""
    length, before = key.shape[2], key.shape[2] - query.shape[2]
    explicit = softcap is not None or s_aux is not None
    outputs = []
    for start in range(before, length, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, length)
        first = 0 if window is None else max(0, start - window + 1)
        q, k, v = query[:, :, start - before : stop - before], key[:, :, first:stop], value[:, :, first:stop]
        offset = torch.arange(start, stop, device=query.device)[:, None] - torch.arange(
            first, stop, device=query.device
        )  # [queries, keys], how far back the key lies
        visible = offset >= 0 if window is None else (offset >= 0) & (offset < window)
        if not explicit:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout, scale=scale)
        elif length > _QUERY_BLOCK and torch.is_grad_enabled():
            # The scores of one block are recomputed in the backward; kept, they would be H * L * L of every chain.
            out = checkpoint(_explicit_attention, q, k, v, visible, scale, dropout, softcap, s_aux, use_reentrant=False)
        else:
            out = _explicit_attention(q, k, v, visible, scale, dropout, softcap, s_aux)
        outputs.append(out)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    scale: float,
    dropout: float,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Scores, soft cap, mask, sinks and softmax (in fp32 or wider) as the models' own eager attention has them."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if s_aux is not None:
        sink = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    probs = torch.softmax(scores, dim=-1, dtype=wide)
    if s_aux is not None:
        probs = probs[..., :-1]
    probs = F.dropout(probs.to(value.dtype), p=dropout, training=dropout > 0.0)
    return torch.matmul(probs, value)


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
    starts, lengths = cu_seqlens[:-1], _lengths(cu_seqlens)
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


class _CpuAttention(torch.autograd.Function):
    """PyTorch's CPU flash kernel over every chain and every branch's prompt, writing straight into packed outputs.

    Against a loop over `scaled_dot_product_attention` it keeps one output instead of two, repeats no key or value head,
    and runs short chains together. A branch attends to itself and to its prompt in two calls, merged by their
    log-sum-exp; with the merged output and log-sum-exp the kernel's backward of each call is exact.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: tuple[int, ...],
        branches: tuple[Branch, ...],
        scale: float,
    ) -> Tensor:
        _, heads, tokens, width = query.shape
        plan = _plan(cu_seqlens, heads * width)
        out = query.new_empty(1, tokens + 1, heads, width)  # row T takes the padding
        lse = query.new_empty(1, tokens + 1, heads, 1, dtype=torch.promote_types(query.dtype, torch.float32))
        for group in plan:
            q, k, v = (_take(x, group) for x in (query, key, value))
            result, group_lse = _flash(q, k, v, 0.0, True, scale=scale)
            _put(out, result, group)
            _put(lse, group_lse.unsqueeze(-1), group)
        for start, stop, first, last in branches:
            result, prompt_lse = _flash(
                query[:, :, start:stop], key[:, :, first:last], value[:, :, first:last], 0.0, False, scale=scale
            )
            own, own_lse = out[:, start:stop], lse[:, start:stop]
            prompt_lse = prompt_lse.transpose(1, 2).unsqueeze(-1)  # [1, tokens of the branch, H, 1]
            merged = torch.logaddexp(own_lse, prompt_lse)
            own.copy_(own * (own_lse - merged).exp() + result.transpose(1, 2) * (prompt_lse - merged).exp())
            own_lse.copy_(merged)
        out, lse = out[:, :tokens], lse[:, :tokens]
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.branches, ctx.scale = plan, branches, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        tokens = query.shape[2]
        grads = [x.new_empty(1, tokens + 1, x.shape[1], x.shape[3]) for x in (query, key, value)]
        dout, out, lse = dout.transpose(1, 2), out.transpose(1, 2), lse.transpose(1, 2)
        for group in ctx.plan:
            q, k, v, o, do, group_lse = (_take(x, group) for x in (query, key, value, out, dout, lse))
            if group.padding is not None:  # padded queries must add nothing to the real keys and values
                do.transpose(1, 2).flatten(0, 1).index_fill_(0, group.padding, 0.0)
                # Not another token's, of which an exponential might be infinite.
                group_lse.transpose(1, 2).flatten(0, 1).index_fill_(0, group.padding, _NO_WEIGHT)
            parts = _flash_backward(do, q, k, v, o, group_lse.squeeze(-1), 0.0, True, scale=ctx.scale)
            for grad, part in zip(grads, parts, strict=True):
                _put(grad, part, group)
        for start, stop, first, last in ctx.branches:
            of_branch, of_prompt = slice(start, stop), slice(first, last)
            parts = _flash_backward(
                dout[:, :, of_branch], query[:, :, of_branch], key[:, :, of_prompt], value[:, :, of_prompt],
                out[:, :, of_branch], lse[:, :, of_branch].squeeze(-1), 0.0, False, scale=ctx.scale,
            )  # fmt: skip
            for grad, part, rows in zip(grads, parts, (of_branch, of_prompt, of_prompt), strict=True):
                grad[:, rows] += part.transpose(1, 2)
        return *(g[:, :tokens].transpose(1, 2) for g in grads), None, None, None


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_NO_WEIGHT = 1e30  # a log-sum-exp under which every score's exponential is 0


def _take(x: Tensor, group: _Group) -> Tensor:
    """[1, heads, T, D] -> [size, heads, length, D]."""
    if group.source is None:
        return x[:, :, group.start : group.start + group.length]
    rows = x[0].transpose(0, 1).index_select(0, group.source)  # [size * length, heads, D]
    return rows.view(group.size, group.length, *rows.shape[1:]).transpose(1, 2)


def _put(out: Tensor, part: Tensor, group: _Group) -> None:
    """part [size, heads, length, D] into out [1, T + 1, heads, D]."""
    part = part.transpose(1, 2)
    if group.sink is None:
        out[:, group.start : group.start + group.length] = part
    else:
        out[0].index_copy_(0, group.sink, part.reshape(-1, *part.shape[2:]))
