"""The head op against the GEMMs it needs and against every peer, and whether it meets what it promises.

    python bench/bench_ops.py                                   # the promised shapes of this device, and the verdict
    python bench/bench_ops.py --quick                           # the same on small shapes: does everything run?
    python bench/bench_ops.py --shape 1024,512,32000 --provider fastpo_kept naive     # some
    python bench/bench_ops.py --sweep                           # one axis after the other, for the plots
    python bench/bench_ops.py --list

What a row is: harness.py. What each provider does: peers.py. Exit code 1 where ours is wrong or misses a promise.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
import harness  # noqa: E402

SHAPES = {
    "cpu": [(1024, 512, 32000), (512, 1024, 151936), (4096, 256, 50257)],
    "cuda": [(8192, 4096, 151936), (4096, 4096, 128256)],
}
QUICK = {"cpu": [(128, 64, 4099), (64, 128, 8192)], "cuda": [(512, 512, 32000)]}
# N, D and V of the plots: one shape, and the values of each axis through it.
SWEEP = {
    "cpu": ((512, 256, 16384), ((128, 512, 2048), (64, 256, 1024), (4096, 16384, 65536))),
    "cuda": ((4096, 4096, 128256), ((1024, 4096, 8192), (1024, 4096, 8192), (32000, 128256, 256000))),
    "quick": ((64, 32, 2048), ((32, 64), (32, 64), (1024, 2048))),
}
SWEPT = ["gemms_3", "fastpo_kept", "fastpo_sliced", "fastpo_frozen", "naive", "torch_lce_sum_256", "trl_chunked",
         "liger_ce", "quack", "cce_exact", "liger_dpo_eager"]  # fmt: skip
LIMITS = {"fastpo_kept": 1.10, "fastpo_sliced": 1.40}  # over the three bare GEMMs
SAME_ERROR = 1.05  # two orders of the same fp32 sums differ by this much; the criterion of fastpo.check allows 1.5
OURS = {"rows": "fastpo_kept", "sum": "fastpo_kept", "dpo": "fastpo_dpo", "simpo": "fastpo_simpo",
        "none": "fastpo_none", "frozen": "fastpo_frozen", "entropy": "fastpo_entropy"}  # fmt: skip
PROMISED = (
    "naive",
    "naive_dpo",
    "torch_lce_rows",
    "torch_lce_sum",
    "torch_lce_sum_256",
    "trl_chunked",
    "liger_dpo",
)  # to be faster than
MUST_SHOW = [
    "gemms_1", "gemms_2", "gemms_3", "fastpo_none", "fastpo_frozen", "fastpo_kept", "fastpo_sliced",
    "fastpo_entropy", "fastpo_entropy_sliced", "naive", "naive_entropy", "compiled", "torch_lce_rows",
    "torch_lce_sum", "torch_lce_sum_256", "trl_chunked", "cce_compiled", "cce_exact", "cce_filtered", "liger_ce",
    "quack", "fastpo_dpo", "naive_dpo", "liger_dpo",
]  # fmt: skip


def verdict(result: dict) -> list[tuple[bool | None, str]]:
    """(met, sentence) for every promise that this shape's rows can tell; None for a peer beyond the promise."""
    rows = result["rows"]
    out: list[tuple[bool | None, str]] = []
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
        elif row["job"] in OURS and "times_s" in row and "times_s" in rows.get(OURS[row["job"]], {}):
            ours = rows[OURS[row["job"]]]["times_s"]
            ratio = harness.quantile([a / b for a, b in zip(ours, row["times_s"])], 0.5)
            out.append(((ratio < 1) if name in PROMISED else None, f"{OURS[row['job']]}: {ratio:.3f} of {name}"))
    return out


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--sweep", action="store_true", help="time and memory against N, V and D, for the plots")
    args = parser.parse_args()
    if args.sweep:
        base, axes = SWEEP["quick" if args.quick else args.device]
        shapes = [base] + [s for s in (vary(base, i, x) for i in range(3) for x in axes[i]) if s != base]
        return harness.run(args, shapes, SWEPT, "sweep")
    shapes = (QUICK if args.quick else SHAPES)[args.device]
    return harness.run(args, shapes, MUST_SHOW, "ops", None if args.quick else verdict)


def vary(shape: tuple[int, int, int], axis: int, value: int) -> tuple[int, int, int]:
    n, d, v = (value if i == axis else size for i, size in enumerate(shape))
    return n, d, v


if __name__ == "__main__":
    sys.exit(main())
