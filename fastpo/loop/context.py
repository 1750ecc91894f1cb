"""What every stage of a run needs: options, prompts, policies by name, the engines that sample and score."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fastpo.errors import ConfigError
from fastpo.loop import checks, online
from fastpo.loop import prompts as prompt_files
from fastpo.loop.config import LoopConfig
from fastpo.models.loading import load_tokenizer
from fastpo.sampling import make
from fastpo.sampling.items import Item, Sampler, Scorer, digest
from fastpo.scoring.scorers import make_scorer


class Context:
    """A run's options and parts. What does not fit together is refused here, before the first sample."""

    def __init__(
        self, config: LoopConfig, *, sampler: Callable[[str], Sampler] | None, scorers: Mapping[str, Any], selector: Any
    ):
        self.config, self.folder = config, Path(config.output_dir)
        self.make_sampler, self.given_scorers, self.selector = sampler, dict(scorers), selector
        self.tokenizer = load_tokenizer(config.model)
        self.items = [] if config.prompts is None else prompt_files.read_prompts(config.prompts)
        self.prompts_digest = _digest(self.items)
        for t in range(1, config.iterations + 1):
            self.of_iteration(t)  # too few prompts are found before the first sample
        held = config.eval.prompts
        self.heldout = [] if held is None else prompt_files.read_prompts(held, "eval.prompts")
        self.heldout_digest = _digest(self.heldout)
        self.extra = prompt_files.extra_responses(config.extra_responses, self.items)
        for t in range(1, config.iterations + 1):
            now = config.in_iteration(t)
            made = self.scorers(now, 1)
            by = checks.deciding(now, made)
            checks.check(now, None if by is None else made[by], {name: s.unit for name, s in made.items()})
            if online.way_of(now.train):
                online.check_made(now, made)

    def policy(self, name: str, t: int) -> str:
        """The folder of a policy by its name in iteration t, in which `current` is what is sampled and trained from."""
        number = {"start": 0, "current": t - 1, "previous": t - 2, "before": -1}.get(name)
        if number is None and name.startswith("iterate-") and name[8:].isdigit():
            number = int(name[8:])
            if number >= t:
                raise ConfigError(f"there is no {name} yet in iteration {t}")
        if number is None:
            return name
        if number < 0:
            if name == "before" and self.config.before is None:
                raise ConfigError("the policy 'before' is what `model` was trained from: give its path as `before`")
            return self.config.before or self.config.model
        return self.config.model if number == 0 else str(self.iteration(number) / "train")

    def policies(self, t: int) -> dict[str, str]:
        """All of them by name, in iteration t."""
        names = ["start", "current", "previous", *(f"iterate-{k}" for k in range(1, t))]
        if self.config.before is not None:
            names.append("before")
        return {name: self.policy(name, t) for name in names}

    def iteration(self, t: int) -> Path:
        return self.folder / f"iter-{t:03d}"

    def of_iteration(self, t: int) -> list[Item]:
        config = self.config
        return prompt_files.part_of(
            self.items, t, config.iterations, config.prompts_per_iteration, config.seed, config.reuse_prompts
        )

    def encode(self, prompt: Any) -> Sequence[int]:
        """The ids of a prompt as the policy sees it."""
        return make.prompt_ids(self.tokenizer, prompt)

    def encode_all(self, prompts: Sequence[Any]) -> list[tuple[int, ...]]:
        """The same of many."""
        return make.prompts_ids(self.tokenizer, prompts)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def answers_of(self, name: str, t: int) -> int:
        """The iteration whose evaluation has the answers of a policy, for eval.against."""
        if name == "start":
            return 0
        if name in ("current", "previous"):
            return max(0, t - 1)
        if name.startswith("iterate-") and name[8:].isdigit():
            return min(int(name[8:]), t)
        raise ConfigError(f"eval.against={name!r}: answers are there of start, previous and iterate-N only")

    @property
    def sampler_key(self) -> Any:
        """What tells one made by the caller from another."""
        return getattr(self.make_sampler, "key", getattr(self.make_sampler, "__qualname__", None))

    def measuring(self, t: int) -> Scorer | None:
        """The scorer of the evaluation."""
        t = max(t, 1)
        config = self.config.in_iteration(t)
        made = self.scorers(config, t)
        if online.way_of(config.train) and not config.eval.scorer:
            return online.measure(config, checks.train_options(config), made)
        name = config.eval.scorer or self.scored(t) or next(iter(made), None)
        return None if name is None else made[name]

    def scored(self, t: int) -> str | None:
        """The scorer that decides in an iteration, by name."""
        config = self.config.in_iteration(t)
        return checks.deciding(config, {**config.scorers, **self.given_scorers})

    def sampler(self, config: LoopConfig, policy: str, folder: Path) -> AbstractContextManager[Sampler]:
        """The engine that answers for a policy, closed at the end."""
        if self.make_sampler is not None:
            return make.lent(self.make_sampler(policy))
        return make.lent(make.make_sampler(config.sample, policy, self.tokenizer, folder))

    def scorers(self, config: LoopConfig, t: int) -> dict[str, Scorer]:
        """All scorers of an iteration by name: those of the options, and those that the caller gave."""
        given, policies = self.sections(config), self.policies(t)
        sections = {name: spec for name, spec in given.items() if isinstance(spec, Mapping)}
        return {
            name: make_scorer(name, spec, policies, self.folder, others=sections) if name in sections else spec
            for name, spec in given.items()
        }

    def sections(self, config: LoopConfig) -> dict[str, Any]:
        """Of all scorers by name: a section, or what the caller gave."""
        out: dict[str, Any] = dict(config.scorers)
        for name, given in self.given_scorers.items():
            of_function = callable(given) and not hasattr(given, "score")
            out[name] = {"kind": "function", "function": given} if of_function else given
        return out


def _digest(items: Sequence[Item]) -> str:
    return digest([prompt_files.to_json(item) for item in items])
