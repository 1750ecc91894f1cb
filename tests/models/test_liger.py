"""Liger's kernels for the trunk's layers: what is asked of them, what is refused, when they are on without being asked,
what is put back, and on a GPU the same numbers."""

import logging
import sys
import types
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM
from transformers.models.llama import modeling_llama

from fastpo.config.train_config import TrainConfig
from fastpo.data import Example
from fastpo.data.packing import collate
from fastpo.errors import ConfigError
from fastpo.models import cpu_layers, liger, lora_layers
from fastpo.models.fused import Fused
from fastpo.models.liger import LigerLayers
from fastpo.models.policy import Policy
from fastpo.models.verify import verify_policy

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Installed:
    """A stand-in for liger-kernel, in plain PyTorch: it notes what it is asked to replace; its table knows llama only.

    `factor` is by how much its norm is wrong.
    """

    def __init__(self):
        self.asked: list[dict] = []
        self.factor = 1.0

    def apply(self, rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True,
              geglu=True, model=None):  # fmt: skip
        asked = dict(rope=rope, cross_entropy=cross_entropy, fused_linear_cross_entropy=fused_linear_cross_entropy,
                     rms_norm=rms_norm, swiglu=swiglu, geglu=geglu)  # fmt: skip
        self.asked.append({**asked, "model": model})
        original = modeling_llama.apply_rotary_pos_emb
        if rope:
            modeling_llama.apply_rotary_pos_emb = lambda *a, **k: original(*a, **k)
        if rms_norm:
            plain = modeling_llama.LlamaRMSNorm.forward
            modeling_llama.LlamaRMSNorm = type("LigerRMSNorm", (nn.Module,), {})
            for module in model.modules():
                if type(module).__name__ == "LlamaRMSNorm":
                    module.in_place = True
                    module.forward = types.MethodType(lambda self, x: self_factor() * plain(self, x), module)

        def self_factor():
            return self.factor


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    fake = Installed()
    patch = types.ModuleType("liger_kernel.transformers.monkey_patch")
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": fake.apply}
    package, inner = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    package.__spec__ = ModuleSpec("liger_kernel", None)
    inner.monkey_patch = patch
    for module in (package, inner, patch):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return fake


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)


def of_family(family: str):
    return types.SimpleNamespace(config=types.SimpleNamespace(model_type=family))


def test_layers_are_replaced_and_never_the_loss(toy, installed) -> None:
    model = toy.model()
    LigerLayers(model)
    LigerLayers(model, {"rope": False, "cross_entropy": False})
    LigerLayers(model, all_kernels=False)
    assert [a.pop("model") for a in installed.asked] == [model] * 3
    none = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    # What is left to Liger's own default is not named.
    assert installed.asked[0] == {**none, "rope": True, "rms_norm": True, "swiglu": True, "geglu": True}
    assert installed.asked[1] == {**none, "rope": False, "rms_norm": True, "swiglu": True, "geglu": True}
    assert installed.asked[2] == {**none, "rope": True, "rms_norm": True, "swiglu": True, "geglu": False}


def test_they_are_put_in_place_and_back(toy, installed) -> None:
    model = toy.model()
    rotary, norm, before = (
        modeling_llama.apply_rotary_pos_emb,
        modeling_llama.LlamaRMSNorm,
        dict(vars(model.model.norm)),
    )
    layers = LigerLayers(model)
    assert str(layers) == "LlamaRMSNorm, apply_rotary_pos_emb"

    def own() -> bool:
        return modeling_llama.apply_rotary_pos_emb is rotary and vars(model.model.norm) == before

    assert own() and modeling_llama.LlamaRMSNorm is norm
    layers.switch(True)
    assert not own() and vars(model.model.norm)["in_place"] and modeling_llama.LlamaRMSNorm is norm
    assert modeling_llama.apply_rotary_pos_emb is not rotary
    layers.switch(False)
    assert own()


def test_what_computes_something_else_is_found(toy, installed) -> None:
    layers = LigerLayers(toy.model())
    assert layers.disagrees(CPU) == ""
    installed.factor = 1.1
    assert layers.disagrees(CPU) == "LlamaRMSNorm does not compute what the model's own does"
    installed.factor = None  # as a kernel that cannot run here
    assert layers.disagrees(CPU) == "LlamaRMSNorm cannot be tried: TypeError"
    installed.factor = 1.0
    rotary = LigerLayers(toy.model(), {"rms_norm": False})
    rotary._files[-1][1]["apply_rotary_pos_emb"] = (lambda q, k, *_: (q, k), modeling_llama.apply_rotary_pos_emb)
    assert "apply_rotary_pos_emb does not compute" in rotary.disagrees(CPU)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("gpt2", None, "no layers for the family 'gpt2'"),
        ("llama", {"rms_nrom": False}, "llama has no kernel 'rms_nrom'; did you mean 'rms_norm'"),
        ("llama", {"qqq": False}, "llama has no kernel 'qqq': it has cross_entropy, "),
        ("llama", {"fused_linear_cross_entropy": True}, "is a loss kernel; fastpo's own head"),
    ],
)
def test_liger_refusals(installed, family, config, message) -> None:
    with pytest.raises(ConfigError, match=message):
        LigerLayers(of_family(family), config)
    assert not installed.asked


def choice(model, device, monkeypatch, **options) -> Fused:
    """What is chosen for a model, whose trial runs where the model is."""
    tried = LigerLayers.disagrees
    monkeypatch.setattr(LigerLayers, "disagrees", lambda self, device: tried(self, CPU))
    fused = Fused()
    fused.choose(model, TrainConfig.build(None, **options), device)
    return fused


def test_on_a_gpu_they_are_on_where_they_are_installed(toy, installed, monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO, "fastpo")
    fused = choice(toy.model(), CUDA, monkeypatch)
    assert fused.on and isinstance(fused.liger, LigerLayers)
    assert [r.message for r in caplog.records] == [
        "liger-kernel's LlamaRMSNorm, apply_rotary_pos_emb for llama (use_liger_kernel=False: none)"
    ]
    assert not installed.asked[0]["geglu"] and choice(toy.model(), CUDA, monkeypatch, use_liger_kernel=True).liger
    assert installed.asked[1]["geglu"]
    # Its own fusing, another family, and who says so.
    assert choice(toy.model(), CUDA, monkeypatch, torch_compile=True).liger is None
    assert choice(of_family("gpt2"), CUDA, monkeypatch).liger is None
    off = choice(toy.model(), CUDA, monkeypatch, use_liger_kernel=False)
    assert off.liger is None and not off.on
    with pytest.raises(ConfigError, match="no layers for the family 'gpt2'"):
        choice(of_family("gpt2"), CUDA, monkeypatch, use_liger_kernel=True)


def test_on_a_gpu_they_stay_off_where_they_disagree(toy, installed, monkeypatch, caplog) -> None:
    installed.factor = 1.1
    fused = choice(toy.model(), CUDA, monkeypatch)
    assert fused.on and fused.liger is None
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "stay off: LlamaRMSNorm does not" in caplog.text


def test_on_a_gpu_without_the_package(toy, absent, monkeypatch) -> None:
    fused = choice(toy.model(), CUDA, monkeypatch)
    assert fused.on and fused.liger is None
    with pytest.raises(ConfigError, match="pip install liger-kernel"):
        choice(toy.model(), CUDA, monkeypatch, use_liger_kernel=True)


def test_on_a_cpu_the_switch_is_of_our_own_layers(toy, absent, monkeypatch, caplog) -> None:
    caplog.set_level(logging.INFO, "fastpo")
    model = toy.model()
    rotary = modeling_llama.apply_rotary_pos_emb

    def fused_ones(**options) -> set[str]:
        policy = Policy(model)
        policy.fused.choose(model, TrainConfig.build(None, **options), CPU)
        with policy.attach():
            found = {n for n, m in {"rms_norm": model.model.norm, "swiglu": model.model.layers[0].mlp}.items()
                     if "forward" in vars(m)}  # fmt: skip
            found |= {"rope"} if modeling_llama.apply_rotary_pos_emb is not rotary else set()
        assert modeling_llama.apply_rotary_pos_emb is rotary and "forward" not in vars(model.model.norm)
        return found

    everything = set(cpu_layers.NAMES) if cpu_layers.available() else set()
    assert fused_ones() == everything and not caplog.records
    assert fused_ones(use_liger_kernel=True) == everything
    assert len(caplog.records) == 1 and "use_liger_kernel" in caplog.text
    assert fused_ones(use_liger_kernel=False) == set()
    assert fused_ones(liger_kernel_config={"rope": False}) == everything - {"rope"}
    assert fused_ones(liger_kernel_config={"swiglu": False, "rms_norm": False}) == everything - {"swiglu", "rms_norm"}
    with pytest.raises(ConfigError, match="a CPU has no kernel 'rms_nrom'; did you mean 'rms_norm'"):
        fused_ones(liger_kernel_config={"rms_nrom": False})


def test_the_switch_is_of_lora_layers_too(toy) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    assert not lora_layers._disagrees("cpu")
    model = peft.get_peft_model(toy.model(), peft.LoraConfig(r=4, target_modules="all-linear"))
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    for on in (True, False):
        with Policy(model, fused=on).attach():
            assert ("forward" in vars(layer)) == on
        assert "forward" not in vars(layer)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral", "phi3"])
def test_what_liger_changes_is_put_back(family, adapter) -> None:
    """liger-kernel's own functions, whose kernels do not run here: what they replace is found, and their losses stay
    off."""
    pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    sizes = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **sizes, num_key_value_heads=2, head_dim=16, pad_token_id=0)
    )
    if adapter:
        peft = pytest.importorskip("peft", reason="needs peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear")).get_base_model()
    file = sys.modules[type(model).__module__]
    before, functions = [dict(vars(m)) for m in model.modules()], dict(vars(file))

    def as_before() -> bool:
        same = all(vars(m).keys() == b.keys() and all(vars(m)[n] is v for n, v in b.items())
                   for m, b in zip(model.modules(), before, strict=True))  # fmt: skip
        return same and all(vars(file)[n] is v for n, v in functions.items())

    assert liger.knows(model)
    layers = LigerLayers(model, all_kernels=False)
    assert as_before()
    layers.switch(True)
    assert "forward" in vars(model.model.norm) and "forward" not in vars(model)
    assert file.apply_rotary_pos_emb is not functions["apply_rotary_pos_emb"]
    layers.switch(False)
    assert as_before()


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
    policy.fused.choose(policy.causal_lm, TrainConfig(), torch.device("cuda"))
    assert policy.fused.liger is not None
    with policy.attach():
        assert policy.causal_lm.forward == forward  # no loss kernel in it
        assert "liger" in f"{policy.trunk.norm.forward.__module__} {policy.trunk.layers[0].mlp.forward.__module__}"
    assert "forward" not in vars(policy.trunk.norm)
    verify_policy(policy, examples)
    got, got_grads = both()
    assert got_grads.keys() == want_grads.keys()
    for name, value in {"logp": want, **want_grads}.items():
        error = (({"logp": got, **got_grads})[name] - value).abs().max()
        assert error <= 1e-3 * max(float(value.abs().max()), 1e-3), name
