"""Checkpoints: written beside and renamed, checked by size and hash before they are trusted, resumed bit for bit.

`checkpoint-N/` holds the model and tokenizer as `from_pretrained` reads them, and unless `save_only_model`

    state/                  weights, fp32 masters, optimiser state by parameter name: a safetensors file a rank, which
                            another number of ranks, or none, can read (checkpoints/state_files.py)
    trainer.pt              schedule, learning rates, counters, open metric window
    rng-0.pt, ...           random state of each rank
    trainer_state.json      transformers' TrainerState with the log history, from which metrics.jsonl is laid anew
    reference.safetensors   the reference's log-probabilities, a hard link to the run's one copy
    previous.safetensors    the same of the previous policy, where a loss reads one that is not the reference
    run.json                what the run is: versions, data, model, configuration
    manifest.json           size and SHA-256 of every other file; written last

Nothing in it can hold code: safetensors, JSON, and two files that `torch.load` reads with `weights_only`.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerState

from fastpo.checkpoints.state_files import as_sharded, nonfinite_weights
from fastpo.data import Example
from fastpo.errors import ConfigError, TrainingError

log = logging.getLogger("fastpo")

FORMAT = 3  # of everything in a checkpoint but the model's own files
MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)$")
TEMPORARY = ".saving-"
_OLD = f"{TEMPORARY}old-"


# ---- folders


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders in `output_dir`, the newest last: by step, for clocks go back and differ between machines.

    A run that goes on from an older one sets the later ones aside before it begins (`set_aside`), so that the order of
    steps is the order in which they were written.
    """
    return sorted((path for path in output_dir.glob("checkpoint-*") if _NAME.match(path.name)), key=step_of)


def _recover(output_dir: Path) -> None:
    """Give back its name to a checkpoint whose successor was killed between the two renames of `seal`."""
    for aside in output_dir.glob(f"{_OLD}checkpoint-*"):
        folder = output_dir / aside.name.removeprefix(_OLD)
        if not folder.exists():
            os.replace(aside, folder)


def set_aside(output_dir: Path, after: int = -1) -> list[Path]:
    """Rename the checkpoints of steps beyond `after` to `checkpoint-N.old`; returns their new paths.

    They are another run's, or of a pass that this run leaves by going on from an older step: nothing that follows is
    resumed from them.
    """
    renamed = []
    for path in checkpoints(output_dir):
        if step_of(path) > after:
            renamed.append(path.with_name(f"{path.name}.old"))
            shutil.rmtree(renamed[-1], ignore_errors=True)
            os.replace(path, renamed[-1])
    return renamed


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = _NAME.match(folder.name)
    return int(match[1]) if match else 0


def make_temporary(path: Path) -> None:
    """An empty folder at `path`, where a checkpoint is written before it gets its name."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def clear_temporaries(output_dir: Path) -> None:
    """Remove what a killed save left."""
    for path in output_dir.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def seal(written: Path, folder: Path) -> None:
    """Write the manifest of a folder that is complete, flush it to the disk, and give it its name."""
    files = [path for path in _files(written) if path != written / MANIFEST]
    with ThreadPoolExecutor(max_workers=4) as pool:
        hashes = list(pool.map(_sha256, files))
    entries = {str(f.relative_to(written)): [f.stat().st_size, h] for f, h in zip(files, hashes, strict=True)}
    (written / MANIFEST).write_text(
        json.dumps({"format": FORMAT, "written_at": time.time_ns(), "files": entries}, indent=1)
    )
    for path in [*files, written / MANIFEST, written]:
        _fsync(path)
    if folder.exists():  # a run that was resumed from an older checkpoint passes here again
        aside = folder.parent / f"{_OLD}{folder.name}"
        os.replace(folder, aside)
        os.replace(written, folder)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.replace(written, folder)
    _fsync(folder.parent)


def _manifest(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    """(manifest, what is wrong with it): one of them is None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return None, f"{MANIFEST} is missing"
    except (OSError, ValueError, RecursionError):
        return None, f"{MANIFEST} cannot be read"
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(isinstance(v, list) and len(v) == 2 for v in files.values()):
        return None, f"{MANIFEST} cannot be read"
    return manifest, None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in one phrase, or None: every file is there, with its size and hash, and the
    weights are numbers."""
    manifest, wrong = _manifest(folder)
    if manifest is None:
        return wrong
    if manifest.get("format") != FORMAT:
        return f"it has format {manifest.get('format')}, this fastpo reads {FORMAT}"
    entries = manifest["files"]
    if "trainer.pt" not in entries and "model only" in (wrong := _model_only(folder)):
        return wrong
    try:
        for name, (size, _) in entries.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (folder / name).stat().st_size != size:
                return f"{name} has {(folder / name).stat().st_size} bytes instead of {size}"
        with ThreadPoolExecutor(max_workers=4) as pool:
            hashes = list(pool.map(_sha256, [folder / name for name in entries]))
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        return f"it cannot be read ({getattr(error, 'strerror', None) or error})"
    for (name, (_, expected)), got in zip(entries.items(), hashes, strict=True):
        if got != expected:
            return f"{name} has changed since it was written"
    for name in ("trainer.pt", "trainer_state.json", "run.json"):
        if name not in entries:
            return f"{name} is missing"
    try:
        nonfinite = nonfinite_weights(folder / "state")
    except Exception as error:  # safetensors has an error of its own
        return f"its state cannot be read ({' '.join(str(error).split())[:120]})"
    return f"its weights are not finite ({nonfinite})" if nonfinite is not None else None


def _model_only(folder: Path) -> str:
    there = any((folder / name).exists() for name in ("trainer.pt", "trainer_state.json", "state"))
    return "trainer.pt is missing" if there else "it holds the model only (save_only_model)"


def read_state(folder: Path) -> TrainerState:
    """transformers' TrainerState of a checkpoint; TrainingError where it is none."""
    try:
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        good = isinstance(state.global_step, int) and all(isinstance(line["step"], int) for line in state.log_history)
    except Exception as error:
        raise TrainingError(unreadable(folder, error)) from error
    if not good:
        raise TrainingError(unreadable(folder, ValueError("trainer_state.json has no step")))
    return state


def unreadable(folder: Path, error: BaseException) -> str:
    """The one line about a checkpoint whose content is not what a run writes."""
    what = " ".join(str(error).split())[:200] or type(error).__name__
    return f"checkpoint {str(folder)!r} cannot be resumed, its content is not what fastpo writes: {what}"


def find(output_dir: Path, request: str | bool | None) -> tuple[Path | None, list[str]]:
    """The checkpoint that `resume_from_checkpoint` means, whole, and what is to be said about it.

    None: no resume. True: the newest; raises where it is damaged, and names the one before. "auto": the newest that is
    whole, or None. A path: that checkpoint, or the newest of that run's folder.
    """
    if request in (None, False, ""):
        return None, []
    if request in (True, "auto"):
        _recover(output_dir)
        found = checkpoints(output_dir)
    else:
        path = Path(str(request))
        _recover(path.parent if _NAME.match(path.name) else path)
        if not path.is_dir():
            near = checkpoints(path.parent if path.parent.is_dir() else output_dir)
            raise ConfigError(
                f"there is no checkpoint {str(path)!r}" + (f"; the newest there is {near[-1]}" if near else "")
            )
        found = [path] if (path / MANIFEST).exists() or _NAME.match(path.name) else checkpoints(path)
    if not found:
        if request == "auto":
            return None, []
        raise ConfigError(
            f"there is no checkpoint in {str(output_dir) if request is True else str(request)!r} "
            "(resume_from_checkpoint=auto starts anew then; save_steps writes them)"
        )
    if (found[-1] / "training_args.bin").exists() and not (found[-1] / MANIFEST).exists():
        raise ConfigError(
            f"{str(found[-1])!r} was written by transformers' Trainer, not by fastpo, and cannot be resumed; start a "
            f"run from its weights: model={found[-1]}"
        )
    said: list[str] = []
    for newest in reversed(found):
        if other := _other_format(newest):
            raise ConfigError(other)
        wrong = damage(newest)
        if wrong is None:
            return newest, said
        if request != "auto":
            older = [c for c in checkpoints(newest.parent) if step_of(c) < step_of(newest)]
            before = next((c for c in reversed(older) if damage(c) is None), None)
            offer = f"; the one before it is whole: resume_from_checkpoint={before}" if before else ""
            damaged = "" if "model only" in wrong or "not finite" in wrong else "it is damaged: "
            raise TrainingError(f"checkpoint {str(newest)!r} cannot be resumed, {damaged}{wrong}{offer}")
        how = "not good" if "not finite" in wrong else "damaged"
        said.append(f"checkpoint {str(newest)!r} is {how} ({wrong}) and passed over")
    return None, said


def _other_format(folder: Path) -> str | None:
    """A checkpoint of another fastpo is no damage, which `auto` would pass over: what to say of it, or None."""
    manifest, _ = _manifest(folder)
    number = manifest.get("format") if manifest is not None else None
    if number == FORMAT or not isinstance(number, int):
        return None
    try:
        version = json.loads((folder / "run.json").read_text()).get("fastpo")
    except (OSError, ValueError, AttributeError):
        version = "of another version"
    return (
        f"checkpoint {str(folder)!r} was written by fastpo {version} in another format ({number}; this one reads "
        f"{FORMAT}): resume it with that version, or start a new run from its weights (model={folder})"
    )


def prune(output_dir: Path, limit: int | None, run_id: str, keep: Sequence[Path]) -> None:
    """Remove this run's oldest checkpoints until `limit` are left; those in `keep` stay, and count."""
    if limit is None:
        return
    mine = [path for path in checkpoints(output_dir) if _run_id(path) == run_id]
    kept = {path.resolve() for path in keep}
    removable = [path for path in mine if path.resolve() not in kept]
    for path in removable[: max(0, len(mine) - max(limit, 1))]:
        shutil.rmtree(path, ignore_errors=True)


def _run_id(folder: Path) -> str | None:
    try:
        return json.loads((folder / "run.json").read_text())["run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- the optimiser


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """(tensors by `optimizer.KEY.NAME`, everything else by name and key) of an optimiser's state.

    `names` maps `id` of what the optimiser steps to the parameter's name.
    """
    tensors: dict[str, Tensor] = {}
    others: dict[str, dict[str, Any]] = {}
    for stepped, state in optimizer.state.items():
        name = names.get(id(stepped))
        if name is None:
            log.warning("the optimiser keeps state that belongs to no parameter; it is not in checkpoints")
            continue
        for key, value in state.items():
            if isinstance(value, Tensor):
                p = parameters[name]
                shards = isinstance(p, DTensor) and value.dim() > 0 and value.shape == p.to_local().shape
                tensors[f"optimizer.{key}.{name}"] = as_sharded(value, p) if shards else value
            else:
                others.setdefault(name, {})[key] = value
    return tensors, others


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    others: Mapping[str, Mapping[str, Any]],
    stepped: Mapping[str, nn.Parameter],
) -> None:
    """Put back what `optimizer_tensors` took; `stepped` maps names to what the optimiser steps."""
    states: dict[str, dict[str, Any]] = {name: dict(other) for name, other in others.items()}
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            entry, _, name = rest.partition(".")
            # A step count lies on the host unless the optimiser counts on the device; moments lie beside their weights.
            stays = value.dim() == 0 and not on_device
            states.setdefault(name, {})[entry] = value if stays else value.to(stepped[name].device)
    for name, state in states.items():
        optimizer.state[stepped[name]] = state


# ---- what the run is


def data_fingerprint(examples: Sequence[Example]) -> str:
    """Hex digest of token ids, pairs and columns, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for e in examples:
        for k, response in enumerate(e.responses):
            for ids in (e.prompt_of(k), response):
                digest.update(len(ids).to_bytes(4, "little") + np.ascontiguousarray(ids, np.int32).tobytes())
        digest.update(json.dumps([e.pairs, e.pair_columns, e.response_columns], sort_keys=True).encode())
        if e.greedy is not None:
            digest.update(b"greedy %d" % e.greedy)
        if e.loss is not None:
            digest.update(f"loss {e.loss}".encode())
        for weights in e.token_weights or ():
            digest.update(weights.tobytes())
    return digest.hexdigest()


# Options that a resumed run must share with the run it goes on with: they decide its rows, or live in the state.
_SAME = ("seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last", "optim", "optim_args",
         "master_weights", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
         "sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha")  # fmt: skip
# Those that may change without a word.
_FREE = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "run_name", "report_to", "disable_tqdm",
         "per_device_train_batch_size", "gradient_accumulation_steps", "max_tokens", "logits_memory_budget", "device",
         "gradient_checkpointing", "gradient_checkpointing_layers", "activation_offloading",
         "share_prompts", "fsdp", "fsdp_cpu_offload", "ddp_timeout", "ddp_backend", "save_total_limit", "report",
         "guardrails", "token_bucket",
         "per_device_eval_batch_size", "dataset_num_proc", "hub_token")  # fmt: skip


def check_run(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any], named_model: bool) -> list[str]:
    """Hold a checkpoint's run.json against this run's: raises ConfigError if they are not one run; returns remarks."""
    name = str(folder)
    if saved.get("format") != FORMAT:
        raise ConfigError(
            f"checkpoint {name!r} was written by fastpo {saved.get('fastpo')} in another format "
            f"({saved.get('format')}; this one reads {FORMAT}): resume it with that version"
        )
    if saved["parameters"] != now["parameters"]:
        raise ConfigError(
            f"checkpoint {name!r} is of another model: {_first_difference(saved['parameters'], now['parameters'])}"
        )
    if saved["data"] != now["data"]:
        raise ConfigError(
            f"checkpoint {name!r} was made on other data: {saved['rows']} rows then, {now['rows']} now, or other token "
            "ids (tokenizer, max_length, truncation, columns); resume with the same"
        )
    if saved["step_size"] != now["step_size"]:
        raise ConfigError(
            f"checkpoint {name!r} has steps of {saved['step_size']} pairs, this run of {now['step_size']} "
            f"({now['world_size']} processes, {saved['world_size']} then): set per_device_train_batch_size or "
            "gradient_accumulation_steps so that their product with the number of processes is the same"
        )
    if saved["frozen"] != now["frozen"]:
        raise ConfigError(
            f"checkpoint {name!r} was trained on another base: the weights that are not trained differ from this "
            f"model's; pass the one that the run began with ({saved['model_name'] or 'in memory'})"
        )
    if saved["adapter"] != now["adapter"]:
        raise ConfigError(
            f"checkpoint {name!r} has another adapter: {_first_difference(saved['adapter'], now['adapter'])}"
        )
    then, today = (run["config"] | _numerics(run) for run in (saved, now))
    if today["dataloader_drop_last"] and saved["batch"] != now["batch"]:
        raise ConfigError(
            f"checkpoint {name!r} drops an epoch's last incomplete batch of {saved['batch']} rows, this run of "
            f"{now['batch']}: with dataloader_drop_last keep per_device_train_batch_size times processes"
        )
    for option in _SAME:
        if then.get(option) != today.get(option):
            raise ConfigError(
                f"checkpoint {name!r} was made with {option}={then.get(option)!r}, this run has "
                f"{today.get(option)!r}: resume with the same, or start a new run from its weights (model={name})"
            )
    remarks = []
    if saved["model"] != now["model"]:
        if named_model:
            raise ConfigError(
                f"checkpoint {name!r} was begun from other weights than {now['model_name']!r} holds; pass the model "
                f"that the run began with ({saved['model_name'] or 'one in memory'})"
            )
        remarks.append("the model in memory is not as the run began; the checkpoint's weights replace its own")
    changed = [o for o in today if o not in _SAME + _FREE and then.get(o, today[o]) != today[o]]
    remarks += [f"{o}={today[o]!r} from here on (the checkpoint had {then.get(o)!r})" for o in changed]
    return remarks


def _numerics(run: Mapping[str, Any]) -> dict[str, Any]:
    """What of the options that memory decides is in the weights, as it was decided; nothing in older checkpoints."""
    settled = run.get("settled", {})
    return {name: settled[name] for name in ("master_weights",) if name in settled}


def _first_difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    for name in [*then, *now]:
        if then.get(name) != now.get(name):
            return f"{name} is {then.get(name) or 'absent'} there and {now.get(name) or 'absent'} here"
    return "its parameters come in another order"


def parameter_shapes(model: nn.Module) -> dict[str, str]:
    """Name -> shape of every trainable parameter."""
    return {n: f"{tuple(p.shape)}" for n, p in model.named_parameters() if p.requires_grad}
