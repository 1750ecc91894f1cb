"""What a resumed run needs beside the model's own files: weights, optimiser, counters and the parts' own states."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastpo.checkpoints import checkpoint, state_files
from fastpo.checkpoints.state_files import as_sharded
from fastpo.checkpoints.weights import Weights
from fastpo.errors import ConfigError
from fastpo.reference.cache import MovingReference
from fastpo.training.distributed import local
from fastpo.training.optim import Gradients
from fastpo.training.progress import Progress
from fastpo.training.random_state import rng_state


class Part(Protocol):
    """What has a state of its own, of types that `torch.load` reads with `weights_only`."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


class AsJson:
    """A part whose state is kept as a text of JSON."""

    def __init__(self, part: Part):
        self.part = part

    def state_dict(self) -> str:
        """The text."""
        return json.dumps(self.part.state_dict())

    def load_state_dict(self, text: str) -> None:
        """Go on where `state_dict` was taken."""
        self.part.load_state_dict(json.loads(text))


_LATER = ("budget",)  # parts that the first checkpoints of this format have not


class RunState:
    """Takes and puts back the state of a run. parts: by their names in trainer.pt, in the order of the file."""

    def __init__(
        self,
        weights: Weights,
        gradients: Gradients,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        parts: Mapping[str, Part],
        moving: MovingReference | None = None,
    ):
        self.weights, self.gradients, self.optimizer = weights, gradients, optimizer
        self.progress, self.parts, self.moving = progress, parts, moving

    def take(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors by name, everything else). Every rank calls it.

        A weight is saved in the most exact form there is: its fp32 master where it has one.
        """
        parameters = self.weights.parameters
        masters = self.gradients.state_dict()
        tensors = {f"weights.{n}": masters.get(n, p.detach()) for n, p in parameters.items()}
        if self.moving is not None:
            for name, value in self.moving.values.items():
                part = as_sharded(value, parameters[name]) if self.weights.sharded else value
                tensors[f"reference.{name}"] = part
        names = {id(self.gradients.stepped(p)): n for n, p in parameters.items()}
        of_optimizer, others = checkpoint.optimizer_tensors(self.optimizer, names, parameters)
        groups = [
            {k: v.item() if isinstance(v, np.generic) else v for k, v in group.items() if k != "params"}
            for group in self.optimizer.param_groups
        ]
        of_parts = {name: part.state_dict() for name, part in self.parts.items()}
        plain = {"optimizer": others, "param_groups": groups, **of_parts, **self.progress.state_dict()}
        return tensors | of_optimizer, plain

    def random(self) -> dict[str, Any]:
        """The random states of this rank: inside a step, those of its beginning."""
        return self.progress.rng or rng_state()

    def put(self, folder: Path, plain: dict[str, Any]) -> None:
        """What `take` gave, its tensors from the checkpoint `folder`, into a run that is built and has not begun."""
        tensors = self.load_weights(folder, plain["tensors"])
        stepped = {name: self.gradients.stepped(p) for name, p in self.weights.parameters.items()}
        checkpoint.restore_optimizer(self.optimizer, tensors, plain["optimizer"], stepped)
        if len(self.optimizer.param_groups) != len(plain["param_groups"]):
            raise ConfigError(
                f"{folder} has an optimiser with {len(plain['param_groups'])} groups of parameters, this run's has "
                f"{len(self.optimizer.param_groups)}: resume with the same"
            )
        for group, saved in zip(self.optimizer.param_groups, plain["param_groups"], strict=True):
            group.update(saved)
        for name, part in self.parts.items():
            part.load_state_dict(plain.get(name, {}) if name in _LATER else plain[name])
        self.progress.load_state_dict(plain)
        if self.moving is not None:
            for name, value in self.moving.values.items():
                value.copy_(tensors[f"reference.{name}"])

    def load_weights(self, folder: Path, expected: dict[str, list[Any]] | None = None) -> dict[str, Tensor]:
        """The checkpoint's weights into the model; returns all of its tensors, which are as `expected`."""
        parameters = self.weights.parameters
        tensors = state_files.load_tensors(folder / "state", parameters, expected)
        masters = self.gradients.state_dict()
        with torch.no_grad():
            for name, p in parameters.items():
                if name not in masters:
                    local(p).copy_(tensors[f"weights.{name}"])
        self.gradients.load_state_dict({name: tensors[f"weights.{name}"].float() for name in masters})
        return tensors
