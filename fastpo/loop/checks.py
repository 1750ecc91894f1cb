"""What does not fit together is refused before the first sample: losses, scorers, selectors, references, sources."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError
from fastpo.loop import online
from fastpo.loop.config import POLICY_NAMES, LoopConfig
from fastpo.loop.selecting import WITHOUT_SCORES, Selector
from fastpo.losses import LOSSES, canonical_name
from fastpo.losses.table import DEGREE
from fastpo.sampling.items import POLICY, Scorer
from fastpo.training.objective import Objective

_OF_THE_LOOP = ("reference", "previous")


def given_options(config: LoopConfig) -> dict[str, Any]:
    """What of `train` is for fastpo.train; degree_aux has as many degrees as there are versions, unless told."""
    own = (*_OF_THE_LOOP, online.REWARDS) if online.way_of(config.train) else _OF_THE_LOOP
    given = {name: value for name, value in config.train.items() if name not in own}
    if config.degrade.degrees and DEGREE in (given.get("loss_type") or ()):
        given["loss_kwargs"] = {"degrees": config.degrade.degrees, **(given.get("loss_kwargs") or {})}
    return given


def train_options(config: LoopConfig) -> TrainConfig:
    """The options of fastpo.train, checked by its own rules."""
    try:
        train = TrainConfig.build(given_options(config), output_dir=config.output_dir)
        Objective.of_options(train)  # refuses what the losses do not read
        return train
    except ConfigError as error:
        raise ConfigError(f"train: {error}") from error


def losses_of(train: TrainConfig) -> list[str]:
    names = [train.loss_type] if isinstance(train.loss_type, str) else list(train.loss_type)
    return [canonical_name(name) for name in names]


def deciding(config: LoopConfig, scorers: Mapping[str, Any]) -> str | None:
    """The name of the scorer that selection goes by; None where it goes by how responses were sampled, and where there
    is none: an online loss is trained on what it draws."""
    if online.way_of(config.train):
        return None
    if config.select.policy in WITHOUT_SCORES and not config.score.by:
        return None
    if config.score.by:
        if config.score.by not in scorers:
            raise ConfigError(f"score.by={config.score.by!r} is none of the scorers {', '.join(scorers) or '(none)'}")
        return config.score.by
    if len(scorers) == 1:
        return next(iter(scorers))
    if not scorers:
        raise ConfigError(
            f"select.policy={config.select.policy} compares scored responses and there is no scorer: give one in "
            "`scorers`, by its name"
        )
    raise ConfigError(f"score.by must name the scorer that decides, one of {', '.join(scorers)}")


def check(config: LoopConfig, scorer: Scorer | None, kinds: Mapping[str, str]) -> None:
    """ConfigError for what cannot go together. `kinds`: unit of each scorer by name."""
    train = train_options(config)
    if online.way_of(config.train):
        online.check(config, train, kinds)
        _check_policies(config, kinds)
        return
    select, losses = config.select, losses_of(train)
    Selector(select)  # knows its policies
    _check_losses(config, losses, scorer)
    _check_degrees(config, train, losses)
    if scorer is not None and scorer.unit == "pair" and config.score.units == "tournament":
        if select.policy != "tournament":
            raise ConfigError(
                f"score.units=tournament asks only the matches of a tournament: select.policy={select.policy} would "
                "compare responses that did not meet; set select.policy=tournament or score.units=all"
            )
    if select.policy == "tournament" and scorer is not None and scorer.unit != "pair":
        raise ConfigError(
            f"select.policy=tournament needs a scorer of pairs, {scorer.name!r} scores a {scorer.unit}: take best_worst"
        )
    if select.policy == "explicit" and None in (select.chosen_source, select.rejected_source):
        raise ConfigError("select.policy=explicit needs select.chosen_source and select.rejected_source")
    sources = sources_of(config)
    for name in ("chosen_source", "rejected_source"):
        wanted = getattr(select, name)
        if wanted is not None and wanted not in sources:
            raise ConfigError(f"select.{name}={wanted!r} is none of the sources {', '.join(sources)}")
    if select.policy == "refinement" and not config.refine.rounds:
        raise ConfigError("select.policy=refinement needs refine.rounds of 1 or more")
    if config.refine.loss is not None and config.refine.loss not in losses:
        raise ConfigError(f"refine.loss={config.refine.loss!r} is none of train.loss_type: {', '.join(losses)}")
    if select.soften and (scorer is None or scorer.unit != "pair"):
        raise ConfigError("select.soften anneals win rates of pairs: it needs a scorer of pairs")
    _check_policies(config, kinds)
    for spec in config.sample.sources:
        if "source" not in spec:
            raise ConfigError("an entry of sample.sources needs `source`, the name of these responses")
        if spec["source"] == POLICY:
            raise ConfigError(f"sample.sources: {POLICY!r} is what sample.n asks for; give these another name")


def _check_policies(config: LoopConfig, kinds: Mapping[str, str]) -> None:
    if config.eval.scorer and config.eval.scorer not in kinds:
        raise ConfigError(f"eval.scorer={config.eval.scorer!r} is none of the scorers {', '.join(kinds)}")
    for name in ("reference", "previous"):
        policy_name(config.train.get(name, "current"), f"train.{name}")
    policy_name(config.eval.against, "eval.against")


def _check_losses(config: LoopConfig, losses: Sequence[str], scorer: Scorer | None) -> None:
    select = config.select
    for name in losses:
        loss = LOSSES.get(name)
        if loss is None:  # sft, reward: they have no pair function
            continue
        if loss.shape == "lists":
            if scorer is None or scorer.unit == "pair":
                what = "nothing is scored" if scorer is None else f"{scorer.name!r} compares pairs"
                raise ConfigError(
                    f"loss_type={name} reads a score of each response and {what}: take a scorer of responses, or a "
                    "loss of pairs such as sppo"
                )
            if select.rows == "pairs":
                raise ConfigError(f"loss_type={name} reads all K responses: set select.rows=kway")
        if loss.pair_prob and select.rows != "pairs":
            raise ConfigError(f"loss_type={name} reads P(chosen beats rejected) of a pair: set select.rows=pairs")
        if loss.win_prob and not loss.pair_prob:
            if select.rows == "pairs":
                raise ConfigError(f"loss_type={name} reads the win probability of each response: set select.rows=kway")
            if scorer is None:
                raise ConfigError(f"loss_type={name} reads win probabilities, and nothing is scored: give a scorer")
        if name == "selm" and "greedy" not in sources_of(config):
            raise ConfigError(
                "loss_type=selm reads the policy's greedy response: add {source: greedy, n: 1, temperature: 0} to "
                "sample.sources"
            )
    referring = [name for name in losses if name in LOSSES and LOSSES[name].reference]
    if "reference" in config.train and not referring:
        raise ConfigError(f"train.reference: {', '.join(losses)} reads no reference; leave it out")
    mixing = [name for name in losses if name in ("inpo", "dno_reg")]
    if "previous" in config.train and not mixing:
        raise ConfigError(f"train.previous: {', '.join(losses)} reads no previous policy; leave it out")


def _check_degrees(config: LoopConfig, train: TrainConfig, losses: Sequence[str]) -> None:
    """Versions of responses are made for the loss that reads them, and for no other."""
    degrees, others = config.degrade.degrees, [name for name in losses if name != DEGREE]
    if DEGREE not in losses:
        if degrees:
            raise ConfigError(f"degrade.degrees={degrees} makes rows of {DEGREE}: set train.loss_type=[dpo, {DEGREE}]")
        return
    if not degrees:
        raise ConfigError(f"loss_type={DEGREE} reads rows of a degree: set degrade.degrees, such as 4")
    objective = Objective.of_options(train)
    if objective.degrees != degrees:
        raise ConfigError(
            f"degrade.degrees={degrees} and {DEGREE} has degrees={objective.degrees}: set train.loss_kwargs="
            f"{{degrees: {degrees}}}"
        )
    if len(others) != 1:
        named = " and ".join(others)
        raise ConfigError(f"every row names one loss: give {DEGREE} beside one loss of pairs, not {named}")
    objective.check_row_losses()
    if config.select.rows == "pairs":
        raise ConfigError(f"rows of {DEGREE} are texts beside rows of K responses: set select.rows=kway")
    if config.search:
        raise ConfigError("degrade has no part in tree search: leave one of them out")


def sources_of(config: LoopConfig) -> list[str]:
    """Names of the sources that responses may have."""
    own = [POLICY] if config.sample.n else []
    rounds = [f"refined-{k}" for k in range(1, config.refine.rounds + 1)]
    return [*own, *(str(s.get("source")) for s in config.sample.sources), *rounds, *config.extra_responses]


def policy_name(name: Any, what: str) -> str:
    """A policy by name, or a path; ConfigError where it is neither a text nor a known name nor looks like a path."""
    if not isinstance(name, str):
        raise ConfigError(f"{what} must be a policy's name or a path, not {name!r}")
    known = (*POLICY_NAMES, "iterate-N")
    plain = name.replace("-", "").isalnum() and "/" not in name
    if plain and name not in POLICY_NAMES and not (name.startswith("iterate-") and name[8:].isdigit()):
        if not os.path.exists(name):
            raise ConfigError(f"{what}={name!r} is neither a policy's name ({', '.join(known)}) nor a path")
    return name
