"""What of a run is saved, and how a run goes on from it: the trainer's side of checkpoints/checkpoint.py."""

import json
import logging
import os
import random
import shutil
import uuid
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastpo import __version__
from fastpo.checkpoints import checkpoint, endings, model_files, state_files
from fastpo.checkpoints.checkpoint import PREVIOUS, REFERENCE
from fastpo.checkpoints.state_files import as_sharded
from fastpo.data.packing import collate
from fastpo.errors import ConfigError, FastpoError, TrainingError
from fastpo.reference.cache import adapter_settings, frozen_fingerprint, model_fingerprint
from fastpo.report import disks, outputs
from fastpo.report.callbacks import note_saved, plain_config
from fastpo.training.distributed import full_state, local
from fastpo.training.memory import is_out_of_memory, release

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
    try:
        saved = json.loads((folder / "run.json").read_text())
        remarks = checkpoint.check_run(folder, saved, identity, run.model_given_by_name)
    except FastpoError:
        raise
    except Exception as error:  # another hand's JSON
        raise TrainingError(checkpoint.unreadable(folder, error)) from error
    for remark in remarks:
        log.warning("resumed from %s: %s", folder.name, remark)
    # The run is what it was begun as: a model in memory may have been trained since.
    return fingerprint, identity | {
        key: saved[key] for key in ("model", "run_id", "reference", "previous") if key in saved
    }


# ---- before the first step


def prepare(run: "Trainer") -> None:
    """What the saved model stops at; and all that saving needs, tried on rank 0 while there is nothing to lose."""
    changed = endings.align(run.model, run.tokenizer, run.examples)
    if changed:
        log.info(
            "as the data and the tokenizer end: %s", ", ".join(f"{name}={value}" for name, value in changed.items())
        )
    config = run.config
    if not (config.save_final or config.save_strategy != "no"):
        return
    run.world.first(
        lambda: model_files.try_to_write(
            run.model, run.tokenizer, run.output_dir, config.max_shard_size, run.parameters
        )
    )


# ---- saving


def save_checkpoint(run: "Trainer", unsure: bool = False) -> Path | None:
    """Write `checkpoint-N`; what fails costs the checkpoint, not the run, and None is returned.

    Weights that are no numbers are no checkpoint: TrainingError. Signals wait until it is written.
    """
    folder = run.output_dir / f"checkpoint-{run.state.global_step}"
    temporary = folder.parent / f"{checkpoint.TEMPORARY}{folder.name}"
    world = run.world
    best_before = run.state.best_model_checkpoint
    with run.signals.whole():
        check_finite(run, unsure)
        try:
            with run.window.paused():
                note_saved(run.state, folder)
                world.first(lambda: outputs.ensure_folder(run))
                _write(run, folder, temporary)
        except BaseException as error:
            run.state.best_model_checkpoint = best_before
            if world.main:
                shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, FastpoError) or not isinstance(error, Exception):
                raise
            if world.main:
                last = checkpoint.checkpoints(run.output_dir)
                log.error(
                    "%s could not be written: %s; %s%s", folder.name, disks.cause(error),
                    "" if run.signals.ending else "training goes on, ",
                    f"the last checkpoint is {last[-1].name}" if last else "without a checkpoint so far",
                )  # fmt: skip
            return None
        run.progress.saved_step = run.state.global_step
        if world.main:
            best = [Path(run.state.best_model_checkpoint)] if run.state.best_model_checkpoint else []
            checkpoint.prune(run.output_dir, run.config.save_total_limit, run.identity["run_id"], keep=[folder, *best])
            if run.hub is not None:
                run.hub.push_checkpoint(folder, run.state.global_step)
    run.callbacks.call("on_save")
    return folder


def _write(run: "Trainer", folder: Path, temporary: Path) -> None:
    """In stages that every rank ends before any begins the next, so that all know of a failure."""
    world, sharded = run.world, run.engine.sharded
    world.all_do(lambda: checkpoint.make_temporary(temporary) if world.main else None)
    if not run.config.save_only_model:
        tensors, plain = _state(run)
        world.all_do(lambda: state_files.save_tensors(temporary / "state", tensors, world, sharded))
        world.all_do(lambda: torch.save(run.progress.rng or rng_state(), temporary / f"rng-{world.rank}.pt"))
        if world.main:
            run.callbacks.export()
    weights = _whole_weights(run)

    def write() -> None:
        if not world.main:
            return
        with run.policy.detached():
            model_files.write(run.model, run.tokenizer, temporary, run.config.max_shard_size, weights)
        (temporary / "run.json").write_text(json.dumps(run.identity, indent=1))
        if not run.config.save_only_model:
            torch.save(plain, temporary / "trainer.pt")
            run.state.save_to_json(str(temporary / "trainer_state.json"))
            for name in (REFERENCE, PREVIOUS):
                if (run.output_dir / name).exists():
                    _link(run.output_dir / name, temporary / name)
        checkpoint.seal(temporary, folder)

    world.all_do(write)


def check_finite(run: "Trainer", unsure: bool = False) -> None:
    """TrainingError where the weights hold what is no number, or give none to a few ordinary rows.

    The latter is asked only after a step that was skipped, or if `unsure`: finite weights of 1e30 are as lost as NaN.
    """
    bad = state_files.first_nonfinite({name: local(p) for name, p in run.parameters.items()})
    bad = next((name for name in run.world.gather(bad) if name is not None), None)
    what = None
    if bad is not None:
        what = f"the weights are not finite (first {bad})"
    elif (unsure or run.window.skipped_last()) and not all(run.world.gather(_gives_numbers(run))):
        what = "the weights are finite, but what they give to ordinary rows is not: they are lost"
    if what is None:
        return
    last = checkpoint.checkpoints(run.output_dir)
    raise TrainingError(
        f"after step {run.state.global_step} {what}: nothing mends that, so the run ends and this state is not saved; "
        "lower the learning rate, or look at the data"
        + (f"; {last[-1].name} is the last good checkpoint" if last else "")
    )


def _gives_numbers(run: "Trainer") -> bool:
    """Whether log-probabilities of a few rows, the shortest, are finite, and the gradients of their mean. Every rank
    calls it; sharded ones leave out the gradients, which FSDP would reduce."""
    rows = sorted(range(len(run.examples)), key=lambda i: run._tokens[i])[:4]
    batch = collate(run.examples, rows).to(run.device)
    try:
        with run.autocast(), torch.set_grad_enabled(not run.engine.sharded):
            logp = run.engine(lambda: run.policy.logp(batch))
        assert isinstance(logp, Tensor)
        if run.engine.sharded or not bool(logp.isfinite().all()):
            return bool(logp.isfinite().all())
        of_each = torch.autograd.grad(logp.mean(), list(run.parameters.values()), allow_unused=True)
        found = dict(zip(run.parameters, of_each, strict=True))
        return state_files.first_nonfinite({name: g for name, g in found.items() if g is not None}) is None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        release(run.device)
        return True  # a device that is full says nothing about the weights


def check_trained(run: "Trainer") -> None:
    """TrainingError at the end of a run that has trained nothing, or ends in what is no number."""
    if run.state.global_step == 0:
        return
    check_finite(run)
    if not run.window.counted():
        raise TrainingError(
            f"all {run.state.global_step} steps had a non-finite loss or gradient and were skipped: nothing was "
            "trained; lower the learning rate, or look at the data"
        )


def save_model(run: "Trainer", folder: Path) -> None:
    """Model and tokenizer as `from_pretrained` reads them, written beside and then moved into `folder`.

    Where that fails the weights are left as plain safetensors, and the TrainingError says where and how to load them.
    """
    world = run.world
    temporary = folder / f"{checkpoint.TEMPORARY}model"  # there, so that its files can be moved
    weights = _whole_weights(run)

    def write() -> None:
        if not world.main:
            return
        outputs.ensure_folder(run)
        checkpoint.make_temporary(temporary)
        with run.policy.detached():
            model_files.write(run.model, run.tokenizer, temporary, run.config.max_shard_size, weights)
        new = {file.name for file in temporary.iterdir()}
        for pattern in _OF_A_MODEL:  # of another run: from_pretrained might read it in place of this one's
            for stale in folder.glob(pattern):
                if stale.name not in new:
                    stale.unlink()
        for file in temporary.iterdir():
            os.replace(file, folder / file.name)
        temporary.rmdir()

    def save() -> None:
        try:
            write()
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)
            last = checkpoint.checkpoints(run.output_dir)
            saved = f"; {last[-1]} holds step {last[-1].name.partition('-')[2]}" if last else ""
            where = _leave_weights(run, weights)
            raise TrainingError(
                f"the trained model could not be written to {str(folder)!r}: {disks.cause(error)}{saved}{where}"
            ) from error

    with run.signals.whole():
        world.all_do(save)


def _leave_weights(run: "Trainer", weights: dict[str, Tensor] | None) -> str:
    """The trained weights as plain safetensors, on rank 0; returns what is to be said of them."""
    only = set(run.parameters) if hasattr(run.model, "peft_config") else set()
    with run.policy.detached():
        found = model_files.rescue(run.model, run.output_dir, only, weights)
    if found is None:
        return "; nor could its weights be written anywhere else"
    run.rescued = True
    return f"; its weights are in {found[0]}: {found[1]} loads them into the model"


_OF_A_MODEL = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_model*.safetensors",
    "adapter_config.json",
)


def rescue(run: "Trainer", error: BaseException) -> None:
    """A crash, Ctrl-C or SIGTERM loses nothing: the last finished step is saved, and can be resumed.

    Not with several processes, which do not stop at the same step: there the last checkpoint stands. Signals that come
    now wait for ever: the run is being ended, and a save that was begun is finished.
    """
    run.signals.ending = True
    step = run.state.global_step
    if not (step in (0, run.progress.saved_step) or run.progress.updating or run.world.several):
        try:
            _rescue_step(run, error)
        except BaseException as failure:  # whatever it is, the error that ended the run is the one to raise
            log.warning("the run could not be saved after the failure: %s", disks.cause(failure))
    outputs.report(run, {}, f"failed: {type(error).__name__}: {error}")


def _rescue_step(run: "Trainer", error: BaseException) -> None:
    step = run.state.global_step
    try:
        folder = save_checkpoint(run, unsure=isinstance(error, TrainingError))
    except TrainingError as lost:
        if str(lost) != str(error):
            log.warning("step %d is not saved: %s", step, lost)
        return
    if folder is not None:
        how = "" if run.config.save_only_model else " (resume_from_checkpoint=true goes on)"
        log.warning("stopped at step %d; %s holds it%s", step, folder, how)
    elif not getattr(run, "rescued", False):
        log.warning("stopped at step %d, without a checkpoint%s", step, _leave_weights(run, None))


def _whole_weights(run: "Trainer") -> dict[str, Tensor] | None:
    """Of a sharded model, what is to be written, gathered on rank 0 in the dtypes it was loaded in; else None."""
    if not run.engine.sharded:
        return None
    names = set(run.parameters) if hasattr(run.model, "peft_config") else None
    return full_state(run.model, run.world, run.saved_dtypes, names)


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
        **run.progress.state_dict(),
        "flags": {f: getattr(run.callbacks.control, f) for f in _FLAGS} if run.progress.todo else {},
    }  # fmt: skip
    tensors |= of_optimizer
    return tensors, plain | {"tensors": state_files.describe(tensors)}


# ---- resuming


def restore(run: "Trainer", folder: Path) -> None:
    """Put a checkpoint's state into a run that is built and has not begun; TrainingError where it is not one's."""
    try:
        _restore(run, folder)
    except FastpoError:
        raise
    except Exception as error:  # its hashes are right and its content is not: another hand's
        raise TrainingError(checkpoint.unreadable(folder, error)) from error
    log.info("resumed from %s: step %d of %d", folder, run.state.global_step, run.state.max_steps)


def _restore(run: "Trainer", folder: Path) -> None:
    plain = torch.load(folder / "trainer.pt", weights_only=True, map_location="cpu")
    tensors = load_weights(run, folder, plain["tensors"])
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
    run.progress.load_state_dict(plain)
    if run.moving is not None:
        for name, value in run.moving.values.items():
            value.copy_(tensors[f"reference.{name}"])
    for flag, value in plain["flags"].items():
        setattr(run.callbacks.control, flag, value)
    run.progress.saved_step = run.state.global_step
    best = run.state.best_model_checkpoint
    if best is not None and not Path(best).exists():  # the run's folder was moved
        run.state.best_model_checkpoint = str(run.output_dir / Path(best).name)
    rng = folder / f"rng-{run.world.rank}.pt"
    if rng.exists():
        set_rng_state(torch.load(rng, weights_only=True, map_location="cpu"))
    elif not run.config.disable_dropout:
        log.warning("%s has no random state of rank %d: its dropout starts anew", folder.name, run.world.rank)


def load_weights(run: "Trainer", folder: Path, expected: dict[str, list[Any]] | None = None) -> dict[str, Tensor]:
    """The checkpoint's weights into the model; returns all of its tensors, which are as `expected`."""
    tensors = state_files.load_tensors(folder / "state", run.parameters, expected)
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


def whole(run: "Trainer") -> AbstractContextManager[None]:
    """Inside, signals wait: a log line and the note that it is written go together."""
    return run.signals.whole()
