"""The certified gradient filter: time against the probability mass that the backward leaves out, and the error of that.

    python bench/grad_filter_rows.py /tmp/rows.pt                        # once: rows of a model trained on real text
    python bench/grad_filter.py /tmp/rows.pt --case 2.0                  # its logits times 2.0
    python bench/grad_filter.py /tmp/rows.pt --case flat                 # a uniform distribution: the worst case

Every case is written into the one result file, beside those that it holds already. The small model's distributions are
flatter than a large one's: `--case` multiplies its logits, and the table says what entropy that makes. Its hidden size
(128) is turned into D by a random rotation, which leaves every logit as it is.

Times are the best of the rounds, forward and backward, of one process in which the budgets take turns; budget 0 is the
op without a filter. Regimes: `kept` trains the head with room for N x V, `sliced` without, `frozen` does not train it.
Errors are relative to the exact gradient in fp64, in the Frobenius norm, of the kept regime.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent))
import common  # noqa: E402

from fastpo import ops  # noqa: E402
from fastpo.ops import grad_filter  # noqa: E402
from fastpo.ops.inputs import choose_backend  # noqa: E402

BUDGETS = (0.0, 1e-4, 1e-3, 1e-2, 5e-2)
REGIMES = {"kept": (True, None), "sliced": (True, 0), "frozen": (False, None)}
LAYOUT_BUDGET = 1e-3
CCE_EPS = 2.0**-12  # cut-cross-entropy's threshold for bf16, on blocks of 128 x 128 logits


def problem(args: argparse.Namespace) -> tuple[dict[str, Tensor], float]:
    """hidden [N, D], weight [V, D], target and upstream [N]; the factor on the logits."""
    torch.manual_seed(0)
    rows = torch.load(args.rows)
    basis = torch.linalg.qr(torch.randn(args.d, rows["hidden"].shape[1]))[0].t()
    hidden = rows["hidden"][: args.n]
    if args.case == "flat":
        hidden = torch.zeros_like(hidden)
    x = {"hidden": hidden @ basis, "weight": rows["weight"] @ basis}
    x = {name: t.to(args.dtype).contiguous() for name, t in x.items()}
    x |= {"target": rows["target"][: args.n], "upstream": torch.randn(args.n)}
    return x, 1.0 if args.case == "flat" else float(args.case)


def step(x: dict[str, Tensor], scale: float, budget: float, trained: bool, memory: int | None) -> dict:
    """One forward and backward: seconds of each, the gradients, the mass that each row lost."""
    hidden, weight = x["hidden"].detach().requires_grad_(), x["weight"].detach().requires_grad_(trained)
    start = time.perf_counter()
    logp, dropped = ops.linear_logprob(
        hidden, weight, x["target"], logit_scale=scale, memory_budget=memory, grad_filter=budget, return_dropped=True
    )
    between = time.perf_counter()
    logp.backward(x["upstream"])
    end = time.perf_counter()
    return {"forward": between - start, "backward": end - between, "dropped": dropped,
            "dhidden": hidden.grad, "dweight": weight.grad}  # fmt: skip


def probabilities(x: dict[str, Tensor], scale: float) -> Tensor:
    return (scale * (x["hidden"].double() @ x["weight"].double().t())).softmax(1)


def exact(x: dict[str, Tensor], scale: float, p: Tensor) -> dict[str, Tensor]:
    """The gradients in fp64."""
    u = p.neg().scatter_add(1, x["target"].unsqueeze(1), torch.ones(len(p), 1, dtype=p.dtype))
    c = scale * x["upstream"].double().unsqueeze(1)
    return {"dhidden": c * (u @ x["weight"].double()), "dweight": u.t() @ (c * x["hidden"].double())}


def relative(ours: Tensor, wanted: Tensor) -> float:
    """nan where the exact gradient is 0."""
    return ((ours.double() - wanted).norm() / wanted.norm()).item()


def kept_share(x: dict[str, Tensor], scale: float, budget: float) -> float:
    head = ops.Head(x["hidden"], x["weight"], x["target"], None, None, scale)
    compiled = choose_backend("auto", x["hidden"]) == "cpu"
    return grad_filter.forward(head, budget, False, False, compiled).keep.float().mean().item() if budget else 1.0


def cce_rule(p: Tensor, x: dict[str, Tensor], eps: float = CCE_EPS, block: int = 128) -> dict[str, float]:
    """What Cut Cross-Entropy's rule would drop of the same rows: blocks where every |onehot - p| is below eps, columns
    in the order of their mean logit."""
    order = (x["weight"].float() @ x["hidden"].float().mean(0)).argsort(descending=True)
    u = p.scatter_add(1, x["target"].unsqueeze(1), -torch.ones(len(p), 1, dtype=p.dtype)).abs()[:, order]
    n, v = len(p) // block * block, p.shape[1] // block * block
    blocks = u[:n, :v].view(n // block, block, v // block, block)
    skip = blocks.amax((1, 3)) < eps  # [row blocks, column blocks]
    lost = (blocks.sum(3) * skip.unsqueeze(1)).sum(2)
    return {"skipped": skip.double().mean().item(), "mean": lost.mean().item(), "max": lost.max().item()}


def layouts(p: Tensor, x: dict[str, Tensor], mass: float) -> dict[str, float]:
    """Share of tiles that stay when rows have lists of their own (1), or blocks of rows decide together, sorted by
    their entropy; with the vocabulary as it is, or by mean logit; by the width of a tile."""
    by_mean = (x["weight"].float() @ x["hidden"].float().mean(0)).argsort(descending=True)
    sorted_rows = torch.special.entr(p).sum(1).argsort()
    out = {}
    for order_name, order in (("ids", torch.arange(p.shape[1])), ("mean logit", by_mean)):
        at = torch.empty_like(order)
        at[order] = torch.arange(len(order))
        for width in (256, 512, 1024):
            q = torch.nn.functional.pad(p[:, order], (0, -p.shape[1] % width))
            shares = q.view(len(q), -1, width).sum(2)
            shares.scatter_(1, (at[x["target"]] // width).unsqueeze(1), torch.inf)
            for rows in (1, 64, 256):
                blocks = shares[sorted_rows].split(rows)
                kept = sum(block_keeps(b, mass) for b in blocks) / (len(blocks) * shares.shape[1])
                out[f"rows {rows}, {order_name}, {width} columns"] = kept
    return out


def block_keeps(shares: Tensor, mass: float) -> int:
    """Tiles that a block of rows keeps: given up in the order of their worst row, while no row loses more than mass."""
    lost, skipped = shares.new_zeros(len(shares)), 0
    for t in shares.amax(0).argsort().tolist():
        if shares[:, t].amax() > mass:
            break
        if (lost + shares[:, t] <= mass).all():
            lost += shares[:, t]
            skipped += 1
    return shares.shape[1] - skipped


def measure(args: argparse.Namespace) -> dict:
    x, scale = problem(args)
    p = probabilities(x, scale)
    wanted = exact(x, scale, p)
    entropy = torch.special.entr(p).sum(1)
    quantiles = {f"p{q}": entropy.quantile(q / 100).item() for q in (10, 50, 90)}
    case: dict = {"entropy": {"mean": entropy.mean().item(), **quantiles}, "cce_rule": cce_rule(p, x), "budgets": {}}
    case["layouts"] = layouts(p.float(), x, LAYOUT_BUDGET)
    del p
    for budget in BUDGETS:
        out = step(x, scale, budget, True, None)
        assert out["dropped"].max() <= budget, (budget, out["dropped"].max())
        case["budgets"][str(budget)] = {
            "dropped_mean": out["dropped"].mean().item(), "dropped_max": out["dropped"].max().item(),
            "tiles_skipped": 1 - kept_share(x, scale, budget),
            **{f"{name}_error": relative(out[name], wanted[name]) for name in wanted},
        }  # fmt: skip
    del wanted, out
    times: dict = {(b, r): [] for b in BUDGETS for r in REGIMES}
    for _ in range(args.rounds):
        for budget, regime in times:
            out = step(x, scale, budget, *REGIMES[regime])
            times[budget, regime].append((out["forward"], out["backward"]))
    for (budget, regime), runs in times.items():
        totals = [f + b for f, b in runs]
        case["budgets"][str(budget)][regime] = {
            "forward_s": min(f for f, _ in runs), "backward_s": min(b for _, b in runs),
            "total_s": min(totals), "median_total_s": statistics.median(totals), "runs_s": runs,
        }  # fmt: skip
    return case


def table(result: dict) -> str:
    size = f"N {result['n']}, D {result['d']}, V {result['v']}, {result['threads']} threads"
    lines = [
        f"{size}; tiles of {result['tile_columns']} columns. Time: ms of forward + backward, and over the op without a "
        "filter (backward alone in brackets).\n",
        "| rows: factor, dtype, mean entropy | budget | mass dropped, mean | max | tiles skipped | kept | sliced | "
        "frozen | dX error | dW error |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, case in result["cases"].items():
        base = case["budgets"]["0.0"]
        for budget, row in case["budgets"].items():
            cells = []
            for regime in REGIMES:
                total, zero = row[regime]["total_s"], base[regime]["total_s"]
                bracket = ""
                if regime != "frozen" and row is not base:  # a frozen head's exact backward is in its forward
                    bracket = f" ({row[regime]['backward_s'] / base[regime]['backward_s']:.2f})"
                cells.append(f"{total * 1e3:.0f}" + (f": {total / zero:.2f}{bracket}" if row is not base else ""))
            errors = [f"{row[k]:.1e}" if row[k] == row[k] else "-" for k in ("dhidden_error", "dweight_error")]
            lines.append(
                f"| {name}, {case['entropy']['mean']:.1f} nats | {float(budget):g} | {row['dropped_mean']:.1e} | "
                f"{row['dropped_max']:.1e} | {row['tiles_skipped']:.1%} | {' | '.join(cells)} | {' | '.join(errors)} |"
            )
    lines += ["", f"The rule of Cut Cross-Entropy on the same rows (every |onehot - p| of a block of 128 x 128 below "
              f"{CCE_EPS:.2g}, columns by mean logit), computed in fp64, not timed:\n",
              "| rows | blocks skipped | mass dropped, mean | max |", "| --- | ---: | ---: | ---: |"]  # fmt: skip
    for name, case in result["cases"].items():
        rule = case["cce_rule"]
        lines.append(f"| {name} | {rule['skipped']:.1%} | {rule['mean']:.1e} | {rule['max']:.1e} |")
    names = [name for name, case in result["cases"].items() if "float32" in name and "layouts" in case]
    if names:
        lines += ["", f"Tiles that would stay under a budget of {LAYOUT_BUDGET:g}, by how many rows decide together "
                  "and how the vocabulary is cut (the op: rows 1, ids, 512 columns), from fp64 shares:\n",
                  f"| | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]  # fmt: skip
        for layout in result["cases"][names[0]]["layouts"]:
            shares = (f"{result['cases'][name]['layouts'][layout]:.1%}" for name in names)
            lines.append(f"| {layout} | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", help="file that grad_filter_rows.py wrote")
    parser.add_argument("--case", default="2.0", help="factor on the logits, or flat")
    parser.add_argument("--n", type=int, default=1024)
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--dtype", dest="dtype_name", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype_name)
    torch.set_num_threads(args.threads)
    size = {"n": args.n, "d": args.d, "v": torch.load(args.rows)["weight"].shape[0], "threads": args.threads,
            "tile_columns": grad_filter.TILE_COLUMNS}  # fmt: skip
    result: dict = {"environment": common.environment(), **size, "cases": {}}
    path = common.ROOT / "bench" / "results" / common.machine_name() / "grad_filter.json"
    if path.exists():
        old = json.loads(path.read_text())
        if all(old[k] == v for k, v in size.items()):
            result["cases"] = old["cases"]
    result["cases"][f"{args.case} {args.dtype_name}"] = measure(args) | {**common.commit(), "rounds": args.rounds}
    report = table(result)
    print(report)
    if not args.no_write:
        print(json.dumps({"written": str(common.write_result("grad_filter", result, report))}))


if __name__ == "__main__":
    main()
