"""An online run's own parts, as the trainer makes and asks them."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError
from fastpo.losses.online import AGAINST_MIXTURE, MIXTURE, ONLINE, POLICY, Online, is_online
from fastpo.online.drawing import REFERENCE, Drawing
from fastpo.online.evaluation import OnlineEvaluation
from fastpo.online.judging import Preferences
from fastpo.online.plan import OnlinePlan
from fastpo.online.prompts import PromptSets
from fastpo.online.rewards import Rewards
from fastpo.online.rollouts import Rollouts
from fastpo.online.worth import ByRewards, ByWins
from fastpo.reference.cache import MovingReference
from fastpo.reference.live import LiveReference
from fastpo.sampling.items import Sampler
from fastpo.sampling.local_sampler import LocalSampler
from fastpo.training.distributed import Engine, World
from fastpo.training.objective import Objective
from fastpo.training.passes import Passes
from fastpo.training.run_data import DataSets
from fastpo.training.step_plan import StepPlan

Within = Callable[[], AbstractContextManager[Any]]
Reference = tuple[Engine, Within]  # who computes its log-probabilities, and inside of what


def of_arguments(
    config: TrainConfig, reward_funcs: Any, reward_processing_classes: Any, judge: Any, sampler: Any
) -> "OnlineRun | None":
    """What is online of a run; None where its data have the responses. ConfigError for arguments that do not fit."""
    given = {"reward_funcs": reward_funcs, "judge": judge, "sampler": sampler}
    if not is_online(config.losses):
        named = next((name for name, value in given.items() if value is not None), None)
        if named is not None:
            raise ConfigError(
                f"{named} is given, and {'+'.join(config.losses)} trains on the data's responses: leave it out, or "
                f"choose an online loss, such as loss_type=grpo"
            )
        return None
    return OnlineRun(config, reward_funcs, reward_processing_classes, judge, sampler)


def sets(
    online: "OnlineRun | None", config: TrainConfig, world: World, tokenizer: Any, objective: Objective, given: Any
) -> DataSets:
    """What reads the rows of a run."""
    if online is None:
        return DataSets(config, world, tokenizer, objective, given)
    found = PromptSets(config, world, tokenizer, objective, given)
    found.count = online.count
    found.checks = [] if online.rewards is None else [online.rewards.check]
    return found


def plan(online: "OnlineRun | None", config: TrainConfig, rows: int, processes: int) -> StepPlan:
    """Which rows each step of a run takes."""
    if online is None:
        return StepPlan(config, rows, processes)
    prompts = prompts_per_step(config, online.way, online.count, processes)
    spread = spread_of(config, prompts, online.count, online.way)
    return OnlinePlan(config, rows, prompts, spread=spread, passes=config.num_iterations)


class OnlineRun:
    """The parts of an online run: who judges, and from `begin` on the rollouts."""

    def __init__(self, config: TrainConfig, reward_funcs: Any, classes: Any, judge: Any, sampler: Any):
        self.config, self.way = config, ONLINE[config.losses[0]]
        self.count = generations(config, self.way)
        self.sampler = sampler
        judge = config.judge if judge is None else judge
        if reward_funcs is None and (judge is None or self.way.by == "rewards"):
            what = "reward_funcs" if self.way.by == "rewards" else "reward_funcs or a judge"
            raise ConfigError(f"{self.way.name} needs {what}: functions, reward models or scorers that judge responses")
        if judge is not None and self.way.by == "rewards":
            raise ConfigError(f"{self.way.name} reads rewards, not comparisons: pass the judge in reward_funcs")
        self.rewards: Rewards | None = None
        self.preferences: Preferences | None = None
        if reward_funcs is not None:
            self.rewards = Rewards(reward_funcs, classes, config.reward_weights, where=Path.cwd())
        if self.way.by == "wins":
            both = self.rewards is not None and judge is not None
            if both:
                raise ConfigError("reward_funcs and a judge are both given: one of them compares the responses")
            self.preferences = Preferences(
                self.rewards, judge, missing_eos_penalty=config.missing_eos_penalty or None, where=Path.cwd()
            )

    def reads_reference(self, objective: Objective) -> bool:
        """Whether the run needs its reference at every generation."""
        return objective.uses_reference or self.way.draws != POLICY or self._penalised

    @property
    def _penalised(self) -> bool:
        """rloo takes its KL from the reward."""
        return self.way.loss == "rloo" and bool(self.beta)

    @property
    def beta(self) -> float:
        beta = self.config.beta
        return (0.05 if self.way.loss == "rloo" else 0.0) if beta is None else float(beta)

    def begin(
        self, plan: OnlinePlan, sets: PromptSets, passes: Passes, tokenizer: Any, live: LiveReference | None,
        moving: MovingReference | None, callbacks: Any, folder: Path,
    ) -> Rollouts:  # fmt: skip
        """The rollouts of a run whose model is as its processes hold it. live, moving: its reference. callbacks: have
        transformers' state, which reward functions may read."""
        config, world, objective = self.config, passes.world, sets.objective
        forward = passes.forward
        reference: Reference | None = None
        if moving is not None:
            reference = forward.engine, moving.in_place
        elif live is not None:
            own = live.policy is forward.policy
            reference = forward.engine if own else Engine(live.policy), live.within

        @contextmanager
        def within() -> Any:
            with forward.policy.detached(), forward.autocast():
                yield

        samplers = self._samplers(forward.policy.model, tokenizer, reference)
        drawing = Drawing(config, self.way.draws, world, samplers, within)
        rollouts = Rollouts(config, plan, sets.train, objective, passes, drawing, self.count, folder)
        rollouts.reference = reference
        if self.way.by == "rewards":
            assert self.rewards is not None
            penalty = rollouts.penalty if self._penalised else None
            rollouts.judgement = ByRewards(config, self.way, self.rewards, world, lambda: callbacks.state, penalty)
        else:
            assert self.preferences is not None
            rollouts.judgement = ByWins(config, self.way, self.preferences, world, lambda: callbacks.state)
        return rollouts

    def evaluation(self, rollouts: Rollouts) -> OnlineEvaluation:
        config = self.config
        count = config.num_generations_eval or self.count
        return OnlineEvaluation(rollouts.drawing, rollouts.judgement, config, count)

    def _samplers(self, model: Any, tokenizer: Any, reference: Reference | None) -> dict[str, Sampler]:
        if self.sampler is not None:
            return {POLICY: self.sampler, MIXTURE: self.sampler, REFERENCE: self.sampler}
        out: dict[str, Sampler] = {POLICY: LocalSampler(model, tokenizer)}
        if self.way.draws != POLICY:
            assert reference is not None
            engine, within = reference
            same = engine.policy.model is model
            other: Any = within if same else engine.policy.model
            coef = 0.5 if self.config.mixture_coef is None else self.config.mixture_coef
            if self.way.draws in (MIXTURE, AGAINST_MIXTURE):
                out[MIXTURE] = LocalSampler(model, tokenizer, mixture=coef, reference=other)
            else:
                out[REFERENCE] = LocalSampler(model, tokenizer, mixture=1.0, reference=other)
        return out

    def close(self) -> None:
        for part in (self.preferences, self.rewards):
            if part is not None:
                part.close()


def generations(config: TrainConfig, way: Online) -> int:
    """Responses of each prompt."""
    if config.num_generations is not None:
        return config.num_generations
    return 2 if way.by == "wins" or way.loss == "rloo" else 8


def prompts_per_step(config: TrainConfig, way: Online, count: int, processes: int) -> int:
    """Prompts of an optimiser step, over all processes. The batch size counts responses for rewards, as GRPOConfig, and
    prompts for preferences, as OnlineDPOConfig. ConfigError where they make no whole groups."""
    step = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    if way.by == "wins":
        return step
    if step % count:
        near = max(count, round(step / count) * count)
        raise ConfigError(
            f"a step takes {step} responses (per_device_train_batch_size x gradient_accumulation_steps x processes), "
            f"which are no whole groups of num_generations={count}: {near} are"
        )
    return step // count


def spread_of(config: TrainConfig, prompts: int, count: int, way: Online) -> int:
    """Optimiser steps whose responses are drawn together."""
    if config.steps_per_generation is not None:
        return max(1, math.ceil(config.steps_per_generation / config.gradient_accumulation_steps))
    if config.generation_batch_size is not None:
        step = prompts * (count if way.by == "rewards" else 1)
        return max(1, config.generation_batch_size // step)
    return 1
