"""What of a run is saved, and how a run goes on from it: the model's files, checkpoints, and both when a run fails."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastpo.checkpoints import checkpoint, endings, model_files, state_files
from fastpo.checkpoints.run_state import RunState
from fastpo.checkpoints.weights import WeightCheck, Weights
from fastpo.config.train_config import TrainConfig
from fastpo.data.prepare import Example
from fastpo.errors import FastpoError, TrainingError
from fastpo.models import adapters, degree_head
from fastpo.reference.roles import ROLES
from fastpo.report import disks
from fastpo.report.callbacks import Callbacks, note_saved
from fastpo.report.hub import Hub
from fastpo.training.distributed import World
from fastpo.training.metrics import Window
from fastpo.training.progress import Progress
from fastpo.training.random_state import set_rng_state
from fastpo.training.signals import Signals

log = logging.getLogger("fastpo")

_OF_A_MODEL = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_model*.safetensors",
    "adapter_config.json",
    degree_head.FILE,
)


def prepare(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    trained: Mapping[str, Tensor],
    config: TrainConfig,
    world: World,
) -> None:
    """What the saved model stops at; and all that saving needs, tried on rank 0 while there is nothing to lose.

    trained: the parameters that are trained, by name.
    """
    changed = endings.align(model, tokenizer, examples)
    if changed:
        log.info(
            "as the data and the tokenizer end: %s", ", ".join(f"{name}={value}" for name, value in changed.items())
        )
    if config.save_final or config.save_strategy != "no":
        folder, size = Path(config.output_dir), config.max_shard_size
        world.first(lambda: model_files.try_to_write(model, tokenizer, folder, size, trained))


class ModelFiles:
    """The model and its tokenizer as `from_pretrained` reads them.

    folder: the run's. make_folder: makes it again where somebody has removed it.
    """

    def __init__(
        self,
        weights: Weights,
        tokenizer: Any,
        folder: Path,
        max_shard_size: str,
        make_folder: Callable[[], None],
    ):
        self.weights, self.tokenizer, self.folder = weights, tokenizer, folder
        self.max_shard_size, self.make_folder = max_shard_size, make_folder
        self.rescued = False  # whether a save that failed has left the weights alone

    def write(self, into: Path, tensors: Mapping[str, Tensor] | None) -> None:
        """All files into a folder that is there, on rank 0; tensors: what `weights.whole` gave."""
        with self.weights.detached():
            model_files.write(self.weights.model, self.tokenizer, into, self.max_shard_size, tensors)
        head = self.weights.engine.policy.degree_head
        if head is not None:
            save_file({name: p.detach().cpu() for name, p in head.named_parameters()}, into / degree_head.FILE)

    def save(self, folder: Path) -> None:
        """All files, written beside and then moved into `folder`. Every rank calls it.

        Where that fails the weights are left as plain safetensors, and the TrainingError says where and how to load
        them.
        """
        tensors, world = self.weights.whole(), self.weights.world
        temporary = folder / f"{checkpoint.TEMPORARY}model"  # there, so that its files can be moved

        def save() -> None:
            try:
                if world.main:
                    self._save(folder, temporary, tensors)
            except Exception as error:
                shutil.rmtree(temporary, ignore_errors=True)
                last = checkpoint.checkpoints(self.folder)
                saved = f"; {last[-1]} holds step {last[-1].name.partition('-')[2]}" if last else ""
                where = self.leave(tensors)
                raise TrainingError(
                    f"the trained model could not be written to {str(folder)!r}: {disks.cause(error)}{saved}{where}"
                ) from error

        world.all_do(save)

    def _save(self, folder: Path, temporary: Path, tensors: Mapping[str, Tensor] | None) -> None:
        self.make_folder()
        checkpoint.make_temporary(temporary)
        self.write(temporary, tensors)
        new = {file.name for file in temporary.iterdir()}
        for pattern in _OF_A_MODEL:  # of another run: from_pretrained might read it in place of this one's
            for stale in folder.glob(pattern):
                if stale.name not in new:
                    stale.unlink()
        for file in temporary.iterdir():
            os.replace(file, folder / file.name)
        temporary.rmdir()

    def leave(self, tensors: Mapping[str, Tensor] | None = None) -> str:
        """The trained weights as plain safetensors, on rank 0; returns what is to be said of them."""
        only = set(self.weights.parameters) if self.weights.adapter else set()
        with self.weights.detached():
            found = model_files.rescue(self.weights.model, self.folder, only, tensors)
        if found is None:
            return "; nor could its weights be written anywhere else"
        self.rescued = True
        return f"; its weights are in {found[0]}: {found[1]} loads them into the model"

    def save_merged(self) -> None:
        """The adapter merged into its base, in `merged`, on rank 0; a warning where that fails."""
        try:
            adapters.save_merged(
                self.weights.model, self.tokenizer, self.folder / "merged", self.max_shard_size,
                adapter_folder=self.folder if self.weights.sharded else None,
            )  # fmt: skip
        except Exception as error:  # PEFT may refuse at this late hour, a disk be full; the adapter itself is saved
            log.warning("no merged model: %s", disks.cause(error))


class Checkpoints:
    """The `checkpoint-N` of a run, in the folder of its model's files.

    identity: what run.json says. callbacks: have transformers' TrainerState, of which they
    keep their own part. hub: where checkpoints go too, on rank 0.
    """

    def __init__(
        self,
        config: TrainConfig,
        identity: Mapping[str, Any],
        files: ModelFiles,
        run_state: RunState,
        callbacks: Callbacks,
        hub: Hub | None = None,
    ):
        self.config, self.identity, self.files, self.run_state = config, identity, files, run_state
        self.callbacks, self.hub = callbacks, hub
        self.folder, self.world = files.folder, files.weights.world

    def last(self) -> Path | None:
        """The newest one in the folder."""
        return next(reversed(checkpoint.checkpoints(self.folder)), None)

    def write(self, goes_on: bool = True) -> Path | None:
        """`checkpoint-N` of the step behind; what fails costs the checkpoint, not the run, and None is returned.

        The oldest ones go where there are more than save_total_limit; the best one stays. goes_on: whether training
        does, for the message. Every rank calls it.
        """
        state, world = self.callbacks.state, self.world
        folder = self.folder / f"checkpoint-{state.global_step}"
        temporary = self.folder / f"{checkpoint.TEMPORARY}{folder.name}"
        best_before = state.best_model_checkpoint
        try:
            note_saved(state, folder)
            world.first(self.files.make_folder)
            self._write(folder, temporary)
        except BaseException as error:
            state.best_model_checkpoint = best_before
            if world.main:
                shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, FastpoError) or not isinstance(error, Exception):
                raise
            if world.main:
                last = self.last()
                log.error(
                    "%s could not be written: %s; %s%s", folder.name, disks.cause(error),
                    "training goes on, " if goes_on else "",
                    f"the last checkpoint is {last.name}" if last is not None else "without a checkpoint so far",
                )  # fmt: skip
            return None
        self.run_state.progress.saved(state.global_step)
        if world.main:
            best = [Path(state.best_model_checkpoint)] if state.best_model_checkpoint else []
            checkpoint.prune(self.folder, self.config.save_total_limit, self.identity["run_id"], keep=[folder, *best])
            if self.hub is not None:
                self.hub.push_checkpoint(folder, state.global_step)
        return folder

    def _write(self, folder: Path, temporary: Path) -> None:
        """In stages that every rank ends before any begins the next, so that all know of a failure."""
        world, sharded, only_model = self.world, self.files.weights.sharded, self.config.save_only_model
        world.all_do(lambda: checkpoint.make_temporary(temporary) if world.main else None)
        if not only_model:
            tensors, plain = self.run_state.take()
            plain["flags"] = self.callbacks.flags() if self.run_state.progress.todo else {}
            plain["tensors"] = state_files.describe(tensors)
            world.all_do(lambda: state_files.save_tensors(temporary / "state", tensors, world, sharded))
            world.all_do(lambda: torch.save(self.run_state.random(), temporary / f"rng-{world.rank}.pt"))
            if world.main:
                self.callbacks.export()
        whole = self.files.weights.whole()

        def write() -> None:
            if not world.main:
                return
            self.files.write(temporary, whole)
            (temporary / "run.json").write_text(json.dumps(self.identity, indent=1))
            if not only_model:
                torch.save(plain, temporary / "trainer.pt")
                self.callbacks.state.save_to_json(str(temporary / "trainer_state.json"))
                for role in ROLES:
                    if (self.folder / role.file).exists():
                        _link(self.folder / role.file, temporary / role.file)
            checkpoint.seal(temporary, folder)

        world.all_do(write)

    def restore(self, folder: Path) -> None:
        """Put a checkpoint's state into a run that is built and has not begun; TrainingError where it is not one's.

        The callbacks have its TrainerState already.
        """
        try:
            self._restore(folder)
        except FastpoError:
            raise
        except Exception as error:  # its hashes are right and its content is not: another hand's
            raise TrainingError(checkpoint.unreadable(folder, error)) from error
        state = self.callbacks.state
        log.info("resumed from %s: step %d of %d", folder, state.global_step, state.max_steps)

    def _restore(self, folder: Path) -> None:
        state, rank = self.callbacks.state, self.world.rank
        plain = torch.load(folder / "trainer.pt", weights_only=True, map_location="cpu")
        self.run_state.put(folder, plain)
        self.callbacks.set_flags(plain["flags"])
        self.run_state.progress.saved(state.global_step)
        best = state.best_model_checkpoint
        if best is not None and not Path(best).exists():  # the run's folder was moved
            state.best_model_checkpoint = str(self.folder / Path(best).name)
        rng = folder / f"rng-{rank}.pt"
        if rng.exists():
            set_rng_state(torch.load(rng, weights_only=True, map_location="cpu"))
        elif not self.config.disable_dropout:
            log.warning("%s has no random state of rank %d: its dropout starts anew", folder.name, rank)

    def load_best(self) -> None:
        """End with the best checkpoint's weights."""
        state = self.callbacks.state
        best = state.best_model_checkpoint
        if best is None:
            log.warning("load_best_model_at_end: no checkpoint was made at a best evaluation; the last weights stay")
        elif Path(best).name != f"checkpoint-{state.global_step}":
            wrong = self.world.first(lambda: checkpoint.damage(Path(best)))
            if wrong is not None:
                log.error("the best checkpoint %r cannot be loaded: %s; the last weights stay", best, wrong)
                return
            self.run_state.load_weights(Path(best))
            log.info("the best checkpoint is %s (%.4g): its weights are the final model", best, state.best_metric)


class Saver:
    """Saves a run while it goes on and when it fails: only weights that are numbers, and nothing in part."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        check: WeightCheck,
        callbacks: Callbacks,
        progress: Progress,
        signals: Signals,
        window: Window,
    ):
        self.checkpoints, self.check, self.callbacks = checkpoints, check, callbacks
        self.progress, self.signals, self.window = progress, signals, window

    def save(self, unsure: bool = False) -> Path | None:
        """Write `checkpoint-N`; what fails costs the checkpoint, not the run, and None is returned.

        Weights that are no numbers are no checkpoint: TrainingError. Signals wait until it is written. Every rank
        calls it.
        """
        with self.signals.whole():
            self.check_finite(unsure)
            with self.window.paused():
                folder = self.checkpoints.write(goes_on=not self.signals.ending)
        if folder is not None:
            self.callbacks.call("on_save")
        return folder

    def check_finite(self, unsure: bool = False) -> None:
        """TrainingError where the weights hold what is no number, or give none to a few ordinary rows.

        The latter is asked only after a step that was skipped, or if `unsure`.
        """
        what = self.check.wrong(closely=unsure or self.window.skipped_last())
        if what is None:
            return
        last = self.checkpoints.last()
        raise TrainingError(
            f"after step {self.callbacks.state.global_step} {what}: nothing mends that, so the run ends and this state "
            "is not saved; lower the learning rate, or look at the data"
            + (f"; {last.name} is the last good checkpoint" if last is not None else "")
        )

    def check_trained(self) -> None:
        """TrainingError at the end of a run that has trained nothing, or ends in what is no number."""
        steps = self.callbacks.state.global_step
        if steps == 0:
            return
        self.check_finite()
        if not self.window.counted():
            raise TrainingError(
                f"all {steps} steps had a non-finite loss or gradient and were skipped: nothing was "
                "trained; lower the learning rate, or look at the data"
            )

    def rescue(self, error: BaseException) -> None:
        """A crash, Ctrl-C or SIGTERM loses nothing: the last finished step is saved, and can be resumed.

        Not with several processes, which do not stop at the same step: there the last checkpoint stands. Signals that
        come now wait for ever: the run is being ended, and a save that was begun is finished.
        """
        self.signals.end()
        step = self.callbacks.state.global_step
        if step in (0, self.progress.saved_step) or self.progress.updating or self.checkpoints.world.several:
            return
        try:
            self._rescue(step, error)
        except BaseException as failure:  # whatever it is, the error that ended the run is the one to raise
            log.warning("the run could not be saved after the failure: %s", disks.cause(failure))

    def _rescue(self, step: int, error: BaseException) -> None:
        files = self.checkpoints.files
        try:
            folder = self.save(unsure=isinstance(error, TrainingError))
        except TrainingError as lost:
            if str(lost) != str(error):
                log.warning("step %d is not saved: %s", step, lost)
            return
        if folder is not None:
            how = "" if self.checkpoints.config.save_only_model else " (resume_from_checkpoint=true goes on)"
            log.warning("stopped at step %d; %s holds it%s", step, folder, how)
        elif not files.rescued:
            log.warning("stopped at step %d, without a checkpoint%s", step, files.leave())


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
