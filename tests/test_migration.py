"""TRL's own scripts, moved: the twin differs in the import and the one call, runs offline, and trains as TRL does."""

import ast
import json
import math
import random
import runpy

import pytest

SCRIPTS = ("quick_start", "reference", "qlora")

# Turns become "<|user|> words <|end|>"; WordLevel splits at the spaces.
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory, toy):
    """A folder with the models and the data set under their hub names: relative paths win over the hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("hub")
    words = ["<unk>", "<pad>", "<|end|>", "<|user|>", "<|assistant|>", *(f"w{i}" for i in range(toy.words - 2))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", unk_token="<unk>", pad_token="<pad>", chat_template=TEMPLATE
    )
    for name in ("Qwen/Qwen3-0.6B", "Qwen/Qwen2-0.5B-Instruct"):
        toy.model(seed=1, eos_token_id=2, pad_token_id=1).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rng = random.Random(0)

    def row():
        prompt = {"role": "user", "content": toy.text(rng, 3, 12)}
        answers = {k: [prompt, {"role": "assistant", "content": toy.text(rng, 2, 9)}] for k in ("chosen", "rejected")}
        return {**answers, "score_chosen": 9.0, "score_rejected": 2.0}  # columns that nobody asked for

    data = folder / "trl-lib" / "ultrafeedback_binarized"
    data.mkdir(parents=True)
    for split, n in (("train", 16), ("test", 6)):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row()) + "\n" for _ in range(n)))
    return folder


@pytest.fixture
def run(hub, repo_root, monkeypatch, tmp_path):
    """Runs a script of tests/migration in a folder of its own; returns the script's names and the folder."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    import torch

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    # At the scripts' own learning rates two steps of a tiny model stay within fp32's noise.
    changes = {"learning_rate": 1e-2}
    if not torch.cuda.is_available():  # where TRL's default, bfloat16, raises: the one thing a CPU needs said
        changes |= {"use_cpu": True, "bf16": False}
    dpo_config = trl.DPOConfig
    monkeypatch.setattr(trl, "DPOConfig", lambda **options: dpo_config(**{**options, **changes}))

    def run(name):
        folder = tmp_path / name
        folder.mkdir()
        for part in ("Qwen", "trl-lib"):
            (folder / part).symlink_to(hub / part)
        monkeypatch.chdir(folder)
        return runpy.run_path(str(repo_root / "tests" / "migration" / f"{name}.py")), folder

    return run


class Move(ast.NodeTransformer):
    """The one change: DPOTrainer leaves the import, its call becomes fastpo.train, and .train() goes."""

    def visit_ImportFrom(self, node):
        if node.module == "trl":
            node.names = [alias for alias in node.names if alias.name != "DPOTrainer"]
        return node if node.names else None

    def visit_Assign(self, node):
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "DPOTrainer":
            node.value.func = ast.parse("fastpo.train", mode="eval").body
            return ast.Expr(node.value)
        return node

    def visit_Expr(self, node):
        return None if ast.unparse(node) == "trainer.train()" else node


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_twin_differs_in_import_and_call_only(repo_root, name):
    folder = repo_root / "tests" / "migration"
    theirs = ast.unparse(Move().visit(ast.parse((folder / f"{name}_trl.py").read_text())))
    ours = (folder / f"{name}_fastpo.py").read_text()
    assert "import fastpo" in ours and "DPOTrainer" not in ours
    without_import = [line for line in ast.unparse(ast.parse(ours)).splitlines() if line != "import fastpo"]
    assert without_import == theirs.splitlines()


def logged(folder):
    return [json.loads(line) for line in next(folder.glob("*/metrics.jsonl")).read_text().splitlines()]


def test_quick_start(run):
    _, folder = run("quick_start_fastpo")
    assert json.loads((folder / "fastpo-output" / "config.json").read_text())["model_type"] == "llama"
    summary = logged(folder)[-1]
    assert summary["step"] == 6 and summary["epoch"] == 3  # 16 rows, batches of 8, 3 epochs
    assert summary["train_loss"] == pytest.approx(math.log(2), abs=1e-3)  # learning rate 1e-6


def test_reference_trains_as_trl(run, hub):
    """Every figure that both log agrees, step by step, on training and evaluation data, and so do the updates."""
    from transformers import AutoModelForCausalLM

    trl_names, _ = run("reference_trl")
    names, folder = run("reference_fastpo")
    keys = {
        "loss": ["grad_norm", "learning_rate", "logps/chosen", "logps/rejected", "rewards/margins", "num_tokens"],
        "eval_loss": ["eval_logps/chosen", "eval_rewards/accuracies", "eval_rewards/margins"],
    }
    for by in ("loss", "eval_loss"):
        theirs = [line for line in trl_names["trainer"].state.log_history if by in line]
        ours = [line for line in logged(folder) if by in line]
        assert [line["step"] for line in theirs] == [line["step"] for line in ours] and ours
        for expected, line in zip(theirs, ours, strict=True):
            for key in (by, *keys[by]):
                assert line[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), (line["step"], key)
    start = AutoModelForCausalLM.from_pretrained(hub / "Qwen" / "Qwen2-0.5B-Instruct").state_dict()
    trained, expected = names["model"].state_dict(), trl_names["model"].state_dict()
    for name, weight in start.items():
        moved = (expected[name] - weight).abs().max()
        assert moved > 0 and (trained[name] - expected[name]).abs().max() <= 0.02 * moved, name


def test_qlora(run):
    pytest.importorskip("bitsandbytes")
    from safetensors.torch import load_file

    _, folder = run("qlora_fastpo")
    output = folder / "Qwen3-0.6B-DPO-QLoRA"
    saved = json.loads((output / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"]) == (32, 16)
    assert saved["base_model_name_or_path"] == "Qwen/Qwen3-0.6B" and not (output / "model.safetensors").exists()
    lines = [line for line in logged(folder) if "loss" in line]
    assert len(lines) == 4 and lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-3)
    adapter = load_file(output / "adapter_model.safetensors")
    trained = [weight for name, weight in adapter.items() if "lora_B" in name]  # zero before training
    assert len(trained) == 14 and all(weight.isfinite().all() and weight.abs().max() > 0 for weight in trained)
