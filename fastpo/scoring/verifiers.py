"""Verifiers: responses checked by rules, without a model. Each is made with its options and gives 0 or 1 (`ifeval` also
shares between them). What cannot be checked is an exception, which a FunctionScorer makes a failed verdict of.
"""

import importlib
import inspect
import json
import re
import threading
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from fastpo.errors import ConfigError, did_you_mean
from fastpo.sampling.items import prompt_text

Check = Callable[[Any, str, Mapping[str, Any]], float]  # (prompt, response, meta)


def max_words(n: int, *, least: int = 1) -> Check:
    """At least `least` and at most `n` words between spaces: an empty response keeps no limit."""
    _whole(n=n, least=least)
    return lambda prompt, response, meta: float(least <= len(response.split()) <= n)


def min_words(n: int) -> Check:
    """At least `n` words between spaces."""
    _whole(n=n)
    return lambda prompt, response, meta: float(len(response.split()) >= n)


def regex(pattern: str, *, absent: bool = False, ignore_case: bool = False) -> Check:
    """The pattern (Python's `re`, `.` also for line breaks) is found, or with `absent` is not found."""
    try:
        found = re.compile(pattern, re.DOTALL | (re.IGNORECASE if ignore_case else 0))
    except re.error as error:
        raise ConfigError(f"pattern={pattern!r} is no regular expression: {error}") from None
    return lambda prompt, response, meta: float((found.search(response) is None) == absent)


_PARTS: dict[str, Callable[[str], str]] = {
    "whole": lambda text: text,
    "first_line": lambda text: text.split("\n", 1)[0],
    "last_line": lambda text: text.rsplit("\n", 1)[-1],
    "last_word": lambda text: (text.split() or [""])[-1].strip(".,:;!?\"'`*()[]"),
}


def exact_match(*, column: str = "answer", part: str = "whole", ignore_case: bool = False) -> Check:
    """The response, or its first line, last line or last word (without marks around it), is the text of this column."""
    if part not in _PARTS:
        raise ConfigError(f"part={part!r} is none of {', '.join(_PARTS)}{did_you_mean(str(part), _PARTS)}")

    def check(prompt: Any, response: str, meta: Mapping[str, Any]) -> float:
        given, wanted = _PARTS[part](response.strip()).strip(), str(meta[column]).strip()
        return float(given.lower() == wanted.lower() if ignore_case else given == wanted)

    return check


def math_verify(*, column: str = "answer") -> Check:
    """The value in the response equals that of this column (math-verify; `pip install 'fastpo[verify]'`)."""
    library = _library("math_verify")

    def check(prompt: Any, response: str, meta: Mapping[str, Any]) -> float:
        # Its time limit is a signal, which only the main thread has.
        limit = {} if threading.current_thread() is threading.main_thread() else {"parsing_timeout": None}
        wanted = str(meta[column])
        gold = library.parse(wanted, **limit) or library.parse(f"${wanted}$", **limit)
        if all(isinstance(value, str) for value in gold):  # nothing but the text itself
            raise ValueError(f"math-verify reads no value in {column}={wanted[:100]!r}")
        given = library.parse(response, **limit)
        seconds = {} if not limit else {"timeout_seconds": None}
        return float(bool(given) and library.verify(gold, given, raise_on_error=True, **seconds))

    return check


def ifeval(
    *, rule: str = "all", loose: bool = False, ids: str = "instruction_id_list", kwargs: str = "kwargs"
) -> Check:
    """IFEval's checks of the instructions that the columns `ids` and `kwargs` name (if-verifiable;
    `pip install 'fastpo[verify]'`): whether all are followed, or with rule "mean" the share that is.

    `loose` is IFEval's: also without first line, last line or asterisks. An instruction that is unknown, or lacks an
    argument, which the checker would draw at random, is a failure.
    """
    if rule not in ("all", "mean"):
        raise ConfigError(f"rule={rule!r}: expected all or mean")
    common = _library("if_verifiable.common", "if-verifiable")
    # Not its IFBench, which downloads NLTK's data when it is imported.
    registry = _library("if_verifiable.ifeval", "if-verifiable").INSTRUCTION_DICT

    def check(prompt: Any, response: str, meta: Mapping[str, Any]) -> float:
        named, given = list(meta[ids]), meta[kwargs]
        given = json.loads(given) if isinstance(given, str) else list(given)
        if len(given) != len(named) or not named:
            raise ValueError(f"{len(named)} instructions have {len(given)} sets of arguments")
        for name, own in zip(named, given):
            if name not in registry:
                raise ValueError(f"no instruction {name!r}{did_you_mean(name, registry)}")
            needed = inspect.signature(registry[name].build_description).parameters
            lacking = [n for n in needed if n != "self" and (own or {}).get(n) is None]
            if lacking:
                raise ValueError(f"{name} lacks {lacking[0]!r}")
        given = [{k: v for k, v in (own or {}).items() if v is not None} for own in given]
        results, _ = common.evaluate_instructions(response, named, given, prompt_text(prompt), registry)
        kept = [float(r.loose_pass if loose else r.strict_pass) for r in results]
        if not kept:  # of an empty response none is checked
            return 0.0
        return float(all(kept)) if rule == "all" else sum(kept) / len(kept)

    return check


VERIFIERS: dict[str, Callable[..., Check]] = {
    "max_words": max_words, "min_words": min_words, "regex": regex, "exact_match": exact_match,
    "math_verify": math_verify, "ifeval": ifeval,
}  # fmt: skip


def make_verifier(name: str, options: Mapping[str, Any]) -> tuple[Check, dict[str, Any]]:
    """(the check, its key) of a verifier's name and options; ConfigError for one that it does not have."""
    if name not in VERIFIERS:
        raise ConfigError(f"verifier={name!r} is none of {', '.join(VERIFIERS)}{did_you_mean(str(name), VERIFIERS)}")
    parameters = inspect.signature(VERIFIERS[name]).parameters
    for option in options:
        if option not in parameters:
            raise ConfigError(
                f"verifier {name} has no option {option!r}, only {', '.join(parameters)}"
                f"{did_you_mean(option, parameters)}"
            )
    lacking = [n for n, p in parameters.items() if p.default is p.empty and n not in options]
    if lacking:
        raise ConfigError(f"verifier {name} needs {lacking[0]!r}")
    made = VERIFIERS[name](**options)
    filled = {n: options.get(n, p.default) for n, p in parameters.items()}
    return made, {"verifier": name, "options": filled} | _version(name)


def _whole(**values: Any) -> None:
    for name, value in values.items():
        if type(value) is not int or value < 0:
            raise ConfigError(f"{name}={value!r}: expected a whole number from 0 on")


def _library(module: str, package: str = "math-verify") -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f"this verifier needs {package}, which is not installed: pip install 'fastpo[verify]'"
        ) from None


def _version(name: str) -> dict[str, str]:
    """Of the package that checks."""
    package = {"math_verify": "math-verify", "ifeval": "if-verifiable"}.get(name)
    return {} if package is None else {"version": version(package)}
