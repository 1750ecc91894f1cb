"""Whole runs with adapters: what the reference is, that quantised bases train, what is saved and goes on."""

import copy
import json
import math

import pytest
import torch

import fastpo
from fastpo.errors import ConfigError
from fastpo.models.loading import load_model

peft = pytest.importorskip("peft", reason="needs peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def run(toy, tmp_path):
    """`run(model, folder, **options)`: a short LoRA run on the toy data, every step logged."""

    def go(model, name="run", peft_config="lora", quantization_config=None, **options):
        if peft_config == "lora":
            peft_config = lora()
        defaults = dict(
            output_dir=str(tmp_path / name), use_cpu=True, max_steps=5, per_device_train_batch_size=8, max_tokens=400,
            learning_rate=5e-3, logging_steps=1, disable_tqdm=True, report=False, guardrails=False, save_strategy="no",
            lr_scheduler_type="constant", train_sampling_strategy="sequential",
        )  # fmt: skip
        return fastpo.train(
            model, toy.rows(16), processing_class=toy.tokenizer(), peft_config=peft_config,
            quantization_config=quantization_config, **{**defaults, **options},
        )  # fmt: skip

    return go


def lora(**changes):
    return peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


def steps(result, key="loss"):
    return [line[key] for line in result.log_history if "grad_norm" in line]


def adapter_weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


@pytest.fixture
def base(toy, tmp_path):
    """Folder of a base model of a shape that bitsandbytes can quantise."""
    toy.model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}, {"init_lora_weights": "pissa"}],
    ids=["lora", "dora", "rslora", "trained_head", "pissa"],
)
def test_new_adapter_starts_at_its_base(run, base, changes) -> None:
    """ln 2 at the first step, and the base's log-probabilities; also where the adapter takes part of the base away."""
    result = run(base, peft_config=lora(**changes))
    losses = steps(result)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0] - 0.05
    plain = run(base, name="plain", peft_config=None, learning_rate=0.0, max_steps=1)
    assert steps(result, "logps/chosen")[0] == pytest.approx(steps(plain, "logps/chosen")[0], abs=1e-3)


def test_policy_in_memory_is_the_reference(run, base, toy) -> None:
    """Not what lies under its name: in an iterative loop that would be the first model for ever."""
    model = load_model(base, use_cpu=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    result = run(copy.deepcopy(model), max_steps=1)
    assert steps(result)[0] == pytest.approx(math.log(2), abs=1e-6)
    moved = run(copy.deepcopy(model), name="other", max_steps=1, ref_model=load_model(base, use_cpu=True))
    assert abs(steps(moved)[0] - math.log(2)) > 1e-3


def test_trained_adapter_is_its_own_reference(run, base) -> None:
    """Continued by its folder or in memory: the loss is ln 2 at the start, and the reference is the adapter's copy."""
    first = run(base)
    folder = base.parent / "run"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    after = run(first.model, name="probe", peft_config=None, learning_rate=0.0, max_steps=1)
    for model in (folder, peft.PeftModel.from_pretrained(load_model(base, use_cpu=True), folder, is_trainable=True)):
        again = run(model, name=f"again-{type(model).__name__}", peft_config=None)
        assert steps(again)[0] == pytest.approx(math.log(2), abs=1e-6)
        assert steps(again)[-1] < steps(again)[0] - 0.02
        # Where it starts is where the first run ended, far from the base.
        start = steps(again, "logps/rejected")[0]
        assert start == pytest.approx(steps(after, "logps/rejected")[0], abs=1e-3)
        assert abs(start - steps(first, "logps/rejected")[0]) > 0.5


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_quantised_base_trains_and_goes_on(run, base, bits) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from transformers import BitsAndBytesConfig

    if bits == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    options = dict(quantization_config=config, dtype="bfloat16")
    result = run(base, **options, save_merged=True)
    losses = steps(result)
    assert losses[0] == pytest.approx(math.log(2), abs=0.02)
    assert losses[-1] < losses[0] - 0.05
    assert not any(p.requires_grad for n, p in result.model.named_parameters() if "lora_" not in n)

    folder = base.parent / "run"
    again = run(folder, name="again", peft_config=None, max_steps=2, **options)
    assert steps(again)[0] == pytest.approx(math.log(2), abs=0.02)
    assert steps(again, "logps/rejected")[0] < steps(result, "logps/rejected")[0] - 0.5
    merged = load_model(folder / "merged", use_cpu=True)
    assert not getattr(merged, "is_quantized", False)


def test_quantised_base_needs_an_adapter(run, base) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from transformers import BitsAndBytesConfig

    with pytest.raises(ConfigError, match="pass peft_config"):
        run(base, peft_config=None, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


def test_checkpointing_changes_nothing(run, base) -> None:
    """Reentrant checkpointing too, whose layers pass no gradient where their inputs ask for none."""
    weights = {}
    for name, options in {
        "off": {"gradient_checkpointing": False},
        "on": {"gradient_checkpointing": True},
        "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    }.items():
        torch.manual_seed(0)
        config = lora(modules_to_save=["lm_head"])
        weights[name] = adapter_weights(run(base, name=name, peft_config=config, **options).model)
    for name in ("on", "reentrant"):
        torch.testing.assert_close(weights[name], weights["off"], rtol=1e-4, atol=1e-5)


def test_merged_beside_the_adapter(run, base, toy) -> None:
    result = run(base, save_merged=True)
    folder = base.parent / "run"
    merged = load_model(folder / "merged", use_cpu=True).eval()
    row = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(merged(row).logits, result.model.eval()(row).logits, rtol=1e-4, atol=1e-5)
    assert (folder / "merged" / "tokenizer.json").exists()
    assert (folder / "adapter_model.safetensors").exists()
