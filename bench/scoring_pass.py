"""Token log-probabilities of given responses, no gradient: fastpo.sequence_logps and padded passes of transformers.

    python bench/scoring_pass.py                              # K = 8 responses of a prompt, bf16, three turns
    python bench/scoring_pass.py --rows hh --dtype fp32 --prompts 16
    python bench/scoring_pass.py --rows 1024x128              # prompts of 1,024 tokens, eight responses of 128 each

The model is of SmolLM2-135M's shape with random weights (real_shape.py). Rows: `kway`, prompts of the shared data's
AlpacaEval file with eight responses each; `hh`, its HH dialogues, two responses each; `PxR`, made ones of random
tokens, eight responses each. Every run is a process of its own, in turn; `seconds` is from rows to numbers, tokenising
included, ours with its guard against the model's logits.

Peers: `padded`, the rows in their order, eight sequences a forward (for `kway` the responses of one prompt);
`padded_sorted`, all of them by length, eight a forward. Both take fp32 log_softmax of the logits, then the targets'.
Memory is the peak resident size over that of the process with its model and rows. `difference`: the largest one of a
response's sum to the padded pass, beside the mean size of these sums.
"""

import argparse
import json
import os
import random
import re
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out

BATCH = 8
OPTIONS = ("rows", "dtype", "prompts")  # of a worker
PROVIDERS = ("fastpo", "padded", "padded_sorted")


def read_rows(kind: str, prompts: int) -> tuple[list[dict], object]:
    """Rows with explicit prompts, and a tokenizer of the model's vocabulary."""
    import common
    import real_shape
    import train_vs_peers

    if kind == "kway":
        ours, _, tokenizer = train_vs_peers.kway_rows(prompts, real_shape.VOCAB)
        return ours, tokenizer
    if kind != "hh":
        sizes = [int(size) for size in kind.split("x")]
        tokenizer, rng = common.word_tokenizer(real_shape.VOCAB), random.Random(0)

        def words(size: int) -> str:
            return " ".join(f"w{rng.randrange(3, real_shape.VOCAB)}" for _ in range(size))

        made = [(words(sizes[0]), [words(sizes[1] - 1) for _ in range(8)]) for _ in range(prompts)]  # and the end
        return [{"prompt": p, "responses": [{"text": f" {r}"} for r in of_it]} for p, of_it in made], tokenizer
    rows = common.hh_rows()
    tokenizer = common.bpe_tokenizer([row[key] for row in rows for key in ("chosen", "rejected")], real_shape.VOCAB)
    out = []
    for row in rows[:prompts]:
        size = len(os.path.commonprefix([row["chosen"], row["rejected"]]))
        size = row["chosen"].rfind("\n\nAssistant:", 0, size) + len("\n\nAssistant:")
        responses = [{"text": row[key][size:]} for key in ("chosen", "rejected")]
        out.append({"prompt": row["chosen"][:size], "responses": responses})
    return out, tokenizer


def padded(model, tokenizer, rows: list[dict], by_length: bool) -> list[float]:
    """Sum of the log-probabilities of every response, with the end behind it."""
    import torch

    encoded = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        for response in row["responses"]:
            whole = tokenizer(row["prompt"] + response["text"])["input_ids"] + [tokenizer.eos_token_id]
            size = len(os.path.commonprefix([prompt, whole]))
            encoded.append((whole, size))
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][0])) if by_length else list(range(len(encoded)))
    out = [0.0] * len(encoded)
    with torch.no_grad():
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            longest = max(len(encoded[i][0]) for i in part)
            ids = torch.full((len(part), longest), tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for place, i in enumerate(part):
                ids[place, : len(encoded[i][0])] = torch.tensor(encoded[i][0])
                mask[place, : len(encoded[i][0])] = 1
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            logp = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            for place, i in enumerate(part):
                whole, size = encoded[i]
                out[i] = logp[place, size - 1 : len(whole) - 1].sum().item()
    return out


def worker(provider: str, args: argparse.Namespace, path: str) -> None:
    import common
    import real_shape
    import torch

    import fastpo

    common.quiet()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rows, tokenizer = read_rows(args.rows, args.prompts)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    model = common.llama(real_shape.VOCAB, **real_shape.SHAPE, dtype=dtype, max_positions=4096).eval()
    tokenizer("a b")
    fastpo.sequence_logps  # noqa: B018  # imported before the clock starts
    base = common.reset_peak_memory()
    start = time.perf_counter()
    if provider == "fastpo":
        sums = [logp.sum().item() for row in fastpo.sequence_logps(model, rows, processing_class=tokenizer)
                for logp in row]  # fmt: skip
    else:
        sums = padded(model, tokenizer, rows, by_length=provider == "padded_sorted")
    result = {"seconds": time.perf_counter() - start, "peak_bytes": common.peak_memory() - base, "sums": sums}
    Path(path).write_text(json.dumps(result))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="kway", help="kway, hh, or PxR (tokens of prompt and response)")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--provider", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], args, args.worker[1])
        return 0

    if args.rows not in ("kway", "hh") and not re.fullmatch(r"\d+x\d+", args.rows):
        parser.error(f"--rows {args.rows}: expected kway, hh, or two numbers such as 1024x128")
    import common

    runs: dict[str, list[dict]] = {provider: [] for provider in args.provider}
    for turn in range(args.repeats):
        for provider in args.provider:
            runs[provider].append(result := common.spawned(__file__, provider, args, OPTIONS))
            print(f"{provider} {turn + 1}: {result['seconds']:.2f} s, {result['peak_bytes'] / 1e9:.2f} GB", flush=True)
    truth = runs.get("padded", next(iter(runs.values())))[0]["sums"]
    seconds = {p: statistics.median(r["seconds"] for r in results) for p, results in runs.items()}
    peak = {p: statistics.median(r["peak_bytes"] for r in results) for p, results in runs.items()}
    difference = {p: max(abs(a - b) for a, b in zip(runs[p][0]["sums"], truth, strict=True)) for p in runs}
    size = statistics.mean(map(abs, truth))
    env = common.environment()
    lines = [
        f"transformers {env['transformers']}, torch {env['torch']}, {env['machine']}, {args.threads} threads. "
        f"SmolLM2-135M's shape, random weights, {args.dtype}; {args.prompts} prompts of `{args.rows}`, {len(truth)} "
        f"responses; medians of {args.repeats} runs, in turn. A response's sum is {size:,.0f} nats on average.",
        "",
        "| provider | seconds | peak GB | time / fastpo | memory / fastpo | largest difference of a sum |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for p in runs:
        lines.append(
            f"| {p} | {seconds[p]:.2f} | {peak[p] / 1e9:.2f} | {seconds[p] / seconds['fastpo']:.2f} "
            f"| {peak[p] / peak['fastpo']:.2f} | {difference[p]:.2g} |"
        )
    table = "\n".join(lines) + "\n"
    print("\n" + table)
    if not args.no_write:
        report = {"environment": env, "arguments": vars(args) | {"worker": None}, "seconds": seconds, "peak": peak,
                  "difference": difference, "mean_sum": size, "runs": runs}  # fmt: skip
        print(f"written to {common.write_result(f'scoring_pass_{args.rows}_{args.dtype}', report, table)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
