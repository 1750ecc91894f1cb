"""One run at a time in an output folder: the second is refused while the first lives, a dead one blocks nobody."""

import contextlib
import errno
import json
import logging
import os
import socket
import time
import weakref
from pathlib import Path

from fastpo.errors import ConfigError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

log = logging.getLogger("fastpo")

NAME = ".fastpo.lock"
TRIES = 6
_HELD: "weakref.WeakSet[RunLock]" = weakref.WeakSet()


class RunLock:
    """An advisory lock of the kernel on a file in the folder, which ends with the process, however that ends.

    A file system without such locks (some network ones) costs the protection, and is spoken of.
    """

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self.handle: int | None = None

    def take(self) -> None:
        """Hold the lock until `release`. ConfigError with the other run's process and host while that one lives."""
        if fcntl is None or self.handle is not None:
            return
        for attempt in range(TRIES):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError:  # what cannot be written is spoken of where it is written
                return
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                other = _owner(handle)
                os.close(handle)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    if attempt < TRIES - 1:  # another start may be looking whether a run lives here
                        time.sleep(0.02)
                        continue
                    raise ConfigError(
                        f"output_dir {str(self.path.parent)!r} is in use by a run that has not ended{other}: choose "
                        "another output_dir, or stop that run first"
                    ) from None
                log.warning("%s: no lock here (%s): see to it that no second run uses it", self.path, error.strerror)
                return
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(handle), os.stat(self.path)):
                    self.handle = handle
                    break
            os.close(handle)  # the run before removed the file between our two calls
        else:
            return
        _HELD.add(self)
        about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # a full disk
            os.truncate(handle, 0)
            os.pwrite(handle, json.dumps(about).encode(), 0)

    def release(self) -> None:
        """Let others run here."""
        if self.handle is None:
            return
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self.handle), os.stat(self.path)):
                self.path.unlink()
        with contextlib.suppress(OSError):
            fcntl.flock(self.handle, fcntl.LOCK_UN)  # for children of a fork too, which share it
        self.forget()

    def forget(self) -> None:
        """Close the file without an end to the lock."""
        if self.handle is not None:
            with contextlib.suppress(OSError):
                os.close(self.handle)
            self.handle = None
        _HELD.discard(self)

    def again(self) -> None:
        """After the folder was removed and made anew."""
        self.forget()
        self.take()


def check(folder: Path) -> None:
    """ConfigError while a run lives in the folder."""
    if (folder / NAME).exists():
        lock = RunLock(folder)
        lock.take()
        lock.release()


def _owner(handle: int) -> str:
    """Who holds the lock, as far as the file says."""
    try:
        about = json.loads(os.pread(handle, 4096, 0))
        return f" (process {about['pid']} on {about['host']}, since {about['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _after_fork() -> None:
    for lock in list(_HELD):  # a child that outlives the run would hold its lock
        lock.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
