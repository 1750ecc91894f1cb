"""An online run's own parts, as the trainer makes and asks them."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fastpo.config import online as config_online
from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError
from fastpo.losses.online import AGAINST_MIXTURE, MIXTURE, ONLINE, POLICY, is_online
from fastpo.online.drawing import REFERENCE, Drawing
from fastpo.online.evaluation import OnlineEvaluation
from fastpo.online.judging import Preferences
from fastpo.online.plan import OnlinePlan
from fastpo.online.prompts import PromptSets
from fastpo.online.rewards import Rewards
from fastpo.online.rollouts import Rollouts
from fastpo.online.serving import Served
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


def options(**given: Any) -> dict[str, Any]:
    """Of the arguments those that are options: mappings and texts, not objects."""
    return {name: value for name, value in given.items() if isinstance(value, Mapping | str)}


def of_arguments(
    config: TrainConfig, processes: int, reward_funcs: Any, reward_processing_classes: Any, judge: Any, sampler: Any
) -> "OnlineRun | None":
    """What is online of a run; None where its data have the responses. ConfigError for arguments that do not fit."""
    judge, sampler = (None if isinstance(value, Mapping | str) else value for value in (judge, sampler))
    given = {"reward_funcs": reward_funcs, "judge": judge, "sampler": sampler}
    if not is_online(config.losses):
        named = next((name for name, value in given.items() if value is not None), None)
        if named is not None:
            raise ConfigError(
                f"{named} is given, and {'+'.join(config.losses)} trains on the data's responses: leave it out, or "
                f"choose an online loss, such as loss_type=grpo"
            )
        return None
    return OnlineRun(
        config, config_online.rollouts(config, processes), reward_funcs, reward_processing_classes, judge, sampler
    )


def sets(
    online: "OnlineRun | None", config: TrainConfig, world: World, tokenizer: Any, objective: Objective, given: Any
) -> DataSets:
    """What reads the rows of a run."""
    if online is None:
        return DataSets(config, world, tokenizer, objective, given)
    found = PromptSets(config, world, tokenizer, objective, given)
    found.count, found.longest = online.asks.num_generations, online.asks.max_prompt_length
    found.apart = online.asks.of_tokens
    found.checks = [] if online.rewards is None else [online.rewards.check]
    return found


def plan(online: "OnlineRun | None", config: TrainConfig, rows: int, processes: int) -> StepPlan:
    """Which rows each step of a run takes."""
    if online is None:
        return StepPlan(config, rows, processes)
    asks = online.asks
    return OnlinePlan(
        config, rows, asks.prompts_per_step, spread=asks.steps_per_generation, passes=config.num_iterations
    )


def close(online: "OnlineRun | None", rollouts: Rollouts | None) -> None:
    """Lets go of samplers, models and connections."""
    for part in (rollouts, online):
        if part is not None:
            part.close()


class OnlineRun:
    """The parts of an online run: who judges, and from `begin` on the rollouts."""

    def __init__(
        self, config: TrainConfig, asks: config_online.Rollouts, reward_funcs: Any, classes: Any, judge: Any,
        sampler: Any,
    ):  # fmt: skip
        self.config, self.asks, self.way = config, asks, ONLINE[config.losses[0]]
        self.sampler = sampler
        judge = config.judge if judge is None else judge
        if reward_funcs is None and (judge is None or self.way.by == "rewards"):
            what = "reward_funcs" if self.way.by == "rewards" else "reward_funcs or a judge"
            raise ConfigError(f"{self.way.name} needs {what}: functions, reward models or scorers that judge responses")
        if judge is not None and self.way.by == "rewards":
            raise ConfigError(f"{self.way.name} reads rewards, not comparisons: pass the judge in reward_funcs")
        self.rewards: Rewards | None = None
        self.preferences: Preferences | None = None
        if reward_funcs is None and config.reward_weights is not None:
            raise ConfigError("reward_weights are of reward_funcs, and here a judge compares: leave them out")
        if reward_funcs is not None:
            self.rewards = (
                reward_funcs
                if isinstance(reward_funcs, Rewards)
                else Rewards(reward_funcs, classes, config.reward_weights, where=Path.cwd())
            )
        if self.way.by == "wins":
            both = self.rewards is not None and judge is not None
            if both:
                raise ConfigError("reward_funcs and a judge are both given: one of them compares the responses")
            self.preferences = (
                judge
                if isinstance(judge, Preferences)
                else Preferences(
                    self.rewards, judge, missing_eos_penalty=config.missing_eos_penalty or None, where=Path.cwd()
                )
            )

    @property
    def _penalised(self) -> bool:
        """rloo takes its KL from the reward."""
        return self.way.loss == "rloo" and bool(self.beta)

    @property
    def beta(self) -> float:
        beta = self.config.beta
        return (0.05 if self.way.loss == "rloo" else 0.0) if beta is None else float(beta)

    def begin(
        self, plan: Any, sets: Any, passes: Passes, tokenizer: Any, live: LiveReference | None,
        moving: MovingReference | None, callbacks: Any, save: Callable[[Path], object], folder: Path,
    ) -> Rollouts:  # fmt: skip
        """The rollouts of a run whose model is as its processes hold it. plan, sets: as made here. live, moving: its
        reference. callbacks: have transformers' state, which reward functions may read. save: the model's files into a
        folder, for a sampler beside this process."""
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
            with ExitStack() as stack:
                for policy in {id(p): p for p in (forward.policy, *([] if live is None else [live.policy]))}.values():
                    stack.enter_context(policy.detached())
                stack.enter_context(forward.autocast())
                yield

        served: Served | None = None
        if self.sampler is not None:
            served = Served(self.sampler, folder / "sampler", save, world, given=True)
        elif self.asks.engine != "local":
            served = Served.of_options(self.asks, forward.policy, tokenizer, folder, save, world)
        samplers = self._samplers(forward.policy.model, tokenizer, reference, served)
        drawing = Drawing(config, self.asks, self.way.draws, world, samplers, within)
        rollouts = Rollouts(config, plan, sets.train, objective, passes, drawing, self.asks.num_generations,
                            self.asks.importance_sampling_mode, folder)  # fmt: skip
        rollouts.served = None if served is None or served.sampler.exact else served
        rollouts.reference = reference
        forward.temperature = self.asks.temperature or 1.0
        forward.wants_entropy = rollouts.entropy.is_on
        parts = (config, self.asks, self.way)
        if self.way.by == "rewards":
            assert self.rewards is not None
            rollouts.judgement = ByRewards(*parts, self.rewards, world, lambda: callbacks.state)
            if self._penalised:
                rollouts.beta = self.beta
                rollouts.judgement.penalise(rollouts.penalty, self.beta)
        else:
            assert self.preferences is not None
            rollouts.judgement = ByWins(*parts, self.preferences, world, lambda: callbacks.state)
        return rollouts

    def evaluation(self, rollouts: Rollouts) -> OnlineEvaluation:
        refresh = rollouts.served.refresh if rollouts.served is not None else lambda: None
        count = self.asks.num_generations_eval
        return OnlineEvaluation(rollouts.drawing, rollouts.judgement, self.config, count, refresh)

    def _samplers(
        self, model: Any, tokenizer: Any, reference: Reference | None, served: Served | None
    ) -> dict[str, Sampler]:
        if served is not None:
            return dict.fromkeys((POLICY, MIXTURE, REFERENCE), served.sampler)
        local = {"live": True, **self.asks.sampler}
        out: dict[str, Sampler] = {POLICY: LocalSampler(model, tokenizer, **local)}
        if self.way.draws != POLICY:
            assert reference is not None
            engine, within = reference
            same = engine.policy.model is model
            other: Any = within if same else engine.policy.model
            if self.way.draws in (MIXTURE, AGAINST_MIXTURE):
                out[MIXTURE] = LocalSampler(model, tokenizer, mixture=self.asks.mixture_coef, reference=other, **local)
            else:
                out[REFERENCE] = LocalSampler(model, tokenizer, mixture=1.0, reference=other, **local)
        return out

    def close(self) -> None:
        for part in (self.preferences, self.rewards):
            if part is not None:
                part.close()
