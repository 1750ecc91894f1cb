"""What the benchmarks' own judges have in common: a language model is shown a text and writes its verdict."""

import abc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastpo.errors import ConfigError
from fastpo.sampling.items import Failure, Unit, Verdict
from fastpo.scoring.judges import Backend, Question, Reply
from fastpo.scoring.scoring import RAW, BaseScorer


class TextJudge(BaseScorer, abc.ABC):
    """A scorer that asks a backend of `fastpo.scoring.judges`, one that answers in text, as `benchmark` does."""

    benchmark: str
    cached = True

    def __init__(self, name: str, backend: Backend):
        self.name, self.backend, self.exact = name, backend, backend.exact

    @property
    def identity(self) -> Mapping[str, Any]:
        return {**self.key, "judge": dict(self.backend.identity)}

    @abc.abstractmethod
    def content(self, unit: Unit) -> str:
        """What the judge is shown."""

    @abc.abstractmethod
    def value(self, reply: str) -> float | Failure:
        """The verdict that was written."""

    def score(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Verdict]]:
        questions = [Question(self.content(unit)) for unit in units]
        for n, verdict in self.backend.answers(questions, self.read):
            yield units[n], verdict

    def read(self, reply: Reply) -> Verdict:
        if isinstance(reply, Failure):
            return Verdict.failed(reply.status, reply.raw[:RAW])
        if not isinstance(reply, str):
            raise ConfigError(
                f"scorer {self.name!r}: {self.benchmark}'s verdicts are written, not probabilities of labels"
            )
        found = self.value(reply)
        if isinstance(found, Failure):
            return Verdict.failed(found.status, reply[:RAW])
        return Verdict(found, raw=reply[:RAW])

    def close(self) -> None:
        self.backend.close()
