"""Before the first step: the packed path gives the model's own numbers, and a policy that starts as its reference gives
the losses' closed form."""

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fastpo.data.packing import PackedBatch
from fastpo.data.prepare import Example
from fastpo.models.noise import check_quiet
from fastpo.models.verify import guard_rows, verify_or_unpack, verify_policy
from fastpo.models.verify_scalar import verify_rewards
from fastpo.training.distributed import Engine
from fastpo.training.forward import Forward
from fastpo.training.memory import is_out_of_memory
from fastpo.training.metrics import pair_inputs
from fastpo.training.objective import Objective
from fastpo.training.router_loss import RouterLoss
from fastpo.training.step_statistics import Statistics


def verify(
    forward: Forward,
    engine: Engine,
    first: Sequence[Example],
    everything: Iterable[Iterable[Example]],
    *,
    quiet: bool = False,
    router: RouterLoss | None = None,
) -> RouterLoss | None:
    """The packed path must equal the model's own logits on a few rows of the `first` step, and the longest of
    `everything`. quiet: dropout must leave no noise. Returns the router's loss, if the layers have one."""
    chosen = guard_rows(engine.policy, first, itertools.chain.from_iterable(everything))
    by = verify_rewards if engine.policy.scores else verify_policy
    with torch.no_grad(), forward.autocast():
        try:
            engine(lambda: verify_or_unpack(engine.policy, chosen, by))
        except Exception as error:
            chosen = chosen[:1]  # as training goes on in smaller micro-batches
            if not is_out_of_memory(error):
                raise
            engine(lambda: verify_or_unpack(engine.policy, chosen, by))
        if router is not None:
            router = engine(lambda: router.verify(chosen, forward.low_precision))
        if quiet:
            engine(lambda: check_quiet(engine.policy, chosen[:1]))
    return router


class StartGuard:
    """Looks at the first step of a run whose start is known. start_of: the start's own token log-probabilities [N] of a
    batch, or None; cache: where a stale reference would have come from."""

    def __init__(
        self, objective: Objective, low_precision: bool, start_of: Callable[[PackedBatch], Tensor | None], cache: str
    ):
        self.objective, self.low_precision, self.start_of, self.cache = objective, low_precision, start_of, cache

    def __call__(self, logp: Tensor, batch: PackedBatch) -> str | None:
        """What is wrong with the log-probabilities [N] of a batch of the first step, beyond the dtype's error."""
        start_logp = self.start_of(batch)
        if start_logp is None:
            return None
        gap = (logp - start_logp).abs().mean().item()
        allowed = 0.1 if self.low_precision else 1e-4 * max(1.0, logp.abs().mean().item())
        if gap <= allowed:
            return None
        zero = logp.new_zeros(())  # what a step's statistics are at the start
        stats, both = Statistics(zero, zero), ((pair_inputs(v, batch), v) for v in (logp, start_logp))
        places = [(t, self.objective.places(t, batch)) for t in self.objective.pair_terms]
        terms = [(t, None if at is None else torch.tensor(at, device=logp.device)) for t, at in places if at != ()]
        got, expected = ([round(stats.loss(t, *v, batch, at).mean().item(), 4) for t, at in terms] for v in both)
        return (
            f"the policy should start at its reference, but its token log-probabilities differ by {gap:.2g} on average "
            f"(allowed {allowed:.2g}; loss {got} instead of {expected}): did {self.cache} outlive a change of the "
            "model's code?"
        )
