"""Shared by the benchmark scripts: data, tokenizers, models, machine name, peak memory, result files."""

import argparse
import gzip
import importlib.util
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fastpo

ROOT = Path(__file__).resolve().parent.parent
SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "</s>"}  # no BOS: ids 0 and 1


def hh_rows(count: int | None = None) -> list[dict]:
    """The first `count` HH dialogues, {"chosen", "rejected"}, prompt implicit. FASTPO_BENCH_DATA: another folder."""
    folder = Path(os.environ.get("FASTPO_BENCH_DATA", ROOT.parent / "shared" / "data"))
    with gzip.open(folder / "hh_dialogues.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file][:count]


def synthetic_rows(count: int, vocab_size: int, seed: int = 0) -> list[dict]:
    """Random words, one token each: prompts of 20 to 120, responses of 10 to 120."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(f"w{rng.randrange(3, vocab_size)}" for _ in range(rng.randint(low, high)))

    return [
        {"prompt": words(20, 120) + " ", "chosen": words(10, 120), "rejected": words(10, 120)} for _ in range(count)
    ]


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One token per word `w<i>`, 3 <= i < vocab_size; token id = i."""
    vocab = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def bpe_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`; fewer than `vocab_size` tokens where the texts run out of merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def llama(
    vocab_size: int, *, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int | None = None,
    tied: bool = False, dtype: torch.dtype = torch.float32, max_positions: int = 2048, seed: int = 0,
) -> LlamaForCausalLM:  # fmt: skip
    """Random Llama with SDPA attention; by default fp32 with an untied head."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).to(dtype)


def trl_config(output_dir: str, **kwargs):
    """DPOConfig for a plain fp32 CPU run: no autocast, no gradient checkpointing, no saving, one log per step."""
    from trl import DPOConfig

    defaults = {
        "output_dir": output_dir,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "gradient_checkpointing": None,  # the deprecated alias, on by default in TRL
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
    }
    return DPOConfig(**(defaults | kwargs))


def fastpo_args(output_dir: str, **kwargs) -> dict:
    """The same run for `fastpo.train`, in TRL's field names."""
    defaults = {
        "output_dir": output_dir,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "save_final": False,
        "disable_tqdm": True,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
    }
    return defaults | kwargs


def own_environment(folder: str, threads: int) -> dict[str, str]:
    """Of a run on the CPU that is a process of its own: its caches are in `folder`, empty, and it is quiet."""
    return os.environ | {
        "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore",
        "HF_DATASETS_CACHE": f"{folder}/datasets", "FASTPO_CACHE": f"{folder}/fastpo", "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
    }  # fmt: skip


def spawned(script: str, provider: str, args: argparse.Namespace, options: Sequence[str]) -> dict:
    """What `script --worker PROVIDER FILE` writes into the file, as a process of its own; it gets these of `args`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, script, "--worker", provider, str(path)]
        for name in options:
            value = getattr(args, name)
            command += [f"--{name}"] * value if isinstance(value, bool) else [f"--{name}", str(value)]
        environment = own_environment(folder, args.threads)
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
        if run.returncode:
            raise SystemExit(f"{provider}: {run.stderr[-2000:]}")
        return json.loads(path.read_text())


def step_logs(log_history: list[dict]) -> list[dict]:
    """The per-step training entries of a log history (no evaluation, no final summary)."""
    return [entry for entry in log_history if "loss" in entry]


def quiet() -> None:
    """Silence progress bars, telemetry and third-party logging; must run before the libraries start work."""
    import transformers

    if importlib.util.find_spec("datasets"):  # TRL's, and not on every machine
        import datasets

        datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()


def need(*modules: str) -> None:
    """One line and exit code 1 where a comparison's other side is not installed."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    if absent:
        raise SystemExit(f"{absent[0]} is not installed: pip install -e '.[bench]'")


def machine_name() -> str:
    """Folder name of this machine's results, such as `cpu-epyc-2c` or `nvidia-h100`."""
    if torch.cuda.is_available():
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.split(":", 1)[1]
            break
    words = re.findall(r"[a-z]+", model.lower())
    family = next((name for name in ("epyc", "ryzen", "xeon", "core", "graviton", "apple") if name in words), words[-1])
    return f"cpu-{family}-{os.cpu_count()}c"


def environment() -> dict:
    """What a result depends on: versions, processor, threads, commit."""
    from importlib.metadata import PackageNotFoundError, version

    packages = ("torch", "triton", "transformers", "trl", "accelerate", "liger_kernel", "cut-cross-entropy",
                "quack-kernels", "fastpo")  # fmt: skip
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    versions["fastpo"] = versions["fastpo"] or fastpo.__version__  # on the path, not installed
    return {"machine": machine_name(), "cores": os.cpu_count(), "python": platform.python_version(), **versions} | {
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda or torch.version.hip,
        **commit(),
    }


def commit() -> dict:
    """The commit of the checkout, and whether tracked files differ from it; None outside of git."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "-uno")
    return {"commit": git("rev-parse", "HEAD"), "branch": git("rev-parse", "--abbrev-ref", "HEAD"),
            "dirty": None if changes is None else bool(changes)}  # fmt: skip


def write_result(name: str, result: dict, markdown: str | None = None, folder: Path | None = None) -> Path:
    """Write <folder or bench/results/<machine>>/<name>.json (and .md)."""
    folder = folder or ROOT / "bench" / "results" / machine_name()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    if markdown is not None:
        path.with_suffix(".md").write_text(markdown)
    return path


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def reset_peak_memory() -> int:
    """Set the peak resident size to the current one (Linux) and return it in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def peak_memory() -> int:
    """Peak resident bytes since `reset_peak_memory`."""
    return _status_bytes("VmHWM")
