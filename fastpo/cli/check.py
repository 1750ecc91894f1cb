"""`fastpo check`: kernels and backends of this machine against the fp64 reference."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--quiet", action="store_true", help="print failures and the count only")


def run(namespace: argparse.Namespace) -> int:
    from fastpo.check import run_check

    return run_check(namespace.device, verbose=not namespace.quiet)
