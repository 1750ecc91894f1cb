"""The logistic regression of length-controlled win rates: chosen by cross-validation, fitted, and fitted to resamples.

What the alpaca-eval package asks of scikit-learn (source: alpaca_eval 0.6.6, metrics/glm_winrate.py; 2404.04475), asked
of the same solver in the same order, so that its figures come out: liblinear stops early, and what it has not yet
reached differs from one choice of its penalty to the next by more than the choices do.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from fastpo.errors import ConfigError

CS = np.logspace(-4, 4, 10)  # LogisticRegressionCV's own grid of inverse penalties
FOLDS = 5
_SEED, _TOLERANCE, _ITERATIONS = 123, 1e-4, 100  # the package's seed, scikit-learn's defaults
_L1_LOGISTIC = 6  # liblinear's number of the problem: L1 penalty, logistic loss

Fit = Callable[[np.ndarray, np.ndarray, np.ndarray, float, np.random.RandomState], np.ndarray]


def need_scikit_learn(what: str) -> None:
    """ConfigError in one line where scikit-learn is not installed."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError:
        raise ConfigError(f"{what} needs scikit-learn, which is not installed: pip install 'fastpo[evals]'") from None


def _by_the_class(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray, c: float, state: np.random.RandomState
) -> np.ndarray:
    """Coefficients [F] of LogisticRegression for rows [N, F], labels 0/1 [N] and weights [N]; draws once of `state`."""
    import sklearn
    from sklearn.linear_model import LogisticRegression

    since = tuple(int(part) for part in sklearn.__version__.split(".")[:2])
    l1: dict[str, Any] = {"l1_ratio": 1.0} if since >= (1, 8) else {"penalty": "l1"}  # `penalty` goes with 1.10
    model = LogisticRegression(
        C=c, solver="liblinear", fit_intercept=False, random_state=state, tol=_TOLERANCE, max_iter=_ITERATIONS, **l1
    )
    return model.fit(x, y, sample_weight=weights).coef_[0]


def _by_the_solver(
    x: np.ndarray, y: np.ndarray, weights: np.ndarray, c: float, state: np.random.RandomState
) -> np.ndarray:
    """The same without the class around it, which costs more than the solver does. Private to scikit-learn."""
    from sklearn.svm import _liblinear

    _liblinear.set_verbosity_wrap(0)
    seed = state.randint(np.iinfo("i").max)
    labels, weights = np.array(y, dtype=np.float64), np.array(weights, dtype=np.float64)
    # No weights of the classes, which are 1: liblinear prints a line for each that has a weight and no rows.
    found, _ = _liblinear.train_wrap(
        np.ascontiguousarray(x), labels, False, _L1_LOGISTIC, _TOLERANCE, -1.0, c, np.ones(0), _ITERATIONS, seed, 0.1,
        weights,
    )  # fmt: skip
    return found[0]


@lru_cache(1)
def solver() -> Fit:
    """The quick way where this scikit-learn has it and it gives the class's coefficients to the bit, else the class."""
    draw = np.random.default_rng(0)
    x, y, weights = draw.normal(size=(40, 3)), np.arange(40) % 2, draw.random(40)
    wanted = _by_the_class(x, y, weights, 1.0, np.random.RandomState(_SEED))
    try:
        same = np.array_equal(_by_the_solver(x, y, weights, 1.0, np.random.RandomState(_SEED)), wanted)
    except (ImportError, AttributeError, TypeError, ValueError, IndexError):
        same = False
    return _by_the_solver if same else _by_the_class


@lru_cache(64)
def _folds(rows: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(rows that are fitted, rows that are tested) of each fold, of a table that is there twice [2 * rows].

    Those of GroupKFold in scikit-learn 1.9. Before, it sorted groups of equal size by whatever sort numpy has for the
    processor, and a model's figure with them moved by up to 0.15 points.
    """
    fold = np.tile((rows - 1 - np.arange(rows)) % FOLDS, 2)
    return [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(FOLDS)]


def fit(x: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """(coefficients [F], inverse penalty C) for features [N, F], soft targets in [0, 1] [N] and weights [N].

    A row is there twice, as won with weight `targets` and as lost with the rest; both are in one of five folds. C is
    that of the ten whose folds have the least mean log-loss, the smallest of equals.
    """
    rows = len(targets)
    twice, labels = np.concatenate([x, x]), np.repeat([1, 0], rows)
    won = np.concatenate([targets, 1 - targets])
    shares = won * np.concatenate([weights, weights])
    target, weight = np.where(labels == 1, won, 1 - won), np.concatenate([weights, weights])
    one = solver()
    losses = np.zeros((FOLDS, len(CS)))
    for fold, (fitted, tested) in enumerate(_folds(rows)):
        part, test = (twice[fitted], labels[fitted], shares[fitted]), (twice[tested], target[tested], weight[tested])
        state = np.random.RandomState(_SEED)  # the penalties of a fold draw in turn, and each fold begins anew
        for number, c in enumerate(CS):
            losses[fold, number] = _loss(one(*part, c, state), *test)
    best = CS[losses.sum(0).argmin()]
    return one(twice, labels, shares, best, np.random.RandomState(_SEED)), float(best)


def _loss(coefficients: np.ndarray, x: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    """Weighted log-loss over the number of rows, which is what the package takes for the mean.

    Its operations in its order: penalties whose losses differ in the last bit are not rare.
    """
    from scipy.special import expit  # scikit-learn's own dependency

    won = np.clip(expit(x @ coefficients), 1e-15, 1 - 1e-15)
    losses = targets * np.log(won) + (1 - targets) * np.log(1 - won)
    return float(-np.mean(losses * weights))


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -z))


def refit(x: np.ndarray, targets: np.ndarray, weights: np.ndarray, c: float, start: np.ndarray) -> np.ndarray:
    """Coefficients [B, F] of B tables of the same rows: features [B, N, F] or [N, F], targets [N], weights [B, N].

    Newton's method to convergence, each step's quadratic with its L1 term by coordinate descent.
    """
    found = np.tile(start, (len(weights), 1))
    size = found.shape[1]
    dense = x if x.ndim == 3 else np.broadcast_to(x, (len(weights), *x.shape))
    for _ in range(50):
        won = _sigmoid(np.einsum("bnf,bf->bn", dense, found))
        slope = c * np.einsum("bnf,bn->bf", dense, weights * (won - targets))
        bend = c * np.einsum("bnf,bn,bng->bfg", dense, weights * won * (1 - won), dense, optimize=True)
        bend += 1e-9 * np.eye(size)
        step = found.copy()
        for _ in range(100):
            before = step.copy()
            for k in range(size):
                others = slope[:, k] + np.einsum("bf,bf->b", bend[:, k], step - found) - bend[:, k, k] * step[:, k]
                step[:, k] = -np.sign(others) * np.maximum(np.abs(others) - 1, 0) / bend[:, k, k]
            if np.abs(step - before).max() < 1e-10:
                break
        moved = np.clip(step - found, -2, 2)  # a resample that is won by everyone runs away, and slowly
        found = found + moved
        if np.abs(moved).max() < 1e-8:
            break
    return found
