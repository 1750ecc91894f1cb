"""disable_dropout means no noise, and what is still random in train mode is named before the first step."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from fastpo.errors import ConfigError
from fastpo.models.noise import check_quiet, disable_dropout
from fastpo.models.policy import Policy

_spec = importlib.util.spec_from_file_location("fastpo_test_model", Path(__file__).with_name("test_policy.py"))
families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(families)
EXAMPLES = families.make_examples()[:2]
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
NOISY = {
    "mixtral": ("Mixtral", {**EXPERTS, "router_jitter_noise": 0.3}),
    "phimoe": ("Phimoe", {**EXPERTS, "router_jitter_noise": 0.4}),  # draws experts; this says among which, also in eval
    "phimoe_input": ("Phimoe", {**EXPERTS, "input_jitter_noise": 0.3}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.5}),
    "falcon": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "hidden_dropout": 0.3}),
    "gpt_neo": ("GPTNeo", {"attention_dropout": 0.3, "num_layers": 2, "attention_types": [[["global"], 2]]}),
}  # fmt: skip
UNPACKED = {"falcon", "gpt_neo"}


def make(name: str, **overrides: object) -> transformers.PreTrainedModel:
    family, kwargs = NOISY[name]
    config = getattr(transformers, f"{family}Config")(**{**families._SIZES, **kwargs, **overrides})
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("name", NOISY)
def test_noise_is_off(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if name in UNPACKED:
        monkeypatch.setenv("FASTPO_ATTENTION", "own")
    model = make(name)
    rows = EXAMPLES * 4  # enough tokens that some expert is another
    before, config = families.own_logps(model.eval(), EXAMPLES), model.config.to_dict()
    with pytest.raises(ConfigError, match="random in train mode though disable_dropout is on.*first behind"):
        check_quiet(Policy(model), rows)
    disable_dropout(model)
    check_quiet(Policy(model), EXAMPLES)
    check_quiet(Policy(copy.deepcopy(model)), EXAMPLES)
    assert torch.equal(families.own_logps(model.train(), EXAMPLES), families.own_logps(model.train(), EXAMPLES))
    assert torch.equal(families.own_logps(model.eval(), EXAMPLES), before)  # a threshold is no noise
    model.save_pretrained(tmp_path)
    assert model.config.to_dict().items() >= {k: v for k, v in config.items() if "drop" in k or "jitter" in k}.items()
    saved = type(model.config).from_pretrained(tmp_path).to_dict()
    assert {k: v for k, v in saved.items() if "drop" in k or "jitter" in k} == {
        k: v for k, v in config.items() if "drop" in k or "jitter" in k
    }


def test_unknown_noise_is_named_and_leaves_no_trace() -> None:
    class Noisy(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (
                self.inner(x) * (1 + 0.01 * torch.rand(()) + 0.01 * np.random.rand())
                if self.training
                else self.inner(x)
            )

    model = families.make_model("llama")
    disable_dropout(model)
    policy = Policy(model)
    check_quiet(policy, EXAMPLES)
    model.model.layers[1].mlp = Noisy(model.model.layers[1].mlp)
    modes, state = [m.training for m in model.modules()], torch.random.get_rng_state()
    drawn = np.random.get_state()[2]
    with pytest.raises(ConfigError, match=r"first behind model\.layers\.1\.mlp \(Noisy\).*disable_dropout=False"):
        check_quiet(policy, EXAMPLES)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert np.random.get_state()[2] == drawn
    assert not any(m._forward_hooks for m in model.modules())


def test_packed_attention_reaches_a_quiet_configuration() -> None:
    """Persimmon's layers read their dropout from the configuration, and their attention's name from the same one."""
    config = transformers.PersimmonConfig(**families._SIZES, attention_dropout=0.3, hidden_dropout=0.3)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    disable_dropout(model)
    assert model.model.layers[0].self_attn.config.attention_dropout == 0.0
    assert model.config.attention_dropout == 0.3
    model.set_attn_implementation("eager")
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"


def test_a_run_with_noise_ends_before_its_first_step_and_goes_with_the_option_off(toy, sgd_run, monkeypatch):
    original = toy.model

    def shaken(**changes):
        model = original(**changes)
        model.model.norm.register_forward_hook(lambda m, i, out: out + 0.01 * torch.randn_like(out) * m.training)
        return model

    monkeypatch.setattr(type(toy), "model", staticmethod(shaken))
    with pytest.raises(ConfigError, match="disable_dropout=False"):
        sgd_run(toy.rows(4), loss_type="simpo", max_steps=1)
    result = sgd_run(toy.rows(4), loss_type="simpo", max_steps=1, disable_dropout=False)
    assert result.state.global_step == 1
