"""Online runs stopped within a generation, groups larger than a micro-batch, and what a newcomer tries."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import online_runs as runs  # noqa: E402
from conftest import Toy  # noqa: E402
from fastpo.checkpoints import checkpoint, endings, weights  # noqa: E402
from fastpo.errors import ConfigError, DataError, TrainingError  # noqa: E402
from fastpo.losses.table import resolve_terms  # noqa: E402
from fastpo.losses.tokens import Tokens, Totals  # noqa: E402
from fastpo.online import rollouts as online_rollouts  # noqa: E402
from fastpo.training.micro_batches import MicroBatches  # noqa: E402
from fastpo.training.policy_terms import PolicyMetrics  # noqa: E402

# ---------------------------------------------------------------- stopped within a step


def interrupted(monkeypatch, name, call):
    """Ctrl-C in the `call`-th call of this method of Rollouts."""
    method, seen = getattr(online_rollouts.Rollouts, name), []

    def stopping(self, *args, **kwargs):
        seen.append(None)
        if len(seen) == call:
            raise KeyboardInterrupt
        return method(self, *args, **kwargs)

    monkeypatch.setattr(online_rollouts.Rollouts, name, stopping)


class BeforeUpdate:
    """Ctrl-C between the gradients of a step and its update."""

    def __init__(self, done):
        self.done = done

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.done:
            raise KeyboardInterrupt


def some_left_out(completion_ids, **_):
    return [None if sum(ids) % 4 == 0 else runs.worth(ids) for ids in completion_ids]


ENTROPY = {"use_adaptive_entropy": True, "entropy_target": 3.6, "entropy_coef": 0.1, "entropy_coef_delta": 0.02}
STOPPED = {
    "scoring": ({"steps_per_generation": 2, "num_iterations": 2, "beta": 0.05, "max_steps": 6}, "reference_logps", 2),
    "scoring, drawn anew": ({}, "_score", 3),
    "update": ({}, None, 2),
    "update, inside a generation": ({"num_iterations": 3}, None, 1),
    "update, entropy": (ENTROPY, None, 2),
    "drawing, entropy": (ENTROPY, "_ask", 3),
}


@pytest.mark.parametrize("case", STOPPED)
def test_stopped_within_a_step(tmp_path, monkeypatch, case):
    options, name, call = STOPPED[case]

    def run(folder, *callbacks):
        rest = {"reward_funcs": some_left_out, "sampler": None, "callbacks": list(callbacks)}
        more = {"max_steps": 4, "logging_steps": 2, "save_steps": 50, **options}
        return runs.train(folder, rest=rest, save_strategy="steps", resume_from_checkpoint="auto", **more)

    whole = run(tmp_path / "whole")
    assert any(line.get("left_out") for line in whole.log_history)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if name is not None:
            interrupted(patch, name, call)
        run(tmp_path / "stopped", *([BeforeUpdate(call)] if name is None else []))
    found = run(tmp_path / "stopped")
    assert torch.equal(runs.weights(found.model), runs.weights(whole.model))
    assert runs.lines(found)[:-1] == runs.lines(whole)[:-1]


# ---------------------------------------------------------------- groups and micro-batches


@pytest.mark.parametrize(
    "options", [{}, {"beta": 0.05, "num_iterations": 2}, {"num_iterations": 2, "top_entropy_quantile": 0.5}]
)
def test_a_group_that_no_micro_batch_holds_is_cut(tmp_path, monkeypatch, options):
    """Responses go through the model one by one, with the same numbers; a run goes on inside such a generation."""
    sizes = []
    batch = MicroBatches.batch

    def noted(self, *args, **kwargs):
        made = batch(self, *args, **kwargs)
        if torch.is_grad_enabled():
            sizes.append(made.cu_seqlens[-1])
        return made

    monkeypatch.setattr(MicroBatches, "batch", noted)
    options = {"max_steps": 4, "adam_epsilon": 1e-3, **options}
    whole = runs.train(tmp_path / "whole", max_tokens=4096, **options)
    large = max(sizes)
    sizes.clear()
    cut = runs.train(tmp_path / "cut", max_tokens=24, **options)
    assert max(sizes) <= 24 < large
    assert (runs.weights(cut.model) - runs.weights(whole.model)).abs().max() < 1e-5
    one, other = runs.lines(cut)[:-1], runs.lines(whole)[:-1]
    for name in ("loss", "reward", "num_tokens", "kl", "clip_ratio/region_mean"):
        assert [line.get(name) for line in one] == pytest.approx([line.get(name) for line in other], abs=1e-5), name

    saved = {"max_tokens": 24, "save_strategy": "steps", "save_steps": 50, "resume_from_checkpoint": "auto"}
    with pytest.raises(KeyboardInterrupt):
        runs.train(tmp_path / "stopped", rest={"callbacks": [runs.Stop(1)]}, **options, **saved)
    found = runs.train(tmp_path / "stopped", **options, **saved)
    assert torch.equal(runs.weights(found.model), runs.weights(cut.model))


def test_what_stands_in_for_long_responses_is_not_computed(tmp_path, monkeypatch):
    """Nor hashed: the check of weights after a failure, and what a run is known by, take short ones."""
    seen = []
    fingerprint, gives = checkpoint.data_fingerprint, weights.WeightCheck._gives_numbers
    ended = []
    monkeypatch.setattr(endings, "ending_ids", lambda tokenizer, examples: ended.extend(examples) or [])

    def hashed(examples):
        seen.append(sum(len(r) for e in examples for r in e.responses))
        return fingerprint(examples)

    def checked(self):
        seen.append(sum(len(r) for e in self.rows for r in e.responses))
        return gives(self)

    monkeypatch.setattr(checkpoint, "data_fingerprint", hashed)
    monkeypatch.setattr(weights.WeightCheck, "_gives_numbers", checked)

    class Fail:
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise TrainingError("enough")

    with pytest.raises(TrainingError, match="enough"):
        runs.train(tmp_path, max_length=None, max_completion_length=400, rest={"callbacks": [Fail()]},
                   save_strategy="steps", save_steps=50)  # fmt: skip
    assert not ended  # token 0 may be a special token
    assert len(seen) == 2 and max(seen) < 8 * 4 * 17


# ---------------------------------------------------------------- options, errors, logs


@pytest.mark.parametrize("options", [{"loss_type": "rloo"}, {"loss_type": "rloo", "beta": 0.5}])
def test_rloo_takes_a_given_reference(tmp_path, options):
    other = runs.model(3)
    given = runs.train(tmp_path / "given", rest={"ref_model": other}, **options)
    own = runs.train(tmp_path / "own", **options)
    assert runs.lines(own)[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert runs.lines(given)[0]["kl"] != pytest.approx(0.0, abs=1e-3)


def test_rloo_moves_its_reference(tmp_path):
    result = runs.train(tmp_path, loss_type="rloo", sync_ref_model=True, ref_model_sync_steps=1,
                        ref_model_mixup_alpha=1.0)  # fmt: skip
    assert all(abs(line["kl"]) < 1e-5 for line in runs.lines(result)[:-1])  # it is where the policy is


@pytest.mark.parametrize("loss_type", ["grpo", "rloo"])
def test_a_reference_that_nothing_reads(tmp_path, loss_type):
    with pytest.raises(ConfigError, match=rf"ref_model is given, and {loss_type}, whose beta is 0, has no .*set beta"):
        runs.train(tmp_path, rest={"ref_model": runs.model()}, loss_type=loss_type, beta=0.0)


def test_vespo_logs_the_mean_weight_of_responses(tmp_path):
    """On policy every weight is 1."""
    result = runs.train(tmp_path, loss_type="vespo", learning_rate=0.0)
    assert all(line["vespo/phi_seq_mean"] == pytest.approx(1.0, abs=1e-4) for line in runs.lines(result)[:-1])


def test_means_of_what_went_through_the_model():
    """Over micro-batches of different sizes; clip ratios are of all tokens of the step."""
    metrics = PolicyMetrics(resolve_terms(["vespo"], None)[0])
    logp = torch.full((5,), -1.0)
    parts = [Tokens(logp[:2], torch.ones(1), torch.tensor([0, 2])),
             Tokens(logp[2:], torch.ones(2), torch.tensor([0, 1, 3]))]  # fmt: skip
    sums = metrics.nothing(torch.device("cpu"))
    for part in parts:
        sums = metrics.joined(sums, metrics.sums(part))

    class One:
        sum_ = max_ = staticmethod(lambda x: x)

    assert metrics.of_step(sums, Totals(100.0, 50.0), One()).tolist() == pytest.approx([1.0])


def test_log_extra_takes_anything(tmp_path):
    def logging(completions, log_extra, **_):
        things = [torch.ones(2), np.float32(0.5), Path("x"), float("nan")]
        log_extra("thing", (things * len(completions))[: len(completions)])
        return [float(len(c)) for c in completions]

    runs.train(tmp_path, rest={"reward_funcs": logging}, log_completions=True, max_steps=1)
    (file,) = (tmp_path / "completions").glob("*.jsonl")
    found = [json.loads(line)["thing"] for line in file.read_text().splitlines()]
    assert found[:3] == [[1.0, 1.0], 0.5, "x"]


def test_completions_of_further_rounds_are_written(tmp_path):
    rows = runs.prompts(8)

    def some(prompts, completion_ids, **_):
        return [0.5 if p == prompts[0] else runs.worth(ids) for p, ids in zip(prompts, completion_ids)]

    runs.train(tmp_path, rows, rest={"reward_funcs": some}, log_completions=True, max_steps=1, dynamic_sampling=1)
    (file,) = (tmp_path / "completions").glob("*.jsonl")
    assert len({json.loads(line)["prompt"] for line in file.read_text().splitlines()}) == 3


@pytest.mark.parametrize("loss_type", ["online_dpo", "nash_md"])
def test_completions_of_preference_losses_are_written(tmp_path, loss_type):
    runs.train(tmp_path, loss_type=loss_type, per_device_train_batch_size=2, log_completions=True, max_steps=1)
    (file,) = (tmp_path / "completions").glob("*.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(found) == 8 and all(0 <= line["win_rate"] <= 1 and line["reward"] is not None for line in found)
    assert {line["source"] for line in found} == ({"policy"} if loss_type == "online_dpo" else {"policy", "mixture"})


def test_equal_rewards_with_a_kl_have_a_gradient(tmp_path, caplog):
    equal = {"reward_funcs": lambda completions, **_: [1.0] * len(completions)}
    runs.train(tmp_path / "kl", rest=equal, beta=0.1, max_steps=1)
    assert "no gradient" not in caplog.text
    runs.train(tmp_path / "none", rest=equal, max_steps=1)
    assert "no gradient" in caplog.text


def test_prompts_beyond_the_positions(tmp_path):
    """No response can be had: a step without a gradient, and the count of them."""
    long = " ".join(["w1"] * (Toy.model().config.max_position_embeddings + 1))
    rows = [{"prompt": long}] * 8
    result = runs.train(tmp_path, rows, rest={"sampler": None}, max_length=None, max_steps=1)
    assert runs.lines(result)[0]["left_out"] == 8


@pytest.mark.parametrize(
    ("sampler", "said"),
    [({"batchsize": 3}, "not 'batchsize'; did you mean 'batch_size'"), ({"base_url": "http://x"}, "engine: openai"),
     ({"mixture": 0.5}, "not 'mixture'")],
)  # fmt: skip
def test_options_that_the_sampler_in_this_process_has_not(tmp_path, sampler, said):
    with pytest.raises(ConfigError, match=said):
        runs.train(tmp_path, rest={"sampler": sampler})


@pytest.mark.parametrize(
    ("rows", "said"),
    [([{"question": "w1", "answer": "1"}], "grpo answers prompts, and the train data have no column 'prompt', only"),
     ([{"prompt": [{"role": "user", "content": "w1"}]}], "give texts in the place of turns")],
)  # fmt: skip
def test_rows_that_are_no_prompts(tmp_path, rows, said):
    with pytest.raises(DataError, match=said):
        runs.train(tmp_path, rows)


def test_a_column_that_is_not_there_is_not_likened_to_what_is_no_column(tmp_path):
    def right(completions, solution):
        return [1.0] * len(completions)

    with pytest.raises(ConfigError, match="needs a column 'solution', and the rows have, beside the prompt, number$"):
        runs.train(tmp_path, rest={"reward_funcs": right})


def test_weights_of_rewards_beside_a_judge_are_refused(tmp_path):
    judge = {"kind": "verifier", "verifier": "max_words", "n": 3}
    with pytest.raises(ConfigError, match="reward_weights are of reward_funcs, and here a judge compares"):
        runs.train(tmp_path, loss_type="online_dpo", reward_weights=[2.0], rest={"reward_funcs": None, "judge": judge})
