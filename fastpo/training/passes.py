"""Passes over rows without gradients, in micro-batches that the memory holds."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpo.data.packing import PackedBatch
from fastpo.data.prepare import Example
from fastpo.training.distributed import World
from fastpo.training.forward import Forward
from fastpo.training.memory import Budget
from fastpo.training.micro_batches import MicroBatches


class Passes:
    """What looks at rows before they are trained on, or in evaluation, goes through here."""

    def __init__(self, batches: MicroBatches, forward: Forward, budget: Budget, world: World):
        self.batches, self.forward, self.budget, self.world = batches, forward, budget, world

    def rounds(self, shares: Sequence[Sequence[Any]]) -> int:
        """How often this process runs the model for these shares of all processes: sharded ranks gather parameters
        together, so that one without work runs some rows for nothing."""
        return max(map(len, shares)) if self.forward.engine.sharded else len(shares[self.world.rank])

    def logps(
        self, share: Sequence[list[int]], rounds: int, examples: Sequence[Example], ref: Any, idle: list[int],
        statistics: bool = False,
    ) -> Iterator[tuple[PackedBatch, Tensor]]:  # fmt: skip
        """Micro-batches of this rank and their log-probabilities without gradient; in idle rounds the rows `idle`."""

        def run(part: list[int]) -> tuple[PackedBatch, Tensor]:
            with torch.no_grad():
                batch = self.batches.batch(examples, part, ref)
                return batch, self.forward(batch, statistics=statistics)

        yield from self.budget.passes(share, examples, run)
        for _ in range(rounds - len(share)):
            run(idle)

    def router_sums(
        self, share: Sequence[list[int]], rounds: int, examples: Sequence[Example], ref: Any, idle: list[int]
    ) -> Tensor:
        """A step's sums of its router's loss, over all ranks, by passes of the trunk alone."""
        router = self.forward.router
        assert router is not None

        def sums(part: list[int]) -> Tensor:
            with self.forward.autocast():
                return router.trunk_pass(self.forward.engine, self.batches.batch(examples, part, ref))

        mine = self.budget.passes(share, examples, sums)
        more = (sums(idle) for _ in range(rounds - len(share)))
        return router.look_ahead(mine, more, self.world)
