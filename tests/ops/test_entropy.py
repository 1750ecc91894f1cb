"""`linear_logprob_entropy` against its fp64 definition: backends, regimes, gradients, memory, what is refused."""

import functools
import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastpo import check, ops
from fastpo.check import SOFTCAPPED, Case
from fastpo.kernels import reference
from fastpo.ops import OpError, backends, entropy, inputs

GPU = pytest.mark.gpu
BUILT = pytest.mark.skipif(backends.compiled is None, reason="csrc/ was not built")

# In Triton's interpreter the tests without COMPILED run on CPU tensors too, in a process of their own, as `make test`
# has it: TRITON_INTERPRET=1 pytest tests/ops/test_entropy.py -k triton-interpreted
ON_CPU = [pytest.param(("torch", "cpu"), id="torch"), pytest.param(("cpu", "cpu"), id="cpu", marks=BUILT)]
ON_GPU = [
    pytest.param(("torch", "cuda"), id="torch-cuda", marks=GPU),
    pytest.param(("triton", "cuda"), id="triton-cuda", marks=GPU),
]
INTERPRETED = [pytest.param(("triton", "cpu"), id="triton-interpreted")] if inputs.INTERPRETED else []
COMPILED = [*ON_CPU, *ON_GPU]
EVERYWHERE = [*ON_CPU, *INTERPRETED, *ON_GPU]
DTYPES = [pytest.param(getattr(torch, name), id=name) for name in ("float32", "bfloat16", "float16")]
BUDGETS = {"none": None, "kept": 1 << 62, "sliced": 0}
LEAVES = ("hidden", "weight", "bias")
RULES = [
    pytest.param({}, id="plain"),
    pytest.param({"bias": True}, id="bias"),
    pytest.param(SOFTCAPPED, id="softcap"),
    pytest.param({"bias": True, **SOFTCAPPED}, id="all"),
    pytest.param({"logit_scale": -0.5}, id="negative-scale"),
]
KINDS = ["negative", "offset", "rising", "peaked"]


@pytest.fixture(autouse=True)
def _interpreted_as_on_a_gpu(round_to_bf16, round_fma_once):
    pass


@pytest.fixture
def small_tiles(monkeypatch):
    for name in ("CPU_TILE_BYTES", "CPU_KEPT_TILE_BYTES", "DEVICE_TILE_BYTES"):
        monkeypatch.setattr(backends, name, 8 << 10)
    for name, rows in (("CPU_TILE_ROWS", 32), ("DEVICE_TILE_ROWS", 32), ("DEVICE_ROW_STEP", 2)):
        monkeypatch.setattr(backends, name, rows)


def problem(case: Case, dtype=torch.float32, device="cpu", seed=0) -> dict[str, Tensor]:
    """Inputs, and an upstream gradient for both outputs."""
    x = case.tensors(dtype, device, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    return x | {"of_entropy": torch.randn(case.n, generator=generator).to(device)}


def run(fn, x, trained=LEAVES, dtype=None, of=("upstream", "of_entropy"), **options) -> dict[str, Tensor]:
    """fn's outputs, and the gradients of the leaves in `trained`, on copies of x in `dtype`; `of`: which upstream."""
    leaves = {k: x[k].detach().to(dtype or x[k].dtype, copy=True) for k in LEAVES if k in x}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in trained)
    outputs = fn(leaves["hidden"], leaves["weight"], x["target"], leaves.get("bias"), **options)
    asked = [leaf for name, leaf in leaves.items() if name in trained]
    if asked:
        pairs = [(out, x[name].to(out.dtype)) for out, name in zip(outputs, ("upstream", "of_entropy")) if name in of]
        torch.autograd.backward([out for out, _ in pairs], [g for _, g in pairs])
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"logp": outputs[0].detach(), "entropy": outputs[1].detach(), **grads}


def assert_within_criterion(case: Case, where, dtype) -> None:
    backend, device = where
    if dtype not in ops.NATIVE_DTYPES[backend]:
        pytest.skip(f"{backend} does not take {dtype}")
    for result in check.head_results(case, dtype, device, [backend], entropy_grad=True):
        assert result.ok, result


@pytest.mark.parametrize("where", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_accuracy(where, dtype, rule):
    """Outputs and every gradient, without one, with a frozen head, with the logits kept, and slice by slice."""
    assert_within_criterion(Case(67, 40, 1003, **rule), where, dtype)


@pytest.mark.parametrize("where", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", *KINDS])
def test_many_tiles_and_extreme_logits(where, dtype, kind, small_tiles):
    assert_within_criterion(Case(67, 24, 5003, kind, bias=kind == "normal"), where, dtype)


@BUILT
@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_instruction_sets(isa, dtype, small_tiles):
    from fastpo import _C

    if not _C.use_isa(isa):
        pytest.skip(f"this machine has no {isa}")
    try:
        for case in (Case(67, 24, 2003, bias=True, **SOFTCAPPED), Case(67, 24, 2003, "rising")):
            assert_within_criterion(case, ("cpu", "cpu"), dtype)
    finally:
        _C.use_isa(None)


@pytest.mark.parametrize("where", COMPILED)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 7), (2, 3, 17), (3, 130, 257), (5, 65, 2049), (3, 8, 50257)])
def test_shapes(where, shape):
    assert_within_criterion(Case(*shape, bias=True), where, torch.float32)


@pytest.mark.parametrize("where", INTERPRETED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("kind", ["normal", "negative", "rising", "peaked"])
def test_interpreted(where, dtype, kind, small_tiles):
    rule = {"bias": True, **SOFTCAPPED} if kind == "normal" else {}
    assert_within_criterion(Case(7, 16, 333, kind, **rule), where, dtype)


STRICT = {"plain": (1, {}), "softcap": (1, SOFTCAPPED), "saturated": (8, {"softcap": 5.0})}


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("of", [("upstream", "of_entropy"), ("of_entropy",)], ids=["both", "entropy"])
@pytest.mark.parametrize("name", STRICT)
def test_every_gradient_is_as_exact_as_plain_pytorchs(where, name, of):
    """In fp32 1.5 times the error and nothing beside it, root mean squares, as tests/ops/test_head.py asks of logp."""
    backend, device = where
    scale, rule = STRICT[name]
    interpreted = backend == "triton" and device == "cpu"
    if interpreted and name == "softcap":
        pytest.skip("the interpreter is slow: the others are compiled")
    x = problem(Case(*((33, 16, 333) if interpreted else (257, 40, 1003)), bias=True), device=device)
    x["hidden"] *= scale
    exact, naive = (run(reference.linear_logprob_entropy, x, dtype=d, of=of, **rule) for d in (torch.float64, None))
    for regime in ("kept", "sliced"):
        options = {**rule, "backend": backend, "memory_budget": BUDGETS[regime]}
        ours = run(ops.linear_logprob_entropy, x, of=of, **options)
        for key in ("dhidden", "dweight", "dbias"):
            mine, plain = (check._rms(y[key].double() - exact[key]) for y in (ours, naive))
            assert mine <= 1.5 * plain, f"{regime} {key}: error {mine:.3g}, plain PyTorch's {plain:.3g}"


@pytest.mark.parametrize("where", EVERYWHERE)
def test_equals_linear_logprob(where):
    """The same log-probabilities and entropies bit for bit, the same gradient where only logp has one."""
    backend, device = where
    x = problem(Case(9, 12, 301, bias=True, ignored=False), device=device)
    for regime in ("kept", "sliced"):
        options = {"backend": backend, "memory_budget": BUDGETS[regime], "return_top1": True}
        ours = run(ops.linear_logprob_entropy, x, of=("upstream",), **options)
        plain = run(functools.partial(ops.linear_logprob, return_entropy=True), x, of=("upstream",), **options)
        assert ours["logp"].equal(plain["logp"]) and ours["entropy"].equal(plain["entropy"])
        for name in ("dhidden", "dweight", "dbias"):
            torch.testing.assert_close(ours[name], plain[name], rtol=1e-4, atol=1e-5)
    args = [x[k] for k in ("hidden", "weight", "target", "bias")]
    *_, top1 = ops.linear_logprob_entropy(*args, backend=backend, return_top1=True)
    assert top1.equal(ops.linear_logprob(*args, backend=backend, return_top1=True)[1]) and not top1.requires_grad


@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "sliced"])
@pytest.mark.parametrize("rule", [{}, {"softcap": 3.0, "logit_scale": 0.7}], ids=["plain", "softcap"])
def test_gradcheck(budget, rule, small_tiles):
    x = problem(Case(5, 4, 67, bias=True), torch.float64)
    x["weight"] *= 0.5

    def fn(hidden, weight, bias):
        return ops.linear_logprob_entropy(hidden, weight, x["target"], bias, memory_budget=budget, **rule)

    leaves = [x[k].requires_grad_() for k in LEAVES]
    assert torch.autograd.gradcheck(fn, leaves, eps=1e-5, atol=1e-8, rtol=1e-6)
    (grad,) = torch.autograd.grad(fn(*leaves)[1].sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "sliced"])
@pytest.mark.parametrize("mask", range(1, 8), ids="{:03b}".format)
def test_gradients_asked_for_and_no_others(where, budget, mask):
    backend, device = where
    trained = tuple(name for i, name in enumerate(LEAVES) if mask >> i & 1)
    x = problem(Case(9, 12, 301, bias=True), device=device)
    every = run(reference.linear_logprob_entropy, x)
    some = run(ops.linear_logprob_entropy, x, trained, backend=backend, memory_budget=budget)
    assert set(some) == {"logp", "entropy", *(f"d{k}" for k in trained)}
    for name, value in some.items():
        torch.testing.assert_close(value, every[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("of", ["upstream", "of_entropy"])
def test_rows_are_independent(where, of):
    """Rows without an upstream, of one output or both, add nothing; the rest is as if they alone were there."""
    backend, device = where
    x = problem(Case(8, 12, 301, bias=True, ignored=False), device=device)
    x["upstream"][:4] = 0
    x["of_entropy"][2:6] = 0
    ours = run(ops.linear_logprob_entropy, x, backend=backend)
    kept = torch.tensor([0, 1, 4, 5, 6, 7], device=device)
    rows = run(ops.linear_logprob_entropy, x | {k: x[k][kept] for k in ("hidden", "target", "upstream", "of_entropy")},
               backend=backend)  # fmt: skip
    assert (ours["dhidden"][2:4] == 0).all()
    torch.testing.assert_close(ours["dhidden"][kept], rows["dhidden"])
    torch.testing.assert_close(ours["dweight"], rows["dweight"])
    alone = run(ops.linear_logprob_entropy, x, of=(of,), backend=backend)
    exact = run(reference.linear_logprob_entropy, x, of=(of,))
    torch.testing.assert_close(alone["dweight"], exact["dweight"], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "sliced"])
def test_ignored_rows_do_nothing(where, budget):
    backend, device = where
    x = problem(Case(9, 12, 301, bias=True), device=device)
    live = x["target"] != -100
    options = {"backend": backend, "memory_budget": budget}
    full = run(ops.linear_logprob_entropy, x, **options)
    assert all((full[name][~live] == 0).all() for name in ("logp", "entropy", "dhidden"))
    rows = run(ops.linear_logprob_entropy, x | {k: x[k][live] for k in ("hidden", "target", "upstream", "of_entropy")},
               **options)  # fmt: skip
    for name in ("dweight", "dbias"):
        torch.testing.assert_close(full[name], rows[name])
    x |= {k: x[k].where(live, torch.nan) for k in ("upstream", "of_entropy")}
    assert run(ops.linear_logprob_entropy, x, **options)["dweight"].equal(full["dweight"])
    none = run(ops.linear_logprob_entropy, x | {"target": torch.full_like(x["target"], -100)}, **options)
    assert all((value == 0).all() for value in none.values())


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "sliced"])
@pytest.mark.parametrize("least", [-torch.inf, torch.finfo(torch.float32).min], ids=["inf", "finite"])
def test_masked_vocabulary(where, budget, least, small_tiles):
    """Columns of probability 0, whole first tiles of them: no gradient, no NaN."""
    backend, device = where
    x = problem(Case(6, 8, 3001, bias=True, ignored=False), device=device)
    x["target"] = torch.randint(2600, 3001, (6,), device=device)
    x["bias"][:2500] = least
    options = {"backend": backend, "memory_budget": budget}
    ours = run(ops.linear_logprob_entropy, x, **options)
    cut = run(ops.linear_logprob_entropy, x | {"weight": x["weight"][2500:], "bias": x["bias"][2500:],
                                               "target": x["target"] - 2500}, **options)  # fmt: skip
    assert (ours["dweight"][:2500] == 0).all() and (ours["dbias"][:2500] == 0).all()
    for name in ("logp", "entropy", "dhidden"):
        torch.testing.assert_close(ours[name], cut[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["dweight"][2500:], cut["dweight"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ON_CPU)
def test_nan_stays_in_its_row(where):
    x = problem(Case(9, 12, 301, bias=True, ignored=False))
    x["hidden"][4] = torch.nan
    ours = run(ops.linear_logprob_entropy, x, ("hidden",), backend=where[0])
    for name in ("logp", "entropy", "dhidden"):
        assert ours[name].isnan().view(9, -1).any(1).nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("where", EVERYWHERE)
def test_upstreams_of_the_size_of_a_loss(where):
    """Means over many tokens: the gradients of fp16's range would be 0 in a matrix that held them."""
    backend, device = where
    dtype = torch.bfloat16 if backend == "cpu" else torch.float16
    x = problem(Case(7, 16, 301, ignored=False), dtype, device)
    options = {"backend": backend, "memory_budget": 0}
    large = run(ops.linear_logprob_entropy, x, **options)
    x["upstream"] *= 2.0**-12
    x["of_entropy"] *= 2.0**-12
    small = run(ops.linear_logprob_entropy, x, **options)
    scaled = small["dweight"].double() * 2.0**12
    torch.testing.assert_close(
        scaled, large["dweight"].double(), rtol=0.02, atol=0.02 * large["dweight"].abs().max().item()
    )


def test_closed_forms():
    """A uniform row is the maximum, log V, without a gradient; a certain one has none left."""
    weight = torch.randn(200, 8)
    for hidden, certain, value in (
        (torch.zeros(2, 8), weight, math.log(200)),
        (torch.ones(2, 8), 0 * weight, None),
    ):
        certain = certain.clone()
        if value is None:
            certain[7], value = 100.0, 0.0
        leaf = hidden.requires_grad_()
        _, of_rows = ops.linear_logprob_entropy(leaf, certain, torch.tensor([7, 7]))
        of_rows.sum().backward()
        torch.testing.assert_close(of_rows.detach(), torch.full((2,), value))
        assert leaf.grad.abs().max() < 1e-6


@pytest.mark.parametrize("where", EVERYWHERE)
def test_no_rows_and_strides(where):
    backend, device = where
    x = problem(Case(9, 12, 301, bias=True), device=device)
    for budget in (None, 0):
        options = {"backend": backend, "memory_budget": budget}
        cut = {k: t if k in ("weight", "bias") else t[:0] for k, t in x.items()}
        none = run(ops.linear_logprob_entropy, cut, **options)
        assert none["logp"].shape == none["entropy"].shape == (0,) and none["dhidden"].shape == (0, 12)
        assert (none["dweight"] == 0).all() and (none["dbias"] == 0).all()
        expected = run(ops.linear_logprob_entropy, x, **options)
        leaves = {"hidden": x["hidden"].t().contiguous().t(), "weight": x["weight"].repeat_interleave(2, 1)[:, ::2],
                  "bias": x["bias"].repeat_interleave(3)[::3]}  # fmt: skip
        leaves = {k: t.detach().requires_grad_() for k, t in leaves.items()}
        target = x["target"].int().repeat_interleave(2)[::2]
        out = ops.linear_logprob_entropy(leaves["hidden"], leaves["weight"], target, leaves["bias"], **options)
        upstream = [x[k].repeat_interleave(2)[::2] for k in ("upstream", "of_entropy")]
        grads = torch.autograd.grad(out, list(leaves.values()), upstream)
        for name, grad in zip(leaves, grads):
            torch.testing.assert_close(grad, expected[f"d{name}"])


@pytest.mark.parametrize("where", COMPILED)
@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "sliced"])
def test_repeats_and_the_graph_kept(where, budget):
    """The logits that are kept are not written over: a graph that is retained gives the same again."""
    backend, device = where
    x = problem(Case(130, 24, 5003), device=device)
    leaves = [x[k].clone().requires_grad_() for k in ("hidden", "weight")]
    out = ops.linear_logprob_entropy(leaves[0], leaves[1], x["target"], backend=backend, memory_budget=budget)
    upstream = (x["upstream"], x["of_entropy"])
    first = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(out, leaves, upstream)
    assert all(a.equal(b) for a, b in zip(first, second))
    torch.set_num_threads(2)
    try:
        assert run(ops.linear_logprob_entropy, x, backend=backend, memory_budget=budget)["dhidden"].equal(first[0])
    finally:
        torch.set_num_threads(1)


class Watch(TorchDispatchMode):
    """The largest tensor made, and the multiply-adds of matrix products; seen where it is entered inside of an op."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, list | tuple) else [out]:
            self.largest = max(self.largest, t.numel() if isinstance(t, Tensor) else 0)
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_, torch.ops.aten.addmm):
            a, b = [t for t in args if isinstance(t, Tensor)][-2:]
            self.products += a.shape[0] * a.shape[1] * b.shape[1]
        return out


@pytest.fixture
def watch(monkeypatch):
    """`Watch` over all that the op does: a mode that is entered outside sees the op, and nothing in it."""
    mode = Watch()

    def inside(fn):
        def watched(*args):
            with mode:
                return fn(*args)

        return watched

    for backend, forward in list(backends.FORWARD.items()):
        monkeypatch.setitem(backends.FORWARD, backend, inside(forward))
    monkeypatch.setattr(entropy, "gradients", inside(entropy.gradients))
    return mode


@pytest.mark.parametrize("where", ON_CPU)
def test_nothing_of_size_n_by_v(where, watch, monkeypatch):
    """Without a budget no tensor of a quarter of N x V elements is made, forward or backward; dweight is smaller."""
    n, v = 512, 4096
    for name in ("CPU_TILE_BYTES", "CPU_KEPT_TILE_BYTES"):
        monkeypatch.setattr(backends, name, 1 << 20)
    monkeypatch.setattr(backends, "CPU_TILE_ROWS", 128)
    x = problem(Case(n, 4, v, bias=True))
    run(ops.linear_logprob_entropy, x, backend=where[0], memory_budget=0)
    assert 4 * v <= watch.largest <= n * v // 4
    run(ops.linear_logprob_entropy, x, backend=where[0])
    assert watch.largest == n * v


@pytest.mark.parametrize("trained, budget, gemms", [((), None, 1), (("hidden",), None, 2), (("hidden",), 0, 3),
                                                    (LEAVES, None, 3), (LEAVES, 0, 4)])  # fmt: skip
@pytest.mark.parametrize("where", ON_CPU)
def test_matrix_products(where, trained, budget, gemms, watch, small_tiles):
    """As many as the table of ops/entropy.py says, in units of NDV multiply-adds."""
    x = problem(Case(64, 16, 2048))
    run(ops.linear_logprob_entropy, x, trained, backend=where[0], memory_budget=budget)
    assert watch.products == gemms * 64 * 16 * 2048


def test_autocast():
    x = problem(Case(9, 8, 130, bias=True))
    narrow = run(ops.linear_logprob_entropy, x, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        wide = run(ops.linear_logprob_entropy, x)
    assert narrow["logp"].equal(wide["logp"]) and narrow["entropy"].equal(wide["entropy"])
    assert narrow["dweight"].float().equal(wide["dweight"])


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("regime", BUDGETS)
def test_opcheck(where, regime):
    backend, device = where
    x = problem(Case(3, 8, 121, bias=True), device=device)
    leaves = {name: x[name].requires_grad_(regime != "none") for name in LEAVES}
    args = (leaves["hidden"], leaves["weight"], x["target"], leaves["bias"])
    rule = (20.0, 0.5, regime, backend)
    torch.library.opcheck(torch.ops.fastpo.logprob_entropy.default, (*args, *rule))
    if regime == "none":
        return
    with torch.no_grad():
        *_, saved, stats = torch.ops.fastpo.logprob_entropy(*args, *rule)
    frozen = [t.detach() for t in args]
    for upstream in ((x["upstream"], x["of_entropy"]), (None, x["of_entropy"])):
        for need in ([True, True, True], [True, False, False], [False, True, False]):
            given = (*upstream, *frozen, saved, stats, *rule, need)
            torch.library.opcheck(torch.ops.fastpo.logprob_entropy_backward.default, given)


@pytest.mark.parametrize("where", COMPILED)
@pytest.mark.parametrize("regime", BUDGETS)
def test_compiled_is_eager_bit_for_bit(where, regime):
    backend, device = where
    trained = () if regime == "none" else LEAVES
    fn = functools.partial(ops.linear_logprob_entropy, backend=backend, memory_budget=BUDGETS[regime], softcap=20.0)
    torch.compiler.reset()
    compiled = torch.compile(lambda *args: fn(*args), fullgraph=True)
    for n in (3, 5, 8):  # the second size makes N dynamic
        x = problem(Case(n, 8, 121, bias=True), device=device)
        eager, ours = (run(f, x, trained) for f in (fn, compiled))
        assert set(eager) == set(ours) and len(eager) == 2 + len(trained)
        for name in eager:
            assert eager[name].equal(ours[name]), name


def test_what_is_refused():
    x = problem(Case(5, 8, 30))
    args = (x["hidden"], x["weight"], x["target"])
    with pytest.raises(OpError, match=r"target \[4\] must be \[N\] = \[5\]"):
        ops.linear_logprob_entropy(*args[:2], args[2][:4])
    with pytest.raises(OpError, match="softcap must be positive"):
        ops.linear_logprob_entropy(*args, softcap=0.0)
    with pytest.raises(OpError, match=r"target\[0\] = 30 is outside the vocabulary of 30"):
        ops.linear_logprob_entropy(*args[:2], torch.full((5,), 30))
