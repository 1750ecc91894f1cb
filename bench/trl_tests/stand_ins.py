"""Local stand-ins for the models and data sets that TRL's tests load from the hub, written into a folder once.

Models lie in a hub cache of their own (`HF_HUB_CACHE`), so that `from_pretrained` finds them by TRL's names without
being patched; data sets are folders that `load_dataset` reads, streamed too. Weights are random, tokenizers byte-level
with the special tokens of their family; chat templates are those that the installed TRL ships.
"""

import json
import shutil
from pathlib import Path
from typing import Any

HUB = "trl-internal-testing"
REVISION = "0" * 40  # what the hub cache calls the commit

# Sizes that every decoder shares; `vocab_size` and the ids of special tokens follow its tokenizer.
_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2}  # fmt: skip
_MOE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}

# By name: transformers' class, its sizes beside _SIZES, the end of sequence, more special tokens, TRL's chat template.
MODELS: dict[str, tuple[str, dict[str, Any], str, tuple[str, ...], str | None]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2", {}, "<|im_end|>", ("<|im_start|>", "<|endoftext|>"), "qwen2_5"),
    "tiny-GptOssForCausalLM": (
        "GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}, "<|return|>",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|endoftext|>"), "gptoss",
    ),
    "tiny-Cohere2ForCausalLM": (
        "Cohere2", {"logit_scale": 1.0}, "<|END_OF_TURN_TOKEN|>",
        ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"), "cohere2",
    ),
    "tiny-Glm4MoeForCausalLM": (
        "Glm4Moe", {**_MOE, "n_routed_experts": 4, "head_dim": 8, "first_k_dense_replace": 1}, "<|endoftext|>",
        ("<|user|>", "<|assistant|>", "<|observation|>"), "glm4moe",
    ),
    "tiny-Qwen3MoeForCausalLM": (
        "Qwen3Moe", {**_MOE, "num_experts": 4, "head_dim": 8}, "<|im_end|>", ("<|im_start|>", "<|endoftext|>"), "qwen3",
    ),
    "tiny-NemotronHForCausalLM-nano": (
        "NemotronH",
        {**_MOE, "layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 8, "mamba_head_dim": 4,
         "mamba_n_groups": 1, "ssm_state_size": 16, "n_routed_experts": 4, "use_mamba_kernels": False,
         "moe_shared_expert_intermediate_size": 32},
        "<|im_end|>", ("<|im_start|>",), "nemotron_3_nano",
    ),
    "tiny-Olmo3ForCausalLM": ("Olmo3", {}, "<|endoftext|>", (), None),
    "tiny-Lfm2ForCausalLM": (
        "Lfm2", {"full_attn_idxs": [1], "block_multiple_of": 8}, "<|im_end|>", ("<|im_start|>",), "lfm2",
    ),
    "tiny-Lfm2ForCausalLM-2.5": (
        "Lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}, "<|im_end|>",
        ("<|im_start|>",), "lfm2_2_5",
    ),
    "tiny-RemoteForCausalLM": ("Llama", {}, "<|im_end|>", ("<|im_start|>",), "qwen2_5"),
    "tiny-T5ForConditionalGeneration": ("T5", {}, "</s>", (), None),
}  # fmt: skip

_REMOTE = {
    "configuration_remote.py": (
        "from transformers import LlamaConfig\n\n\nclass RemoteConfig(LlamaConfig):\n    model_type = 'remote'\n"
    ),
    "modeling_remote.py": (
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_remote import RemoteConfig\n\n\n"
        "class RemoteForCausalLM(LlamaForCausalLM):\n    config_class = RemoteConfig\n"
    ),
}

# Questions with a right answer and a wrong one.
_FACTS = [
    ("What do bees make", "Honey.", "Wool."), ("Where do fish live", "In water.", "In trees."),
    ("What falls in winter", "Snow falls.", "Sand falls."), ("What barks", "A dog does.", "A stone does."),
    ("How many legs has a spider", "Eight legs.", "Two."), ("What burns", "Dry wood.", "Wet stone."),
    ("What gives light by day", "The sun.", "The moon and some stars."), ("What has wings", "A bird.", "A snail."),
    ("What grows on an oak", "Acorns grow there.", "Shoes."), ("What is frozen water", "Ice.", "Steam, or so."),
    ("What do we read", "Books.", "Spoons."), ("What tells the time", "A clock.", "A carpet."),
    ("What opens a lock", "The right key.", "A cloud."), ("What carries letters", "The post.", "A pond."),
    ("What is made of flour", "Bread is.", "Glass is."), ("What sails", "A ship.", "A chair."),
    ("What pulls a plough", "An ox.", "A mouse."), ("What do cows eat", "Grass.", "Nails."),
    ("What covers a house", "A roof.", "A river."),
]  # fmt: skip

_TOOL = {"type": "function", "function": {
    "name": "look_up", "description": "Looks a word up.",
    "parameters": {"type": "object", "properties": {"word": {"type": "string", "description": "What to look up."}},
                   "required": ["word"]}}}  # fmt: skip


def build(root: Path) -> tuple[Path, dict[str, Path]]:
    """The stand-ins below `root`, made where they are missing. -> the hub cache, and folders of data sets by name"""
    hub, data = root / "hub", root / "data"
    for name in MODELS:
        folder = hub / f"models--{HUB}--{name}"
        if not (folder / "refs" / "main").exists():
            shutil.rmtree(folder, ignore_errors=True)
            _model(name, folder / "snapshots" / REVISION)
            (folder / "refs").mkdir()
            (folder / "refs" / "main").write_text(REVISION)
    sets = {f"{HUB}/{name}": data / name for name in ("zen", "harmony", "toolcall")}
    if not all((folder / "README.md").exists() for folder in sets.values()):
        shutil.rmtree(data, ignore_errors=True)
        _write_set(data / "zen", _zen())
        _write_set(data / "harmony", {"preference": _harmony()})
        _write_set(data / "toolcall", {"preference": _toolcall()})
    return hub, sets


def _tokenizer(folder: Path, end: str, more: tuple[str, ...], template: str | None) -> Any:
    import trl
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    text = [" ".join(fact) for fact in _FACTS] * 4
    if template is not None:  # its words, so that a rendered prompt is as short as with the family's own vocabulary
        template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
        text += [template, json.dumps(_TOOL)] * 4
    bpe.train_from_iterator(text, vocab_size=800, min_frequency=2, special_tokens=["<|pad|>", end, *more])
    bos = {"bos_token": more[0]} if more and more[0].startswith("<BOS") else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=end, pad_token="<|pad|>", additional_special_tokens=list(more), **bos
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def _model(name: str, folder: Path) -> None:
    import torch
    import transformers

    family, sizes, end, more, template = MODELS[name]
    tokenizer = _tokenizer(folder, end, more, template)
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ids["bos_token_id"] = tokenizer.bos_token_id
    torch.manual_seed(0)
    if family == "T5":
        shape = {"d_model": 16, "d_ff": 32, "d_kv": 4, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
        model: Any = transformers.T5ForConditionalGeneration(transformers.T5Config(**ids, **shape))
    else:
        config = getattr(transformers, f"{family}Config")(**_SIZES, **ids, **sizes)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.to(torch.bfloat16).save_pretrained(folder)
    if name == "tiny-RemoteForCausalLM":
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config |= {"model_type": "remote", "architectures": ["RemoteForCausalLM"], "auto_map": {
            "AutoConfig": "configuration_remote.RemoteConfig",
            "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM"}}  # fmt: skip
        path.write_text(json.dumps(config, indent=2))
        for file, code in _REMOTE.items():
            (folder / file).write_text(code)


def _write_set(folder: Path, configs: dict[str, list[dict[str, Any]]]) -> None:
    """Each configuration's rows as parquet, the last two as the split test."""
    from datasets import Dataset

    lines = ["---", "configs:"]
    for name, rows in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, part in (("train", rows[:-2]), ("test", rows[-2:])):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Dataset.from_list(part).to_parquet(folder / name / f"{split}.parquet")
            lines += [f"  - split: {split}", f"    path: {name}/{split}.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def _zen() -> dict[str, list[dict[str, Any]]]:
    """The shapes of TRL's data set of that name: text and conversations, with the prompt apart or repeated."""
    user = [[{"role": "user", "content": q + "?"}] for q, _, _ in _FACTS]
    says = [[[{"role": "assistant", "content": a}] for a in fact[1:]] for fact in _FACTS]
    texts = [(q + ":", " " + good, " " + bad) for q, good, bad in _FACTS]
    numbered = list(enumerate(texts))
    return {
        "standard_preference": [{"prompt": q, "chosen": a, "rejected": b} for q, a, b in texts],
        "standard_implicit_prompt_preference": [{"chosen": q + a, "rejected": q + b} for q, a, b in texts],
        "conversational_preference": [
            {"prompt": q, "chosen": a, "rejected": b} for q, (a, b) in zip(user, says, strict=True)
        ],
        "conversational_implicit_prompt_preference": [
            {"chosen": q + a, "rejected": q + b} for q, (a, b) in zip(user, says, strict=True)
        ],
        "standard_unpaired_preference": [
            {"prompt": q, "completion": (a, b)[i % 3 == 0], "label": i % 3 != 0} for i, (q, a, b) in numbered
        ],
    }


def _harmony() -> list[dict[str, Any]]:
    rows = []
    for i, (q, good, bad) in enumerate(_FACTS):
        answers = [
            {"role": "assistant", "thinking": f"{why} {q.lower()}.", "content": text}
            for why, text in (("I know", good), ("I guess", bad))
        ]
        kwargs = {"reasoning_effort": ("low", "medium", "high")[i % 3], "model_identity": "You are a model."}
        row = {"prompt": [{"role": "user", "content": q + "?"}], "chosen": answers[:1], "rejected": answers[1:]}
        rows.append({**row, "chat_template_kwargs": kwargs})
    return rows


def _toolcall() -> list[dict[str, Any]]:
    rows = []
    for q, good, bad in _FACTS:
        calls = [
            [{"role": "assistant", "tool_calls": [
                {"type": "function", "function": {"name": "look_up", "arguments": {"word": word}}}]}]
            for word in (good, bad)
        ]  # fmt: skip
        rows.append({"prompt": [{"role": "user", "content": q + "?"}], "chosen": calls[0], "rejected": calls[1],
                     "tools": [_TOOL]})  # fmt: skip
    return rows
