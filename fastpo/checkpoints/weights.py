"""The weights of a run as a save needs them: whole on one rank, named, and known to be numbers."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fastpo.checkpoints import state_files
from fastpo.data.packing import collate
from fastpo.data.prepare import Example
from fastpo.training.distributed import Engine, World, full_state, local
from fastpo.training.memory import is_out_of_memory, release


class Weights:
    """A run's model and its trained parameters, as this rank holds them.

    parameters: those that are trained, by name; shards, where the engine has split them. dtypes: of all parameters as
    the model was loaded, by name, in which a split model is written.
    """

    def __init__(
        self,
        engine: Engine,
        parameters: Mapping[str, nn.Parameter],
        dtypes: Mapping[str, torch.dtype],
        world: World,
    ):
        self.engine, self.parameters, self.dtypes, self.world = engine, parameters, dtypes, world

    @property
    def model(self) -> Any:
        return self.engine.policy.model

    @property
    def sharded(self) -> bool:
        return self.engine.sharded

    @property
    def adapter(self) -> bool:
        """Whether an adapter is trained, and the rest is as it was."""
        return hasattr(self.model, "peft_config")

    def detached(self) -> AbstractContextManager[Any]:
        """Inside, the model is as it came, for its own methods."""
        return self.engine.policy.detached()

    def whole(self) -> dict[str, Tensor] | None:
        """Of a sharded model, what is to be written, on rank 0 in the dtypes it was loaded in; else None. Every rank
        calls it."""
        if not self.sharded:
            return None
        return full_state(self.model, self.world, self.dtypes, set(self.parameters) if self.adapter else None)

    def first_nonfinite(self) -> str | None:
        """The first parameter that holds a value which is no number on any rank. Every rank calls it."""
        bad = state_files.first_nonfinite({name: local(p) for name, p in self.parameters.items()})
        return next((name for name in self.world.gather(bad) if name is not None), None)


class WeightCheck:
    """Whether weights hold numbers, and give some.

    rows: a few short ones of the training data. around: entered for a pass over them (autocast); inside it the policy
    is attached.
    """

    def __init__(self, weights: Weights, rows: Sequence[Example], around: Callable[[], AbstractContextManager[Any]]):
        self.weights, self.rows, self.around = weights, rows, around

    def wrong(self, closely: bool) -> str | None:
        """What is wrong with the weights, or None; `closely`: with what they give to rows too, for finite weights of
        1e30 are as lost as NaN. Every rank calls it."""
        bad = self.weights.first_nonfinite()
        if bad is not None:
            return f"the weights are not finite (first {bad})"
        if closely and not all(self.weights.world.gather(self._gives_numbers())):
            return "the weights are finite, but what they give to ordinary rows is not: they are lost"
        return None

    def _gives_numbers(self) -> bool:
        """Whether log-probabilities of the rows are finite, and the gradients of their mean; sharded ranks leave out
        the gradients, which FSDP would reduce."""
        engine, parameters, device = self.weights.engine, self.weights.parameters, self.weights.world.device
        batch = collate(self.rows, range(len(self.rows))).to(device)
        try:
            with self.around(), torch.set_grad_enabled(not engine.sharded):
                logp = engine(lambda: engine.policy.read(batch))
            if engine.sharded or not bool(logp.isfinite().all()):
                return bool(logp.isfinite().all())
            of_each = torch.autograd.grad(logp.mean(), list(parameters.values()), allow_unused=True)
            found = {name: g for name, g in zip(parameters, of_each, strict=True) if g is not None}
            return state_files.first_nonfinite(found) is None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            release(device)
            return True  # a device that is full says nothing about the weights
