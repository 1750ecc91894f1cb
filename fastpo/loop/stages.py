"""Stages of an iteration: what has been done is not done again, what was begun goes on, what has changed is named.

A stage has a folder's file `stages/NAME.json`. It is written when the stage begins, with its key, the options and the
digests of its inputs, and again when it is done, with its outputs. The key is a hash of options and inputs, and of the
format of these files: the version of the code is recorded and does not count.
"""

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpo.errors import ConfigError, shown
from fastpo.sampling.items import digest
from fastpo.sampling.parts import file_digest, read_json, write_json

FORMAT = 1
# Files of a model's folder that decide what it says: its log, its checkpoints and its page do not.
_OF_A_MODEL = ("*.safetensors", "*.bin", "*.gguf", "config.json", "adapter_config.json", "tokenizer*", "vocab*",
               "merges*", "*.jinja", "*.model", "special_tokens_map.json", "added_tokens.json")  # fmt: skip
_VERSIONS = ("fastpo", "torch", "transformers", "tokenizers", "openai", "peft")


@dataclass(frozen=True)
class Stage:
    """One step of an iteration. `work` makes the outputs and returns counts for the manifest."""

    name: str
    options: Mapping[str, Any]  # JSON: all that decides what it does, besides its inputs
    inputs: Mapping[str, Path]  # files or folders by a name of their role
    outputs: Sequence[Path]  # inside the iteration's folder
    work: Callable[[], Mapping[str, Any]]


class Iteration:
    """The folder of one iteration, and what has been done in it."""

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self.folder, self.say = folder, say

    def manifest(self, name: str) -> dict[str, Any] | None:
        return read_json(self.folder / "stages" / f"{name}.json")

    def done(self, name: str) -> bool:
        found = self.manifest(name)
        return found is not None and found["state"] == "done"

    def run(self, stage: Stage) -> Mapping[str, Any]:
        """Does the stage, or what is left of it; returns its manifest. ConfigError where it was begun otherwise."""
        options = dict(stage.options)
        inputs = {name: _digest(path) for name, path in stage.inputs.items()}
        key = digest({"format": FORMAT, "stage": stage.name, "options": options, "inputs": inputs})
        before = self.manifest(stage.name)
        if before is not None and before["key"] != key:
            raise ConfigError(self._difference(stage, before, options, inputs))
        if before is not None and before["state"] == "done":
            gone = [p for p in stage.outputs if not p.exists()]
            changed = [p for p in stage.outputs if p.exists() and _digest(p) != before["outputs"][self._name(p)]]
            if not gone and not changed:
                return before
            if changed:
                raise ConfigError(
                    f"{changed[0]} is not what stage {stage.name} wrote: it was changed since; --from {stage.name} "
                    "makes it anew"
                )
            self.say(f"{stage.name}: {self._name(gone[0])} is gone; the stage is done again")
        began = before if before is not None else {}
        record = {
            "stage": stage.name, "state": "running", "key": key, "options": options, "inputs": inputs,
            "seconds": began.get("seconds", 0.0), "versions": versions(),
        }  # fmt: skip
        write_json(self._path(stage.name), record)
        start = time.perf_counter()
        try:
            counts = stage.work()
        except BaseException:
            # What it took so far counts; of a process that is killed it is lost.
            write_json(self._path(stage.name), record | {"seconds": record["seconds"] + time.perf_counter() - start})
            raise
        record |= {
            "state": "done", "seconds": record["seconds"] + time.perf_counter() - start, "counts": dict(counts),
            "outputs": {self._name(path): _digest(path) for path in stage.outputs},
        }  # fmt: skip
        write_json(self._path(stage.name), record)
        return record

    def set_aside(self, names: Sequence[str], outputs: Sequence[Path]) -> Path | None:
        """Move these stages' manifests and outputs into a folder `old-N`; returns it, None where there is nothing."""
        there = [p for p in (*(self._path(n) for n in names), *outputs) if p.exists()]
        if not there:
            return None
        number = 1
        while (self.folder / f"old-{number}").exists():
            number += 1
        old = self.folder / f"old-{number}"
        for path in there:
            target = old / path.relative_to(self.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        return old

    def _path(self, name: str) -> Path:
        return self.folder / "stages" / f"{name}.json"

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.folder))

    def _difference(
        self, stage: Stage, before: Mapping[str, Any], options: Mapping[str, Any], inputs: Mapping[str, str]
    ) -> str:
        where = f"{self.folder.name}: stage {stage.name} was {'done' if before['state'] == 'done' else 'begun'}"
        mend = f"give it back its value, take another run folder, or --from {stage.name} to redo it from here"
        found = first_difference(before["options"], options)
        if found is not None:
            name, then, now = found
            return f"{where} with {name}={shown(then, 60)}, now it is {shown(now, 60)}: {mend}"
        for name in sorted({*before["inputs"], *inputs}):
            if before["inputs"].get(name) != inputs.get(name):
                return f"{where} with another {name} ({stage.inputs.get(name, 'none now')}): {mend}"
        return f"{where} by a version of fastpo with other files: {mend}"


def first_difference(then: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """(dotted name, value then, value now) of the first thing that differs."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in sorted({*then, *now}, key=str):
            found = first_difference(then.get(key), now.get(key), f"{name}.{key}" if name else str(key))
            if found is not None:
                return found
        return None
    return None if digest(then) == digest(now) else (name, then, now)


def versions() -> dict[str, str]:
    """Of what the numbers may depend on."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


_digests: dict[tuple[str, int, int], str] = {}


def _digest(path: Path) -> str:
    """Of a file or folder; that of a file that was hashed in this process is known while size and time stay."""
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return digest({p.name: _digest(p) for pattern in _OF_A_MODEL for p in path.glob(pattern) if p.is_file()})
    if path.is_dir():
        return digest({str(p.relative_to(path)): _digest(p) for p in sorted(path.rglob("*")) if p.is_file()})
    stat = path.stat()
    key = (str(path), stat.st_size, stat.st_mtime_ns)
    if key not in _digests:
        _digests[key] = file_digest(path)
    return _digests[key]
