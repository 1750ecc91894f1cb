"""The head op alone against the GEMMs it needs, plain PyTorch, TRL, Liger and cut-cross-entropy: time and peak memory.

    python bench/bench_head.py                                    # CPU, fp32, N 1024, D 512, V 32000
    python bench/bench_head.py --device cuda                      # bf16, N 8192, D 4096, V 128256
    python bench/bench_head.py --only bare_gemms kept naive       # some providers

Every provider does a forward and, where its regime has one, a backward with a non-uniform gradient per row, and
allocates its outputs afresh. Rounds are interleaved in one process: provider after provider, then again. Before timing,
gradients are compared with plain PyTorch's. Peak memory: one step in a process of its own, over what was there before
it (resident size on a CPU, the allocator's peak on a GPU). A provider that cannot run is listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent))
import common  # noqa: E402

from fastpo import ops  # noqa: E402

GIB = 1 << 30
PAIRS = 4  # responses of equal length, for the preference losses
BETA = 0.1


@dataclass
class Problem:
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    target: Tensor  # [N]
    upstream: Tensor  # [N]

    @classmethod
    def make(cls, n: int, d: int, v: int, dtype: torch.dtype, device: str) -> Problem:
        torch.manual_seed(0)
        hidden = torch.randn(n, d, device=device, dtype=dtype)
        weight = torch.randn(v, d, device=device, dtype=dtype) / d**0.5
        return cls(hidden, weight, torch.randint(0, v, (n,), device=device), torch.randn(n, device=device))

    def leaves(self, weight_grad: bool = True) -> tuple[Tensor, Tensor]:
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_(weight_grad)


Gradients = tuple[Tensor | None, Tensor | None]


def gemms(count: int) -> Callable[[Problem], Gradients]:
    """The products alone: logits; with two, dX; with three, dW."""

    def step(p: Problem) -> Gradients:
        logits = torch.mm(p.hidden, p.weight.t())
        dx = torch.mm(logits, p.weight) if count > 1 else None
        return dx, torch.mm(logits.t(), p.hidden) if count > 2 else None

    return step


def fastpo(regime: str, budget: int | None = None) -> Callable[[Problem], Gradients]:
    def step(p: Problem) -> Gradients:
        hidden, weight = p.leaves(regime == "trained")
        if regime == "none":
            with torch.no_grad():
                ops.linear_logprob(hidden, weight, p.target)
            return None, None
        ops.linear_logprob(hidden, weight, p.target, memory_budget=budget).backward(p.upstream)
        return hidden.grad, weight.grad

    return step


def naive(p: Problem) -> Gradients:
    hidden, weight = p.leaves()
    logp = F.linear(hidden, weight).float().log_softmax(-1).gather(1, p.target.unsqueeze(1)).squeeze(1)
    logp.backward(p.upstream)
    return hidden.grad, weight.grad


def trl_chunked(p: Problem) -> Gradients:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import utils

    hidden, weight = p.leaves()
    chunk = getattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 8192)
    ChunkedLogProbFunction.apply(hidden, weight, None, p.target, 1.0, chunk, None, 1.0, ())[0].backward(p.upstream)
    return hidden.grad, weight.grad


def cut_cross_entropy(impl: str, filter_eps: str | None) -> Callable[[Problem], Gradients]:
    def step(p: Problem) -> Gradients:
        from cut_cross_entropy import linear_cross_entropy

        hidden, weight = p.leaves()
        loss = linear_cross_entropy(hidden, weight, p.target, reduction="none", impl=impl, filter_eps=filter_eps)
        loss.backward(-p.upstream.to(loss.dtype))
        return hidden.grad, weight.grad

    return step


def fastpo_dpo(p: Problem) -> Gradients:
    hidden, weight = p.leaves()
    logp = ops.linear_logprob(hidden, weight, p.target)
    device = logp.device
    offsets = torch.arange(0, len(p.target) + 1, len(p.target) // (2 * PAIRS), dtype=torch.int32, device=device)
    pairs = torch.arange(2 * PAIRS, dtype=torch.int32, device=device).view(2, PAIRS).t().contiguous()
    weights = torch.full((PAIRS,), 1 / PAIRS, device=device)
    ops.preference_loss(logp, None, offsets, pairs, weights, loss_type="dpo", beta=BETA, unique=True)[0].backward()
    return hidden.grad, weight.grad


def naive_dpo(p: Problem) -> Gradients:
    hidden, weight = p.leaves()
    logp = F.linear(hidden, weight).float().log_softmax(-1).gather(1, p.target.unsqueeze(1)).squeeze(1)
    chosen, rejected = logp.view(2, PAIRS, -1).sum(-1)
    (-F.logsigmoid(BETA * (chosen - rejected))).mean().backward()
    return hidden.grad, weight.grad


def liger_dpo(compiled: bool) -> Callable[[Problem], Gradients]:
    def step(p: Problem) -> Gradients:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        hidden, weight = p.leaves()
        loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compiled=compiled)
        rows = hidden.view(2 * PAIRS, -1, hidden.shape[1])
        loss(weight, rows, p.target.view(2 * PAIRS, -1))[0].backward()
        return hidden.grad, weight.grad

    return step


def liger_cross_entropy(p: Problem) -> Gradients:
    """A scalar mean loss: Liger's fused linear cross entropy takes no gradient per row without recomputing."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    hidden, weight = p.leaves()
    liger_fused_linear_cross_entropy(hidden, weight, p.target).backward()
    return hidden.grad, weight.grad


def providers(device: str) -> dict[str, tuple[Callable[[Problem], Gradients], str | None]]:
    """Name -> (step, whose gradients it must reproduce)."""
    out: dict[str, tuple[Callable[[Problem], Gradients], str | None]] = {
        "gemm_1": (gemms(1), None),
        "gemms_2": (gemms(2), None),
        "bare_gemms": (gemms(3), None),
        "no_grad": (fastpo("none"), None),
        "frozen_head": (fastpo("frozen"), "naive"),
        "budget_1GiB": (fastpo("trained", GIB), "naive"),
        "budget_default": (fastpo("trained"), "naive"),
        "budget_16MiB": (fastpo("trained", 16 << 20), "naive"),
        "budget_0": (fastpo("trained", 0), "naive"),
        "naive": (naive, None),
        "trl_chunked": (trl_chunked, "naive"),
        "fastpo_dpo": (fastpo_dpo, "naive_dpo"),
        "naive_dpo": (naive_dpo, None),
        "liger_dpo": (liger_dpo(True), "naive_dpo"),
        "liger_dpo_uncompiled": (liger_dpo(False), "naive_dpo"),
    }
    if device == "cuda":
        out["liger_cross_entropy"] = (liger_cross_entropy, None)
        out["cce_exact"] = (cut_cross_entropy("cce", None), "naive")
        out["cce_filtered"] = (cut_cross_entropy("cce", "high"), "naive")
    else:
        out["cce_torch_compile"] = (cut_cross_entropy("torch_compile", None), "naive")
    return out


def compare(ours: Gradients, theirs: Gradients) -> float:
    """The larger relative error (Frobenius) of the two gradients that both have."""
    pairs = [(a, b) for a, b in zip(ours, theirs) if a is not None and b is not None]
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)


def seconds(step: Callable[[Problem], Gradients], p: Problem) -> float:
    if p.hidden.is_cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        grads = step(p)
        end.record()
        del grads
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    grads = step(p)
    elapsed = time.perf_counter() - start
    del grads  # freed outside the timed part, on every side
    return elapsed


def peak_of(name: str, args: argparse.Namespace) -> int:
    """Peak bytes of one step over what was there before it; for a process of its own."""
    step = providers(args.device)[name][0]
    step(Problem.make(16, 64, 512, args.dtype, args.device))  # libraries, thread pools, compilers
    p = Problem.make(args.n, args.d, args.v, args.dtype, args.device)
    if "compile" in name or name == "liger_dpo":
        step(p)  # compiled for this shape
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(p)
        return torch.cuda.max_memory_allocated() - before
    before = common.reset_peak_memory()
    step(p)
    return common.peak_memory() - before


def peak_in_subprocess(name: str, args: argparse.Namespace) -> int | None:
    command = [sys.executable, __file__, "--memory-of", name, "--device", args.device, "--threads", str(args.threads)]
    command += ["--n", str(args.n), "--d", str(args.d), "--v", str(args.v), "--dtype", args.dtype_name]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def gate(chosen: dict, p: Problem, tolerance: float) -> tuple[dict, dict[str, str], dict[str, float]]:
    """The providers that run and agree with plain PyTorch, why the others do not, and the relative errors."""
    able, skipped, errors, references = {}, {}, {}, {}
    for name, (step, reference) in chosen.items():
        try:
            grads = step(p)
        except Exception as error:  # a peer may fail in any way; it is listed, not fatal
            skipped[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            continue
        if reference is not None:
            if reference not in references:
                references[reference] = providers(p.hidden.device.type)[reference][0](p)
            errors[name] = compare(grads, references[reference])
            if not errors[name] <= tolerance:
                skipped[name] = f"gradients differ from {reference} by {errors[name]:.1e}"
                if name.startswith(("frozen", "budget", "fastpo")):
                    raise SystemExit(f"{name}: {skipped[name]}")
                continue
        able[name] = step
    return able, skipped, errors


def table(rows: dict[str, dict], args: argparse.Namespace) -> str:
    tflop = 2 * args.n * args.d * args.v / 1e12
    lines = [
        f"N {args.n}, D {args.d}, V {args.v}, {args.dtype_name}, {args.device}: one GEMM is {tflop:.3f} TFLOP\n",
        "| provider | median ms | best ms | / bare GEMMs (median of rounds) | best / best | peak MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        if "skipped" in row:
            lines.append(f"| {name} | skipped: {row['skipped']} | | | | |")
            continue
        peak = "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 2**20:.0f}"
        ratios = [f"{row[key]:.3f}" if key in row else "" for key in ("ratio", "best_ratio")]
        lines.append(
            f"| {name} | {row['median_s'] * 1e3:.1f} | {row['best_s'] * 1e3:.1f} | {' | '.join(ratios)} | {peak} |"
        )
    return "\n".join(lines) + "\n"


def commit() -> str:
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=common.ROOT, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--n", type=int)
    parser.add_argument("--d", type=int)
    parser.add_argument("--v", type=int)
    parser.add_argument("--dtype", dest="dtype_name", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", help="providers to run")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    args.n, args.d, args.v = (
        args.n or (8192 if on_gpu else 1024),
        args.d or (4096 if on_gpu else 512),
        args.v or (128256 if on_gpu else 32000),
    )
    args.dtype_name = args.dtype_name or ("bfloat16" if on_gpu else "float32")
    args.dtype = getattr(torch, args.dtype_name)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(peak_of(args.memory_of, args))
        return

    chosen = {n: s for n, s in providers(args.device).items() if not args.only or n in args.only or n == "bare_gemms"}
    p = Problem.make(args.n, args.d, args.v, args.dtype, args.device)
    able, skipped, errors = gate(chosen, p, 1e-4 if args.dtype == torch.float32 else 3e-2)
    times: dict[str, list[float]] = {name: [] for name in able}
    for _ in range(args.rounds):
        for name, step in able.items():
            times[name].append(seconds(step, p))
    del p
    rows: dict[str, dict] = {}
    for name in chosen:
        if name in skipped:
            rows[name] = {"skipped": skipped[name]}
            continue
        ratios = [t / bare for t, bare in zip(times[name], times["bare_gemms"])]
        rows[name] = {
            "median_s": statistics.median(times[name]),
            "best_s": min(times[name]),
            "ratio": statistics.median(ratios),
            "best_ratio": min(times[name]) / min(times["bare_gemms"]),
            "relative_error": errors.get(name),
            "peak_bytes": None if args.no_memory else peak_in_subprocess(name, args),
            "times_s": times[name],
        }
    report = table(rows, args)
    print(report)
    if not args.no_write:
        size = {"n": args.n, "d": args.d, "v": args.v, "dtype": args.dtype_name, "threads": args.threads}
        result = {"environment": common.environment() | {"commit": commit()}, **size, "providers": rows}
        path = common.write_result(f"head_{args.dtype_name}_{args.n}x{args.d}x{args.v}", result, report)
        print(json.dumps({"written": str(path)}))


if __name__ == "__main__":
    main()
