"""Online runs: what cannot be judged or drawn, options, evaluation, adapters and references, faces."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fastpo  # noqa: E402
import online_runs as runs  # noqa: E402
from conftest import Toy  # noqa: E402
from fastpo.errors import ConfigError, TrainingError  # noqa: E402

# ---------------------------------------------------------------- what cannot be judged or drawn


def some(what, bad):
    """The rewards of runs.by_ids, but for responses that `bad(k, ids)`: there it is `what`."""

    def function(completion_ids, **_):
        return [what if bad(k, ids) else runs.worth(ids) for k, ids in enumerate(completion_ids)]

    return function


def numbers(result):
    for line in runs.lines(result):
        for name, value in line.items():
            assert not isinstance(value, float) or math.isfinite(value), name


@pytest.mark.parametrize(
    ("what", "loss_type"), [(None, "grpo"), (math.nan, "dapo"), (math.inf, "rloo"), ("text", "online_ipo")]
)
def test_responses_without_a_reward_are_as_if_they_had_not_been_drawn(tmp_path, what, loss_type):
    """The first of each prompt's four: the run is one of three responses."""
    batch = {"per_device_train_batch_size": 2 if loss_type == "online_ipo" else 8}
    options = {"loss_type": loss_type, "adam_epsilon": 1e-3, "scale_rewards": None}
    left_out = runs.train(
        tmp_path / "some", rest={"reward_funcs": some(what, lambda k, ids: k % 4 == 0)}, **options, **batch
    )
    three = runs.Given(lambda prompt_ids, k, *_: runs.response_ids(prompt_ids, k + 1))
    batch = {"per_device_train_batch_size": 2 if loss_type == "online_ipo" else 6}
    fewer = runs.train(tmp_path / "fewer", rest={"sampler": three}, num_generations=3, **options, **batch)
    assert (runs.weights(left_out.model) - runs.weights(fewer.model)).abs().max() < 1e-6
    numbers(left_out)
    for mine, theirs in zip(runs.lines(left_out)[:-1], runs.lines(fewer)[:-1]):
        assert mine["left_out"] == 2 and "left_out" not in theirs
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        assert mine["reward"] == pytest.approx(theirs["reward"])


@pytest.mark.parametrize("kind", ["too many", "raises"])
def test_a_function_that_fails_for_a_while(tmp_path, kind, caplog):
    """At the second step nothing is judged: no gradient, said and counted."""

    def function(completion_ids, trainer_state, **_):
        if trainer_state.global_step == 1:
            if kind == "raises":
                raise ValueError("the service is away")
            return [1.0] * (len(completion_ids) + 1)
        return runs.by_ids(completion_ids)

    options = {"optim": "sgd", "learning_rate": 0.1, "weight_decay": 0.0}
    result = runs.train(tmp_path / "all", rest={"reward_funcs": function}, **options)
    numbers(result)
    first, second, third, _ = runs.lines(result)
    assert second["grad_norm"] == 0 and second["left_out"] == 8 and "reward" not in second
    assert first["grad_norm"] > 0 and third["grad_norm"] > 0 and "left_out" not in third
    assert "left out: 8 function" in caplog.text and "no gradient from this step's responses" in caplog.text


def test_all_of_a_prompt_left_out(tmp_path):
    """The step trains the other prompt alone."""
    result = runs.train(
        tmp_path / "one", rest={"reward_funcs": some(math.nan, lambda k, ids: k < 4)}, max_steps=1, adam_epsilon=1e-3
    )
    alone = runs.train(
        tmp_path / "other", runs.prompts(8)[1:], max_steps=1, per_device_train_batch_size=4, adam_epsilon=1e-3
    )
    assert (runs.weights(result.model) - runs.weights(alone.model)).abs().max() < 1e-6
    assert runs.lines(result)[0]["left_out"] == 4


def test_a_function_that_never_judges_ends_the_run(tmp_path):
    with pytest.raises(TrainingError, match="could not judge any"):
        runs.train(tmp_path, rest={"reward_funcs": some(math.nan, lambda k, ids: True)})


@pytest.mark.parametrize("loss_type", ["grpo", "online_dpo", "nash_md"])
def test_a_sampler_that_fails_for_some_requests(tmp_path, caplog, loss_type):
    sampler = runs.Given(fails=lambda request: request.id in "02" and request.k < 3)
    batch = {} if loss_type == "grpo" else {"per_device_train_batch_size": 2}
    rest = {"sampler": sampler}
    if loss_type == "nash_md":  # half of the responses are the mixture's
        rest = {"sampler": None}
    result = runs.train(tmp_path, rest=rest, loss_type=loss_type, **batch)
    numbers(result)
    if loss_type != "nash_md":
        assert runs.lines(result)[0]["left_out"] == 3
        assert "not sampled: timeout" in caplog.text


def test_a_sampler_that_fails_for_all(tmp_path):
    """One step's: no gradient; the next goes on."""
    options = {"optim": "sgd", "weight_decay": 0.0}
    sampler = runs.Given(fails=lambda request: request.id in "23")
    result = runs.train(tmp_path, rest={"sampler": sampler}, **options)
    numbers(result)
    assert [line["grad_norm"] > 0 for line in runs.lines(result)[:-1]] == [True, False, True]


# ---------------------------------------------------------------- options


def test_truncated_responses_are_masked(tmp_path):
    """They count in the means, and what is drawn in their place changes nothing."""

    def other(prompt_ids, k, *_):
        ids = runs.response_ids(prompt_ids, k)
        return [*ids[:-1], 50] if ids[-1] != runs.EOS else ids

    rest = {"reward_funcs": lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids]}
    one, two = (
        runs.train(tmp_path / name, rest={**rest, "sampler": runs.Given(ids)}, mask_truncated_completions=True)
        for name, ids in (("a", runs.response_ids), ("b", other))
    )
    assert torch.equal(runs.weights(one.model), runs.weights(two.model))
    trained = runs.train(tmp_path / "c", rest=rest)
    assert not torch.equal(runs.weights(one.model), runs.weights(trained.model))
    assert runs.lines(one)[0]["completions/clipped_ratio"] == 0.25


def test_dynamic_sampling_asks_for_other_prompts(tmp_path):
    """Of prompts 0 and 2 all responses are worth the same."""

    def function(completion_ids, number, **_):
        return [1.0 if n in (0, 2) else runs.worth(ids) for ids, n in zip(completion_ids, number)]

    sampler = runs.Given()
    rest = {"reward_funcs": function, "sampler": sampler}
    result = runs.train(tmp_path, rest=rest, dynamic_sampling=2, max_steps=1)
    asked = [request.id for request in sampler.requests]
    assert set(asked[:8]) == {"0", "1"} and len(set(asked)) in (3, 4)
    replaced = next(row for row in asked[8:] if row not in "02")
    plain = [runs.prompts(8)[1], runs.prompts(8)[int(replaced)]]
    alone = runs.train(tmp_path / "alone", plain, max_steps=1)
    assert (runs.weights(result.model) - runs.weights(alone.model)).abs().max() < 1e-6


def test_dynamic_sampling_fills_every_place_that_it_can(tmp_path):
    """One prompt a step teaches, in every second round another one does."""

    def function(completion_ids, number, **_):
        return [runs.worth(ids) if n >= 12 else 1.0 for ids, n in zip(completion_ids, number)]

    sampler = runs.Given()
    rest = {"reward_funcs": function, "sampler": sampler}
    result = runs.train(
        tmp_path, runs.prompts(16), rest=rest, dynamic_sampling=15, max_steps=1, per_device_train_batch_size=16
    )
    assert {"12", "13", "14", "15"} <= {request.id for request in sampler.requests}
    assert runs.lines(result)[0]["grad_norm"] > 0
    tokens = sum(len(runs.response_ids(Toy.tokenizer()(runs.prompts(16)[n]["prompt"])["input_ids"], k))
                 for n in (12, 13, 14, 15) for k in range(4))  # fmt: skip
    prompts = sum(len(Toy.tokenizer()(runs.prompts(16)[n]["prompt"])["input_ids"]) for n in (12, 13, 14, 15))
    assert runs.lines(result)[0]["num_tokens"] == tokens + 4 * prompts


def test_penalties_are_rewards_of_their_own(tmp_path):
    result = runs.train(tmp_path, overlong_buffer=4, overlong_penalty=0.5, missing_eos_penalty=2.0, max_steps=1)
    line = runs.lines(result)[0]
    ids = [runs.response_ids(Toy.tokenizer()(row["prompt"])["input_ids"], k)
           for row in runs.prompts(8)[:2] for k in range(4)]  # fmt: skip
    overlong = [max(-1.0, min(0.0, (runs.LONGEST - 4 - len(i)) / 4)) for i in ids]
    missing = [-float(i[-1] != runs.EOS) for i in ids]
    assert line["rewards/overlong/mean"] == pytest.approx(sum(overlong) / 8)
    assert line["rewards/missing_eos/mean"] == pytest.approx(sum(missing) / 8)
    rewards = [runs.worth(i) + 0.5 * o + 2.0 * m for i, o, m in zip(ids, overlong, missing)]
    assert line["reward"] == pytest.approx(sum(rewards) / 8)


def test_completions_are_written(tmp_path):
    def function(completion_ids, log_extra, log_metric, **_):
        log_extra("length", [len(ids) for ids in completion_ids])
        log_metric("mine", 3.0)
        return runs.by_ids(completion_ids)

    result = runs.train(tmp_path, rest={"reward_funcs": function}, log_completions=True, max_steps=2)
    files = sorted((tmp_path / "completions").iterdir())
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert [len(of_file) for of_file in lines] == [8, 8]
    first = lines[0][0]
    assert first["prompt"] == runs.prompts(1)[0]["prompt"] and first["function"] == pytest.approx(
        runs.worth(runs.response_ids(Toy.tokenizer()(first["prompt"])["input_ids"], 0))
    )
    assert isinstance(first["advantage"], float) and first["length"] > 0
    assert runs.lines(result)[0]["mine"] == 3.0


# ---------------------------------------------------------------- evaluation, callbacks


class Seen:
    def __init__(self):
        self.events = []

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(("step", state.global_step))

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.events.append(("evaluate", state.global_step, metrics))


def test_evaluation_and_the_best_by_reward(tmp_path):
    """The reward falls from step to step, so that the first evaluation's weights are the best."""
    steps = []

    def function(completion_ids, trainer_state, **_):
        steps.append(trainer_state.global_step)
        return [worth - trainer_state.global_step for worth in runs.by_ids(completion_ids)]

    seen = Seen()
    rest = {"eval_dataset": runs.prompts(3, 5), "reward_funcs": function, "callbacks": [seen]}
    options = dict(max_steps=4, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)
    result = runs.train(
        tmp_path, rest=rest, load_best_model_at_end=True, metric_for_best_model="reward", greater_is_better=True,
        num_generations_eval=3, **options,
    )  # fmt: skip
    evaluations = [line for line in runs.lines(result) if "eval_reward" in line]
    assert [line["step"] for line in evaluations] == [2, 4]
    assert evaluations[0]["eval_reward"] - evaluations[1]["eval_reward"] == pytest.approx(2, abs=1e-6)
    assert {"eval_reward_std", "eval_completions/mean_length", "eval_rewards/function/mean"} <= evaluations[0].keys()
    assert [event[:2] for event in seen.events] == [
        ("step", 1), ("step", 2), ("evaluate", 2), ("step", 3), ("step", 4), ("evaluate", 4),
    ]  # fmt: skip
    assert "eval_reward" in seen.events[2][2]
    assert result.state.best_global_step == 2
    two = runs.train(tmp_path / "two", rest={"reward_funcs": function}, max_steps=2)
    assert torch.equal(runs.weights(result.model), runs.weights(two.model))


def test_an_evaluation_is_of_the_policy_alone(tmp_path):
    """Whoever else gives the responses that are trained on."""
    lines = {}
    for loss_type in ("online_ipo", "ipo_md", "nash_md", "xpo"):
        rest = {"sampler": None, "eval_dataset": runs.prompts(3, 5)}
        options = {"loss_type": loss_type, "per_device_train_batch_size": 2, "temperature": 1.0, "beta": 0.1}
        result = runs.train(tmp_path / loss_type, rest=rest, eval_on_start=True, max_steps=1, **options)
        line = next(line for line in runs.lines(result) if "eval_reward" in line)
        lines[loss_type] = {k: v for k, v in line.items() if k.startswith(("eval_reward", "eval_completions"))}
    assert len({json.dumps(line) for line in lines.values()}) == 1


def test_an_evaluation_before_training_and_after(tmp_path):
    """It is the one of eval_on_start, and the run is as without."""
    options = {"loss_type": "rloo", "temperature": 1.0, "optim": "sgd", "learning_rate": 0.1}
    rest = {"sampler": None, "eval_dataset": runs.prompts(3, 5)}
    plain = runs.train(tmp_path / "plain", rest=rest, eval_on_start=True, **options)
    trainer = fastpo.Trainer(
        runs.model(), runs.prompts(8), args=runs.options(tmp_path / "trainer", **options), reward_funcs=runs.by_ids,
        processing_class=Toy.tokenizer(), eval_dataset=runs.prompts(3, 5),
    )  # fmt: skip
    before = trainer.evaluate()
    assert before["eval_reward"] == plain.log_history[0]["eval_reward"]
    trainer.train()
    assert torch.equal(runs.weights(trainer.model), runs.weights(plain.model))
    after = trainer.evaluate()
    assert math.isfinite(after["eval_reward"]) and after["eval_kl"] != before["eval_kl"]


def test_an_evaluation_does_not_change_the_run(tmp_path):
    options = {"temperature": 1.0, "max_steps": 3}
    rest = {"sampler": None}
    one = runs.train(tmp_path / "one", rest=rest, **options)
    evaluated = {**rest, "eval_dataset": {"a": runs.prompts(3, 5), "b": runs.prompts(2, 6)}}
    two = runs.train(tmp_path / "two", rest=evaluated, eval_strategy="steps", eval_steps=1, **options)
    assert torch.equal(runs.weights(one.model), runs.weights(two.model))
    assert {"eval_a_reward", "eval_b_reward"} <= {name for line in two.log_history for name in line}


# ---------------------------------------------------------------- adapters and references


def lora(**changes):
    import peft

    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **changes)


@pytest.mark.parametrize("loss_type", ["grpo", "rloo", "online_dpo", "nash_md", "xpo"])
def test_an_adapter_has_its_base_as_reference(tmp_path, loss_type):
    """The KL begins at 0, and a copy of the base as ref_model gives the same run."""
    batch = {} if loss_type in ("grpo", "rloo") else {"per_device_train_batch_size": 2}
    options = {"loss_type": loss_type, "beta": 0.1, "learning_rate": 1e-2, "adam_epsilon": 1e-3, **batch}
    torch.manual_seed(0)
    rest = {"sampler": None, "peft_config": lora()}
    one = runs.train(tmp_path / "one", rest=rest, **options)
    two = runs.train(tmp_path / "two", rest={**rest, "ref_model": runs.model()}, **options)
    assert (runs.weights(one.model) - runs.weights(two.model)).abs().max() < 1e-5
    if loss_type in ("grpo", "rloo"):
        assert runs.lines(one)[0]["kl"] == pytest.approx(0, abs=1e-5) and runs.lines(one)[2]["kl"] != 0
    base = dict(runs.model().named_parameters())
    for name, weight in one.model.named_parameters():
        if "lora" not in name:
            plain = name.replace("base_model.model.", "").replace(".base_layer", "")
            assert torch.equal(weight, base[plain])


def test_a_given_reference(tmp_path):
    one = runs.train(tmp_path / "one", rest={"ref_model": runs.model(3)}, beta=0.1)
    assert runs.lines(one)[0]["kl"] > 0.1
    runs.model(3).save_pretrained(tmp_path / "ref")
    two = runs.train(tmp_path / "two", rest={"ref_model": str(tmp_path / "ref")}, beta=0.1)
    assert torch.equal(runs.weights(one.model), runs.weights(two.model))
    with pytest.raises(ConfigError, match="no reference"):
        runs.train(tmp_path / "none", rest={"ref_model": runs.model(3)})


def test_a_reference_that_moves(tmp_path):
    """At every step all the way: each step's KL begins at 0."""
    options = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    moving = runs.train(tmp_path / "moving", **options)
    assert all(line["kl"] == pytest.approx(0, abs=1e-6) for line in runs.lines(moving)[:-1])
    fixed = runs.train(tmp_path / "fixed", beta=0.1)
    assert runs.lines(fixed)[2]["kl"] > 1e-4


@pytest.mark.parametrize("loss_type", ["grpo", "nash_md"])
def test_bf16(tmp_path, loss_type):
    batch = {} if loss_type == "grpo" else {"per_device_train_batch_size": 2}
    options = {"loss_type": loss_type, "beta": 0.05, "num_iterations": 2, **batch}
    result = runs.train(tmp_path, rest={"sampler": None}, bf16=True, **options)
    numbers(result)
    assert next(result.model.parameters()).dtype == torch.float32
    first = runs.lines(result)[0]
    assert first.get("clip_ratio/region_mean", 0.0) == 0  # the same pass gives the same numbers


def test_temperature_is_of_the_distribution(tmp_path):
    """A temperature t is the model with its head divided by t."""
    rest = {"sampler": runs.Given()}
    options = {"max_steps": 1, "optim": "sgd", "learning_rate": 1e-3, "weight_decay": 0.0, "beta": 0.1}
    hot = runs.train(tmp_path / "hot", rest=rest, temperature=2.0, **options)
    other = runs.model()
    with torch.no_grad():
        other.lm_head.weight.div_(2.0)
    cold = runs.train(tmp_path / "cold", rest={**rest, "model": other}, **options)
    assert runs.lines(hot)[0]["entropy"] == pytest.approx(runs.lines(cold)[0]["entropy"], abs=1e-5)
    start = dict(runs.model().named_parameters())
    trunk = lambda run: torch.cat([(p - start[n]).flatten() for n, p in run.model.named_parameters()  # noqa: E731
                                   if n != "lm_head.weight"])  # fmt: skip
    assert torch.allclose(trunk(hot), trunk(cold), atol=1e-8)
    assert trunk(hot).abs().max() > 1e-6


# ---------------------------------------------------------------- faces


def test_as_trl_s_trainer_is_used(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    options = {k: v for k, v in runs.options(tmp_path / "trl").items()
               if k not in ("report", "save_final", "train_sampling_strategy")}  # fmt: skip
    args = trl.GRPOConfig(**{**options, "shuffle_dataset": False})
    trainer = fastpo.Trainer(
        model=runs.model(), reward_funcs=runs.by_ids, args=args, train_dataset=Dataset.from_list(runs.prompts(8)),
        processing_class=Toy.tokenizer(), sampler=runs.Given(),
    )  # fmt: skip
    trainer.train()
    plain = runs.train(tmp_path / "plain")
    assert torch.equal(runs.weights(trainer.model), runs.weights(plain.model))
    metrics = trainer.evaluate(runs.prompts(2, 4))
    assert "eval_reward" in metrics


def test_conversations(tmp_path):
    """Prompts of turns go through the template, and reward functions get turns."""
    seen = []

    def function(prompts, completions, **_):
        seen.append((prompts[0], completions[0]))
        return [float(len(c[0]["content"])) for c in completions]

    tokenizer = Toy.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w2 {% endif %}"
    )
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in runs.prompts(8)]
    rest = {"reward_funcs": function, "processing_class": tokenizer, "sampler": None}
    result = runs.train(tmp_path, rows, rest=rest)
    numbers(result)
    prompt, completion = seen[0]
    assert prompt[0]["role"] == "user" and completion[0]["role"] == "assistant"
