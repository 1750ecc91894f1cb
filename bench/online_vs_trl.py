"""GRPO by fastpo and by TRL's GRPOTrainer: seconds of a step's parts, memory, and the steps' losses.

    python bench/online_vs_trl.py                       # the same rollouts for both: prompts of 256, 8 responses of 128
    python bench/online_vs_trl.py --sample              # each samples its own, in process; whole steps
    python bench/online_vs_trl.py --shape real --dtype bf16 --prompts 1

A step takes --prompts prompts with --generations responses each. Given rollouts: random tokens, by the prompt; rewards
by a hash of the tokens. beta is 0.04 and each generation is trained on twice (num_iterations=2), so that both sides
compute old and reference log-probabilities. Same initial weights, AdamW, no gradient checkpointing; TRL takes a
prompt's responses as a micro-batch. Each run is a process of its own; providers take turns; each turn gives one ratio.

`train`: forward, backward and optimiser of a step. `passes`: old and reference log-probabilities of a generation.
`draw`: sampling. `step`: a whole step, of --sample. Medians over the steps but the first generation's. Memory is the
peak resident size over that of the interpreter with its imports. Shapes are those of train_vs_peers.py, and `real`,
SmolLM2-135M's; random weights. `gap`: the largest difference of a step's loss to TRL's. Needs the `bench` extra (TRL).
"""

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out

PROVIDERS = ("fastpo", "trl")
OPTIONS = ("shape", "dtype", "prompts", "generations", "prompt", "response", "steps", "sample")  # of a worker
PARTS = ("train", "passes", "draw", "step")


def shape_of(args: argparse.Namespace) -> tuple[dict, int]:
    """(arguments of common.llama, vocabulary)."""
    import real_shape
    import train_vs_peers

    if args.shape == "real":
        return real_shape.SHAPE, real_shape.VOCAB
    return train_vs_peers.CPU_SHAPES[args.shape], train_vs_peers.VOCAB


def given_ids(prompt_ids: list[int], k: int, args: argparse.Namespace, vocabulary: int) -> list[int]:
    """Response k to a prompt, the same for both."""
    import numpy

    seed = int(hashlib.sha256(f"{list(prompt_ids)} {k}".encode()).hexdigest()[:8], 16)
    return numpy.random.default_rng(seed).integers(10, vocabulary, args.response).tolist()


def reward(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """Between 0 and 1, by a hash."""
    return [int(hashlib.sha256(str(list(ids)).encode()).hexdigest()[:8], 16) / 2**32 for ids in completion_ids]


def rows_of(args: argparse.Namespace, vocabulary: int) -> list[dict]:
    import numpy

    rng = numpy.random.default_rng(0)
    count = args.prompts * args.steps
    return [{"prompt": " ".join(f"w{i}" for i in rng.integers(10, vocabulary, args.prompt))} for _ in range(count)]


class Clock:
    """Seconds of a run's parts, step by step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.now: dict[str, float] = {}
        self.begun = 0.0

    def timed(self, part: str, call):
        def wrapped(*args, **kwargs):
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.now[part] = self.now.get(part, 0.0) + time.perf_counter() - start

        return wrapped

    def callback(self):
        from transformers import TrainerCallback

        clock = self

        class OfSteps(TrainerCallback):
            def on_step_begin(self, *args, **kwargs) -> None:
                clock.now, clock.begun = {}, time.perf_counter()

            def on_step_end(self, *args, **kwargs) -> None:
                clock.now["step"] = time.perf_counter() - clock.begun
                clock.steps.append(clock.now)

        return OfSteps()


def run_fastpo(args: argparse.Namespace, model, rows: list[dict], tokenizer, vocabulary: int, folder: str):
    import common

    import fastpo
    from fastpo.online import drawing, rollouts
    from fastpo.sampling.items import Response

    clock = Clock()

    class Given:
        exact, key = True, {}

        def batches(self, requests):
            return [list(requests)]

        def sample(self, requests):
            for request in requests:
                ids = given_ids(list(request.prompt_ids), request.k, args, vocabulary)
                yield request, Response("", tuple(ids), False)

        def close(self) -> None:
            pass

    rollouts.Rollouts.logps = clock.timed("passes", rollouts.Rollouts.logps)
    rollouts.Rollouts._draw = clock.timed("rollouts", rollouts.Rollouts._draw)
    drawing.Drawing.__call__ = clock.timed("draw", drawing.Drawing.__call__)
    given = common.fastpo_args(
        folder, loss_type="grpo", num_generations=args.generations, max_completion_length=args.response,
        max_length=None,
        per_device_train_batch_size=args.prompts * args.generations, learning_rate=1e-5, max_steps=args.steps,
        num_iterations=1 if args.sample else 2, beta=0.0 if args.sample else 0.04, seed=0,
    )  # fmt: skip
    result = fastpo.train(
        model, rows, args=given, processing_class=tokenizer, reward_funcs=reward, callbacks=[clock.callback()],
        sampler=None if args.sample else Given(),
    )  # fmt: skip
    for step in clock.steps:
        step["train"] = step["step"] - step.get("rollouts", 0.0)
    return clock, result.log_history


def run_trl(args: argparse.Namespace, model, rows: list[dict], tokenizer, vocabulary: int, folder: str):
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    clock = Clock()

    class Given(GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *more, **options):
            seen: dict[tuple[int, ...], int] = {}
            out = []
            for ids in prompt_ids:
                k = seen.get(tuple(ids), 0)
                seen[tuple(ids)] = k + 1
                out.append(given_ids(list(ids), k, args, vocabulary))
            return out, None

    config = GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", report_to=[],
        disable_tqdm=True, logging_steps=1, shuffle_dataset=False, loss_type="grpo", num_generations=args.generations,
        max_completion_length=args.response, per_device_train_batch_size=args.generations,
        gradient_accumulation_steps=args.prompts, learning_rate=1e-5, max_steps=args.steps, seed=0,
        num_iterations=1 if args.sample else 2, beta=0.0 if args.sample else 0.04, use_bias_correction_kl=True,
    )  # fmt: skip
    kind = GRPOTrainer if args.sample else Given
    trainer = kind(model=model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows),
                   processing_class=tokenizer, callbacks=[clock.callback()])  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    logps = trainer._get_per_token_logps_and_entropies
    timed = clock.timed("passes", logps)
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (logps if torch.is_grad_enabled() else timed)(*a, **k)
    trainer._generate_and_score_completions = clock.timed("rollouts", trainer._generate_and_score_completions)
    trainer._generate_single_turn = clock.timed("draw", trainer._generate_single_turn)
    trainer.train()
    for step in clock.steps:
        step["train"] = step["step"] - step.get("rollouts", 0.0)
    return clock, trainer.state.log_history


def worker(provider: str, args: argparse.Namespace, path: str) -> None:
    import common
    import torch

    if provider == "fastpo":
        import fastpo

        _ = fastpo.train
    else:
        import trl

        _ = trl.GRPOTrainer
    common.quiet()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    shape, vocabulary = shape_of(args)
    rows, tokenizer = rows_of(args, vocabulary), common.word_tokenizer(vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        base = common.reset_peak_memory()
        torch.manual_seed(0)
        model = common.llama(vocabulary, **shape).to(torch.bfloat16 if args.dtype == "bf16" else torch.float32)
        model.save_pretrained(f"{folder}/model")  # where TRL finds the reference
        model.config._name_or_path = f"{folder}/model"
        run = run_fastpo if provider == "fastpo" else run_trl
        clock, history = run(args, model, rows, tokenizer, vocabulary, folder)
    logs = common.step_logs(history)
    if len(clock.steps) != args.steps:
        raise RuntimeError(f"{provider}: {len(clock.steps)} steps, expected {args.steps}")
    kept = clock.steps[1 if args.sample else 2 :]
    medians = {part: statistics.median(values) for part in PARTS
               if (values := [step[part] for step in kept if step.get(part)])}  # fmt: skip
    result = {"parts": medians, "peak_bytes": common.peak_memory() - base, "steps": clock.steps,
              "losses": [line["loss"] for line in logs], "rewards": [line.get("reward") for line in logs]}  # fmt: skip
    Path(path).write_text(json.dumps(result))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("12x192", "4x256", "real"), default="12x192")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--response", type=int, default=128, help="tokens")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sample", action="store_true")
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
            print(f"{provider} {turn + 1}: {result['parts']}", flush=True)
    parts = [part for part in PARTS if all(part in r["parts"] for results in runs.values() for r in results)]
    if not args.sample:
        parts = [part for part in parts if part in ("train", "passes")]
    ratios = {part: [b["parts"][part] / a["parts"][part] for a, b in zip(runs["fastpo"], runs["trl"], strict=True)]
              for part in parts}  # fmt: skip
    env = common.environment()
    lines = [
        f"trl {env['trl']}, torch {env['torch']}, {env['machine']}, {args.threads} threads; {args.shape}, "
        f"{args.dtype}, "
        f"{args.prompts} prompts of {args.prompt} tokens a step, {args.generations} responses of {args.response}, "
        + ("each samples its own; " if args.sample else "the same rollouts; ")
        + f"{args.steps} steps; medians of {args.turns} runs, in turn.",
        "",
        "| provider | " + " | ".join(f"{part} s" for part in parts) + " | peak GB | gap |",
        "| --- |" + " ---: |" * (len(parts) + 2),
    ]
    wanted = runs["trl"][0]["losses"]
    for provider, results in runs.items():
        seconds = [statistics.median(r["parts"][part] for r in results) for part in parts]
        peak = statistics.median(r["peak_bytes"] for r in results)
        gap = max(abs(a - b) for r in results for a, b in zip(r["losses"], wanted, strict=True))
        shown = "-" if args.sample else f"{gap:.1g}"
        lines.append(f"| {provider} | " + " | ".join(f"{s:.3f}" for s in seconds) + f" | {peak / 1e9:.2f} | {shown} |")
    for part, of_part in ratios.items():
        lines += ["", f"TRL's time over fastpo's, {part}, turn by turn: " + ", ".join(f"{r:.2f}" for r in of_part)]
    table = "\n".join(lines) + "\n"
    print("\n" + table)
    if not args.no_write:
        report = {"environment": env, "arguments": vars(args) | {"worker": None}, "runs": runs, "ratios": ratios}
        name = f"online_{'sample' if args.sample else 'grpo'}_{args.shape}_{args.dtype}"
        print(f"written to {common.write_result(name, report, table)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
