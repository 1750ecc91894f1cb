"""What stands where in the trunk's row of a packed batch, and which part of it attends to which."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Branch(NamedTuple):
    """Whole chains [start, stop) that continue the first tokens of another chain, [prompt, prompt_stop)."""

    start: int
    stop: int
    prompt: int
    prompt_stop: int


class TrunkRow:
    """Lays out the row: prompts and responses one after another, shared prompts once."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []  # one a segment
        self.positions: list[np.ndarray] = []  # one a call of `_chain`
        self.seg_lengths: list[int] = []
        self.seg_parents: list[int] = []
        self.chain_lengths: list[int] = []
        self.branches: list[Branch] = []
        self.size = 0  # tokens so far
        self.root = self.root_segment = self.after_first = 0  # of the tree's prompt; where its first response ends
        # By response of a shared prompt: what predicts its tokens, and where it begins.
        self.placed: dict[bytes, tuple[np.ndarray, int]] = {}
        self.parts: list[tuple[int, int]] = []  # of the trunk: each prompt and each response of each row

    def begin_row(self, opens: bool) -> None:
        """A row of data; `opens`: it begins a tree."""
        if opens:
            self.root, self.root_segment = self.size, len(self.seg_parents)
            self.placed.clear()

    def add(self, prompt: np.ndarray, response: np.ndarray, share: bool, whole: bool = False) -> np.ndarray:
        """A response, with its prompt unless that is shared and stands there; returns the positions that predict it.
        `whole`: with its last token, which predicts nothing."""
        key = response.tobytes() if share else b""
        tokens = response if whole else response[:-1]
        if not (share and key in self.placed):
            start = self.size
            if share and self.placed:
                self._chain([tokens], [self.root_segment], len(prompt))
                last, first = self.root + len(prompt) - 1, start
            else:
                self._chain([prompt, tokens], [-1, len(self.seg_parents)], 0)
                self.after_first = self.size
                first = start + len(prompt)
                last = first - 1
            rows = np.concatenate([[last], np.arange(first, first + len(response) - 1)])
            if share:
                self.placed[key] = rows, first
        else:
            rows, first = self.placed[key]
        prompt_stop = int(rows[0]) + 1
        self.parts += [(prompt_stop - len(prompt), prompt_stop), (first, first + len(tokens))]
        return rows

    def position(self, token: int) -> int:
        """Where that token of the last response's prompt and itself is."""
        (prompt, prompt_stop), (first, _) = self.parts[-2:]
        length = prompt_stop - prompt
        return prompt + token if token < length else first + token - length

    def uses(self) -> Tensor:
        """How many responses each token is part of; 0 for padding. -> [T] fp32"""
        counts = np.zeros(self.size, np.float32)
        for start, stop in self.parts:
            counts[start:stop] += 1
        return torch.from_numpy(counts)

    def _chain(self, segments: list[np.ndarray], parents: list[int], first_position: int) -> None:
        """Segments whose positions count on; one without tokens is none of attention's chains."""
        length = sum(map(len, segments))
        self.ids += segments
        self.positions.append(np.arange(first_position, first_position + length))
        self.seg_parents += parents
        self.seg_lengths += map(len, segments)
        if length:
            self.chain_lengths.append(length)
        self.size += length

    def end_shared_row(self, opens: bool, prompt_length: int) -> None:
        """What came after the tree's first response branches off its prompt."""
        if self.size == self.after_first:
            return
        if not opens and self.branches and self.branches[-1].prompt == self.root:
            self.branches.pop()  # of the same tree, one row ago
        self.branches.append(Branch(self.after_first, self.size, self.root, self.root + prompt_length))

    def pad(self, bucket: int) -> int:
        """Fills the row up to a multiple of `bucket`; returns by how much."""
        padding = -self.size % bucket
        # No longer than the rows' own chains: padding has no position, and asks for no window, that they do not.
        longest = max(self.chain_lengths, default=1)
        for first in range(0, padding, longest):
            self._chain([np.zeros(min(longest, padding - first), np.int64)], [-1], 0)
        return padding
