"""The options of `fastpo evaluate`: a mapping (YAML), checked before anything runs.

models: {before: runs/sft, after: runs/loop/iter-003/train}   # or model: PATH
baseline: before                       # one of them, another policy, a file of answers, or column:NAME of the prompts
prompts: prompts.jsonl
judge: {kind: judge, base_url: http://localhost:8000/v1, model: judge}
sample: {temperature: 0.7, max_tokens: 1024}
output_dir: eval
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpo.data.sources import SUFFIXES
from fastpo.errors import ConfigError, did_you_mean, shown
from fastpo.loop import config as configs
from fastpo.loop.config import Options, Sample
from fastpo.sampling import make
from fastpo.training.start_checks import check_output_dir

COLUMN = "column:"
_SAMPLE = {"n": 1, "temperature": 0.0, "max_tokens": 1024, "check_logps": 0}
NOT_READ = ("sources", "drop_truncated", "check_logps", "tolerance")  # of the loop's section
SAMPLE_OPTIONS = tuple(f.name for f in dataclasses.fields(Sample) if f.name not in (*NOT_READ, "options"))
_OF_A_MODEL = ("policy", "answers", "model", "sample")


@dataclass(frozen=True)
class EvalConfig:
    """Every option of an evaluation."""

    output_dir: str
    prompts: Any = None  # a file or rows, in the measure's own format or with `prompt`
    model: Any = None  # the one model, in the place of `models`
    models: Options = field(default_factory=dict)  # by name: a policy, a file of answers, or {policy, answers, sample}
    baseline: Any = None  # what they are compared with: one of them by name, or as they are given
    judge: Any = None  # a scorer's section (docs/loop-scorers.md)
    verdicts: Any = None  # in its place, a file as verdicts.jsonl, or {verdicts: FILE, judge: NAME} of several judges'
    annotations: Any = None  # in the place of answers and judge, a file in the measure's own format
    sample: Options = field(default_factory=dict)  # how policies answer, as in the loop: greedy, 1024 tokens
    both_orders: bool | None = None  # pairs in both orders; None: as the measure has it
    limit: int | None = None  # so many of the prompts, drawn by the seed
    seed: int = 42  # of samples, orders and draws
    max_failed: float = 0.02  # share of answers or verdicts; more end the evaluation
    measure: Options = field(default_factory=dict)  # options of the measure


@dataclass(frozen=True)
class Source:
    """Where the answers of a model come from: a policy that is sampled, or rows that are there."""

    name: str
    policy: str | None = None
    answers: Any = None
    of: str | None = None  # which model, in a file with the answers of several
    sample: Sample = field(default_factory=Sample)


def build(options: Options) -> EvalConfig:
    """The checked options; ConfigError names the first that is wrong."""
    if options.get("output_dir") is None:
        raise ConfigError("fastpo evaluate needs output_dir: give it in the config or as --output-dir")
    config: EvalConfig = configs.section(EvalConfig, options, "")
    check_output_dir(config.output_dir)
    if config.model is not None and config.models:
        raise ConfigError("model is the one model, models are several by name: give one of the two")
    if config.limit is not None and config.limit < 1:
        raise ConfigError(f"limit must be 1 or more, not {config.limit}")
    if not 0 <= config.max_failed < 1:
        raise ConfigError(f"max_failed must be a share in [0, 1), not {config.max_failed:g}")
    if config.judge is not None and config.verdicts is not None:
        raise ConfigError("judge and verdicts: the verdicts are in the judge's place; give one of the two")
    return config


def sources(config: EvalConfig) -> tuple[list[Source], list[Source]]:
    """(the models, the baselines that are none of them), each name once."""
    given = dict(config.models) or ({} if config.model is None else {"model": config.model})
    models = [_source(str(name), value, config.sample) for name, value in given.items()]
    names = [model.name for model in models]
    baseline = config.baseline
    if baseline is None or (isinstance(baseline, str) and baseline in names):
        return models, []
    several = isinstance(baseline, Mapping) and not set(baseline) & {"policy", "answers"}
    named = dict(baseline) if several else {"baseline": baseline}
    others = [_source(str(name), value, config.sample) for name, value in named.items()]
    for other in others:
        if other.name in names:
            raise ConfigError(f"{other.name!r} is the name of a model and of a baseline")
    return models, others


def _source(name: str, value: Any, sample: Options) -> Source:
    if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
        raise ConfigError(f"models: the name {shown(name, 60)} must be of letters, digits, '.', '_', '+' and '-'")
    if isinstance(value, Mapping) and {"policy", "answers"} & set(value):
        for key in value:
            if key not in _OF_A_MODEL:
                raise ConfigError(f"models.{name} has no option {key!r}{did_you_mean(str(key), _OF_A_MODEL)}")
        if "policy" in value and "answers" in value:
            raise ConfigError(f"models.{name}: policy is sampled, answers are there: give one of the two")
        made = sample_of({**sample, **(value.get("sample") or {})}, f"models.{name}.sample")
        if "policy" in value:
            return Source(name, policy=str(value["policy"]), sample=made)
        return Source(name, answers=value["answers"], of=value.get("model"), sample=made)
    made = sample_of(sample, "sample")
    if isinstance(value, str | Path):
        text = str(value)
        if not text.startswith(COLUMN) and not text.endswith(SUFFIXES):
            return Source(name, policy=text, sample=made)
        return Source(name, answers=text, sample=made)
    return Source(name, answers=value, sample=made)


def sample_of(given: Options, where: str) -> Sample:
    for option in given:
        if option in NOT_READ:
            raise ConfigError(f"{where}.{option} is the loop's: an evaluation judges every answer of the policy")
    sample: Sample = configs.section(Sample, {**_SAMPLE, **given}, where)
    make.check_options(sample, where)
    if sample.n < 1 or sample.max_tokens < 1 or sample.temperature < 0 or not 0 < sample.top_p <= 1:
        raise ConfigError(f"{where}: n and max_tokens are 1 or more, temperature 0 or more, top_p in (0, 1]")
    if sample.n > 1 and sample.temperature == 0:
        raise ConfigError(f"{where}.n={sample.n} answers of temperature 0 are all the same: set {where}.temperature")
    return sample
