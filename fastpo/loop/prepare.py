"""The stages before the first iteration, by name: what `prepare` of a run may hold, and the order in which it is done.

Each is `NAME(spec, teacher, folder, *, encode, seed, max_failed) -> counts`: it reads its options from `spec`, asks
`teacher` (a Sampler), and writes into `folder` files that grow, so that it goes on where it was stopped, and at the end
its output. `encode(prompt)` gives a prompt's token ids; None where the teacher's engine has its own tokenizer.

A stage's `spec` may have `teacher`, the options of that engine, which are for those who make it.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpo.errors import ConfigError, did_you_mean, shown
from fastpo.loop import autorule, pugc, skillmix
from fastpo.loop.config import as_json
from fastpo.loop.config import section as read_section
from fastpo.loop.stages import Stage
from fastpo.loop.supervise import Supervise, sft
from fastpo.loop.teacher import Encode
from fastpo.sampling.items import Sampler


@dataclass(frozen=True)
class Preparation:
    """One of them."""

    work: Callable[..., dict[str, Any]]
    options: type
    output: str  # file or folder in the stage's folder
    gives: str  # what of the run it stands for
    inputs: tuple[str, ...]  # options that name files
    templates: Callable[[Any], Mapping[str, Any]] | None = None  # of those that ask a teacher


# In this order: supervision may read the rows of skillmix.
PREPARATIONS: Mapping[str, Preparation] = {
    "skillmix": Preparation(skillmix.skillmix, skillmix.SkillMix, "rows.jsonl", "prepare.sft.rows", ("skills", "types"),
                            skillmix.templates_of),
    "queries": Preparation(pugc.queries, pugc.Queries, "prompts.jsonl", "prompts", ("texts",), pugc.templates_of),
    "rules": Preparation(autorule.rules, autorule.AutoRule, "rules.json", "scorers.NAME.rules", ("pairs",),
                         autorule.templates_of),
    "sft": Preparation(sft, Supervise, "train", "model", ("rows", "pairs", "model")),
}  # fmt: skip


def check(prepare: Mapping[str, Any]) -> list[str]:
    """The names of the stages that a run has, in order; ConfigError for what is not there: a name, an option, a
    template or a word in it."""
    for name, spec in prepare.items():
        if name not in PREPARATIONS:
            raise ConfigError(f"prepare: no stage {name!r}{did_you_mean(str(name), PREPARATIONS)}")
        if not isinstance(spec, Mapping):
            raise ConfigError(f"prepare.{name} must hold options by name, not {shown(spec)}")
        _options(name, spec)
    return [name for name in PREPARATIONS if name in prepare]


def stage(
    name: str, spec: Mapping[str, Any], folder: Path, teacher: Callable[[], Sampler] | None, *, encode: Encode | None,
    seed: Any, max_failed: float, model: str | None = None,
) -> Stage:  # fmt: skip
    """A stage of an Iteration whose folder is around `folder`, with all that decides what it does.

    `teacher` makes the sampler when the work begins; it is closed at the end. `model`: what `sft` trains by default.
    """
    kind = PREPARATIONS[name]
    options, texts = _options(name, spec)
    if kind.templates is not None and teacher is None:
        raise ConfigError(f"prepare.{name} asks a model: give one as prepare.{name}.teacher")
    files = {}
    given = {"model": model} if name == "sft" and model is not None and spec.get("model") is None else {}
    for key in kind.inputs:
        path = given.get(key, getattr(options, key))
        if isinstance(path, str | Path) and Path(path).exists():
            files[key] = Path(path)

    def work() -> Mapping[str, Any]:
        with contextlib.ExitStack() as stack:
            asked = None
            if kind.templates is not None and teacher is not None:
                asked = teacher()
                stack.callback(asked.close)
            return kind.work(spec, asked, folder, encode=encode, seed=seed, max_failed=max_failed, **given)

    decided = {"options": as_json(options), "templates": texts, "seed": seed, **given}
    return Stage(name, decided, files, [folder / kind.output], work)


def _options(name: str, spec: Mapping[str, Any]) -> tuple[Any, dict[str, str]]:
    """(the checked options of a stage, its templates' texts)."""
    kind = PREPARATIONS[name]
    options = read_section(kind.options, spec, f"prepare.{name}")
    return options, {} if kind.templates is None else {key: t.text for key, t in kind.templates(options).items()}
