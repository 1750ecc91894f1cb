"""`fastpo games NAME`: self-play algorithms on a game whose equilibrium is known, a table and a plot of their gaps."""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from fastpo import games
from fastpo.errors import ConfigError, shown
from fastpo.games.curves import GAMES, cell, follow, format_table, make_game, plot

MOST_STEPS = 1_000_000  # whose policies are all kept
LEAST = 1e-9  # of eta and tau: below, and above one over it, exp and log in fp64 say nothing


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.5,0.3,0.2") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Self-play algorithms on a game whose equilibrium is known: the gap to it, step by step. Needs SciPy: "
        "pip install 'fastpo[games]'."
    )
    listed = "; ".join(f"{name.replace('_', '-')}: {about}" for name, (about, _, _) in GAMES.items())
    parser.add_argument("name", nargs="?", default="rps", metavar="NAME", help=f"the game [rps]. {listed}")
    names = ", ".join(name.replace("_", "-") for name in games.ALGORITHMS)
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


def _policy(probabilities: Tensor) -> str:
    return " ".join(f"{p:.3f}" for p in probabilities.tolist())


def run(namespace: argparse.Namespace) -> int:
    """The command; prints tables, writes the plot, returns the exit code."""
    if not find_spec("scipy"):
        raise ConfigError("games needs scipy, which is not installed: pip install 'fastpo[games]'")
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
    chosen = list(games.ALGORITHMS.values()) if "all" in asked else [games.algorithm(a) for a in asked]
    chosen = list(dict.fromkeys(chosen))
    if not chosen:
        raise ConfigError(f"algorithm names none: all, or some of {', '.join(games.ALGORITHMS)}")
    curves = [
        follow(
            prefs, a, steps, log_start=log_start, eta=namespace.eta, tau=namespace.tau, trained=namespace.trained
        )
        for a in chosen
    ]  # fmt: skip

    nash = games.nash_equilibrium(prefs)
    regularised = games.regularised_nash(prefs, log_start, namespace.tau)
    print(f"{name}: {about}, {n} responses")
    print(f"Nash equilibrium          {_policy(nash)}   (linear programming; gap {cell(_gap(prefs, nash))})")
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
