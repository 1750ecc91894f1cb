"""The gradients of one step: this process's micro-batches, one after another, each a share of the whole step's loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastpo.data.packing import PackedBatch, loss_count, trunk_tokens
from fastpo.data.prepare import Example
from fastpo.errors import TrainingError
from fastpo.losses.tokens import Totals
from fastpo.models.degree_head import LOGITS
from fastpo.models.policy import DROPPED_MASS
from fastpo.training.degree_metrics import DEGREE_SUMS, degree_sums
from fastpo.training.guardrails import Warning_
from fastpo.training.metrics import PAIR_METRICS, TOKEN_SUMS, token_sums
from fastpo.training.objective import Objective
from fastpo.training.optim import Gradients
from fastpo.training.passes import Passes
from fastpo.training.policy_terms import entropy_sum, token_inputs
from fastpo.training.reward_metrics import no_range, reward_range
from fastpo.training.row_statistics import TRAIN
from fastpo.training.start_guard import StartGuard
from fastpo.training.step_statistics import Statistics
from fastpo.training.stepwide import RefOf, StepWide


@dataclass
class StepSums:
    """Of this process's part of a step, detached, on the device."""

    loss: Tensor  # []
    metrics: Tensor  # [len(PAIR_METRICS)], sums over pairs
    tokens: Tensor  # [TOKEN_SUMS], where the log watches them
    range: Tensor  # [RANGE], of a reward model's rewards
    degrees: Tensor  # [DEGREE_SUMS]
    policy: Tensor  # of PolicyMetrics, of responses that the policy gave
    entropy: Tensor  # [], summed over tokens
    totals: Totals | None = None  # of the whole step, of the same
    batches: list[PackedBatch] = field(default_factory=list)
    dropped: list[Tensor] = field(default_factory=list)  # by grad_filter: of each micro-batch's rows
    wrong_start: str | None = None


class Accumulation:
    """Runs steps over `examples`; what it leaves are their gradients and sums."""

    def __init__(
        self,
        objective: Objective,
        stepwide: StepWide,
        passes: Passes,
        gradients: Gradients,
        examples: Sequence[Example],
        on_substep_end: Callable[[], object] = lambda: None,
    ):
        self.objective, self.stepwide, self.passes, self.gradients = objective, stepwide, passes, gradients
        self.examples, self.on_substep_end = examples, on_substep_end

    def __call__(
        self, rows: Sequence[int], ref: RefOf, step: int, warn: Callable[[Warning_], object],
        start_guard: StartGuard | None = None,
    ) -> StepSums:  # fmt: skip
        """Forward and backward of step number `step` (from 1). Every rank calls it.

        Running out of memory begins this process's part anew (memory.py), and `warn` is told. With `start_guard` the
        policy must be where it is known to start: TrainingError.
        """
        passes, world = self.passes, self.passes.world
        self._begin(rows, step)
        idle = [min(rows, key=lambda i: trunk_tokens(self.examples[i]))]
        stats = self.stepwide.statistics("train", rows, passes, ref)
        if world.several:  # here the ranks meet, and a rank that begins its part anew does so alone
            self._look_ahead(stats, ref, idle)
        with passes.forward.keeping_casts():
            sums = passes.budget.repeat(
                lambda: self._run(rows, stats, ref, idle, step, start_guard),
                drop=lambda: self._drop(step), restart=lambda: self._begin(rows, step), step=step, warn=warn,
            )  # fmt: skip
        if stats.watches_entropy:
            self.stepwide.entropy = float(world.sum_(sums.entropy)) / max(stats.entropy_tokens, 1.0)
        if start_guard is not None and any(world.gather(sums.wrong_start)):
            raise TrainingError(sums.wrong_start or "another process does not start at the reference")
        return sums

    def _drop(self, step: int) -> None:
        """Lets go of what a failed attempt has left."""
        self.gradients.begin(1, step)
        self.passes.forward.drop_casts()

    def _begin(self, rows: Sequence[int], step: int) -> None:
        """Packs the step into this process's micro-batches, and forgets the last one's gradients."""
        passes, budget = self.passes, self.passes.budget
        shares = passes.batches.of_step(self.examples, rows, budget.max_tokens)
        self.share = shares[passes.world.rank]
        if budget.lowered:  # this process's rows stay its own
            mine = {i for part in self.share for i in part}
            self.share = passes.batches.of_part(self.examples, [i for i in rows if i in mine], budget.tokens)
        self.rounds = passes.rounds(shares) if passes.forward.engine.sharded else len(self.share)
        self.gradients.begin(len(self.share), step)

    def _look_ahead(self, stats: Statistics, ref: RefOf, idle: list[int]) -> None:
        self.stepwide.look_ahead(stats, self.passes, self.share, self.rounds, self.examples, ref("train"), idle)

    def _run(
        self, rows: Sequence[int], stats: Statistics, ref: RefOf, idle_rows: list[int], step: int,
        start_guard: StartGuard | None,
    ) -> StepSums:  # fmt: skip
        """Nothing is exchanged between processes here, but by sharded ones."""
        passes, forward, world = self.passes, self.passes.forward, self.passes.world
        # Where the loss is normalised: by what the whole step has of pairs, and of each sft term's tokens or rows.
        pair_count = sum(loss_count(self.examples[i]) for i in rows)
        nlls = self.objective.nll_counts(self.examples[i] for i in rows)
        device, watched = world.device, self.objective.policy_metrics
        sums = StepSums(
            torch.zeros((), device=device), torch.zeros(len(PAIR_METRICS), device=device),
            torch.zeros(TOKEN_SUMS, device=device), no_range(device), torch.zeros(DEGREE_SUMS, device=device),
            torch.zeros(0) if watched is None else watched.nothing(device), torch.zeros((), device=device),
            stats.totals,
        )  # fmt: skip
        if forward.router is not None:
            forward.router.begin()
        at_once = not world.several and len(self.share) == 1
        if not (world.several or at_once):
            self._look_ahead(stats, ref, idle_rows)
        for k in range(self.rounds):
            idle = k >= len(self.share)
            part = idle_rows if idle else self.share[k]
            passes.budget.tries(self.examples, part)
            forward.engine.sync_gradients(k == self.rounds - 1)
            batch = passes.batches.batch(self.examples, part, ref("train"), TRAIN, step - 1)
            logp = forward(batch)
            if idle:
                (0.0 * logp.sum()).backward()
                continue
            if self.stepwide.reads_rows and at_once:
                self.stepwide.of_rows(stats, [(batch, logp)], self.examples, world, train=True)
            loss, metrics = self.objective(logp, batch, stats, pair_count, nlls)
            if forward.router is not None:
                loss = loss + forward.router.share(batch, stats.router)
            if start_guard is not None:
                sums.wrong_start = sums.wrong_start or start_guard(logp.detach(), batch)
            loss.backward()
            if watched is not None:
                sums.policy = watched.joined(sums.policy, watched.sums(token_inputs(logp.detach(), batch)))
            if stats.watches_entropy:
                sums.entropy += entropy_sum(batch).detach()
            if DROPPED_MASS in batch.rows:
                sums.dropped.append(batch.rows[DROPPED_MASS])
            if batch.scored_rows is not None:
                sums.range = torch.maximum(sums.range, reward_range(logp))
            if LOGITS in batch.rows:
                sums.degrees += degree_sums(batch)
            if forward.watches:
                sums.tokens += token_sums(batch)
            batch.rows.clear()  # the step's batches are counted at its end: their graphs need not live until then
            sums.loss += loss.detach()
            sums.metrics += metrics
            sums.batches.append(batch)
            if k + 1 < self.rounds:
                self.on_substep_end()
        return sums
