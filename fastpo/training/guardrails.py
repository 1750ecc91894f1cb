"""Warnings with a reason when a run looks wrong. They read what is logged anyway, cost nothing and stop nothing.

Each rule is a method that returns its message, or None; each speaks once a run. A threshold stands where published
runs end and broken ones begin, and the comment beside it says why there.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastpo.config.train_config import TrainConfig
from fastpo.data import DataReport
from fastpo.losses.table import LOSSES, SFT, Term

# Highest rates of the losses' own recipes, all full fine-tunes with Adam or RMSprop. Losses whose papers publish none,
# such as IPO, hinge and robust DPO, take DPO's: their gradient at the start is DPO's within a factor of two in its
# direction and Adam takes out the scale.
_DPO_RATE = (1e-6, "DPO's own code takes 5e-7, its tuned runs 3e-7 to 7e-7, TRL 1e-6")
_SPPO_RATE = (5e-7, "SPPO's scripts take 5e-7")
PUBLISHED_RATES = {
    **{
        name: _DPO_RATE
        for name, loss in LOSSES.items()
        if not loss.online and loss.shape not in ("scores", "degrees", "tokens")
    },
    "simpo": (1e-6, "SimPO's recipes take 3e-7 to 1e-6"),
    "orpo": (5e-6, "ORPO's code takes 5e-6"),
    "sppo": _SPPO_RATE,
    "sppo_single": _SPPO_RATE,
    "sppo_hard": _SPPO_RATE,
    "inpo": (5e-7, "INPO's recipe takes 5e-7"),
    SFT: (2e-5, "supervised recipes take 2e-5"),
}
# "Far above" is ten times the highest published rate: the recipes of one loss differ by three among themselves.
FAR_ABOVE = 10
# Adapters take about ten times the rate of a full fine-tune. The highest published for a preference loss is 1e-4 (CPO
# in ALMA), NCA's QLoRA took 5e-6: warn from twice the highest. Supervised: ten times the full fine-tune's limit.
ADAPTER_LIMIT, ADAPTER_LIMIT_SFT = 2e-4, 2e-3
# The recipes are of models of a billion parameters and more. The rate that a model bears falls with its width: one of
# 100 million bears several times theirs, and a toy hundreds of times.
SMALL_MODEL = 100_000_000
# The rates of these optimisers are on another scale.
OTHER_SCALE = ("sgd", "muon")

# Every token of the chosen responses is half as likely as at the start, on average: 140 nats for 200 tokens. A fall as
# such is what DPO does and no disease (the quickstart's DPO, which works, loses two thirds of this).
COLLAPSE_NATS = math.log(2)
# A mean margin of 10 leaves the average pair exp(-10), 1/20,000, of the gradient it began with: what still moves the
# weights are the few pairs it has wrong.
LOGISTIC_MARGIN = 10.0
# Right on 64 new pairs in a row within 50 steps. At 90% accuracy, more than preference data give so early, that is a
# chance of 1 in 1,000.
PERFECT_PAIRS, PERFECT_STEPS = 64, 50
# Nothing learnt: after as many steps as 50 at the full learning rate (100 of a linear decay) the loss is within 1% of
# its start and chosen and rejected are less than a tenth of a nat apart. DPO's loss at beta 0.1 moves by 1% with 0.14.
FULL_RATE_STEPS, SAME_LOSS, SAME_NATS = 50, 0.01, 0.1
# A rare overflow is normal in 16 bit; every fiftieth step is a cause of its own.
SKIPPED_SHARE, SKIPPED_STEPS = 0.02, 3
# "Most": from here on the shortened rows are what is trained on.
TRUNCATED_SHARE = 0.5


@dataclass(frozen=True)
class Warning_:
    """What looks wrong, since which step, and what to do about it."""

    name: str
    step: int
    message: str

    def __str__(self) -> str:
        at = f"step {self.step}: " if self.step else ""
        return f"{at}{self.message} [{self.name}]"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Guardrails:
    """The rules of one run, fed with its data reports and its log lines."""

    def __init__(
        self,
        terms: Sequence[Term],
        config: TrainConfig,
        trainable_is_full: bool,
        *,
        starts_at_reference: bool = False,
        pairs_per_step: int | None = None,
        parameters: int | None = None,
        optimizer_given: bool = False,
    ):
        """trainable_is_full: no adapter. parameters: the model's; None is taken for a large one.

        starts_at_reference: rewards begin at 0, so that a fall before the first log line shows too.
        """
        self.config, self.full = config, trainable_is_full
        self.pairs_per_step = pairs_per_step or config.step_size
        self.parameters, self.optimizer_given = parameters, optimizer_given
        self.terms = list(terms)
        pair_terms = [t for t in terms if t.of_pairs]
        # The one whose beta the rewards carry, as in metrics.metric_means.
        self.term = next((t for t in pair_terms if t.loss.reference), pair_terms[0] if pair_terms else None)
        self.starts_at_reference = starts_at_reference and self.term is not None and self.term.loss.reference
        self.warnings: list[Warning_] = []
        self.response_length: float | None = None  # mean, in tokens
        self.train_rows: int | None = None
        self.start: dict[str, float] = {}  # the first line with a finite loss
        self.streaks: dict[str, int] = {}
        self.last_step = 0
        self.full_rate_steps = 0.0  # steps, each counted as its learning rate's share of the peak

    def at_start(self, data_reports: Mapping[str, DataReport]) -> list[Warning_]:
        """What can be said before the first step; `data_reports` by the name of the set, `train` among them."""
        train = data_reports.get("train")
        if train is not None and train.responses:
            self.response_length = train.response_tokens / train.responses
            self.train_rows = train.kept
        found = {"learning_rate": self._learning_rate(), "truncated_rows": _truncated(data_reports)}
        return self._say(0, found)

    def check(self, step: int, metrics: Mapping[str, Any]) -> list[Warning_]:
        """What a log line says. Lines without `loss` (of an evaluation, of the end) say nothing."""
        if "loss" not in metrics:
            return []
        line = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v)}
        steps = max(0, step - self.last_step)
        self.last_step = step
        found = {"skipped_steps": self._skipped(step, line)}
        if "loss" in line:
            self.start = self.start or line
            peak = max(self.config.learning_rate, line.get("learning_rate", 0.0))
            self.full_rate_steps += steps * (line.get("learning_rate", peak) / peak if peak else 0.0)
            found["zero_gradient"] = self._zero_gradient(line)
            found["nothing_learnt"] = self._nothing_learnt(step, line)
            if self.term is not None and "rewards/margins" in line:
                found["chosen_collapse"] = self._collapse(line)
                found["margins_explode"] = self._margins(line)
                found["perfect_at_start"] = self._perfect(step, steps, line)
        return self._say(step, found)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to speak each warning once, against the same start; ready for JSON."""
        return {
            "warnings": [w.to_dict() for w in self.warnings],
            "start": dict(self.start),
            "streaks": dict(self.streaks),
            "last_step": self.last_step,
            "full_rate_steps": self.full_rate_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; `at_start` is still to be called, and repeats nothing."""
        self.warnings = [Warning_(**w) for w in state["warnings"]]
        self.start, self.streaks = dict(state["start"]), dict(state["streaks"])
        self.last_step, self.full_rate_steps = state["last_step"], state["full_rate_steps"]

    # ----------------------------------------------------------------- rules

    def _learning_rate(self) -> str | None:
        if self.optimizer_given or self.config.optim in OTHER_SCALE:
            return None
        if self.term is not None and self.term.loss.shape == "scores":  # it has no language to unlearn
            return None
        if self.full and self.parameters is not None and self.parameters < SMALL_MODEL:
            return None
        rate = self.config.learning_rate
        names = [t.name for t in self.terms if t.of_pairs] or [SFT]  # a preference loss is the touchier part
        if not self.full:
            limit = ADAPTER_LIMIT if names != [SFT] else ADAPTER_LIMIT_SFT
            if rate < limit:
                return None
            return (
                f"learning_rate is {rate:g}, for adapters with a preference loss 5e-6 to 1e-4 are published and with "
                f"sft about ten times a full fine-tune's 2e-5: from {limit:g} on a model easily unlearns language; "
                "lower it, unless you have seen it work"
            )
        for name in names:
            published, source = PUBLISHED_RATES[name]
            if rate >= FAR_ABOVE * published * (1 - 1e-9):
                return (
                    f"learning_rate is {rate:g}, {rate / published:.3g} times the highest that is published for full "
                    f"fine-tuning with {name} ({source}): the model may fall into repetition; try {published:g}, or "
                    "train an adapter (peft_config)"
                )
        return None

    def _collapse(self, line: Mapping[str, float]) -> str | None:
        """Log-probability of the chosen responses, per token, against the start."""
        per_token = self._per_token()
        if per_token is None or "rewards/chosen" not in line:
            return None
        start, margin = (self.start.get(k, 0.0) for k in ("rewards/chosen", "rewards/margins"))
        if self.starts_at_reference:
            start = margin = 0.0
        fall = (start - line["rewards/chosen"]) * per_token
        if not self._lasts("chosen_collapse", fall >= COLLAPSE_NATS):
            return None
        grew = line["rewards/margins"] > margin
        why = (
            f"while the margin went from {margin:.3g} to {line['rewards/margins']:.3g}: the loss asks for a difference "
            "only, and gets it by making both answers unlikely"
            if grew
            else f"and the margin has not grown ({line['rewards/margins']:.3g}): the run diverges"
        )
        sft = f"add a supervised term: loss_type=['{self.term.name}', 'sft'], loss_weights=[1, 0.1]"
        if any(t.name == SFT for t in self.terms):
            sft = "raise the weight of sft"
        strength = "eta" if "eta" in self.term.hyper else "beta"
        return (
            f"the chosen answers have lost {fall:.2g} nats a token since the start (each token is "
            f"{math.exp(-fall):.2g} times as likely), {why}. Lower learning_rate (now {self.config.learning_rate:g}), "
            f"raise {strength} (now {self.term.hyper[strength]:g}), train fewer epochs, or {sft}"
        )

    def _margins(self, line: Mapping[str, float]) -> str | None:
        margin, (limit, reason) = line["rewards/margins"], self._margin_limit()
        if not self._lasts("margins_explode", margin > limit):
            return None
        return (
            f"rewards/margins is {margin:.3g}; {self.term.name} has no use for more than {limit:.3g}: {reason}. The "
            "run memorises or diverges: train fewer epochs, lower learning_rate "
            f"(now {self.config.learning_rate:g}), or check how the pairs were labelled"
        )

    def _margin_limit(self) -> tuple[float, str]:
        """The mean reward margin from which on the loss has nothing to gain, and why."""
        name, hyper = self.term.name, self.term.hyper
        if not (self.term.loss.reference or self.term.loss.length):
            return math.inf, ""  # sums without a reference: their margin is anything at the start
        if name == "inpo":  # its rewards are log-ratios to the mixture of reference and previous policy
            return 1 / hyper["eta"], "its loss there is higher than at the start"
        if name in ("ipo", "sppo", "sppo_single", "sppo_hard", "gpo_sq"):
            # Squared losses have a target margin, and at twice the target the loss is as high as it was at the start.
            # In rewards (beta x log-ratio) IPO's target is 1/2, times the length where it is per token; SPPO's is the
            # difference of two win probabilities, at most 1.
            target = 1.0 if name != "ipo" else 0.5
            if name == "ipo" and hyper["ipo_reduce"] == "mean":
                if self.response_length is None:
                    return math.inf, ""
                target *= self.response_length
            return 2 * target, "its loss there is higher than at the start"
        if name == "sigmoid_norm":  # its rewards are of sums, its loss is of their share a token
            if self.response_length is None:
                return math.inf, ""
            return LOGISTIC_MARGIN * self.response_length, "the average pair has no gradient left there"
        offset = hyper["beta"] * hyper["gamma_beta_ratio"] if "gamma_beta_ratio" in hyper else 0.0
        smoothing = hyper.get("label_smoothing", 0.0)
        if smoothing and name in ("dpo", "cdpo", "simpo", "cpo_simpo"):
            # -(1 - e) log s(z) - e log s(-z) grows like e z and is back at its start, ln 2, near z = ln 2 / e.
            worse = math.log(2) / smoothing
            if worse < LOGISTIC_MARGIN:
                return worse + offset, "with label_smoothing its loss there is higher than at the start"
        if name in ("hinge", "gpo_hinge", "gpo_tquad"):
            return LOGISTIC_MARGIN, "its gradient is zero from 1 on, ten times less"
        return LOGISTIC_MARGIN + offset, "the average pair has no gradient left there, only outliers have"

    def _perfect(self, step: int, steps: int, line: Mapping[str, float]) -> str | None:
        """Right on every pair while each is still new: no model knows people's preferences that well."""
        pairs = steps * self.pairs_per_step
        perfect = line.get("rewards/accuracies", 0.0) >= 0.999
        self.streaks["perfect"] = self.streaks.get("perfect", 0) + pairs if perfect else 0
        new = self.train_rows is None or step * self.pairs_per_step <= self.train_rows
        if self.streaks["perfect"] < PERFECT_PAIRS or step > PERFECT_STEPS or not new:
            return None
        return (
            f"rewards/accuracies is 1.0 on the last {self.streaks['perfect']} pairs at step {step}, each seen for the "
            "first time: something tells chosen from rejected at a glance (length, format, a missing end of sequence, "
            "another model's style), or the columns were made by rule. The model learns that mark, not the preference: "
            "look at a few rows"
        )

    def _nothing_learnt(self, step: int, line: Mapping[str, float]) -> str | None:
        if self.config.sync_ref_model:  # the reference follows the policy, and the loss goes back to its start with it
            return None
        start = self.start["loss"]
        same = self.full_rate_steps >= FULL_RATE_STEPS and abs(line["loss"] - start) <= SAME_LOSS * abs(start)
        if self.term is not None and "rewards/margins" in line:
            if self.term.loss.reference:
                moved = line["rewards/margins"] - (
                    0.0 if self.starts_at_reference else self.start.get("rewards/margins", 0.0)
                )
                same = same and abs(moved) / self.term.beta < SAME_NATS
            else:
                gained = line.get("rewards/accuracies", 0.0) - self.start.get("rewards/accuracies", 0.0)
                same = same and gained <= 0.02
        if not self._lasts("nothing_learnt", same, lines=3):
            return None
        cure = "Raise learning_rate" if self.full else "Raise learning_rate (adapters need about ten times more)"
        return (
            f"after {step} steps the loss is {line['loss']:.4g}, as at the start ({start:.4g}): nothing has been "
            f"learnt. {cure} (now {self.config.learning_rate:g}), and check that chosen and rejected differ in more "
            "than chance and that the trainable parameters are the ones you mean"
        )

    def _zero_gradient(self, line: Mapping[str, float]) -> str | None:
        if not self._lasts("zero_gradient", line.get("grad_norm") == 0.0):
            return None
        reason = (
            "every pair is past the hinge's margin"
            if self.term is not None and self.term.name in ("hinge", "gpo_hinge", "gpo_tquad") and line["loss"] == 0.0
            else "the trainable parameters are not reached by the loss, or the loss has saturated"
        )
        return (
            f"grad_norm is exactly 0 on two log lines (loss {line['loss']:.4g}): {reason}. Further steps change "
            "nothing but weight decay"
        )

    def _skipped(self, step: int, line: Mapping[str, float]) -> str | None:
        skipped = line.get("skipped_steps", 0.0)
        if skipped < SKIPPED_STEPS or skipped < SKIPPED_SHARE * step:
            return None
        return (
            f"{skipped:.0f} of {step} steps had a non-finite loss or gradient and were skipped, their rows unused: "
            f"lower learning_rate (now {self.config.learning_rate:g}), use bf16 or fp32 in place of fp16 weights, and "
            f"look for extreme rows (training stops after {self.config.max_nonfinite_steps} in a row)"
        )

    # --------------------------------------------------------------- helpers

    def _per_token(self) -> float | None:
        """What turns a reward into nats a token; None while the responses' length is unknown."""
        if not self.term.loss.reference:  # SimPO's reward is beta times the mean over tokens
            return 1 / self.term.beta if self.term.loss.length else None
        return 1 / (self.term.beta * self.response_length) if self.response_length else None

    def _lasts(self, name: str, now: bool, lines: int = 2) -> bool:
        """True from the second log line in a row on: one window may be an outlier."""
        self.streaks[name] = self.streaks.get(name, 0) + 1 if now else 0
        return self.streaks[name] >= lines

    def _say(self, step: int, found: Mapping[str, str | None]) -> list[Warning_]:
        said = {w.name for w in self.warnings}
        new = [Warning_(name, step, message) for name, message in found.items() if message and name not in said]
        self.warnings += new
        return new


def _truncated(reports: Mapping[str, DataReport]) -> str | None:
    parts = []
    for name, report in reports.items():
        responses = report.truncated / max(1, report.responses)
        prompts = report.truncated_prompts / max(1, report.kept)
        if max(responses, prompts) <= TRUNCATED_SHARE:
            continue
        cut = f"{responses:.0%} of the responses" if responses >= prompts else f"{prompts:.0%} of the prompts"
        ends = f", {report.truncated_eos} of them without their end of sequence" if report.truncated_eos else ""
        parts.append(f"{cut} of the {name} data are cut at max_length {report.max_length}{ends}")
    if not parts:
        return None
    return f"{'; '.join(parts)}: what is compared is then mostly beginnings. Raise max_length, or filter long rows"
