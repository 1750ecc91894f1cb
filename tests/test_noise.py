"""disable_dropout means no noise: what modules hold, what they read from the configuration, and what no name tells."""

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from fastpo.data import Example
from fastpo.errors import ConfigError
from fastpo.model import Policy
from fastpo.noise import check_quiet, disable_dropout

SIZES = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, pad_token_id=0, max_position_embeddings=64)  # fmt: skip
NOISY = {
    "mixtral": ("Mixtral", dict(num_local_experts=4, router_jitter_noise=0.3)),
    "phimoe": ("Phimoe", dict(num_local_experts=4)),  # its own default: router_jitter_noise 0.01
    "starcoder2": ("Starcoder2", dict(residual_dropout=0.2, embedding_dropout=0.2, attention_dropout=0.2)),
    "falcon": (
        "Falcon",
        dict(new_decoder_architecture=True, num_kv_heads=2, hidden_dropout=0.3, attention_dropout=0.2),
    ),
    "opt": ("OPT", dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0.2, layerdrop=0.5)),
    "gpt2": ("GPT2", dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.2, embd_pdrop=0.2)),
}


def make_model(name: str) -> nn.Module:
    family, options = NOISY[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options})
    return transformers.AutoModelForCausalLM.from_config(config)


def examples() -> list[Example]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(3, 60, n).astype(np.int32) for n in (9, 12, 14)]
    return [Example(prompt_ids=ids[0], responses=ids[1:], pairs=[(0, 1)])]


@pytest.mark.parametrize("name", NOISY)
def test_noise_by_every_name_is_off_and_the_config_is_saved_as_it_was(name, tmp_path):
    model = make_model(name)
    before = model.config.to_dict()
    policy = Policy(model)
    with pytest.raises(ConfigError, match="random in train mode though disable_dropout is on"):
        check_quiet(policy, examples())
    disable_dropout(model)
    check_quiet(policy, examples())
    model.save_pretrained(tmp_path)
    saved = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    noise = {k for k, v in before.items() if isinstance(v, float) and ("drop" in k or "jitter" in k)}
    assert noise and {k: saved[k] for k in noise} == {k: before[k] for k in noise}


def test_noise_that_no_name_tells_is_found_and_placed():
    class Shaken(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + 0.01 * torch.randn_like(x) * self.training

    model = make_model("mixtral")
    disable_dropout(model)
    model.model.layers[1].post_attention_layernorm = Shaken(model.model.layers[1].post_attention_layernorm)
    before = torch.random.get_rng_state()
    with pytest.raises(ConfigError, match=r"first behind model\.layers\.1\.post_attention_layernorm \(Shaken\)"):
        check_quiet(Policy(model), examples())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training is False or all(m.training == model.training for m in model.modules())


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
