"""Which reference a run has, and its log-probabilities for every data set.

INPO and regularised DNO read a second policy, the previous iterate of self-play. It is found as the reference is, and
mixed with it before training, (1 - kappa) previous + kappa reference, so that a step reads one number a response.
"""

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import numpy as np
import torch

from fastpo.config.train_config import TrainConfig
from fastpo.data import rows
from fastpo.data.packing import PackedBatch
from fastpo.data.prepare import Example
from fastpo.errors import ConfigError, DataError
from fastpo.models.policy import Policy
from fastpo.reference.cache import MovingReference, RefCache, TokenLogps, cache_folder, cache_key
from fastpo.reference.function_state import function_digest
from fastpo.reference.kept import Kept
from fastpo.reference.passes import ReferencePass
from fastpo.reference.policies import Policies, Start
from fastpo.reference.roles import PREV, REF, Given, Role, Sets
from fastpo.training.distributed import Engine
from fastpo.training.metrics import TOKEN_KL
from fastpo.training.objective import Objective
from fastpo.training.passes import Passes
from fastpo.training.step_plan import StepPlan
from fastpo.training.stepwide import TRAIN_MISMATCHED

log = logging.getLogger("fastpo")


class References:
    """The fixed policies of one run, and their token log-probabilities by data set.

    objective: says what the losses read. policies: makes the models of the roles ready. compute: runs them. kept: what
    the run has on disk. moving: the reference that follows the policy, where there is one (`config.sync_ref_model`).
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        policies: Policies,
        compute: ReferencePass,
        kept: Kept,
        moving: MovingReference | None = None,
    ):
        self.config, self.objective, self.policies, self.compute = config, objective, policies, compute
        self.kept, self.moving, self.world = kept, moving, policies.world
        self.is_read, self.kappa = objective.uses_reference, objective.kappa
        self.is_live = TOKEN_KL in objective.row_statistics  # then reference/live.py has it, and nothing is known here
        # Whether the policy's first losses have a closed form, and what it gives at the start where that is not it.
        self.starts_at_reference = policies.given[REF] is None and policies.start.is_exact
        self.start: TokenLogps | None = None
        self._is_attached = False
        self._sets: Sets = {}
        self._logps: dict[str, TokenLogps | None] = {}
        self._refuse: str | None = None  # why the reference may not be computed: it is not the one of the start

    @classmethod
    def of_run(
        cls, config: TrainConfig, objective: Objective, given: Given, start: Start, passes: Passes, kept: Kept,
        moving: MovingReference | None, *, verify: Callable[[Engine], object], bar: Callable[..., Any],
    ) -> Self:  # fmt: skip
        """With the parts below it, for the precision and the budget of `passes`."""
        forward, budget, world = passes.forward, passes.budget, passes.world
        policies = Policies(given, start, config, world, autocast_dtype=forward.autocast_dtype, verify=verify)
        compute = ReferencePass(
            lambda engine, batch: forward(batch, engine, statistics=False), world, passes=budget.passes,
            max_tokens=lambda: budget.max_tokens, token_bucket=config.token_bucket,
            autocast_dtype=forward.autocast_dtype, bar=bar,
        )  # fmt: skip
        return cls(config, objective, policies, compute, kept, moving)

    def of_set(self, name: str) -> TokenLogps | None:
        """Log-probabilities of the set's rows; None where the losses read none, or the rows have sums of their own."""
        return self._logps.get(name)

    def start_of(self, batch: PackedBatch) -> torch.Tensor | None:
        """What the policy's own start gives for the rows [N] of a training batch; None where that is not known."""
        return batch.ref_logp if self.start is None else of_batch(self.start, batch)

    def attach(self, plan: StepPlan, sets: Sets) -> None:
        """Know the token log-probabilities of every row of `sets` that the plan, or an evaluation, will visit.

        Once: at a second call, of the same plan and sets, the policy has left the start that they are of.
        """
        if not self._is_attached:
            self._attach(plan, sets)
        self._is_attached = True

    def _attach(self, plan: StepPlan, sets: Sets) -> None:
        self._sets, self._logps = sets, {}
        if self.world.main:
            self.kept.clear()
        if not self.is_read or self.is_live:
            return
        given = self._given(REF, sets)
        prev_given = self._given(PREV, sets) if self.kappa is not None else set()
        if "train" in given:
            log.info("reference: log-probabilities from the data")
            self.starts_at_reference = False
        if self.moving is not None:
            return  # computed from one move to the next
        starts = [role for role, of_data in ((REF, given), (PREV, prev_given))
                  if self.policies.given[role] is None and "train" not in of_data]  # fmt: skip
        self._logps |= self._compute(REF, plan, {name: e for name, e in sets.items() if name not in given})
        if self.kappa is None:
            return
        both_start = starts == [REF, PREV] and not given | prev_given
        if both_start and self.kept.is_as_begun(PREV, self.kept.keys[REF.key]):
            log.info("previous policy: the reference, which is the policy as it is before training")
            return
        if PREV in starts:
            log.info("previous policy: the policy as it is before training")
        previous = self._compute(PREV, plan, {name: e for name, e in sets.items() if name not in prev_given})
        if starts and self.policies.start.is_exact:
            self.start = self._logps["train"] if starts[0] is REF else previous["train"]
        self.starts_at_reference = False
        for name, examples in sets.items():
            self._logps[name] = mix(examples, self._logps.get(name), previous.get(name), self.kappa)

    def move(self, plan: StepPlan, start: int) -> None:
        """A moving reference's log-probabilities for the steps of the plan from `start` until it moves again."""
        assert self.moving is not None
        visited = plan.visited(start, start + self.moving.every)
        with self.moving.in_place():
            engine = self.policies.start.engine
            self._logps |= self.compute(engine, RefCache("", None), self._sets, _of_train(visited))

    # ---- rows that the run did not begin with

    def check_other_rows(self, *, trained: bool) -> None:
        """ConfigError where such rows can get no reference now. `trained`: whether the policy has left its start."""
        if not self.is_read:
            return
        config, policies = self.config, self.policies
        if self.kappa is not None or self.is_live:
            names = "+".join(config.losses)
            raise ConfigError(f"evaluate() takes no rows with {names}: pass them to the trainer, as eval_dataset")
        by_name = policies.start.name is not None
        again = by_name and not config.precompute_ref_log_probs
        moved = trained and not (policies.start.is_base or self.moving is not None)
        if moved and policies.given[REF] is None and not again:
            way = "or set precompute_ref_log_probs=False, so that it is loaded again, " if by_name else ""
            raise ConfigError(
                "Cannot compute reference log-probs for a dataset passed to evaluate() after training: the reference "
                f"was the policy at its start, which is gone; pass the rows as eval_dataset, {way}or pass ref_model"
            )

    def of_other_rows(self, sets: Sets, *, trained: bool) -> dict[str, TokenLogps]:
        """Token log-probabilities of the reference for sets outside of training; none where the losses read none, or
        the rows have sums. The policy is its own reference before training; after it, it is loaded again by its name.
        """
        if not self.is_read:
            return {}
        if self.kappa is None and not self.is_live:
            given = self._given(REF, sets)
            sets = {name: examples for name, examples in sets.items() if name not in given}
        if not sets:
            return {}
        self.check_other_rows(trained=trained)
        policies = self.policies
        if self.moving is not None:
            with self.moving.in_place():
                return self.compute(policies.start.engine, RefCache("", None), sets, {}, refuse=self._refuse)
        with contextlib.ExitStack() as stack:
            if trained and policies.given[REF] is None and not policies.start.is_base:
                engine, fingerprint = policies.again(stack), policies.start.fingerprint
            else:
                engine, fingerprint = policies.of(REF, sets, stack)
            return self.compute(engine, self._open(REF, engine.policy, fingerprint), sets, {}, refuse=self._refuse)

    def hold(self, sets: Sets, *, trained: bool) -> None:
        """Know the reference of these sets of the run too, as far as it is not known yet."""
        missing = {name: examples for name, examples in sets.items() if name not in self._logps}
        if missing and (self.kappa is not None or self.is_live):
            when = "after training" if trained else "before training"
            raise ConfigError(
                f"evaluate() has no reference with {'+'.join(self.config.losses)} {when}: set eval_strategy, or "
                "eval_on_start, and train() evaluates the sets"
            )
        self._logps |= self.of_other_rows(missing, trained=trained)

    @contextlib.contextmanager
    def held(self, sets: Sets, *, trained: bool) -> Iterator[None]:
        """Inside, the reference of these sets is known too."""
        before = dict(self._logps)
        try:
            self._logps |= self.of_other_rows(sets, trained=trained)
            yield
        finally:
            self._logps = before

    # ---- one role

    def _given(self, role: Role, sets: Sets) -> set[str]:
        """The data sets that have the role's sums themselves. A model that is given goes before them."""
        found: set[str] = set()
        if self.policies.given[role] is not None or self.moving is not None:
            return found
        for name, examples in sets.items():
            has = [role.columns in e.response_columns for e in examples]
            if any(has) and not all(has):
                columns = " or ".join(rows.RESPONSE_COLUMNS[role.columns])
                raise DataError(f"{columns} is missing in some rows of the {name} data")
            columns = " and ".join(rows.RESPONSE_COLUMNS[role.columns])
            if any(has) and examples[0].token_weights is not None:
                raise DataError(
                    f"{columns} are sums, which neither chosen_token_weights nor turns that are not trained on can "
                    f"weigh: pass {role.model} instead, or assistant_only_loss=false where they are of all turns"
                )
            if (of_tokens := self.objective.of_tokens) and any(has):
                raise DataError(
                    f"{of_tokens} needs the reference's log-probability of every token, and {columns} of the {name} "
                    f"data are sums: drop the columns, or pass {role.model}"
                )
            found |= {name} if all(has) else set()
        return found

    def _compute(self, role: Role, plan: StepPlan, sets: Sets) -> dict[str, TokenLogps]:
        """The role's token log-probabilities for `sets`, computed, cached, and kept beside the run."""
        if not sets:
            return {}
        policies, given = self.policies, self.policies.given
        with contextlib.ExitStack() as stack:
            engine, fingerprint = policies.of(role, sets, stack)
            if given[role] is not None:
                policies.verify(engine)
            refuse = self._why_not(role, fingerprint)
            # The model is not as the run began, or another is given: what it computes now would not fit what is there.
            cache = RefCache("", None) if refuse is not None else self._open(role, engine.policy, fingerprint)
            self.kept.read(role, cache)
            visited = _of_train(plan.visited())
            out = self.compute(engine, cache, sets, visited, what=role.name, refuse=refuse)
        if given[role] is not None and self.config.fsdp != "no":
            # Its log-probabilities are all that training needs of it; FSDP's modules hold each other.
            given.drop(role)
            del engine
            gc.collect()
        if self.world.main:
            self.kept.write(role, sets, out)
        return out

    def _why_not(self, role: Role, fingerprint: str) -> str | None:
        """Why this policy may not compute what the checkpoint of a resumed run lacks; None where it may."""
        refuse = None
        if not self.kept.is_as_begun(role, self.policies.key(fingerprint)):
            refuse = (
                f"{self.kept.resume} lacks the {role.name}'s log-probabilities for rows that this run needs: to add "
                f"steps or evaluation data, pass the model and {role.model} that the run began with"
            )
        if role is REF:
            self._refuse = refuse
        return refuse

    def _open(self, role: Role, policy: Policy, fingerprint: str) -> RefCache:
        """The cache on disk of what this policy computes; in memory on ranks other than 0, which look nothing up."""
        if not self.world.main:
            return RefCache("", None)
        is_base = self.policies.given[role] is None and self.policies.start.is_base
        state = function_digest(policy.model, without_adapter=is_base)
        return RefCache(cache_key(self.policies.key(fingerprint), state), cache_folder())


def _of_train(visited: set[int]) -> dict[str, set[int]]:
    """The rows that training visits, by the sets that it takes them from; of other sets every row is read."""
    return {"train": visited, TRAIN_MISMATCHED: visited}


def mix(
    examples: Sequence[Example], ref: TokenLogps | None, prev: TokenLogps | None, kappa: float
) -> TokenLogps | None:
    """(1 - kappa) previous + kappa reference of every response: per token, or where the data give either as a sum only,
    as sums in the examples' `ref_logps`, and None is returned.
    """
    if ref is not None and prev is not None:
        return [[((1 - kappa) * t + kappa * r).astype(np.float32) for r, t in zip(*both, strict=True)]
                for both in zip(ref, prev, strict=True)]  # fmt: skip
    for i, example in enumerate(examples):
        columns = example.response_columns
        r, t = (columns[role.columns] if tokens is None else [float(x.sum(dtype=np.float64)) for x in tokens[i]]
                for role, tokens in ((REF, ref), (PREV, prev)))  # fmt: skip
        if r and t:  # else a row that no step visits
            columns[REF.columns] = [(1 - kappa) * b + kappa * a for a, b in zip(r, t, strict=True)]
    return None


def of_batch(logps: TokenLogps, batch: PackedBatch) -> torch.Tensor:
    """Token log-probabilities [N] fp32 of the batch's rows, on its device."""
    parts = [logp for i in batch.examples for logp in logps[i]]
    return torch.from_numpy(np.concatenate(parts).astype(np.float32)).to(batch.target.device)
