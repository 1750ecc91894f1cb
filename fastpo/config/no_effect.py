"""Options that are set and change nothing in this run: said once, in one line, before the first step.

Only what differs from every default counts: fastpo's, TRL's, transformers'. A DPOConfig carries all of its defaults.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fastpo.config.option import differ
from fastpo.config.options import OPTIONS
from fastpo.config.train_config import TrainConfig


@dataclass(frozen=True)
class Facts:
    """What decides beside the options."""

    device_type: str = "cpu"
    processes: int = 1
    steps: int = 0  # of the run
    own_optimizer: bool = True  # made of the options, not passed in
    own_scheduler: bool = True
    narrow: bool = False  # whether a 16-bit parameter is trained
    from_hub: bool = True  # whether train_dataset is a name or a folder, which has splits
    eval_from_hub: bool = True


_Without = Callable[[TrainConfig, Facts], bool]
_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio")

# (options, when they have no effect, why). One line a cause.
_TABLE: tuple[tuple[tuple[str, ...], _Without, str], ...] = (
    (("eval_delay",), lambda c, f: c.eval_strategy == "no", "eval_strategy=no"),
    (("eval_steps",), lambda c, f: c.eval_strategy != "steps", "eval_strategy is not steps"),
    (("save_steps",), lambda c, f: c.save_strategy != "steps", "save_strategy is not steps"),
    (("save_total_limit", "save_only_model"), lambda c, f: c.save_strategy == "no", "save_strategy=no"),
    (("logging_first_step",), lambda c, f: c.logging_strategy != "steps", "logging_strategy is not steps"),
    (
        ("logging_steps",),
        lambda c, f: c.logging_strategy != "steps" and not (c.eval_strategy == "steps" and c.eval_steps is None),
        "logging_strategy is not steps",
    ),
    (
        ("greater_is_better",),
        lambda c, f: c.metric_for_best_model is None and not c.load_best_model_at_end,
        "no metric_for_best_model",
    ),
    (
        ("ref_model_mixup_alpha", "ref_model_sync_steps"),
        lambda c, f: not c.sync_ref_model,
        "sync_ref_model is off",
    ),
    (
        ("sync_ref_model",),
        lambda c, f: 0 < f.steps < c.ref_model_sync_steps,
        "fewer steps than ref_model_sync_steps",
    ),
    (
        ("warmup_steps", "warmup_ratio"),
        lambda c, f: f.own_scheduler and c.lr_scheduler_type == "constant",
        "lr_scheduler_type=constant has no warm-up: constant_with_warmup has",
    ),
    (_SCHEDULE, lambda c, f: not f.own_scheduler, "a scheduler was passed in"),
    (
        ("optim", "optim_args", "weight_decay", "learning_rate", "master_weights", *_ADAM),
        lambda c, f: not f.own_optimizer,
        "an optimiser was passed in",
    ),
    (_ADAM, lambda c, f: f.own_optimizer and c.optim in ("sgd", "rmsprop"), "optim is no Adam"),
    (
        ("master_weights",),
        lambda c, f: f.own_optimizer and not f.narrow,
        "no 16-bit weight is trained",
    ),
    (("gradient_checkpointing_kwargs",), lambda c, f: not c.gradient_checkpointing, "gradient_checkpointing is off"),
    (("liger_kernel_config",), lambda c, f: c.use_liger_kernel is False, "use_liger_kernel is off"),
    (("fsdp_gradients",), lambda c, f: c.fsdp == "no", "fsdp is off"),
    (("ddp_timeout", "ddp_backend"), lambda c, f: f.processes == 1, "there is one process"),
    (("tf32",), lambda c, f: f.device_type == "cpu", "the device is a CPU"),
    (("generation_kwargs",), lambda c, f: not c.sample_generations, "sample_generations is off"),
    (("dataset_train_split",), lambda c, f: not f.from_hub, "train_dataset is no hub data set"),
    (("dataset_test_split",), lambda c, f: not f.eval_from_hub, "eval_dataset is no hub data set"),
    (("dataset_config",), lambda c, f: not (f.from_hub or f.eval_from_hub), "the rows are no hub data set"),
    (
        ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        lambda c, f: not {"trackio", "wandb", "all"} & set(c.report_names),
        "report_to has no trackio",
    ),
    (
        ("hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_revision"),
        lambda c, f: not c.push_to_hub,
        "push_to_hub is off",
    ),
    (("num_train_epochs",), lambda c, f: c.max_steps > 0, "max_steps is set"),
    (("truncation_mode",), lambda c, f: c.max_length is None, "max_length is None"),
    (("num_generations_eval",), lambda c, f: c.eval_strategy == "no" and not c.eval_on_start, "eval_strategy=no"),
    (
        ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
        lambda c, f: not c.use_adaptive_entropy,
        "use_adaptive_entropy is off",
    ),
    (
        ("importance_sampling_mode", "importance_sampling_clip_max", "importance_sampling_clip_min"),
        lambda c, f: not c.importance_sampling_correction,
        "importance_sampling_correction is off",
    ),
    (("overlong_penalty",), lambda c, f: c.overlong_buffer is None, "overlong_buffer is not set"),
    (
        ("num_completions_to_print", "log_unique_prompts"),
        lambda c, f: not c.log_completions,
        "log_completions is off",
    ),
    (("data_seed",), lambda c, f: c.train_sampling_strategy == "sequential", "the order is sequential"),
)


def without_effect(config: TrainConfig, facts: Facts) -> list[str]:
    """What to say: `option (why)` for every option that is set and has no effect in this run."""
    out = []
    for names, is_without, why in _TABLE:
        if is_without(config, facts) and (given := [name for name in names if _is_set(config, name)]):
            out.append(f"{', '.join(given)} ({why})")
    if ignored := getattr(config, "without_meaning", ()):
        out.append(f"{', '.join(ignored)} (docs/migrating-from-trl.md says why)")
    return out


def _is_set(config: TrainConfig, name: str) -> bool:
    value = getattr(config, name)
    return all(differ(value, default) for default in (None, *_defaults(name)))


def _defaults(name: str) -> Iterator[Any]:
    from transformers import TrainingArguments

    of_ours = {f.name: f for f in dataclasses.fields(TrainConfig)}
    of_theirs = {f.name: f for f in dataclasses.fields(TrainingArguments)}
    for field in (of_ours.get(name), of_theirs.get(name)):
        if field is not None and field.default is not dataclasses.MISSING:
            yield getattr(field.default, "value", field.default)
    if name in OPTIONS:
        yield OPTIONS[name].default
    if name == "gradient_checkpointing_kwargs":
        yield {"use_reentrant": False}  # what transformers fills in
