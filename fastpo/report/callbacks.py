"""transformers' callbacks and trackers around fastpo's loop, and which checkpoint is the best.

A callback follows transformers' `TrainerCallback` protocol and steers through `control`, changed in place or returned.
A tracker is one of the callbacks that transformers ships for `report_to`: it runs on rank 0 alone, must start before
the first step, and once training runs its failure costs the tracker, not the run.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames, ParallelMode

from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError, shown

log = logging.getLogger("fastpo")

# report_to's names: (module that must be there, what pip calls it).
PACKAGES = {
    "azure_ml": ("azureml", "azureml-sdk"),
    "clearml": ("clearml", "clearml"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "dagshub": ("dagshub", "dagshub mlflow"),
    "dvclive": ("dvclive", "dvclive"),
    "flyte": ("flytekit", "flytekit flytekitplugins-deck-standard"),
    "mlflow": ("mlflow", "mlflow"),
    "neptune": ("neptune", "neptune"),
    "swanlab": ("swanlab", "swanlab"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "trackio": ("trackio", "trackio"),
    "wandb": ("wandb", "wandb"),
}
# Control flags that an event closes before its handlers run, as in transformers' CallbackHandler.
_CLOSES = {
    "on_train_begin": ("should_training_stop",),
    "on_epoch_begin": ("should_epoch_stop",),
    "on_step_begin": ("should_log", "should_evaluate", "should_save"),
    "on_log": ("should_log",),
    "on_evaluate": ("should_evaluate",),
    "on_save": ("should_save",),
}
_FLAGS = tuple(f.name for f in dataclasses.fields(TrainerControl))
_DUE = ("should_log", "should_evaluate", "should_save")
_TRACKERS_KEY = "fastpo.trackers"  # in TrainerState.stateful_callbacks: the run that each tracker goes on with
_SECRETS = {"token", "use_auth_token", "auth_token", "access_token", "hub_token", "api_key", "password"}


# ---- the configuration as callbacks see it


def plain_config(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON types, without any token: for files, trackers and model cards."""

    def hide(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: hide(v, k) for k, v in value.items()}
        return "<hidden>" if key in _SECRETS and isinstance(value, str) else value

    values = json.loads(json.dumps(config.to_dict(), default=str))
    values.pop("hub_token", None)
    return hide(values)


class CallbackArgs:
    """The configuration as a callback expects its `args`: fastpo's fields, else transformers' defaults.

    Setting a field sets it in the configuration; the trainer reads what it needs at every step from there.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        rank: int = 0,
        local_rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
    ):
        self.__dict__.update(
            _config=config, process_index=rank, local_process_index=local_rank, local_rank=local_rank,
            world_size=world_size, device=device or torch.device("cpu"), should_save=rank == 0, should_log=rank == 0,
        )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":  # copy and pickle ask before there is a configuration
            raise AttributeError(name)
        if name in _DERIVED:
            return _DERIVED[name](self)
        if name != "hub_token" and hasattr(self._config, name):
            return _as_enum(name, getattr(self._config, name))
        for field in dataclasses.fields(TrainingArguments):
            if field.name == name:
                factory = field.default_factory
                return field.default if factory is dataclasses.MISSING else factory()
        raise AttributeError(f"fastpo's configuration has no {name!r}, nor have transformers' TrainingArguments")

    def __setattr__(self, name: str, value: Any) -> None:
        in_config = name in {f.name for f in dataclasses.fields(TrainConfig)}
        setattr(self._config, name, value) if in_config else self.__dict__.update({name: value})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without any token."""
        return plain_config(self._config)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """Only bool, int, float and str, for a tracker's table of hyper-parameters."""
        values = {**self.to_dict(), "train_batch_size": self.train_batch_size, "eval_batch_size": self.eval_batch_size}
        return {k: v if type(v) in (bool, int, float, str) else str(v) for k, v in values.items()}

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __repr__(self) -> str:
        return f"CallbackArgs({self.to_json_string()})"


# What transformers' TrainingArguments compute.
_DERIVED: dict[str, Callable[[Any], Any]] = {
    "metric_for_best_model": lambda args: best_metric_name(args._config, prefix=False),
    "greater_is_better": lambda args: greater_is_better(args._config),
    "report_to": lambda args: args._config.report_names,
    "logging_dir": lambda args: os.environ.get("TENSORBOARD_LOGGING_DIR") or os.path.join(args.output_dir, "runs"),
    "train_batch_size": lambda args: args._config.per_device_train_batch_size,
    "eval_batch_size": lambda args: args._config.per_device_eval_batch_size,
    "n_gpu": lambda args: int(args.device.type == "cuda"),
    "_n_gpu": lambda args: int(args.device.type == "cuda"),
    "parallel_mode": lambda args: ParallelMode.DISTRIBUTED if args.world_size > 1 else ParallelMode.NOT_PARALLEL,
    # None would let trackio make a Space in its user's account for every model pushed: only a name asks for one.
    "trackio_static_space_id": lambda args: getattr(args._config, "trackio_static_space_id", None) or False,
}
_ENUMS: dict[str, Any] = {
    "eval_strategy": IntervalStrategy,
    "hub_strategy": HubStrategy,
    "logging_strategy": IntervalStrategy,
    "lr_scheduler_type": SchedulerType,
    "optim": OptimizerNames,
    "save_strategy": SaveStrategy,
}


def _as_enum(name: str, value: Any) -> Any:
    """transformers' enum where it has the value: equal to the plain string, and with the `.value` that some read."""
    with contextlib.suppress(KeyError, ValueError):
        return _ENUMS[name](value)
    return value


# ---- the callbacks of a run


class Callbacks:
    """All callbacks of one run: trackers of `report_to` first, then the user's in their order, as in transformers.

    Handlers are given the state and the tokenizer, the model once the run has it (`take`), the optimiser and the
    schedule at last (`begin`). around: entered where any handler runs (a clock paused, the model as it came). Raises
    ConfigError for a tracker that is unknown or not installed.
    """

    def __init__(
        self,
        callbacks: Sequence[Any] | None,
        config: TrainConfig,
        *,
        tokenizer: Any = None,
        rank: int = 0,
        local_rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
        around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ):
        self.config, self.tokenizer, self.around, self.world_size = config, tokenizer, around, world_size
        self.model: nn.Module | None = None
        self.optimizer: Any = None
        self.scheduler: Any = None
        self.args = CallbackArgs(config, rank=rank, local_rank=local_rank, world_size=world_size, device=device)
        self.state = TrainerState(is_local_process_zero=local_rank == 0, is_world_process_zero=rank == 0)
        self.control = TrainerControl()
        self.user = [_as_callback(c) for c in callbacks or []]
        made = make_trackers(config.report_names)  # on every rank, so that all stop where one is missing
        # One that the user built stands in for ours: nothing is logged twice.
        made = [t for t in made if not any(isinstance(c, type(t)) for c in self.user)]
        self.trackers = (made if rank == 0 else []) + [c for c in self.user if _is_tracker(c)]
        self.callbacks = (made if rank == 0 else []) + self.user
        self._started: list[Any] = []
        self._opened_wandb = False
        _check_early_stopping(self.user, config)

    def take(self, model: nn.Module) -> None:
        """The run has its model."""
        self.model = model

    def begin(self, optimizer: Any, scheduler: Any) -> None:
        """The run has its optimiser and its schedule."""
        self.optimizer, self.scheduler = optimizer, scheduler

    def call(self, event: str, **extra: Any) -> TrainerControl:
        """Run an event's handlers, from on_init_end to on_push_begin; returns `control` as they leave it."""
        for flag in _CLOSES.get(event, ()):
            setattr(self.control, flag, False)
        if event == "on_train_begin":
            self.start_trackers()
        handlers = [c for c in self.callbacks if _handles(c, event)]
        if event == "on_train_begin":
            handlers = [c for c in handlers if c not in self._started]
        if handlers:
            with self.around():
                for callback in handlers:
                    self._run(callback, event, extra)
        return self.control

    def log(self, metrics: dict[str, Any]) -> TrainerControl:
        """on_log with transformers' keys: the metrics and the epoch; the step is the state's."""
        return self.call("on_log", logs={**metrics, "epoch": self.state.epoch})

    def start_trackers(self) -> None:
        """Open the trackers' runs, before the work that would be lost if one cannot. Once; on_train_begin does it too.

        With the state of a checkpoint (`restore`) a tracker goes on with its run: TensorBoard, W&B and trackio; MLflow
        begins a new one.
        """
        for tracker in self.trackers:
            if tracker in self._started:
                continue
            name = type(tracker).__name__
            try:
                with self._resumed(tracker):
                    self._handler(tracker, "on_train_begin", {})
            except Exception as error:
                raise ConfigError(f"report_to: {name} cannot start: {_first_line(error)}") from error
            self._started.append(tracker)

    def close(self, failed: bool = False) -> None:
        """End the trackers' runs; as failed ones where training did not reach on_train_end. Call it in `finally`.

        A failed run has no on_train_end: callbacks that announce or upload the trained model would do so with one
        that is not. Only the trackers are told, each in its own way.
        """
        for tracker in [t for t in self.trackers if t in self._started]:
            name = type(tracker).__name__
            try:
                if name == "WandbCallback":
                    if self._opened_wandb and tracker._wandb.run is not None:  # the user's own run stays open
                        tracker._wandb.finish(exit_code=int(failed))
                elif name == "MLflowCallback" and failed:
                    if tracker._auto_end_run and tracker._ml_flow.active_run():
                        tracker._ml_flow.end_run(status="FAILED")
                elif failed:
                    self._handler(tracker, "on_train_end", {})
            except Exception as error:
                log.warning("%s could not be closed: %s", name, _first_line(error))
        self._started.clear()

    # ------------------------------------------------------------ state

    def export(self) -> TrainerState:
        """Write what stateful callbacks (`ExportableState`) want kept into the state, for a checkpoint."""
        state = self.state
        out: dict[str, Any] = {}
        for callback in (*self.callbacks, self.control):
            if isinstance(callback, ExportableState):
                out.setdefault(type(callback).__name__, []).append(callback.state())
        state.stateful_callbacks = {name: kept if len(kept) > 1 else kept[0] for name, kept in out.items()}
        if runs := {n: r for t in self.trackers if (r := _run_of(n := type(t).__name__, t))}:
            state.stateful_callbacks[_TRACKERS_KEY] = runs
        return state

    def restore(self, state: TrainerState) -> None:
        """Take over a checkpoint's state: the callbacks that were given again go on where they were."""
        self.state = state
        state.is_world_process_zero = self.args.process_index == 0
        state.is_local_process_zero = self.args.local_process_index == 0
        missing = []
        for name, kept in (state.stateful_callbacks or {}).items():
            kept = kept if isinstance(kept, list) else [kept]
            if name in (_TRACKERS_KEY, "TrainerControl"):
                continue
            same = [c for c in self.callbacks if type(c).__name__ == name]
            for callback, values in zip(same, kept, strict=False):
                _restore(callback, values)
            if len(same) < len(kept):
                missing.append(name)
        if missing:
            log.warning("the checkpoint holds the state of callbacks that are not given now: %s", ", ".join(missing))
        flags = (state.stateful_callbacks or {}).get("TrainerControl", {}).get("args", {})
        # The other flags were answered at the step that was saved; a stop of the epoch outlives it.
        self.control.should_epoch_stop = bool(flags.get("should_epoch_stop", False))

    def flags(self) -> dict[str, bool]:
        """What is due after the step at hand, for a checkpoint that is made before it is done."""
        return {name: getattr(self.control, name) for name in _DUE}

    def set_flags(self, flags: Mapping[str, bool]) -> None:
        """What `flags` returned; none of them, of a checkpoint after which nothing is due."""
        for name, value in flags.items():
            setattr(self.control, name, value)

    def agree(self, group: dist.ProcessGroup | None = None) -> None:
        """Several processes: what a callback decides on one rank holds on all (a clock, a file, a random number).

        `group` must take CPU tensors. Without callbacks of the user nothing is exchanged.
        """
        if self.world_size == 1 or not self.user:
            return
        home = "cpu" if "cpu" in dist.get_backend_config(group) else self.args.device
        flags = torch.tensor([int(getattr(self.control, name)) for name in _FLAGS], dtype=torch.int32, device=home)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
        for name, value in zip(_FLAGS, flags.tolist(), strict=True):
            setattr(self.control, name, bool(value))

    # --------------------------------------------------------- internals

    def _handler(self, callback: Any, event: str, extra: dict[str, Any]) -> Any:
        return getattr(callback, event)(
            self.args, self.state, self.control, model=self.model, processing_class=self.tokenizer,
            optimizer=self.optimizer, lr_scheduler=self.scheduler, train_dataloader=None, eval_dataloader=None, **extra,
        )  # fmt: skip

    def _run(self, callback: Any, event: str, extra: dict[str, Any]) -> None:
        if callback not in self.trackers:
            returned = self._handler(callback, event, extra)
            for flag in _FLAGS if returned is not None else ():  # `control` stays the object that the trainer holds
                setattr(self.control, flag, getattr(returned, flag))
            return
        try:
            self._handler(callback, event, extra)
        except Exception as error:  # a server that is away, a full disk: the run goes on without the tracker
            name = type(callback).__name__
            log.warning("%s failed in %s and is switched off: %s", name, event, _first_line(error))
            self.callbacks = [c for c in self.callbacks if c is not callback]
            self.trackers = [c for c in self.trackers if c is not callback]

    @contextlib.contextmanager
    def _resumed(self, tracker: Any) -> Iterator[None]:
        """A tracker's start: with the run of the checkpoint, where there is one."""
        name = type(tracker).__name__
        run = (self.state.stateful_callbacks or {}).get(_TRACKERS_KEY, {}).get(name)
        if name == "WandbCallback":
            self._opened_wandb = tracker._wandb.run is None
            if run and self._opened_wandb and "WANDB_RUN_ID" not in os.environ:
                project = os.environ.get("WANDB_PROJECT", self.args.project)
                tracker._wandb.init(project=project, name=self.config.run_name, id=run, resume="allow")
        elif name == "TrackioCallback" and run:
            self.args.__dict__["run_name"] = run  # trackio goes on with the run of that name
        elif name == "TensorBoardCallback" and run and Path(run).is_dir() and tracker.tb_writer is None:
            tracker.logging_dir = run
            # Steps after the checkpoint were logged by the run that was killed, and come again.
            tracker.tb_writer = tracker._SummaryWriter(log_dir=run, purge_step=self.state.global_step + 1)
        try:
            yield
        finally:
            self.args.__dict__.pop("run_name", None)


def make_trackers(names: Sequence[str]) -> list[Any]:
    """transformers' callbacks for `report_to`'s names; ConfigError for one that is unknown or not installed."""
    if not names:
        return []
    from transformers.integrations import integration_utils

    known = integration_utils.INTEGRATION_TO_CALLBACK
    if "all" in names:
        names = integration_utils.get_available_reporting_integrations()
    out = []
    for name in dict.fromkeys(names):
        if name not in known:
            near = difflib.get_close_matches(name.lower(), [*known, "all", "none"], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}, all and none"
            raise ConfigError(f"unknown tracker {name!r} in report_to; {hint}")
        if name == "wandb" and os.environ.get("WANDB_LOG_MODEL", "").lower() == "end":
            raise ConfigError("WANDB_LOG_MODEL=end is not honoured: set it to checkpoint, or push_to_hub")
        module, package = PACKAGES.get(name, (None, None))
        if module is not None and importlib.util.find_spec(module) is None:
            raise ConfigError(f"report_to={name!r} needs a package that is missing: pip install {package}")
        try:
            out.append(known[name]())
        except (ImportError, RuntimeError) as error:  # its server is not named, or the package is too old
            raise ConfigError(f"report_to={name!r} cannot be used: {_first_line(error)}") from None
    return out


def _is_tracker(callback: Any) -> bool:
    """Whether a user's callback is one of transformers' own trackers."""
    return type(callback).__module__ == "transformers.integrations.integration_utils"


def _as_callback(callback: Any) -> Any:
    if isinstance(callback, type):
        try:
            callback = callback()
        except Exception as error:
            raise ConfigError(f"callbacks: {callback.__name__} cannot be made: {_first_line(error)}") from error
    if not any(name.startswith("on_") and callable(getattr(callback, name, None)) for name in dir(callback)):
        hint = "; a tracker's name goes into report_to" if isinstance(callback, str) else ""
        raise ConfigError(f"callbacks holds {shown(callback)}, which has no on_... method{hint}")
    return callback


def _handles(callback: Any, event: str) -> bool:
    """Whether a callback does anything there: TrainerCallback has an empty method for every event."""
    handler = getattr(callback, event, None)
    return handler is not None and getattr(handler, "__func__", handler) is not getattr(TrainerCallback, event, None)


def _restore(callback: Any, values: dict[str, Any]) -> None:
    """An exported state into a callback in place: its user holds on to the object."""
    values = {"args": {}, "attributes": {}, **values}
    if all(hasattr(callback, name) for name in values["args"]):
        changes = {**values["args"], **values["attributes"]}
    else:  # arguments that the constructor turns into something else
        changes = vars(type(callback).from_state(values))
    for name, value in changes.items():
        setattr(callback, name, value)


def _run_of(name: str, tracker: Any) -> str | None:
    """What a tracker needs to go on with its run after a resume."""
    if name == "TensorBoardCallback" and tracker.tb_writer is not None:
        return str(tracker.tb_writer.log_dir)
    if name == "WandbCallback" and tracker._wandb.run is not None:
        return tracker._wandb.run.id
    if name == "TrackioCallback" and tracker._initialized:
        return getattr(tracker._trackio.context_vars.current_run.get(), "name", None)
    return None


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# ---- the best checkpoint


def best_metric_name(config: TrainConfig, *, prefix: bool = True) -> str | None:
    """The evaluation metric that says which checkpoint is best, with eval_; None where none is asked for."""
    name = config.metric_for_best_model
    if name is None and config.load_best_model_at_end:
        name = "loss"
    if name is None or not prefix:
        return name
    return name if name.startswith("eval_") else f"eval_{name}"


def greater_is_better(config: TrainConfig) -> bool | None:
    """As set; else not for a metric whose name ends in loss."""
    name = best_metric_name(config)
    if config.greater_is_better is not None or name is None:
        return config.greater_is_better
    return not name.endswith("loss")


def best(state: TrainerState, metrics: dict[str, Any], config: TrainConfig) -> bool:
    """Whether an evaluation is the best so far, noted in `state.best_metric` and `best_global_step`.

    Call it after on_evaluate, whose EarlyStoppingCallback compares with the best before, with the metrics of all sets
    together; False where no metric is asked for. A value that is not a number is never the best.
    """
    name = best_metric_name(config)
    if name is None:
        return False
    if name not in metrics:
        raise ConfigError(_no_metric(name, [k for k in metrics if k.startswith("eval_")]))
    value, larger = float(metrics[name]), greater_is_better(config)
    if state.best_metric is None:
        state.best_metric = float("-inf") if larger else float("inf")
    if not (value > state.best_metric if larger else value < state.best_metric):
        return False
    state.best_metric = value
    if config.save_strategy != "no":
        state.best_global_step = state.global_step
    return True


def note_saved(state: TrainerState, folder: str | Path) -> None:
    """Call it when a checkpoint is being written, before its state: the best one's folder is noted once it exists."""
    if state.best_global_step and state.best_global_step == state.global_step:
        state.best_model_checkpoint = str(folder)


def check_best(config: TrainConfig, reported: Mapping[str, Sequence[str]]) -> None:
    """Refuse before training a metric that no evaluation will have.

    reported: by the set's prefix, such as `eval` or `eval_news`, what it reports, such as `loss`.
    """
    name = best_metric_name(config)
    known = [f"{prefix}_{metric}" for prefix, metrics in reported.items() for metric in metrics]
    if name is not None and name not in known:
        raise ConfigError(_no_metric(name, known))


def _no_metric(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known) or 'none: give an eval_dataset'}"
    return f"metric_for_best_model: no evaluation reports {name!r}; {hint}"


def _check_early_stopping(callbacks: Sequence[Any], config: TrainConfig) -> None:
    if not any(isinstance(c, EarlyStoppingCallback) for c in callbacks):
        return
    if best_metric_name(config) is None:
        raise ConfigError("EarlyStoppingCallback needs metric_for_best_model, such as metric_for_best_model='loss'")
    if config.eval_strategy == "no":
        raise ConfigError("EarlyStoppingCallback needs evaluations: set eval_strategy to steps or epoch")
