"""What is written to a model, templates, and the lists that it writes. None: it cannot be read (see replies.py)."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastpo.errors import ConfigError, did_you_mean
from fastpo.sampling.items import Failure
from fastpo.scoring.replies import FENCED, answer_of, lists_in, whole_list


class Template:
    """A text with {words} to fill in: one of fastpo/loop/templates/ by its name, or a file of the user's."""

    def __init__(self, name: str, words: Sequence[str], given: Mapping[str, str] | None = None):
        """words: what must be in it, so that none is lost. given: the user's files by name."""
        path = (given or {}).get(name)
        try:
            if path is None:
                self.text = (files("fastpo.loop") / "templates" / f"{name}.txt").read_text(encoding="utf-8")
            else:
                self.text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"template {name} ({path}): {error.strerror or error}") from error
        self.text = self.text.removesuffix("\n")
        for word in words:
            if f"{{{word}}}" not in self.text:
                raise ConfigError(f"template {name} ({path or 'built in'}) has no {{{word}}}: it would not be seen")
        self.words = tuple(words)

    def __call__(self, **values: str) -> str:
        """Each {word} replaced once; what is put in is not read again, and other braces stay."""
        assert set(values) == set(self.words), (sorted(values), self.words)
        pieces = re.split("(" + "|".join(rf"\{{{re.escape(word)}\}}" for word in self.words) + ")", self.text)
        return "".join(values[p[1:-1]] if k % 2 else p for k, p in enumerate(pieces)) if self.words else self.text


def check_templates(given: Mapping[str, str], known: Collection[str], where: str) -> None:
    """ConfigError for a template that nothing asks for."""
    for name in given:
        if name not in known:
            raise ConfigError(f"{where}.templates: no template {name!r}{did_you_mean(name, known)}")


def numbered(texts: Sequence[str]) -> str:
    """A line each, from 1 on; a text's own line breaks become spaces."""
    return "\n".join(f"{k}. {' '.join(text.split())}" for k, text in enumerate(texts, 1))


def without_thoughts(reply: str) -> str:
    """The reply without the thoughts before it; empty where they have no end."""
    text = answer_of(reply)
    return "" if isinstance(text, Failure) else text


def read_texts(reply: str) -> list[str] | None:
    """The one JSON list of texts in a reply, alone, in a fence, as an object's only list, or with prose around it.
    Empty texts and repetitions are left out. None where there is no list, more than one, or one of other things."""
    text = without_thoughts(reply)
    fenced = FENCED.match(text)
    found = whole_list(fenced[1] if fenced else text)
    if found is None:
        lists = [value for value in map(json.loads, lists_in(text)) if _texts(value) is not None]
        found = lists[0] if len(lists) == 1 else None
    texts = _texts(found)
    return None if texts is None else unrepeated(texts)


def unrepeated(texts: Sequence[str]) -> list[str]:
    """Without those that differ in case, spaces and a full stop alone; the first stays."""
    kept = {
        " ".join(text.lower().split()).rstrip(".;"): " ".join(text.split()) for text in reversed(texts) if text.strip()
    }
    return list(reversed(kept.values()))


def _texts(value: Any) -> list[str] | None:
    return value if isinstance(value, list) and all(isinstance(entry, str) for entry in value) else None
