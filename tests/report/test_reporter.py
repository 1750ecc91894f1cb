"""A run's files for people, of a reporter alone: no trainer, no model."""

import dataclasses
import json
import math
import os
import shutil

import pytest
import yaml
from transformers import TrainerState

from fastpo.config.train_config import TrainConfig
from fastpo.losses.table import resolve_terms
from fastpo.report import disks
from fastpo.report.outputs import Reporter, RunFacts
from fastpo.training.guardrails import Warning_


@pytest.fixture
def make(tmp_path):
    """`make(main=..., inputs=..., again=..., **options)`: a reporter in a folder that is there."""

    def reporter(main=True, inputs=None, again=lambda: None, **options):
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        return Reporter(TrainConfig.build({"output_dir": str(folder), **options}), folder, main, inputs, again)

    return reporter


FACTS = RunFacts(
    model_name="you/small", architecture="LlamaForCausalLM", adapter=False, dtype="float32", chat=False,
    parameters=1234, trainable_parameters=1000, terms=resolve_terms(["sigmoid"], None, beta=0.1), rows=20,
    dataset_name=None, step_size=4, device="cpu", world_size=1, tags=["fastpo"],
)  # fmt: skip


def state_of(*losses, max_steps=None):
    history = [{"loss": loss, "step": k + 1} for k, loss in enumerate(losses)]
    steps = len(losses)
    return TrainerState(global_step=steps, max_steps=steps if max_steps is None else max_steps, log_history=history)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_of_a_run_that_goes_on(make, tmp_path):
    folder, config = tmp_path / "run", {"beta": 0.3, "learning_rate": 1e-6}
    reporter = make(inputs={"model": "small", "ref_model": None}, **config)
    samples = [{"step": k, "answer": f"a{k}"} for k in range(1, 5)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples) + '{"step": 5, "ans')
    history = [{"loss": 0.7, "step": 1}, {"loss": math.nan, "step": 2}]
    reporter.start(history, step=2)
    assert lines(folder / "metrics.jsonl") == [{"loss": 0.7, "step": 1}, {"loss": None, "step": 2}]
    history.append({"loss": 0.5, "step": 3})
    reporter.add_line(history)
    reporter.add_samples([{"answer": "b"}, {"answer": "c"}], step=3)
    assert lines(folder / "metrics.jsonl")[-1] == history[-1] and len(lines(folder / "metrics.jsonl")) == 3
    assert lines(folder / "samples.jsonl") == [*samples[:2], {"step": 3, "answer": "b"}, {"step": 3, "answer": "c"}]
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written.pop("model") == "small" and "ref_model" not in written
    assert dataclasses.asdict(TrainConfig.build(written)) == dataclasses.asdict(reporter.config)


def test_a_folder_that_is_removed(make, tmp_path, caplog):
    again = []
    reporter = make(again=lambda: again.append(True), inputs={"model": "small"})
    reporter.start()
    history = [{"loss": 0.7, "step": 1}]
    reporter.add_line(history)
    assert not again
    shutil.rmtree(tmp_path / "run")
    history.append({"loss": 0.6, "step": 2})
    reporter.add_line(history)
    assert again == [True] and lines(tmp_path / "run" / "metrics.jsonl") == history
    assert (tmp_path / "run" / "config.yaml").exists() and caplog.text.count("was removed") == 1


def test_lines_wait_for_their_disk(make, tmp_path, monkeypatch, caplog):
    reporter, path, history = make(), tmp_path / "run" / "metrics.jsonl", []
    reporter.start()
    with monkeypatch.context() as patch:
        patch.setattr(disks.os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
        for step in (1, 2):
            history.append({"loss": 0.7, "step": step})
            reporter.add_line(history)
            reporter.add_samples([{"answer": "a"}], step)
    assert path.read_text() == "" and caplog.text.count("metrics.jsonl could not be written: No space left") == 1
    history.append({"loss": 0.7, "step": 3})
    reporter.add_line(history)
    reporter.add_samples([{"answer": "a"}], 3)
    assert lines(path) == history
    assert [s["step"] for s in lines(tmp_path / "run" / "samples.jsonl")] == [1, 2, 3]


def test_other_ranks_write_nothing(make, tmp_path):
    reporter, state = make(main=False), state_of(0.7)
    reporter.start()
    reporter.add_line(state.log_history)
    reporter.add_samples([{"answer": "a"}], 1)
    reporter.write_card(FACTS, state)
    reporter.finish(FACTS, state, {}, {}, [])
    reporter.fail(FACTS, state, ValueError("x"), {}, [])
    assert list((tmp_path / "run").iterdir()) == []


def test_the_card_is_of_the_best_step_where_that_is_the_model(make, tmp_path):
    state = state_of(0.75, 0.625, 0.125)
    make().write_card(FACTS, state)
    text = (tmp_path / "run" / "README.md").read_text()
    assert "| loss | 0.125 |" in text and "you/small" in text and "| rows of training data | 20 |" in text
    state.best_global_step = 2
    best = make(load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", eval_steps=1, save_steps=1)
    best.write_card(FACTS, state)
    assert "| loss | 0.625 |" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    "max_steps, end, said",
    [(None, "finish", "finished"), (9, "finish", "stopped by a callback at step 2 of 9"),
     (9, "fail", "failed: ValueError: on purpose")],
)  # fmt: skip
def test_the_report_says_how_the_run_ended(make, tmp_path, caplog, max_steps, end, said):
    caplog.set_level("INFO", logger="fastpo")
    state, warnings = state_of(0.7, 0.6, max_steps=max_steps), [Warning_("reward_drop", 2, "look here")]
    for guardrails in (True, False):
        reporter = make(guardrails=guardrails, report=True)
        if end == "fail":
            reporter.fail(FACTS, state, ValueError("on purpose"), {}, warnings)
        else:
            reporter.finish(FACTS, state, {"train_loss": 0.65}, {}, warnings)
        page = (tmp_path / "run" / "report.html").read_text()
        assert said in page and ("look here" in page) == guardrails
    assert ("2 steps, loss 0.65; the model is in" in caplog.text) == (end == "finish")


def test_what_cannot_be_written_at_the_end_is_said_and_costs_nothing(make, tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastpo.report.hub.write_card", full)
    monkeypatch.setattr("fastpo.report.outputs.write_report", full)
    reporter = make(report=True)
    reporter.write_card(FACTS, state_of(0.7))
    reporter.finish(FACTS, state_of(0.7), {}, {}, [])
    assert "the model card could not be written: No space left" in caplog.text
    assert "report.html could not be written: No space left" in caplog.text
