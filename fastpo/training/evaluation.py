"""Evaluation: the training metrics on other rows, and a user's own metrics."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpo.data.packing import PackedBatch, loss_count, pass_batches
from fastpo.data.prepare import Example
from fastpo.errors import ConfigError
from fastpo.models.degree_head import LOGITS
from fastpo.models.modes import eval_mode
from fastpo.training.degree_metrics import DEGREE_SUMS, degree_means, degree_sums
from fastpo.training.metrics import PAIR_METRICS, TOKEN_SUMS, metric_means, pair_inputs, token_means, token_sums
from fastpo.training.objective import Objective
from fastpo.training.passes import Passes
from fastpo.training.reward_metrics import no_range, range_means, reward_range
from fastpo.training.router_loss import ROUTER, value
from fastpo.training.stepwide import RefOf, StepWide


@dataclass(frozen=True)
class Evaluated:
    """What `compute_metrics` gets of an evaluation: log-probabilities of whole responses (of a reward model their
    rewards), no logits.

    Arrays fp32 in the order of the rows kept: [P], one entry a pair; of unpaired rows [S] in `chosen_logps`, and None
    for the rejected. metrics: what fastpo reports, keys without prefix. A compute_metrics that asks for transformers'
    predictions, label_ids or inputs gets a ConfigError: they would hold logits of every token.
    """

    metrics: dict[str, float]
    chosen_logps: np.ndarray
    rejected_logps: np.ndarray | None
    ref_chosen_logps: np.ndarray | None
    ref_rejected_logps: np.ndarray | None
    label: np.ndarray | None  # [S] bool: desirable
    rows: np.ndarray  # [P] or [S] int64: which of the rows kept

    def __getattr__(self, name: str) -> Any:
        if name in ("predictions", "label_ids", "inputs", "losses", "elements"):
            raise ConfigError(
                f"compute_metrics reads {name}: fastpo keeps no logits; it has metrics, chosen_logps, rejected_logps, "
                "ref_chosen_logps, ref_rejected_logps, label and rows"
            )
        raise AttributeError(name)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.predictions, self.label_ids))


class Evaluation:
    """Evaluates one run's objective; nothing of the run changes by it."""

    def __init__(
        self,
        objective: Objective,
        stepwide: StepWide,
        passes: Passes,
        token_metrics: bool = False,
        compute_metrics: Callable[[Evaluated], Mapping[str, float]] | None = None,
    ):
        self.objective, self.stepwide, self.passes = objective, stepwide, passes
        self.token_metrics, self.compute_metrics = token_metrics, compute_metrics

    @torch.no_grad()
    def __call__(
        self, examples: Sequence[Example], ref: RefOf, name: str, prefix: str | None = None
    ) -> dict[str, float]:
        """The training metrics on other data, every pair once whatever packing and ranks; keys carry `prefix`.
        `name`: of the set, which is the prefix where no other is given."""
        started = time.monotonic()
        prefix = name if prefix is None else prefix
        passes, world, router_loss = self.passes, self.passes.world, self.passes.forward.router
        policy = passes.forward.policy
        pair_count = sum(map(loss_count, examples))
        nlls = self.objective.nll_counts(examples)
        sums = torch.zeros(1 + len(PAIR_METRICS), dtype=torch.float64, device=world.device)
        mine: dict[int, list[list[float]]] = {}  # what compute_metrics gets of each row
        batches = pass_batches(examples, range(len(examples)), passes.budget.max_tokens)
        shares = [batches[rank :: world.size] for rank in range(world.size)]
        share = shares[world.rank]
        of_tokens = torch.zeros(TOKEN_SUMS, dtype=torch.float64, device=world.device)
        of_rewards, of_degrees = no_range(world.device), torch.zeros(DEGREE_SUMS, device=world.device)
        watching = passes.forward.watching(self.token_metrics)
        with eval_mode(policy.model), policy.attach(), passes.forward.keeping_casts(), watching:
            stats = self.stepwide.statistics(name, range(len(examples)), passes, ref)
            parts: Iterable[tuple[PackedBatch, Tensor]]
            parts = passes.logps(share, passes.rounds(shares), examples, ref(name), batches[0], statistics=True)
            if self.stepwide.reads_rows:
                parts = list(parts)
                self.stepwide.of_rows(stats, parts, examples, world, train=False)
            router = None
            for batch, logp in parts:
                if router_loss is not None:
                    sums_of = batch.rows[ROUTER]
                    router = sums_of if router is None else router + sums_of
                loss, metrics = self.objective(logp, batch, stats, pair_count, nlls)
                sums += torch.cat([loss.reshape(1), metrics])
                if passes.forward.watches:
                    of_tokens += token_sums(batch)
                if batch.scored_rows is not None:
                    of_rewards = torch.maximum(of_rewards, reward_range(logp))
                if LOGITS in batch.rows:
                    of_degrees += degree_sums(batch)
                if self.compute_metrics is not None:
                    _note(mine, logp, batch, examples)
        total, *means = world.sum_(torch.cat([sums, of_tokens])).tolist()
        means, of_all_tokens = means[: len(PAIR_METRICS)], means[len(PAIR_METRICS) :]
        aux = {}
        if router_loss is not None:
            router = world.sum_(torch.zeros(router_loss.size, device=world.device) if router is None else router)
            aux["aux_loss"] = value(router, router).item()
            total += router_loss.coefficient * aux["aux_loss"]
        seconds = time.monotonic() - started
        of_pairs = metric_means(means, self.objective.pair_terms) if self.objective.pair_terms else {}
        if self.objective.scores:
            of_pairs |= range_means(world.max_(of_rewards).tolist(), 1)
        out = {"loss": total, **aux, **of_pairs, **token_means(of_all_tokens)}
        if self.objective.degrees:
            out |= degree_means(world.sum_(of_degrees).tolist())
        if self.compute_metrics is not None:
            everywhere = {row: values for part in world.gather(mine) for row, values in part.items()}
            out |= _own_metrics(self.compute_metrics, out, everywhere)
        out = {k if k.startswith(f"{prefix}_") else f"{prefix}_{k}": v for k, v in out.items()}
        return {**out, f"{prefix}_runtime": seconds, f"{prefix}_samples_per_second": len(examples) / seconds}


def _note(into: dict[int, list[list[float]]], logp: Tensor, batch: PackedBatch, examples: Sequence[Example]) -> None:
    """Of each pair, or unpaired row, of a batch: its log-probabilities and the reference's, NaN for what is not."""
    if batch.pairs.numel() == 0 and batch.label is None:
        return
    x = pair_inputs(logp, batch)
    none = torch.full_like(x.chosen_logps, float("nan"))
    label = none if x.label is None else x.label.to(none.dtype)
    columns = [none if c is None else c for c in x[:4]]
    values = iter(torch.stack([*columns, label], 1).tolist())
    for row in batch.examples:
        into[row] = [next(values) for _ in range(loss_count(examples[row]))]


def _own_metrics(compute: Any, metrics: dict[str, float], of_rows: dict[int, list[list[float]]]) -> dict[str, float]:
    """What a user's compute_metrics says; ConfigError where that is no mapping of names to numbers."""
    order = sorted(of_rows)
    table = np.array([values for row in order for values in of_rows[row]], dtype=np.float32).reshape(-1, 5)
    _, rejected, ref_chosen, ref_rejected, label = (None if np.isnan(column).all() else column for column in table.T)
    at = np.repeat(order, [len(of_rows[row]) for row in order]).astype(np.int64)
    desirable = None if label is None else label > 0.5
    got = compute(Evaluated(dict(metrics), table[:, 0], rejected, ref_chosen, ref_rejected, desirable, at))
    if not isinstance(got, Mapping) or not all(isinstance(v, int | float | np.number) for v in got.values()):
        raise ConfigError(f"compute_metrics must return a dict of numbers by name, not {got!r}")
    return {name: float(value) for name, value in got.items()}
