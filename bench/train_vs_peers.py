"""fastpo.train against TRL's DPOTrainer, with and without Liger: seconds a step, memory, per-step losses, tokens.

    python bench/train_vs_peers.py                              # CPU: a small model, ten steps of each scenario
    python bench/train_vs_peers.py --scenario hh --steps 4      # one scenario, fewer steps
    python bench/train_vs_peers.py --shape 4x256                # another small model, see below; train_vs_peers_4x256.*
    python bench/train_vs_peers.py --device cuda                # GPU: 1B and 8B shapes, LoRA and full

The peers are of the `bench` extra (TRL, Liger); one that is not installed is a row with its reason. Each run is one
fresh process; runs of the providers alternate; medians are reported. Same rows in the same order, same initial weights,
same step; CPU runs are fp32, or bf16 by --dtype, without gradient checkpointing, GPU runs bf16 with it. `seconds` is
everything between the call and its return, divided by the optimiser steps: tokenisation, guards, reference pass and
training. Memory on a CPU is the peak resident size over that of the interpreter with its imports, tokenizer and rows
loaded, so model, gradients and optimiser state count; on a GPU the allocator's peak. FASTPO_CACHE is empty in every
run: no reference pass is saved.

Providers: `fastpo`; `fastpo_unshared` (`share_prompts=never`); `trl` (reference model in memory, one forward in each
step, TRL's default); `trl_precompute` (`precompute_ref_log_probs=True`); `trl_liger` (`use_liger_kernel=True`, where
its Triton kernels run). GPU runs compute the reference beforehand on every side.

Useful FLOPs are the same number for every provider of a scenario: 6 (4 where frozen) per parameter and real token of
every response with its prompt, and the head on the responses' tokens; plus the reference's forward. `utilisation` is
their rate over that of a large GEMM in the run's dtype, measured by this script in the same run.

The CPU's models are small enough for ten steps of TRL in minutes. Sharing prompts saves nothing in the head, which has
27% of the HH rows' useful FLOPs in 12x192 (12 layers of width 192), 45% in 4x256, 1 to 3% in a 7B model. Matrix
multiplies alone would make a step of these rows 1.34 times as fast in 12x192, 1.24 times in 4x256.
"""

import argparse
import copy
import dataclasses
import functools
import gzip
import importlib.util
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out

PROVIDERS = ("fastpo", "fastpo_unshared", "trl", "trl_precompute", "trl_liger")
VOCAB = 32_000
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
CPU_SHAPES = {  # layers x hidden size; untied heads, random weights
    "12x192": {"hidden": 192, "intermediate": 512, "layers": 12, "heads": 3},
    "4x256": {"hidden": 256, "intermediate": 688, "layers": 4, "heads": 4},
}
CPU_SHAPE = "12x192"  # unless another is chosen
GPU_SHAPES = {  # Llama-3.2-1B (tied head) and Llama-3-8B, random weights
    "1b": {"hidden": 2048, "intermediate": 8192, "layers": 16, "heads": 32, "kv_heads": 8, "tied": True},
    "8b": {"hidden": 4096, "intermediate": 14336, "layers": 32, "heads": 32, "kv_heads": 8, "tied": False},
}


@dataclass(frozen=True)
class Scenario:
    rows: str  # what the rows are
    pairs: int  # of one optimiser step
    device: str = "cpu"
    shape: str = CPU_SHAPE  # of CPU_SHAPES or GPU_SHAPES
    method: str = "full"  # or lora
    dtype: str = "float32"  # of the CPU's weights
    lengths: tuple[int, int] = (0, 0)  # tokens of a prompt and of a response, of random rows
    accumulation: int = 1  # of TRL, whose logits of a whole step may not fit


SCENARIOS = {
    "synthetic": Scenario(
        "random words, prompts of 20 to 120 words, responses of 10 to 120, one token a word", 8
    ),
    "hh": Scenario(
        "HH dialogues of ../shared/data in their order, implicit prompts, byte-level BPE trained on all of them", 16
    ),
    "kway": Scenario(
        "prompts of ../shared/data's AlpacaEval file, eight responses each, all 28 pairs by win probability; TRL gets "
        "the pairs as rows; one prompt a step", 28, accumulation=4,
    ),
}  # fmt: skip
for _shape, _method, (_prompt, _response) in itertools.product(
    GPU_SHAPES, ("lora", "full"), ((1024, 256), (512, 512), (64, 512))
):
    SCENARIOS[f"{_shape}_{_method}_{_prompt}_{_response}"] = Scenario(
        f"random tokens, prompts of about {_prompt}, responses of about {_response}", 8, device="cuda", shape=_shape,
        method=_method, lengths=(_prompt, _response), accumulation=4,
    )  # fmt: skip


# By how much TRL must take longer and more memory than fastpo, and fastpo without sharing longer, by (scenario, shape):
# the goals that were set for these models. 1.25 times is beyond what sharing can bring in 4x256.
TARGETS = {
    ("synthetic", "4x256"): {"trl": {"time_ratio": 8.0, "memory_ratio": 6.0}},
    ("hh", "4x256"): {"trl": {"time_ratio": 12.0, "memory_ratio": 5.0}},
    ("hh", "12x192"): {"trl": {"time_ratio": 15.0, "memory_ratio": 5.0}, "fastpo_unshared": {"time_ratio": 1.25}},
    ("kway", "12x192"): {"trl": {"time_ratio": 20.0}},
}


def on_model(shape: str, dtype: str) -> None:
    """The CPU's scenarios on another small model, or in another dtype."""
    for name, scenario in SCENARIOS.items():
        if scenario.device == "cpu":
            SCENARIOS[name] = dataclasses.replace(scenario, shape=shape, dtype=dtype)


def load_rows(name: str, steps: int) -> tuple[list[dict], list[dict], object]:
    """(rows for fastpo, rows for TRL, tokenizer)."""
    import common

    scenario = SCENARIOS[name]
    if name == "kway":
        return kway_rows(steps)
    count = scenario.pairs * steps
    if name == "hh":
        rows = common.hh_rows()
        tokenizer = common.bpe_tokenizer([row[key] for row in rows for key in ("chosen", "rejected")], VOCAB)
        return rows[:count], rows[:count], tokenizer
    if scenario.lengths != (0, 0):
        rng = random.Random(0)

        def words(about: int) -> str:
            return " ".join(f"w{rng.randrange(3, VOCAB)}" for _ in range(rng.randint(about * 3 // 4, about * 5 // 4)))

        prompt, response = scenario.lengths
        rows = [
            {"prompt": words(prompt) + " ", "chosen": words(response), "rejected": words(response)}
            for _ in range(count)
        ]
    else:
        rows = common.synthetic_rows(count, VOCAB)
    return rows, rows, common.word_tokenizer(VOCAB)


def kway_rows(steps: int, vocab: int = VOCAB) -> tuple[list[dict], list[dict], object]:
    """K = 8 rows whose win probabilities all differ, and the same as 28 pairs each."""
    import common

    folder = Path(os.environ.get("FASTPO_BENCH_DATA", common.ROOT.parent / "shared" / "data"))
    with gzip.open(folder / "alpaca_eval_kway.jsonl.gz", "rt", encoding="utf-8") as file:
        table = [json.loads(line) for line in file]
    tokenizer = common.bpe_tokenizer([r["text"] for row in table for r in row["responses"]], vocab)
    ours, theirs = [], []
    for row in table:
        responses = [{"text": r["text"], "win_prob": r["win_prob_vs_baseline"]} for r in row["responses"]]
        if len({r["win_prob"] for r in responses}) < 8 or len({r["text"] for r in responses}) < 8:
            continue
        if not all(r["text"] for r in responses):
            continue
        ours.append({"prompt": row["prompt"] + "\n", "responses": responses})
        for a, b in itertools.permutations(responses, 2):
            if a["win_prob"] > b["win_prob"]:
                theirs.append({"prompt": row["prompt"] + "\n", "chosen": a["text"], "rejected": b["text"]})
        if len(ours) == steps:
            return ours, theirs, tokenizer
    raise SystemExit(f"only {len(ours)} prompts have eight different win probabilities")


def lora_config():
    from peft import LoraConfig

    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=modules, task_type="CAUSAL_LM")


def run_trl(provider, scenario, model, rows, tokenizer, options, output_dir) -> tuple[list[dict], list[float]]:
    import common
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import DPOTrainer

    step_ends: list[float] = []

    class StepTimes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            step_ends.append(time.perf_counter())

    lora, precompute = scenario.method == "lora", provider == "trl_precompute" or scenario.device == "cuda"
    ours = {
        "per_device_train_batch_size": scenario.pairs // scenario.accumulation,
        "gradient_accumulation_steps": scenario.accumulation,
        "precompute_ref_log_probs": precompute,
        "use_liger_kernel": provider == "trl_liger",
    }
    if scenario.device == "cuda":
        ours |= {"use_cpu": False, "bf16": True, "gradient_checkpointing": True, "activation_checkpointing": None}
    trainer = DPOTrainer(
        model=model,
        ref_model=None if precompute or lora else copy.deepcopy(model),
        args=common.trl_config(output_dir, **options | ours),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config() if lora else None,
        callbacks=[StepTimes()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return common.step_logs(trainer.state.log_history), step_ends


def run_fastpo(provider, scenario, name, model, rows, tokenizer, options, output_dir) -> list[dict]:
    import common

    import fastpo

    extra = {"share_prompts": "never"} if provider == "fastpo_unshared" else {}
    if scenario.device == "cuda":
        extra |= {"use_cpu": False, "bf16": True, "gradient_checkpointing": True}
    extra["per_device_train_batch_size"] = scenario.pairs
    if name == "kway":
        extra |= {"per_device_train_batch_size": 1, "pair_policy": "all"}
    peft_config = lora_config() if scenario.method == "lora" else None
    args = common.fastpo_args(output_dir, **options | extra)
    result = fastpo.train(model, rows, args=args, processing_class=tokenizer, peft_config=peft_config)
    return common.step_logs(result.log_history)


def full_optimiser() -> str:
    """Of full fine-tuning on a GPU, on both sides: 8-bit state where bitsandbytes is there, else PyTorch's AdamW."""
    return "adamw_8bit" if importlib.util.find_spec("bitsandbytes") else "adamw_torch_fused"


def unavailable(provider: str) -> str | None:
    """Why a provider cannot run here, or None; told before a process is started for it."""
    needs = [] if provider.startswith("fastpo") else ["trl", "datasets", "accelerate"]
    needs += ["liger_kernel"] if provider == "trl_liger" else []
    absent = [name for name in needs if importlib.util.find_spec(name) is None]
    return f"{absent[0]} is not installed" if absent else None


def make_model(scenario: Scenario):
    import common
    import torch

    if scenario.device == "cpu":
        return common.llama(VOCAB, **CPU_SHAPES[scenario.shape]).to(getattr(torch, scenario.dtype))
    shape = dict(GPU_SHAPES[scenario.shape])
    tied, kv_heads = shape.pop("tied"), shape.pop("kv_heads")
    with torch.device("cuda"):
        return common.llama(
            128_256, **shape, kv_heads=kv_heads, tied=tied, dtype=torch.bfloat16, max_positions=4096
        )  # fmt: skip


def worker(provider: str, name: str, steps: int, result_path: str) -> None:
    """One provider, one scenario, in this process; writes its measurements as JSON."""
    import common
    import torch

    scenario = SCENARIOS[name]
    if provider.startswith("fastpo"):
        import fastpo

        _ = fastpo.train
    else:
        import trl

        _ = trl.DPOTrainer
    common.quiet()
    on_gpu = scenario.device == "cuda"
    if not on_gpu:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    our_rows, their_rows, tokenizer = load_rows(name, steps)
    tokenizer("a b")
    options = {
        "num_train_epochs": 1,
        "learning_rate": 1e-6 if on_gpu else 1e-4,
        "loss_type": "sigmoid",
        "beta": 0.1,
        "max_length": 2048 if on_gpu else 1024,
    }
    if on_gpu and scenario.method == "full":
        options["optim"] = full_optimiser()
    with tempfile.TemporaryDirectory() as output_dir:
        base_bytes = 0 if on_gpu else common.reset_peak_memory()
        model = make_model(scenario)
        step_ends: list[float] = []
        start, cpu_start = time.perf_counter(), time.process_time()
        if provider.startswith("fastpo"):
            logs = run_fastpo(provider, scenario, name, model, our_rows, tokenizer, options, output_dir)
        else:
            logs, step_ends = run_trl(provider, scenario, model, their_rows, tokenizer, options, output_dir)
        if on_gpu:
            torch.cuda.synchronize()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        peak_bytes = torch.cuda.max_memory_allocated() if on_gpu else common.peak_memory() - base_bytes
    if len(logs) != steps:
        raise RuntimeError(f"{provider}: {len(logs)} logged steps, expected {steps}")
    result = {
        "provider": provider,
        "scenario": name,
        "seconds": seconds,
        "seconds_per_step": seconds / steps,
        "cpu_seconds_per_step": cpu_seconds / steps,  # tells a busy machine from a slow program
        "step_seconds": [b - a for a, b in zip(step_ends, step_ends[1:], strict=False)],  # the first step unknown
        "base_bytes": base_bytes,
        "peak_bytes": peak_bytes,
        "tokens": logs[-1]["num_tokens"],
        "losses": [entry["loss"] for entry in logs],
        "grad_norms": [entry["grad_norm"] for entry in logs],
        "packing_efficiency": statistics.mean(e["packing_efficiency"] for e in logs) if "fastpo" in provider else None,
    }
    Path(result_path).write_text(json.dumps(result))


@functools.cache
def count(name: str, steps: int) -> dict:
    """What the rows of a scenario are in tokens, and the useful FLOPs of a step."""
    import torch

    from fastpo.data import kway, prepare_examples
    from fastpo.data.packing import sequence_tokens, set_sharing, trunk_tokens

    scenario = SCENARIOS[name]
    ours, theirs, tokenizer = load_rows(name, steps)
    limit = 2048 if scenario.device == "cuda" else 1024
    shape = (CPU_SHAPES if scenario.device == "cpu" else GPU_SHAPES)[scenario.shape]

    def examples(rows: list[dict]) -> list:
        forming = kway.Forming("all" if rows is ours and name == "kway" else "best_worst")
        return prepare_examples(rows, tokenizer, max_length=limit, forming=forming)[0]

    prepared, as_pairs = examples(ours), examples(theirs)
    micro = scenario.pairs // scenario.accumulation
    padded = 0
    for first in range(0, len(as_pairs), micro):
        part = as_pairs[first : first + micro]
        longest = max(len(e.prompt_of(k)) + len(r) for e in part for k, r in enumerate(e.responses))
        padded += 2 * len(part) * longest
    responses = sum(len(r) for e in prepared for r in e.responses)
    unshared = sum(sequence_tokens(e) - len(e.responses) for e in prepared)
    set_sharing(prepared, "always", 0.0)
    shared = sum(map(trunk_tokens, prepared))
    d, kv = shape["hidden"], shape.get("kv_heads", shape["heads"]) * shape["hidden"] // shape["heads"]
    per_token = shape["layers"] * (2 * d * d + 2 * d * kv + 3 * d * shape["intermediate"])
    head = d * (VOCAB if scenario.device == "cpu" else 128_256)
    factor = (4 if scenario.method == "lora" else 6) + 2
    with torch.no_grad():
        return {
            "trl_padded_tokens": padded,
            "trl_real_tokens": sum(map(sequence_tokens, as_pairs)),
            "unshared_tokens": unshared,
            "shared_tokens": shared,
            "response_tokens": responses,
            "useful_flops_per_step": factor * (per_token * unshared + head * responses) / steps,
        }


def gemm_rate(device: str, threads: int, dtype_name: str) -> float:
    """FLOP/s of a large square GEMM, in the dtype of the runs; the median of ten."""
    import roofline
    import torch

    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, getattr(torch, dtype_name))
    torch.set_num_threads(threads)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = [roofline.seconds(lambda: a @ b, device) for _ in range(12)]
    return 2 * size**3 / statistics.median(times[2:])


def spawn(provider: str, name: str, steps: int, threads: int) -> dict:
    if reason := unavailable(provider):
        return {"provider": provider, "skipped": reason}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        environment = os.environ | {
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_DATASETS_CACHE": str(Path(folder) / "datasets"),
            "FASTPO_CACHE": str(Path(folder) / "fastpo"),
            "PYTHONWARNINGS": "ignore",
        }
        if SCENARIOS[name].device == "cpu":
            environment |= {
                "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "",
            }  # fmt: skip
        command = [sys.executable, __file__, "--worker", provider, name, "--steps", str(steps), "--result", str(path)]
        if SCENARIOS[name].device == "cpu":
            command += ["--shape", SCENARIOS[name].shape, "--dtype", SCENARIOS[name].dtype]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode != 0:
            lines = [line for line in run.stderr.splitlines() if line.strip()] or ["no message"]
            return {"provider": provider, "skipped": lines[-1].strip()[:200], "stderr": run.stderr[-4000:]}
        return json.loads(path.read_text())


def summarise(name: str, runs: dict[str, list[dict]], steps: int, gemm_flops: float) -> dict:
    """Medians per provider, ratios to fastpo, and the largest per-step loss difference."""
    counts = count(name, steps)
    useful = counts["useful_flops_per_step"]
    scenario = SCENARIOS[name]
    summary = {
        "shape": scenario.shape, "steps": steps, "pairs_per_step": scenario.pairs, "rows": scenario.rows, **counts,
        "optim": full_optimiser() if scenario.device == "cuda" and scenario.method == "full" else "adamw_torch_fused",
        "providers": {},
    }  # fmt: skip
    for provider, results in runs.items():
        if not results:
            continue
        if skipped := next((r["skipped"] for r in results if "skipped" in r), None):
            stderr = next((r["stderr"] for r in results if "stderr" in r), None)
            summary["providers"][provider] = {"skipped": skipped} | ({"stderr": stderr} if stderr else {})
            continue
        seconds = statistics.median(r["seconds_per_step"] for r in results)
        summary["providers"][provider] = {
            "seconds_per_step": seconds,
            "pairs_per_second": scenario.pairs / seconds,
            "tokens_per_second": counts["trl_real_tokens"] / steps / seconds,
            "utilisation": useful / seconds / gemm_flops,
            "peak_gb": statistics.median(r["peak_bytes"] for r in results) / 1e9,
            "packing_efficiency": results[0]["packing_efficiency"],
            "losses": results[0]["losses"],
            "runs": results,
        }
    ours = summary["providers"].get("fastpo")
    for provider, theirs in summary["providers"].items():
        if ours is None or "skipped" in ours or provider == "fastpo" or "skipped" in theirs:
            continue
        theirs["time_ratio"] = theirs["seconds_per_step"] / ours["seconds_per_step"]
        theirs["memory_ratio"] = theirs["peak_gb"] / ours["peak_gb"]
        theirs["loss_deviation"] = max(
            abs(a - b) / abs(b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)
        )
    return summary


def _dtype(report: dict) -> str:
    return "bf16 weights" if report.get("dtype") == "bfloat16" else "fp32"


def markdown(report: dict) -> str:
    env = report["environment"]
    lines = [
        f"TRL {env['trl']}, transformers {env['transformers']}, torch {env['torch']}, {env['machine']}, "
        f"{report['threads']} threads. CPU: {_dtype(report)}, Llama of layers x hidden size, V=32,000, untied head. "
        "Sigmoid loss. "
        f"A large GEMM runs at {report['gemm_flops'] / 1e9:,.0f} GFLOP/s. Real tokens are TRL's: responses with their "
        "prompts, once a pair.",
        "",
        "| scenario | provider | s/step | pairs/s | real tokens/s | utilisation | peak GB | time / fastpo "
        "| memory / fastpo | loss deviation |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, summary in report["scenarios"].items():
        for provider, row in summary["providers"].items():
            label = f"{name}, {summary['shape']}, {summary['pairs_per_step']} pairs, {summary['steps']} steps"
            if "skipped" in row:
                lines.append(f"| {label} | {provider} | not run: {row['skipped']} | | | | | | | |")
                continue
            ratios = "| 1.0 | 1.0 | |"
            if "time_ratio" in row:
                ratios = f"| {row['time_ratio']:.2f} | {row['memory_ratio']:.2f} | {row['loss_deviation']:.1e} |"
            lines.append(
                f"| {label} | {provider} | {row['seconds_per_step']:.2f} | {row['pairs_per_second']:.1f} "
                f"| {row['tokens_per_second']:,.0f} | {row['utilisation']:.0%} | {row['peak_gb']:.2f} {ratios}"
            )
    lines += ["", "| scenario | TRL, padded | TRL, real | packed, a prompt a response | packed, shared prompts |",
              "| --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for name, s in report["scenarios"].items():
        keys = ("trl_padded_tokens", "trl_real_tokens", "unshared_tokens", "shared_tokens")
        lines.append(f"| tokens through the trunk, {name} | " + " | ".join(f"{s[k]:,}" for k in keys) + " |")
    return "\n".join(lines) + "\n"


def plot(report: dict, path: Path) -> None:
    """Loss per step, a panel a scenario: the providers' curves lie on top of each other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(report["scenarios"])
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.2), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        styles = itertools.cycle(("-", "--", ":", "-."))  # anew, so that no later curve hides an earlier one
        for provider, row in report["scenarios"][name]["providers"].items():
            if "losses" in row:
                axis.plot(range(1, len(row["losses"]) + 1), row["losses"], next(styles), label=provider)
        axis.set(title=name, xlabel="step", ylabel="loss")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def failures(report: dict) -> list[str]:
    """Runs of ours that broke, losses that differ, ratios below the target."""
    found = []
    for name, summary in report["scenarios"].items():
        scenario, rows = SCENARIOS[name], summary["providers"]
        for provider, row in rows.items():
            if provider.startswith("fastpo") and "skipped" in row:
                found.append(f"{name}: {provider} did not run: {row['skipped']}")
            if (
                row.get("loss_deviation", 0.0)
                > LOSS_TOLERANCE["bfloat16" if scenario.device == "cuda" else scenario.dtype]
            ):
                found.append(f"{name}: losses differ from {provider}'s by {row['loss_deviation']:.1e}")
        for provider, targets in TARGETS.get((name, summary["shape"]), {}).items():
            for key, target in targets.items():
                got = rows.get(provider, {}).get(key)
                if got is not None and got < target:
                    found.append(f"{name}: {key.replace('_', ' ')} to {provider} {got:.2f}, target {target}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, help="default: all of the device")
    parser.add_argument("--provider", nargs="+", choices=PROVIDERS, help="default: all, trl_precompute left out")
    parser.add_argument("--steps", type=int, default=10, help="optimiser steps a run")
    parser.add_argument("--repeats", type=int, default=5, help="runs of fastpo; the peers run once, they take minutes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", choices=CPU_SHAPES, default=CPU_SHAPE, help="of the CPU's model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the CPU's weights")
    parser.add_argument("--name", help="of the result's files; default: train_vs_peers, and a shape that is chosen")
    parser.add_argument("--out", type=Path, help="folder of the results; default bench/results/<machine>")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--worker", nargs=2, metavar=("PROVIDER", "SCENARIO"), help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    on_model(args.shape, args.dtype)
    if args.worker:
        worker(*args.worker, args.steps, args.result)
        return 0

    import common

    chosen = args.scenario or [name for name, s in SCENARIOS.items() if s.device == args.device]
    providers = args.provider or [p for p in PROVIDERS if p != "trl_precompute"]
    ours = [p for p in providers if p.startswith("fastpo")]
    order = [p for p in providers if p not in ours]
    order = [*ours, *order[:1], *ours * (args.repeats > 1), *order[1:], *ours * max(args.repeats - 2, 0)]
    report = {"environment": common.environment(), "threads": args.threads, "dtype": args.dtype, "scenarios": {}}
    report["gemm_flops"] = gemm_rate(args.device, args.threads, args.dtype)
    for name in chosen:
        runs: dict[str, list[dict]] = {provider: [] for provider in providers}
        for provider in order:
            if any("skipped" in r for r in runs[provider]):
                continue
            result = spawn(provider, name, args.steps, args.threads)
            runs[provider].append(result)
            if "skipped" in result:
                print(f"{name} {provider}: {result['skipped']}", flush=True)
                print(result.get("stderr", ""), file=sys.stderr, flush=True)
            else:
                print(
                    f"{name} {provider} run {len(runs[provider])}: {result['seconds_per_step']:.2f} s/step "
                    f"({result['cpu_seconds_per_step']:.2f} of CPU), "
                    f"{result['peak_bytes'] / 1e9:.2f} GB",
                    flush=True,
                )
            report["scenarios"][name] = summarise(name, runs, args.steps, report["gemm_flops"])
            report["failures"] = failures(report)
            if not args.no_write:  # after every run: what is cut short is not lost
                default = "train_vs_peers" if args.shape == CPU_SHAPE else f"train_vs_peers_{args.shape}"
                default += "_bf16" if args.dtype == "bfloat16" else ""
                path = common.write_result(args.name or default, report, markdown(report), args.out)
    print("\n" + markdown(report))
    if not args.no_write:
        if importlib.util.find_spec("matplotlib"):
            plot(report, path.with_suffix(".png"))
        print(f"written to {path}")
    for line in report["failures"]:
        print(f"FAILED {line}")
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
