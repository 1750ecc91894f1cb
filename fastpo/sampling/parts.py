"""Files of lines of JSON that grow while a stage works and survive its end at any moment.

A line is written whole and flushed before its unit counts as done; what a crash left of a last line is cut off when the
file is opened again. Files that are read by others are written beside their name and renamed.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from fastpo.errors import DataError

try:  # writes and reads lines in a third of the time; what it refuses, half of a surrogate pair, json takes
    import orjson
except ImportError:
    orjson = None


def loads(line: bytes | str) -> Any:
    """A line of JSON; ValueError where it is none."""
    if orjson is not None:
        with contextlib.suppress(ValueError):
            return orjson.loads(line)
    return json.loads(line)


class Part:
    """An append-only file of JSON lines. A context manager; `lines` are those that were there, or what `keep` makes of
    each: a line of token ids takes ten times its bytes in memory."""

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], Any] = lambda line: line):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = [keep(line) for line in _whole_lines(path)]
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "Part":
        self._file = open(self.path, "ab")
        return self

    def __exit__(self, *raised: object) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append them in one write: all are there after a crash of this process, or the torn ones are cut off."""
        assert self._file is not None, "a part is written inside `with`"
        self._file.write(b"".join(_line(line) for line in lines))
        self._file.flush()


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of the file, of which what follows the last line break is cut off first."""
    if not path.exists():
        return
    _cut_off_torn(path)
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield loads(line)
            except ValueError:
                raise DataError(
                    f"{path}, line {number} is no JSON: the file was changed by something else than fastpo; move it "
                    "away and start again, the stage will redo it"
                ) from None


def _cut_off_torn(path: Path, block: int = 1 << 16) -> None:
    """Cuts off what follows the last line break, which is looked for from the end."""
    with open(path, "rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - block)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                end = start + at + 1
                break
            end = start
        if end < size:
            file.truncate(end)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a finished file of JSON lines."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield loads(line)


def lines_so_far(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file that may still grow, up to the first that is not whole; none where there is no file. The file
    stays as it is."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                yield loads(line)
            except ValueError:  # whoever opens the file to go on says so
                return


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> int:
    """Write them all under this name at once; returns how many there were."""
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    with open(beside, "wb") as file:
        for line in lines:
            file.write(_line(line))
            count += 1
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    return count


def write_json(path: Path, value: Any) -> None:
    """The same of one value, indented for people."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(_text(value) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def read_json(path: Path) -> Any:
    """None where the file is not there."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def file_digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, that of its files' names and contents."""
    if path.is_dir():
        whole = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            whole.update(f"{file.relative_to(path)}\0{file_digest(file)}\n".encode())
        return whole.hexdigest()
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _line(value: Mapping[str, Any]) -> bytes:
    if orjson is not None:
        with contextlib.suppress(TypeError):
            return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which a server's JSON may hold
        return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _text(value: Any) -> str:
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return text if text.isascii() or _is_unicode(text) else json.dumps(value, indent=1)


def _is_unicode(text: str) -> bool:
    """Whether it has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
