"""AlpacaEval 2: raw and length-controlled win rates from a judge's annotations, with standard errors that hold.

The raw win rate is the mean preference. The length-controlled one is what a logistic regression of the preferences on
the difference of lengths and the instructions' difficulty predicts at equal lengths (2404.04475), as the leaderboard's
code has it. The difficulties and the annotations of the two gamed baselines are its file df_gamed.csv; without it the
figure is that of the minimal form and is called so.
"""

import csv
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastpo.data.sources import load_rows
from fastpo.errors import ConfigError, DataError, did_you_mean, one_line, quoted, shown
from fastpo.evals import glm

HUB, GAMED = "tatsu-lab/alpaca_eval", "df_gamed.csv"
FULL, NOREG, MINIMAL = "length_controlled_winrate", "length_controlled_noreg", "length_controlled_minimal"
FORMS = (FULL, NOREG, MINIMAL)
GAMED_WEIGHT = 0.2 / 2  # of a gamed baseline's row: lambda over the two baselines
_COLUMNS = ("preference", "index", "std_delta_len", "instruction_difficulty")
_NAMED = 3  # names that a message gives
_AT_ONCE = 50  # resamples that are fitted together


def _named(names: Iterable[Any]) -> str:
    names = list(names)
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(shown(name, 60) for name in names[:_NAMED]) + more


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
            bad = np.flatnonzero((array < low) | (array > high))
            if len(bad):
                what = "preferences are not in [0, 1]" if name == "preferences" else f"{name} are negative or infinite"
                raise DataError(
                    f"{self.model}: {len(bad)} of {len(array)} {what}: "
                    + _named(f"row {row}: {array[row]:g}" for row in bad)
                )
        if not len(self.preferences):
            raise DataError(f"{self.model}: no annotations")
        if self.prompts is not None:
            object.__setattr__(self, "prompts", tuple(self.prompts))
            if len(self.prompts) != len(self.preferences):
                raise DataError(f"{self.model}: {len(self.prompts)} prompts and {len(self.preferences)} preferences")
            _unrepeated(self.model, self.prompts)

    def __len__(self) -> int:
        return len(self.preferences)

    def swapped(self) -> "Annotations":
        """The baseline as the model and the model as the baseline."""
        return replace(
            self, preferences=1 - self.preferences, lengths=self.baseline_lengths, baseline_lengths=self.lengths,
            model=self.baseline, baseline=self.model,
        )  # fmt: skip

    def of_prompts(self, prompts: Sequence[str], allow_missing: bool = False) -> "Annotations":
        """The same rows in the order of `prompts`. DataError for annotations of other prompts, and for prompts without
        an annotation unless `allow_missing`, which leaves them out; by count and name."""
        if self.prompts is None:
            raise DataError(f"{self.model}: annotations without prompts cannot be compared with the prompts given")
        _unrepeated("the prompts", prompts)
        row = {prompt: number for number, prompt in enumerate(self.prompts)}
        wanted = set(prompts)
        strange = [prompt for prompt in self.prompts if prompt not in wanted]
        if strange:
            raise DataError(
                f"{self.model}: {len(strange)} of {len(self)} annotations are of other prompts: {_named(strange)}"
            )
        lacking = [prompt for prompt in prompts if prompt not in row]
        if lacking and not allow_missing:
            raise DataError(
                f"{self.model}: {len(lacking)} of {len(prompts)} prompts have no annotation: {_named(lacking)}; "
                "allow_missing=True leaves them out"
            )
        order = [row[prompt] for prompt in prompts if prompt in row]
        return replace(
            self, preferences=self.preferences[order], lengths=self.lengths[order],
            baseline_lengths=self.baseline_lengths[order], prompts=tuple(self.prompts[number] for number in order),
        )  # fmt: skip


def _unrepeated(who: str, prompts: Sequence[str]) -> None:
    seen: set[str] = set()
    twice = [prompt for prompt in prompts if prompt in seen or seen.add(prompt)]  # type: ignore[func-returns-value]
    if twice:
        raise DataError(f"{who}: {len(twice)} of {len(prompts)} prompts are there more than once: {_named(twice)}")


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
        raise DataError(f"{where}: annotations of {len(names)} models ({_named(names)}): choose one with model=")
    baselines = dict.fromkeys(row.get("generator_1", "baseline") for row in rows)
    if len(baselines) > 1:
        raise DataError(f"{where}: annotations against {len(baselines)} baselines: {_named(baselines)}")
    name = str(rows[0]["generator_2"])
    preferences = np.array([_number(row["preference"], name, number) for number, row in enumerate(rows)])
    bad = np.flatnonzero((preferences != 0) & ((preferences < 1) | (preferences > 2)))
    if len(bad):
        raise DataError(
            f"{name}: {len(bad)} of {len(rows)} preferences are neither in [1, 2] nor 0, a tie: "
            + _named(f"row {row}: {preferences[row]:g}" for row in bad)
        )
    asked = [row.get("instruction") for row in rows]
    return Annotations(
        np.where(preferences == 0, 0.5, preferences - 1),
        np.array([_length(row["output_2"], name, number) for number, row in enumerate(rows)]),
        np.array([_length(row["output_1"], name, number) for number, row in enumerate(rows)]),
        model=name, baseline=str(next(iter(baselines))),
        prompts=None if any(prompt is None for prompt in asked) else tuple(map(str, asked)),
    )  # fmt: skip


def _rows_of_file(path: Path) -> Any:
    """orjson reads a judge's log-probabilities in half the time, where it is installed."""
    if path.suffix == ".json":
        try:
            import orjson

            rows = orjson.loads(path.read_bytes())
            if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
                return rows
        except (ImportError, ValueError, OSError):
            pass  # what is wrong with it is the other reader's to say
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
            _unrepeated("calibration", self.prompts)


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
            f"({type(error).__name__}): give the file's path; without it only {MINIMAL} can be had"
        ) from None


@dataclass(frozen=True)
class WinRates:
    """Win rates of one model in percent. `form` says which regression the length-controlled one is of.

    `standard_error` is the sample's, `lc_standard_error` by resampling the instructions and fitting again;
    `interval` and `lc_interval` hold 95 %. `lc_package_error` is what the alpaca-eval package calls the standard
    error: the spread of the predicted preferences over the root of their number, in which the regression itself is
    taken for certain. `coefficients` are of length, difficulty and the model, those that the form has.
    """

    model: str
    baseline: str
    prompts: int
    missing_preferences: int
    missing_answers: int
    empty_answers: int
    win_rate: float
    standard_error: float
    interval: tuple[float, float]
    discrete_win_rate: float
    wins: int
    losses: int
    ties: int
    mean_length: float
    form: str
    length_controlled: float
    lc_standard_error: float | None
    lc_interval: tuple[float, float] | None
    lc_package_error: float
    coefficients: dict[str, float]
    inverse_penalty: float | None

    def figures(self) -> dict[str, float | None]:
        """The leaderboard's columns, the length-controlled one under the name of its form."""
        return {
            "win_rate": self.win_rate, "standard_error": self.standard_error,
            "discrete_win_rate": self.discrete_win_rate, self.form: self.length_controlled,
            "lc_standard_error": self.lc_standard_error,
        }  # fmt: skip


def win_rates(
    annotations: Any, *, calibration: Calibration | None = None, form: str | None = None,
    prompts: Sequence[str] | None = None, allow_missing: bool = False, resamples: int = 1000, seed: int = 0,
) -> WinRates:  # fmt: skip
    """Raw and length-controlled win rate of one model's annotations (what `read_annotations` takes).

    `form` is by default `length_controlled_winrate`, the leaderboard's, where a calibration with gamed baselines is
    given, and `length_controlled_minimal` without; `length_controlled_noreg` is the first without gamed baselines.
    `prompts` is the evaluation set: annotations are put in its order, and others are refused. With `allow_missing`,
    instructions without a preference or an answer are left out of the fit and predicted all the same, as the package
    does, and counted. `resamples=0` gives no standard error of the length-controlled rate. Where the difference of
    lengths is constant there is nothing to control for, and the length-controlled rate is the raw one, without a fit.
    DataError for bad annotations; ConfigError without scikit-learn.
    """
    glm.need_scikit_learn("AlpacaEval's length-controlled win rate")
    rows = read_annotations(annotations)
    form = form or (FULL if calibration is not None and len(calibration.gamed_index) else MINIMAL)
    if form not in FORMS:
        raise ConfigError(f"form {form!r} is none of {quoted(FORMS)}{did_you_mean(form, FORMS)}")
    if form != MINIMAL and calibration is None:
        raise ConfigError(f"{form} needs a calibration: load_calibration(path of {GAMED}); without: {MINIMAL}")
    if form == FULL and not len(calibration.gamed_index):
        raise ConfigError(f"{form} needs the gamed baselines' annotations, which this calibration lacks: {NOREG}")
    if prompts is not None:
        rows = rows.of_prompts(prompts, allow_missing)
    _whole(rows, allow_missing)
    design = _design(rows, calibration if form != MINIMAL else None, form == FULL, allow_missing)
    raw = rows.preferences[~np.isnan(rows.preferences)]
    wins, losses = int((raw > 0.5).sum()), int((raw < 0.5).sum())
    ties = len(raw) - wins - losses
    rounded = np.where(raw == 0.5, 0.5, np.round(raw))
    coefficients, c = np.zeros(len(design.names)), None
    rate, error = 100 * float(raw.mean()), 100 * _error(raw)
    lc_error: float | None = None
    lc_interval: tuple[float, float] | None = None
    if rows.model == rows.baseline:  # a half by construction
        lc_rate, lc_spread = 50.0, 0.0
    elif not design.varies:
        lc_rate, lc_spread, lc_error, lc_interval = rate, error, error, _around(rate, error)
    else:
        coefficients, c = glm.fit(design.x, design.targets, design.weights)
        predicted = design.predicted(coefficients)
        lc_rate, lc_spread = 100 * float(predicted.mean()), 100 * _error(predicted)
        if resamples:
            drawn = 100 * _resampled(design, coefficients, c, resamples, seed)
            lc_error = float(drawn.std(ddof=1))
            lc_interval = float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))
    return WinRates(
        model=rows.model, baseline=rows.baseline, prompts=len(rows), missing_preferences=len(rows) - len(raw),
        missing_answers=int(np.isnan(rows.lengths).sum()), empty_answers=int((rows.lengths == 0).sum()),
        win_rate=rate, standard_error=error, interval=_around(rate, error),
        discrete_win_rate=100 * float(rounded.mean()), wins=wins, losses=losses, ties=ties,
        mean_length=float(np.nanmean(rows.lengths)), form=form, length_controlled=lc_rate, lc_standard_error=lc_error,
        lc_interval=lc_interval, lc_package_error=lc_spread,
        coefficients=dict(zip(design.names, coefficients.tolist())), inverse_penalty=c,
    )  # fmt: skip


def _whole(rows: Annotations, allow_missing: bool) -> None:
    """DataError for instructions without a preference or an answer; and for too few to make five folds of."""
    lacking = {
        "preferences": np.isnan(rows.preferences), "answers": np.isnan(rows.lengths),
        "answers of the baseline": np.isnan(rows.baseline_lengths),
    }  # fmt: skip
    for what, gone in lacking.items():
        if gone.any() and not allow_missing:
            which = [f"row {row}" if rows.prompts is None else rows.prompts[row] for row in np.flatnonzero(gone)]
            raise DataError(
                f"{rows.model}: {len(which)} of {len(rows)} {what} are missing: {_named(which)}; "
                "allow_missing=True leaves them out of the fit"
            )
    left = len(rows) - int(np.logical_or.reduce(list(lacking.values())).sum())
    if left < glm.FOLDS:
        raise DataError(f"{rows.model}: {left} whole annotations; the regression's {glm.FOLDS} folds need one each")


@dataclass(frozen=True, eq=False)
class _Design:
    """The regression's table. The rows that are fitted are the gamed baselines', then the model's."""

    names: tuple[str, ...]
    apart: np.ndarray  # [N] baseline's length minus the model's, NaN where one is missing
    targets_of_rows: np.ndarray  # [N], NaN where missing
    fixed: np.ndarray  # [N, F - 1] features that are no lengths: the difficulty, if any, and 1
    gamed: np.ndarray  # [G, F]
    gamed_targets: np.ndarray  # [G]
    gamed_index: np.ndarray  # [G] the row of the same instruction, -1 where it has none

    @property
    def fitted(self) -> np.ndarray:
        return ~(np.isnan(self.apart) | np.isnan(self.targets_of_rows))

    @property
    def varies(self) -> bool:
        """Whether the difference of lengths does."""
        known = self.apart[~np.isnan(self.apart)]
        return bool((known != known[0]).any())

    @property
    def x(self) -> np.ndarray:
        lengths = np.tanh(self.apart / self.apart[~np.isnan(self.apart)].std(ddof=1))
        return np.concatenate([self.gamed, np.concatenate([lengths[:, None], self.fixed], 1)[self.fitted]])

    @property
    def targets(self) -> np.ndarray:
        return np.concatenate([self.gamed_targets, self.targets_of_rows[self.fitted]])

    @property
    def weights(self) -> np.ndarray:
        return np.concatenate([np.full(len(self.gamed), GAMED_WEIGHT), np.ones(int(self.fitted.sum()))])

    def predicted(self, coefficients: np.ndarray) -> np.ndarray:
        """Preferences [..., N] at equal lengths, of coefficients [..., F]; missing rows' too, as the package's mean
        has them."""
        return np.exp(-np.logaddexp(0, -(coefficients[..., 1:] @ self.fixed.T)))


def _design(rows: Annotations, calibration: Calibration | None, gamed: bool, allow_missing: bool) -> _Design:
    ones = np.ones((len(rows), 1))
    apart = rows.baseline_lengths - rows.lengths
    if calibration is None:
        none = np.zeros(0)
        return _Design(("length", "model"), apart, rows.preferences, ones, none.reshape(0, 2), none, none)
    place = _places(rows, calibration, allow_missing)
    fixed = np.concatenate([calibration.difficulties[place][:, None], ones], 1)
    index = calibration.gamed_index if gamed else calibration.gamed_index[:0]
    count = len(index)
    of_gamed = np.stack(
        [np.tanh(calibration.gamed_lengths[:count]), calibration.difficulties[index], np.zeros(count)], 1
    )
    row_of = np.full(len(calibration.difficulties), -1)
    row_of[place] = np.arange(len(rows))
    return _Design(
        ("length", "difficulty", "model"), apart, rows.preferences, fixed, of_gamed,
        calibration.gamed_preferences[:count], row_of[index],
    )  # fmt: skip


def _places(rows: Annotations, calibration: Calibration, allow_missing: bool) -> np.ndarray:
    """Which of the calibration's instructions the rows are of."""
    if rows.prompts is not None and calibration.prompts is not None:
        rows.of_prompts(calibration.prompts, allow_missing)  # what it would refuse
        place = {prompt: number for number, prompt in enumerate(calibration.prompts)}
        return np.array([place[prompt] for prompt in rows.prompts])
    if len(rows) != len(calibration.difficulties):
        raise DataError(
            f"{rows.model}: {len(rows)} annotations and {len(calibration.difficulties)} instruction difficulties; "
            "without the prompts of both can only be matched by their place: load_calibration(..., prompts=...)"
        )
    return np.arange(len(rows))


def _resampled(design: _Design, coefficients: np.ndarray, c: float, resamples: int, seed: int) -> np.ndarray:
    """Length-controlled rates [resamples] in [0, 1] of instructions drawn with return, at the penalty that was chosen.

    A drawn instruction brings its rows of the gamed baselines with it; those of instructions that are not there stay.
    """
    draw, count = np.random.default_rng(seed), len(design.apart)
    known, fitted = ~np.isnan(design.apart), design.fitted
    apart = np.where(known, design.apart, 0)
    targets = np.concatenate([design.gamed_targets, design.targets_of_rows[fitted]])
    found = np.empty(resamples)
    for start in range(0, resamples, _AT_ONCE):
        batch = min(_AT_ONCE, resamples - start)
        times = draw.multinomial(count, np.full(count, 1 / count), size=batch).astype(np.float64)  # [B, N]
        there = times * known
        many = np.maximum(there.sum(1), 2)
        mean = (there @ apart) / many
        spread = np.sqrt(np.maximum((there @ apart**2) - many * mean**2, 0) / (many - 1))
        lengths = np.tanh(apart / np.where(spread > 0, spread, np.inf)[:, None])  # [B, N]
        x = np.concatenate([lengths[..., None], np.broadcast_to(design.fixed, (batch, *design.fixed.shape))], 2)
        x = np.concatenate([np.broadcast_to(design.gamed, (batch, *design.gamed.shape)), x[:, fitted]], 1)
        of_gamed = np.where(design.gamed_index >= 0, times[:, design.gamed_index.astype(int)], 1.0)
        weights = np.concatenate([GAMED_WEIGHT * of_gamed, times[:, fitted]], 1)
        refitted = glm.refit(x, targets, weights, c, coefficients)
        predicted = design.predicted(refitted)
        found[start : start + batch] = (times * predicted).sum(1) / count
    return found


def _error(values: np.ndarray) -> float:
    """Standard error of a mean."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def _around(rate: float, error: float) -> tuple[float, float]:
    return max(0.0, rate - 1.96 * error), min(100.0, rate + 1.96 * error)
