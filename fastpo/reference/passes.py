"""A pass of a fixed policy over rows: token log-probabilities, from the cache or computed."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastpo.data.packing import PackedBatch
from fastpo.errors import ConfigError
from fastpo.models.modes import eval_mode
from fastpo.models.policy import Policy, weights_eps
from fastpo.ops import casts
from fastpo.reference.cache import RefCache, TokenLogps, reference_logps
from fastpo.reference.roles import Sets
from fastpo.training.distributed import Engine, World


class ReferencePass:
    """Computes an engine's token log-probabilities of the rows of data sets, as far as a cache lacks them."""

    def __init__(
        self,
        score: Callable[[Engine, PackedBatch], Tensor],
        world: World,
        *,
        passes: Callable[..., Iterator[Any]],
        max_tokens: Callable[[], int],
        token_bucket: int | None = None,
        autocast_dtype: torch.dtype | None = None,
        bar: Callable[..., Any],
    ):
        """score: token log-probabilities [N] of a batch on the device. passes: training.memory.Budget's, which splits
        what does not fit. max_tokens: of a micro-batch, as it is at the time of a pass. autocast_dtype: what `score`
        computes in beside the weights' own. bar: a tqdm, from its `desc` and `total`.
        """
        self.score, self.world, self.passes = score, world, passes
        self.max_tokens, self.token_bucket, self.autocast_dtype, self.bar = (
            max_tokens,
            token_bucket,
            autocast_dtype,
            bar,
        )

    @torch.no_grad()
    def __call__(
        self,
        engine: Engine,
        cache: RefCache,
        sets: Sets,
        visited: Mapping[str, Collection[int]],
        *,
        what: str = "reference",
        refuse: str | None = None,
    ) -> dict[str, TokenLogps]:
        """Of every row of `sets`, or of those `visited` where a set is named there; others stay empty lists.

        Every rank calls it. `refuse`: what to say, in a ConfigError, where the cache does not have all of them.
        """
        policy = engine.policy

        def compute(batch: PackedBatch) -> Tensor:
            if refuse is not None:
                raise ConfigError(refuse)
            return self.score(engine, batch.to(self.world.device))

        out: dict[str, TokenLogps] = {}
        with eval_mode(policy.model), policy.attach(), casts.keeping():
            for name, examples in sets.items():
                rows = sorted(visited[name]) if name in visited else range(len(examples))
                with contextlib.ExitStack() as stack:
                    out[name] = reference_logps(
                        examples, rows, cache, compute, max_tokens=self.max_tokens(), token_bucket=self.token_bucket,
                        world=self.world, progress=self._progress(what, stack), passes=self.passes,
                        nudged=lambda: _nudged(policy, self.autocast_dtype),
                    )  # fmt: skip
        return out

    def _progress(self, what: str, stack: contextlib.ExitStack) -> Callable[[int, int], None]:
        """Shows how far a pass is, from its first round on until the stack is left."""
        bars: list[Any] = []

        def progress(done: int, total: int) -> None:
            if not bars:
                bars.append(self.bar(desc=what, total=total))
                stack.callback(bars[0].close)
            bars[0].update(done - bars[0].n)

        return progress


@contextlib.contextmanager
def _nudged(policy: Policy, autocast_dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, every embedding is one spacing of the working precision off, up and down in turn."""
    eps = max(weights_eps(policy), torch.finfo(autocast_dtype).eps if autocast_dtype is not None else 0.0)

    def move(module: torch.nn.Module, inputs: Any, out: Tensor) -> Tensor:
        sign = torch.ones_like(out)
        sign[..., ::2] = -1
        return out * (1 + eps * sign)

    handle = policy.causal_lm.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()
