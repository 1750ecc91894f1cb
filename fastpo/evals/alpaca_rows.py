"""What AlpacaEval 2 reads: a judge's annotations, and what the leaderboard holds fixed (difficulties, gamed baselines).

As the alpaca-eval package writes them, or as plain arrays; refused by count and name where they are wrong.
"""

import csv
import gc
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastpo.data.sources import load_rows
from fastpo.errors import DataError, did_you_mean, one_line, quoted, shown
from fastpo.evals.asked import named, refuse, refuse_repeated

HUB, GAMED = "tatsu-lab/alpaca_eval", "df_gamed.csv"
_COLUMNS = ("preference", "index", "std_delta_len", "instruction_difficulty")
_REPEATED = "prompts occur more than once"


@dataclass(frozen=True, eq=False)
class Annotations:
    """One model against one baseline: a row an instruction, in the order of the evaluation set.

    Arrays [N] of float64: `preferences` in [0, 1], P(the model's answer is the better); `lengths` and
    `baseline_lengths`, characters of the answers. NaN is what is missing. `prompts`, where given, are the N
    instructions. DataError for preferences out of range, infinite or negative lengths, instructions that are there
    twice and arrays that do not fit, by count and name.
    """

    preferences: np.ndarray
    lengths: np.ndarray
    baseline_lengths: np.ndarray
    model: str = "model"
    baseline: str = "baseline"
    prompts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("preferences", "lengths", "baseline_lengths"):
            try:
                array = np.array(getattr(self, name), dtype=np.float64)
            except (TypeError, ValueError):
                raise DataError(f"{self.model}: {name} must be numbers") from None
            if array.ndim != 1 or len(array) != len(self.preferences):
                raise DataError(
                    f"{self.model}: {name} has the shape {array.shape}, not that of {len(self.preferences)} preferences"
                )
            object.__setattr__(self, name, array)
            low, high = (0, 1) if name == "preferences" else (0, np.finfo(np.float64).max)
            what = "preferences are not in [0, 1]" if name == "preferences" else f"{name} are negative or infinite"
            bad = [f"row {row}: {array[row]:g}" for row in np.flatnonzero((array < low) | (array > high))]
            refuse(what, bad, len(array), who=self.model)
        if not len(self.preferences):
            raise DataError(f"{self.model}: no annotations")
        if self.prompts is not None:
            object.__setattr__(self, "prompts", tuple(self.prompts))
            if len(self.prompts) != len(self.preferences):
                raise DataError(f"{self.model}: {len(self.prompts)} prompts and {len(self.preferences)} preferences")
            refuse_repeated(_REPEATED, self.prompts, who=self.model)

    def __len__(self) -> int:
        return len(self.preferences)

    def of_prompts(self, prompts: Sequence[str], allow_missing: bool = False) -> "Annotations":
        """The same rows in the order of `prompts`. DataError for annotations of other prompts, and for prompts without
        an annotation unless `allow_missing`, which leaves them out; by count and name."""
        if self.prompts is None:
            raise DataError(f"{self.model}: annotations without prompts cannot be compared with the prompts given")
        refuse_repeated(_REPEATED, prompts)
        row = {prompt: number for number, prompt in enumerate(self.prompts)}
        wanted = set(prompts)
        strange = [prompt for prompt in self.prompts if prompt not in wanted]
        refuse("annotations are of other prompts", strange, len(self), who=self.model)
        if not allow_missing:
            lacking = [prompt for prompt in prompts if prompt not in row]
            refuse("prompts have no annotation", lacking, len(prompts), "; allow_missing=True leaves them out",
                   who=self.model)  # fmt: skip
        order = [row[prompt] for prompt in prompts if prompt in row]
        return replace(
            self, preferences=self.preferences[order], lengths=self.lengths[order],
            baseline_lengths=self.baseline_lengths[order], prompts=tuple(self.prompts[number] for number in order),
        )  # fmt: skip


def read_annotations(source: Any, *, model: str | None = None) -> Annotations:
    """Annotations as the alpaca-eval package writes them: rows, or the path of a JSON file (.gz), or of its folder.

    A row has `instruction`, `output_1` (the baseline's), `output_2`, `generator_1`, `generator_2` and `preference`:
    1 to 2, where 2 is the model's and 0 means 1.5, or null. Rows of several models need `model`. DataError in one line
    for what cannot be read, columns that are not there, and preferences out of range.
    """
    if isinstance(source, Annotations):
        return source
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir():
            inside = [path / name for name in ("annotations.json", "annotations.json.gz") if (path / name).is_file()]
            if not inside:
                raise DataError(f"{path}: no annotations.json in this folder")
            path = inside[0]
        where, rows = str(path), _rows_of_file(path)
    else:
        where, rows = "annotations", load_rows(source)
    rows = list(rows)
    if not rows:
        raise DataError(f"{where}: no annotations")
    for column in ("output_1", "output_2", "generator_2", "preference"):
        lacking = sum(column not in row for row in rows)
        if lacking:
            hint = did_you_mean(column, rows[0])
            raise DataError(f"{where}: {lacking} of {len(rows)} annotations have no {column!r}{hint}")
    names = dict.fromkeys(row["generator_2"] for row in rows)
    if model is not None:
        if model not in names:
            raise DataError(f"{where}: no annotations of {model!r}{did_you_mean(model, map(str, names))}")
        rows = [row for row in rows if row["generator_2"] == model]
    elif len(names) > 1:
        raise DataError(f"{where}: annotations of {len(names)} models ({named(names)}): choose one with model=")
    baselines = dict.fromkeys(row.get("generator_1", "baseline") for row in rows)
    if len(baselines) > 1:
        raise DataError(f"{where}: annotations against {len(baselines)} baselines: {named(baselines)}")
    name = str(rows[0]["generator_2"])
    preferences = np.array([_number(row["preference"], name, number) for number, row in enumerate(rows)])
    bad = np.flatnonzero((preferences != 0) & ((preferences < 1) | (preferences > 2)))
    refuse("preferences are neither in [1, 2] nor 0, a tie", [f"row {row}: {preferences[row]:g}" for row in bad],
           len(rows), who=name)  # fmt: skip
    asked = [row.get("instruction") for row in rows]
    return Annotations(
        np.where(preferences == 0, 0.5, preferences - 1),
        np.array([_length(row["output_2"], name, number) for number, row in enumerate(rows)]),
        np.array([_length(row["output_1"], name, number) for number, row in enumerate(rows)]),
        model=name, baseline=str(next(iter(baselines))),
        prompts=None if any(prompt is None for prompt in asked) else tuple(map(str, asked)),
    )  # fmt: skip


def _rows_of_file(path: Path) -> Any:
    """orjson reads a judge's log-probabilities in half the time, where it is installed.

    The collector is off meanwhile: a hundred thousand new objects, none of them rubbish, have it look through all of
    the process several times.
    """
    if path.suffix == ".json":
        collecting = gc.isenabled()
        gc.disable()
        try:
            import orjson

            rows = orjson.loads(path.read_bytes())
            if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
                return rows
        except (ImportError, ValueError, OSError):
            pass  # what is wrong with it is the other reader's to say
        finally:
            if collecting:
                gc.enable()
    return load_rows(path)


def _number(value: Any, model: str, row: int) -> float:
    if value is None:
        return np.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{model}: the preference of row {row} is {shown(value)}, not a number")
    return float(value)


def _length(text: Any, model: str, row: int) -> float:
    if text is None or (isinstance(text, float) and np.isnan(text)):
        return np.nan
    if not isinstance(text, str):
        raise DataError(f"{model}: the answer of row {row} is a {type(text).__name__}, not a text")
    return len(text)


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the leaderboard holds fixed: difficulties of the M instructions, and its two gamed baselines' annotations.

    Arrays of float64: `difficulties` [M]; of the gamed rows, `gamed_preferences` in [0, 1] [G], `gamed_lengths`, the
    difference of lengths (baseline's minus the gamed one's) over its standard deviation [G], and `gamed_index`, which
    instruction they are of [G]. `prompts` [M], where given, are the instructions: annotations are then matched by them,
    otherwise by their place. Without gamed rows only the form `length_controlled_noreg` can be had.
    """

    difficulties: np.ndarray
    gamed_preferences: np.ndarray = field(default_factory=lambda: np.zeros(0))
    gamed_lengths: np.ndarray = field(default_factory=lambda: np.zeros(0))
    gamed_index: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    prompts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("difficulties", "gamed_preferences", "gamed_lengths", "gamed_index"):
            kind = np.int64 if name == "gamed_index" else np.float64
            array = np.array(getattr(self, name), dtype=kind)
            object.__setattr__(self, name, array)
            if not np.isfinite(array).all():
                raise DataError(
                    f"calibration: {int((~np.isfinite(array)).sum())} of {len(array)} {name} are not finite"
                )
        if not len(self.gamed_preferences) == len(self.gamed_lengths) == len(self.gamed_index):
            raise DataError("calibration: the gamed baselines' arrays differ in length")
        bad = np.flatnonzero((self.gamed_preferences < 0) | (self.gamed_preferences > 1))
        if len(bad):
            raise DataError(f"calibration: {len(bad)} preferences of the gamed baselines are not in [0, 1]")
        bad = np.flatnonzero((self.gamed_index < 0) | (self.gamed_index >= len(self.difficulties)))
        if len(bad):
            raise DataError(f"calibration: {len(bad)} gamed rows are of instructions without a difficulty")
        if self.prompts is not None:
            object.__setattr__(self, "prompts", tuple(self.prompts))
            if len(self.prompts) != len(self.difficulties):
                raise DataError(f"calibration: {len(self.prompts)} prompts, {len(self.difficulties)} difficulties")
            refuse_repeated(_REPEATED, self.prompts, who="calibration")


def load_calibration(source: str | os.PathLike[str] = HUB, *, prompts: Sequence[str] | None = None) -> Calibration:
    """The leaderboard's difficulties and gamed baselines: the path of df_gamed.csv or its folder, or a hub data set.

    `prompts` are the M instructions in the evaluation set's order, for annotations in another order or with gaps.
    DataError in one line where it cannot be had.
    """
    path = Path(source)
    if path.is_dir():
        path = path / GAMED
    if not path.is_file():
        if path.suffix == ".csv" or path.is_absolute() or str(source).count("/") != 1:
            raise DataError(f"{path}: no such file of instruction difficulties and gamed baselines ({GAMED})")
        path = _from_hub(str(source))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {one_line(error)}") from None
    table = csv.DictReader(io.StringIO(text))
    for column in _COLUMNS:
        if column not in (table.fieldnames or ()):
            known = table.fieldnames or []
            raise DataError(f"{path} has no column {column!r}, only {quoted(known)}{did_you_mean(column, known)}")
    rows = list(table)
    try:
        values = np.array([[float(row[column]) for column in _COLUMNS] for row in rows]).reshape(-1, len(_COLUMNS))
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: {one_line(error)}") from None
    index = values[:, 1].astype(np.int64)
    found = dict(zip(index[::-1].tolist(), values[::-1, 3]))  # the first row of an instruction
    if sorted(found) != list(range(len(found))):
        raise DataError(f"{path}: its {len(found)} instructions are not numbered from 0 to {len(found) - 1}")
    return Calibration(
        np.array([found[number] for number in range(len(found))]), values[:, 0], values[:, 2], index,
        prompts=None if prompts is None else tuple(prompts),
    )  # fmt: skip


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id=name, filename=GAMED, repo_type="dataset"))
    except Exception as error:  # its errors have no common class: the network's, the hub's, a name it does not take
        raise DataError(
            f"the instruction difficulties and gamed baselines ({GAMED} of the data set {name}) are not here "
            f"({type(error).__name__}): give the file's path; without it only length_controlled_minimal can be had"
        ) from None
