"""The trainer's side of ref_policy.py: which reference a run has, and its log-probabilities for every data set."""

import contextlib
import gc
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm.auto import tqdm

from fastpo import checkpoint, data
from fastpo.distributed import Engine, shard
from fastpo.errors import ConfigError, DataError
from fastpo.model import Policy, load_model
from fastpo.packing import PackedBatch
from fastpo.prepare import check_ids, eval_mode, on_device
from fastpo.ref_policy import (
    RefCache,
    cache_folder,
    cache_key,
    model_fingerprint,
    reference_logps,
    response_key,
    write_entries,
)

if TYPE_CHECKING:
    from fastpo.trainer import Trainer

log = logging.getLogger("fastpo")

Sets = dict[str, list[data.Example]]


def attach(run: "Trainer", plan: list[tuple[int, list[int]]]) -> None:
    """Fill `run.ref` with token log-probabilities for every data set, or leave None where none is needed."""
    run.ref = {"train": None, **dict.fromkeys(run.eval_sets)}
    if run.world.main and run.resume is None:
        (run.output_dir / checkpoint.REFERENCE).unlink(missing_ok=True)
    if not run.uses_reference:
        return
    sets = _sets(run)
    if run.ref_model is None:
        given = {name: ["ref_logps" in e.response_columns for e in examples] for name, examples in sets.items()}
        for name in sets:
            if any(given[name]) and not all(given[name]):
                raise DataError(f"ref_chosen_logps or ref_rejected_logps is missing in some rows of the {name} data")
        if all(given["train"]):
            log.info("reference: log-probabilities from the data")
            run.starts_at_reference = False
        sets = {name: examples for name, examples in sets.items() if not all(given[name])}
        if not sets:
            return
    if run.moving is not None:
        return  # computed from one move to the next
    with contextlib.ExitStack() as stack:
        engine, fingerprint = run.engine, run.fingerprint
        if run.ref_model is not None:
            engine, fingerprint = _engine(run, sets, stack)
            run.verify(engine, plan[0][1])
        elif run.reference_is_base:
            # A new adapter's reference is the base model; one that was trained before is its own, as in TRL.
            stack.enter_context(run.policy.model.disable_adapter())  # type: ignore[operator]
        cache = _cache(run, fingerprint)
        _pass(run, engine, cache, sets, {row for _, rows in plan for row in rows})
    # Its log-probabilities are all that training needs of it; FSDP's modules hold each other.
    run.ref_model = engine = None
    gc.collect()
    if run.world.main:
        _keep(run, sets)


def _sets(run: "Trainer") -> Sets:
    # A callback may ask for an evaluation that the options do not.
    evaluates = run.config.eval_strategy != "no" or run.config.eval_on_start or bool(run.callbacks.user)
    return {"train": run.examples, **(run.eval_sets if evaluates else {})}


def _cache(run: "Trainer", fingerprint: str) -> RefCache:
    """The cache of this reference on rank 0; of a resumed run, its checkpoint's own log-probabilities first."""
    tf32 = "|tf32" if run.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32 else ""
    key = cache_key(fingerprint, f"{run.autocast_dtype or 'as loaded'}|{run.device.type}{tf32}")
    run.other_reference = run.identity.setdefault("reference", key) != key
    # The model is not as the run began, or ref_model another: what it computes now would not fit what is there.
    cache = RefCache(key, cache_folder()) if run.world.main and not run.other_reference else RefCache("", None)
    if run.resume is not None and (run.resume / checkpoint.REFERENCE).exists():
        cache.read(run.resume / checkpoint.REFERENCE)
    return cache


def _engine(run: "Trainer", sets: Sets, stack: contextlib.ExitStack) -> tuple[Engine, str]:
    """The reference model on the device or split as the policy is, and its fingerprint."""
    config, model = run.config, run.ref_model
    sharded = config.fsdp != "no"
    if isinstance(model, str | os.PathLike):
        home = torch.device("cpu") if sharded else run.device
        model = load_model(os.fspath(model), dtype=config.dtype or str(run.loaded_dtype), device=home,
                           trust_remote_code=config.trust_remote_code)  # fmt: skip
    elif not isinstance(model, nn.Module):
        raise ConfigError(f"ref_model must be a model, or its name or path, not {model!r}")
    policy = Policy(model)
    for name, examples in sets.items():
        check_ids(policy, examples, f"{name} (for ref_model)")
    fingerprint = run.world.first(lambda: model_fingerprint(model))
    if sharded:
        model.requires_grad_(False)  # else its shards would be fp32, for an optimiser that never comes
        stack.enter_context(eval_mode(model))
        return shard(policy, config, run.world, run.autocast_dtype), fingerprint
    stack.enter_context(on_device(model, run.device))
    return Engine(policy), fingerprint


def _pass(run: "Trainer", engine: Engine, cache: RefCache, sets: Sets, visited: set[int]) -> None:
    policy = engine.policy

    def compute(batch: PackedBatch) -> torch.Tensor:
        if run.other_reference:
            raise ConfigError(
                f"{run.resume} lacks the reference's log-probabilities for rows that this run needs: to add steps or "
                "evaluation data, pass the model and ref_model that the run began with"
            )
        return run.logp(engine, batch.to(run.device))

    with torch.no_grad(), eval_mode(policy.model), policy.attach():
        for name, examples in sets.items():
            bars: list[tqdm] = []

            def progress(done: int, total: int, bars: list[tqdm] = bars) -> None:
                if not bars:
                    bars.append(run.bar(desc="reference", total=total))
                bars[0].update(done - bars[0].n)

            run.ref[name] = reference_logps(
                examples, sorted(visited) if name == "train" else range(len(examples)), cache, compute,
                max_tokens=run.max_tokens, world=run.world, progress=progress,
            )  # fmt: skip
            for bar in bars:
                bar.close()


def _keep(run: "Trainer", sets: Sets) -> None:
    """The run's own copy, to which every checkpoint links: a resumed run needs neither the cache nor the pass."""
    entries = {}
    for name, examples in sets.items():
        for example, logps in zip(examples, run.ref[name], strict=True):
            for k, logp in enumerate(logps):
                entries[response_key(example.prompt_of(k), example.responses[k])] = logp
    temporary = run.output_dir / f".{checkpoint.REFERENCE}"
    try:
        write_entries(entries, temporary)
        os.replace(temporary, run.output_dir / checkpoint.REFERENCE)
    except Exception as error:  # safetensors has an error of its own for a full disk
        temporary.unlink(missing_ok=True)
        log.warning("the reference's log-probabilities could not be written beside the run: %s", error)


def move(run: "Trainer", plan: list[tuple[int, list[int]]], start: int) -> None:
    """A moving reference's log-probabilities for the steps of the plan until it moves again."""
    assert run.moving is not None
    run.reference_start = start
    visited = {row for _, rows in plan[start : start + run.moving.every] for row in rows}
    with run.moving.in_place(lambda: _exchanging(run)):
        _pass(run, run.engine, RefCache("", None), _sets(run), visited)


@contextlib.contextmanager
def _exchanging(run: "Trainer") -> Iterator[None]:
    """Inside, the weights are neither the policy's nor the reference's: nothing may be saved."""
    before, run.updating = run.updating, True
    yield
    run.updating = before
