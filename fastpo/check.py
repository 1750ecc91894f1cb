"""`fastpo check`: every op, backend and cost regime of this machine against the fp64 reference.

The criterion is the project's: the error against fp64 is at most 1.5 times that of plain PyTorch on the same inputs
(the GEMM in the input dtype, the rest in fp32, autograd), plus eps32 * max|logits|: log-probabilities are differences
of logits, and rounding one of them once costs that much. Errors are root mean squares over a tensor; the largest single
error, which is one draw, may be 4 times plain PyTorch's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpo import ops
from fastpo.errors import DeviceError
from fastpo.kernels import reference
from fastpo.losses.table import LOSSES
from fastpo.models.loading import resolve_device

REGIMES = ("none", "frozen", "kept", "sliced")
SOFTCAPPED: dict[str, Any] = {"softcap": 20.0, "logit_scale": 0.5}


@dataclass(frozen=True)
class Case:
    """Inputs of one comparison. `kind`: normal, negative (all logits below 0), offset (all near 1e3), rising (each
    tile's logits above the last one's, by more than fp32's exp can span in all), peaked (p(target) nearly 1)."""

    n: int
    d: int
    v: int
    kind: str = "normal"
    bias: bool = False
    softcap: float | None = None
    logit_scale: float = 1.0
    ignored: bool = True  # some targets are -100

    def __str__(self) -> str:
        extras = [self.kind] if self.kind != "normal" else []
        extras += ["bias"] if self.bias else []
        extras += [f"cap{self.softcap:g}"] if self.softcap else []
        extras += [f"scale{self.logit_scale:g}"] if self.logit_scale != 1 else []
        return " ".join([f"{self.n}x{self.d}x{self.v}", *extras])

    def tensors(self, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Tensor]:
        """hidden, weight, target, bias (perhaps) and the upstream gradient, non-uniform."""
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(self.n, self.d, generator=generator)
        weight = torch.randn(self.v, self.d, generator=generator) * (2 / self.d**0.5)
        target = torch.randint(0, self.v, (self.n,), generator=generator)
        bias = torch.randn(self.v, generator=generator)
        upstream = torch.randn(self.n, generator=generator)
        # Half of the columns shift the logits of a token, for all rows alike: 10 in hidden times `step` in weight.
        half, step = self.d // 2, 1 / (10 * max(1, self.d // 2))
        if self.kind in ("negative", "offset"):
            hidden[:, :half], weight[:, :half] = 10.0, (-1000.0 if self.kind == "negative" else 1000.0) * step
        elif self.kind == "rising":
            hidden[:, :half], weight[:, :half] = 10.0, torch.linspace(0, 240, self.v).unsqueeze(1) * step
        elif self.kind == "peaked":
            hidden += 6 * weight[target] / weight[target].square().sum(1, keepdim=True).sqrt()
        if self.ignored and self.n > 2:
            target[1::5] = -100
        out = {"hidden": hidden, "weight": weight, "bias": bias} if self.bias else {"hidden": hidden, "weight": weight}
        out = {name: t.to(device, dtype) for name, t in out.items()}
        return out | {"target": target.to(device), "upstream": upstream.to(device)}


@dataclass(frozen=True)
class Result:
    """One comparison: the output whose error came nearest to what is allowed, or went over it."""

    op: str
    shape: str
    dtype: torch.dtype
    backend: str
    regime: str
    output: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # False for NaN


def head_outputs(
    fn, tensors: dict[str, Tensor], regime: str, dtype: torch.dtype | None = None, entropy_grad: bool = False
) -> dict[str, Tensor]:
    """fn(hidden, weight, target, bias) -> (logp, entropy), with the gradients that the regime asks for; `entropy_grad`:
    of the entropy too, whose upstream gradient is that of the row across."""
    trained = {"none": (), "frozen": ("hidden",)}.get(regime, ("hidden", "weight", "bias"))
    x = {n: t.detach().to(dtype or t.dtype, copy=True) for n, t in tensors.items() if n in ("hidden", "weight", "bias")}
    for name in x:
        x[name].requires_grad_(name in trained)
    logp, entropy = fn(x["hidden"], x["weight"], tensors["target"], x.get("bias"))
    if trained:
        upstream = tensors["upstream"].to(logp.dtype)
        of = slice(1 + entropy_grad)
        torch.autograd.backward((logp, entropy)[of], (upstream, upstream.flip(0))[of])
    grads = {f"d{name}": t.grad for name, t in x.items() if t.grad is not None}
    return {"logp": logp.detach(), "entropy": entropy.detach(), **grads}


def head_results(
    case: Case,
    dtype: torch.dtype,
    device: str,
    backends: list[str],
    regimes: tuple[str, ...] = REGIMES,
    entropy_grad: bool = False,
) -> Iterator[Result]:
    """`linear_logprob`, or `linear_logprob_entropy`, in every backend and regime: its worst output each."""
    tensors = case.tensors(dtype, device)
    rule: dict[str, Any] = {"softcap": case.softcap, "logit_scale": case.logit_scale}
    rule |= {} if entropy_grad else {"return_entropy": True}
    name = "linear_logprob_entropy" if entropy_grad else "linear_logprob"

    def plain(*args: Tensor) -> Any:
        return getattr(reference, name)(*args, **rule)

    exact = head_outputs(plain, tensors, "kept", torch.float64, entropy_grad)
    naive = head_outputs(plain, tensors, "kept", None, entropy_grad)
    magnitude = _largest_logit(case, tensors)
    # dhidden is a difference of rows of W, whose rounding does not shrink with it.
    operands = {"dhidden": _rms(tensors["weight"].double()) * _rms(tensors["upstream"].double())}
    for backend in backends:
        for regime in regimes:
            budget = {"kept": 1 << 62, "sliced": 0}.get(regime)

            def fused(*args: Tensor, budget=budget, backend=backend) -> Any:
                return getattr(ops, name)(*args, **rule, memory_budget=budget, backend=backend)

            ours = head_outputs(fused, tensors, regime, None, entropy_grad)
            errors = {
                output: budgeted_error(ours[output], naive[output], exact[output], magnitude, operands.get(output))
                for output in ours
            }
            yield _worst(name, str(case), dtype, backend, regime, errors)


def _largest_logit(case: Case, tensors: dict[str, Tensor]) -> float:
    raw = tensors["hidden"].double() @ tensors["weight"].double().t()
    raw += tensors.get("bias", raw.new_zeros(()))
    return reference.logit_rule(raw, case.softcap, case.logit_scale).abs().max().item()


def budgeted_error(
    ours: Tensor, naive: Tensor, exact: Tensor, magnitude: float, scale: float | None = None
) -> tuple[float, float]:
    """(error, allowed) of one tensor, of the norm that is nearer to its limit; NaN where ours is not finite.

    A log-probability of logits of size `magnitude` is off by eps32 * magnitude, and so is, relative to the tensor's own
    size or to `scale` where that is larger, a gradient made of probabilities.
    """
    if ours.shape != exact.shape or not ours.isfinite().all():
        return float("nan"), 0.0
    eps = torch.finfo(torch.float32).eps * magnitude
    if ours.dtype == torch.float64:
        eps = torch.finfo(torch.float64).eps * 100 * max(1.0, magnitude)
    worst = (0.0, eps)
    for norm, factor in ((_rms, 1.5), (_largest, 4.0)):
        floor = eps * max(norm(exact), scale or 0.0) if exact.dim() > 1 else eps
        error, allowed = norm(ours.double() - exact), factor * norm(naive.double() - exact) + floor
        if error * worst[1] >= worst[0] * allowed:
            worst = (error, allowed)
    return worst


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _worst(
    op: str, shape: str, dtype: torch.dtype, backend: str, regime: str, errors: dict[str, tuple[float, float]]
) -> Result:
    def ratio(name: str) -> float:
        error, allowed = errors[name]
        return float("inf") if error != error else error / allowed if allowed else float(error > 0)

    output = max(errors, key=ratio)
    return Result(op, shape, dtype, backend, regime, output, *errors[output])


def slice_results(device: str) -> Iterator[Result]:
    """The Triton kernel that takes a row's vocabulary in slices; no regime uses it on one device."""
    from fastpo.kernels import logprob as kernels

    case = Case(7, 24, 5003, bias=True, **SOFTCAPPED)
    rule = {"softcap": case.softcap, "logit_scale": case.logit_scale}
    for dtype in ops.NATIVE_DTYPES["triton"]:
        x = case.tensors(dtype, device)
        raw, bias = x["hidden"] @ x["weight"].t(), x["bias"]
        state = kernels.logprob_slice_init(case.n, device, entropy=True)
        for begin in range(0, case.v, 2048):
            v = slice(begin, begin + 2048)
            kernels.logprob_slice_fwd(raw[:, v], x["target"], bias[v], state, col_offset=begin, **rule)
        ours = kernels.logprob_slice_finish(state, x["target"], **rule)
        exact = reference.row_logprob(raw.double() + bias.double(), x["target"], **rule)
        naive = reference.row_logprob(raw.float() + bias.float(), x["target"], **rule)
        rows = zip(("logp", "lse", "entropy"), ours, naive, exact)
        errors = {name: budgeted_error(a, b, c, case.softcap) for name, a, b, c in rows}
        yield _worst("logprob_slice_fwd", str(case), dtype, "triton", "-", errors)


def adamw_results(device: str) -> Iterator[Result]:
    """A step of the Triton AdamW with fp32 masters, and without: the same numbers, rounded as the definition does."""
    from fastpo.kernels import adamw as kernels

    n, hyper = 40_001, {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    generator = torch.Generator().manual_seed(0)
    start, grad, exp_avg, exp_avg_sq = (torch.randn(n, generator=generator).to(device) for _ in range(4))
    key, one, scale = (-5, 7), torch.ones((), device=device), torch.full((), 0.5, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        before = start.to(dtype), grad.to(dtype), exp_avg, exp_avg_sq.square()

        def tensors(master: bool, before=before) -> list[Any]:
            weight, grad, exp_avg, exp_avg_sq = (x.clone() for x in before)
            wide = weight.float() if master else None
            return [kernels.AdamWTensor(grad, weight, wide, exp_avg, exp_avg_sq, 3 * one, 1)]

        (wide,), (narrow,) = tensors(True), tensors(False)
        for t in (wide, narrow):
            own_key = None if t is wide else key
            kernels.adamw(kernels.adamw_table([t]), [t], finite=one, scale=scale, key=own_key, **hyper)
        exact, naive = (
            reference.adamw(*(x.to(kind) for x in before), 3, scale=0.5, **hyper)
            for kind in (torch.float64, torch.float32)
        )
        ours = zip(("master", "exp_avg", "exp_avg_sq"), (wide.master, wide.exp_avg, wide.exp_avg_sq), naive, exact)
        errors = {name: budgeted_error(a, b, c, c.abs().max().item()) for name, a, b, c in ours}
        yield _worst("adamw", f"{n} numbers", dtype, "triton", "master", errors)
        noise = reference.rounding_noise(n, 1, key).to(device)
        normal = wide.master.abs() >= torch.finfo(dtype).smallest_normal
        wrong = narrow.weight != reference.stochastic_round(wide.master, dtype, noise)
        yield _worst(
            "adamw", f"{n} numbers", dtype, "triton", "stochastic", {"rounding": (float((wrong & normal).sum()), 0.5)}
        )


# What the losses of pairs are checked with beside their defaults: an NLL that is not a mean over the step's tokens, as
# the kernel has it, and labels that are smoothed.
_HYPER: dict[str, dict[str, Any]] = {
    "dpo": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.1}, "simpo": {"label_smoothing": 0.1},
    "cpo": {"nll_reduction": "seq_mean"}, "cpo_simpo": {"nll_reduction": "seq_sum"},
    "cpo_hinge": {"nll_reduction": "seq_sum"}, "cpo_ipo": {"nll_reduction": "seq_mean"},
    "rpo": {"nll_reduction": "seq_mean"}, "slic": {"nll_reduction": "seq_sum"},
    "orpo": {"nll_reduction": "seq_mean", "disable_prompt_loss": True},
}  # fmt: skip


def preference_results(device: str, backends: list[str]) -> Iterator[Result]:
    """`preference_loss` for every loss: total, per-pair outputs, metrics, and the gradient of every token."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 7, 200, 1500, 33, 4, 60, 61])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    logp, ref, prev = (-3 * torch.rand(3, int(offsets[-1]), generator=generator)).to(device)
    rows = torch.rand(len(logp), generator=generator).to(device)
    weight, win, lose = torch.rand(3, 4, generator=generator).to(device)
    layouts = {"unique": [[0, 1], [2, 3], [5, 4], [7, 6]], "shared": [[0, 1], [2, 1], [2, 6], [7, 2]]}
    for loss_type in ops.FUSED_LOSSES:
        loss = LOSSES[loss_type]
        hyper = loss.hyper(**_HYPER.get(loss_type, {}))
        for layout, responses in layouts.items():
            first = [offsets[r] + torch.arange(int(lengths[list(pair)].min())) for pair in responses for r in pair]
            x = ops.PreferenceInputs(
                logp, rows, ref, None, prev if loss.previous else None, None, None,
                torch.cat(first).to(device) if loss.drawn else None, offsets.int().to(device),
                torch.tensor(responses, dtype=torch.int32, device=device), weight, win, lose,
            )  # fmt: skip

            def plain(x: ops.PreferenceInputs, name=loss_type, hyper=hyper) -> Any:
                return ops.plain_preference_loss(name, hyper, x, reference.response_sums)

            exact, naive = (_preference_outputs(plain, x, dtype) for dtype in (torch.float64, torch.float32))
            magnitude = exact["chosen_logps"].abs().max().item()
            for backend in backends:

                def fused(x: ops.PreferenceInputs, name=loss_type, hyper=hyper, backend=backend, layout=layout) -> Any:
                    options = {"loss_type": name, "unique": layout == "unique", "backend": backend, **hyper}
                    return ops.preference_loss(**x._asdict(), **options)

                ours = _preference_outputs(fused, x, torch.float32)
                # Losses and coefficients are at most quadratic in the sums, with slopes of the size of their values.
                errors = {
                    name: budgeted_error(
                        ours[name], naive[name], exact[name], magnitude * max(1.0, exact[name].abs().max().item())
                    )
                    for name in exact
                }
                yield _worst(f"preference {loss_type}", f"4 pairs {layout}", torch.float32, backend, "-", errors)


def _preference_outputs(fn, x: ops.PreferenceInputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything that fn(x) gives in `dtype`, with the gradients of the total."""
    wide = {name: t.to(dtype) for name, t in x._asdict().items() if t is not None and t.is_floating_point()}
    leaves = {name: wide[name].detach().clone().requires_grad_() for name in ("logp", "rows")}
    total, out = fn(x._replace(**wide | leaves))
    total.backward()
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"total": total.detach(), **{n: t.detach() for n, t in out._asdict().items()}, **grads}


def cases(device: str) -> Iterator[tuple[Case, torch.dtype]]:
    """What `fastpo check` runs: odd shapes, real vocabularies, the logit rules of real models, extreme logits."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    rules: list[dict[str, Any]] = [
        {},
        {"bias": True},
        SOFTCAPPED,
        {**SOFTCAPPED, "bias": True},
        {"logit_scale": 0.0625},
    ]
    for dtype in (fp32, bf16, fp16):
        for rule in rules:
            yield Case(67, 40, 5003, **rule), dtype
        for kind in ("negative", "offset", "rising", "peaked"):
            yield Case(33, 24, 9001, kind), dtype
    yield Case(9, 16, 701), torch.float64
    for shape in ((1, 1, 1), (1, 8, 17), (3, 130, 257)):
        yield Case(*shape, bias=True), fp32
    if device == "cpu":
        yield Case(60, 40, 50257, bias=True), fp32
        yield Case(12, 40, 151936), bf16
        return
    for v in (50257, 128256, 151936, 256000):
        yield Case(520, 256, v), bf16
        yield Case(70, 136, v, bias=True, **SOFTCAPPED), bf16
    yield Case(66000, 64, 1031), bf16
    yield Case(2100, 1024, 128256), bf16


def _table(results: list[Result]) -> str:
    header = ("op", "shape", "dtype", "backend", "regime", "worst", "error", "allowed", "")
    rows = [
        (r.op, r.shape, str(r.dtype).removeprefix("torch."), r.backend, r.regime, r.output)
        + (f"{r.error:.2e}", f"{r.allowed:.2e}", "ok" if r.ok else "FAILED")
        for r in results
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in [header, *rows])


def run_check(device: str | None = None, *, verbose: bool = True) -> int:
    """Check everything that runs on `device`, print a table; 0 if all is within the criterion, else 1."""
    device = str(resolve_device(device))
    if not device.startswith(("cpu", "cuda")):
        raise DeviceError(f"device {device!r} is not supported; use cuda or cpu")
    begin = time.perf_counter()
    on_cpu = device.startswith("cpu")
    backends = [b for b in ops.available_backends() if (b == "cpu") <= on_cpu and (b == "triton") <= (not on_cpu)]
    results: list[Result] = []
    whole = False
    try:
        for result in _all_results(device, backends):
            results.append(result)
        whole = True
    finally:  # what is cut short by Ctrl-C, or by a kernel that fails, has told something too
        failed = [r for r in results if not r.ok]
        if verbose or failed:
            print(_table(results if verbose else failed))
        seconds = time.perf_counter() - begin
        cut = "" if whole else ", the others have not run"
        print(f"{len(results) - len(failed)} of {len(results)} checks passed on {device} in {seconds:.1f} s{cut}")
    return 1 if failed else 0


def _all_results(device: str, backends: list[str]) -> Iterator[Result]:
    for case, dtype in cases(device):
        able = [b for b in backends if dtype in ops.NATIVE_DTYPES[b]]
        yield from head_results(case, dtype, device, able)
        yield from head_results(case, dtype, device, able, entropy_grad=True)
    if "triton" in backends:
        yield from slice_results(device)
        yield from adamw_results(device)
    yield from preference_results(device, [b for b in backends if b != "cpu"])
