"""What of a run is saved, and how a run goes on from it: the trainer's side of checkpoint.py."""

import contextlib
import json
import logging
import os
import random
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging as logging_utils

from fastpo import __version__, checkpoint, loading
from fastpo.callbacks import note_saved, plain_config
from fastpo.checkpoint import PREVIOUS, REFERENCE, as_sharded
from fastpo.distributed import full_state, local
from fastpo.errors import ConfigError, TrainingError
from fastpo.ref_policy import adapter_settings, frozen_fingerprint, model_fingerprint

if TYPE_CHECKING:
    from fastpo.trainer import Trainer

log = logging.getLogger("fastpo")


def identify(run: "Trainer") -> tuple[str, dict[str, Any]]:
    """(the reference's fingerprint, run.json), before anything changes; held against the checkpoint that is resumed."""
    without_adapter = run.reference_is_base
    fingerprint = run.world.first(lambda: model_fingerprint(run.model, without_adapter=without_adapter))
    identity: dict[str, Any] = {
        "format": checkpoint.FORMAT,
        "run_id": uuid.uuid4().hex,
        "fastpo": __version__,
        "torch": torch.__version__,
        "model": fingerprint,
        "model_name": run.model_name,
        "parameters": {name: str(tuple(p.shape)) for name, p in run.parameters.items()},
        "frozen": run.world.first(lambda: fingerprint if without_adapter else frozen_fingerprint(run.model)),
        "adapter": adapter_settings(run.model),
        "data": checkpoint.data_fingerprint(run.examples),
        "rows": len(run.examples),
        "step_size": run.step_size,
        "batch": run.config.per_device_train_batch_size * run.world.size,
        "world_size": run.world.size,
        "config": plain_config(run.config),
    }
    if run.resume is None:
        return fingerprint, identity
    folder = run.resume
    saved = json.loads((folder / "run.json").read_text())
    for remark in checkpoint.check_run(folder, saved, identity, run.model_given_by_name):
        log.warning("resumed from %s: %s", folder.name, remark)
    # The run is what it was begun as: a model in memory may have been trained since.
    return fingerprint, identity | {
        key: saved[key] for key in ("model", "run_id", "reference", "previous") if key in saved
    }


# ---- saving


def save_checkpoint(run: "Trainer") -> Path | None:
    """Write `checkpoint-N`; a disk that is full costs the checkpoint, not the run, and None is returned."""
    folder = run.output_dir / f"checkpoint-{run.state.global_step}"
    world = run.world
    best_before = run.state.best_model_checkpoint
    try:
        with run.window.paused():
            note_saved(run.state, folder)
            _write(run, folder)
    except Exception as error:
        run.state.best_model_checkpoint = best_before
        if not _is_disk_error(error):
            raise
        if world.main:
            shutil.rmtree(folder.parent / f"{checkpoint.TEMPORARY}{folder.name}", ignore_errors=True)
            last = checkpoint.checkpoints(run.output_dir)
            log.error(
                "%s could not be written: %s; training goes on, %s", folder.name, _cause(error),
                f"the last checkpoint is {last[-1].name}" if last else "without a checkpoint so far",
            )  # fmt: skip
        return None
    run.saved_step = run.state.global_step
    if world.main:
        best = [Path(run.state.best_model_checkpoint)] if run.state.best_model_checkpoint else []
        checkpoint.prune(run.output_dir, run.config.save_total_limit, run.identity["run_id"], keep=[folder, *best])
        if run.hub is not None:
            run.hub.push_checkpoint(folder, run.state.global_step)
    run.callbacks.call("on_save")
    return folder


def _write(run: "Trainer", folder: Path) -> None:
    """In stages that every rank ends before any begins the next, so that all know of a failure."""
    world, sharded = run.world, run.engine.sharded
    temporary = folder.parent / f"{checkpoint.TEMPORARY}{folder.name}"
    world.all_do(lambda: checkpoint.make_temporary(temporary) if world.main else None)
    if not run.config.save_only_model:
        tensors, plain = _state(run)
        world.all_do(lambda: checkpoint.save_tensors(temporary / "state", tensors, world, sharded))
        world.all_do(lambda: torch.save(run.rng or rng_state(), temporary / f"rng-{world.rank}.pt"))
        if world.main:
            run.callbacks.export()
    weights = _whole_weights(run)

    def write() -> None:
        if not world.main:
            return
        _write_model(run, temporary, weights)
        (temporary / "run.json").write_text(json.dumps(run.identity, indent=1))
        if not run.config.save_only_model:
            torch.save(plain, temporary / "trainer.pt")
            run.state.save_to_json(str(temporary / "trainer_state.json"))
            for name in (REFERENCE, PREVIOUS):
                if (run.output_dir / name).exists():
                    _link(run.output_dir / name, temporary / name)
        checkpoint.seal(temporary, folder)

    world.all_do(write)


def save_model(run: "Trainer", folder: Path) -> None:
    """Model and tokenizer as `from_pretrained` reads them, written beside and then moved into `folder`."""
    world = run.world
    temporary = run.output_dir / f"{checkpoint.TEMPORARY}model"
    weights = _whole_weights(run)

    def write() -> None:
        if not world.main:
            return
        checkpoint.make_temporary(temporary)
        _write_model(run, temporary, weights)
        new = {file.name for file in temporary.iterdir()}
        for pattern in _OF_A_MODEL:  # of another run: from_pretrained might read it in place of this one's
            for stale in folder.glob(pattern):
                if stale.name not in new:
                    stale.unlink()
        for file in temporary.iterdir():
            os.replace(file, folder / file.name)
        temporary.rmdir()

    try:
        world.all_do(write)
    except Exception as error:
        if not _is_disk_error(error):
            raise
        shutil.rmtree(temporary, ignore_errors=True)
        last = checkpoint.checkpoints(run.output_dir)
        raise TrainingError(
            f"the trained model could not be written to {str(folder)!r}: {_cause(error)}"
            + (f"; {last[-1]} holds step {last[-1].name.partition('-')[2]}" if last else "")
        ) from error


_OF_A_MODEL = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_model*.safetensors",
    "adapter_config.json",
)


def _whole_weights(run: "Trainer") -> dict[str, Tensor] | None:
    """Of a sharded model, what is to be written, gathered on rank 0 in the dtypes it was loaded in; else None."""
    if not run.engine.sharded:
        return None
    names = set(run.parameters) if hasattr(run.model, "peft_config") else None
    return full_state(run.model, run.world, run.saved_dtypes, names)


def _write_model(run: "Trainer", folder: Path, weights: dict[str, Tensor] | None) -> None:
    # A copy of the dict: transformers takes the tensors out as it writes them.
    given: dict[str, Any] = {} if weights is None else {"state_dict": dict(weights)}
    if not hasattr(run.model, "peft_config"):
        given["max_shard_size"] = run.config.max_shard_size
    bars = logging_utils.is_progress_bar_enabled()
    logging_utils.disable_progress_bar()  # transformers draws one for every save
    try:
        with run.policy.detached():
            run.model.save_pretrained(folder, **given)
        loading.carry_over(run.model, folder)
    finally:
        if bars:
            logging_utils.enable_progress_bar()
    if weights is not None and (folder / "config.json").exists():
        # transformers writes the shards' dtype; the weights are in the one that they were loaded in.
        config = json.loads((folder / "config.json").read_text())
        dtypes = {str(t.dtype).removeprefix("torch.") for t in weights.values() if t.is_floating_point()}
        if len(dtypes) == 1:
            (folder / "config.json").write_text(json.dumps({**config, "dtype": dtypes.pop()}, indent=2) + "\n")
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template of a card; ours is written at the end
    run.tokenizer.save_pretrained(folder)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


_FLAGS = ("should_log", "should_evaluate", "should_save")


def _state(run: "Trainer") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, everything else) that a resumed run needs.

    A weight is saved in the most exact form there is: its fp32 master where it has one.
    """
    masters = run.gradients.state_dict()
    tensors = {f"weights.{n}": masters.get(n, p.detach()) for n, p in run.parameters.items()}
    if run.moving is not None:
        for name, value in run.moving.values.items():
            p = run.parameters[name]
            tensors[f"reference.{name}"] = as_sharded(value, p) if run.engine.sharded else value
    names = {id(run.gradients.stepped(p)): n for n, p in run.parameters.items()}
    of_optimizer, others = checkpoint.optimizer_tensors(run.optimizer, names, run.parameters)
    groups = [
        {k: v.item() if isinstance(v, np.generic) else v for k, v in group.items() if k != "params"}
        for group in run.optimizer.param_groups
    ]
    plain = {
        "optimizer": others, "param_groups": groups, "scheduler": run.scheduler.state_dict(),
        "window": run.window.state_dict(), "stepwide": run.stepwide.state_dict(),
        "budget": run.budget.state_dict(),
        "guards": json.dumps(run.guards.state_dict()),
        "num_tokens": run.num_tokens, "cursor": run.cursor, "seen": run.seen, "todo": dict(run.todo),
        "flags": {f: getattr(run.callbacks.control, f) for f in _FLAGS} if run.todo else {},
        "reference_start": run.reference_start, "rows_done": run.rows_done, "elapsed": time.monotonic() - run.started,
    }  # fmt: skip
    return tensors | of_optimizer, plain


# ---- resuming


def restore(run: "Trainer", folder: Path) -> None:
    """Put a checkpoint's state into a run that is built and has not begun."""
    tensors = load_weights(run, folder)
    plain = torch.load(folder / "trainer.pt", weights_only=True, map_location="cpu")
    stepped = {name: run.gradients.stepped(p) for name, p in run.parameters.items()}
    checkpoint.restore_optimizer(run.optimizer, tensors, plain["optimizer"], stepped)
    if len(run.optimizer.param_groups) != len(plain["param_groups"]):
        raise ConfigError(
            f"{folder} has an optimiser with {len(plain['param_groups'])} groups of parameters, this run's has "
            f"{len(run.optimizer.param_groups)}: resume with the same"
        )
    for group, saved in zip(run.optimizer.param_groups, plain["param_groups"], strict=True):
        group.update(saved)
    run.scheduler.load_state_dict(plain["scheduler"])
    run.window.load_state_dict(plain["window"])
    run.stepwide.load_state_dict(plain["stepwide"])
    run.budget.load_state_dict(plain.get("budget", {}))
    run.guards.load_state_dict(json.loads(plain["guards"]))
    run.num_tokens, run.cursor, run.seen, run.todo = (plain[k] for k in ("num_tokens", "cursor", "seen", "todo"))
    run.reference_start, run.rows_done, run.elapsed = (plain[k] for k in ("reference_start", "rows_done", "elapsed"))
    if run.moving is not None:
        for name, value in run.moving.values.items():
            value.copy_(tensors[f"reference.{name}"])
    for flag, value in plain["flags"].items():
        setattr(run.callbacks.control, flag, value)
    run.saved_step = run.state.global_step
    best = run.state.best_model_checkpoint
    if best is not None and not Path(best).exists():  # the run's folder was moved
        run.state.best_model_checkpoint = str(run.output_dir / Path(best).name)
    rng = folder / f"rng-{run.world.rank}.pt"
    if rng.exists():
        set_rng_state(torch.load(rng, weights_only=True, map_location="cpu"))
    elif not run.config.disable_dropout:
        log.warning("%s has no random state of rank %d: its dropout starts anew", folder.name, run.world.rank)
    log.info("resumed from %s: step %d of %d", folder, run.state.global_step, run.state.max_steps)


def load_weights(run: "Trainer", folder: Path) -> dict[str, Tensor]:
    """The checkpoint's weights into the model; returns all of its tensors."""
    tensors = checkpoint.load_tensors(folder / "state", run.parameters, run.engine.sharded)
    masters = run.gradients.state_dict()
    with torch.no_grad():
        for name, p in run.parameters.items():
            if name not in masters:
                local(p).copy_(tensors[f"weights.{name}"])
    run.gradients.load_state_dict({name: tensors[f"weights.{name}"].float() for name in masters})
    return tensors


def load_best(run: "Trainer") -> None:
    """End with the best checkpoint's weights."""
    best = run.state.best_model_checkpoint
    if best is None:
        log.warning("load_best_model_at_end: no checkpoint was made at a best evaluation; the last weights stay")
    elif Path(best).name != f"checkpoint-{run.state.global_step}":
        wrong = run.world.first(lambda: checkpoint.damage(Path(best)))
        if wrong is not None:
            log.error("the best checkpoint %r cannot be loaded: %s; the last weights stay", best, wrong)
            return
        load_weights(run, Path(best))
        log.info("the best checkpoint is %s (%.4g): its weights are the final model", best, run.state.best_metric)


def rng_state() -> dict[str, Any]:
    """Every random state of this process, of types that torch.load reads without pickle."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """What `rng_state` returned."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def terminable(run: "Trainer") -> Iterator[None]:
    """SIGTERM, as schedulers send it before they kill, stops one process as Ctrl-C does: what is done is saved."""
    ours = (
        not run.world.several
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    )
    if not ours:
        yield
        return

    def stop(number: int, frame: Any) -> None:
        if run.updating or run.writing:  # a step takes effect whole, and a line is written once: try again then
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        else:
            raise SystemExit(128 + signal.SIGTERM)

    alarm = signal.signal(signal.SIGALRM, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, alarm)


@contextlib.contextmanager
def whole(run: "Trainer") -> Iterator[None]:
    """Inside, SIGTERM waits: a log line and the note that it is written go together."""
    run.writing = True
    try:
        yield
    finally:
        run.writing = False


# ---- disks

_FULL = ("no space left", "disk quota", "file too large", "read-only file system", "input/output error",
         "failed writing", "unexpected pos")  # fmt: skip  # the last two are torch.save's words for a short write


def _is_disk_error(error: BaseException) -> bool:
    return isinstance(_root(error), OSError) or any(words in _cause(error).lower() for words in _FULL)


def _root(error: BaseException) -> BaseException:
    """The OSError that an error came from, if one did: PyTorch and safetensors raise others in its place."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return link
        link = link.__cause__ or link.__context__
    return error


def _cause(error: BaseException) -> str:
    root = _root(error)
    return (root.strerror if isinstance(root, OSError) and root.strerror else " ".join(str(root).split()))[:200]
