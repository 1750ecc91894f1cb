"""`fastpo.iterate`: the iterations, one stage after another, each done once.

    iterate     options, parts, checks before the first sample, then the iterations
    Run         a run's folder: policies by name, the stages of an iteration, in order
    Run.stages  what each stage does, as data: options, inputs, outputs, work

A stage is skipped where it is done, goes on where it was begun, and is refused where its options or inputs have changed
(fastpo/loop/stages.py). What a later stage needs of an earlier one it reads from the files, never from memory, so that
an unbroken run and a resumed one do the same.
"""

import contextlib
import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastpo.checkpoints.run_lock import RunLock
from fastpo.errors import ConfigError, TrainingError, did_you_mean
from fastpo.loop import checks, evaluation, guards, rows, sampling
from fastpo.loop import config as configs
from fastpo.loop import prompts as prompt_files
from fastpo.loop.config import LoopConfig
from fastpo.loop.items import Item, Response, Sampler, Scorer, Scores, digest
from fastpo.loop.parts import read_json, read_lines, write_json, write_lines
from fastpo.loop.recipes import options_of
from fastpo.loop.requests import refinements, requests_of
from fastpo.loop.sample_stage import read_samples, sample_stage
from fastpo.loop.score_stage import read_scores, score_stage
from fastpo.loop.scorers import FunctionScorer, make_scorer
from fastpo.loop.selecting import gather
from fastpo.loop.stages import Iteration, Stage
from fastpo.losses import LOSSES
from fastpo.models.loading import load_tokenizer
from fastpo.report.outputs import ensure_log_handler
from fastpo.trainer import train

log = logging.getLogger("fastpo")

STAGES = ("prompts", "sample", "score", "select", "train", "eval")


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
    start_from: str | None = None,
    dry_run: bool = False,
    **overrides: Any,
) -> IterateResult | None:
    """Sample, judge, pair, train, and again: `iterations` times, each from the policy that the one before has made.

    * `config`: options by name, or the path of a YAML file with them (fastpo/loop/config.py); `overrides` on top.
    * `recipe`: a system of a paper whose options are the defaults of all others (`fastpo recipes` lists them).
    * `sampler`: makes the sampler of a policy's folder, in place of the engine in `sample`.
    * `scorers`: further scorers by name: objects with the protocol of fastpo/loop/items.py, or functions
      f(prompt, response, meta) -> number, None where there is no judgement; TRL's reward functions too.
    * `selector`: an object whose `select(item, scores)` gives a row or a `Dropped`, in place of `select`.
    * `start_from`: "score", or "2:score": what was done from this stage on (of the last iteration) is moved aside and
      done again.
    * `dry_run`: prints stages, calls, tokens and disk, and returns None.

    Called again with the same options it goes on where it stopped. Raises fastpo.errors.FastpoError with one line.
    """
    ensure_log_handler(quiet=False)
    run = Run(resolve(config, recipe, overrides), sampler=sampler, scorers=scorers or {}, selector=selector)
    if dry_run:
        print(run.plan())
        return None
    lock = RunLock(run.folder)
    lock.take()
    try:
        if start_from is not None:
            run.redo_from(start_from)
        return run()
    finally:
        lock.release()


def resolve(config: Any, recipe: str | None, overrides: Mapping[str, Any]) -> LoopConfig:
    """The options of a recipe, a config and overrides, the last one on top."""
    given = configs.load(config) if isinstance(config, str | Path) else dict(config or {})
    given = configs.merged(given, overrides)
    name = recipe or given.get("recipe")
    if name is not None:
        given = configs.merged(options_of(name), given) | {"recipe": name}
    return configs.build(given)


class Run:
    """A run's folder and its policies."""

    def __init__(
        self, config: LoopConfig, *, sampler: Callable[[str], Sampler] | None, scorers: Mapping[str, Any], selector: Any
    ):
        self.config, self.folder = config, Path(config.output_dir)
        self.make_sampler, self.given_scorers, self.selector = sampler, dict(scorers), selector
        self.tokenizer = load_tokenizer(config.model)
        self.items = prompt_files.read_prompts(config.prompts)
        for t in range(1, config.iterations + 1):
            self.of_iteration(t)  # too few prompts are found before the first sample
        self.heldout = [] if config.eval.prompts is None else prompt_files.read_prompts(config.eval.prompts, "eval.prompts")
        self.extra = prompt_files.extra_responses(config.extra_responses, self.items)
        for t in range(1, config.iterations + 1):
            now = config.in_iteration(t)
            made = self.scorers(now, 1)
            by = checks.deciding(now, made)
            checks.check(now, None if by is None else made[by], {name: s.unit for name, s in made.items()})

    # ------------------------------------------------------------ policies

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
        return prompt_files.part_of(self.items, t, config.iterations, config.prompts_per_iteration, config.seed)

    def encode(self, prompt: Any) -> Sequence[int]:
        return sampling.prompt_ids(self.tokenizer, prompt)

    # -------------------------------------------------------------- stages

    def __call__(self) -> IterateResult:
        """The iterations that are not done yet."""
        config = self.config
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "iterate.json", configs.plain(config) | {"prompts": _shown(config.prompts)})
        if self.heldout:
            self.do(0, "eval", *self.evaluation(0))
        for t in range(1, config.iterations + 1):
            log.info("iteration %d of %d: from %s", t, config.iterations, self.policy("current", t))
            for name, stage in self.stages(t):
                self.do(t, name, *stage)
            self.close_iteration(t)
        return self.result()

    def do(self, t: int, name: str, options: Mapping[str, Any], inputs: Mapping[str, Path], outputs: Sequence[Path],
           work: Callable[[], Mapping[str, Any]]) -> None:  # fmt: skip
        folder = Iteration(self.iteration(t), log.info)
        if folder.done(name):
            folder.run(Stage(name, options, inputs, outputs, work))
            return
        start = time.perf_counter()
        record = folder.run(Stage(name, options, inputs, outputs, work))
        counts = ", ".join(f"{key} {_number(value)}" for key, value in record["counts"].items()
                           if isinstance(value, int | float) and not isinstance(value, bool))  # fmt: skip
        log.info("%s %s: %.1f s%s", self.iteration(t).name, name, time.perf_counter() - start, counts and f"; {counts}")

    def stages(self, t: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """The stages of an iteration in order, each made when the one before is done."""
        yield "prompts", self.prompts(t)
        yield "sample", self.sampling(t)
        if self.scored(t):
            yield "score", self.scoring(t)
        yield "select", self.selection(t)
        yield "train", self.training(t)
        if self.heldout:
            yield "eval", self.evaluation(t)

    def prompts(self, t: int) -> tuple[Any, ...]:
        items, path = self.of_iteration(t), self.iteration(t) / "prompts.jsonl"
        options = {"iterations": self.config.iterations, "prompts_per_iteration": self.config.prompts_per_iteration,
                   "seed": self.config.seed, "iteration": t}  # fmt: skip
        inputs = _file(prompts=self.config.prompts)
        if not inputs:
            options["prompts"] = configs_digest(self.items)
        return (
            options, inputs, [path],
            lambda: {"prompts": write_lines(path, map(prompt_files.to_json, items))},
        )  # fmt: skip

    def read_items(self, t: int) -> list[Item]:
        return [prompt_files.from_json(line) for line in read_lines(self.iteration(t) / "prompts.jsonl")]

    def sampling(self, t: int) -> tuple[Any, ...]:
        config, folder = self.config.in_iteration(t), self.iteration(t) / "samples"
        policy = self.policy("current", t)
        options = {"sample": configs.as_json(config.sample), "refine": configs.as_json(config.refine), "seed": config.seed}

        def work() -> Mapping[str, Any]:
            items, counts = self.read_items(t), Counter[str]()
            with self.sampler(config, policy, folder.parent) as sampler:
                asked = requests_of(items, config.sample, self.encode, config.seed, t)
                counts.update(sample_stage(sampler, asked, folder / "part-0000.jsonl", max_failed=config.max_failed))
                for k in range(1, config.refine.rounds + 1):
                    before = read_samples(folder / f"part-{k - 1:04d}.jsonl")
                    asked = refinements(items, before, k, config.refine, config.sample, self.encode, config.seed, t)
                    counts.update(sample_stage(sampler, asked, folder / f"part-{k:04d}.jsonl", max_failed=config.max_failed))
            responses = [r for item in self.sampled(t, items) for r in item.responses]
            return {**counts, **guards.sample_figures(responses)}

        return options, _file(policy=policy) | {"prompts": self.iteration(t) / "prompts.jsonl"}, [folder], work

    def sampled(self, t: int, items: Sequence[Item]) -> list[Item]:
        """The prompts of an iteration with all that was sampled for them, in order."""
        found: dict[str, list[Response]] = {}
        for part in sorted((self.iteration(t) / "samples").glob("part-*.jsonl")):
            for name, responses in read_samples(part).items():
                found.setdefault(name, []).extend(responses)
        return [item.with_responses(found.get(item.id, ())) for item in items]

    def gathered(self, t: int, dropped: Counter[str] | None = None) -> list[Item]:
        """What is scored in an iteration: with the responses from outside, without what is not worth a judgement."""
        config, counts = self.config.in_iteration(t), Counter[str]() if dropped is None else dropped
        out = []
        for item in self.sampled(t, self.read_items(t)):
            outside = [Response(text, source=source) for source, text in self.extra.get(item.id, ())]
            item = item.with_responses([*item.responses, *outside])
            out.append(gather(item, config.select, config.sample.drop_truncated, counts))
        return out

    def scored(self, t: int) -> str | None:
        """The scorer that decides in an iteration, by name."""
        config = self.config.in_iteration(t)
        return checks.deciding(config, {**config.scorers, **self.given_scorers})

    def scoring(self, t: int) -> tuple[Any, ...]:
        config, folder, by = self.config.in_iteration(t), self.iteration(t), self.scored(t)
        assert by is not None
        scorer = self.scorers(config, t)[by]
        options = {"scorer": scorer.key, "score": configs.as_json(config.score), "select": _gathering(config)}

        def work() -> Mapping[str, Any]:
            with contextlib.closing(scorer):
                return score_stage(scorer, self.gathered(t), folder / "scores", plan=config.score.units,
                                   both_orders=config.score.both_orders, max_failed=config.max_failed)  # fmt: skip

        return options, {"samples": folder / "samples", **_file(**self.config.extra_responses)}, [folder / "scores"], work

    def selection(self, t: int) -> tuple[Any, ...]:
        config, folder, by = self.config.in_iteration(t), self.iteration(t), self.scored(t)
        options = {"select": configs.as_json(config.select), "refine": configs.as_json(config.refine),
                   "replay": {str(k): v for k, v in config.replay.items()}, "seed": config.seed,
                   "selector": None if self.selector is None else type(self.selector).__qualname__}  # fmt: skip
        earlier = {back: self.iteration(t - back) / "rows.jsonl" for back in config.replay if t - back >= 1}
        inputs = {"samples": folder / "samples"} | {f"rows of {back} back": path for back, path in earlier.items()}
        if by is not None:
            inputs["scores"] = folder / "scores"
        if config.select.extra_rows is not None:
            inputs |= _file(extra_rows=config.select.extra_rows)

        def work() -> Mapping[str, Any]:
            dropped = Counter[str]()
            items = [replace(item, prompt_ids=tuple(self.encode(item.prompt))) for item in self.gathered(t, dropped)]
            scores = {} if by is None else read_scores(folder / "scores", by, items)
            return rows.make_rows(
                config, items, scores, scored=by is not None, earlier=earlier, dropped=dropped, encode=self.encode,
                selector=self.selector or rows.make_selector(config, items, scores),
                rows_path=folder / "rows.jsonl", counts_path=folder / "rows.json",
            )  # fmt: skip

        return options, inputs, [folder / "rows.jsonl", folder / "rows.json"], work

    def training(self, t: int) -> tuple[Any, ...]:
        config, folder = self.config.in_iteration(t), self.iteration(t)
        policy, losses = self.policy("current", t), checks.losses_of(checks.train_options(config))
        given = {name: value for name, value in config.train.items() if name not in ("reference", "previous")}
        others = {}
        if any(name in LOSSES and LOSSES[name].reference for name in losses):
            others["ref_model"] = self.policy(config.train.get("reference", "current"), t)
        if "previous" in config.train:
            others["prev_model"] = self.policy(config.train["previous"], t)
        # The model as it is at the call is its own reference.
        models = {name: path for name, path in others.items() if path != policy}

        def work() -> Mapping[str, Any]:
            for name, path in {"policy": policy, **others}.items():
                log.info("%s %s: %s", folder.name, name, path)
            result = train(
                policy, str(folder / "rows.jsonl"), **models, args=given, output_dir=str(folder / "train"),
                resume_from_checkpoint="auto", **({"pair_policy": "explicit"} if config.select.rows == "kway" else {}),
            )  # fmt: skip
            return {name: value for name, value in result.metrics.items() if isinstance(value, int | float)}

        inputs = {"rows": folder / "rows.jsonl"} | _file(policy=policy, **others)
        return {"train": given, **others}, inputs, [folder / "train"], work

    def evaluation(self, t: int) -> tuple[Any, ...]:
        """Greedy answers of what iteration t has trained (0: the start), scored, and against another policy's."""
        config, folder = self.config.in_iteration(max(t, 1)), self.iteration(t) / "eval"
        name = config.eval.scorer or self.scored(max(t, 1)) or next(iter({**config.scorers, **self.given_scorers}), None)
        scorer = None if name is None else self.scorers(config, max(t, 1))[name]
        policy = self.policy("current", t + 1)
        against = 0 if config.eval.against == "start" else int(self.policy_number(config.eval.against, t))
        sample = replace(
            config.sample, n=1, temperature=config.eval.temperature, top_p=1.0, top_k=0, sources=(),
            max_tokens=config.eval.max_tokens or config.sample.max_tokens,
        )  # fmt: skip
        options = {"eval": configs.as_json(config.eval), "sample": configs.as_json(sample),
                   "scorer": None if scorer is None else scorer.key, "heldout": configs_digest(self.heldout)}  # fmt: skip
        inputs = _file(policy=policy)
        if t > 0:
            inputs["answers of the other policy"] = self.iteration(against) / "eval" / "answers.jsonl"

        def work() -> Mapping[str, Any]:
            with self.sampler(replace(config, sample=sample), policy, folder) as sampler:
                asked = requests_of(self.heldout, sample, self.encode, config.seed, "eval")
                sample_stage(sampler, asked, folder / "answers.jsonl", max_failed=config.max_failed)
            answers = read_samples(folder / "answers.jsonl")
            others = read_samples(self.iteration(against) / "eval" / "answers.jsonl") if t > 0 else {}
            figures: dict[str, Any] = guards.sample_figures([r for found in answers.values() for r in found])
            if scorer is not None and (scorer.unit == "response" or t > 0):
                items = [evaluation.compared(item, answers[item.id][0], others.get(item.id, [None])[0], scorer)
                         for item in self.heldout if item.id in answers]  # fmt: skip
                with contextlib.closing(scorer):
                    score_stage(scorer, items, folder / "scores", plan="all", both_orders=config.score.both_orders,
                                max_failed=1.0)  # fmt: skip
                scores = read_scores(folder / "scores", scorer.name, items)
                before = self.scores_of_answers(against, scorer) if t > 0 else None
                figures |= evaluation.figures(scores, before, len(self.heldout))
            figures |= {"policy": policy, "against": config.eval.against}
            write_json(self.iteration(t) / "eval.json", figures)
            return figures

        return options, inputs, [self.iteration(t) / "eval.json", folder], work

    def scores_of_answers(self, t: int, scorer: Scorer) -> Mapping[str, Scores] | None:
        """Those of an earlier evaluation, where answers are scored one by one."""
        if scorer.unit != "response":
            return None
        folder = self.iteration(t) / "eval"
        answers = read_samples(folder / "answers.jsonl")
        items = [item.with_responses(answers[item.id][:1]) for item in self.heldout if item.id in answers]
        return read_scores(folder / "scores", scorer.name, items)

    def policy_number(self, name: str, t: int) -> int:
        """The iteration whose evaluation has the answers of a policy, for eval.against."""
        if name in ("current", "previous"):
            return max(0, t - 1)
        if name.startswith("iterate-") and name[8:].isdigit():
            return min(int(name[8:]), t)
        raise ConfigError(f"eval.against={name!r}: answers are there of start, previous and iterate-N only")

    # ------------------------------------------------------- parts by name

    @contextlib.contextmanager
    def sampler(self, config: LoopConfig, policy: str, folder: Path) -> Iterator[Sampler]:
        """The engine that answers for a policy, closed at the end."""
        if self.make_sampler is not None:
            made = self.make_sampler(policy)
        else:
            made = sampling.make_sampler(config.sample, policy, self.tokenizer, folder)
        try:
            yield made
        finally:
            made.close()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def scorers(self, config: LoopConfig, t: int) -> dict[str, Scorer]:
        """All scorers of an iteration by name."""
        made = {name: make_scorer(name, spec, self.policies(t), self.folder) for name, spec in config.scorers.items()}
        for name, given in self.given_scorers.items():
            made[name] = FunctionScorer(given, name=name) if callable(given) and not hasattr(given, "score") else given
        return made

    # ----------------------------------------------------------- the ending

    def close_iteration(self, t: int) -> None:
        """What went wrong is said, and the page is written."""
        config, figures = self.config.in_iteration(t), self.figures(t)
        first = self.figures(1)["samples"]
        found = guards.warnings_of(config.guards, figures["samples"], first, figures["rows"], figures["eval"])
        for warning in found:
            log.warning("%s: %s", self.iteration(t).name, warning)
        write_json(self.iteration(t) / "warnings.json", found)
        if found and config.guards.stop:
            raise TrainingError(f"{self.iteration(t).name}: {found[0]} (guards.stop)")

    def figures(self, t: int) -> dict[str, Any]:
        """All that is known in numbers of an iteration."""
        folder = self.iteration(t)
        of = {name: read_json(folder / "stages" / f"{name}.json") or {} for name in STAGES}
        return {
            "iteration": t, "policy": str(folder / "train"), "samples": of["sample"].get("counts", {}),
            "rows": read_json(folder / "rows.json") or {}, "eval": read_json(folder / "eval.json") or {},
            "train": of["train"].get("counts", {}), "warnings": read_json(folder / "warnings.json") or [],
            "seconds": {name: found["seconds"] for name, found in of.items() if found},
        }  # fmt: skip

    def result(self) -> IterateResult:
        done = [self.figures(t) for t in range(1, self.config.iterations + 1)]
        policies = {"start": self.config.model} | {f"iterate-{f['iteration']}": f["policy"] for f in done}
        best = f"iterate-{len(done)}"
        measured = {"start": read_json(self.iteration(0) / "eval.json") or {}} | {
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
        begun = [t for t in range(1, self.config.iterations + 1) if (self.iteration(t) / "stages").is_dir()]
        if stage not in STAGES:
            raise ConfigError(f"--from {where}: no stage {stage!r}{did_you_mean(stage, STAGES)}")
        if number and not number.isdigit():
            raise ConfigError(f"--from {where}: expected a stage, or an iteration and a stage such as 2:{stage}")
        first = int(number) if number else max(begun, default=1)
        of_stage = {"prompts": ["prompts.jsonl"], "sample": ["samples"], "score": ["scores"],
                    "select": ["rows.jsonl", "rows.json"], "train": ["train"],
                    "eval": ["eval.json", "eval", "warnings.json"]}  # fmt: skip
        for t in begun:
            if t < first:
                continue
            names = STAGES if t > first else STAGES[STAGES.index(stage) :]
            folder = self.iteration(t)
            old = Iteration(folder, log.info).set_aside(names, [folder / f for name in names for f in of_stage[name]])
            if old is not None:
                log.info("%s: %s moved to %s", folder.name, ", ".join(names), old.name)

    def plan(self) -> str:
        """What the run would do: stages, calls, tokens and disk, as text."""
        lines = [f"{self.folder}: {self.config.iterations} iterations of {self.config.recipe or 'its own recipe'}"]
        weights = sum(p.stat().st_size for p in Path(self.config.model).glob("*.safetensors"))
        total_calls = total_tokens = 0
        for t in range(1, self.config.iterations + 1):
            config, prompts = self.config.in_iteration(t), len(self.of_iteration(t))
            made, by = self.scorers(config, 1), self.scored(t)
            each = (config.sample.n + sum(int(s.get("n", 1)) for s in config.sample.sources))
            each += config.refine.rounds * config.sample.n
            k = each + len(config.extra_responses)
            calls = 0
            if by is not None:
                orders = 2 if config.score.both_orders else 1
                pairs = {"tournament": k + k // 2 - 1}.get(config.score.units, k * (k - 1) // 2)
                calls = prompts * {"response": k, "list": 1, "pair": pairs * orders}[made[by].unit]
            tokens = prompts * each * config.sample.max_tokens
            total_calls, total_tokens = total_calls + calls, total_tokens + tokens
            lines.append(
                f"  iteration {t}: {prompts:,} prompts; {prompts * each:,} responses of {self.policy('current', t)}, at "
                f"most {tokens:,} tokens; {f'{calls:,} judgements by {by}' if by else 'nothing is scored'}; loss "
                f"{config.train.get('loss_type', 'dpo')}, reference {config.train.get('reference', 'current')}"
                + (f", previous {config.train['previous']}" if "previous" in config.train else "")
            )
        if self.heldout:
            lines.append(f"  measured on {len(self.heldout):,} held-out prompts, before and after each iteration")
        disk = total_tokens * 12 + weights * self.config.iterations
        lines.append(
            f"  in all at most {total_calls:,} judgements, {total_tokens:,} sampled tokens and {disk / 1e9:.1f} GB on disk "
            "beside the checkpoints of training"
        )
        return "\n".join(lines)


def configs_digest(items: Sequence[Item]) -> str:
    return digest([prompt_files.to_json(item) for item in items])


def _file(**paths: Any) -> dict[str, Path]:
    """Those that are files or folders of this machine: names of a hub have no content here."""
    return {name: Path(path) for name, path in paths.items() if isinstance(path, str | Path) and Path(path).exists()}


def _gathering(config: LoopConfig) -> dict[str, Any]:
    """What decides which responses are scored."""
    select = config.select
    return {"drop_truncated": config.sample.drop_truncated, "min_chars": select.min_chars, "max_chars": select.max_chars}


def _shown(prompts: Any) -> Any:
    return str(prompts) if isinstance(prompts, str | Path) else f"{type(prompts).__name__} in memory"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
