"""The public ops against the fp64 reference: every backend and cost regime, and what can go wrong around them.

Sizes are small because the criterion is relative to plain PyTorch's own error; V is large enough for several tiles, and
`small_tiles` makes more of them. Tests with a `device` run on a GPU too: pytest -m gpu.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpo import check, ops
from fastpo.check import SOFTCAPPED, Case
from fastpo.errors import FastpoError
from fastpo.kernels import reference
from fastpo.losses.table import LOSSES, Pairs
from fastpo.ops import backends, inputs, parts
from fastpo.training.metrics import pair_metrics

HERE = Path(__file__).resolve()
BUILT = backends.compiled is not None
GPU = pytest.mark.gpu

# In Triton's interpreter the small ones run on CPU tensors too, in a process of their own, as `make test` has it:
# TRITON_INTERPRET=1 pytest tests/ops/test_head.py -k triton-interpreted
ON_CPU = [
    pytest.param(("torch", "cpu"), id="torch"),
    pytest.param(("cpu", "cpu"), id="cpu", marks=pytest.mark.skipif(not BUILT, reason="csrc/ was not built")),
]
ON_GPU = [
    pytest.param(("torch", "cuda"), id="torch-cuda", marks=GPU),
    pytest.param(("triton", "cuda"), id="triton-cuda", marks=GPU),
]
INTERPRETED = [pytest.param(("triton", "cpu"), id="triton-interpreted")] if inputs.INTERPRETED else []
COMPILED = [*ON_CPU, *ON_GPU]
EVERYWHERE = [*ON_CPU, *INTERPRETED, *ON_GPU]
DTYPES = [pytest.param(getattr(torch, name), id=name) for name in ("float32", "bfloat16", "float16")]
REGIMES = ("none", "frozen", "kept", "sliced")
BUDGETS = {"none": None, "frozen": None, "kept": 1 << 62, "sliced": 0}


@pytest.fixture(autouse=True)
def _one_thread():
    """These problems are too small for a second thread; `test_threads` is about threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several row blocks and dozens of column slices even for small problems."""
    for name in ("CPU_TILE_BYTES", "CPU_KEPT_TILE_BYTES", "DEVICE_TILE_BYTES"):
        monkeypatch.setattr(backends, name, 8 << 10)
    for name, rows in (("CPU_TILE_ROWS", 32), ("DEVICE_TILE_ROWS", 32), ("DEVICE_ROW_STEP", 2)):
        monkeypatch.setattr(backends, name, rows)


def skip_unless_takes(backend: str, dtype: torch.dtype) -> None:
    if dtype not in ops.NATIVE_DTYPES[backend]:
        pytest.skip(f"{backend} does not take {dtype}")


def assert_within_criterion(case: Case, where: tuple[str, str], dtype: torch.dtype, regimes=REGIMES) -> None:
    backend, device = where
    skip_unless_takes(backend, dtype)
    for result in check.head_results(case, dtype, device, [backend], regimes):
        assert result.ok, result


def problem(n=9, d=12, v=301, *, bias=True, dtype=torch.float32, device="cpu", **kwargs) -> dict[str, Tensor]:
    return Case(n, d, v, bias=bias, **kwargs).tensors(dtype, device)


def run(x: dict[str, Tensor], trained=("hidden", "weight", "bias"), upstream: Tensor | None = None, **options):
    """(logp, gradients by name) of linear_logprob for the inputs of `problem`."""
    leaves = {n: x[n].detach().clone().requires_grad_(n in trained) for n in ("hidden", "weight", "bias") if n in x}
    logp = ops.linear_logprob(leaves["hidden"], leaves["weight"], x["target"], leaves.get("bias"), **options)
    if trained:
        logp.backward(x["upstream"].to(logp.dtype) if upstream is None else upstream)
    return logp.detach(), {name: leaf.grad for name, leaf in leaves.items()}


# ---- accuracy: output, entropy and every gradient, in every regime

RULES = [
    pytest.param({}, id="plain"),
    pytest.param({"bias": True}, id="bias"),
    pytest.param(SOFTCAPPED, id="softcap"),
    pytest.param({"bias": True, **SOFTCAPPED}, id="all"),
    pytest.param({"logit_scale": -0.5}, id="negative-scale"),
]


@pytest.mark.parametrize("where", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_accuracy(where, dtype, rule):
    assert_within_criterion(Case(67, 40, 1003, **rule), where, dtype)


@pytest.mark.parametrize("where", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "negative", "offset", "rising", "peaked"])
def test_many_tiles_and_extreme_logits(where, dtype, kind, small_tiles):
    """`rising` makes the compiled path restate its rows at nearly every tile; all-negative logits and offsets of 1e3
    are where a padded column, or a maximum that starts at 0, shows."""
    assert_within_criterion(Case(67, 24, 5003, kind, bias=kind == "normal"), where, dtype)


# Logits far beyond the cap: every slope there is the small rest of 1.
STRICT = {
    "plain": (1, {}), "softcap": (1, SOFTCAPPED), "low-cap": (1, {"softcap": 4.0}),
    "negative-scale": (1, {"logit_scale": -0.5}), "saturated": (8, {"softcap": 5.0}),
    "saturated-scaled": (8, {"softcap": 30.0, "logit_scale": 1.7}),
}  # fmt: skip


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("name", STRICT)
def test_every_gradient_is_as_exact_as_plain_pytorchs(where, name, request):
    """In fp32 1.5 times the error and nothing beside it, root mean squares over all problems: what `fastpo check`
    allows for one rounding of a logit would hide errors that add up over the rows, or where slopes are small."""
    backend, device = where
    request.getfixturevalue("round_fma_once")
    scale, rule = STRICT[name]
    interpreted = backend == "triton" and device == "cpu"
    if interpreted and name not in ("plain", "negative-scale", "saturated"):
        pytest.skip("the interpreter is slow: the others are compiled")
    n, d, v = (33, 16, 333) if interpreted else (257, 40, 1003)
    errors: dict[tuple[str, str], list[Tensor]] = {}
    for seed in range(1 if interpreted else 3):
        x = Case(n, d, v, bias=True).tensors(torch.float32, device, seed)
        x["hidden"] *= scale
        options = {"softcap": None, "logit_scale": 1.0, "return_entropy": True, **rule}
        plain = functools.partial(reference.linear_logprob, **options)
        exact, naive = (check.head_outputs(plain, x, "kept", dtype) for dtype in (torch.float64, None))
        for regime in REGIMES[1:]:
            ours = check.head_outputs(
                functools.partial(ops.linear_logprob, **options, memory_budget=BUDGETS[regime], backend=backend),
                x,
                regime,
            )
            for output in sorted(ours.keys() - {"logp", "entropy"}):
                pair = [(of[output].double() - exact[output]).flatten() for of in (ours, naive)]
                errors.setdefault((regime, output), []).append(torch.stack(pair))
    assert len(errors) == 7
    for what, pairs in errors.items():
        ours, naive = torch.cat(pairs, 1).square().mean(1).sqrt().tolist()
        assert ours <= 1.5 * naive, f"{what}: error {ours:.3g}, plain PyTorch's {naive:.3g}"


# V: one column, less than a vector, an odd rest after whole vectors, the vocabularies of GPT-2, Llama 3 and Qwen
# (cut down in D and N); D: smaller than any block, above one, not a multiple of 64.
SHAPES = [(1, 1, 1), (1, 8, 7), (2, 3, 17), (3, 130, 257), (5, 65, 2049), (4, 200, 4096)]
VOCABULARIES = [32000, 50257, 50304, 128256, 151936, 152064, 256000]


@pytest.mark.parametrize("where", COMPILED)
@pytest.mark.parametrize("shape", SHAPES, ids="{0[0]}x{0[1]}x{0[2]}".format)
def test_shapes(where, shape):
    assert_within_criterion(Case(*shape, bias=True), where, torch.float32)


@pytest.mark.parametrize("where", COMPILED)
@pytest.mark.parametrize("v", VOCABULARIES)
def test_vocabularies(where, v):
    assert_within_criterion(Case(3, 8, v, "negative", bias=True), where, torch.float32)


@pytest.mark.parametrize("where", INTERPRETED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("kind", ["normal", "negative", "rising"])
def test_interpreted(where, dtype, kind, small_tiles):
    rule = {"bias": True, **SOFTCAPPED} if kind == "normal" else {}
    assert_within_criterion(Case(7, 16, 333, kind, **rule), where, dtype)


@pytest.mark.parametrize("where", [*INTERPRETED, ON_GPU[1]])
def test_slice_kernel(where):
    for result in check.slice_results(where[1]):
        assert result.ok, result


@pytest.mark.gpu
@pytest.mark.parametrize("v", VOCABULARIES)
def test_vocabularies_in_bf16(v):
    assert_within_criterion(Case(300, 128, v), ("triton", "cuda"), torch.bfloat16)


@pytest.mark.parametrize("where", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_more_rows_than_a_grid_dimension(where, dtype):
    assert_within_criterion(Case(70_000, 4, 33), where, dtype)


@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "sliced"])
@pytest.mark.parametrize("rule", [{}, {"softcap": 5.0, "logit_scale": 0.7}], ids=["plain", "softcap"])
@pytest.mark.parametrize("trained", [(True, True, True), (True, False, False)], ids=["all", "frozen"])
def test_gradcheck(budget, rule, trained, small_tiles):
    x = problem(5, 4, 67, dtype=torch.float64)
    leaves = [x[n].requires_grad_(t) for n, t in zip(("hidden", "weight", "bias"), trained)]
    leaves[1].data *= 0.5

    def fn(hidden, weight, bias):
        return ops.linear_logprob(hidden, weight, x["target"], bias, memory_budget=budget, **rule)

    assert torch.autograd.gradcheck(fn, leaves, eps=1e-5, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("where", ON_CPU)
def test_nearly_certain_target(where):
    """log p to a relative 1e-5 where 1 - p is far below the dtype's resolution, and its gradient too."""
    v = 1000
    bias = torch.zeros(v)
    bias[7] = 40.0
    hidden, weight = torch.zeros(2, 3, requires_grad=True), torch.randn(v, 3)
    logp = ops.linear_logprob(hidden, weight, torch.tensor([7, 7]), bias, backend=where[0])
    exact = -torch.log1p((v - 1) * torch.tensor(-40.0).double().exp())
    torch.testing.assert_close(logp.double(), exact.expand(2), rtol=1e-5, atol=0)
    logp.sum().backward()
    others = weight.double()[torch.arange(v) != 7]
    expected = -exact * (weight[7].double() - others.mean(0))
    torch.testing.assert_close(hidden.grad.double(), expected.expand(2, 3), rtol=1e-4, atol=0)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("regime", REGIMES[1:])
def test_masked_vocabulary(where, regime, small_tiles):
    """Logits of -inf, whole first tiles of them: probability 0, gradient 0, nothing becomes NaN."""
    backend, device = where
    x = problem(6, 8, 3001, device=device)
    x["target"] = torch.randint(2600, 3001, (6,), device=device)
    x["bias"][:2500] = -torch.inf
    trained = ("hidden",) if regime == "frozen" else ("hidden", "weight", "bias")
    logp, grads = run(x, trained, backend=backend, memory_budget=BUDGETS[regime])
    small = {**x, "weight": x["weight"][2500:], "bias": x["bias"][2500:], "target": x["target"] - 2500}
    expected, small_grads = run(small, trained, backend="torch")
    torch.testing.assert_close(logp, expected)
    torch.testing.assert_close(grads["hidden"], small_grads["hidden"])
    if regime != "frozen":
        assert (grads["weight"][:2500] == 0).all() and (grads["bias"][:2500] == 0).all()
        torch.testing.assert_close(grads["weight"][2500:], small_grads["weight"])


@pytest.mark.parametrize("where", ON_CPU)
def test_nan_stays_in_its_row(where):
    x = problem()
    x["hidden"][4] = torch.nan
    logp, _ = run(x, (), backend=where[0])
    assert logp.isnan().nonzero().flatten().tolist() == [4]


# ---- gradients: which, for what upstream, and how often


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "sliced"])
@pytest.mark.parametrize("mask", range(8), ids="{:03b}".format)
def test_gradients_asked_for_and_no_others(where, budget, mask, monkeypatch):
    backend, device = where
    names = ("hidden", "weight", "bias")
    trained = tuple(name for i, name in enumerate(names) if mask >> i & 1)
    x = problem(device=device)
    _, expected = run(x, names, backend="torch")
    sizes = []
    for table in (backends.SLICED_BACKWARD, {"kept": backends.kept_backward}):
        for key, fn in table.items():

            def spy(*args, fn=fn):
                grads = fn(*args)
                sizes.append([g is not None for g in grads])
                return grads

            if key == "kept":
                monkeypatch.setattr(backends, "kept_backward", spy)
            else:
                monkeypatch.setitem(backends.SLICED_BACKWARD, key, spy)
    logp, grads = run(x, trained, backend=backend, memory_budget=budget)
    for name in names:
        assert (grads[name] is not None) == (name in trained), name
        if name in trained:
            torch.testing.assert_close(grads[name], expected[name], rtol=1e-4, atol=1e-5)
    if trained and trained != ("hidden",):
        assert sizes == [[name in trained for name in names]]


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("regime", REGIMES[1:])
def test_upstream_gradient_per_row(where, regime):
    """Rows are independent: the gradient for c is the sum over rows of c_i times the gradient for row i alone."""
    backend, device = where
    trained = ("hidden",) if regime == "frozen" else ("hidden", "weight", "bias")
    x = problem(4, 6, 97, device=device, ignored=False)
    options = {"backend": backend, "memory_budget": BUDGETS[regime]}
    _, together = run(x, trained, **options)
    rows = [run(x, trained, row, **options)[1] for row in torch.eye(4, device=device)]
    for name in trained:
        summed = sum(c * row[name] for c, row in zip(x["upstream"], rows))
        torch.testing.assert_close(together[name], summed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("regime", REGIMES[1:])
def test_ignored_rows_do_nothing(where, regime):
    backend, device = where
    trained = ("hidden",) if regime == "frozen" else ("hidden", "weight", "bias")
    options = {"backend": backend, "memory_budget": BUDGETS[regime]}
    x = problem(device=device)
    live = x["target"] != -100
    logp, grads = run(x, trained, **options)
    kept_rows = {**x, **{n: x[n][live] for n in ("hidden", "target", "upstream")}}
    expected, expected_grads = run(kept_rows, trained, **options)
    assert (logp[~live] == 0).all() and (grads["hidden"][~live] == 0).all()
    torch.testing.assert_close(logp[live], expected)
    torch.testing.assert_close(grads["hidden"][live], expected_grads["hidden"])
    if regime != "frozen":
        torch.testing.assert_close(grads["weight"], expected_grads["weight"])
    _, nothing = run({**x, "target": torch.full_like(x["target"], -100)}, trained, **options)
    assert all((nothing[name] == 0).all() for name in trained)
    upstream = x["upstream"].where(live, torch.nan)  # of a caller who divides by what an ignored row has none of
    _, unharmed = run(x, trained, upstream, **options)
    assert all(torch.equal(unharmed[name], grads[name]) for name in trained)


@pytest.mark.parametrize("where", EVERYWHERE)
def test_entropy_beside_logits_of_the_least_finite_number(where):
    """A vocabulary masked by finfo.min in the bias, before and after what is left of it."""
    backend, device = where
    x = problem(5, 16, 9000, device=device, ignored=False)
    for masked in (slice(0, 6144), slice(4500, 9000)):
        x["bias"].zero_()[masked] = torch.finfo(torch.float32).min
        x["target"].fill_(7000 if masked.start == 0 else 100)
        args = (x["hidden"], x["weight"], x["target"], x["bias"])
        _, entropy = ops.linear_logprob(*args, return_entropy=True, backend=backend)
        _, exact = reference.linear_logprob(*(t.double() if t.is_floating_point() else t for t in args),
                                            return_entropy=True)  # fmt: skip
        torch.testing.assert_close(entropy.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("regime", REGIMES)
def test_no_rows(where, regime):
    backend, device = where
    trained = {"none": (), "frozen": ("hidden",)}.get(regime, ("hidden", "weight", "bias"))
    x = problem(0, device=device)
    logp, grads = run(x, trained, backend=backend, memory_budget=BUDGETS[regime])
    assert logp.shape == (0,)
    assert all(grads[name].shape == x[name].shape and (grads[name] == 0).all() for name in trained)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("regime", REGIMES[1:])
def test_strides(where, regime):
    backend, device = where
    trained = ("hidden",) if regime == "frozen" else ("hidden", "weight", "bias")
    options = {"backend": backend, "memory_budget": BUDGETS[regime]}
    x = problem(device=device)
    expected, expected_grads = run(x, trained, **options)
    strided = {
        "hidden": x["hidden"].t().contiguous().t(),
        "weight": x["weight"].repeat_interleave(2, 1)[:, ::2],
        "bias": x["bias"].repeat_interleave(3)[::3],
        "target": x["target"].int().repeat_interleave(2)[::2],
    }
    assert not any(t.is_contiguous() for t in strided.values())
    leaves = {name: strided[name].detach().requires_grad_(name in trained) for name in ("hidden", "weight", "bias")}
    logp = ops.linear_logprob(leaves["hidden"], leaves["weight"], strided["target"], leaves["bias"], **options)
    upstream = x["upstream"].repeat_interleave(2)[::2]
    grads = torch.autograd.grad(logp, [leaves[name] for name in trained], upstream)
    torch.testing.assert_close(logp, expected)
    for name, grad in zip(trained, grads):
        torch.testing.assert_close(grad, expected_grads[name])


@pytest.mark.parametrize("where", COMPILED)
@pytest.mark.parametrize("regime", REGIMES[1:])
def test_deterministic(where, regime):
    backend, device = where
    trained = ("hidden",) if regime == "frozen" else ("hidden", "weight", "bias")
    x = problem(130, 24, 5003, device=device)
    first, second = (run(x, trained, backend=backend, memory_budget=BUDGETS[regime]) for _ in range(2))
    assert first[0].equal(second[0])
    assert all(first[1][name].equal(second[1][name]) for name in trained)


@pytest.mark.parametrize("where", ON_CPU)
def test_backward_twice_and_the_graph_kept(where):
    x = problem()
    weight = x["weight"].requires_grad_()
    logp = ops.linear_logprob(x["hidden"], weight, x["target"], backend=where[0])
    first = torch.autograd.grad(logp, weight, x["upstream"], retain_graph=True)[0]
    assert first.equal(torch.autograd.grad(logp, weight, x["upstream"])[0])


@pytest.mark.parametrize("regime", REGIMES[1:])
def test_second_derivative_is_refused(regime):
    x = problem(bias=False)
    x["hidden"].requires_grad_()
    x["weight"].requires_grad_(regime != "frozen")
    logp = ops.linear_logprob(x["hidden"], x["weight"], x["target"], memory_budget=BUDGETS[regime])
    (grad,) = torch.autograd.grad(logp.sum(), x["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_entropy_is_detached():
    x = problem()
    logp, entropy = ops.linear_logprob(x["hidden"].requires_grad_(), x["weight"], x["target"], return_entropy=True)
    assert logp.requires_grad and not entropy.requires_grad and entropy.dtype == torch.float32


# ---- whether the target is the likeliest token


def exact_problem(device: str, dtype: torch.dtype, rule: dict) -> dict[str, Tensor]:
    """Small whole numbers: every logit, and so every tie, is the same in any dtype and in any order of summing. Targets
    are the first or the last of the largest logits, the first of the second largest, masked, ignored, or any."""
    g = torch.Generator().manual_seed(3)
    x = {"hidden": torch.randint(-1, 2, (37, 8), generator=g), "weight": torch.randint(-3, 4, (1003, 8), generator=g)}
    x["bias"] = torch.randint(-4, 5, (1003,), generator=g)
    x = {name: t.to(device, dtype) for name, t in x.items()}
    if not rule:  # a negative scale would make it +inf, and a cap finite
        x["bias"][:100] = -torch.inf
    z = reference.logit_rule(F.linear(*(t.double() for t in x.values())), **rule)
    top = z == z.amax(1, keepdim=True)
    assert (top.sum(1) > 1).sum() > 5, "else no tie is seen"
    target = torch.randint(0, 1003, (37,), generator=g).to(device)
    target[0::6], target[1::6] = top[0::6].int().argmax(1), 1002 - top[1::6].flip(1).int().argmax(1)
    target[2::6], target[3::6], target[4::6] = z.masked_fill(top, -torch.inf)[2::6].argmax(1), 50, -100
    return x | {"target": target}


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("dtype", [*DTYPES, pytest.param(torch.float64, id="float64")])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("rule", [{}, {"softcap": 40.0, "logit_scale": 0.5}, {"logit_scale": -2.0}],
                         ids=["plain", "softcap", "negative-scale"])  # fmt: skip
def test_top1(where, dtype, regime, rule, small_tiles):
    """Exactly as in fp64, over many tiles, with and without a grad_filter; it changes nothing that is asked for with
    it."""
    backend, device = where
    skip_unless_takes(backend, dtype)
    if where == ("triton", "cpu") and rule and dtype != torch.float32:
        pytest.skip("in the interpreter, which takes seconds for each, 16 bits with the plain rule alone")
    x = exact_problem(device, dtype, rule)
    trained = {"none": (), "frozen": ("hidden",)}.get(regime, ("hidden", "weight", "bias"))
    leaves = {n: x[n].requires_grad_(n in trained) for n in ("hidden", "weight", "bias")}
    args = (leaves["hidden"], leaves["weight"], x["target"], leaves["bias"])
    wide = [t.detach().double() if t.is_floating_point() else t for t in args]
    _, exact = reference.linear_logprob(*wide, return_top1=True, **rule)
    assert 12 <= exact.sum() < 25
    for grad_filter in (0.0, 0.01):
        options = {"backend": backend, "memory_budget": BUDGETS[regime], "grad_filter": grad_filter, **rule}
        *both, top1 = ops.linear_logprob(*args, return_entropy=True, return_top1=True, **options)
        assert top1.tolist() == exact.tolist()
        assert top1.dtype == backends.acc_dtype(dtype) and not top1.requires_grad
        alone = ops.linear_logprob(*args, return_entropy=True, **options)
        assert len(alone) == 2 and all(a.equal(b) for a, b in zip(both, alone, strict=True))
        assert both[0].requires_grad == (regime != "none")


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("grad_filter", [0.0, 0.01], ids=["all", "filtered"])
def test_top1_beside_logits_that_are_not_finite(where, grad_filter, small_tiles):
    """A NaN or +inf anywhere in a row, and a row of nothing but -inf, have no likeliest token; no rows, none."""
    backend, device = where
    x = exact_problem(device, torch.float32, {})
    live = x["target"] != -100
    z = F.linear(x["hidden"], x["weight"], x["bias"])
    x["target"] = z.argmax(1).where(live, x["target"])
    x["weight"][700, 0] = torch.inf  # of which a hidden 0 makes NaN, and the others +inf or -inf
    leaf = x["hidden"].requires_grad_()
    options = {"return_top1": True, "backend": backend, "grad_filter": grad_filter}
    logp, top1 = ops.linear_logprob(leaf, x["weight"], x["target"], x["bias"], **options)
    finite = logp.isfinite() & live
    assert 5 < finite.sum() < live.sum() - 5
    assert top1.bool().equal(finite)
    masked = torch.full_like(x["bias"], -torch.inf)
    _, top1 = ops.linear_logprob(leaf.detach(), x["weight"].nan_to_num(posinf=1), x["target"], masked, **options)
    assert not top1.any()
    _, top1 = ops.linear_logprob(leaf[:0], x["weight"], x["target"][:0], x["bias"], **options)
    assert top1.shape == (0,)


# ---- the regime: decided by grad mode, requires_grad and the budget


def regime_of(hidden_grad: bool, weight_grad: bool, bias_grad: bool = False, budget: int | None = None) -> str:
    x = problem(16, 8, 100)
    for name, flag in (("hidden", hidden_grad), ("weight", weight_grad), ("bias", bias_grad)):
        x[name].requires_grad_(flag)
    return inputs.regime_of(x["hidden"], x["weight"], x["bias"], budget)


def test_regime():
    assert regime_of(False, False) == "none"
    assert regime_of(True, False) == "frozen"
    assert regime_of(True, True) == regime_of(False, True) == regime_of(True, False, True) == "kept"
    assert regime_of(True, True, budget=16 * 100 * 4) == "kept"
    assert regime_of(True, True, budget=16 * 100 * 4 - 1) == regime_of(False, True, budget=0) == "sliced"
    with torch.no_grad():
        assert regime_of(True, True) == "none"
    with torch.inference_mode():
        assert regime_of(False, False) == "none"


def test_default_budget_is_a_gibibyte_or_the_fp32_gradient():
    assert ops.default_memory_budget(torch.empty(10, 10)) == 1 << 30
    assert (
        ops.default_memory_budget(torch.empty(256000, 3584, device="meta", dtype=torch.bfloat16)) == 256000 * 3584 * 4
    )


def test_inference_mode():
    x = problem()
    expected, _ = run(x, ())
    with torch.inference_mode():
        assert ops.linear_logprob(x["hidden"], x["weight"], x["target"], x["bias"]).equal(expected)


# ---- memory: no N x V matrix where none is promised


MIB = 1 << 20
# What a tile, its temporaries in plain PyTorch and the allocator's slack may take, whatever N and V are.
CONSTANT = 40 * MIB


def resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def peak_of(step) -> int:
    """Peak resident bytes of a second run of step() over those before it."""
    try:
        step()
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")
        before = resident("VmRSS")
        assert resident("VmHWM") < before + 4 * MIB
    except (OSError, AssertionError, StopIteration):
        pytest.skip("needs /proc/self/clear_refs to reset the peak")
    step()
    return resident("VmHWM") - before


N, D, V = 1536, 32, 32000  # one fp32 N x V matrix: 187.5 MiB; dweight: 3.9 MiB


@pytest.fixture(scope="module")
def big() -> dict[str, Tensor]:
    return problem(N, D, V, bias=False, ignored=False)


@pytest.mark.parametrize("where", ON_CPU[:2])
@pytest.mark.parametrize("regime", REGIMES)
def test_memory(where, regime, big):
    trained = {"none": (), "frozen": ("hidden",)}.get(regime, ("hidden", "weight"))
    matrix = N * V * 4

    def step():
        run(big, trained, backend=where[0], memory_budget=BUDGETS[regime])

    allowed = CONSTANT + (matrix + V * D * 4 if regime == "kept" else 0)
    assert allowed < matrix or regime == "kept"
    peak = peak_of(step)
    assert peak <= allowed, f"peak {peak / MIB:.0f} MiB over allowed {allowed / MIB:.0f} MiB"


def test_memory_measure_sees_a_matrix(big):
    """The measure itself: plain PyTorch, which keeps the logits and their gradient, must show."""

    def step():
        weight = big["weight"].detach().requires_grad_()
        logp = F.linear(big["hidden"], weight).log_softmax(1).gather(1, big["target"].unsqueeze(1))
        logp.sum().backward()

    assert peak_of(step) > 2 * N * V * 4


@pytest.mark.parametrize("where", ON_CPU[:2])
def test_kept_matrix_is_released_by_the_backward(where, big):
    hidden, weight = big["hidden"].detach().requires_grad_(), big["weight"].detach().requires_grad_()
    logp = ops.linear_logprob(hidden, weight, big["target"], backend=where[0], memory_budget=BUDGETS["kept"])
    with_matrix = resident("VmRSS")
    logp.backward(big["upstream"])
    assert resident("VmRSS") < with_matrix - N * V * 4 + CONSTANT
    del logp


@pytest.mark.gpu
@pytest.mark.parametrize("regime", REGIMES)
def test_memory_on_a_gpu(regime):
    n, d, v = 4096, 64, 256000  # one bf16 N x V matrix: 1.95 GiB
    x = problem(n, d, v, bias=False, dtype=torch.bfloat16, device="cuda")
    trained = {"none": (), "frozen": ("hidden",)}.get(regime, ("hidden", "weight"))
    run(x, trained, memory_budget=BUDGETS[regime])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(x, trained, memory_budget=BUDGETS[regime])
    peak = torch.cuda.max_memory_allocated() - before
    operands = 3 * (n * d + v * d) * 4
    # Blocks of whole rows are of 2,048 at least, which at this V is more than a tile; the kept matrix is its own block.
    tile = max(backends.DEVICE_TILE_BYTES, backends.device_rows(n, 2 * v) * 2 * v)
    assert tile < n * v * 2
    assert peak <= operands + (n * v * 2 if regime == "kept" else tile)


# ---- around the op: autocast, compile, opcheck, threads, builds


@pytest.mark.parametrize("regime", REGIMES)
def test_autocast_is_a_cast_of_the_inputs(regime):
    trained = {"none": (), "frozen": ("hidden",)}.get(regime, ("hidden", "weight", "bias"))
    x = problem(40, 16, 1003)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp, grads = run(x, trained, memory_budget=BUDGETS[regime])
    cast = {name: t.bfloat16() if name in ("hidden", "weight", "bias") else t for name, t in x.items()}
    expected, expected_grads = run(cast, trained, memory_budget=BUDGETS[regime])
    assert logp.dtype == torch.float32 and logp.equal(expected)
    for name in trained:
        assert grads[name].dtype == torch.float32 and grads[name].equal(expected_grads[name].float())


def test_autocast_runs_every_gemm_in_its_dtype(monkeypatch):
    """fp32 parameters under bf16 autocast, forward and backward, one GEMM and recomputed tiles."""
    seen = []
    for owner, name, call in ((torch, "mm", torch.mm), (Tensor, "addmm_", Tensor.addmm_)):

        def spy(*args, real=call, **kwargs):
            seen.extend(t.dtype for t in args if t.dim() == 2)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)
    x = problem(40, 16, 1003)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for regime in REGIMES:
            trained = {"none": (), "frozen": ("hidden",)}.get(regime, ("hidden", "weight", "bias"))
            run(x, trained, memory_budget=BUDGETS[regime])
    assert len(seen) > 16 and set(seen) == {torch.bfloat16}


def test_fp64_under_autocast_stays_fp64():
    x = problem(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(x)[0].dtype == torch.float64


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("regime", REGIMES)
def test_opcheck(where, regime):
    backend, device = where
    x = problem(3, 8, 121, device=device)
    names = {"none": (), "frozen": ("hidden",)}.get(regime, ("hidden", "weight", "bias"))
    leaves = {name: x[name].requires_grad_(name in names) for name in ("hidden", "weight", "bias")}
    rule = (20.0, 0.5, regime, backend)
    inputs = (leaves["hidden"], leaves["weight"], x["target"], leaves["bias"])
    torch.library.opcheck(torch.ops.fastpo.linear_logprob.default, (*inputs, *rule, True))
    if regime in ("kept", "sliced"):
        with torch.no_grad():
            *_, saved, stats = torch.ops.fastpo.linear_logprob(*inputs, *rule, False)
        frozen = [t.detach() for t in inputs]
        for need in ([True, True, True], [True, False, True], [False, True, False]):
            args = (x["upstream"], *frozen, saved, stats, *rule, need)
            torch.library.opcheck(torch.ops.fastpo.linear_logprob_backward.default, args)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("regime", REGIMES)
def test_compiled_is_eager_bit_for_bit(where, regime):
    backend, device = where
    trained = {"none": (), "frozen": ("hidden",)}.get(regime, ("hidden", "weight", "bias"))
    options = {"backend": backend, "memory_budget": BUDGETS[regime], "softcap": 20.0}
    options |= {"return_entropy": True, "return_top1": True}

    def fn(hidden, weight, target, bias):
        logp, *numbers = ops.linear_logprob(hidden, weight, target, bias, **options)
        return logp, torch.stack(numbers)

    torch.compiler.reset()
    compiled = torch.compile(fn, fullgraph=True)
    for n in (3, 5, 8):  # the second size makes N dynamic
        x = problem(n, 8, 121, device=device)
        eager, ours = (check.head_outputs(f, x, regime) for f in (fn, compiled))
        assert set(eager) == set(ours) and len(trained) == len(eager) - 2
        for name in eager:
            assert eager[name].equal(ours[name]), name


@pytest.mark.parametrize("where", COMPILED)
@pytest.mark.parametrize("regime", REGIMES)
def test_one_graph_for_every_n(where, regime):
    from torch._dynamo.testing import CompileCounterWithBackend

    backend, device = where
    trained = {"none": (), "frozen": ("hidden",)}.get(regime, ("hidden", "weight", "bias"))
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def fn(hidden, weight, target, bias):
        return ops.linear_logprob(hidden, weight, target, bias, backend=backend, memory_budget=BUDGETS[regime])

    compiled = torch.compile(fn, fullgraph=True, backend=counter)
    for n in (7, 12, 19, 33):
        x = problem(n, 8, 121, device=device)
        leaves = {name: x[name].requires_grad_(name in trained) for name in ("hidden", "weight", "bias")}
        torch._dynamo.mark_dynamic(x["hidden"], 0)
        torch._dynamo.mark_dynamic(x["target"], 0)
        logp = compiled(leaves["hidden"], leaves["weight"], x["target"], leaves["bias"])
        if trained:
            logp.sum().backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize("where", COMPILED)
@pytest.mark.parametrize("regime", REGIMES)
def test_deterministic_mode(where, regime, monkeypatch):
    """No op without a deterministic form, and nothing read that was never written: the mode fills that with NaN."""
    backend, device = where
    trained = {"none": (), "frozen": ("hidden",)}.get(regime, ("hidden", "weight", "bias"))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    x = problem(40, 16, 1003, device=device)
    options = {"backend": backend, "memory_budget": BUDGETS[regime], "softcap": 20.0}
    expected, expected_grads = run(x, trained, **options)
    torch.use_deterministic_algorithms(True)
    try:
        logp, grads = run(x, trained, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert logp.equal(expected) and all(grads[name].equal(expected_grads[name]) for name in trained)


@pytest.mark.parametrize("where", ON_GPU)
@pytest.mark.parametrize("regime", REGIMES)
def test_no_synchronisation(where, regime):
    backend, device = where
    trained = {"none": (), "frozen": ("hidden",)}.get(regime, ("hidden", "weight", "bias"))
    x = problem(300, 64, 5003, device=device, dtype=torch.bfloat16)
    options = {"backend": backend, "memory_budget": BUDGETS[regime], "return_entropy": False}
    run(x, trained, **options)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(x, trained, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("where", ON_GPU)
@pytest.mark.parametrize("regime", REGIMES)
def test_cuda_graph(where, regime):
    """Forward and backward captured once; replayed on other inputs they give what eager gives."""
    backend, device = where
    trained = {"none": (), "frozen": ("hidden",)}.get(regime, ("hidden", "weight", "bias"))
    options = {"backend": backend, "memory_budget": BUDGETS[regime]}
    x = problem(300, 64, 5003, device=device, dtype=torch.bfloat16)
    leaves = {name: x[name].clone().requires_grad_(name in trained) for name in ("hidden", "weight", "bias")}

    def step():
        logp = ops.linear_logprob(leaves["hidden"], leaves["weight"], x["target"], leaves["bias"], **options)
        grads = torch.autograd.grad(logp, [leaves[n] for n in trained], x["upstream"]) if trained else ()
        return logp, *grads

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves["hidden"].mul_(-0.5)
        x["upstream"].neg_()
        x["target"].copy_(x["target"].flip(0))
    graph.replay()
    assert all(ours.equal(eager) for ours, eager in zip(captured, step()))


@pytest.mark.parametrize("where", ON_GPU)
def test_target_outside_the_vocabulary_on_a_gpu(where, monkeypatch):
    """NaN in its row without looking; an error on request."""
    x = problem(9, 8, 121, device=where[1], ignored=False)
    x["target"][4], x["target"][6] = 121, -1
    logp, _ = run(x, (), backend=where[0])
    assert logp.isnan().nonzero().flatten().tolist() == [4, 6]
    monkeypatch.setattr(parts, "CHECK_INPUTS", True)
    with pytest.raises(FastpoError, match=r"target\[4\] = 121 is outside the vocabulary of 121"):
        run(x, (), backend=where[0])


def test_target_outside_the_vocabulary_is_nan_in_the_plain_backend():
    """What a GPU without Triton would run."""
    x = problem(9, 8, 121, ignored=False)
    x["target"][4], x["target"][6], x["target"][7] = 121, -1, -100
    head = backends.Head(x["hidden"], x["weight"], x["target"], x["bias"], None, 1.0)
    logp = backends.torch_forward(head, "none", False).logp
    assert logp.isnan().nonzero().flatten().tolist() == [4, 6] and logp[7] == 0


@pytest.mark.skipif(not BUILT, reason="csrc/ was not built")
def test_threads():
    """Rows do not depend on who computes them: PyTorch's OpenMP threads, threads of our own, or one thread."""
    from fastpo import _C

    x = problem(300, 8, 5003)
    hidden, weight = x["hidden"], x["weight"]
    logits = hidden @ weight.t()
    results = []
    library = str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
    try:
        for threads, openmp in ((1, None), (2, library), (5, None)):
            _C.use_openmp_of(openmp)
            torch.set_num_threads(threads)
            tile, rows = logits.clone(), torch.zeros(5, 300)
            rows[0::2] = -torch.inf
            head = backends.Head(hidden, weight, x["target"], x["bias"], 20.0, 0.5)
            backends._cpu_pass(head, tile, rows[:4], slice(0, 5003), top=rows[4])
            results.append((tile, rows))
    finally:
        _C.use_openmp_of(library)
    for tile, rows in results[1:]:
        assert tile.equal(results[0][0]) and rows.equal(results[0][1])


@pytest.mark.skipif(not BUILT, reason="csrc/ was not built")
@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_instruction_sets(isa, dtype, small_tiles):
    from fastpo import _C

    if not _C.use_isa(isa):
        pytest.skip(f"this machine has no {isa}")
    try:
        assert _C.isa() == isa
        for case in (Case(67, 24, 2003, bias=True, **SOFTCAPPED), Case(67, 24, 2003, "rising")):
            assert_within_criterion(case, ("cpu", "cpu"), dtype)
    finally:
        _C.use_isa(None)


def python(*args: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *args], env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, cwd=HERE.parents[2],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_without_the_extension():
    code = (
        "import torch; from fastpo import ops; assert 'cpu' not in ops.available_backends();"
        "w = torch.randn(50, 8, requires_grad=True);"
        "ops.linear_logprob(torch.randn(3, 8), w, torch.tensor([1, 2, 3])).sum().backward(); print(w.grad.shape)"
    )
    assert "[50, 8]" in python("-c", code, FASTPO_NO_CSRC="1")


DISTRIBUTED = """
import os, sys, torch, torch.distributed as dist
from torch import nn
from fastpo import ops
child = os.fork()  # after the imports, which take longest
rank = int(child == 0)
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
dist.init_process_group("gloo", rank=rank, world_size=2)

class Head(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.head = nn.Linear(8, 8), nn.Linear(8, 301)
    def forward(self, x, target):
        return -ops.linear_logprob(self.trunk(x), self.head.weight, target, self.head.bias).mean()

torch.manual_seed(1)
x, target = torch.randn(12, 8), torch.randint(0, 301, (12,))
alone = Head()
alone(x, target).backward()
mine = slice(6 * rank, 6 * rank + 6)
ddp = nn.parallel.DistributedDataParallel(Head())
ddp(x[mine], target[mine]).backward()
for (name, p), q in zip(alone.named_parameters(), ddp.module.parameters()):
    torch.testing.assert_close(q.grad, p.grad, msg=lambda m: f"DDP {name}: {m}")

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
sharded = Head()
fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
sharded(x[mine], target[mine]).backward()
for (name, p), q in zip(alone.named_parameters(), sharded.parameters()):
    torch.testing.assert_close(q.grad.full_tensor(), p.grad, msg=lambda m: f"FSDP2 {name}: {m}")
dist.destroy_process_group()
print(f"rank {rank} is equal", flush=True)
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


def test_two_ranks_have_the_gradients_of_one():
    """DDP and FSDP2 over gloo; the op runs inside the wrapped forward, on whole parameters."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    output = python("-c", DISTRIBUTED, port)
    assert "rank 0 is equal" in output and "rank 1 is equal" in output


# ---- errors


BAD = {
    "hidden-3d": ({"hidden": torch.zeros(2, 3, 4)}, r"hidden \[2, 3, 4\]"),
    "hidden-width": ({"hidden": torch.zeros(3, 5)}, r"\[N, D\] and \[V, D\]"),
    "no-vocabulary": ({"weight": torch.zeros(0, 4)}, "vocabulary is empty"),
    "target-length": ({"target": torch.zeros(4, dtype=torch.long)}, r"target \[4\]"),
    "target-dtype": ({"target": torch.zeros(3)}, "integer"),
    "bias-length": ({"bias": torch.zeros(6)}, r"bias \[6\]"),
    "dtypes": ({"weight": torch.zeros(5, 4, dtype=torch.bfloat16)}, "one floating dtype"),
    "integers": ({"hidden": torch.zeros(3, 4, dtype=torch.int), "weight": torch.zeros(5, 4, dtype=torch.int)}, "dtype"),
    "devices": ({"weight": torch.zeros(5, 4, device="meta")}, "several devices"),
    "budget": ({"memory_budget": -1}, "at least 0 bytes"),
    "backend": ({"backend": "cuda"}, "'cuda' is not available here; one of auto"),
    "backend-dtype": (
        {"hidden": torch.zeros(3, 4).half(), "weight": torch.zeros(5, 4).half(), "backend": "cpu"},
        "cpu",
    ),
    "softcap": ({"softcap": 0.0}, "softcap must be positive"),
    "target-above": ({"target": torch.tensor([0, 5, 1])}, r"target\[1\] = 5 is outside the vocabulary of 5"),
    "target-below": ({"target": torch.tensor([0, 1, -1])}, r"target\[2\] = -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changes, message = BAD[name]
    args = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "target": torch.zeros(3, dtype=torch.long)}
    with pytest.raises(FastpoError, match=message) as caught:
        ops.linear_logprob(**{**args, **changes})
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


# ---- preference_loss


LENGTHS = [3, 1, 5, 2, 0, 4]  # one-token and empty responses among them
PAIRS = [[0, 1], [2, 3], [0, 4], [5, 2]]


def preferences(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    logp, ref = (-3 * torch.rand(2, sum(LENGTHS), generator=generator)).to(device, dtype)
    weight, win, lose = torch.rand(3, 4, generator=generator).to(device, dtype)
    return {
        "logp": logp, "ref_logp": ref, "response_offsets": offsets.to(device),
        "pairs": torch.tensor(PAIRS, dtype=torch.int32, device=device), "weight": weight,
        "win_prob_chosen": win, "win_prob_rejected": lose,
    }  # fmt: skip


PREFERENCE_BACKENDS = [
    pytest.param(("torch", "cpu"), id="torch"),
    *INTERPRETED,
    ON_GPU[1],
]
# With the NLL of some by sequence, as every backend has it.
BY_SEQUENCE = {
    "slic": {"nll_reduction": "seq_sum"}, "cpo": {"nll_reduction": "seq_mean"}, "rpo": {"nll_reduction": "seq_mean"},
    "cpo_hinge": {"nll_reduction": "seq_sum"}, "cpo_ipo": {"nll_reduction": "seq_mean"},
    "cpo_simpo": {"nll_reduction": "seq_sum"}, "orpo": {"nll_reduction": "seq_mean", "disable_prompt_loss": True},
}  # fmt: skip


def called(name: str, x: dict[str, Tensor], hyper: dict) -> tuple[Tensor, Tensor]:
    """(losses [P], metrics [9]) of the table's own call in fp64, on sums that are formed one response at a time."""
    loss = LOSSES[name]
    x = {key: t.double() if t is not None and t.is_floating_point() else t for key, t in x.items()}
    begins, token_weight = x["response_offsets"].tolist(), x.get("token_weight")

    def sums(key: str, response: int, take: slice | Tensor = slice(None)) -> Tensor:
        if x.get(f"{key}response_logps") is not None:
            return x[f"{key}response_logps"][response]
        values = x.get(key if key == "rows" else f"{key}logp")
        values = torch.zeros_like(x["logp"]) if values is None else values
        values = values if token_weight is None else token_weight.double() * values
        return values[begins[response] : begins[response + 1]][take].sum()

    columns: dict[str, list[Tensor]] = {}
    whole: dict[str, list[Tensor]] = {}
    at = 0
    for pair in PAIRS:
        shared = min(LENGTHS[r] for r in pair)
        for side, r in zip(("chosen", "rejected"), pair):
            take: slice | Tensor = slice(None)
            if loss.drawn:
                take = x["drawn_rows"][at : at + shared] - begins[r]
                at += shared
            kinds = {"": "logps", "ref_": "logps", "prev_": "logps", "rows": "kl" if "chosen_kl" in loss.needs else
                     "log_sum_sq"}  # fmt: skip
            for key, what in kinds.items():
                column = f"{'' if key == 'rows' else key}{side}_{what}"
                columns.setdefault(column, []).append(sums(key, r, take))
                whole.setdefault(column, []).append(sums(key, r))
                if key in ("", "ref_"):
                    columns.setdefault(f"{key}{side}_tail_logps", []).append(sums(key, r, slice(shared, None)))
            ones = torch.ones_like(x["logp"]) if token_weight is None else token_weight.double()
            length = ones[begins[r] : begins[r + 1]].sum()
            columns.setdefault(f"{side}_len", []).append(length if LENGTHS[r] else torch.ones_like(length))
    of_pairs = {key: torch.stack(values) for key, values in columns.items()}
    probs = {key: x[key] for key in ("win_prob_chosen", "win_prob_rejected")}
    if loss.pair_prob:
        probs = {"win_prob": x["win_prob_chosen"]}
    first = [of_pairs.pop(f"{k}{side}_logps") for k in ("", "ref_") for side in ("chosen", "rejected")]
    losses = loss(*first, **of_pairs, **probs, **hyper)
    lw, ll, rw, rl = (torch.stack(whole[f"{k}{side}_logps"]) for k in ("", "ref_") for side in ("chosen", "rejected"))
    has_ref = x["ref_logp"] is not None or x.get("ref_response_logps") is not None
    pairs = Pairs(lw, ll, *((rw, rl) if has_ref else (None, None)), of_pairs["chosen_len"], of_pairs["rejected_len"])
    return losses, pair_metrics(pairs, SimpleNamespace(loss=loss))


@pytest.mark.parametrize("where", PREFERENCE_BACKENDS)
@pytest.mark.parametrize("name", ops.FUSED_LOSSES)
def test_preference_loss(where, name):
    """Losses, metrics and gradients of every loss against the table's own call; K-way pairs, with and without token
    weights, the reference by token, by response or not at all."""
    backend, device = where
    loss, hyper, x = LOSSES[name], BY_SEQUENCE.get(name, {}), preferences(device)
    per_token = loss.drawn or "chosen_tail_logps" in loss.needs
    generator = torch.Generator().manual_seed(1)
    more = {"rows": torch.rand(len(x["logp"]), generator=generator)}
    places = list(enumerate(("tokens", "responses", "none")[: 1 if per_token else 3]))
    if backend == "triton" and device == "cpu":  # the interpreter is slow: each of these for a third of the losses
        places = [places[list(ops.FUSED_LOSSES).index(name) % len(places)]]
    for place, ref in places:
        x = preferences(device) | {key: t.to(device) for key, t in more.items()}
        x["prev_logp"] = 0.9 * x["ref_logp"]
        if ref != "tokens":
            sums = torch.stack([part.sum() for part in x["ref_logp"].split(LENGTHS)])
            x |= {"ref_logp": None, "ref_response_logps": sums if ref == "responses" else None}
        x["token_weight"] = 2 * torch.rand_like(x["logp"]) + 0.1 if place != 1 else None
        if loss.drawn:
            drawn = [x["response_offsets"][r] + torch.arange(min(LENGTHS[k] for k in p)) for p in PAIRS for r in p]
            x["drawn_rows"] = torch.cat(drawn).to(device)
        exact = dict(x) | {key: x[key].double().requires_grad_() for key in ("logp", "rows")}
        losses, metrics = called(name, exact, hyper)
        (3 * x["weight"].double() * losses).sum().backward()
        ours = dict(x) | {key: x[key].clone().requires_grad_() for key in ("logp", "rows")}
        total, out = ops.preference_loss(**ours, loss_type=name, backend=backend, **hyper)
        (3 * total).backward()
        assert not any(t.requires_grad for t in out)
        close = functools.partial(torch.testing.assert_close, rtol=2e-5, atol=2e-5)
        close(total.detach().double(), (x["weight"].double() * losses.detach()).sum())
        close(out.losses.double(), losses.detach())
        close(out.metrics.double(), metrics)
        close(ours["logp"].grad.double(), exact["logp"].grad)
        if "chosen_kl" in loss.needs:
            close(ours["rows"].grad.double(), exact["rows"].grad)


@pytest.mark.parametrize("where", PREFERENCE_BACKENDS)
@pytest.mark.parametrize("name", ["dpo", "tdpo2"])
def test_preference_loss_compiles(where, name):
    backend, device = where
    x = preferences(device)
    rows = torch.rand_like(x["logp"]) if name == "tdpo2" else None

    def fn(logp):
        return ops.preference_loss(**{**x, "logp": logp, "rows": rows}, loss_type=name, beta=0.1, backend=backend)

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    logps = [x["logp"].clone().requires_grad_() for _ in range(2)]
    (eager, _), (ours, _) = fn(logps[0]), compiled(logps[1])
    eager.backward(), ours.backward()
    assert ours.equal(eager) and logps[1].grad.equal(logps[0].grad)


def test_preference_loss_in_fp64():
    x = preferences(dtype=torch.float64)
    logp = x.pop("logp").requires_grad_()
    for loss_type in ("dpo", "simpo", "sppo"):

        def fn(logp, loss_type=loss_type):
            return ops.preference_loss(logp, **x, loss_type=loss_type, beta=0.5)[0]

        assert torch.autograd.gradcheck(fn, logp)


def test_a_mean_over_the_steps_tokens_is_the_tables():
    """No kernel has it: `auto` takes plain PyTorch, whose divisor is the mean length of the pairs given."""
    x = preferences()
    losses, _ = called("cpo", x, {})
    total, out = ops.preference_loss(**x, loss_type="cpo")
    torch.testing.assert_close(out.losses.double(), losses)
    torch.testing.assert_close(total.double(), (x["weight"] * losses).sum())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss_type": "dppo"}, "unknown loss_type 'dppo'; did you mean"),
        ({"loss_type": "kto"}, "kto is no function of single pairs"),
        ({"gamma": 0.1}, "dpo has no 'gamma'"),
        ({"beta": -0.1}, "dpo: beta must be positive"),
        ({"weight": torch.ones(3)}, r"\[N\], \[P, 2\] and \[P\]"),
        ({"ref_logp": torch.ones(2)}, r"ref_logp \[2\] must have the shape of logp"),
        ({"token_weight": torch.ones(2)}, r"token_weight \[2\] must have the shape of logp"),
        ({"ref_logp": None, "ref_response_logps": torch.ones(5)}, r"\[5\] must have the shape of the responses \[6\]"),
        ({"win_prob_chosen": torch.ones(3)}, r"win_prob_chosen \[3\] must have the shape of weight"),
        ({"ref_response_logps": torch.ones(6)}, "not both"),
        ({"weight": torch.ones(4, device="meta")}, "several devices"),
        ({"loss_type": "sppo", "win_prob_chosen": None}, "needs win_prob_chosen"),
        ({"loss_type": "dpo_soft", "win_prob_chosen": None}, "dpo_soft needs win_prob_chosen"),
        ({"loss_type": "tdpo1"}, "tdpo1 needs rows: token_kl"),
        ({"loss_type": "wpo"}, "wpo needs rows: log_sum_sq"),
        ({"loss_type": "sampo"}, "sampo needs drawn_rows"),
        ({"loss_type": "ld_dpo", "ref_logp": None, "ref_response_logps": torch.ones(6)}, "reference per token"),
        ({"loss_type": "orpo"}, "orpo here has no NLL of the prompt"),
        ({"backend": "tpu"}, "not available here"),
    ],
    ids=str,
)
def test_preference_loss_bad_input(changes, message):
    with pytest.raises(FastpoError, match=message) as caught:
        ops.preference_loss(**{**preferences(), "loss_type": "dpo", **changes})
    assert "\n" not in str(caught.value)


# ---- fastpo check


@pytest.mark.parametrize("broken", [False, True], ids=["passes", "fails"])
def test_run_check(broken, monkeypatch, capsys):
    monkeypatch.setattr(check, "cases", lambda device: iter([(Case(9, 8, 301, bias=True), torch.float32)]))
    if broken:
        monkeypatch.setattr(ops.backends, "_mm_wide", lambda a, b, dtype: torch.mm(a, b).to(dtype).mul_(1.001))
    assert check.run_check(device="cpu") == int(broken)
    out = capsys.readouterr().out
    assert ("FAILED" in out) == broken and "linear_logprob" in out and "preference dpo" in out
