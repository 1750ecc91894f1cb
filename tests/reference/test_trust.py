"""A cached reference is the live model's, or it is not used: what a run finds after one of the same weights that
computed something else. Once as the key has it, and once with a key that is blind to it, where the comparison sees it.
"""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import fastpo
from fastpo.reference import function_state
from fastpo.reference import sources as references
from fastpo.reference.function_state import function_digest


@pytest.fixture
def reference(toy, tmp_path, monkeypatch):
    """`reference(cache, policy, ref_model)`: the log-probabilities that a run of one step trained against, in order."""

    def run(cache, policy, ref_model=None, **options):
        monkeypatch.setenv("FASTPO_CACHE", str(tmp_path / cache))
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        fastpo.train(
            policy, toy.rows(24), ref_model=ref_model, processing_class=toy.tokenizer(),
            **dict(output_dir=str(folder), max_steps=1, per_device_train_batch_size=24, save_final=False, report=False,
                   device="cpu", guardrails=False, learning_rate=1e-3) | options,
        )  # fmt: skip
        stored = load_file(folder / "reference.safetensors")
        split = np.split(stored["logp"], stored["offsets"][1:-1])
        return np.concatenate([split[i] for i in np.lexsort(stored["keys"].T)])

    return run


def scaling(model):
    for layer in model.model.layers:
        layer.self_attn.scaling *= 3


def epsilon(model):
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 10.0


def activation(model):
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.Tanh()


def hook(model):
    model.model.layers[0].register_forward_hook(lambda module, args, out: out + 0.3)


def pre_hook(model):
    model.model.layers[0].register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))


def rotary(model):
    model.model.rotary_emb.attention_scaling = 3.0


def forward(model):
    inner = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: 2 * inner(x)


EDITS = [scaling, epsilon, activation, hook, pre_hook, rotary, forward]


@pytest.mark.parametrize("blind", [False, True], ids=["by the key", "by the comparison"])
@pytest.mark.parametrize("edit", EDITS, ids=lambda f: f.__name__)
def test_an_edited_reference_is_not_the_one_before(toy, reference, monkeypatch, caplog, edit, blind):
    if blind:
        monkeypatch.setattr(references, "function_digest", lambda model, without_adapter: "")
    before = reference("cache", toy.model(), toy.model(5))
    edited = toy.model(5)
    edit(edited)
    after = reference("cache", toy.model(), edited)
    other = toy.model(5)
    edit(other)
    assert np.array_equal(after, reference("another", toy.model(), other))
    assert np.abs(after - before).max() > 1e-3
    assert caplog.text.count("another function of the same weights") == (1 if blind else 0)
    again = reference("cache", toy.model(), toy.model(5))
    np.testing.assert_allclose(again, before, atol=1e-5)


@pytest.mark.parametrize("blind", [False, True], ids=["by the key", "by the comparison"])
@pytest.mark.parametrize("edit", ["off", "inside", "scaled", "merged and unmerged"])
def test_an_adapter_that_is_switched_is_another_reference(toy, reference, monkeypatch, edit, blind):
    peft = pytest.importorskip("peft", reason="needs peft")
    if blind:
        monkeypatch.setattr(references, "function_digest", lambda model, without_adapter: "")
    held = []

    def model(edit=None):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        model = peft.get_peft_model(toy.model(5), config)
        if edit == "off":
            model.base_model.disable_adapter_layers()
        elif edit == "inside":
            held.append(model.disable_adapter())
            held[-1].__enter__()
        elif edit == "scaled":
            for module in model.modules():
                if hasattr(module, "scale_layer"):
                    module.scale_layer(4.0)
        elif edit:
            model.merge_adapter()
            model.unmerge_adapter()
        return model

    reference("cache", toy.model(), model())
    got, truth = reference("cache", toy.model(), model(edit)), reference("another", toy.model(), model(edit))
    np.testing.assert_allclose(got, truth, atol=1e-5)


def test_a_function_that_a_module_calls_and_no_key_sees(toy, reference, monkeypatch, caplog):
    from transformers.models.llama import modeling_llama

    before = reference("cache", toy.model())
    rope = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(
        modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin, **rest: rope(q, k, sin, cos, **rest)
    )
    after = reference("cache", toy.model())
    assert np.array_equal(after, reference("another", toy.model())) and np.abs(after - before).max() > 1e-3
    assert caplog.text.count("another function of the same weights") == 1


def test_the_digest_is_of_what_decides_numbers(toy, tmp_path, monkeypatch):
    digest = function_digest(toy.model())
    toy.model(3).save_pretrained(tmp_path / "a")
    from transformers import AutoModelForCausalLM

    same = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert digest == function_digest(same) == function_digest(same.train())
    same.gradient_checkpointing_enable()
    same.enable_input_require_grads()
    assert digest == function_digest(same)
    own = type("Own", (type(same),), {"scale": lambda self: 1.5})
    other = type("Own", (type(same),), {"scale": lambda self: 2.5})
    digests = {digest}
    for cls in (own, other):  # code of the model's own
        same.__class__ = cls
        digests.add(function_digest(same))
    for edit in EDITS:
        model = toy.model()
        edit(model)
        digests.add(function_digest(model))
    monkeypatch.setattr(function_state.transformers, "__version__", "5.99")
    digests.add(function_digest(toy.model()))
    assert len(digests) == 4 + len(EDITS)


def test_the_digest_of_a_base_is_blind_to_its_adapter(toy):
    peft = pytest.importorskip("peft", reason="needs peft")
    adapted = {
        r: peft.get_peft_model(toy.model(), peft.LoraConfig(r=r, target_modules=["q_proj"], bias="all")) for r in (2, 4)
    }
    base = function_digest(toy.model())
    assert {function_digest(m, without_adapter=True) for m in adapted.values()} == {base}
    assert len({base, *map(function_digest, adapted.values())}) == 3


def test_the_comparison_allows_bf16_its_noise(toy, reference, caplog, monkeypatch):
    """Another max_tokens is another packing."""
    for options in ({"bf16": True}, {}):
        policy = toy.model() if options else toy.model().bfloat16()
        other = toy.model() if options else toy.model().bfloat16()
        first = reference(f"cache{len(options)}", policy, **options)
        assert np.array_equal(first, reference(f"cache{len(options)}", other, **options, max_tokens=64))
    assert "another function" not in caplog.text
