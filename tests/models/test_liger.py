"""Liger's kernels for the trunk's layers: what is asked of them, what is refused, and on a GPU the same numbers."""

import sys
import types

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from fastpo.data import Example
from fastpo.data.packing import collate
from fastpo.errors import ConfigError
from fastpo.models.adapters import apply_liger
from fastpo.models.policy import Policy
from fastpo.models.verify import verify_policy


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch):
    """A stand-in for liger-kernel that notes what it is asked to replace; its table knows llama only."""
    asked: list[dict] = []

    def apply_to_llama(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, model=None):
        losses = dict(cross_entropy=cross_entropy, fused_linear_cross_entropy=fused_linear_cross_entropy)
        asked.append(dict(losses, rope=rope, rms_norm=rms_norm, model=model))

    patch = types.ModuleType("liger_kernel.transformers.monkey_patch")
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply_to_llama}
    package, inner = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    inner.monkey_patch = patch
    for module in (package, inner, patch):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


def on_a_gpu(family: str):
    """What apply_liger looks at, of a model that is on a GPU."""
    weight = types.SimpleNamespace(device=torch.device("cuda"))
    return types.SimpleNamespace(
        config=types.SimpleNamespace(model_type=family), parameters=lambda: iter([weight])
    )  # fmt: skip


def test_liger_replaces_layers_and_never_the_loss(liger) -> None:
    model = on_a_gpu("llama")
    apply_liger(model)
    apply_liger(model, {"rope": False, "cross_entropy": False})
    wrapped = types.SimpleNamespace(get_base_model=lambda: model)
    apply_liger(wrapped)
    assert [a.pop("model") for a in liger] == [model] * 3
    losses = {"cross_entropy": False, "fused_linear_cross_entropy": False, "rms_norm": True}
    assert liger == [{**losses, "rope": True}, {**losses, "rope": False}, {**losses, "rope": True}]


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("gpt2", None, "no layers for the family 'gpt2'"),
        ("llama", {"rms_nrom": False}, "llama has no kernel 'rms_nrom'; did you mean rms_norm"),
        ("llama", {"fused_linear_cross_entropy": True}, "is a loss kernel; fastpo's own head"),
    ],
)
def test_liger_refusals(liger, family, config, message) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_liger(on_a_gpu(family), config)
    assert not liger


def test_liger_needs_its_package_and_a_gpu(toy, liger, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="needs a GPU .* on the cpu"):
        apply_liger(toy.model())
    with pytest.raises(ConfigError, match="no layers for the family 'gpt2'"):  # on the CPU now, on a GPU later
        apply_liger(types.SimpleNamespace(config=types.SimpleNamespace(model_type="gpt2")), device="cuda:0")
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(ConfigError, match="pip install liger-kernel"):
        apply_liger(toy.model())


@pytest.mark.gpu
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_liger_on_a_gpu(adapter: bool) -> None:
    pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    # A family that no other GPU test runs on the CPU: Liger replaces its rotary embeddings in the whole process.
    torch.manual_seed(1)
    sizes = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    model = MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=2, sliding_window=None)).cuda().eval()
    if adapter:
        peft = pytest.importorskip("peft", reason="needs peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    policy = Policy(model)
    ids = np.random.default_rng(0).integers(3, 97, (3, 12)).astype(np.int32)
    examples = [Example(prompt_ids=row[:4], responses=[row[4:9], row[9:]], pairs=[(0, 1)]) for row in ids]
    batch = collate(examples, range(3)).to(torch.device("cuda"))

    def both() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad(set_to_none=True)
        with policy.attach():
            logp = policy.logp(batch)
            (logp * torch.linspace(-1.0, 1.5, len(logp), device="cuda")).sum().backward()
        return logp.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    want, want_grads = both()
    forward = policy.causal_lm.forward
    apply_liger(model)
    assert policy.causal_lm.forward == forward  # no loss kernel in it
    assert "liger" in f"{policy.trunk.norm.forward.__module__} {policy.trunk.layers[0].mlp.forward.__module__}"
    verify_policy(policy, examples)
    got, got_grads = both()
    assert got_grads.keys() == want_grads.keys()
    for name, value in {"logp": want, **want_grads}.items():
        error = (({"logp": got, **got_grads})[name] - value).abs().max()
        assert error <= 1e-3 * max(float(value.abs().max()), 1e-3), name
