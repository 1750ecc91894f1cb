"""Liger's Triton kernels for a model's norms, MLPs and rotary embeddings, in place of its own while they are `on`.

The head is fastpo's own op, so that Liger's loss kernels, which replace the model's forward, have no part here. Liger
changes a model and its family's file for good; here the changes are noted, undone, and made again by `switch`.
"""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastpo.errors import ConfigError, did_you_mean

_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
_TRIED = ("rope", "rms_norm", "swiglu")  # what is used without being asked for
_ABSENT = object()


def knows(model: Any) -> bool:
    """Whether liger-kernel is installed and has layers for this family."""
    return importlib.util.find_spec("liger_kernel") is not None and _apply_function(model) is not None


def _apply_function(model: Any) -> Callable[..., None] | None:
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError:
        raise ConfigError("use_liger_kernel needs the liger-kernel package: pip install liger-kernel") from None
    return monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)


class LigerLayers:
    """Of a causal language model; the family's rotary function is replaced for the whole process while `on`.

    `kernels` switches single ones, such as {"rope": False}. Without `all_kernels` only norms (RMSNorm), SwiGLU and
    rotary embeddings are taken. ConfigError where Liger is absent or lacks the family, or a kernel that is named.
    """

    def __init__(self, model: Any, kernels: Mapping[str, bool] | None = None, all_kernels: bool = True):
        apply, family = _apply_function(model), model.config.model_type
        if apply is None:
            raise ConfigError(f"liger-kernel has no layers for the family {family!r}; leave use_liger_kernel out")
        known = set(inspect.signature(apply).parameters) - {"model"}
        for name, value in (kernels or {}).items():
            if name not in known:
                others = did_you_mean(name, known) or f": it has {', '.join(sorted(known))}"
                raise ConfigError(f"liger_kernel_config: {family} has no kernel {name!r}{others}")
            if name in _LOSSES and value:
                raise ConfigError(f"liger_kernel_config: {name} is a loss kernel; fastpo's own head takes its place")
        unasked = {} if all_kernels else {name: name in _TRIED for name in known}
        asked = {**unasked, **(kernels or {}), **{name: False for name in _LOSSES if name in known}}
        modules = list(model.modules())
        files = sorted({type(m).__module__ for m in modules if type(m).__module__ in sys.modules})
        before = [dict(vars(m)) for m in modules], [dict(vars(sys.modules[file])) for file in files]
        try:
            apply(model=model, **asked)
        finally:
            self._modules = [(m, _changes(old, vars(m))) for m, old in zip(modules, before[0], strict=True)]
            # Functions alone: the names of classes are for models that are made later.
            self._files = [(sys.modules[file], {n: c for n, c in _changes(old, vars(sys.modules[file])).items()
                                                if not isinstance(c[0], type)})
                           for file, old in zip(files, before[1], strict=True)]  # fmt: skip
            for file, old in zip(files, before[1], strict=True):
                _restore(vars(sys.modules[file]), _changes(old, vars(sys.modules[file])))
            for m, changes in self._modules:
                _restore(vars(m), changes)
        self._modules = [(m, changes) for m, changes in self._modules if changes]
        self.width = model.config.get_text_config(decoder=True).hidden_size

    def __str__(self) -> str:
        kinds = sorted({type(m).__name__ for m, _ in self._modules})
        functions = sorted({name for _, changes in self._files for name in changes})
        return ", ".join([*kinds, *functions]) or "nothing"

    def switch(self, on: bool) -> None:
        for owner, changes in [*self._modules, *self._files]:
            for name, (new, old) in changes.items():
                value = new if on else old
                if value is _ABSENT:
                    vars(owner).pop(name, None)
                else:
                    vars(owner)[name] = value

    def disagrees(self, device: torch.device) -> str:
        """What is wrong with them beside the model's own on random numbers, values and gradients; else ""."""
        tried: set[type] = set()
        for module, changes in self._modules:
            if "forward" not in changes or type(module) in tried:
                continue
            tried.add(type(module))
            parameter = next(module.parameters(), None)
            if parameter is None or not parameter.dtype.is_floating_point:
                return f"{type(module).__name__} cannot be tried"
            home = parameter.device
            width = parameter.shape[0] if parameter.dim() == 1 else self.width
            x = _numbers(1, 6, width, device=device, dtype=parameter.dtype)
            try:
                module.to(device)
                if why := self._differ(lambda x, m=module: m(x), (x,)):
                    return f"{type(module).__name__} {why}"
            finally:
                module.to(home)
        for file, changes in self._files:
            for name in changes:
                q, k = (_numbers(1, heads, 6, 64, device=device, dtype=torch.float32) for heads in (4, 2))
                half = _numbers(1, 6, 32, device=device, dtype=torch.float32)
                angles = torch.cat([half, half], -1)
                given = angles.cos(), angles.sin()
                if why := self._differ(lambda q, k, f=file, n=name, g=given: vars(f)[n](q, k, *g), (q, k)):
                    return f"{file.__name__.rpartition('.')[2]}.{name} {why}"
        return ""

    def _differ(self, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> str:
        try:
            theirs = _results(function, inputs)
            self.switch(True)
            ours = _results(function, inputs)
        except Exception as error:  # other arguments, no compiler, a chip that Triton does not know
            return f"cannot be tried: {type(error).__name__}"
        finally:
            self.switch(False)
        limit = 1e-3 if inputs[0].dtype in (torch.float32, torch.float64) else 3e-2
        same = all(a.shape == b.shape and (a - b).float().norm() <= limit * b.float().norm()
                   for a, b in zip(ours, theirs, strict=True))  # fmt: skip
        return "" if same else "does not compute what the model's own does"


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(new, old) of what differs."""
    names = [*before, *(name for name in after if name not in before)]
    pairs = {name: (after.get(name, _ABSENT), before.get(name, _ABSENT)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] is not pair[1]}


def _restore(attributes: dict[str, Any], changes: Mapping[str, tuple[Any, Any]]) -> None:
    for name, (_, old) in changes.items():
        if old is _ABSENT:
            del attributes[name]
        else:
            attributes[name] = old


def _numbers(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _results(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Values, and the gradients of the inputs for one upstream gradient. Liger's kernels may write into both."""
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    with torch.enable_grad():
        out = function(*(x * 1 for x in inputs))
        out = out if isinstance(out, tuple) else (out,)
        values = [y.detach().clone() for y in out]
        upstream = [_numbers(*y.shape, device=y.device, dtype=y.dtype) for y in out]
        return [*values, *torch.autograd.grad(out, inputs, upstream)]
