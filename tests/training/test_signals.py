"""Ctrl-C and SIGTERM in a run: what is done is saved, a second one loses nothing, other signals are the program's."""

import json
import os
import signal
import threading
import time

import pytest
import torch

import fastpo
from fastpo.checkpoints import checkpoint
from fastpo.training.signals import Signals

TIMES = ("runtime", "per_second", "peak_memory_gb")


@pytest.fixture
def run(toy, tmp_path):
    """`run(folder, callbacks, **options)`: six steps on 20 rows, a checkpoint every second."""

    def call(folder="run", callbacks=(), **options):
        defaults = dict(
            output_dir=str(tmp_path / folder), disable_tqdm=True, use_cpu=True, bf16=False, logging_steps=1,
            max_steps=6, per_device_train_batch_size=4, save_steps=2, learning_rate=1e-2, gradient_checkpointing=False,
            report=False, resume_from_checkpoint="auto",
        )  # fmt: skip
        return fastpo.train(
            toy.model(), toy.rows(20), processing_class=toy.tokenizer(), callbacks=list(callbacks),
            args={**defaults, **options},
        )  # fmt: skip

    return call


def same(a, b) -> bool:
    weights = [torch.cat([p.detach().flatten() for p in r.model.parameters()]) for r in (a, b)]
    logs = [
        [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in r.log_history] for r in (a, b)
    ]  # fmt: skip
    return torch.equal(*weights) and logs[0] == logs[1]


class Send:
    """Sends this process signals in an event, after `step` steps."""

    def __init__(self, event, step, *numbers):
        def handler(args, state, control, **kwargs):
            if state.global_step == step:
                for number in numbers:
                    os.kill(os.getpid(), number)

        setattr(self, event, handler)


@pytest.mark.parametrize("number, error", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize(
    "event, step, saved",
    [("on_step_end", 3, 3), ("on_step_begin", 3, 3), ("on_pre_optimizer_step", 2, 2), ("on_optimizer_step", 2, 3),
     ("on_log", 3, 3), ("on_save", 2, 2)],
)  # fmt: skip
def test_a_signal_keeps_the_last_finished_step(run, tmp_path, number, error, event, step, saved):
    """One that comes while a step takes effect waits for its end: that step is finished, and kept."""
    whole = run("whole")
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(error) as raised:
        run(callbacks=[Send(event, step, number)])
    if number == signal.SIGTERM:
        assert raised.value.code == 143
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert checkpoint.step_of(checkpoint.checkpoints(tmp_path / "run")[-1]) == saved
    assert same(run(), whole)


@pytest.mark.parametrize("first, second", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)])
@pytest.mark.parametrize("periodic", [False, True])
def test_a_second_signal_within_a_save_does_not_lose_it(run, tmp_path, monkeypatch, first, second, periodic):
    seal = checkpoint.seal

    def hit(written, folder):
        for number in (first, second) if periodic else (second, second):
            os.kill(os.getpid(), number)
        seal(written, folder)

    whole = run("whole")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "seal", hit)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run(callbacks=[] if periodic else [Send("on_step_end", 1, first)])
    (saved,) = checkpoint.checkpoints(tmp_path / "run")
    assert checkpoint.step_of(saved) == (2 if periodic else 1) and checkpoint.damage(saved) is None
    assert not list((tmp_path / "run").glob(".saving*"))
    assert same(run(), whole)


def test_a_signal_that_a_callback_swallows_is_asked_for_again(run, tmp_path):
    class Swallow:
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                try:
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(1)
                except KeyboardInterrupt:
                    pass

    with pytest.raises(KeyboardInterrupt):
        run(callbacks=[Swallow()])
    assert checkpoint.checkpoints(tmp_path / "run")[-1].name == "checkpoint-3"


def test_the_programs_own_handlers_and_timers_are_left_alone(run):
    heard = []
    mine = {n: signal.signal(n, lambda number, frame: heard.append(number)) for n in (signal.SIGINT, signal.SIGALRM)}
    try:
        signal.setitimer(signal.ITIMER_REAL, 1000, 1000)
        result = run(callbacks=[Send("on_step_end", 2, signal.SIGINT, signal.SIGALRM)])
        assert signal.getitimer(signal.ITIMER_REAL)[1] == 1000
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in mine.items():
            signal.signal(number, handler)
    assert heard == [signal.SIGINT, signal.SIGALRM] and result.state.global_step == 6


def test_a_run_in_another_thread_takes_no_signal(run):
    results = []
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: results.append(run(max_steps=2)))
    thread.start()
    thread.join()
    assert results[0].state.global_step == 2 and signal.getsignal(signal.SIGINT) == before


def test_what_was_noted_is_raised_when_the_section_ends():
    signals = Signals()
    with signals.taken(True):
        with pytest.raises(KeyboardInterrupt):
            with signals.whole():
                with signals.whole():
                    os.kill(os.getpid(), signal.SIGINT)
                    os.kill(os.getpid(), signal.SIGTERM)
                reached = True
        assert reached
        signals.ending = True
        signals.check()
    with signals.taken(True):  # of another run: what the one before was asked for is behind
        signals.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        signals.asked = None
    busy = [True]
    signals = Signals(busy=lambda: busy[0])
    with signals.taken(True):
        os.kill(os.getpid(), signal.SIGTERM)
        busy[0] = False
        with pytest.raises(SystemExit):
            signals.check()
        signals.asked = None


def test_a_signal_after_the_last_step_keeps_the_model(run, tmp_path, monkeypatch):
    from fastpo.checkpoints import model_files

    write = model_files.write

    def hit(model, tokenizer, folder, *rest):
        if folder.name == f"{checkpoint.TEMPORARY}model":
            os.kill(os.getpid(), signal.SIGTERM)
        write(model, tokenizer, folder, *rest)

    monkeypatch.setattr(model_files, "write", hit)
    with pytest.raises(SystemExit):
        run(max_steps=2)
    assert (tmp_path / "run" / "model.safetensors").exists()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
