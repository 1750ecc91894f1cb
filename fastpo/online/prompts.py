"""The prompts of an online run: rows of `prompt` and any other columns, which reward functions get.

Until responses are drawn a row has stand-ins, as many and as long as responses may become: by them the run decides how
it packs, what its memory holds and whether the model computes as it should.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fastpo.data import mixing, sources
from fastpo.data.example import Example
from fastpo.data.packing import trunk_tokens
from fastpo.data.report import DataReport
from fastpo.errors import DataError, nearest, quoted
from fastpo.sampling import make
from fastpo.sampling.items import Prompt, seed_of
from fastpo.training.run_data import DataSets, open_table

log = logging.getLogger("fastpo")

PROBE_TOKENS = 16  # of a response that the guard looks at


@dataclass(slots=True)
class Asked(Example):
    """A prompt with the columns of its row."""

    prompt: Prompt = ""
    row: Mapping[str, Any] = field(default_factory=dict)


class PromptSets(DataSets):
    """Reads prompts in the place of rows with responses; train and evaluation sets hold `Asked`."""

    count = 2  # responses of a prompt
    longest: int | None = None  # tokens of a prompt
    apart = False  # whether each response may go through the model alone
    checks: Sequence[Callable[[list[str]], object]] = ()  # of the names of the columns

    def _of_one(self, part: mixing.Part, split: str, name: str) -> tuple[list[Example], DataReport]:
        config, count = self.config, self.count
        table = open_table(part, split, config.dataset_config)
        if isinstance(table, sources.Stream):
            raise DataError("an online run reads its prompts more than once: pass a Dataset, or list(dataset.take(n))")
        found = sources.column_names(table)
        if "prompt" not in found:
            close = nearest("prompt", found, 0.4)
            hint = f"; did you mean {close!r}?" if close else f", only {quoted(found)}"
            raise DataError(f"{config.losses[0]} answers prompts, and the {name} data have no column 'prompt'{hint}")
        for check in self.checks:
            check(list(found))
        report = DataReport(columns=list(found))
        kept: list[tuple[int, Mapping[str, Any]]] = []
        for number, row in enumerate(table):
            report.rows += 1
            why = _wrong(row["prompt"])
            if why is None:
                kept.append((number, dict(row)))
            elif config.invalid_rows == "raise":
                raise DataError(f"row {number}: 'prompt' {why}")
            else:
                report.dropped[why] = report.dropped.get(why, 0) + 1
        if not kept:
            raise DataError(f"the {name} data have no prompt")
        prompts = [_prompt(row["prompt"]) for _, row in kept]
        ids = make.prompts_ids(self.tokenizer, prompts, config.chat_template_kwargs)
        stand_ins = stand_in(count, config.max_completion_length)
        examples: list[Example] = []
        for (number, row), prompt, prompt_ids in zip(kept, prompts, ids, strict=True):
            if not prompt_ids:
                raise DataError(f"row {number}: 'prompt' has no tokens")
            if self.longest is not None and len(prompt_ids) > self.longest:
                why = f"more than {self.longest} tokens: max_length less max_completion_length"
                report.dropped[why] = report.dropped.get(why, 0) + 1
                continue
            array = np.array(prompt_ids, np.int32)
            examples.append(Asked(array, list(stand_ins), prompt=prompt, row=row))
            report.kept_rows.append(number)
            report.prompt_tokens += len(array)
        if not examples:
            raise DataError(f"the {name} data have no prompt of at most {self.longest} tokens: set max_length")
        report.kept = len(examples)
        report.longest_sequence = max(len(e.prompt_ids) for e in examples) + config.max_completion_length
        return examples, report

    def reported(self) -> dict[str, list[str]]:
        """Metrics that an evaluation of each set will report."""
        return {name: ["reward", "reward_std", "completions/mean_length"] for name in self.evals}

    def show(self, example: Example) -> None:
        text = self.tokenizer.decode(example.prompt_ids.tolist(), skip_special_tokens=False)
        log.info("a prompt, as it is answered: %r", text if len(text) <= 600 else f"{text[:400]} [...] {text[-200:]}")

    def identified(self) -> list[Example]:
        """The rows by which a run that goes on is known: a prompt as often as it is answered, whatever the length, and
        what reward functions read beside it."""
        return [
            replace(e, responses=[r[:1] for r in e.responses], pair_columns={"row": [float(_number(e.row))]})
            for e in self.train
            if isinstance(e, Asked)
        ]

    def sized(self) -> list[Example]:
        return [replace(e, responses=e.responses[:1], share=False) for e in self.train] if self.apart else self.train

    def say_sharing(self, max_tokens: int) -> None:
        longest = max(map(trunk_tokens, self.sized()), default=0)
        if longest > max_tokens:
            log.warning("a prompt with %s may have %d tokens, more than max_tokens=%d: then they are a micro-batch of "
                        "their own, and take the memory of one", "a response" if self.apart else "its responses",
                        longest, max_tokens)  # fmt: skip

    def probe(self, places: Sequence[int]) -> list[Example]:
        """The rows for the guard: with few short responses."""
        out = []
        for i in places:
            e = self.train[i]
            out.append(replace(e, responses=[r[:PROBE_TOKENS] for r in e.responses[:2]]))
        return out


def _number(row: Mapping[str, Any]) -> int:
    """Of the columns of a row: of a value that JSON has no form of, only that it is there."""
    given = {name: value for name, value in row.items() if value is not None}
    return seed_of(json.loads(json.dumps(given, default=lambda value: type(value).__name__)))


def stand_in(count: int, length: int) -> list[np.ndarray]:
    """`count` responses of this many tokens, as different as 0 and 1 make them: any model has these tokens."""
    digits = np.arange(min(length, 30))
    out = np.zeros((count, length), np.int32)
    out[:, digits] = np.arange(count)[:, None] >> digits & 1
    return list(out)


def _prompt(value: Any) -> Prompt:
    return value if isinstance(value, str) else [dict(turn) for turn in value]


def _wrong(value: Any) -> str | None:
    """What is wrong with a prompt, if anything is."""
    if isinstance(value, str):
        return None if value else "is empty"
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        return f"is {type(value).__name__}, neither a text nor a list of turns"
    if not value:
        return "has no turns"
    for turn in value:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            return "has a turn without 'role'"
        if not isinstance(turn.get("content"), str):
            return "has a turn whose 'content' is no text"
    return None
