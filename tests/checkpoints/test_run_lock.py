"""One run at a time in an output folder."""

import os
import signal
import subprocess
import sys
import time

import pytest

import fastpo
from fastpo.checkpoints import run_lock
from fastpo.checkpoints.run_lock import NAME, RunLock
from fastpo.errors import ConfigError


@pytest.fixture
def run(toy, tmp_path):
    def call(folder="run", callbacks=(), **options):
        return fastpo.train(
            toy.model(), toy.rows(8), processing_class=toy.tokenizer(), callbacks=list(callbacks),
            output_dir=str(tmp_path / folder), disable_tqdm=True, use_cpu=True, bf16=False, max_steps=2, report=False,
            gradient_checkpointing=False, **options,
        )  # fmt: skip

    return call


def test_a_second_run_is_refused_while_the_first_lives(run, tmp_path):
    refused = []

    class Again:
        def on_step_end(self, args, state, control, **kwargs):
            for options in ({}, {"resume_from_checkpoint": "auto"}, {"overwrite_output_dir": True}):
                with pytest.raises(ConfigError) as error:
                    run(**options)
                refused.append(str(error.value))

    run(callbacks=[Again()])
    assert len(refused) == 6 and all(
        f"in use by a run that has not ended (process {os.getpid()} on" in r for r in refused
    )
    assert not (tmp_path / "run" / NAME).exists()
    run(overwrite_output_dir=True)  # one after another is fine


def test_a_run_that_failed_lets_go(run, tmp_path):
    class Fail:
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        run(callbacks=[Fail()])
    assert run(resume_from_checkpoint="auto").state.global_step == 2


def test_a_killed_process_blocks_nobody_and_a_living_one_does(tmp_path, repo_root):
    script = """
import os, sys, time; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from fastpo.checkpoints.run_lock import RunLock
lock = RunLock(Path(sys.argv[2])); lock.take()
if os.fork() == 0: time.sleep(60); os._exit(0)  # a child that outlives the run
print("held", flush=True); time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(repo_root), str(tmp_path)], stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "held\n"
        for ask in (lambda: run_lock.check(tmp_path), RunLock(tmp_path).take):
            with pytest.raises(ConfigError, match=f"process {process.pid} on .*choose another output_dir"):
                ask()
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.05)
        assert (tmp_path / NAME).exists()
        run_lock.check(tmp_path)
        lock = RunLock(tmp_path)
        lock.take()
        assert lock.handle is not None
        lock.release()
        assert not (tmp_path / NAME).exists()
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_a_file_system_without_locks_is_spoken_of(tmp_path, monkeypatch, caplog):
    import errno

    def none(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", none)
    RunLock(tmp_path).take()
    assert "no lock here (No locks available)" in caplog.text
