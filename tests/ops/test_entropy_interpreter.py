"""kernels/entropy.py against its fp64 reference: in Triton's interpreter on a CPU, or compiled on a GPU.

TRITON_INTERPRET=1 pytest tests/ops/test_entropy_interpreter.py   (its own process: Triton reads the variable at import)
pytest -m gpu tests/ops/test_entropy_interpreter.py               (the same bodies, compiled)

Criterion: that of tests/ops/test_kernels_interpreter.py. The op around the kernel is in tests/ops/test_entropy.py.
"""

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the Triton kernels need triton")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRET and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 in its own process, or a GPU", allow_module_level=True)

from fastpo.kernels import entropy, logprob, reference  # noqa: E402

DEVICE = "cpu" if INTERPRET else "cuda"
pytestmark = [
    pytest.mark.usefixtures("poison_empty", "round_to_bf16", "round_fma_once"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
if not INTERPRET:
    pytestmark.append(pytest.mark.gpu)

DTYPES = [pytest.param(d, id=str(d).removeprefix("torch.")) for d in (torch.float32, torch.bfloat16, torch.float16)]
PLAIN = {"softcap": None, "logit_scale": 1.0}
RULES = [
    pytest.param(PLAIN, False, id="plain"),
    pytest.param({"softcap": 4.0, "logit_scale": 1.0}, False, id="softcap"),
    pytest.param({"softcap": None, "logit_scale": -0.25}, True, id="negative-scale-bias"),
    pytest.param({"softcap": 30.0, "logit_scale": 1.7}, True, id="softcap-scale-bias"),
]


def case(n: int, v: int, dtype: torch.dtype, with_bias: bool = False, offset: float = 0.0):
    """(logits [n, v], target [n] with one -100 row where n > 1, bias [v] | None, upstream [2, n])."""
    logits = (3 * torch.randn(n, v, device=DEVICE) + offset).to(dtype)
    target = torch.randint(0, v, (n,), device=DEVICE)
    target[-1] = v - 1
    if n > 1:
        target[n // 2] = -100
    bias = torch.randn(v, device=DEVICE).to(dtype) if with_bias else None
    return logits, target, bias, torch.randn(2, n, device=DEVICE)


def by_autograd(logits: Tensor, target: Tensor, bias: Tensor | None, upstream: Tensor, rule: dict, dtype: torch.dtype):
    """(U, the largest logit) of the definition in `dtype`."""
    raw = logits.to(dtype, copy=True).requires_grad_()
    biased = raw if bias is None else raw + bias.to(dtype)
    outputs = reference.row_logprob_entropy(biased, target, **rule)
    (u,) = torch.autograd.grad(outputs, raw, list(upstream.to(outputs[0].dtype)))
    return u, reference.logit_rule(biased.detach(), **rule).abs().max().item()


def stats_of(logits: Tensor, target: Tensor, bias: Tensor | None, rule: dict) -> Tensor:
    """The forward's statistics of whole rows [4, N]; of logits as they were stored."""
    norm = torch.empty(2, len(target), device=DEVICE)
    logp, _, of_rows = logprob.logprob_row_fwd(logits, target, bias, entropy=True, norm=norm, **rule)
    return torch.stack([*norm, logp, of_rows])


def check(given: tuple, rule: dict, *, cuts: tuple[int, ...] = (), out: Tensor | None = None) -> Tensor:
    """U in slices that begin at 0 and `cuts`, held to the definition; into `out`, else over the logits."""
    logits, target, bias, upstream = given
    exact, magnitude = by_autograd(*given, rule, torch.float64)
    plain, _ = by_autograd(*given, rule, logits.dtype)
    stats = stats_of(logits, target, bias, rule)
    before = logits.clone()
    ours = logits if out is None else out
    for begin, end in zip((0, *cuts), (*cuts, logits.shape[1])):
        v = slice(begin, end)
        part = None if bias is None else bias[v].clone()
        entropy.logprob_entropy_grad(
            logits[:, v], target, stats, upstream, part, out=ours[:, v], col_offset=begin, **rule
        )
    assert ours.isfinite().all() and (out is None or torch.equal(logits, before))
    error = (ours.double() - exact).abs().max().item()
    allowed = 1.5 * (plain.double() - exact).abs().max().item() + torch.finfo(torch.float32).eps * magnitude
    assert error <= allowed, f"error {error:.3g} over allowed {allowed:.3g}"
    assert (ours[target == -100] == 0).all()
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule, with_bias", RULES)
def test_whole_rows(dtype, rule, with_bias):
    check(case(4, 257, dtype, with_bias), rule)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [1, 31, 1000])
def test_sizes(dtype, v):
    check(case(3, v, dtype, True), {"softcap": 30.0, "logit_scale": 1.7})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [-1000.0, -50.0, 1000.0])
def test_offset_and_all_negative(dtype, offset):
    check(case(5, 1000, dtype, offset=offset), PLAIN)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule, with_bias", RULES)
def test_slices_into_another_matrix(dtype, rule, with_bias):
    """The logits stay; nothing beyond a slice is written; an unaligned side is not read by vectors."""
    given = case(3, 1000, dtype, with_bias)
    buffer = torch.full((3, 1041), float("nan"), dtype=dtype, device=DEVICE)
    padded = logprob.empty_logits(3, 1000, dtype, DEVICE)
    padded.copy_(given[0])
    check((padded, *given[1:]), rule, cuts=(1, 257, 700), out=buffer[:, 11:1011])
    assert buffer[:, :11].isnan().all() and buffer[:, 1011:].isnan().all()


@pytest.mark.parametrize("rule, with_bias", RULES)
def test_few_rows_are_split(rule, with_bias, monkeypatch):
    """Over several programs, in place: each writes its own columns, the target's among them once."""
    monkeypatch.setattr(logprob, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(logprob, "MIN_SPLIT", 1024)
    assert logprob.split_columns(3, 5000, torch.device(DEVICE))[0] == 4
    check(case(3, 5000, torch.float32, with_bias), rule)


def test_dead_rows_and_masked_columns():
    """A -100 row is 0 with NaN in its logits and upstream; a column of -inf or of the least finite number is 0."""
    logits, target, _, upstream = case(4, 300, torch.float32)
    logits[0, :200], logits[1, 100:] = -torch.inf, torch.finfo(torch.float32).min
    target[:2] = torch.tensor([250, 50])
    exact, _ = by_autograd(logits, target, None, upstream, PLAIN, torch.float64)
    stats = stats_of(logits, target, None, PLAIN)
    logits[2], upstream[:, 2] = torch.nan, torch.nan
    entropy.logprob_entropy_grad(logits, target, stats, upstream, None, out=logits, col_offset=0, **PLAIN)
    assert (logits[0, :200] == 0).all() and (logits[1, 100:] == 0).all() and (logits[2] == 0).all()
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-6)


def test_nothing_but_one_column_is_left():
    """p of the target is 1: what is left of 1 - p comes from the forward's logp, not from rounding."""
    logits, target = torch.zeros(2, 400, device=DEVICE), torch.tensor([7, 7], device=DEVICE)
    logits[:, 7] = 40.0
    stats = stats_of(logits, target, None, PLAIN)
    stats[2] = -399 * torch.tensor(-40.0, dtype=torch.float64).exp().float()
    upstream = torch.tensor([[0.0, 0.0], [1.0, 1.0]], device=DEVICE)
    entropy.logprob_entropy_grad(logits, target, stats, upstream, None, out=logits, col_offset=0, **PLAIN)
    others = torch.arange(400, device=DEVICE) != 7
    expected = 40 * torch.tensor(-40.0, dtype=torch.float64).exp()
    torch.testing.assert_close(logits[:, others].double(), expected.expand(2, 399), rtol=1e-4, atol=0)
    assert (logits[:, 7].abs() < 1e-7).all()


@pytest.mark.parametrize(
    "change, message",
    [({"stats": torch.zeros(3, 4)}, "stats must be"), ({"upstream": torch.zeros(2, 3)}, "upstream must be"),
     ({"out": torch.zeros(4, 30)}, "out must be")],
)  # fmt: skip
def test_contracts(change, message):
    logits, target, _, upstream = case(4, 31, torch.float32)
    given = {"stats": torch.zeros(4, 4, device=DEVICE), "upstream": upstream, "out": logits} | change
    with pytest.raises(AssertionError, match=message):
        entropy.logprob_entropy_grad(
            logits, target, given["stats"], given["upstream"], None, out=given["out"], col_offset=0, **PLAIN
        )
    none = torch.zeros(0, 31, device=DEVICE)
    entropy.logprob_entropy_grad(
        none, target[:0], torch.zeros(4, 0, device=DEVICE), upstream[:, :0], None, out=none, col_offset=0, **PLAIN
    )
