"""Verdicts that outlive a run: an SQLite file beside the reference cache, keyed by the judge and what it was shown.

Failures are never kept. A file that cannot be opened, read or written is done without, and said once.
"""

import json
import logging
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastpo.reference.cache import cache_folder
from fastpo.sampling.items import Verdict

log = logging.getLogger("fastpo")
_AT_ONCE = 500  # keys of one query: SQLite's oldest limit is 999


class VerdictCache:
    """`path=None`: verdicts.sqlite in `$FASTPO_CACHE`, by default beside Hugging Face's cache. Several runs may share
    it. A context manager, or `close`."""

    def __init__(self, path: Path | None = None):
        self.path = path if path is not None else cache_folder() / "verdicts.sqlite"
        self._base: sqlite3.Connection | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(self.path, timeout=30, isolation_level=None)
            self._base.execute("PRAGMA synchronous=NORMAL")
            self._base.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, value TEXT, raw TEXT)")
        except (OSError, sqlite3.Error) as error:
            self._without(error)

    def _without(self, error: Exception) -> None:
        log.warning("verdict cache %s: %s; this run goes on without it", self.path, error)
        if self._base is not None:
            self._base.close()
        self._base = None

    def get(self, keys: Sequence[str]) -> dict[str, Verdict]:
        """Those of the keys that are there."""
        found: dict[str, Verdict] = {}
        wanted = list(dict.fromkeys(keys))
        for start in range(0, len(wanted), _AT_ONCE):
            if self._base is None:
                break
            part = wanted[start : start + _AT_ONCE]
            marks = ",".join("?" * len(part))
            try:
                rows = self._base.execute(
                    f"SELECT key, value, raw FROM verdicts WHERE key IN ({marks})", part
                ).fetchall()
                found |= {key: Verdict(_value(json.loads(value)), raw=raw) for key, value, raw in rows}
            except (sqlite3.Error, ValueError) as error:
                self._without(error)
        return found

    def put(self, verdicts: Mapping[str, Verdict]) -> None:
        """Keep them, all or none; failures are left out."""
        rows = [(key, json.dumps(v.value), v.raw) for key, v in verdicts.items() if v.value is not None]
        if self._base is None or not rows:
            return
        try:
            self._base.execute("BEGIN IMMEDIATE")
            self._base.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)", rows)
            self._base.execute("COMMIT")
        except (sqlite3.Error, UnicodeEncodeError) as error:
            self._without(error)

    def close(self) -> None:
        if self._base is not None:
            self._base.close()
            self._base = None

    def __enter__(self) -> "VerdictCache":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
