"""`fastpo quickstart`: train a small model on a task with a checkable answer."""

import argparse

from fastpo.quickstart import PREFERENCE, run_quickstart


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--loss-type", choices=list(PREFERENCE), default="dpo", help="preference loss [dpo]")
    add("--seed", type=int, default=0, metavar="INT", help="seed of everything [0]")
    add("--output-dir", default="fastpo-quickstart", metavar="DIR", help="where to write [fastpo-quickstart]")
    add("--control", action="store_true", help="compare with as many supervised steps on the chosen answers")
    add("--fast", action="store_true", help="a smaller run, less accurate")


def run(namespace: argparse.Namespace) -> int:
    """0 if greedy accuracy rose, else 1."""
    summary = run_quickstart(
        namespace.output_dir, namespace.loss_type, namespace.seed, namespace.control, namespace.fast
    )
    return int(summary["after_greedy"] <= summary["before_greedy"])
