"""Supervision before the loop: a policy from demonstrations, which is what the first iteration starts from.

    rows.jsonl   the rows, where they are made here: of a column, or of pairs
    train/       fastpo.train's folder, the policy

Of pairs, EVOLVE's (arXiv:2502.05605) that teach to refine: of (x, y_w, y_l) one row x -> y_w, and one
(x, y_l, z) -> y_w, z being what asks for a better answer.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpo.data.sources import load_rows
from fastpo.errors import ConfigError, DataError, nearest, quoted
from fastpo.loop.config import Options, Refine
from fastpo.loop.config import section as read_section
from fastpo.loop.pairs import read_pairs
from fastpo.loop.requests import refined_prompt
from fastpo.loop.teacher import Encode
from fastpo.sampling.items import Sampler
from fastpo.sampling.parts import write_lines
from fastpo.trainer import train

_OURS = ("output_dir", "loss_type", "resume_from_checkpoint")


@dataclass(frozen=True)
class Supervise:
    """The options of `sft`."""

    model: str | None = None  # None: the run's
    rows: Any = None  # prompts with completions, in any layout that fastpo.train reads
    column: str | None = None  # of rows: the answer to `prompt`, a text
    pairs: Any = None  # in the place of rows: preference pairs, for rows that refine
    template: str = Refine().template  # z
    train: Options = field(default_factory=dict)  # of fastpo.train


def sft(
    spec: Mapping[str, Any], teacher: Sampler | None, folder: Path, *, encode: Encode | None = None, seed: Any = 42,
    max_failed: float = 0.0, model: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Trains `model` with loss_type=sft into folder/train; returns counts, and the policy's folder as `policy`.

    No teacher is asked. An interrupted training goes on from its last checkpoint.
    """
    options: Supervise = read_section(Supervise, spec, "prepare.sft")
    start = options.model or model
    if start is None:
        raise ConfigError("prepare.sft needs model, the policy that is trained")
    if (options.rows is None) is (options.pairs is None):
        raise ConfigError("prepare.sft needs rows or pairs, and not both")
    if options.column is not None and options.rows is None:
        raise ConfigError("prepare.sft.column is a column of prepare.sft.rows")
    wrong = next((name for name in _OURS if name in options.train), None)
    if wrong is not None:
        raise ConfigError(f"prepare.sft.train.{wrong} is set by the stage: leave it out")
    folder.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    rows: Any = options.rows
    if options.pairs is not None:
        rows = folder / "rows.jsonl"
        made = refining_rows(options.pairs, options.template, counts)
        counts["rows"] = write_lines(rows, made)
    elif options.column is not None:
        rows = folder / "rows.jsonl"
        counts["rows"] = write_lines(rows, _of_column(options.rows, options.column, counts))
    given: dict[str, Any] = {"seed": seed} if isinstance(seed, int) else {}
    result = train(
        start, str(rows) if isinstance(rows, str | Path) else rows, args={**given, **options.train, "loss_type": "sft"},
        output_dir=str(folder / "train"), resume_from_checkpoint="auto",
    )  # fmt: skip
    measured = {name: value for name, value in result.metrics.items() if isinstance(value, int | float)}
    return {**dict(sorted(counts.items())), **measured, "policy": str(folder / "train")}


def refining_rows(pairs: Any, template: str, counts: Counter[str]) -> list[dict[str, Any]]:
    """x -> y_w and (x, y_l, z) -> y_w of every pair."""
    out = []
    for pair in read_pairs(pairs, "prepare.sft.pairs", counts):
        text = isinstance(pair.prompt, str)
        answer: Any = pair.chosen if text else [{"role": "assistant", "content": pair.chosen}]
        refining = refined_prompt(pair.prompt, pair.rejected, template)
        out.append({"id": pair.id, "prompt": pair.prompt, "completion": answer})
        out.append({"id": f"{pair.id}/refine", "prompt": refining, "completion": answer})
    return out


def _of_column(source: Any, column: str, counts: Counter[str]) -> list[dict[str, Any]]:
    """prompt -> the text of a column; rows without one are left out."""
    out = []
    for number, row in enumerate(load_rows(source)):
        for name in ("prompt", column):
            if name not in row:
                near = nearest(name, row, 0.5)
                hint = f": did you mean {near!r}?" if near else f", only {quoted(row)}"
                raise DataError(f"prepare.sft.rows: row {number} has no column {name!r}{hint}")
        prompt, answer = row["prompt"], row[column]
        if not isinstance(answer, str) or not answer.strip():
            counts["no answer"] += 1
            continue
        done: Any = answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
        out.append({"prompt": prompt, "completion": done})
    if not out:
        raise DataError(f"prepare.sft.rows: no row has a text in {column!r}")
    return out
