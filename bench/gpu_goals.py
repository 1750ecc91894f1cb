"""What only a GPU can show: kernels alone, and the project's goals for one card, judged from the JSON of a run.

    python bench/gpu_goals.py kernels --out FOLDER     # row kernel, fused forward
    python bench/gpu_goals.py judge --out FOLDER       # ops.json (else ours/ops.json), kernels.json -> goals.json

Both for bench/gpu.sh. `--tiny` takes small sizes and fp32, so that Triton's interpreter (TRITON_INTERPRET=1) can walk
through on a CPU; its times mean nothing. N = head rows, D = hidden, V = vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent))
import harness  # noqa: E402
import roofline  # noqa: E402

from fastpo import ops  # noqa: E402
from fastpo.kernels import reference  # noqa: E402

GIB = 1 << 30
LARGE, SQUARE = [8192, 4096, 151936], [4096, 4096, 128256]
# Peers to be faster than. QuACK's one number for all rows and a compiled graph without limits are for the record.
BEATEN = (
    "naive",
    "torch_lce_rows",
    "torch_lce_sum",
    "torch_lce_sum_256",
    "trl_chunked",
    "liger_ce",
    "cce_exact",
    "cce_filtered",
)
VOCABULARIES = (32000, 128256, 151936)
SHORT_S = 1e-3  # what is timed at once takes about this long


def medians(
    steps: dict[str, Callable[[], object]], device: str, rounds: int
) -> tuple[dict[str, float], dict[str, bool]]:
    """(seconds of each, whether its launches were queued in all rounds), rounds interleaved, after one untimed call.
    A short one is timed as several in a row, which an event's resolution asks for."""
    repeats = {}
    for name, step in steps.items():
        step()
        once = roofline.timed(step, device)[0]
        repeats[name] = min(20, max(1, round(SHORT_S / once))) if device == "cuda" else 1
    times: dict[str, list[tuple[float, bool]]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(roofline.timed(step, device, repeats[name]))
    found = {name: statistics.median(t for t, _ in taken) for name, taken in times.items()}
    return found, {name: all(queued for _, queued in taken) for name, taken in times.items()}


def _agree(got: Tensor, logits: Tensor, target: Tensor) -> None:
    """Log-probabilities of the given logits (as they were rounded), or an error: nothing wrong is timed."""
    want = reference.row_logprob(logits.float(), target)[0]
    worst = (got.float() - want).abs().max().item()
    if not worst <= 1e-2 * max(1.0, want.abs().max().item()):
        raise RuntimeError(f"log-probabilities are off by {worst:.1e}: not timed")


def row_kernel(rows: int, vocabulary: int, dtype: torch.dtype, device: str, rounds: int) -> dict:
    """The row kernel with `onehot - P` written in place (one read, one write) against a copy of the same matrix."""
    from fastpo.kernels import logprob

    source = torch.randn(rows, vocabulary, device=device).mul_(2).to(dtype)
    target = torch.randint(0, vocabulary, (rows,), device=device)
    tile, sink = source.clone(), torch.empty_like(source)
    rule = {"softcap": None, "logit_scale": 1.0}
    _agree(logprob.logprob_row_fwd(tile, target, None, write="grad", **rule)[0], source, target)
    tile.copy_(source)
    taken, queued = medians(
        {
            "copy": lambda: sink.copy_(source),
            "row_grad": lambda: logprob.logprob_row_fwd(tile, target, None, write="grad", **rule),
            "row_read": lambda: logprob.logprob_row_fwd(source, target, None, write=None, **rule),
        },
        device,
        rounds,
    )
    moved = 2 * source.nbytes
    return {
        "rows": rows,
        "vocabulary": vocabulary,
        "copy_gbps": moved / taken["copy"] / 1e9,
        "row_grad_gbps": moved / taken["row_grad"] / 1e9,
        "row_read_gbps": moved / 2 / taken["row_read"] / 1e9,
        "of_copy": taken["copy"] / taken["row_grad"],
        "queued": all(queued.values()),
    }


def fused_forward(shape: list[int], dtype: torch.dtype, device: str, rounds: int) -> dict:
    """The forward without gradients, two ways: fused kernel, and vendor GEMM with the row kernel in the op's blocks."""
    from fastpo.kernels import fused, logprob
    from fastpo.ops import backends

    n, d, v = shape
    hidden = torch.randn(n, d, device=device).to(dtype)
    weight = torch.randn(v, d, device=device).div_(d**0.5).to(dtype)
    target = torch.randint(0, v, (n,), device=device)
    rule = {"softcap": None, "logit_scale": 1.0}
    rows = backends.device_rows(n, v * dtype.itemsize)

    def unfused() -> Tensor:
        logits, out = logprob.empty_logits(rows, v, dtype, device), hidden.new_empty(n, dtype=torch.float32)
        for r in (slice(begin, min(begin + rows, n)) for begin in range(0, n, rows)):
            block = torch.mm(hidden[r], weight.t(), out=logits[: r.stop - r.start])
            out[r] = logprob.logprob_row_fwd(block, target[r], None, write=None, **rule)[0]
        return out

    def fused_kernel() -> Tensor:
        return fused.fused_logprob_fwd(hidden, weight, target, None, **rule)[0]

    few = slice(0, min(n, 256))
    for step in (unfused, fused_kernel):
        _agree(step()[few], (hidden[few].float() @ weight.float().t()), target[few])

    def gemm() -> Tensor:
        return torch.mm(hidden, weight.t())

    taken, queued = medians({"gemm": gemm, "unfused": unfused, "fused": fused_kernel}, device, rounds)
    return {"shape": shape, **{f"{name}_ms": t * 1e3 for name, t in taken.items()}, "queued": all(queued.values())}


def kernels(args: argparse.Namespace) -> int:
    """kernels.json: each measurement, or why there is none."""
    args.out.mkdir(parents=True, exist_ok=True)
    out: dict = {"tiny": args.tiny, "row_kernel": [], "fused_forward": []}
    dtype = torch.float32 if args.tiny and args.device == "cpu" else torch.bfloat16
    rounds = 2 if args.tiny else 20

    def attempt(key: str, label: dict, step: Callable[[], dict]) -> None:
        try:
            if "triton" not in ops.available_backends():
                raise RuntimeError("the Triton kernels need a GPU")
            out[key].append(step())
        except Exception as error:  # one kernel that fails must not lose the others
            out[key].append(label | {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})
        print(key, json.dumps(out[key][-1]), flush=True)
        (args.out / "kernels.json").write_text(json.dumps(out, indent=1) + "\n")

    for v in (1000,) if args.tiny else VOCABULARIES:
        rows = 8 if args.tiny else 2048
        attempt("row_kernel", {"vocabulary": v}, lambda v=v, n=rows: row_kernel(n, v, dtype, args.device, rounds))
    if args.tiny and args.device == "cpu":
        dtype = torch.float16  # the fused kernel takes 16 bit only; the interpreter's bf16 products are garbage
    for shape in ([16, 64, 500],) if args.tiny else (LARGE, SQUARE, [1024, 4096, 128256]):
        attempt("fused_forward", {"shape": shape}, lambda s=shape: fused_forward(s, dtype, args.device, rounds))
    failed = any("failed" in item for item in out["row_kernel"] + out["fused_forward"])
    return int(failed and not args.tiny)


def goals_of(rows: dict[tuple, dict], kernel: dict) -> list[tuple[str, float | None, float | None, str, str]]:
    """(name, value or None, limit or None for no goal, unit, sense) of every goal; rows by (N, D, V)."""

    def get(shape: list[int], name: str, key: str, factor: float = 1.0) -> float | None:
        value = rows.get(tuple(shape), {}).get(name, {}).get(key)
        return None if value is None else value * factor

    def over(shape: list[int], name: str, bare: str) -> float | None:
        """Median over rounds of one provider's time over another's."""
        ours, theirs = (rows.get(tuple(shape), {}).get(x, {}).get("times_s") for x in (name, bare))
        return None if not ours or not theirs else harness.quantile([a / b for a, b in zip(ours, theirs)], 0.5)

    copies = [k["of_copy"] for k in kernel.get("row_kernel", []) if "of_copy" in k and not kernel.get("tiny")]
    text = {tuple(s): f"N {s[0]:,}, D {s[1]:,}, V {s[2]:,}" for s in (LARGE, SQUARE)}
    large, square = text[tuple(LARGE)], text[tuple(SQUARE)]
    out = [
        (f"forward and backward, {large}", get(LARGE, "fastpo_kept", "p50_s", 1e3), 50.0, "ms", "at most"),
        (f"its peak memory, {large}", get(LARGE, "fastpo_kept", "peak_bytes", 1 / GIB), 7.0, "GiB", "at most"),
        (f"forward and backward, {square}", get(SQUARE, "fastpo_kept", "p50_s", 1e3), 19.0, "ms", "at most"),
        (f"frozen head, {square}", get(SQUARE, "fastpo_frozen", "p50_s", 1e3), 13.0, "ms", "at most"),
        (f"reference pass over its GEMM, {large}", over(LARGE, "fastpo_none", "gemms_1"), 1.1, "", "at most"),
        (f"reference pass over its GEMM, {square}", over(SQUARE, "fastpo_none", "gemms_1"), 1.1, "", "at most"),
        ("row kernel over copy bandwidth, worst vocabulary", min(copies, default=None), 0.85, "", "at least"),
    ]  # fmt: skip
    for shape in (LARGE, SQUARE):
        found = [k for k in kernel.get("fused_forward", []) if k.get("shape") == shape and "fused_ms" in k]
        value = found[0]["fused_ms"] / found[0]["unfused_ms"] if found else None
        out.append((f"fused forward over GEMM and row kernel, {text[tuple(shape)]}", value, None, "", ""))
        for name in rows.get(tuple(shape), {}):
            row = rows[tuple(shape)][name]
            if row["job"] in ("rows", "sum") and not name.startswith("fastpo"):
                limit = 1.0 if name in BEATEN else None
                out.append(
                    (f"ours over {name}, {text[tuple(shape)]}", over(shape, "fastpo_kept", name), limit, "", "below")
                )
    return out


def judge(args: argparse.Namespace) -> int:
    """goals.json and a table; exit code 1 where a goal was measured and missed."""

    def load(name: str) -> dict:
        path = args.out / name
        return json.loads(path.read_text()) if path.exists() else {}

    rows: dict[tuple, dict] = {}
    for path in (args.out / "ours" / "ops.json", args.out / "ops.json"):
        for result in harness.read(path) if path.exists() else []:
            # The run with peers wins, unless one of them broke the device's context before ours was timed.
            if result["rows"].get("fastpo_kept", {}).get("times_s") or tuple(result["shape"]) not in rows:
                rows[tuple(result["shape"])] = result["rows"]
    goals, missed = [], 0
    for name, value, limit, unit, sense in goals_of(rows, load("kernels.json")):
        if value is None or math.isnan(value):
            verdict = "not measured"
        elif limit is None:
            verdict = "for the record"
        else:
            met = {"at most": value <= limit, "below": value < limit, "at least": value >= limit}[sense]
            verdict, missed = ("met", missed) if met else ("MISSED", missed + 1)
        reason = "" if value is not None else "not measured"
        goals.append({"name": name, "value": value, "limit": limit, "unit": unit, "sense": sense, "verdict": verdict,
                      "reason": reason})  # fmt: skip
        shown = "-" if value is None else f"{value:.3f}"
        wanted = "" if limit is None else f"{sense} {limit:g}"
        print(f"{verdict:14} {shown:>9} {unit:4} {wanted:14} {name}")
    waited = [f"{name}, {'x'.join(map(str, shape))}" for shape, of in rows.items() for name, row in of.items()
              if not row.get("queued", True)]  # fmt: skip
    for name in waited:
        print(f"its time holds the CPU's launches: {name}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "goals.json").write_text(json.dumps({"goals": goals, "not_queued": waited}, indent=1) + "\n")
    return 1 if missed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kernels", "judge"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    return {"kernels": kernels, "judge": judge}[args.what](args)


if __name__ == "__main__":
    sys.exit(main())
