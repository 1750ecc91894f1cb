"""The options of a run of the loop: a mapping (YAML) over a recipe's, checked before anything runs.

recipe: sppo                     # its options are the defaults of everything below
model: path/to/sft
prompts: prompts.jsonl
output_dir: run
iterations: 3
sample: {n: 5, temperature: 0.7, max_tokens: 512}
scorers: {judge: {kind: judge, base_url: http://localhost:8000/v1, model: judge}}
score: {by: judge}
select: {policy: best_worst}
train: {loss_type: sppo, learning_rate: 5.0e-7, reference: current}
eval: {prompts: heldout.jsonl}
at: {2: {train: {learning_rate: 1.0e-7}}}    # other options in iteration 2
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from fastpo.errors import ConfigError, did_you_mean, shown
from fastpo.losses.online import is_online
from fastpo.selection import GOAL

Options = Mapping[str, Any]
POLICY_NAMES = ("start", "before", "current", "previous")  # and iterate-1, iterate-2, ...


@dataclass(frozen=True)
class Sample:
    """How the policy answers. What is not listed here goes to the engine: base_url, command, batch_size, ..."""

    engine: str = "local"  # local: transformers in this process; openai: a server
    n: int = 4  # responses of each prompt
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # 1: all tokens
    top_k: int = 0  # 0: all tokens
    max_tokens: int = 512  # of a response
    stop: Sequence[str] = ()  # texts that end a response
    sources: Sequence[Options] = ()  # more of each prompt: {source, n, temperature, prefix, contrast, ...}
    drop_truncated: bool = True  # responses that max_tokens ended are not judged
    check_logps: int = 4  # responses of an iteration whose log-probabilities are held against our own
    tolerance: float = 0.1  # nats a token by which they may differ
    options: Options = field(default_factory=dict)  # of the engine: all that is not listed here


@dataclass(frozen=True)
class Refine:
    """Rounds of y_k+1 given (x, y_k, z)."""

    rounds: int = 0  # how many
    template: str = "Please give a better answer to my first message."  # z
    temperature: float | None = None  # None: the sample's
    train: bool = True  # rows of (x, y_k, z) beside those of x
    loss: str | None = None  # of rows of (x, y_k, z), one of train.loss_type, whose first is that of x; None: the same
    weights: Sequence[float] = (0.2, 0.4, 0.4)  # of rows on x, on the rejected y_k, on the chosen one


@dataclass(frozen=True)
class Score:
    """Which scorer decides, and what it is asked."""

    by: str = ""  # the scorer's name; empty: the only one
    units: str = "all"  # of a pair scorer: all, tournament, against
    both_orders: bool = True  # each pair twice, either response first
    position_bias: float = 0.9  # a larger share of the pairs is decided by the place: the judge is refused


@dataclass(frozen=True)
class Select:
    """Which pairs are made of scored responses (fastpo/loop/selecting.py)."""

    policy: str = "best_worst"  # the rule
    margin: float = 0.0  # by which the winner is better
    margin_if_chosen_sampled: float | None = None  # the same where the winner is the policy's own
    min_chosen: float | None = None  # what a winner needs
    max_pairs: int | None = None  # of a prompt
    min_valid: int = 2  # responses with a verdict
    labels: str = "hard"  # all, margin: soft gives both orders of a pair, weighted by P
    itself: bool = True  # whether a response's win probability counts it against itself
    length_penalty: float | str = 0.0  # a character; auto: DICE's rule
    soften: float = 0.0  # win rates towards 1/2 by overlap of the two responses
    repeated_ngrams: int | None = None  # a response that repeats as many n-grams is worth nothing
    chosen_source: str | None = None  # explicit: the source of the winners
    rejected_source: str | None = None  # and of the losers
    min_chars: int = 1  # shorter responses are not judged
    max_chars: int | None = None  # nor are longer ones
    relabel: bool = False  # reward-augmented rows
    goal: str = GOAL  # what asks for a score; {goal} is the number
    goal_joint: str = "\n\n"  # between it and a prompt that is a text
    rows: str = "kway"  # pairs: a row each, with win_prob of the pair
    extra_rows: str | None = None  # a file of rows that are mixed in
    extra_share: float = 0.5  # of all rows


@dataclass(frozen=True)
class Degrade:
    """Versions of a response that lack more and more of its key phrases, for loss_type=[..., degree_aux]."""

    degrees: int = 0  # versions of a response, itself included; 0: none are made
    of: str = "chosen"  # both: of the losers of pairs too
    phrases: str = "rake"  # what is taken away: rake (English), words, pattern
    pattern: str = "."  # a regular expression: what matches is a phrase
    most: float = 0.75  # share of the phrases that the last version lacks


@dataclass(frozen=True)
class Eval:
    """How a new policy is measured: greedy answers to held-out prompts."""

    prompts: Any = None  # held-out ones, as `prompts` of the run
    scorer: str = ""  # empty: the one that decides
    against: str = "start"  # the policy whose answers they are compared with
    temperature: float = 0.0  # 0: greedy
    max_tokens: int | None = None  # None: the sample's


@dataclass(frozen=True)
class Guards:
    """What is said of an iteration that goes wrong: the run goes on, or stops where `stop` says so."""

    max_length_growth: float = 2.0  # mean tokens over those of the first iteration
    min_distinct: float = 0.5  # distinct 3-grams over those of the first iteration
    max_truncated: float = 0.2  # share of the responses
    min_agreement: float = 0.6  # of the two orders of pairs
    min_kept: float = 0.05  # prompts that give a row
    stop: bool = False  # end the run at the first of these


@dataclass(frozen=True)
class LoopConfig:
    """Every option of a run."""

    model: str  # the policy to start from: a folder, or a name of a hub
    output_dir: str  # of the run
    prompts: Any = None  # a file or rows with `prompt`, and `id` if they have one; the rest is the scorers' `meta`
    recipe: str | None = None  # whose options are the defaults of all others
    before: str | None = None  # the policy that `model` was trained from, where a recipe reads it
    iterations: int = 3  # how many
    prompts_per_iteration: int | None = None  # None: the prompts in equal parts
    reuse_prompts: bool = False  # each iteration draws from all prompts, not from a part of its own
    seed: int = 42  # of prompts, samples and draws
    max_failed: float = 0.02  # share of samples or judgements; more end the stage
    prepare: Options = field(default_factory=dict)  # stages before the first iteration: sft, rules, queries, skillmix
    search: Options = field(default_factory=dict)  # tree search in the place of sampling
    sample: Sample = field(default_factory=Sample)  # how the policy answers
    refine: Refine = field(default_factory=Refine)  # rounds of better answers
    extra_responses: Options = field(default_factory=dict)  # source -> file of {id, text}
    scorers: Mapping[str, Options] = field(default_factory=dict)  # name -> kind and its options
    score: Score = field(default_factory=Score)  # which scorer decides
    select: Select = field(default_factory=Select)  # which pairs are made
    degrade: Degrade = field(default_factory=Degrade)  # rows for a loss of degrees
    replay: Mapping[int, float] = field(default_factory=dict)  # iterations back -> share of the pairs
    train: Options = field(default_factory=dict)  # of fastpo.train; reference and previous: policies' names
    eval: Eval = field(default_factory=Eval)  # how a policy is measured
    guards: Guards = field(default_factory=Guards)  # what is said of an iteration that goes wrong
    at: Mapping[int, Options] = field(default_factory=dict)  # iteration -> options that differ in it

    def in_iteration(self, number: int) -> "LoopConfig":
        """With what `at` says of this iteration."""
        if number not in self.at:
            return self
        return build(merged(plain(self), self.at[number]) | {"at": {}})


_PER_ITERATION = (
    "sample", "refine", "score", "select", "degrade", "replay", "train", "eval", "guards", "search", "scorers",
)  # fmt: skip
_FREE = ("options",)  # fields that take what their section does not know


def merged(under: Options, over: Options) -> dict[str, Any]:
    """`over` on top of `under`: mappings in both are merged, null takes an option back to its default, everything else
    is replaced."""
    out = dict(under)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(out.get(key), Mapping):
            out[key] = merged(out[key], value)
        elif value is None:
            out.pop(key, None)
        else:
            out[key] = value
    return out


def load(path: str | Path) -> dict[str, Any]:
    """The mapping of a YAML file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror or error}") from error
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path} is no YAML: {error}") from error
    if not isinstance(found, Mapping):
        raise ConfigError(f"config {path} must hold options by name, not {shown(found)}")
    return dict(found)


def build(options: Options) -> LoopConfig:
    """The checked options; ConfigError names the first that is wrong."""
    needed = ("model", "output_dir") if options.get("iterations") == 0 else ("model", "prompts", "output_dir")
    lacking = [name for name in needed if options.get(name) is None]
    if lacking:
        raise ConfigError(f"fastpo iterate needs {lacking[0]}: give it in the config or as --{lacking[0]}")
    config: LoopConfig = section(LoopConfig, options, "")
    for number, part in config.at.items():
        wrong = next((key for key in part if key not in _PER_ITERATION), None)
        if wrong is not None:
            raise ConfigError(f"at.{number}.{wrong}: only {', '.join(_PER_ITERATION)} change between iterations")
    losses = config.train.get("loss_type", ())
    forms = () if is_online([losses] if isinstance(losses, str) else list(losses)) else ("pair_policy", "pair_margin")
    for name in ("output_dir", "resume_from_checkpoint", *forms):
        if name in config.train:
            raise ConfigError(f"train.{name} is set by the loop: leave it out")
    _check_numbers(config)
    return config


def _check_numbers(config: LoopConfig) -> None:
    def need(right: bool, name: str, what: str, value: Any) -> None:
        if not right:
            raise ConfigError(f"{name} must be {what}, not {shown(value)}")

    least = 0 if config.prepare else 1
    need(config.iterations >= least, "iterations", f"{least} or more", config.iterations)
    need(0 <= config.max_failed < 1, "max_failed", "a share in [0, 1)", config.max_failed)
    sample, select = config.sample, config.select
    need(sample.n >= 0, "sample.n", "0 or more", sample.n)
    need(sample.temperature >= 0, "sample.temperature", "0 or more", sample.temperature)
    need(0 < sample.top_p <= 1, "sample.top_p", "in (0, 1]", sample.top_p)
    need(sample.max_tokens >= 1, "sample.max_tokens", "1 or more", sample.max_tokens)
    need(config.score.units in ("all", "tournament", "against"), "score.units", "all, tournament or against",
         config.score.units)  # fmt: skip
    need(select.labels in ("hard", "soft"), "select.labels", "hard or soft", select.labels)
    need(select.rows in ("kway", "pairs"), "select.rows", "kway or pairs", select.rows)
    need(0 <= select.soften <= 1, "select.soften", "in [0, 1]", select.soften)
    degrade = config.degrade
    need(degrade.degrees == 0 or 2 <= degrade.degrees <= 64, "degrade.degrees", "0, or 2 to 64", degrade.degrees)
    need(degrade.of in ("chosen", "both"), "degrade.of", "chosen or both", degrade.of)
    need(degrade.phrases in ("rake", "words", "pattern"), "degrade.phrases", "rake, words or pattern", degrade.phrases)
    need(0 < degrade.most <= 1, "degrade.most", "a share in (0, 1]", degrade.most)
    need(_is_expression(degrade.pattern), "degrade.pattern", "a regular expression", degrade.pattern)
    need(select.min_valid >= 2, "select.min_valid", "2 or more", select.min_valid)
    need(0 <= select.extra_share < 1, "select.extra_share", "a share in [0, 1)", select.extra_share)
    need(len(config.refine.weights) == 3, "refine.weights", "three numbers", config.refine.weights)
    need(all(k >= 1 and s >= 0 for k, s in config.replay.items()) and sum(config.replay.values()) < 1, "replay",
         "shares by how many iterations back, less than 1 in all", dict(config.replay))  # fmt: skip


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def section(cls: type, options: Options, where: str) -> Any:
    """An instance of the dataclass; what it does not know goes into its `options`, where it has them, or is refused."""
    hints, fields = get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    free: dict[str, Any] = {}
    for name, value in options.items():
        full = f"{where}.{name}" if where else str(name)
        if name not in fields:
            if any(f in fields for f in _FREE):
                free[str(name)] = value
                continue
            raise ConfigError(f"no option {full}{did_you_mean(str(name), fields)}")
        if name in _FREE and isinstance(value, Mapping):
            free.update(value)
            continue
        values[name] = _value(hints[name], value, full)
    if free:
        values["options"] = free
    return cls(**values)


def _value(hint: Any, value: Any, name: str) -> Any:
    """The value as the field's type has it."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must hold options by name, not {shown(value)}")
        return section(hint, value, name)
    if origin is not None and issubclass(type(origin), type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be a mapping, not {shown(value)}")
        try:
            return {inner[0](k) if inner[0] is int else k: v for k, v in value.items()}
        except (TypeError, ValueError):
            raise ConfigError(f"{name}: the keys are numbers of iterations, not {shown(list(value))}") from None
    if origin is not None and isinstance(origin, type) and issubclass(origin, Sequence):
        if isinstance(value, str) or not isinstance(value, Sequence):
            value = (value,)
        return tuple(value)
    kinds = inner or (hint,)
    if value is None and type(None) in kinds:
        return None
    if float in kinds and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    for kind in (bool, int, str):
        if kind in kinds and type(value) is kind:
            return value
    if float in kinds and isinstance(value, str):  # YAML 1.1 reads 5e-7 as a text
        try:
            return float(value)
        except ValueError:
            if str in kinds:
                return value
    if str in kinds and isinstance(value, Path):
        return str(value)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    expected = " or ".join(words[k] for k in kinds if k in words)
    raise ConfigError(f"{name} must be {expected}, not {shown(value)}")


def plain(config: LoopConfig) -> dict[str, Any]:
    """As nested mappings."""
    return {f.name: _unwrapped(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _unwrapped(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _unwrapped(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value


_SECRETS = ("api_key", "headers")  # of an engine: not written, and another key gives the same answers


def as_json(section: Any) -> Any:
    """A section as JSON has it, for the key of a stage and for people; without secrets."""
    found = json.dumps(_unwrapped(section), default=lambda v: getattr(v, "__qualname__", type(v).__name__))
    return _without_secrets(json.loads(found))


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: "(secret)" if k in _SECRETS and v else _without_secrets(v) for k, v in value.items()}
    return [_without_secrets(v) for v in value] if isinstance(value, list) else value
