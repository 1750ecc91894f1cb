"""`fastpo plan`: what a run takes in memory, from the options of `fastpo train`."""

import argparse
from collections.abc import Sequence

from fastpo.cli.options import add_train_options, run_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Estimate the memory of `fastpo train` with the same options, from the model's configuration alone. With "
        "--train-dataset its lengths are used too."
    )
    parser.usage = "fastpo plan --model PATH [--memory 80GiB] [--train-dataset PATH] [--OPTION VALUE ...]"
    parser.add_argument("--memory", metavar="SIZE", help="memory to fit into, such as 80GiB (default: the device's)")
    parser.add_argument("--json", action="store_true", help="the numbers as JSON, in bytes")
    add_train_options(parser)


def run(namespace: argparse.Namespace, extras: Sequence[str]) -> int:
    found = run_arguments(namespace, extras, needed=("model",))
    if found is None:
        return 0
    from fastpo.plan import command

    return command.run(*found, namespace.memory, namespace.json)
