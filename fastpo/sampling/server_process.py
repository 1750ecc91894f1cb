"""A server that a run starts with the policy's folder, and stops by its own process group, whatever happens."""

import atexit
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from fastpo.errors import ConfigError, TrainingError, one_line, shown

log = logging.getLogger("fastpo")

# Run in the place of the command, which it becomes: the kernel is to end it when the process that began it has ended,
# however that was (prctl PR_SET_PDEATHSIG, SIGTERM).
_WITH_US = (
    "import ctypes, os, sys; parent = int(sys.argv[1]); ctypes.CDLL(None).prctl(1, 15); "
    "os.getppid() == parent or sys.exit(1); os.execvp(sys.argv[2], sys.argv[2:])"
)
START_TIMEOUT = 900.0  # seconds; large models are loaded and compiled in minutes
_STOP_SECONDS = 20.0
_TAIL = 12  # lines of its log in a message


class ServerProcess:
    """`command` with {model} replaced, in a process group of its own, its output in a file.

    Constructing it starts the server and returns when it answers. ConfigError where something answers there already
    (whose weights nobody knows) or the command does not exist; TrainingError with the end of its log where it ends or
    does not answer within `timeout` seconds.
    """

    def __init__(self, command: str, model: str, base_url: str, log_path: Path, *, timeout: float = START_TIMEOUT):
        self.log_path, self._root = log_path, root_of(base_url)
        self._pid_path = log_path.with_suffix(".pid")
        self._process: subprocess.Popen[bytes] | None = None
        try:
            words = [word.replace("{model}", model) for word in shlex.split(command)]
        except ValueError as error:
            raise ConfigError(f"sample.command={shown(command)}: {error}") from None
        if not words:
            raise ConfigError("sample.command is empty")
        if shutil.which(words[0]) is None:
            raise ConfigError(f"sample.command: there is no program {words[0]!r}")
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._stop_orphan()
        if self._answers():
            raise ConfigError(
                f"something answers at {self._root} already, and which weights it has is not known: stop it, or leave "
                "out sample.command to sample from it"
            )
        begin = [sys.executable, "-I", "-S", "-c", _WITH_US, str(os.getpid()), *words]
        with open(log_path, "ab") as out:
            # A group of its own: Ctrl-C is ours to pass on, and its workers end with it.
            self._process = subprocess.Popen(begin, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                                             start_new_session=True)  # fmt: skip
        atexit.register(self.close)
        try:
            self._pid_path.write_text(json.dumps({"pid": self._process.pid, "started": _started(self._process.pid)}))
            self._wait(timeout)
        except BaseException:
            self.close()
            raise

    def died(self) -> str | None:
        """What its log ends with, where it has ended by itself."""
        if self._process is None or self._process.poll() is None:
            return None
        return f"the server ended with exit code {self._process.returncode}; {self._end_of_log()}"

    def close(self) -> None:
        """Ends the group: asked to first, killed where it does not within 20 seconds."""
        atexit.unregister(self.close)
        process, self._process = self._process, None
        if process is None:
            return
        _end_group(process.pid, lambda: process.poll() is not None)
        process.wait()
        self._pid_path.unlink(missing_ok=True)

    def _wait(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if (why := self.died()) is not None:
                raise TrainingError(f"sample.command: {why}")
            if self._answers():
                return
            time.sleep(0.2)
        raise TrainingError(
            f"sample.command: no answer from {self._root} within {timeout:g} seconds (sample.start_timeout); "
            f"{self._end_of_log()}"
        )

    def _answers(self) -> bool:
        """Whether it is ready: by /health, or by the list of models where there is no such page."""
        status = _get(f"{self._root}/health")
        return status == 200 or (status in (404, 405) and _get(f"{self._root}/v1/models") == 200)

    def _end_of_log(self) -> str:
        try:
            lines = self.log_path.read_text(errors="replace").strip().splitlines()[-_TAIL:]
        except OSError:
            lines = []
        return f"its log {self.log_path} ends: {' | '.join(line.strip() for line in lines) or 'empty'}"

    def _stop_orphan(self) -> None:
        """Ends what is left of the server of a run that was killed: the same process, by its pid and its start."""
        try:
            kept = json.loads(self._pid_path.read_text())
            pid, started = int(kept["pid"]), kept["started"]
        except (OSError, ValueError, KeyError, TypeError):
            return
        if started is not None and _started(pid) == started:
            log.warning("sample: the server of a run that was killed is still there (pid %d): it is stopped", pid)
            _end_group(pid, lambda: _started(pid) != started)
        self._pid_path.unlink(missing_ok=True)


def root_of(base_url: str) -> str:
    """The address without /v1. ConfigError for what is no address."""
    parts = urllib.parse.urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"base_url={shown(base_url)} is no address: give it as http://localhost:8000/v1")
    return base_url.rstrip("/").removesuffix("/v1")


def _get(url: str) -> int | None:
    """The status of a page; None where nobody answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a server of this machine, past any proxy
    try:
        with opener.open(url, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError) as error:
        log.debug("%s: %s", url, one_line(error))
        return None


def _started(pid: int) -> str | None:
    """When a process began, in ticks since the machine did: with its pid it names it. None where there is none."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] == "Z" else after_name[19]


def _end_group(group: int, ended: Callable[[], bool]) -> None:
    for number, seconds in ((signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(group, number)
        except (ProcessLookupError, PermissionError):
            return
        deadline = time.monotonic() + seconds
        while not ended() and time.monotonic() < deadline:
            time.sleep(0.05)
        if ended():
            break
    # Workers that outlive their leader.
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
