"""Adapters beside embeddings resized for new tokens or tied to the head; TDPO where weights of the base train too."""

import pytest
import torch

import fastpo
from fastpo.errors import UnsupportedModelError
from fastpo.models.loading import load_model

peft = pytest.importorskip("peft", reason="needs peft")
LORA = dict(r=4, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def train(toy, tmp_path):
    def call(model, name, **options):
        inputs = {k: options.pop(k) for k in ("ref_model", "peft_config") if k in options}
        return fastpo.train(
            model, toy.rows(16), processing_class=toy.tokenizer(), **inputs,
            **dict(output_dir=str(tmp_path / name), max_steps=3, per_device_train_batch_size=8, logging_steps=1,
                   device="cpu", learning_rate=0.02, report=False, guardrails=False, save_final=False,
                   bf16=False) | options,
        )  # fmt: skip

    return call


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_an_adapter_saved_with_resized_embeddings_continues_by_its_path(toy, train, tmp_path, tied):
    toy.model(vocab_size=90, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    base = load_model(tmp_path / "base", use_cpu=True)
    base.resize_token_embeddings(toy.words + 3)
    trained = train(base, "adapter", peft_config=peft.LoraConfig(**LORA), save_final=True).model
    loaded = load_model(tmp_path / "adapter", use_cpu=True)
    ids = torch.arange(toy.words + 3)[None]
    with torch.no_grad():
        assert torch.equal(trained(input_ids=ids).logits, loaded(input_ids=ids).logits)
    if tied:
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    on = train(str(tmp_path / "adapter"), "on", ref_model=str(tmp_path / "adapter"), save_final=True)
    first, _, last = [line["loss"] for line in on.log_history if "loss" in line]
    assert first == pytest.approx(0.6931, abs=1e-4) and last < first - 1e-3
    assert train(str(tmp_path / "on"), "further", save_merged=True, save_final=True).metrics
    assert load_model(tmp_path / "further" / "merged", use_cpu=True).vocab_size == toy.words + 3


def test_another_base_is_still_refused(toy, train, tmp_path):
    toy.model(hidden_size=48).save_pretrained(tmp_path / "base")
    train(
        load_model(tmp_path / "base", use_cpu=True),
        "adapter",
        peft_config=peft.LoraConfig(**LORA),
        save_final=True,
    )
    toy.model().save_pretrained(tmp_path / "base")
    with pytest.raises(fastpo.errors.ConfigError, match="was trained for another base"):
        load_model(tmp_path / "adapter", use_cpu=True)


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(LORA, trainable_token_indices=[5, 6]), "trainable_token_indices reach the output head"),
        (dict(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True), "leave ensure_weight_tying or the emb"),
        (dict(r=4, target_modules=["lm_head"]), "leave lm_head out of target_modules"),
    ],
)
def test_what_reaches_a_tied_head_is_refused_with_the_way_out(toy, train, config, message):
    with pytest.raises(UnsupportedModelError, match=message):
        train(toy.model(tie_word_embeddings=True), "run", peft_config=peft.LoraConfig(**config))


CONFIGS = {
    "bias all": dict(LORA, bias="all"),
    "bias lora_only": dict(LORA, bias="lora_only"),
    "embeddings whole": dict(LORA, modules_to_save=["embed_tokens", "lm_head"]),
    "a norm whole": dict(LORA, modules_to_save=["norm"], bias="all"),
    "rows of the embeddings": dict(LORA, trainable_token_indices=list(range(40))),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("loss", ["tdpo1", "tdpo2"])
def test_tdpos_reference_is_the_base_as_it_was(toy, train, config, loss):
    """Whatever of the base an adapter trains with it: a copy of the base gives the same run."""
    base = lambda: toy.model(attention_bias=True, mlp_bias=True)  # noqa: E731
    runs = []
    for given in ({}, {"ref_model": base()}):
        torch.manual_seed(0)
        options = dict(loss_type=loss, peft_config=peft.LoraConfig(**CONFIGS[config]), optim="adamw_torch")
        runs.append(train(base(), f"run{len(given)}", **options, **given))
    own, given = ([line["loss"] for line in run.log_history if "loss" in line] for run in runs)
    assert own == pytest.approx(given, rel=1e-5) and abs(own[-1] - own[0]) > 1e-3
    for (name, a), b in zip(runs[0].model.named_parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)
        assert a.requires_grad == b.requires_grad
