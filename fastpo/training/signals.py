"""Ctrl-C and SIGTERM in a run of one process: a first one stops it where nothing is lost, a second one loses nothing.

A signal that comes while a step takes effect, a line or a file is written, is noted and honoured when that is done; one
that comes elsewhere stops the run at once, and the last finished step is saved. What was asked for once stays asked:
where a callback swallows the exception, the next step's end raises it anew. No timer is used, and no signal of another
kind: those are the program's.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


class Signals:
    """What stops a run. `busy()`: whether the run is at a place where it must not be stopped."""

    def __init__(self, busy: Callable[[], bool] = lambda: False):
        self.busy = busy
        self.asked: int | None = None  # the first signal
        self.sections = 0  # open ones, inside which nothing is stopped
        self.ending = False  # the run is being ended: what comes now comes too late to stop it

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.asked is None:
            self.asked = number
            self.check()

    def check(self) -> None:
        """Stop here if that was asked for: as Python does on Ctrl-C, or with SIGTERM's exit code."""
        if self.asked is None or self.sections or self.ending or self.busy():
            return
        if self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.asked)

    def end(self) -> None:
        """The run is being ended: what comes from here on waits for ever."""
        self.ending = True

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, signals wait until the block has ended."""
        self.sections += 1
        try:
            yield
        finally:
            self.sections -= 1
        self.check()

    @contextlib.contextmanager
    def taken(self, wanted: bool) -> Iterator[None]:
        """Inside, SIGINT and SIGTERM come here, but for those that the program handles itself. Only in the main thread,
        where Python runs handlers. What an earlier run was asked for is behind."""
        self.asked, self.ending = None, False
        before = {}
        if wanted and threading.current_thread() is threading.main_thread():
            for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
                if signal.getsignal(number) == default:
                    before[number] = signal.signal(number, self.handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                if signal.getsignal(number) == self.handle:  # else a callback has taken it over
                    signal.signal(number, handler)
        self.check()
