"""Where the trees of a packed row lie: host integers, and the small tables that kernels read, made once a batch.

T = packed tokens, C = chains, B = branches. A chain is a run of tokens that attends causally to itself; the chains of a
branch attend to the prompt of another chain as well.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from fastpo.data.packing import Branch
from fastpo.data.prefetch import to_device
from fastpo.errors import UnsupportedModelError


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
    fwd_blocks: Tensor  # [NQ, 5] int32, of queries
    dq_blocks: Tensor  # [NQ, 5] int32, of queries
    dkv_blocks: Tensor  # [NK, 6] int32, of keys


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

    def positions(self, device: torch.device) -> Tensor:
        """Where each token [T] is in its sequence, prompt included; int64 on `device`."""
        key = ("positions", device)
        if key not in self._tables:
            prompts = prompts_of_chains(self.cu_seqlens, self.branches)
            before = [b - a for a, b in (prompts.get(start, (0, 0)) for start in self.cu_seqlens[:-1])]
            parts = [np.arange(n, n + length) for n, length in zip(before, self.lengths, strict=True)]
            (self._tables[key],) = _to_device([np.concatenate(parts)], device)
        return self._tables[key]

    def chunked(self, size: int) -> "Layout":
        """The layout in which a token sees only those of its own chunk: positions [k size, (k + 1) size).

        UnsupportedModelError where a shared prompt and its responses do not fit in one.
        """
        if self.max_seqlen <= size:
            return self
        key = ("chunked", size)
        if key not in self._tables:
            prompts = prompts_of_chains(self.cu_seqlens, self.branches)
            boundaries = [0]
            for start, stop in itertools.pairwise(self.cu_seqlens):
                first, end = prompts.get(start, (0, 0))
                if end > first and end - first + stop - start > size:
                    raise UnsupportedModelError(
                        f"a prompt is shared by responses that go beyond the attention's chunk of {size} tokens: pass "
                        "share_prompts=never"
                    )
                boundaries += [*range(start + size, stop, size), stop]
            self._tables[key] = Layout.from_chains(tuple(boundaries), self.branches)
        return self._tables[key]

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

    def tree_blocks(self, device: torch.device, fwd_queries: int, dq_queries: int, dkv_keys: int) -> TreeBlocks:
        """Blocks of at most so many queries and keys, likewise."""
        key = ("tree", device, fwd_queries, dq_queries, dkv_keys)
        if key not in self._tables:
            forest = _Forest(self.cu_seqlens, self.branches)
            arrays = (
                forest.chain_start, forest.query_blocks(fwd_queries), forest.query_blocks(dq_queries),
                forest.key_blocks(dkv_keys),
            )  # fmt: skip
            self._tables[key] = TreeBlocks(*_to_device((a.astype(np.int32) for a in arrays), device))
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
    return to_device((torch.from_numpy(np.ascontiguousarray(a)) for a in arrays), device)


_Mark = tuple[int, int, tuple[int, ...]]  # first token, end, what goes with it


class _Forest:
    """The tables of kernels/attention.py, int64; blocks with the most work come first.

    A block may span chains, as long as all of it continues the same prompt, or is the prompt of the same branch: the
    kernels tell chains apart by `chain_start`. So short responses share a block.
    """

    def __init__(self, cu_seqlens: tuple[int, ...], branches: tuple[Branch, ...]):
        if len({b.prompt for b in branches}) < len(branches):
            raise ValueError(f"branches that share a prompt must be one branch: {branches}")
        boundaries = np.array(cu_seqlens, np.int64)
        lengths = np.diff(boundaries)
        self.total, self.branches = int(boundaries[-1]), branches
        self.chain_start, self.chain_stop = np.repeat(boundaries[:-1], lengths), np.repeat(boundaries[1:], lengths)

    def query_blocks(self, size: int) -> np.ndarray:  # [NQ, 5]
        marks: list[_Mark] = [(b.start, b.stop, (b.prompt, b.prompt_stop)) for b in self.branches]
        first, stop, prompts = _blocks(marks, self.total, size, 2)
        own = self.chain_start[first]
        keys = stop - own + prompts[:, 1] - prompts[:, 0]
        return np.column_stack([first, stop, own, prompts])[np.argsort(-keys, kind="stable")]

    def key_blocks(self, size: int) -> np.ndarray:  # [NK, 6]
        marks: list[_Mark] = [(b.prompt, b.prompt_stop, (b.start, b.stop, b.prompt_stop)) for b in self.branches]
        first, stop, branches = _blocks(marks, self.total, size, 3)
        own = self.chain_stop[stop - 1]
        queries = own - first + branches[:, 1] - branches[:, 0]
        return np.column_stack([first, stop, own, branches])[np.argsort(-queries, kind="stable")]


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
