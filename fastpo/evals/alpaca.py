"""AlpacaEval 2: raw and length-controlled win rates from a judge's annotations, with standard errors that hold.

The raw win rate is the mean preference. The length-controlled one is what a logistic regression of the preferences on
the difference of lengths and the instructions' difficulty predicts at equal lengths (2404.04475), as the leaderboard's
code has it. The difficulties and the annotations of the two gamed baselines are its file df_gamed.csv; without it the
figure is that of the minimal form and is called so.
"""

import logging
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fastpo.errors import ConfigError, DataError, did_you_mean, quoted, shown
from fastpo.evals import glm
from fastpo.evals.alpaca_rows import GAMED, Annotations, Calibration, load_calibration, read_annotations
from fastpo.evals.asked import refuse, standard_error
from fastpo.evals.measure import mean_of

__all__ = [
    "FULL", "MINIMAL", "NOREG", "Annotations", "Calibration", "WinRates", "leaderboard", "load_calibration",
    "read_annotations", "win_rates",
]  # fmt: skip

FULL, NOREG, MINIMAL = "length_controlled_winrate", "length_controlled_noreg", "length_controlled_minimal"
FORMS = (FULL, NOREG, MINIMAL)
GAMED_WEIGHT = 0.2 / 2  # of a gamed baseline's row: lambda over the two baselines
_AT_ONCE = 50  # resamples that are fitted together
_APART = 0.1  # of `_Design.apart_from_length`: above, intervals of nominal 95 % hold 91 %, near 0 they hold 60 %

log = logging.getLogger("fastpo")


@dataclass(frozen=True)
class WinRates:
    """Win rates of one model in percent. `form` says which regression the length-controlled one is of.

    `standard_error` is the sample's, `lc_standard_error` by resampling the instructions and fitting again;
    `interval` and `lc_interval` hold 95 %. `lc_package_error` is what the alpaca-eval package calls the standard
    error: the spread of the predicted preferences over the root of their number, in which the regression itself is
    taken for certain. `coefficients` are of length, difficulty and the model, those that the form has. `note` says
    what is amiss with the length-controlled rate, and why it has no interval where it has none.
    """

    model: str
    baseline: str
    prompts: int
    missing_preferences: int
    missing_answers: int
    missing_baseline_answers: int
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
    note: str | None


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
    Where length and model cannot be told apart, or all preferences are alike, the rate is the package's and has no
    interval; a warning says what `note` does.
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
    low, high = mean_of(raw.tolist(), 100.0)["interval"]
    interval = (max(0.0, min(low, rate)), min(100.0, max(high, rate)))  # Wilson's end at 100 is rounded to just below
    notes: list[str] = []
    lc_error: float | None = None
    lc_interval: tuple[float, float] | None = None
    if rows.model == rows.baseline:  # a half by construction
        lc_rate, lc_spread = 50.0, 0.0
    elif not design.varies:
        lc_rate, lc_spread, lc_error, lc_interval = rate, error, error, interval
        notes.append("all differences of length are the same: there is nothing to control for, this is the raw rate")
    else:
        coefficients, c = glm.fit(design.x, design.targets, design.weights)
        predicted = design.predicted(coefficients)
        lc_rate, lc_spread = 100 * float(predicted.mean()), 100 * _error(predicted)
        notes += _unresolved(design, coefficients)
        if resamples and not notes:
            drawn = 100 * _resampled(design, coefficients, c, resamples, seed)
            lc_error = float(drawn.std(ddof=1))
            lc_interval = float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))
        if _extreme(rate, lc_rate):
            notes.append(
                f"the length-controlled rate is {lc_rate:.1f} where the raw one is {rate:.1f}: the alpaca-eval package "
                "warns of so large a change as a sign that the regression failed"
            )
    note = "; ".join(notes) or None
    if note is not None:
        log.warning("%s: %s", rows.model, note)
    return WinRates(
        model=rows.model, baseline=rows.baseline, prompts=len(rows), missing_preferences=len(rows) - len(raw),
        missing_answers=int(np.isnan(rows.lengths).sum()),
        missing_baseline_answers=int(np.isnan(rows.baseline_lengths).sum()),
        empty_answers=int((rows.lengths == 0).sum()), win_rate=rate, standard_error=error, interval=interval,
        discrete_win_rate=100 * float(rounded.mean()), wins=wins, losses=losses, ties=ties,
        mean_length=float(np.nanmean(rows.lengths)), form=form, length_controlled=lc_rate, lc_standard_error=lc_error,
        lc_interval=lc_interval, lc_package_error=lc_spread,
        coefficients=dict(zip(design.names, coefficients.tolist())), inverse_penalty=c, note=note,
    )  # fmt: skip


def _unresolved(design: "_Design", coefficients: np.ndarray) -> list[str]:
    """Why resampling gives this fit no interval that holds."""
    targets = design.targets_of_rows[design.fitted]
    if (targets == targets[0]).all():
        return [f"all {len(targets)} preferences are {targets[0]:g}: resamples say nothing of the figure's error, and "
                "it has no interval"]  # fmt: skip
    if coefficients[-1] == 0:
        return ["the regression's penalty has set the model's own coefficient to 0: the figure is shrunk to a half and "
                "not measured, and has no interval"]  # fmt: skip
    if design.apart_from_length < _APART:
        return ["the differences of length are larger than their spread: length and model cannot be told apart, the "
                "penalty decides between them, and the figure has no interval"]  # fmt: skip
    return []


def _extreme(raw: float, controlled: float) -> bool:
    """The package's own rule of a change that it warns of: by more than 10 points, and by more than a quarter of what
    there was to lose or to win."""
    return controlled < raw - max(raw / 4, 10) or controlled > raw + max((100 - raw) / 4, 10)


def leaderboard(sources: Iterable[Any], *, workers: int | None = None, **options: Any) -> list[WinRates]:
    """`win_rates(source, **options)` of each source, the highest length-controlled rate first.

    `workers` processes share the models: by default as many as there are cores, one where processes cannot be forked.
    """
    if isinstance(sources, str | os.PathLike):
        raise ConfigError(f"a leaderboard is of several sources: [{shown(os.fspath(sources))}, ...]")
    jobs = list(sources)
    if workers is not None and workers < 1:
        raise ConfigError(f"leaderboard: workers must be 1 or more, not {workers}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers or cores, len(jobs))
    of_one = partial(win_rates, **options)
    if workers < 2 or "fork" not in multiprocessing.get_all_start_methods():
        found = list(map(of_one, jobs))
    else:
        glm.need_scikit_learn("AlpacaEval's length-controlled win rate")
        glm.solver()  # here, and with it what it imports: the processes begin with it
        # Forked: the worker only reads files and fits, and what starts a process anew costs more than ten models.
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
            found = list(pool.map(of_one, jobs, chunksize=max(1, len(jobs) // (8 * workers))))
    return sorted(found, key=lambda rates: -rates.length_controlled)


def _whole(rows: Annotations, allow_missing: bool) -> None:
    """DataError for instructions without a preference or an answer; and for too few to make five folds of."""
    lacking = {
        "preferences": np.isnan(rows.preferences), "answers": np.isnan(rows.lengths),
        "answers of the baseline": np.isnan(rows.baseline_lengths),
    }  # fmt: skip
    for what, gone in lacking.items():
        if not allow_missing:
            which = [f"row {row}" if rows.prompts is None else rows.prompts[row] for row in np.flatnonzero(gone)]
            refuse(f"{what} are missing", which, len(rows), "; allow_missing=True leaves them out of the fit",
                   who=rows.model)  # fmt: skip
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
    def apart_from_length(self) -> float:
        """The share of the model's column that the other columns leave, 0 to 1: 0 where they are collinear."""
        root = np.sqrt(self.weights)
        x = self.x * root[:, None]
        left = x[:, -1] - x[:, :-1] @ np.linalg.lstsq(x[:, :-1], x[:, -1])[0]
        return float((left @ left) / (x[:, -1] @ x[:, -1]))

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
    return standard_error(values.tolist()) or 0.0
