"""What a loss reads of a whole step, whatever its micro-batches and ranks: KTO's KL, BCO's mean reward, AOT's order.

Each comes from a pass over the step without gradient, ahead of the one that trains; where one micro-batch is the whole
step, that pass is the same. An evaluation set counts as one step.
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpo.config.train_config import TrainConfig
from fastpo.data.packing import PackedBatch, loss_count, pack_step, trunk_tokens
from fastpo.data.prepare import Example, mismatched
from fastpo.errors import ConfigError
from fastpo.losses.table import KL, ORDER, REWARD_MEAN, Pairs, Term
from fastpo.training.distributed import World
from fastpo.training.metrics import pair_inputs
from fastpo.training.passes import Passes
from fastpo.training.step_statistics import Statistics

log = logging.getLogger("fastpo")

RefOf = Callable[[str], Any]  # the reference's log-probabilities of a data set, by its name


class StepWide:
    """The statistics of a run's losses; `ratio_sum` and `ratio_count` are the running mean's state."""

    def __init__(self, pair_terms: Sequence[Term], config: TrainConfig):
        self.pair_terms, self.config = list(pair_terms), config
        wide = [t for t in pair_terms if t.loss.of_step]
        self.ordered = [t for t in wide if t.loss.of_step == ORDER]
        self.reads_kl = any(t.loss.of_step == KL for t in wide)
        self.reads_mean = any(t.loss.of_step == REWARD_MEAN for t in wide)
        self.reads_rows = bool(self.ordered) or self.reads_mean
        self.ratio_sum, self.ratio_count = 0.0, 0
        self.pending = (0.0, 0)  # of the step that is under way
        self.of_rollouts: dict[str, Any] = {}  # fields of the next step's statistics, of an online run
        self.entropy: float | None = None  # of the last step's tokens, where a coefficient follows it
        self.mismatched: dict[str, list[Example]] = {}
        if self.reads_rows and not config.disable_dropout:
            names = ", ".join(t.name for t in wide if t.loss.of_step != KL)
            raise ConfigError(f"{names} looks at a step before training on it, so dropout must be off: disable_dropout")

    def prepare(self, sets: dict[str, list[Example]]) -> None:
        """Check the data; where a KL is read, form the mismatched rows of each set."""
        for name, examples in sets.items():
            weighted = any(w != 1.0 for e in examples for w in e.pair_columns.get("weight", ()))
            if self.ordered and weighted:
                raise ConfigError(
                    f"{self.ordered[0].name} compares sorted margins of different pairs, so a pair can have no weight: "
                    f"leave the column weight out of the {name} data"
                )
            if self.reads_kl and any("ref_logps" in e.response_columns for e in examples):
                # The KL would be to the policy's start, whatever reference the columns are of.
                raise ConfigError(
                    "kto scores completions of other prompts with the reference, which ref_chosen_logps and "
                    f"ref_rejected_logps of the {name} data cannot: pass ref_model, or leave the columns out where the "
                    "reference is the model itself"
                )
            if self.reads_kl:
                self.mismatched[name] = mismatched(examples, self.config.max_length)
        for term in self.pair_terms:
            if "label" in term.loss.needs and "desirable_weight" in term.hyper and "train" in sets:
                _check_balance(term, sets["train"])

    def forget(self, names: Iterable[str]) -> None:
        """Leave out the mismatched rows of sets that are behind."""
        for name in names:
            self.mismatched.pop(name, None)

    def reference_sets(self, sets: dict[str, list[Example]]) -> dict[str, list[Example]]:
        """The mismatched rows of `sets`, which the reference must score too."""
        return {_mismatched(name): self.mismatched[name] for name in sets if name in self.mismatched}

    # ---- one step

    def statistics(self, name: str, rows: Sequence[int], passes: Passes, ref: RefOf) -> Statistics:
        """What is known before the rows' own pass; `of_rows` adds the rest. Every rank calls it."""
        if not self.reads_kl:
            return Statistics(**self.of_rollouts)
        examples, world = self.mismatched[name], passes.world
        tokens = {i: trunk_tokens(examples[i]) for i in rows}
        shares = pack_step(rows, tokens, passes.budget.max_tokens, world.size)
        sums = torch.zeros(2, dtype=torch.float64, device=world.device)
        for batch, logp in passes.logps(
            shares[world.rank], passes.rounds(shares), examples, ref(_mismatched(name)), shares[0][0]
        ):
            ratios = logp.double() - batch.ref_logp.double()
            sums[0] += (ratios if batch.token_weight is None else batch.token_weight * ratios).sum()
            sums[1] += len(batch.examples)
        total, count = world.sum_(sums)
        return Statistics(kl=(total / count).float())

    def look_ahead(
        self, stats: Statistics, passes: Passes, share: Sequence[list[int]], rounds: int, examples: Sequence[Example],
        ref: Any, idle: list[int],
    ) -> None:  # fmt: skip
        """Complete `stats` of a training step, if a loss asks for it, by a pass over this rank's share of it."""
        if self.reads_rows:
            parts = passes.logps(share, rounds, examples, ref, idle)
            self.of_rows(stats, parts, examples, passes.world, train=True)
        if passes.forward.router is not None:
            stats.router = passes.router_sums(share, rounds, examples, ref, idle)

    def of_rows(
        self, stats: Statistics, parts: Iterable[tuple[PackedBatch, Tensor]], examples: Sequence[Example], world: World,
        *, train: bool,
    ) -> None:  # fmt: skip
        """Complete `stats` from the log-probabilities of this rank's part of the step; here the host waits for them."""
        mine: dict[int, list[list[float]]] = {}  # row -> of each of its pairs, or of itself: lw, ll, rw, rl
        for batch, logp in parts:
            x = pair_inputs(logp.detach(), batch)
            values = iter(torch.stack([c for c in x[:4] if c is not None], 1).double().tolist())
            for row in batch.examples:
                mine[row] = [next(values) for _ in range(loss_count(examples[row]))]
        everywhere = {row: values for part in world.gather(mine) for row, values in part.items()}
        rows = sorted(everywhere)  # whatever the packing
        columns = torch.tensor([v for row in rows for v in everywhere[row]], device=world.device).unbind(1)
        if self.reads_mean:
            ratios = columns[0].double() - columns[1].double()
            self.pending = (ratios.sum().item(), len(ratios)) if train else (0.0, 0)
            total, count = self.ratio_sum + self.pending[0], self.ratio_count + self.pending[1]
            stats.ratio_mean = torch.tensor(total / max(count, 1), device=world.device)
            return
        places = itertools.accumulate((len(everywhere[row]) for row in rows), initial=0)
        stats.pair_at = dict(zip(rows, places, strict=False))
        x = Pairs(*columns)
        for term in self.ordered:
            stats.coefficients[term.name] = term.loss.gradient(x, **term.hyper)
            stats.means[term.name] = term.loss.fn(x, **term.hyper).mean()

    def commit(self, finite: bool) -> None:
        """The step is behind: its log-ratios count in the running mean, unless it was skipped."""
        if finite:
            self.ratio_sum += self.pending[0]
            self.ratio_count += self.pending[1]
        self.pending = (0.0, 0)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"ratio_sum": self.ratio_sum, "ratio_count": self.ratio_count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.ratio_sum, self.ratio_count = state["ratio_sum"], state["ratio_count"]


def _mismatched(name: str) -> str:
    return f"{name} mismatched"


TRAIN_MISMATCHED = _mismatched("train")


def _check_balance(term: Term, examples: Sequence[Example]) -> None:
    desirable = sum(e.response_columns["label"][0] for e in examples)
    undesirable = len(examples) - desirable
    if not desirable or not undesirable:
        log.warning("%s: all rows are %s", term.name, "desirable" if desirable else "undesirable")
        return
    ratio = term.hyper["desirable_weight"] * desirable / (term.hyper["undesirable_weight"] * undesirable)
    if not 0.999 <= ratio <= 1.335:
        log.warning(
            "%s: desirable_weight x %d rows is %.3g of undesirable_weight x %d rows; KTO's authors advise 1 to 4/3: "
            "undesirable_weight=%.3g would give 1",
            term.name, desirable, ratio, undesirable, ratio * term.hyper["undesirable_weight"],
        )  # fmt: skip
