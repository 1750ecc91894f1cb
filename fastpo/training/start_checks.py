"""Options that would fail late, tried at the start: each by the call that the run will make, on next to nothing."""

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastpo.config.no_effect import Facts, without_effect
from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError, FastpoError, shown
from fastpo.models.adapters import first_line
from fastpo.models.attention import BACKENDS
from fastpo.models.modes import check_offloading
from fastpo.ops.backends import cpu_has_bf16
from fastpo.ops.chips import FUSED_FORWARD_VARIABLE
from fastpo.training.distributed import World
from fastpo.training.optim import NARROW, Gradients, build_optimizer, build_scheduler
from fastpo.training.samples import Answers, check_generation_kwargs

log = logging.getLogger("fastpo")


def check_options(config: TrainConfig, device: torch.device, cache: Path) -> None:
    """ConfigError for options that need no model to be seen to fail, and for variables of the environment. cache: the
    folder of cached log-probabilities."""
    if config.scalar_head:
        _check_scalar_head(config)
    check_generation_kwargs(config.generation_kwargs)
    check_offloading(config, device)
    check_environment(cache)
    check_output_dir(config.output_dir)
    build_scheduler(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), config, steps=100)
    _check_optimizer(config)
    _check_checkpointing(config)
    if config.grad_filter and device.type == "cuda":
        log.warning("grad_filter runs plain PyTorch operations on a GPU, unmeasured: compare tokens_per_second")
    if config.bf16 and device.type == "cpu" and not cpu_has_bf16():
        log.warning("bf16 is slower than fp32 on this processor, which has no bf16 multiplies: pass bf16=false")
    if config.torch_compile:
        from fastpo.models.compiled import check_backend

        check_backend(config)


def _check_scalar_head(config: TrainConfig) -> None:
    """What asks for a language model's head, a reference or a cut response, which a reward model has not."""
    reasons = {
        "sample_generations": "a scalar head writes no answers",
        "generation_kwargs": "a scalar head writes no answers",
        "grad_filter": "a scalar head has no distribution of tokens",
        "precompute_ref_log_probs": "it has no reference",
        "router_aux_loss_coef": "transformers' sequence classifiers add no load-balancing loss",
    }
    for name, why in reasons.items():
        if getattr(config, name):
            raise ConfigError(f"loss_type=reward: leave {name} out, for {why}")
    if config.truncation_mode != "keep_start":
        raise ConfigError(
            f"loss_type=reward: leave truncation_mode={config.truncation_mode} out: responses over max_length are left "
            "out, not cut, for the reward is read at their end"
        )


def _check_optimizer(config: TrainConfig) -> None:
    """The optimiser made, and stepped once where that needs no GPU: its arguments must leave numbers."""
    layer = nn.Linear(2, 2, bias=False)
    gradients = Gradients(dict(layer.named_parameters()), master_weights="none", seed=0)
    try:
        optimizer = build_optimizer(layer, config, gradients)
        if "8bit" in config.optim or "32bit" in config.optim:
            return
        layer.weight.grad = torch.ones_like(layer.weight)
        with torch.no_grad():
            optimizer.step()
    except FastpoError:
        raise
    except Exception as error:
        raise ConfigError(
            f"optim={config.optim}, optim_args={shown(config.optim_args)}: {first_line(error)}"
        ) from error
    finally:
        gradients.close()
    if not layer.weight.isfinite().all():
        raise ConfigError(f"optim={config.optim}, optim_args={shown(config.optim_args)}: its first step is not finite")


def _check_checkpointing(config: TrainConfig) -> None:
    kwargs = config.gradient_checkpointing_kwargs
    if not kwargs or not config.gradient_checkpointing:
        return
    x = torch.ones(1, requires_grad=True)
    try:
        checkpoint(lambda t: 2 * t, x, **{"use_reentrant": False, **kwargs}).sum().backward()
    except Exception as error:
        raise ConfigError(
            f"gradient_checkpointing_kwargs={shown(kwargs)}: torch.utils.checkpoint says: {first_line(error)}"
        ) from error


def check_environment(cache: Path) -> None:
    """ConfigError for a FASTPO_ variable that says nothing, or a `cache` of log-probabilities that would lie below a
    file."""
    attention = os.environ.get("FASTPO_ATTENTION") or "own"
    if attention not in (*BACKENDS, "own"):
        raise ConfigError(f"FASTPO_ATTENTION={shown(attention)}: expected one of {', '.join(BACKENDS)}, or own")
    if (fused := os.environ.get(FUSED_FORWARD_VARIABLE, "")) not in ("", "0", "1"):
        raise ConfigError(f"{FUSED_FORWARD_VARIABLE} must be 0, 1 or unset, not {shown(fused)}")
    for part in (cache, *cache.parents):
        if _is_file(part):
            raise ConfigError(f"FASTPO_CACHE: {shown(str(part))} is a file, and the cache is a folder")


def check_output_dir(name: str) -> None:
    """ConfigError where no folder of that name can be."""
    if not name.strip():
        raise ConfigError("output_dir is empty: it names the folder for the trained model")
    folder = Path(name)
    for part in (folder, *folder.parents):
        if _is_file(part):
            raise ConfigError(f"output_dir: {shown(str(part))} is a file, and the run needs a folder")
    try:
        folder.exists()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise ConfigError(f"output_dir {shown(name)} cannot be written: {error.strerror}") from None


def _is_file(path: Path) -> bool:
    try:
        return path.exists() and not path.is_dir()
    except (OSError, ValueError):
        return False


def try_samples(config: TrainConfig, answers: Answers) -> None:
    """ConfigError where generate() does not take generation_kwargs with this model: one token of one answer."""
    if not config.generation_kwargs or answers.forward.engine.sharded:
        return
    length = ("max_length", "min_length", "max_new_tokens", "min_new_tokens", "max_time")
    kwargs = {k: v for k, v in config.generation_kwargs.items() if k not in length} | {"max_new_tokens": 1}
    answers(1, kwargs)


def say_without_effect(
    config: TrainConfig, paths: Mapping[str, Any], trained: Iterable[nn.Parameter],
    optimizers: tuple[torch.optim.Optimizer | None, Any], world: World, steps: int,
) -> None:  # fmt: skip
    """One line for all options that are set and change nothing in this run. paths: what it is made from, by argument.
    optimizers: those passed in. steps: of the run."""
    of_eval = paths.get("eval_dataset")
    names = list(of_eval.values()) if isinstance(of_eval, dict) else [of_eval]
    optimizer, scheduler = optimizers
    facts = Facts(
        device_type=world.device.type, processes=world.size, steps=steps, own_optimizer=optimizer is None,
        own_scheduler=scheduler is None, narrow=any(p.dtype in NARROW for p in trained),
        from_hub=_has_splits(paths.get("train_dataset")), eval_from_hub=any(map(_has_splits, names)),
    )  # fmt: skip
    if found := without_effect(config, facts):
        log.warning("without effect in this run: %s", "; ".join(found))


def _has_splits(dataset: Any) -> bool:
    if isinstance(dataset, list):  # a mixture
        return any(_has_splits(part["path"]) for part in dataset)
    return isinstance(dataset, str | os.PathLike) and not Path(dataset).expanduser().is_file()
