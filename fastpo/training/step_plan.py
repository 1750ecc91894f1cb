"""Which rows each optimiser step of a run takes, over all processes: the seeded order of every epoch, cut into steps.

Nothing is drawn before it is asked for: a run that a callback will stop may name a billion steps.
"""

import math
from collections.abc import Sequence
from typing import Any, overload

import torch

from fastpo.config.bounds import COUNT
from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError, DataError

KEPT = 3  # epochs whose order is kept: a step looks at its neighbours


class StepPlan(Sequence[tuple[int, list[int]]]):
    """(epoch, rows) of every step of a run over `rows` examples in `processes` processes.

    Raises DataError where the rows do not fill a batch, ConfigError for more steps than any run takes.
    """

    def __init__(self, config: TrainConfig, rows: int, processes: int = 1):
        self.config, self.n, self.rows = config, rows, rows
        self.seed = config.seed if config.data_seed is None else config.data_seed
        self.batch = config.per_device_train_batch_size * processes
        used = rows // self.batch * self.batch if config.dataloader_drop_last else rows
        if not used:
            raise DataError(f"{rows} rows do not fill one batch of {self.batch} (dataloader_drop_last)")
        self.per_epoch = -(-used // (self.batch * config.gradient_accumulation_steps))
        epochs = config.num_train_epochs
        self.total = config.max_steps if config.max_steps > 0 else math.ceil(epochs * self.per_epoch)
        if self.total > COUNT:
            raise ConfigError(f"num_train_epochs={epochs:g} are {self.total:,} steps of these data: at most {COUNT:,}")
        self._drawn: dict[int, list[list[int]]] = {}

    def __len__(self) -> int:
        return self.total

    @overload
    def __getitem__(self, step: int) -> tuple[int, list[int]]: ...
    @overload
    def __getitem__(self, step: slice) -> list[tuple[int, list[int]]]: ...
    def __getitem__(self, step: Any) -> Any:
        if isinstance(step, slice):
            return [self[i] for i in range(*step.indices(self.total))]
        step = step + self.total if step < 0 else step
        if not 0 <= step < self.total:
            raise IndexError(step)
        return self._of(step)

    def _of(self, step: int) -> tuple[int, list[int]]:
        epoch, place = divmod(step, self.per_epoch)
        return epoch, self._steps(epoch)[place]

    def visited(self, start: int = 0, stop: int | None = None) -> set[int]:
        """The rows of the steps from `start` to `stop`, which ends where all are there."""
        stop = self.total if stop is None else min(stop, self.total)
        alike = self.config.train_sampling_strategy == "sequential"  # every epoch takes the same rows
        stop = min(stop, start + self.per_epoch) if alike else stop
        rows: set[int] = set()
        for step in range(start, stop):
            rows.update(self[step][1])
            if len(rows) == self.n:
                break
        return rows

    def _steps(self, epoch: int) -> list[list[int]]:
        if epoch not in self._drawn:
            config = self.config
            order = epoch_order(self.n, seed=self.seed, epoch=epoch, strategy=config.train_sampling_strategy)
            accumulation = config.gradient_accumulation_steps
            while len(self._drawn) >= KEPT:
                del self._drawn[next(iter(self._drawn))]
            self._drawn[epoch] = epoch_steps(order, self.batch, accumulation, config.dataloader_drop_last)
        return self._drawn[epoch]


def epoch_order(n: int, *, seed: int, epoch: int, strategy: str) -> list[int]:
    """The order of n rows in one epoch: as they stand, or transformers' seeded permutation (seed + epoch)."""
    if strategy == "sequential":
        return list(range(n))
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


def epoch_steps(order: Sequence[int], batch_size: int, accumulation: int, drop_last: bool = False) -> list[list[int]]:
    """The rows of each optimiser step of one epoch: `accumulation` batches of `batch_size` rows; the last may be short.

    `drop_last` leaves out an incomplete last batch, as a data loader does, not an incomplete step.
    """
    if drop_last:
        order = order[: len(order) // batch_size * batch_size]
    step = batch_size * accumulation
    return [list(order[start : start + step]) for start in range(0, len(order), step)]
