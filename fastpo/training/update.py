"""The optimiser step: gradients, optimiser and learning-rate schedule of a run."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError
from fastpo.losses.table import DEGREE
from fastpo.training.distributed import World
from fastpo.training.optim import Gradients, build_optimizer, build_scheduler, check_given


class Update:
    """Built from the options, or around an optimiser and a schedule that were passed in (`given`)."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        config: TrainConfig,
        world: World,
        given: tuple[torch.optim.Optimizer | None, Any],
        steps: int,
    ):
        """parameters: the trainable ones by name. steps: of the run, over which the learning rate moves."""
        optimizer, scheduler = given
        self.own_optimizer = optimizer is None
        self.max_grad_norm = config.max_grad_norm
        masters = "fp32" if config.master_weights == "auto" else config.master_weights
        self.gradients = Gradients(
            dict(parameters), master_weights=masters if self.own_optimizer else "none", seed=config.seed,
            group=world.group, sharded=config.fsdp != "no",
        )  # fmt: skip
        if optimizer is not None:
            check_given(optimizer, dict(parameters))
        self.optimizer = build_optimizer(model, config, self.gradients) if optimizer is None else optimizer
        self.scheduler = build_scheduler(self.optimizer, config, steps) if scheduler is None else scheduler

    def kept_schedule(self) -> Any:
        """The schedule, as a checkpoint keeps it."""
        return LearningRate(self.scheduler)

    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self.scheduler.get_last_lr()[0])

    def norm(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clips the gradients; (their norm before, whether it and the loss are finite), both [] on the device."""
        norm = self.gradients.clip_(self.max_grad_norm)
        return norm, torch.isfinite(norm).to(loss.device) & torch.isfinite(loss)

    def step(self, finite: Tensor, then: Callable[[], object]) -> None:
        """The weights move, unless the step is not finite; `then()`, and the learning rate goes on in any case."""
        self.gradients.step_(self.optimizer, finite)
        then()
        self.scheduler.step()


class LearningRate:
    """A learning-rate schedule as a checkpoint keeps it: where it stands. What it gives from there is this run's, which
    may have more steps than the one before."""

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state)
        if isinstance(self.scheduler, LambdaLR):  # others have no closed form, and go on from the rate that was kept
            of_groups = zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
            self.scheduler._last_lr = [base * factor(self.scheduler.last_epoch) for base, factor in of_groups]
            for group, rate in zip(self.scheduler.optimizer.param_groups, self.scheduler._last_lr, strict=True):
                group["lr"] = rate


def check_optimizers(given: tuple[Any, Any] | None, config: TrainConfig) -> tuple[Any, Any]:
    """What was passed as `optimizers`; ConfigError for one that fsdp would leave behind."""
    optimizer, scheduler = (None, None) if given is None else given
    if optimizer is not None and DEGREE in config.losses:
        raise ConfigError(f"{DEGREE} has a head that an optimiser made before does not step: set optim instead")
    if optimizer is not None and config.fsdp != "no":
        raise ConfigError("fsdp splits the parameters, so an optimiser made before does not fit: set optim instead")
    return optimizer, scheduler
