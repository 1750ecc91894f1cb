"""The floor of the head op: FLOPs and least bytes of each regime, and the time that this machine needs for them.

    python bench/roofline.py [--shape N,D,V] [--dtype float32] [--device cpu]     # this machine's rates and floors

N = head rows, D = hidden, V = vocabulary, 2 N D V FLOPs one GEMM. A regime's least traffic is each operand read once
per use that cannot share it, each result written once:

regime   GEMMs   bytes beside the [N] vectors
none     1       X and W read
frozen   2       X and W read, dX written
kept     3       X and W read, dX and dW written, the N x V matrix written by the forward and read by the backward
sliced   4       X and W read twice, dX and dW written

floor = max(FLOPs / GEMM rate, bytes / copy bandwidth): work that overlaps perfectly. The rate is that of the three
products logits = X W^T, dX = logits W, dW = logits^T X at the row's own shape and dtype, into outputs that exist; the
bandwidth is that of a copy, read and write both counted. Both are measured in the rounds of the run they judge.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

GEMMS = {"none": 1, "frozen": 2, "kept": 3, "sliced": 4}
COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # past every cache
SPINS_S = (0.002, 0.01, 0.05)  # tried in turn; launching a step takes the CPU a millisecond or a few


def flops(regime: str, n: int, d: int, v: int) -> int:
    return GEMMS[regime] * 2 * n * d * v


def least_bytes(regime: str, n: int, d: int, v: int, itemsize: int) -> int:
    """Bytes that have to move between the processor and its memory; the target [N] and results [N] with them."""
    x, w, vectors = n * d * itemsize, v * d * itemsize, n * (8 + 4)
    return (
        vectors
        + {
            "none": x + w,
            "frozen": 2 * x + w,
            "kept": 2 * (x + w) + 2 * n * v * itemsize,
            "sliced": 3 * (x + w),
        }[regime]
    )


def timed(step: Callable[[], object], device: str, repeats: int = 1) -> tuple[float, bool]:
    """(seconds of one call, whether its launches were queued); what the call returns is freed outside the timed part.

    On a GPU the stream spins while the CPU launches the work, so that a kernel shorter than its own launch is timed and
    not the launch. The spin grows until the work is queued before it ends; work that waits for the device inside never
    is, and then the CPU's time is in the figure (False).
    """
    if device != "cuda":
        start = time.perf_counter()
        out = [step() for _ in range(repeats)]
        elapsed = time.perf_counter() - start
        del out
        return elapsed / repeats, True
    for spin in SPINS_S:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(int(spin * spin_rate()))
        begin.record()
        for _ in range(repeats):
            out = step()
        end.record()
        queued = not begin.query()  # the stream still spins
        torch.cuda.synchronize()
        del out
        if queued:
            break
    return begin.elapsed_time(end) / 1e3 / repeats, queued


def seconds(step: Callable[[], object], device: str) -> float:
    """One call, timed as `timed` does it."""
    return timed(step, device)[0]


@functools.cache
def spin_rate() -> float:
    """Cycles of torch.cuda._sleep a second on this GPU: it counts clock cycles, whose rate the second call measures."""
    for _ in range(2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.cuda._sleep(10_000_000)
        end.record()
        torch.cuda.synchronize()
    return 10_000_000 / (begin.elapsed_time(end) / 1e3)


@dataclass
class Machine:
    """Rates measured beside the rounds of one shape; every sample is kept."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    gemm_s: list[float] = field(default_factory=list)  # the three products together
    copy_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        device = self.hidden.device.type
        size = COPY_BYTES[device] if self.weight.nbytes > 1 << 20 else 1 << 20  # a tiny problem is a test of this code
        self._source = torch.ones(size // 4, dtype=torch.float32, device=device)
        self._sink = torch.empty_like(self._source)

    def sample(self) -> None:
        x, w = self.hidden, self.weight
        logits, dx, dw = x.new_empty(len(x), len(w)), torch.empty_like(x), torch.empty_like(w)
        for out in (logits, dx, dw):
            out.zero_()  # its pages exist before the clock starts

        def products() -> None:
            torch.mm(x, w.t(), out=logits)
            torch.mm(logits, w, out=dx)
            torch.mm(logits.t(), x, out=dw)

        self.gemm_s.append(seconds(products, x.device.type))
        self._sink.copy_(self._source)
        self.copy_s.append(seconds(lambda: self._sink.copy_(self._source), x.device.type))

    @property
    def gemm_rate(self) -> float:
        """FLOP/s, median."""
        return 6 * self.hidden.numel() * len(self.weight) / statistics.median(self.gemm_s)

    @property
    def bandwidth(self) -> float:
        """Bytes/s, median."""
        return 2 * self._source.nbytes / statistics.median(self.copy_s)

    def floor(self, regime: str) -> dict[str, float]:
        """{"flops", "bytes", "flops_s", "bytes_s", "floor_s"} of one regime at this shape and dtype."""
        shape = (*self.hidden.shape, len(self.weight))
        work, traffic = flops(regime, *shape), least_bytes(regime, *shape, self.hidden.itemsize)
        times = {"flops_s": work / self.gemm_rate, "bytes_s": traffic / self.bandwidth}
        return {"flops": work, "bytes": traffic, **times, "floor_s": max(times.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1024,512,32000", help="N,D,V")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    n, d, v = map(int, args.shape.split(","))
    dtype = getattr(torch, args.dtype)
    machine = Machine(*(torch.randn(rows, d, device=args.device).to(dtype) for rows in (n, v)))
    for _ in range(args.rounds):
        machine.sample()
    print(f"GEMM {machine.gemm_rate / 1e12:.3f} TFLOP/s in {args.dtype}, copy {machine.bandwidth / 1e9:.1f} GB/s")
    for regime in GEMMS:
        f = machine.floor(regime)
        print(
            f"{regime:7} {f['flops'] / 1e12:8.3f} TFLOP {f['flops_s'] * 1e3:9.2f} ms   "
            f"{f['bytes'] / 1e9:8.3f} GB {f['bytes_s'] * 1e3:9.2f} ms   floor {f['floor_s'] * 1e3:9.2f} ms"
        )


if __name__ == "__main__":
    main()
