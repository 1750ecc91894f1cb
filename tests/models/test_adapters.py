"""Adapters of many kinds, quantised bases, merged copies: packed equals own, and the base is what it was."""

import logging
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fastpo.data import Example
from fastpo.data.packing import collate
from fastpo.errors import ConfigError, UnsupportedModelError
from fastpo.models import adapters
from fastpo.models.adapters import base_tensors, save_merged, with_adapter
from fastpo.models.loading import load_model, load_tokenizer
from fastpo.models.policy import Policy
from fastpo.models.verify import verify_policy

peft = pytest.importorskip("peft", reason="needs peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*tie_word_embeddings.*:UserWarning")
VOCABULARY = 97


def make_model(dtype=torch.float32, seed=1, **changes):
    options = dict(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**options, **changes}))
    with torch.no_grad():  # far from the flat start, where every rule gives log(1 / V)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.1))
    return model.to(dtype).eval()


def make_examples() -> list[Example]:
    rng = np.random.default_rng(0)
    rows = [(5, (3, 7)), (1, (9, 1)), (12, (6, 2))]
    ids = lambda n: rng.integers(3, VOCABULARY, n).astype(np.int32)  # noqa: E731
    return [Example(prompt_ids=ids(p), responses=[ids(r) for r in lengths], pairs=[(0, 1)]) for p, lengths in rows]


EXAMPLES = make_examples()


def own_logps(model) -> torch.Tensor:
    parts = []
    for example in EXAMPLES:
        for response in example.responses:
            row = torch.tensor([[*example.prompt_ids, *response]])
            logits = model(input_ids=row[:, :-1], use_cache=False).logits[0, -len(response) :].float()
            parts.append(logits.log_softmax(-1).gather(-1, row[0, -len(response) :, None]).squeeze(-1))
    return torch.cat(parts)


def packed_logps(policy: Policy) -> torch.Tensor:
    with policy.attach():
        return policy.logp(collate(EXAMPLES, range(len(EXAMPLES))))


def gradients(model, logp) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    (logp * torch.linspace(-1.0, 1.5, len(logp))).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(got, want, relative=1e-5, scale=0.0) -> None:
    got, want = got.detach(), want.detach()
    scale = max(scale, float(want.abs().max()))
    assert float((got - want).abs().max()) <= relative * scale


def shake(model, by=0.05) -> None:
    """The adapter as if trained: no tensor of it at its start."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * by)


def lora(**changes):
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **changes})


KINDS = {
    "lora": lambda: lora(),
    "rslora": lambda: lora(use_rslora=True, lora_alpha=16),
    "dora": lambda: lora(use_dora=True),
    "all_linear": lambda: lora(target_modules="all-linear"),
    "embedding": lambda: lora(target_modules=["embed_tokens", "v_proj"]),
    "bias": lambda: lora(lora_bias=True, target_modules=["q_proj"]),
    "trained_head": lambda: lora(modules_to_save=["lm_head"]),
    "trained_embedding": lambda: lora(modules_to_save=["embed_tokens"]),
    "tokens": lambda: lora(trainable_token_indices=[3, 4, 5]),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
                                  task_type="CAUSAL_LM"),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
}  # fmt: skip


# ---- a new adapter


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapter(kind: str, tied: bool, tmp_path) -> None:
    """Starts as its base; packed equals own; switched off it is its base; merged and loaded again it is itself."""
    base = make_model(tie_word_embeddings=tied, attention_bias=kind == "bias")
    want_base, before = own_logps(base).detach(), {n: t.clone() for n, t in base_tensors(base).items()}
    config = KINDS[kind]()
    model = with_adapter(base, config).eval()
    assert adapters.starts_at_base(config)
    close(own_logps(model).detach(), want_base)

    shake(model)
    if kind == "tokens" and tied:
        with pytest.raises(UnsupportedModelError, match="trainable_token_indices reach the output head"):
            Policy(model)
        return
    policy = Policy(model)
    verify_policy(policy, EXAMPLES)
    want = own_logps(model)
    want_grads = gradients(model, want)
    assert float((want.detach() - want_base).abs().max()) > 1e-2
    got = packed_logps(policy)
    close(got, want)
    got_grads = gradients(model, got)
    assert got_grads.keys() == want_grads.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    largest = max(float(g.abs().max()) for g in want_grads.values())
    for name, gradient in want_grads.items():
        close(got_grads[name], gradient, scale=0.1 * largest)

    after = base_tensors(model)
    extra = adapters.all_tensors(model).keys() - after.keys()
    assert extra >= {n for n, p in model.named_parameters() if p.requires_grad}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    with model.disable_adapter():
        close(packed_logps(policy), want_base)

    state = {n: t.clone() for n, t in model.state_dict().items()}
    save_merged(model, None, tmp_path, max_shard_size="50KB")
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert not (tmp_path / "adapter_config.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    close(own_logps(merged), want)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "mica", "pissa", "olora"])
def test_what_a_new_lora_starts_from(init) -> None:
    """`starts_at_base` and `rewrites_base` say what is measured, for every initialisation that is allowed."""
    base = make_model()
    want = own_logps(base).detach()
    config = lora(init_lora_weights=init)
    model = with_adapter(base, config).eval()
    on = own_logps(model).detach()
    with model.disable_adapter():
        off = own_logps(model).detach()
    assert adapters.starts_at_base(config) == torch.allclose(on, want, atol=1e-4)
    assert adapters.rewrites_base(config) != torch.allclose(off, want, atol=1e-4)


def test_unknown_start_is_not_claimed() -> None:
    config = peft.FourierFTConfig(n_frequency=50, target_modules=["q_proj"])
    assert not adapters.starts_at_base(config)
    base = make_model()
    want = own_logps(base).detach()
    assert float((own_logps(with_adapter(base, config).eval()).detach() - want).abs().max()) > 0.1


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_rewritten_base_is_found_again(init: str, tmp_path) -> None:
    """The saved adapter on the original base is the trained model: its part of the base is taken away again."""
    make_model().save_pretrained(tmp_path / "base")
    model = with_adapter(load_model(tmp_path / "base", use_cpu=True), lora(init_lora_weights=init)).eval()
    shake(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "adapter")
    again = load_model(tmp_path / "adapter", use_cpu=True).eval()
    close(own_logps(again).detach(), own_logps(model).detach())
    save_merged(model, None, tmp_path / "merged")
    close(own_logps(load_model(tmp_path / "merged", use_cpu=True)).detach(), own_logps(model).detach())


def test_adapter_in_fp32_on_a_bf16_base() -> None:
    model = with_adapter(make_model(torch.bfloat16), lora(target_modules="all-linear"))
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())
    assert not any("lm_head.lora" in n for n, _ in model.named_parameters())  # all-linear leaves the head out
    shake(model)
    policy = Policy(model)
    assert policy.low_precision
    verify_policy(policy, EXAMPLES)
    assert all(torch.isfinite(g).all() for g in gradients(model, packed_logps(policy)).values())
    assert not Policy(make_model()).low_precision


def test_merged_keeps_the_bases_dtype(tmp_path) -> None:
    model = with_adapter(make_model(torch.bfloat16), lora()).eval()
    shake(model, by=0.2)
    save_merged(model, None, tmp_path)
    merged = load_model(tmp_path, use_cpu=True)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_base_model().get_submodule(name)
    want = layer.base_layer.weight.float() + layer.get_delta_weight("default")
    assert torch.equal(merged.get_submodule(name).weight, want.bfloat16())  # rounded once


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ("lora", ConfigError, r"peft_config must be a PeftConfig such as .* not 'lora'"),
        (lora(target_modules=["query"]), ConfigError, r"does not fit LlamaForCausalLM: Target modules .*query"),
        (lora(init_lora_weights="pissa_niter_4"), ConfigError, r"'pissa_niter_4' changes the base.*'pissa'"),
        (lora(alora_invocation_tokens=[3]), UnsupportedModelError, "alora_invocation_tokens"),
        (peft.AdaLoraConfig(total_step=9, target_modules=["q_proj"]), UnsupportedModelError, "ADALORA.*use LoRA"),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), UnsupportedModelError, "virtual tokens"),
    ],
)
def test_adapter_that_is_refused(config, error, message) -> None:
    with pytest.raises(error, match=message) as caught:
        with_adapter(make_model(), config)
    assert "\n" not in str(caught.value)


def test_peft_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"peft_config needs .* pip install 'fastpo\[peft\]'"):
        with_adapter(make_model(), lora())


# ---- a trained adapter


@pytest.fixture
def trained(tmp_path):
    """(folder of the base, folder of a trained adapter on it, the adapter's own log-probabilities, the base's)."""
    base = make_model()
    base.save_pretrained(tmp_path / "base")
    base = load_model(tmp_path / "base", use_cpu=True).eval()
    of_base = own_logps(base).detach()
    model = with_adapter(base, lora()).eval()
    shake(model, by=0.2)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", own_logps(model).detach(), of_base


def test_adapter_folder_is_base_and_adapter(trained) -> None:
    _, folder, want, of_base = trained
    model = load_model(folder, use_cpu=True, dtype="float32").eval()
    assert float((want - of_base).abs().max()) > 0.1
    close(own_logps(model).detach(), want)
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    verify_policy(Policy(model), EXAMPLES)


def test_tokenizer_of_an_adapter_saved_without_one(trained, toy) -> None:
    base, folder, *_ = trained
    toy.tokenizer().save_pretrained(base)
    assert load_tokenizer(folder)("w5 w6").input_ids == toy.tokenizer()("w5 w6").input_ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32}, r"trained for another base than .*base'?: size mismatch"),
        ({"num_hidden_layers": 3}, r"no weights for .*layers\.2"),
        ({"num_hidden_layers": 1}, r"no place for its .*layers\.1"),
    ],
    ids=["width", "deeper", "shallower"],
)
def test_adapter_for_another_base(trained, changes, message) -> None:
    base, folder, *_ = trained
    make_model(**changes).save_pretrained(base)  # the base's folder holds another model by now
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(folder, use_cpu=True)
    assert "\n" not in str(caught.value)


def test_adapter_for_another_family(trained) -> None:
    import transformers

    base, folder, *_ = trained
    sizes = dict(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(base)
    with pytest.raises(ConfigError, match="another base.*Target modules") as caught:
        load_model(folder, use_cpu=True)
    assert "\n" not in str(caught.value)


def test_adapter_without_its_base(trained, tmp_path) -> None:
    base, folder, *_ = trained
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"cannot load the model '.*base', the base of the adapter '.*adapter'"):
        load_model(folder, use_cpu=True)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), ""))
    with pytest.raises(ConfigError, match=r"does not name its base model; .*is_trainable=True"):
        load_model(folder, use_cpu=True)
    config.write_text(config.read_text()[:40])
    with pytest.raises(ConfigError, match=r"cannot read the adapter_config\.json of"):
        load_model(folder, use_cpu=True)


def test_adapter_that_names_another_base(trained, tmp_path, caplog) -> None:
    base, folder, *_ = trained
    for name, warns in (("base", False), ("other", True)):
        make_model().save_pretrained(tmp_path / "moved" / name)
        model = peft.PeftModel.from_pretrained(load_model(tmp_path / "moved" / name, use_cpu=True), folder)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="fastpo"):
            adapters.check_adapter_base(model)
        assert bool(caplog.records) == warns, name
    assert "other" in caplog.text and str(base) in caplog.text


def test_adapter_of_transformers_own_mixin(trained) -> None:
    """`model.load_adapter`, without a PeftModel around it."""
    base, folder, want, _ = trained
    model = load_model(base, use_cpu=True)
    model.load_adapter(str(folder), is_trainable=True)
    policy = Policy(model.eval())
    verify_policy(policy, EXAMPLES)
    close(packed_logps(policy).detach(), want)


# ---- quantised bases

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
QUANTISED = {"nf4": NF4, "int8": {"load_in_8bit": True}}


@pytest.fixture(params=QUANTISED)
def quantised(request, tmp_path):
    """`quantised(dtype)`: a Llama loaded in 4 or 8 bits by bitsandbytes; its folder is tmp_path / "base"."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from transformers import BitsAndBytesConfig

    def load(dtype=torch.bfloat16):
        make_model(dtype).save_pretrained(tmp_path / "base")
        config = BitsAndBytesConfig(**QUANTISED[request.param], bnb_4bit_compute_dtype=dtype)
        return load_model(tmp_path / "base", use_cpu=True, quantization_config=config).eval()

    load.kind = request.param
    return load


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_quantised_base(quantised, dtype) -> None:
    """The guards hold, the base is smaller and stays as it was, the adapter alone is trained, and in fp32."""
    base = quantised(dtype)
    plain = sum(p.nbytes for p in make_model(dtype).parameters())
    assert sum(p.nbytes for p in base.parameters()) < 0.75 * plain
    assert adapters.is_quantized(base)
    with pytest.raises(ConfigError, match="pass peft_config"):
        adapters.check_quantized(base)
    before = {n: (t.dtype, t.clone()) for n, t in base_tensors(base).items()}
    model = with_adapter(base, lora(target_modules="all-linear")).eval()
    adapters.check_quantized(model)
    after = base_tensors(model)
    assert all(after[n].dtype == dt and torch.equal(after[n], t) for n, (dt, t) in before.items())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    shake(model, by=0.02)
    policy = Policy(model)
    assert policy.low_precision
    verify_policy(policy, EXAMPLES)
    gradients_ = gradients(model, packed_logps(policy))
    assert gradients_.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients_.values())


def test_tensors_of_a_quantised_base(quantised) -> None:
    """The same before and after the first forward, scales included, with an adapter or without."""
    model = quantised()
    before = {n: t.clone() for n, t in base_tensors(model).items()}
    own_logps(model)
    model = with_adapter(model, lora())
    shake(model)
    after = base_tensors(model)
    assert after.keys() == before.keys() and all(torch.equal(after[n], t) for n, t in before.items())
    scales = [n for n in after if n.endswith("proj.SCB")]
    assert len(scales) == (14 if quantised.kind == "int8" else 0)
    assert not any(hasattr(t, "SCB") for t in after.values())
    everything = adapters.all_tensors(model)
    assert {n.split(".")[-3] for n in everything.keys() - after.keys()} == {"lora_A", "lora_B"}


def test_quantised_base_with_checkpointing(quantised) -> None:
    model = with_adapter(quantised(), lora(target_modules="all-linear")).train()
    shake(model, by=0.02)
    policy = Policy(model)
    with policy.attach():
        want = gradients(model, packed_logps(policy))
        policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        got = gradients(model, packed_logps(policy))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[n], want[n]) for n in want)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_quantised_base_lets_go_of_its_checkpoint(quantised, tmp_path) -> None:
    """Mapped into memory the 16-bit file would take more room than what was quantised."""
    model = quantised()
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert str(tmp_path / "base") not in Path("/proc/self/maps").read_text()
    plain = load_model(tmp_path / "base", use_cpu=True)
    assert plain.lm_head.weight.device.type == "cpu"
    assert str(tmp_path / "base") in Path("/proc/self/maps").read_text()


def test_quantised_base_without_outliers_packs_exactly(tmp_path) -> None:
    """Rows of LLM.int8 meet in its outlier columns only; without them packing is as exact as in fp32."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from transformers import BitsAndBytesConfig

    make_model().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    model = load_model(tmp_path, use_cpu=True, quantization_config=config).eval()
    with torch.no_grad():
        close(packed_logps(Policy(model)), own_logps(model))


def test_adapter_on_a_quantised_base_is_continued_and_merged(quantised, tmp_path) -> None:
    model = with_adapter(quantised(), lora()).eval()
    shake(model, by=0.1)
    want = own_logps(model).detach()
    model.save_pretrained(tmp_path / "adapter")

    config = model.get_base_model().config.quantization_config
    again = load_model(tmp_path / "adapter", use_cpu=True, quantization_config=config).eval()
    assert adapters.is_quantized(again)
    assert torch.equal(own_logps(again).detach(), want)

    # Merged: the unquantised base with the adapter, in the base's dtype; never the quantised weights.
    state = {n: t.clone() for n, t in model.state_dict().items()}
    save_merged(model, None, tmp_path / "merged")
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items() if isinstance(t, torch.Tensor))
    merged = load_model(tmp_path / "merged", use_cpu=True)
    assert not adapters.is_quantized(merged)
    on_plain = load_model(tmp_path / "adapter", use_cpu=True)
    for module in ("q_proj", "k_proj"):
        layer = on_plain.get_base_model().get_submodule(f"model.layers.0.self_attn.{module}")
        plain = layer.base_layer.weight if module == "q_proj" else layer.weight
        delta = layer.get_delta_weight("default") if module == "q_proj" else 0.0
        got = merged.get_submodule(f"model.layers.0.self_attn.{module}").weight
        assert torch.equal(got, (plain.float() + delta).bfloat16())

    make_model(torch.bfloat16, seed=9).save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match="on disk is not that of the base in memory"):
        save_merged(model, None, tmp_path / "merged")
    model.get_base_model().config._name_or_path = ""
    with pytest.raises(ConfigError, match="the quantised base has no name or path"):
        save_merged(model, None, tmp_path / "merged")


def test_base_saved_quantised_cannot_be_merged(tmp_path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from transformers import BitsAndBytesConfig

    make_model(torch.bfloat16).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(**NF4)
    load_model(tmp_path / "base", use_cpu=True, quantization_config=config).save_pretrained(tmp_path / "small")
    model = with_adapter(load_model(tmp_path / "small", use_cpu=True), lora())
    with pytest.raises(ConfigError, match="holds quantised weights only"):
        adapters.check_mergeable(model)
    with pytest.raises(ConfigError, match="holds quantised weights only"):
        save_merged(model, None, tmp_path / "merged")


def test_bitsandbytes_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import quantizer_bnb_4bit

    make_model().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True)
    monkeypatch.setattr(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda *_: False)
    with pytest.raises(ConfigError, match=r"pip install 'fastpo\[quant\]'") as caught:
        load_model(tmp_path, use_cpu=True, quantization_config=config)
    assert "\n" not in str(caught.value)


def test_quantiser_without_gradients_is_refused() -> None:
    model = with_adapter(make_model(), lora())
    config = types.SimpleNamespace(quant_method="mxfp4")
    model.get_base_model().hf_quantizer = types.SimpleNamespace(is_trainable=False, quantization_config=config)
    with pytest.raises(ConfigError, match="quantised by mxfp4 passes no gradients"):
        adapters.check_quantized(model)


def test_int8_message_is_said_once(caplog) -> None:
    model = make_model()
    model.is_quantized = True
    adapters.settle_quantized(model)
    adapters.settle_quantized(model)
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    assert sum(isinstance(f, adapters._Once) for f in logger.filters) == 1
    with caplog.at_level(logging.WARNING, logger=logger.name):
        for _ in range(3):
            logger.warning("a test of fastpo: %s", "cast")
    assert len(caplog.records) == 1


@pytest.mark.parametrize("already", [False, True], ids=["fresh", "has_run_in_eval"])
def test_evaluation_leaves_4bit_layers_trainable(tmp_path, already: bool) -> None:
    """bitsandbytes lays 4-bit weights out anew in eval mode on some CPUs, for a kernel without a backward."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from transformers import BitsAndBytesConfig

    make_model(torch.bfloat16, intermediate_size=128).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.bfloat16)
    load = lambda: AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype="auto")  # noqa: E731
    models = []
    for evaluates in (False, True):
        base = load().eval()
        if evaluates and already:
            own_logps(base)  # not by fastpo: the layout may change here
        torch.manual_seed(0)
        model = with_adapter(base, lora()).eval()
        shake(model, by=0.1)
        policy = Policy(model)
        if evaluates:
            verify_policy(policy, EXAMPLES)
        models.append((packed_logps(policy), gradients(model, packed_logps(policy))))
    (want, want_grads), (got, got_grads) = models
    # Layout and back rounds the scales once; without that nothing may move.
    close(got, want, 0.02 if already else 1e-7)
    for name, gradient in want_grads.items():
        close(got_grads[name], gradient, 0.1 if already else 1e-7, scale=0.1 * float(gradient.abs().max()))


def test_what_cannot_be_merged_is_known_before(tmp_path) -> None:
    model = with_adapter(make_model(), lora())
    adapters.check_mergeable(model)
    with pytest.raises(ConfigError, match="the sharded base has no name or path"):
        adapters.check_mergeable(model, sharded=True)
    model.get_base_model().config._name_or_path = str(tmp_path / "gone")
    with pytest.raises(ConfigError, match="cannot load the base '.*gone' again"):
        adapters.check_mergeable(model, sharded=True)
    config = lora(target_modules=["q_proj"], lora_bias=True)  # a bias that the merged layer has no place for
    with pytest.raises(ConfigError, match="save_merged: LORA cannot be merged here: .*bias"):
        save_merged(with_adapter(make_model(), config), None, tmp_path)


def test_merging_needs_an_adapter(tmp_path) -> None:
    with pytest.raises(ConfigError, match="save_merged needs an adapter"):
        save_merged(make_model(), None, tmp_path)


def test_merging_from_a_saved_adapter(trained, tmp_path, toy) -> None:
    """What a sharded model needs: nothing of the weights in memory is read."""
    _, folder, want, _ = trained
    model = load_model(folder, use_cpu=True)
    shake(model)
    save_merged(model, toy.tokenizer(), tmp_path / "merged", adapter_folder=folder)
    close(own_logps(load_model(tmp_path / "merged", use_cpu=True)).detach(), want)
    assert load_tokenizer(tmp_path / "merged")("w5").input_ids == toy.tokenizer()("w5").input_ids
