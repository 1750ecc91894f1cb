"""What a run keeps of its fixed policies, in its folder and its checkpoints: which they were, and what they gave."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from fastpo.reference.cache import RefCache, TokenLogps, response_key, write_entries
from fastpo.reference.roles import ROLES, Role, Sets

log = logging.getLogger("fastpo")


class Kept:
    """Which policies a run began with, by the keys of their caches, and its own copy of their log-probabilities.

    folder: the run's. resume: the checkpoint that it goes on from, or None. saved: what run.json of that has of `keys`.
    """

    def __init__(self, folder: Path, resume: Path | None = None, saved: Mapping[str, str] | None = None):
        self.folder, self.resume = folder, resume
        self.keys = {role.key: saved[role.key] for role in ROLES if role.key in (saved or {})}  # for run.json

    def is_as_begun(self, role: Role, key: str) -> bool:
        """Whether a resumed run's policy in this role is the one that it began with; a new run's is noted."""
        return self.keys.setdefault(role.key, key) == key

    def clear(self) -> None:
        """Forget what another run has left in the folder, unless this one goes on from it."""
        for role in ROLES if self.resume is None else ():
            (self.folder / role.file).unlink(missing_ok=True)

    def read(self, role: Role, cache: RefCache) -> None:
        """Into the cache, the log-probabilities of the checkpoint that the run goes on from."""
        if self.resume is not None and (self.resume / role.file).exists():
            cache.read(self.resume / role.file)

    def write(self, role: Role, sets: Sets, logps: Mapping[str, TokenLogps]) -> None:
        """The run's own copy, to which every checkpoint links: a resumed run needs neither the cache nor the pass."""
        entries = {}
        for name, examples in sets.items():
            for example, of_row in zip(examples, logps[name], strict=True):
                for k, logp in enumerate(of_row):
                    entries[response_key(example.prompt_of(k), example.responses[k])] = logp
        temporary = self.folder / f".{role.file}"
        try:
            write_entries(entries, temporary)
            os.replace(temporary, self.folder / role.file)
        except Exception as error:  # safetensors has an error of its own for a full disk
            temporary.unlink(missing_ok=True)
            log.warning("the %s's log-probabilities could not be written beside the run: %s", role.name, error)
