"""Position embeddings that depend on a row's length, for every chain of a packed row as if it were alone.

Dynamic NTK and LongRoPE take their frequencies from the longest position of a forward. In a packed row that would be
the longest neighbour's. Here the model's own module is called once for every group of chains whose lengths mean the
same to it, from a fresh state, and its results are put back in the order of the row.

T = packed tokens.
"""

import contextlib
import itertools
from collections.abc import Hashable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastpo.attention import chunk_of
from fastpo.data import Example
from fastpo.errors import UnsupportedModelError
from fastpo.layout import Layout, prompts_of_chains

_layout: ContextVar[Layout | None] = ContextVar("fastpo_layout", default=None)  # of the forward that runs


def _rules(module: nn.Module) -> list[tuple[str, int]]:
    """(kind, the length up to which frequencies stand still) of each rule of a rotary module that reads lengths."""
    kinds, config = getattr(module, "rope_type", None), getattr(module, "config", None)
    if kinds is None or config is None:
        return []
    rules = []
    for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
        parameters = config.rope_parameters
        parameters = parameters if layer_type is None else parameters[layer_type]
        if kind == "longrope":
            rules.append((kind, int(parameters["original_max_position_embeddings"])))
        elif "dynamic" in kind:
            rules.append((kind, int(getattr(module, "original_max_seq_len", config.max_position_embeddings))))
    return rules


def modules_by_length(trunk: nn.Module) -> list[nn.Module]:
    """The trunk's modules whose results depend on the longest position of the call."""
    return [module for module in trunk.modules() if _rules(module)]


def fresh(model: nn.Module) -> None:
    """Frequencies as they were before any long row: dynamic NTK keeps those of the longest one that it has seen."""
    for module in model.modules():
        if not any("dynamic" in kind for kind, _ in _rules(module)):
            continue
        for name in [n for n in dict(module.named_buffers(recurse=False)) if n.endswith("original_inv_freq")]:
            prefix = name.removesuffix("original_inv_freq")
            old = getattr(module, f"{prefix}inv_freq")
            module.register_buffer(
                f"{prefix}inv_freq", getattr(module, name).to(old.device, copy=True), persistent=False
            )
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
        module.max_seq_len_cached = module.original_max_seq_len


def unshare(trunk: nn.Module, examples: Sequence[Example]) -> int:
    """Rows whose shared prompt would need several frequencies, or chunks, get a copy each; how many those are."""
    limits = [limit for module in modules_by_length(trunk) for _, limit in _rules(module)]
    limits += [chunk for module in trunk.modules() if (chunk := chunk_of(module)) is not None]
    count = 0
    for example in examples if limits else ():
        longest = max(len(example.prompt_of(k)) + len(r) for k, r in enumerate(example.responses))
        if longest > min(limits) and (example.share or example.share_from):
            example.share, example.share_from, count = False, 0, count + 1
    return count


@contextlib.contextmanager
def forward_of(layout: Layout) -> Iterator[None]:
    """Says to the modules of `by_chain` which chains the forward inside the block runs on."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


@contextlib.contextmanager
def by_chain(trunk: nn.Module) -> Iterator[None]:
    """Inside the block the trunk's rotary modules give every chain the embeddings that it has alone."""
    changed = modules_by_length(trunk)
    for module in changed:
        module.forward = _wrapped(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward
            fresh(module)


def _wrapped(module: nn.Module) -> Any:
    own, rules = module.forward, _rules(module)

    def forward(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        layout = _layout.get()
        if layout is None or position_ids.shape[-1] != layout.cu_seqlens[-1]:
            fresh(module)
            return own(x, position_ids, *args, **kwargs)
        groups, back = _groups(layout, rules, x.device)
        parts = []
        for rows in groups:
            fresh(module)
            parts.append(own(x, position_ids.index_select(-1, rows), *args, **kwargs))
        fresh(module)
        if len(parts) == 1:
            return parts[0]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts, dim=-2).index_select(-2, back)
        return type(parts[0])(torch.cat(p, dim=-2).index_select(-2, back) for p in zip(*parts, strict=True))

    return forward


def _groups(layout: Layout, rules: list[tuple[str, int]], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """(the tokens of each group of chains that have one set of frequencies; where each token [T] is among them all)."""
    key = ("rotary", tuple(rules), device)
    if key not in layout._tables:
        prompts = prompts_of_chains(layout.cu_seqlens, layout.branches)
        of_chain: dict[int, Hashable] = {}
        tokens: dict[Hashable, list[np.ndarray]] = {}
        for start, stop in itertools.pairwise(layout.cu_seqlens):
            before = prompts.get(start)
            length = stop - start + (before[1] - before[0] if before else 0)
            group = tuple(length > limit if kind == "longrope" else max(length, limit) for kind, limit in rules)
            of_chain[start] = group
            if before and of_chain.get(before[0], group) != group:
                raise UnsupportedModelError(
                    "responses of different lengths share a prompt, whose position embeddings depend on the length of "
                    "the whole: pass share_prompts=never"
                )
            tokens.setdefault(group, []).append(np.arange(start, stop))
        order = [np.concatenate(parts) for parts in tokens.values()]
        back = np.argsort(np.concatenate(order), kind="stable")
        layout._tables[key] = [torch.from_numpy(o).to(device) for o in order], torch.from_numpy(back).to(device)
    return layout._tables[key]
