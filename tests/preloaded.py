"""A Python that has everything imported, for tests that need processes of their own: each is forked from it.

Starting one costs a hundredth of a second instead of the several that importing torch, transformers and PEFT takes.
Nothing has been computed in it, so that no thread is lost by the fork. Not for what depends on how a process starts:
variables that are read at import (TRITON_INTERPRET, OMP_NUM_THREADS), limits, the package's installation.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

# tqdm's lock is one for all forked processes: one that is killed while it draws keeps it, and the others wait for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))


class Process:
    """One that was started: what subprocess.Popen has, as far as tests need it."""

    def __init__(self, server: "Preloaded", pid: int, folder: Path):
        self._server, self.pid, self._folder = server, pid, folder
        self.returncode: int | None = None  # -N: ended by signal N

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Waits for its end: (stdout, stderr). After `timeout` seconds it is killed, and that is an error."""
        deadline = time.monotonic() + timeout
        while self.returncode is None:
            self.returncode = self._server.ask({"poll": self.pid})
            if self.returncode is None and time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                deadline += 60
                timeout = 0
            time.sleep(0.01)
        out, err = ((self._folder / f"{self.pid}.{name}").read_text() for name in ("out", "err"))
        assert timeout, f"process {self.pid} did not end in time:\n{out[-2000:]}{err[-2000:]}"
        return out, err


class Preloaded:
    """The server, as its user sees it."""

    def __init__(self, folder: Path):
        """folder: for what the processes print."""
        self._folder = folder
        command = [sys.executable, str(Path(__file__).resolve()), str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, question: dict) -> int | None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, *args: object, env: Mapping[str, str] | None = None) -> Process:
        """`python *args` (-c code, -m module or a file first) in a new process; env: on top of this one's."""
        pid = self.ask({"args": [str(a) for a in args], "env": {**os.environ, **(env or {})}, "cwd": os.getcwd()})
        assert pid
        return Process(self, pid, self._folder)

    def run(self, *args: object, env: Mapping[str, str] | None = None, timeout: float = 300.0) -> Process:
        """The same until its end: `stdout`, `stderr` and `returncode` as subprocess.run has them."""
        process = self.start(*args, env=env)
        process.stdout, process.stderr = process.communicate(timeout)  # type: ignore[attr-defined]
        return process

    def close(self) -> None:
        self._process.kill()  # an end in order takes seconds, for all that is imported
        self._process.communicate()


def _answer(folder: Path) -> tuple[list[str], dict[str, str], str] | None:
    """Serves until the end of input; in a forked process it returns what that is to run."""
    for line in sys.stdin:
        question = json.loads(line)
        if "poll" in question:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := os.fork()) == 0:
            own = os.getpid()
            for number, target in ((0, os.devnull), (1, folder / f"{own}.out"), (2, folder / f"{own}.err")):
                file = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
                os.dup2(file, number)
                os.close(file)
            return question["args"], question["env"], question["cwd"]
        print(json.dumps(answer), flush=True)
    return None


def _run(args: Sequence[str]) -> None:
    """As `python *args` would."""
    if args[0] == "-c":
        sys.argv = ["-c", *args[2:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(args[1], "<string>", "exec"), main.__dict__)
    elif args[0] == "-m":
        sys.argv = [*args[1:]]
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [*args]
        runpy.run_path(args[0], run_name="__main__")


def main() -> None:
    import peft  # noqa: F401
    import pytest  # noqa: F401  # for conftest, which most scripts beside this one import
    import transformers.models.llama.modeling_llama  # noqa: F401

    import fastpo.cli.command_line
    import fastpo.trainer  # noqa: F401

    try:  # a thousand regular expressions, which a process that saves a model compiles: a third of a tiny run's time
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")
    except ImportError:  # an older transformers has none
        pass

    if (job := _answer(Path(sys.argv[1]))) is not None:
        args, environment, folder = job
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        _run(args)


if __name__ == "__main__":
    main()
