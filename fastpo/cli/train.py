"""`fastpo train`: train a model on preference data."""

import argparse
from collections.abc import Sequence

from fastpo.cli.options import add_train_options, run_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train a model on preference data. Every option is a key of the YAML file too, spelt with underscores. "
        "Defaults are in brackets; lists are separated by commas, mappings are JSON; --OPTION and --no-OPTION turn a "
        "BOOL on and off. Options of `trl dpo` and `trl grpo`, such as --use-peft --lora-r 16, work too."
    )
    parser.usage = "fastpo train [--config run.yaml] [--model PATH] [--train-dataset PATH] [--OPTION VALUE ...]"
    add_train_options(parser)


def run(namespace: argparse.Namespace, extras: Sequence[str]) -> int:
    found = run_arguments(namespace, extras, needed=("model", "train_dataset"))
    if found is None:
        return 0
    from fastpo.trainer import train

    inputs, args = found
    train(args=args, **inputs)
    return 0
