"""`fastpo games NAME`: self-play algorithms on a game whose equilibrium is known, a table and a plot of their gaps."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpo.config.bounds import SEED
from fastpo.errors import ConfigError, shown
from fastpo.games import games
from fastpo.games.games import ALGORITHMS, Algorithm

MOST_STEPS = 1_000_000  # whose policies are all kept
LEAST = 1e-9  # of eta and tau: below, and above one over it, exp and log in fp64 say nothing

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


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.5,0.3,0.2") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Self-play algorithms on a game whose equilibrium is known: the gap to it, step by step."
    listed = "; ".join(f"{name.replace('_', '-')}: {about}" for name, (about, _, _) in GAMES.items())
    parser.add_argument("name", nargs="?", default="rps", metavar="NAME", help=f"the game [rps]. {listed}")
    names = ", ".join(name.replace("_", "-") for name in ALGORITHMS)
    parser.add_argument("--algorithm", nargs="+", default=["all"], metavar="NAME", help=f"which [all]: {names}")
    parser.add_argument("--steps", type=int, default=200, help="iterations [200]")
    parser.add_argument("--eta", type=float, help="a step is 1/eta [1; without a reference the best for --steps]")
    parser.add_argument("--tau", type=float, default=0.1, help="weight of the KL to the reference [0.1]")
    parser.add_argument("--start", type=_numbers, metavar="P,P,...", help="first policy and reference [1:2:...:n]")
    parser.add_argument("--payoffs", type=_numbers, metavar="A,B,C", help="of rps, up to 0.5 [0.5,0.5,0.5]")
    parser.add_argument("--size", type=int, help="responses of a game that has a choice")
    parser.add_argument("--seed", type=int, help="of a random game [0]")
    parser.add_argument("--trained", action="store_true", help="train a table of logits at every step, by the losses")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves too: .png, .svg or .pdf")


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


def _cell(value: float) -> str:
    return f"{max(value, 0):.1e}" if value < 1e-3 else f"{value:.4f}"  # rounding makes a gap of 0 negative


def format_table(curves: list[Curve]) -> str:
    """Gaps at round steps: a pair of columns an algorithm, last policy and average policy."""
    width = max(19, *(len(c.algorithm.name) + 2 for c in curves))
    lines = ["step  " + "".join(f"{c.algorithm.name:>{width}}" for c in curves)]
    lines.append("      " + "".join(f"{'last':>{width - 9}}{'average':>9}" for _ in curves))
    for t in _milestones(len(curves[0].last) - 1):
        cells = "".join(f"{_cell(c.last[t]):>{width - 9}}{_cell(c.average[t]):>9}" for c in curves)
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


def _policy(probabilities: Tensor) -> str:
    return " ".join(f"{p:.3f}" for p in probabilities.tolist())


def run(namespace: argparse.Namespace) -> int:
    """The command; prints tables, writes the plot, returns the exit code."""
    name, about, prefs = make_game(
        namespace.name, payoffs=namespace.payoffs, size=namespace.size, seed=namespace.seed
    )  # fmt: skip
    n, steps = len(prefs), namespace.steps
    if not 1 <= steps <= MOST_STEPS:
        raise ConfigError(f"steps must be from 1 to {MOST_STEPS:,}, not {shown(steps)}")
    for option in ("tau", "eta"):
        value = getattr(namespace, option)
        if value is not None and not (value > 0 and LEAST <= value <= 1 / LEAST):
            least = "positive" if not value > 0 else f"from {LEAST:g} to {1 / LEAST:g}"
            raise ConfigError(f"{option} must be {least}, not {value:g}")
    start = torch.tensor(namespace.start or [i + 1 for i in range(n)], dtype=torch.float64)
    if len(start) != n or not (start > 0).all() or not (start / start.sum() > 0).all():
        raise ConfigError(f"start must be {n} positive numbers, not {namespace.start}")
    if namespace.plot and namespace.plot.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"plot must end in .png, .svg or .pdf, not {namespace.plot.name!r}")
    if namespace.plot and not namespace.plot.absolute().parent.is_dir():
        raise ConfigError(f"plot: no folder {namespace.plot.absolute().parent}")
    if namespace.plot and not find_spec("matplotlib"):
        raise ConfigError("plot needs matplotlib, which is not installed: pip install matplotlib")
    log_start = (start / start.sum()).log()
    asked = [part for text in namespace.algorithm for part in text.split(",") if part.strip()]
    chosen = list(ALGORITHMS.values()) if "all" in asked else [games.algorithm(a) for a in asked]
    chosen = list(dict.fromkeys(chosen))
    if not chosen:
        raise ConfigError(f"algorithm names none: all, or some of {', '.join(ALGORITHMS)}")
    curves = [
        follow(
            prefs, a, steps, log_start=log_start, eta=namespace.eta, tau=namespace.tau, trained=namespace.trained
        )
        for a in chosen
    ]  # fmt: skip

    nash = games.nash_equilibrium(prefs)
    regularised = games.regularised_nash(prefs, log_start, namespace.tau)
    print(f"{name}: {about}, {n} responses")
    print(f"Nash equilibrium          {_policy(nash)}   (linear programming; gap {_cell(_gap(prefs, nash))})")
    print(f"regularised equilibrium   {_policy(regularised.exp())}   (tau {namespace.tau:g})")
    print(f"start and reference       {_policy(log_start.exp())}")
    groups = (
        ("Gap to the Nash equilibrium", [c for c in curves if not c.algorithm.regularised]),
        ("Gap to the regularised equilibrium", [c for c in curves if c.algorithm.regularised]),
    )
    for heading, group in groups:
        if group:
            etas = ", ".join(f"{c.algorithm.name} {c.eta:.3g}" for c in group if c.eta)
            print(f"\n{heading}" + (f" (eta: {etas})" if etas else ""))
            print(format_table(group))
    if namespace.plot:
        how = "trained through the losses" if namespace.trained else "exact updates"
        if any(c.algorithm.regularised for c in curves):
            how += f", tau {namespace.tau:g}"
        plot(namespace.plot, f"{name.replace('_', '-')}: {about}; {how}", curves)
        print(f"\nwrote {namespace.plot}")
    return 0


def _gap(prefs: Tensor, policy: Tensor) -> float:
    return games.duality_gap(prefs, policy.log())
