"""The stages of one iteration: what each reads, what decides it, what it writes, and how.

What a stage needs of an earlier one it reads from the files, never from memory, so that an unbroken run and a resumed
one do the same.
"""

import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastpo.loop import checks, evaluation, growth, guards, online, rows
from fastpo.loop import prompts as prompt_files
from fastpo.loop.config import as_json
from fastpo.loop.context import Context
from fastpo.loop.requests import refinements, requests_of
from fastpo.loop.sample_stage import read_samples, sample_stage
from fastpo.loop.score_stage import read_scores, score_stage
from fastpo.loop.search import search
from fastpo.loop.selecting import gather
from fastpo.loop.stages import Stage
from fastpo.losses import LOSSES
from fastpo.sampling.check_sampler import check_sampler
from fastpo.sampling.items import Item, Request, Response, Scorer
from fastpo.sampling.parts import read_lines, write_json, write_lines
from fastpo.trainer import train

log = logging.getLogger("fastpo")

STAGES = ("prompts", "sample", "score", "select", "search", "train", "eval")  # search: in the place of three
OUTPUTS = {  # of each stage, in the iteration's folder
    "prompts": ("prompts.jsonl",), "sample": ("samples",), "score": ("scores",), "select": ("rows.jsonl", "rows.json"),
    "search": ("tree", "rows.jsonl", "rows.json"), "train": ("train",), "eval": ("eval.json", "eval", "warnings.json"),
}  # fmt: skip


class Work:
    """Iteration t of a run, from 1 on; 0 is the start, which is only measured."""

    def __init__(self, run: Context, t: int):
        self.run, self.t = run, t
        self.config = run.config.in_iteration(max(t, 1))
        self.folder = run.iteration(t)

    def stages(self) -> Iterator[Stage]:
        """In order, each made when the one before is done."""
        if self.t == 0:
            yield self.evaluation()
            return
        yield self.prompts()
        if online.way_of(self.config.train):
            yield self.online_training()
            if self.run.heldout:
                yield self.evaluation()
            return
        if self.config.search:
            yield self.searching()
        else:
            yield self.sampling()
            if self.run.scored(self.t):
                yield self.scoring()
            yield self.selection()
        yield self.training()
        if self.run.heldout:
            yield self.evaluation()

    def prompts(self) -> Stage:
        run, path = self.run, self.folder / "prompts.jsonl"
        config = self.config
        options = {"prompts_per_iteration": config.prompts_per_iteration, "reuse_prompts": config.reuse_prompts,
                   "seed": config.seed, "iteration": self.t, "prompts": run.prompts_digest}  # fmt: skip
        if config.prompts_per_iteration is None and not config.reuse_prompts:
            options["iterations"] = config.iterations  # they cut the prompts into parts

        def work() -> Mapping[str, Any]:
            items = run.of_iteration(self.t)
            ids = run.encode_all([item.prompt for item in items])
            made = (replace(item, prompt_ids=own) for item, own in zip(items, ids, strict=True))
            return {"prompts": write_lines(path, map(prompt_files.to_json, made))}

        return Stage("prompts", options, _tokenizer_files(run.config.model), [path], work)

    def sampling(self) -> Stage:
        config, run, folder = self.config, self.run, self.folder / "samples"
        policy, sources = run.policy("current", self.t), checks.sources_of(config)
        options = {"sample": as_json(config.sample), "refine": as_json(config.refine), "seed": config.seed,
                   "policy": policy, "sampler": run.sampler_key}  # fmt: skip

        def work() -> Mapping[str, Any]:
            items, counts, seed = self._prompts(), Counter[str](), (config.seed, self.t)  # counts of all rounds
            with run.sampler(config, policy, self.folder) as sampler:

                def ask(requests: Sequence[Request], part: int) -> Path:
                    path = folder / f"part-{part:04d}.jsonl"
                    counts.update(sample_stage(sampler, requests, path, max_failed=config.max_failed))
                    return path

                first = requests_of(items, config.sample, run.encode_all, *seed)
                path = ask(first, 0)
                for k in range(1, config.refine.rounds + 1):
                    found = read_samples(path, sources)
                    path = ask(refinements(items, found, k, config.refine, config.sample, run.encode_all, *seed), k)
            return {**counts, **guards.sample_figures(counts, self._some()), **self._checked(policy, first)}

        return Stage(
            "sample", options, {"prompts": self.folder / "prompts.jsonl", **_there(policy=policy)}, [folder], work
        )

    def _checked(self, policy: str, requests: Sequence[Request]) -> dict[str, Any]:
        """What the sampler says of a few of its responses against what the policy says of them."""
        sample, run = self.config.sample, self.run
        if sample.check_logps < 1 or run.make_sampler is not None:
            return {}
        asked = {request.unit: request for request in requests}
        pairs = []
        for line in read_lines(self.folder / "samples" / "part-0000.jsonl"):
            if "status" not in line:
                pairs.append((asked[line["id"], line["source"], line["k"]], Response.from_json(line)))
            if len(pairs) >= 4 * sample.check_logps:
                break
        found = check_sampler(pairs, policy, run.tokenizer, n=sample.check_logps, tolerance=sample.tolerance)
        if not found["compared"]:
            log.warning("%s: %s", self.folder.name, found["why"])
        return {"checked": found}

    def searching(self) -> Stage:
        config, run, folder = self.config, self.run, self.folder / "tree"
        policy, options = run.policy("current", self.t), growth.options_of(config.search)
        made = run.scorers(config, self.t)
        by = options.scorer or (None if options.self_eval else run.scored(self.t))
        scorer, self_eval = (None if not name else made[name] for name in (by, options.self_eval))
        outputs = [folder, self.folder / "rows.jsonl", self.folder / "rows.json"]
        decided = {"search": as_json(options), "seed": config.seed, "policy": policy, "sampler": run.sampler_key,
                   "scorer": scorer and scorer.key, "self_eval": self_eval and self_eval.key}  # fmt: skip

        def work() -> Mapping[str, Any]:
            with contextlib.ExitStack() as stack:
                for one in (scorer, self_eval):
                    if one is not None:
                        stack.callback(one.close)
                sampler = stack.enter_context(run.sampler(config, policy, self.folder))
                counts = search(
                    sampler, scorer, self._prompts(), run.encode, run.decode, config.search, folder,
                    [config.seed, self.t], config.max_failed, self_eval=self_eval, rows_path=outputs[1],
                )  # fmt: skip
            known = ("prompts", "prompts kept", "pairs")
            rest = {name: n for name, n in counts.items() if name not in known and isinstance(n, int)}
            write_json(outputs[2], {name: counts[name] for name in known} | {"rows": counts["pairs"], "dropped": rest})
            return counts

        inputs = {"prompts": self.folder / "prompts.jsonl", **_there(policy=policy)}
        return Stage("search", decided, inputs, outputs, work)

    def scoring(self) -> Stage:
        config, folder, by = self.config, self.folder / "scores", self.run.scored(self.t)
        assert by is not None
        scorer = self.run.scorers(config, self.t)[by]
        select = {"drop_truncated": config.sample.drop_truncated, "min_chars": config.select.min_chars,
                  "max_chars": config.select.max_chars}  # fmt: skip
        asked = {name: value for name, value in as_json(config.score).items() if name != "position_bias"}
        options = {"scorer": scorer.key, "score": asked, "select": select}

        def work() -> Mapping[str, Any]:
            with contextlib.closing(scorer):
                return score_stage(scorer, self._gathered(Counter()), folder, plan=config.score.units,
                                   both_orders=config.score.both_orders, max_failed=config.max_failed)  # fmt: skip

        return Stage("score", options, {"samples": self.folder / "samples", **_there(**config.extra_responses)},
                     [folder], work)  # fmt: skip

    def selection(self) -> Stage:
        config, run, by = self.config, self.run, self.run.scored(self.t)
        outputs = [self.folder / "rows.jsonl", self.folder / "rows.json"]
        options = {"select": as_json(config.select), "position_bias": config.score.position_bias,
                   "refine": as_json(config.refine), "seed": config.seed,
                   "replay": {str(back): share for back, share in config.replay.items()},
                   "selector": None if run.selector is None else type(run.selector).__qualname__}  # fmt: skip
        options |= {"degrade": as_json(config.degrade)} if config.degrade.degrees else {}
        earlier = {back: run.iteration(self.t - back) / "rows.jsonl" for back in config.replay if back < self.t
                   and not online.way_of(run.config.in_iteration(self.t - back).train)}  # fmt: skip
        inputs = {"samples": self.folder / "samples"} | {f"rows of {k} back": path for k, path in earlier.items()}
        inputs |= {"scores": self.folder / "scores"} if by is not None else {}
        inputs |= _there(extra_rows=config.select.extra_rows)

        def work() -> Mapping[str, Any]:
            dropped = Counter[str]()
            items = self._gathered(dropped)
            scores = {} if by is None else read_scores(self.folder / "scores", by, items)
            return rows.make_rows(
                config, items, scores, scored=by is not None, earlier=earlier, dropped=dropped, encode=run.encode,
                selector=run.selector or rows.make_selector(config, items, scores), rows_path=outputs[0],
                counts_path=outputs[1],
            )  # fmt: skip

        return Stage("select", options, inputs, outputs, work)

    def training(self) -> Stage:
        config, run, folder = self.config, self.run, self.folder / "train"
        policy, losses = run.policy("current", self.t), checks.losses_of(checks.train_options(config))
        given = checks.given_options(config)
        others = {}
        if any(name in LOSSES and LOSSES[name].reference for name in losses):
            others["ref_model"] = run.policy(config.train.get("reference", "current"), self.t)
        if "previous" in config.train:
            others["prev_model"] = run.policy(config.train["previous"], self.t)
        # The model as it is at the call is its own reference.
        models: dict[str, Any] = {name: path for name, path in others.items() if path != policy}

        def work() -> Mapping[str, Any]:
            for name, path in {"trained from": policy, **others}.items():
                log.info("%s %s: %s", self.folder.name, name, path)
            kway = config.select.rows == "kway" and not config.search
            explicit: dict[str, Any] = {"pair_policy": "explicit"} if kway else {}
            result = train(policy, str(self.folder / "rows.jsonl"), **models, args=dict(given), output_dir=str(folder),
                           resume_from_checkpoint="auto", **explicit)  # fmt: skip
            return {name: value for name, value in result.metrics.items() if isinstance(value, int | float)}

        inputs = {"rows": self.folder / "rows.jsonl", **_there(policy=policy, **others)}
        return Stage("train", {"train": as_json(given), "policy": policy, **others}, inputs, [folder], work)

    def online_training(self) -> Stage:
        """Training on responses that the policy gives as it trains: the rows are the prompts."""
        config, run, folder = self.config, self.run, self.folder / "train"
        options, policy = checks.train_options(config), run.policy("current", self.t)
        given, made = checks.given_options(config), run.scorers(config, self.t)
        others = {}
        if online.reads_reference(config.train, options):
            others["ref_model"] = run.policy(config.train.get("reference", "current"), self.t)
        models: dict[str, Any] = {name: path for name, path in others.items() if path != policy}
        names = online.named(config, {name: scorer.unit for name, scorer in made.items()})
        decided = {"train": as_json(given), "policy": policy, **others,
                   "rewards": [[name, made[name].key] for name in names]}  # fmt: skip

        def work() -> Mapping[str, Any]:
            for name, path in {"trained from": policy, **others}.items():
                log.info("%s %s: %s", self.folder.name, name, path)
            log.info("%s rewards: %s", self.folder.name, ", ".join(names))
            parts = online.judges(config, options, run.sections(config), made, run.policies(self.t), run.folder)
            with contextlib.ExitStack() as stack:
                for part in (*parts.values(), *made.values()):
                    stack.callback(part.close)
                result = train(policy, online.rows_of(self._prompts()), **models, **parts, args=dict(given),
                               output_dir=str(folder), resume_from_checkpoint="auto")  # fmt: skip
            counts = {name: value for name, value in result.metrics.items() if isinstance(value, int | float)}
            return counts | online.figures(result.log_history)

        inputs = {"prompts": self.folder / "prompts.jsonl", **_there(policy=policy, **others)}
        return Stage("train", decided, inputs, [folder], work)

    def evaluation(self) -> Stage:
        """Greedy answers of what the iteration has trained, scored, and against another policy's."""
        config, run, folder = self.config, self.run, self.folder / "eval"
        scorer = run.measuring(self.t)
        policy, other = run.policy("current", self.t + 1), run.iteration(run.answers_of(config.eval.against, self.t))
        longest = config.sample.max_tokens
        if online.way_of(config.train):
            longest = checks.train_options(config).max_completion_length
        sample = replace(
            config.sample, n=1, temperature=config.eval.temperature, top_p=1.0, top_k=0, sources=(),
            max_tokens=config.eval.max_tokens or longest,
        )  # fmt: skip
        options = {"eval": as_json(config.eval), "sample": as_json(sample), "heldout": run.heldout_digest,
                   "scorer": None if scorer is None else scorer.key, "policy": policy}  # fmt: skip
        inputs = _there(policy=policy)
        if self.t > 0:
            inputs["answers of the other policy"] = other / "eval" / "answers.jsonl"

        def work() -> Mapping[str, Any]:
            with run.sampler(replace(config, sample=sample), policy, folder) as sampler:
                asked = requests_of(run.heldout, sample, run.encode_all, config.seed, "eval")
                counts = sample_stage(sampler, asked, folder / "answers.jsonl", max_failed=config.max_failed)
            answers = read_samples(folder / "answers.jsonl")
            figures: dict[str, Any] = guards.sample_figures(counts, [r for found in answers.values() for r in found])
            if scorer is not None and (scorer.unit == "response" or self.t > 0):
                figures |= self._measured(scorer, answers, other)
            figures |= {"policy": policy, "against": config.eval.against}
            write_json(self.folder / "eval.json", figures)
            return figures

        return Stage("eval", options, inputs, [folder, self.folder / "eval.json"], work)

    def _measured(self, scorer: Scorer, answers: Mapping[str, Sequence[Response]], other: Path) -> dict[str, Any]:
        """Score and win rate of the answers."""
        theirs = read_samples(other / "eval" / "answers.jsonl") if self.t > 0 else {}
        heldout = [item for item in self.run.heldout if item.id in answers]
        asked = [evaluation.compared(item, answers[item.id][0], next(iter(theirs.get(item.id, ())), None), scorer)
                 for item in heldout]  # fmt: skip
        folder = self.folder / "eval" / "scores"
        with contextlib.closing(scorer):
            score_stage(scorer, asked, folder, plan="all", both_orders=self.config.score.both_orders, max_failed=1.0)
        before = None
        if self.t > 0 and scorer.unit == "response":
            alone = [item.with_responses(theirs[item.id][:1]) for item in heldout if item.id in theirs]
            before = read_scores(other / "eval" / "scores", scorer.name, alone)
        return evaluation.figures(read_scores(folder, scorer.name, asked), before, len(self.run.heldout))

    # -------------------------------------------------- read from the files

    def _prompts(self) -> list[Item]:
        return [prompt_files.from_json(line) for line in read_lines(self.folder / "prompts.jsonl")]

    def _some(self) -> list[Response]:
        """The first responses of every part, for figures that need not all of them."""
        found: list[Response] = []
        for part in sorted((self.folder / "samples").glob("part-*.jsonl")):
            lines = itertools.islice((line for line in read_lines(part) if "status" not in line), guards.ENOUGH)
            found += map(Response.from_json, lines)
        return found

    def _sampled(self) -> list[Item]:
        """The prompts with all that was sampled for them, in order."""
        found: dict[str, list[Response]] = {}
        sources = checks.sources_of(self.config)
        for part in sorted((self.folder / "samples").glob("part-*.jsonl")):
            for name, responses in read_samples(part, sources).items():
                found.setdefault(name, []).extend(responses)
        return [item.with_responses(found.get(item.id, ())) for item in self._prompts()]

    def _gathered(self, dropped: Counter[str]) -> list[Item]:
        """What is scored: with the responses from outside, without what is not worth a judgement."""
        out = []
        for item in self._sampled():
            outside = [Response(text, source=source) for source, text in self.run.extra.get(item.id, ())]
            item = item.with_responses([*item.responses, *outside])
            out.append(gather(item, self.config.select, self.config.sample.drop_truncated, dropped))
        return out


def _there(**paths: Any) -> dict[str, Path]:
    """Those that are files or folders of this machine: names of a hub have no content here."""
    return {name: Path(path) for name, path in paths.items() if isinstance(path, str | Path) and Path(path).exists()}


def _tokenizer_files(model: str) -> dict[str, Path]:
    """What a prompt's token ids depend on, where the model is a folder."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
    return {name: path for name in names if (path := Path(model) / name).is_file()}
