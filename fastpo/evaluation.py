"""Evaluation inside a run: the training metrics on other rows, and answers to a few of their prompts."""

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastpo import data, outputs, saving
from fastpo.callbacks import best
from fastpo.metrics import PAIR_METRICS, metric_means
from fastpo.packing import PackedBatch, loss_count, pass_batches
from fastpo.prepare import eval_mode
from fastpo.router_loss import ROUTER, value
from fastpo.samples import generate_samples

if TYPE_CHECKING:
    from fastpo.trainer import Trainer


def evaluate_all(run: "Trainer") -> bool:
    """Evaluates and logs every set; returns whether the result is the best so far. What a run cut short had done is not
    done again."""
    done = run.todo.setdefault("evaluated", {})
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
    del run.todo["evaluated"]
    if run.state.global_step == 0:
        return False  # as in transformers: what a run begins with is not its best
    return best(run.state, {k: v for metrics in done.values() for k, v in metrics.items()}, run.config)


@torch.no_grad()
def evaluate(run: "Trainer", examples: Sequence[data.Example], ref: Any, prefix: str = "eval") -> dict[str, float]:
    """The training metrics on other data, every pair once whatever packing and ranks; keys carry `prefix`."""
    started = time.monotonic()
    pair_count = sum(map(loss_count, examples))
    nlls = run.nll_counts(examples)
    sums = torch.zeros(1 + len(PAIR_METRICS), dtype=torch.float64, device=run.device)
    batches = pass_batches(examples, range(len(examples)), run.max_tokens)
    share = batches[run.world.rank :: run.world.size]
    rounds = -(-len(batches) // run.world.size) if run.engine.sharded else len(share)
    with eval_mode(run.model), run.policy.attach():
        stats = run.stepwide.statistics(prefix, range(len(examples)))
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
    total, *means = run.world.sum_(sums).tolist()
    aux = {}
    if run.router is not None:
        router = run.world.sum_(torch.zeros(run.router.size, device=run.device) if router is None else router)
        aux["aux_loss"] = value(router, router).item()
        total += run.router.coefficient * aux["aux_loss"]
    seconds = time.monotonic() - started
    out = {"loss": total, **aux, **(metric_means(means, run.pair_terms) if run.pair_terms else {})}
    out = {f"{prefix}_{k}": v for k, v in out.items()}
    return {**out, f"{prefix}_runtime": seconds, f"{prefix}_samples_per_second": len(examples) / seconds}


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
