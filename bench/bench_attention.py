"""Attention on shared prompts, forward and backward, against the same attention with a prompt for every response.

    python bench/bench_attention.py                    # CPU, fp32
    python bench/bench_attention.py --device cuda      # bf16: FlashAttention, Triton, FlexAttention with the same mask

Trees of one prompt and K responses, as many as fill about `--tokens` tokens with the prompts repeated. Outputs and the
gradients of queries, keys and values (summed over a prompt's copies where it has several) are compared with fp64 before
anything is timed. Rounds are interleaved; ratios are taken within a round, medians over rounds.

unshared        chains of prompt and response, FlashAttention where there is a GPU
shared          what training with share_prompts takes here
shared_triton   kernels/attention.py
flex            FlexAttention on the shared rows, its mask compiled (a GPU only: it has no backward on a CPU)
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent))
import common  # noqa: E402
import roofline  # noqa: E402

from fastpo.data.packing import Branch  # noqa: E402
from fastpo.kernels import reference  # noqa: E402
from fastpo.models.attention import packed_attention  # noqa: E402
from fastpo.models.layout import Layout  # noqa: E402

SHAPES = ((1024, 256, 2), (512, 512, 2), (64, 512, 2), (512, 256, 8))  # prompt, response, K
HEADS = {"cuda": (32, 8, 128), "cpu": (4, 4, 64)}  # of queries, of keys and values, their size
EXACT_TOKENS = 3000  # of the trees that are compared with fp64, which has a mask of all tokens squared
Outputs = tuple[Tensor, ...]


class Problem(NamedTuple):
    """Queries, keys and values of the shared row, and where its tokens lie in the unshared one."""

    q: Tensor  # [1, H, T, D]
    k: Tensor  # [1, G, T, D]
    v: Tensor  # [1, G, T, D]
    grad: Tensor  # [1, T, H, D]
    shared: Layout
    unshared: Layout
    source: Tensor  # [T'] int64: token of the shared row for each token of the unshared one
    first: Tensor  # [T'] bool: whether that is the token's first copy


def make(prompt: int, response: int, k: int, trees: int, device: str, dtype: torch.dtype) -> Problem:
    heads, groups, size = HEADS[device]
    chains, branches, source, first, unshared = [0], [], [], [], [0]
    for _ in range(trees):
        root = chains[-1]
        chains.append(root + prompt + response)
        chains += [chains[-1] + response * (i + 1) for i in range(k - 1)]
        branches.append(Branch(root + prompt + response, chains[-1], root, root + prompt))
        for i in range(k):
            own = root + prompt + response * i
            source += [*range(root, root + prompt), *range(own, own + response)]
            first += [i == 0] * prompt + [True] * response
            unshared.append(unshared[-1] + prompt + response)
    torch.manual_seed(0)
    shape = {"q": heads, "k": groups, "v": groups}
    q, key, v = (torch.randn(1, n, chains[-1], size, device=device, dtype=dtype) for n in shape.values())
    grad = torch.randn(1, chains[-1], heads, size, device=device, dtype=dtype)
    return Problem(
        q, key, v, grad, Layout.from_chains(tuple(chains), tuple(branches)), Layout.from_chains(tuple(unshared)),
        torch.tensor(source, device=device), torch.tensor(first, device=device),
    )  # fmt: skip


class Module(nn.Module):
    is_causal = True


def run(layout: Layout, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, forced: str = "") -> Outputs:
    os.environ["FASTPO_ATTENTION"] = forced
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, _ = packed_attention(Module().eval(), q, k, v, fastpo_layout=layout)
    out.backward(grad)
    return out.detach(), q.grad, k.grad, v.grad


def shared(p: Problem, forced: str = "") -> Outputs:
    return run(p.shared, p.q, p.k, p.v, p.grad, forced)


def unshared_inputs(p: Problem) -> tuple[Tensor, ...]:
    """Rows with a copy of the prompt for each response; only a token's first copy has a gradient."""
    q, k, v = (x.index_select(2, p.source) for x in (p.q, p.k, p.v))
    return q, k, v, p.grad.index_select(1, p.source) * p.first[None, :, None, None]


def folded(p: Problem, outputs: Outputs) -> Outputs:
    """The unshared row's results in the shared row's places."""
    out = p.grad.new_empty(p.grad.shape)
    out[:, p.source[p.first]] = outputs[0][:, p.first]
    grads = (torch.zeros_like(x, dtype=torch.float64) for x in (p.q, p.k, p.v))
    return out, *(into.index_add_(2, p.source, x.double()) for into, x in zip(grads, outputs[1:], strict=True))


def flex(p: Problem) -> Callable[[], Outputs]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    total, device = p.q.shape[2], p.q.device
    chain = torch.zeros(total, dtype=torch.int32, device=device)
    begin, end = (torch.full((total,), -1, dtype=torch.int32, device=device) for _ in range(2))
    for a, b in zip(p.shared.cu_seqlens, p.shared.cu_seqlens[1:], strict=False):
        chain[a:b] = a
    for branch in p.shared.branches:
        begin[branch.start : branch.stop], end[branch.start : branch.stop] = branch.prompt, branch.prompt_stop

    def mask(b, h, i, j):
        return ((chain[i] == chain[j]) & (i >= j)) | ((j >= begin[i]) & (j < end[i]))

    blocks = create_block_mask(mask, None, None, total, total, device=str(device), _compile=True)
    compiled = torch.compile(flex_attention)

    def step() -> Outputs:
        q, k, v = (x.detach().requires_grad_() for x in (p.q, p.k, p.v))
        out = compiled(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])
        out.backward(p.grad.transpose(1, 2))
        return out.detach().transpose(1, 2), q.grad, k.grad, v.grad

    return step


def providers(p: Problem, device: str) -> dict[str, Callable[[], Outputs]]:
    copies = unshared_inputs(p)
    steps = {"unshared": lambda: run(p.unshared, *copies), "shared": lambda: shared(p)}
    if device == "cuda":
        steps |= {"shared_triton": lambda: shared(p, "triton"), "flex": flex(p)}
    return steps


def exact(p: Problem) -> Outputs:
    q, k, v = (x[0].transpose(0, 1).double().requires_grad_() for x in (p.q, p.k, p.v))
    visible = reference.tree_mask(p.shared.cu_seqlens, p.shared.branches)
    out = reference.tree_attention(q, k, v, visible, scale=q.shape[-1] ** -0.5)
    out.backward(p.grad[0].double())
    return out.detach()[None], *(x.grad.transpose(0, 1)[None] for x in (q, k, v))


def errors(device: str, dtype: torch.dtype, prompt: int, response: int, k: int) -> dict[str, float]:
    """Each provider's largest relative error (Frobenius) against fp64, on one tree of about EXACT_TOKENS tokens."""
    scale = min(1.0, EXACT_TOKENS / (prompt + k * response))
    p = make(max(1, int(prompt * scale)), max(1, int(response * scale)), k, 1, device, dtype)
    want, found = exact(p), {}
    for name, step in providers(p, device).items():
        got = step()
        got = folded(p, got) if name == "unshared" else got
        found[name] = max(float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want, strict=True))
    return found


def measure(prompt: int, response: int, k: int, args: argparse.Namespace) -> dict[str, dict]:
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    wrong = 0.05 if args.device == "cuda" else 1e-4
    off = errors(args.device, dtype, prompt, response, k)
    p = make(prompt, response, k, max(1, args.tokens // (k * (prompt + response))), args.device, dtype)
    steps = {name: step for name, step in providers(p, args.device).items() if off[name] <= wrong}
    times: dict[str, list[float]] = {name: [] for name in steps}
    waited = set()
    for step in steps.values():
        step()
    for _ in range(args.rounds):
        for name, step in steps.items():
            taken, queued = roofline.timed(step, args.device)
            times[name].append(taken)
            waited |= set() if queued else {name}
    rows = {}
    for name, error in off.items():
        rows[name] = {"error": error, "tokens": p.unshared.cu_seqlens[-1] if name == "unshared" else p.q.shape[2]}
        if name in steps:
            ratios = [t / base for t, base in zip(times[name], times["unshared"], strict=True)]
            rows[name] |= {"median_s": statistics.median(times[name]), "ratio": statistics.median(ratios),
                           "queued": name not in waited}  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, help="of the unshared rows; default 16,384 on a GPU, 5,120 on a CPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder of the results; default bench/results/<machine>")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    args.tokens = args.tokens or (16_384 if args.device == "cuda" else 5_120)
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    heads, groups, size = HEADS[args.device]
    lines = [
        f"{heads} heads, {groups} of keys and values, size {size}, {'bf16' if args.device == 'cuda' else 'fp32'}; "
        f"about {args.tokens:,} tokens with a prompt for every response; forward and backward, {args.rounds} rounds.",
        "",
        "| prompt / response x K | provider | tokens | ms | / unshared | error against fp64 |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    result: dict = {"environment": common.environment(), "shapes": []}
    for prompt, response, k in SHAPES:
        rows = measure(prompt, response, k, args)
        result["shapes"].append({"prompt": prompt, "response": response, "k": k, "providers": rows})
        for name, row in rows.items():
            timed = f"{row['median_s'] * 1e3:.1f} | {row['ratio']:.2f}" if "ratio" in row else "wrong, not timed | "
            lines.append(f"| {prompt} / {response} x {k} | {name} | {row['tokens']:,} | {timed} | {row['error']:.1e} |")
        report = "\n".join(lines) + "\n"
        if not args.no_write:  # after every shape: what is cut short is not lost
            path = common.write_result("attention", result, report, args.out)
    print(report)
    if not args.no_write:
        print(f"written to {path}")
    return int(any("ratio" not in row for shape in result["shapes"] for row in shape["providers"].values()))


if __name__ == "__main__":
    sys.exit(main())
