"""What a checkpoint holds that the model's class does not read, and the files beside its weights: carried over as they
are into the folder that is saved."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import cached_file

# Arguments of from_pretrained that say where the files are, for everything that is read beside the weights.
WHERE = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies", "gguf_file")
# Buffers that older checkpoints hold and that every model computes by itself.
COMPUTED = re.compile(
    r"(^|\.)((original_)?inv_freq|position_ids|masked_bias|(cross)?(attn|attention)\.bias|(cos|sin)_cached|"
    r"relative_position_index)$"
)
# What processors of images and sound lie in, beside the tokenizer.
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def left_out(model: Any, where: str, patterns: list[str], kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Tensors of the checkpoint that the class declares it does not read, by name, and the files that hold them."""
    declared = re.compile("|".join(f"({p})" for p in patterns))
    own = set(model.state_dict())
    out = {}
    for file in _weight_files(where, kwargs):
        with safe_open(file, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118  # no mapping
                if name not in own and declared.search(name) and not COMPUTED.search(name):
                    out[name] = file
    return out


def _weight_files(where: str, kwargs: Mapping[str, Any]) -> list[str]:
    """The safetensors files of a checkpoint; empty where it has none."""
    single = _file_of(where, "model.safetensors", kwargs)
    if single is not None:
        return [single]
    index = _file_of(where, "model.safetensors.index.json", kwargs)
    if index is None:
        return []
    names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    return [file for name in names if (file := _file_of(where, name, kwargs)) is not None]


def _file_of(where: str, name: str, kwargs: Mapping[str, Any]) -> str | None:
    of_files = {key: kwargs[key] for key in WHERE if kwargs.get(key) is not None and key != "gguf_file"}
    try:
        return cached_file(
            where, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False, **of_files,
        )  # fmt: skip
    except (OSError, ValueError):
        return None


def carry_over(model: Any, folder: str | os.PathLike[str]) -> None:
    """Into the folder of a whole model that was saved: the tensors of its checkpoint that its class does not read, bit
    for bit, and of a model that sees or hears, its processor's files. Nothing for an adapter's folder."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    folder = Path(folder)
    if not (folder / "config.json").exists() or not hasattr(model, "fastpo_source"):
        return
    where, of_files = model.fastpo_source
    if model.config.get_text_config(decoder=True) is not model.config:
        for name in _PROCESSOR_FILES:
            if not (folder / name).exists() and (file := _file_of(where, name, of_files)):
                shutil.copyfile(file, folder / name)
    if files := getattr(model, "fastpo_left_out", None):
        _add_tensors(folder, {name: _tensor_of(name, file) for name, file in files.items()})


def _tensor_of(name: str, file: str) -> Tensor:
    with safe_open(file, framework="pt") as f:
        return f.get_tensor(name)


def _add_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Put tensors into the safetensors of a saved model: a file more of a sharded one, else the one file anew."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        save_file({**tensors, **load_file(single)}, folder / "model.safetensors.new", metadata={"format": "pt"})
        os.replace(folder / "model.safetensors.new", single)
        return
    described = json.loads(index.read_text())
    added = {name: tensor for name, tensor in tensors.items() if name not in described["weight_map"]}
    save_file(added, folder / "model-left-out.safetensors", metadata={"format": "pt"})
    described["weight_map"].update(dict.fromkeys(added, "model-left-out.safetensors"))
    size = sum(tensor.nbytes for tensor in added.values())
    described["metadata"]["total_size"] = described["metadata"].get("total_size", 0) + size
    index.write_text(json.dumps(described, indent=2) + "\n")
