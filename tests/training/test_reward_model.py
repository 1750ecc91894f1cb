"""Reward models: TRL's RewardTrainer on the same rows, whatever the packing, saved as transformers reads them."""

import copy
import json
import logging
import os
import subprocess
import sys
import warnings

import pytest
import torch

import fastpo
from fastpo.errors import ConfigError, UnsupportedModelError

KEYS = ("loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward")


def options(folder, **changes):
    return dict(
        output_dir=str(folder), loss_type="reward", use_cpu=True, bf16=False, disable_tqdm=True, logging_steps=1,
        per_device_train_batch_size=8, max_steps=4, learning_rate=1e-3, lr_scheduler_type="constant",
        gradient_checkpointing=False, save_strategy="no", save_final=False, report=False,
        train_sampling_strategy="sequential",
    ) | changes  # fmt: skip


@pytest.fixture
def run(toy, tmp_path):
    count = iter(range(100))

    def call(rows, model=None, rest=None, tokenizer=None, **changes):
        model = toy.reward_model() if model is None else model
        args = options(tmp_path / f"run{next(count)}", **changes)
        return fastpo.train(model, rows, processing_class=tokenizer or toy.tokenizer(), args=args, **rest or {})

    return call


def steps(history, keys=KEYS):
    return [[line[key] for key in keys] for line in history if "loss" in line]


def own_rewards(model, tokenizer, prompt, responses):
    """By the model's own forward, each response alone."""
    out = []
    for response in responses:
        ids = tokenizer(prompt + response)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            out.append(model(input_ids=torch.tensor([ids])).logits.item())
    return out


def distance(a, b):
    mine, other = dict(a.named_parameters()), dict(b.named_parameters())
    assert mine.keys() == other.keys()
    return max((mine[n].double() - other[n].double()).abs().max().item() for n in mine)


# ---------------------------------------------------------------------------------------------------------- TRL


def trl_run(model, rows, tokenizer, folder, eval_rows=None, peft_config=None, **changes):
    """TRL's RewardTrainer: (log history, model)."""
    pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[bench]'")
    datasets = pytest.importorskip("datasets")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import RewardConfig, RewardTrainer

        given = dict(
            output_dir=str(folder), use_cpu=True, bf16=False, disable_tqdm=True, logging_steps=1, report_to="none",
            per_device_train_batch_size=8, max_steps=4, learning_rate=1e-3, lr_scheduler_type="constant",
            gradient_checkpointing=None, activation_checkpointing=False, save_strategy="no",
            train_sampling_strategy="sequential",
        ) | changes  # fmt: skip
        trainer = RewardTrainer(
            model=model, args=RewardConfig(**given), train_dataset=datasets.Dataset.from_list(rows),
            eval_dataset=None if eval_rows is None else datasets.Dataset.from_list(eval_rows),
            processing_class=tokenizer, peft_config=peft_config,
        )  # fmt: skip
        trainer.train()
    return trainer.state.log_history, trainer.model


@pytest.mark.parametrize("dtype, allowed", [(torch.float64, 1e-8), (torch.float32, 2e-5)])
@pytest.mark.parametrize("case", ["plain", "margin and centring", "end pads", "implicit prompt"])
def test_equals_trl(toy, run, tmp_path, dtype, allowed, case):
    rows, tokenizer, model = toy.rows(32), toy.tokenizer(), toy.reward_model().to(dtype)
    theirs, ours = {}, {}
    if case == "margin and centring":
        rows = [row | {"margin": 0.3 * (i % 4) - 0.2} for i, row in enumerate(rows)]
        theirs, ours = {"center_rewards_coefficient": 0.01}, {"loss_kwargs": {"center_rewards_coefficient": 0.01}}
    if case == "end pads":
        tokenizer.pad_token = "<eos>"
    if case == "implicit prompt":
        rows = [{k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in rows]
    history, expected = trl_run(copy.deepcopy(model), rows, copy.deepcopy(tokenizer), tmp_path / "trl", rows[:8],
                                eval_strategy="steps", eval_steps=4, **theirs)  # fmt: skip
    result = run(rows, model, {"eval_dataset": rows[:8]}, tokenizer, **ours, eval_strategy="steps", eval_steps=4)
    wanted = steps(history)
    assert len(wanted) == 4 and steps(result.log_history) == [pytest.approx(line, abs=1e-5) for line in wanted]
    evaluated = [[line[f"eval_{k}"] for k in KEYS] for h in (history, result.log_history) for line in h
                 if "eval_loss" in line]  # fmt: skip
    assert evaluated[1] == pytest.approx(evaluated[0], abs=1e-5)
    assert distance(result.model, expected) < allowed
    assert wanted[0][0] != pytest.approx(wanted[-1][0], rel=1e-3)  # something was learnt


def test_k_responses_are_trls_rows_of_each_pair(toy, run, tmp_path):
    """Every pair that is formed counts as one; each response goes through the model once."""
    kway, model = toy.kway_rows(4, sizes=(4,)), toy.reward_model().double()
    pairs = []
    for row in kway:
        entries = row["responses"]
        pairs += [{"prompt": row["prompt"], "chosen": a["text"], "rejected": b["text"]}
                  for a in entries for b in entries if a["score"] > b["score"]]  # fmt: skip
    plain = dict(optim="sgd", learning_rate=0.1, max_grad_norm=0.0)  # Adam divides by gradients that are rounding
    history, expected = trl_run(copy.deepcopy(model), pairs, toy.tokenizer(), tmp_path / "trl",
                                per_device_train_batch_size=len(pairs), **plain)  # fmt: skip
    for share in ("always", "never"):
        result = run(kway, copy.deepcopy(model), per_device_train_batch_size=4, pair_policy="all", share_prompts=share,
                     **plain)  # fmt: skip
        assert steps(result.log_history) == [pytest.approx(line, abs=1e-5) for line in steps(history)]
        assert distance(result.model, expected) < 1e-7


def test_a_language_models_path_gets_trls_new_head(toy, tmp_path):
    """Drawn with the run's seed, whatever is drawn before; the language model's own head is left behind."""
    folder = tmp_path / "lm"
    toy.model().save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    rows = toy.rows(16)
    result = fastpo.train(str(folder), rows, args=options(tmp_path / "ours", seed=7))
    head = result.model.score.weight
    assert head.shape == (1, 32) and result.model.config.num_labels == 1
    _, expected = trl_run(str(folder), rows, toy.tokenizer(), tmp_path / "trl", seed=7)
    assert distance(result.model, expected) < 2e-5


def test_trls_config(tmp_path):
    trl = pytest.importorskip("trl")
    from fastpo.config.train_config import TrainConfig

    config = TrainConfig.build(trl.RewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none",
                                                center_rewards_coefficient=0.02))  # fmt: skip
    assert config.losses == ["reward"] and config.learning_rate == 1e-4
    assert config.loss_kwargs == {"center_rewards_coefficient": 0.02}
    with pytest.raises(ConfigError, match="eos_token.*processing_class"):
        TrainConfig.build(trl.RewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, eos_token="<eos>"))
    with pytest.raises(ConfigError, match="loss_kwargs={center_rewards_coefficient"):
        TrainConfig.build({"loss_type": "reward", "center_rewards_coefficient": 0.01})


# --------------------------------------------------------------------------------------------------- invariance


def test_micro_batches_sharing_and_accumulation_change_nothing(toy, run):
    rows = toy.kway_rows(12)
    cases = [{}, {"max_tokens": 40}, {"share_prompts": "never"}, {"share_prompts": "always", "max_tokens": 70},
             {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, {"gradient_checkpointing": True},
             {"token_bucket": 64, "max_tokens": 128}]  # fmt: skip
    common = dict(pair_policy="all", optim="sgd", learning_rate=0.1, max_grad_norm=0.0,
                  loss_kwargs={"center_rewards_coefficient": 0.1})  # fmt: skip
    runs = [run(rows, toy.reward_model().double(), **common, **case) for case in cases]
    for case, other in zip(cases[1:], runs[1:], strict=True):
        shared = case.get("share_prompts") == "always"  # whose backward pass keeps sums in fp32
        assert distance(runs[0].model, other.model) < (1e-7 if shared else 1e-11), case
        for line, wanted in zip(steps(other.log_history), steps(runs[0].log_history), strict=True):
            assert line == pytest.approx(wanted, abs=1e-5), case


def test_each_response_passes_once(toy, monkeypatch):
    from fastpo.models.policy import Policy

    seen, trunk = [], Policy._trunk_forward
    monkeypatch.setattr(
        Policy, "_trunk_forward", lambda self, ids, *rest: seen.append(len(ids)) or trunk(self, ids, *rest)
    )
    prompt = " ".join(f"w{k % 90}" for k in range(150))
    rows = [{"prompt": prompt, "responses": [f" w{k} w{k + 1}" for k in range(8)]}] * 2
    model = toy.reward_model(hidden_size=256, intermediate_size=1024)
    fastpo.rewards(model, rows, processing_class=toy.tokenizer(), verify=False)
    assert seen == [150 + 8 * 3]  # the end too, and equal responses once


def test_bf16(toy, run):
    result = run(toy.rows(16), bf16=True, optim="sgd", learning_rate=0.01)
    plain = run(toy.rows(16), optim="sgd", learning_rate=0.01)
    for line, wanted in zip(steps(result.log_history), steps(plain.log_history), strict=True):
        assert line[0] == pytest.approx(wanted[0], abs=0.01)
    in_16_bits = run(toy.rows(16), toy.reward_model().bfloat16())
    assert in_16_bits.log_history[0]["loss"] == pytest.approx(plain.log_history[0]["loss"], abs=0.02)


# ----------------------------------------------------------------------------------------------- saved and loaded


@pytest.mark.parametrize("pads", ["<pad>", "<eos>", None])
def test_what_is_saved_scores_as_it_was_trained(toy, run, tmp_path, pads):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    tokenizer, rows = toy.tokenizer(), toy.rows(16)
    tokenizer.pad_token = pads
    run(rows, tokenizer=tokenizer, output_dir=str(tmp_path / "out"), save_final=True, report=True)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == 1 and model.config.pad_token_id == tokenizer.pad_token_id is not None
    got = fastpo.rewards(tmp_path / "out", rows)
    for row, found in zip(rows, got, strict=True):
        assert found == pytest.approx(own_rewards(model, tokenizer, row["prompt"], [row["chosen"], row["rejected"]]),
                                      abs=2e-6)  # fmt: skip
    texts = [row["prompt"] + row["chosen"] + "<eos>" for row in rows]
    score = pipeline("text-classification", model=str(tmp_path / "out"), function_to_apply="none", batch_size=4)
    assert [s["score"] for s in score(texts)] == pytest.approx([found[0] for found in got], abs=2e-6)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card and "pipeline_tag: text-classification" in card
    assert "Rewards of responses" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_the_cards_code_runs(toy, run, tmp_path):
    run(toy.rows(16), output_dir=str(tmp_path / "out"), save_final=True)
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120,
                          env=os.environ | {"HF_HUB_OFFLINE": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.isfinite(torch.tensor(float(done.stdout)))


def test_an_adapter(toy, run, tmp_path):
    peft = pytest.importorskip("peft")
    base, rows = tmp_path / "lm", toy.rows(32)
    toy.model().save_pretrained(base)
    toy.tokenizer().save_pretrained(base)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    result = run(rows, str(base), {"peft_config": lora}, output_dir=str(tmp_path / "out"), save_final=True,
                 save_merged=True, learning_rate=0.01)  # fmt: skip
    names = {n for n, p in result.model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "score.modules_to_save" in n for n in names) and len(names) == 2 * 2 * 2 + 1
    trained = fastpo.rewards(result.model, rows, processing_class=toy.tokenizer())
    again = fastpo.rewards(tmp_path / "out", rows)
    merged = fastpo.rewards(tmp_path / "out" / "merged", rows)
    for a, b, c in zip(trained, again, merged, strict=True):
        assert a == pytest.approx(b, abs=1e-6) and a == pytest.approx(c, abs=1e-5)
    history, expected = trl_run(str(base), rows, toy.tokenizer(), tmp_path / "trl", peft_config=copy.deepcopy(lora),
                                learning_rate=0.01)  # fmt: skip
    assert steps(result.log_history)[0] == pytest.approx(steps(history)[0], abs=1e-5)
    # A further run goes on with the adapter, head included.
    more = run(rows, str(tmp_path / "out"), max_steps=1)
    assert more.log_history[0]["loss"] < result.log_history[0]["loss"]


def test_an_adapter_by_its_arguments_and_one_without_the_head(toy, run, tmp_path):
    peft = pytest.importorskip("peft")
    base, rows = tmp_path / "lm", toy.rows(16)
    toy.model().save_pretrained(base)
    toy.tokenizer().save_pretrained(base)
    result = run(rows, str(base), {"peft_config": {"r": 2, "target_modules": ["q_proj"]}}, max_steps=1)
    assert any("score.modules_to_save" in n for n, p in result.model.named_parameters() if p.requires_grad)
    only = peft.LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="random start: set task_type='SEQ_CLS' or modules_to_save"):
        run(rows, str(base), {"peft_config": only})
    with pytest.raises(ConfigError, match="task_type must be SEQ_CLS"):
        run(rows, str(base), {"peft_config": peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")})
    saving = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score"])
    assert run(rows, str(base), {"peft_config": saving}, max_steps=1).metrics["train_loss"] > 0


def test_a_resumed_run_is_the_unbroken_one(toy, run, tmp_path):
    rows, rest = toy.kway_rows(24), {"eval_dataset": toy.kway_rows(5, seed=1)}
    common = dict(pair_policy="all", save_strategy="steps", save_steps=2, save_final=True, eval_strategy="steps",
                  eval_steps=2, logging_steps=4)  # fmt: skip
    whole = run(rows, None, rest, max_steps=6, output_dir=str(tmp_path / "whole"), **common)
    run(rows, None, rest, max_steps=6, output_dir=str(tmp_path / "broken"), **common)
    resumed = run(rows, None, rest, max_steps=6, output_dir=str(tmp_path / "broken"), **common,
                  resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-2"))  # fmt: skip
    assert distance(whole.model, resumed.model) == 0.0
    pace = ("_runtime", "_per_second", "peak_memory_gb", "mfu")
    lines = [
        [{k: v for k, v in line.items() if not k.endswith(pace)} for line in r.log_history] for r in (whole, resumed)
    ]
    assert lines[0] == lines[1]
    assert lines[0][0].keys() >= {f"eval_{k}" for k in KEYS} or lines[0][1].keys() >= {f"eval_{k}" for k in KEYS}


def test_the_best_checkpoint_by_accuracy(toy, run, tmp_path):
    result = run(toy.rows(16), None, {"eval_dataset": toy.rows(8, seed=3)}, output_dir=str(tmp_path / "out"),
                 save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
                 metric_for_best_model="accuracy", greater_is_better=True, save_final=True)  # fmt: skip
    best = max(line["eval_accuracy"] for line in result.log_history if "eval_accuracy" in line)
    assert result.state.best_metric == best


# --------------------------------------------------------------------------------------------------------- rows


def test_what_is_too_long_is_left_out(toy, run, caplog):
    """Rows as in TRL; of K responses those that are too long, with their pairs."""
    long = " " + " ".join("w1 w2 w3" for _ in range(14))
    pairs = [*toy.rows(6), {"prompt": "w1", "chosen": " w2", "rejected": long}]
    with caplog.at_level(logging.INFO, logger="fastpo"):
        run(pairs, max_length=38, max_steps=1)
    assert "6 of 7 rows kept" in caplog.text and "1 dropped: longer than max_length" in caplog.text
    caplog.clear()
    kway = [
        {"prompt": "w1", "responses": [{"text": text, "score": s} for s, text in enumerate((" w2", long, " w3 w4"))]}
    ]
    with caplog.at_level(logging.INFO, logger="fastpo"):
        run(kway, max_length=20, max_steps=1, pair_policy="all")
    assert "1 pairs of 2 of their 3 responses" in caplog.text


def test_a_margin_of_a_row_of_k_responses_is_every_pairs(toy, run):
    rows = [row | {"margin": 1.5} for row in toy.kway_rows(4)]
    plain, apart = (run(r, max_steps=1, pair_policy="all") for r in (toy.kway_rows(4), rows))
    assert apart.log_history[0]["loss"] > plain.log_history[0]["loss"] + 0.5
    assert apart.log_history[0]["margin"] == plain.log_history[0]["margin"]


def test_compute_metrics_gets_rewards(toy, run):
    seen = {}

    def compute(evaluated):
        seen.update(chosen=evaluated.chosen_logps, rejected=evaluated.rejected_logps)
        return {"gap": float((evaluated.chosen_logps - evaluated.rejected_logps).mean())}

    rows = toy.rows(8)
    result = run(rows, None, {"eval_dataset": rows, "compute_metrics": compute}, eval_on_start=True, max_steps=1)
    line = next(line for line in result.log_history if "eval_gap" in line)
    assert line["eval_gap"] == pytest.approx(line["eval_margin"], abs=1e-6) and seen["chosen"].shape == (8,)


# ------------------------------------------------------------------------------------------------- fastpo.rewards


def test_rewards_are_the_models_own(toy):
    model, tokenizer = toy.reward_model().train(), toy.tokenizer()
    rows = [
        {"prompt": "w1 w2 w3", "completion": " w4 w5"},
        {"prompt": "w9", "chosen": " w7", "rejected": " w8 w8 w8", "score": 3.0},
        {"prompt": "w1 w2 w3", "responses": [{"text": " w6 w7"}, " w6", {"text": " w6 w7"}]},
    ]
    done = []
    got = fastpo.rewards(model, rows, processing_class=tokenizer, progress=lambda *a: done.append(a))
    expected = [("w1 w2 w3", [" w4 w5"]), ("w9", [" w7", " w8 w8 w8"]), ("w1 w2 w3", [" w6 w7", " w6", " w6 w7"])]
    model.eval()
    for found, (prompt, responses) in zip(got, expected, strict=True):
        assert found == pytest.approx(own_rewards(model, tokenizer, prompt, responses), abs=2e-6)
    assert got[2][0] == got[2][2] and done[-1] == (6, 6) and all(isinstance(v, float) for row in got for v in row)
    ids = fastpo.rewards(model, [{"prompt": [5, 6, 7], "completion": [8, 9]}], processing_class=tokenizer)
    assert ids == [[pytest.approx(model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits.item(), abs=2e-6)]]
    assert fastpo.rewards(model, [], processing_class=tokenizer) == []


def test_the_token_that_is_scored_is_transformers(toy):
    """The last that is not padding, in the prompt where all of the response is."""
    model, tokenizer = toy.reward_model().eval(), toy.tokenizer()
    for pad in (2, 0, 8, None):
        model.config.pad_token_id = pad
        rows = [{"prompt": [5, 8, 7], "completion": c} for c in ([8], [9, 0], [0], [8, 8, 8], [4, 8, 8])]
        rows.append({"prompt": [8, 8], "completion": [8]})
        got = fastpo.rewards(model, rows, processing_class=tokenizer)
        for row, (found,) in zip(rows, got, strict=True):
            want = model(input_ids=torch.tensor([row["prompt"] + row["completion"]])).logits.item()
            assert found == pytest.approx(want, abs=2e-6), (pad, row)


def test_an_encoder_runs_padded(toy, caplog):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                        num_attention_heads=4, num_labels=1, pad_token_id=2)  # fmt: skip
    model, tokenizer = BertForSequenceClassification(config).eval(), toy.tokenizer()
    rows = toy.rows(6)
    with caplog.at_level(logging.WARNING, logger="fastpo"):
        got = fastpo.rewards(model, rows, processing_class=tokenizer, max_tokens=64)
    assert "BertForSequenceClassification is no causal classifier" in caplog.text
    for row, found in zip(rows, got, strict=True):
        for side, value in zip(("chosen", "rejected"), found, strict=True):
            with torch.no_grad():
                want = model(**tokenizer(row["prompt"], row[side], return_tensors="pt")).logits.item()
            assert value == pytest.approx(want, abs=2e-6)
    with pytest.raises(UnsupportedModelError, match="no linear head `score`"):
        fastpo.train(model, rows, processing_class=tokenizer, args={"loss_type": "reward", "use_cpu": True})


def scaled(model):
    """A head with a rule that fastpo does not know."""
    kind = type(model)

    class Scaled(kind):
        def forward(self, *args, **kwargs):
            out = kind.forward(self, *args, **kwargs)
            out.logits = 2 * out.logits
            return out

    model.__class__ = Scaled
    return model


def test_the_guard_sees_another_rule(toy, run, caplog):
    rows, tokenizer = toy.rows(8), toy.tokenizer()
    with pytest.raises(UnsupportedModelError, match="rewards differ from the model's own"):
        run(rows, scaled(toy.reward_model()))
    model = scaled(toy.reward_model().eval())
    with caplog.at_level(logging.WARNING, logger="fastpo"):
        got = fastpo.rewards(model, rows, processing_class=tokenizer)
    assert "padded batches of its own forward" in caplog.text
    for row, found in zip(rows, got, strict=True):
        want = own_rewards(model, tokenizer, row["prompt"], [row["chosen"], row["rejected"]])
        assert found == pytest.approx(want, abs=2e-6)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3", "opt", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_families(toy, family, dtype):
    """What transformers builds for a family, through the guard and against its own forward."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = dict(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    more = {
        "gpt2": dict(n_embd=32, n_layer=2, n_head=4, vocab_size=100, bos_token_id=0, eos_token_id=0),
        "gemma2": sizes | dict(num_key_value_heads=2, head_dim=8, sliding_window=8),
        "qwen3": sizes | dict(num_key_value_heads=2, head_dim=8),
        "opt": dict(vocab_size=100, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=4,
                    ffn_dim=64, max_position_embeddings=128),
        "mixtral": sizes | dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
    }[family]  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **more, num_labels=1, pad_token_id=2)
    model = AutoModelForSequenceClassification.from_config(config).to(dtype).eval()
    tokenizer, rows = toy.tokenizer(), toy.rows(6)
    got = fastpo.rewards(model, rows, processing_class=tokenizer)
    allowed = 5e-6 if dtype == torch.float32 else 0.02
    for row, found in zip(rows, got, strict=True):
        want = own_rewards(model, tokenizer, row["prompt"], [row["chosen"], row["rejected"]])
        assert found == pytest.approx(want, abs=allowed)


# ------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss_type": ["reward", "sft"]}, "reward trains a scalar head, which has no log-probabilities for sft"),
        ({"loss_type": ["dpo", "reward"]}, "reward trains a scalar head, which has no log-probabilities for dpo"),
        ({"beta": 0.1}, "beta is set, but reward does not read it"),
        ({"sync_ref_model": True}, "sync_ref_model moves a reference, and reward has none"),
        ({"precompute_ref_log_probs": True}, "leave precompute_ref_log_probs out"),
        ({"grad_filter": 0.001}, "leave grad_filter out"),
        ({"sample_generations": 2, "eval_on_start": True}, "leave sample_generations out"),
        ({"generation_kwargs": {"max_new_tokens": 4}}, "leave generation_kwargs out"),
        ({"truncation_mode": "keep_end"}, "leave truncation_mode=keep_end out"),
        ({"router_aux_loss_coef": 0.1}, "leave router_aux_loss_coef out"),
        ({"loss_kwargs": {"center_rewards_coefficient": -1.0}}, "center_rewards_coefficient must be zero or more"),
        ({"loss_kwargs": {"center_reward_coefficient": 0.1}}, "did you mean 'center_rewards_coefficient'"),
    ],
    ids=str,
)  # fmt: skip
def test_refused_options(toy, run, changes, message):
    with pytest.raises(ConfigError, match=message) as raised:
        run(toy.rows(8), None, {"eval_dataset": toy.rows(2)}, **changes)
    assert "\n" not in str(raised.value)


def test_refused_models(toy, run, tmp_path):
    rows = toy.rows(8)
    with pytest.raises(UnsupportedModelError, match="has a language model's head.*AutoModelForSequenceClassification"):
        run(rows, toy.model())
    with pytest.raises(UnsupportedModelError, match="load it with AutoModelForCausalLM"):
        run(rows, toy.reward_model(), loss_type="dpo")
    with pytest.raises(ConfigError, match="ref_model is given, and reward has no reference"):
        run(rows, None, {"ref_model": toy.model()})
    two = toy.reward_model()
    two.config.num_labels = 2
    with pytest.raises(ConfigError, match="num_labels=2, and a reward is one number"):
        run(rows, two)
    from transformers import LlamaForSequenceClassification

    folder = tmp_path / "two"
    config = toy.model().config
    config.num_labels = 3
    LlamaForSequenceClassification(config).save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    with pytest.raises(ConfigError, match="LlamaForSequenceClassification of 3 labels, and a reward is one number"):
        run(rows, str(folder))
    with pytest.raises(ConfigError, match="3 labels"):
        fastpo.rewards(folder, rows)
    toy.model().save_pretrained(tmp_path / "lm")
    toy.tokenizer().save_pretrained(tmp_path / "lm")
    with pytest.raises(ConfigError, match="no scalar head, and a random one says nothing"):
        fastpo.rewards(tmp_path / "lm", rows)
    with pytest.raises(ConfigError, match="LlamaForCausalLM is no sequence classifier"):
        fastpo.rewards(toy.model(), rows, processing_class=toy.tokenizer())


def test_the_command_line(toy, tmp_path):
    """A language model by path, an adapter by TRL's flags, pairs in a file."""
    from fastpo import cli

    toy.model().save_pretrained(tmp_path / "lm")
    toy.tokenizer().save_pretrained(tmp_path / "lm")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in toy.rows(16)))
    code = cli.main(["train", "--model", str(tmp_path / "lm"), "--train-dataset", str(tmp_path / "rows.jsonl"),
                     "--loss-type", "reward", "--output-dir", str(tmp_path / "out"), "--max-steps", "2", "--use-cpu",
                     "--use-peft", "--lora-target-modules", "q_proj", "--learning-rate", "1e-3"])  # fmt: skip
    assert code == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["classifier", "score"]
    assert len(fastpo.rewards(tmp_path / "out", toy.rows(2))) == 2


def test_rows_of_token_ids(toy, run):
    """As sampled, no end appended; equal responses are one, and what is too long goes with its pairs."""
    ids, scores = [[5, 6], [7, 8, 9], [5, 6], list(range(3, 30))], [0.0, 5.0, 1.0, 9.0]
    entries = [{"token_ids": r, "score": s, "finished": False} for r, s in zip(ids, scores, strict=True)]
    rows, model = [{"prompt_ids": [10, 11, 12], "responses": entries}], toy.reward_model().eval()
    (found,) = fastpo.rewards(model, rows, processing_class=toy.tokenizer())
    own = [model(input_ids=torch.tensor([[10, 11, 12, *r]])).logits.item() for r in ids]
    assert found == pytest.approx(own, abs=2e-6)
    result = run(rows, model, max_length=20, pair_policy="all", max_steps=1, learning_rate=0.0)
    assert result.log_history[0]["margin"] == pytest.approx(own[1] - own[0], abs=1e-5)


def test_memory_is_planned(toy, run, tmp_path, capsys):
    """By `fastpo plan`, from the configuration of a language model, and by max_tokens=auto."""
    from fastpo import cli

    toy.model().save_pretrained(tmp_path / "lm")
    toy.tokenizer().save_pretrained(tmp_path / "lm")
    for loss in ("reward", "dpo"):
        assert cli.main(["plan", "--model", str(tmp_path / "lm"), "--loss-type", loss, "--memory", "8GiB", "--device",
                         "cuda", "--json"]) == 0  # fmt: skip
    reward, dpo = (json.loads(part) for part in capsys.readouterr().out.replace("}\n{", "}\n\0{").split("\0"))
    assert reward["parameters"] == dpo["parameters"] - 100 * 32 + 32 and reward["max_tokens"] >= dpo["max_tokens"]
    result = run(toy.kway_rows(4), max_tokens="auto", pair_policy="all", max_steps=1)
    assert result.log_history[0]["shared_prompt_savings"] >= 0


def test_a_quantised_base(toy, run, tmp_path):
    """QLoRA: the head stays in the base's precision, and the merged model has the adapter's."""
    pytest.importorskip("bitsandbytes")
    toy.model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "lm")
    toy.tokenizer().save_pretrained(tmp_path / "lm")
    rows = toy.rows(16)
    rest = {"peft_config": {"r": 4, "target_modules": ["q_proj"]},
            "quantization_config": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}}  # fmt: skip
    result = run(rows, str(tmp_path / "lm"), rest, output_dir=str(tmp_path / "out"), save_final=True, save_merged=True)
    assert "Linear4bit" in repr(result.model) and torch.isfinite(torch.tensor(result.metrics["train_loss"]))
    (tmp_path / "out" / "merged" / "config.json").read_text()
    merged = fastpo.rewards(tmp_path / "out" / "merged", rows)
    trained = fastpo.rewards(result.model, rows, processing_class=toy.tokenizer())
    assert torch.tensor(merged).sub(torch.tensor(trained)).abs().max() < 0.2  # what quantising moves


def test_rows_may_name_the_loss(toy, run):
    named, plain = (run([row | more for row in toy.rows(8)], max_steps=1) for more in ({"loss": "reward"}, {}))
    assert named.log_history[0]["loss"] == pytest.approx(plain.log_history[0]["loss"], abs=1e-6)
