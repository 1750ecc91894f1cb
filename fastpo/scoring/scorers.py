"""Scorers by name: a section of the configuration becomes an object that judges."""

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastpo.errors import ConfigError, did_you_mean, shown
from fastpo.scoring.client import Client
from fastpo.scoring.judges import Judge, LocalBackend, ServerBackend
from fastpo.scoring.policy_scorers import DensityRatio, ImplicitReward, RewardModelScorer
from fastpo.scoring.scoring import BothOrders, Ensemble, FunctionScorer, Rules
from fastpo.scoring.verifiers import make_verifier

__all__ = [
    "BothOrders", "DensityRatio", "Ensemble", "FunctionScorer", "ImplicitReward", "Judge", "RewardModelScorer", "Rules",
    "make_scorer",
]  # fmt: skip


def make_scorer(
    name: str,
    spec: Mapping[str, Any],
    policies: Mapping[str, str],
    where: Path,
    *,
    others: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """The scorer of a section: `kind` and the options of that kind (docs/loop-scorers.md).

    `policies`: paths by the names that policies have (start, current, ...); a path may stand in place of a name.
    `where`: the folder of relative paths that are not found from the working directory. `others`: the sections of all
    scorers, for an ensemble that names its members. ConfigError for what is unknown, with the nearest name.
    """
    if not isinstance(spec, Mapping) or "kind" not in spec:
        raise ConfigError(f"scorer {name!r} has no `kind`: expected one of {', '.join(_KINDS)}")
    kind, options = spec["kind"], {k: v for k, v in spec.items() if k != "kind"}
    if kind not in _KINDS:
        raise ConfigError(
            f"scorer {name!r}: kind={kind!r} is none of {', '.join(_KINDS)}{did_you_mean(str(kind), _KINDS)}"
        )
    return _KINDS[kind](_Making(name, policies, where, others or {}), options)


class _Making:
    """What the makers share."""

    def __init__(self, name: str, policies: Mapping[str, str], where: Path, others: Mapping[str, Mapping[str, Any]]):
        self.name, self.policies, self.where, self.others = name, policies, Path(where), others

    def policy(self, option: str, value: Any) -> tuple[str, str]:
        """(name, path) of a policy by name, or of a model by path or by its name on the hub."""
        value = str(value)
        if value in self.policies:
            return value, str(self.policies[value])
        path = self.path(value)
        if Path(path).exists() or "/" in value:
            return value, path
        raise ConfigError(
            f"scorer {self.name!r}: {option}={value!r} is no path and no policy, of which there are "
            f"{', '.join(self.policies)}{did_you_mean(value, self.policies)}"
        )

    def path(self, value: Any) -> str:
        """As it is found from the working directory, or from `where`; as it is where neither has it."""
        inside = self.where / str(value)
        return str(inside) if not Path(str(value)).exists() and inside.exists() else str(value)

    def check(self, options: Mapping[str, Any], known: list[str], needed: tuple[str, ...] = ()) -> None:
        for option in options:
            if option not in known:
                raise ConfigError(
                    f"scorer {self.name!r} has no option {option!r}, only {', '.join(known)}"
                    f"{did_you_mean(str(option), known)}"
                )
        for option in needed:
            if options.get(option) is None:
                raise ConfigError(f"scorer {self.name!r} needs {option!r}")

    def call(self, made: Callable[..., Any], *given: Any, **options: Any) -> Any:
        """Values of the wrong type are a user's mistake too."""
        try:
            return made(*given, **options)
        except TypeError as error:
            raise ConfigError(f"scorer {self.name!r}: {error}") from error


def _parameters(made: Callable[..., Any], *without: str) -> list[str]:
    return [n for n in inspect.signature(made).parameters if n not in ("self", "name", *without)]


def _function(making: _Making, options: dict[str, Any]) -> FunctionScorer:
    making.check(options, ["function", "unit"], ("function",))
    function = options["function"]
    if isinstance(function, str) and ".py:" in function:
        path, _, attribute = function.rpartition(":")
        function = f"{making.path(path)}:{attribute}"
    return FunctionScorer(making.name, function, unit=options.get("unit"), where=Path())


def _verifier(making: _Making, options: dict[str, Any]) -> FunctionScorer:
    verifier = options.pop("verifier", None)
    if verifier is None:
        raise ConfigError(f"scorer {making.name!r} needs 'verifier'")
    check, key = making.call(make_verifier, verifier, options)
    return FunctionScorer(making.name, check, key=key)


def _reward_model(making: _Making, options: dict[str, Any]) -> RewardModelScorer:
    making.check(options, ["model", *_parameters(RewardModelScorer, "path", "model", "tokenizer")], ("model",))
    _, path = making.policy("model", options.pop("model"))
    return making.call(RewardModelScorer, making.name, path, **options)


_JUDGE = _parameters(Judge, "backend", "where")
_SERVER = ["base_url", *_parameters(ServerBackend, "client", "by")]
_CLIENT = ["api_key_env", "timeout", "attempts", "concurrency"]
_LOCAL = ["path", *_parameters(LocalBackend, "path")]
_MODES = ("pair", "response", "list", "rule", "reference_text")


def _judge(making: _Making, options: dict[str, Any]) -> Any:
    """On a server (`base_url`), or in this process (`path`)."""
    local = "path" in options
    making.check(options, [*_JUDGE, "both_orders", *(_LOCAL if local else [*_SERVER, *_CLIENT])])
    if not local and not options.get("base_url"):
        raise ConfigError(f"scorer {making.name!r} needs 'base_url' of a server, or the 'path' of a model")
    mode, both = options.pop("mode", "pair"), options.pop("both_orders", None)
    if mode not in _MODES:
        raise ConfigError(
            f"scorer {making.name!r}: mode={mode!r} is none of {', '.join(_MODES)}{did_you_mean(str(mode), _MODES)}"
        )
    if mode == "reference_text":
        mode = "response"
        options.setdefault("template", "score_reference")
    if both and mode != "pair":
        raise ConfigError(f"scorer {making.name!r}: both_orders is for mode pair, not {mode}")
    of_judge = {k: v for k, v in options.items() if k in _JUDGE}
    if local:
        if of_judge.setdefault("by", "logprobs") != "logprobs":
            raise ConfigError(
                f"scorer {making.name!r}: a model in this process judges by logprobs, not {options['by']}"
            )
        given = {k: v for k, v in options.items() if k in _LOCAL}
        _, path = making.policy("path", given.pop("path"))
        backend: Any = making.call(LocalBackend, path, **given)
    else:
        of_client = {k: v for k, v in options.items() if k in (*_CLIENT, "base_url")}
        of_server = {k: v for k, v in options.items() if k in _SERVER and k not in of_client}
        client = making.call(Client, **of_client)
        backend = making.call(
            ServerBackend, client, of_server.pop("model", None), by=of_judge.get("by", "text"), **of_server
        )
    scale = of_judge.get("scale")
    if scale is not None and not (isinstance(scale, list | tuple) and len(scale) == 2):
        raise ConfigError(f"scorer {making.name!r}: scale={scale!r}: expected [low, high]")
    judge = making.call(Judge, making.name, backend, mode, where=making.where, **of_judge)
    return BothOrders(judge) if mode == "pair" and both is not False else judge


def _implicit(making: _Making, options: dict[str, Any]) -> ImplicitReward:
    making.check(options, _parameters(ImplicitReward), ("policy", "reference"))
    policies = [making.policy(option, options.pop(option)) for option in ("policy", "reference")]
    return making.call(ImplicitReward, making.name, *policies, **options)


def _density_ratio(making: _Making, options: dict[str, Any]) -> DensityRatio:
    making.check(options, _parameters(DensityRatio), ("strong", "weak"))
    policies = [making.policy(option, options.pop(option)) for option in ("strong", "weak")]
    return making.call(DensityRatio, making.name, *policies, **options)


def _rules(making: _Making, options: dict[str, Any]) -> Rules:
    """`rules`: a list, or a file with a rule a line or a list of JSON."""
    making.check(options, ["rules", "judge"], ("rules",))
    rules, judge = options["rules"], options.get("judge")
    if isinstance(rules, str):
        rules = _rules_of_file(making, Path(making.path(rules)))
    if not isinstance(rules, list):
        raise ConfigError(f"scorer {making.name!r}: rules={shown(rules, 60)}: expected a list, or a file's path")
    if judge is not None:
        if not isinstance(judge, Mapping):
            raise ConfigError(f"scorer {making.name!r}: judge={shown(judge, 60)}: expected the options of a judge")
        given = {k: v for k, v in judge.items() if k != "kind"}
        if given.setdefault("mode", "rule") != "rule":
            raise ConfigError(f"scorer {making.name!r}: the judge of rules has mode rule, not {given['mode']}")
        inner = _Making(f"{making.name}.judge", making.policies, making.where, making.others)
        judge = _judge(inner, given)
    return Rules(making.name, rules, judge, where=making.where)


def _rules_of_file(making: _Making, path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"scorer {making.name!r}: rules={str(path)!r} cannot be read: {error.strerror}") from None
    if text.lstrip().startswith("["):
        try:
            return list(json.loads(text))
        except ValueError as error:
            raise ConfigError(f"scorer {making.name!r}: {path} is no list of JSON: {error}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _ensemble(making: _Making, options: dict[str, Any]) -> Ensemble:
    """`of`: names of other scorers, or sections by name."""
    making.check(options, ["of", *_parameters(Ensemble, "members")], ("of",))
    of = options.pop("of")
    sections: dict[str, Mapping[str, Any]] = dict(of) if isinstance(of, Mapping) else {}
    for member in of if not isinstance(of, Mapping) else ():
        if member not in making.others:
            known = [n for n in making.others if n != making.name]
            raise ConfigError(
                f"scorer {making.name!r}: of names {member!r}, no scorer of {', '.join(known) or 'this configuration'}"
                f"{did_you_mean(str(member), known)}"
            )
        sections[member] = making.others[member]
    if any(section.get("kind") == "ensemble" for section in sections.values()):
        raise ConfigError(f"scorer {making.name!r}: an ensemble has no ensembles as members")
    members = {n: make_scorer(n, s, making.policies, making.where) for n, s in sections.items()}
    return making.call(Ensemble, making.name, members, **options)


_KINDS: dict[str, Callable[[_Making, dict[str, Any]], Any]] = {
    "function": _function, "verifier": _verifier, "reward_model": _reward_model, "judge": _judge,
    "implicit": _implicit, "density_ratio": _density_ratio, "rules": _rules, "ensemble": _ensemble,
}  # fmt: skip
