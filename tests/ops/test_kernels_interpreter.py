"""The Triton kernels against their fp64 references: in Triton's interpreter on a CPU, or compiled on a GPU.

TRITON_INTERPRET=1 pytest tests/ops/test_kernels_interpreter.py   (its own process: Triton reads the variable at import)
pytest -m gpu tests/ops/test_kernels_interpreter.py               (the same bodies, compiled)

Criterion: the error against fp64 is at most 1.5 times plain PyTorch's in the same dtype, plus eps32 * max|logits|:
log-probabilities are differences of logits, so rounding any of them once costs that much. (For sums over a response the
sums take the logits' place.)
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the Triton kernels need triton")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRET and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 in its own process, or a GPU", allow_module_level=True)

import fastpo  # noqa: E402
from fastpo import ops  # noqa: E402
from fastpo.data import Example  # noqa: E402
from fastpo.data.packing import collate  # noqa: E402
from fastpo.kernels import fused, logprob, pair_losses, preference, reference  # noqa: E402
from fastpo.losses.table import LOSSES, resolve_terms  # noqa: E402
from fastpo.ops import chips, parts  # noqa: E402
from fastpo.training.row_statistics import LOG_SUM_SQ, TOKEN_KL, draw_rows  # noqa: E402
from fastpo.training.stepwide import Statistics  # noqa: E402

DEVICE = "cpu" if INTERPRET else "cuda"
# The interpreter evaluates both sides of tl.where in numpy, which warns about the side that is thrown away.
pytestmark = [
    pytest.mark.usefixtures("poison_empty", "round_to_bf16", "round_fma_once"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
if not INTERPRET:
    pytestmark.append(pytest.mark.gpu)


EPS32 = torch.finfo(torch.float32).eps
DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in (torch.float32, torch.bfloat16, torch.float16)]
# softcap (Gemma), logit_scale (Cohere, Granite), bias (Phi), and all of them at once
RULES = [
    pytest.param({"softcap": None, "logit_scale": 1.0}, False, id="plain"),
    pytest.param({"softcap": 4.0, "logit_scale": 1.0}, False, id="softcap"),
    pytest.param({"softcap": None, "logit_scale": 0.25}, True, id="scale-bias"),
    pytest.param({"softcap": 30.0, "logit_scale": 1.7}, True, id="softcap-scale-bias"),
]
PLAIN = {"softcap": None, "logit_scale": 1.0}


def largest(x: Tensor) -> float:
    return x.abs().max().item()


def root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def assert_within_budget(
    name: str, ours: Tensor, plain: Tensor, exact: Tensor, magnitude: float, size: Callable[[Tensor], float] = largest
) -> None:
    """The module's criterion for one tensor, its largest error by default."""
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.isfinite().all(), f"{name} is not finite"
    error, allowed = size(ours.double() - exact), 1.5 * size(plain.double() - exact) + EPS32 * magnitude
    assert error <= allowed, f"{name}: error {error:.3g} over allowed {allowed:.3g}"


def row_case(n: int, v: int, dtype: torch.dtype, with_bias: bool, offset: float = 0.0):
    """(logits [n, v], target [n] with one -100 row where n > 1, bias [v] | None)."""
    logits = (3 * torch.randn(n, v, device=DEVICE) + offset).to(dtype)
    target = torch.randint(0, v, (n,), device=DEVICE)
    target[-1] = v - 1
    if n > 1:
        target[n // 2] = -100
    return logits, target, torch.randn(v, device=DEVICE).to(dtype) if with_bias else None


def row_reference(logits: Tensor, target: Tensor, bias: Tensor | None, rule: dict, dtype: torch.dtype) -> dict:
    """reference.row_logprob in `dtype`, and U = d sum(logp) / d logits by autograd."""
    raw = logits.to(dtype, copy=True).requires_grad_()
    biased = raw if bias is None else raw + bias.to(dtype)
    logp, lse, entropy = reference.row_logprob(biased, target, **rule)
    (u,) = torch.autograd.grad(logp.sum(), raw)
    z = reference.logit_rule(biased.detach(), **rule)
    out = {"logp": logp.detach(), "lse": lse, "entropy": entropy, "U": u, "magnitude": largest(z)}
    return out | {"top1": reference.row_top1(biased, target, **rule)}


def check_rows(logits: Tensor, target: Tensor, bias: Tensor | None, rule: dict, entropy: bool = True) -> None:
    """One launch with everything asked for against fp64 and plain PyTorch."""
    exact = row_reference(logits, target, bias, rule, torch.float64)
    plain = row_reference(logits, target, bias, rule, logits.dtype)
    top1 = torch.empty(len(target), device=DEVICE)
    outputs = logprob.logprob_row_fwd(logits, target, bias, **rule, entropy=entropy, write="grad", top1=top1)
    assert top1.tolist() == exact["top1"].tolist()
    assert all(x is None or x.dtype == torch.float32 for x in outputs)
    for name, ours in zip(("logp", "lse", "entropy"), outputs):
        if ours is not None:
            assert_within_budget(name, ours, plain[name], exact[name], exact["magnitude"])
    assert_within_budget("U", logits, plain["U"], exact["U"], exact["magnitude"])
    ignored = target == -100
    assert (outputs[0][ignored] == 0).all() and (logits[ignored] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule, with_bias", RULES)
def test_row(dtype, rule, with_bias):
    check_rows(*row_case(4, 257, dtype, with_bias), rule)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [1, 31, 1000], ids="V{}".format)
def test_row_sizes(dtype, v):
    check_rows(*row_case(3, v, dtype, True), {"softcap": 30.0, "logit_scale": 1.7})


# 50,257 (GPT-2) is three whole blocks and an odd rest in bf16, six in fp32; 4,096 is one or two and nothing left.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [4096, 50257], ids="V{}".format)
def test_row_many_blocks(dtype, v):
    logits, target, bias = row_case(3, v, dtype, True)
    padded = logprob.empty_logits(3, v, dtype, DEVICE)
    padded.copy_(logits)
    check_rows(padded, target, bias, {"softcap": 30.0, "logit_scale": 0.5})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [-1000.0, -50.0, 1000.0], ids="offset{:g}".format)
def test_row_offset_and_all_negative(dtype, offset):
    logits, target, _ = row_case(5, 1000, dtype, False, offset)
    assert offset > 0 or logits.max() < 0
    check_rows(logits, target, None, PLAIN)


@pytest.mark.parametrize("write", [None, "grad"], ids=["stats", "grad"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_stride(dtype, write):
    """A view with odd row stride and offset: nothing beyond V is read or written; without `write` nothing is."""
    logits, target, _ = row_case(4, 257, dtype, False)
    buffer = torch.full((4, 301), float("nan"), dtype=dtype, device=DEVICE)
    view = buffer[:, 11:268]
    view.copy_(logits)
    if write:
        check_rows(view, target, None, PLAIN, entropy=False)
    else:
        logp, lse, entropy = logprob.logprob_row_fwd(view, target, None, **PLAIN)
        assert entropy is None and logp.isfinite().all() and lse.isfinite().all()
        assert torch.equal(view, logits)
    view.fill_(float("nan"))
    assert buffer.isnan().all()


def test_row_minus_infinity():
    """Masked-out vocabulary, also where it fills a whole block or everything but the target."""
    logits, target, _ = row_case(4, 5000, torch.float32, False)
    logits[0, :4200] = float("-inf")
    logits[1, 7::2] = float("-inf")
    logits[3] = float("-inf")
    logits[3, 17] = 2.0
    target[:] = torch.tensor([4999, 6, -100, 17])
    exact = logits.double().log_softmax(1)
    expected_u = -exact.exp()
    live = torch.tensor([0, 1, 3], device=DEVICE)
    expected_u[live, target[live]] += 1
    expected_u[2] = 0
    logp, _, entropy = logprob.logprob_row_fwd(logits, target, None, **PLAIN, entropy=True, write="grad")
    torch.testing.assert_close(logp[live].double(), exact[live, target[live]], rtol=0, atol=4 * EPS32 * 15)
    torch.testing.assert_close(entropy.double(), torch.special.entr(exact.exp()).sum(1), rtol=0, atol=4 * EPS32 * 15)
    torch.testing.assert_close(logits.double(), expected_u, rtol=0, atol=4 * EPS32 * 15)


@pytest.mark.parametrize("bad", [-1, 31, 2**40], ids=["minus1", "V", "huge"])
def test_target_out_of_range_is_nan(bad):
    """No plausible number comes out of a target outside the vocabulary; its neighbours are unharmed."""
    logits, target, _ = row_case(3, 31, torch.float32, False)
    target[:] = torch.tensor([3, bad, 5])
    logp, lse, _ = logprob.logprob_row_fwd(logits, target, None, **PLAIN)
    assert logp.isnan().tolist() == [False, True, False] and lse.isfinite().all()


@pytest.mark.parametrize("target_dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_target_dtype(target_dtype):
    logits, target, _ = row_case(3, 31, torch.float32, False)
    expected, _, _ = reference.row_logprob(logits, target)
    logp, _, _ = logprob.logprob_row_fwd(logits, target.to(target_dtype), None, **PLAIN)
    torch.testing.assert_close(logp, expected)


def test_nan_logit_is_not_hidden():
    logits, target, _ = row_case(3, 257, torch.float32, False)
    logits[0, 200] = float("nan")
    logp, _, _ = logprob.logprob_row_fwd(logits, target, None, **PLAIN, write="grad")
    assert logp.isnan().tolist() == [True, False, False] and logits[0].isnan().all() and logits[1:].isfinite().all()


def test_no_rows():
    logits, target = torch.empty(0, 31, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
    for out in logprob.logprob_row_fwd(logits, target, None, **PLAIN, entropy=True, write="grad"):
        assert out.shape == (0,) and out.dtype == torch.float32
    state = logprob.logprob_slice_init(0, DEVICE, entropy=True)
    logprob.logprob_slice_fwd(logits, target, None, state, **PLAIN, col_offset=0)
    norm = torch.empty(2, 0, device=DEVICE)
    logp, lse, _ = logprob.logprob_slice_finish(state, target, norm=norm, **PLAIN)
    logprob.logprob_slice_grad(logits, target, norm, None, **PLAIN, col_offset=0)
    assert logp.shape == lse.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_gradients(dtype):
    """dX = c (U W), dW = U^T (c X), dbias = U^T c under a non-uniform upstream c. The products are formed in fp64, and
    both sides read the same rounded logits, so what is compared is the kernel's U and not two GEMMs; by the root mean
    square, because the largest error of a sum over a few rows is one rounding's luck."""
    n, d, v, rule = 33, 24, 257, {"softcap": 8.0, "logit_scale": 0.7}
    _, target, _ = row_case(n, v, dtype, False)
    leaves = {
        "hidden": torch.randn(n, d, device=DEVICE).to(dtype),
        "weight": torch.randn(v, d, device=DEVICE).to(dtype),
        "bias": torch.randn(v, device=DEVICE).to(dtype),
    }
    upstream = torch.randn(n, device=DEVICE)

    def by_autograd(to: torch.dtype) -> dict[str, Tensor]:
        inputs = {name: leaf.to(to, copy=True).requires_grad_() for name, leaf in leaves.items()}
        logp = reference.linear_logprob(inputs["hidden"], inputs["weight"], target, inputs["bias"], **rule)
        grads = torch.autograd.grad(logp, list(inputs.values()), upstream.to(logp.dtype))
        return {"logp": logp.detach(), **dict(zip(inputs, grads))}

    exact, plain = by_autograd(torch.float64), by_autograd(dtype)
    logits = torch.nn.functional.linear(*leaves.values())
    logp, _, _ = logprob.logprob_row_fwd(logits, target, None, **rule, write="grad")
    u, c = logits.double(), upstream.double()[:, None]
    ours = {
        "logp": logp,
        "hidden": c * (u @ leaves["weight"].double()),
        "weight": u.T @ (c * leaves["hidden"].double()),
        "bias": (c * u).sum(0),
    }
    for name, value in ours.items():
        assert_within_budget(name, value, plain[name], exact[name], 8.0, root_mean_square)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule, with_bias", RULES)
def test_slices(dtype, rule, with_bias):
    """A vocabulary cut into uneven slices gives the whole rows' results, and U slice by slice."""
    logits, target, bias = row_case(3, 1000, dtype, with_bias)
    exact = row_reference(logits, target, bias, rule, torch.float64)
    plain = row_reference(logits, target, bias, rule, dtype)
    state = logprob.logprob_slice_init(3, DEVICE, entropy=True)
    spans = [(700, 1000), (0, 1), (1, 257), (257, 700)]  # any order
    for begin, end in spans:
        part = None if bias is None else bias[begin:end].clone()
        logprob.logprob_slice_fwd(logits[:, begin:end], target, part, state, **rule, col_offset=begin)
    top1, norm = torch.empty(3, device=DEVICE), torch.empty(2, 3, device=DEVICE)
    outputs = logprob.logprob_slice_finish(state, target, top1, norm, **rule)
    assert top1.tolist() == exact["top1"].tolist()
    for name, ours in zip(("logp", "lse", "entropy"), outputs):
        assert_within_budget(name, ours, plain[name], exact[name], exact["magnitude"])
    for begin, end in spans:
        part = None if bias is None else bias[begin:end].clone()
        logprob.logprob_slice_grad(logits[:, begin:end], target, norm, part, **rule, col_offset=begin)
    assert_within_budget("U", logits, plain["U"], exact["U"], exact["magnitude"])
    assert (logits[target == -100] == 0).all()


def test_slices_without_entropy_and_target_never_seen():
    logits, target, _ = row_case(3, 64, torch.float32, False)
    target[:] = torch.tensor([10, 63, -100])
    state = logprob.logprob_slice_init(3, DEVICE)
    logprob.logprob_slice_fwd(logits[:, :32], target, None, state, **PLAIN, col_offset=0)
    logp, lse, entropy = logprob.logprob_slice_finish(state, target, **PLAIN)
    assert entropy is None and lse.isfinite().all()
    assert logp.isnan().tolist() == [False, True, False]


def test_rows_are_deterministic():
    logits, target, bias = row_case(3, 5000, torch.bfloat16, True)
    copy = logits.clone()
    first = logprob.logprob_row_fwd(logits, target, bias, **PLAIN, entropy=True, write="grad")
    second = logprob.logprob_row_fwd(copy, target, bias, **PLAIN, entropy=True, write="grad")
    assert all(torch.equal(a, b) for a, b in zip(first, second)) and torch.equal(logits, copy)


@pytest.fixture
def many_splits(monkeypatch):
    """A chip of 132 multiprocessors, and rows that are cut into parts of 1,024 columns."""
    monkeypatch.setattr(logprob, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(logprob, "MIN_SPLIT", 1024)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n, v, rule, with_bias",
    [
        pytest.param(1, 5003, *RULES[3].values, id="1x5003-all"),
        pytest.param(3, 9001, *RULES[3].values, id="3x9001-all"),
        pytest.param(12, 2111, *RULES[0].values, id="12x2111-plain"),
    ],
)
def test_split_rows(n, v, dtype, rule, with_bias, many_splits):
    """Rows split over programs, within the criterion and the same from run to run."""
    logits, target, bias = row_case(n, v, dtype, with_bias)
    assert logprob.split_columns(n, v, logits.device)[0] > 1
    copy = logits.clone()
    check_rows(logits, target, bias, rule)
    logprob.logprob_row_fwd(copy, target, bias, **rule, entropy=True, write="grad")
    assert torch.equal(copy, logits)


@pytest.mark.parametrize("split", [False, True], ids=["one-program", "split"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_argmax(dtype, split, request):
    """The first of equal maxima, within a block, in two blocks and in two splits; a masked row; a bias that decides."""
    if split:
        request.getfixturevalue("many_splits")
    logits, target, bias = row_case(6, 9001, dtype, True)
    logits[0, [700, 8500]] = 40.0
    logits[1, [17, 18, 19]] = 40.0
    logits[2] = float("-inf")
    logits[3, 9000] = 40.0
    logits[4] = -200.0
    argmax = torch.empty(6, dtype=torch.int64, device=DEVICE)
    for used in (None, bias):
        raw = logits if used is None else logits.float() + used.float()
        logprob.logprob_row_fwd(logits.clone(), target, used, **PLAIN, argmax=argmax)
        assert argmax.tolist() == reference.row_argmax(raw).tolist()
        if used is None:
            assert argmax[:5].tolist() == [700, 17, 0, 9000, 0]
            assert torch.equal(argmax, logits.argmax(1))


@pytest.mark.parametrize("way", ["one-program", "split", "slices"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("rule, with_bias", RULES)
def test_top1(dtype, rule, with_bias, way, request):
    """A target that is the likeliest, one of several, the next; masked, ignored and outside; a NaN and +inf beside
    it."""
    if way == "split":
        request.getfixturevalue("many_splits")
    logits, _, bias = row_case(10, 3001, dtype, with_bias)
    logits /= 4  # so that 12 is the largest, and the cap of 4 does not make one of it and 11.75
    target = torch.tensor([700, 2500, 19, 3, 17, -100, 2**40, 40, 5, 2999], device=DEVICE)
    if bias is not None:
        bias[[700, 2500, 18, 19, 3, 40]] = 0.5
    logits[0, [700, 2500]] = 12.0
    logits[1, [700, 2500]] = 12.0
    logits[2, 19], logits[2, 18] = 11.75, 12.0
    logits[3] = -30.0
    logits[3, 3] = -12.0
    logits[4, 3:2400] = float("-inf")
    logits[7, 40], logits[7, 41] = 12.0, float("nan")
    logits[8, 5] = float("inf")
    logits[9, 2999] = float("-inf")
    biased = logits.float() if bias is None else logits.float() + bias.float()
    inside = target.where(target < 3001, 0)
    expected = reference.row_top1(biased, inside, **rule).where(target < 3001, 0.0)
    capped = float(rule["softcap"] is not None)  # +inf, to a number
    assert expected.tolist() == [1, 1, 0, 1, 0, 0, 0, 0, capped, 0]
    top1 = torch.empty(10, device=DEVICE)
    if way == "slices":
        state = logprob.logprob_slice_init(10, DEVICE)
        for begin, end in ((1000, 2000), (2000, 3001), (0, 1000)):
            v = slice(begin, end)
            part = None if bias is None else bias[v].clone()
            logprob.logprob_slice_fwd(logits[:, v], target, part, state, **rule, col_offset=begin)
        logprob.logprob_slice_finish(state, target, top1, **rule)
    else:
        logprob.logprob_row_fwd(logits, target, bias, **rule, top1=top1)
    assert top1.tolist() == expected.tolist()


def test_split_rows_masked_and_not_finite(many_splits):
    """Splits of nothing but -inf, a NaN in a split that is not the target's, +inf: as plain PyTorch."""
    logits, target, _ = row_case(4, 5000, torch.float32, False)
    logits[0, :4200] = float("-inf")
    logits[1, 4000] = float("nan")
    logits[2, 100] = float("inf")
    target[:] = torch.tensor([4999, 3, 7, -100])
    plain, lse, _ = reference.row_logprob(logits, target)
    logp, our_lse, _ = logprob.logprob_row_fwd(logits, target, None, **PLAIN, write="grad")
    assert logp.isnan().tolist() == plain.isnan().tolist() == [False, True, True, False]
    torch.testing.assert_close(logp[0], plain[0])
    torch.testing.assert_close(our_lse[[0, 3]], lse[[0, 3]])
    assert logits[[0, 3]].isfinite().all() and logits[1].isnan().all() and (logits[3] == 0).all()


# The fused forward. Small tiles, so that small shapes have several in every direction.
FUSED = [pytest.param(fused.FusedConfig(16, 64, 32, 4, 2), id="pointers")]
if INTERPRET or torch.cuda.get_device_capability()[0] >= 9:
    FUSED.append(pytest.param(fused.FusedConfig(16, 64, 32, 4, 2, tma=True, flatten=True), id="descriptors"))
HALF = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in (torch.bfloat16, torch.float16)]


def head_case(n: int, d: int, v: int, dtype: torch.dtype, with_bias: bool = False, offset: float = 0.0):
    """(hidden [n, d], weight [v, d], target [n] with one -100 where n > 1, bias [v] | None); logits of scale 2."""
    hidden = torch.randn(n, d, device=DEVICE).to(dtype)
    weight = (torch.randn(v, d, device=DEVICE) * (2 / d**0.5)).to(dtype)
    target = torch.randint(0, v, (n,), device=DEVICE)
    target[-1] = v - 1
    if n > 1:
        target[n // 2] = -100
    bias = (torch.randn(v, device=DEVICE) + offset).to(dtype) if with_bias or offset else None
    return hidden, weight, target, bias


def check_fused(case: tuple, rule: dict, config: fused.FusedConfig | None) -> tuple[Tensor, ...]:
    """Every output against fp64, with plain PyTorch's error as the budget."""
    hidden, weight, target, bias = case

    def rows(dtype: torch.dtype) -> tuple[Tensor, ...]:
        cast = [None if t is None else t.to(dtype) for t in (hidden, weight, bias)]
        return reference.row_logprob(torch.nn.functional.linear(*cast), target, **rule)

    exact, plain = rows(torch.float64), rows(hidden.dtype)
    raw = hidden.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    likeliest = reference.row_argmax(raw, **rule)
    for aim in (target, likeliest.where(target != -100, target)):
        top1 = torch.empty(len(target), device=DEVICE)
        outputs = fused.fused_logprob_fwd(hidden, weight, aim, bias, **rule, entropy=True, top1=top1, config=config)
        assert top1.tolist() == reference.row_top1(raw, aim, **rule).tolist()
    outputs = fused.fused_logprob_fwd(hidden, weight, target, bias, **rule, entropy=True, config=config)
    for name, ours, p, x in zip(("logp", "lse", "entropy"), outputs, plain, exact):
        assert ours.dtype == torch.float32
        assert_within_budget(name, ours, p, x, largest(raw * rule["logit_scale"]))
    assert (outputs[0][target == -100] == 0).all()
    return outputs


@pytest.mark.parametrize("config", FUSED)
@pytest.mark.parametrize("rule, with_bias", RULES)
@pytest.mark.parametrize("dtype", HALF)
def test_fused(config, rule, with_bias, dtype):
    """D over BLOCK_D and no multiple of it, V no multiple of anything, several tiles in every direction."""
    check_fused(head_case(37, 200, 301, dtype, with_bias), rule, config)


@pytest.mark.parametrize(
    "n, d, v", [(1, 64, 257), (1, 8, 1), (17, 24, 64), (3, 72, 1000)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("config", FUSED)
def test_fused_shapes(config, n, d, v):
    check_fused(head_case(n, d, v, torch.bfloat16), PLAIN, config)


@pytest.mark.parametrize("offset", [-1000.0, -60.0, 1000.0], ids="offset{:g}".format)
def test_fused_offset_and_all_negative(offset):
    check_fused(head_case(5, 40, 257, torch.bfloat16, offset=offset), PLAIN, FUSED[0].values[0])


@pytest.mark.parametrize("d", [96, 112, 123], ids="D{}".format)
def test_fused_config_of_the_chip(d):
    """Without a configuration given: D of whole blocks, not whole, and odd."""
    check_fused(head_case(70, d, 700, torch.bfloat16, True), {"softcap": 30.0, "logit_scale": 0.5}, None)


def test_fused_repeats_bitwise(monkeypatch):
    """From run to run, whatever the number of programs, and for a row alone or among others."""
    hidden, weight, target, bias = head_case(70, 40, 300, torch.bfloat16, True)

    def run(rows: slice = slice(None)) -> tuple[Tensor, ...]:
        options = {"entropy": True, "config": FUSED[0].values[0]}
        return fused.fused_logprob_fwd(hidden[rows], weight, target[rows], bias, **PLAIN, **options)

    first = run()
    assert all(torch.equal(a, b) for a, b in zip(first, run()))
    monkeypatch.setattr(fused, "multiprocessors", lambda device: 7)
    assert all(torch.equal(a, b) for a, b in zip(first, run()))
    assert all(torch.equal(a[32:64], b) for a, b in zip(first, run(slice(32, 64))))


def test_fused_strides_and_no_rows():
    """A weight that is part of a larger one, hidden rows apart; no rows at all."""
    hidden, weight, target, _ = head_case(5, 40, 257, torch.bfloat16)
    expected = fused.fused_logprob_fwd(hidden, weight, target, None, **PLAIN)
    wide = torch.full((257, 64), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    wide[:, 16:56] = weight
    apart = torch.full((10, 40), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    apart[::2] = hidden
    ours = fused.fused_logprob_fwd(apart[::2], wide[:, 16:56], target, None, **PLAIN)
    torch.testing.assert_close(ours[0], expected[0], rtol=0, atol=4 * EPS32 * 10)
    for out in fused.fused_logprob_fwd(hidden[:0], weight, target[:0], None, **PLAIN, entropy=True):
        assert out.shape == (0,)


def test_fused_not_finite():
    """A NaN or infinite logit surfaces in its row and only there, as in plain PyTorch; -inf masks a column; a target
    outside the vocabulary is NaN."""
    hidden, weight, _, bias = head_case(6, 40, 257, torch.bfloat16, True)
    target = torch.tensor([5, 6, 2**40, 7, -1, 70], device=DEVICE)
    hidden[0, 3] = float("nan")
    hidden[1, 3] = float("inf")
    bias[200] = float("-inf")
    bias[:70] = float("-inf")  # a whole tile and more
    plain, lse, _ = reference.row_logprob(
        torch.nn.functional.linear(hidden.float(), weight.float(), bias.float()), torch.full_like(target, 70)
    )
    logp, our_lse, entropy = fused.fused_logprob_fwd(
        hidden, weight, target, bias, **PLAIN, entropy=True, config=FUSED[0].values[0]
    )
    assert plain.isnan().tolist() == [True, True, False, False, False, False]
    assert logp.isnan().tolist() == [True, True, True, False, True, False]
    assert logp[3] == float("-inf")  # a masked target
    torch.testing.assert_close(logp[5], plain[5])
    torch.testing.assert_close(our_lse[2:], lse[2:])
    assert entropy[2:].isfinite().all()


@pytest.mark.parametrize("regime", ["none", "sliced"])
@pytest.mark.parametrize("kind", ["plain", "bias-softcap", "peaked"])
@pytest.mark.parametrize("dtype", HALF)
def test_fused_through_the_op(dtype, kind, regime, monkeypatch):
    """linear_logprob with the override on: log-probability, entropy and, recomputing, every gradient. In `peaked` the
    target has nearly all of the probability: a logit rounded one way here and another there would be all one sees."""
    monkeypatch.setenv(chips.FUSED_FORWARD_VARIABLE, "1")
    calls = []
    forward = fused.fused_logprob_fwd
    monkeypatch.setattr(fused, "fused_logprob_fwd", lambda *a, **k: calls.append(1) or forward(*a, **k))
    n, d, v = 40, 72, 517
    hidden, weight, target, bias = head_case(n, d, v, dtype, kind == "bias-softcap")
    rule = {"softcap": 8.0, "logit_scale": 0.7} if kind == "bias-softcap" else PLAIN
    if kind == "peaked":
        hidden = (weight[target.clamp(min=0)].float() * (30 / 4)).to(dtype)
    upstream = torch.randn(n, device=DEVICE)

    def results(op: Callable[..., Tensor], to: torch.dtype, **options) -> dict[str, Tensor]:
        leaves = {"hidden": hidden, "weight": weight, "bias": bias}
        leaves = {k: t.to(to, copy=True).requires_grad_() for k, t in leaves.items() if t is not None}
        arguments = (leaves["hidden"], leaves["weight"], target, leaves.get("bias"))
        if regime == "none":
            with torch.no_grad():
                logp, entropy, top1 = op(*arguments, return_entropy=True, return_top1=True, **rule, **options)
            return {"logp": logp, "entropy": entropy, "top1": top1}
        logp = op(*arguments, **rule, **options)
        grads = torch.autograd.grad(logp, list(leaves.values()), upstream.to(logp.dtype))
        return {"logp": logp.detach(), **dict(zip(leaves, grads))}

    exact, plain = results(reference.linear_logprob, torch.float64), results(reference.linear_logprob, dtype)
    ours = results(fastpo.linear_logprob, dtype, backend="triton", memory_budget=0)
    assert calls == [1]
    for name, value in ours.items():
        assert_within_budget(name, value, plain[name], exact[name], 40.0, root_mean_square)


@pytest.mark.gpu
def test_more_rows_than_a_16_bit_grid():
    """70,001 rows; 43 columns make odd strides."""
    check_rows(*row_case(70_001, 43, torch.bfloat16, False), PLAIN)


@pytest.mark.gpu
@pytest.mark.parametrize("v", [32_000, 128_256, 151_936, 256_000], ids="V{}".format)
def test_real_vocabularies(v):
    check_rows(*row_case(64, v, torch.bfloat16, False), PLAIN)


# Preference kernel. 1,500 tokens is more than one block; one response has a single token, one none at all.
LENGTHS = [3, 1, 1500, 40, 0, 9, 5]
CLASSIC = [[0, 1], [3, 2], [5, 4]]  # of the first six
K_WAY = [[0, 1], [0, 2], [3, 2], [1, 2], [5, 3]]  # 4 and 6 are in no pair

# A loss is the kernel's where a pair's own numbers determine it: not lists, unpaired rows, a whole step, or a third
# response.
POINTWISE = {
    name: loss
    for name, loss in LOSSES.items()
    if loss.shape == "pairs" and not loss.of_step and not {"greedy_logps", "chosen_of_reference"} & set(loss.needs)
}
# Hyper-parameters beside the defaults with which each loss is tried too; those with an NLL have it by sequence here.
VARIANTS = {
    "dpo": [{"label_smoothing": 0.2}], "robust": [{"label_smoothing": 0.2}], "ipo": [{"ipo_reduce": "sum"}],
    "simpo": [{"label_smoothing": 0.1}], "bco_pair": [{"delta": 0.4}], "wpo": [{"clamp_weight": False}],
    "fdpo": [{"f_divergence_type": k} for k in ("reverse_kl", "forward_kl", "alpha_divergence")],
    "alphapo": [{"alpha": 0.0}, {"alpha": -0.5}], "discopop": [{"beta": 0.5, "discopop_tau": 0.7}],
    "slic": [{"lambda_coef": 0.0}], "orpo": [{"nll_coef": 0.0}], "cpo": [{"nll_reduction": "seq_mean"}],
    "cpo_hinge": [{"cpo_alpha": 0.0}],
}  # fmt: skip
BY_SEQUENCE = {
    "slic": {"nll_reduction": "seq_sum"}, "cpo": {"nll_reduction": "seq_sum", "label_smoothing": 0.1},
    "cpo_hinge": {"nll_reduction": "seq_sum"}, "cpo_ipo": {"nll_reduction": "seq_mean"},
    "cpo_simpo": {"nll_reduction": "seq_mean"}, "rpo": {"nll_reduction": "seq_mean", "rpo_alpha": 1.0},
    "orpo": {"nll_reduction": "seq_mean", "disable_prompt_loss": True},
}  # fmt: skip
CASES = [
    pytest.param(
        name, {**BY_SEQUENCE.get(name, {}), **hyper}, id="-".join([name, *(f"{k}={v}" for k, v in hyper.items())])
    )
    for name in POINTWISE
    for hyper in [{}, *VARIANTS.get(name, [])]
]


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)


OFFSETS = offsets_of(LENGTHS)


def preference_case(
    name: str, pairs: list[list[int]], ref: str = "token", weights: bool = False, lengths: list[int] = LENGTHS
) -> ops.PreferenceInputs:
    """Random inputs that suit a loss; `ref` is token, response or none."""
    lengths = lengths[:6] if pairs is CLASSIC else lengths
    offsets, loss = offsets_of(lengths), POINTWISE[name]
    n, s, p = int(offsets[-1]), len(lengths), len(pairs)
    logp = -2 * torch.rand(n)
    drawn = [
        int(offsets[r]) + torch.randperm(lengths[r])[: min(lengths[k] for k in pair)] for pair in pairs for r in pair
    ]
    by_response = ref == "response"
    x = ops.PreferenceInputs(
        logp=logp,
        rows=torch.rand(n) if loss.needs and "chosen_kl" in loss.needs else logp * (0.8 + 0.4 * torch.rand(n)),
        ref_logp=logp + 0.3 * torch.randn(n) if ref == "token" else None,
        ref_response_logps=reference.response_sums(logp, offsets) + torch.randn(s) if by_response else None,
        prev_logp=logp + 0.3 * torch.randn(n) if loss.previous and not by_response else None,
        prev_response_logps=-50 * torch.rand(s) if loss.previous and by_response else None,
        token_weight=torch.rand(n) + 0.5 if weights else None,
        drawn_rows=torch.cat(drawn) if loss.drawn and pairs else None,
        response_offsets=offsets,
        pairs=torch.tensor(pairs, dtype=torch.int32).reshape(p, 2),
        weight=torch.rand(p) + 0.5,
        win_prob_chosen=torch.rand(p),
        win_prob_rejected=torch.rand(p),
    )
    return ops.PreferenceInputs(*(None if t is None else t.to(DEVICE) for t in x))


def launch(name: str, hyper: dict, x: ops.PreferenceInputs, unique: bool = False) -> dict[str, Tensor]:
    """The kernel's results by name."""
    arguments = x._asdict() | ({"rows": None} if not preference.recipe(name, **hyper).reads_rows else {})
    result = preference.preference_fwd(
        **arguments, loss_type=name, unique=unique, mean_rewards=POINTWISE[name].length, **hyper
    )
    shown = zip(ops.PreferenceOutput._fields, result.shown)
    drows = {} if result.drows is None else {"drows": result.drows}
    return {**dict(shown), "metrics": result.metrics.sum(1), "coef": result.coef, "dlogp": result.dlogp, **drows}


def by_the_table(name: str, hyper: dict, x: ops.PreferenceInputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same by the Python table and autograd in `dtype`; `spread_*`: what a relative error of 1 in all of a pair's
    sums would do to its loss and to its coefficients."""
    loss = POINTWISE[name]
    wide = {k: t.to(dtype).cpu() if t.is_floating_point() else t.cpu() for k, t in x._asdict().items() if t is not None}
    leaves = {k: wide[k].detach().clone().requires_grad_() for k in ("logp", "rows")}
    x = x._replace(**wide | leaves)
    total, out = ops.plain_preference_loss(name, hyper, x, reference.response_sums)
    dlogp, drows = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    pairs, _ = ops.table_inputs(loss, x, reference.response_sums)
    sums = [t.detach().requires_grad_() for t in pairs[:2]]
    of_each = loss.fn(pairs._replace(chosen_logps=sums[0], rejected_logps=sums[1]), **hyper)
    coef = torch.stack(torch.autograd.grad((x.weight * of_each).sum(), sums, create_graph=True), 1)
    size = torch.stack([t.detach().abs() for t in pairs if t is not None and t.shape == of_each.shape]).amax(0)
    spread = 0.0
    for side in coef.unbind(1):
        if side.requires_grad:
            curvature = torch.autograd.grad(side.sum(), sums, retain_graph=True, allow_unused=True)
            spread = spread + sum((c.abs() * size for c in curvature if c is not None), torch.zeros_like(size))
    coef = coef.detach()
    return {
        **{k: t.detach() for k, t in out._asdict().items()}, "coef": coef, "dlogp": dlogp,
        **({"drows": drows} if loss.needs and "chosen_kl" in loss.needs else {}),
        "spread_losses": (coef.abs().sum(1) * size).amax(), "spread_coef": torch.as_tensor(spread).max(),
    }  # fmt: skip


def assert_is_the_table(name: str, hyper: dict, x: ops.PreferenceInputs, unique: bool) -> dict[str, Tensor]:
    """Every result of the kernel against the table in fp64, by the module's criterion."""
    hyper = POINTWISE[name].hyper(**hyper)
    exact, plain = (by_the_table(name, hyper, x, dtype) for dtype in (torch.float64, torch.float32))
    ours = launch(name, hyper, x, unique)
    assert ours.keys() == {k for k in exact if not k.startswith("spread")}
    sums = max(largest(exact[k]) for k in ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"))
    shared = 1 if unique else 3  # so many pairs meet in a response of K_WAY
    for key, value in ours.items():
        assert value.dtype == torch.float32
        # One rounding of the result itself, and one of the sums and hyper-parameters that it is made of.
        of_sums = {"losses": exact["spread_losses"], "coef": exact["spread_coef"]}
        of_sums |= {key: shared * exact["spread_coef"] for key in ("dlogp", "drows")}
        magnitude = shared * largest(exact[key]) + float(of_sums.get(key, sums))
        assert_within_budget(f"{name} {key}", value.cpu(), plain[key], exact[key], magnitude)
    return ours


def test_every_pointwise_pair_loss_has_a_recipe():
    """The kernel and the table know the same losses, by the same hyper-parameters, defaults and needs."""
    assert set(pair_losses.RECIPES) == set(POINTWISE)
    for name, loss in POINTWISE.items():
        _, *expected = inspect.signature(loss.fn).parameters.values()  # without x
        found = inspect.signature(pair_losses.RECIPES[name]).parameters.values()
        assert [(p.name, p.default) for p in found] == [(p.name, p.default) for p in expected], name
        made = pair_losses.recipe(name, **loss.hyper(**BY_SEQUENCE.get(name, {})))
        assert (made.reference != "none") == loss.reference and (made.reference == "mixed") == loss.previous, name
        assert (made.probs == "pair") == loss.pair_prob, name
        assert (made.probs == "both") == (loss.win_prob or "win_prob" in loss.may_read), name
        assert made.has_row_gradient == ("chosen_kl" in loss.needs), name
        assert made.reads_rows == bool({"chosen_kl", "chosen_log_sum_sq"} & set(loss.needs)), name
        assert made.tokens == ("drawn" if loss.drawn else "tails" if "chosen_tail_logps" in loss.needs else "all"), name
        assert (made.nll != "none") == (loss.nll is not None), name
        if loss.nll:  # a mean over the step's tokens is no pair's own
            assert pair_losses.recipe(name, **loss.hyper()) is None, name
    for name in set(LOSSES) - set(POINTWISE):
        assert pair_losses.recipe(name) is None and name in pair_losses.__doc__, name
    with pytest.raises(TypeError, match="dpo has the hyper-parameters beta, label_smoothing, not gamma"):
        pair_losses.recipe("dpo", gamma=1.0)


@pytest.mark.parametrize("name, hyper", CASES)
def test_the_kernel_is_the_table(name, hyper):
    """Losses, both coefficients, metrics and every token's gradient."""
    assert_is_the_table(name, hyper, preference_case(name, CLASSIC), True)


# The gather, the weights and the lengths are the same code for all losses but these.
@pytest.mark.parametrize("name", ["dpo", "simpo", "rdpo", "orpo", "sppo", "wpo", "ld_dpo", "sampo", "tdpo1", "tdpo2"])
def test_shared_responses_and_token_weights(name):
    """K-way pairs, whose coefficients a second launch gathers."""
    ours = assert_is_the_table(name, BY_SEQUENCE.get(name, {}), preference_case(name, K_WAY, weights=True), False)
    assert all((ours["dlogp"][OFFSETS[i] : OFFSETS[i + 1]] == 0).all() for i in (4, 6))


@pytest.mark.parametrize("ref", ["response", "none"])
@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "sppo", "inpo"])
def test_references(name, ref):
    """Sums of the data instead of tokens; no reference: then its sums are 0, and rewards are the policy's own."""
    ours = assert_is_the_table(name, {}, preference_case(name, K_WAY, ref), False)
    if ref == "none":
        assert (ours["ref_chosen_logps"] == 0).all() and (ours["ref_rejected_logps"] == 0).all()


def test_dno_without_scores():
    """Regularised DNO is DNO-Prct on the mixed reference where there are no win probabilities."""
    x = preference_case("dno_reg", CLASSIC)._replace(win_prob_chosen=None, win_prob_rejected=None)
    assert_is_the_table("dno_reg", {}, x, True)


def same_arithmetic(name: str) -> tuple[str, ...]:
    """What a loss does with a pair's sums once it has them: losses that agree in it are one code with other numbers."""
    made = pair_losses.recipe(name, **POINTWISE[name].hyper(**BY_SEQUENCE.get(name, {})))
    return made._replace(tokens="", reference="").words


@pytest.mark.parametrize("name", {same_arithmetic(name): name for name in reversed(POINTWISE)}.values())
def test_extreme_margins(name):
    """|beta * margin| of 1e-3 to 1e3 in one-token responses, of either sign, on either side: as far as the table."""
    hyper = {**BY_SEQUENCE.get(name, {})}
    largest_sum = 1e3 / POINTWISE[name].hyper(**hyper).get("beta", 1.0)
    sums = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0], [1e-6, 0], [0, 1e-6], [0.08, 0], [0, 0.08]])
    zeros = torch.zeros_like(sums)
    policy, ref = (sums, zeros) if not POINTWISE[name].reference else (
        torch.cat([sums, zeros[:4]]), torch.cat([zeros, sums[[0, 1, 2, 6]]])
    )  # fmt: skip
    x = preference_case(name, [[2 * i, 2 * i + 1] for i in range(len(policy))], lengths=[1] * policy.numel())
    policy, ref = (-largest_sum * side.flatten().to(DEVICE) for side in (policy, ref))
    rows = policy if "chosen_log_sum_sq" in POINTWISE[name].needs else x.rows
    assert_is_the_table(name, hyper, x._replace(logp=policy, rows=rows, ref_logp=ref), True)


def one_pair(margin: float) -> dict[str, Tensor | None]:
    """A pair of one-token responses, the chosen one `margin` above the other, without a reference."""
    return {
        "logp": torch.tensor([margin, 0.0], device=DEVICE),
        "ref_logp": None,
        "response_offsets": torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE),
        "pairs": torch.tensor([[0, 1]], dtype=torch.int32, device=DEVICE),
        "weight": torch.ones(1, device=DEVICE),
    }


@pytest.mark.parametrize("margin", [-1e4, -80.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 17.0, 60.0, 80.0, 1e4], ids="{:g}".format)
def test_log_sigmoid_is_stable(margin):
    """dpo with beta 1 is -logsigmoid(margin) to a relative 1e-5 over its whole range, with slope -sigmoid(-margin)."""
    result = preference.preference_fwd(**one_pair(margin), loss_type="dpo", beta=1.0, unique=True)
    exact = torch.tensor(margin, dtype=torch.float32).double()
    expected = -torch.nn.functional.logsigmoid(exact).item()
    assert result.shown[0].item() == pytest.approx(expected, rel=1e-5, abs=1e-38)
    slope = torch.sigmoid(-exact).item()
    assert result.dlogp.tolist() == pytest.approx([-slope, slope], rel=1e-5, abs=1e-38)


@pytest.mark.parametrize("name", ["dpo", "hinge", "gpo_exp", "gpo_tquad", "alphapo", "orpo"])
def test_nan_is_not_hidden(name):
    x = preference_case(name, [[0, 1], [3, 4]])
    x.logp[0] = float("nan")
    ours = launch(name, POINTWISE[name].hyper(**BY_SEQUENCE.get(name, {})), x)
    assert ours["losses"].isnan().tolist() == [True, False]


def test_policy_at_the_reference_gives_log_2_and_no_wins():
    x = preference_case("dpo", CLASSIC)
    ours = launch("dpo", {"beta": 0.1}, x._replace(ref_logp=x.logp.clone()), True)
    torch.testing.assert_close(ours["losses"], torch.full_like(ours["losses"], 2.0).log(), rtol=2 * EPS32, atol=0)
    assert ours["metrics"][2] == 0


@pytest.mark.parametrize("name", ["dpo", "ld_dpo", "tdpo1", "sampo"])
def test_runs_are_equal_bit_for_bit(name):
    """Run to run with shared responses and without; and one launch equals two."""
    hyper = POINTWISE[name].hyper()
    x, k_way = preference_case(name, CLASSIC), preference_case(name, K_WAY, weights=True)
    one, two, *again = (
        launch(name, hyper, x, True), launch(name, hyper, x, False), launch(name, hyper, k_way),
        launch(name, hyper, k_way),
    )  # fmt: skip
    assert all(torch.equal(one[k], two[k]) for k in one) and all(torch.equal(again[0][k], again[1][k]) for k in one)


def test_many_pairs_per_response(monkeypatch):
    """More pairs than one block gathers at a time."""
    monkeypatch.setattr(preference, "BLOCK_P", 8)
    pairs = [[i % 4, (i + 1 + i // 4 % 3) % 4] for i in range(18)]
    for name in ("dpo", "ld_dpo"):
        hyper, x = POINTWISE[name].hyper(), preference_case(name, pairs, lengths=[5, 40, 1, 9])
        exact, plain = (by_the_table(name, hyper, x, dtype) for dtype in (torch.float64, torch.float32))
        ours = launch(name, hyper, x)["dlogp"].cpu()
        assert_within_budget("dlogp", ours, plain["dlogp"], exact["dlogp"], 20 * largest(exact["dlogp"]))


@pytest.mark.gpu
@pytest.mark.parametrize("unique", [True, False], ids=["pairs", "k-way"])
def test_more_pairs_than_a_16_bit_grid(unique):
    """70,001 pairs, one program each."""
    count = 70_001
    pairs = [[2 * i, 2 * i + 1] for i in range(count)]
    if not unique:
        pairs[-1] = [0, 1]
    assert_is_the_table("dpo", {}, preference_case("dpo", pairs, lengths=[1, 2] * count), unique)


@pytest.mark.parametrize("name", ["dpo", "tdpo1", "sampo"])
@pytest.mark.parametrize("rows", [True, False], ids=["no-pairs", "nothing"])
def test_no_pairs(name, rows):
    x = preference_case(name, [], lengths=LENGTHS if rows else [])
    x = x._replace(drawn_rows=x.response_offsets[:0].long() if name == "sampo" else None)
    ours = launch(name, POINTWISE[name].hyper(), x, unique=not rows)
    assert ours["losses"].shape == (0,) and ours["coef"].shape == (0, 2) and (ours["metrics"] == 0).all()
    assert all(ours[k].shape == x.logp.shape and (ours[k] == 0).all() for k in ("dlogp", "drows") if k in ours)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("kto", {"beta": 0.1}, "loss_type must be one of"),
        ("cpo", {"beta": 0.1, "cpo_alpha": 1.0, "nll_reduction": "token_mean"}, "without a token_mean"),
        ("sppo", {"beta": 0.1, "win_prob_rejected": None}, "sppo needs win_prob_chosen and win_prob_rejected"),
        ("tdpo1", {"beta": 0.1, "rows": None}, "tdpo1 needs rows"),
        (
            "ld_dpo",
            {"beta": 0.1, "ld_alpha": 0.5, "ref_logp": None, "ref_response_logps": torch.zeros(7)},
            "per token",
        ),
        ("sampo", {"beta": 0.1}, "drawn_rows go with sampo"),
        ("dpo", {"beta": 0.1, "unique": True}, "unique=True"),
        ("dpo", {"beta": 0.1, "weight": torch.ones(3)}, "weight must be"),
        ("dpo", {"beta": 0.1, "token_weight": torch.ones(3)}, "token_weight must be"),
        ("dpo", {"beta": 0.1, "pairs": torch.zeros(5, 2, dtype=torch.int64)}, "pairs must be"),
        ("dpo", {"beta": 0.1, "ref_response_logps": torch.zeros(7)}, "not both"),
    ],
    ids=["loss", "nll", "probs", "rows", "tails", "drawn", "unique", "weight", "tokens", "pairs", "two-references"],
)
def test_preference_contracts(name, change, message):
    x = preference_case("dpo", K_WAY)._asdict() | {"loss_type": name}
    with pytest.raises(AssertionError, match=message):
        preference.preference_fwd(**(x | {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in change.items()}))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"response_offsets": lambda t: t - 1}, "response_offsets must ascend from 0"),
        ({"response_offsets": lambda t: t.clamp(max=int(t[-1]) - 1)}, "response_offsets must ascend from 0"),
        ({"pairs": lambda t: t + 11}, "pairs must be indices"),
        ({"pairs": lambda t: t - 1}, "pairs must be indices"),
    ],
    ids=["start", "end", "past", "negative"],
)
def test_preference_op_looks_at_its_indices_on_request(change, message, monkeypatch):
    monkeypatch.setattr(parts, "CHECK_INPUTS", True)
    x = preference_case("dpo", K_WAY)._asdict()
    x |= {name: fn(x[name]) for name, fn in change.items()}
    with pytest.raises(ops.OpError, match=message):
        ops.preference_loss(**x, loss_type="dpo", beta=0.1, backend="triton")


def test_one_minus_p_of_a_slice_keeps_its_digits():
    """A vocabulary-parallel slice turns kept logits to U with the log-probabilities at hand: not by z - lse near 0."""
    from fastpo.ops import vocab_parallel

    logits = 16 + torch.randn(4, 64, device=DEVICE)
    target = torch.tensor([3, 9, 60, vocab_parallel.ELSEWHERE], device=DEVICE)
    rows = torch.arange(3, device=DEVICE)
    logits[rows, target[:3]] = 30.0
    exact = logits.double().log_softmax(1)
    lse, logp = logits.double().logsumexp(1).float(), exact[torch.arange(4, device=DEVICE), target.clamp(min=0)].float()
    head = vocab_parallel.Head(logits[:, :1], logits.new_empty(64, 1), target, None, None, 1.0)
    saved = logits.clone()
    vocab_parallel._logits_to_grad(head, saved, torch.stack([lse, torch.ones_like(lse), lse]), logp, "triton")
    torch.testing.assert_close(
        saved[rows, target[:3]].double(), -torch.expm1(exact[rows, target[:3]]), rtol=5e-3, atol=0
    )
    torch.testing.assert_close(saved[3].double(), -exact[3].exp(), rtol=1e-4, atol=1e-12)


# ---- the trainer's own path

TRAINED = [name for name, loss in POINTWISE.items() if not loss.online]


@pytest.mark.parametrize("layout", ["classic", "k-way"])
def test_the_trainer_takes_the_kernel(layout, monkeypatch):
    """Objective.of_pairs by the kernel and by the table: total, metrics and gradient of every trainable loss; K-way
    pairs have token weights."""
    objective = pytest.importorskip("fastpo.training.objective")
    examples = []
    for k in range(2):
        lengths = [4 + k, 2, 6][: 2 if layout == "classic" else 3]
        pairs = [(0, 1)] if layout == "classic" else [(0, 1), (2, 1)]
        columns = {"win_prob_chosen": 0.7, "win_prob_rejected": 0.4, "weight": 2.0}
        weights = None if layout == "classic" else [np.linspace(0.5, 2, n, dtype=np.float32) for n in lengths]
        examples.append(
            Example(
                prompt_ids=np.arange(5, dtype=np.int32),
                responses=[np.arange(n, dtype=np.int32) for n in lengths],
                pairs=pairs,
                pair_columns={name: [value] * len(pairs) for name, value in columns.items()},
                token_weights=weights,
            )
        )
    ref = [[-np.random.rand(len(r)).astype(np.float32) for r in e.responses] for e in examples]
    logp = torch.from_numpy(np.concatenate([r + 0.1 * np.random.randn(len(r)) for rs in ref for r in rs])).float()
    asked = []

    def takes(term, logp, batch):
        asked.append(term.name)
        return ops.has_kernel(term.name, term.hyper)

    names = TRAINED if layout == "k-way" else ["dpo", "simpo", "cpo", "sampo", "ld_dpo", "tdpo1", "wpo", "inpo"]
    for name in names:
        terms = resolve_terms([name])[:1]  # without the sft term of some
        results = []
        for kernel in (False, True):
            batch = collate(examples, range(2), None if not POINTWISE[name].reference else ref)
            leaves = [logp.clone().requires_grad_(), torch.linspace(0.1, 1, len(logp)).requires_grad_()]
            batch.rows = {TOKEN_KL: leaves[1], LOG_SUM_SQ: logp - 0.1}
            batch.drawn_rows = draw_rows(examples, range(2), 0, 1, 0)
            batch = batch.to(torch.device(DEVICE))
            batch.rows = {key: values.to(DEVICE) for key, values in batch.rows.items()}
            monkeypatch.setattr(objective, "has_kernel", takes if kernel else lambda *_: False)
            total, metrics = objective.Objective(terms).of_pairs(leaves[0].to(DEVICE), batch, Statistics())
            total.backward()
            results.append([total.detach(), metrics, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
        for table, kernel in zip(*results, strict=True):
            torch.testing.assert_close(kernel, table, rtol=3e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert set(asked) == set(names)
