"""A reward model by fastpo (loss_type=reward) and by TRL's RewardTrainer: seconds a step, memory, losses of the steps.

    python bench/reward_vs_trl.py                                # K = 8 responses of a prompt, all 28 pairs, fp32
    python bench/reward_vs_trl.py --rows hh --steps 6            # pairs of HH dialogues, 16 a step
    python bench/reward_vs_trl.py --shape real --dtype bf16 --steps 3 --turns 2

Rows of `kway` are the AlpacaEval prompts of the shared data with eight responses each, one prompt a step: TRL gets
its 28 pairs as rows, in --accumulation parts. Same rows in the same order, same initial weights, same steps, fp32 (or
16-bit weights) without gradient checkpointing. Each run is a process of its own; providers take turns, and each turn
gives one ratio. `seconds` is everything between the call and its return, tokenising and guards included, divided by the
steps.
Shapes are those of train_vs_peers.py, and `real`, SmolLM2-135M's; random weights. `gap`: the largest difference of a
step's loss to TRL's first run. Needs the `bench` extra (TRL).
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out

OPTIONS = ("rows", "dtype", "shape", "steps", "accumulation")  # of a worker
PROVIDERS = ("fastpo", "trl")
HH_PAIRS = 16


def make_model(args: argparse.Namespace):
    """A Llama of the shape under a scalar head, random weights."""
    import common
    import real_shape
    import torch
    import train_vs_peers
    from transformers import LlamaForSequenceClassification

    shape = real_shape.SHAPE if args.shape == "real" else train_vs_peers.CPU_SHAPES[args.shape]
    config = common.llama(vocabulary(args), **shape).config
    config.num_labels = 1
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config).to(torch.bfloat16 if args.dtype == "bf16" else torch.float32)


def vocabulary(args: argparse.Namespace) -> int:
    import real_shape
    import train_vs_peers

    return real_shape.VOCAB if args.shape == "real" else train_vs_peers.VOCAB


def load_rows(args: argparse.Namespace) -> tuple[list[dict], list[dict], object]:
    """(rows for fastpo, rows for TRL, tokenizer)."""
    import common
    import train_vs_peers

    if args.rows == "kway":
        return train_vs_peers.kway_rows(args.steps, vocabulary(args))
    rows = common.hh_rows()
    tokenizer = common.bpe_tokenizer([row[key] for row in rows for key in ("chosen", "rejected")], vocabulary(args))
    return rows[: HH_PAIRS * args.steps], rows[: HH_PAIRS * args.steps], tokenizer


def run_fastpo(args: argparse.Namespace, model, rows: list[dict], tokenizer, folder: str) -> list[dict]:
    import common

    import fastpo

    options = {"per_device_train_batch_size": 1, "pair_policy": "all"} if args.rows == "kway" else {
        "per_device_train_batch_size": HH_PAIRS}  # fmt: skip
    given = common.fastpo_args(folder, loss_type="reward", num_train_epochs=1, learning_rate=1e-4, **options)
    return fastpo.train(model, rows, args=given, processing_class=tokenizer).log_history


def run_trl(args: argparse.Namespace, model, rows: list[dict], tokenizer, folder: str) -> list[dict]:
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import RewardConfig, RewardTrainer

    pairs = 28 if args.rows == "kway" else HH_PAIRS
    config = RewardConfig(
        output_dir=folder, use_cpu=True, bf16=False, activation_checkpointing=False, gradient_checkpointing=None,
        save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1, train_sampling_strategy="sequential",
        per_device_train_batch_size=pairs // args.accumulation, gradient_accumulation_steps=args.accumulation,
        num_train_epochs=1, learning_rate=1e-4,
    )  # fmt: skip
    trainer = RewardTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.state.log_history


def worker(provider: str, args: argparse.Namespace, path: str) -> None:
    import common
    import torch

    if provider == "fastpo":
        import fastpo

        _ = fastpo.train
    else:
        import trl

        _ = trl.RewardTrainer
    common.quiet()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    ours, theirs, tokenizer = load_rows(args)
    tokenizer("a b")
    with tempfile.TemporaryDirectory() as folder:
        base = common.reset_peak_memory()
        model = make_model(args)
        start = time.perf_counter()
        run, rows = (run_fastpo, ours) if provider == "fastpo" else (run_trl, theirs)
        logs = common.step_logs(run(args, model, rows, tokenizer, folder))
        seconds = time.perf_counter() - start
    if len(logs) != args.steps:
        raise RuntimeError(f"{provider}: {len(logs)} logged steps, expected {args.steps}")
    result = {
        "seconds_per_step": seconds / args.steps, "peak_bytes": common.peak_memory() - base,
        "losses": [line["loss"] for line in logs], "accuracies": [line["accuracy"] for line in logs],
        "tokens": logs[-1]["num_tokens"],
    }  # fmt: skip
    Path(path).write_text(json.dumps(result))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", choices=("kway", "hh"), default="kway")
    parser.add_argument("--shape", choices=("12x192", "4x256", "real"), default="12x192")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--accumulation", type=int, default=4, help="parts in which TRL has a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], args, args.worker[1])
        return 0
    import common

    common.need("trl", "datasets")
    runs: dict[str, list[dict]] = {provider: [] for provider in PROVIDERS}
    for turn in range(args.turns):
        for provider in PROVIDERS if turn % 2 == 0 else reversed(PROVIDERS):
            runs[provider].append(result := common.spawned(__file__, provider, args, OPTIONS))
            print(f"{provider} {turn + 1}: {result['seconds_per_step']:.2f} s a step", flush=True)
    ratios = [b["seconds_per_step"] / a["seconds_per_step"] for a, b in zip(runs["fastpo"], runs["trl"], strict=True)]
    wanted = runs["trl"][0]["losses"]
    env = common.environment()
    lines = [
        f"trl {env['trl']}, torch {env['torch']}, {env['machine']}, {args.threads} threads; `{args.rows}` rows, "
        f"{args.shape}, {args.dtype}, {args.steps} steps; medians of {args.turns} runs, in turn.",
        "",
        "| provider | s a step | peak GB | gap |",
        "| --- | ---: | ---: | ---: |",
    ]
    for provider, results in runs.items():
        seconds = statistics.median(r["seconds_per_step"] for r in results)
        peak = statistics.median(r["peak_bytes"] for r in results)
        gap = max(abs(a - b) for r in results for a, b in zip(r["losses"], wanted, strict=True))
        lines.append(f"| {provider} | {seconds:.2f} | {peak / 1e9:.2f} | {gap:.1g} |")
    lines += ["", "TRL's time over fastpo's, turn by turn: " + ", ".join(f"{r:.2f}" for r in ratios)]
    table = "\n".join(lines) + "\n"
    print("\n" + table)
    if not args.no_write:
        report = {"environment": env, "arguments": vars(args) | {"worker": None}, "runs": runs, "ratios": ratios}
        print(f"written to {common.write_result(f'reward_{args.rows}_{args.shape}_{args.dtype}', report, table)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
