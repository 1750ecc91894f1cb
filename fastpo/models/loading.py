"""A model by name or path: as the class that its config names, whole, on its device; and its tokenizer.

What a checkpoint holds must come back in the folder that is saved. So weights that the class would make up, and tensors
that it would leave out, end the run before it begins; what the class itself declares that it never reads (heads that
predict further tokens) is carried over as it is (models/carried.py).
"""

import copy
import difflib
import logging
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation import GenerationMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from fastpo.errors import ConfigError, DeviceError
from fastpo.models import adapters
from fastpo.models.adapters import first_line
from fastpo.models.carried import COMPUTED, WHERE, left_out

log = logging.getLogger("fastpo")


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: torch.device | str | None = None,
    use_cpu: bool = False,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    quantization_config: object | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    scalar_head: bool = False,
) -> PreTrainedModel:
    """A causal language model by name or path, in the checkpoint's own dtype unless `dtype` says otherwise; with
    `scalar_head` a reward model: a sequence classifier of one label, whose head is new where the checkpoint is a
    language model's.

    Its class is the one that the checkpoint's config names. A trained adapter's folder or hub name gives its base with
    that adapter, trainable; `revision` is the adapter's. `attn_implementation` is what the model runs outside fastpo
    (generation, the guard); inside, attention is packed. ConfigError where the checkpoint and its class do not fit.
    """
    kwargs = dict(model_init_kwargs or {})
    kwargs.update(dtype=loading_dtype(dtype, kwargs), trust_remote_code=trust_remote_code)
    given = dict(revision=revision, attn_implementation=attn_implementation, quantization_config=quantization_config)
    kwargs.update({key: value for key, value in given.items() if value is not None})
    where, of = os.fspath(name_or_path), ""
    if adapter := adapters.saved_adapter(where, revision):
        where, of = adapter.base_model_name_or_path, f", the base of the adapter {where!r}"
        kwargs["revision"] = adapter.revision
    target = resolve_device(device, use_cpu=use_cpu)
    if quantization_config is not None and "device_map" not in kwargs:
        kwargs["device_map"] = {"": target}
    new_head = False
    try:
        if scalar_head and kwargs.pop("num_labels", 1) != 1:
            raise ConfigError("model_init_kwargs: num_labels must be 1, for a reward is one number")
        config = _config_of(where, kwargs)
        if scalar_head:
            new_head = not is_classifier(config)
            kind, kwargs["config"] = AutoModelForSequenceClassification, with_one_label(config, where)
        else:
            kind = model_class(config, where)
        told = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below, by name
        model, info = kind.from_pretrained(where, **{**kwargs, **told})
    except ConfigError:
        raise
    except ImportError as error:
        hint = "pip install 'fastpo[quant]'" if quantization_config is not None else first_line(error)
        raise ConfigError(f"loading {where!r} needs a package that is not installed: {hint}") from error
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"cannot load the model {where!r}{of}: {first_line(error)}") from error
    _check_whole(model, _with_new_head(model, info) if new_head else info, where, kwargs)
    adapters.settle_quantized(model, just_loaded=True)
    model = model if "device_map" in kwargs else model.to(target)
    return model if adapter is None else adapters.continue_adapter(model, name_or_path, revision)


def _config_of(where: str, kwargs: Mapping[str, Any]) -> Any:
    """The checkpoint's config, or the one that is given in its place."""
    if isinstance(kwargs.get("config"), transformers.PreTrainedConfig):
        return kwargs["config"]
    of_files = {key: kwargs[key] for key in (*WHERE, "trust_remote_code") if kwargs.get(key) is not None}
    return AutoConfig.from_pretrained(kwargs.get("config") or where, **of_files)


# ---- which class


def model_class(config: Any, where: str) -> Any:
    """The class that a config names, with `from_pretrained` and a language model's head; an auto class where it names
    none, and for code that comes with the checkpoint. ConfigError in one line for what is no such class."""
    name = next(iter(getattr(config, "architectures", None) or ()), None)
    of_type = _classes_of(config)
    auto_map = getattr(config, "auto_map", None) or {}
    if type(config).__module__.startswith("transformers_modules") or (
        auto_map and not hasattr(transformers, str(name))
    ):
        image = "AutoModelForImageTextToText" in auto_map and "AutoModelForCausalLM" not in auto_map
        return AutoModelForImageTextToText if image else AutoModelForCausalLM
    if name is None:
        return AutoModelForCausalLM
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        near = difflib.get_close_matches(name, of_type, 1, 0.0)
        hint = f"set architectures to [{near[0]!r}] in its config.json if that is what it is" if near else "upgrade it"
        raise ConfigError(
            f"the config of {where!r} names the class {name}, which transformers {transformers.__version__} does not "
            f"have: {hint}"
        )
    if not issubclass(kind, GenerationMixin):
        hint = f"; a language model of this type is a {of_type[0]}" if of_type else ""
        raise ConfigError(f"the config of {where!r} names the class {name}, which has no language model's head{hint}")
    expected: Any = getattr(kind, "config_class", None)
    if not isinstance(expected, type) or isinstance(config, expected):
        return kind
    if name in of_type:  # a type without a class of its own, such as ShieldGemma 2
        return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    if not isinstance(config.get_text_config(decoder=True), expected):
        raise ConfigError(
            f"the config of {where!r} is a {config.model_type!r}'s, and names the class {name}, which is a "
            f"{getattr(expected, 'model_type', '')!r}'s: one of the two is wrong"
        )
    return kind


def _classes_of(config: Any) -> list[str]:
    """Names of the language models of a config's type."""
    mappings = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    found = [kind for mapping in mappings if (kind := mapping.get(type(config), None)) is not None]
    return [k.__name__ for kind in found for k in (kind if isinstance(kind, tuple) else (kind,))]


def empty_model(
    config: Any, dtype: torch.dtype, where: str, trust_remote_code: bool = False, scalar_head: bool = False
) -> PreTrainedModel:
    """A model of a config alone, of the class that `load_model` would give it, with the weights that it starts with."""
    if scalar_head:
        config = with_one_label(config, where)
        return AutoModelForSequenceClassification.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    kind: Any = model_class(config, where)
    if issubclass(kind, PreTrainedModel):
        return kind._from_config(config, dtype=dtype)
    return kind.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


# ---- a scalar head in the place of the language model's

_LM_HEADS = re.compile(r"(^|\.)(lm_head|embed_out)\.")
_SCALAR_HEAD = re.compile(r"(^|\.)score\.")


def with_one_label(config: Any, where: str) -> Any:
    """A copy of a model's config for a reward model; ConfigError where it is a classifier's of more labels than one."""
    config = copy.deepcopy(config)
    if is_classifier(config) and config.num_labels != 1:
        raise ConfigError(
            f"{where!r} is a {config.architectures[0]} of {config.num_labels} labels, and a reward is one number: give "
            "a language model, or a classifier trained with num_labels=1"
        )
    if config.num_labels != 1:
        config.num_labels = 1
    return config


def is_classifier(config: Any) -> bool:
    """Whether the config is that of a sequence classifier, which brings a head of its own."""
    return any(name.endswith("ForSequenceClassification") for name in getattr(config, "architectures", None) or ())


def _with_new_head(model: Any, info: Mapping[str, Any]) -> dict[str, Any]:
    """What loading said of a language model's checkpoint, without the head that it is expected to lack, which is drawn
    at random, and the one that it has instead."""
    new = [key for key in info["missing_keys"] if _SCALAR_HEAD.search(key)]
    model.fastpo_new_head = bool(new)
    log.info("%s: a new scalar head (%s), drawn at random", type(model).__name__, ", ".join(sorted(new)))
    return {
        **info,
        "missing_keys": [key for key in info["missing_keys"] if key not in new],
        "unexpected_keys": [key for key in info["unexpected_keys"] if not _LM_HEADS.search(key)],
    }


# ---- whether all of it was loaded


def _check_whole(model: Any, info: Mapping[str, Any], where: str, kwargs: Mapping[str, Any]) -> None:
    """Raise ConfigError for weights that would start at random, and for tensors that would be gone once it is saved."""
    name = type(model).__name__
    for key, held, wanted in sorted(info["mismatched_keys"]) if not kwargs.get("ignore_mismatched_sizes") else ():
        raise ConfigError(
            f"{where!r} holds {key} as {tuple(held)}, which {name}, the class of its config, has as {tuple(wanted)}: "
            "its config is not that of its weights"
        )
    parameters = {key for key, _ in model.named_parameters()}
    missing = sorted(parameters & set(info["missing_keys"]))
    unexpected = sorted(key for key in info["unexpected_keys"] if not COMPUTED.search(key))
    if missing:
        also = f", and has {_listed(unexpected)} in their place" if unexpected else ""
        raise ConfigError(
            f"{where!r} holds no weights for {_listed(missing)} of {name}, the class of its config, which would start "
            f"at random{also}: is it another class's checkpoint?"
        )
    if unexpected:
        raise ConfigError(
            f"{where!r} holds {_listed(unexpected)}, for which {name}, the class of its config, has no place: they "
            "would be missing from the model that is saved"
        )
    model.fastpo_source = (where, {key: kwargs[key] for key in WHERE if kwargs.get(key) is not None})
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
    if patterns and not adapters.is_quantized(model) and not kwargs.get("gguf_file"):
        model.fastpo_left_out = left_out(model, where, list(patterns), kwargs)


def _listed(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ---- tokenizer, device, dtype


def load_tokenizer(
    name_or_path: str | os.PathLike[str], *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer that lies with the model; of an adapter saved without one, its base's."""
    where = os.fspath(name_or_path)
    if not where:
        raise ConfigError("the model does not say where its tokenizer is: pass processing_class=")
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        if adapter := adapters.saved_adapter(where, revision):
            return load_tokenizer(adapter.base_model_name_or_path, trust_remote_code=trust_remote_code)
        here = "" if os.path.isdir(where) else ", which is no folder here"
        raise ConfigError(f"cannot load a tokenizer from {where!r}{here}: {first_line(error)}") from error


def resolve_device(device: torch.device | str | None = None, *, use_cpu: bool = False) -> torch.device:
    """The device asked for, or the accelerator that is there, or the CPU."""
    if device is None:
        if use_cpu or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())
    try:
        device = torch.device(device)
    except RuntimeError:
        raise DeviceError(f"there is no device {device!r}; use cuda, cuda:0 or cpu") from None
    if use_cpu and device.type != "cpu":
        raise DeviceError(f"use_cpu is set, and device {device} too; leave one out")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device {device} was asked for, but PyTorch sees no GPU; use_cpu=True trains on the CPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device {device} was asked for, but there are {torch.cuda.device_count()} GPUs")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def loading_dtype(dtype: str | torch.dtype | None, model_init_kwargs: dict[str, Any]) -> str | torch.dtype:
    """The dtype to load in, of the option and of model_init_kwargs (which loses it), or 'auto'; ConfigError where they
    contradict each other."""
    named = {"dtype": dtype}
    for key in ("dtype", "torch_dtype"):
        if key in model_init_kwargs:
            named[f'model_init_kwargs["{key}"]'] = model_init_kwargs.pop(key)
    given = {name: parse_dtype(value) for name, value in named.items() if value is not None}
    if len(set(given.values())) > 1:
        raise ConfigError("the model's dtype is named twice: " + " and ".join(f"{n}={v}" for n, v in given.items()))
    return next(iter(given.values()), "auto")


def parse_dtype(dtype: Any) -> str | torch.dtype:
    """A floating-point dtype by its name in PyTorch or its short form, or 'auto'."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
    name = dtype if isinstance(dtype, str) else ""
    parsed = getattr(torch, short.get(name, name.removeprefix("torch.")), None)
    if not isinstance(parsed, torch.dtype) or not parsed.is_floating_point:
        raise ConfigError(f"dtype={dtype!r}: expected 'auto', 'bfloat16', 'float16' or 'float32'")
    return parsed
