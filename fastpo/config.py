"""`TrainConfig`: one flat dataclass with Hugging Face's and TRL's field names and meanings.

A configuration comes from a `TrainConfig`, a dict, a YAML file, or a TRL `DPOConfig` / transformers `TrainingArguments`,
with keyword overrides on top (`TrainConfig.build`). Anything set that fastpo does not honour raises: an option that is
accepted is an option that has its effect.
"""

import dataclasses
import difflib
import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpo.errors import ConfigError


def _opt(default: Any, group: str, help: str, choices: tuple[str, ...] | None = None) -> Any:
    metadata = {"group": group, "help": help, "choices": choices}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
             "inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay")  # fmt: skip
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "rmsprop", "sgd")


@dataclass
class TrainConfig:
    """Everything a run depends on except the model and the data. `fastpo train --help` prints it grouped."""

    # fmt: off
    output_dir: str = _opt("fastpo-output", "run", "folder for the trained model, metrics.jsonl and config.yaml")
    overwrite_output_dir: bool = _opt(False, "run", "use an output_dir that already holds a run")
    seed: int = _opt(42, "run", "seed of the row order, dropout and initialisation")
    data_seed: int | None = _opt(None, "run", "seed of the row order alone (None: seed)")
    use_cpu: bool = _opt(False, "run", "train on the CPU even where there is a GPU")
    device: str | None = _opt(None, "run", "device to train on, such as cuda:1 (None: the first GPU, else the CPU)")

    model_init_kwargs: dict | None = _opt(None, "model", "keyword arguments of from_pretrained, where the model is a name or path")
    dtype: str | None = _opt(None, "model", "dtype to load the model in; None or auto: the checkpoint's own")
    trust_remote_code: bool = _opt(False, "model", "let a checkpoint's own code run")
    disable_dropout: bool = _opt(True, "model", "set every dropout probability of the policy to zero")

    dataset_config: str | None = _opt(None, "data", "configuration of a hub dataset")
    dataset_train_split: str = _opt("train", "data", "split to train on, for a hub dataset")
    dataset_test_split: str = _opt("test", "data", "split to evaluate on, for a hub dataset")
    max_length: int | None = _opt(1024, "data", "tokens of prompt plus response that are kept (None: all)")
    truncation_mode: str = _opt("keep_start", "data", "which end of a sequence over max_length is kept", ("keep_start", "keep_end"))
    invalid_rows: str = _opt("raise", "data", "rows with NaN scores, empty or identical responses: raise, or drop with a count", ("raise", "drop"))
    train_sampling_strategy: str = _opt("random", "data", "order of the rows", ("random", "sequential"))
    dataloader_drop_last: bool = _opt(False, "data", "leave out an epoch's last, incomplete step")
    dataset_num_proc: int | None = _opt(None, "data", "processes that tokenise")

    loss_type: str | list[str] = _opt("dpo", "loss", "dpo (sigmoid), ipo, simpo, sppo, sppo_hard, hinge, robust, sft; a list is a weighted sum")
    loss_weights: list[float] | None = _opt(None, "loss", "weight of each loss of a list (None: 1)")
    beta: float | None = _opt(None, "loss", "the loss's own beta (None: dpo, hinge, robust 0.1; simpo 2.0; sppo 0.001; ipo's tau 0.1)")
    label_smoothing: float = _opt(0.0, "loss", "dpo, simpo: smoothed labels (cDPO); robust: the probability that a label is flipped")
    gamma_beta_ratio: float | None = _opt(None, "loss", "simpo: target margin over beta (None: 0.5)")
    ipo_reduce: str = _opt("mean", "loss", "ipo: log-ratios per token (mean, as TRL) or per response (sum, as the paper)", ("mean", "sum"))
    precompute_ref_log_probs: bool = _opt(True, "loss", "the reference is always computed once, ahead, and cached: True and False train alike")

    per_device_train_batch_size: int = _opt(8, "batch", "pairs per device and accumulation step")
    gradient_accumulation_steps: int = _opt(1, "batch", "an optimiser step takes this many times per_device_train_batch_size pairs")
    per_device_eval_batch_size: int = _opt(8, "batch", "has no effect on the numbers; evaluation is packed like training")
    max_tokens: int | None = _opt(None, "batch", "tokens of a packed micro-batch (None: 16384 on a GPU, 2048 on a CPU)")

    learning_rate: float = _opt(1e-6, "optimisation", "peak learning rate")
    num_train_epochs: float = _opt(3.0, "optimisation", "passes over the data")
    max_steps: int = _opt(-1, "optimisation", "optimiser steps; over num_train_epochs where positive")
    lr_scheduler_type: str = _opt("linear", "optimisation", "learning rate schedule", SCHEDULES)
    lr_scheduler_kwargs: dict | None = _opt(None, "optimisation", "arguments of the schedule")
    warmup_steps: float = _opt(0, "optimisation", "warm-up steps; below 1, a share of all steps")
    warmup_ratio: float | None = _opt(None, "optimisation", "warm-up as a share of all steps")
    optim: str = _opt("adamw_torch_fused", "optimisation", "optimiser", OPTIMIZERS)
    weight_decay: float = _opt(0.0, "optimisation", "decoupled weight decay, not on biases and norms")
    adam_beta1: float = _opt(0.9, "optimisation", "AdamW's beta1")
    adam_beta2: float = _opt(0.999, "optimisation", "AdamW's beta2")
    adam_epsilon: float = _opt(1e-8, "optimisation", "AdamW's epsilon")
    max_grad_norm: float = _opt(1.0, "optimisation", "gradients are scaled down to this norm (0 or less: never)")
    max_nonfinite_steps: int = _opt(5, "optimisation", "stop after this many non-finite steps in a row; each is skipped")

    bf16: bool | None = _opt(None, "precision and memory", "autocast to bfloat16 over the weights as loaded (None: on a GPU that has it)")
    gradient_checkpointing: bool = _opt(True, "precision and memory", "recompute each layer in the backward pass")
    gradient_checkpointing_kwargs: dict | None = _opt(None, "precision and memory", "arguments of gradient_checkpointing_enable")
    logits_memory_budget: int | None = _opt(None, "precision and memory", "bytes that the head may keep from forward to backward (None: DESIGN's rule; 0: nothing of size N x V)")

    eval_strategy: str = _opt("no", "evaluation", "when to evaluate; steps where eval_steps is set", ("no", "steps", "epoch"))
    eval_steps: float | None = _opt(None, "evaluation", "steps between evaluations (None: logging_steps); below 1, a share of all steps")
    eval_on_start: bool = _opt(False, "evaluation", "evaluate before the first step")

    logging_steps: float = _opt(10, "logging", "steps between log lines; below 1, a share of all steps")
    logging_first_step: bool = _opt(False, "logging", "log the first step too")
    disable_tqdm: bool = _opt(False, "logging", "no progress bar")
    report_to: str | list[str] = _opt("none", "logging", "none: metrics go to output_dir/metrics.jsonl")
    run_name: str | None = _opt(None, "logging", "name of the run, kept in config.yaml")

    save_strategy: str = _opt("no", "saving", "when to save the model beside the final save; steps where save_steps is set", ("no", "steps", "epoch"))
    save_steps: float = _opt(500, "saving", "steps between saves; below 1, a share of all steps")
    save_total_limit: int | None = _opt(None, "saving", "how many checkpoint folders to keep")
    save_final: bool = _opt(True, "saving", "save the model in output_dir at the end")
    # fmt: on

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            setattr(self, f.name, _coerce(f.name, getattr(self, f.name), f.type))
            choices = f.metadata["choices"]
            if choices and getattr(self, f.name) not in choices:
                raise ConfigError(f"{f.name} must be one of {', '.join(choices)}, not {getattr(self, f.name)!r}")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size",
                     "num_train_epochs", "adam_epsilon", "logging_steps", "save_steps", "max_nonfinite_steps"):  # fmt: skip
            self._require(name, getattr(self, name) > 0, "positive")
        for name in ("learning_rate", "weight_decay", "warmup_steps"):
            self._require(name, getattr(self, name) >= 0, "zero or more")
        for name in ("beta", "max_length", "max_tokens", "eval_steps", "save_total_limit", "dataset_num_proc"):
            value = getattr(self, name)
            self._require(name, value is None or value > 0, "positive")
        for name in ("adam_beta1", "adam_beta2"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._require("max_grad_norm", True, "a finite number")
        if self.warmup_ratio is not None and self.warmup_steps:
            raise ConfigError("warmup_steps and warmup_ratio are both set; give one")
        self._require("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)")
        self._require("warmup_ratio", self.warmup_ratio is None or 0 <= self.warmup_ratio < 1, "in [0, 1)")
        self._require("logits_memory_budget", (self.logits_memory_budget or 0) >= 0, "zero or more bytes")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ConfigError(f"max_steps must be positive, or -1 for num_train_epochs, not {self.max_steps}")
        reports = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        if any(r != "none" for r in reports):
            raise ConfigError(
                f"report_to={self.report_to!r} is not honoured yet; metrics are written to output_dir/metrics.jsonl"
            )
        if self.loss_weights is not None and len(self.loss_weights) != len(self.losses):
            raise ConfigError(f"loss_weights has {len(self.loss_weights)} entries for {len(self.losses)} losses")

    def _require(self, name: str, ok: bool, what: str) -> None:
        value = getattr(self, name)
        if not ok or (isinstance(value, float) and not math.isfinite(value)):
            raise ConfigError(f"{name} must be {what}, not {value!r}")

    @property
    def losses(self) -> list[str]:
        """The loss types as a list."""
        return [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)

    @property
    def step_size(self) -> int:
        """Pairs (or rows, for sft) of one optimiser step on one device."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dict, in order."""
        return dataclasses.asdict(self)

    @classmethod
    def build(cls, args: Any = None, **overrides: Any) -> "TrainConfig":
        """A `TrainConfig` from `args` (None, TrainConfig, dict, YAML path, or a TRL / transformers arguments object).

        Raises ConfigError for an unknown option (naming the nearest) and for one that fastpo does not honour.
        """
        if args is None:
            values: dict[str, Any] = {}
        elif isinstance(args, cls):
            values = {f.name: getattr(args, f.name) for f in dataclasses.fields(args)}
        elif isinstance(args, Mapping):
            values = check_options(args)
        elif isinstance(args, str | Path):
            values = check_options(read_yaml(args))
        elif _is_dpo_arguments(args):
            values = check_options(_explicit_fields(args))
        else:
            raise ConfigError(
                f"args must be a TrainConfig, a dict, a YAML path or a TRL DPOConfig, not {type(args).__name__}"
            )
        values |= check_options(overrides)
        # A cadence that is given says that it is wanted.
        if ("save_steps" in values or "save_total_limit" in values) and "save_strategy" not in values:
            values["save_strategy"] = "steps"
        if values.get("eval_steps") is not None and "eval_strategy" not in values:
            values["eval_strategy"] = "steps"
        return cls(**values)


def field_names() -> list[str]:
    """Names of all options, in the order of `--help`."""
    return [f.name for f in dataclasses.fields(TrainConfig)]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {str(path)!r}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data or {}, dict):
        raise ConfigError(f"{path} must hold option names with values, not a {type(data).__name__}")
    return data or {}


# Names that mean the same under another name here.
RENAMED = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
}

# Options without meaning here: any value trains alike, so they are accepted.
NO_EFFECT = {
    "padding_free": "fastpo is always padding-free",
    "pad_to_multiple_of": "nothing is padded",
    "precompute_ref_batch_size": "the reference pass is packed to max_tokens",
    "remove_unused_columns": "columns that are not used are ignored",
    "dataloader_num_workers": "batches are packed ahead from token ids in memory",
    "dataloader_pin_memory": "as above",
    "dataloader_persistent_workers": "as above",
    "dataloader_prefetch_factor": "as above",
    "dataloader_in_order": "as above",
    "dataloader_multiprocessing_context": "as above",
    "use_cache": "training never uses the key-value cache",
    "do_train": "read by example scripts, not by a trainer",
    "do_eval": "as above",
    "do_predict": "as above",
    "skip_memory_metrics": "peak memory is always logged",
    "include_num_input_tokens_seen": "num_tokens is always logged",
    "eval_do_concat_batches": "evaluation keeps no predictions",
    "eval_use_gather_object": "as above",
    "eval_accumulation_steps": "as above",
    "prediction_loss_only": "as above",
    "average_tokens_across_devices": "every term is normalised over the whole step",
    "log_on_each_node": "one process",
    "log_level": "Python's logging decides",
    "log_level_replica": "as above",
    "logging_nan_inf_filter": "a non-finite step is skipped, counted and shown",
    "save_on_each_node": "one process",
    "save_only_model": "checkpoints hold the model",
    "local_rank": "one process",
    "project": "belongs to trackers, see report_to",
    "label_names": "rows have fixed column names",
    "length_column_name": "belongs to group_by_length",
    "ddp_timeout": "one process",
    "use_liger_kernel": "the head is always fused",
    "hub_strategy": "belongs to push_to_hub",
}

# Options that would change the training and are not built: setting one raises.
REFUSED = {
    "full_determinism": "call torch.use_deterministic_algorithms(True); fastpo's own operations are deterministic",
    "fp16": "use bf16, or load the model in float32",
    "tf32": "set torch.set_float32_matmul_precision yourself",
    "torch_compile": "not honoured yet",
    "neftune_noise_alpha": "not honoured",
    "auto_find_batch_size": "set max_tokens: it bounds memory without changing the step",
    "label_smoothing_factor": "use label_smoothing",
    "push_to_hub": "push the folder that output_dir names yourself",
    "load_best_model_at_end": "not honoured yet",
    "resume_from_checkpoint": "not honoured yet",
    "deepspeed": "one process for now",
    "fsdp": "one process for now",
    "sync_ref_model": "a reference that moves is not honoured yet",
    "f_divergence_type": "only reverse_kl is built",
    "ld_alpha": "LD-DPO is not built yet",
    "use_weighting": "WPO is not built yet",
    "router_aux_loss_coef": "the router's auxiliary loss is not added",
    "discopop_tau": "DiscoPOP is not built yet",
    "activation_offloading": "not honoured yet",
    "padding_value": "nothing is padded",
    "max_prompt_length": "TRL removed it too: max_length counts prompt plus response",
    "max_completion_length": "TRL removed it too: max_length counts prompt plus response",
    "simpo_gamma": "set gamma_beta_ratio (gamma over beta)",
    "cpo_alpha": "add a weighted sft loss: loss_type=['simpo', 'sft'], loss_weights=[1, alpha]",
    "rpo_alpha": "add a weighted sft loss: loss_type=['dpo', 'sft'], loss_weights=[1, alpha]",
    "reference_free": "use simpo, or give ref_chosen_logps and ref_rejected_logps of zero",
}


def check_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Option names to `TrainConfig` fields: renamed ones resolved, those without effect left out, the rest refused."""
    known = field_names()
    out: dict[str, Any] = {}
    for name, value in values.items():
        name = RENAMED.get(name, name)
        if name in known:
            out[name] = value
        elif name in NO_EFFECT:
            continue
        elif name in REFUSED or name in _hf_defaults():
            default = _TRL_DEFAULTS.get(name, _hf_defaults().get(name))
            if value is None or value is False or value == default:  # off, or as it is anyway
                continue
            raise ConfigError(f"{name}={value!r} is not honoured by fastpo: {REFUSED.get(name, 'not honoured yet')}")
        else:
            near = difflib.get_close_matches(name, [*known, *RENAMED, *NO_EFFECT], n=1, cutoff=0.5)
            raise ConfigError(f"unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return out


_TRL_DEFAULTS = {"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "discopop_tau": 0.05,
                 "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 512}  # fmt: skip


@functools.cache
def _hf_defaults() -> dict[str, Any]:
    """transformers' TrainingArguments: field -> default."""
    from transformers import TrainingArguments

    return {f.name: f.default for f in dataclasses.fields(TrainingArguments)}


def _is_dpo_arguments(args: Any) -> bool:
    """TRL's DPOConfig or a subclass of it, or plain TrainingArguments; other trainers' arguments mean other losses."""
    names = [c.__name__ for c in type(args).__mro__]
    if "TrainingArguments" in names and names[0] != "TrainingArguments" and "DPOConfig" not in names:
        raise ConfigError(
            f"args is a {names[0]}, whose defaults mean another loss; pass a DPOConfig, a dict or a TrainConfig"
        )
    return "TrainingArguments" in names


_TRL_LOSSES = {"sigmoid", "ipo", "hinge", "robust", "sppo_hard", "sft"}


def _explicit_fields(args: Any) -> dict[str, Any]:
    """The fields of a TRL or transformers arguments object that its user set: those that differ from the defaults.

    TRL's own defaults (learning rate, logging steps, beta) are fastpo's. Fields that transformers fills in by itself
    (logging_dir, bf16 on this machine, ...) are compared with an untouched object of the same class.
    """
    untouched = type(args)(output_dir=args.output_dir, use_cpu=True, bf16=False)
    fields = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.init}
    changed = {k: v for k, v in fields.items() if v != getattr(untouched, k)}
    # What TRL or transformers set by default where ours differs keeps their meaning.
    for name in field_names():
        if name in fields and name not in ("precompute_ref_log_probs", "bf16"):
            changed.setdefault(name, fields[name])
    changed["bf16"] = bool(fields.get("bf16"))
    if "loss_type" in fields:
        changed["loss_type"] = fields["loss_type"]
    for name in ("lr_scheduler_type", "optim", "eval_strategy", "save_strategy"):
        if name in changed:
            changed[name] = getattr(changed[name], "value", changed[name])
    names = [changed["loss_type"]] if isinstance(changed.get("loss_type"), str) else changed.get("loss_type", [])
    if changed.get("beta") == getattr(untouched, "beta", None) and not set(names) <= _TRL_LOSSES:
        changed["beta"] = None  # TRL's default was not meant for a loss that TRL does not have
    if changed.get("report_to") in ([], None):
        changed["report_to"] = "none"
    return changed


def _coerce(name: str, value: Any, annotation: Any) -> Any:
    """YAML reads 1e-6 as a string and 3 as an int; TRL scripts pass enums. Wrong types are a one-line error."""
    kinds = _kinds(annotation)
    if value is None:
        if type(None) in kinds:
            return None
        raise ConfigError(f"{name} must not be None")
    value = getattr(value, "value", value)
    if isinstance(value, tuple):
        value = list(value)
    if str in kinds and not isinstance(value, str | list):
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        elif type(value).__module__ == "torch":  # a dtype or a device
            value = str(value)
    if bool in kinds and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, str) and str not in kinds and value.lower() == "none" and type(None) in kinds:
        return None
    for kind in (int, float):
        if kind in kinds and not isinstance(value, bool) and isinstance(value, int | float | str):
            try:
                number = float(value)
            except ValueError:
                continue
            if kind is float or number == int(number):
                return kind(number)
    if type(value) in kinds and not (isinstance(value, bool) and bool not in kinds):
        if name == "loss_weights":
            return [float(v) for v in value]
        return value
    words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", dict: "a mapping"}
    names = " or ".join(words.get(k, k.__name__) for k in kinds if k is not type(None))
    raise ConfigError(f"{name} must be {names}, not {value!r}")


def _kinds(annotation: Any) -> tuple[type, ...]:
    import types
    import typing

    args = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return tuple(typing.get_origin(a) or a for a in args)
