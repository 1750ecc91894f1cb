"""The Triton kernels against their fp64 references: in Triton's interpreter on a CPU, or compiled on a GPU.

TRITON_INTERPRET=1 pytest tests/test_kernels_interpreter.py   (its own process: Triton reads the variable at import)
pytest -m gpu tests/test_kernels_interpreter.py               (the same bodies, compiled)

Criterion: the error against fp64 is at most 1.5 times plain PyTorch's in the same dtype, plus eps32 * max|logits|:
log-probabilities are differences of logits, so rounding any of them once costs that much. (For sums over a response the
sums take the logits' place.)
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the Triton kernels need triton")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRET and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 in its own process, or a GPU", allow_module_level=True)

import fastpo  # noqa: E402
from fastpo import chips  # noqa: E402
from fastpo import losses as table  # noqa: E402
from fastpo.kernels import fused, logprob, preference, reference  # noqa: E402

DEVICE = "cpu" if INTERPRET else "cuda"
# The interpreter evaluates both sides of tl.where in numpy, which warns about the side that is thrown away.
pytestmark = [pytest.mark.usefixtures("poison_empty"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]
if not INTERPRET:
    pytestmark.append(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _interpreter_rounds_to_bf16(monkeypatch):
    """The interpreter cuts fp32 off at bf16, with twice the error of the rounding that every GPU does."""
    if not INTERPRET:
        return
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(array, from_dtype, to_dtype, mode):
        if (from_dtype, to_dtype) != (tl.float32, tl.bfloat16):
            return convert(array, from_dtype, to_dtype, mode)
        wide = torch.tensor(array.tolist() if array.ndim == 0 else array.copy(), dtype=torch.float32)
        return wide.bfloat16().view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounding)


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
    return {"logp": logp.detach(), "lse": lse, "entropy": entropy, "U": u, "magnitude": largest(z)}


def check_rows(logits: Tensor, target: Tensor, bias: Tensor | None, rule: dict, entropy: bool = True) -> None:
    """One launch with everything asked for against fp64 and plain PyTorch."""
    exact = row_reference(logits, target, bias, rule, torch.float64)
    plain = row_reference(logits, target, bias, rule, logits.dtype)
    outputs = logprob.logprob_row_fwd(logits, target, bias, **rule, entropy=entropy, write="grad")
    assert all(x is None or x.dtype == torch.float32 for x in outputs)
    for name, ours in zip(("logp", "lse", "entropy"), outputs):
        if ours is not None:
            assert_within_budget(name, ours, plain[name], exact[name], exact["magnitude"])
    assert_within_budget("U", logits, plain["U"], exact["U"], exact["magnitude"])
    ignored = target == -100
    assert (outputs[0][ignored] == 0).all() and (logits[ignored] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule, with_bias", RULES)
@pytest.mark.parametrize("v", [1, 31, 257, 1000], ids="V{}".format)
def test_row(dtype, rule, with_bias, v):
    check_rows(*row_case(5, v, dtype, with_bias), rule)


# 50,257 (GPT-2) is three whole blocks and an odd rest in bf16, six in fp32; 4,096 is one or two and nothing left.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [4096, 50257], ids="V{}".format)
def test_row_many_blocks(dtype, v):
    logits, target, bias = row_case(5, v, dtype, True)
    padded = logprob.empty_logits(5, v, dtype, DEVICE)
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
    logp, lse, _ = logprob.logprob_slice_finish(state, target)
    logprob.logprob_slice_grad(logits, target, lse, None, **PLAIN, col_offset=0)
    assert logp.shape == lse.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_gradients(dtype):
    """dX = c (U W), dW = U^T (c X), dbias = U^T c under a non-uniform upstream c. The products are formed in fp64, and
    both sides read the same rounded logits, so what is compared is the kernel's U and not two GEMMs; by the root mean
    square, because the largest error of a sum over a few rows is one rounding's luck."""
    n, d, v, rule = 65, 24, 257, {"softcap": 8.0, "logit_scale": 0.7}
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
    logits, target, bias = row_case(5, 1000, dtype, with_bias)
    exact = row_reference(logits, target, bias, rule, torch.float64)
    plain = row_reference(logits, target, bias, rule, dtype)
    state = logprob.logprob_slice_init(5, DEVICE, entropy=True)
    spans = [(700, 1000), (0, 1), (1, 257), (257, 700)]  # any order
    for begin, end in spans:
        part = None if bias is None else bias[begin:end].clone()
        logprob.logprob_slice_fwd(logits[:, begin:end], target, part, state, **rule, col_offset=begin)
    outputs = logprob.logprob_slice_finish(state, target)
    for name, ours in zip(("logp", "lse", "entropy"), outputs):
        assert_within_budget(name, ours, plain[name], exact[name], exact["magnitude"])
    for begin, end in spans:
        part = None if bias is None else bias[begin:end].clone()
        logprob.logprob_slice_grad(logits[:, begin:end], target, outputs[1], part, **rule, col_offset=begin)
    assert_within_budget("U", logits, plain["U"], exact["U"], exact["magnitude"])
    assert (logits[target == -100] == 0).all()


def test_slices_without_entropy_and_target_never_seen():
    logits, target, _ = row_case(3, 64, torch.float32, False)
    target[:] = torch.tensor([10, 63, -100])
    state = logprob.logprob_slice_init(3, DEVICE)
    logprob.logprob_slice_fwd(logits[:, :32], target, None, state, **PLAIN, col_offset=0)
    logp, lse, entropy = logprob.logprob_slice_finish(state, target)
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
@pytest.mark.parametrize("rule, with_bias", [RULES[0], RULES[3]])
@pytest.mark.parametrize("n, v", [(1, 5003), (5, 9001), (12, 2111)], ids=["1x5003", "5x9001", "12x2111"])
def test_split_rows(n, v, dtype, rule, with_bias, many_splits):
    """Rows split over programs, within the criterion and the same from run to run."""
    logits, target, bias = row_case(n, v, dtype, with_bias)
    assert logprob.split_columns(n, v, logits.device)[0] > 1
    copy = logits.clone()
    check_rows(logits, target, bias, rule)
    logprob.logprob_row_fwd(copy, target, bias, **rule, entropy=True, write="grad")
    assert torch.equal(copy, logits)


@pytest.mark.parametrize("split", [False, True], ids=["one-program", "split"])
@pytest.mark.parametrize("dtype", DTYPES)
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
    hidden, weight, target, bias = head_case(70, 72, 500, torch.bfloat16, True)

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
                logp, entropy = op(*arguments, return_entropy=True, **rule, **options)
            return {"logp": logp, "entropy": entropy}
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
LENGTHS = [3, 1, 1500, 40, 7, 9, 0, 5, 12, 64, 31, 33]
CLASSIC = [[0, 1], [3, 2], [4, 5], [7, 6], [8, 9], [11, 10]]
K_WAY = [[0, 1], [0, 2], [3, 2], [1, 2], [5, 4], [8, 9], [9, 10], [8, 10], [10, 9]]  # 6, 7 and 11 are in no pair
# With each loss: a bound on |d coefficient / d response sum|, so what a rounding of the sums does to a coefficient.
LOSSES = [
    pytest.param({"loss_type": "dpo", "beta": 0.1}, 0.0025, id="dpo"),
    pytest.param({"loss_type": "dpo", "beta": 0.1, "label_smoothing": 0.2}, 0.0025, id="cdpo"),
    pytest.param({"loss_type": "ipo", "beta": 0.1, "ipo_mean": True}, 2.0, id="ipo-mean"),
    pytest.param({"loss_type": "ipo", "beta": 0.1, "ipo_mean": False}, 2.0, id="ipo-sum"),
    pytest.param({"loss_type": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.5}, 1.0, id="simpo"),
    pytest.param(
        {"loss_type": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.5, "label_smoothing": 0.1}, 1.0, id="simpo-smooth"
    ),
    pytest.param({"loss_type": "sppo", "beta": 0.01}, 1.0, id="sppo"),
    pytest.param({"loss_type": "sppo_hard", "beta": 0.01}, 2.0, id="sppo-hard"),
    pytest.param({"loss_type": "hinge", "beta": 0.1}, 0.0, id="hinge"),
    pytest.param({"loss_type": "robust", "beta": 0.1, "label_smoothing": 0.1}, 0.004, id="robust"),
]
OFFSETS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)


def preference_case(pairs: list[list[int]], ref: str) -> dict[str, Tensor | None]:
    """Inputs of preference_fwd by name; `ref` is token, response or none."""
    n, s, p = int(OFFSETS[-1]), len(LENGTHS), len(pairs)
    logp = -2 * torch.rand(n)
    case = {
        "logp": logp,
        "ref_logp": logp + 0.3 * torch.randn(n) if ref == "token" else None,
        "ref_response_logps": reference.response_sums(logp, OFFSETS) + torch.randn(s) if ref == "response" else None,
        "response_offsets": OFFSETS,
        "pairs": torch.tensor(pairs, dtype=torch.int32).reshape(p, 2),
        "weight": torch.rand(p) + 0.5,
        "win_prob_chosen": torch.rand(p),
        "win_prob_rejected": torch.rand(p),
    }
    return {name: None if value is None else value.to(DEVICE) for name, value in case.items()}


def preference_reference(case: dict[str, Tensor | None], loss: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    """reference.preference_loss in `dtype`; dlogp and coef by autograd of the weighted sum."""
    cast = {k: v.to(dtype) if v is not None and v.is_floating_point() else v for k, v in case.items()}
    weight = cast.pop("weight")
    logp = cast.pop("logp").clone().requires_grad_()
    terms = reference.preference_loss(logp, **cast, **loss)
    (dlogp,) = torch.autograd.grad((weight * terms.losses).sum(), logp, retain_graph=True)
    coef = torch.stack(
        torch.autograd.grad(
            (weight * terms.losses).sum(), [terms.chosen_logps, terms.rejected_logps], allow_unused=True
        ),
        dim=1,
    )
    return {name: value.detach() for name, value in {**terms._asdict(), "dlogp": dlogp, "coef": coef}.items()}


@pytest.mark.parametrize("loss, curvature", LOSSES)
@pytest.mark.parametrize("ref", ["token", "response", "none"])
@pytest.mark.parametrize("unique", [True, False], ids=["pairs", "k-way"])
def test_preference(loss, curvature, ref, unique):
    case = preference_case(CLASSIC if unique else K_WAY, ref)
    exact = preference_reference(case, loss, torch.float64)
    plain = preference_reference(case, loss, torch.float32)
    result = preference.preference_fwd(**case, **loss, unique=unique)
    largest_sum = max(largest(exact[name]) for name in ("chosen_logps", "rejected_logps"))
    curvature *= largest(case["weight"])
    sensitivity = {"losses": largest(exact["coef"]), "coef": curvature, "dlogp": curvature if unique else 3 * curvature}
    for name, ours in result._asdict().items():
        assert ours.dtype == torch.float32
        # One rounding of the result itself, and one of the sums; three pairs meet in a response of K_WAY.
        magnitude = largest(exact[name]) + largest_sum * sensitivity.get(name, 1.0)
        assert_within_budget(name, ours, plain[name], exact[name], magnitude)
    if ref == "none":
        assert (result.ref_chosen_logps == 0).all() and (result.ref_rejected_logps == 0).all()
    if not unique:
        lonely = [6, 7, 11]
        assert all((result.dlogp[OFFSETS[i] : OFFSETS[i + 1]] == 0).all() for i in lonely)


@pytest.mark.parametrize("loss, curvature", LOSSES)
def test_coefficients_by_central_differences(loss, curvature):
    """A check that shares nothing with autograd: the fp64 reference's losses, moved by +-h in one response's sum.
    Responses of equal sums and at most 12 tokens keep fp32's rounding of the sums below the differences' own."""
    case = preference_case([[0, 1], [4, 5], [7, 8]], "token")
    result = preference.preference_fwd(**case, **loss)
    h = 1e-5
    wide = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in case.items()}
    weight, logp = wide.pop("weight"), wide.pop("logp")
    for pair, responses in enumerate(case["pairs"].tolist()):
        for side, response in enumerate(responses):
            first = int(OFFSETS[response])
            moved = []
            for step in (h, -h):
                shifted = logp.clone()
                shifted[first] += step
                moved.append(weight[pair] * reference.preference_loss(shifted, **wide, **loss).losses[pair])
            expected = ((moved[0] - moved[1]) / (2 * h)).item()
            assert result.coef[pair, side].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert torch.equal(result.dlogp[first], result.coef[pair, side])


@pytest.mark.parametrize("loss, curvature", LOSSES)
def test_the_kernel_is_the_table(loss, curvature):
    """Losses and closed-form coefficients of fastpo.losses, in fp64 on the kernel's own sums."""
    case = preference_case(CLASSIC, "token")
    result = preference.preference_fwd(**case, **loss, unique=True)
    hyper = dict(loss)
    entry = table.LOSSES[hyper.pop("loss_type")]
    if "ipo_mean" in hyper:
        hyper["ipo_reduce"] = "mean" if hyper.pop("ipo_mean") else "sum"
    sums = [getattr(result, f"{who}_logps").double() for who in ("chosen", "rejected", "ref_chosen", "ref_rejected")]
    lengths = torch.tensor(LENGTHS).clamp(min=1).double()[torch.tensor(CLASSIC)]  # the mean of nothing is 0
    arguments = dict(
        chosen_len=lengths[:, 0], rejected_len=lengths[:, 1], win_prob_chosen=case["win_prob_chosen"].double(),
        win_prob_rejected=case["win_prob_rejected"].double(),
    )  # fmt: skip
    sums = [v.cpu() for v in sums]
    arguments = {k: v.cpu() for k, v in arguments.items()}
    torch.testing.assert_close(result.losses.cpu().double(), entry(*sums, **arguments, **hyper), rtol=1e-5, atol=1e-5)
    coefficients = torch.stack(entry.coefficients(*sums, **arguments, **hyper), 1)
    expected = case["weight"].cpu()[:, None] * coefficients
    torch.testing.assert_close(result.coef.cpu().double(), expected.double(), rtol=1e-5, atol=1e-6)


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
    assert result.losses.item() == pytest.approx(expected, rel=1e-5, abs=1e-38)
    slope = torch.sigmoid(-exact).item()
    assert result.dlogp.tolist() == pytest.approx([-slope, slope], rel=1e-5, abs=1e-38)


def test_policy_at_the_reference_gives_log_2():
    case = preference_case(CLASSIC, "token")
    case["ref_logp"] = case["logp"].clone()
    result = preference.preference_fwd(**case, loss_type="dpo", beta=0.1, unique=True)
    torch.testing.assert_close(result.losses, torch.full_like(result.losses, 2.0).log(), rtol=2 * EPS32, atol=0)


def test_one_launch_equals_two():
    case = preference_case(CLASSIC, "token")
    one = preference.preference_fwd(**case, loss_type="simpo", beta=2.0, gamma_beta_ratio=0.5, unique=True)
    two = preference.preference_fwd(**case, loss_type="simpo", beta=2.0, gamma_beta_ratio=0.5, unique=False)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_many_pairs_per_response(monkeypatch):
    """More pairs than one block gathers at a time."""
    monkeypatch.setattr(preference, "BLOCK_P", 16)
    pairs = [[i % 4, (i + 1 + i // 4 % 3) % 4] for i in range(40)]
    case = preference_case(pairs, "none")
    loss = {"loss_type": "dpo", "beta": 0.1}
    exact = preference_reference(case, loss, torch.float64)
    plain = preference_reference(case, loss, torch.float32)
    result = preference.preference_fwd(**case, **loss)
    assert_within_budget("dlogp", result.dlogp, plain["dlogp"], exact["dlogp"], largest(exact["dlogp"]))


@pytest.mark.parametrize("unique", [True, False], ids=["pairs", "k-way"])
def test_no_pairs(unique):
    case = preference_case([], "token")
    if unique:
        case |= {"logp": case["logp"][:0], "ref_logp": None, "response_offsets": OFFSETS[:1].to(DEVICE)}
    result = preference.preference_fwd(**case, loss_type="dpo", beta=0.1, unique=unique)
    assert result.losses.shape == (0,) and result.coef.shape == (0, 2)
    assert result.dlogp.shape == case["logp"].shape and (result.dlogp == 0).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"loss_type": "dpoo"}, "loss_type must be one of"),
        ({"loss_type": "sppo"}, "sppo needs"),
        ({"unique": True}, "unique=True"),
        ({"weight": torch.ones(3)}, "weight must be"),
        ({"ref_response_logps": torch.zeros(12)}, "not both"),
    ],
    ids=["loss", "sppo", "unique", "shape", "two-references"],
)
def test_preference_contracts(change, message):
    case = preference_case(K_WAY, "token") | {"win_prob_chosen": None, "loss_type": "dpo", "beta": 0.1}
    with pytest.raises(AssertionError, match=message):
        preference.preference_fwd(**(case | change))
