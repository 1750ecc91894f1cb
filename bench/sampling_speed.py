"""Responses of a policy: LocalSampler and plain transformers generate(do_sample=True), the same batch.

    python bench/sampling_speed.py            # 4 prompts of 256 tokens, 8 responses of 128 to each
    python bench/sampling_speed.py --dtype bf16 --repeats 5
    python bench/sampling_speed.py --provider fastpo --profile      # where the time of one batch goes

The model is train_vs_peers.py's 12x192 with random weights, whose end is drawn never: all responses have all tokens.
`generate` is what TRL's trainers call: every prompt as often as it has responses, padded on the left, temperature 1.
`mixture` draws from half of the policy's and half of a second model's logits, for which generate() has no counterpart.
The providers take turns in one process; the first turn is not counted. `seconds` is of a batch, texts included.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out

PROVIDERS = ("fastpo", "generate", "mixture")


def made(args: argparse.Namespace) -> dict[str, Callable[[], list[str]]]:
    """By provider what answers the batch: texts."""
    import common
    import torch
    import train_vs_peers
    from transformers import GenerationConfig

    from fastpo.sampling.items import Request, seed_of
    from fastpo.sampling.local_sampler import LocalSampler

    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    shape, vocabulary = train_vs_peers.CPU_SHAPES[args.shape], train_vs_peers.VOCAB
    model, other = (common.llama(vocabulary, **shape, dtype=dtype, seed=seed).eval() for seed in (0, 1))
    tokenizer = common.word_tokenizer(vocabulary)
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    rng = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(3, vocabulary, (args.prompt,), generator=rng).tolist()) for _ in range(args.prompts)]
    requests = [Request(f"p{i}", k, "policy", "", ids, seed_of(i, k), max_tokens=args.tokens)
                for i, ids in enumerate(prompts) for k in range(args.responses)]  # fmt: skip
    ids = torch.tensor([r.prompt_ids for r in requests])
    settings = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=args.tokens, pad_token_id=0)

    def plain() -> list[str]:
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        assert out.shape == (len(requests), args.prompt + args.tokens)
        return tokenizer.batch_decode(out[:, args.prompt :])

    def ours(**options) -> Callable[[], list[str]]:
        sampler = LocalSampler(model, tokenizer, batch_size=len(requests), **options)

        def answer() -> list[str]:
            found = [response for _, response in sampler.sample(requests)]
            assert all(len(response.token_ids) == args.tokens for response in found)
            return [response.text for response in found]

        return answer

    return {"fastpo": ours(), "generate": plain, "mixture": ours(mixture=0.5, reference=other)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="12x192", help="of train_vs_peers.py's models")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a response")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--provider", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="of one more batch of the first provider")
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    import common
    import torch

    common.quiet()
    torch.set_num_threads(args.threads)
    runs, seconds = made(args), {name: [] for name in args.provider}
    for turn in range(args.repeats + 1):
        for name in args.provider:
            start = time.perf_counter()
            runs[name]()
            if turn or not args.repeats:
                seconds[name].append(time.perf_counter() - start)
    if args.profile:
        with torch.profiler.profile() as profile:
            runs[args.provider[0]]()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))
    count = args.prompts * args.responses * args.tokens
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    lines = ["| | seconds a batch | tokens a second | to generate |", "| --- | ---: | ---: | ---: |"]
    for name, median in medians.items():
        to = f"{median / medians['generate']:.2f}" if "generate" in medians else ""
        lines.append(f"| {name} | {median:.2f} | {count / median:,.0f} | {to} |")
    what = (
        f"{args.prompts} prompts of {args.prompt} tokens, {args.responses} responses of {args.tokens} to each, "
        f"{args.shape}, {args.dtype}, {args.threads} threads, medians of {args.repeats}"
    )
    table = "\n".join([what, "", *lines])
    print(table)
    if not args.no_write:
        report = {"environment": common.environment(), "arguments": vars(args), "seconds": seconds, "medians": medians}
        print(f"written to {common.write_result(f'sampling_speed_{args.dtype}', report, table)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
