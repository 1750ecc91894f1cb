"""A sampler beside this process: it is given the weights of each generation, and held to them by what it says of its
own tokens."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastpo.config.online import Rollouts as Asks
from fastpo.errors import ConfigError
from fastpo.models.policy import Policy
from fastpo.sampling.check_sampler import check_sampler
from fastpo.sampling.items import Request, Response, Sampler
from fastpo.sampling.make import make_sampler
from fastpo.training.distributed import World

log = logging.getLogger("fastpo")
FOLDERS = ("a", "b")  # of weights, in turn: a server may still read the last ones


class _Section:
    """A section of the options as samplers are made of."""

    def __init__(self, engine: str, options: dict[str, Any]):
        self.engine, self.options = engine, options


class Served:
    """Gives a sampler new weights. save: writes the whole model into a folder, on rank 0; every rank calls it."""

    def __init__(
        self, sampler: Sampler, folder: Path, save: Callable[[Path], object], world: World, *, given: bool = False
    ):
        """given: by the user, who says how it comes to new weights, by `update(folder)`, or sees to it."""
        self.sampler, self.folder, self.save, self.world, self.given = sampler, folder, save, world, given
        self.generation = 0
        self._unchecked = False

    @classmethod
    def of_options(
        cls, asks: Asks, policy: Policy, tokenizer: Any, folder: Path, save: Callable[[Path], object], world: World
    ) -> "Served":
        """What `sampler={engine: ..., ...}` names. ConfigError for an adapter, of which a server would need the merged
        weights at every generation."""
        if hasattr(policy.model, "peft_config"):
            raise ConfigError(
                f"sampler.engine={asks.engine} is given whole models, and this run trains an adapter: leave sampler "
                "out (the policy answers in this process), or peft_config"
            )
        section = _Section(asks.engine, dict(asks.sampler))
        start = folder / "sampler" / FOLDERS[0]
        return cls(make_sampler(section, start, tokenizer, folder), folder / "sampler", save, world)

    def refresh(self) -> None:
        """From now on the sampler has the weights as they are. Every rank calls it."""
        update = getattr(self.sampler, "update", None)
        if update is None:
            if not self.given:
                raise ConfigError(f"a sampler of {type(self.sampler).__name__} takes no new weights while it runs")
            return
        into = self.folder / FOLDERS[self.generation % len(FOLDERS)]
        if self.world.main:
            into.mkdir(parents=True, exist_ok=True)
        self.save(into)
        said = self.world.first(lambda: update(into))
        if self.generation == 0:
            log.info("sampler: %s", said)
        self.generation += 1

    def check(self, answers: Sequence[tuple[int, Response, Any]]) -> dict[str, float]:
        """Holds what the sampler says of its tokens against our own log-probabilities: (row, response, ours [tokens]).

        TrainingError where it has other weights; a metric under TRL's name.
        """
        samples = [(Request(str(row), 0, response.source, "", (), 0), response) for row, response, _ in answers]
        found = check_sampler(samples, own=[ours for *_, ours in answers])
        if found["compared"]:
            return {"sampling/sampling_logp_difference/mean": float(found["difference"])}
        if not self._unchecked and answers:
            log.warning("sampler: %s", found["why"])
            self._unchecked = True
        return {}
