"""The head op against the GEMMs it needs and against every peer, and whether it meets what it promises.

    python bench/bench_ops.py                                   # the promised shapes of this device, and the verdict
    python bench/bench_ops.py --quick                           # the same on small shapes: does everything run?
    python bench/bench_ops.py --shape 1024,512,32000 --provider fastpo_kept naive     # some
    python bench/bench_ops.py --list

What a row is: harness.py. What each provider does: peers.py. Exit code 1 where ours is wrong or misses a promise.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent))
import harness  # noqa: E402
from peers import PROVIDERS  # noqa: E402

SHAPES = {
    "cpu": [(1024, 512, 32000), (512, 1024, 151936), (4096, 256, 50257)],
    "cuda": [(8192, 4096, 151936), (4096, 4096, 128256)],
}
QUICK = {"cpu": [(128, 64, 4099), (64, 128, 8192)], "cuda": [(512, 512, 32000)]}
LIMITS = {"fastpo_kept": 1.10, "fastpo_sliced": 1.40}  # over the three bare GEMMs
SAME_ERROR = 1.05  # two orders of the same fp32 sums differ by this much; the criterion of fastpo.check allows 1.5
OURS = {"rows": "fastpo_kept", "sum": "fastpo_kept", "dpo": "fastpo_dpo", "simpo": "fastpo_simpo",
        "none": "fastpo_none", "frozen": "fastpo_frozen"}  # fmt: skip
MUST_SHOW = [
    "gemms_1", "gemms_2", "gemms_3", "fastpo_none", "fastpo_frozen", "fastpo_kept", "fastpo_sliced", "naive",
    "compiled", "torch_lce_rows", "torch_lce_sum", "trl_chunked", "cce_compiled", "cce_exact",
    "cce_filtered", "liger_ce", "quack", "fastpo_dpo", "naive_dpo", "liger_dpo",
]  # fmt: skip


def verdict(result: dict) -> list[tuple[bool, str]]:
    """(met, sentence) for every promise that this shape's rows can tell."""
    rows, out = result["rows"], []
    for name, limit in LIMITS.items():
        if "over_gemms" in rows.get(name, {}):
            ratio = rows[name]["over_gemms"]
            out.append((ratio <= limit, f"{name}: {ratio:.3f} of the three bare GEMMs, at most {limit:.2f}"))
    for name, row in rows.items():
        if name.startswith("fastpo"):
            if row["status"] != "ok":
                out.append((False, f"{name}: {row['status']}, {row['reason']}"))
                continue
            worst = max(row["over_naive"], key=row["over_naive"].get)
            ratio = row["over_naive"][worst]
            out.append((ratio <= SAME_ERROR, f"{name}: error of {worst} {ratio:.3f} times naive PyTorch's"))
        elif row["job"] in OURS and "times_s" in row:
            ours = rows.get(OURS[row["job"]], {})
            if "times_s" in ours:
                ratios = [a / b for a, b in zip(ours["times_s"], row["times_s"])]
                ratio = harness.quantile(ratios, 0.5)
                out.append((ratio < 1, f"{OURS[row['job']]}: {ratio:.3f} of {name}"))
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", type=harness.parse_shape, help="N,D,V; may be repeated")
    parser.add_argument("--provider", nargs="+", help="these only; the bare GEMMs always")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=9, help="at most")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing per shape, after three rounds")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path, help="folder of the JSON; default bench/results/<machine>")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--list", action="store_true", help="the providers, and why those that cannot run cannot")
    args = parser.parse_args()
    if args.list:
        for name, provider in PROVIDERS.items():
            print(f"{name:18} {provider.job:7} {provider.regime:7} {provider.unavailable(args.device) or ''}".rstrip())
        return 0
    unknown = [name for name in args.provider or [] if name not in PROVIDERS]
    if unknown:
        parser.error(f"unknown provider {unknown[0]!r}; one of {', '.join(PROVIDERS)}")
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))
    shapes = args.shape or (QUICK if args.quick else SHAPES)[args.device]
    names = args.provider or MUST_SHOW
    results, met = [], True
    for shape in shapes:
        begin = time.perf_counter()
        result = harness.measure(
            shape, names, dtype=dtype, device=args.device, rounds=3 if args.quick else args.rounds,
            seconds=args.seconds, memory=not args.no_memory, seed=args.seed,
        )  # fmt: skip
        results.append(result)
        met &= all(row["status"] == "ok" for name, row in result["rows"].items() if name.startswith("fastpo"))
        print(harness.table(result))
        for good, sentence in [] if args.quick else verdict(result):
            met &= good
            print(f"{'ok  ' if good else 'MISS'} {sentence}")
        print(f"({time.perf_counter() - begin:.0f} s)\n", flush=True)
    if not args.no_write:
        print(f"written: {harness.write(results, 'ops', args.out)}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
