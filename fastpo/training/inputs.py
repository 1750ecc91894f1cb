"""The arguments of `fastpo.train` beside its options: of the right kind, and paths that are there.

Looked at before anything is loaded, so that a mistake costs no model's loading time, and says what it is: a path that
is not there is spoken of as a path, not as a repository that the hub does not know.
"""

import difflib
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fastpo.config.bounds import check_content
from fastpo.data import mixing, sources
from fastpo.errors import ConfigError, did_you_mean, shown
from fastpo.training.distributed import World

# What a folder has that a model, or an adapter, can be loaded from.
MODEL_MARKS = ("config.json", "adapter_config.json")


# ---- paths


def is_path(name: str) -> bool:
    """Whether a text can only mean a path: the hub's names are `name` or `owner/name`."""
    return not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or name.endswith((".json", ".safetensors", ".gguf"))


def model_name(argument: str, value: Any) -> str | None:
    """The name or path of a model given so, with `~` spelt out, None for one in memory.

    ConfigError where `value` is neither, and for a path where no model is.
    """
    if isinstance(value, nn.Module):
        return None
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{argument} must be a model, or the name or path of one, not {shown(value)}")
    name = os.fspath(value)
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"{argument} must be a model, or the name or path of one, not {shown(name)}")
    check_content(argument, name)
    where = os.path.expanduser(name)
    try:
        there, folder = os.path.exists(where), os.path.isdir(where)
    except ValueError:
        there = folder = False
    if folder and not any(os.path.exists(os.path.join(where, mark)) for mark in MODEL_MARKS):
        inside = sorted({p.parent.name for mark in MODEL_MARKS for p in Path(where).glob(f"*/{mark}")})
        hint = f"; there is one in {inside[-1]} below it" if inside else ""
        if is_path(name) or os.listdir(where) or hint:
            raise ConfigError(f"{argument}: the folder {shown(name)} holds no model, which has a config.json{hint}")
    if there and not folder:
        raise ConfigError(f"{argument}: {shown(name)} is a file, and a model is a folder")
    if not there and (is_path(name) or isinstance(value, os.PathLike)):
        raise ConfigError(f"{argument}: no such folder: {shown(name)}{nearest(where)}")
    return where if there else name


def nearest(path: str) -> str:
    """What may have been meant by a path that is not there: the nearest name to its first part that is missing."""
    missing = Path(path)
    while not (missing.parent.exists() or missing.parent == missing):
        missing = missing.parent
    try:
        names = os.listdir(missing.parent)
    except OSError:
        return ""
    near = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {str(missing.parent / near[0])!r}?"
    return (
        "" if str(missing) == path or not missing.parent.name else f" ({str(missing.parent)!r} has no {missing.name!r})"
    )


# ---- other arguments


def check(
    processing_class: Any = None, callbacks: Any = None, optimizers: Any = None, eval_dataset: Any = None
) -> None:
    """ConfigError for an argument of a kind that the run would stumble over later."""
    if isinstance(processing_class, str | os.PathLike):
        name = os.fspath(processing_class)
        raise ConfigError(
            f"processing_class is a tokenizer, not its name: AutoTokenizer.from_pretrained({shown(name)})"
        )
    if processing_class is not None and not hasattr(processing_class, "tokenizer"):  # a processor has one inside
        if isinstance(processing_class, type) or not (
            callable(processing_class)
            and hasattr(processing_class, "decode")
            and hasattr(processing_class, "eos_token_id")
        ):
            raise ConfigError(f"processing_class must be a tokenizer, not {shown(processing_class)}")
    if callbacks is not None and (isinstance(callbacks, str | Mapping) or not isinstance(callbacks, Sequence)):
        raise ConfigError(f"callbacks must be a list of callbacks, not {shown(callbacks)}")
    if optimizers is not None:
        _check_optimizers(optimizers)
    if isinstance(eval_dataset, Mapping):
        if not eval_dataset:
            raise ConfigError("eval_dataset is an empty mapping: leave it out, or give a data set")
        for name in eval_dataset:
            if not isinstance(name, str) or not name:
                raise ConfigError(f"eval_dataset: the sets have names, and {shown(name)} is none")


def _check_optimizers(optimizers: Any) -> None:
    if not isinstance(optimizers, tuple | list) or len(optimizers) != 2:
        raise ConfigError(f"optimizers must be (optimizer, scheduler), either of them None, not {shown(optimizers)}")
    optimizer, scheduler = optimizers
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise ConfigError(f"optimizers: the first is a torch.optim.Optimizer or None, not {shown(optimizer)}")
    if scheduler is not None and not (hasattr(scheduler, "step") and hasattr(scheduler, "get_last_lr")):
        raise ConfigError(f"optimizers: the second is a learning rate scheduler or None, not {shown(scheduler)}")
    if scheduler is not None and optimizer is None:
        raise ConfigError("optimizers: a scheduler belongs to an optimiser: give both, or lr_scheduler_type")


def peft_config(value: Any, scalar_head: bool = False) -> Any:
    """peft_config as PEFT's object: a mapping, as in YAML and on the command line, holds LoraConfig's arguments, or
    those of another kind that `peft_type` names. ConfigError for the task of another head than the run's."""
    task, other = ("SEQ_CLS", "CAUSAL_LM") if scalar_head else ("CAUSAL_LM", "SEQ_CLS")
    if not isinstance(value, Mapping):
        given = getattr(value, "task_type", None)
        if getattr(given, "value", given) == other:
            raise ConfigError(f"peft_config: task_type must be {task} with this loss_type, not {shown(other)}")
        return value
    try:
        import peft
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError:
        raise ConfigError("peft_config needs peft: pip install 'fastpo[peft]'") from None
    check_content("peft_config", dict(value))
    arguments = {"task_type": task, **value}
    kinds = {str(getattr(k, "value", k)): kind for k, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name = str(getattr(arguments.get("peft_type"), "value", arguments.pop("peft_type", None) or "LORA"))
    if name.upper() not in kinds:
        raise ConfigError(f"peft_config: unknown peft_type {shown(name)}{did_you_mean(name.upper(), kinds)}")
    if arguments["task_type"] not in (task, peft.TaskType[task]):
        named = f"{shown(arguments['task_type'])} (lora_task_type on the command line)"
        raise ConfigError(f"peft_config: task_type must be {task}, not {named}")
    return construct("peft_config", kinds[name.upper()], arguments)


def quantization_config(value: Any) -> Any:
    """quantization_config as transformers' object: a mapping holds BitsAndBytesConfig's arguments."""
    if value is None or not isinstance(value, Mapping):
        if isinstance(value, str | bytes | int | float | Sequence):
            raise ConfigError(f"quantization_config must be a BitsAndBytesConfig or its arguments, not {shown(value)}")
        return value
    try:
        import bitsandbytes  # noqa: F401  # its absence is said here, before the model loads
    except ImportError:
        raise ConfigError("quantization_config needs bitsandbytes: pip install 'fastpo[quant]'") from None
    from transformers import BitsAndBytesConfig

    check_content("quantization_config", dict(value))
    if not (value.get("load_in_4bit") or value.get("load_in_8bit")):
        raise ConfigError("quantization_config says neither load_in_4bit nor load_in_8bit: set one of them to true")
    return construct("quantization_config", BitsAndBytesConfig, dict(value))


def construct(argument: str, kind: Any, arguments: dict[str, Any]) -> Any:
    """`kind(**arguments)`; an argument that it does not have is answered with the nearest."""
    known = [n for n, p in inspect.signature(kind).parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    for name in arguments:
        if name not in known:
            raise ConfigError(f"{argument}: {kind.__name__} has no {shown(name)}{did_you_mean(name, known)}")
    try:
        return kind(**arguments)
    except Exception as error:
        raise ConfigError(f"{argument}: {kind.__name__}: {error}") from error


# ---- what a run is made from


@dataclass(frozen=True)
class Origin:
    """The model and the data of a run as they were passed, and their names and paths for its files."""

    model: Any
    model_name: str  # or that in the config of a model in memory; empty where there is none
    by_name: bool
    ref_model: Any
    prev_model: Any
    dataset_name: str | None
    paths: dict[str, Any]  # by argument, of what was given by name or path

    @classmethod
    def of(
        cls, model: Any, train_dataset: Any, eval_dataset: Any, ref_model: Any, prev_model: Any, world: World
    ) -> "Origin":
        """ConfigError or DataError for a path that is not there."""
        name = model_name("model", model)
        if isinstance(model, nn.Module) and ref_model is model:
            raise ConfigError("ref_model is the model that is trained: leave it out for its weights at the start")
        if ref_model is not None:
            ref_model = model_name("ref_model", ref_model) or ref_model
        if prev_model is not None:
            prev_model = model_name("prev_model", prev_model) or prev_model
        of_arguments = {"model": name, "train_dataset": train_dataset, "eval_dataset": eval_dataset,
                        "ref_model": ref_model, "prev_model": prev_model}  # fmt: skip
        paths: dict[str, Any] = {k: os.fspath(v) for k, v in of_arguments.items() if isinstance(v, str | os.PathLike)}
        evaluated = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
        named = [path for d in (train_dataset, *evaluated.values()) for path in mixing.paths_of(d)]
        world.first(lambda: [sources.check_path(dataset) for dataset in named])  # before the hub is asked for a model
        paths |= mixing.described(train_dataset)
        if isinstance(eval_dataset, Mapping) and all(isinstance(v, str | os.PathLike) for v in eval_dataset.values()):
            paths["eval_dataset"] = {name: os.fspath(v) for name, v in eval_dataset.items()}
        return cls(
            model, name or getattr(getattr(model, "config", None), "_name_or_path", "") or "", name is not None,
            ref_model, prev_model, train_dataset if isinstance(train_dataset, str) else None, paths,
        )  # fmt: skip
