"""The head op on four processes: what ops/test_vocab_parallel.py reads. Every case runs on the first ranks of the four.

python tests/vocab_runs.py results.pt
"""

import contextlib
import functools
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")  # all backends in one process

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor  # noqa: E402
from torch.distributed.tensor.debug import CommDebugMode  # noqa: E402
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module  # noqa: E402

import fastpo  # noqa: E402
from fastpo import check, ops  # noqa: E402
from fastpo.check import SOFTCAPPED, Case  # noqa: E402
from fastpo.kernels import reference  # noqa: E402
from fastpo.ops import backends, parts, vocab_parallel  # noqa: E402

WORLD = 4
BUDGETS = {"none": None, "frozen": None, "kept": 1 << 62, "sliced": 0}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64, "float16": torch.float16}
RULE: dict[str, Any] = {"bias": True, **SOFTCAPPED}
# name -> (where the slices end, backend, dtype, case). Uneven slices, slices of nothing, slices out of order.
HALVES, UNEVEN, EMPTY = ((0, 502), (502, 1003)), ((0, 7), (7, 800), (800, 1003)), ((0, 1003), (1003, 1003))
TURNED = ((500, 1003), (3, 3), (0, 500))
SMALL = ((0, 130), (130, 257))
CASES: dict[str, tuple[tuple[tuple[int, int], ...], str, str, Case]] = {
    **{f"{b} {d}": (UNEVEN, b, d, Case(35, 24, 1003, **RULE)) for b in ("torch", "cpu")
       for d in ("float32", "bfloat16")},
    **{f"{b} {kind}": (HALVES, b, "float32", Case(35, 24, 1003, kind)) for b in ("torch", "cpu")
       for kind in ("negative", "offset", "rising", "peaked")},
    **{f"{b} peaked bfloat16": (HALVES, b, "bfloat16", Case(35, 24, 1003, "peaked")) for b in ("torch", "cpu")},
    "torch float64": (UNEVEN, "torch", "float64", Case(9, 16, 1003, **RULE)),
    "torch float16": (HALVES, "torch", "float16", Case(35, 24, 1003, bias=True)),
    "cpu empty": (EMPTY, "cpu", "float32", Case(9, 16, 1003, bias=True)),
    "torch turned": (TURNED, "torch", "float32", Case(9, 16, 1003)),
    "triton float32": (SMALL, "triton", "float32", Case(3, 16, 257, **RULE)),
    "triton float16": (SMALL, "triton", "float16", Case(3, 16, 257, "negative")),
    "triton peaked": (SMALL, "triton", "float32", Case(3, 16, 257, "peaked", bias=True)),
    "no rows": (HALVES, "cpu", "float32", Case(0, 16, 1003)),
}  # fmt: skip
# Those of them that `linear_logprob_entropy` runs too, under "NAME entropy".
WITH_ENTROPY = ("torch float32", "torch bfloat16", "cpu float32", "cpu bfloat16", "torch offset", "cpu offset",
                "cpu rising", "torch peaked", "cpu peaked", "torch float64", "torch float16", "cpu empty",
                "torch turned", "triton float32", "triton float16", "triton peaked", "no rows")  # fmt: skip


class Counts(contextlib.AbstractContextManager):
    """Collectives inside custom ops, which no dispatch mode sees."""

    def __enter__(self) -> dict[str, int]:
        self.real = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}
        self.calls = dict.fromkeys(self.real, 0)

        def counted(name: str):
            def call(*args: Any, **kwargs: Any) -> Any:
                self.calls[name] += 1
                return self.real[name](*args, **kwargs)

            return call

        for name in self.real:
            setattr(dist, name, counted(name))
        return self.calls

    def __exit__(self, *exception: object) -> None:
        for name, call in self.real.items():
            setattr(dist, name, call)


def sliced_case(
    group: dist.ProcessGroup, slices, backend: str, dtype: torch.dtype, case: Case, entropy: bool = False
) -> dict[str, Any]:
    """Errors against fp64 of every regime; whether ranks agree and a second run is the same; collectives. `entropy`:
    of the op whose entropies have a gradient."""
    outputs = functools.partial(check.head_outputs, entropy_grad=entropy)
    split = fastpo.VocabParallel.of_slice(group, *slices[group.rank()])
    tensors = case.tensors(dtype, "cpu")
    rule: dict[str, Any] = {"softcap": case.softcap, "logit_scale": case.logit_scale}
    op, plain = ops.linear_logprob_entropy, functools.partial(reference.linear_logprob_entropy, **rule)
    if not entropy:
        rule["return_entropy"] = True
        op, plain = ops.linear_logprob, functools.partial(reference.linear_logprob, **rule)
    mine = slice(split.start, split.stop)
    exact = outputs(plain, tensors, "kept", torch.float64)
    naive = outputs(plain, tensors, "kept")
    magnitude = check._largest_logit(case, tensors) if case.n else 0.0
    operands = {"dhidden": check._rms(tensors["weight"].double()) * check._rms(tensors["upstream"].double())}
    out: dict[str, Any] = {}
    for regime, budget in BUDGETS.items():

        def fused(hidden, weight, target, bias, budget=budget) -> Any:
            options = {**rule, "memory_budget": budget, "backend": backend, "vocab_parallel": split}
            bias = None if bias is None else bias[mine]
            return op(hidden, weight[mine], target, bias, **options)

        with Counts() as calls:
            ours = outputs(fused, tensors, regime)
        again = outputs(fused, tensors, regime)
        agree = True
        for name in ("logp", "entropy", "dhidden"):
            if name in ours:
                copies = [torch.empty_like(ours[name]) for _ in slices]
                dist.all_gather(copies, ours[name], group=group)
                agree &= all(copy.equal(copies[0]) for copy in copies)
        same = all(ours[name].equal(again[name]) for name in ours)
        for name in ("dweight", "dbias"):
            if name in ours:
                dist.all_reduce(ours[name], group=group)  # the other slices' rows are 0
        errors = {name: check.budgeted_error(ours[name], naive[name], exact[name], magnitude, operands.get(name))
                  for name in ours}  # fmt: skip
        out[regime] = {"errors": errors, "agree": agree, "same": same, "calls": dict(calls)}
    return out


def gradients_asked_for(group: dist.ProcessGroup) -> list[str]:
    """Which gradients are there, and collectives, for every choice; what differs from one process."""
    x = Case(9, 8, 301, bias=True).tensors(torch.float32, "cpu")
    split = fastpo.VocabParallel.of_slice(group, *((0, 100), (100, 301))[group.rank()])
    mine, wrong = slice(split.start, split.stop), []
    for budget in (None, 0):
        for mask in range(1, 8):
            trained = [name for i, name in enumerate(("hidden", "weight", "bias")) if mask >> i & 1]
            whole, part = ({n: x[n].clone() for n in ("hidden", "weight", "bias")} for _ in range(2))
            part |= {n: part[n][mine].clone() for n in ("weight", "bias")}
            for leaves in (whole, part):
                for name in trained:
                    leaves[name].requires_grad_()
            ops.linear_logprob(whole["hidden"], whole["weight"], x["target"], whole["bias"]).backward(x["upstream"])
            with Counts() as calls:
                logp = ops.linear_logprob(part["hidden"], part["weight"], x["target"], part["bias"],
                                          memory_budget=budget, vocab_parallel=split)  # fmt: skip
                logp.backward(x["upstream"], retain_graph=True)
            if calls != {"all_reduce": int("hidden" in trained), "all_gather": 1}:
                wrong.append(f"{trained} {budget}: {calls}")
            first = {n: part[n].grad.clone() for n in trained}
            logp.backward(x["upstream"])
            for name in part:
                if (part[name].grad is not None) != (name in trained):
                    wrong.append(f"{trained} {budget}: gradient of {name}")
                elif name in trained:
                    expected = whole[name].grad if name == "hidden" else whole[name].grad[mine]
                    if not torch.allclose(first[name], expected, rtol=1e-4, atol=1e-5):
                        wrong.append(f"{trained} {budget}: {name} differs")
                    if not part[name].grad.equal(2 * first[name]):
                        wrong.append(f"{trained} {budget}: {name} differs in a second backward pass")
    return wrong


def masked_slice(group: dist.ProcessGroup) -> dict[str, float]:
    """A slice of nothing but logits of -inf has probability 0; largest differences from one process without it."""
    x = Case(9, 8, 301, bias=True).tensors(torch.float32, "cpu")
    split = fastpo.VocabParallel.of_slice(group, *((0, 150), (150, 301))[group.rank()])
    x["target"] = x["target"].clamp(min=-100).where(x["target"] < 150, 5)
    x["bias"][150:] = -torch.inf
    mine, out = slice(split.start, split.stop), {}
    for regime, budget in BUDGETS.items():

        def whole(hidden, weight, target, bias) -> Any:
            return ops.linear_logprob(hidden, weight[:150], target, bias[:150], return_entropy=True)

        def part(hidden, weight, target, bias, budget=budget) -> Any:
            return ops.linear_logprob(hidden, weight[mine], target, bias[mine], return_entropy=True,
                                      memory_budget=budget, vocab_parallel=split)  # fmt: skip

        expected, ours = (check.head_outputs(fn, x, regime) for fn in (whole, part))
        for name in ("dweight", "dbias"):
            if name in ours:
                dist.all_reduce(ours[name], group=group)
        out |= {f"{regime} {name}": (ours[name] - expected[name]).abs().max().item() for name in ours}
    return out


def nearly_certain(group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp, exact logp, dhidden, exact dhidden) where 1 - p is far below the dtype's resolution."""
    v = 1000
    bias, weight = torch.zeros(v), torch.randn(v, 3, generator=torch.Generator().manual_seed(0))
    bias[7] = 40.0
    split = fastpo.VocabParallel.of_slice(group, *((0, 20), (20, v))[group.rank()])
    mine, hidden = slice(split.start, split.stop), torch.zeros(2, 3, requires_grad=True)
    logp = ops.linear_logprob(hidden, weight[mine], torch.tensor([7, 7]), bias[mine], vocab_parallel=split)
    logp.sum().backward()
    exact = -torch.log1p((v - 1) * torch.tensor(-40.0).double().exp())
    others = weight.double()[torch.arange(v) != 7]
    return logp.detach(), exact, hidden.grad, -exact * (weight[7].double() - others.mean(0))


def peak_of(step: Any) -> int:
    """Peak resident bytes of step() over those before it."""

    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def peak_memory(group: dist.ProcessGroup) -> dict[str, float]:
    """Bytes over those before, by regime, in units of this rank's matrix [N, V_r] in fp32."""
    n, d, v = 2560, 16, 32000
    split = fastpo.VocabParallel.of_slice(group, *((0, 16000), (16000, v))[group.rank()])
    x = Case(n, d, v, ignored=False).tensors(torch.float32, "cpu")
    out = {}
    for backend in ("torch", "cpu"):
        for regime in BUDGETS:
            trained = {"none": (), "frozen": ("hidden",)}.get(regime, ("hidden", "weight"))
            leaves = {"hidden": x["hidden"].clone(), "weight": x["weight"][split.start : split.stop].clone()}
            for name in trained:
                leaves[name].requires_grad_()

            def step(rows=n, leaves=leaves, regime=regime, trained=trained, backend=backend) -> None:
                options = {"backend": backend, "memory_budget": BUDGETS[regime], "vocab_parallel": split}
                logp = ops.linear_logprob(leaves["hidden"][:rows], leaves["weight"], x["target"][:rows], **options)
                if trained:
                    torch.autograd.grad(logp, list(leaves.values())[: len(trained)], x["upstream"][:rows])

            step(64)  # what the first call sets up is no part of the peak
            with contextlib.suppress(OSError):  # not every system resets the peak
                out[f"{backend} {regime}"] = peak_of(step) / (n * 16000 * 4)
    return out


class Model(nn.Module):
    """A trunk of one layer and a head, like any causal language model at its last step."""

    def __init__(self, v: int = 301):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.lm_head = nn.Linear(8, 8), nn.Linear(8, v)

    def forward(self, x: Tensor, target: Tensor, **options: Any) -> Tensor:
        return head_loss(self, x, target, **options)


def head_loss(model: Model, x: Tensor, target: Tensor, **options: Any) -> Tensor:
    """What `forward` does, outside whatever is wrapped around it."""
    hidden = model.trunk(x)
    return -fastpo.linear_logprob(hidden, model.lm_head.weight, target, model.lm_head.bias, **options).mean()


def entropy_loss(model: Model, x: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The same of log-probabilities and entropies."""
    head = model.lm_head
    logp, entropy = ops.linear_logprob_entropy(model.trunk(x), head.weight, target, head.bias, **options)
    return (entropy - logp).mean()


def largest_difference(model: nn.Module, expected: nn.Module) -> float:
    """Of all gradients; both of the same names."""
    theirs = dict(expected.named_parameters())
    whole = {n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for n, p in model.named_parameters()}
    return max((whole[n] - theirs[n].grad).abs().max().item() for n in theirs)


def dtensor_weights(rank: int) -> dict[str, Any]:
    """A head by ColwiseParallel, by FSDP2, and by both, outside any wrapped forward; gradients of one process."""
    torch.manual_seed(1)
    x, target = torch.randn(12, 8), torch.randint(0, 301, (12,))
    alone = Model()
    head_loss(alone, x, target).backward()
    out: dict[str, Any] = {}

    for ranks in (2, 3):
        mesh = dist.device_mesh.DeviceMesh("cpu", list(range(ranks)), mesh_dim_names=("tp",))
        if rank >= ranks:
            continue
        model = parallelize_module(Model(), mesh, {"lm_head": ColwiseParallel()})
        with Counts() as calls:
            loss = head_loss(model, x, target, vocab_parallel=mesh)
            loss.backward()
        out[f"tp {ranks}"] = largest_difference(model, alone), calls
        out["local rows"] = model.lm_head.weight.to_local().shape[0]
        if ranks == 2:
            model.zero_grad()
            hidden = DTensor.from_local(model.trunk(x), mesh, [Replicate()])
            args = (hidden, model.lm_head.weight, distribute_tensor(target, mesh, [Replicate()]), model.lm_head.bias)
            logp = fastpo.linear_logprob(*args, vocab_parallel=mesh.get_group(), memory_budget=0)
            (-logp.mean()).backward()
            out["replicated DTensors"] = largest_difference(model, alone), type(logp) is Tensor

        alone_too = Model()
        entropy_loss(alone_too, x, target).backward()
        model.zero_grad()
        entropy_loss(model, x, target, vocab_parallel=mesh).backward()
        out[f"entropy, tp {ranks}"] = largest_difference(model, alone_too)

    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    mine = slice(3 * rank, 3 * rank + 3)
    model, alone_too = Model(), Model()
    fully_shard(model.trunk, mesh=mesh)
    fully_shard(model.lm_head, mesh=mesh)
    entropy_loss(model, x[mine], target[mine]).backward()
    entropy_loss(alone_too, x, target).backward()
    out["entropy, fsdp"] = largest_difference(model, alone_too)
    for autocast in (False, True):
        model = Model()
        fully_shard(model.trunk, mesh=mesh)
        fully_shard(model.lm_head, mesh=mesh)
        with CommDebugMode() as seen, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = model.trunk(x[mine])
            with CommDebugMode() as forward:
                logp = fastpo.linear_logprob(hidden, model.lm_head.weight, target[mine], model.lm_head.bias)
            loss = -logp.mean()
        if autocast:
            single = Model()
            with torch.autocast("cpu", torch.bfloat16):
                head_loss(single, x, target).backward()
        else:
            single = alone
        with CommDebugMode() as seen:
            loss.backward()
        counts = [{str(k).split(".")[-1].strip("')>"): v for k, v in c.get_comm_counts().items()}
                  for c in (forward, seen)]  # fmt: skip
        out["fsdp autocast" if autocast else "fsdp"] = largest_difference(model, single), counts
        out["grad dtype"] = str(model.lm_head.weight.grad.dtype)

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    mine = slice(6 * (rank // 2), 6 * (rank // 2) + 6)
    for place in ("outside", "inside"):  # of the forward that fully_shard wraps
        model = parallelize_module(Model(), mesh["tp"], {"lm_head": ColwiseParallel()})
        for module in (model,) if place == "inside" else (model.trunk, model.lm_head):
            fully_shard(module, mesh=mesh["dp"])
        call = model if place == "inside" else functools.partial(head_loss, model)
        call(x[mine], target[mine], vocab_parallel=mesh["tp"]).backward()
        out[f"fsdp and tp {place}"] = largest_difference(model, alone)
    return out


def compiled(group: dist.ProcessGroup) -> dict[str, Any]:
    """torch.compile(fullgraph=True) against eager, bit for bit, with N dynamic; graphs compiled."""
    from torch._dynamo.testing import CompileCounterWithBackend

    split = fastpo.VocabParallel.of_slice(group, *((0, 100), (100, 301))[group.rank()])
    mine, out = slice(split.start, split.stop), {}
    for regime in ("frozen", "kept", "sliced", "entropy"):

        def fn(hidden, weight, target, bias, regime=regime) -> Any:
            options = {"memory_budget": BUDGETS.get(regime), "vocab_parallel": split}
            if regime == "entropy":
                logp, entropy = ops.linear_logprob_entropy(hidden, weight[mine], target, bias[mine], **options)
                return logp + entropy, entropy.detach()
            options["return_entropy"] = True
            return fastpo.linear_logprob(hidden, weight[mine], target, bias[mine], **options)

        torch.compiler.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled_fn = torch.compile(fn, fullgraph=True, backend=counter)

        def fast(hidden, weight, target, bias, call=compiled_fn) -> Any:
            torch._dynamo.mark_dynamic(hidden, 0)
            torch._dynamo.mark_dynamic(target, 0)
            return call(hidden, weight, target, bias)

        same = True
        for n in (7, 12, 19):
            x = Case(n, 8, 301, bias=True).tensors(torch.float32, "cpu")
            eager, ours = (check.head_outputs(f, x, regime) for f in (fn, fast))
            same &= all(eager[name].equal(ours[name]) for name in eager)
        out[regime] = same, counter.frame_count
    return out


def compiled_dtensor(mesh: Any) -> bool:
    """A ColwiseParallel head under torch.compile(fullgraph=True): loss and all gradients of eager, bit for bit."""
    torch.manual_seed(1)
    x, target = torch.randn(12, 8), torch.randint(0, 301, (12,))
    models = [parallelize_module(Model(), mesh, {"lm_head": ColwiseParallel()}) for _ in range(2)]

    def fn(model: Model) -> Tensor:
        return head_loss(model, x, target, vocab_parallel=mesh)

    torch.compiler.reset()
    losses = [fn(models[0]), torch.compile(fn, fullgraph=True, backend="aot_eager")(models[1])]
    for loss in losses:
        loss.backward()
    pairs = zip(models[0].parameters(), models[1].parameters())
    locals_ = [[p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in pair] for pair in pairs]
    return losses[0].equal(losses[1]) and all(a.equal(b) for a, b in locals_)


def opcheck(group: dist.ProcessGroup) -> None:
    """torch.library's own checks of both ops: schema, fake tensors, autograd registration, AOT dispatch."""
    split = fastpo.VocabParallel.of_slice(group, *((0, 100), (100, 301))[group.rank()])
    x = Case(9, 8, 301, bias=True).tensors(torch.float32, "cpu")
    x |= {n: x[n][split.start : split.stop] for n in ("weight", "bias")}
    for regime in BUDGETS:
        trained = {"none": (), "frozen": ("hidden",)}.get(regime, ("hidden", "weight", "bias"))
        inputs = [x[n].detach().clone().requires_grad_(n in trained) if n != "target" else x[n]
                  for n in ("hidden", "weight", "target", "bias")]  # fmt: skip
        rule, where = (
            (20.0, 0.5, regime, "torch"),
            (split.group_name, split.rank, list(split.starts), list(split.stops)),
        )
        torch.library.opcheck(torch.ops.fastpo.vocab_parallel_logprob.default, (*inputs, *rule, True, *where))
        if trained:
            with torch.no_grad():
                _, _, saved, stats = torch.ops.fastpo.vocab_parallel_logprob(*inputs, *rule, False, *where)
            args = (x["upstream"], *(t.detach() for t in inputs), saved, stats, *rule, split.group_name, split.start)
            need = [name in trained for name in ("hidden", "weight", "bias")]
            torch.library.opcheck(torch.ops.fastpo.vocab_parallel_backward.default, (*args, need))
        if regime == "frozen":
            continue
        torch.library.opcheck(torch.ops.fastpo.vocab_parallel_entropy.default, (*inputs, *rule, *where))
        if trained:
            with torch.no_grad():
                _, _, saved, stats = torch.ops.fastpo.vocab_parallel_entropy(*inputs, *rule, *where)
            args = (
                None,
                x["upstream"],
                *(t.detach() for t in inputs),
                saved,
                stats,
                *rule,
                split.group_name,
                split.start,
            )
            torch.library.opcheck(torch.ops.fastpo.vocab_parallel_entropy_backward.default, (*args, need))


def bad_input(rank: int, two: dist.ProcessGroup, three: dist.ProcessGroup) -> dict[str, str]:
    """What each mistake says, on the first two ranks."""
    mesh = dist.device_mesh.DeviceMesh("cpu", [0, 1], mesh_dim_names=("tp",))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    said: dict[str, str] = {}
    if rank > 1:
        return said
    hidden, weight, target = torch.zeros(3, 4), torch.zeros(10, 4), torch.zeros(3, dtype=torch.long)
    rows = distribute_tensor(weight, mesh, [Shard(0)])
    split = fastpo.VocabParallel.of_slice(two, 5 * rank, 5 * rank + 5)
    part = weight[:5]

    def attempt(name: str, call: Any) -> None:
        try:
            call()
            said[name] = "nothing"
        except fastpo.errors.FastpoError as error:
            said[name] = str(error)

    def op(*args: Any, **options: Any) -> Any:
        return lambda: fastpo.linear_logprob(*args, **options)

    columns = distribute_tensor(weight, mesh, [Shard(1)])
    attempt("hidden dimension", op(hidden, columns, target, vocab_parallel=mesh))
    attempt("hidden sharded", op(distribute_tensor(hidden, mesh, [Shard(0)]), rows, target, vocab_parallel=mesh))
    attempt("hidden sharded, no group", op(distribute_tensor(hidden, mesh, [Shard(0)]), weight, target))
    attempt("gap", lambda: fastpo.VocabParallel.of_slice(two, 6 * rank, 5 + 6 * rank))
    attempt("overlap", lambda: fastpo.VocabParallel.of_slice(two, 0, 5))
    attempt("empty", lambda: fastpo.VocabParallel.of_slice(two, 0, 0))
    attempt("no member", lambda: fastpo.VocabParallel.of_slice(None, 0, 5))
    attempt("other group", op(hidden, rows, target, vocab_parallel=three))
    attempt("two dimensions", op(hidden, rows, target, vocab_parallel=square))
    attempt("plain weight, group", op(hidden, weight, target, vocab_parallel=mesh))
    attempt("DTensor, split", op(hidden, rows, target, vocab_parallel=split))
    attempt("one DTensor", op(hidden, rows, target, torch.zeros(10), vocab_parallel=mesh))
    attempt("placements", op(hidden, rows, target, distribute_tensor(torch.zeros(10), mesh, [Replicate()])))
    attempt("rows", op(hidden, weight, target, vocab_parallel=split))
    attempt("bias", op(hidden, part, target, torch.zeros(4), vocab_parallel=split))
    attempt("top1", op(hidden, part, target, vocab_parallel=split, return_top1=True))
    attempt("top1 of the entropy's", lambda: ops.linear_logprob_entropy(hidden, part, target, vocab_parallel=split,
                                                                        return_top1=True))  # fmt: skip
    attempt("dtypes", op(hidden, part.bfloat16(), target, vocab_parallel=split))
    attempt("devices", op(hidden, part.to("meta"), target, vocab_parallel=split))
    attempt("target", op(hidden, part, torch.tensor([0, 9, 10]), vocab_parallel=split))
    attempt("other op", lambda: ops.log_sum_sq(hidden, rows))
    parts.CHECK_INPUTS = True
    try:
        attempt("replicated", op(hidden, part, target, vocab_parallel=split))
        attempt("hidden differs", op(hidden + torch.tensor([[0.0], [rank], [0.0]]), part, target, vocab_parallel=split))
        attempt("target differs", op(hidden, part, target + rank, vocab_parallel=split))
        attempt("other rows", op(hidden[: 2 + rank], part, target[: 2 + rank], vocab_parallel=split))
    finally:
        parts.CHECK_INPUTS = False
    return said


def strides(group: dist.ProcessGroup) -> float:
    """Largest difference that strides make, of logp and every gradient, in all regimes."""
    split = fastpo.VocabParallel.of_slice(group, *((0, 100), (100, 301))[group.rank()])
    x = Case(9, 8, 301, bias=True).tensors(torch.float32, "cpu")
    x |= {n: x[n][split.start : split.stop] for n in ("weight", "bias")}
    odd = {**x, "hidden": x["hidden"].t().contiguous().t(), "weight": x["weight"].repeat_interleave(2, 1)[:, ::2],
           "bias": x["bias"].repeat_interleave(3)[::3],
           "target": x["target"].int().repeat_interleave(2)[::2]}  # fmt: skip
    worst = 0.0
    for regime, budget in BUDGETS.items():

        def fn(*args: Tensor, budget=budget) -> Any:
            return ops.linear_logprob(*args, memory_budget=budget, vocab_parallel=split, return_entropy=True)

        expected, ours = check.head_outputs(fn, x, regime), check.head_outputs(fn, odd, regime)
        worst = max(worst, *((ours[n] - expected[n]).abs().max().item() for n in ours))
    return worst


def work(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    groups = {n: dist.new_group(list(range(n))) for n in (2, 3)}
    out: dict[str, Any] = {"dtensor": dtensor_weights(rank), "bad": bad_input(rank, groups[2], groups[3])}
    if rank < 2:
        two = groups[2]
        out |= {"memory": peak_memory(two), "gradients": gradients_asked_for(two), "masked": masked_slice(two)}
        out |= {"certain": nearly_certain(two), "compiled": compiled(two), "strides": strides(two)}
        opcheck(two)
        out["compiled DTensor"] = compiled_dtensor(dist.device_mesh.DeviceMesh.from_group(two, "cpu"))
    # Several row blocks and many column slices even here.
    for name in ("CPU_TILE_BYTES", "CPU_KEPT_TILE_BYTES"):
        setattr(backends, name, 8 << 10)
    backends.CPU_TILE_ROWS = 32
    for name, (slices, backend, dtype, case) in CASES.items():
        if rank < len(slices) and (backend != "cpu" or backends.compiled is not None):
            out[name] = sliced_case(groups[len(slices)], slices, backend, DTYPES[dtype], case)
            if name in WITH_ENTROPY:
                entropies = sliced_case(groups[len(slices)], slices, backend, DTYPES[dtype], case, entropy=True)
                out[f"{name} entropy"] = entropies
    torch.save(out, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    assert vocab_parallel  # whose ops are registered before the fork
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        torch.multiprocessing.start_processes(work, (port, folder), nprocs=WORLD, start_method="fork")
        torch.save([torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(WORLD)], sys.argv[1])


if __name__ == "__main__":
    main()
