"""Policies that are not there, found before anything is sampled."""

import re
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache

from fastpo.errors import ConfigError, nearest
from fastpo.evals.options import Source

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # NAME or OWNER/NAME: all else is a path
_MODEL_FILES = ("config.json", "adapter_config.json")


def check_policy(source: Source) -> None:
    """ConfigError where the source's policy is no model: a path is looked for here alone, a name that a hub may have is
    asked for there."""
    assert source.policy is not None
    name, path = source.name, Path(source.policy)
    if path.is_dir():
        if not any((path / file).is_file() for file in _MODEL_FILES):
            raise ConfigError(f"{name}: the folder '{path}' holds no model (no config.json){_inside(path)}")
        return
    if path.is_file():
        raise ConfigError(f"{name}: '{path}' is a file and no model's folder; for its answers give {{answers: {path}}}")
    in_a_folder = len(path.parts) > 1 and Path(path.parts[0]).is_dir()  # runs/dop, where there is runs
    if in_a_folder or not _HUB_NAME.fullmatch(source.policy):
        raise ConfigError(f"{name}: there is no folder '{path}'{_nearest(path)}")
    if not _on_a_hub(source.policy):
        raise ConfigError(f"{name}: there is no folder '{path}' here, and no hub answers for a model{_nearest(path)}")


def _on_a_hub(name: str) -> bool:
    """One request, where the name is not in the cache: loading asks for each file six times where no hub is reached."""
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return True
    try:
        HfApi().model_info(name, timeout=10)
        return True
    except Exception:  # no such model, no network, none wanted
        return isinstance(try_to_load_from_cache(name, "adapter_config.json"), str)


def _inside(folder: Path) -> str:
    """A model in a folder of the folder, as a loop's iteration has it."""
    found = [one for one in sorted(folder.iterdir()) if any((one / file).is_file() for file in _MODEL_FILES)]
    return f"; did you mean '{found[-1]}'?" if found else ""


def _nearest(path: Path) -> str:
    """The existing folder whose name is nearest to the first part of the path that there is not."""
    there = next(parent for parent in (*path.parents, Path()) if parent.is_dir())
    missing = path.relative_to(there).parts[0]
    near = nearest(missing, [one.name for one in there.iterdir() if one.is_dir()], cutoff=0.5)
    return f"; did you mean '{there / near}'?" if near else ""
