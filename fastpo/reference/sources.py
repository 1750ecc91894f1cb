"""The trainer's side of reference/cache.py: which reference a run has, and its log-probabilities for every data set.

INPO and regularised DNO read a second policy, the previous iterate of self-play. It is found as the reference is, and
mixed with it before training, (1 - kappa) previous + kappa reference, so that a step reads one number a response.
"""

import contextlib
import gc
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from fastpo.checkpoints import checkpoint
from fastpo.data import prepare as data
from fastpo.data import rows
from fastpo.data.packing import PackedBatch
from fastpo.errors import ConfigError, DataError
from fastpo.models.loading import load_model
from fastpo.models.modes import check_ids, eval_mode, on_device
from fastpo.models.policy import Policy, weights_eps
from fastpo.reference.cache import (
    RefCache,
    TokenLogps,
    cache_folder,
    cache_key,
    model_fingerprint,
    reference_logps,
    response_key,
    write_entries,
)
from fastpo.reference.function_state import function_digest
from fastpo.training.distributed import Engine, shard
from fastpo.training.row_statistics import TOKEN_KL, needs_reference_tokens
from fastpo.training.step_plan import StepPlan
from fastpo.training.stepwide import TRAIN_MISMATCHED

if TYPE_CHECKING:
    from fastpo.trainer import Trainer

log = logging.getLogger("fastpo")

Sets = dict[str, list[data.Example]]


@dataclass(frozen=True)
class Role:
    """A fixed policy that a loss compares with, and where a run has it."""

    name: str
    model: str  # attribute of the run: a model, or its name or path, until its log-probabilities are known
    columns: str  # of the data, as the example has them: sums
    file: str  # its token log-probabilities beside the run and in checkpoints
    key: str  # in run.json: the cache's key


REF = Role("reference", "ref_model", "ref_logps", checkpoint.REFERENCE, "reference")
PREV = Role("previous policy", "prev_model", "prev_logps", checkpoint.PREVIOUS, "previous")


def check_previous(run: "Trainer", prev_model: Any) -> None:
    """ConfigError where a previous policy is given to losses that have none apart, or beside a moving reference."""
    names = "+".join(run.config.losses)
    if prev_model is not None and run.kappa is None:
        hint = "pass it as ref_model, its only reference" if run.uses_reference else "leave it out"
        raise ConfigError(f"prev_model is given, and {names} mixes no previous policy with the reference: {hint}")
    if run.config.sync_ref_model and run.kappa is not None:
        raise ConfigError(f"sync_ref_model moves the reference, and {names} mixes it with the previous policy once")


def attach(run: "Trainer", plan: StepPlan) -> None:
    """Fill `run.ref` with token log-probabilities for every data set, or leave None where none is needed."""
    run.ref = {"train": None, **dict.fromkeys(run.eval_sets)}
    if run.world.main and run.resume is None:
        for role in (REF, PREV):
            (run.output_dir / role.file).unlink(missing_ok=True)
    if not run.uses_reference or TOKEN_KL in run.row_statistics:  # reference/live.py has the latter
        return
    sets = sets_of(run)
    given = _given(run, REF, sets)
    prev_given = _given(run, PREV, sets) if run.kappa is not None else set()
    if "train" in given:
        log.info("reference: log-probabilities from the data")
        run.starts_at_reference = False
    if run.moving is not None:
        return  # computed from one move to the next
    starts = [role for role, of_data in ((REF, given), (PREV, prev_given))
              if getattr(run, role.model) is None and "train" not in of_data]  # fmt: skip
    run.ref |= _logps(run, plan, REF, {name: e for name, e in sets.items() if name not in given})
    if run.kappa is None:
        return
    reference = run.identity.get(REF.key)
    if starts == [REF, PREV] and not given | prev_given and run.identity.setdefault(PREV.key, reference) == reference:
        log.info("previous policy: the reference, which is the policy as it is before training")
        return
    if PREV in starts:
        log.info("previous policy: the policy as it is before training")
    previous = _logps(run, plan, PREV, {name: e for name, e in sets.items() if name not in prev_given})
    if starts and run.start_is_known:
        run.start = run.ref["train"] if starts[0] is REF else previous["train"]
    run.starts_at_reference = False
    run.ref |= {name: mix(examples, run.ref[name], previous.get(name), run.kappa) for name, examples in sets.items()}


def _given(run: "Trainer", role: Role, sets: Sets) -> set[str]:
    """The data sets that have the role's sums themselves. A model that is given goes before them."""
    found: set[str] = set()
    for name, examples in sets.items() if getattr(run, role.model) is None else ():
        has = [role.columns in e.response_columns for e in examples]
        if any(has) and not all(has):
            columns = " or ".join(rows.RESPONSE_COLUMNS[role.columns])
            raise DataError(f"{columns} is missing in some rows of the {name} data")
        if any(has) and examples[0].token_weights is not None:
            columns = " and ".join(rows.RESPONSE_COLUMNS[role.columns])
            raise DataError(
                f"{columns} are sums, which neither chosen_token_weights nor turns that are not trained on can weigh: "
                f"pass {role.model} instead, or assistant_only_loss=false where they are of all turns"
            )
        of_tokens = next((t.name for t in run.pair_terms if needs_reference_tokens(t.loss)), None)
        if of_tokens is not None and any(has):
            columns = " and ".join(rows.RESPONSE_COLUMNS[role.columns])
            raise DataError(
                f"{of_tokens} needs the reference's log-probability of every token, and {columns} of the {name} data "
                f"are sums: drop the columns, or pass {role.model}"
            )
        found |= {name} if all(has) else set()
    return found


def _logps(run: "Trainer", plan: StepPlan, role: Role, sets: Sets) -> dict[str, TokenLogps]:
    """The role's token log-probabilities for `sets`, computed, cached, and kept beside the run."""
    if not sets:
        return {}
    with contextlib.ExitStack() as stack:
        engine, fingerprint = run.engine, run.fingerprint
        if getattr(run, role.model) is not None:
            engine, fingerprint = load(run, role, sets, stack)
            run.verify(engine, plan[0][1])
        elif run.reference_is_base:
            # A new adapter's reference is the base model; one that was trained before is its own, as in TRL.
            stack.enter_context(run.policy.model.disable_adapter())  # type: ignore[operator]
        cache = _cache(run, role, engine.policy, fingerprint)
        out = _pass(run, engine, cache, sets, plan.visited(), role.name)
    if getattr(run, role.model) is not None and run.config.fsdp != "no":
        # Its log-probabilities are all that training needs of it; FSDP's modules hold each other.
        setattr(run, role.model, None)
        engine = None
        gc.collect()
    if run.world.main:
        _keep(run, role, sets, out)
    return out


def check_other_rows(run: "Trainer") -> None:
    """ConfigError where rows that a run did not begin with can get no reference now."""
    names = "+".join(run.config.losses)
    if not run.uses_reference:
        return
    if run.kappa is not None or TOKEN_KL in run.row_statistics:
        raise ConfigError(f"evaluate() takes no rows with {names}: pass them to the trainer, as eval_dataset")
    again = run.model_given_by_name and not run.config.precompute_ref_log_probs
    moved = run.state.global_step > 0 and not (run.reference_is_base or run.config.sync_ref_model)
    if moved and run.ref_model is None and not again:
        way = "or set precompute_ref_log_probs=False, so that it is loaded again, " if run.model_given_by_name else ""
        raise ConfigError(
            "Cannot compute reference log-probs for a dataset passed to evaluate() after training: the reference was "
            f"the policy at its start, which is gone; pass the rows as eval_dataset, {way}or pass ref_model"
        )


def of_other_rows(run: "Trainer", sets: Sets) -> dict[str, Any]:
    """Token log-probabilities of the reference for sets outside of training, and for their mismatched rows; None where
    the loss reads none. The policy is its own reference before training; after it, it is loaded again by its name.
    """
    none = dict.fromkeys(sets)
    if not run.uses_reference or not sets:
        return none
    check_other_rows(run)
    sets = {**sets, **run.stepwide.reference_sets(sets)}
    given = _given(run, REF, sets)
    sets = {name: examples for name, examples in sets.items() if name not in given}
    if run.config.sync_ref_model:
        assert run.moving is not None
        with run.moving.in_place(lambda: exchanging(run)):
            return none | _pass(run, run.engine, RefCache("", None), sets, set())
    with contextlib.ExitStack() as stack:
        engine, fingerprint = run.engine, run.fingerprint
        if run.ref_model is not None:
            engine, fingerprint = load(run, REF, sets, stack)
        elif run.reference_is_base:
            stack.enter_context(run.policy.model.disable_adapter())  # type: ignore[operator]
        elif run.state.global_step > 0:
            engine = _as_it_began(run, stack)
        return none | _pass(run, engine, _open(run, REF, engine.policy, fingerprint), sets, set())


def _as_it_began(run: "Trainer", stack: contextlib.ExitStack) -> Engine:
    """The policy loaded again by its name, if that still gives the weights that the run began with."""
    config = run.config
    home = torch.device("cpu") if config.fsdp != "no" else run.device
    model = load_model(run.model_name, dtype=config.dtype, device=home, trust_remote_code=config.trust_remote_code,
                       model_init_kwargs=config.model_init_kwargs)  # fmt: skip
    if run.world.first(lambda: model_fingerprint(model)) != run.fingerprint:
        raise ConfigError(
            f"Cannot compute reference log-probs for a dataset passed to evaluate(): {run.model_name!r} is no longer "
            "what the run began with; pass the rows as eval_dataset, or ref_model"
        )
    policy = Policy(model)
    if config.fsdp != "no":
        model.requires_grad_(False)
        stack.enter_context(eval_mode(model))
        return shard(policy, config, run.world, run.autocast_dtype)
    return Engine(policy)


def mix(
    examples: Sequence[data.Example], ref: TokenLogps | None, prev: TokenLogps | None, kappa: float
) -> TokenLogps | None:
    """(1 - kappa) previous + kappa reference of every response: per token, or where the data give either as a sum only,
    as sums in the examples' `ref_logps`, and None is returned.
    """
    if ref is not None and prev is not None:
        return [[((1 - kappa) * t + kappa * r).astype(np.float32) for r, t in zip(*both, strict=True)]
                for both in zip(ref, prev, strict=True)]  # fmt: skip
    for i, example in enumerate(examples):
        columns = example.response_columns
        r, t = (columns[role.columns] if tokens is None else [float(x.sum(dtype=np.float64)) for x in tokens[i]]
                for role, tokens in ((REF, ref), (PREV, prev)))  # fmt: skip
        if r and t:  # else a row that no step visits
            columns[REF.columns] = [(1 - kappa) * b + kappa * a for a, b in zip(r, t, strict=True)]
    return None


def of_batch(logps: TokenLogps, batch: PackedBatch) -> torch.Tensor:
    """Token log-probabilities [N] fp32 of the batch's rows, on its device."""
    parts = [logp for i in batch.examples for logp in logps[i]]
    return torch.from_numpy(np.concatenate(parts).astype(np.float32)).to(batch.target.device)


def sets_of(run: "Trainer") -> Sets:
    # A callback may ask for an evaluation that the options do not.
    evaluates = run.config.eval_strategy != "no" or run.config.eval_on_start or bool(run.callbacks.user) or run.stays
    sets = {"train": run.examples, **(run.eval_sets if evaluates else {})}
    return {**sets, **run.stepwide.reference_sets(sets)}


def _cache(run: "Trainer", role: Role, policy: Policy, fingerprint: str) -> RefCache:
    """The cache of this policy on rank 0; of a resumed run, its checkpoint's own log-probabilities first."""
    run.other_reference = not is_as_begun(run, role, fingerprint)
    # The model is not as the run began, or ref_model another: what it computes now would not fit what is there.
    cache = RefCache("", None) if run.other_reference else _open(run, role, policy, fingerprint)
    if run.resume is not None and (run.resume / role.file).exists():
        cache.read(run.resume / role.file)
    return cache


def _open(run: "Trainer", role: Role, policy: Policy, fingerprint: str) -> RefCache:
    """The cache on disk of what this policy computes; in memory only on ranks other than 0, which look nothing up."""
    if not run.world.main:
        return RefCache("", None)
    is_base = getattr(run, role.model) is None and run.reference_is_base
    state = function_digest(policy.model, without_adapter=is_base)
    return RefCache(cache_key(_key(run, fingerprint), state), cache_folder())


def _key(run: "Trainer", fingerprint: str) -> str:
    tf32 = "|tf32" if run.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32 else ""
    return cache_key(fingerprint, f"{run.autocast_dtype or 'as loaded'}|{run.device.type}{tf32}")


def is_as_begun(run: "Trainer", role: Role, fingerprint: str) -> bool:
    """Whether a resumed run's policy in this role is the one that it began with; a new run's is noted."""
    key = _key(run, fingerprint)
    return run.identity.setdefault(role.key, key) == key


def load(run: "Trainer", role: Role, sets: Sets, stack: contextlib.ExitStack) -> tuple[Engine, str]:
    """The model given on the device or split as the policy is, and its fingerprint."""
    config, model = run.config, getattr(run, role.model)
    sharded = config.fsdp != "no"
    if isinstance(model, str | os.PathLike):
        home = torch.device("cpu") if sharded else run.device
        model = load_model(os.fspath(model), dtype=config.dtype or str(run.loaded_dtype), device=home,
                           trust_remote_code=config.trust_remote_code)  # fmt: skip
    elif not isinstance(model, nn.Module):
        raise ConfigError(f"{role.model} must be a model, or its name or path, not {model!r}")
    elif sharded and any(isinstance(p, DTensor) for p in model.parameters()):
        raise ConfigError(f"{role.model} is a model that fsdp has split for another purpose: pass a copy, or its path")
    policy = Policy(model)
    for name, examples in sets.items():
        check_ids(policy, examples, f"{name} (for {role.model})")
    fingerprint = run.world.first(lambda: model_fingerprint(model))
    if sharded:
        model.requires_grad_(False)  # else its shards would be fp32, for an optimiser that never comes
        stack.enter_context(eval_mode(model))
        return shard(policy, config, run.world, run.autocast_dtype), fingerprint
    stack.enter_context(on_device(model, run.device))
    return Engine(policy), fingerprint


def _pass(
    run: "Trainer", engine: Engine, cache: RefCache, sets: Sets, visited: set[int], what: str = "reference"
) -> dict[str, TokenLogps]:
    policy = engine.policy
    out: dict[str, TokenLogps] = {}

    def compute(batch: PackedBatch) -> torch.Tensor:
        if run.other_reference:
            raise ConfigError(
                f"{run.resume} lacks the {what}'s log-probabilities for rows that this run needs: to add steps or "
                f"evaluation data, pass the model and {'ref_model' if what == REF.name else 'prev_model'} that the run "
                "began with"
            )
        return run.logp(engine, batch.to(run.device), statistics=False)

    with torch.no_grad(), eval_mode(policy.model), policy.attach():
        for name, examples in sets.items():
            bars: list[tqdm] = []

            def progress(done: int, total: int, bars: list[tqdm] = bars) -> None:
                if not bars:
                    bars.append(run.bar(desc=what, total=total))
                bars[0].update(done - bars[0].n)

            rows = sorted(visited) if name in ("train", TRAIN_MISMATCHED) else range(len(examples))
            out[name] = reference_logps(
                examples, rows, cache, compute,
                max_tokens=run.max_tokens, token_bucket=run.config.token_bucket, world=run.world, progress=progress,
                passes=run.budget.passes, nudged=lambda: _nudged(policy, run.autocast_dtype),
            )  # fmt: skip
            for bar in bars:
                bar.close()
    return out


@contextlib.contextmanager
def _nudged(policy: Policy, autocast_dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, every embedding is one spacing of the working precision off, up and down in turn."""
    eps = max(weights_eps(policy), torch.finfo(autocast_dtype).eps if autocast_dtype is not None else 0.0)

    def move(module: nn.Module, inputs: Any, out: torch.Tensor) -> torch.Tensor:
        sign = torch.ones_like(out)
        sign[..., ::2] = -1
        return out * (1 + eps * sign)

    handle = policy.causal_lm.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def _keep(run: "Trainer", role: Role, sets: Sets, out: dict[str, TokenLogps]) -> None:
    """The run's own copy, to which every checkpoint links: a resumed run needs neither the cache nor the pass."""
    entries = {}
    for name, examples in sets.items():
        for example, logps in zip(examples, out[name], strict=True):
            for k, logp in enumerate(logps):
                entries[response_key(example.prompt_of(k), example.responses[k])] = logp
    temporary = run.output_dir / f".{role.file}"
    try:
        write_entries(entries, temporary)
        os.replace(temporary, run.output_dir / role.file)
    except Exception as error:  # safetensors has an error of its own for a full disk
        temporary.unlink(missing_ok=True)
        log.warning("the %s's log-probabilities could not be written beside the run: %s", role.name, error)


def move(run: "Trainer", plan: StepPlan, start: int) -> None:
    """A moving reference's log-probabilities for the steps of the plan until it moves again."""
    assert run.moving is not None
    run.progress.reference_start = start
    visited = plan.visited(start, start + run.moving.every)
    with run.moving.in_place(lambda: exchanging(run)):
        run.ref |= _pass(run, run.engine, RefCache("", None), sets_of(run), visited)


@contextlib.contextmanager
def exchanging(run: "Trainer") -> Iterator[None]:
    """Inside, the weights are neither the policy's nor the reference's: nothing may be saved."""
    before, run.progress.updating = run.progress.updating, True
    yield
    run.progress.updating = before
