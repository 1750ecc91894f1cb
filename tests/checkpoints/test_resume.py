"""Checkpoints and resuming: killed at any moment, damaged, of another run, on a full disk; reused references."""

import copy
import json
import signal
import time

import pytest
import torch
from torch.nn.functional import logsigmoid

import fastpo
from fastpo.checkpoints import checkpoint
from fastpo.errors import ConfigError, DataError, TrainingError
from fastpo.training.evaluation import Evaluation

TIMES = ("runtime", "per_second", "peak_memory_gb")


@pytest.fixture
def run(toy, tmp_path):
    """`run(folder, **options)`: six steps on 20 rows, a checkpoint every second; `rest` reaches `fastpo.train`."""

    def call(folder="run", *, model=None, rows=None, rest=None, **options):
        defaults = dict(
            output_dir=str(tmp_path / folder), disable_tqdm=True, use_cpu=True, bf16=False, logging_steps=1,
            max_steps=6, per_device_train_batch_size=4, save_steps=2, learning_rate=1e-2, gradient_checkpointing=False,
            report=False,
        )  # fmt: skip
        return fastpo.train(
            toy.model() if model is None else model, toy.rows(20) if rows is None else rows,
            processing_class=toy.tokenizer(), args={**defaults, **options}, **(rest or {}),
        )  # fmt: skip

    return call


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def timeless(history):
    return [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in history]


class Stop:
    """Interrupts a run after `step`."""

    def __init__(self, step, error=KeyboardInterrupt):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error


# ---- bit for bit


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_with_the_same_bits(repo_root, preloaded, tmp_path):
    """LoRA with dropout, 8-bit moments, a moving reference, two replicas and two shards included."""
    out = tmp_path / "kills.json"
    done = preloaded.run(repo_root / "tests" / "kill_runs.py", "--kills", "16", "--json", out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    records = json.loads(out.read_text())["records"]
    assert len(records) == 16 and all(r["same"] for r in records)
    assert any("in a save" in r["killed"] for r in records) and any(r["resumed_from"] for r in records)


@pytest.mark.parametrize("request_", [True, "auto", "path", "folder"])
def test_an_interrupted_run_goes_on(toy, run, tmp_path, monkeypatch, request_):
    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run(rest={"callbacks": [Stop(3)]})
    # Ctrl-C saved the last finished step; its counters and open metric window too
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-3"]
    where = {"path": str(tmp_path / "run" / "checkpoint-2"), "folder": str(tmp_path / "run")}.get(request_, request_)
    result = run(resume_from_checkpoint=where)
    assert torch.equal(weights(result.model), weights(whole.model))
    assert timeless(result.log_history) == timeless(whole.log_history)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert timeless(lines) == timeless(whole.log_history)
    assert [line["num_tokens"] for line in lines] == sorted(line["num_tokens"] for line in lines)  # TRL's restarts


def test_a_resumed_run_computes_no_reference(run, tmp_path, monkeypatch):
    """Neither the cache nor the model as it was at first is needed: the checkpoint has the log-probabilities."""
    with pytest.raises(KeyboardInterrupt):
        run(rest={"callbacks": [Stop(3)]})
    monkeypatch.setenv("FASTPO_CACHE", str(tmp_path / "another"))
    passes = []
    monkeypatch.setattr("fastpo.reference.cache._of_batch", lambda *args: passes.append(args))
    run(resume_from_checkpoint=True)
    assert not passes


def test_a_model_trained_since_is_replaced_and_a_named_one_refused(toy, run, tmp_path, caplog):
    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run(rest={"callbacks": [Stop(3)]})
    result = run(model=toy.model(seed=5), resume_from_checkpoint=True)
    assert torch.equal(weights(result.model), weights(whole.model)) and "is not as the run began" in caplog.text
    toy.model(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="was begun from other weights than .*other"):
        run(model=str(tmp_path / "other"), resume_from_checkpoint=True)


def test_steps_and_epochs_may_be_added(run, tmp_path):
    run(max_steps=4, lr_scheduler_type="constant", save_steps=4)
    longer = run(max_steps=6, lr_scheduler_type="constant", resume_from_checkpoint=True)
    assert torch.equal(weights(longer.model), weights(run("whole", lr_scheduler_type="constant").model))


def test_a_schedule_goes_on_over_the_steps_of_the_run_that_resumes(run):
    run(max_steps=4, lr_scheduler_type="linear", save_steps=4)
    longer = run(max_steps=8, lr_scheduler_type="linear", resume_from_checkpoint=True)
    rates = [line["learning_rate"] for line in longer.log_history if "loss" in line and line["step"] > 4]
    assert rates == [line["learning_rate"] for line in run("whole", max_steps=8, lr_scheduler_type="linear").log_history
                     if "loss" in line and line["step"] > 4]  # fmt: skip
    assert len(rates) == 4 and rates[0] > rates[-1] > 0


def test_sigterm_saves_and_the_run_goes_on(repo_root, preloaded, tmp_path):
    """As a scheduler stops a job: exit code 143, and nothing is lost."""
    script = """
import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from conftest import Toy
import fastpo
fastpo.train(Toy.model(), Toy.rows(20), processing_class=Toy.tokenizer(), output_dir=sys.argv[2], use_cpu=True,
    max_steps=int(sys.argv[3]), disable_tqdm=True, report=False, resume_from_checkpoint="auto", logging_steps=1)
"""
    command = ["-c", script, repo_root, tmp_path / "run"]
    process = preloaded.start(*command, 100_000)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM, said
    (saved,) = checkpoint.checkpoints(tmp_path / "run")
    assert checkpoint.damage(saved) is None and "holds it" in said
    reached = checkpoint.step_of(saved)
    assert preloaded.run(*command, reached + 2).returncode == 0
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == [*range(1, reached + 3), reached + 2]


class Raise:
    """Raises in one event, the `nth` time after `step` steps."""

    def __init__(self, event, step, error=KeyboardInterrupt, nth=1):
        self.left = nth

        def handler(args, state, control, **kwargs):
            if state.global_step == step:
                self.left -= 1
                if self.left == 0:
                    raise error

        setattr(self, event, handler)


# on_log comes after the step's line and after each set's; steps 4 and 5 end a window of two lines and an epoch
@pytest.mark.parametrize("event, step, nth", [("on_step_end", 4, 1), ("on_log", 4, 1), ("on_log", 4, 2),
                                              ("on_evaluate", 4, 1), ("on_evaluate", 4, 2), ("on_evaluate", 2, 2),
                                              ("on_step_end", 3, 1), ("on_epoch_end", 5, 1)])  # fmt: skip
def test_cut_short_between_a_step_and_its_checkpoint(toy, run, tmp_path, monkeypatch, event, step, nth):
    """The step's lines, evaluations and checkpoint are what they would have been, and none comes twice."""
    evaluated, steps = [], []
    in_run, evaluate = fastpo.Trainer.evaluate_in_run, Evaluation.__call__

    def noted(trainer):
        steps.append(trainer.state.global_step)
        return in_run(trainer)

    def counted(evaluation, examples, ref, name):
        evaluated.append((steps[-1], name))
        return evaluate(evaluation, examples, ref, name)

    monkeypatch.setattr(fastpo.Trainer, "evaluate_in_run", noted)
    monkeypatch.setattr(Evaluation, "__call__", counted)
    rest = {"eval_dataset": {"a": toy.rows(3, seed=1), "b": toy.rows(3, seed=2)}}
    options = dict(eval_steps=2, logging_steps=2)
    whole = run("whole", rest=rest, **options)
    asked, evaluated[:] = list(evaluated), []
    assert asked == [(s, f"eval_{name}") for s in (2, 4, 6) for name in "ab"]
    with pytest.raises(KeyboardInterrupt):
        run(rest={**rest, "callbacks": [Raise(event, step, nth=nth)]}, **options)
    assert checkpoint.checkpoints(tmp_path / "run")[-1].name == f"checkpoint-{step}"
    result = run(rest=rest, resume_from_checkpoint=True, **options)
    assert evaluated == asked
    assert torch.equal(weights(result.model), weights(whole.model))
    assert timeless(result.log_history) == timeless(whole.log_history)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert timeless(lines) == timeless(whole.log_history)
    assert {p.name for p in checkpoint.checkpoints(tmp_path / "run")} == {
        f"checkpoint-{s}" for s in (2, 4, 6, step)
    }  # fmt: skip


def test_cut_short_as_a_line_is_written(run, tmp_path, monkeypatch):
    """Ctrl-C at any place: the line is in the log, and no callback has closed should_log."""
    from fastpo.report.outputs import Reporter

    whole = run("whole")

    def killed(self, history):
        if history[-1]["step"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "add_line", killed)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert timeless(run(resume_from_checkpoint=True).log_history) == timeless(whole.log_history)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert timeless(lines) == timeless(whole.log_history)


@pytest.mark.parametrize(
    "event, step, options, saved",
    [
        ("on_step_begin", 2, {}, ["checkpoint-2"]),  # nothing has happened since
        ("on_save", 2, {}, ["checkpoint-2"]),
        ("on_step_end", 3, {}, ["checkpoint-2", "checkpoint-3"]),
        ("on_step_begin", 3, {}, ["checkpoint-2", "checkpoint-3"]),
        ("on_train_end", 6, {}, ["checkpoint-2", "checkpoint-4", "checkpoint-6"]),
        ("on_step_begin", 3, {"save_strategy": "no"}, ["checkpoint-3"]),
        ("on_pre_optimizer_step", 2, {"save_strategy": "no"}, ["checkpoint-2"]),  # inside step 3
        ("on_optimizer_step", 2, {"save_strategy": "no"}, []),  # the weights are no longer step 2's
        ("on_step_begin", 0, {}, []),
    ],
    ids=str,
)
def test_a_failed_run_saves_its_last_step_once(run, monkeypatch, event, step, options, saved):
    written = []
    seal = checkpoint.seal
    monkeypatch.setattr(checkpoint, "seal", lambda a, folder: (written.append(folder.name), seal(a, folder)))
    with pytest.raises(RuntimeError, match="on purpose"):
        run(rest={"callbacks": [Raise(event, step, RuntimeError("on purpose"))]}, **options)
    assert written == saved


def test_a_resumed_run_that_fails_at_once_saves_nothing(run, monkeypatch):
    run(max_steps=4)
    written = []
    monkeypatch.setattr(checkpoint, "seal", lambda a, folder: written.append(folder.name))
    with pytest.raises(RuntimeError, match="on purpose"):
        run(rest={"callbacks": [Raise("on_train_begin", 4, RuntimeError("on purpose"))]}, resume_from_checkpoint=True)
    assert not written


def test_a_run_that_non_finite_steps_ended_goes_on(toy, run, tmp_path, any_weight):
    """The count begins anew: else the first finite step after the resume would end the run again."""
    rows = [{**r, "weight": 3e38 if i in (2, 3) else 1.0} for i, r in enumerate(toy.rows(8))]
    options = dict(rows=rows, per_device_train_batch_size=1, train_sampling_strategy="sequential", save_strategy="no",
                   loss_type="sppo_hard", max_nonfinite_steps=2)  # fmt: skip
    whole = run("whole", **{**options, "max_nonfinite_steps": 5})
    with pytest.raises(TrainingError, match="2 steps in a row had a non-finite"):
        run(**options)
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "run")] == ["checkpoint-4"]
    result = run(**options, resume_from_checkpoint=True)
    assert torch.equal(weights(result.model), weights(whole.model))
    assert result.metrics["skipped_steps"] == whole.metrics["skipped_steps"] == 2
    assert timeless(result.log_history)[-2:] == timeless(whole.log_history)[-2:]


@pytest.mark.parametrize("request_", [True, "auto", "path", "folder"])
def test_killed_between_the_two_renames_of_a_checkpoint(run, tmp_path, monkeypatch, request_):
    """A run that passes a step again sets its checkpoint aside before the new one gets the name."""
    import shutil

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run(rest={"callbacks": [Stop(3)]}, save_steps=3)
    folder = tmp_path / "run" / "checkpoint-3"
    again = folder.with_name(f"{checkpoint.TEMPORARY}{folder.name}")
    shutil.copytree(folder, again)
    rename = checkpoint.os.replace

    def killed(source, target):
        if target == folder:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.seal(again, folder)
    assert not folder.exists() and not checkpoint.checkpoints(folder.parent)
    where = {"path": str(folder), "folder": str(folder.parent)}.get(request_, request_)
    result = run(resume_from_checkpoint=where)
    assert result.log_history[0]["step"] == 1 and torch.equal(weights(result.model), weights(whole.model))
    assert not list(folder.parent.glob(f"{checkpoint.TEMPORARY}*"))


def test_lines_that_a_kill_cut_off(toy, run, tmp_path):
    rest = {"eval_dataset": toy.rows(3, seed=1)}
    options = dict(eval_steps=2, sample_generations=1, generation_kwargs={"max_new_tokens": 2})
    whole = run("whole", rest=rest, **options)
    with pytest.raises(KeyboardInterrupt):
        run(rest={**rest, "callbacks": [Stop(3)]}, **options)
    folder = tmp_path / "run"
    for name, cut in (("metrics.jsonl", '{"loss": 0.6'), ("samples.jsonl", '{"step": 4, "prompt": "w1 w')):
        with open(folder / name, "a") as f:
            f.write(cut)
    run(rest=rest, resume_from_checkpoint=True, **options)

    def lines(path):
        return [json.loads(line) for line in path.read_text().splitlines()]

    assert timeless(lines(folder / "metrics.jsonl")) == timeless(whole.log_history)
    samples = lines(folder / "samples.jsonl")
    assert [s["step"] for s in samples] == [2, 4, 6] and samples == lines(tmp_path / "whole" / "samples.jsonl")


# ---- what can be wrong with a checkpoint


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "missing": ("trainer.pt", lambda p: p.unlink(), "trainer.pt is missing"),
    "truncated": ("model.safetensors", truncate, "model.safetensors has .* bytes instead of"),
    "flipped": ("state/rank-00000.safetensors", flip, "state/rank-00000.safetensors has changed"),
    "no manifest": ("manifest.json", lambda p: p.unlink(), "manifest.json is missing"),
    "garbled": ("manifest.json", lambda p: p.write_text("{"), "manifest.json cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(run, tmp_path, caplog, kind):
    name, break_, said = DAMAGE[kind]
    whole = run(save_steps=3)
    (newest,) = [p for p in checkpoint.checkpoints(tmp_path / "run") if checkpoint.step_of(p) == 6]
    break_(newest / name)
    with pytest.raises(TrainingError, match=f"checkpoint-6' cannot be resumed, it is damaged: {said}.*checkpoint-3"):
        run(save_steps=3, resume_from_checkpoint=True)
    result = run(save_steps=3, resume_from_checkpoint="auto")
    assert "checkpoint-6' is damaged" in caplog.text
    assert torch.equal(weights(result.model), weights(whole.model))


def test_what_is_no_checkpoint(run, tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint in .*auto starts anew"):
        run(resume_from_checkpoint=True)
    run(resume_from_checkpoint="auto", max_steps=2)  # begins
    with pytest.raises(ConfigError, match="no checkpoint '.*checkpoint-9'; the newest there is .*checkpoint-2"):
        run(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-9"))
    run("only", save_only_model=True, max_steps=2)
    with pytest.raises(TrainingError, match="it holds the model only"):
        run("only", save_only_model=True, resume_from_checkpoint=True)


def test_a_checkpoint_of_another_run_is_refused(toy, run, tmp_path):
    run(max_steps=2)
    folder = tmp_path / "run" / "checkpoint-2"

    def refused(said, **options):
        with pytest.raises(ConfigError, match=said):
            run("other", resume_from_checkpoint=str(folder), **options)

    refused("another model: .*is .* there and", model=toy.model(hidden_size=16))
    refused("other data: 20 rows then, 19 now", rows=toy.rows(19))
    refused("other token ids", rows=toy.rows(20, seed=1))
    refused("other token ids", max_length=12)
    refused("steps of 4 pairs, this run of 2 .*gradient_accumulation_steps", per_device_train_batch_size=2)
    refused("learning_rate=0.01, this run has 0.1", learning_rate=0.1)
    refused("seed=42, this run has 1", seed=1)
    refused("optim='adamw_torch_fused'", optim="rmsprop")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "format": 99, "fastpo": "7.0"}))
    checkpoint.seal(folder, tmp_path / "run" / "checkpoint-1")
    with pytest.raises(ConfigError, match=r"written by fastpo 7.0 in another format \(99"):
        run(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_a_changed_loss_is_said(run, tmp_path, caplog):
    run(max_steps=2)
    run(max_steps=4, beta=0.3, resume_from_checkpoint=True)
    assert "beta=0.3 from here on (the checkpoint had None)" in caplog.text


def test_checkpoints_are_models(toy, run, tmp_path):
    """`from_pretrained` reads them; a model over max_shard_size lies in several files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = run(max_shard_size="20KB", max_steps=2)
    folder = tmp_path / "run" / "checkpoint-2"
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert torch.equal(weights(AutoModelForCausalLM.from_pretrained(folder)), weights(result.model))
    assert AutoTokenizer.from_pretrained(folder)("w1 w2")["input_ids"] == toy.tokenizer()("w1 w2")["input_ids"]
    assert not any(p.name.startswith(".saving") for p in (tmp_path / "run").iterdir())


def test_the_last_k_and_the_best_are_kept(toy, run, tmp_path):
    """The best of an overfitting run is an early one: it is kept, and loaded at the end."""
    options = dict(max_steps=12, eval_steps=2, save_total_limit=2, learning_rate=0.05, load_best_model_at_end=True)
    result = run(rest={"eval_dataset": toy.rows(12, seed=3)}, **options)
    kept = [p.name for p in checkpoint.checkpoints(tmp_path / "run")]
    losses = {line["step"]: line["eval_loss"] for line in result.log_history if "eval_loss" in line}
    best = min(losses, key=losses.get)
    assert best < 10 and kept == [f"checkpoint-{best}", "checkpoint-12"]
    assert result.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    from transformers import AutoModelForCausalLM

    for folder in (tmp_path / "run" / f"checkpoint-{best}", tmp_path / "run"):
        assert torch.equal(weights(AutoModelForCausalLM.from_pretrained(folder)), weights(result.model))
    card = (tmp_path / "run" / "README.md").read_text()
    last = [line for line in result.log_history if "eval_loss" in line][-1]
    assert f"{losses[best]:.4g}" in card and f"{last['eval_loss']:.4g}" not in card


@pytest.mark.parametrize("before", ["shards", "adapter"])
def test_a_model_takes_the_place_of_another_kind(toy, run, tmp_path, before):
    """`from_pretrained` would read an adapter_config.json or an index that another run left, and not this run's."""
    from transformers import AutoModelForCausalLM

    folder, options = tmp_path / "run", dict(max_steps=1, save_strategy="no")
    if before == "adapter":
        peft = pytest.importorskip("peft", reason="needs peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        run(rest={"peft_config": config}, **options)
        assert (folder / "adapter_config.json").exists() and not list(folder.glob("model*.safetensors"))
    else:
        run(max_shard_size="20KB", **options)
        assert (folder / "model.safetensors.index.json").exists()
    (folder / "model_notes.txt").write_text("mine")
    result = run(model=toy.model(seed=1), overwrite_output_dir=True, **options)
    assert [p.name for p in folder.glob("*.safetensors*") if p.name != "reference.safetensors"] == ["model.safetensors"]
    assert not (folder / "adapter_config.json").exists() and (folder / "model_notes.txt").exists()
    assert torch.equal(weights(AutoModelForCausalLM.from_pretrained(folder)), weights(result.model))
    result = run(model=toy.model(seed=2), overwrite_output_dir=True, max_shard_size="20KB", **options)
    assert not (folder / "model.safetensors").exists()
    assert torch.equal(weights(AutoModelForCausalLM.from_pretrained(folder)), weights(result.model))


def test_a_full_disk_costs_the_checkpoint_not_the_run(repo_root, preloaded, tmp_path):
    """A limit on file sizes stands in for the disk: the state does not fit, the model does."""
    script = """
import sys, resource, signal; sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from conftest import Toy
import fastpo, fastpo.trainer
model = Toy.model(hidden_size=64, intermediate_size=256)
class Limit:
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == int(sys.argv[3]):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), -1))
fastpo.train(model, Toy.rows(20), processing_class=Toy.tokenizer(), callbacks=[Limit()], output_dir=sys.argv[2],
    use_cpu=True, max_steps=6, save_steps=2, disable_tqdm=True, report=False, logging_steps=1)
"""
    done = preloaded.run("-c", script, repo_root, tmp_path / "a", 3, 900_000)
    assert done.returncode == 0, done.stderr
    assert "checkpoint-4 could not be written" in done.stderr and "the last checkpoint is checkpoint-2" in done.stderr
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "a")] == ["checkpoint-2"]
    assert (
        checkpoint.damage(tmp_path / "a" / "checkpoint-2") is None and (tmp_path / "a" / "model.safetensors").exists()
    )
    assert not list((tmp_path / "a").glob(".saving*"))
    done = preloaded.run("-c", script, repo_root, tmp_path / "b", 5, 100_000)
    assert "could not be written" in done.stderr.splitlines()[-1] and "checkpoint-4 holds step 4" in done.stderr


# ---- references


@pytest.fixture
def passes(monkeypatch, tmp_path):
    """Counts the reference pass's micro-batches; a cache of its own."""
    from fastpo.reference import cache

    monkeypatch.setenv("FASTPO_CACHE", str(tmp_path / "cache"))
    rows = []
    original = cache._of_batch

    def counted(examples, indices, *rest):
        rows.extend(indices)
        return original(examples, indices, *rest)

    monkeypatch.setattr(cache, "_of_batch", counted)
    return rows


def test_a_sweep_runs_the_reference_pass_once(toy, run, passes):
    """TRL 1.16 repeats it for another beta or learning rate: its key covers every training argument."""
    for loss in ("dpo", "ipo"):
        for i, beta in enumerate((0.01, 0.05, 0.1, 0.3, 1.0)):
            run(f"{loss}-{i}", loss_type=loss, beta=beta, learning_rate=1e-3 * (i + 1), max_steps=5, save_strategy="no")
    assert sorted(passes) == list(range(20))


def test_what_changes_the_numbers_is_computed_again(toy, run, passes, tmp_path):
    """TRL 1.16 reuses stale values for another max_length with keep_end: 5b and 5c of its bugs."""

    def computed(name, **options) -> int:
        passes.clear()
        run(name, max_steps=5, save_strategy="no", **options)
        return len(passes)

    assert computed("first") == 20 and computed("again") == 0
    assert computed("weights", model=toy.model(seed=1)) == 20
    assert computed("dtype", model=toy.model().bfloat16()) == 20
    assert computed("rope", model=toy.model(rope_theta=123.0)) == 20
    longer = [len((r["prompt"] + r["chosen"]).split()) + 1 > 24 or len((r["prompt"] + r["rejected"]).split()) + 1 > 24
              for r in toy.rows(20)]  # fmt: skip
    for mode in ("keep_end", "keep_start"):
        assert 0 < computed(mode, max_length=24, truncation_mode=mode) <= sum(longer)
    # another tokenizer: the same words under other ids
    tokenizer = toy.tokenizer()
    shuffled = copy.deepcopy(tokenizer.backend_tokenizer)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    ids = {w: i if i < 3 else 3 + (i - 2) % 97 for i, w in enumerate(vocabulary)}
    shuffled.model = models.WordLevel(ids, unk_token="<unk>")
    other = PreTrainedTokenizerFast(tokenizer_object=shuffled, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")
    passes.clear()
    fastpo.train(toy.model(), toy.rows(20), processing_class=other, output_dir=str(tmp_path / "tokenizer"),
                 use_cpu=True, disable_tqdm=True, report=False, max_steps=3)  # fmt: skip
    assert len(passes) == 20


def test_a_moving_reference_equals_a_plain_loop(toy, run):
    """TR-DPO as anybody would write it: a second model, mixed every two steps."""
    rows, beta, alpha, every = toy.rows(12), 0.3, 0.6, 2
    model, tokenizer = toy.model(), toy.tokenizer()
    ref = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def logp(m, row, response):
        ids = tokenizer(row["prompt"] + row[response] + "<eos>")["input_ids"]
        start = len(tokenizer(row["prompt"])["input_ids"])
        logits = m(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return logits[start - 1 : -1].gather(1, torch.tensor(ids[start:])[:, None]).sum()

    losses = []
    for step in range(1, 7):
        part = [rows[((step - 1) * 4 + i) % 12] for i in range(4)]
        terms = []
        for row in part:
            with torch.no_grad():
                fixed = logp(ref, row, "chosen") - logp(ref, row, "rejected")
            terms.append(-logsigmoid(beta * (logp(model, row, "chosen") - logp(model, row, "rejected") - fixed)))
        loss = torch.stack(terms).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % every == 0:
            with torch.no_grad():
                for r, p in zip(ref.parameters(), model.parameters(), strict=True):
                    r.copy_(alpha * p + (1 - alpha) * r)
    result = run(rows=rows, sync_ref_model=True, ref_model_sync_steps=every, ref_model_mixup_alpha=alpha, beta=beta,
                 optim="sgd", learning_rate=0.05, lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no",
                 train_sampling_strategy="sequential")  # fmt: skip
    assert [line["loss"] for line in result.log_history[:6]] == pytest.approx(losses, rel=1e-4)
    assert (weights(result.model) - weights(model)).abs().max() < 1e-5
    still = run("still", rows=rows, beta=beta, optim="sgd", learning_rate=0.05, lr_scheduler_type="constant",
                max_grad_norm=0.0, train_sampling_strategy="sequential", save_strategy="no")  # fmt: skip
    assert still.log_history[5]["loss"] != pytest.approx(losses[5], rel=1e-2)


def test_an_earlier_checkpoint_as_reference(toy, run, tmp_path):
    first = run(max_steps=2)
    by_path = run("path", rest={"ref_model": str(tmp_path / "run" / "checkpoint-2")})
    in_memory = run("memory", rest={"ref_model": first.model})
    assert timeless(by_path.log_history) == timeless(in_memory.log_history)
    assert by_path.log_history[0]["loss"] != pytest.approx(0.6931, abs=1e-3)


def test_a_moving_reference_needs_a_loss_with_one(run):
    with pytest.raises(ConfigError, match="simpo has none"):
        run(loss_type="simpo", sync_ref_model=True)
    with pytest.raises(DataError, match="does not fill|do not fill"):
        run(dataloader_drop_last=True, per_device_train_batch_size=50)


def test_damaged_checkpoints_are_resumed_refused_or_passed_over(repo_root, preloaded, tmp_path):
    """A sample of `python tests/damage_runs.py --count 500`."""
    out = tmp_path / "damage.json"
    done = preloaded.run(repo_root / "tests" / "damage_runs.py", "--count", 25, "--seed", 3, "--json", out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    outcomes = json.loads(out.read_text())["outcomes"]
    assert sum(outcomes.values()) == 25 and outcomes["refused"] and outcomes["the same bits"]


@pytest.mark.slow
def test_runs_stopped_by_signals_keep_the_last_finished_step(repo_root, preloaded, tmp_path):
    """Single and double ones, between and within saves."""
    out = tmp_path / "signals.json"
    done = preloaded.run(repo_root / "tests" / "kill_runs.py", "--signals", "16", "--json", out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert all(r["same"] for r in json.loads(out.read_text())["records"])
