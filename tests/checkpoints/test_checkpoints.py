"""Checkpoints of a toy model, of their parts alone: no trainer, no reference, no training data."""

import copy
import json
import math
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, load_model

from fastpo.checkpoints import checkpoint, identity, model_files
from fastpo.checkpoints.run_state import AsJson, RunState
from fastpo.checkpoints.saving import Checkpoints, ModelFiles, Saver
from fastpo.checkpoints.weights import WeightCheck, Weights
from fastpo.config.train_config import TrainConfig
from fastpo.data.prepare import Example
from fastpo.errors import ConfigError, TrainingError
from fastpo.losses.table import resolve_terms
from fastpo.models.policy import Policy
from fastpo.report.callbacks import Callbacks
from fastpo.training.distributed import Engine, World
from fastpo.training.metrics import PAIR_METRICS, Window
from fastpo.training.optim import Gradients
from fastpo.training.progress import Progress
from fastpo.training.random_state import rng_state
from fastpo.training.signals import Signals

CPU = torch.device("cpu")
ROWS = [Example(np.array([5, 6], np.int32), [np.array(r, np.int32) for r in ([7, 8, 0], [9, 0])], [(0, 1)])]


class Counter:
    """A part with a state of its own."""

    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class Parts:
    """What is saved of a run, and what saves it, in the folder `run`; made anew it is another process's."""

    def __init__(self, toy, tmp_path, seed=0, dtype=torch.float32, hub=None, **options):
        defaults = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "report_to": "none"}
        self.config = TrainConfig.build({**defaults, **options})
        self.folder = tmp_path / "run"
        self.model = toy.model(seed, num_hidden_layers=1).to(dtype)
        self.parameters = dict(self.model.named_parameters())
        world, policy = World(CPU), Policy(self.model)
        self.gradients = Gradients(self.parameters, master_weights="fp32", seed=0)
        self.optimizer = torch.optim.AdamW([self.gradients.stepped(p) for p in self.parameters.values()], lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, total_iters=20)
        self.window = Window(CPU, policy, resolve_terms(["sigmoid"], None), lambda: 100, 5)
        self.counter, self.said = Counter(), Counter()
        self.progress, self.signals = Progress(), Signals()
        self.progress.start()
        self.callbacks = Callbacks([], self.config)
        self.callbacks.take(self.model)
        self.callbacks.state.max_steps = 20
        self.weights = Weights(Engine(policy), self.parameters, {}, world)
        self.files = ModelFiles(
            self.weights, toy.tokenizer(), self.folder, "5GB", lambda: self.folder.mkdir(parents=True, exist_ok=True)
        )
        parts = {"scheduler": self.scheduler, "window": self.window, "stepwide": self.counter,
                 "guards": AsJson(self.said)}  # fmt: skip
        state = RunState(self.weights, self.gradients, self.optimizer, self.progress, parts)
        self.run_json = {"run_id": "a", "reference": "key"}
        self.checkpoints = Checkpoints(self.config, self.run_json, self.files, state, self.callbacks, hub)
        check = WeightCheck(self.weights, ROWS, policy.attach)
        self.saver = Saver(self.checkpoints, check, self.callbacks, self.progress, self.signals, self.window)

    @property
    def state(self):
        return self.callbacks.state

    def step(self, finite=True):
        """A step of random gradients, with all that a step counts."""
        self.gradients.begin(1)
        for p in self.parameters.values():
            p.grad = torch.randn_like(p)
        norm = self.gradients.clip_(1.0)
        self.gradients.step_(self.optimizer, torch.tensor(finite))
        self.scheduler.step()
        self.window.add(norm, torch.rand(len(PAIR_METRICS)), norm, torch.tensor(finite))
        self.progress.cursor += 1
        self.counter.count += 2
        self.said.count += 3
        self.state.global_step += 1
        self.state.log_history.append({"step": self.state.global_step})

    def all(self):
        """Everything that must come back, ready to be compared."""
        tensors, plain = self.checkpoints.run_state.take()
        plain = {k: v for k, v in plain.items() if k != "elapsed"}
        plain["window"] = {k: v for k, v in plain["window"].items() if k != "seconds"}
        model = {f"model.{n}": p.detach() for n, p in self.parameters.items()}
        return {n: t.clone() for n, t in (tensors | model).items()}, copy.deepcopy(plain)


@pytest.fixture
def make(toy, tmp_path):
    made = []

    def parts(**options):
        made.append(Parts(toy, tmp_path, **options))
        return made[-1]

    yield parts
    for each in made:
        each.gradients.close()


def same(a, b):
    (tensors, plain), (others, rest) = a, b
    assert tensors.keys() == others.keys() and all(torch.equal(t, others[n]) for n, t in tensors.items())
    assert repr(plain) == repr(rest)


def names(folder):
    return [path.name for path in checkpoint.checkpoints(folder)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_goes_on_bit_for_bit(make, dtype):
    first = make(dtype=dtype)
    for _ in range(3):
        first.step()
    first.progress.todo, first.callbacks.control.should_evaluate = {"stage": 1}, True
    folder = first.saver.save()
    assert folder == first.folder / "checkpoint-3" and checkpoint.damage(folder) is None
    assert first.progress.saved_step == 3 and json.loads((folder / "run.json").read_text()) == first.run_json
    at_save = first.all()
    first.step()
    drawn = [random.random(), np.random.rand(), torch.rand(1).item()]
    other = make(seed=1, dtype=dtype)
    with pytest.raises(AssertionError):
        same(other.all(), at_save)
    other.callbacks.restore(checkpoint.read_state(folder))
    other.checkpoints.restore(folder)
    same(other.all(), at_save)
    assert other.callbacks.control.should_evaluate and other.progress.saved_step == 3
    other.step()
    assert [random.random(), np.random.rand(), torch.rand(1).item()] == drawn
    same(other.all(), first.all())


def test_inside_a_step_the_random_states_are_those_of_its_beginning(make):
    parts = make()
    parts.step()
    parts.progress.rng = rng_state()
    expected = torch.rand(1).item()
    folder = parts.saver.save()
    parts.callbacks.restore(checkpoint.read_state(folder))
    parts.checkpoints.restore(folder)
    assert torch.rand(1).item() == expected


def test_another_hands_state_is_refused_in_one_line(make):
    parts = make()
    parts.step()
    folder = parts.saver.save()
    plain = torch.load(folder / "trainer.pt", weights_only=True)
    del plain["stepwide"]
    torch.save(plain, folder / "trainer.pt")
    with pytest.raises(TrainingError, match="checkpoint-1' cannot be resumed, its content is not what fastpo writes"):
        make().checkpoints.restore(folder)
    two = make()
    two.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ConfigError, match="an optimiser with 1 groups of parameters, this run's has 2"):
        two.checkpoints.restore(folder)


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_failing_write_costs_the_checkpoint_and_not_the_run(make, monkeypatch, caplog, goes_on):
    parts = make()
    parts.step()
    parts.saver.save()
    parts.state.best_global_step = 2
    parts.step()
    if not goes_on:
        parts.signals.end()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "seal", lambda *_: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
        assert parts.saver.save() is None
    said = "checkpoint-2 could not be written: No space left on device; "
    assert said + ("training goes on, " if goes_on else "") + "the last checkpoint is checkpoint-1" in caplog.text
    assert names(parts.folder) == ["checkpoint-1"] and not list(parts.folder.glob(".saving*"))
    assert parts.progress.saved_step == 1 and parts.state.best_model_checkpoint is None
    assert parts.saver.save().name == "checkpoint-2" and parts.state.best_model_checkpoint.endswith("checkpoint-2")


def test_what_ends_a_process_leaves_nothing_half_written(make, monkeypatch):
    parts = make()
    parts.step()
    monkeypatch.setattr(checkpoint, "seal", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        parts.saver.save()
    assert not list(parts.folder.iterdir())


def test_the_oldest_go_and_the_best_stays(make):
    parts = make(save_total_limit=2)
    saved = []
    for step in range(1, 5):
        parts.step()
        if step == 2:
            parts.state.best_global_step, parts.state.best_metric = 2, 0.5
        parts.saver.save()
        saved.append(names(parts.folder))
    of = [["1"], ["1", "2"], ["2", "3"], ["2", "4"]]
    assert saved == [[f"checkpoint-{n}" for n in ns] for ns in of]
    state = checkpoint.read_state(parts.folder / "checkpoint-4")
    assert state.best_model_checkpoint == str(parts.folder / "checkpoint-2")
    state.best_model_checkpoint = "/where/it/was/checkpoint-2"  # of a folder that was moved
    moved = make()
    moved.callbacks.restore(state)
    moved.checkpoints.restore(parts.folder / "checkpoint-4")
    assert state.best_model_checkpoint == str(parts.folder / "checkpoint-2")


def test_the_best_weights_are_loaded_unless_they_are_damaged(make, caplog):
    parts = make()
    parts.checkpoints.load_best()
    assert "no checkpoint was made at a best evaluation" in caplog.text
    parts.step()
    parts.state.best_global_step, parts.state.best_metric = 1, 0.5
    folder = parts.saver.save()
    best = {n: p.detach().clone() for n, p in parts.parameters.items()}
    parts.step()
    last = {n: p.detach().clone() for n, p in parts.parameters.items()}
    parts.checkpoints.load_best()
    assert all(torch.equal(p, best[n]) and not torch.equal(p, last[n]) for n, p in parts.parameters.items())
    (folder / "trainer.pt").write_bytes(b"x")
    with torch.no_grad():
        for n, p in parts.parameters.items():
            p.copy_(last[n])
    parts.checkpoints.load_best()
    assert "cannot be loaded: trainer.pt has 1 bytes" in caplog.text
    assert all(torch.equal(p, last[n]) for n, p in parts.parameters.items())


@pytest.mark.parametrize("value, skipped, said", [
    (math.nan, False, r"after step 2 the weights are not finite \(first model.norm.weight\).*checkpoint-1 is the last"),
    (1e38, True, "after step 2 the weights are finite, but what they give to ordinary rows is not"),
    (1e38, False, None),  # not looked at
])  # fmt: skip
def test_weights_that_are_no_numbers_are_refused(make, value, skipped, said):
    parts = make()
    parts.step()
    parts.saver.save()
    parts.step(finite=not skipped)
    with torch.no_grad():
        parts.model.model.norm.weight.fill_(value)
        if said is None or skipped:
            parts.model.lm_head.weight.fill_(value)
    if said is None:
        assert parts.saver.save() is not None
        return
    with pytest.raises(TrainingError, match=said):
        parts.saver.save()
    assert names(parts.folder) == ["checkpoint-1"] and not list(parts.folder.glob(".saving*"))


def test_a_run_that_trained_nothing_is_an_error(make):
    parts = make()
    parts.saver.check_trained()  # no step, nothing to say
    parts.step(finite=False)
    with pytest.raises(TrainingError, match="all 1 steps had a non-finite loss or gradient and were skipped"):
        parts.saver.check_trained()
    parts.step()
    parts.saver.check_trained()


def test_a_run_that_fails_saves_its_last_step(make, caplog):
    parts = make()
    parts.saver.rescue(ValueError("before the first step"))
    parts.step()
    parts.progress.updating = True
    parts.saver.rescue(ValueError("between two steps"))
    assert not parts.folder.exists() and parts.signals.ending
    parts.progress.updating = False
    parts.saver.rescue(ValueError("x"))
    assert names(parts.folder) == ["checkpoint-1"] and "stopped at step 1; " in caplog.text
    caplog.clear()
    parts.saver.rescue(ValueError("once more"))
    assert not caplog.text


@pytest.mark.parametrize("rescued", [False, True])
def test_where_no_checkpoint_can_be_written_the_weights_are_left(make, toy, monkeypatch, caplog, rescued):
    parts = make()
    parts.step()
    monkeypatch.setattr(parts.model, "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("x\ny")))
    path = parts.folder / model_files.RESCUED / "model.safetensors"
    if rescued:
        parts.folder.mkdir()
        with pytest.raises(
            TrainingError, match=r"model could not be written to .*: x y; its weights are in .*load_model"
        ):
            parts.files.save(parts.folder)
        path.unlink()
    parts.saver.rescue(ValueError("x"))
    assert ("stopped at step 1, without a checkpoint; its weights are in" in caplog.text) == (not rescued)
    if not rescued:
        fresh = toy.model(3, num_hidden_layers=1)
        load_model(fresh, path)
        assert all(torch.equal(p, parts.parameters[n]) for n, p in fresh.named_parameters())


def test_the_models_files_replace_another_runs(make):
    parts = make()
    parts.folder.mkdir()
    (parts.folder / "model-00001-of-00002.safetensors").write_text("stale")
    (parts.folder / "notes.txt").write_text("mine")
    parts.files.save(parts.folder)
    files = {path.name for path in parts.folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "notes.txt"} <= files
    assert "model-00001-of-00002.safetensors" not in files and not parts.files.rescued
    saved = load_file(parts.folder / "model.safetensors")
    assert all(torch.equal(t, parts.parameters[n]) for n, t in saved.items())


def test_what_a_run_is_and_what_it_was_begun_as(make, tmp_path, caplog):
    parts, world = make(), World(CPU)

    def of(model, config=parts.config):
        return identity.identify(model, ROWS, config, world, name="small", of_base=False, settled={})

    begun = of(parts.model)
    assert begun["rows"] == 1 and begun["parameters"]["model.norm.weight"] == "(32,)" and begun["run_id"]
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({**begun, "reference": "key"}))
    parts.step()
    now = of(parts.model)
    assert now["model"] != begun["model"]
    went_on = identity.as_begun(folder, now, named_model=False)
    assert {k: went_on[k] for k in ("model", "run_id")} == {k: begun[k] for k in ("model", "run_id")}
    assert went_on["reference"] == "key" and "is not as the run began" in caplog.text
    with pytest.raises(ConfigError, match="was begun from other weights than 'small' holds"):
        identity.as_begun(folder, now, named_model=True)
    (folder / "run.json").write_text('{"format": 3}')
    with pytest.raises(TrainingError, match="cannot be resumed, its content is not what fastpo writes"):
        identity.as_begun(folder, now, named_model=False)


def test_the_hub_gets_what_is_whole(make, monkeypatch):
    pushed = []
    hub = SimpleNamespace(push_checkpoint=lambda folder, step: pushed.append((folder.name, step)))
    parts = make(hub=hub)
    parts.step()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "seal", lambda *_: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
        parts.saver.save()
    assert not pushed
    parts.saver.save()
    assert pushed == [("checkpoint-1", 1)]
