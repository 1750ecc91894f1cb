"""An iteration whose loss draws its responses as it trains (grpo, online_dpo and their kin, docs/online.md).

Its stages are prompts, train, eval: the iteration's prompts are the rows, the scorers of the run the reward functions,
or the judge. What is drawn and how is said in `train`, by fastpo.train's names.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastpo.config.online import rollouts
from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError, did_you_mean, shown
from fastpo.loop.config import Degrade, LoopConfig, Options, Refine, Sample, Score, Select
from fastpo.loop.guards import AT_FIRST
from fastpo.losses.online import ONLINE, POLICY, Online, is_online
from fastpo.online.judging import Preferences
from fastpo.online.plan import OnlinePlan
from fastpo.online.rewards import Rewards, check_alone
from fastpo.sampling.items import Item
from fastpo.scoring.scoring import Ensemble
from fastpo.training.objective import Objective

REWARDS = "reward_funcs"  # of `train`: which of the scorers judge what is drawn
# Options that say of a sample what `train` says of an online loss; None: there is nothing of the kind.
_OF_SAMPLE = {"n": "num_generations", "temperature": "temperature", "top_p": "top_p", "top_k": "top_k",
              "max_tokens": "max_completion_length", "stop": None, "sources": None,
              "drop_truncated": "mask_truncated_completions", "check_logps": None, "tolerance": None}  # fmt: skip
_STAGES = {"score": Score, "select": Select, "refine": Refine, "degrade": Degrade}
_MAPPINGS = ("search", "extra_responses", "replay")


def way_of(train: Options) -> Online | None:
    """The online loss of a section `train`; None of a loss that is trained on rows."""
    losses = train.get("loss_type", ())
    names = [losses] if isinstance(losses, str) else [str(name) for name in losses]
    return ONLINE[names[0]] if is_online(names) else None


# -------------------------------------------------------------------- what does not go together


def check(config: LoopConfig, train: TrainConfig, units: Mapping[str, str]) -> None:
    """ConfigError for options that mean nothing then. `units`: of each scorer by name."""
    way = way_of(config.train)
    assert way is not None
    name = way.name
    for option, instead in _OF_SAMPLE.items():
        value = getattr(config.sample, option)
        if value != getattr(Sample(), option):
            hint = f"set train.{instead}" if instead else "leave it out"
            raise ConfigError(f"sample.{option}={shown(value, 60)}: {name} draws its responses in training: {hint}")
    if config.sample.engine != "local" and not config.train.get("sampler"):
        raise ConfigError(
            f"sample.engine={config.sample.engine} answers when a policy is measured: say who answers as {name} "
            "trains, as train.sampler={engine: local} or {engine: openai, base_url: ...}"
        )
    if config.score.by:
        raise ConfigError(
            f"score.by={config.score.by!r}: {name} has no stage of scores: set train.{REWARDS}=[{config.score.by}]"
        )
    for section, cls in _STAGES.items():
        given, default = getattr(config, section), cls()
        for f in dataclasses.fields(cls):
            if getattr(given, f.name) != getattr(default, f.name):
                raise ConfigError(
                    f"{section}.{f.name}={shown(getattr(given, f.name), 60)}: {name} is trained on what it draws, not "
                    "on rows of sampled and scored responses: leave it out"
                )
    for section in _MAPPINGS:
        if getattr(config, section):
            raise ConfigError(f"{section} has no part in an iteration of {name}, which makes no rows: leave it out")
    if train.judge is not None:
        raise ConfigError(f"train.judge: the scorers of the run judge: name it in `scorers` and in train.{REWARDS}")
    if "previous" in config.train:
        raise ConfigError(f"train.previous: {name} reads no previous policy; leave it out")
    if "reference" in config.train and not reads_reference(config.train, train):
        hint = "set train.beta, the weight of the KL, or leave it out" if not way.pairs else "leave it out"
        raise ConfigError(f"train.reference: {name} with beta={_beta(train)} reads no reference; {hint}")
    names = named(config, units)
    rollouts(train)  # whole groups in a batch
    weights = train.reward_weights
    if weights is not None and way.by == "wins" and len(names) == 1 and units[names[0]] == "pair":
        raise ConfigError(f"train.reward_weights: {names[0]!r} compares responses and is the only judge: leave it out")
    if weights is not None and len(weights) != len(names):
        raise ConfigError(
            f"train.reward_weights has {len(weights)} weights for {len(names)} rewards: {', '.join(names)}"
        )
    if config.eval.prompts is not None and not config.eval.scorer and len(names) > 1:
        pairs = [n for n in names if units[n] != "response"]
        if pairs:
            raise ConfigError(
                f"eval.scorer must name what a policy is measured by: {pairs[0]!r} judges a {units[pairs[0]]}, which "
                "cannot be summed with the other rewards there"
            )


def named(config: LoopConfig, units: Mapping[str, str]) -> list[str]:
    """The scorers that are rewards, by name: those of train.reward_funcs, else all. ConfigError if unclear."""
    given = config.train.get(REWARDS)
    if given is None:
        if not units:
            raise ConfigError(
                f"{_name(config)} needs rewards and there is no scorer: give one in `scorers`, by its name"
            )
        if len(units) > 1:
            ensemble = next((n for n, s in config.scorers.items() if s.get("kind") == "ensemble"), None)
            why = f"{ensemble!r} combines others" if ensemble else ""
            if config.eval.scorer in units and not why:
                why = f"eval.scorer={config.eval.scorer!r} may be one of them or be kept from training"
            if why:
                raise ConfigError(
                    f"train.{REWARDS} must name the scorers that are rewards, of {', '.join(units)}: {why}"
                )
        return list(units)
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not names or not all(isinstance(n, str) for n in names):
        raise ConfigError(f"train.{REWARDS} must list names of scorers, not {shown(given, 60)}")
    for n in names:
        if n not in units:
            raise ConfigError(
                f"train.{REWARDS}: {n!r} is none of the scorers {', '.join(units) or '(none)'}{did_you_mean(n, units)}"
            )
    if len(set(names)) < len(names):
        raise ConfigError(f"train.{REWARDS}={shown(given, 60)} names a scorer twice: use reward_weights")
    return list(names)


def check_made(config: LoopConfig, made: Mapping[str, Any]) -> None:
    """ConfigError for scorers that need all judgements of a stage at once."""
    for name in named(config, {n: s.unit for n, s in made.items()}):
        check_alone(name, made[name])


def reads_reference(section: Options, train: TrainConfig) -> bool:
    """Whether training has a reference: in the loss, the reward or what is drawn. `section`: `train` of the loop."""
    way = way_of(section)
    return way is not None and (
        Objective.of_options(train).uses_reference or way.draws != POLICY or (way.loss == "rloo" and train.beta != 0)
    )


def _beta(train: TrainConfig) -> str:
    return "0" if not train.beta else f"{train.beta:g}"


def _name(config: LoopConfig) -> str:
    way = way_of(config.train)
    return "" if way is None else way.name


# -------------------------------------------------------------------- the parts


def judges(
    config: LoopConfig, train: TrainConfig, sections: Mapping[str, Any], made: Mapping[str, Any],
    policies: Mapping[str, str], where: Path,
) -> dict[str, Any]:  # fmt: skip
    """`reward_funcs` or `judge` for fastpo.train, of which the caller closes the one. Reward models are loaded here.

    `sections`: sections or objects of all scorers by name; `made`: the scorers that were made of them.
    """
    names = named(config, {n: s.unit for n, s in made.items()})
    way = way_of(config.train)
    assert way is not None
    if way.by == "wins" and len(names) == 1 and made[names[0]].unit == "pair":
        return {"judge": Preferences(judge=sections[names[0]], policies=policies, where=where,
                                     missing_eos_penalty=train.missing_eos_penalty or None)}  # fmt: skip
    # An ensemble names its members, which are no rewards themselves.
    given = {name: made[name] if isinstance(made[name], Ensemble) else sections[name] for name in names}
    return {"reward_funcs": Rewards(given, weights=train.reward_weights, policies=policies, where=where)}


def measure(config: LoopConfig, train: TrainConfig, made: Mapping[str, Any]) -> Any:
    """The scorer by which a policy is measured: the only reward, or the weighted sum of them."""
    names = named(config, {n: s.unit for n, s in made.items()})
    if len(names) == 1:
        return made[names[0]]
    weights = dict(zip(names, train.reward_weights or [1.0] * len(names), strict=True))
    return Ensemble("+".join(names), {n: made[n] for n in names}, "sum", normalise=False, weights=weights)


def rows_of(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Rows for fastpo.train: prompts with their other columns."""
    return [{"prompt": item.prompt, **item.meta} for item in items]


# -------------------------------------------------------------------- figures


def figures(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of training's log: rewards and lengths of the first and of the last generation that it has a line of."""
    out: dict[str, float] = {}
    for name in dict.fromkeys(key for line in history for key in line):
        own = {"reward": "reward", "completions/mean_length": "mean tokens", "completions/clipped_ratio": "truncated"}
        if name not in own and not (name.startswith("rewards/") and name.endswith("/mean")):
            continue
        known = [v for line in history if _is_finite(v := line.get(name))]
        if known:
            label = own.get(name) or f"reward of {name.removeprefix('rewards/').removesuffix('/mean')}"
            out |= {f"{label}{AT_FIRST}": float(known[0]), label: float(known[-1])}
    return out


def sample_figures(counts: Mapping[str, Any]) -> dict[str, float]:
    """What the guards read of the training's counts."""
    return {k: v for k, v in counts.items() if k.removesuffix(AT_FIRST) in ("mean tokens", "truncated")}


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def steps_of(train: TrainConfig, prompts: int) -> tuple[int, int]:
    """(optimiser steps, responses that are drawn) of training on so many prompts, in one process."""
    asks = rollouts(train)
    plan = OnlinePlan(
        train, prompts, asks.prompts_per_step, spread=asks.steps_per_generation, passes=train.num_iterations
    )
    per_step = min(prompts, asks.prompts_per_step) * asks.num_generations
    return plan.total, math.ceil(plan.total / train.num_iterations) * per_step
