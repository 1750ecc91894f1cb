"""The trunk's layers as transformers has them, fused, and through torch.compile: forward and backward of a micro-batch.

    python bench/trunk_speed.py                 # CPU: the 4x256 model of train_vs_peers.py in fp32, 2,048 tokens
    python bench/trunk_speed.py --shape real    # CPU: real_shape.py's SmolLM2-135M in bf16
    python bench/trunk_speed.py --device cuda   # GPU: the 1B shape in bf16, 16,384 tokens; fused are Liger's layers

`fused` is the default of a run (use_liger_kernel): fastpo's own layers on a CPU. Rows are train_vs_peers.py's synthetic
ones, prompts shared; another micro-batch in every round, the same for all
variants, which take turns. `trunk` is the layers alone; `micro-batch` adds the head's log-probabilities of all
responses, which are no part of what is compiled. `first` is the first call, compilation included; `compile` is what it
took more than the median one, without inductor's caches of earlier runs. The gradients of every variant are compared
with those of the layers as they came; in bf16 these are themselves rounded.
"""

import argparse
import contextlib
import os
import statistics
import sys
import time
from pathlib import Path

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # every compilation is a first one

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import common  # noqa: E402
from real_shape import SHAPE as REAL  # noqa: E402
from real_shape import VOCAB as REAL_VOCAB  # noqa: E402
from train_vs_peers import CPU_SHAPES, GPU_SHAPES, VOCAB  # noqa: E402

from fastpo.config.train_config import TrainConfig  # noqa: E402
from fastpo.data import prepare_examples  # noqa: E402
from fastpo.data.packing import PackedBatch, TrunkCost, collate, pass_batches, set_sharing  # noqa: E402
from fastpo.models.compiled import compiled_layers  # noqa: E402
from fastpo.models.policy import Policy  # noqa: E402

BUCKET = {"cpu": 256, "cuda": 2048}
TOKENS = {"cpu": 2048, "cuda": 16_384}
SHAPES = {  # vocabulary, shape, dtype
    "4x256": (VOCAB, CPU_SHAPES["4x256"], torch.float32), "real": (REAL_VOCAB, REAL, torch.bfloat16),
    "1b": (VOCAB, GPU_SHAPES["1b"], torch.bfloat16),
}  # fmt: skip


def micro_batches(
    count: int, max_tokens: int, bucket: int | None, vocab: int, device: torch.device
) -> list[PackedBatch]:
    rows = common.synthetic_rows(max(64, count * max_tokens // 100), vocab)
    tokenizer = common.word_tokenizer(vocab)
    examples, _ = prepare_examples(rows, tokenizer, kind="preference", max_length=1024)
    set_sharing(examples, "always", TrunkCost(1.0))
    parts = pass_batches(examples, range(len(examples)), max_tokens)[:count]
    return [collate(examples, part, token_bucket=bucket).to(device) for part in parts]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(policy: Policy, batch: PackedBatch, what: str) -> None:
    policy.model.zero_grad()
    if what == "trunk":
        # A fixed direction for each head row: the norm of a row, which the last layer fixes, would have no gradient.
        hidden = policy.hidden(batch).index_select(0, batch.logit_rows)
        generator = torch.Generator(hidden.device).manual_seed(0)
        upstream = torch.randn(hidden.shape, dtype=hidden.dtype, device=hidden.device, generator=generator)
        hidden.backward(upstream)
    else:
        policy.logp(batch).mean().backward()


def timed(policy: Policy, batch: PackedBatch, what: str, device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    run(policy, batch, what)
    wait(device)
    return time.perf_counter() - start


def gradients(policy: Policy, batch: PackedBatch) -> list[Tensor]:
    run(policy, batch, "trunk")
    return [p.grad.clone() for p in policy.model.parameters() if p.grad is not None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=SHAPES, help="default: 4x256 on a CPU, 1b on a GPU")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--skip", nargs="*", default=[], help="variants that are left out")
    args = parser.parse_args()
    device = torch.device(args.device)
    shape = args.shape or ("4x256" if device.type == "cpu" else "1b")
    vocab, sizes, dtype = SHAPES[shape]
    bucket = BUCKET[device.type]
    off, compiled = {"use_liger_kernel": False}, {"use_liger_kernel": False, "torch_compile": True}
    variants: dict[str, dict] = {
        "as they came": off, "fused": {}, "compiled, any size": compiled,
        "compiled, token_bucket": {**compiled, "token_bucket": bucket},
    }  # fmt: skip
    variants = {name: options for name, options in variants.items() if name not in args.skip}
    found: dict[str, dict] = {}
    policies, batches = {}, {}
    base: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        for name, options in variants.items():
            model = common.llama(vocab, **sizes, dtype=dtype).to(device)
            model.train()
            policies[name] = policy = Policy(model)
            config = TrainConfig.build(None, use_cpu=device.type == "cpu", **options)
            policy.fused.choose(policy.causal_lm, config, device)
            batches[name] = micro_batches(args.rounds, TOKENS[device.type], config.token_bucket, vocab, device)
            if config.torch_compile:
                stack.enter_context(compiled_layers(policy, config))
            # A family's rotary embeddings are replaced in its file: one variant's layers are on at a time.
            with policy.attach():
                first = timed(policy, batches[name][0], "trunk", device)
                grads = gradients(policy, batches[name][0])
                base = base or grads
                error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(grads, base, strict=True))
                for batch in batches[name]:  # every size once, before anything is timed
                    warm = timed(policy, batch, "trunk", device)
                run(policy, batches[name][0], "micro-batch")
            print(name, f"first {first:.2f} s, then {warm:.3f} s, gradient error {error:.2g}", flush=True)
            found[name] = {"first_s": first, "gradient_error": error, "trunk": [], "micro-batch": []}
        for k in range(args.rounds):
            for what in ("trunk", "micro-batch"):
                for name, policy in policies.items():
                    with policy.attach():
                        found[name][what].append(timed(policy, batches[name][k], what, device))
    rows = ["| layers | trunk ms | ratio | micro-batch ms | ratio | first call s | compile s | gradient error |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    plain = found["as they came"]
    for name, x in found.items():
        for what in ("trunk", "micro-batch"):
            x[f"{what}_ms"] = 1e3 * statistics.median(x[what])
            x[f"{what}_ratio"] = statistics.median(a / b for a, b in zip(plain[what], x[what], strict=True))
        x["compile_s"] = max(0.0, x["first_s"] - x["trunk_ms"] / 1e3)
        rows.append(
            f"| {name} | {x['trunk_ms']:.0f} | {x['trunk_ratio']:.2f} | {x['micro-batch_ms']:.0f} | "
            f"{x['micro-batch_ratio']:.2f} | {x['first_s']:.1f} | {x['compile_s']:.1f} | {x['gradient_error']:.1g} |"
        )
    tokens = [b.cu_seqlens[-1] for b in batches["as they came"]]
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    markdown = "\n".join([
        f"Forward and backward of the shape {shape}, {common.machine_name()}, {torch.get_num_threads()} threads, "
        f"{kind}, micro-batches of {min(tokens):,} to {max(tokens):,} tokens; token_bucket={bucket}. "
        f"Median of {args.rounds}; ratio: how many "
        "times as fast as the layers as they came, median over the rounds.", "", *rows, "",
        "`compile s` of the first compiled row holds the import and start of inductor, which the second finds done.",
        "",
    ])  # fmt: skip
    result = {
        "environment": common.environment(),
        "shape": shape,
        "tokens": tokens,
        "bucket": bucket,
        "variants": found,
    }
    path = common.write_result("trunk_speed" + ("_real" if shape == "real" else ""), result, markdown)
    print(markdown, path, sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
