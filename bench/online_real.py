"""GRPO on a real model, SmolLM2-135M-Instruct, with a verifier as reward: answers within eight words.

    python bench/online_real.py                       # the committed runs
    python bench/online_real.py --least 4
    python bench/online_real.py --steps 4 --no-write  # a look

Prompts are instructions of the shared data's AlpacaEval file of at most 100 characters, as in bench/loop_real.py, each
with "Answer in at most 8 words."; the reward is 1 for an answer that ends by itself within eight words, less for each
further word, 0 from 24 on or where the policy did not end it. This reward is as high for one word as for eight, and one
word is where the policy goes; --least 4 multiplies it by words / 4 below four words. A step draws 8 answers of at most
40 tokens to each of its prompts, which are new ones in every step until they have been gone through. The figure before
and after is the reward's mean over greedy answers to held-out prompts, beside the share of answers within eight words
and the mean number of words. All weights are trained, in fp32, by AdamW at a constant rate; beta 0, one update a batch,
as TRL's defaults have it. Settings of a run of minutes on a CPU.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out

import common  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from loop_real import MAX_TOKENS, WORDS, brevity, prompts_of  # noqa: E402

import fastpo  # noqa: E402
from fastpo.sampling import make  # noqa: E402
from fastpo.sampling.items import Request, Response  # noqa: E402
from fastpo.sampling.local_sampler import LocalSampler  # noqa: E402

KEPT = ("loss", "grad_norm", "entropy", "reward", "reward_std", "frac_reward_zero_std", "completions/mean_length",
        "completions/clipped_ratio", "num_tokens", "step_time")  # fmt: skip


def worth(text: str, ended: bool, least: int) -> float:
    """The verifier: `brevity` of an answer that ended, 0 of another; less below `least` words."""
    return float(ended) * brevity(None, text, {}) * min(1.0, len(text.split()) / least if least else 1.0)


def greedy(model: Any, tokenizer: Any, prompts: Sequence[Mapping[str, Any]]) -> list[Response]:
    """One answer each."""
    sampler = LocalSampler(model, tokenizer)
    asked = [p["prompt"] for p in prompts]
    ids = make.prompts_ids(tokenizer, asked, None)
    requests = [
        Request(str(k), 0, "policy", prompt, tuple(of_prompt), k, 0.0, 1.0, 0, MAX_TOKENS)
        for k, (prompt, of_prompt) in enumerate(zip(asked, ids, strict=True))
    ]
    found: dict[str, Response] = {}
    for batch in sampler.batches(requests):
        for request, answer in sampler.sample(batch):
            assert isinstance(answer, Response)
            found[request.id] = answer
    return [found[str(k)] for k in range(len(prompts))]


def measure(model: Any, tokenizer: Any, prompts: Sequence[Mapping[str, Any]], least: int) -> dict[str, Any]:
    answers = greedy(model, tokenizer, prompts)
    words = [len(a.text.split()) for a in answers]
    return {
        "reward": statistics.fmean(worth(a.text, a.finished, least) for a in answers),
        "within": statistics.fmean(a.finished and w <= WORDS for a, w in zip(answers, words, strict=True)),
        "words": statistics.fmean(words), "ended": statistics.fmean(a.finished for a in answers),
        "answers": [a.text for a in answers],
    }  # fmt: skip


def plot(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Reward of the drawn responses by step, and their length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    steps = [line["step"] for line in lines]
    names = (("reward", "mean reward"), ("completions/mean_length", "mean tokens of a response"))
    for axis, (key, what) in zip(figure.subplots(1, 2), names):
        values = [line[key] for line in lines]
        axis.plot(steps, values, marker=".", linewidth=0.8, color="tab:gray", label="step")
        mean = [statistics.fmean(values[max(0, k - 2) : k + 3]) for k in range(len(values))]
        axis.plot(steps, mean, color="tab:blue", label="mean of five")
        axis.set(xlabel="step", ylabel=what)
        axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(common.ROOT / "runs" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--data", type=Path, default=common.ROOT.parent / "shared" / "data")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=4, help="of a step")
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--least", type=int, default=0, help="words below which the reward falls")
    parser.add_argument("--heldout", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=5e-6)
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    began = time.perf_counter()
    found = prompts_of(args.data, args.heldout + args.steps * args.prompts)
    heldout, asked = found[: args.heldout], found[args.heldout :]
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    before = measure(model, tokenizer, heldout, args.least)
    print(f"before: {before}", flush=True)

    def brief(
        completions: Sequence[Sequence[Mapping[str, str]]], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float]:
        return [
            worth(answer[0]["content"], ids[-1] == tokenizer.eos_token_id, args.least)
            for answer, ids in zip(completions, completion_ids, strict=True)
        ]

    with tempfile.TemporaryDirectory() as work:
        result = fastpo.train(
            model, [{"prompt": row["prompt"]} for row in asked], processing_class=tokenizer, reward_funcs=brief,
            output_dir=work, loss_type="grpo", num_generations=args.generations, max_completion_length=MAX_TOKENS,
            per_device_train_batch_size=args.prompts * args.generations, max_steps=args.steps, seed=args.seed,
            learning_rate=args.learning_rate, beta=args.beta, lr_scheduler_type="constant",
            use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1, save_strategy="no",
            save_final=False, report=False, disable_tqdm=True, optim="adamw_torch",
        )  # fmt: skip
    lines = [
        {"step": line["step"], **{k: line[k] for k in KEPT if k in line}}
        for line in result.log_history if "reward" in line
    ]  # fmt: skip
    after = measure(result.model.eval(), tokenizer, heldout, args.least)
    print(f"after: {after}", flush=True)
    seconds = time.perf_counter() - began
    limits = f"{args.least} to {WORDS}" if args.least else f"at most {WORDS}"
    text = [
        f"{common.machine_name()}: SmolLM2-135M-Instruct by grpo, {args.steps} steps of {args.prompts} prompts with "
        f"{args.generations} sampled answers of at most {MAX_TOKENS} tokens, learning rate {args.learning_rate:g}, "
        f"beta {args.beta:g}; verifier: {limits} words; greedy answers to {args.heldout} held-out prompts. "
        f"{seconds / 60:.1f} minutes in all, {result.metrics['train_runtime'] / args.steps:.1f} s a step.", "",
        "| | before | after |", "| --- | ---: | ---: |",
        *(f"| {what} | {before[key]:.2f} | {after[key]:.2f} |" for key, what in (
            ("reward", "mean reward"), ("within", f"ended within {WORDS} words"), ("words", "mean words"),
            ("ended", "ended by themselves"))), "",
        "Of the responses that were drawn, means of five steps:", "",
        "| steps | reward | standard deviation | prompts whose answers are all worth the same | tokens | entropy |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for k in range(0, len(lines), 5):
        some = lines[k : k + 5]
        names = ("reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "entropy")
        cells = [statistics.fmean(line[name] for line in some) for name in names]
        text.append(f"| {some[0]['step']}-{some[-1]['step']} | " + " | ".join(f"{v:.2f}" for v in cells) + " |")
    text += ["", "The first held-out answers:", "", "| before | after |", "| --- | --- |"]
    for pair in list(zip(before["answers"], after["answers"], strict=True))[:8]:
        text.append("| " + " | ".join(" ".join(answer.split()).replace("|", "\\|") for answer in pair) + " |")
    table = "\n".join(text) + "\n"
    print("\n" + table)
    if not args.no_write:
        report = {"environment": common.environment(), "arguments": {k: str(v) for k, v in vars(args).items()},
                  "before": before, "after": after, "steps": lines, "metrics": result.metrics}  # fmt: skip
        name = f"online_real_{args.least}_to_{WORDS}" if args.least else "online_real"
        path = common.write_result(name, report, table)
        plot(path.with_suffix(".png"), lines)
        print(f"written to {path}")


if __name__ == "__main__":
    main()
