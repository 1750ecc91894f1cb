"""A run of drawn responses goes on wherever it was stopped, inside a generation too, with the unbroken run's bits."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import online_runs as runs  # noqa: E402
from fastpo.errors import FastpoError  # noqa: E402

# A generation is two steps, each gone through twice; the policy answers itself.
OPTIONS = {
    "steps_per_generation": 2, "num_iterations": 2, "max_steps": 7, "save_strategy": "steps", "save_steps": 1,
    "logging_steps": 2, "temperature": 0.9, "resume_from_checkpoint": "auto",
}  # fmt: skip
CASES = {
    "reference, entropy": {"beta": 0.05, "use_adaptive_entropy": True, "entropy_target": 3.6, "entropy_coef": 0.1},
    "dynamic sampling": {"dynamic_sampling": 2, "loss_type": "dapo"},
    "certain tokens": {"top_entropy_quantile": 0.5, "loss_type": "bnpo"},
    "moving reference": {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2},
    "rloo": {"loss_type": "rloo"},
    "online_ipo": {"loss_type": "online_ipo", "per_device_train_batch_size": 2},
    "nash_md": {"loss_type": "nash_md", "per_device_train_batch_size": 2},
    "xpo": {"loss_type": "xpo", "per_device_train_batch_size": 2},
}


def worth(completion_ids, **_):
    """Alike for many a response, so that whole groups teach nothing."""
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


def run(folder, *callbacks, rows=None, **options):
    rest = {"sampler": None, "reward_funcs": worth, "callbacks": list(callbacks), "eval_dataset": runs.prompts(2, 9)}
    return runs.train(folder, rows, rest=rest, **OPTIONS | {"eval_strategy": "steps", "eval_steps": 3} | options)


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed(tmp_path, case):
    options = CASES[case]
    whole = run(tmp_path / "whole", **options)
    moved = runs.weights(whole.model) - runs.weights(runs.model())
    assert moved.abs().max() > 1e-3
    for step in (1, 2, 3, 6):  # before the second step of a generation, before its second pass, its last step, a later
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", runs.Stop(step), **options)
    found = run(tmp_path / "stopped", **options)
    assert torch.equal(runs.weights(found.model), runs.weights(whole.model))
    assert runs.lines(found)[:-1] == runs.lines(whole)[:-1]
    kept = [json.loads(line) for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == [line["step"] for line in whole.log_history]


def test_checkpoints_load_with_weights_only(tmp_path):
    run(tmp_path, beta=0.05, max_steps=2)
    files = sorted((tmp_path / "checkpoint-2").rglob("*.pt"))
    assert files
    for file in files:
        torch.load(file, weights_only=True)


def test_a_checkpoint_is_not_taken_up_by_another_plan(tmp_path):
    """One in which its next step goes on with responses that it never kept."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, runs.Stop(1), steps_per_generation=1, num_iterations=1)
    with pytest.raises(FastpoError, match="responses drawn at step 0, which the checkpoint does not hold"):
        run(tmp_path)


def test_a_checkpoint_is_not_taken_up_with_other_columns(tmp_path):
    """Reward functions read them: here one that knows the answer."""
    rows = runs.prompts(8)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, runs.Stop(1), rows=rows)
    run(tmp_path, runs.Stop(9), rows=[row | {"note": None} for row in rows], max_steps=2)  # as datasets fills rows up
    with pytest.raises(FastpoError, match="data"):
        run(tmp_path, rows=[row | {"number": row["number"] + (row["number"] == 5)} for row in rows])


def test_two_runs_alike(tmp_path):
    one, other = (run(tmp_path / name, save_strategy="no") for name in "ab")
    assert torch.equal(runs.weights(one.model), runs.weights(other.model))
    assert runs.lines(one) == runs.lines(other)


@pytest.mark.slow
def test_killed_at_random_moments(repo_root, preloaded, tmp_path):
    out = tmp_path / "kills.json"
    modes = ("grpo", "grpo ddp", "online dpo")
    done = preloaded.run(repo_root / "tests" / "kill_runs.py", "--kills", "4", "--modes", *modes, "--json", out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    records = json.loads(out.read_text())["records"]
    assert len(records) == 4 and all(r["same"] for r in records)
