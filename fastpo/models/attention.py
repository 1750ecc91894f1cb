"""Attention over packed sequences, registered in transformers under the name "fastpo".

Many causal chains lie end to end in one row of T tokens; a token attends to its own chain, and where its response
shares a prompt with others, to that prompt: a `Branch`. They come as a `Layout` through the model's keyword arguments,
so that gradient checkpointing sees them again when it recomputes. No mask over the whole pack exists at any time.
Whatever a model asks for that is not computed exactly here is refused. docs/attention.md says which backend runs what.

T = packed tokens, C = chains, H = query heads, G = key and value heads (H a multiple of G), L = tokens of one chain.
"""

import contextlib
import functools
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from fastpo.errors import ConfigError, UnsupportedModelError
from fastpo.models.cpu_attention import can_run, compiled_tree_attention
from fastpo.models.layout import Layout, prompts_of_chains
from fastpo.models.tree_attention import cpu_tree_attention, triton_tree_attention, varlen_tree_attention
from fastpo.ops import chips
from fastpo.ops.inputs import HAS_TRITON, INTERPRETED

NAME = "fastpo"
BACKENDS = ("flash_attn", "varlen", "triton", "sdpa")  # in order of preference
UNPACKED = "FASTPO_ATTENTION=own runs it unpacked, every response alone with its prompt through the model's own layers"

# Keyword arguments that reach the attention function and do not change what it computes. Any other one that is set
# (a position bias, sparse indices, a cache) belongs to a kind of attention that is not computed here.
_HARMLESS = frozenset(
    "position_ids cache_position position_embeddings use_cache output_attentions output_hidden_states "
    "output_router_logits num_items_in_batch return_dict is_causal layer_idx deterministic logits_to_keep".split()
)
# Rows of the score matrix that are alive at a time in the two paths that form it (sliding window, soft cap or sinks).
_QUERY_BLOCK = 512


def runs_unpacked() -> bool:
    """Whether FASTPO_ATTENTION=own asks for the model's own attention, one chain at a time."""
    return os.environ.get("FASTPO_ATTENTION") == "own"


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
    if getattr(module, _TEMPERATURE, False):
        query = _tempered(module, query, fastpo_layout)
    if (chunk := chunk_of(module)) is not None:
        fastpo_layout = fastpo_layout.chunked(chunk)
    dtype = compute_dtype(query, value)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    dropout = dropout if module.training else 0.0
    # A window that no chain outgrows is no window.
    window = sliding_window if sliding_window and sliding_window < fastpo_layout.max_seqlen else None
    softcap = softcap or None
    backend = _choose_backend(query, value, bool(fastpo_layout.branches), dropout, window, softcap, s_aux)
    if backend == "sdpa":
        out = _segment_attention(query, key, value, fastpo_layout, scale, dropout, window, softcap, s_aux)
    elif backend == "triton":
        q, k, v = (_token_major(x) for x in (query, key, value))
        out = triton_tree_attention(
            q, k, v, fastpo_layout, scale=scale, window=window, softcap=softcap, sink=s_aux
        ).unsqueeze(0)
    else:
        out = _varlen_attention(backend, query, key, value, fastpo_layout, scale, dropout, window, softcap)
    return out, None


def chunk_of(module: nn.Module) -> int | None:
    """Tokens of a chunk, in a layer whose tokens see their own chunk only: Llama 4 says so in its mask alone."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None or layer is None or layer >= len(kinds) or kinds[layer] != "chunked_attention":
        return None
    return getattr(config, "attention_chunk_size", None)


_TEMPERATURE = "fastpo_temperature"  # attribute of attention layers whose queries are scaled here


@contextlib.contextmanager
def own_temperatures(trunk: nn.Module, packed: bool) -> Iterator[None]:
    """Llama 4 scales the queries of its layers without rotary embedding by their place in the row that it is given;
    inside the block that is done here, by their place in the chain. Nothing where rows are not `packed`."""
    layers = [m for m in trunk.modules() if getattr(m, "attn_temperature_tuning", False) and hasattr(m, "floor_scale")]
    layers = [m for m in layers if packed and not getattr(m, "use_rope", False)]
    for layer in layers:
        setattr(layer, _TEMPERATURE, layer.attn_temperature_tuning)
        layer.attn_temperature_tuning = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.attn_temperature_tuning = getattr(layer, _TEMPERATURE)
            delattr(layer, _TEMPERATURE)


def _tempered(module: Any, query: Tensor, layout: Layout) -> Tensor:
    """Queries [1, H, T, D] by the formula of the model."""
    positions = layout.positions(query.device).float()
    scales = torch.log1p(torch.floor((positions + 1.0) / module.floor_scale)) * module.attn_scale + 1.0
    return (query * scales[:, None]).to(query.dtype)


def _token_major(x: Tensor) -> Tensor:
    """[1, heads, T, size] -> [T, heads, size]."""
    return x[0].transpose(0, 1)


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
            f"attention ({UNPACKED}), or it was called outside fastpo; use `with policy.detached():` around generate() "
            "and forward()"
        )
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise UnsupportedModelError(f"{name} is not causal; packed attention is for causal language models")
    if attention_mask is not None:
        raise UnsupportedModelError(
            f"{name} builds an attention mask of its own, which packed attention would ignore; {UNPACKED}"
        )
    unknown = sorted(k for k, v in kwargs.items() if k not in _HARMLESS and v is not None)
    if unknown:
        raise UnsupportedModelError(
            f"{name} asks its attention for {', '.join(unknown)}, which fastpo does not know; {UNPACKED}"
        )
    tokens = layout.cu_seqlens[-1]
    if query.shape[0] != 1 or query.shape[2] != tokens or key.shape[2] != tokens:
        shapes = f"queries {tuple(query.shape)}, keys {tuple(key.shape)}"
        raise UnsupportedModelError(f"{name}: {shapes} are not one packed row of {tokens} tokens; {UNPACKED}")


def compute_dtype(query: Tensor, value: Tensor) -> torch.dtype:
    """Rotary embeddings and norms may leave queries and keys in fp32 where the projections are in 16 bits."""
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type) and value.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return value.dtype


def _choose_backend(
    query: Tensor,
    value: Tensor,
    branches: bool,
    dropout: float,
    window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> str:
    head = max(query.shape[-1], value.shape[-1])
    usable = _usable(query.device, query.dtype, head, branches, dropout, window, softcap, s_aux is not None)
    forced = os.environ.get("FASTPO_ATTENTION")
    if forced:
        if forced not in BACKENDS:
            raise ConfigError(f"FASTPO_ATTENTION={forced}: expected one of {', '.join(BACKENDS)}, or own")
        if not usable[forced]():
            raise ConfigError(
                f"FASTPO_ATTENTION={forced} cannot run here: {query.dtype} on {query.device}, head size {head}, window "
                f"{window}, softcap {softcap}, dropout {dropout}, sinks {s_aux is not None}, shared prompts {branches}"
            )
        return forced
    if query.device.type == "cpu":
        return "sdpa"
    return next(name for name in BACKENDS if usable[name]())


def _usable(
    device: torch.device, dtype: torch.dtype, head: int, branches: bool, dropout: float, window: int | None,
    softcap: float | None, sinks: bool,
) -> dict[str, Callable[[], bool]]:  # fmt: skip
    """By backend, whether it computes that."""
    flash = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and not sinks and head <= 256
    # On shared prompts two calls are merged. A window's reach into the prompt is then another for every response, which
    # one call for all of them cannot say; and the random state of dropout would be two.
    flash = flash and not (branches and (window is not None or dropout > 0.0))
    return {
        "flash_attn": lambda: flash and flash_attn_available() and not (branches and _old_flash_attn()),
        # FlashAttention inside PyTorch: compute capability 8.0, neither soft cap nor dropout.
        "varlen": lambda: flash and softcap is None and dropout == 0.0 and _has_varlen(device),
        "triton": lambda: dropout == 0.0 and _has_triton_kernels(device) and head <= _triton_size(dtype),
        "sdpa": lambda: True,
    }


@dataclass(frozen=True)
class Kind:
    """What one layer asks of its attention."""

    head: int  # the larger of the sizes of queries and values
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0
    sinks: bool = False


def tree_backend(kind: Kind, device: torch.device | None, dtype: torch.dtype) -> str | None:
    """The backend that computes shared prompts in such a layer on a GPU; None where that is another than without
    them, or has no form for trees (sdpa). device: None for an NVIDIA GPU of today that is not here."""
    if device is None:
        flash = dtype in (torch.bfloat16, torch.float16) and not kind.sinks and kind.head <= 256
        flash = flash and kind.window is None and kind.softcap is None and kind.dropout == 0.0
        return "varlen" if flash else None
    forced = os.environ.get("FASTPO_ATTENTION")
    found = []
    for branches in (False, True):
        usable = _usable(device, dtype, kind.head, branches, kind.dropout, kind.window, kind.softcap, kind.sinks)
        names = [name for name in BACKENDS if forced in (None, "", name) and usable[name]()]
        found.append(names[0] if names else None)
    return found[0] if found[0] == found[1] and found[0] != "sdpa" else None


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
def _old_flash_attn() -> bool:
    """Whether the package is from before 2.7, whose functions of forward and backward take other arguments."""
    import flash_attn

    return tuple(int(part) for part in flash_attn.__version__.split(".")[:2]) < (2, 7)


def _has_triton_kernels(device: torch.device) -> bool:
    """GPUs of AMD, and of NVIDIA from compute capability 8.0 on, if Triton compiles for them; or the interpreter."""
    if device.type != "cuda":
        return INTERPRETED
    known = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return HAS_TRITON and known and chips.triton_compiles(device.index)


def _triton_size(dtype: torch.dtype) -> int:
    """The largest head of the Triton kernels."""
    from fastpo.kernels.attention import MAX_HEAD_SIZE

    return MAX_HEAD_SIZE.get(dtype, 0)


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
    q, k, v = (_token_major(x) for x in (query, key, value))
    # F.pad copies even where there is nothing to add.
    q, k, v = (x if x.shape[-1] == head else F.pad(x, (0, head - x.shape[-1])) for x in (q, k, v))
    if layout.branches:
        merged = varlen_tree_attention(backend, q, k, v, layout, scale=scale, softcap=softcap)
        return merged[..., :head_v].unsqueeze(0)
    cu_seqlens = layout.varlen_tables(q.device).cu_seqlens
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
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.attention.varlen import varlen_attn

        # From 2.15 on PyTorch prefers cuDNN on Hopper and Blackwell, for causal calls too. Which is faster, and whether
        # its numbers hold, is not measured: FlashAttention, as on shared prompts. The backward takes what this chose.
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
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
        q, k, v = (_token_major(x) for x in (query, key, value))
        compiled = can_run(q, k, v, scale)
        run = compiled_tree_attention if compiled else cpu_tree_attention
        return run(q, k, v, layout, scale=scale).unsqueeze(0)
    if query.shape[1] != key.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    outputs = []
    prompts = prompts_of_chains(layout.cu_seqlens, layout.branches)
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
