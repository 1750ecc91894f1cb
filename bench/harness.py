"""Runs providers (peers.py) on one shape: outputs against fp64, then interleaved timing, then one row each.

A provider's outputs are checked in full before it is timed: one that is wrong is listed with its error and not timed.
Timing goes in rounds, every provider once a round in a seeded random order, because a shared machine drifts: ratios are
taken within a round, medians over rounds. A provider that took over three times the bare GEMMs once, or over twice
twice, is timed no more: that settles it. Peak memory is that of the untimed step that is checked, over what was there
when it began (resident size on a CPU after glibc has handed back what is free, the allocator's peak on a GPU). On a GPU
a step is queued behind a spin before the clock starts (roofline.py), so that the time of its launches is not in it.

The rounds are ours and the file is pytest-benchmark's. Its runner times one function to the end before the next begins,
which puts a drifting machine into the ratios; its JSON is what `pytest-benchmark compare` and other tools read.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent))
import common  # noqa: E402
import peers  # noqa: E402
import roofline  # noqa: E402
from peers import PROVIDERS, Outputs, Problem  # noqa: E402

from fastpo import check  # noqa: E402

COLUMNS = ("provider", "job", "p20 ms", "p50 ms", "p80 ms", "/ 3 GEMMs", "/ floor", "TFLOP/s", "GB/s", "peak MiB",
           "error", "/ naive")  # fmt: skip
VERDICTS = {True: "met", False: "MISSED", None: "also"}
RESULT_KEYS = ("shape", "dtype", "device", "seed", "threads", "rounds", "rates")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXACT_BLOCK = 1 << 26  # elements of a block of fp64 logits
# A peer's error relative to the exact output beyond which it counts as wrong, not as imprecise; ours is held to the
# criterion of fastpo.check instead.
WRONG = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


class Exact:
    """Log-probabilities and gradients of one problem in fp64, in blocks."""

    def __init__(self, p: Problem):
        self.p, self.hidden, self.weight = p, p.hidden.double(), p.weight.double()
        n, _, v = p.shape
        self.lse = self.hidden.new_empty(n)
        self.logp = torch.empty_like(self.lse)
        self.unit = torch.empty_like(self.hidden)  # (onehot - P) W: dhidden for an upstream of 1
        self.largest_logit = 0.0
        rows = max(1, EXACT_BLOCK // v)
        for begin in range(0, n, rows):
            r = slice(begin, begin + rows)
            logits = self.hidden[r] @ self.weight.t()
            self.largest_logit = max(self.largest_logit, logits.abs().max().item())
            self.lse[r] = logits.logsumexp(1)
            self.logp[r] = logits.gather(1, p.target[r].unsqueeze(1)).squeeze(1) - self.lse[r]
            self.unit[r] = self.weight[p.target[r]] - (logits - self.lse[r].unsqueeze(1)).exp_() @ self.weight

    def outputs(self, job: str) -> Outputs:
        """What a provider of `job` has to return."""
        if job == "none":
            return {"logp": self.logp}
        if job == "entropy":
            return self._with_entropy()
        values, c = {"logp": self.logp}, self.upstream(job)
        if job == "sum":
            values = {"loss": -self.logp.sum()}
        elif job in ("dpo", "simpo"):
            values = {"loss": peers.pair_loss(self.logp, job)}
        values["dhidden"] = self.unit * c.unsqueeze(1)
        if job != "frozen":
            values["dweight"] = self._dweight(c)
        return values

    def _with_entropy(self) -> Outputs:
        """`outputs` of the job that has a gradient for the entropy too."""
        n, _, v = self.p.shape
        c, h = self.upstream("entropy"), self.upstream("entropy").flip(0)
        entropy, dhidden, dweight = torch.empty_like(self.lse), self.unit * c.unsqueeze(1), self._dweight(c)
        rows = max(1, EXACT_BLOCK // v)
        for begin in range(0, n, rows):
            r = slice(begin, begin + rows)
            logps = self.hidden[r] @ self.weight.t() - self.lse[r].unsqueeze(1)
            terms = logps.exp() * logps
            entropy[r] = -terms.sum(1)
            u = terms.addcmul_(logps.exp_(), entropy[r].unsqueeze(1)).mul_(-h[r].unsqueeze(1))
            dhidden[r] += u @ self.weight
            dweight += u.t() @ self.hidden[r]
        return {"logp": self.logp, "entropy": entropy, "dhidden": dhidden, "dweight": dweight}

    def upstream(self, job: str) -> Tensor:
        """The gradient [N] that each row's log-probability gets in this job."""
        if job == "sum":
            return torch.full_like(self.lse, -1.0)
        if job in ("dpo", "simpo"):
            logp = self.logp.clone().requires_grad_()
            return torch.autograd.grad(peers.pair_loss(logp, job), logp)[0]
        return self.p.upstream.double()

    def _dweight(self, c: Tensor) -> Tensor:
        n, _, v = self.p.shape
        cx, out = self.hidden * c.unsqueeze(1), torch.empty_like(self.weight)
        columns = max(1, EXACT_BLOCK // n)
        for begin in range(0, v, columns):
            s = slice(begin, min(begin + columns, v))
            p = (self.hidden @ self.weight[s].t() - self.lse.unsqueeze(1)).exp_()
            torch.mm(p.t(), cx, out=out[s])
        return out.neg_().index_add_(0, self.p.target, cx)


def relative_errors(ours: Outputs, exact: Outputs) -> dict[str, float]:
    """|ours - exact| / |exact|, Frobenius norms; NaN where an output is missing, misshapen or not finite."""
    out = {}
    for name, want in exact.items():
        got = ours.get(name)
        if got is None or got.shape != want.shape:
            out[name] = math.nan
        else:
            out[name] = (_distance(got, want) / want.norm()).item()
    return out


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| without an fp64 copy of the whole of a."""
    if a.dim() < 2:
        return (a.double() - b).norm()
    step = max(1, EXACT_BLOCK // 4 // a.shape[1])
    return torch.stack([(x.double() - y).norm() for x, y in zip(a.split(step), b.split(step))]).norm()


def _over_criterion(ours: Outputs, naive: Outputs, want: Outputs, exact: Exact, job: str) -> float:
    """The project's criterion (fastpo.check): the worst output's error over what it is allowed; NaN if not finite."""
    operands = {"dhidden": check._rms(exact.weight) * check._rms(exact.upstream(job))}
    worst = 0.0
    for name, x in want.items():
        error, allowed = check.budgeted_error(ours[name], naive[name], x, exact.largest_logit, operands.get(name))
        worst = max(worst, error / allowed if allowed else math.inf, key=lambda x: math.inf if math.isnan(x) else x)
    return worst


def gate(names: Iterable[str], p: Problem, device: str, memory: bool = True) -> dict[str, dict]:
    """name -> {"status": ok, wrong, failed or skipped, "reason", "errors", "over_naive", "peak_bytes"}."""
    rows: dict[str, dict] = {}
    names = list(names)
    exact = Exact(p)
    for job in dict.fromkeys(PROVIDERS[name].job for name in names):
        want = None if job == "gemms" else exact.outputs(job)
        naive = None if want is None else peers.naive(job)(p)
        for name in (n for n in names if PROVIDERS[n].job == job):
            rows[name] = _gate_one(name, p, device, want, naive, exact, memory)
    return {name: rows[name] for name in names}


def _gate_one(
    name: str,
    p: Problem,
    device: str,
    want: Outputs | None,
    naive: Outputs | None,
    exact: Exact,
    memory: bool,
) -> dict:
    provider = PROVIDERS[name]
    reason = provider.unavailable(device)
    if reason is not None:
        return {"status": "skipped", "reason": reason}
    tiny = Problem.make(2 * peers.PAIRS, p.shape[1], 64, p.hidden.dtype, device)
    try:
        # Imports, thread pools and handles are not a step's memory; nor is a compiler, which works per shape.
        provider.step(p if provider.compiles else tiny)
        ours, peak = with_peak(provider.step, p) if memory else (provider.step(p), None)
    except Exception as error:  # a peer may fail in any way; it is listed, not fatal
        return {"status": "failed", "reason": _words(error)}
    if want is None:
        return {"status": "ok", "peak_bytes": peak}
    errors, base = relative_errors(ours, want), relative_errors(naive, want)
    # A scalar's error is one draw, whose ratio to another draw says nothing.
    tensors = [k for k in errors if want[k].dim() and base[k] > 0]
    row = {"status": "ok", "errors": errors, "peak_bytes": peak}
    row["over_naive"] = {k: errors[k] / base[k] for k in tensors}
    if name.startswith("fastpo"):
        row["over_criterion"] = _over_criterion(ours, naive, want, exact, provider.job)
        wrong = not row["over_criterion"] <= 1.0
    else:
        wrong = not all(error <= WRONG[p.hidden.dtype] for error in errors.values())
    if wrong:
        worst = max(errors, key=lambda k: math.inf if math.isnan(errors[k]) else errors[k])
        row |= {
            "status": "wrong",
            "reason": f"{worst} is off by {errors[worst]:.1e}, plain PyTorch by {base[worst]:.1e}",
        }
    return row


def with_peak(step: Callable[[Problem], Outputs], p: Problem) -> tuple[Outputs, int | None]:
    """One step's outputs, and its peak bytes over what was there before it; None where /proc does not tell."""
    if p.hidden.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = step(p)
        torch.cuda.synchronize()
        return out, torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        before = common.reset_peak_memory()
    except (OSError, AttributeError):  # another C library than glibc, another system than Linux, or no permission
        return step(p), None
    out = step(p)
    return out, common.peak_memory() - before


def rounds_of(
    names: list[str], p: Problem, machine: roofline.Machine, *, rounds: int, seconds: float, seed: int
) -> tuple[dict[str, list[float]], dict[str, str], set[str]]:
    """(name -> seconds per round, name -> what it failed with, those whose launches the GPU had to wait for); two
    rounds of all, one of those that are left, then until `rounds` are done or `seconds` are spent on them."""
    device, order, begin = p.hidden.device.type, random.Random(seed), time.perf_counter()
    times: dict[str, list[float]] = {name: [] for name in names}
    racing, failed, waited = list(names), {}, set()
    for done in range(rounds):
        if done >= min(3, rounds) and time.perf_counter() - begin > seconds:
            break
        machine.sample()
        for name in order.sample(racing, len(racing)):
            try:
                taken, queued = roofline.timed(lambda step=PROVIDERS[name].step: step(p), device)
                times[name].append(taken)
                waited |= set() if queued else {name}
            except Exception as error:
                failed[name] = _words(error)
                racing.remove(name)
        limit = {0: 3, 1: 2}.get(done, math.inf) * min(times["gemms_3"])
        racing = [name for name in racing if min(times[name]) < limit or name.startswith("fastpo")]
        if done == 1:
            begin = time.perf_counter()
    return {name: taken for name, taken in times.items() if name not in failed}, failed, waited


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def quantile(values: list[float], q: float) -> float:
    values = sorted(values)
    at = q * (len(values) - 1)
    low = math.floor(at)
    return values[low] + (values[min(low + 1, len(values) - 1)] - values[low]) * (at - low)


def measure(
    shape: tuple[int, int, int],
    names: Iterable[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    rounds: int = 9,
    seconds: float = 60.0,
    memory: bool = True,
    seed: int = 0,
) -> dict:
    """One shape: {"rows": {name: row}} and the keys of RESULT_KEYS."""
    names = list(dict.fromkeys(["gemms_3", *names]))
    p = Problem.make(*shape, dtype, device, seed)
    rows = gate(names, p, device, memory)
    able = [name for name in names if rows[name]["status"] == "ok"]
    machine = roofline.Machine(p.hidden, p.weight)
    times, failed, waited = rounds_of(able, p, machine, rounds=rounds, seconds=seconds, seed=seed)
    for name in names:
        provider, row = PROVIDERS[name], rows[name]
        if name in failed:
            row |= {"status": "failed", "reason": failed[name]}
        row |= {"job": provider.job, "regime": provider.regime, "level": provider.level}
        if name not in times:
            continue
        taken, floor = times[name], machine.floor(provider.regime)
        ratios = [t / bare for t, bare in zip(taken, times["gemms_3"])]
        # Useful work: what the job needs at least, whatever a provider recomputes.
        needed = {"none": "none", "frozen": "frozen"}.get(provider.job, "kept")
        needed = provider.regime if provider.job == "gemms" else needed
        p50 = statistics.median(taken)
        row |= {
            "p20_s": quantile(taken, 0.2),
            "p50_s": p50,
            "p80_s": quantile(taken, 0.8),
            "over_gemms": statistics.median(ratios),
            "best_over_gemms": min(taken) / min(times["gemms_3"]),
            "tflops": roofline.flops(needed, *shape) / p50 / 1e12,
            "gbps": floor["bytes"] / p50 / 1e9,
            "floor_s": floor["floor_s"],
            # Both within a round: the floor's rate drifts with the machine as the provider does.
            "over_floor": _over_floor(taken, machine, provider.regime),
            "queued": name not in waited,  # else the CPU's launches are in the time, in a round at least
            "times_s": taken,
        }
    rates = {"gemm_flops_per_s": machine.gemm_rate, "copy_bytes_per_s": machine.bandwidth}
    return {
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "rounds": len(machine.gemm_s),
        "rates": rates | {"gemm_s": machine.gemm_s, "copy_s": machine.copy_s},
        "rows": rows,
    }


def _over_floor(taken: list[float], machine: roofline.Machine, regime: str) -> float:
    floor = machine.floor(regime)
    by_flops = floor["flops_s"] >= floor["bytes_s"]
    beside = machine.gemm_s if by_flops else machine.copy_s
    scale = floor["floor_s"] / statistics.median(beside)
    return statistics.median(t / (scale * b) for t, b in zip(taken, beside))


def table(result: dict) -> str:
    """Markdown of one shape."""
    n, d, v = result["shape"]
    rates = result["rates"]
    lines = [
        f"N {n}, D {d}, V {v}, {result['dtype']}, {result['device']}, {result['threads']} threads: one GEMM is "
        f"{2 * n * d * v / 1e12:.3f} TFLOP; GEMMs run at {rates['gemm_flops_per_s'] / 1e12:.3g} TFLOP/s, a copy at "
        f"{rates['copy_bytes_per_s'] / 1e9:.3g} GB/s; {result['rounds']} rounds, seed {result['seed']}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
    ]
    for name, row in result["rows"].items():
        if "p50_s" not in row:
            lines.append(f"| {name} | {row['job']} | {row['status']}: {row['reason']} |" + " |" * (len(COLUMNS) - 3))
            continue
        errors, peak = row.get("errors", {}), row.get("peak_bytes")
        worst = max(row.get("over_naive", {"": 0.0}).values())
        cells = [
            name, row["job"], *(f"{row[q] * 1e3:.1f}" for q in ("p20_s", "p50_s", "p80_s")),
            f"{row['over_gemms']:.3f}", f"{row['over_floor']:.3f}", f"{row['tflops']:.3g}", f"{row['gbps']:.3g}",
            "" if peak is None else f"{peak / 2**20:.0f}",
            f"{max(errors.values()):.1e}" if errors else "", f"{worst:.2f}" if errors else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def pytest_benchmark_json(results: list[dict], group: str) -> dict:
    """The results in the format of pytest-benchmark 5 (`pytest-benchmark compare FILE`)."""
    environment = common.environment()
    benchmarks = []
    for result in results:
        label = "x".join(map(str, result["shape"]))
        about = {k: result[k] for k in RESULT_KEYS}
        for name, row in result["rows"].items():
            if "times_s" not in row:
                continue
            full = f"{name}[{label}-{result['dtype']}]"
            benchmarks.append(
                {
                    "group": f"{group} {label} {result['dtype']}",
                    "name": full,
                    "fullname": f"bench/bench_{group}.py::{full}",
                    "params": {"provider": name, "shape": label, "dtype": result["dtype"]},
                    "param": f"{label}-{result['dtype']}",
                    "extra_info": about | {k: x for k, x in row.items() if k != "times_s"},
                    "options": {"disable_gc": False, "timer": "perf_counter", "min_rounds": 3, "warmup": True},
                    "stats": _stats(row["times_s"]),
                }
            )
    skipped = [
        {k: r[k] for k in RESULT_KEYS} | {"provider": name, "row": row}
        for r in results
        for name, row in r["rows"].items()
        if "times_s" not in row
    ]
    return {
        "machine_info": environment,
        "commit_info": {"id": environment["commit"], "dirty": environment["dirty"], "branch": environment["branch"]},
        "benchmarks": benchmarks,
        "not_timed": skipped,
        "datetime": datetime.datetime.now(datetime.UTC).isoformat(),
        "version": "5.1.0",
    }


def _stats(times: list[float]) -> dict:
    """pytest-benchmark's fields."""
    q1, median, q3 = (quantile(times, q) for q in (0.25, 0.5, 0.75))
    mean, spread = statistics.fmean(times), statistics.pstdev(times)
    low, high = q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)
    far = sum(not low <= t <= high for t in times)
    wide = sum(abs(t - mean) > spread for t in times)
    return {
        "min": min(times), "max": max(times), "mean": mean, "stddev": spread, "rounds": len(times), "median": median,
        "iqr": q3 - q1, "q1": q1, "q3": q3, "iqr_outliers": far, "stddev_outliers": wide, "outliers": f"{wide};{far}",
        "ld15iqr": min(t for t in times if t >= low), "hd15iqr": max(t for t in times if t <= high),
        "ops": 1 / mean, "total": sum(times), "iterations": 1, "data": times,
    }  # fmt: skip


def write(results: list[dict], group: str, folder: Path | None = None) -> Path:
    """<folder or bench/results/<machine>>/<group>.json."""
    folder = folder or common.ROOT / "bench" / "results" / common.machine_name()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{group}.json"
    path.write_text(json.dumps(pytest_benchmark_json(results, group), indent=1) + "\n")
    return path


def read(path: Path) -> list[dict]:
    """The results in a file that `write` wrote, as `measure` returned them."""
    data = json.loads(path.read_text())
    results: dict[tuple, dict] = {}

    def result_of(info: dict) -> dict:
        key = (*info["shape"], info["dtype"], info["device"])
        return results.setdefault(key, {k: info[k] for k in RESULT_KEYS} | {"rows": {}})

    for item in data["not_timed"]:
        result_of(item)["rows"][item["provider"]] = item["row"]
    for item in data["benchmarks"]:
        info = item["extra_info"]
        row = {k: x for k, x in info.items() if k not in RESULT_KEYS} | {"times_s": item["stats"]["data"]}
        result_of(info)["rows"][item["params"]["provider"]] = row
    for result in results.values():
        order = [name for name in PROVIDERS if name in result["rows"]]
        result["rows"] = {name: result["rows"][name] for name in order}
    return list(results.values())


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that bench_ops.py and bench_losses.py share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", type=parse_shape, help="N,D,V; may be repeated")
    parser.add_argument("--provider", nargs="+", help="these only; the bare GEMMs always")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES))
    parser.add_argument("--rounds", type=int, help="at most; default 9, with --quick 3")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="of timing per shape, after two rounds; the third is always done"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="small shapes: does everything run?")
    parser.add_argument("--no-compile", action="store_true", help="leave out those whose first call compiles")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path, help="folder of the JSON; default bench/results/<machine>")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--list", action="store_true", help="the providers, and why those that cannot run cannot")
    return parser


def run(
    args: argparse.Namespace,
    shapes: list[tuple[int, int, int]],
    names: list[str],
    group: str,
    verdict: Callable[[dict], list[tuple[bool | None, str]]] | None = None,
) -> int:
    """Measure, print and write; 1 where an op of ours is wrong or fails, or a promise of `verdict` is missed."""
    if args.list:
        for name, provider in PROVIDERS.items():
            print(f"{name:18} {provider.job:7} {provider.regime:7} {provider.unavailable(args.device) or ''}".rstrip())
        return 0
    unknown = [name for name in args.provider or [] if name not in PROVIDERS]
    if unknown:
        raise SystemExit(f"unknown provider {unknown[0]!r}; one of {', '.join(PROVIDERS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda was asked for, but torch.cuda.is_available() is False")
    torch.set_num_threads(args.threads)
    dtype = DTYPES[args.dtype or ("float32" if args.device == "cpu" else "bfloat16")]
    rounds = args.rounds or (3 if args.quick else 9)
    wanted = [x for x in args.provider or names if not (args.no_compile and PROVIDERS[x].compiles)]
    results, met = [], True
    for shape in args.shape or shapes:
        begin = time.perf_counter()
        result = measure(
            shape, wanted, dtype=dtype, device=args.device, rounds=rounds, seconds=args.seconds,
            memory=not args.no_memory, seed=args.seed,
        )  # fmt: skip
        results.append(result)
        print(table(result))
        met &= all(row["status"] == "ok" for name, row in result["rows"].items() if name.startswith("fastpo"))
        for good, sentence in verdict(result) if verdict else []:
            met &= good is not False
            print(f"{VERDICTS[good]:6} {sentence}")
        print(f"({time.perf_counter() - begin:.0f} s)\n", flush=True)
        if not args.no_write:  # after every shape: what is cut short is not lost
            path = write(results, group, args.out)
    if not args.no_write:
        print(f"written: {path}")
    return 0 if met else 1


def parse_shape(text: str) -> tuple[int, int, int]:
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise SystemExit(f"--shape takes N,D,V, for example 1024,512,32000, not {text!r}")
    n, d, v = map(int, parts)
    return n, d, v
