"""`fastpo plan` and max_tokens=auto: what is estimated is what PyTorch's allocator says that a run takes."""

import json
import resource
import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fastpo
from fastpo import cli, plan
from fastpo.config import TrainConfig
from fastpo.errors import ConfigError
from fastpo.packing import trunk_tokens

MIB = 1 << 20
SIZES = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, max_position_embeddings=512)


def families():
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

    qwen = dict(SIZES, vocab_size=5000, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    gpt2 = dict(vocab_size=100, n_embd=256, n_layer=4, n_head=4, n_positions=512)
    return {
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**qwen, tie_word_embeddings=True)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**gpt2)),
    }


@pytest.fixture
def options(tmp_path):
    return dict(
        output_dir=str(tmp_path / "run"), disable_tqdm=True, use_cpu=True, bf16=False, max_steps=2, learning_rate=1e-4,
        save_final=False, report=False, loss_type="simpo", gradient_checkpointing=False, max_tokens=1200,
        per_device_train_batch_size=32, logging_steps=1,
    )  # fmt: skip


def rows(toy, n=32):
    import random

    rng = random.Random(0)
    return [{"prompt": toy.text(rng, 30, 60), **{k: " " + toy.text(rng, 20, 60) for k in ("chosen", "rejected")}}
            for _ in range(n)]  # fmt: skip


def measured_peak(train, tmp_path) -> int:
    """Bytes that PyTorch's CPU allocator has given out at most, over those at the start, by its profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        train()
    trace = tmp_path / "trace.json"
    prof.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    first = min(events, key=lambda e: e["ts"])["args"]
    start = first["Total Allocated"] - first["Bytes"]  # of an earlier profile in this process
    return max(e["args"]["Total Allocated"] for e in events) - start


CASES = {
    "llama": (None, False, torch.float32, {}),
    "checkpointing": (None, False, torch.float32, {"gradient_checkpointing": True}),
    "two layers": (None, False, torch.float32, {"gradient_checkpointing": True, "gradient_checkpointing_layers": 2}),
    "lora": (None, True, torch.float32, {}),
    "lora checkpointing": (None, True, torch.float32, {"gradient_checkpointing": True}),
    "masters": (None, False, torch.bfloat16, {}),
    "stochastic": (None, False, torch.bfloat16, {"master_weights": "stochastic"}),
    "autocast": (None, False, torch.float32, {"bf16": True}),
    "qwen3 kept": ("qwen3", False, torch.float32, {}),
    "qwen3 sliced": ("qwen3", False, torch.float32, {"logits_memory_budget": 0}),
    "gpt2": ("gpt2", False, torch.float32, {"optim": "sgd"}),
}
FACTOR = 1.25


@pytest.mark.parametrize("case", CASES)
def test_estimate_against_the_allocator(toy, options, tmp_path, case):
    family, adapter, dtype, changes = CASES[case]
    model = (families()[family]() if family else toy.model(**SIZES)).to(dtype)
    if adapter:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    args = TrainConfig(**{**options, **changes})
    trainer = fastpo.trainer.Trainer(model, rows(toy), args=args, processing_class=toy.tokenizer())
    rows_share = sum(len(r) for e in trainer.examples for r in e.responses) / sum(map(trunk_tokens, trainer.examples))
    found = plan.estimate(plan.Blueprint.of_model(model), args, "cpu", row_share=rows_share, autocast=bool(args.bf16))
    assert found.weights == sum(t.nbytes for t in {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}.values())
    measured = measured_peak(trainer.train, tmp_path)
    largest = max(line["packing_efficiency"] for line in trainer.state.log_history if "packing_efficiency" in line)
    estimated = found.total(largest * args.max_tokens) - found.weights - found.process
    print(f"{case}: estimated {estimated / MIB:.1f} MiB, measured {measured / MIB:.1f} MiB: {estimated / measured:.3f}")
    assert 1 / FACTOR < estimated / measured < FACTOR
