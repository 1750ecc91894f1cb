"""Online runs through fastpo.train: against TRL's trainers on the same responses, exact under packing, options, faces."""

import collections
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import online_runs as runs  # noqa: E402
from conftest import Toy  # noqa: E402

# ---------------------------------------------------------------- against TRL


def of_trl(tmp_path, monkeypatch, *, rloo=False, rows=None, shuffles=False, **options):
    """(weights, log lines) of TRL's trainer on the same responses."""
    module = pytest.importorskip(f"trl.trainer.{'rloo' if rloo else 'grpo'}_trainer")
    import trl

    def given(self, prompt_ids, *_, **__):
        seen: collections.Counter[tuple[int, ...]] = collections.Counter()
        out = []
        for ids in prompt_ids:
            out.append(runs.response_ids(ids, seen[tuple(ids)]))
            seen[tuple(ids)] += 1
        return out, None

    trainer, config = (trl.RLOOTrainer, trl.RLOOConfig) if rloo else (trl.GRPOTrainer, trl.GRPOConfig)
    monkeypatch.setattr(trainer, "_generate_single_turn", given)
    if not shuffles:  # responses of one prompt stay in one step, as here
        monkeypatch.setattr(module, "shuffle_sequence_dict", lambda batch: batch)
    from datasets import Dataset

    start = str(tmp_path / "start")  # from where TRL takes the reference
    runs.model().save_pretrained(start)

    defaults = dict(
        output_dir=str(tmp_path / "trl"), num_generations=4, max_completion_length=runs.LONGEST, per_device_train_batch_size=8,
        max_steps=3, logging_steps=1, use_cpu=True, bf16=False, disable_tqdm=True, learning_rate=3e-3,
        lr_scheduler_type="constant", warmup_steps=0, report_to="none", save_strategy="no", max_grad_norm=0.0,
        gradient_checkpointing=False, shuffle_dataset=False, logging_nan_inf_filter=False, adam_epsilon=1e-3,
    )  # fmt: skip
    run = trainer(
        model=start, reward_funcs=[runs.by_ids, runs.by_text], args=config(**(defaults | options)),
        train_dataset=Dataset.from_list(rows or runs.prompts(8)), processing_class=Toy.tokenizer(),
    )  # fmt: skip
    run.train()
    return runs.weights(run.model), run.state.log_history[:-1]


# Keys of TRL's lines that are of time, or measured otherwise: a norm before clipping, tokens of steps that follow.
_NOT_OURS = {"step_time", "epoch", "step", "learning_rate", "grad_norm"}


def compared(tmp_path, monkeypatch, *, rloo=False, rows=None, shuffles=False, **options):
    """(largest difference of weights, of each metric of TRL's lines, those lines)."""
    theirs, expected = of_trl(tmp_path, monkeypatch, rloo=rloo, rows=rows, shuffles=shuffles, **options)
    options = {"scale_rewards": "group", **options}  # as TRL's, whatever the loss
    if rloo:
        options |= {"loss_type": "rloo", "scale_rewards": None}
    elif options.get("importance_sampling_level") == "sequence":
        options |= {"loss_type": "gspo", "epsilon": 0.2, "epsilon_high": 0.2}
    elif options.get("loss_type") == "dapo":
        options.setdefault("epsilon_high", 0.2)
    arguments = {"reward_funcs": [runs.by_ids, runs.by_text]}
    result = runs.train(tmp_path / "ours", rows, rest=arguments, adam_epsilon=1e-3, **options)
    moved = (theirs - runs.weights(runs.model())).abs().max()
    assert moved > 1e-3
    found = runs.lines(result)[:-1]
    assert len(found) == len(expected)
    differences: dict[str, float] = {}
    for line, want in zip(found, expected):
        for name in want.keys() - _NOT_OURS:
            assert name in line, name
            differences[name] = max(differences.get(name, 0.0), abs(line[name] - want[name]))
    return float((runs.weights(result.model) - theirs).abs().max()), differences, expected


TYPES = {
    "grpo": {}, "dr_grpo": {}, "dapo": {}, "bnpo": {}, "cispo": {"epsilon_high": 1.05}, "sapo": {},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
}  # fmt: skip


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", TYPES)
def test_training_equals_grpo_trainer(tmp_path, monkeypatch, loss_type, beta, iterations):
    options = {"loss_type": loss_type, "beta": beta, "num_iterations": iterations} | TYPES[loss_type]
    apart, differences, expected = compared(tmp_path, monkeypatch, **options)
    assert apart < 1e-5
    assert max(differences.values()) < 2e-5, differences
    if iterations == 2 and loss_type not in ("sapo",):  # else there is nothing to compare
        assert any(line.get("clip_ratio/region_mean", line.get("cispo_clip_ratio")) for line in expected)
    if beta:
        assert expected[-1]["kl"] > 1e-3


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_training_equals_rloo_trainer(tmp_path, monkeypatch, beta, iterations):
    options = {"beta": beta, "num_iterations": iterations, "learning_rate": 1e-3}
    apart, differences, expected = compared(tmp_path, monkeypatch, rloo=True, **options)
    assert apart < 1e-5
    assert max(differences.values()) < 2e-5, differences
    assert ("kl" in expected[-1]) == bool(beta)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_accumulating_equals_trl(tmp_path, monkeypatch, loss_type):
    """TRL's entropy and clip ratios are means of its micro-batches' means."""
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_iterations": 2, "beta": 0.04}
    apart, differences, _ = compared(tmp_path, monkeypatch, loss_type=loss_type, shuffles=True, **options)
    assert apart < 1e-5
    of_means = {name for name in differences if name.startswith(("clip_ratio", "entropy", "kl"))}
    assert max(value for name, value in differences.items() if name not in of_means) < 2e-5, differences


def test_a_generation_of_two_steps_equals_trl(tmp_path, monkeypatch):
    options = {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 4, "beta": 0.04}
    apart, differences, _ = compared(tmp_path, monkeypatch, **options)
    assert apart < 1e-5
    assert max(differences.values()) < 2e-5, differences


@pytest.mark.parametrize(
    "options",
    [
        {"scale_rewards": "batch"}, {"scale_rewards": "none"}, {"reward_weights": [0.3, 2.0]}, {"temperature": 0.7},
        {"mask_truncated_completions": True}, {"mask_truncated_completions": True, "loss_type": "dapo"},
        {"multi_objective_aggregation": "normalize_then_sum"}, {"delta": 1.05, "num_iterations": 2},
        {"entropy_coef": 0.1}, {"entropy_coef": 0.1, "use_adaptive_entropy": True, "entropy_target": 3.7},
        {"top_entropy_quantile": 0.5}, {"top_entropy_quantile": 0.5, "entropy_coef": 0.1, "num_iterations": 2},
        {"off_policy_mask_threshold": 0.01, "num_iterations": 2}, {"use_bias_correction_kl": False, "beta": 0.1},
    ],
    ids=lambda options: " ".join(options),
)  # fmt: skip
def test_options_equal_trl(tmp_path, monkeypatch, options):
    apart, differences, _ = compared(tmp_path, monkeypatch, **{"loss_type": "grpo", "max_steps": 4, **options})
    assert apart < 1e-5
    assert max(differences.values()) < 2e-5, differences
