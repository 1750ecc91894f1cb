"""What a loss reads of a whole step, whatever its micro-batches and ranks: KTO's KL, BCO's mean reward, AOT's order.

Each comes from a pass over the step without gradient, ahead of the one that trains; where one micro-batch is the whole
step, that pass is the same. An evaluation set counts as one step.
"""

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastpo.data import prepare as data
from fastpo.data.packing import PackedBatch, loss_count, pack_step, trunk_tokens
from fastpo.data.prefetch import to_device
from fastpo.errors import ConfigError
from fastpo.losses.table import KL, ORDER, REWARD_MEAN, Pairs, Term
from fastpo.training.metrics import list_loss, pair_inputs
from fastpo.training.row_statistics import term_inputs

if TYPE_CHECKING:
    from fastpo.trainer import Trainer

log = logging.getLogger("fastpo")


@dataclass
class Statistics:
    """Of one step, or of one evaluation; detached, on the device."""

    kl: Tensor | None = None  # []: mean log-ratio of mismatched prompts and completions
    ratio_mean: Tensor | None = None  # []: running mean of the log-ratios
    pair_at: dict[int, int] = field(default_factory=dict)  # row -> place of its first pair in what follows
    coefficients: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # term -> dL/dlw, dL/dll, each [P]
    means: dict[str, Tensor] = field(default_factory=dict)  # term -> mean loss of the step's pairs, []
    router: Tensor | None = None  # [2 E + 1]: training/router_loss.py's sums, where the step is several micro-batches

    def of_term(self, x: Pairs, term: Term) -> Pairs:
        """`x` with what the term's loss reads of the step."""
        mean = None if self.ratio_mean is None else term.beta * self.ratio_mean
        return x._replace(kl=self.kl, reward_mean=mean)

    def loss(self, term: Term, x: Pairs, logp: Tensor, batch: PackedBatch) -> Tensor:
        """The term's loss of each pair, each unpaired response, or each row's list of responses. -> [P]"""
        if term.loss.shape == "lists":
            return list_loss(term, logp, batch)
        return term.loss.fn(self.of_term(term_inputs(term, x, logp, batch), term), **term.hyper)

    def ordered_loss(self, x: Pairs, term: Term, batch: PackedBatch) -> Tensor:
        """The batch's share of a loss over the order of all pairs: its value, and its gradient for these pairs."""
        at = [self.pair_at[row] + k for row, n in zip(batch.examples, batch.row_pairs, strict=True) for k in range(n)]
        (index,) = to_device([torch.tensor(at)], x.chosen_logps.device)
        chosen, rejected = (c.index_select(0, index) for c in self.coefficients[term.name])
        slope = (chosen * x.chosen_logps + rejected * x.rejected_logps).sum()
        return slope + (self.means[term.name] * len(at) - slope).detach()


class StepWide:
    """The statistics of a run's losses; `ratio_sum` and `ratio_count` are the running mean's state."""

    def __init__(self, run: "Trainer"):
        self.run = run
        wide = [t for t in run.pair_terms if t.loss.of_step]
        self.ordered = [t for t in wide if t.loss.of_step == ORDER]
        self.reads_kl = any(t.loss.of_step == KL for t in wide)
        self.reads_mean = any(t.loss.of_step == REWARD_MEAN for t in wide)
        self.reads_rows = bool(self.ordered) or self.reads_mean
        self.ratio_sum, self.ratio_count = 0.0, 0
        self.pending = (0.0, 0)  # of the step that is under way
        self.mismatched: dict[str, list[data.Example]] = {}
        if self.reads_rows and not run.config.disable_dropout:
            names = ", ".join(t.name for t in wide if t.loss.of_step != KL)
            raise ConfigError(f"{names} looks at a step before training on it, so dropout must be off: disable_dropout")

    def prepare(self, sets: dict[str, list[data.Example]]) -> None:
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
                self.mismatched[name] = data.mismatched(examples, self.run.config.max_length)
        for term in self.run.pair_terms:
            if "label" in term.loss.needs and "desirable_weight" in term.hyper and "train" in sets:
                _check_balance(term, sets["train"])

    def forget(self, names: Iterable[str]) -> None:
        """Leave out the mismatched rows of sets that are behind."""
        for name in names:
            self.mismatched.pop(name, None)

    def reference_sets(self, sets: dict[str, list[data.Example]]) -> dict[str, list[data.Example]]:
        """The mismatched rows of `sets`, which the reference must score too."""
        return {_mismatched(name): self.mismatched[name] for name in sets if name in self.mismatched}

    # ---- one step

    def statistics(self, name: str, rows: Sequence[int]) -> Statistics:
        """What is known before the rows' own pass; `of_rows` adds the rest. Every rank calls it."""
        if not self.reads_kl:
            return Statistics()
        run, examples = self.run, self.mismatched[name]
        tokens = {i: trunk_tokens(examples[i]) for i in rows}
        shares = pack_step(rows, tokens, run.max_tokens, run.world.size)
        share = shares[run.world.rank]
        rounds = max(map(len, shares)) if run.engine.sharded else len(share)
        sums = torch.zeros(2, dtype=torch.float64, device=run.device)
        for batch, logp in self.first_pass(share, rounds, examples, run.ref[_mismatched(name)], shares[0][0]):
            ratios = logp.double() - batch.ref_logp.double()
            sums[0] += (ratios if batch.token_weight is None else batch.token_weight * ratios).sum()
            sums[1] += len(batch.examples)
        total, count = run.world.sum_(sums)
        return Statistics(kl=(total / count).float())

    def look_ahead(self, stats: Statistics, share: Sequence[list[int]], rounds: int, idle: list[int]) -> None:
        """Complete `stats` of a training step, if a loss asks for it, by a pass over this rank's share of it."""
        if self.reads_rows:
            parts = self.first_pass(share, rounds, self.run.examples, self.run.ref["train"], idle)
            self.of_rows(stats, parts, self.run.examples, train=True)
        run = self.run
        if run.router is not None:
            router = run.router

            def sums(part: list[int]) -> Tensor:
                with run.autocast():
                    return router.trunk_pass(run.engine, run.batch(run.examples, part, run.ref["train"]))

            mine = run.budget.passes(share, run.examples, sums)
            more = (sums(idle) for _ in range(rounds - len(share)))
            stats.router = router.look_ahead(mine, more, run.world)

    def first_pass(
        self, share: Sequence[list[int]], rounds: int, examples: Sequence[data.Example], ref: Any, idle: list[int],
        statistics: bool = False,
    ) -> Iterator[tuple[PackedBatch, Tensor]]:  # fmt: skip
        """Micro-batches of this rank and their log-probabilities without gradient; in idle rounds the rows `idle`."""

        def forward(part: list[int]) -> tuple[PackedBatch, Tensor]:
            with torch.no_grad():
                batch = self.run.batch(examples, part, ref)
                return batch, self.run.logp(self.run.engine, batch, statistics=statistics)

        yield from self.run.budget.passes(share, examples, forward)
        for _ in range(rounds - len(share)):
            forward(idle)

    def of_rows(
        self, stats: Statistics, parts: Iterable[tuple[PackedBatch, Tensor]], examples: Sequence[data.Example],
        *, train: bool,
    ) -> None:  # fmt: skip
        """Complete `stats` from the log-probabilities of this rank's part of the step; here the host waits for them."""
        mine: dict[int, list[list[float]]] = {}  # row -> of each of its pairs, or of itself: lw, ll, rw, rl
        for batch, logp in parts:
            x = pair_inputs(logp.detach(), batch)
            values = iter(torch.stack([c for c in x[:4] if c is not None], 1).double().tolist())
            for row in batch.examples:
                mine[row] = [next(values) for _ in range(loss_count(examples[row]))]
        everywhere = {row: values for part in self.run.world.gather(mine) for row, values in part.items()}
        rows = sorted(everywhere)  # whatever the packing
        columns = torch.tensor([v for row in rows for v in everywhere[row]], device=self.run.device).unbind(1)
        if self.reads_mean:
            ratios = columns[0].double() - columns[1].double()
            self.pending = (ratios.sum().item(), len(ratios)) if train else (0.0, 0)
            total, count = self.ratio_sum + self.pending[0], self.ratio_count + self.pending[1]
            stats.ratio_mean = torch.tensor(total / max(count, 1), device=self.run.device)
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


def _check_balance(term: Term, examples: Sequence[data.Example]) -> None:
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
