"""What an online run trains on: responses that the policy gives as it trains, judged and made into rows.

A generation: responses are drawn to the prompts of its steps, judged, and become advantages or pairs; the policy's own
log-probabilities as it is now (`old_logp`) and the reference's are computed where the loss reads them. Then its steps
train on them. Everything of a generation that its later steps need is in `state_dict`, so that a run goes on inside it.

A response that trains nothing goes through the model no more: one that was left out, that is masked out, or, where
neither a KL nor an entropy term is on, whose advantage is 0.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fastpo.config.train_config import TrainConfig
from fastpo.data.example import ADVANTAGE, OF_REFERENCE, REF_LOGP, Example, even_weights
from fastpo.data.packing import PackedBatch, trunk_tokens
from fastpo.errors import TrainingError
from fastpo.losses.advantages import correction
from fastpo.losses.tokens import Totals
from fastpo.models.modes import eval_mode
from fastpo.models.policy import ENTROPY
from fastpo.online.drawing import Drawing, Drawn
from fastpo.online.plan import OnlinePlan
from fastpo.online.prompts import Asked
from fastpo.online.serving import Served
from fastpo.sampling.items import Response, seed_of
from fastpo.sampling.parts import write_lines
from fastpo.training.distributed import Engine
from fastpo.training.objective import Objective
from fastpo.training.passes import Passes
from fastpo.training.policy_terms import CORRECTION, MASK, OLD_LOGP, POLICY_MASK, SAMPLER_LOGP
from fastpo.training.stepwide import StepWide

log = logging.getLogger("fastpo")

TIES = 1e-5  # entropies this near to each other are alike: of one context they differ by rounding, as they are packed
Arrays = list[list[np.ndarray]]  # of each example, of each response: [tokens] fp32


@dataclass
class Group:
    """A prompt's responses that can be trained on, and what is known of them. K = responses."""

    row: int
    asked: Asked
    responses: list[Response]  # K
    advantage: list[float] = field(default_factory=list)  # [K], of losses per token
    pairs: list[tuple[int, int]] = field(default_factory=list)
    pair_columns: dict[str, list[float]] = field(default_factory=dict)
    masked: list[bool] = field(default_factory=list)  # [K]: counts, and trains nothing
    token_columns: dict[str, list[np.ndarray]] = field(default_factory=dict)  # as an example's

    def leave(self, keep: Sequence[bool]) -> None:
        """Only these responses [K], with what is known of each; of a group without pairs."""
        columns = {name: getattr(self, name) for name in ("responses", "advantage", "masked")}
        for name, values in columns.items():
            setattr(self, name, list(itertools.compress(values, keep)))
        self.token_columns = {name: list(itertools.compress(v, keep)) for name, v in self.token_columns.items()}

    def example(self) -> Example:
        """As a row."""
        columns = {ADVANTAGE: list(self.advantage)} if self.advantage else {}
        return Example(
            self.asked.prompt_ids, [np.asarray(r.token_ids, np.int32) for r in self.responses], list(self.pairs),
            {name: list(values) for name, values in self.pair_columns.items()}, columns,
            token_columns={name: list(values) for name, values in self.token_columns.items()},
        )  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """Groups that were judged, and what the log says of them."""

    groups: list[Group]
    metrics: dict[str, float]
    tokens: dict[int, int]  # by row: of its prompt with each response that was drawn
    left_out: Counter[str] = field(default_factory=Counter)  # responses, by reason
    lines: list[dict[str, Any]] = field(default_factory=list)  # of `log_completions`


class Judgement(Protocol):
    """What makes groups of what was drawn (online/worth.py). Every rank calls it alike."""

    def __call__(self, drawn: Sequence[Drawn], asked: Mapping[int, Asked]) -> Judged: ...

    def close(self) -> None: ...


class EntropyBonus:
    """The weight of the tokens' entropy in the loss; adaptive, it follows what the entropy was a step before."""

    def __init__(self, config: TrainConfig):
        self.config, self.value, self.last = config, config.entropy_coef, float("inf")

    @property
    def is_on(self) -> bool:
        return bool(self.config.entropy_coef) or self.config.use_adaptive_entropy

    def coefficient(self) -> float:
        """Of the step at hand; adaptive, 0 where the entropy is above its target."""
        return 0.0 if self.config.use_adaptive_entropy and self.last > self.config.entropy_target else self.value

    def update(self, entropy: float | None) -> None:
        """Mean entropy of the last step's tokens, if it is known."""
        if entropy is not None:
            self.value, self.last = self.after(entropy), entropy

    def after(self, entropy: float | None) -> float:
        """Its weight after a step of this entropy."""
        config = self.config
        if entropy is None:
            return self.value
        step = config.entropy_coef_delta if entropy <= config.entropy_target else -config.entropy_coef_delta
        return min(config.entropy_coef_max, max(config.entropy_coef_min, self.value + step))


@dataclass
class Step:
    """What one step trains."""

    rows: list[int]
    totals: Totals
    tokens: int  # prompt and response tokens that it was drawn from, as TRL counts them
    acting: float  # of its response tokens those that have a policy term, and whose entropy has a bonus


@dataclass
class Logged:
    """What the log says of one generation."""

    begun: int
    metrics: dict[str, float]
    left_out: Counter[str]


class Rollouts:
    """The rows of an online run; `examples` are what the trainer's steps read, by row."""

    def __init__(
        self, config: TrainConfig, plan: OnlinePlan, asked: Sequence[Example], objective: Objective, passes: Passes,
        drawing: Drawing, count: int, mode: str, folder: Path,
    ):  # fmt: skip
        """count: responses of a prompt. mode: of the correction for a sampler's own log-probabilities. folder: of the
        run, for `log_completions`."""
        self.config, self.plan, self.asked, self.objective = config, plan, list(asked), objective
        self.passes, self.drawing, self.count, self.folder = passes, drawing, count, folder
        self.mode = mode
        self.judgement: Any = None  # a Judgement, which may ask for `penalty`
        self.beta = 0.0  # of the penalty
        self.examples: list[Example] = list(asked)
        self.steps: list[Step] = []  # of the generation at hand
        self.parts: dict[int, int] = {}  # of rows behind those of the data, whose prompt each has
        self.begun = -1  # the step at which it was drawn
        self.window: list[Logged] = []  # of the generations since the last log line
        self.entropy = EntropyBonus(config)
        self.stepwide: StepWide | None = None
        self.entered = -1  # the last step that was begun
        self._seen_entropy: float | None = None  # by a run that this one goes on from
        self.served: Served | None = None  # a sampler beside this process
        self.reference: tuple[Engine, Callable[[], AbstractContextManager[Any]]] | None = None

    @property
    def _last_entropy(self) -> float | None:
        """Of the last step's tokens, where that is known; of a run that goes on, before its first step too."""
        return self._seen_entropy if self.stepwide is None else self.stepwide.entropy

    # ---- a step

    def begin_step(self, number: int, stepwide: StepWide) -> tuple[list[int], int]:
        """(rows that step `number` trains, prompt and response tokens that they are of); `stepwide` gets the rest."""
        step = self.step(number)
        self.stepwide = stepwide
        if number != self.entered:  # else it was cut short, and is done again
            self.entropy.update(stepwide.entropy if stepwide.entropy is not None else self._seen_entropy)
        stepwide.entropy, self._seen_entropy, self.entered = None, None, number
        stepwide.of_rollouts = {"totals": step.totals, "entropy_coef": self.entropy.coefficient(),
                                "entropy_tokens": step.acting,
                                "watches_entropy": self.config.use_adaptive_entropy}  # fmt: skip
        again = number - self.begun >= len(self.steps)  # num_iterations: these tokens are counted already, as in TRL
        return step.rows, 0 if again else step.tokens

    def step(self, number: int) -> Step:
        """What step `number` trains, drawn where it begins a generation. Every rank calls it."""
        begun, place, base = self.plan.generation(number)
        if begun != self.begun or not self.steps:
            if begun != number:
                raise TrainingError(
                    f"step {number} trains on responses drawn at step {begun}, which the checkpoint does not hold"
                )
            self._draw(number, base)
        return self.steps[place]

    def _draw(self, number: int, base: Sequence[int]) -> None:
        """The generation of step `number`. Until all of it is there none is: a run that is stopped in here draws it
        again when it goes on, and logs it once."""
        for row in {row for step in self.steps for row in step.rows}:
            if row < len(self.asked):
                self.examples[row] = self.asked[row]
        del self.examples[len(self.asked) :]
        self.begun, self.steps, self.parts = -1, [], {}
        self.window = [logged for logged in self.window if logged.begun < number]
        if self.served is not None:
            self.served.refresh()
        rows = [self.plan.base(step)[1] for step in base]
        judged, rows = self._judged(number, rows)
        self.window.append(Logged(number, dict(judged.metrics), judged.left_out))
        self._say(number, judged)
        by_row = {group.row: group for group in judged.groups}
        steps: list[Step] = []
        kept: dict[int, Group] = {}
        watch = bool(self.objective.token_terms) and self.config.top_entropy_quantile < 1
        if watch:
            self._mask_certain([by_row[row] for step in rows for row in step if row in by_row])
        for step in rows:
            mine = [row for row in step if row in by_row]
            totals, tokens = self._totals([by_row[row] for row in mine]), sum(judged.tokens.get(row, 0) for row in step)
            acting = self._acting([by_row[row] for row in mine]) if watch else totals.tokens
            trained = [row for row in mine if self._keep(by_row[row])]
            kept |= {row: by_row[row] for row in trained}
            steps.append(Step(trained or [step[0]], totals, tokens, acting))
        rows_of_all = sorted({row for step in steps for row in step.rows})
        found = {row: kept[row].example() if row in kept else self._idle(row) for row in rows_of_all}
        self._score(list(found.values()), kept)
        for of_step in steps:
            self._put(of_step, found)
        self.begun, self.steps = number, steps

    def _put(self, step: Step, found: Mapping[int, Example]) -> None:
        """The rows of a step among the examples. Nothing couples the responses of a loss per token: where those of a
        prompt are more than a micro-batch holds, or there are fewer prompts than processes, each is a row of its own.
        They share their prompt where packing finds that cheaper, as other rows do."""
        budget, world = self.passes.budget, self.passes.world
        most = budget.max_tokens if world.several else budget.tokens  # which other processes do not know
        few = len(step.rows) < world.size
        for row in list(step.rows):
            example = found[row]
            cut = bool(self.objective.token_terms) and (few or trunk_tokens(example) > most)
            self.examples[row], *others = _singles(example) if cut else [example]
            for other in others:
                self.parts[len(self.examples)] = row
                step.rows.append(len(self.examples))
                self.examples.append(other)
            if cut:
                self.passes.batches.place("rollouts", [self.examples[row], *others])

    def _judged(self, number: int, rows: list[list[int]]) -> tuple[Judged, list[list[int]]]:
        """Responses to the prompts of all steps; with dynamic sampling prompts that teach nothing are replaced."""
        config = self.config
        asked = {row: self.asked[row] for step in rows for row in step}
        judged = self._ask(number, 0, asked)
        for round_ in range(1, (config.dynamic_sampling or 0) + 1):
            teaching = {g.row for g in judged.groups if any(g.advantage)}
            idle = [row for step in rows for row in step if row not in teaching]
            if not idle:
                break
            others = self._others(number, round_, set(asked), len(idle))
            if not others:
                break
            more = self._ask(number, round_, {row: self.asked[row] for row in others})
            good = [g for g in more.groups if any(g.advantage)][: len(idle)]
            instead = dict(zip(idle, [g.row for g in good], strict=False))
            rows = [[instead.get(row, row) for row in step] for step in rows]
            asked |= {row: self.asked[row] for row in others}
            groups = [g for g in judged.groups if g.row not in instead] + good
            judged = replace(judged, groups=groups, left_out=judged.left_out + more.left_out,
                             tokens=judged.tokens | more.tokens, lines=judged.lines + more.lines)  # fmt: skip
        return judged, rows

    def _ask(self, number: int, round_: int, asked: Mapping[int, Example]) -> Judged:
        prompts: dict[int, Asked] = {row: e for row, e in asked.items() if isinstance(e, Asked)}
        drawn = self.drawing(prompts, self.count, self.config.seed, "rollout", number, round_)
        return self.judgement(drawn, prompts)

    def _others(self, number: int, round_: int, without: set[int], count: int) -> list[int]:
        """Further prompts, in a seeded order, none twice in a generation."""
        seed = seed_of(self.config.seed, "instead", number, round_)
        order = torch.randperm(len(self.asked), generator=torch.Generator().manual_seed(seed)).tolist()
        return [row for row in order if row not in without][:count]

    # ---- what of a group trains

    def _keep(self, group: Group) -> bool:
        """Leaves those of its responses that train something; whether there are any."""
        if self.objective.pair_terms:
            return bool(group.pairs)
        idle = self._every_token_trains()
        keep = [not m and (idle or a != 0.0) for a, m in zip(group.advantage, group.masked, strict=True)]
        if any(keep):
            group.leave(keep)
        return any(keep)

    def _every_token_trains(self) -> bool:
        """Whether a response whose advantage is 0 has a gradient: by a KL or by its entropy."""
        config = self.config
        return self.objective.uses_reference or bool(config.entropy_coef) or config.use_adaptive_entropy

    def _idle(self, row: int) -> Example:
        """A prompt with two responses of a token each that weigh nothing: of a step in which nothing trains."""
        pairs = [(0, 1)] if self.objective.pair_terms else []
        columns = {"weight": [0.0]} if pairs else {}
        if any(OF_REFERENCE in t.loss.needs for t in self.objective.pair_terms):
            columns[OF_REFERENCE] = [0.0]
        responses = [np.array([k], np.int32) for k in range(2)]
        return Example(
            self.asked[row].prompt_ids, responses, pairs, columns,
            {} if pairs else {ADVANTAGE: [0.0, 0.0]}, token_columns={MASK: [np.zeros(1, np.float32)] * 2},
        )  # fmt: skip

    def _totals(self, groups: Sequence[Group]) -> Totals:
        tokens = responses = 0
        for group in groups:
            masked = group.masked or [False] * len(group.responses)
            for response, out in zip(group.responses, masked, strict=True):
                length = len(response.token_ids or ())
                tokens += 0 if out else length
                responses += 1
        return Totals(float(tokens), float(responses), self.config.max_completion_length)

    # ---- log-probabilities of what is trained

    def _score(self, examples: list[Example], groups: Mapping[int, Group]) -> None:
        """Fills the rows' token columns."""
        passes, objective = self.passes, self.objective
        passes.batches.place("rollouts", examples)
        even_weights(examples)
        if any(MASK in e.token_columns for e in examples):
            for e in examples:
                e.token_columns.setdefault(MASK, [np.ones(len(r), np.float32) for r in e.responses])
        known = {name for e in examples for name in e.token_columns} & {OLD_LOGP, POLICY_MASK}
        for e, name in itertools.product(examples, sorted(known)):  # those without are idle
            e.token_columns.setdefault(name, [np.zeros(len(r), np.float32) for r in e.responses])
        if OLD_LOGP not in known and objective.token_terms and self._reads_old():
            _set(examples, OLD_LOGP, self.logps(examples, None)[0])
        if self.served is not None:
            self._hold_to_its_word(self.served, examples, list(groups.values()))
        if objective.uses_reference:
            _set(examples, REF_LOGP, self.reference_logps(examples))

    def penalty(self, groups: Sequence[Group]) -> list[list[float]]:
        """beta times log(pi_old / pi_ref) of each response, which rloo takes from its reward."""
        examples = [group.example() for group in groups]
        self.passes.batches.place("rollouts", examples)
        old, ref = self.logps(examples, None)[0], self.reference_logps(examples)
        if self._reads_old():
            for group, of_row in zip(groups, old, strict=True):
                group.token_columns[OLD_LOGP] = of_row
        return [[self.beta * float((o.astype(float) - r).sum()) for o, r in zip(*of_row, strict=True)]
                for of_row in zip(old, ref, strict=True)]  # fmt: skip

    def reference_logps(self, examples: list[Example]) -> Arrays:
        """The reference's token log-probabilities of all examples."""
        assert self.reference is not None
        engine, within = self.reference
        with within():
            return self.logps(examples, engine)[0]

    def _reads_old(self) -> bool:
        """Whether the policy leaves the weights that it sampled by before it has trained on all of its responses."""
        plan = self.plan
        return plan.spread * plan.passes > 1 or self.served is not None

    def _mask_certain(self, groups: Sequence[Group]) -> None:
        """Only the tokens of the highest entropies of the generation have a policy term; those of responses that train
        nothing are among them."""
        examples = [group.example() for group in groups]
        if not examples:
            return
        self.passes.batches.place("rollouts", examples)
        old, entropies = self.logps(examples, None, watching=True)
        counted = [values for group, of_row in zip(groups, entropies, strict=True)
                   for values, out in zip(of_row, group.masked, strict=True) if not out]  # fmt: skip
        least = float(np.quantile(np.concatenate(counted), 1 - self.config.top_entropy_quantile)) if counted else 0.0
        for group, of_old, of_row in zip(groups, old, entropies, strict=True):
            mask = [(values >= least - TIES * max(1.0, least)).astype(np.float32) for values in of_row]
            group.token_columns |= {OLD_LOGP: of_old, POLICY_MASK: mask}

    @staticmethod
    def _acting(groups: Sequence[Group]) -> float:
        """Tokens that have a policy term."""
        masks = ((group.token_columns[POLICY_MASK], group.masked) for group in groups)
        return float(sum(v.sum() for of_group, masked in masks for v, out in zip(of_group, masked) if not out))

    def _hold_to_its_word(self, served: Served, examples: Sequence[Example], groups: Sequence[Group]) -> None:
        """Compares the sampler's own log-probabilities with ours, and corrects for the difference. They are not
        tempered, so neither are ours here."""
        config, forward = self.config, self.passes.forward
        by_prompt = {id(g.asked.prompt_ids): g for g in groups}
        mine = [(e, by_prompt[id(e.prompt_ids)]) for e in examples if id(e.prompt_ids) in by_prompt]
        if forward.temperature == 1 and all(OLD_LOGP in e.token_columns for e, _ in mine):
            own = [e.token_columns[OLD_LOGP] for e, _ in mine]
        else:
            temperature, forward.temperature = forward.temperature, 1.0
            try:
                own = self.logps([e for e, _ in mine], None)[0] if mine else []
            finally:
                forward.temperature = temperature
        answers = [(g.row, r, o) for (_, g), of_row in zip(mine, own, strict=True)
                   for r, o in zip(g.responses, of_row, strict=True)]  # fmt: skip
        self.window[-1].metrics |= served.check(answers)
        if not self.objective.token_terms:
            return
        for e in examples:
            e.token_columns[SAMPLER_LOGP] = [np.full(len(r), np.nan, np.float32) for r in e.responses]
            e.token_columns[CORRECTION] = [np.ones(len(r), np.float32) for r in e.responses]
        ratios: list[float] = []
        for (e, g), of_row in zip(mine, own, strict=True):
            for k, (response, ours) in enumerate(zip(g.responses, of_row, strict=True)):
                if response.token_logps is None:
                    continue
                theirs = np.asarray(response.token_logps, np.float32)
                e.token_columns[SAMPLER_LOGP][k] = theirs
                if config.importance_sampling_correction:
                    weights = correction(
                        torch.from_numpy(ours), torch.from_numpy(theirs), torch.tensor([0, len(ours)]),
                        mode=self.mode, clip_min=config.importance_sampling_clip_min,
                        clip_max=config.importance_sampling_clip_max,
                    ).numpy()  # fmt: skip
                    e.token_columns[CORRECTION][k] = weights.astype(np.float32)
                    ratios += weights.tolist()
        if ratios:
            self.window[-1].metrics |= {
                "sampling/importance_sampling_ratio/min": min(ratios),
                "sampling/importance_sampling_ratio/mean": float(np.mean(ratios)),
                "sampling/importance_sampling_ratio/max": max(ratios),
            }

    @torch.no_grad()
    def logps(self, examples: list[Example], engine: Engine | None, *, watching: bool = False) -> tuple[Arrays, Arrays]:
        """Token log-probabilities of all examples by the policy, or by `engine`; with `watching` the entropies of their
        distributions too. On every rank, which shares the work."""
        passes, world = self.passes, self.passes.world
        engine = engine or passes.forward.engine
        shares = passes.batches.of_step(examples, range(len(examples)), passes.budget.max_tokens)
        mine: dict[int, tuple[list[np.ndarray], list[np.ndarray]]] = {}

        def run(part: list[int]) -> tuple[PackedBatch, Any]:
            batch = passes.batches.batch(examples, part, None)
            return batch, passes.forward(batch, engine, statistics=watching)

        watch = passes.forward.watching() if watching else nullcontext()
        with eval_mode(engine.policy.model), engine.policy.attach(), passes.forward.keeping_casts(), watch:
            for batch, logp in passes.budget.passes(shares[world.rank], examples, run):
                columns = [logp, batch.rows[ENTROPY]] if watching else [logp]
                parts = [_split(c.float().cpu().numpy(), batch) for c in columns]
                for row, values in enumerate(zip(*parts, strict=True)):
                    mine[batch.examples[row]] = (values[0], values[1] if watching else [])
        everywhere = {i: values for part in world.gather(mine) for i, values in part.items()}
        order = range(len(examples))
        return [everywhere[i][0] for i in order], [everywhere[i][1] for i in order]

    # ---- what is said

    def _say(self, number: int, judged: Judged) -> None:
        if judged.left_out:
            log.warning("left out: %s", _counts(judged.left_out))
        teaches = any(g.pairs or any(g.advantage) for g in judged.groups)
        if not teaches and not (judged.groups and self._every_token_trains()):
            log.warning("no gradient from this step's responses: all of every prompt are worth the same, or left out")
        if judged.lines and self.passes.world.main:
            lines, most = judged.lines, self.config.num_completions_to_print
            if self.config.log_unique_prompts:
                first: dict[str, dict[str, Any]] = {}
                for line in lines:
                    first.setdefault(repr(line["prompt"]), line)
                lines = list(first.values())
            write_lines(self.folder / "completions" / f"{number:06d}.jsonl", lines[:most])

    def flush(self) -> dict[str, float]:
        """Means of the metrics since the last call, of what is a number."""
        out: dict[str, list[float]] = {}
        left_out = 0
        for logged in self.window:
            left_out += sum(logged.left_out.values())
            for name, value in logged.metrics.items():
                if value == value:
                    out.setdefault(name, []).append(value)
        self.window = []
        means = {name: sum(values) / len(values) for name, values in out.items()}
        if left_out:
            means["left_out"] = float(left_out)
        if self.entropy.is_on:
            means["entropy_coef"] = self.entropy.after(self._last_entropy)
        return means

    def close(self) -> None:
        """Lets go of the samplers."""
        self.drawing.close()

    # ---- of a run that goes on

    def state_dict(self) -> dict[str, Any]:
        """The generation at hand, where steps of it are left, as types that `torch.load` reads with weights_only."""
        if self.plan.spread * self.plan.passes == 1:  # the next step draws its own
            rows, steps = [], []
        else:
            rows, steps = sorted({row for step in self.steps for row in step.rows}), self.steps
        return {
            "begun": self.begun, "entered": self.entered, "entropy": [self.entropy.value, self.entropy.last],
            "seen_entropy": self._last_entropy,
            "window": [(w.begun, dict(w.metrics), dict(w.left_out)) for w in self.window],
            "steps": [(list(s.rows), tuple(map(float, s.totals)), s.tokens, s.acting) for s in steps],
            "examples": {row: _kept(self.examples[row]) for row in rows},
            "parts": {row: self.parts[row] for row in rows if row in self.parts},
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.begun, (self.entropy.value, self.entropy.last) = state["begun"], state["entropy"]
        self._seen_entropy, self.entered = state["seen_entropy"], state["entered"]
        self.window = [Logged(at, dict(metrics), Counter(out)) for at, metrics, out in state["window"]]
        self.steps = [Step(list(rows), Totals(*totals), *rest) for rows, totals, *rest in state["steps"]]
        self.parts = dict(state["parts"])
        self.examples[len(self.asked) :] = [self.asked[self.parts[row]] for row in sorted(self.parts)]
        for row, kept in state["examples"].items():
            self.examples[row] = _restored(self.asked[self.parts.get(row, row)], kept)
        if state["examples"]:
            self.passes.batches.place("rollouts", [self.examples[row] for row in state["examples"]])


def _set(examples: Sequence[Example], name: str, values: Arrays) -> None:
    for example, of_row in zip(examples, values, strict=True):
        example.token_columns[name] = of_row


def _split(values: np.ndarray, batch: PackedBatch) -> Iterator[list[np.ndarray]]:
    """Of each row of a batch, of each of its responses."""
    offsets, at = batch.response_offsets.tolist(), 0
    for count in batch.row_responses:
        yield [values[offsets[k] : offsets[k + 1]].copy() for k in range(at, at + count)]
        at += count


def _singles(example: Example) -> list[Example]:
    """Each response of a row without pairs as a row."""
    return [
        Example(
            example.prompt_ids, [response], [], {}, {name: [v[k]] for name, v in example.response_columns.items()},
            token_columns={name: [v[k]] for name, v in example.token_columns.items()},
        )
        for k, response in enumerate(example.responses)
    ]  # fmt: skip


def _kept(example: Example) -> dict[str, Any]:
    """An example as tensors; without its prompt."""
    lengths = [len(r) for r in example.responses]
    return {
        "lengths": lengths, "ids": torch.from_numpy(np.concatenate(example.responses)),
        "pairs": [list(pair) for pair in example.pairs], "pair_columns": dict(example.pair_columns),
        "response_columns": dict(example.response_columns),
        "token_columns": {k: torch.from_numpy(np.concatenate(v)) for k, v in example.token_columns.items()},
    }  # fmt: skip


def _restored(asked: Example, kept: Mapping[str, Any]) -> Example:
    ends = np.cumsum(kept["lengths"])[:-1]
    return Example(
        asked.prompt_ids, np.split(kept["ids"].numpy(), ends), [(i, j) for i, j in kept["pairs"]],
        dict(kept["pair_columns"]), dict(kept["response_columns"]),
        token_columns={k: np.split(v.numpy(), ends) for k, v in kept["token_columns"].items()},
    )  # fmt: skip


def _counts(reasons: Counter[str]) -> str:
    return "; ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
