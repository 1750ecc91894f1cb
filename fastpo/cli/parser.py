"""How a command line is read: option names in kebab or snake case, mistakes answered in one line."""

import argparse
import difflib
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

from fastpo.errors import FastpoError


class UsageError(FastpoError):
    """A command line that cannot be read."""


class Parser(argparse.ArgumentParser):
    """Options in kebab or snake case, no abbreviations; an unknown one is answered with the nearest."""

    def __init__(self, *args: Any, commands: Collection[str] = (), **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", _help_formatter)
        super().__init__(*args, **kwargs)
        self.commands = commands

    def error(self, message: str) -> NoReturn:
        found = re.match(r"argument COMMAND: invalid choice: '(.*)' \(choose", message, re.DOTALL)
        if found:
            near = difflib.get_close_matches(found[1], self.commands, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(self.commands)}"
            raise UsageError(f"unknown command '{found[1]}'; {hint} (see {self.prog} --help)")
        raise UsageError(f"{message} (see {self.prog} --help)")


def _help_formatter(prog: str) -> argparse.HelpFormatter:
    width = min(shutil.get_terminal_size((120, 24)).columns, 140)
    return argparse.HelpFormatter(prog, max_help_position=44, width=width)


def kebab(argv: Sequence[str]) -> list[str]:
    """Option names to kebab case: --learning_rate=1e-5 becomes --learning-rate=1e-5."""
    out = []
    for token in argv:
        if re.match(r"--[A-Za-z]", token):
            name, equals, value = token.partition("=")
            token = name.replace("_", "-") + equals + value
        out.append(token)
    return out


def section_hint(extras: Sequence[str], sections: Mapping[str, Collection[str]]) -> str:
    """Of options that are a section's, as the end of a message: --max-tokens 96 is --set sample.max_tokens=96."""
    name, equals, value = extras[0].removeprefix("--").partition("=")
    name = name.replace("-", "_")
    if not equals and len(extras) > 1 and not extras[1].startswith("--"):
        value = extras[1]
    for section, options in sections.items():
        if extras[0].startswith("--") and name in options:
            return f"; did you mean --set {section}.{name}={value or 'VALUE'}?"
    return ""


def assign(options: dict[str, Any], assignments: Sequence[str]) -> None:
    """Puts NAME=VALUE of dotted names, values as YAML reads them, into nested options."""
    import yaml

    for text in assignments:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise UsageError(f"--set {text}: expected NAME=VALUE, such as sample.n=8")
        *path, last = name.split(".")
        place = options
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise UsageError(f"--set {text}: {part} is given as a value already")
        place[last] = yaml.safe_load(value)
