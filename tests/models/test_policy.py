"""Tiny random models of real families: packed log-probabilities and gradients equal the model's own, or a refusal."""

import contextlib
import copy

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fastpo.data import Example
from fastpo.data.packing import collate
from fastpo.errors import ConfigError, DeviceError, UnsupportedModelError
from fastpo.models.loading import load_model, load_tokenizer, resolve_device
from fastpo.models.policy import Policy
from fastpo.models.verify import verify_policy

VOCABULARY = 97  # odd, and not a multiple of any block
WINDOW = 4  # shorter than most rows
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2", {}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": WINDOW}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3_moe": ("Qwen3Moe", {**_MOE, "head_dim": 8}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma2": ("Gemma2", {**_MIXED, "head_dim": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3", {**_MIXED, "head_dim": 8, "final_logit_softcapping": 3.0}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "phi": ("Phi", {}),  # bias in the head
    "phi3": ("Phi3", {"sliding_window": WINDOW}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
    "cohere2": ("Cohere2", {**_MIXED, "logit_scale": 0.25}),
    "granite": ("Granite", {"logits_scaling": 4.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5}),
    "minicpm3": ("MiniCPM3", {"dim_model_base": 8, "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 8,
                              "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}),
    "hyperclovax": ("HyperCLOVAX", {"logits_scaling": 4.0}),
    "olmo2": ("Olmo2", {}),
    "gpt_neox": ("GPTNeoX", {}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt_oss": ("GptOss", {**_MIXED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),  # sinks
}  # fmt: skip
FAMILIES = {k: v for k, v in FAMILIES.items() if hasattr(transformers, f"{v[0]}Config")}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """These models are too small to share among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(family: str, dtype: torch.dtype = torch.float32, **overrides: object) -> transformers.PreTrainedModel:
    name, kwargs = FAMILIES[family]
    config_class = getattr(transformers, {"Gemma3": "Gemma3Text"}.get(name, name) + "Config")
    config = config_class(**{**_SIZES, **kwargs, **overrides})
    torch.manual_seed(1)
    attention = "eager" if family == "gemma2" else None  # SDPA leaves the soft caps out in older transformers
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():  # far from the flat start, where every rule gives log(1 / V)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1))
    return model.to(dtype).eval()


def make_examples(seed: int = 0, share: bool = False) -> list[Example]:
    """Two pairs in both orders, three ranked responses, one-token prompts and responses, rows beyond the window; with
    `share` eight responses too, and one prompt for all of a row's."""
    rng = np.random.default_rng(seed)

    def ids(n: int) -> np.ndarray:
        return rng.integers(3, VOCABULARY, n).astype(np.int32)

    shapes = [
        (5, (3, 7), [(0, 1)]),
        (1, (9, 1), [(1, 0)]),
        (12, (1, 6, 2), [(0, 1), (2, 1)]),
        (1, (1, 2), [(0, 1)]),
    ]
    if share:
        shapes += [(7, (4, 1, 9, 2, 2, 11, 1, 3), [(2, 0), (5, 1)]), (3, (1, 1), [(0, 1)])]
    return [
        Example(prompt_ids=ids(p), responses=[ids(r) for r in lengths], pairs=pairs, share=share)
        for p, lengths, pairs in shapes
    ]


def own_logps(model: torch.nn.Module, examples: list[Example]) -> torch.Tensor:
    """Token log-probabilities by the model's own forward, row by row, in the order of the packed batch."""
    parts = []
    for example in examples:
        for response in example.responses:
            row = torch.tensor([[*example.prompt_ids, *response]])
            logits = model(input_ids=row[:, :-1], use_cache=False).logits[0, -len(response) :]
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            parts.append(wide.log_softmax(-1).gather(-1, row[0, -len(response) :, None]).squeeze(-1))
    return torch.cat(parts)


def gradients(model: torch.nn.Module, logp: torch.Tensor) -> dict[str, torch.Tensor]:
    coefficients = torch.linspace(-1.0, 1.5, len(logp), dtype=logp.dtype, device=logp.device)
    model.zero_grad(set_to_none=True)
    (logp * coefficients).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _checkpoint(model: torch.nn.Module, reentrant: bool) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()


def assert_close(name: str, got: torch.Tensor, want: torch.Tensor, relative: float, scale: float = 0.0) -> None:
    scale = max(scale, float(want.abs().max()))
    assert torch.isfinite(got).all(), name
    error = float((got - want).abs().max())
    assert error <= relative * scale, f"{name}: error {error:.3g} beside values of {scale:.3g}"


def assert_same(model: torch.nn.Module, examples: list[Example], relative: float, policy: Policy | None = None) -> None:
    """Packed log-probabilities and the gradient of every parameter equal the model's own."""
    policy = policy or Policy(model)
    want = own_logps(model, examples)
    want_grads = gradients(model, want)
    with policy.attach():
        got = policy.logp(collate(examples, range(len(examples))))
        got_grads = gradients(model, got)
    assert_close("logp", got.detach(), want.detach(), relative)
    assert got_grads.keys() == want_grads.keys()
    largest = max(float(g.abs().max()) for g in want_grads.values())
    for name, want_grad in want_grads.items():
        # The largest gradient sets the rounding of the sums that a small one comes from.
        assert_close(name, got_grads[name], want_grad, relative, scale=0.1 * largest)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [False, True], ids=["", "shared"])
def test_packed_equals_own_fp32(family: str, share: bool) -> None:
    model = make_model(family)
    verify_policy(Policy(model), make_examples(share=share))
    assert_same(model, make_examples(share=share), relative=1e-5)


# Softmax of eager attention, some norms and some routers run in fp32 whatever the model's dtype.
# An RMS norm's fp32 backward is linear but for its rounding: the gradients of K responses go through it together
# where they share a prompt, and one by one in the model's own forward.
_FP32_NORM = {"llama", "llama_tied", "mistral", "qwen2", "qwen2_window", "qwen3", "phi3", "granite", "minicpm3",
              "hyperclovax", "olmo2"}  # fmt: skip
_FP32_INSIDE = {"gemma", "gemma2", "gemma3", "gpt_oss", "gpt_neox", "qwen3_moe", "cohere", "cohere2"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [False, True], ids=["", "shared"])
def test_packed_equals_own_fp64(family: str, share: bool) -> None:
    model = make_model(family, torch.float64)
    if family in ("qwen3_moe", "gpt_oss"):
        model.set_experts_implementation("eager")  # the grouped matrix multiply knows no fp64
    rounded = family in _FP32_INSIDE or (share and family in _FP32_NORM)
    assert_same(model, make_examples(share=share), relative=1e-6 if rounded else 1e-10)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    """The backward recomputes the layers when the forward's context is long gone: the layout must travel with it."""
    examples = make_examples(share=True)
    model = make_model(family)
    policy = Policy(model)
    batch = collate(examples, range(len(examples)))
    other = collate(examples[:2], range(2))
    with policy.attach():
        want = gradients(model, policy.logp(batch))
        _checkpoint(model, reentrant)
        logp = policy.logp(batch)
        policy.logp(other)  # another layout in between
        got = gradients(model, logp)
    assert got.keys() == want.keys()
    for name in want:
        assert_close(name, got[name], want[name], 1e-5, scale=0.1 * max(float(g.abs().max()) for g in want.values()))


def test_attach_restores_and_nests() -> None:
    model = make_model("llama")
    before = model.config._attn_implementation
    policy = Policy(model)
    row = torch.tensor([[5, 6, 7]])
    want = model(row).logits
    with policy.attach(), policy.attach():
        assert model.config._attn_implementation == "fastpo"
        with pytest.raises(UnsupportedModelError, match="detached"):
            model(row)
        with policy.detached() as own:
            assert own is model
            torch.testing.assert_close(model(row).logits, want)
            assert model.generate(row, max_new_tokens=2, do_sample=False).shape == (1, 5)
        assert model.config._attn_implementation == "fastpo"
    assert model.config._attn_implementation == before
    with pytest.raises(RuntimeError, match="attach"):
        policy.hidden(collate(make_examples(), [0]))


def test_attach_restores_after_an_error() -> None:
    model = make_model("llama")
    before = model.config._attn_implementation
    with contextlib.suppress(KeyError), Policy(model).attach():
        raise KeyError
    assert model.config._attn_implementation == before


def test_saved_while_attached_loads_with_its_own_attention(tmp_path) -> None:
    model = make_model("llama")
    with Policy(model).attach():
        model.save_pretrained(tmp_path)
    assert "fastpo" not in (tmp_path / "config.json").read_text()
    assert load_model(tmp_path, use_cpu=True).config._attn_implementation != "fastpo"


def test_head_rows_only() -> None:
    """The head sees completion rows; the entropy is that of the model's own distribution."""
    model, examples = make_model("gemma2"), make_examples()
    policy = Policy(model)
    batch = collate(examples, range(len(examples)))
    with torch.no_grad(), policy.attach():
        logp, entropy = policy.logp(batch, return_entropy=True)
        hidden = policy.hidden(batch)
        assert not batch.rows
        again = policy.logp(batch, token_metrics=True)
    assert again.equal(logp) and batch.rows["entropy"].equal(entropy)
    assert batch.rows["top1"].shape == logp.shape and not batch.rows["top1"].requires_grad
    assert hidden.shape == (len(batch.input_ids), 32)
    assert logp.shape == entropy.shape == batch.target.shape
    assert logp.dtype == torch.float32
    row = torch.tensor([[*examples[0].prompt_ids, *examples[0].responses[0]]])
    log_probs = model(row[:, :-1]).logits[0, -3:].log_softmax(-1)
    torch.testing.assert_close(entropy[:3], -(log_probs.exp() * log_probs).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_entropies_with_a_gradient(family: str) -> None:
    """The values are those of `token_metrics`; gradients of every parameter are those of the model's own logits in
    fp64, of a loss of both."""
    model, examples = make_model(family, torch.float64), make_examples()
    policy = Policy(model)
    batch = collate(examples, range(len(examples)))
    upstream = torch.randn(2, len(batch.target), dtype=torch.float64)
    with policy.attach():
        with torch.no_grad():
            detached = policy.logp(batch, token_metrics=True)
        entropy, top1 = batch.rows["entropy"], batch.rows["top1"]
        batch.rows.clear()
        logp = policy.logp(batch, entropy_grad=True)
        assert set(batch.rows) == {"entropy"} and batch.rows["entropy"].requires_grad
        again, pair = policy.logp(batch, entropy_grad=True, token_metrics=True, return_entropy=True)
        assert batch.rows["top1"].equal(top1) and again.equal(logp) and pair.equal(batch.rows["entropy"])
        assert logp.equal(detached) and batch.rows["entropy"].equal(entropy)
        (upstream[0] @ logp + upstream[1] @ batch.rows["entropy"]).backward()
        with pytest.raises(ConfigError, match="not built for grad_filter"):
            policy.logp(batch, entropy_grad=True, grad_filter=0.1)
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss, at = torch.zeros((), dtype=torch.float64), 0
    for example in examples:
        for response in example.responses:
            row = torch.tensor([[*example.prompt_ids, *response]])
            own = model(row[:, :-1]).logits[0, -len(response) :].double().log_softmax(-1)
            rows = slice(at, at + len(response))
            loss = loss + upstream[0, rows] @ own.gather(1, row[0, -len(response) :, None]).squeeze(1)
            loss = loss - upstream[1, rows] @ (own.exp() * own).sum(-1)
            at += len(response)
    assert at == len(batch.target)
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-6, atol=1e-9 + 1e-6 * p.grad.abs().max().item())


def test_no_square_of_the_pack_is_made() -> None:
    """Largest tensor made by a forward and backward over many chains: linear in T, far below T * T."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
            return out

    rng = np.random.default_rng(0)
    rows = [rng.integers(3, VOCABULARY, 60).astype(np.int32) for _ in range(40)]
    examples = [Example(prompt_ids=row[: 5 + i], responses=[row[5 + i :]]) for i, row in enumerate(rows)]
    for family in ("llama", "gemma2", "mistral"):
        policy = Policy(make_model(family))
        batch = collate(examples, range(len(examples)))
        tokens = len(batch.input_ids)
        with policy.attach(), Largest() as largest:
            policy.logp(batch).sum().backward()
        assert largest.numel <= tokens * VOCABULARY < tokens**2 / 10, family


# ---- adapters


def _lora(model: torch.nn.Module, **kwargs: object) -> torch.nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    config = peft.LoraConfig(r=2, init_lora_weights=False, **{"target_modules": ["q_proj", "up_proj"], **kwargs})
    return peft.get_peft_model(model, config)


def test_lora() -> None:
    model = _lora(make_model("llama")).eval()
    policy = Policy(model)
    verify_policy(policy, make_examples())
    assert_same(model, make_examples(), 1e-5, policy)


def test_lora_switched_off_is_the_base_model() -> None:
    base = make_model("llama")
    want = own_logps(base, make_examples())
    policy = Policy(_lora(copy.deepcopy(base), modules_to_save=["lm_head"]).eval())
    with torch.no_grad():
        policy.head().weight.add_(0.1)  # the adapter's own copy of the head
        with policy.attach(), policy.model.disable_adapter():
            off = policy.logp(collate(make_examples(), range(4)))
        with policy.attach():
            on = policy.logp(collate(make_examples(), range(4)))
    torch.testing.assert_close(off, want, rtol=1e-5, atol=1e-5)
    assert (on - want).abs().max() > 1e-2


def test_trained_head_with_lora() -> None:
    model = _lora(make_model("llama"), modules_to_save=["lm_head"]).eval()
    verify_policy(Policy(model), make_examples())
    assert_same(model, make_examples(), 1e-5)


def test_lora_with_checkpointing() -> None:
    model = _lora(make_model("llama"))
    policy = Policy(model)
    batch = collate(make_examples(), range(4))
    with policy.attach():
        want = gradients(model, policy.logp(batch))
        _checkpoint(model, False)
        got = gradients(model, policy.logp(batch))
    for name in want:
        assert_close(name, got[name], want[name], 1e-5)


def test_adapter_on_the_head_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"head carries an adapter.*leave lm_head out of target_modules"):
        Policy(_lora(make_model("llama"), target_modules=["lm_head"]))


def test_prompt_tuning_is_refused() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UnsupportedModelError, match="virtual tokens"):
        Policy(peft.get_peft_model(make_model("llama"), config))


# ---- heads


def test_wrapped_head() -> None:
    class CastOutput(torch.nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).float()

    model = make_model("llama", torch.bfloat16)
    model.lm_head = CastOutput(model.lm_head)
    assert Policy(model).head().weight is model.lm_head[0].weight


def test_head_in_another_precision() -> None:
    class Fp32Head(LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, **kwargs: object):
            hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
            return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(hidden.float()))

    model = make_model("llama", torch.bfloat16)
    model.__class__ = Fp32Head
    model.lm_head.float()
    verify_policy(Policy(model), make_examples())


def test_quantised_head_is_refused() -> None:
    model = make_model("llama")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="quantised"):
        Policy(model)


# ---- models that are refused


class HalvedLlama(LlamaForCausalLM):
    """A family that scales its logits without saying so in its configuration."""

    def forward(self, *args: object, **kwargs: object):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out


class BiasedLlama(LlamaForCausalLM):
    """A family that adds something to a few logits."""

    def forward(self, *args: object, **kwargs: object):
        out = super().forward(*args, **kwargs)
        out.logits[..., :10] -= 1.0
        return out


@pytest.mark.parametrize("model_class", [HalvedLlama, BiasedLlama])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_unknown_logit_rule_is_refused(model_class: type, dtype: torch.dtype) -> None:
    model = make_model("llama", dtype)
    model.__class__ = model_class
    with pytest.raises(UnsupportedModelError, match=f"{model_class.__name__}.*own logits.*does not know"):
        verify_policy(Policy(model), make_examples())


def test_real_family_with_a_head_of_two_modules_is_refused() -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.ModernBertDecoderConfig(
        **_SIZES, rope_parameters={"full_attention": rope, "sliding_attention": rope}
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    with pytest.raises(UnsupportedModelError, match="ModernBertDecoderForCausalLM"):
        verify_policy(Policy(model), make_examples())


def test_encoder_decoder_is_refused() -> None:
    config = transformers.T5Config(**{**_SIZES, "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8})
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        Policy(transformers.AutoModelForSeq2SeqLM.from_config(config))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("Bloom", {"n_layer": 1, "n_head": 2}), ("Mamba", {"state_size": 4}), ("StableLm", {})],
)
def test_family_that_cannot_be_packed_runs_unpacked(name: str, kwargs: dict, monkeypatch) -> None:
    monkeypatch.setenv("FASTPO_ATTENTION", "own")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**{**_SIZES, **kwargs})).eval()
    examples = make_examples(share=True)
    verify_policy(Policy(model), examples)
    assert_same(model, examples, relative=1e-5)


def test_family_that_drops_keyword_arguments_is_refused() -> None:
    config = transformers.StableLmConfig(**_SIZES)
    with pytest.raises(UnsupportedModelError, match="StableLmAttention was called without.*FASTPO_ATTENTION=own"):
        verify_policy(Policy(AutoModelForCausalLM.from_config(config)), make_examples())


def test_window_in_the_mask_alone_is_refused() -> None:
    """Qwen2-MoE hands its window to the mask only: packed, it would be full attention on rows beyond the window."""
    config = transformers.Qwen2MoeConfig(
        **_SIZES, **_MOE, use_sliding_window=True, max_window_layers=2, sliding_window=32
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match=r"Qwen2MoeAttention is told of no window but masked by 32 tokens"):
        verify_policy(Policy(model), make_examples())
    config = transformers.Qwen2MoeConfig(**_SIZES, **_MOE, use_sliding_window=False)
    verify_policy(Policy(AutoModelForCausalLM.from_config(config)), make_examples())


def test_headless_and_foreign_models_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no output head"):
        Policy(transformers.LlamaModel(LlamaConfig(**_SIZES)))
    with pytest.raises(UnsupportedModelError, match="not a transformers causal language model"):
        Policy(torch.nn.Linear(2, 2))


# ---- the guard itself


def test_guard_leaves_no_trace() -> None:
    model = make_model("llama", attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()  # a mixture that train() or eval() would not restore
    modes = [m.training for m in model.modules()]
    state = torch.random.get_rng_state()
    before = {n: p.clone() for n, p in model.named_parameters()}
    verify_policy(Policy(model), make_examples())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.config._attn_implementation == "sdpa"
    assert not model.get_input_embeddings()._forward_hooks
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


@pytest.mark.parametrize("swap", ["pairs", "offsets", "targets", "rows"])
def test_guard_finds_mispairing(monkeypatch: pytest.MonkeyPatch, swap: str) -> None:
    """A batch whose bookkeeping is wrong is found, though its first loss would still be ln 2."""
    from fastpo.models import verify as module

    def wrong(examples: list[Example], indices: range):
        batch = collate(examples, indices)
        if swap == "pairs":
            batch.pairs = batch.pairs.flip(1)
        elif swap == "offsets":
            batch.response_offsets[1] += 1
        elif swap == "targets":
            batch.target = batch.target.roll(1)
        else:
            batch.logit_rows = batch.logit_rows - 1
        return batch

    monkeypatch.setattr(module, "collate", wrong)
    with pytest.raises(UnsupportedModelError, match="paired or packed wrongly|own logits"):
        verify_policy(Policy(make_model("llama")), make_examples()[:1])


def test_guard_finds_leakage_between_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpo.models import policy as module
    from fastpo.models.layout import Layout

    def one_chain(cls, cu, branches=()):
        return Layout((0, cu[-1]), cu[-1])

    monkeypatch.setattr(module.Layout, "from_chains", classmethod(one_chain))
    with pytest.raises(UnsupportedModelError, match="own logits"):
        verify_policy(Policy(make_model("llama")), make_examples())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "qwen3", "gpt2", "phi"])
@pytest.mark.parametrize("share", [False, True], ids=["", "shared"])
def test_guard_allows_the_dtype_its_rounding(family: str, dtype: torch.dtype, share: bool) -> None:
    verify_policy(Policy(make_model(family, dtype)), make_examples(share=share))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_guard_under_autocast(family: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        verify_policy(Policy(make_model(family)), make_examples())


def test_guard_tolerance_argument() -> None:
    with pytest.raises(UnsupportedModelError, match="rounding explains 1e-12"):
        verify_policy(Policy(make_model("llama")), make_examples(), tolerance=1e-12)


def test_multimodal_model_trains_on_text() -> None:
    text = {**_SIZES, "head_dim": 8, **_MIXED}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(1)
    model = transformers.Gemma3ForConditionalGeneration(config)
    policy = Policy(model)
    verify_policy(policy, make_examples())
    model.train()  # its own forward now asks for token types; the text trunk does not
    with policy.attach():
        policy.logp(collate(make_examples(), range(4))).sum().backward()


# ---- loading


def test_load_model_keeps_the_checkpoints_dtype(tmp_path) -> None:
    make_model("llama", torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(tmp_path, use_cpu=True).dtype == torch.bfloat16
    assert load_model(str(tmp_path), dtype="float32", use_cpu=True).dtype == torch.float32
    assert load_model(tmp_path, dtype=torch.float16, use_cpu=True).dtype == torch.float16
    assert load_model(tmp_path, use_cpu=True, model_init_kwargs={"dtype": "float32"}).dtype == torch.float32
    assert load_model(tmp_path, use_cpu=True, attn_implementation="eager").config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match="dtype='int7'"):
        load_model(tmp_path, dtype="int7", use_cpu=True)


def test_load_errors_are_one_line(tmp_path) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(ConfigError, match="nothing-here") as caught:
            load(tmp_path / "nothing-here")
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="processing_class"):
        load_tokenizer("")


def test_cuda_asked_for_and_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no GPU"):
        resolve_device("cuda")
    with pytest.raises(DeviceError, match="no GPU"):
        load_model("anything", device="cuda:0")
    assert resolve_device(None) == torch.device("cpu")


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_own_bf16_cuda(family: str) -> None:
    """The error against fp64 is at most 1.5 times that of the model's own bf16 forward, and the guard agrees."""
    examples = make_examples()
    truth = own_logps(make_model(family, torch.float64), examples).detach()
    model = make_model(family, torch.bfloat16).cuda()
    with torch.device("cuda"):
        own = own_logps(model, examples).detach().cpu()
    policy = Policy(model)
    verify_policy(policy, examples)
    with policy.attach():
        logp = policy.logp(collate(examples, range(len(examples))).to(torch.device("cuda")))
        grads = gradients(model, logp)
    assert all(torch.isfinite(g).all() for g in grads.values())
    own_error = (own - truth).abs().mean()
    assert (logp.detach().cpu() - truth).abs().mean() <= 1.5 * own_error + 1e-3 * truth.abs().mean()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt_oss"])
def test_packed_equals_own_fp32_cuda(family: str) -> None:
    examples = make_examples()
    model = make_model(family).cuda()
    policy = Policy(model)
    with torch.device("cuda"):
        want = own_logps(model, examples)
    with policy.attach():
        got = policy.logp(collate(examples, range(len(examples))).to(torch.device("cuda")))
    assert_close("logp", got.detach(), want.detach(), 1e-4)
