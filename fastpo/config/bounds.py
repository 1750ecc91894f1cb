"""What values an option takes: its kind, its range, what a text may hold. One rule for each, for all options.

Numbers are finite and within `RANGES`, where every numeric option of TrainConfig stands (a test compares): a seed that
numpy refuses, a step count that no run ends at or a rate that no weight survives is a line before anything is loaded.
"""

import enum
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastpo.errors import ConfigError, shown

COUNT = 10**9  # steps, rows, tokens: more is a slip of the keyboard, and lists of it do not fit in memory
LARGE = 1e6  # factors and rates: more leaves fp32 within a few steps
SCORE = 1e30  # what is only compared with the data's own numbers
SEED = 2**32 - 1  # numpy's largest


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; `above` and `below` leave the ends out; `share`: below 1 a share, else whole."""

    low: float
    high: float
    above: bool = False
    below: bool = False
    share: bool = False
    unit: str = ""

    def holds(self, value: float) -> bool:
        if not (self.low < value if self.above else self.low <= value):
            return False
        if not (value < self.high if self.below else value <= self.high):
            return False
        return not self.share or value < 1 or value == int(value)

    def text(self, value: float) -> str:
        """What `value`, which is not within, should be."""
        if self.high <= 1:
            return f"in {'(' if self.above else '['}{_plain(self.low)}, {_plain(self.high)}{')' if self.below else ']'}"
        if value > self.high:
            return f"at most {_plain(self.high)}{self.unit}"
        if self.share and value > 1 and math.isfinite(value):
            return "a whole number of steps, or below 1 a share of all steps"
        if self.low == 0 or (self.low == 1 and not self.above):
            return ("positive" if self.above or self.low == 1 else "zero or more") + self.unit
        return f"from {_plain(self.low)} to {_plain(self.high)}"


def _plain(number: float) -> str:
    whole = number == int(number) and abs(number) >= 1
    return f"{int(number):,}" if whole and abs(number) < 1e15 else f"{number:g}"


_POSITIVE = Range(1, COUNT)  # a count of at least one
_STEPS = Range(0, COUNT, above=True, share=True)
_FACTOR = Range(0, LARGE, above=True)
_SIGNED = Range(-LARGE, LARGE)
_BELOW_ONE = Range(0, 1, below=True)

RANGES: dict[str, Range] = {
    "seed": Range(0, SEED),
    "data_seed": Range(0, SEED),
    "ddp_timeout": _POSITIVE,
    "max_length": _POSITIVE,
    "pair_margin": Range(0, SCORE, above=True),
    "dataset_num_proc": Range(1, 1024),
    "loss_weights": Range(-LARGE, LARGE),
    "beta": _FACTOR,
    "label_smoothing": _BELOW_ONE,
    "gamma_beta_ratio": _SIGNED,
    "discopop_tau": _FACTOR,
    "f_alpha_divergence_coef": _SIGNED,
    "ld_alpha": Range(0, 1),
    "ref_model_mixup_alpha": Range(0, 1),
    "ref_model_sync_steps": _POSITIVE,
    "per_device_train_batch_size": _POSITIVE,
    "gradient_accumulation_steps": _POSITIVE,
    "per_device_eval_batch_size": _POSITIVE,
    "max_tokens": _POSITIVE,
    "token_bucket": _POSITIVE,
    "learning_rate": Range(0, LARGE),
    "num_train_epochs": Range(0, COUNT, above=True),
    "max_steps": Range(-1, COUNT),
    "warmup_steps": Range(0, COUNT, share=True),
    "warmup_ratio": _BELOW_ONE,
    "weight_decay": Range(0, LARGE),
    "adam_beta1": _BELOW_ONE,
    "adam_beta2": _BELOW_ONE,
    "adam_epsilon": Range(1e-37, LARGE),  # less is zero in fp32, and zero over zero no update
    "max_grad_norm": Range(-SCORE, SCORE),
    "max_nonfinite_steps": _POSITIVE,
    "gradient_checkpointing_layers": Range(0, COUNT),
    "logits_memory_budget": Range(0, 2**62, unit=" bytes"),
    "router_aux_loss_coef": Range(0, LARGE),
    "grad_filter": _BELOW_ONE,
    "eval_steps": _STEPS,
    "eval_delay": Range(0, COUNT),
    "sample_generations": Range(0, COUNT),
    "logging_steps": _STEPS,
    "save_steps": _STEPS,
    "save_total_limit": _POSITIVE,
    "num_generations": _POSITIVE,
    "num_generations_eval": _POSITIVE,
    "max_completion_length": _POSITIVE,
    "steps_per_generation": _POSITIVE,
    "generation_batch_size": _POSITIVE,
    "num_iterations": _POSITIVE,
    "temperature": _FACTOR,
    "top_p": Range(0, 1, above=True),
    "top_k": Range(0, COUNT),
    "min_p": Range(0, 1),
    "repetition_penalty": _FACTOR,
    "mixture_coef": Range(0, 1),
    "dynamic_sampling": Range(0, COUNT),
    "reward_weights": _SIGNED,
    "missing_eos_penalty": _FACTOR,
    "overlong_buffer": _POSITIVE,
    "overlong_penalty": Range(0, LARGE),
    "epsilon": Range(0, LARGE),
    "epsilon_high": Range(0, LARGE),
    "delta": _FACTOR,
    "sapo_temperature_neg": _FACTOR,
    "sapo_temperature_pos": _FACTOR,
    "vespo_k_pos": Range(0, LARGE),
    "vespo_lambda_pos": Range(0, LARGE),
    "vespo_k_neg": Range(0, LARGE),
    "vespo_lambda_neg": Range(0, LARGE),
    "off_policy_mask_threshold": _FACTOR,
    "top_entropy_quantile": Range(0, 1),
    "entropy_coef": _SIGNED,
    "entropy_coef_min": _SIGNED,
    "entropy_coef_max": _SIGNED,
    "entropy_coef_delta": Range(0, LARGE),
    "entropy_target": Range(0, LARGE),
    "importance_sampling_clip_max": _FACTOR,
    "importance_sampling_clip_min": Range(0, LARGE),
    "num_completions_to_print": _POSITIVE,
}


def check_range(name: str, value: Any) -> None:
    """ConfigError for a number outside the option's range, or none at all; other values have passed `coerce`."""
    numbers = value if isinstance(value, list) else [value]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        if not RANGES[name].holds(number):
            raise ConfigError(f"{name} must be {RANGES[name].text(number)}, not {shown(value)}")


def check_content(name: str, value: Any) -> None:
    """ConfigError for what no file can hold, inside lists and mappings too: null characters and halves of characters
    in texts, numbers that are none, keys that are no names."""
    if isinstance(value, str):
        if "\x00" in value:
            raise ConfigError(f"{name} holds a null character: {shown(value)}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"{name} is no text that a file can hold: {shown(value.encode(errors='replace'))}"
            ) from None
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} must be finite, not {value!r}")
    elif isinstance(value, list | tuple):
        for item in value:
            check_content(name, item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str) or not key:
                raise ConfigError(f"{name}: its keys are names, not {shown(key)}")
            check_content(f"{name}: {key}", item)


# ---- from what was given to a field's type


def coerce(name: str, value: Any, annotation: Any) -> Any:
    """YAML reads 1e-6 as a string and 3 as an int; TRL scripts pass enums, numpy's numbers, paths and dtypes. Wrong
    kinds are a one-line error."""
    kinds = kinds_of(annotation)
    value = plain(value)
    if name == "report_to" and (value is None or value in ("", [], False)):
        return "none"
    if value is None:
        if type(None) in kinds:
            return None
        raise ConfigError(f"{name} must not be None")
    if name == "fsdp" and isinstance(value, list):
        value = " ".join(str(v) for v in value)
    if str in kinds and not isinstance(value, str | list):
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        elif type(value).__module__ == "torch" and type(value).__name__ in ("dtype", "device"):
            value = str(value)
    if isinstance(value, str):
        value = _from_text(name, value, kinds)
    for kind in (int, float):
        if kind in kinds and not isinstance(value, bool) and isinstance(value, int | float | str):
            number = _number(value, kind)
            if number is not None:
                return number
    if value is None or (type(value) in kinds and not (isinstance(value, bool) and bool not in kinds)):
        return _items(name, value, annotation) if isinstance(value, list) else value
    words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", dict: "a mapping"}
    names = " or ".join(words.get(k, k.__name__) for k in kinds if k is not type(None))
    told = "" if name == "hub_token" else f", not {shown(value)}"
    raise ConfigError(f"{name} must be {names}{told}")


def plain(value: Any) -> Any:
    """Enums, numpy's scalars and tuples as Python's own, inside lists and mappings too."""
    if isinstance(value, enum.Enum):
        value = value.value
    elif type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0 and value.dtype.kind in "biufUS":
        value = value.item()
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    return dict(value) if isinstance(value, Mapping) else value


def _number(value: int | float | str, kind: type) -> Any:
    """`value` as a whole number or a float; None where it is neither. A whole number keeps all its digits."""
    if kind is int and isinstance(value, int):
        return value
    try:
        number = float(value)
    except ValueError:
        return None
    except OverflowError:  # ten to the 400th: its sign is what the range needs
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]
    if kind is float or not math.isfinite(number):
        return number
    return int(number) if number == int(number) else None


def _items(name: str, value: list, annotation: Any) -> list:
    """A list whose items are numbers or names, as the annotation says."""
    wanted = next((typing.get_args(a) for a in _members(annotation) if typing.get_origin(a) is list), ())
    if float in wanted:
        numbers = [
            None if isinstance(v, bool) or not isinstance(v, int | float | str) else _number(v, float) for v in value
        ]
        if None in numbers:
            raise ConfigError(f"{name} must be a list of numbers, not {shown(value)}")
        return numbers
    if str in wanted and not all(isinstance(v, str) for v in value):
        raise ConfigError(f"{name} must be a string or a list of strings, not {shown(value)}")
    return value


def _from_text(name: str, value: str, kinds: tuple[type, ...]) -> Any:
    """What a text means for a field that is no text: none, true, false, or a mapping as JSON, which TRL takes too."""
    if bool in kinds and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if str not in kinds and value.lower() == "none" and type(None) in kinds:
        return None
    if dict in kinds and value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{name} is not JSON: {error}") from None
    return value


def _members(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def kinds_of(annotation: Any) -> tuple[type, ...]:
    """The plain types of a field: `float | None` gives (float, NoneType)."""
    return tuple(typing.get_origin(a) or a for a in _members(annotation))
