"""Evaluation: the training metrics on other rows, a user's own metrics, and answers to a few of the prompts."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastpo.checkpoints import saving
from fastpo.data import prepare as data
from fastpo.data.packing import PackedBatch, loss_count, pass_batches
from fastpo.errors import ConfigError
from fastpo.models.modes import eval_mode
from fastpo.reference import sources as references
from fastpo.report import outputs
from fastpo.report.callbacks import best
from fastpo.training import run_data
from fastpo.training.metrics import PAIR_METRICS, TOKEN_SUMS, metric_means, pair_inputs, token_means, token_sums
from fastpo.training.router_loss import ROUTER, value
from fastpo.training.samples import generate_samples

if TYPE_CHECKING:
    from fastpo.trainer import Trainer


def evaluate_all(run: "Trainer") -> bool:
    """Evaluates and logs every set; returns whether the result is the best so far. What a run cut short had done is not
    done again."""
    done = run.progress.todo.setdefault("evaluated", {})
    with run.window.paused():
        for name, examples in run.eval_sets.items():
            if name not in done:
                metrics = evaluate(run, examples, run.ref[name], name)
                with saving.whole(run):
                    done[name] = metrics
                    run.log(metrics)
        if run.config.sample_generations:
            _sample(run)
    for metrics in done.values():
        run.callbacks.call("on_evaluate", metrics={**metrics, "epoch": run.state.epoch})
    del run.progress.todo["evaluated"]
    if run.state.global_step == 0:
        return False  # as in transformers: what a run begins with is not its best
    return best(run.state, {k: v for metrics in done.values() for k, v in metrics.items()}, run.config)


@dataclass(frozen=True)
class Evaluated:
    """What `compute_metrics` gets of an evaluation: log-probabilities of whole responses, no logits.

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


@contextlib.contextmanager
def _watching(run: "Trainer") -> Iterator[None]:
    """Inside, forward passes look at their tokens' distributions, where the options ask for it."""
    before, run.watch_tokens = run.watch_tokens, run.config.token_metrics
    try:
        yield
    finally:
        run.watch_tokens = before


@torch.no_grad()
def evaluate(
    run: "Trainer", examples: Sequence[data.Example], ref: Any, prefix: str = "eval", name: str | None = None
) -> dict[str, float]:
    """The training metrics on other data, every pair once whatever packing and ranks; keys carry `prefix`.
    `name`: of the set in the run, where it is not the prefix."""
    started = time.monotonic()
    pair_count = sum(map(loss_count, examples))
    nlls = run.objective.nll_counts(examples)
    sums = torch.zeros(1 + len(PAIR_METRICS), dtype=torch.float64, device=run.device)
    mine: dict[int, list[list[float]]] = {}  # what compute_metrics gets of each row
    batches = pass_batches(examples, range(len(examples)), run.max_tokens)
    share = batches[run.world.rank :: run.world.size]
    rounds = -(-len(batches) // run.world.size) if run.engine.sharded else len(share)
    of_tokens = torch.zeros(TOKEN_SUMS, dtype=torch.float64, device=run.device)
    with eval_mode(run.model), run.policy.attach(), _watching(run):
        stats = run.stepwide.statistics(name or prefix, range(len(examples)))
        parts: Iterable[tuple[PackedBatch, Tensor]]
        parts = run.stepwide.first_pass(share, rounds, examples, ref, batches[0], statistics=True)
        if run.stepwide.reads_rows:
            parts = list(parts)
            run.stepwide.of_rows(stats, parts, examples, train=False)
        router = None
        for batch, logp in parts:
            if run.router is not None:
                sums_of = batch.rows[ROUTER]
                router = sums_of if router is None else router + sums_of
            loss, metrics = run.objective(logp, batch, stats, pair_count, nlls)
            sums += torch.cat([loss.reshape(1), metrics])
            if run.watch_tokens:
                of_tokens += token_sums(batch)
            if run.compute_metrics is not None:
                _note(mine, logp, batch, examples)
    total, *means = run.world.sum_(torch.cat([sums, of_tokens])).tolist()
    means, shares = means[: len(PAIR_METRICS)], means[len(PAIR_METRICS) :]
    aux = {}
    if run.router is not None:
        router = run.world.sum_(torch.zeros(run.router.size, device=run.device) if router is None else router)
        aux["aux_loss"] = value(router, router).item()
        total += run.router.coefficient * aux["aux_loss"]
    seconds = time.monotonic() - started
    of_pairs = metric_means(means, run.pair_terms) if run.pair_terms else {}
    out = {"loss": total, **aux, **of_pairs, **token_means(shares)}
    if run.compute_metrics is not None:
        everywhere = {row: values for part in run.world.gather(mine) for row, values in part.items()}
        out |= _own_metrics(run.compute_metrics, out, everywhere)
    out = {k if k.startswith(f"{prefix}_") else f"{prefix}_{k}": v for k, v in out.items()}
    return {**out, f"{prefix}_runtime": seconds, f"{prefix}_samples_per_second": len(examples) / seconds}


def _note(
    into: dict[int, list[list[float]]], logp: Tensor, batch: PackedBatch, examples: Sequence[data.Example]
) -> None:
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


# ---- outside of training


def evaluate_now(run: "Trainer", dataset: Any, prefix: str) -> dict[str, float]:
    """`Trainer.evaluate`: of the sets of the run, or of rows given; logged like an evaluation of the run."""
    if run.in_loop:
        raise ConfigError("evaluate() within a run: set control.should_evaluate in the callback, or eval_strategy")
    run.ready()
    if dataset is None and not run.eval_sets:
        raise ConfigError("evaluate() needs rows: pass them, or an eval_dataset to the trainer")
    metrics: dict[str, float] = {}
    with _sets(run, dataset) as sets:
        for name, examples in sets.items():
            shown = prefix + name.removeprefix(_GIVEN).removeprefix("eval")
            metrics |= evaluate(run, examples, run.ref.get(name), shown, name)
    line = {**metrics, "epoch": round(run.state.epoch or 0.0, 4), "step": run.state.global_step}
    run.state.log_history.append(line)
    run.callbacks.log(metrics)
    run.callbacks.call("on_evaluate", metrics={**metrics, "epoch": run.state.epoch})
    return metrics


_GIVEN = "rows given to "  # what the name of such a set begins with inside a run; `eval` follows


@contextlib.contextmanager
def _sets(run: "Trainer", dataset: Any) -> Iterator[dict[str, list[data.Example]]]:
    """The sets to evaluate, with their reference in `run.ref`; that of rows given only inside."""
    if dataset is None:
        sets = run.eval_sets
        missing = {name: examples for name, examples in sets.items() if run.ref.get(name) is None}
        run.ref |= references.of_other_rows(run, missing)
        yield sets
        return
    references.check_other_rows(run)
    run_data.check_precomputed(run.config, dataset)
    if isinstance(dataset, Mapping):
        given = {f"{_GIVEN}eval_{name}": rows for name, rows in dataset.items()}
    else:
        given = {f"{_GIVEN}eval": dataset}
    sets = {name: run_data.prepare(run, rows, run.config.dataset_test_split, name) for name, rows in given.items()}
    run_data.place(run, sets)
    before = dict(run.ref)
    try:
        run.ref |= references.of_other_rows(run, sets)
        yield sets
    finally:
        run.ref = before
        run.stepwide.forget(sets)


def _sample(run: "Trainer") -> None:
    """Answers to a few prompts, as the model gives them now, appended to samples.jsonl."""
    examples = next(iter(run.eval_sets.values()), run.examples)
    if not (run.world.main or run.engine.sharded):
        return

    def generate() -> list[dict[str, Any]]:
        with run.policy.detached(), run.autocast():
            return generate_samples(
                run.model, run.tokenizer, examples, run.config.sample_generations, run.config.generation_kwargs
            )

    with torch.no_grad():
        samples = run.engine(generate)
    outputs.write_samples(run, samples)
