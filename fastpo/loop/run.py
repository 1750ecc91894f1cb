"""`fastpo.iterate`: the iterations, one stage after another, each done once.

    iterate   options, parts (context.py), checks before the first sample (checks.py), then the iterations
    Run       one iteration after another; what is said of each, and which policy is the best
    Work      the stages of an iteration (work.py): options, inputs, outputs, work

A stage is skipped where it is done, goes on where it was begun, and is refused where its options or inputs have changed
(stages.py).
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastpo.checkpoints.run_lock import RunLock
from fastpo.config.online import rollouts
from fastpo.errors import ConfigError, TrainingError, did_you_mean
from fastpo.loop import checks, guards, online, prepare
from fastpo.loop import config as configs
from fastpo.loop.config import LoopConfig, Sample
from fastpo.loop.context import Context
from fastpo.loop.page import write_page
from fastpo.loop.recipes import options_of
from fastpo.loop.stages import Iteration
from fastpo.loop.work import OUTPUTS, STAGES, Work
from fastpo.models.loading import load_tokenizer
from fastpo.report.outputs import ensure_log_handler
from fastpo.sampling import make
from fastpo.sampling.items import Sampler
from fastpo.sampling.parts import read_json, write_json

log = logging.getLogger("fastpo")


@dataclass
class IterateResult:
    """What `fastpo.iterate` returns."""

    output_dir: Path
    policies: dict[str, str]  # "start", "iterate-1", ...: folders of models
    iterations: list[dict[str, Any]]  # of each: `samples`, `rows`, `eval`, `seconds`, `warnings`
    best: str = "start"  # the policy with the best figure on the held-out prompts; without those, the last one


def iterate(
    config: Any = None,
    *,
    recipe: str | None = None,
    sampler: Callable[[str], Sampler] | None = None,
    scorers: Mapping[str, Any] | None = None,
    selector: Any = None,
    teacher: Callable[[], Sampler] | None = None,
    start_from: str | None = None,
    dry_run: bool = False,
    **overrides: Any,
) -> IterateResult | None:
    """Sample, judge, pair, train, and again: `iterations` times, each from the policy that the one before has made.

    * `config`: options by name, or the path of a YAML file with them (fastpo/loop/config.py); `overrides` on top.
    * `recipe`: a system of a paper whose options are the defaults of all others (`fastpo recipes` lists them).
    * `sampler`: makes the sampler of a policy's folder, in place of the engine in `sample`.
    * `scorers`: further scorers by name: objects with the protocol of fastpo/sampling/items.py, or functions
      f(prompt, response, meta) -> number, None where there is no judgement; TRL's reward functions too.
    * `selector`: an object whose `select(item, scores)` gives a row or a `Dropped`, in place of `select`.
    * `teacher`: makes the sampler that the stages of `prepare` ask, in place of their option `teacher`.
    * `start_from`: "score", or "2:score": what was done from this stage on (of the last iteration) is moved aside and
      done again.
    * `dry_run`: prints stages, calls, tokens and disk, and returns None.

    Called again with the same options it goes on where it stopped. Raises fastpo.errors.FastpoError with one line.
    """
    ensure_log_handler(quiet=False)
    options = given_options(config, recipe, overrides)

    def made() -> Run:
        return Run(Context(configs.build(options), sampler=sampler, scorers=scorers or {}, selector=selector))

    preparing = prepare.check(options.get("prepare") or {})
    if dry_run:
        if preparing:
            print(f"first {', '.join(preparing)}; what follows from them is not known before")
        if not {"queries", "skillmix"} & set(preparing):
            print(made().plan())
        return None
    lock = RunLock(Path(str(options.get("output_dir", "."))))
    lock.take()
    try:
        if preparing:
            options = before_the_first(options, preparing, teacher)
        run = made()
        if start_from is not None:
            run.redo_from(start_from)
        return run()
    finally:
        lock.release()


def given_options(config: Any, recipe: str | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a recipe, a config and overrides, the last one on top."""
    given = configs.load(config) if isinstance(config, str | Path) else dict(config or {})
    given = configs.merged(given, overrides)
    name = recipe or given.get("recipe")
    return given if name is None else configs.merged(options_of(name), given) | {"recipe": name}


def resolve(config: Any, recipe: str | None, overrides: Mapping[str, Any]) -> LoopConfig:
    """The same, checked."""
    return configs.build(given_options(config, recipe, overrides))


def before_the_first(
    options: Mapping[str, Any], names: Sequence[str], teacher: Callable[[], Sampler] | None
) -> dict[str, Any]:
    """Does the stages of `prepare`; returns the options with what they have made in its place."""
    given, folder = dict(options), Path(options["output_dir"]) / "prepare"
    seed, failed, model = options.get("seed", 42), options.get("max_failed", 0.02), options.get("model")
    for name in names:
        spec = dict(options["prepare"][name])
        asked = spec.pop("teacher", None)
        if name == "sft" and spec.get("rows") is None and spec.get("pairs") is None and "skillmix" in names:
            spec["rows"] = str(folder / "skillmix" / "rows.jsonl")
        if name == "sft" and spec.get("pairs") is not None and (options.get("refine") or {}).get("template"):
            spec.setdefault("template", options["refine"]["template"])  # what the rounds of an iteration will ask
        make, encode = teachers(asked, model, folder / name) if teacher is None else (teacher, None)
        stage = prepare.stage(name, spec, folder / name, make, encode=encode, seed=seed, max_failed=failed, model=model)
        Iteration(folder, log.info).run(stage)
        made = str(stage.outputs[0])
        if name == "sft":
            given["model"] = made
        elif name == "queries":
            given["prompts"] = made
        elif name == "rules":
            scorers = dict(given.get("scorers") or {})
            found = [n for n, s in scorers.items() if isinstance(s, Mapping) and s.get("kind") == "rules"]
            if len(found) != 1:
                raise ConfigError("prepare.rules makes the rules of a scorer: give one of kind: rules in `scorers`")
            scorers[found[0]] = {**scorers[found[0]], "rules": read_json(Path(made))}
            given["scorers"] = scorers
    return given


def teachers(options: Any, model: Any, folder: Path) -> tuple[Callable[[], Sampler] | None, Any]:
    """(what makes the sampler of a stage before the first iteration, what gives the ids of its prompts)."""
    if options is None:
        return None, None
    spec = dict(options)
    name = str(spec.get("model", model)) if spec.get("engine", "local") == "local" else str(spec.get("model", ""))
    if spec.get("engine", "local") == "local":
        spec.pop("model", None)
    sample = configs.section(Sample, spec, "prepare.teacher")
    if sample.engine != "local":
        if sample.engine == "openai":  # all that is asked is a chat, and the server has the tokenizer
            sample = replace(sample, options={"tokens": "chat", **sample.options})
        return (lambda: make.make_sampler(sample, name, None, folder)), None
    tokenizer = load_tokenizer(name)
    return (lambda: make.make_sampler(sample, name, tokenizer, folder)), partial(make.prompt_ids, tokenizer)


class Run:
    """A run's iterations."""

    def __init__(self, context: Context):
        self.context, self.config, self.folder = context, context.config, Path(context.config.output_dir)

    def __call__(self) -> IterateResult:
        """What is not done yet."""
        config = self.config
        self.folder.mkdir(parents=True, exist_ok=True)
        shown = configs.as_json(config) | {"prompts": _shown(config.prompts)}
        write_json(self.folder / "iterate.json", shown)
        try:
            if self.context.heldout:
                self._do(Work(self.context, 0))
            for t in range(1, config.iterations + 1):
                log.info("iteration %d of %d: from %s", t, config.iterations, self.context.policy("current", t))
                self._do(Work(self.context, t))
                self.close_iteration(t)
        finally:
            write_page(self.folder)  # of a run that ends early too
        return self.result()

    def _do(self, work: Work) -> None:
        folder = Iteration(work.folder, log.info)
        for stage in work.stages():
            done, start = folder.done(stage.name), time.perf_counter()
            record = folder.run(stage)
            if not done:
                log.info("%s %s: %.1f s%s", work.folder.name, stage.name, time.perf_counter() - start,
                         _counts(record["counts"]))  # fmt: skip

    def close_iteration(self, t: int) -> None:
        """What went wrong is said, and the page is written."""
        config, figures = self.config.in_iteration(t), self.figures(t)
        first = self.figures(1)["samples"]
        found = guards.warnings_of(config.guards, figures["samples"], first, figures["rows"], figures["eval"])
        for warning in found:
            log.warning("%s: %s", self.context.iteration(t).name, warning)
        write_json(self.context.iteration(t) / "warnings.json", found)
        write_page(self.folder)
        if found and config.guards.stop:
            raise TrainingError(f"{self.context.iteration(t).name}: {found[0]} (guards.stop)")

    def figures(self, t: int) -> dict[str, Any]:
        """All that is known in numbers of an iteration."""
        folder = self.context.iteration(t)
        of = {name: read_json(folder / "stages" / f"{name}.json") or {} for name in STAGES}
        return {
            "iteration": t, "policy": str(folder / "train"),
            "samples": of["sample"].get("counts", {}) or online.sample_figures(of["train"].get("counts", {})),
            "rows": read_json(folder / "rows.json") or {}, "eval": read_json(folder / "eval.json") or {},
            "train": of["train"].get("counts", {}), "warnings": read_json(folder / "warnings.json") or [],
            "seconds": {name: found["seconds"] for name, found in of.items() if found},
        }  # fmt: skip

    def result(self) -> IterateResult:
        done = [self.figures(t) for t in range(1, self.config.iterations + 1)]
        policies = {"start": self.config.model} | {f"iterate-{f['iteration']}": f["policy"] for f in done}
        best = f"iterate-{len(done)}" if done else "start"
        measured = {"start": read_json(self.context.iteration(0) / "eval.json") or {}} | {
            f"iterate-{f['iteration']}": f["eval"] for f in done
        }
        for name in ("score", "win rate"):
            known = {policy: found[name] for policy, found in measured.items() if name in found}
            if len(known) >= len(done) > 0:
                best = max(known, key=lambda policy: known[policy])
                if name == "win rate" and known[best] < 0.5:
                    best = "start"
                break
        return IterateResult(self.folder, policies, done, best)

    def redo_from(self, where: str) -> None:
        """Move aside what was done from a stage on: `score`, of the last iteration that was begun, or `2:score`."""
        number, _, stage = where.rpartition(":")
        begun = [t for t in range(1, self.config.iterations + 1) if (self.context.iteration(t) / "stages").is_dir()]
        if stage not in STAGES:
            raise ConfigError(f"--from {where}: no stage {stage!r}{did_you_mean(stage, STAGES)}")
        if number and not number.isdigit():
            raise ConfigError(f"--from {where}: expected a stage, or an iteration and a stage such as 2:{stage}")
        first = int(number) if number else max(begun, default=1)
        for t in begun:
            if t < first:
                continue
            names = STAGES if t > first else STAGES[STAGES.index(stage) :]
            folder = self.context.iteration(t)
            old = Iteration(folder, log.info).set_aside(names, [folder / f for name in names for f in OUTPUTS[name]])
            if old is not None:
                log.info("%s: %s moved to %s", folder.name, ", ".join(names), old.name)

    def plan(self) -> str:
        """What the run would do: stages, calls, tokens and disk, as text."""
        lines = [f"{self.folder}: {self.config.iterations} iterations of {self.config.recipe or 'its own recipe'}"]
        weights = sum(p.stat().st_size for p in Path(self.config.model).glob("*.safetensors"))
        total_calls = total_tokens = 0
        for t in range(1, self.config.iterations + 1):
            config, prompts = self.config.in_iteration(t), len(self.context.of_iteration(t))
            if online.way_of(config.train):
                line, calls, tokens = self._online_plan(t, config, prompts)
                total_calls, total_tokens = total_calls + calls, total_tokens + tokens
                lines.append(line)
                continue
            made, by = self.context.scorers(config, 1), self.context.scored(t)
            each = config.sample.n + sum(int(s.get("n", 1)) for s in config.sample.sources)
            each += config.refine.rounds * config.sample.n
            k = each + len(config.extra_responses)
            calls = 0
            if by is not None:
                orders = 2 if config.score.both_orders else 1
                pairs = {"tournament": k + k // 2 - 1}.get(config.score.units, k * (k - 1) // 2)
                calls = prompts * {"response": k, "list": 1, "pair": pairs * orders}[made[by].unit]
            tokens = prompts * each * config.sample.max_tokens
            total_calls, total_tokens = total_calls + calls, total_tokens + tokens
            judged = f"{calls:,} judgements by {by}" if by else "nothing is scored"
            loss = config.train.get("loss_type", "dpo")
            policies = [f"{role} {config.train[role]}" for role in ("reference", "previous") if role in config.train]
            lines.append(
                f"  iteration {t}: {prompts:,} prompts; {prompts * each:,} responses of "
                f"{self.context.policy('current', t)}, at most {tokens:,} tokens; {judged}; "
                f"{', '.join([f'loss {loss}', *policies])}"
            )
        if self.context.heldout:
            lines.append(
                f"  measured on {len(self.context.heldout):,} held-out prompts, before and after each iteration"
            )
        disk = total_tokens * 12 + weights * self.config.iterations
        lines.append(
            f"  in all at most {total_calls:,} judgements, {total_tokens:,} sampled tokens and {disk / 1e9:.1f} GB on "
            "disk beside the checkpoints of training"
        )
        return "\n".join(lines)

    def _online_plan(self, t: int, config: LoopConfig, prompts: int) -> tuple[str, int, int]:
        """(its line, judgements, tokens at most) of an iteration that draws its responses as it trains."""
        train, made = checks.train_options(config), self.context.scorers(config, 1)
        steps, responses = online.steps_of(train, prompts)
        names = online.named(config, {name: scorer.unit for name, scorer in made.items()})
        each = rollouts(train).num_generations
        per_prompt = {"response": each, "list": 1, "pair": each * (each - 1)}
        calls = sum(responses // each * per_prompt[made[name].unit] for name in names)
        tokens = responses * train.max_completion_length
        reference = online.reads_reference(config.train, train)
        roles = [f"reference {config.train.get('reference', 'current')}"] if reference else []
        said = ", ".join([f"loss {train.losses[0]}", *roles])
        return (
            f"  iteration {t}: {prompts:,} prompts; {steps:,} steps on {responses:,} responses that "
            f"{self.context.policy('current', t)} gives as it trains, {each} a prompt, at most {tokens:,} tokens; "
            f"{calls:,} judgements by {', '.join(names)}; {said}", calls, tokens,
        )  # fmt: skip


def _shown(prompts: Any) -> Any:
    return str(prompts) if isinstance(prompts, str | Path) else f"{type(prompts).__name__} in memory"


def _counts(counts: Mapping[str, Any]) -> str:
    """The numbers among them, for a line of the log."""
    shown = [
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.3g}"
        for name, value in counts.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return f"; {', '.join(shown)}" if shown else ""
