"""What decides a model's numbers beside its weights and its configuration, as one digest: part of the reference cache's
key, so that another function of the same weights does not find the entries.

That is, of every module: its class and that class's code, its attributes (an epsilon, a scaling, a callable put in the
place of another, an adapter that is switched off, scaled or merged), its hooks; and the versions of the libraries whose
code it runs. It is the same in another process and on another machine: no addresses, no order of sets. What it cannot
see (a function two calls away that was replaced, an object's inner state) is left to the comparison with the live model
on a few rows (reference/cache.py).
"""

import functools
import hashlib
import platform
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import torch
import transformers
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig

from fastpo.models import adapters, attention
from fastpo.reference.cache import described_config, tensor_digest

# Of a module: PyTorch's own bookkeeping, modes, where it was loaded from and how it is split, generation, training.
_WITHOUT_EFFECT = {
    *(set(vars(nn.Module())) - {"_forward_hooks", "_forward_pre_hooks"}),
    "_ep_plan", "_fsdp_plan", "_gradient_checkpointing_func", "_hf_peft_config_loaded", "_is_hf_initialized",
    "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_keys_to_ignore_on_load_missing",
    "_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_save", "_no_split_modules", "_pp_plan",
    "_require_grads_hook", "_require_grads_hooks", "_skip_keys_device_placement", "_tp_plan", "_use_kernels",
    "_weight_conversions", "all_tied_weights_keys", "fastpo_left_out", "fastpo_source", "generation_config",
    "gradient_checkpointing", "hf_device_map", "hf_quantizer", "kernel_config", "loss_type", "max_seq_len_cached",
    "model_tags", "name_or_path", "peft_config", "warnings_issued",
}  # fmt: skip
_VERSIONED = ("torch.", "transformers.", "peft.")  # packages whose code their version stands for
_DEPTH, _LENGTH = 5, 1000  # how far into an attribute, and how many items of a container


def function_digest(model: nn.Module, *, without_adapter: bool = False) -> str:
    """Hex digest; `without_adapter` is the base under an adapter that is switched off, whatever the adapter."""
    digest = hashlib.blake2b(digest_size=16)
    versions = [platform.python_version_tuple()[:2], torch.__version__, transformers.__version__]
    if not without_adapter and hasattr(model, "peft_config"):
        import peft

        versions.append(peft.__version__)
    digest.update(repr(versions).encode())
    base: Any = model.get_base_model() if without_adapter and hasattr(model, "get_base_model") else model  # type: ignore[operator]
    classes: set[type] = set()
    for name, module in _modules(base, "", without_adapter):
        own = _own_class(module)
        classes.add(own)
        digest.update(f"{name}|{_name(own)}".encode())
        for key, value in sorted(vars(module).items()):
            if key in _WITHOUT_EFFECT or "dropout" in key or isinstance(module, nn.modules.dropout._DropoutNd):
                continue
            if key in ("_forward_hooks", "_forward_pre_hooks"):
                value = [hook for hook in value.values() if not _is_neutral(hook)]
                if not value:
                    continue
            digest.update(f"{key}={_described(value, _DEPTH)};".encode())
    for cls in sorted(classes, key=_name):
        digest.update(_class_code(cls).encode())
    if attention.runs_unpacked():
        digest.update(str(getattr(getattr(base, "config", None), "_attn_implementation", None)).encode())
    return digest.hexdigest()


def _modules(module: Any, prefix: str, without_adapter: bool) -> Iterator[tuple[str, nn.Module]]:
    while without_adapter and (inner := adapters.wrapped(module)) is not None:
        module = inner
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _modules(child, f"{prefix}{name}.", without_adapter)


def _own_class(module: nn.Module) -> type:
    """The class of a module as it is without FSDP2, which puts one of its own in front."""
    return next(c for c in type(module).__mro__ if not issubclass(c, FSDPModule))


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _module_of(function: Any) -> str:
    return getattr(function, "__module__", None) or type(function).__module__


def _is_neutral(hook: Any) -> bool:
    """Whether a hook changes no number: FSDP2's, and the one that gives a frozen embedding's output a gradient."""
    return _module_of(hook).startswith("torch.distributed") or "enable_input_require_grads" in getattr(
        hook, "__qualname__", ""
    )


def _class_code(cls: type) -> str:
    """The functions of a class and of those that it inherits from; of libraries with a version the forward alone,
    which is what other packages replace."""
    parts = []
    for base in cls.__mro__:
        if base in (object, nn.Module) or issubclass(nn.Module, base):
            continue
        versioned = base.__module__.startswith(_VERSIONED)
        for name, value in sorted(vars(base).items()):
            function = _function(value)
            if function is not None and (name == "forward" or not versioned):
                parts.append(f"{_name(base)}.{name}:{_described(function, 2)}")
    return ";".join(parts)


def _function(value: Any) -> Any:
    """The function behind a method, a static method or a property; None for anything else."""
    if isinstance(value, property):
        value = value.fget
    value = getattr(value, "__func__", value)
    return value if isinstance(value, types.FunctionType) else None


def _described(value: Any, depth: int) -> str:
    """A text that two values share where they compute the same, and two processes where the values are the same."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.Size):
        return repr(value)
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, torch.device):
        return value.type
    if isinstance(value, torch.Tensor):
        return tensor_digest(value).hex()
    if isinstance(value, type):
        return _name(value)
    if isinstance(value, PreTrainedConfig):
        return described_config(value)
    if depth == 0:
        return _name(type(value))
    if isinstance(value, Mapping | list | tuple | set | frozenset) and len(value) > _LENGTH:
        return f"{_name(type(value))}[{len(value)}]"
    if isinstance(value, Mapping):
        return (
            "{"
            + ",".join(sorted(f"{_described(k, depth - 1)}:{_described(v, depth - 1)}" for k, v in value.items()))
            + "}"
        )
    if isinstance(value, list | tuple):
        return "[" + ",".join(_described(v, depth - 1) for v in value) + "]"
    if isinstance(value, set | frozenset):
        return "{" + ",".join(sorted(_described(v, depth - 1) for v in value)) + "}"
    if isinstance(value, functools.partial):
        return f"partial({_described([value.func, value.args, value.keywords], depth - 1)})"
    function = _function(value)
    if function is None:
        return _name(type(value))
    cells = [_cell(cell) for cell in function.__closure__ or ()]
    given = [function.__defaults__, function.__kwdefaults__, cells]
    return f"{_module_of(function)}.{function.__qualname__}({_code(function.__code__)},{_described(given, depth - 1)})"


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _code(code: types.CodeType) -> str:
    """Digest of a function's bytecode, the names and the constants in it."""
    digest = hashlib.blake2b(code.co_code + repr((code.co_names, code.co_varnames)).encode(), digest_size=8)
    for constant in code.co_consts:
        digest.update((_code(constant) if isinstance(constant, types.CodeType) else _described(constant, 3)).encode())
    return digest.hexdigest()
