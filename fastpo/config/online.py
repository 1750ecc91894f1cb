"""Online losses: which they are, which of their options go together, and the run that they ask for (`Rollouts`).

A loss per token (`TOKENS`) reads a number of each response; an online preference loss (`PREFERENCES`) reads pairs of
responses that the policy gives as it trains. `per_device_train_batch_size` counts responses for the first, as TRL's
GRPOConfig, and prompts for the second, as TRL's OnlineDPOConfig.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastpo.config.option import differ
from fastpo.errors import ConfigError, did_you_mean, shown

TOKENS = ("reinforce", "rloo", "grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo", "sapo", "luspo", "vespo", "gmpo")
PREFERENCES = ("online_dpo", "online_ipo", "ipo_md", "nash_md", "xpo", "spo")
ONLINE = (*TOKENS, *PREFERENCES)
ADVANTAGES = ("nash_md", "spo")  # of PREFERENCES: they read how often a response wins, not pairs
MIXTURES = {"nash_md": 0.5, "ipo_md": 0.5}  # losses of a mixture with the reference: the reference's share, as in TRL

# Options of the losses' own, None unless given: handed to the loss under these names.
HYPER = ("epsilon", "epsilon_high", "delta", "sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos",
         "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "importance_sampling_level",
         "off_policy_mask_threshold", "use_bias_correction_kl", "kl_estimator")  # fmt: skip
GENERATIONS = {name: 2 for name in ("rloo", *PREFERENCES)}  # of the others 8
UNSCALED = ("reinforce", "rloo", "dr_grpo")  # rewards that their papers do not divide by a standard deviation
SCALES = ("group", "batch", "none")
# How the importance of what the sampler said is kept within bounds; VESPO weighs whole responses itself.
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
LOCAL = ("engine", "batch_size", "batch_tokens")  # what `sampler` may say of the in-process sampler
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_completion_length")
_CORRECTION = ("importance_sampling_correction", "importance_sampling_mode", "importance_sampling_clip_max",
               "importance_sampling_clip_min")  # fmt: skip
_OF_REWARDS = ("multi_objective_aggregation", "scale_rewards", "dynamic_sampling", "overlong_buffer",
               "overlong_penalty")  # fmt: skip
_OF_TOKENS = ("mask_truncated_completions", "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy",
              *_CORRECTION)  # fmt: skip


def loss_of(losses: Sequence[str]) -> str | None:
    """The online loss among `losses`; None where all are trained on given rows. ConfigError where it is not alone."""
    found = [name for name in losses if name in ONLINE]
    if found and len(losses) > 1:
        raise ConfigError(
            f"loss_type={list(losses)}: {found[0]} is trained on responses of its own: give loss_type={found[0]} alone"
        )
    return found[0] if found else None


def takes_no_beta(losses: Sequence[str]) -> bool:
    """Whether beta=0, no reference, is one of the losses' values."""
    return all(name in (*TOKENS, *ADVANTAGES) for name in losses)


@dataclass(frozen=True)
class Rollouts:
    """What an online run draws, with the defaults of its loss in place of None; made by `rollouts`.

    A generation is the responses that are drawn with one policy: `prompts` prompts, `num_generations` of each. It feeds
    `steps_per_generation` optimiser steps, and these are done `num_iterations` times.
    """

    loss: str
    of_tokens: bool  # a loss per token, of numbers; else of preferences
    num_generations: int  # responses of a prompt
    num_generations_eval: int
    temperature: float
    max_completion_length: int
    max_prompt_length: int | None  # tokens of the longest prompt that is taken; None: any
    scale_rewards: str  # group, batch or none
    importance_sampling_mode: str
    mixture_coef: float  # the reference's share where the opponent's responses are drawn; 0: the policy alone
    engine: str  # of the sampler
    sampler: Mapping[str, Any]  # its other options
    prompts: int  # of one generation, over all processes
    steps_per_generation: int  # optimiser steps

    @property
    def responses(self) -> int:
        """Of one generation, over all processes."""
        return self.prompts * self.num_generations

    @property
    def prompts_per_step(self) -> int:
        """Over all processes."""
        return self.prompts // self.steps_per_generation


# `config` is a TrainConfig, which this module does not import: it reads the names above.
def rollouts(config: Any, processes: int = 1) -> Rollouts:
    """The run that the options of an online loss ask for, with so many processes.

    ConfigError where the batch does not hold whole groups, and for what does not fit together: before a model is
    loaded. `steps_per_generation` counts micro-batches, as in TRL: over gradient_accumulation_steps it is optimiser
    steps, which must be a whole number. One that divides gradient_accumulation_steps is one step: TRL then draws
    several times within a step, from one and the same policy.
    """
    loss = loss_of(config.losses)
    if loss is None:
        raise ConfigError(f"loss_type={config.loss_type} draws no responses: it is trained on given rows")
    tokens = loss in TOKENS
    generations = _or(config.num_generations, GENERATIONS.get(loss, 8))
    step = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    if tokens and step % generations:
        raise ConfigError(
            f"per_device_train_batch_size x gradient_accumulation_steps x processes is {step} responses, no multiple "
            f"of num_generations={generations}: {_nearest(step, generations)}"
        )
    steps = _steps(config, processes)
    sampler = dict(config.sampler or {})
    room = config.max_length
    return Rollouts(
        loss=loss,
        of_tokens=tokens,
        num_generations=generations,
        num_generations_eval=_or(config.num_generations_eval, generations),
        temperature=_or(config.temperature, 1.0 if tokens else 0.9),
        max_completion_length=config.max_completion_length,
        max_prompt_length=None if room is None else room - config.max_completion_length,
        scale_rewards=_or(config.scale_rewards, "none" if loss in UNSCALED or not tokens else "group"),
        importance_sampling_mode=_or(
            config.importance_sampling_mode, "token_truncate" if loss == "vespo" else "sequence_mask"
        ),
        mixture_coef=_or(config.mixture_coef, MIXTURES.get(loss, 0.0)),
        engine=sampler.pop("engine", "local"),
        sampler=sampler,
        prompts=(step // generations if tokens else step) * steps,
        steps_per_generation=steps,
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _steps(config: Any, processes: int) -> int:
    """Optimiser steps that one generation feeds."""
    accumulation = config.gradient_accumulation_steps
    micro = config.steps_per_generation
    if config.generation_batch_size is not None:
        batch = config.per_device_train_batch_size * processes
        if config.generation_batch_size % batch:
            raise ConfigError(
                f"generation_batch_size={config.generation_batch_size} must be a multiple of "
                f"per_device_train_batch_size x processes, {batch}: {_nearest(config.generation_batch_size, batch)}"
            )
        micro = config.generation_batch_size // batch
    if micro is None or (accumulation % micro == 0 and config.num_iterations == 1):
        return 1
    if micro % accumulation:
        raise ConfigError(
            f"steps_per_generation={micro} micro-batches must be a multiple of "
            f"gradient_accumulation_steps={accumulation}: {_nearest(micro, accumulation)}"
        )
    return micro // accumulation


def _nearest(value: int, of: int) -> str:
    low = value // of * of
    return f"the nearest are {low} and {low + of}" if low else f"the nearest is {of}"


def hyper(config: Any) -> dict[str, Any]:
    """The options that a loss itself reads, for `fastpo.losses.table.resolve_terms`; None where not given."""
    return {name: getattr(config, name) for name in HYPER}


def given(config: Any) -> list[str]:
    """Options of online losses that are set to something else than their default."""
    return [
        f.name
        for f in dataclasses.fields(config)
        if f.metadata["group"].startswith("online") and differ(getattr(config, f.name), f.default)
    ]


def check(config: Any) -> None:
    """ConfigError for options that do not go together; what the processes decide is in `rollouts`."""
    loss = loss_of(config.losses)
    if loss is None:
        if named := given(config):
            _refuse_offline(config, named)
        return
    _check_counts(config)
    _check_parts(config, loss)
    if loss in PREFERENCES:
        unread = (*_OF_REWARDS, *(() if loss in ADVANTAGES else _OF_TOKENS))
        if wrong := next((name for name in given(config) if name in unread), None):
            reads = "how often a response wins" if loss in ADVANTAGES else "pairs of responses"
            raise ConfigError(f"{wrong} is set, but {loss} does not read it: it reads {reads}, not rewards as grpo")
    elif config.judge is not None:
        raise ConfigError(f"judge compares two responses, and {loss} reads a number of each: give reward_funcs")
    if config.mixture_coef is not None and loss not in MIXTURES:
        raise ConfigError(f"mixture_coef is set, but {loss} does not read it: {' and '.join(MIXTURES)} do")
    _check_entropy(config)
    _check_correction(config, loss)


def _refuse_offline(config: Any, names: Sequence[str]) -> None:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    hint = ""
    if "max_completion_length" in names:
        hint = ": max_length counts prompt plus response"
    elif "delta" in names:
        hint = "; slic's own is loss_kwargs={delta: ...}"
    raise ConfigError(
        f"{', '.join(f'{n}={shown(getattr(config, n))}' for n in names[:3])}{more} belongs to online losses "
        f"({', '.join(ONLINE)}), and {'+'.join(config.losses)} is trained on given rows{hint}"
    )


def _check_counts(config: Any) -> None:
    for name in ("num_generations", "num_generations_eval"):
        number = getattr(config, name)
        if name == "num_generations" and number is not None and number < 2:
            raise ConfigError(f"{name} must be 2 or more, not {number}: a response is held against its prompt's others")
    if config.generation_batch_size is not None and config.steps_per_generation is not None:
        raise ConfigError("generation_batch_size and steps_per_generation are both set; give one")
    if config.max_length is not None and config.max_completion_length >= config.max_length:
        raise ConfigError(
            f"max_completion_length={config.max_completion_length} leaves no room for a prompt within "
            f"max_length={config.max_length}: raise max_length, or set it to none"
        )
    if config.overlong_buffer is not None and config.overlong_buffer > config.max_completion_length:
        raise ConfigError(
            f"overlong_buffer={config.overlong_buffer} must be at most max_completion_length="
            f"{config.max_completion_length}"
        )


def _check_parts(config: Any, loss: str) -> None:
    """The sampler, and what a run without given responses cannot have."""
    sampler = config.sampler or {}
    engine = sampler.get("engine", "local")
    if not isinstance(engine, str):
        raise ConfigError(f"sampler: engine must be a name, not {shown(engine)}")
    if engine == "local" and (unknown := next((name for name in sampler if name not in LOCAL), None)) is not None:
        raise ConfigError(
            f"sampler: the policy answers in this process, with the options {', '.join(LOCAL[1:])}, not {unknown!r}"
            f"{did_you_mean(str(unknown), LOCAL)}; a server is sampler={{engine: openai, base_url: ...}}"
        )
    if engine == "local" and config.fsdp != "no":
        raise ConfigError(
            f"fsdp={config.fsdp} splits the model that the in-process sampler answers with: set "
            "sampler={engine: openai, base_url: ...}, a server's, or leave fsdp out"
        )
    if engine != "local" and loss in (*MIXTURES, "xpo"):
        raise ConfigError(
            f"{loss} draws from the reference too, or from a mixture with it, which only the in-process sampler does: "
            f"leave sampler.engine={engine} out"
        )
    if config.generation_kwargs and not config.sample_generations:
        raise ConfigError(
            f"generation_kwargs={shown(config.generation_kwargs)} are of sample_generations; what {loss} draws takes "
            f"{', '.join(_SAMPLING)}, each an option"
        )
    if config.precompute_ref_log_probs:
        raise ConfigError(f"precompute_ref_log_probs: {loss} has no responses before the run; leave it out")


def _check_entropy(config: Any) -> None:
    if not config.entropy_coef and not config.use_adaptive_entropy:
        return
    if config.grad_filter:
        name = "entropy_coef" if config.entropy_coef else "use_adaptive_entropy"
        raise ConfigError(f"grad_filter leaves out tokens that the entropy's gradient needs: leave it or {name} out")
    low, start, high = config.entropy_coef_min, config.entropy_coef, config.entropy_coef_max
    if config.use_adaptive_entropy and not low <= start <= high:
        raise ConfigError(
            f"entropy_coef={start:g} must be from entropy_coef_min={low:g} to entropy_coef_max={high:g}, where "
            "use_adaptive_entropy begins"
        )


def _check_correction(config: Any, loss: str) -> None:
    mode, low, high = (
        config.importance_sampling_mode,
        config.importance_sampling_clip_min,
        config.importance_sampling_clip_max,
    )
    if not config.importance_sampling_correction:
        return
    if loss == "vespo" and mode is not None and not mode.startswith("token"):
        raise ConfigError(f"vespo weighs whole responses itself: importance_sampling_mode=token_truncate, not {mode}")
    if low is not None and high is not None and low >= high:
        raise ConfigError(f"importance_sampling_clip_min={low:g} must be below importance_sampling_clip_max={high:g}")
    if low is None and high is None and (mode or "").endswith("truncate"):
        raise ConfigError(
            f"importance_sampling_mode={mode} needs importance_sampling_clip_max or importance_sampling_clip_min"
        )
