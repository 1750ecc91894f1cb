"""A model's files: written as `from_pretrained` reads them, tried before there is anything to lose, and in the worst
case the weights alone."""

import contextlib
import copy
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.serialization import split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers import modeling_utils
from transformers.utils import logging as logging_utils

from fastpo.checkpoints.state_files import first_nonfinite, write_tensors
from fastpo.errors import ConfigError
from fastpo.models.carried import carry_over
from fastpo.report import disks

log = logging.getLogger("fastpo")

TRIAL = ".saving-trial"
RESCUED = "rescued-weights"
# What generate() reads only if it samples; transformers does not save it beside do_sample=False.
_SAMPLING = ("temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff")


def write(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    max_shard_size: int | str,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Model and tokenizer into `folder`. `weights`: what is written in the place of the model's own, which are split
    over ranks; in the dtypes that they were loaded in."""
    whole = not hasattr(model, "peft_config")
    # A copy of the dict: transformers takes the tensors out as it writes them.
    given: dict[str, Any] = {} if weights is None else {"state_dict": dict(weights)}
    if whole:
        given["max_shard_size"] = max_shard_size
    with _without_bars(), _generation_config(model) if whole else contextlib.nullcontext():
        model.save_pretrained(folder, **given)  # type: ignore[operator]
    carry_over(model, folder)
    if weights is not None and (folder / "config.json").exists():
        # transformers writes the shards' dtype; the weights are in the one that they were loaded in.
        config = json.loads((folder / "config.json").read_text())
        dtypes = {str(t.dtype).removeprefix("torch.") for t in weights.values() if t.is_floating_point()}
        if len(dtypes) == 1:
            (folder / "config.json").write_text(json.dumps({**config, "dtype": dtypes.pop()}, indent=2) + "\n")
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template of a card; ours is written at the end
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """transformers draws one for every save."""
    bars = logging_utils.is_progress_bar_enabled()
    logging_utils.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging_utils.enable_progress_bar()


@contextlib.contextmanager
def _generation_config(model: Any) -> Iterator[None]:
    """Inside, the model has the generation config that is saved: without what has no effect in it."""
    own = getattr(model, "generation_config", None)
    idle = _idle_settings(own)
    if not idle:
        yield
        return
    model.generation_config = copy.deepcopy(own)
    for name in idle:
        setattr(model.generation_config, name, None)
    try:
        yield
    finally:
        model.generation_config = own


def _idle_settings(generation_config: Any) -> list[str]:
    """Sampling's settings in a generation config that does not sample, where transformers refuses to save it."""
    if generation_config is None or generation_config.do_sample is True:
        return []
    if getattr(generation_config, "_original_object_hash", None) == hash(generation_config):
        return []  # as it was published, which transformers saves back whatever it is
    with contextlib.suppress(ValueError):
        generation_config.validate(strict=True)
        return []
    plain = type(generation_config)()
    return [n for n in _SAMPLING if getattr(generation_config, n, None) not in (None, getattr(plain, n, None))]


# ---- before the first step


def check_shard_size(size: int | str) -> None:
    """ConfigError for a max_shard_size that transformers would refuse at the end of training."""
    try:
        split_torch_state_dict_into_shards({"": torch.zeros(1)}, max_shard_size=size)
    except Exception:
        raise ConfigError(f"max_shard_size={size!r} is no size: write it as '5GB' or '500MB'") from None
    if isinstance(size, int) and size <= 0:
        raise ConfigError(f"max_shard_size={size} is no size: write it as '5GB' or '500MB'")


def try_to_write(
    model: nn.Module, tokenizer: Any, output_dir: Path, max_shard_size: int | str, trained: Mapping[str, Tensor]
) -> None:
    """All that a save does, but for the weights' bytes, on the real model and tokenizer: ConfigError for what fails.

    `trained`: the parameters that are trained, by name. What can be mended without another meaning is, and said.
    """
    bad = first_nonfinite(trained)
    if bad is not None:
        raise ConfigError(f"the model's {bad} holds values that are not finite (NaN or infinity) before training")
    folder = output_dir / TRIAL
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "written").write_bytes(bytes(1 << 16))
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ConfigError(f"output_dir {str(output_dir)!r} cannot be written: {error.strerror}") from None
    try:
        _try_parts(model, tokenizer, folder, max_shard_size)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    saved = trained if hasattr(model, "peft_config") else dict(model.named_parameters())
    needed, free = sum(t.nbytes for t in saved.values()), shutil.disk_usage(output_dir).free
    if needed > free:
        log.warning(
            "the disk of output_dir %s has %.3g GB free, and the model alone takes %.3g GB: a save will fail",
            output_dir, free / 1e9, needed / 1e9,
        )  # fmt: skip


def _try_parts(model: Any, tokenizer: Any, folder: Path, max_shard_size: int | str) -> None:
    if not hasattr(model, "peft_config"):
        _attempt(
            lambda: model.config.save_pretrained(folder),
            lambda: f"the model's config cannot be saved{_no_json(model.config.to_dict(), 'model.config.')}",
            "set it to what JSON holds, or delete it",
        )
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            if idle := _idle_settings(generation):
                said = ", ".join(f"{name}={getattr(generation, name)}" for name in idle)
                log.warning(
                    "the saved generation_config leaves out %s: without effect as do_sample is off, and transformers "
                    "does not save it so", said,
                )  # fmt: skip
            with _generation_config(model):
                _attempt(
                    lambda: model.generation_config.save_pretrained(folder),
                    lambda: "the model's generation_config cannot be saved",
                    "change model.generation_config",
                )
    _attempt(
        lambda: tokenizer.save_pretrained(folder),
        lambda: (
            "the tokenizer cannot be saved"
            + _no_json(getattr(tokenizer, "init_kwargs", {}), "tokenizer.init_kwargs.", "tokenizer_config.json")
        ),
        "change or delete what it cannot write",
    )
    with _weightless():
        _attempt(
            lambda: write(model, tokenizer, folder, max_shard_size),
            lambda: f"the model cannot be saved{_shared(model)}",
            "give each its own (copy.deepcopy), or name them in the model's _tied_weights_keys" if _shared(model) else
            "mend that first, or set save_final=false and save_strategy=no",
        )  # fmt: skip


def _attempt(work: Callable[[], Any], what: Callable[[], str], remedy: str) -> None:
    try:
        work()
    except Exception as error:
        lines = [" ".join(line.split()) for line in str(error).splitlines()]
        lines = [line for line in lines if line and line != "GenerationConfig is invalid:"]
        reason = (lines[0] if lines else type(error).__name__)[:300]
        raise ConfigError(f"{what()}, which would lose the trained model at the end ({reason}): {remedy}") from error


def _no_json(values: Mapping[str, Any], prefix: str, file: str = "config.json") -> str:
    """The first value that is none of JSON's types, for a message."""
    for name, value in values.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError):
            return f" ({prefix}{name} is a {type(value).__name__}, which {file} cannot hold)"
    return ""


def _shared(model: nn.Module) -> str:
    """Two weights in the same memory that the model does not declare as tied, for a message."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
    seen: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        other = seen.setdefault(p.data_ptr(), name) if p.numel() else name
        if other != name and not {name, other} & tied:
            return f" ({name} and {other} share their memory)"
    return ""


@contextlib.contextmanager
def _weightless() -> Iterator[None]:
    """Inside, transformers writes one number in the place of each tensor. Tensors that share memory stay as they are,
    for whether they may be written is one of the questions."""
    original = getattr(modeling_utils, "safe_save_file", None)
    if original is None:  # another version of transformers: then the weights are written
        yield
        return

    def save(tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        memory = {name: (t.device, t.untyped_storage().data_ptr()) for name, t in tensors.items()}
        users = Counter(memory.values())
        small = {
            name: t if users[memory[name]] > 1 and t.numel() else t.new_zeros(1) for name, t in tensors.items()
        }  # fmt: skip
        return original(small, *args, **kwargs)

    modeling_utils.safe_save_file = save
    try:
        yield
    finally:
        modeling_utils.safe_save_file = original


# ---- after a save that failed


def rescue(
    model: nn.Module, output_dir: Path, only: Collection[str] = (), weights: Mapping[str, Tensor] | None = None
) -> tuple[Path, str] | None:
    """The weights as one plain safetensors file, where there is a disk that takes it: (file, how to load it), or None.

    `only`: names of parameters, where the rest is as it was (an adapter's base); else all parameters and buffers that
    the model would save. Tensors in the same memory are written once. `weights`: as of `write`.
    """
    tensors = dict(model.state_dict() if weights is None else weights)
    once: dict[Any, str] = {}
    for name, t in list(tensors.items()):
        if not isinstance(t, Tensor) or (only and name not in only):
            del tensors[name]
        elif t.numel() and once.setdefault((t.data_ptr(), t.shape, t.stride(), t.dtype), name) != name:
            del tensors[name]
    for home in (output_dir, Path(tempfile.gettempdir()) / f"fastpo-{os.getpid()}", Path.cwd()):
        folder = home / RESCUED
        path = (folder / "model.safetensors").absolute()
        strict = ", strict=False" if only else ""
        how = f"safetensors.torch.load_model(model, {str(path)!r}{strict})"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_tensors(folder / ".model.safetensors", tensors, {"format": "pt"})
            os.replace(folder / ".model.safetensors", path)
            with contextlib.suppress(OSError):
                text = _README.format(what=_what(bool(only)), path=repr(str(path)), strict=strict)
                (folder / "README.md").write_text(text)
            return path, how
        except Exception as error:
            log.error("the weights could not be written to %s: %s", folder, disks.cause(error))
            with contextlib.suppress(OSError):
                (folder / ".model.safetensors").unlink(missing_ok=True)
                folder.rmdir()
    return None


def _what(adapter: bool) -> str:
    if adapter:
        return "what was trained (the adapter). Make the model as for `fastpo.train`, with its adapter"
    return "the trained model. Make it as for `fastpo.train`"


_README = """The save of the trained model failed; its weights lie here. They are {what}, then load them into it:

    from safetensors.torch import load_model
    load_model(model, {path}{strict})
"""
