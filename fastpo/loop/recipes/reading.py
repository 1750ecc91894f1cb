"""A recipe's file, read: its texts, its options, and an example of what its user adds."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import yaml

from fastpo.errors import ConfigError, did_you_mean

TEXTS = ("title", "about", "source", "choices", "needs")  # of a recipe's file
ABOUT = (*TEXTS, "example")  # what is no option; `example`: options that a user adds


def names() -> list[str]:
    """Of all recipes."""
    return sorted(
        file.name.removesuffix(".yaml") for file in files(__package__).iterdir() if file.name.endswith(".yaml")
    )


def read(name: str) -> dict[str, Any]:
    """A recipe's whole file; ConfigError where there is none of this name."""
    known = names()
    if name not in known:
        raise ConfigError(f"no recipe {name!r}{did_you_mean(name, known)} (fastpo recipes lists them)")
    return dict(yaml.safe_load((files(__package__) / f"{name}.yaml").read_text(encoding="utf-8")))


def options_of(name: str) -> dict[str, Any]:
    """What a recipe sets."""
    return {key: value for key, value in read(name).items() if key not in ABOUT}


def text_of(name: str) -> Mapping[str, str]:
    """What a recipe does, its source, what was chosen here where the source is silent, and what its user gives."""
    found = read(name)
    return {key: " ".join(str(found.get(key, "")).split()) for key in TEXTS}


def example_of(name: str) -> dict[str, Any]:
    """Options that a user adds to a recipe's, with the names of files that are not there."""
    return dict(read(name).get("example") or {})
