"""The stages before the first iteration, by name: what `prepare` of a run may hold, and the order in which it is done.

Each is `NAME(spec, teacher, folder, *, encode, seed, max_failed) -> counts`: it reads its options from `spec`, asks
`teacher` (a Sampler), and writes into `folder` files that grow, so that it goes on where it was stopped, and at the end
its output. `encode(prompt)` gives a prompt's token ids; None where the teacher's engine has its own tokenizer.

A stage's `spec` may have `teacher`, the options of that engine, which are for those who make it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastpo.errors import ConfigError, did_you_mean, shown
from fastpo.loop.autorule import AutoRule, rules
from fastpo.loop.config import _read as read_section
from fastpo.loop.pugc import Queries, queries
from fastpo.loop.skillmix import SkillMix, skillmix
from fastpo.loop.supervise import Supervise, sft


@dataclass(frozen=True)
class Preparation:
    """One of them."""

    work: Callable[..., dict[str, Any]]
    options: type
    output: str  # file or folder in the stage's folder
    gives: str  # what of the run it stands for
    inputs: tuple[str, ...]  # options that name files
    asks: bool = True  # a teacher


# In this order: supervision may read the rows of skillmix.
PREPARATIONS: Mapping[str, Preparation] = {
    "skillmix": Preparation(skillmix, SkillMix, "rows.jsonl", "prepare.sft.rows", ("skills", "types")),
    "queries": Preparation(queries, Queries, "prompts.jsonl", "prompts", ("texts",)),
    "rules": Preparation(rules, AutoRule, "rules.json", "scorers.NAME.rules", ("pairs",)),
    "sft": Preparation(sft, Supervise, "train", "model", ("rows", "pairs", "model"), asks=False),
}


def check(prepare: Mapping[str, Any]) -> list[str]:
    """The names of the stages that a run has, in order; ConfigError for a name or an option that there is not."""
    for name, spec in prepare.items():
        if name not in PREPARATIONS:
            raise ConfigError(f"prepare: no stage {name!r}{did_you_mean(str(name), PREPARATIONS)}")
        if not isinstance(spec, Mapping):
            raise ConfigError(f"prepare.{name} must hold options by name, not {shown(spec)}")
        read_section(PREPARATIONS[name].options, spec, f"prepare.{name}")
    return [name for name in PREPARATIONS if name in prepare]
