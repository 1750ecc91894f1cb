"""`fastpo losses`: the table of losses, or all there is to say of one."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="a loss_type")


def run(namespace: argparse.Namespace) -> int:
    from fastpo.losses.docs import text

    print(text(namespace.name))
    return 0
