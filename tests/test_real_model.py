"""A real pretrained model, SmolLM2-135M-Instruct with its chat template, trained on real rows: `make real`.

The model is made by tests/real_model.py, the rows are HH dialogues as conversations; without either the tests skip and
say so. Those marked slow are left out by `make real QUICK=1`, which CI runs.
"""

import gzip
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, pipeline

import fastpo

pytestmark = pytest.mark.real

LN2 = math.log(2)
MARKS = ("\n\nHuman: ", "\n\nAssistant: ")


@pytest.fixture(scope="session")
def folder(repo_root: Path) -> Path:
    folder = repo_root / "runs" / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").is_file():
        pytest.skip("no real model in runs/: make real, or python tests/real_model.py")
    return folder


def conversation(text: str) -> list[dict]:
    """The turns of an HH dialogue."""
    turns = []
    for part in text.split(MARKS[0])[1:]:
        user, *answer = part.split(MARKS[1])
        turns.append({"role": "user", "content": user.strip()})
        turns += [{"role": "assistant", "content": a.strip()} for a in answer]
    return turns


@pytest.fixture(scope="session")
def rows(shared_data) -> list[dict]:
    """Sixteen dialogues of at most 700 characters as `prompt`, `chosen` and `rejected` turns."""
    found = []
    with gzip.open(shared_data("hh_dialogues.jsonl.gz"), "rt", encoding="utf-8") as file:
        for line in file:
            chosen, rejected = (conversation(json.loads(line)[name]) for name in ("chosen", "rejected"))
            texts = [turn["content"] for turn in (*chosen, rejected[-1])]
            if chosen[:-1] == rejected[:-1] and chosen[-1] != rejected[-1] and all(texts) and len("".join(texts)) < 700:
                found.append({"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]})
            if len(found) == 16:
                return found
    raise AssertionError("too few short dialogues")


@pytest.fixture
def train(folder: Path, rows: list[dict], tmp_path: Path):
    """`train(**options)`: three steps over the same two pairs, so that the loss must fall; `rest`: other arguments."""

    def run(data=None, model=folder, rest=None, **options):
        defaults = dict(
            output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False, disable_tqdm=True, logging_steps=1, max_steps=3,
            per_device_train_batch_size=2, learning_rate=1e-5, lr_scheduler_type="constant", report=False,
        )  # fmt: skip
        args = {**defaults, **options}
        return fastpo.train(model if isinstance(model, torch.nn.Module) else str(model), data or rows[:2], args=args,
                            **rest or {})  # fmt: skip

    return run


def losses(result) -> list[float]:
    return [line["loss"] for line in result.log_history if "loss" in line]


def lora():
    from peft import LoraConfig

    return LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")


def same_logits(a: torch.nn.Module, b: torch.nn.Module, tokenizer) -> None:
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(a.eval()(ids).logits, b.eval()(ids).logits, rtol=0, atol=0)


# bf16 steps are lost below half a spacing of the weights: masters in fp32 keep them, which is the default.
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_full_dpo_learns_and_the_saved_model_is_the_trained_one(train, tmp_path, dtype):
    result = train(dtype=dtype)
    first, *_, last = losses(result)
    assert first == pytest.approx(LN2, abs=1e-5 if dtype == "float32" else 2e-2)
    assert last < first - 0.02
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype="auto")
    assert saved.dtype == getattr(torch, dtype)
    same_logits(result.model, saved, AutoTokenizer.from_pretrained(tmp_path / "run"))


@pytest.mark.slow
def test_bf16_autocast_over_fp32_weights(train):
    first, *_, last = losses(train(bf16=True))
    assert first == pytest.approx(LN2, abs=2e-2)
    assert last < first - 0.02


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_lora_dpo_saves_an_adapter_that_peft_reads(train, folder, tmp_path, dtype):
    from peft import PeftModel

    result = train(dtype=dtype, learning_rate=1e-3, rest={"peft_config": lora()})
    first, *_, last = losses(result)
    assert first == pytest.approx(LN2, abs=1e-5 if dtype == "float32" else 2e-2)
    assert last < first - 0.02
    assert not (tmp_path / "run" / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    same_logits(result.model, PeftModel.from_pretrained(base, tmp_path / "run"), AutoTokenizer.from_pretrained(folder))


@pytest.mark.slow
def test_simpo(train):
    first, *_, last = losses(train(loss_type="simpo"))
    assert last < first


@pytest.mark.slow
def test_k_responses(train, rows):
    """The answers to other questions are worse ones."""
    others = [row["chosen"] for row in rows[2:4]]
    data = [{"prompt": row["prompt"], "responses": [{"messages": row["chosen"], "score": 1.0},
                                                     *({"messages": other, "score": 0.0} for other in others)]}
            for row in rows[:2]]  # fmt: skip
    result = train(data, pair_policy="all")
    assert losses(result)[0] == pytest.approx(LN2, abs=1e-5)
    assert losses(result)[-1] < LN2 - 0.02


@pytest.mark.slow
def test_kto(train, rows):
    data = [{"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for row in rows[:2] for name in ("chosen", "rejected")]  # fmt: skip
    first, *_, last = losses(train(data, loss_type="kto", per_device_train_batch_size=4))
    assert first == pytest.approx(0.5, abs=1e-5)
    assert last < first


@pytest.mark.slow
def test_evaluation_with_the_best_checkpoint(train, rows, tmp_path):
    """A learning rate that spoils the model in its second step: the first step's weights come back."""

    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step == 1:
                for group in optimizer.param_groups:
                    group["lr"] = 1e-2

    result = train(rest={"eval_dataset": rows[:2], "callbacks": [Spoil()]}, max_steps=2,
                   eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
                   load_best_model_at_end=True)  # fmt: skip
    evaluated = [line["eval_loss"] for line in result.log_history if "eval_loss" in line]
    assert evaluated[0] < LN2 and evaluated[1] > evaluated[0]
    assert Path(result.state.best_model_checkpoint).name == "checkpoint-1"
    final, best = (load_file(tmp_path / "run" / at / "model.safetensors") for at in ("", "checkpoint-1"))
    assert all(torch.equal(final[name], best[name]) for name in best)


def test_a_resumed_run_has_the_bits_of_the_unbroken_one(train, rows, tmp_path):
    options = dict(dtype="bfloat16", learning_rate=1e-4, rest={"peft_config": lora()}, max_steps=3, save_steps=2)
    whole = train(rows[:6], output_dir=str(tmp_path / "whole"), **options)
    (tmp_path / "broken").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "broken" / "checkpoint-2")
    resumed = train(rows[:6], output_dir=str(tmp_path / "broken"), resume_from_checkpoint=True, **options)
    assert losses(resumed)[-1] == losses(whole)[-1]
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "broken"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_saved_model_answers_by_pipeline_and_stops(train, tmp_path):
    train(max_steps=1)
    answer = pipeline("text-generation", model=str(tmp_path / "run"), device="cpu")
    asked = [{"role": "user", "content": "Say hello."}]
    out = answer(asked, max_new_tokens=60, do_sample=False)[0]["generated_text"][-1]
    assert out["role"] == "assistant" and out["content"].strip() and "<|im_end|>" not in out["content"]


@pytest.mark.parametrize("case", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_losses_and_rewards_are_those_of_trl(repo_root, folder, case, shared_data, monkeypatch):
    """bench/parity_real.py, which states the limits, over two steps."""
    pytest.importorskip("trl")
    monkeypatch.setenv("FASTPO_BENCH_DATA", str(shared_data("hh_dialogues.jsonl.gz").parent))
    spec = importlib.util.spec_from_file_location("parity_real", repo_root / "bench" / "parity_real.py")
    parity = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parity)
    comparison, _ = parity.run(case, folder, steps=2)
    assert all(row["ok"] for row in comparison), comparison


@pytest.mark.slow
def test_the_loop_goes_from_prompts_to_another_model(folder, tmp_path):
    """Sampled in process, judged by a function, trained on its own token ids; the sampler held against the policy."""
    asked = ("the capital of France", "the largest ocean", "the colour of snow", "two and two", "a word for happy")
    texts = [f"What is {what}? Answer in at most eight words." for what in asked]
    prompts = [{"prompt": [{"role": "user", "content": text}]} for text in texts]

    def short(prompt, response, meta):
        return -len(response.split())

    result = fastpo.iterate(
        recipe="iterative_dpo", model=str(folder), prompts=prompts[:4], output_dir=str(tmp_path / "run"), iterations=1,
        sample={"n": 3, "max_tokens": 24, "drop_truncated": False}, scorers={"short": short},
        train={"learning_rate": 1e-5, "per_device_train_batch_size": 2, "warmup_ratio": 0.0, "use_cpu": True,
               "report": False, "disable_tqdm": True, "save_strategy": "no"},
        eval={"prompts": prompts[4:], "max_tokens": 16},
    )  # fmt: skip
    (found,) = result.iterations
    assert found["samples"]["checked"]["compared"] == 4 and found["samples"]["checked"]["difference"] < 1e-3
    assert found["rows"]["pairs"] > 0 and "win rate" in found["eval"]
    rows = [json.loads(line) for line in open(tmp_path / "run" / "iter-001" / "rows.jsonl")]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row in rows:
        assert tokenizer.decode(row["prompt_ids"]).endswith("<|im_start|>assistant\n")
        for response in row["responses"]:
            ended = response["token_ids"][-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
            assert ended == response["finished"]  # no end that the policy did not give
    before, after = (load_file(Path(p) / "model.safetensors") for p in (folder, result.policies["iterate-1"]))
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_grpo_draws_judges_and_trains(folder, tmp_path):
    """Two steps on answers that the policy gives as it trains, judged by their length, with the chat template."""
    asked = ("the capital of France", "the largest ocean", "the colour of snow", "two and two")
    prompts = [
        {"prompt": [{"role": "user", "content": f"What is {what}? Answer in at most eight words."}]} for what in asked
    ]

    def short(completions, **columns):
        return [-float(len(turns[0]["content"].split())) for turns in completions]

    result = fastpo.train(
        str(folder), prompts, loss_type="grpo", reward_funcs=short, num_generations=4, max_completion_length=24,
        per_device_train_batch_size=8, max_steps=2, learning_rate=1e-5, lr_scheduler_type="constant",
        log_completions=True, num_completions_to_print=8, logging_steps=1, output_dir=str(tmp_path / "run"),
        use_cpu=True, bf16=False, report=False, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    lines = [line for line in result.log_history if "reward" in line]
    assert [line["step"] for line in lines] == [1, 2] and all(line["grad_norm"] > 0 for line in lines)
    for step, line in enumerate(lines):
        path = tmp_path / "run" / "completions" / f"{step:06d}.jsonl"
        drawn = [json.loads(text) for text in path.read_text().splitlines()]
        words = [len(d["completion"].split()) for d in drawn]
        assert len(drawn) == 8 and [d["short"] for d in drawn] == [-w for w in words]
        assert line["reward"] == pytest.approx(-sum(words) / 8)
        for group in (drawn[:4], drawn[4:]):  # the advantages of a prompt's answers are about 0, shorter ones have more
            assert sum(d["advantage"] for d in group) == pytest.approx(0, abs=1e-6)
            by_reward = sorted(group, key=lambda d: d["short"])
            assert [d["advantage"] for d in by_reward] == sorted(d["advantage"] for d in group)
        assert not any("<|im_" in d["completion"] for d in drawn)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "run"))
    assert any(not torch.equal(before[name].float(), after[name].float()) for name in after)
