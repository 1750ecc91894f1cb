"""Where the trees of a packed row lie: host integers, and the small tables that kernels read, made once a batch.

T = packed tokens, C = chains, B = branches. A chain is a run of tokens that attends causally to itself; the chains of a
branch attend to the prompt of another chain as well.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from fastpo.packing import Branch


class VarlenTables(NamedTuple):
    """What FlashAttention's calls take: all chains on themselves, and all branches on their prompts."""

    cu_seqlens: Tensor  # [C + 1] int32
    branch_rows: Tensor  # [tokens of branches] int64
    cu_branches: Tensor  # [B + 1] int32
    prompt_rows: Tensor  # [tokens of their prompts] int64
    cu_prompts: Tensor  # [B + 1] int32


class TreeBlocks(NamedTuple):
    """The tables of kernels/attention.py, which explains them."""

    chain_start: Tensor  # [T] int32
    query_blocks: Tensor  # [NQ, 5] int32
    key_blocks: Tensor  # [NK, 6] int32


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where the causal chains of a packed row lie, and which of them continue a prompt."""

    cu_seqlens: tuple[int, ...]  # C + 1 boundaries
    max_seqlen: int  # the longest way from a token back to the beginning of its prompt
    branches: tuple[Branch, ...] = ()
    _tables: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_chains(cls, cu_seqlens: tuple[int, ...], branches: tuple[Branch, ...] = ()) -> Self:
        """The layout of chains with boundaries `cu_seqlens` (0 first)."""
        boundaries = tuple(cu_seqlens)
        branches = tuple(b for b in branches if b.start < b.stop and b.prompt < b.prompt_stop)
        longest = max(_lengths(boundaries))
        prompts = prompts_of_chains(boundaries, branches)
        for chain, start in enumerate(boundaries[:-1]):
            if prompt := prompts.get(start):
                longest = max(longest, prompt[1] - prompt[0] + boundaries[chain + 1] - start)
        return cls(boundaries, longest, branches)

    @property
    def lengths(self) -> list[int]:
        return _lengths(self.cu_seqlens)

    @property
    def longest_chain(self) -> int:
        return max(self.lengths)

    def varlen_tables(self, device: torch.device) -> VarlenTables:
        """On `device`, copied there once and without a synchronisation; a model may span devices."""
        key = ("varlen", device)
        if key not in self._tables:
            arrays = [np.array(self.cu_seqlens, np.int32)]
            for ranges in ([b[:2] for b in self.branches], [b[2:] for b in self.branches]):
                arrays.append(np.concatenate([np.arange(0), *(np.arange(*r) for r in ranges)]))
                arrays.append(np.cumsum([0, *(b - a for a, b in ranges)]).astype(np.int32))
            self._tables[key] = VarlenTables(*_to_device(arrays, device))
        return self._tables[key]

    def tree_blocks(self, device: torch.device, query_block: int, key_block: int) -> TreeBlocks:
        """Blocks of at most so many queries and keys, likewise."""
        key = ("tree", device, query_block, key_block)
        if key not in self._tables:
            arrays = _tree_blocks(self.cu_seqlens, self.branches, query_block, key_block)
            self._tables[key] = TreeBlocks(*_to_device(arrays, device))
        return self._tables[key]


def _lengths(cu_seqlens: tuple[int, ...]) -> list[int]:
    return [b - a for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False)]


def prompts_of_chains(cu_seqlens: tuple[int, ...], branches: tuple[Branch, ...]) -> dict[int, tuple[int, int]]:
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


def _to_device(arrays: Iterable[np.ndarray], device: torch.device) -> list[Tensor]:
    tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]
    if device.type == "cpu":
        return tensors
    return [t.pin_memory().to(device, non_blocking=True) for t in tensors]


_Mark = tuple[int, int, tuple[int, ...]]  # first token, end, what goes with it


def _tree_blocks(
    cu_seqlens: tuple[int, ...], branches: tuple[Branch, ...], query_block: int, key_block: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(chain_start [T], query_blocks [NQ, 5], key_blocks [NK, 6]), int32; the blocks with the most work first.

    A block may span chains, as long as all of it continues the same prompt, or is the prompt of the same branch: the
    kernels tell chains apart by `chain_start`. So short responses share a block.
    """
    boundaries = np.array(cu_seqlens, np.int64)
    lengths = np.diff(boundaries)
    chain_start, chain_stop = np.repeat(boundaries[:-1], lengths), np.repeat(boundaries[1:], lengths)
    total = int(boundaries[-1])

    continuing: list[_Mark] = [(b.start, b.stop, (b.prompt, b.prompt_stop)) for b in branches]
    first, stop, prompts = _blocks(continuing, total, query_block, 2)
    queries = np.column_stack([first, stop, chain_start[first], prompts])
    seen = stop - chain_start[first] + prompts[:, 1] - prompts[:, 0]

    if len({b.prompt for b in branches}) < len(branches):
        raise ValueError(f"branches that share a prompt must be one branch: {branches}")
    continued: list[_Mark] = [(b.prompt, b.prompt_stop, (b.start, b.stop, b.prompt_stop)) for b in branches]
    first, stop, following = _blocks(continued, total, key_block, 3)
    keys = np.column_stack([first, stop, chain_stop[stop - 1], following])
    seers = chain_stop[stop - 1] - first + following[:, 1] - following[:, 0]

    queries, keys = queries[np.argsort(-seen, kind="stable")], keys[np.argsort(-seers, kind="stable")]
    return chain_start.astype(np.int32), queries.astype(np.int32), keys.astype(np.int32)


def _blocks(marks: list[_Mark], total: int, size: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[0, total) in blocks of at most `size`, none of which crosses the border of a mark: (beginnings, ends, the
    columns that go with the mark, zeros outside marks)."""
    runs: list[_Mark] = []
    at = 0
    nothing: tuple[int, ...] = (0,) * columns
    for mark in [*sorted(marks), (total, total, nothing)]:
        if at < mark[0]:
            runs.append((at, mark[0], nothing))
        if mark[0] < mark[1]:
            runs.append(mark)
        at = mark[1]
    first = np.concatenate([np.arange(a, b, size) for a, b, _ in runs])
    counts = [-(-(b - a) // size) for a, b, _ in runs]
    stop = np.minimum(first + size, np.repeat([b for _, b, _ in runs], counts))
    return first, stop, np.repeat(np.array([v for *_, v in runs]).reshape(-1, columns), counts, axis=0)
