"""The command line: `fastpo train`, `plan`, `losses`, `quickstart`, `check`, `games`, `env`."""

from fastpo.cli.command_line import main as main
