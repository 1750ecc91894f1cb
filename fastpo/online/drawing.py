"""Responses of the policy as it is: what is asked of its samplers, and who of several processes asks it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from fastpo.config.online import Rollouts
from fastpo.config.train_config import TrainConfig
from fastpo.errors import TrainingError
from fastpo.losses.online import AGAINST_MIXTURE, AGAINST_REFERENCE, MIXTURE, POLICY
from fastpo.online.prompts import Asked
from fastpo.sampling.items import Failure, Request, Response, Sampler, seed_of
from fastpo.training.distributed import World

REFERENCE = "reference"  # the source of a response that the reference gave; MIXTURE that of one of both


@dataclass(frozen=True)
class Drawn:
    """A prompt's responses, in the order in which they were asked for; None where one could not be had."""

    row: int
    responses: tuple[Response | None, ...]
    failures: tuple[Failure, ...] = ()


class Drawing:
    """Draws responses. samplers: by source. within: entered while a sampler in this process works."""

    def __init__(
        self, config: TrainConfig, asks: Rollouts, draws: str, world: World, samplers: Mapping[str, Sampler],
        within: Callable[[], AbstractContextManager[Any]],
    ):  # fmt: skip
        self.config, self.asks, self.draws, self.world = config, asks, draws, world
        self.samplers, self.within = samplers, within

    def sources(self, count: int, draws: str) -> list[tuple[str, int]]:
        """Who is asked for how many of a prompt's `count` responses."""
        if draws == POLICY:
            return [(POLICY, count)]
        if draws == MIXTURE:
            return [(MIXTURE, count)]
        other = MIXTURE if draws == AGAINST_MIXTURE else REFERENCE
        assert draws in (AGAINST_MIXTURE, AGAINST_REFERENCE)
        return [(POLICY, (count + 1) // 2), (other, count // 2)]

    def __call__(
        self,
        asked: Mapping[int, Asked],
        count: int,
        *seed: Any,
        temperature: float | None = None,
        draws: str | None = None,
    ) -> list[Drawn]:
        """`count` responses to each prompt, by its row; `seed` and the request's name seed each. `draws`: of whom;
        None: as the loss has it. Every rank calls it, and has all of them afterwards. The batches do not depend on the
        ranks, nor do the responses."""
        found: dict[tuple[str, str, int], Response | Failure] = {}
        sources = self.sources(count, draws or self.draws)
        for source, n in sources:
            sampler = self.samplers[source]
            requests = [
                self._request(row, e, source, k, seed, temperature) for row, e in asked.items() for k in range(n)
            ]
            mine = sampler.batches(requests)[self.world.rank :: self.world.size]
            if not sampler.exact:  # a server answers them all at a time, to one process
                mine = [requests] if self.world.main else []
            found |= self._sampled(sampler, mine)
        everywhere = {unit: r for part in self.world.gather(found) for unit, r in part.items()}
        out = []
        for row in asked:
            given = [everywhere[str(row), source, k] for source, n in sources for k in range(n)]
            responses = tuple(None if isinstance(r, Failure) or not r.token_ids else r for r in given)
            out.append(Drawn(row, responses, tuple(r for r in given if isinstance(r, Failure))))
        return out

    def _sampled(self, sampler: Sampler, batches: Sequence[Sequence[Request]]) -> dict[tuple[str, str, int], Any]:
        def work() -> dict[tuple[str, str, int], Any]:
            with self.within():
                return {request.unit: answer for batch in batches for request, answer in sampler.sample(batch)}

        found, asked = self.world.all_do(work), sum(map(len, batches))
        if len(found) != asked:
            raise TrainingError(f"the sampler answered {len(found)} of {asked} requests")
        return found

    def _request(
        self, row: int, asked: Asked, source: str, k: int, seed: tuple[Any, ...], temperature: float | None
    ) -> Request:
        config, asks = self.config, self.asks
        return Request(
            str(row), k, source, asked.prompt, tuple(asked.prompt_ids.tolist()), seed_of(*seed, row, source, k),
            asks.temperature if temperature is None else temperature, config.top_p, config.top_k,
            asks.max_completion_length, min_p=config.min_p or 0.0, repetition_penalty=config.repetition_penalty,
        )  # fmt: skip

    def close(self) -> None:
        for sampler in self.samplers.values():
            sampler.close()
