"""`fastpo.evaluate`: answers of policies, verdicts of a judge, a figure with its interval, and a page to read.

    sampled/NAME.jsonl   what each policy answered, line by line as it comes
    judged/              verdicts, line by line as they come (fastpo/loop/score_stage.py)
    answers.jsonl        all answers: {id, prompt, model, text, finished, tokens}
    verdicts.jsonl       all verdicts: {id, shown, judge, value, status, raw}
    result.json          figures, counts, keys, versions
    report.html          the page

Sampling and judging are stages of the loop (fastpo/loop/stages.py): done once, gone on with after a kill, refused where
what they depend on has changed. The figures are made anew each time.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fastpo.checkpoints.run_lock import RunLock
from fastpo.errors import ConfigError, did_you_mean
from fastpo.evals.inputs import UNKNOWN_END, answers_of, drawn, there, verdict_rows
from fastpo.evals.judging import Cost, FileJudge, cost, judge_of, verdicts_so_far
from fastpo.evals.measure import Asked, Measure
from fastpo.evals.measures import measure_of
from fastpo.evals.options import EvalConfig, Source, build, sources
from fastpo.evals.page import write_page
from fastpo.evals.policies import check_policy
from fastpo.evals.summary import given_as, how, sampling
from fastpo.loop import config as configs
from fastpo.loop.requests import requests_of
from fastpo.loop.sample_stage import read_samples, sample_stage
from fastpo.loop.stages import Iteration, Stage, versions
from fastpo.models.loading import load_tokenizer
from fastpo.report.outputs import ensure_log_handler
from fastpo.sampling import make
from fastpo.sampling.items import Item, Response, Sampler, digest
from fastpo.sampling.parts import lines_so_far, read_json, write_json, write_lines

log = logging.getLogger("fastpo")
JUDGE = "judge"
_LONGEST = "abcd"  # stands for a token of an answer that is not there yet


@dataclass
class EvalResult:
    """What `fastpo.evaluate` returns. `figures`: of each model by name `value`, `error`, `interval`, and what belongs
    to them; `counts`: of answers and verdicts, the failed ones by status."""

    output_dir: Path
    name: str
    figures: dict[str, dict[str, Any]]
    counts: dict[str, Any]
    result: dict[str, Any] = field(default_factory=dict)  # all that result.json holds

    @property
    def value(self) -> float | None:
        """The figure of the first model."""
        return next((found["value"] for found in self.figures.values()), None)


def evaluate(
    name: str,
    config: Any = None,
    *,
    sampler: Callable[[str], Sampler] | None = None,
    start_from: str | None = None,
    dry_run: bool = False,
    **overrides: Any,
) -> EvalResult | None:
    """The figure of a measure: `alpaca_eval`, `wildbench`, `arena`, `rewardbench`, `win_rate`, `verifier`, `held_out`.

    * `config`: options by name, or the path of a YAML file with them (fastpo/evals/options.py); `overrides` on top.
      `judge` may be a scorer's section, an object that is a scorer, or a function f(prompt, response, meta) -> number.
    * `sampler`: makes the sampler of a policy, in place of the engine in `sample`.
    * `start_from`: "sample", "sample-NAME" or "judge": what was done from this stage on is moved aside and done again.
    * `dry_run`: prints the cost, and returns None.

    Called again with the same options it goes on where it stopped. Raises fastpo.errors.FastpoError with one line.
    """
    ensure_log_handler(quiet=False)
    given = configs.load(config) if isinstance(config, str | Path) else dict(config or {})
    options = build({**configs.merged(given, {k: v for k, v in overrides.items() if not _whole(k)}),
                     **{k: v for k, v in overrides.items() if _whole(k)}})  # fmt: skip
    measure = measure_of(name, options.measure)
    if options.annotations is not None:
        return _of_annotations(measure, options, dry_run)
    made = Evaluation(measure, options, sampler)
    if dry_run:
        print(made.cost(start_from))
        return None
    lock = RunLock(made.folder)
    lock.take()
    try:
        if start_from is not None:
            made.redo_from(start_from)
        return made()
    finally:
        lock.release()
        made.close()


def _whole(name: str) -> bool:
    """Options that replace what a file says, and are not merged with it."""
    return name in ("prompts", "judge", "verdicts", "annotations", "baseline")


def _of_annotations(measure: Measure, options: EvalConfig, dry_run: bool) -> EvalResult | None:
    for name in ("judge", "verdicts", "model", *(() if measure.name == "arena" else ("baseline",))):
        if getattr(options, name) is not None:
            raise ConfigError(f"annotations hold answers and verdicts: leave {name} out")
    if dry_run:
        print(f"{measure.name}: nothing is asked, the annotations are there")
        return None
    figures = measure.of_annotations(options.annotations, options.prompts, options.seed, options.baseline)
    folder = Path(options.output_dir)
    # Which of WildBench's figures it is, the annotations say: comparisons are given by the baseline's name.
    figure, even = measure.of_unit("pair" if isinstance(options.annotations, Mapping) else "response")
    result = _plain({
        "name": measure.name, "figure": figure, "even": even, "figures": figures, "counts": {},
        "options": {**measure.given}, "annotations": given_as(options.annotations), "versions": versions(),
    })  # fmt: skip
    write_json(folder / "result.json", result)
    write_page(folder, result, [], [], options.seed)
    return EvalResult(folder, measure.name, figures, {}, result)


class Evaluation:
    """One evaluation: what it is of is read and checked when it is made, before the first sample."""

    def __init__(self, measure: Measure, config: EvalConfig, sampler: Callable[[str], Sampler] | None):
        self.measure, self.config, self.make_sampler = measure, config, sampler
        self.folder = Path(config.output_dir)
        every = measure.prompts(config.prompts)
        limit = config.limit if config.limit is not None else measure.limit
        items = drawn(every, limit, config.seed)
        self._limit = len(items) if len(items) < len(every) else None
        if config.baseline is None and measure.compares:
            config = replace(config, baseline=measure.baseline(items))
        models, others = sources(config)
        self.sources = [*models, *others]
        if self.sources and measure.of_judge:
            raise ConfigError(
                f"{measure.name} is of the judge, the answers are the rows': leave model and baseline out"
            )
        names = [one.name for one in models]
        baselines = [one.name for one in others] or ([str(config.baseline)] if config.baseline is not None else [])
        self.asked = Asked(names, baselines, items, {}, None, False, config.seed, config.max_failed, every)
        self.items = measure.items(self.asked)
        known = measure.items(replace(self.asked, items=every))
        self.there = {one.name: answers_of(one, self.items, known) for one in self.sources if one.answers is not None}
        for one in self.sources:
            if one.policy is not None:
                check_policy(one)
        self.asked.scorer = self._judge()
        both = measure.both if config.both_orders is None else config.both_orders
        if isinstance(self.asked.scorer, FileJudge) and config.both_orders is None:
            both = both or self.asked.scorer.both
        self.asked.both = both and self.asked.scorer.unit == "pair"
        if not self.sources and not measure.of_judge:
            raise ConfigError(f"{measure.name} needs model, a policy or a file of answers")
        several = [one.name for one in self.sources if one.sample.n > 1 and one.policy is not None]
        if several and (self.asked.scorer.unit != "response" or measure.name not in ("verifier", "held_out")):
            raise ConfigError(
                f"{several[0]}: sample.n is above 1, and {measure.name} judges one answer a prompt: several are for "
                "verifier and held_out, by a judge of responses"
            )
        measure.check(replace(self.asked, answers=self._expected()[0]))

    def _judge(self) -> Any:
        config = self.config
        if config.verdicts is not None:
            return FileJudge(verdict_rows(config.verdicts))
        if config.judge is None:
            raise ConfigError(
                f"{self.measure.name} needs a judge: a scorer's section (docs/loop-scorers.md), or verdicts"
            )
        policies = {one.name: one.policy for one in self.sources if one.policy is not None}
        return judge_of(config.judge, policies, self.folder, self.measure.own_judge)

    # ---- before the start

    def cost(self, start_from: str | None = None) -> str:
        """One line: what is still to be sampled and judged."""
        redone = [] if start_from is None else self._from(start_from)
        answers, left = self._expected(redone)
        sampled = sum(left.values())
        tokens = sum(left[one.name] * one.sample.max_tokens for one in self.sources if one.name in left)
        samples = f"{sampled:,} answers to sample, at most {tokens:,} tokens" if sampled else "no answers to sample"
        asked = replace(self.asked, answers=answers)
        state = self._state(self.judging(asked), redone)
        units = () if state == "done" else self.measure.units(asked)
        done = verdicts_so_far(asked.scorer, self.folder / "judged") if state == "running" else None
        judged = _cost_line(asked.scorer.name, cost(asked.scorer, units, done), "at most" if sampled else "about")
        return f"{self.measure.name}: {len(self.items):,} prompts; {samples}; {judged}"

    def _state(self, stage: Stage, redone: Sequence[str]) -> str:
        """ "done", or "running" where it was begun; "" where it was not, or with other options."""
        found = None if stage.name in redone else Iteration(self.folder, log.info).manifest(stage.name)
        same = found is not None and digest(found["options"]) == digest(dict(stage.options))
        return found["state"] if found is not None and same else ""

    def _expected(self, redone: Sequence[str] = ()) -> tuple[dict[str, dict[str, list[Response]]], dict[str, int]]:
        """(answers of all models, those to come being as long as they may be; how many are to come, by model)."""
        answers, left = dict(self.there), {}
        for one in self.sources:
            if one.policy is None:
                continue
            state, path = self._state(self._sampling(one), redone), self._sampled(one)
            if state == "done" and path.exists():
                answers[one.name] = self._read(one)
                continue
            text = _LONGEST * one.sample.max_tokens
            answers[one.name] = {i.id: [Response(text, source=one.name)] * one.sample.n for i in self.items}
            there = sum("status" not in line for line in lines_so_far(path)) if state == "running" else 0
            left[one.name] = len(self.items) * one.sample.n - there
        return answers, left

    # ---- the stages

    def stages(self) -> list[Stage]:
        """Those that sample; the one that judges reads what they wrote, and is made by `judging`."""
        return [self._sampling(one) for one in self.sources if one.policy is not None]

    def _sampling(self, one: Source) -> Stage:
        assert one.policy is not None
        path, policy = self._sampled(one), one.policy
        sampler = getattr(self.make_sampler, "key", getattr(self.make_sampler, "__qualname__", None))
        options = {"policy": policy, "sample": sampling(one), "seed": self.config.seed,
                   "limit": self._limit, "sampler": sampler,
                   "texts": {"prompts": digest([[item.id, _plain(item.prompt)] for item in self.items])}}  # fmt: skip

        def work() -> Mapping[str, Any]:
            requests = requests_of(self.items, one.sample, partial(_encoded, policy), self.config.seed, "evaluate")
            with make.lent(self._sampler(one)) as sampler:
                return sample_stage(
                    sampler, requests, path, max_failed=self.config.max_failed, name=f"sample {one.name}"
                )

        return Stage(f"sample-{one.name}", options, there(policy), [path, path.with_suffix(".sampler.json")], work)

    def _sampler(self, one: Source) -> Sampler:
        assert one.policy is not None
        if self.make_sampler is not None:
            return self.make_sampler(one.policy)
        return make.make_sampler(one.sample, one.policy, load_tokenizer(one.policy), self.folder / "sampled")

    def judging(self, asked: Asked) -> Stage:
        folder = self.folder / "judged"
        # What a person changed has a name that comes before the texts that changed with it: the first is what is said.
        texts = {"prompts": digest(_plain([_of_prompt(item) for item in asked.items]))}
        for name, found in asked.answers.items():
            texts[f"answers of {name}"] = digest({key: [r.text for r in own] for key, own in found.items()})
        options = {"measure": self.measure.name, "judge": configs.as_json(dict(asked.scorer.key)),
                   "both_orders": asked.both, "baselines": asked.baselines, "seed": self.config.seed,
                   "limit": self._limit, "max_words": self.measure.given.get("max_words"), "texts": texts}  # fmt: skip
        return Stage(JUDGE, options, {}, [folder], lambda: self.measure.judge(asked, folder))

    def answers(self) -> dict[str, dict[str, list[Response]]]:
        """Of all models, by prompt."""
        found = dict(self.there)
        for one in self.sources:
            if one.policy is not None:
                found[one.name] = self._read(one)
        return {one.name: found[one.name] for one in self.sources}

    def _sampled(self, one: Source) -> Path:
        return self.folder / "sampled" / f"{one.name}.jsonl"

    def _read(self, one: Source) -> dict[str, list[Response]]:
        return {
            key: [replace(response, source=one.name) for response in own]
            for key, own in read_samples(self._sampled(one)).items()
        }

    def __call__(self) -> EvalResult:
        """What is not done yet, then the figures."""
        log.info("%s", self.cost())
        folder = Iteration(self.folder, log.info)
        counts: dict[str, Any] = {"prompts": len(self.items), "answers": {}}
        for stage in self.stages():
            counts["answers"][stage.name.removeprefix("sample-")] = dict(folder.run(stage)["counts"])
        self.asked.answers = self.answers()
        counts["verdicts"] = {k: v for k, v in folder.run(self.judging(self.asked))["counts"].items() if k != "members"}
        answers, verdicts = self._answer_lines(), list(self.measure.verdicts(self.asked, self.folder / "judged"))
        figures = self.measure.figures(self.asked, self.folder / "judged")
        for name, found in figures.items():
            if name in self.asked.answers:
                found["answers"] = lengths(self.asked.answers[name], len(self.items))
        write_lines(self.folder / "answers.jsonl", answers)
        write_lines(self.folder / "verdicts.jsonl", verdicts)
        figure, even = self.measure.of_unit(self.asked.scorer.unit)
        result = _plain({
            "name": self.measure.name, "figure": figure, "even": even, "figures": figures,
            "baselines": {name: {"answers": lengths(self.asked.answers[name], len(self.items))}
                          for name in self.asked.baselines},
            "counts": counts, "options": {**self.measure.given, "both_orders": self.asked.both,
                                          "seed": self.config.seed, "limit": self.config.limit},
            "models": {one.name: one.policy or given_as(one.answers) for one in self.sources},
            "how": how(self.config, self.sources, len(self.items), len(self.asked.every)),
            "judge": configs.as_json(dict(self.asked.scorer.key)), "keys": self._keys(), "versions": versions(),
        })  # fmt: skip
        write_json(self.folder / "result.json", result)
        write_page(self.folder, result, answers, verdicts, self.config.seed)
        return EvalResult(self.folder, self.measure.name, figures, counts, result)

    def _answer_lines(self) -> list[dict[str, Any]]:
        prompts = {item.id: item.prompt for item in self.items}
        lines = []
        for model, found in self.asked.answers.items():
            for name, own in found.items():
                for response in own:
                    tokens = None if response.token_ids is None else len(response.token_ids)
                    finished = None if UNKNOWN_END in response.meta else response.finished
                    lines.append({"id": name, "prompt": prompts[name], "model": model, "text": response.text,
                                  "finished": finished, "tokens": tokens})  # fmt: skip
        if self.measure.of_judge:
            for one in self.asked.items:
                for k, text in enumerate(one.answers):
                    lines.append({"id": one.name, "prompt": one.prompt, "model": _place(k, one.num_correct),
                                  "text": text, "finished": None, "tokens": None})  # fmt: skip
        return lines

    def _keys(self) -> dict[str, str]:
        """Of the stages that are done."""
        names = [stage.name for stage in self.stages()] + [JUDGE]
        return {name: (read_json(self.folder / "stages" / f"{name}.json") or {}).get("key", "") for name in names}

    def _from(self, where: str) -> list[str]:
        """The stages that are done again from this one on; ConfigError where there is none of that name."""
        names = [stage.name for stage in self.stages()]
        if where not in ("sample", JUDGE, *names):
            raise ConfigError(f"--from {where}: no stage {where!r}{did_you_mean(where, ('sample', JUDGE, *names))}")
        return [name for name in names if where in ("sample", name)] + [JUDGE]

    def redo_from(self, where: str) -> None:
        """Move aside what was done from a stage on."""
        moved = self._from(where)
        outputs = [path for stage in self.stages() if stage.name in moved for path in stage.outputs]
        outputs.append(self.folder / "judged")
        old = Iteration(self.folder, log.info).set_aside(moved, outputs)
        if old is not None:
            log.info("%s moved to %s", ", ".join(moved), old.name)

    def close(self) -> None:
        self.asked.scorer.close()


def lengths(answers: Mapping[str, Sequence[Response]], prompts: int) -> dict[str, Any]:
    """Counts and means of a model's answers; None where it is not known."""
    every = [response for own in answers.values() for response in own]
    tokens = [len(r.token_ids) for r in every if r.token_ids is not None]
    return {
        "answers": len(every), "missing": prompts - len(answers), "empty": sum(not r.text.strip() for r in every),
        "cut off": None if any(UNKNOWN_END in r.meta for r in every) else sum(not r.finished for r in every),
        "mean characters": sum(len(r.text) for r in every) / len(every) if every else None,
        "mean tokens": sum(tokens) / len(tokens) if tokens else None,
    }  # fmt: skip


def _cost_line(judge: str, of: Cost, most: str) -> str:
    line = f"{of.calls:,} judgements by {judge}" if of.calls else f"no judgements left for {judge}"
    line += f", {of.done:,} more are done" if of.calls and of.done else ""
    line += f", {most} {of.shown:,} prompt tokens at four characters each" if of.shown else ""
    return line + (f", at most {of.written:,} tokens of replies" if of.written else "")


def _encoded(policy: str, prompts: Sequence[Any]) -> list[tuple[int, ...]]:
    return make.prompts_ids(load_tokenizer(policy), prompts)


def _place(k: int, right: int) -> str:
    return ("right" if k < right else "wrong") + f"-{k + 1}"


def _of_prompt(item: Any) -> Any:
    if isinstance(item, Item):
        return [item.id, item.prompt, dict(item.meta)]
    return [repr(item)]


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return _plain(vars(value)) if hasattr(value, "__dataclass_fields__") else str(value)
