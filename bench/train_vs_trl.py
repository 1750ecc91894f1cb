"""fastpo.train against TRL's DPOTrainer on the CPU: seconds a step, peak memory, per-step losses.

    .venv-bench/bin/python bench/train_vs_trl.py [--repeats 1] [--steps 4] [--scenario synthetic hh]

Needs the `bench` extra (TRL). Each run is one fresh process; runs of the providers alternate; medians are reported.
Same rows in the same order, same initial weights, fp32, two threads, no gradient checkpointing, one epoch of fresh
rows. `seconds` is everything between the call and its return, divided by the optimiser steps: tokenisation, guards,
reference pass and training. Memory is the peak resident size over that of the interpreter with its imports, tokenizer
and rows loaded, so model, gradients and optimiser state count. Providers: `fastpo`; `fastpo_unshared`
(`share_prompts=never`); `trl` (reference model in memory,
one forward in each step, TRL's default); `trl_precompute` (`precompute_ref_log_probs=True`). FASTPO_CACHE is empty in
every run: no reference pass is saved.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out

ORDER = (
    "fastpo",
    "fastpo_unshared",
    "trl",
    "fastpo",
    "fastpo_unshared",
    "trl_precompute",
    "fastpo",
    "fastpo_unshared",
)  # one TRL run takes minutes
PROVIDERS = ("fastpo", "fastpo_unshared", "trl", "trl_precompute")
VOCAB = 32_000
MODEL = {"hidden": 256, "intermediate": 688, "layers": 4, "heads": 4}  # untied head: 19.6M parameters
LOSS_TOLERANCE = 1e-3
SCENARIOS = {
    "synthetic": {
        "pairs": 8,
        "time_ratio": 8.0,
        "memory_ratio": 6.0,
        "rows": "random words, prompts of 20 to 120 words, responses of 10 to 120, one token a word",
    },
    "hh": {
        "pairs": 16,
        "time_ratio": 12.0,
        "memory_ratio": 5.0,
        "rows": "the first 64 HH dialogues of ../shared/data, implicit prompts, byte-level BPE trained on all of them",
    },
}


def load_scenario(name: str, steps: int):
    import common

    count = SCENARIOS[name]["pairs"] * steps
    if name == "synthetic":
        return common.synthetic_rows(count, VOCAB), common.word_tokenizer(VOCAB)
    rows = common.hh_rows()
    tokenizer = common.bpe_tokenizer([row[key] for row in rows for key in ("chosen", "rejected")], VOCAB)
    return rows[:count], tokenizer


def run_trl(model, rows, tokenizer, options: dict, output_dir: str, precompute: bool) -> tuple[list[dict], list[float]]:
    import common
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import DPOTrainer

    step_ends: list[float] = []

    class StepTimes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            step_ends.append(time.perf_counter())

    trainer = DPOTrainer(
        model=model,
        ref_model=None if precompute else copy.deepcopy(model),
        args=common.trl_config(output_dir, precompute_ref_log_probs=precompute, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[StepTimes()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return common.step_logs(trainer.state.log_history), step_ends


def run_fastpo(model, rows, tokenizer, options: dict, output_dir: str) -> list[dict]:
    import common

    import fastpo

    result = fastpo.train(model, rows, args=common.fastpo_args(output_dir, **options), processing_class=tokenizer)
    return common.step_logs(result.log_history)


def worker(provider: str, scenario: str, steps: int, result_path: str) -> None:
    """One provider, one scenario, in this process; writes its measurements as JSON."""
    import common
    import torch

    if provider.startswith("fastpo"):
        import fastpo

        _ = fastpo.train
    else:
        import trl

        _ = trl.DPOTrainer
    common.quiet()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rows, tokenizer = load_scenario(scenario, steps)
    tokenizer(rows[0]["chosen"])
    options = {
        "per_device_train_batch_size": SCENARIOS[scenario]["pairs"],
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "loss_type": "sigmoid",
        "beta": 0.1,
        "max_length": 1024,
    }
    with tempfile.TemporaryDirectory() as output_dir:
        base_bytes = common.reset_peak_memory()
        model = common.llama(VOCAB, **MODEL)
        step_ends: list[float] = []
        start, cpu_start = time.perf_counter(), time.process_time()
        if provider == "fastpo":
            logs = run_fastpo(model, rows, tokenizer, options, output_dir)
        elif provider == "fastpo_unshared":
            logs = run_fastpo(model, rows, tokenizer, {**options, "share_prompts": "never"}, output_dir)
        else:
            logs, step_ends = run_trl(model, rows, tokenizer, options, output_dir, provider == "trl_precompute")
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        peak_bytes = common.peak_memory() - base_bytes
    if len(logs) != steps:
        raise RuntimeError(f"{provider}: {len(logs)} logged steps, expected {steps}")
    result = {
        "provider": provider,
        "scenario": scenario,
        "seconds": seconds,
        "seconds_per_step": seconds / steps,
        "cpu_seconds_per_step": cpu_seconds / steps,  # tells a busy machine from a slow program
        "step_seconds": [b - a for a, b in zip(step_ends, step_ends[1:], strict=False)],  # the first step unknown
        "base_bytes": base_bytes,
        "peak_bytes": peak_bytes,
        "tokens": logs[-1]["num_tokens"],
        "losses": [entry["loss"] for entry in logs],
        "grad_norms": [entry["grad_norm"] for entry in logs],
    }
    Path(result_path).write_text(json.dumps(result))


def spawn(provider: str, scenario: str, steps: int, threads: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "CUDA_VISIBLE_DEVICES": "",
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_DATASETS_CACHE": str(Path(folder) / "datasets"),
            "FASTPO_CACHE": str(Path(folder) / "fastpo"),
            "PYTHONWARNINGS": "ignore",
        }
        command = [sys.executable, __file__, "--worker", provider, scenario, "--steps", str(steps), "--out", str(path)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"{provider} on {scenario} failed:\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}")
        return json.loads(path.read_text())


def summarise(name: str, runs: dict[str, list[dict]], steps: int) -> dict:
    """Medians per provider, ratios to fastpo, and the largest per-step loss difference."""
    summary = {
        "steps": steps,
        "pairs_per_step": SCENARIOS[name]["pairs"],
        "rows": SCENARIOS[name]["rows"],
        "providers": {},
    }
    for provider, results in runs.items():
        summary["providers"][provider] = {
            "seconds_per_step": statistics.median(r["seconds_per_step"] for r in results),
            "peak_gb": statistics.median(r["peak_bytes"] for r in results) / 1e9,
            "tokens_per_second": statistics.median(r["tokens"] / r["seconds"] for r in results),
            "losses": results[0]["losses"],
            "runs": results,
        }
    ours = summary["providers"].get("fastpo")
    for provider, theirs in summary["providers"].items():
        if ours is None or provider == "fastpo":
            continue
        theirs["time_ratio"] = theirs["seconds_per_step"] / ours["seconds_per_step"]
        theirs["memory_ratio"] = theirs["peak_gb"] / ours["peak_gb"]
        theirs["loss_deviation"] = max(
            abs(a - b) / abs(b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)
        )
        theirs["same_tokens"] = theirs["runs"][0]["tokens"] == ours["runs"][0]["tokens"]
    return summary


def markdown(report: dict) -> str:
    env = report["environment"]
    lines = [
        f"TRL {env['trl']}, transformers {env['transformers']}, torch {env['torch']}, {env['machine']}, "
        f"{report['threads']} threads, fp32, Llama 4 layers D=256 V=32,000 (untied head), sigmoid loss.",
        "",
        "| scenario | provider | s/step | real tokens/s | peak GB | time / fastpo | memory / fastpo | loss deviation |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, summary in report["scenarios"].items():
        for provider, row in summary["providers"].items():
            ratios = "| 1.0 | 1.0 | |"
            if "time_ratio" in row:
                ratios = f"| {row['time_ratio']:.1f} | {row['memory_ratio']:.1f} | {row['loss_deviation']:.1e} |"
            lines.append(
                f"| {name}, {summary['pairs_per_step']} pairs | {provider} | {row['seconds_per_step']:.2f} "
                f"| {row['tokens_per_second']:,.0f} | {row['peak_gb']:.2f} {ratios}"
            )
    return "\n".join(lines) + "\n"


def failures(report: dict) -> list[str]:
    """Losses that differ, or a ratio to TRL's default path below the target."""
    found = []
    for name, summary in report["scenarios"].items():
        for provider, row in summary["providers"].items():
            if "time_ratio" not in row:
                continue
            if row["loss_deviation"] > LOSS_TOLERANCE or not row["same_tokens"]:
                found.append(f"{name}: losses differ from {provider} by {row['loss_deviation']:.1e}")
            if provider == "trl" and row["time_ratio"] < SCENARIOS[name]["time_ratio"]:
                found.append(f"{name}: {row['time_ratio']:.1f}x in time, target {SCENARIOS[name]['time_ratio']}x")
            if provider == "trl" and row["memory_ratio"] < SCENARIOS[name]["memory_ratio"]:
                found.append(f"{name}: {row['memory_ratio']:.1f}x in memory, target {SCENARIOS[name]['memory_ratio']}x")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--provider", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps a run")
    parser.add_argument("--repeats", type=int, default=3, help="at most this many runs of a provider")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--worker", nargs=2, metavar=("PROVIDER", "SCENARIO"), help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker, args.steps, args.out)
        return 0

    import common

    report = {"environment": common.environment(), "threads": args.threads, "scenarios": {}}
    for name in args.scenario:
        runs: dict[str, list[dict]] = {provider: [] for provider in args.provider}
        for provider in ORDER:
            if provider not in args.provider or len(runs[provider]) >= args.repeats:
                continue
            result = spawn(provider, name, args.steps, args.threads)
            runs[provider].append(result)
            print(
                f"{name} {provider} run {len(runs[provider])}: {result['seconds_per_step']:.2f} s/step "
                f"({result['cpu_seconds_per_step']:.2f} of CPU), "
                f"{result['peak_bytes'] / 1e9:.2f} GB",
                flush=True,
            )
        report["scenarios"][name] = summarise(name, runs, args.steps)
    table = markdown(report)
    print("\n" + table)
    report["failures"] = failures(report)
    if not args.no_write:
        print(f"written to {common.write_result('train_vs_trl', report, table)}")
    for line in report["failures"]:
        print(f"FAILED {line}")
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
