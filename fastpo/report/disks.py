"""What a disk does to a run: how its errors are known, and files of lines that outlive them."""

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

log = logging.getLogger("fastpo")


def _root(error: BaseException) -> BaseException:
    """The OSError that an error came from, if one did: PyTorch and safetensors raise others in its place."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return link
        link = link.__cause__ or link.__context__
    return error


def cause(error: BaseException) -> str:
    """An error in a few words, those of the file system where it comes from there."""
    root = _root(error)
    words = root.strerror if isinstance(root, OSError) and root.strerror else " ".join(str(root).split())
    return words[:200] or type(root).__name__


class Lines:
    """A file of lines. Those that cannot be written wait, in their order, for the next one; none is written in part.

    `whole()`: every line so far, for a file that has been removed meanwhile; None where nobody knows them.
    """

    def __init__(self, path: Path, whole: Callable[[], Sequence[str]] | None = None):
        self.path, self.whole = path, whole
        self.waiting: list[str] = []
        self.failed = False

    def add(self, *lines: str) -> None:
        """Append lines, each with its line feed, after those that wait."""
        self.waiting += lines
        try:
            if self.whole is not None and not self.path.exists():
                self.waiting = list(self.whole())
            self._write("".join(self.waiting).encode())
        except OSError as error:
            if not self.failed:
                log.error(
                    "%s could not be written: %s; its lines are kept and written when that is possible",
                    self.path, error.strerror or error,
                )  # fmt: skip
            self.failed = True
            return
        self.waiting = []
        if self.failed:
            log.warning("%s is written again, with the lines that waited", self.path)
        self.failed = False

    def _write(self, data: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(handle).st_size
            try:
                while data:
                    data = data[os.write(handle, data) :]
            except OSError:
                # What did fit is a part of a line, or will come again.
                with contextlib.suppress(OSError):
                    os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)
