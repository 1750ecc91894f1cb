"""run.json: what a run is, and whether a checkpoint is of the same run."""

import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpo import __version__
from fastpo.checkpoints import checkpoint
from fastpo.config.train_config import TrainConfig
from fastpo.data.prepare import Example
from fastpo.errors import FastpoError, TrainingError
from fastpo.reference.cache import adapter_settings, frozen_fingerprint, model_fingerprint
from fastpo.report.callbacks import plain_config
from fastpo.training.distributed import World

log = logging.getLogger("fastpo")


def identify(
    model: nn.Module, examples: Sequence[Example], config: TrainConfig, world: World, *, name: str, of_base: bool,
    settled: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """run.json of a new run, before anything changes: `model` as it starts, whole on rank 0. Every rank calls it.

    name: of the model, empty where it has none. of_base: the reference is the model without its adapter, and "model"
    is that one's fingerprint. settled: what the memory has decided of the options (plan/settle.py).
    """
    fingerprint = world.first(lambda: model_fingerprint(model, without_adapter=of_base))
    return {
        "format": checkpoint.FORMAT,
        "run_id": uuid.uuid4().hex,
        "fastpo": __version__,
        "torch": torch.__version__,
        "model": fingerprint,
        "model_name": name,
        "parameters": checkpoint.parameter_shapes(model),
        "frozen": world.first(lambda: fingerprint if of_base else frozen_fingerprint(model)),
        "adapter": adapter_settings(model),
        "data": checkpoint.data_fingerprint(examples),
        "rows": len(examples),
        "step_size": config.step_size * world.size,
        "batch": config.per_device_train_batch_size * world.size,
        "world_size": world.size,
        "config": plain_config(config),
        "settled": dict(settled),
    }


def as_begun(folder: Path, identity: Mapping[str, Any], named_model: bool) -> dict[str, Any]:
    """`identity` of a run that goes on from the checkpoint `folder`: what it was begun as, for a model in memory may
    have been trained since. ConfigError where they are not one run, TrainingError where run.json is not one.

    named_model: the model was given by a name, which always means the same weights.
    """
    try:
        saved = json.loads((folder / "run.json").read_text())
        remarks = checkpoint.check_run(folder, saved, identity, named_model)
    except FastpoError:
        raise
    except Exception as error:  # another hand's JSON
        raise TrainingError(checkpoint.unreadable(folder, error)) from error
    for remark in remarks:
        log.warning("resumed from %s: %s", folder.name, remark)
    kept = {key: saved[key] for key in ("model", "run_id", "reference", "previous") if key in saved}
    return {**identity, **kept}
