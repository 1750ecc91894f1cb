"""`fastpo env`: versions, devices and backends, for a bug report."""

import argparse
import json

from fastpo import env


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(namespace: argparse.Namespace) -> int:
    report = env.collect()
    print(json.dumps(report, indent=2) if namespace.json else env.format_text(report))
    return 0
