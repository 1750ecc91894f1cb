"""What scripts read of `fastpo.Trainer` before and after a run: evaluate, compute_metrics, rows, tags, files."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import fastpo
from fastpo.errors import ConfigError
from fastpo.losses.table import LOSSES


@pytest.fixture
def trainer(toy, tmp_path):
    count = iter(range(100))

    def make(model=None, rows=None, **given):
        defaults = dict(
            output_dir=str(tmp_path / f"run{next(count)}"), disable_tqdm=True, use_cpu=True, bf16=False,
            logging_steps=1, max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2,
            lr_scheduler_type="constant", gradient_checkpointing=False, save_final=False, report=False,
        )  # fmt: skip
        arguments = ("ref_model", "eval_dataset", "peft_config", "compute_metrics", "callbacks")
        own = {name: given.pop(name) for name in arguments if name in given}
        return fastpo.Trainer(
            toy.model() if model is None else model, toy.rows(8) if rows is None else rows,
            processing_class=toy.tokenizer(), args={**defaults, **given}, **own,
        )  # fmt: skip

    return make


def unpaired(rows):
    out = [{"prompt": r["prompt"], "completion": r["chosen"], "label": True} for r in rows[::2]]
    return out + [{"prompt": r["prompt"], "completion": r["rejected"], "label": False} for r in rows[1::2]]


# --------------------------------------------------------------------------------------------------------- evaluate


def test_evaluate_before_and_after(trainer, toy):
    """At the start the loss is its closed form; of the trainer's own set the reference is that of the start for ever,
    and an evaluation leaves the run as it is."""
    rows = toy.rows(5, seed=3)
    run = trainer(eval_dataset=rows)
    before = run.evaluate()
    assert before["eval_loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert run.state.log_history[-1]["eval_loss"] == before["eval_loss"] and run.state.log_history[-1]["step"] == 0
    given = run.evaluate(rows, metric_key_prefix="test")
    assert given["test_loss"] == before["eval_loss"] and not [k for k in given if k.startswith("eval")]
    result = run.train()
    after = run.evaluate()
    assert after["eval_loss"] != pytest.approx(math.log(2), rel=1e-3)

    plain = trainer(eval_dataset=rows, eval_strategy="steps", eval_steps=2).train()
    of_run = [line for line in plain.log_history if "eval_loss" in line][-1]
    assert of_run["eval_loss"] == pytest.approx(after["eval_loss"], rel=1e-6)
    losses = [[line["loss"] for line in r.log_history if "loss" in line] for r in (result, plain)]
    assert losses[0] == losses[1]


def test_evaluate_several(trainer, toy):
    sets = {"a": toy.rows(3, seed=1), "b": toy.rows(4, seed=2)}
    run = trainer(eval_dataset=sets)
    assert {k for k in run.evaluate() if k.endswith("_loss")} == {"eval_a_loss", "eval_b_loss"}
    assert {k for k in run.evaluate(sets) if k.endswith("_loss")} == {"eval_a_loss", "eval_b_loss"}
    assert set(run.eval_dataset) == {"a", "b"} and len(run.eval_dataset["b"]) == 4


def test_rows_given_after_training(trainer, toy, tmp_path):
    """Their reference is an adapter's base, a ref_model, or the model loaded again by its name; else there is none."""
    from peft import LoraConfig

    rows = toy.rows(5, seed=3)
    expected = trainer(eval_dataset=rows)
    expected.train()
    expected = expected.evaluate()["eval_loss"]

    run = trainer()
    run.train()
    with pytest.raises(ConfigError, match="Cannot compute reference log-probs for a dataset passed to") as caught:
        run.evaluate(rows)
    assert "\n" not in str(caught.value) and "precompute" not in str(caught.value)

    run = trainer(ref_model=toy.model())
    run.train()
    assert run.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-6)

    toy.model().save_pretrained(tmp_path / "model")
    run = trainer(str(tmp_path / "model"))
    run.train()
    assert run.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-6)
    run.config.precompute_ref_log_probs = True
    with pytest.raises(ConfigError, match="or set precompute_ref_log_probs=False, so that it is loaded again"):
        run.evaluate(rows)
    run.config.precompute_ref_log_probs = False
    toy.model(seed=1).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="is no longer what the run began with"):
        run.evaluate(rows)

    adapter = LoraConfig(target_modules=["q_proj"], init_lora_weights=True)
    run = trainer(peft_config=adapter, eval_dataset=rows)
    run.train()
    assert run.evaluate(rows)["eval_loss"] == pytest.approx(run.evaluate()["eval_loss"], rel=1e-6)

    run = trainer(loss_type="simpo")  # without a reference
    run.train()
    assert math.isfinite(run.evaluate(rows)["eval_loss"])


def test_a_prefix_of_nothing(trainer, toy):
    """As in transformers; it is a prefix, and not that there is none."""
    run = trainer(eval_dataset=toy.rows(3))
    assert "_loss" in run.evaluate(metric_key_prefix="") and "_loss" in run.evaluate(toy.rows(3), metric_key_prefix="")


def test_own_sets_with_sums_of_their_own(trainer, toy):
    """They need no reference that is still there."""
    sums = {"ref_chosen_logps": -20.0, "ref_rejected_logps": -21.0}
    rows = [{**row, **sums} for row in toy.rows(8)]
    run = trainer(rows=rows, eval_dataset=rows[:3], eval_strategy="steps", eval_steps=2)
    before = run.evaluate()["eval_loss"]
    history = run.train().log_history
    after = run.evaluate()["eval_loss"]
    assert after != before and after == [line["eval_loss"] for line in history if "eval_loss" in line][-2]


def test_a_second_call_counts_anew(trainer, capfd):
    """Tokens and the rates from them are of the call, as steps of the plan and seconds are."""
    run = trainer()
    first, second = run.train().metrics, run.train().metrics
    assert first["num_tokens"] == second["num_tokens"] > 0
    for metrics in (first, second):
        rate = metrics["num_tokens"] / metrics["train_runtime"]
        assert metrics["tokens_per_second"] == pytest.approx(rate)


@pytest.mark.parametrize("loss_type", ["dpo", "inpo", "tdpo2"])
def test_a_second_call_keeps_the_reference(trainer, toy, tmp_path, monkeypatch, loss_type):
    """It is the policy at its start, in the cache too, and not what the first call has made of it."""
    monkeypatch.setenv("FASTPO_CACHE", str(tmp_path / "cache"))
    sums = {"ref_chosen_logps": -20.0, "ref_rejected_logps": -21.0, "prev_chosen_logps": -22.0,
            "prev_rejected_logps": -20.0}  # fmt: skip
    rows = [{**row, **sums} for row in toy.rows(8)] if loss_type == "inpo" else toy.rows(8)
    options = dict(
        loss_type=loss_type, train_sampling_strategy="sequential", per_device_train_batch_size=8, max_steps=1
    )  # fmt: skip
    run = trainer(rows=rows, **options)
    run.train()
    cached = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.safetensors")}
    trained = copy.deepcopy(run.model)
    run.train()
    got = [line["loss"] for line in run.state.log_history if "loss" in line][-1]
    assert {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.safetensors")} == cached
    again = {} if loss_type == "inpo" else {"ref_model": toy.model()}
    expected = trainer(trained, rows=rows, **again, **options).train().log_history[0]["loss"]
    assert got == pytest.approx(expected, rel=1e-6)


def test_moving_reference(trainer, toy):
    """`ref_model` is the reference that moves, as it is; rows are compared with it."""
    rows = toy.rows(4, seed=3)
    run = trainer(sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0)
    assert run.evaluate(rows)["eval_loss"] == pytest.approx(math.log(2), rel=1e-6)
    before = {n: p.clone() for n, p in run.ref_model.named_parameters()}
    policy = dict(run.model.named_parameters())
    assert all(torch.equal(before[n], p) and p is not run.ref_model.get_parameter(n) for n, p in policy.items())
    run.train()
    for name, parameter in run.model.named_parameters():
        assert torch.equal(run.ref_model.get_parameter(name), parameter) and not torch.equal(before[name], parameter)
    assert run.evaluate(rows)["eval_loss"] == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_evaluate_unpaired(trainer, toy, loss_type):
    rows = unpaired(toy.rows(6, seed=2))
    run = trainer(rows=unpaired(toy.rows(8)), loss_type=loss_type, eval_dataset=rows)
    assert run.evaluate(rows)["eval_loss"] == run.evaluate()["eval_loss"] == pytest.approx(0.5, rel=1e-6)
    run.train()
    metrics = run.evaluate()
    assert metrics["eval_loss"] != 0.5 and ("eval_kl" in metrics) == (loss_type == "kto")
    assert set(run.stepwide.mismatched) == ({"train", "eval"} if loss_type == "kto" else set())


def test_evaluate_is_refused(trainer, toy):
    with pytest.raises(ConfigError, match="evaluate\\(\\) needs rows"):
        trainer().evaluate()
    with pytest.raises(ConfigError, match="evaluate\\(\\) takes no rows with inpo"):
        trainer(loss_type="inpo").evaluate(toy.rows(2))
    own = trainer(loss_type="inpo", eval_dataset=toy.rows(2))
    with pytest.raises(ConfigError, match="no reference with inpo before training: set eval_strategy"):
        own.evaluate()
    own.train()
    assert math.isfinite(own.evaluate()["eval_loss"])


def test_streams_and_precomputed(trainer, toy):
    datasets = pytest.importorskip("datasets", reason="streams are of that library")
    stream = datasets.Dataset.from_list(toy.rows(8)).to_iterable_dataset()
    for given in ({"rows": stream}, {"eval_dataset": stream}, {"eval_dataset": {"a": stream}}):
        with pytest.raises(ConfigError, match="precompute_ref_log_probs=True is not supported with IterableDataset"):
            trainer(precompute_ref_log_probs=True, **given)


# ------------------------------------------------------------------------------------------------- compute_metrics


def test_compute_metrics(trainer, toy):
    """It gets each pair's log-probabilities in the order of the rows, whatever the packing; the loss follows."""
    rows, seen = toy.rows(7, seed=3), []

    def compute(evaluated):
        seen.append(evaluated)
        return {"wins": np.mean(evaluated.chosen_logps > evaluated.rejected_logps), "eval_own": 2}

    run = trainer(eval_dataset=rows, eval_strategy="steps", eval_steps=2, compute_metrics=compute, max_tokens=60)
    history = run.train().log_history
    line = next(line for line in history if "eval_loss" in line)
    x = seen[-1]
    assert x.rows.tolist() == list(range(7)) and x.label is None and x.chosen_logps.dtype == np.float32
    assert line["eval_wins"] == np.mean(x.chosen_logps > x.rejected_logps) and line["eval_own"] == 2.0
    arrays = map(torch.from_numpy, (x.chosen_logps, x.rejected_logps, x.ref_chosen_logps, x.ref_rejected_logps))
    assert LOSSES["dpo"](*arrays).mean().item() == pytest.approx(line["eval_loss"], rel=1e-5)
    assert x.metrics["loss"] == line["eval_loss"]

    alone = trainer(eval_dataset=rows[2:3], compute_metrics=compute)
    alone.evaluate()
    np.testing.assert_allclose(seen[-1].ref_chosen_logps, x.ref_chosen_logps[2:3], rtol=1e-5)


def test_compute_metrics_unpaired_and_sft(trainer, toy):
    seen = []

    def compute(evaluated):
        seen.append(evaluated)
        return {}

    rows = unpaired(toy.rows(6, seed=2))
    trainer(rows=rows, loss_type="apo_zero_unpaired", eval_dataset=rows, compute_metrics=compute).evaluate()
    assert seen[-1].label.tolist() == [r["label"] for r in rows] and seen[-1].rejected_logps is None
    simpo = trainer(loss_type="simpo", eval_dataset=toy.rows(3), compute_metrics=compute)
    simpo.evaluate()
    assert seen[-1].ref_chosen_logps is None and len(seen[-1].rejected_logps) == 3


def test_compute_metrics_is_refused_what_is_not_kept(trainer, toy):
    def unpack(evaluated):
        logits, labels = evaluated
        return {}

    for compute, message in (
        (lambda e: {"x": e.predictions.argmax(-1)}, "compute_metrics reads predictions: fastpo keeps no logits"),
        (unpack, "compute_metrics reads predictions"),
        (lambda e: 3, "must return a dict of numbers by name, not 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainer(eval_dataset=toy.rows(2), compute_metrics=compute).evaluate()


# ------------------------------------------------------------------------------------------------- what is looked at


def test_rows(trainer, toy):
    run = trainer(eval_dataset=toy.rows(3, seed=1))
    tokenizer, row = run.processing_class, toy.rows(8)[2]
    assert len(run.train_dataset) == 8 and len(run.eval_dataset) == 3
    seen = run.train_dataset[2]
    assert (
        seen["prompt_ids"] == tokenizer(row["prompt"])["input_ids"] == next(iter(run.train_dataset[2:]))["prompt_ids"]
    )
    assert seen["chosen_ids"] == tokenizer(row["chosen"] + " <eos>")["input_ids"]
    assert run.eval_dataset is not None and trainer().eval_dataset is None
    unlabelled = trainer(rows=unpaired(toy.rows(4)), loss_type="kto").train_dataset[0]
    assert set(unlabelled) == {"prompt_ids", "completion_ids", "label"} and unlabelled["label"] is True


def test_models(trainer, toy):
    reference = toy.model()
    run = trainer(ref_model=reference)
    run.train()
    assert run.ref_model is reference
    assert trainer().ref_model is None
    model = toy.model()
    with pytest.raises(ConfigError, match="ref_model is the model that is trained"):
        trainer(model, ref_model=model)
    with pytest.raises(ConfigError, match="`train_dataset` is required"):
        fastpo.Trainer(toy.model())


def test_tags(trainer, toy, tmp_path):
    model = toy.model()
    model.add_model_tags(["mine"])
    run = trainer(model, loss_type=["dpo", "sft"], output_dir=str(tmp_path / "out"), save_final=True)
    assert run.model.model_tags == ["mine", "fastpo", "preference-optimization", "dpo", "sft"]
    run.train()
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.split("---")[1].count("\n- ") == 5 and "\n- mine\n" in card


def test_files(trainer, toy, tmp_path):
    run = trainer(eval_dataset=toy.rows(3))
    run.save_model(tmp_path / "before")
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "before").lm_head.weight, toy.model().lm_head.weight
    )
    run.train()
    run.save_model(tmp_path / "after")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert torch.equal(saved.lm_head.weight, run.model.lm_head.weight)
    assert not torch.equal(saved.lm_head.weight, toy.model().lm_head.weight)
    metrics = run.evaluate()
    run.log_metrics("eval", metrics)
    run.save_metrics("eval", metrics)
    run.save_metrics("train", {"train_loss": 1.0})
    run.save_state()
    folder = run.output_dir
    assert json.loads((folder / "eval_results.json").read_text()) == metrics
    assert json.loads((folder / "all_results.json").read_text()) == {**metrics, "train_loss": 1.0}
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 2
    assert run.args.output_dir == str(folder) and run.args.per_device_train_batch_size == 4


# ---------------------------------------------------------------------------------------- entropy, mean_token_accuracy


def token_metrics(model, tokenizer, rows):
    """As TRL defines them, from all logits: the entropy's mean over the tokens of both responses, and the share of the
    chosen responses' tokens that the model finds likeliest."""
    entropies, hits = [], []
    for row in rows:
        for side in ("chosen", "rejected"):
            start = len(tokenizer(row["prompt"])["input_ids"])
            ids = tokenizer(row["prompt"] + row[side] + " <eos>")["input_ids"]
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].double().log_softmax(-1)
            entropies.append(-(logp.exp() * logp).sum(-1))
            if side == "chosen":
                hits.append(logp.argmax(-1) == torch.tensor(ids[start:]))
    return torch.cat(entropies).mean().item(), torch.cat(hits).double().mean().item()


@pytest.mark.parametrize("options", [{}, {"max_tokens": 60}, {"max_tokens": 60, "share_prompts": "always"}])
def test_token_metrics(trainer, toy, options):
    """Of the step that is logged, whatever its packing, and of evaluations; the summary has them for a last step that
    no line shows. They change no step."""
    rows = toy.rows(8)
    model = toy.model()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    entropy, accuracy = token_metrics(model, toy.tokenizer(), rows)
    assert 0 < accuracy < 1, "else this test sees nothing"
    whole = {"per_device_train_batch_size": 8, "max_steps": 1, **options}
    run = trainer(model, rows=rows, eval_dataset=rows, **whole)
    evaluated = run.evaluate()
    assert evaluated["eval_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert evaluated["eval_mean_token_accuracy"] == pytest.approx(accuracy, rel=1e-6)
    history = run.train().log_history
    line = next(line for line in history if "loss" in line)
    assert line["entropy"] == pytest.approx(entropy, rel=1e-5)
    assert line["mean_token_accuracy"] == pytest.approx(accuracy, rel=1e-6)
    assert "entropy" not in history[-1]

    steps = {"max_steps": 3, **options}
    plain = trainer(rows=rows, token_metrics=False, **steps).train().log_history
    unlogged = trainer(rows=rows, logging_steps=10, **steps).train().log_history
    assert not [k for line in plain for k in line if "entropy" in k or "token_accuracy" in k]
    assert unlogged[-1]["entropy"] > 0 and 0 <= unlogged[-1]["mean_token_accuracy"] <= 1
    seen = trainer(rows=rows, **steps).train().log_history
    assert [line.get("loss") for line in seen] == [line.get("loss") for line in plain]


def test_token_metrics_of_unpaired_rows_and_sft(trainer, toy):
    """KTO's are as TRL's: an entropy, no accuracy; sft's tokens are all chosen."""
    metrics = trainer(rows=unpaired(toy.rows(8)), loss_type="kto", eval_dataset=unpaired(toy.rows(4))).evaluate()
    assert "eval_entropy" in metrics and "eval_mean_token_accuracy" not in metrics
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in toy.rows(8)]
    metrics = trainer(rows=rows, loss_type="sft", eval_dataset=rows).evaluate()
    assert metrics["eval_entropy"] > 0 and 0 <= metrics["eval_mean_token_accuracy"] <= 1
