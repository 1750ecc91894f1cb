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

from fastpo.data import Example
from fastpo.errors import UnsupportedModelError
from fastpo.models.attention import chunk_of
from fastpo.models.layout import Layout, prompts_of_chains

# Of the policy's forward that runs: its layout, or None where every chain runs alone; and how many tokens at the end of
# each row are not in the trunk but are part of its length: its last one, which predicts nothing.
_forward: ContextVar[tuple[Layout | None, int] | None] = ContextVar("fastpo_forward", default=None)


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
def forward_of(layout: Layout | None, missing: int) -> Iterator[None]:
    """Says to the modules of `by_chain` which chains the forward inside the block runs on (None: one alone), and how
    many tokens of each row are `missing` at its end."""
    token = _forward.set((layout, missing))
    try:
        yield
    finally:
        _forward.reset(token)


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

    def of_length(x: Tensor, position_ids: Tensor, length: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The embeddings of these positions [..., n] in a row of this length [1], from a fresh state."""
        fresh(module)
        last = (length - 1).expand(*position_ids.shape[:-1], 1)
        out = own(x, torch.cat([position_ids, last], dim=-1), *args, **kwargs)
        if isinstance(out, Tensor):
            return out.narrow(-2, 0, out.shape[-2] - 1)
        return type(out)(part.narrow(-2, 0, part.shape[-2] - 1) for part in out)

    def forward(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        layout, missing = _forward.get() or (None, 0)
        if layout is None or position_ids.shape[-1] != layout.cu_seqlens[-1]:
            if not missing:
                fresh(module)
                return own(x, position_ids, *args, **kwargs)
            return of_length(x, position_ids, position_ids.max().reshape(1) + 1 + missing, *args, **kwargs)
        groups, back = _groups(layout, rules, missing, x.device)
        parts = [of_length(x, position_ids.index_select(-1, rows), length, *args, **kwargs) for rows, length in groups]
        fresh(module)
        if len(parts) == 1:
            return parts[0]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts, dim=-2).index_select(-2, back)
        return type(parts[0])(torch.cat(p, dim=-2).index_select(-2, back) for p in zip(*parts, strict=True))

    return forward


def _groups(
    layout: Layout, rules: list[tuple[str, int]], missing: int, device: torch.device
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """(the tokens of each group of chains that have one set of frequencies, and a length [1] that means it; where each
    token [T] is among them all)."""
    key = ("rotary", tuple(rules), missing, device)
    if key not in layout._tables:
        prompts = prompts_of_chains(layout.cu_seqlens, layout.branches)
        of_chain: dict[int, Hashable] = {}
        tokens: dict[Hashable, list[np.ndarray]] = {}
        lengths: dict[Hashable, int] = {}
        for start, stop in itertools.pairwise(layout.cu_seqlens):
            before = prompts.get(start)
            length = stop - start + (before[1] - before[0] if before else 0) + missing
            group = tuple(length > limit if kind == "longrope" else max(length, limit) for kind, limit in rules)
            of_chain[start] = group
            if before and of_chain.get(before[0], group) != group:
                raise UnsupportedModelError(
                    "responses of different lengths share a prompt, whose position embeddings depend on the length of "
                    "the whole: pass share_prompts=never"
                )
            tokens.setdefault(group, []).append(np.arange(start, stop))
            lengths[group] = max(length, lengths.get(group, 0))
        order = [np.concatenate(parts) for parts in tokens.values()]
        back = np.argsort(np.concatenate(order), kind="stable")
        groups = [(torch.from_numpy(rows).to(device), torch.tensor([lengths[group]], device=device))
                  for group, rows in zip(tokens, order, strict=True)]  # fmt: skip
        layout._tables[key] = groups, torch.from_numpy(back).to(device)
    return layout._tables[key]
