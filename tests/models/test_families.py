"""Models of text and images by name: the class that the config names, trained by text rows as the same model in memory,
and saved whole. Checkpoints that do not fit their class end before step 1.

A few families, tiny; FASTPO_ALL_FAMILIES=1 runs all that are listed.
"""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

import fastpo
from fastpo.errors import ConfigError, FastpoError
from fastpo.models.loading import load_model
from fastpo.models.trunk import freeze_towers, towers

# What a config's fields, at any depth, are set to.
SMALL = dict(
    hidden_size=32, embed_dim=32, d_model=32, width=32, out_hidden_size=32, intermediate_size=64, ffn_dim=64,
    encoder_ffn_dim=64, moe_intermediate_size=16, shared_expert_intermediate_size=16, projection_dim=32, mlp_dim=64,
    num_hidden_layers=2, num_layers=2, depth=2, encoder_layers=2, num_global_layers=1, num_attention_heads=4,
    num_heads=4, attention_heads=4, encoder_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=100,
    max_position_embeddings=256, num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    patch_size=4, image_size=16, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
    num_mel_bins=16, initializer_range=0.2, vision_output_dim=32, intermediate_size_mlp=64, pad_token_id=2,
    bos_token_id=0, eos_token_id=0, cross_attention_layers=[1], deepstack_visual_indexes=[0],
    fullatt_block_indexes=[1], vision_feature_layer=-1,
)  # fmt: skip
_VQ = {"vocabulary_map": {"<image>": 4}, "vq_config": {
    "num_embeddings": 8, "embed_dim": 32, "latent_channels": 32, "z_channels": 32, "base_channels": 32,
    "resolution": 16, "num_res_blocks": 1, "channel_multiplier": [1, 1]}}  # fmt: skip
FEW = {"qwen2_5_vl": {}, "qwen3_5": {}, "gemma3": {}, "mllama": {}, "llava": {}, "aya_vision": {}, "voxtral": {}}
MORE = dict.fromkeys(
    "qwen2_vl qwen3_vl qwen3_vl_moe qwen3_5_moe llava_next llava_next_video llava_onevision vipllava video_llava "
    "mistral3 internvl idefics2 idefics3 smolvlm cohere2_vision paligemma fuyu glm4v glm46v glmga glm_ocr "
    "granite_docling lfm2_vl lfm3_vl lighton_ocr ovis2 paddleocr_vl janus deepseek_vl deepseek_vl_hybrid qwen2_audio "
    "got_ocr2 git minicpm_ocr minicpmv4_6 minicpmv4_7 minimax_m3_vl muse_glimmer qianfan_ocr qwen2_5_omni_thinker "
    "qwen3_omni_moe_thinker unlimited_ocr video_llama_3 cosmos3_edge cosmos3_omni evolla exaone4_5 "
    "hyperclovax_vision_v2 mistral4 phi4_multimodal glmasr moss_transcribe_diarize qwen3_asr".split(), {}
) | {"chameleon": _VQ, "emu3": _VQ}  # fmt: skip
NEEDS_IMAGES = ("blip-2", "kosmos-2", "idefics")
FAMILIES = {**FEW, **(MORE if os.environ.get("FASTPO_ALL_FAMILIES") else {})}
CLASSES = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
_ROPE = ("qwen2_vl", "qwen2_5", "qwen3", "glm", "paddle")  # three positions a token
OPTIONS = dict(
    use_cpu=True, bf16=False, disable_tqdm=True, max_steps=2, logging_steps=1, learning_rate=1e-2, report=False,
    per_device_train_batch_size=4, lr_scheduler_type="constant", save_strategy="no", guardrails=False,
)  # fmt: skip


def _shrink(described: dict, rope: bool) -> dict:
    out: dict = {}
    for key, value in described.items():
        if isinstance(value, dict) and key not in ("rope_scaling", "rope_parameters", "id2label", "label2id"):
            out[key] = _shrink(value, rope)
        elif key in SMALL and value is not None:
            out[key] = SMALL[key] if isinstance(SMALL[key], list) or not isinstance(value, list) else value
        elif key in ("layer_types", "mlp_layer_types") and isinstance(value, list):
            out[key] = value[:1] + value[-1:]
        elif key.endswith(("token_id", "token_index")):
            out[key] = min(value, 90) if isinstance(value, int) else value
        elif not key.endswith("token_ids") and key not in ("moe_layers", "no_rope_layers"):
            out[key] = value
    if isinstance(out.get("rope_parameters"), dict) and rope:
        out["rope_parameters"]["mrope_section"] = [2, 1, 1]
    return out


def make_model(family: str, overrides: dict | None = None) -> transformers.PreTrainedModel:
    kind = type(transformers.AutoConfig.for_model(family))
    described = _shrink(kind().to_dict(), any(word in family for word in _ROPE))
    for key in ("architectures", "transformers_version", "dtype"):
        described.pop(key, None)
    for key, value in (overrides or {}).items():
        described[key] = {**described.get(key, {}), **value} if isinstance(described.get(key), dict) else value
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES[family])(kind.from_dict(described)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02)
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    out = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as f:
            out |= {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118  # no mapping
    return out


def known(families):
    return [f for f in families if f in CLASSES and hasattr(transformers, CLASSES[f])]


@pytest.mark.parametrize("family", known(FAMILIES))
def test_by_name_as_in_memory(toy, tmp_path, family):
    model, rows, losses = make_model(family, FAMILIES[family]), toy.rows(8), {}
    model.save_pretrained(tmp_path / "model")
    toy.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    before = tensors(tmp_path / "model")
    outside = towers(model)
    for how in ("name", "memory"):
        given = str(tmp_path / "model") if how == "name" else copy.deepcopy(model)
        out = fastpo.train(given, rows, processing_class=toy.tokenizer(),
                           args={**OPTIONS, "output_dir": str(tmp_path / how)})  # fmt: skip
        losses[how] = [line["loss"] for line in out.log_history if "loss" in line]
        assert type(out.model) is type(model)
        frozen = [n for n, p in out.model.named_parameters() if not p.requires_grad]
        assert all(n.startswith(tuple(outside)) for n in frozen)
        after = tensors(tmp_path / how)
        assert set(after) == set(before)
        trained, again = dict(out.model.named_parameters()), dict(model.named_parameters())
        assert all(torch.equal(trained[n], again[n]) for n in frozen)
        assert sum(not torch.equal(after[n], before[n]) for n in before) > 5
        if outside:
            words = ("vision", "visual", "audio", "vqmodel", "tower", "connector")
            of_towers = [n for n in before if any(word in n for word in words)]
            assert all(torch.equal(after[n], before[n]) for n in of_towers)
    assert losses["name"] == losses["memory"]
    assert losses["name"][0] != losses["name"][1]
    if model.config.get_text_config(decoder=True) is not model.config:
        assert (tmp_path / "name" / "preprocessor_config.json").exists()


@pytest.mark.parametrize("family", known(NEEDS_IMAGES))
def test_a_model_that_needs_images_is_refused(toy, tmp_path, family):
    with pytest.raises(FastpoError, match="cannot run on rows of text alone"):
        fastpo.train(make_model(family), toy.rows(4), processing_class=toy.tokenizer(),
                     args={**OPTIONS, "output_dir": str(tmp_path)})  # fmt: skip


def test_an_adapter_spares_the_tower(toy, tmp_path):
    peft = pytest.importorskip("peft")
    model = make_model("llava")
    names = [n for n, _ in model.named_modules() if n.endswith("q_proj")]
    assert any("vision" in n for n in names)
    model.save_pretrained(tmp_path / "model")
    toy.tokenizer().save_pretrained(tmp_path / "model")
    out = fastpo.train(
        str(tmp_path / "model"), toy.rows(8), peft_config=peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        args={**OPTIONS, "output_dir": str(tmp_path / "out"), "save_merged": True},
    )  # fmt: skip
    adapted = [n for n, _ in out.model.named_parameters() if "lora_" in n]
    assert adapted
    assert not any("vision" in n for n in adapted)
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", framework="pt") as f:
        assert not any("vision" in n for n in f.keys())  # noqa: SIM118
    merged, before = tensors(tmp_path / "out" / "merged"), tensors(tmp_path / "model")
    assert set(merged) == set(before)
    assert all(torch.equal(merged[n], before[n]) for n in before if "vision" in n)
    again = load_model(tmp_path / "out", use_cpu=True)  # goes on by its path
    assert not freeze_towers(again)


def edited(folder: Path, toy, change) -> str:
    """A toy checkpoint with `change(config, tensors)` applied to its files."""
    toy.model().save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    config, held = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    change(config, held)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


MISFITS = {
    "unknown class": (lambda c, t: c.update(architectures=["LlamaForCausalLM2"]),
                      r"names the class LlamaForCausalLM2, which transformers .* architectures to \['LlamaForCausal"),
    "no head": (lambda c, t: c.update(architectures=["LlamaForSequenceClassification"]),
                "LlamaForSequenceClassification, which has no language model's head; .* is a LlamaForCausalLM"),
    "another type": (lambda c, t: c.update(architectures=["Qwen2ForCausalLM"]),
                     "is a 'llama''s, and names the class Qwen2ForCausalLM, which is a 'qwen2''s"),
    "no weights": (lambda c, t: t.pop("lm_head.weight"), "no weights for lm_head.weight of LlamaForCausalLM"),
    "a score head": (lambda c, t: t.update({"score.weight": t.pop("lm_head.weight")[:2].clone()}),
                     "no weights for lm_head.weight .* at random, and has score.weight in their place"),
    "a tensor more": (lambda c, t: t.update({"visual.proj.weight": torch.ones(2, 2)}),
                      "holds visual.proj.weight, for which LlamaForCausalLM, .* has no place"),
    "another size": (lambda c, t: c.update(intermediate_size=32), r"holds model.layers.0.mlp.* as \(.*64.*has as"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_a_checkpoint_that_does_not_fit_its_class_is_refused(toy, tmp_path, name):
    change, message = MISFITS[name]
    where = edited(tmp_path / "model", toy, change)
    with pytest.raises(ConfigError, match=message) as caught:
        fastpo.train(where, toy.rows(4), args={**OPTIONS, "output_dir": str(tmp_path / "out")})
    assert "\n" not in str(caught.value)


def test_what_every_model_computes_itself_is_no_loss(toy, tmp_path):
    where = edited(tmp_path / "model", toy,
                   lambda c, t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))  # fmt: skip
    assert load_model(where, use_cpu=True).fastpo_source[0] == where


@pytest.mark.parametrize("max_shard_size", ["5GB", "30KB"], ids=["one file", "sharded"])
def test_what_a_class_never_reads_is_carried_over(toy, tmp_path, max_shard_size):
    """Heads that predict further tokens, which the class declares it leaves out: in the saved folder, bit for bit."""
    model = make_model("qwen3_5")
    model.save_pretrained(tmp_path / "model")
    toy.tokenizer().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file({**load_file(file), "mtp.fc.weight": torch.randn(4, 8)}, file, metadata={"format": "pt"})
    before = tensors(tmp_path / "model")
    for source, target in (("model", "once"), ("once", "twice")):
        fastpo.train(str(tmp_path / source), toy.rows(4), processing_class=toy.tokenizer(), args={
            **OPTIONS, "output_dir": str(tmp_path / target), "max_steps": 1, "max_shard_size": max_shard_size,
        })  # fmt: skip
        after = tensors(tmp_path / target)
        assert set(after) == set(before)
        assert torch.equal(after["mtp.fc.weight"], before["mtp.fc.weight"])
        index = tmp_path / target / "model.safetensors.index.json"
        assert index.exists() == (max_shard_size != "5GB")
        if index.exists():
            assert set(json.loads(index.read_text())["weight_map"]) == set(after)
    shutil.rmtree(tmp_path / "model")


def test_one_dtype(toy, tmp_path):
    toy.model().save_pretrained(tmp_path)
    for named in ({"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}):
        with pytest.raises(ConfigError, match="dtype is named twice: dtype=torch.float32 and model_init_kwargs"):
            load_model(tmp_path, use_cpu=True, dtype="float32", model_init_kwargs=named)
        assert load_model(tmp_path, use_cpu=True, dtype="bf16", model_init_kwargs=named).dtype == torch.bfloat16
        assert load_model(tmp_path, use_cpu=True, model_init_kwargs=named).dtype == torch.bfloat16
