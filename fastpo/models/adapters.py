"""Adapters on a model (PEFT), quantised bases (bitsandbytes) and merged copies.

A new adapter that starts as a no-op has the bare base as its reference: switch it off. One that was trained before is
its own reference, as it stands at the call. Both are facts of the adapter, so they are decided here (`starts_at_base`,
`rewrites_base`).
"""

import copy
import logging
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from fastpo.errors import ConfigError, UnsupportedModelError, shown
from fastpo.models.carried import carry_over
from fastpo.models.trunk import towers

log = logging.getLogger("fastpo")

# LoRA initialisations that take part of the base's weights away, so that base and adapter together start as the base.
# The first two are computed from the weights alone and come out the same when the adapter is loaded again; the others
# draw random numbers or data (measured on PEFT 0.21: a reloaded pissa_niter_4 adapter moves log-probabilities by 2.2).
_REWRITING = ("pissa", "olora")
_NOT_REPRODUCIBLE = ("pissa_niter", "corda", "loftq", "lora_ga")
# Initialisations after which the adapter adds nothing yet.
_LORA_NO_OP = ("gaussian", "eva", "orthogonal", "mica")
# PEFT types that start as a no-op unless an `init_...` field says False (PEFT 0.21: to 2e-6 of the log-probabilities).
_NO_OP_TYPES = {"BOFT", "C3A", "DELORA", "GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "OFT",
                "RANDLORA", "VERA"}  # fmt: skip
# PEFT types that need more of a trainer than gradients, by what they need.
_REFUSED_TYPES = {
    "ADALORA": "its ranks change by a call after every step and an extra loss",
    "ADAPTION_PROMPT": "it adds tokens inside the attention, which do not pack",
    "POLY": "it needs the task of every row",
    "SHADOW": "it runs a second backbone beside the layers",
    "XLORA": "it runs the model twice and mixes adapters by the result",
}


# ---- a new adapter


def with_adapter(model: nn.Module, peft_config: Any) -> nn.Module:
    """A new adapter on `model`, trainable, in fp32 whatever the base's dtype; the base is frozen.

    A quantised base is left as it was loaded: nothing of it is cast up, so what was saved by quantising stays saved.
    """
    peft = _peft("peft_config")
    if not isinstance(peft_config, peft.PeftConfig):
        raise ConfigError(f"peft_config must be a PeftConfig such as peft.LoraConfig(r=16), not {shown(peft_config)}")
    for name, value in vars(peft_config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"peft_config: {name} must be finite, not {value}")
    check_adapter_type(peft_config)
    init = str(getattr(peft_config, "init_lora_weights", "")).lower()
    if init.startswith(_NOT_REPRODUCIBLE):
        raise ConfigError(
            f"init_lora_weights={init!r} changes the base's weights in a way that loading the saved adapter cannot "
            "repeat, so the result would be lost; use 'pissa', 'olora', 'orthogonal' or True"
        )
    if is_quantized(model) and rewrites_base(peft_config):
        raise ConfigError(f"init_lora_weights={init!r} rewrites the base's weights, which a quantised base cannot take")
    try:
        with warnings.catch_warnings():
            # PEFT sets the config's base name itself, and says so; tied heads are untied where the model is merged.
            warnings.filterwarnings(
                "ignore", message=".*(was renamed from|ensure_weight_tying|is_gradient_checkpointing).*"
            )
            return peft.get_peft_model(model, _spare_towers(model, peft_config))
    except Exception as error:  # PEFT checks little of what it is given, and fails in many ways
        raise ConfigError(f"peft_config does not fit {type(model).__name__}: {first_line(error)}") from error


def _spare_towers(model: nn.Module, peft_config: Any) -> Any:
    """The same configuration, which leaves out what text rows do not reach: names such as q_proj lie in encoders of
    images too."""
    outside = "|".join(rf"{re.escape(name)}(\..*)?" for name in towers(model))
    if not outside or not hasattr(peft_config, "exclude_modules"):
        return peft_config
    spared, own = copy.copy(peft_config), peft_config.exclude_modules
    if own and not isinstance(own, str):  # names, of which PEFT compares the ends
        own = rf"(.*\.)?({'|'.join(map(re.escape, own))})"
    spared.exclude_modules = f"({own})|({outside})" if own else f"({outside})"
    return spared


def check_adapter_type(peft_config: Any) -> None:
    """Raise UnsupportedModelError for adapters that a plain loop over packed rows would train wrongly."""
    kind = _kind(peft_config)
    if getattr(peft_config, "is_prompt_learning", False):
        raise UnsupportedModelError(f"{kind}: prompt tuning adds virtual tokens, which do not pack; use LoRA")
    if kind in _REFUSED_TYPES:
        raise UnsupportedModelError(f"{kind} adapters are not supported: {_REFUSED_TYPES[kind]}; use LoRA")
    if getattr(peft_config, "alora_invocation_tokens", None) is not None:
        raise UnsupportedModelError(
            "alora_invocation_tokens switch the adapter on at a place of each row, which packing hides; leave it out"
        )


def rewrites_base(peft_config: Any) -> bool:
    """Whether making this adapter takes part of the base's weights away (PiSSA, OLoRA).

    Then the base with the adapter switched off is not the model that was passed in: the reference is the policy at the
    start, adapter on.
    """
    return str(getattr(peft_config, "init_lora_weights", "")).lower() in _REWRITING


def starts_at_base(peft_config: Any) -> bool:
    """Whether a new adapter of this kind leaves the model's function as it was, until it is trained."""
    if peft_config is None:
        return True
    kind = _kind(peft_config)
    if kind == "LORA":
        init = peft_config.init_lora_weights
        return init is True or str(init).lower() in (*_LORA_NO_OP, *_REWRITING)
    inits = [value for name, value in vars(peft_config).items() if name.startswith("init_")]
    return kind in _NO_OP_TYPES and not any(value is False for value in inits)


def is_quantized(model: nn.Module) -> bool:
    """Whether the base was loaded quantised, through a PEFT wrapper too."""
    return bool(getattr(model, "is_quantized", False)) or getattr(model, "hf_quantizer", None) is not None


def check_quantized(model: nn.Module) -> None:
    """A quantised base must have an adapter, and a quantiser that lets gradients through; else ConfigError."""
    if not is_quantized(model):
        return
    if not hasattr(model, "peft_config"):
        raise ConfigError("a quantised model cannot be trained itself: pass peft_config for an adapter on top")
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        method = getattr(quantizer.quantization_config, "quant_method", "this quantisation")
        raise ConfigError(
            f"a base quantised by {getattr(method, 'value', method)} passes no gradients on to an adapter; "
            "use bitsandbytes (load_in_4bit or load_in_8bit)"
        )


# ---- a trained adapter


def saved_adapter(name_or_path: str | os.PathLike[str], revision: str | None = None) -> Any | None:
    """The PeftConfig of a trained adapter by folder or hub name; None where that is a model of its own."""
    where = os.fspath(name_or_path)
    try:
        if find_adapter_config_file(where, revision=revision) is None:
            return None
    except (OSError, ValueError):  # no such repository: from_pretrained says it better
        return None
    peft = _peft(f"the adapter {where!r}")
    try:
        config = peft.PeftConfig.from_pretrained(where, revision=revision)
    except (ValueError, KeyError, TypeError) as error:  # damaged, or of a kind that this PEFT does not know
        raise ConfigError(f"cannot read the adapter_config.json of {where!r}: {first_line(error)}") from error
    check_adapter_type(config)
    if not config.base_model_name_or_path:
        raise ConfigError(
            f"the adapter {where!r} does not name its base model; load both and pass PeftModel.from_pretrained(base, "
            f"{where!r}, is_trainable=True)"
        )
    return config


def continue_adapter(base: nn.Module, name_or_path: str | os.PathLike[str], revision: str | None = None) -> nn.Module:
    """A trained adapter on its base, trainable. ConfigError in one line where the two do not fit."""
    peft = _peft("a trained adapter")
    where = os.fspath(name_or_path)
    misfit = f"the adapter {where!r} was trained for another base than {_name(base)!r}"
    missing: list[str] = []
    _resize_to(base, where)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = peft.PeftModel.from_pretrained(base, where, is_trainable=True, revision=revision)
        except (RuntimeError, ValueError, TypeError) as error:  # shapes differ; its target modules are not there
            lines = [line.strip() for line in str(error).splitlines()]
            reason = next((line for line in lines if line.startswith("size mismatch")), lines[0] if lines else "")
            raise ConfigError(f"{misfit}: {reason}") from error
        except OSError as error:
            raise ConfigError(f"cannot load the adapter {where!r}: {first_line(error)}") from error
    for warning in caught:
        if "missing adapter keys" in str(warning.message):  # PEFT would leave these at their random start
            missing.append(str(warning.message).partition("[")[2].partition(",")[0])
    if missing:
        raise ConfigError(f"{misfit}: it has no weights for {missing[0]}")
    unused = _unused_weights(model, where)
    if unused:
        raise ConfigError(f"{misfit}: the base has no place for its {unused[0]}")
    return model


def _resize_to(base: Any, folder: str) -> None:
    """Give the base as many embeddings as a saved adapter was trained with, where it brings its own.

    PEFT saves the embeddings and the head of a model that was resized for new tokens beside the adapter, whole; they
    load into a base of the same size only. The new rows are the adapter's.
    """
    shapes = {name: shape[0] for name, shape in _saved_shapes(folder).items() if len(shape) == 2}
    for name, module in base.named_modules():
        if module is base.get_input_embeddings() and isinstance(module, nn.Embedding):
            rows = shapes.get(f"base_model.model.{name}.weight")
            if rows is not None and rows != module.num_embeddings:
                base.resize_token_embeddings(rows, mean_resizing=False)
            return


def _saved_shapes(folder: str) -> dict[str, list[int]]:
    """Names and shapes of a saved adapter's tensors; none where they are not in a local safetensors file."""
    from safetensors import SafetensorError, safe_open

    file = Path(folder) / "adapter_model.safetensors"
    try:
        with safe_open(file, framework="pt") as f:
            return {name: f.get_slice(name).get_shape() for name in f.keys()}  # noqa: SIM118 -- no mapping
    except (OSError, SafetensorError):  # of the hub, or PEFT says what is wrong with it
        return {}


def _unused_weights(model: nn.Module, folder: str) -> list[str]:
    """Tensors of a saved adapter that found no module: PEFT drops them without a word."""
    saved = set(_saved_shapes(folder))
    if not saved:
        return []
    from peft import get_peft_model_state_dict

    # With embeddings that are saved whole, PEFT takes them for part of the adapter or not by what the hub says.
    return sorted(saved - set(get_peft_model_state_dict(model)) - {name for name, _ in model.named_parameters()})


def check_adapter_base(model: nn.Module) -> None:
    """Warn where an adapter names another base than the one that it lies on. Folders that were moved are the same."""
    for config in getattr(model, "peft_config", {}).values():
        check_adapter_type(config)
        told, given = config.base_model_name_or_path or "", _name(model)
        if told and given and Path(told).name != Path(given).name:
            log.warning("the adapter was trained on %r, but lies on %r: is that the same base?", told, given)


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model without its adapters, under the names of the model without adapters.

    With them the scales of LLM.int8, as `<module>.SCB`: bitsandbytes keeps them in attributes, elsewhere after the
    first forward than before.
    """
    return dict(_base_tensors(model.get_base_model() if hasattr(model, "get_base_model") else model, ""))  # type: ignore[operator]


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """`base_tensors` and those of the adapters, under their own names."""
    tensors = base_tensors(model)
    seen = {id(tensor) for tensor in tensors.values()}
    others = [*model.named_parameters(), *model.named_buffers()]
    return tensors | {name: t for name, t in others if id(t) not in seen and t.dtype != torch.int8}


def _base_tensors(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    # Told apart by where the tensors lie: their names differ with every kind of adapter (lora_, vera_A, hada_, ...).
    while (inner := wrapped(module)) is not None:
        module = inner
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is None:
            continue
        scales = getattr(tensor, "SCB", None)
        if scales is None and tensor.dtype == torch.int8:
            scales = getattr(getattr(module, "state", None), "SCB", None)
        if scales is not None:
            yield f"{prefix}SCB", scales
            tensor = tensor.detach().as_subclass(Tensor)  # without the attribute
        yield prefix + name, tensor
    for name, child in module._modules.items():
        if child is not None:
            yield from _base_tensors(child, f"{prefix}{name}.")


def wrapped(module: Any) -> Any | None:
    """The module that PEFT has put an adapter around, or None."""
    if hasattr(module, "token_adapter"):
        return module.token_adapter
    if hasattr(module, "modules_to_save") and isinstance(getattr(module, "original_module", None), nn.Module):
        return module.original_module
    return getattr(module, "base_layer", None) if hasattr(module, "adapter_layer_names") else None


# ---- merged copies


def save_merged(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | os.PathLike[str],
    max_shard_size: str = "5GB",
    adapter_folder: str | os.PathLike[str] | None = None,
) -> None:
    """Write the model with its adapter merged, as `from_pretrained` reads it; the model in memory is left untouched.

    The copy is made and merged in host memory, in the base's dtype. A quantised base is never merged into: the adapter
    goes onto the unquantised base, loaded again by its name. So it is where `adapter_folder` is given, the adapter
    saved before: a sharded model has no whole weights to copy.
    """
    check_mergeable(model, sharded=adapter_folder is not None)
    if adapter_folder is not None or is_quantized(model):
        merged = _merged_from_disk(model, adapter_folder)
    else:
        merged = _merged_copy(model)
    merged.save_pretrained(folder, max_shard_size=max_shard_size)
    carry_over(model, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def check_mergeable(model: Any, sharded: bool = False) -> None:
    """Raise ConfigError for what `save_merged` could not do after training; reads no weights."""
    if not hasattr(model, "get_base_model"):
        raise ConfigError("save_merged needs an adapter (peft_config): this model has none to merge")
    if not sharded and not is_quantized(model):
        return
    name, kind = _name(model), "quantised" if is_quantized(model) else "sharded"
    if not name:
        raise ConfigError(f"save_merged: the {kind} base has no name or path to load its own weights from")
    try:
        config = type(model.get_base_model().config).from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"save_merged: cannot load the base {name!r} again: {first_line(error)}") from error
    if getattr(config, "quantization_config", None):
        raise ConfigError(
            f"save_merged: {name!r} holds quantised weights only; merge the saved adapter into the unquantised original"
        )


def _merged_copy(model: Any) -> PreTrainedModel:
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:  # each once, so that tied weights stay tied
        twin = tensor.detach().to("cpu", copy=True)
        memo[id(tensor)] = nn.Parameter(twin, requires_grad=False) if isinstance(tensor, nn.Parameter) else twin
    return _merge(copy.deepcopy(model, memo))


def _merged_from_disk(model: Any, adapter_folder: str | os.PathLike[str] | None) -> PreTrainedModel:
    name = _name(model)
    # The model's own class knows a checkpoint with code of its own too; under FSDP2 it is the second of the bases.
    own_class: Any = next(c for c in type(model.get_base_model()).__mro__ if not issubclass(c, FSDPModule))
    inner = model.get_base_model()
    labels = {"num_labels": inner.config.num_labels} if _is_classifier(inner) else {}  # of a language model's too
    try:
        base = own_class.from_pretrained(name, dtype="auto", **labels)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"save_merged: cannot load the base {name!r} again: {first_line(error)}") from error
    _same_base(model, base, name)
    with tempfile.TemporaryDirectory() as temporary:
        if adapter_folder is None:
            model.save_pretrained(temporary)
            adapter_folder = temporary
        return _merge(continue_adapter(base, adapter_folder))


def _same_base(model: Any, base: PreTrainedModel, name: str) -> None:
    """What quantising leaves alone (norms, embeddings) must be equal, or the base in memory was not the one on disk."""
    mine = base_tensors(model)
    for key, tensor in base.named_parameters():
        other = mine.get(key)
        if key.startswith("score.") and _is_classifier(base):  # the adapter's own, on a language model at random
            continue
        if other is None or other.requires_grad or hasattr(other, "device_mesh") or other.shape != tensor.shape:
            continue
        if other.dtype.is_floating_point and not torch.equal(other.detach().cpu(), tensor.detach().to(other.dtype)):
            raise ConfigError(f"save_merged: {key} of {name!r} on disk is not that of the base in memory")


def _is_classifier(model: Any) -> bool:
    return getattr(model, "score", None) is not None and model.get_output_embeddings() is None


def _merge(model: Any) -> PreTrainedModel:
    causal_lm = model.get_base_model()
    _untie(causal_lm)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie.*", category=UserWarning)
        try:
            merged = model.merge_and_unload()
        except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
            kinds = ", ".join(_kind(config) for config in model.peft_config.values())
            raise ConfigError(f"save_merged: {kinds} cannot be merged here: {first_line(error)}") from error
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        merged.config.get_text_config(decoder=True).tie_word_embeddings = False
        merged.config.tie_word_embeddings = False
    return merged


def _untie(causal_lm: PreTrainedModel) -> None:
    """An adapter on one of two tied matrices must not reach the other: give the head a weight of its own."""
    head, embedding = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    if wrapped(head) is None and wrapped(embedding) is None:
        return
    inner, source = head, embedding
    while (deeper := wrapped(inner)) is not None:
        inner = deeper
    while (deeper := wrapped(source)) is not None:
        source = deeper
    if inner is not None and inner.weight is source.weight:
        inner.weight = nn.Parameter(inner.weight.detach().clone(), requires_grad=False)


# ---- what bitsandbytes does beside


def settle_quantized(model: nn.Module, just_loaded: bool = False) -> None:
    """Make a quantised model's layers compute the same in train and eval mode, and talk less. Others are left alone.

    On CPUs with AVX512-BF16, Linear4bit lays its weights out anew in its first forward in eval mode, with scales
    rounded to bf16, for a kernel without a backward (bitsandbytes 0.50): after one evaluation, no gradient would pass
    a layer. And LLM.int8 says for every matrix of every forward that it casts to fp16.
    """
    if just_loaded and is_quantized(model):
        # On a CPU what was not quantised lies in the mapped checkpoint, which it would keep in memory as a whole.
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.device.type == "cpu" and tensor.is_floating_point():
                tensor.data = tensor.data.clone()
    modules: list[Any] = list(model.modules())
    for module in modules:
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                module.state_dict()  # puts the layout back in place
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    if is_quantized(model) and not any(isinstance(f, _Once) for f in logger.filters):
        logger.addFilter(_Once())


class _Once(logging.Filter):
    """Lets each message through once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        new = record.msg not in self.seen
        self.seen.add(record.msg)
        return new


# ---- small things


def _peft(what: str) -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError(f"{what} needs the peft package: pip install 'fastpo[peft]'") from None
    return peft


def _kind(peft_config: Any) -> str:
    kind = getattr(peft_config, "peft_type", "")
    return str(getattr(kind, "value", kind)).upper()


def _name(model: Any) -> str:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(getattr(base, "config", None), "_name_or_path", "") or ""


def first_line(error: BaseException) -> str:
    """What fits into an error of one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
