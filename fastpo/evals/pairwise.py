"""Pairwise win rates in the form of Arena-Hard: two orders, five verdicts, Bradley-Terry, style control.

Every pair of answers is judged twice, each answer once as A. A slight verdict is one win, a clear one `weight` of them,
a tie half a win each. Strengths are fitted to all games by maximum likelihood; a model's score is its chance in percent
against the baseline. Style control adds the differences of length and of markdown to the fit, and leaves them out of
the score. Intervals come from resampling the prompts with all their games, which are no independent observations.
Source: arena-hard-auto (2406.11939), style control as on Chatbot Arena. No judge is called here.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from fastpo.errors import ConfigError, DataError, did_you_mean, quoted
from fastpo.evals.asked import named, refuse, wilson
from fastpo.evals.glm import need_scikit_learn
from fastpo.sampling.items import Failure
from fastpo.scoring.replies import answer_of, is_refusal

# (points of A, of B) of each verdict, and how often it counts: `strong` or once.
VERDICTS = {"A>>B": (1.0, True), "A>B": (1.0, False), "A=B": (0.5, False), "B>A": (0.0, False), "B>>A": (0.0, True)}
_OTHER_WORDS = {"A<B": "B>A", "A<<B": "B>>A", "B=A": "A=B", "B<A": "A>B", "B<<A": "A>>B"}
_LABEL = r"\s*([AB]\s*(?:>>?|=|<<?)\s*[AB])\s*"
_MARKED = (  # the first that occurs is what counts
    re.compile(rf"\[\[{_LABEL}\]\]", re.IGNORECASE), re.compile(rf"\[{_LABEL}\]", re.IGNORECASE)
)  # fmt: skip
READS = 1  # goes up where `read_verdict` reads a reply otherwise: verdicts are kept across runs
CONTROLS = ("length", "markdown")
_STYLE = ("length", "headers", "lists", "bold")
_AT_ONCE = 50  # resamples that are fitted together
_RIDGE = 1e-6  # of a strength, so that a model that has won every game has one


@cache
def template() -> str:
    """The judge's template, with {prompt}, {answer_a} and {answer_b}."""
    return resources.files("fastpo.evals").joinpath("templates", "pairwise.txt").read_text(encoding="utf-8")


def question(prompt: str, answer_a: str, answer_b: str) -> str:
    """What the judge is asked; braces in the texts are theirs."""
    texts = {"{prompt}": prompt, "{answer_a}": answer_a, "{answer_b}": answer_b}
    return re.sub(r"\{(?:prompt|answer_a|answer_b)\}", lambda found: texts[found.group()], template())


def read_verdict(reply: str) -> str | Failure:
    """One of VERDICTS, of a label in [[ ]], or in [ ] where there is none in [[ ]]; a Failure where there is no label,
    or several that differ. Thoughts before the reply are not read."""
    text = answer_of(reply)
    if isinstance(text, Failure):
        return text
    for pattern in _MARKED:
        labels = {re.sub(r"\s", "", label).upper() for label in pattern.findall(text)}
        known = {_OTHER_WORDS.get(label, label) for label in labels}
        if known:
            [label, *others] = known
            return label if not others and label in VERDICTS else Failure("unparsed", reply)
    return Failure("refused" if is_refusal(reply) else "unparsed", reply)


@dataclass(frozen=True)
class Style:
    """What style control sees of an answer: its length, in characters or tokens, and counts of markdown."""

    length: int
    headers: int = 0
    lists: int = 0
    bold: int = 0


def style_of(text: str) -> Style:
    """Characters, headers, list items and bold parts of an answer; markdown in fenced code is code."""
    prose = re.sub(r"```.*?(?:```|\Z)", "", text, flags=re.DOTALL)
    return Style(
        len(text),
        len(re.findall(r"^#{1,6}\s", prose, re.MULTILINE)),
        len(re.findall(r"^\s*(?:[-*+]|\d+\.)\s", prose, re.MULTILINE)),
        len(re.findall(r"\*\*[^*\n]+\*\*|__[^_\n]+__", prose)),
    )


@dataclass(frozen=True)
class Game:
    """One verdict: the answer of `a` was shown as A, that of `b` as B. None is a judgement that failed."""

    prompt: str
    a: str
    b: str
    verdict: str | None


def read_judgments(
    rows: Sequence[Mapping[str, Any]], category: str | None = None, baseline: str | None = None
) -> list[Game]:
    """The games of Arena-Hard's `model_judgment` files, as rows: `uid`, `model`, `games` with a `score` each.

    The baseline was A in the first game of a row and B in the second; it is the row's, or `baseline` in files of the
    first version. `category` leaves the others out, which have baselines of their own. A game or a score that is None
    has failed. DataError for several categories of which none is chosen, and for rows without a prompt, a model, a
    baseline or two games, by count.
    """
    known = list(dict.fromkeys(str(row["category"]) for row in rows if row.get("category") is not None))
    if category is not None and category not in known:
        raise DataError(
            f"no judgment is of category {category!r}, only of {quoted(known)}{did_you_mean(category, known)}"
        )
    if category is None and len(known) > 1:
        raise DataError(f"the judgments are of the categories {quoted(known)}: give one, category: {known[0]}")
    games, bad, count = [], [], 0
    for number, row in enumerate(rows):
        if category is not None and row.get("category") != category:
            continue
        count += 1
        prompt, model, other = row.get("uid", row.get("question_id")), row.get("model"), row.get("baseline", baseline)
        two = row.get("games")
        if prompt is None or model is None or other is None or not isinstance(two, list | tuple) or len(two) != 2:
            bad.append(number)
            continue
        for (a, b), game in zip(((other, model), (model, other)), two):
            label = game.get("score") if isinstance(game, Mapping) else None
            games.append(Game(str(prompt), str(a), str(b), None if label is None else _OTHER_WORDS.get(label, label)))
    refuse("judgments lack uid, model, baseline or two games; numbers of the rows", bad, count)
    return games


@dataclass(frozen=True)
class Standing:
    """A model's score in percent, its interval, and its strength in log-odds against the baseline. No interval without
    resamples, or of fewer than two prompts. Of a model that has won or lost everything, whose resamples are all alike,
    it is Wilson's for so many prompts."""

    model: str
    score: float
    interval: tuple[float, float] | None
    strength: float
    games: int


@dataclass(frozen=True)
class Arena:
    """All models, the strongest first. `first` is the share of points in percent that went to the answer shown first;
    `style` the coefficients of the standardised differences that were controlled for."""

    baseline: str
    standings: tuple[Standing, ...]
    first: float
    failed: int
    style: dict[str, float]

    def of(self, model: str) -> Standing:
        for standing in self.standings:
            if standing.model == model:
                return standing
        known = [standing.model for standing in self.standings]
        raise ConfigError(f"no model {model!r} in this arena{did_you_mean(model, known)}")


def arena(
    games: Iterable[Game], baseline: str, *, weight: int = 3, control: Sequence[str] = (),
    styles: Mapping[tuple[str, str], Style] | None = None, allow_missing: bool = False, resamples: int = 1000,
    level: float = 0.95, seed: int = 0,
) -> Arena:  # fmt: skip
    """Scores of all models in the games against `baseline`.

    `control` is of `length` and `markdown`, with `styles` by (prompt, model). Every pair of a prompt needs both orders,
    once each. With `allow_missing`, pairs of which an order is missing or failed are left out, and counted. DataError,
    by count and name, for verdicts that are none, pairs without an order, games that are there twice, models that no
    chain of games joins to the baseline, answers without a style; ConfigError without scikit-learn.
    """
    need_scikit_learn("a Bradley-Terry fit")
    unknown = [name for name in control if name not in CONTROLS]
    if unknown:
        raise ConfigError(f"control {unknown[0]!r} is none of {quoted(CONTROLS)}{did_you_mean(unknown[0], CONTROLS)}")
    if weight < 1 or not 0 < level < 1:
        raise ConfigError(f"arena: weight {weight} must be 1 or more, and level {level} between 0 and 1")
    played, failed = _both_orders(list(games), allow_missing)
    models = sorted({game.a for game in played} | {baseline})
    _joined(played, baseline)
    columns = {model: number for number, model in enumerate(model for model in models if model != baseline)}
    x = np.zeros((len(played), len(columns)))
    for row, game in enumerate(played):
        for model, sign in ((game.a, 1.0), (game.b, -1.0)):
            if model in columns:
                x[row, columns[model]] = sign
    named_styles, style = _styles(played, control, styles)
    x = np.concatenate([x, style], 1)
    points = np.array([VERDICTS[game.verdict][0] for game in played])
    counts = np.array([weight if VERDICTS[game.verdict][1] else 1 for game in played], dtype=np.float64)
    prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(game.prompt for game in played))}
    prompt_of = np.array([prompts[game.prompt] for game in played])
    fit = _Fit(x, points)
    best = fit.again(counts[None], fit(counts))[0]  # as the resamples are fitted, so that it lies among them
    draw, drawn = np.random.default_rng(seed), np.zeros((resamples, len(columns)))
    for start in range(0, resamples, _AT_ONCE):
        size = min(_AT_ONCE, resamples - start)
        times = draw.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), size=size)  # [B, prompts]
        again = fit.again(counts * times[:, prompt_of], best)
        drawn[start : start + size] = _chance(again[:, : len(columns)])
    edges = (1 - level) / 2, (1 + level) / 2
    many = Counter(model for game in played for model in (game.a, game.b))
    standings = [Standing(baseline, 50.0, (50.0, 50.0), 0.0, many[baseline])]
    for model, column in columns.items():
        interval = None
        if resamples and len(prompts) > 1:
            low, high = np.quantile(drawn[:, column], edges)
            interval = _of_one_sided(played, model, level) or (float(low), float(high))
        score = float(_chance(best[column]))
        standings.append(Standing(model, score, interval, float(best[column]), many[model]))
    standings.sort(key=lambda standing: -standing.strength)
    return Arena(
        baseline, tuple(standings), 100 * float((counts * points).sum() / counts.sum()), failed,
        dict(zip(named_styles, best[len(columns) :].tolist())),
    )  # fmt: skip


def _of_one_sided(games: Sequence[Game], model: str, level: float) -> tuple[float, float] | None:
    """The interval of a model that has won, or lost, all its games; else None."""
    own = [game for game in games if model in (game.a, game.b)]
    points = {VERDICTS[str(game.verdict)][0] if game.a == model else 1 - VERDICTS[str(game.verdict)][0] for game in own}
    if points not in ({1.0}, {0.0}):
        return None
    low, high = wilson(points.pop(), len({game.prompt for game in own}), level)
    return 100 * low, 100 * high


def _chance(strength: Any) -> Any:
    return 100 / (1 + np.exp(-strength))


class _Fit:
    """Coefficients [F] of soft outcomes [N] given differences [N, F], by weights of the games [N]; equal rows are one.

    scikit-learn's logistic regression, because the same fit takes ties, weights and style: choix has strengths alone,
    evalica weights too, neither has covariates.
    """

    def __init__(self, x: np.ndarray, points: np.ndarray):
        self.x, self.row = np.unique(x, axis=0, return_inverse=True)
        self.row, self.points = self.row.ravel(), points
        self.twice, self.won = np.concatenate([self.x, self.x]), np.arange(2 * len(self.x)) < len(self.x)

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        from sklearn.linear_model import LogisticRegression

        won = np.bincount(self.row, counts * self.points, len(self.x))
        lost = np.bincount(self.row, counts * (1 - self.points), len(self.x))
        model = LogisticRegression(C=1 / _RIDGE, fit_intercept=False, solver="newton-cholesky", tol=1e-8, max_iter=200)
        return model.fit(self.twice, self.won, sample_weight=np.concatenate([won, lost])).coef_[0]

    def again(self, counts: np.ndarray, start: np.ndarray) -> np.ndarray:
        """The same of B weightings [B, N], together, by Newton's method from the coefficients `start`: [B, F]."""
        sums = [np.zeros((len(counts), len(self.x))) for _ in range(2)]
        for total, share in zip(sums, (self.points, 1 - self.points)):
            np.add.at(total.T, self.row, (counts * share).T)
        won, played = sums[0], sums[0] + sums[1]
        found = np.tile(start, (len(counts), 1))
        for _ in range(200):
            chance = 1 / (1 + np.exp(-np.clip(found @ self.x.T, -700, 700)))
            slope = (won - played * chance) @ self.x - _RIDGE * found
            bend = np.einsum("bn,nf,ng->bfg", played * chance * (1 - chance), self.x, self.x, optimize=True)
            step = np.linalg.solve(bend + _RIDGE * np.eye(self.x.shape[1]), slope[..., None])[..., 0]
            found += np.clip(step, -1, 1)
            if np.abs(step).max() < 1e-8:
                break
        return found


def _both_orders(games: Sequence[Game], allow_missing: bool) -> tuple[list[Game], int]:
    """The games of pairs that have both orders, and how many pairs were left out."""
    if not games:
        raise DataError("arena: no games")
    wrong = [game for game in games if game.verdict is not None and game.verdict not in VERDICTS]
    if wrong:
        raise DataError(
            f"{len(wrong)} of {len(games)} verdicts are none of {quoted(VERDICTS)}: "
            + named(f"{game.prompt}: {game.verdict}" for game in wrong)
        )
    alone = [game for game in games if game.a == game.b]
    if alone:
        raise DataError(f"{len(alone)} of {len(games)} games are of a model with itself: {named(g.a for g in alone)}")
    times = Counter((game.prompt, game.a, game.b) for game in games)
    twice = [key for key, count in times.items() if count > 1]
    if twice:
        raise DataError(f"{len(twice)} of {len(times)} games are there more than once: {named(map(' / '.join, twice))}")
    pairs: dict[tuple[str, frozenset[str]], list[Game]] = defaultdict(list)
    for game in games:
        pairs[game.prompt, frozenset((game.a, game.b))].append(game)
    whole, lacking = [], []
    for (prompt, both), found in pairs.items():
        if len(found) == 2 and all(game.verdict is not None for game in found):
            whole += found
        else:
            lacking.append(f"{prompt}: {' / '.join(sorted(both))}")
    if lacking and not allow_missing:
        raise DataError(
            f"{len(lacking)} of {len(pairs)} pairs lack a verdict in one of the two orders: {named(lacking)}; "
            "allow_missing=True leaves them out"
        )
    if not whole:
        raise DataError(f"none of {len(pairs)} pairs has a verdict in both orders")
    return whole, len(lacking)


def _joined(games: Sequence[Game], baseline: str) -> None:
    others: dict[str, set[str]] = defaultdict(set)
    for game in games:
        others[game.a].add(game.b)
        others[game.b].add(game.a)
    if baseline not in others:
        raise DataError(f"the baseline {baseline!r} has played no game{did_you_mean(baseline, others)}")
    reached, new = {baseline}, [baseline]
    while new:
        new = [model for model in others[new.pop()] - reached if not reached.add(model)] + new  # type: ignore[func-returns-value]
    apart = sorted(set(others) - reached)
    if apart:
        raise DataError(f"{len(apart)} of {len(others)} models are joined to {baseline!r} by no games: {named(apart)}")


def _styles(
    games: Sequence[Game], control: Sequence[str], styles: Mapping[tuple[str, str], Style] | None
) -> tuple[list[str], np.ndarray]:
    """(names, standardised differences A - B [N, S]). Both orders are there, so that their mean is 0."""
    if not control:
        return [], np.zeros((len(games), 0))
    wanted = {(game.prompt, model) for game in games for model in (game.a, game.b)}
    lacking = sorted(wanted - set(styles or ()))
    if lacking:
        raise DataError(f"{len(lacking)} of {len(wanted)} answers have no style: {named(map(' / '.join, lacking))}")
    a, b = (
        np.array([[getattr(styles[game.prompt, model], name) for name in _STYLE] for game, model in zip(games, who)],
                 dtype=np.float64)
        for who in ([game.a for game in games], [game.b for game in games])
    )  # fmt: skip
    length = (a[:, :1] - b[:, :1]) / np.maximum(a[:, :1] + b[:, :1], 1)
    dense_a, dense_b = a[:, 1:] / (a[:, :1] + 1), b[:, 1:] / (b[:, :1] + 1)
    features = np.concatenate([length, (dense_a - dense_b) / (dense_a + dense_b + 1)], 1)
    chosen = [n for n, name in enumerate(_STYLE) if ("length" if name == "length" else "markdown") in control]
    features = features[:, chosen]
    spread = features.std(0)
    return [_STYLE[n] for n in chosen], features / np.where(spread > 0, spread, 1)
