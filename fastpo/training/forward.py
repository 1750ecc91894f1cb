"""The forward pass of a run: token log-probabilities of packed batches, and what else its losses read of the same pass.

N = head rows (completion tokens), D = hidden.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fastpo.config.train_config import TrainConfig
from fastpo.data.packing import PackedBatch
from fastpo.models.policy import Head, Policy
from fastpo.ops import casts
from fastpo.training.distributed import Engine, uses_bf16
from fastpo.training.metrics import PROMPT_LOGP
from fastpo.training.router_loss import RouterLoss
from fastpo.training.row_statistics import observer

# What a reference in memory gives: hidden states [N, E] of a batch's head rows, and its head.
LiveRows = Callable[[PackedBatch], tuple[Tensor, Head]]


class Forward:
    """Runs a policy, or another one beside it, under the run's precision."""

    def __init__(self, engine: Engine, config: TrainConfig, device: torch.device, wanted: set[str]):
        """wanted: numbers of each head row beside its log-probability (row_statistics.py)."""
        self.engine, self.config, self.device, self.wanted = engine, config, device, wanted
        self.autocast_dtype = torch.bfloat16 if uses_bf16(config, device) else None
        self.router: RouterLoss | None = None
        self.live: LiveRows | None = None
        self.watches = False  # whether passes look at their tokens' distributions, for the log
        self.temperature = 1.0  # of the distribution that an online run draws from
        self.wants_entropy = False  # whether passes with statistics give entropies with a gradient, for a loss

    @property
    def policy(self) -> Policy:
        return self.engine.policy

    @property
    def low_precision(self) -> bool:
        """Whether it computes in 16 bits."""
        return self.autocast_dtype is not None or self.policy.low_precision

    def begin(self, engine: Engine, router: RouterLoss | None, live: LiveRows | None = None) -> None:
        """What is known only when the model is as this run's processes hold it: its engine, its router's loss, and the
        reference in memory."""
        self.engine, self.router, self.live = engine, router, live

    def autocast(self) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        # A cast made without gradients would be taken for one with them while `keeping_casts`.
        return torch.autocast(self.device.type, self.autocast_dtype, cache_enabled=torch.is_grad_enabled())

    @contextlib.contextmanager
    def keeping_casts(self) -> Iterator[None]:
        """Inside, in which weights do not change, each of them is cast once, not once a pass: by autocast what has
        gradients, by `casts` the head and adapters."""
        torch.autocast_increment_nesting()
        try:
            with casts.keeping():
                yield
        finally:
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()

    @staticmethod
    def drop_casts() -> None:
        """Lets go of them, and of what a pass that failed has left with them."""
        torch.clear_autocast_cache()
        casts.clear()

    @contextlib.contextmanager
    def watching(self, wanted: bool = True) -> Iterator[None]:
        """Inside, passes look at their tokens' distributions, if `wanted`."""
        before, self.watches = self.watches, wanted and not self.policy.scores
        try:
            yield
        finally:
            self.watches = before

    def __call__(self, batch: PackedBatch, engine: Engine | None = None, statistics: bool = True) -> Tensor:
        """Token log-probabilities [N] fp32, of a reward model the rewards [S]; into `batch.rows`, with `statistics`,
        what else the losses read. `engine`: of another model than the one that is trained."""
        engine = engine or self.engine
        observe = observer(batch, self.wanted, self._live) if statistics and self.wanted else None
        prompts = statistics and batch.prompts is not None
        config = self.config
        options: dict[str, Any] = {"memory_budget": config.logits_memory_budget, "grad_filter": config.grad_filter}
        options["token_metrics"] = statistics and self.watches
        options["entropy_grad"] = statistics and self.wants_entropy
        if self.temperature != 1:
            options["temperature"] = self.temperature
        router = self.router if engine is self.engine else None
        with self.autocast(), router.collecting(batch) if router is not None else contextlib.nullcontext():
            logp = engine(lambda: engine.policy.read(batch, observe=observe, prompts=prompts, **options))
        if prompts:
            logp, batch.rows[PROMPT_LOGP] = logp.split([batch.target.numel(), logp.numel() - batch.target.numel()])
        return logp

    def _live(self, batch: PackedBatch) -> tuple[Tensor, Head] | None:
        """The reference's rows. Before the policy's own forward pass, whose weights it may borrow."""
        if self.live is None:
            return None
        with torch.no_grad(), self.autocast():
            return self.live(batch)
