"""transformers' callbacks and trackers around fastpo's loop; transformers' own Trainer is the reference."""

import copy
import dataclasses
import importlib.util
import inspect
import json
import logging
import types

import accelerate
import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import integration_utils
from transformers.trainer_callback import CallbackHandler, ExportableState

import fastpo
from fastpo.config.train_config import TrainConfig
from fastpo.errors import ConfigError
from fastpo.report import callbacks as cb
from fastpo.report.callbacks import CallbackArgs, Callbacks

SECRET = "hf_abcdefghijklmnop"


def config(tmp_path, **options) -> TrainConfig:
    return TrainConfig.build({"output_dir": str(tmp_path / "run"), **options})


class Recorder(TrainerCallback):
    """Every event with its step, as a CallbackHandler or fastpo calls them."""

    def __init__(self):
        self.events, self.logs = [], []

    def __getattribute__(self, name):
        if name.startswith("on_"):

            def record(args, state, control, logs=None, metrics=None, **kwargs):
                keys = sorted(set(logs or {}) & {"loss", "eval_loss", "train_loss", "epoch", "learning_rate"})
                self.events.append((name, state.global_step, keys))

            return record
        return super().__getattribute__(name)


# ---- the arguments that callbacks read


def test_args_answer_whatever_training_arguments_have(tmp_path):
    """Every field and the properties that integrations read; enums equal to strings and with a `.value`."""
    args = CallbackArgs(config(tmp_path, save_steps=5), rank=1, local_rank=1, world_size=2)
    reference = TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True)
    for field in dataclasses.fields(TrainingArguments):
        value, theirs = getattr(args, field.name), getattr(reference, field.name)
        assert value is not dataclasses.MISSING
        if hasattr(theirs, "value") and field.name not in ("optim", "lr_scheduler_type"):
            assert type(value) is type(theirs), field.name
    assert args.save_strategy == "steps" and args.save_strategy.value == "steps"
    assert (args.process_index, args.world_size, args.should_save, args.n_gpu) == (1, 2, False, 0)
    assert args.parallel_mode.value == "distributed"
    with pytest.raises(AttributeError, match="no 'nonsense'"):
        _ = args.nonsense
    assert copy.deepcopy(args).learning_rate == args.learning_rate


def test_args_set_the_configuration(tmp_path):
    options = config(tmp_path)
    args = CallbackArgs(options)
    args.max_grad_norm, args.mine = 0.5, "kept"
    assert options.max_grad_norm == 0.5 and args.mine == "kept"


def test_no_token_leaves_the_configuration(tmp_path):
    options = config(tmp_path, hub_token=SECRET, model_init_kwargs={"token": SECRET, "revision": "main"},
                     generation_kwargs={"pad_token_id": 3})  # fmt: skip
    args = CallbackArgs(options)
    for text in (args.to_json_string(), str(args.to_dict()), str(args.to_sanitized_dict()), repr(args)):
        assert SECRET not in text
    assert args.hub_token is None
    plain = cb.plain_config(options)
    assert plain["model_init_kwargs"]["revision"] == "main" and plain["generation_kwargs"] == {"pad_token_id": 3}
    assert {type(v) for v in args.to_sanitized_dict().values()} <= {bool, int, float, str}


# ---- trackers


def test_unknown_tracker_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"):
        Callbacks(None, config(tmp_path, report_to="tensorbord"))
    with pytest.raises(ConfigError, match="has no on_... method; a tracker's name goes into report_to"):
        Callbacks(["tensorboard"], config(tmp_path))


MISSING = [name for name, (module, _) in cb.PACKAGES.items() if importlib.util.find_spec(module) is None]


@pytest.mark.parametrize("name", MISSING)
def test_missing_tracker_names_its_package(tmp_path, name):
    with pytest.raises(ConfigError) as error:
        Callbacks(None, config(tmp_path, report_to=[name]))
    assert str(error.value) == f"report_to={name!r} needs a package that is missing: pip install {cb.PACKAGES[name][1]}"


def test_every_tracker_of_transformers_has_its_package():
    # kubeflow is no package but a server named by the environment
    assert set(cb.PACKAGES) == set(integration_utils.INTEGRATION_TO_CALLBACK) - {"kubeflow"}


def test_wandb_model_upload_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")
    with pytest.raises(ConfigError, match="WANDB_LOG_MODEL=end is not honoured"):
        Callbacks(None, config(tmp_path, report_to="wandb"))


class FailingTracker(TrainerCallback):
    fails_in = "on_log"

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, **kwargs):
        self._at("on_train_begin")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(logs)
        self._at("on_log")

    def on_train_end(self, args, state, control, **kwargs):
        self._at("on_train_end")

    def _at(self, event):
        if event == self.fails_in:
            raise OSError("server away\nsecond line")


@pytest.fixture
def failing(monkeypatch):
    """`failing(event)`: report_to="tensorboard" gives a tracker that fails there."""

    def install(event):
        tracker = type("FailingTracker", (FailingTracker,), {"fails_in": event})
        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", tracker)

    return install


def test_a_tracker_that_cannot_start_stops_the_run(tmp_path, failing):
    failing("on_train_begin")
    with pytest.raises(ConfigError, match="^report_to: FailingTracker cannot start: server away$"):
        Callbacks(None, config(tmp_path, report_to="tensorboard")).start_trackers()


def test_a_tracker_that_fails_later_is_switched_off(tmp_path, failing, caplog):
    failing("on_log")
    mine = Recorder()
    run = Callbacks([mine], config(tmp_path, report_to="tensorboard"))
    tracker = run.trackers[0]
    run.call("on_train_begin")
    with caplog.at_level(logging.WARNING, "fastpo"):
        run.log({"loss": 1.0})
        run.log({"loss": 0.5})
    assert [r.getMessage() for r in caplog.records] == [
        "FailingTracker failed in on_log and is switched off: server away"
    ]
    assert len(tracker.seen) == 1 and len([e for e in mine.events if e[0] == "on_log"]) == 2
    run.close()


def test_users_callbacks_fail_loudly(tmp_path):
    run = Callbacks([FailingTracker()], config(tmp_path))
    with pytest.raises(OSError, match="server away"):
        run.log({"loss": 1.0})


def test_only_rank_zero_tracks(tmp_path, failing):
    failing("nowhere")
    options = config(tmp_path, report_to="tensorboard")
    assert len(Callbacks(None, options).trackers) == 1
    other = Callbacks([Recorder()], options, rank=1, local_rank=1, world_size=2)
    assert not other.trackers and len(other.callbacks) == 1
    assert not other.state.is_world_process_zero and not other.args.should_save


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder of event files."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def steps(run, first, last, save_at=None):
    """A loop as the trainer runs it; a state saved on the way comes back."""
    saved = None
    run.call("on_train_begin")
    for step in range(first, last + 1):
        run.call("on_step_begin")
        run.state.global_step, run.state.epoch = step, step / 10
        run.call("on_step_end")
        run.log({"loss": 1 / step})
        if step == save_at:
            saved = json.loads(json.dumps(dataclasses.asdict(run.export())))
    return saved


def test_tensorboard_goes_on_after_a_kill(tmp_path):
    """Steps 4 and 5 were logged by the run that was killed, and again by the one that was resumed from step 3."""
    pytest.importorskip("tensorboard")
    options = config(tmp_path, report_to="tensorboard")
    killed = Callbacks(None, options)
    saved = steps(killed, 1, 5, save_at=3)
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    assert scalars(folder)["train/loss"] == [(s, pytest.approx(1 / s)) for s in range(1, 6)]  # flushed at every line

    resumed = Callbacks(None, options)
    resumed.restore(TrainerState(**saved))
    resumed.start_trackers()
    steps(resumed, 4, 7)
    resumed.call("on_train_end")
    resumed.close()
    assert list((tmp_path / "run" / "runs").iterdir()) == [folder]
    assert scalars(folder)["train/loss"] == [(s, pytest.approx(1 / s)) for s in range(1, 8)]


def test_a_tracker_given_twice_logs_once(tmp_path):
    pytest.importorskip("tensorboard")
    mine = integration_utils.TensorBoardCallback()
    run = Callbacks([mine], config(tmp_path, report_to="tensorboard"))
    assert run.callbacks == [mine] and run.trackers == [mine]


def test_a_failed_run_closes_its_trackers(tmp_path):
    pytest.importorskip("tensorboard")
    mine = Recorder()
    run = Callbacks([mine], config(tmp_path, report_to="tensorboard"))
    steps(run, 1, 2)
    assert run.trackers[0].tb_writer is not None
    run.close(failed=True)
    assert run.trackers[0].tb_writer is None
    assert "on_train_end" not in [name for name, *_ in mine.events]


class Wandb:
    """The module, as far as it is asked."""

    def __init__(self, run=None):
        self.run, self.calls = run, []

    def init(self, **arguments):
        self.calls.append(("init", arguments))
        self.run = types.SimpleNamespace(id=arguments.get("id") or "new")

    def finish(self, exit_code):
        self.calls.append(("finish", exit_code))
        self.run = None


@pytest.fixture
def wandb(monkeypatch):
    """`wandb(run)`: report_to="wandb" with a stand-in for the package, in which `run` is open already."""

    def install(run=None):
        module = Wandb(run)

        class WandbCallback(TrainerCallback):
            def __init__(self):
                self._wandb = module

            def on_train_begin(self, args, state, control, **kwargs):
                if module.run is None:  # as in transformers
                    module.init(project=args.project, name=args.run_name)

        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", WandbCallback)
        monkeypatch.setitem(cb.PACKAGES, "wandb", ("json", "wandb"))
        return module

    return install


@pytest.mark.parametrize("failed", [False, True])
def test_wandb_ends_the_run_that_it_opened(tmp_path, wandb, failed):
    """Two runs of a sweep in one process are two runs of W&B; one that its user opened goes on."""
    module = wandb()
    for _ in range(2):
        run = Callbacks(None, config(tmp_path, report_to="wandb", run_name="mine"))
        steps(run, 1, 2)
        run.close(failed)
        run.close(failed)
    opened = ("init", {"project": "huggingface", "name": "mine"})
    assert module.calls == [opened, ("finish", int(failed))] * 2
    theirs = types.SimpleNamespace(id="theirs")
    module = wandb(theirs)
    run = Callbacks(None, config(tmp_path, report_to="wandb"))
    steps(run, 1, 2)
    run.close(failed)
    assert module.run is theirs and module.calls == []


def test_wandb_goes_on_with_the_checkpoints_run(tmp_path, wandb, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    module = wandb()
    options = config(tmp_path, report_to="wandb")
    saved = steps(Callbacks(None, options), 1, 3, save_at=2)
    module.run = None
    resumed = Callbacks(None, options)
    resumed.restore(TrainerState(**saved))
    resumed.start_trackers()
    assert module.calls[-1] == ("init", {"project": "mine", "name": None, "id": "new", "resume": "allow"})
    assert len(module.calls) == 2


# ---- control and state


def test_flags_close_where_transformers_closes_them(tmp_path):
    """CallbackHandler is the reference: the same flags are open after each event."""
    run = Callbacks(None, config(tmp_path))
    handler = CallbackHandler([], None, None, None, None)
    events = [name for name in dir(TrainerCallback) if name.startswith("on_")]
    for event in events:
        theirs = Callbacks(None, config(tmp_path)).control
        for name in cb._FLAGS:
            setattr(theirs, name, True)
            setattr(run.control, name, True)
        extra = {"on_log": {"logs": {}}, "on_evaluate": {"metrics": {}}, "on_predict": {"metrics": {}}}.get(event, {})
        getattr(handler, event)(None, None, theirs, **extra)
        assert run.call(event, **extra) == theirs, event


def test_a_returned_control_is_taken(tmp_path):
    class Returns(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            return dataclasses.replace(control, should_save=True)

    entered = []

    class Around:
        def __enter__(self):
            entered.append(1)

        def __exit__(self, *error):
            pass

    run = Callbacks([Returns], config(tmp_path), around=Around)
    control = run.control
    assert run.call("on_step_begin").should_save is False and not entered  # nothing listens: nothing is entered
    assert run.call("on_step_end").should_save is True and len(entered) == 1
    assert run.control is control


def test_ranks_agree(tmp_path, monkeypatch):
    """A callback that stops one rank stops the others; without callbacks of the user nothing is exchanged."""
    calls = []

    def all_reduce(tensor, op, group=None):
        assert op == torch.distributed.ReduceOp.MAX
        calls.append(tensor.tolist())
        tensor[0] = 1  # the other rank wants to stop

    monkeypatch.setattr(cb.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(cb.dist, "get_backend_config", lambda group: "cpu:gloo,cuda:nccl")
    Callbacks(None, config(tmp_path), world_size=2).agree()
    Callbacks([Recorder()], config(tmp_path)).agree()
    assert not calls
    run = Callbacks([Recorder()], config(tmp_path), world_size=2)
    run.control.should_save = True
    run.agree()
    assert len(calls) == 1
    assert (run.control.should_training_stop, run.control.should_save, run.control.should_log) == (True, True, False)


class Counter(TrainerCallback, ExportableState):
    """Its constructor's argument is no attribute, so that it is restored through from_state."""

    def __init__(self, start=0):
        self.count = start

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1

    def state(self):
        return {"args": {"start": self.count}, "attributes": {}}


def test_stateful_callbacks_are_restored_in_place(tmp_path, caplog):
    """Two of one class, each with its own state; and one of transformers that keeps its counter as an attribute."""
    options = config(tmp_path, eval_steps=1, metric_for_best_model="loss")
    run = Callbacks([Counter(10), Counter(20), EarlyStoppingCallback(3)], options)
    run.callbacks[2].early_stopping_patience_counter = 2
    saved = steps(run, 1, 3, save_at=3)
    steps(run, 4, 5)

    given = [Counter(), Counter(), EarlyStoppingCallback(3)]
    again = Callbacks(given, options)
    state = TrainerState(**saved)
    again.restore(state)
    assert again.state is state and [c.count for c in given[:2]] == [13, 23]
    assert given[2].early_stopping_patience_counter == 2
    assert again.export().stateful_callbacks == saved["stateful_callbacks"]
    with caplog.at_level(logging.WARNING, "fastpo"):
        Callbacks([EarlyStoppingCallback(3)], options).restore(TrainerState(**saved))
    assert "callbacks that are not given now: Counter" in caplog.text


def test_early_stopping_says_what_it_needs(tmp_path):
    with pytest.raises(ConfigError, match="needs metric_for_best_model"):
        Callbacks([EarlyStoppingCallback()], config(tmp_path, eval_steps=1))
    with pytest.raises(ConfigError, match="needs evaluations"):
        Callbacks([EarlyStoppingCallback()], config(tmp_path, metric_for_best_model="loss"))


# ---- in a run


@pytest.fixture
def run(toy, tmp_path, monkeypatch):
    """`run(callbacks, **options)`: a short, quiet run, with a cache of its own: other tests compare bit for bit."""
    monkeypatch.setenv("FASTPO_CACHE", str(tmp_path / "cache"))

    def call(callbacks=(), **options):
        defaults = dict(
            output_dir=str(tmp_path / "run"), disable_tqdm=True, use_cpu=True, bf16=False, logging_steps=2, max_steps=5,
            per_device_train_batch_size=4, learning_rate=1e-2, gradient_checkpointing=False, report=False,
        )  # fmt: skip
        return fastpo.train(
            toy.model(), toy.rows(12), eval_dataset=toy.rows(5, seed=1), processing_class=toy.tokenizer(),
            callbacks=list(callbacks), args={**defaults, **options},
        )  # fmt: skip

    return call


CADENCES = {
    "steps": {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4},
    "epochs": {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_first_step": True},
    "log by epoch": {"logging_strategy": "epoch", "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "no"},
    "on start": {"eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True, "save_strategy": "no"},
    "late": {"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 3, "save_strategy": "no"},
}


@pytest.mark.skipif(
    "keep_torch_compile" not in inspect.signature(accelerate.Accelerator.unwrap_model).parameters,
    reason=f"transformers' Trainer does not run beside accelerate {accelerate.__version__}",
)
@pytest.mark.parametrize("cadence", CADENCES)
def test_events_come_as_from_transformers(toy, run, tmp_path, cadence):
    """The same events at the same steps in the same order as transformers' Trainer, three steps an epoch.

    Two differences by intent: at the end the model is saved, no checkpoint; and a checkpoint is written after all that
    belongs to its step, on_epoch_end too, so that a resumed run misses nothing.
    """
    options = {"logging_steps": 2, "max_steps": 6, **CADENCES[cadence]}
    ours, theirs = Recorder(), Recorder()
    run([ours], **options)
    data = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 12
    args = TrainingArguments(output_dir=str(tmp_path / "hf"), per_device_train_batch_size=4, use_cpu=True,
                             disable_tqdm=True, **options)  # fmt: skip
    Trainer(toy.model(), args, train_dataset=data, eval_dataset=data[:5], callbacks=[theirs]).train()
    for recorder in (ours, theirs):
        # micro-batches are fastpo's own, and it predicts nothing
        skipped = {("on_substep_end", s) for s in range(7)} | {("on_prediction_step", s) for s in range(7)}
        if cadence == "steps":
            skipped.add(("on_save", 6))
        recorder.events = [e for e in recorder.events if e[:2] not in skipped]
    assert ours.events == theirs.events


def test_tensorboard_shows_what_metrics_jsonl_holds(run, tmp_path):
    run(report_to="tensorboard", eval_strategy="steps", eval_steps=2, logging_steps=1)
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    shown = scalars(folder)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected: dict[str, list] = {}
    for line in lines:
        for key, value in line.items():
            if key in ("step", "epoch") or value is None:
                continue
            tag = f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
            expected.setdefault(tag, []).append((line["step"], pytest.approx(value, rel=1e-6)))
    assert {tag for tag in shown if not tag.endswith("/epoch")} == set(expected)
    assert {"train/loss", "eval/loss", "train/rewards/margins", "train/train_loss"} <= set(expected)
    for tag, points in expected.items():
        assert shown[tag] == points, tag


def test_early_stopping_stops(run):
    """The loss rises at this learning rate: with no patience the second worse evaluation is the last."""
    result = run([EarlyStoppingCallback(1)], learning_rate=5.0, lr_scheduler_type="constant", max_steps=20,
                 eval_steps=1, metric_for_best_model="loss", max_nonfinite_steps=100)  # fmt: skip
    values = [line["eval_loss"] for line in result.log_history if "eval_loss" in line]
    first_worse = next(i for i in range(1, len(values)) if not values[i] < min(values[:i]))
    assert first_worse == len(values) - 1 < 19
    assert result.state.best_metric == min(values)


def test_a_crash_ends_trackers_but_announces_nothing(run, tmp_path):
    class Crash(Recorder):
        def __getattribute__(self, name):
            if name == "on_step_end":

                def crash(args, state, control, **kwargs):
                    if state.global_step == 3:
                        raise RuntimeError("boom")

                return crash
            return super().__getattribute__(name)

    recorder = Crash()
    tracker = integration_utils.TensorBoardCallback()
    with pytest.raises(RuntimeError, match="boom"):
        run([recorder, tracker], logging_steps=1)
    assert "on_train_end" not in [name for name, *_ in recorder.events]
    assert tracker.tb_writer is None
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    assert [step for step, _ in scalars(folder)["train/loss"]] == [1, 2]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


class Boom(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise RuntimeError("boom")


def test_callbacks_and_trackers_go_on_after_a_resume(run, tmp_path):
    """Counters, control and TensorBoard's folder, as if the run had never been broken."""
    options = dict(report_to="tensorboard", logging_steps=1, max_steps=7, save_strategy="steps", save_steps=3)
    with pytest.raises(RuntimeError, match="boom"):
        run([Counter(), Boom()], **options)
    counter = Counter()
    run([counter], resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"), **options)
    assert counter.count == 7
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    assert [step for step, _ in scalars(folder)["train/loss"]] == list(range(1, 8))


def test_the_best_evaluations_weights_come_back(run, toy, tmp_path):
    """The best is at a step that save_steps would have left out, and save_total_limit keeps it."""

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                torch.manual_seed(0)
                for p in model.parameters():
                    p.data.add_(torch.randn_like(p))

    result = run([Spoil()], max_steps=8, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=4,
                 load_best_model_at_end=True, save_total_limit=1, learning_rate=1e-3)  # fmt: skip
    values = {line["step"]: line["eval_loss"] for line in result.log_history if "eval_loss" in line}
    assert min(values, key=values.get) == 2 == result.state.best_global_step
    assert result.state.best_model_checkpoint.endswith("checkpoint-2")
    fresh = run([StopAt(2)], output_dir=str(tmp_path / "short"), max_steps=8, learning_rate=1e-3)
    for (name, p), q in zip(result.model.named_parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_callback_may_take_back_what_is_due(run):
    class Never(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = False

    result = run([Never()], eval_strategy="steps", eval_steps=1)
    assert not any("eval_loss" in line for line in result.log_history)


def test_an_epoch_can_be_stopped(run):
    """Three steps an epoch, and each ends after its first: steps 1 to 3 are the first steps of epochs 1 to 3."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = True

    recorder = Recorder()
    run([Stop(), recorder], max_steps=9, logging_steps=1)
    steps_of = [(name, step) for name, step, _ in recorder.events if name in ("on_epoch_begin", "on_epoch_end")]
    assert steps_of == [(name, step + (name == "on_epoch_end")) for step in range(3)
                        for name in ("on_epoch_begin", "on_epoch_end")]  # fmt: skip


def test_samples_are_written_at_every_evaluation(run, tmp_path):
    result = run(eval_strategy="steps", eval_steps=2, sample_generations=2, generation_kwargs={"max_new_tokens": 4},
                 max_steps=4)  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["index"]) for line in lines] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    assert all(0 < line["new_tokens"] <= 4 and line["chosen"] for line in lines)
    plain = run(output_dir=str(tmp_path / "plain"), eval_strategy="steps", eval_steps=2, max_steps=4)
    for p, q in zip(result.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q)  # samples leave the training as it was
