"""`log_sum_sq` and `token_kl` against their fp64 definitions: accuracy, gradients, tiles, memory, what is refused."""

import math

import pytest
import torch

from fastpo import ops
from fastpo.check import SOFTCAPPED, Case, budgeted_error
from fastpo.kernels import reference
from fastpo.ops import OpError, backends, vocab_ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [pytest.param(getattr(torch, name), id=name) for name in ("float32", "bfloat16", "float16")]
REF_RULE = {"ref_softcap": 15.0, "ref_logit_scale": 0.7}
RULES = [
    pytest.param({}, {}, id="plain"),
    pytest.param({"bias": True}, {}, id="bias"),
    pytest.param(SOFTCAPPED, REF_RULE, id="softcap"),
    pytest.param({"bias": True, **SOFTCAPPED}, REF_RULE, id="all"),
]


@pytest.fixture
def small_tiles(monkeypatch):
    for name in ("CPU_TILE_BYTES", "DEVICE_TILE_BYTES"):
        monkeypatch.setattr(backends, name, 8 << 10)
    for name in ("CPU_TILE_ROWS", "DEVICE_TILE_ROWS"):
        monkeypatch.setattr(backends, name, 32)


def problem(case: Case, dtype, device="cpu", *, near: float | None = None):
    """Inputs of the policy, and of a reference with another hidden size; `near`: the policy itself, moved that far."""
    x = case.tensors(dtype, device)
    other = Case(case.n, case.d if near is not None else case.d + 3, case.v, case.kind, bias=case.bias)
    ref = other.tensors(torch.float32, device, seed=1)
    if near is not None:
        ref = {k: x[k].float() + near * ref[k] for k in ref if k in ("hidden", "weight", "bias")}
    return x | {f"ref_{k}": t.to(dtype) for k, t in ref.items() if k in ("hidden", "weight", "bias")}


def of_both(fn, x, rules, dtype=None, trained=("hidden", "weight", "bias")):
    """fn's KL and gradients, on copies of x in `dtype`."""
    x = {k: t.to(dtype, copy=True) if dtype and k not in ("target", "upstream") else t for k, t in x.items()}
    leaves = {k: x[k].detach().clone().requires_grad_() for k in trained if k in x}
    x = x | leaves
    kl = fn(
        x["hidden"], x["weight"], x["ref_hidden"], x["ref_weight"], x.get("bias"), x.get("ref_bias"),
        target=x["target"], **rules,
    )  # fmt: skip
    if leaves:
        kl.backward(x["upstream"].to(kl.dtype))
    return {"kl": kl.detach(), **{f"d{k}": t.grad for k, t in leaves.items()}}


def magnitude(case, x):
    logits = [x[f"{s}hidden"].double() @ x[f"{s}weight"].double().t() for s in ("", "ref_")]
    return max(reference.logit_rule(z, case.softcap, case.logit_scale).abs().max().item() for z in logits)


def rules_of(case, ref_rules):
    return {"softcap": case.softcap, "logit_scale": case.logit_scale, **ref_rules}


def assert_kl_within(case, dtype, device, ref_rules, near=None):
    x = problem(case, dtype, device, near=near)
    rules = rules_of(case, ref_rules)
    exact = of_both(reference.token_kl, x, rules, torch.float64)
    naive = of_both(reference.token_kl, x, rules)
    ours = of_both(ops.token_kl, x, rules)
    size = magnitude(case, x)
    scale = x["weight"].double().square().mean().sqrt().item() * x["upstream"].square().mean().sqrt().item()
    for name in exact:
        error, allowed = budgeted_error(
            ours[name], naive[name], exact[name], size, scale if name == "dhidden" else None
        )
        assert error <= allowed, (name, error, allowed)
    dead = x["target"] == -100
    assert dead.any() and (ours["kl"][dead] == 0).all() and (ours["dhidden"][dead] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rule", "ref_rules"), RULES)
def test_token_kl(device, dtype, rule, ref_rules, small_tiles):
    assert_kl_within(Case(67, 40, 1003, **rule), dtype, device, ref_rules)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["negative", "offset", "rising", "peaked"])
def test_token_kl_of_extreme_logits(device, dtype, kind, small_tiles):
    assert_kl_within(Case(67, 24, 2003, kind), dtype, device, {}, near=0.01)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", [r.values[0] for r in RULES], ids=["plain", "bias", "softcap", "all"])
def test_log_sum_sq(device, dtype, rule, small_tiles):
    case = Case(67, 40, 1003, **rule)
    x = case.tensors(dtype, device)
    options = {"target": x["target"], "softcap": case.softcap, "logit_scale": case.logit_scale}
    args = [x["hidden"], x["weight"], x.get("bias")]
    exact = reference.log_sum_sq(*(t if t is None else t.double() for t in args), **options)
    error, allowed = budgeted_error(
        ops.log_sum_sq(*args, **options), reference.log_sum_sq(*args, **options), exact, 3 * magnitude(
            case, problem(case, dtype, device))
    )  # fmt: skip  # a sum of two log-sum-exps, one twice
    assert error <= allowed
    assert (ops.log_sum_sq(*args, **options)[x["target"] == -100] == 0).all()


@pytest.mark.parametrize("kind", ["negative", "offset", "rising", "peaked"])
def test_log_sum_sq_of_extreme_logits(kind, small_tiles):
    x = Case(19, 24, 2003, kind).tensors(torch.float32, "cpu")
    exact = reference.log_sum_sq(x["hidden"].double(), x["weight"].double())
    torch.testing.assert_close(ops.log_sum_sq(x["hidden"], x["weight"]).double(), exact, rtol=1e-3, atol=1e-3)


def test_gradcheck(small_tiles):
    case = Case(5, 4, 300, bias=True, **SOFTCAPPED)
    x = problem(case, torch.float64)

    def kl(hidden, weight, bias):
        return ops.token_kl(
            hidden, weight, x["ref_hidden"], x["ref_weight"], bias, x["ref_bias"], target=x["target"],
            **rules_of(case, REF_RULE),
        )  # fmt: skip

    leaves = [x[k].double().requires_grad_() for k in ("hidden", "weight", "bias")]
    assert torch.autograd.gradcheck(kl, leaves, fast_mode=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        (grad,) = torch.autograd.grad(kl(*leaves).sum(), leaves[0], create_graph=True)
        grad.sum().backward()


@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ()])
def test_only_what_is_asked_for(trained):
    case = Case(9, 8, 130, bias=True)
    x = problem(case, torch.float32)
    every = of_both(ops.token_kl, x, {})
    some = of_both(ops.token_kl, x, {}, trained=trained)
    assert set(some) == {"kl", *(f"d{k}" for k in trained)}
    assert all(torch.equal(some[k], every[k]) for k in some)


def test_tiles_change_nothing(monkeypatch):
    case = Case(67, 24, 1003, bias=True, **SOFTCAPPED)
    x = problem(case, torch.float64)
    args = (x["hidden"], x["weight"], x["bias"])
    whole = of_both(ops.token_kl, x, rules_of(case, REF_RULE)) | {"sq": ops.log_sum_sq(*args)}
    for tile, rows in ((1 << 12, 1), (1 << 14, 7), (1 << 16, 64)):
        monkeypatch.setattr(backends, "CPU_TILE_BYTES", tile)
        monkeypatch.setattr(backends, "CPU_TILE_ROWS", rows)
        cut = of_both(ops.token_kl, x, rules_of(case, REF_RULE)) | {"sq": ops.log_sum_sq(*args)}
        for name, value in whole.items():
            torch.testing.assert_close(cut[name], value, rtol=1e-12, atol=1e-12)


def test_what_they_are():
    """KL of a distribution with itself; a uniform and a certain row; the bound that entropy gives."""
    x = problem(Case(11, 8, 200, bias=True, ignored=False), torch.float32)
    same = ops.token_kl(x["hidden"], x["weight"], x["hidden"], x["weight"], x["bias"], x["bias"])
    assert same.dtype == torch.float32 and same.abs().max() < 1e-6
    flat = ops.log_sum_sq(torch.zeros(2, 8), x["weight"])
    torch.testing.assert_close(flat, torch.full((2,), -math.log(200)))
    certain = torch.zeros(200, 8)
    certain[7] = 100.0
    torch.testing.assert_close(ops.log_sum_sq(torch.ones(1, 8), certain), torch.zeros(1))
    _, entropy = ops.linear_logprob(
        x["hidden"], x["weight"], x["target"], x["bias"], return_entropy=True
    )  # by Jensen, E[log p] <= log E[p]
    squares = ops.log_sum_sq(x["hidden"], x["weight"], x["bias"])
    assert (squares >= -entropy - 1e-5).all() and (squares <= 0).all()
    # against a uniform reference, KL = -log V - mean log p; against a uniform policy, log V - entropy of the reference
    uniform = torch.zeros(200, 8)
    from_uniform = ops.token_kl(x["hidden"], uniform, x["hidden"], x["weight"], None, x["bias"])
    torch.testing.assert_close(from_uniform, math.log(200) - entropy)


def test_masked_columns_and_no_rows(small_tiles):
    """Columns that a head masks with -inf carry no probability in either; N = 0 works."""
    x = problem(Case(9, 8, 700, bias=True, ignored=False), torch.float32)
    masked = {k: t.clone() for k, t in x.items()}
    for name in ("bias", "ref_bias"):
        masked[name][:128] = -torch.inf
    cut = {k: t[128:] if k.removeprefix("ref_") in ("weight", "bias") else t for k, t in x.items()}
    ours, exact = (of_both(ops.token_kl, y, {}) for y in (masked, cut))
    torch.testing.assert_close(ours["kl"], exact["kl"])
    torch.testing.assert_close(ours["dhidden"], exact["dhidden"])
    args = [(y["hidden"], y["weight"], y["bias"]) for y in (masked, cut)]
    torch.testing.assert_close(ops.log_sum_sq(*args[0]), ops.log_sum_sq(*args[1]))
    none = of_both(ops.token_kl, {k: t[:0] if k in ("hidden", "ref_hidden", "target", "upstream") else t
                                  for k, t in x.items()}, {})  # fmt: skip
    assert none["kl"].shape == (0,) and (none["dweight"] == 0).all()
    assert ops.log_sum_sq(x["hidden"][:0], x["weight"]).shape == (0,)


def test_nothing_of_size_n_by_v(monkeypatch):
    """No tensor of a quarter of N x V elements is made, forward or backward; dweight [V, D] is smaller here."""
    from torch.utils._python_dispatch import TorchDispatchMode

    n, d, v = 512, 4, 4096
    monkeypatch.setattr(backends, "CPU_TILE_BYTES", 1 << 20)
    monkeypatch.setattr(backends, "CPU_TILE_ROWS", 128)
    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, list | tuple) else [out]:
                if isinstance(t, torch.Tensor):
                    largest[0] = max(largest[0], t.numel())
            return out

    # The functions inside of the ops: of an op a mode sees the call and nothing else.
    x = problem(Case(n, d, v, bias=True), torch.float32)
    policy, ref = ([x[f"{s}{k}"] for k in ("hidden", "weight", "bias")] for s in ("", "ref_"))
    tensors, rule = (*policy, *ref, x["target"]), (None, 1.0, None, 1.0)
    with Watch():
        _, stats = vocab_ops.token_kl_op._init_fn(*tensors, *rule)
        vocab_ops._token_kl_backward._init_fn(x["upstream"], *tensors, stats, *rule, [True] * 3)
        vocab_ops.log_sum_sq_op._init_fn(*policy, x["target"], None, 1.0)
    assert 4 * v < largest[0] <= n * v // 4


def test_autocast_and_compile():
    x = problem(Case(9, 8, 130, bias=True), torch.float32)
    narrow = of_both(ops.token_kl, x, {}, torch.bfloat16)["kl"]
    with torch.autocast("cpu", torch.bfloat16):
        wide = of_both(ops.token_kl, x, {})["kl"]
        squares = ops.log_sum_sq(x["hidden"], x["weight"])
    assert torch.equal(narrow, wide)
    assert torch.equal(squares, ops.log_sum_sq(x["hidden"].bfloat16(), x["weight"].bfloat16()))
    tensors = [x[k] for k in ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias", "target")]
    torch.library.opcheck(torch.ops.fastpo.log_sum_sq, (*tensors[:3], x["target"], 20.0, 0.5))
    tensors[0] = tensors[0].clone().requires_grad_()
    torch.library.opcheck(torch.ops.fastpo.token_kl, (*tensors, None, 1.0, 20.0, 0.5))


def test_what_is_refused():
    x = problem(Case(5, 8, 30), torch.float32)
    args = [x[k] for k in ("hidden", "weight", "ref_hidden", "ref_weight")]
    with pytest.raises(OpError, match="the vocabularies differ"):
        ops.token_kl(*args[:3], args[3][:-1])
    with pytest.raises(OpError, match=r"target \[5\] must be \[N\] = \[4\]"):
        ops.token_kl(args[0], args[1], args[2][:4], args[3])
    with pytest.raises(OpError, match="softcap must be positive"):
        ops.token_kl(*args, ref_softcap=0.0)
    with pytest.raises(OpError, match="must share one floating dtype"):
        ops.log_sum_sq(args[0], args[1].double())
