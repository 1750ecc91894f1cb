"""DPO steps of a real small model's shape on a CPU: fastpo and TRL at each dtype, and the bare GEMMs of the same steps.

    python bench/real_shape.py                                     # 4 HH pairs a step, twelve steps, ours five times
    python bench/real_shape.py --provider fastpo_bf16 trl_bf16 --repeats 3
    python bench/real_shape.py --before ../other-checkout          # that checkout's fastpo too, as before_bf16, ...
    python bench/real_shape.py --lora --pairs 16; python bench/real_shape.py --kway --steps 4

The shape is SmolLM2-135M's (30 layers, D 576, 9 heads on 3, V 49,152, tied head), the weights are random, the rows are
the HH dialogues of the shared data with a byte-level BPE trained on them. Each run is a process of its own, in turn.

Two times: the whole call of the trainer over its steps (start-up checks, tokenising, reference pass included), and
the median of the steps after the first, in which TRL computes its reference and fastpo has it already. Bare GEMMs:
every matrix multiply of one fastpo step, by the profiler's shapes, again and alone, in the same dtype and process; the
step is the last but one, whose rows the last and profiled one has again.
"""

import argparse
import contextlib
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

VOCAB = 49_152
KWAY_PAIRS = 28  # of eight responses
KWAY_PARTS = 4  # in which TRL, which takes the pairs as rows, has them: the logits of all do not fit
SHAPE = {"hidden": 576, "intermediate": 1536, "layers": 30, "heads": 9, "kv_heads": 3, "tied": True}
DTYPES = ("bf16", "autocast", "fp32")
PROVIDERS = [f"{who}_{dtype}" for who in ("fastpo", "trl") for dtype in DTYPES]


def lora_config():
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def mm_shapes(profile) -> list[tuple[int, int, int]]:
    """(m, k, n) of every matrix multiply that was profiled."""
    found = []
    for event in profile.events():
        first = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}.get(event.name)
        if first is not None:
            (m, k), (_, n) = event.input_shapes[first : first + 2]
            found.append((m, k, n))
    return found


# Kinds of work of a step, by the profiler's names.
KINDS = {
    "matrix multiplies": ("aten::mm", "aten::addmm", "aten::addmm_"),
    "attention": ("_TreeAttention",),
    "norms": ("_RMSNorm",),
    "SwiGLU": ("_SiluMul",),
    "rotary embeddings": ("_Rotary",),
    "fills": ("aten::fill_", "aten::zero_"),
    "head's passes": ("fastpo::", "GeneratedBackwardFor_fastpo"),
}


def roofline(profile, shapes: list[tuple[int, int, int]], parameters: int, optimiser: float, step: float) -> dict:
    """By kind of work of a profiled step of bf16 weights: seconds, and the least bytes that such passes move. What is
    left of `step`, the wall's seconds, is launches, small operations, and the profiler. optimiser: its seconds, by the
    callbacks around it: compiled code is no operation that the profiler sees."""
    import torch

    layers, d, wide = SHAPE["layers"], SHAPE["hidden"], SHAPE["intermediate"]
    heads = (SHAPE["heads"] + SHAPE["kv_heads"]) * d // SHAPE["heads"]
    tokens = sum(m for m, k, n in shapes if (k, n) == (d, wide)) / (2 * layers)  # gate and up
    least = {
        "norms": (2 * layers + 1) * tokens * d * 2 * 5,  # x read, y written; x and dy read, dx written
        "SwiGLU": layers * tokens * wide * 2 * 8,  # 2 read, 1 written; 3 read, 2 written
        "rotary embeddings": layers * tokens * heads * 2 * 4,
        "optimiser": parameters * 28,  # the gradient read; an fp32 copy and two moments read and written; the weight
    }
    seconds = dict.fromkeys(KINDS, 0.0) | {"optimiser": optimiser}
    for event in profile.key_averages():
        for kind, names in KINDS.items():
            if event.key.startswith(names):
                seconds[kind] += event.self_cpu_time_total / 1e6
                break
    a, b = torch.empty(64 << 20), torch.ones(64 << 20)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a.copy_(b)
        times.append(time.perf_counter() - start)
    return {"seconds": seconds, "other": step - sum(seconds.values()), "least_bytes": least, "tokens": tokens,
            "copy_bandwidth": 2 * a.nbytes / statistics.median(times)}  # fmt: skip


def bare_gemms(shapes: list[tuple[int, int, int]], dtype) -> float:
    """Seconds for these multiplies alone, outputs allocated afresh: the sum of the medians of each size."""
    import torch

    total = 0.0
    for shape in sorted(set(shapes)):
        m, k, n = shape
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        total += statistics.median(times[1:]) * shapes.count(shape)
    return total


def worker(provider: str, pairs: int, steps: int, lora: bool, kway: bool, path: str) -> None:
    """One run in this process; its measurements as JSON."""
    import common
    import torch
    import train_vs_peers
    from transformers import PrinterCallback, TrainerCallback

    who, _, kind = provider.partition("_")
    trl = who == "trl"
    common.quiet()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if kway:
        ours, theirs, tokenizer = train_vs_peers.kway_rows(steps - 1, VOCAB)
        rows, pairs = (theirs, KWAY_PAIRS) if trl else (ours, 1)
    else:
        rows = common.hh_rows()
        tokenizer = common.bpe_tokenizer([row[key] for row in rows for key in ("chosen", "rejected")], VOCAB)
        rows = rows[: pairs * (steps - 1)]
    rows = rows + rows[-pairs:]
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    options = {
        "num_train_epochs": 1, "learning_rate": 1e-5, "loss_type": "sigmoid", "beta": 0.1, "max_length": 1024,
        "per_device_train_batch_size": pairs, "bf16": kind == "autocast",
    }  # fmt: skip
    if kway:
        accumulated = {"per_device_train_batch_size": pairs // KWAY_PARTS, "gradient_accumulation_steps": KWAY_PARTS}
        options |= accumulated if trl else {"pair_policy": "all"}
    ends: list[float] = []
    optimiser: list[float] = []
    profiles: list = []

    class StepTimes(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            ends.append(time.perf_counter())

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            optimiser.append(-time.perf_counter())

        def on_optimizer_step(self, args, state, control, **kwargs):
            optimiser[-1] += time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            ends.append(time.perf_counter())
            if profiles and state.global_step == steps:
                profiles[0].__exit__(None, None, None)
            if who == "fastpo" and state.global_step == steps - 1:  # the last step, which is left out of the times
                profiles.append(torch.profiler.profile(record_shapes=True))
                profiles[0].__enter__()

    peft_config = lora_config() if lora else None
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        base = common.reset_peak_memory()
        model = common.llama(VOCAB, **SHAPE, dtype=dtype)
        start = time.perf_counter()
        if trl:
            from datasets import Dataset
            from trl import DPOTrainer

            trainer = DPOTrainer(
                model=model, ref_model=None if lora else copy.deepcopy(model), peft_config=peft_config,
                args=common.trl_config(folder, **options), train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer, callbacks=[StepTimes()],
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            logs = common.step_logs(trainer.state.log_history)
        else:
            import fastpo

            result = fastpo.train(
                model, rows, args=common.fastpo_args(folder, **options), processing_class=tokenizer,
                callbacks=[StepTimes()], peft_config=peft_config,
            )  # fmt: skip
            logs = common.step_logs(result.log_history)
        seconds, peak = time.perf_counter() - start, common.peak_memory() - base
    each = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    result = {
        "provider": provider, "seconds_per_step": seconds / steps, "steps": each[1:-1], "peak_bytes": peak,
        "losses": [entry["loss"] for entry in logs], "tokens": logs[-1]["num_tokens"],
    }  # fmt: skip
    if profiles:
        shapes = mm_shapes(profiles[0])
        of_step = torch.float32 if kind == "fp32" else torch.bfloat16
        result |= {
            "gemm_seconds": bare_gemms(shapes, of_step),
            "gemms": len(shapes),
            "gemms_of": each[-2],
            "gemm_flops": sum(2 * m * k * n for m, k, n in shapes),
            "roofline": roofline(
                profiles[0], shapes, sum(p.numel() for p in model.parameters()), optimiser[-1], each[-1]
            ),
        }
    Path(path).write_text(json.dumps(result))


def spawn(provider: str, args: argparse.Namespace) -> dict:
    import common

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        environment = common.own_environment(folder, args.threads)
        name = provider
        if provider.startswith("before_"):
            environment["PYTHONPATH"] = str(Path(args.before).resolve())
            name = provider.replace("before", "fastpo")
        command = [sys.executable, __file__, "--worker", name, str(path), "--pairs", str(args.pairs), "--steps",
                   str(args.steps), *(["--lora"] * args.lora), *(["--kway"] * args.kway)]  # fmt: skip
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=args.limit)
        if run.returncode:
            lines = [line for line in run.stderr.splitlines() if line.strip()] or ["no message"]
            return {"provider": provider, "skipped": lines[-1].strip()[:200]}
        return json.loads(path.read_text()) | {"provider": provider}


def summarise(runs: dict[str, list[dict]]) -> dict:
    summary = {}
    for provider, results in runs.items():
        if skipped := next((r["skipped"] for r in results if "skipped" in r), None):
            summary[provider] = {"skipped": skipped}
            continue
        row = {
            "seconds_per_step": statistics.median(r["seconds_per_step"] for r in results),
            "step": statistics.median(statistics.median(r["steps"]) for r in results),
            "peak_gb": statistics.median(r["peak_bytes"] for r in results) / 1e9,
            "losses": results[0]["losses"],
        }
        if "gemm_seconds" in results[0]:
            row |= {
                "gemm_seconds": statistics.median(r["gemm_seconds"] for r in results),
                "over_gemms": statistics.median(r["gemms_of"] / r["gemm_seconds"] for r in results),
                "gemm_flops": results[0]["gemm_flops"],
                "roofline": results[-1]["roofline"],
            }
        summary[provider] = row
    return summary


def markdown(report: dict) -> str:
    env = report["environment"]
    what = "LoRA of rank 16 on all linear layers" if report["lora"] else "all weights trained"
    rows = f"{report['pairs']} HH pairs"
    if report["kway"]:
        rows = f"one AlpacaEval prompt with eight responses, all {KWAY_PAIRS} pairs ({KWAY_PARTS} parts of TRL)"
    lines = [
        f"TRL {env['trl']}, transformers {env['transformers']}, torch {env['torch']}, {env['machine']}, "
        f"{report['threads']} threads. SmolLM2-135M's shape, random weights, {rows} a step, "
        f"{report['steps']} steps, {what}; medians of {report['repeats']} runs of fastpo, TRL once.",
        "",
        "| provider | whole run, s/step | a step, s | step over its bare GEMMs | GEMMs, GFLOP/s | peak GB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for provider, row in report["providers"].items():
        if "skipped" in row:
            lines.append(f"| {provider} | not run: {row['skipped']} | | | | |")
            continue
        gemms = "| | "
        if "over_gemms" in row:
            gemms = f"| {row['over_gemms']:.2f} | {row['gemm_flops'] / row['gemm_seconds'] / 1e9:,.0f} "
        lines.append(
            f"| {provider} | {row['seconds_per_step']:.2f} | {row['step']:.2f} {gemms}| {row['peak_gb']:.2f} |"
        )
    row = report["providers"].get("fastpo_bf16", {})
    if "roofline" in row and not report["lora"]:
        lines += ["", *roofline_lines(row)]
    return "\n".join(lines) + "\n"


def roofline_lines(row: dict) -> list[str]:
    found = row["roofline"]
    bandwidth = found["copy_bandwidth"]
    lines = [
        f"The profiled step of fastpo_bf16, {found['tokens']:,.0f} tokens through the layers; a copy moves "
        f"{bandwidth / 1e9:,.0f} GB/s, the GEMMs alone take {row['gemm_seconds']:.2f} s.",
        "",
        "| work | s | least GB moved | s at the copy's bandwidth |",
        "| --- | ---: | ---: | ---: |",
    ]
    for kind, seconds in (*found["seconds"].items(), ("everything else", found["other"])):
        moved = found["least_bytes"].get(kind)
        bytes_of = f"{moved / 1e9:.2f} | {moved / bandwidth:.3f}" if moved else "|"
        lines.append(f"| {kind} | {seconds:.3f} | {bytes_of} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", nargs="+", help=f"of {', '.join(PROVIDERS)}; default: all")
    parser.add_argument("--before", help="folder of another checkout of fastpo, to be run beside ours")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5, help="runs of fastpo, in turn; TRL runs once")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--kway", action="store_true", help="one prompt a step, its eight responses, all 28 pairs")
    parser.add_argument("--limit", type=int, default=900, help="seconds of one run")
    parser.add_argument("--name", help="of the result's files; default: real_shape, and what differs")
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], args.pairs, args.steps, args.lora, args.kway, args.worker[1])
        return 0

    import common

    providers = list(args.provider or PROVIDERS)
    if args.before:
        providers += [f"before_{p.partition('_')[2]}" for p in providers if p.startswith("fastpo_")]
    runs: dict[str, list[dict]] = {p: [] for p in providers}
    for turn in range(args.repeats):
        for provider in providers:
            if (provider.startswith("trl_") and turn) or any("skipped" in r for r in runs[provider]):
                continue
            result = spawn(provider, args)
            runs[provider].append(result)
            told = result.get("skipped") or (
                f"{result['seconds_per_step']:.2f} s/step of the run, {statistics.median(result['steps']):.2f} s a step"
                f", {result['peak_bytes'] / 1e9:.2f} GB"
            )
            print(f"{provider} run {turn + 1}: {told}", flush=True)
    report = {
        "environment": common.environment(), "threads": args.threads, "pairs": args.pairs, "steps": args.steps,
        "repeats": args.repeats, "lora": args.lora, "kway": args.kway, "providers": summarise(runs), "runs": runs,
    }  # fmt: skip
    table = markdown(report)
    print("\n" + table)
    if not args.no_write:
        name = args.name or "real_shape" + (f"_{args.pairs}" if args.pairs != 4 else "") + "_lora" * args.lora + (
            "_kway" * args.kway
        )
        print(f"written to {common.write_result(name, report, table)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
