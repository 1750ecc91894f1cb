"""Online runs through fastpo.train: against TRL's trainers on the same responses, and exact under packing."""

import collections
import sys
from pathlib import Path

import pytest
import torch

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
        return out if rloo else (out, None)

    trainer, config = (trl.RLOOTrainer, trl.RLOOConfig) if rloo else (trl.GRPOTrainer, trl.GRPOConfig)
    monkeypatch.setattr(trainer, "_generate_single_turn", given)
    if not shuffles:  # responses of one prompt stay in one step, as here
        monkeypatch.setattr(module, "shuffle_sequence_dict", lambda batch: batch)
    from datasets import Dataset

    start = str(tmp_path / "start")  # from where TRL takes the reference
    runs.model().save_pretrained(start)

    defaults = dict(
        output_dir=str(tmp_path / "trl"), num_generations=4, max_completion_length=runs.LONGEST,
        per_device_train_batch_size=8, max_steps=3, logging_steps=1, use_cpu=True, bf16=False, disable_tqdm=True,
        learning_rate=3e-3,
        lr_scheduler_type="constant", warmup_steps=0, report_to="none", save_strategy="no", max_grad_norm=0.0,
        gradient_checkpointing=False, shuffle_dataset=False, logging_nan_inf_filter=False, adam_epsilon=1e-3,
    )  # fmt: skip
    run = trainer(
        model=start, reward_funcs=[runs.by_ids, runs.by_text], args=config(**(defaults | options)),
        train_dataset=Dataset.from_list(rows or runs.prompts(8)), processing_class=Toy.tokenizer(),
    )  # fmt: skip
    run.train()
    return runs.weights(run.model), run.state.log_history[:-1]


# Keys of TRL's lines that are of time, or that there are not here: the loss without its bonus.
_NOT_OURS = {"step_time", "policy_loss"}


def compared(tmp_path, monkeypatch, *, rloo=False, rows=None, shuffles=False, **options):
    """(largest difference of weights, of each metric of TRL's lines, those lines)."""
    options = {**({} if rloo else {"loss_type": "grpo"}), **options}
    theirs, expected = of_trl(tmp_path, monkeypatch, rloo=rloo, rows=rows, shuffles=shuffles, **options)
    options = {"scale_rewards": "group", **options}  # as TRL's, whatever the loss
    if rloo:
        options |= {"loss_type": "rloo", "scale_rewards": None}
    elif options["loss_type"] == "grpo" and options.get("importance_sampling_level") == "sequence":
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
        # Tokens count here with the step that they are drawn for, there with the first of their generation.
        for name in want.keys() - _NOT_OURS - ({"num_tokens"} if "steps_per_generation" in options else set()):
            assert name in line, name
            differences[name] = max(differences.get(name, 0.0), abs(line[name] - want[name]))
    return float((runs.weights(result.model) - theirs).abs().max()), differences, expected


TYPES = {
    "grpo": {}, "dr_grpo": {}, "dapo": {}, "bnpo": {}, "cispo": {"epsilon_high": 1.05}, "sapo": {},
    "vespo": {}, "luspo": {"importance_sampling_level": "sequence"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
}  # fmt: skip


@pytest.mark.parametrize(("beta", "iterations"), [(0.0, 1), (0.04, 2)])
@pytest.mark.parametrize("loss_type", TYPES)
def test_training_equals_grpo_trainer(tmp_path, monkeypatch, loss_type, beta, iterations):
    options = {"loss_type": loss_type, "beta": beta, "num_iterations": iterations} | TYPES[loss_type]
    apart, differences, expected = compared(tmp_path, monkeypatch, **options)
    assert apart < 1e-5
    assert not {name: value for name, value in differences.items() if value > 2e-5}
    if iterations == 2 and loss_type not in ("sapo", "vespo"):  # else there is nothing to compare
        assert any(line.get("clip_ratio/region_mean", line.get("cispo_clip_ratio")) for line in expected)
    if beta:
        assert expected[-1]["kl"] > 1e-3


@pytest.mark.parametrize(("beta", "iterations"), [(0.0, 2), (0.05, 1), (0.05, 2)])
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
        {"top_entropy_quantile": 0.5},
        {"top_entropy_quantile": 0.5, "entropy_coef": 0.1, "mask_truncated_completions": True},
        {"off_policy_mask_threshold": 0.01, "num_iterations": 2}, {"use_bias_correction_kl": False, "beta": 0.1},
    ],
    ids=lambda options: " ".join(options),
)  # fmt: skip
def test_options_equal_trl(tmp_path, monkeypatch, options):
    apart, differences, _ = compared(tmp_path, monkeypatch, **{"max_steps": 4, **options})
    assert apart < 1e-5
    assert max(differences.values()) < 2e-5, differences


# ---------------------------------------------------------------- exact under packing


def close(one, other, tolerance=2e-6):
    """Of two runs: the weights, and every number of the log that is not of the packing."""
    packing = ("packing_efficiency", "shared_prompt_savings", "tokens_per_second")
    assert (runs.weights(one.model) - runs.weights(other.model)).abs().max() < tolerance
    for mine, theirs in zip(runs.lines(one), runs.lines(other), strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - set(packing):
            assert mine[name] == pytest.approx(theirs[name], abs=2e-5), name


PACKED = [
    {"loss_type": "grpo", "beta": 0.04, "num_iterations": 2}, {"loss_type": "dapo"}, {"loss_type": "dr_grpo"},
    {"loss_type": "gspo", "epsilon": 0.2, "num_iterations": 2}, {"loss_type": "rloo"},
    {"loss_type": "vespo", "num_iterations": 2}, {"loss_type": "gmpo", "num_iterations": 2},
    {"loss_type": "grpo", "top_entropy_quantile": 0.4}, {"loss_type": "grpo", "entropy_coef": 0.1},
    {"loss_type": "bnpo", "mask_truncated_completions": True},
]  # fmt: skip


@pytest.mark.parametrize("options", PACKED, ids=lambda options: " ".join(map(str, options.values())))
def test_numbers_do_not_depend_on_micro_batches(tmp_path, options):
    options = {"adam_epsilon": 1e-3, "per_device_train_batch_size": 16, **options}
    one = runs.train(tmp_path / "one", **options)
    close(one, runs.train(tmp_path / "more", max_tokens=40, **options))
    close(one, runs.train(tmp_path / "shared", share_prompts="always", **options))


class Trunk:
    """Counts tokens of passes through the model, with a gradient and without, from the first response on."""

    def __init__(self, monkeypatch):
        from fastpo.models.policy import Policy

        self.batches: list[tuple[bool, int, int]] = []  # with a gradient; trunk tokens; head rows
        self.sampler = runs.Given()
        read = Policy.read

        def counted(policy, batch, **options):
            if self.sampler.requests:
                self.batches.append((torch.is_grad_enabled(), batch.input_ids.numel(), batch.target.numel()))
            return read(policy, batch, **options)

        monkeypatch.setattr(Policy, "read", counted)

    def trained(self):
        return [(tokens, rows) for grad, tokens, rows in self.batches if grad]


def some_worth_alike(completion_ids, **_):
    """Of each prompt's four the last two alone differ; of every second prompt all are alike."""
    out = []
    for start in range(0, len(completion_ids), 4):
        out += [0.0, 0.0, 1.0, -1.0] if (start // 4) % 2 == 0 else [1.0] * 4
    return out


def test_what_trains_nothing_is_not_in_the_trunk(tmp_path, monkeypatch):
    """Two prompts a step: of the first two responses of four train, of the second none."""
    trunk = Trunk(monkeypatch)
    options = {"max_steps": 2, "share_prompts": "always", "num_iterations": 1}
    rows = runs.prompts(8)
    rest = {"reward_funcs": some_worth_alike, "sampler": trunk.sampler}
    run = runs.train(tmp_path, rows, rest=rest, **options)
    tokenizer = Toy.tokenizer()
    for (tokens, head), first in zip(trunk.trained(), (0, 2), strict=True):
        ids = tokenizer(rows[first]["prompt"])["input_ids"]
        lengths = [len(runs.response_ids(ids, k)) for k in (2, 3)]
        assert head == sum(lengths)
        assert tokens == len(ids) + sum(n - 1 for n in lengths)  # the prompt once, the last tokens not at all
    assert all(grad for grad, *_ in trunk.batches)  # nor a pass without gradient
    assert runs.lines(run)[0]["frac_reward_zero_std"] == 0.5
    assert runs.lines(run)[0]["completions/mean_length"] > 0


@pytest.mark.parametrize(
    "options", [{"loss_type": "grpo"}, {"loss_type": "dapo", "num_iterations": 2}, {"loss_type": "dr_grpo"},
                {"loss_type": "bnpo", "top_entropy_quantile": 0.3}],
    ids=lambda options: options["loss_type"],
)  # fmt: skip
def test_leaving_out_what_trains_nothing_changes_nothing(tmp_path, monkeypatch, options):
    from fastpo.online.rollouts import Rollouts

    options = {"adam_epsilon": 1e-3, **options}
    rest = {"reward_funcs": some_worth_alike}
    one = runs.train(tmp_path / "one", rest=rest, **options)
    monkeypatch.setattr(Rollouts, "_every_token_trains", lambda self: True)
    other = runs.train(tmp_path / "other", rest=rest, **options)
    assert (runs.weights(one.model) - runs.weights(other.model)).abs().max() < 1e-6
    for mine, theirs in zip(runs.lines(one), runs.lines(other), strict=True):
        for name in mine.keys() - {"entropy", "mean_token_accuracy", "packing_efficiency", "shared_prompt_savings"}:
            assert mine[name] == pytest.approx(theirs[name], abs=1e-5), name


def test_a_prompt_is_in_the_trunk_once_for_its_responses(tmp_path, monkeypatch):
    trunk = Trunk(monkeypatch)
    options = {"max_steps": 1, "num_generations": 8, "share_prompts": "always", "beta": 0.1, "num_iterations": 2}
    rows = runs.prompts(1)
    runs.train(tmp_path, rows, rest={"sampler": trunk.sampler}, **options)
    ids = Toy.tokenizer()(rows[0]["prompt"])["input_ids"]
    own = sum(len(runs.response_ids(ids, k)) - 1 for k in range(8))
    # Once for the old log-probabilities, once for the reference's, once to train.
    assert [tokens for _, tokens, _ in trunk.batches] == [len(ids) + own] * 3
    assert [grad for grad, *_ in trunk.batches] == [False, False, True]
