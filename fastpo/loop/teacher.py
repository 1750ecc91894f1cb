"""Questions to a model that helps before the loop: one file of replies for each round of questions."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastpo.loop.answers import Answers
from fastpo.loop.written import read_texts
from fastpo.sampling.items import Failure, Prompt, Request, Response, Sampler, Turn, seed_of

Encode = Callable[[Prompt], Sequence[int]]


class Teacher:
    """A sampler with what all requests of a stage have in common. `counts` gets what could not be used, by reason.

    `encode` is None where the engine has its own tokenizer. `name`: of the stage, in messages and seeds.
    """

    def __init__(
        self, sampler: Sampler, folder: Path, name: str, *, encode: Encode | None, seed: Any, max_failed: float,
        temperature: float, top_p: float, max_tokens: int,
    ):  # fmt: skip
        self.sampler, self.folder, self.name = sampler, folder, name
        self.encode, self.seed, self.max_failed = encode, seed, max_failed
        self.temperature, self.top_p, self.max_tokens = temperature, top_p, max_tokens
        self.counts: Counter[str] = Counter()
        folder.mkdir(parents=True, exist_ok=True)

    def request(self, id_: str, source: str, asked: str | Sequence[Turn], k: int = 0) -> Request:
        """`asked`: the user's turn, or the whole chat."""
        prompt = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
        ids = () if self.encode is None else tuple(self.encode(prompt))
        seed = seed_of(self.seed, self.name, id_, source, k)
        return Request(id_, k, source, prompt, ids, seed, self.temperature, self.top_p, 0, self.max_tokens)

    def answers(self, file: str, max_failed: float | None = None) -> Answers:
        """The file FILE.jsonl of the stage's folder."""
        share = self.max_failed if max_failed is None else max_failed
        return Answers(self.folder / f"{file}.jsonl", name=f"prepare.{self.name}: {file}", max_failed=share)

    def ask(self, file: str, requests: Sequence[Request]) -> list[Response | Failure]:
        """One round."""
        with self.answers(file) as answers:
            replies = answers.ask(self.sampler, requests, file)
            if answers.failed:
                self.counts[f"{file}: failed"] += len(answers.failed)
        return replies

    def whole(self, what: str, answer: Response | Failure) -> Response | None:
        """A reply that is there and was not cut off."""
        if isinstance(answer, Failure):
            return None
        if not answer.finished:
            self.counts[f"{what}: cut off"] += 1
            return None
        return answer

    def texts(self, what: str, answer: Response | Failure) -> list[str] | None:
        """The JSON list of texts of a reply."""
        found = self.whole(what, answer)
        texts = None if found is None else read_texts(found.text)
        if found is not None and texts is None:
            self.counts[f"{what}: unparsed"] += 1
        return texts

    def said(self) -> str:
        """The counts, in a message."""
        return said(self.counts)


def said(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items()) or "nothing was left out"
