"""Named games, and the gap of each algorithm to their equilibrium, step by step: as numbers, a table, a plot."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpo.config.bounds import SEED
from fastpo.errors import ConfigError, shown
from fastpo.games import games
from fastpo.games.games import Algorithm

# name -> (what it is, its options with their defaults, the preferences)
GAMES: dict[str, tuple[str, dict[str, Any], Callable[..., Tensor]]] = {
    "rps": (
        "rock-paper-scissors", {"payoffs": (0.5, 0.5, 0.5)}, lambda payoffs: games.rock_paper_scissors(*payoffs),
    ),
    "weighted_rps": (
        "rock-paper-scissors with payoffs 1, 2, 3 sixths", {},
        lambda: games.rock_paper_scissors(1 / 6, 2 / 6, 3 / 6),
    ),
    "bradley_terry": (
        "Bradley-Terry preferences, rewards 2 down to 0", {"size": 4},
        lambda size: games.bradley_terry(torch.linspace(2, 0, size, dtype=torch.float64)),
    ),
    "random": (
        "uniform preferences", {"size": 6, "seed": 0}, lambda size, seed: games.random_game(size, seed),
    ),
    "condorcet": (
        "a mixture of Bradley-Terry annotators whose majority is cyclic", {"size": 3},
        lambda size: games.condorcet(size),
    ),
    "mixture": (
        "half a random game, half Bradley-Terry with rewards 2 down to 0", {"size": 6, "seed": 0},
        lambda size, seed: games.mixture(
            [games.random_game(size, seed), games.bradley_terry(torch.linspace(2, 0, size, dtype=torch.float64))]
        ),
    ),
}  # fmt: skip


def make_game(name: str, **options: Any) -> tuple[str, str, Tensor]:
    """(name, what it is, its preferences); options that are None take the game's defaults, others it must read."""
    key = name.strip().lower().replace("-", "_")
    if key not in GAMES:
        raise ConfigError(games.unknown("game", name, key, list(GAMES)))
    about, defaults, build = GAMES[key]
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in defaults:
            readers = [other for other, (_, reads, _) in GAMES.items() if option in reads]
            raise ConfigError(f"{key} does not read {option}; {' and '.join(readers)} do")
    if len(given.get("payoffs", (1, 1, 1))) not in (1, 3):
        raise ConfigError(f"payoffs must be one number or three, not {len(given['payoffs'])}")
    for option, (low, high) in {"size": (2, 1000), "seed": (0, SEED)}.items():
        if not low <= given.get(option, low) <= high:
            raise ConfigError(f"{option} must be from {low} to {high:,}, not {shown(given[option])}")
    return key, about, build(**{**defaults, **given})


@dataclass(frozen=True)
class Curve:
    """One algorithm's run: the gap after each step (index t: after t steps), of the last and the average policy."""

    algorithm: Algorithm
    eta: float | None  # constant, in the algorithm's own units
    last: list[float]
    average: list[float]  # of the policies that the steps started from
    kl: list[float]  # KL(equilibrium || policy)
    bound: list[float] | None  # of the theorem; on `average` without a reference, on `kl` with one


def best_eta(log_start: Tensor, steps: int) -> float:
    """1/eta = sqrt(8 D / T), D = log(1 / min start): Hedge's step, whose average has the smallest bound after T."""
    return math.sqrt(steps / (8 * -log_start.min().item()))


def follow(
    prefs: Tensor, algorithm: Algorithm, steps: int, *, log_start: Tensor, eta: float | None, tau: float,
    trained: bool = False,
) -> Curve:  # fmt: skip
    """Runs one algorithm; `eta` None is 1 for algorithms with a reference, `best_eta` for those without."""
    update = algorithm.update
    if trained:
        from fastpo.games.tabular import trained_update

        update = trained_update(algorithm)
    step = eta
    if step is None:
        step = 1.0 if algorithm.regularised else best_eta(log_start, steps)
    own = step * algorithm.eta_scale
    fixed: dict[str, Any] = {"log_ref": log_start, "tau": tau} if algorithm.regularised else {}
    policies = games.run(
        prefs, update, steps, start=log_start, eta=games.decaying(tau) if algorithm.decay else own, **fixed
    )
    if algorithm.regularised:
        target = games.regularised_nash(prefs, log_start, tau)
        gap = lambda log_pi: games.regularised_gap(prefs, log_pi, log_start, tau)  # noqa: E731
    else:
        target = games.nash_equilibrium(prefs).log()
        gap = lambda log_pi: games.duality_gap(prefs, log_pi)  # noqa: E731
    bound = None
    if algorithm.decay:
        constant = 32 if algorithm.name.startswith("inpo") else 8
        bound = [constant / (tau**2 * (t + 1)) for t in range(steps + 1)]
    elif algorithm.name == "mwu":
        spread = -log_start.min().item()
        bound = [math.inf, *(2 * (step * spread / t + 1 / (8 * step)) for t in range(1, steps + 1))]
    averages = games.averages(policies)
    return Curve(
        algorithm, None if algorithm.decay or algorithm.name == "online_ipo" else own,
        [gap(p) for p in policies], [gap(averages[max(t - 1, 0)]) for t in range(steps + 1)],
        [games.kl(target, p) for p in policies], bound,
    )  # fmt: skip


def _milestones(steps: int) -> list[int]:
    """0, 1, 2, 5, 10, 20, 50, ... and the last step."""
    rows = [m * 10**k for k in range(len(str(steps))) for m in (1, 2, 5) if m * 10**k < steps]
    return [0, *rows, steps]


def cell(value: float) -> str:
    return f"{max(value, 0):.1e}" if value < 1e-3 else f"{value:.4f}"  # rounding makes a gap of 0 negative


def format_table(curves: list[Curve]) -> str:
    """Gaps at round steps: a pair of columns an algorithm, last policy and average policy."""
    width = max(19, *(len(c.algorithm.name) + 2 for c in curves))
    lines = ["step  " + "".join(f"{c.algorithm.name:>{width}}" for c in curves)]
    lines.append("      " + "".join(f"{'last':>{width - 9}}{'average':>9}" for _ in curves))
    for t in _milestones(len(curves[0].last) - 1):
        cells = "".join(f"{cell(c.last[t]):>{width - 9}}{cell(c.average[t]):>9}" for c in curves)
        lines.append(f"{t:<6}{cells}")
    return "\n".join(lines)


def plot(path: Path, title: str, curves: list[Curve]) -> None:
    """Three panels: the game's own gap; the regularised gap; KL to the regularised equilibrium with its bounds."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    plain = [c for c in curves if not c.algorithm.regularised]
    regularised = [c for c in curves if c.algorithm.regularised]
    panels = [("No reference: gap to the Nash equilibrium", "duality gap", plain)] if plain else []
    if regularised:
        panels.append(("Gap to the regularised equilibrium", "regularised duality gap", regularised))
        panels.append(("Distance to the regularised equilibrium", "KL(equilibrium || last policy)", regularised))
    figure = Figure(figsize=(max(5.2 * len(panels), 7.5), 4.9), layout="constrained")
    figure.suptitle(title)
    floor = 1e-16  # fp64
    colours = {c.algorithm.name: f"C{i}" for i, c in enumerate(curves)}
    for axes, (heading, quantity, drawn) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        divergence = quantity.startswith("KL")
        names = {c.algorithm.name for c in drawn}
        for curve in drawn:
            colour, steps, name = colours[curve.algorithm.name], range(len(curve.last)), curve.algorithm.title
            values = curve.kl if divergence else curve.last
            under = curve.algorithm.name == "mwu" and "sppo" in names  # SPPO's curve lies on MWU's, here a broad band
            width, alpha = (4.0, 0.45) if under else (1.4, 1.0)
            axes.plot(
                steps, [max(v, floor) for v in values], color=colour, label=name, linewidth=width, alpha=alpha
            )  # fmt: skip
            if not divergence:
                axes.plot(steps, [max(v, floor) for v in curve.average], "--", color=colour, linewidth=0.9)
            if curve.bound and (divergence or not curve.algorithm.regularised):
                axes.plot(steps, curve.bound, ":", color=colour, linewidth=1.2)
        axes.set(title=heading, xlabel="step", ylabel=quantity, yscale="log", xlim=(0, len(drawn[0].last) - 1))
        axes.grid(alpha=0.25)
        if not divergence:  # the same colours as in the panel before
            axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    styles = [("-", "last policy"), ("--", "average policy")]
    if any(c.bound for c in curves):
        styles.append((":", "the theorem's bound"))
    handles = [Line2D([], [], color="0.3", ls=style, label=label) for style, label in styles]
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)
