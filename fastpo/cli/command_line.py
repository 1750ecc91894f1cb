"""The command line: finds the command, and turns what it raises into one line and an exit code.

Exit codes: 0 done, 1 a run or a check failed, 2 a user's mistake (one line on stderr; FASTPO_TRACEBACK=1 shows where),
130 on Ctrl-C. Only the module of the command that runs is imported, so that --help does not wait for PyTorch.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from fastpo import __version__
from fastpo.cli.parser import Parser, UsageError, kebab
from fastpo.errors import FastpoError, TrainingError

# Each is a module beside this one, with `add_arguments(parser)` and `run(namespace)`, which returns the exit code.
COMMANDS = {
    "train": "train a model on preference data",
    "iterate": "sample, judge, pair, train, and again: a self-improvement loop",
    "evaluate": "a figure of a policy: AlpacaEval, WildBench, RewardBench, pairwise win rates, accuracy",
    "recipes": "the loops of the papers, or all there is to say of one",
    "plan": "what a run takes in memory, and the largest max_tokens that fits",
    "losses": "the table of losses, or all there is to say of one",
    "quickstart": "train a small model on a task with a checkable answer, and show that it got better",
    "check": "kernels and backends of this machine against the fp64 reference",
    "games": "self-play algorithms on games whose equilibrium is known",
    "env": "versions, devices and backends, for a bug report",
}
# Their `run` takes the options that the parser does not know too: for TRL's, TrainConfig says what is the matter.
WITH_OTHER_OPTIONS = ("train", "plan")

# Packages of fastpo's extras, for the message when one is missing.
EXTRAS = {"datasets": "data", "pyarrow": "data", "peft": "peft", "bitsandbytes": "quant", "scipy": "games",
          "sklearn": "evals", "openai": "loop", "tenacity": "loop", "ray": "ray",
          "pytest": "test"}  # fmt: skip


def _module(command: str) -> Any:
    return import_module(f"fastpo.cli.{command}")


def build_parser(command: str | None = None) -> Parser:
    """The parser, with the options of `command`."""
    parser = Parser(prog="fastpo", description="Preference optimisation at the speed of the matrix multiply.",
                    commands=COMMANDS)  # fmt: skip
    parser.add_argument("--version", action="version", version=f"fastpo {__version__}")
    parsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, text in COMMANDS.items():
        own = parsers.add_parser(name, help=text)
        if name == command:
            _module(name).add_arguments(own)
    return parser


def _dispatch(argv: Sequence[str]) -> int:
    argv = kebab(argv)
    parser = build_parser(next((token for token in argv if not token.startswith("-")), None))
    if not argv:
        parser.print_help()
        return 0
    namespace, extras = parser.parse_known_args(argv)
    command = namespace.command
    if command in WITH_OTHER_OPTIONS:
        return _module(command).run(namespace, extras)
    if extras:
        hint = getattr(_module(command), "hint", None) if command in COMMANDS else None
        near = hint(extras) if hint else ""
        raise UsageError(f"unrecognised argument {extras[0]!r}{near} (see fastpo {command or ''} --help)")
    if command is None:
        raise UsageError(f"no command given: {', '.join(COMMANDS)} (see fastpo --help)")
    return _module(command).run(namespace)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _print_error(error: BaseException, message: str) -> None:
    """The one line. Under torchrun it says the rank, and what every rank finds alike is said once a node."""
    rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        print(f"fastpo: error: {message}", file=sys.stderr)
        return
    in_options = isinstance(error, UsageError) or getattr(error, "in_options", False)
    relayed = getattr(error, "relayed", False)  # from rank 0, which says it
    if not (in_options and local_rank != "0") and not (relayed and rank != "0"):
        print(f"fastpo: error on rank {rank}: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        return _dispatch(sys.argv[1:] if argv is None else argv)
    except SystemExit as stop:  # argparse after --help and --version
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("fastpo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("FASTPO_TRACEBACK", "0") not in ("", "0"):
            raise
        if isinstance(error, FastpoError):
            message, code = _one_line(error), 1 if isinstance(error, TrainingError) else 2
        elif isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
            message, code = f"{error.name} is not installed: pip install 'fastpo[{EXTRAS[error.name]}]'", 2
        elif type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "DefaultCPUAllocator" in str(error):
            # A micro-batch that does not fit is split; this is the model, a reference or the optimiser's state.
            message = f"out of memory; fastpo plan shows what a run takes ({_one_line(error)})"
            code = 1
        elif "Connection closed by peer" in str(error) or "Connection reset by peer" in str(error):
            message, code = "another process of this run has died; its own message says why", 1
        else:
            raise
        _print_error(error, message)
        return code
