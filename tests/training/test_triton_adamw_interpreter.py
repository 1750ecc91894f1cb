"""AdamW's Triton kernel and the optimiser made of it: in Triton's interpreter on a CPU, or compiled on a GPU.

TRITON_INTERPRET=1 pytest tests/training/test_triton_adamw_interpreter.py     (its own process)
pytest -m gpu tests/training/test_triton_adamw_interpreter.py                 (the same bodies, compiled)

Criterion: the error against fp64 is at most 1.5 times plain PyTorch's in fp32, plus eps32 times the largest number.
What is rounded stochastically is the definition's rounding of the fp32 result, bit for bit.
"""

import copy
import logging
import os

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="the Triton kernels need triton")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRET and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 in its own process, or a GPU", allow_module_level=True)

from fastpo import check  # noqa: E402
from fastpo.config.train_config import TrainConfig  # noqa: E402
from fastpo.kernels import adamw, reference  # noqa: E402
from fastpo.kernels.adamw import AdamWTensor  # noqa: E402
from fastpo.training import triton_adamw  # noqa: E402
from fastpo.training.optim import Gradients, build_optimizer  # noqa: E402

DEVICE = "cpu" if INTERPRET else "cuda"
pytestmark = [
    pytest.mark.usefixtures("poison_empty", "round_to_bf16", "round_fma_once"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
if not INTERPRET:
    pytestmark.append(pytest.mark.gpu)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS32 = torch.finfo(FP32).eps
HYPER = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
KEY = (-123_456_789, 77)
# One element, a block and one more, several chunks and an odd rest.
SIZES = (1, adamw.BLOCK + 1, 2 * adamw.CHUNK + 3333)


def make(n, weight=BF16, grad=BF16, state=FP32, master=False, step=1.0, number=0, offset=0):
    """A tensor as `step` finds it, from `offset` elements into its memory on."""

    def put(x, dtype):
        return x.to(DEVICE, dtype)[offset:]

    m, v = torch.randn(n + offset) * 0.1, torch.rand(n + offset) * 0.1
    if step == 1:
        m, v = torch.zeros_like(m), torch.zeros_like(v)
    w = put(torch.randn(n + offset), weight)
    g = put(torch.randn(n + offset), grad)
    count = torch.tensor(step, device=DEVICE)
    return AdamWTensor(
        g, w, put(w.float() + 0.001, FP32) if master else None, put(m, state), put(v, state), count, number
    )


def copies(tensors):
    return [AdamWTensor(*(x.clone() if isinstance(x, torch.Tensor) else x for x in t)) for t in tensors]


def launch(tensors, *, key=None, finite=1.0, scale=0.5, **hyper):
    table = adamw.adamw_table(tensors)
    adamw.adamw(
        table, tensors, finite=torch.tensor(finite, device=DEVICE), scale=torch.tensor(scale, device=DEVICE), key=key,
        **{**HYPER, **hyper},
    )  # fmt: skip
    return tensors


def expected(t, dtype, scale=0.5, **hyper):
    start = t.weight if t.master is None else t.master
    numbers = (x.to(dtype) for x in (start, t.grad, t.exp_avg, t.exp_avg_sq))
    return dict(zip(("weight", "exp_avg", "exp_avg_sq"), reference.adamw(
        *numbers, int(t.step), scale=scale, **{**HYPER, **hyper}
    ), strict=True))  # fmt: skip


def assert_within_budget(name, ours, plain, exact):
    assert ours.isfinite().all(), name
    error, allowed = ours.double() - exact, 1.5 * (plain.double() - exact).abs().max() + EPS32 * exact.abs().max()
    assert error.abs().max() <= allowed, f"{name}: {error.abs().max():.3g} over {allowed:.3g}"


@pytest.mark.parametrize("step", [1.0, 2.0, 1000.0], ids="step{:g}".format)
@pytest.mark.parametrize("grad", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("weight", [BF16, FP16], ids=str)
def test_masters_and_moments(weight, grad, step):
    tensors = [make(n, weight, grad, master=True, step=step, number=i) for i, n in enumerate(SIZES)]
    before = copies(tensors)
    for ours, start in zip(launch(tensors), before, strict=True):
        exact, plain = expected(start, torch.float64), expected(start, FP32)
        assert_within_budget("master", ours.master, plain["weight"], exact["weight"])
        for name in ("exp_avg", "exp_avg_sq"):
            assert_within_budget(name, getattr(ours, name), plain[name], exact[name])
        assert torch.equal(ours.weight, ours.master.to(weight))
        assert torch.equal(ours.grad, start.grad) and ours.step == step


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.9, 0.95), (0.5, 0.9999)], ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_hyperparameters(betas, weight_decay):
    hyper = {"betas": betas, "weight_decay": weight_decay, "lr": 0.3, "eps": 1e-3}
    (start,) = before = copies([make(5000, master=True, step=3.0)])
    (ours,) = launch(copies(before), **hyper)
    exact, plain = expected(start, torch.float64, **hyper), expected(start, FP32, **hyper)
    assert_within_budget("master", ours.master, plain["weight"], exact["weight"])


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_weights_themselves_with_moments_of_16_bits(offset):
    """master_weights=none: as PyTorch's fused kernel, which computes in fp32 and rounds all three to nearest."""
    ours = make(5000, state=BF16, step=2.0, offset=offset)
    (start,) = copies([ours])
    assert adamw.adamw_table([ours]).aligned == (offset == 0)
    launch([ours])
    plain = reference.adamw(start.weight, start.grad, start.exp_avg, start.exp_avg_sq, 2, scale=0.5, **HYPER)
    for got, want in zip((ours.weight, ours.exp_avg, ours.exp_avg_sq), plain, strict=True):
        off = (got.float() - want.float()).abs()
        assert (off <= torch.finfo(BF16).eps * want.float().abs()).all()  # one spacing, of few
        assert (off > 0).float().mean() < 0.01  # m of a few bits is often half way between two


def test_philox():
    """The known answers of its authors' library (Random123, kat_vectors)."""
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    ones = (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2
    for (counters, keys), known in {
        ((0, 0, 0, 0), (0, 0)): "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ones: "408f276d 41c83b0e a20bc7c6 6d5451fd",
        pi: "d16cfe09 94fdcceb 5001e420 24126ea1",
    }.items():
        assert " ".join(f"{int(x):08x}" for x in reference.philox(counters, keys)) == known


@pytest.mark.parametrize("weight", [BF16, FP16], ids=str)
def test_rounding_is_the_definitions_bit_for_bit(weight):
    tensors = [make(n, weight, number=3 + i) for i, n in enumerate(SIZES)]
    with_masters = [t._replace(master=t.weight.float()) for t in copies(tensors)]
    launch(with_masters)
    for ours, wide in zip(launch(tensors, key=KEY), with_masters, strict=True):
        noise = reference.rounding_noise(ours.weight.numel(), ours.number, KEY).to(DEVICE)
        smallest = torch.finfo(weight).smallest_normal  # below it the kernel's noise has fewer digits
        normal = wide.master.abs() >= smallest
        wanted = reference.stochastic_round(wide.master, weight, noise)
        assert torch.equal(ours.weight[normal], wanted[normal]) and normal.float().mean() > 0.99
        assert torch.equal(ours.exp_avg, wide.exp_avg) and torch.equal(ours.exp_avg_sq, wide.exp_avg_sq)
        if ours.weight.numel() > 100:
            assert not torch.equal(ours.weight, wide.weight)


@pytest.mark.parametrize("value", [1.0, -3.140625, 6.103515625e-05, 2.9802322387695312e-06])
@pytest.mark.parametrize("weight", [BF16, FP16], ids=str)
def test_rounding_is_unbiased(weight, value):
    """A gradient of zero and a decay of a third of a spacing, over 100,003 elements."""
    t = make(100_003, weight)._replace(grad=torch.zeros(100_003, device=DEVICE, dtype=weight))
    t.weight.fill_(value)
    start = t.weight[0].item()
    eps = torch.finfo(weight).eps
    spacing = max(
        eps * 2.0 ** torch.tensor(abs(start)).log2().floor().item(), torch.finfo(weight).smallest_normal * eps
    )
    lr = spacing / 3 / abs(start)
    launch([t], key=KEY, lr=lr, weight_decay=1.0)
    exact = start * (1 - lr)
    low, high = sorted(t.weight.double().unique().tolist())
    assert low < exact < high and (torch.tensor((low + high) / 2, dtype=torch.float64).to(weight).item() in (low, high))
    p = (exact - low) / (high - low)
    error = (t.weight.double().mean().item() - exact) / (high - low)
    assert abs(error) < 5 * (p * (1 - p) / 100_003) ** 0.5


def test_fastpo_check_runs_it():
    results = list(check.adamw_results(DEVICE))
    assert [r.regime for r in results] == ["master", "stochastic"] * 2 and all(r.ok for r in results), results


def test_what_is_not_finite_stays_so():
    t = make(5000)
    t.weight[:3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    launch([t], key=KEY)
    assert t.weight[:3].tolist()[:2] == [float("inf"), -float("inf")] and t.weight[2].isnan()
    assert t.weight[3:].isfinite().all()


def test_bits_depend_on_number_and_element_alone():
    tensors = [make(n, number=i) for i, n in enumerate(SIZES)]
    together, apart, reverse = copies(tensors), copies(tensors), copies(tensors)
    launch(together, key=KEY)
    for t in apart:
        launch([t], key=KEY)
    launch(reverse[::-1], key=KEY)
    for a, b, c in zip(together, apart, reverse, strict=True):
        assert torch.equal(a.weight, b.weight) and torch.equal(a.weight, c.weight)
    again = [t._replace(number=9) for t in copies(tensors)]
    launch(again, key=KEY)
    other = copies(tensors)
    launch(other, key=(KEY[0], 78))
    for t in (again[2], other[2]):
        assert not torch.equal(t.weight, together[2].weight) and torch.equal(t.exp_avg, together[2].exp_avg)


def test_not_finite_writes_nothing():
    tensors = [make(n, master=master, number=i) for i, n in enumerate(SIZES) for master in (True,)]
    tensors[0].grad.fill_(float("nan"))
    before = copies(tensors)
    for t, b in zip(launch(tensors, finite=0.0), before, strict=True):
        for x, y in zip(t[1:6], b[1:6], strict=True):
            assert torch.equal(x, y)


def test_the_table_is_made_again_only_where_it_changed():
    tensors = [make(n, number=i) for i, n in enumerate(SIZES)]
    table = adamw.adamw_table(tensors)
    assert adamw.adamw_table(tensors, table) is table
    moved = [tensors[0]._replace(grad=tensors[0].grad.clone()), *tensors[1:]]
    again = adamw.adamw_table(moved, table)
    assert again.chunks is table.chunks and again.rows[0][0] == moved[0].grad.data_ptr()
    assert len(adamw.adamw_table(tensors[:2], table).chunks) == 2


# --------------------------------------------------------------- the optimiser


def layers(seed=0, dtype=BF16):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(33, 70), nn.LayerNorm(70), nn.Linear(70, 5)).to(DEVICE, dtype)
    model[1].float()  # beside them, one that the kernel does not take
    return model


CONFIG = {"learning_rate": 1e-2, "weight_decay": 0.1, "adam_beta2": 0.95}


def start(model, mode, optim="adamw_torch_fused"):
    gradients = Gradients(dict(model.named_parameters()), master_weights=mode, seed=7)
    return gradients, build_optimizer(model, TrainConfig(optim=optim, **CONFIG), gradients)


def train(model, gradients, optimizer, steps, first=0, micro_batches=1, max_norm=0.05):
    for step in range(first, first + steps):
        gradients.begin(micro_batches, step + 1)
        for k in range(micro_batches):
            x = torch.randn(8, 33, generator=torch.Generator().manual_seed(100 * step + k)).to(DEVICE, BF16)
            model[2](model[1](model[0](x).float()).to(BF16)).float().square().sum().backward()
        norm = gradients.clip_(max_norm)
        gradients.step_(optimizer, torch.isfinite(norm))


def plain(monkeypatch, mode, steps, micro_batches=1, state=None):
    monkeypatch.setenv(triton_adamw.SWITCH, "0")
    model = layers()
    gradients, optimizer = start(model, mode, "adamw_torch")
    assert type(optimizer) is torch.optim.AdamW and not gradients.by_kernel
    train(model, gradients, optimizer, steps, micro_batches=micro_batches)
    monkeypatch.delenv(triton_adamw.SWITCH)
    return model, gradients, optimizer


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("mode", ["fp32", "stochastic", "none"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_equal_to_pytorchs(optim, mode, micro_batches, monkeypatch):
    """Two steps with masters; one where weights are rounded, since it decides the signs of a second's small gradients.
    Unfused, PyTorch rounds each operation on 16 bits, and its gradients after scaling them."""
    count = 2 if mode == "fp32" else 1
    ours = layers()
    gradients, optimizer = start(ours, mode, optim)
    assert type(optimizer) is triton_adamw.TritonAdamW and len(gradients.by_kernel) == 4
    train(ours, gradients, optimizer, count, micro_batches=micro_batches)
    theirs, other_gradients, other = plain(monkeypatch, mode, count, micro_batches)
    spacing = torch.finfo(BF16).eps
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=2 * spacing if a.dtype == BF16 else 1e-4, atol=1e-4), name
    for (name, a), b in zip(gradients.state_dict().items(), other_gradients.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), name
        assert torch.equal(ours.get_parameter(name), a.bfloat16())
    states, others = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert states.keys() == others.keys()
    for i, state in states.items():
        assert state.keys() == others[i].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(state[k].dtype == others[i][k].dtype and state[k].shape == others[i][k].shape for k in state)
        assert state["step"] == others[i]["step"] == count
        for name in ("exp_avg", "exp_avg_sq"):
            rtol = 6 * spacing if mode == "none" else 1e-4
            assert torch.allclose(state[name], others[i][name], rtol=rtol, atol=1e-8), name
    moved = [float((a - b).detach().abs().max()) for a, b in zip(ours.parameters(), layers().parameters(), strict=True)]
    assert min(moved) > 5e-3


@pytest.mark.parametrize("mode", ["fp32", "stochastic", "none"])
def test_saved_and_loaded_it_goes_on_bit_for_bit(mode, tmp_path):
    whole, parts = layers(), layers()
    gradients, optimizer = start(whole, mode)
    train(whole, gradients, optimizer, 4)
    gradients, optimizer = start(parts, mode)
    train(parts, gradients, optimizer, 2)
    torch.save([parts.state_dict(), gradients.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True, map_location="cpu")
    again = layers(seed=1)
    again.load_state_dict(saved[0])
    gradients, optimizer = start(again, mode)
    gradients.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[2])
    train(again, gradients, optimizer, 2, first=2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["fp32", "stochastic", "none"])
def test_checkpoints_carry_over_both_ways(mode, monkeypatch):
    """A run that PyTorch's AdamW began, unfused, goes on by the kernel, and the other way round."""
    theirs, before, other = plain(monkeypatch, mode, 2)
    ours = layers()
    ours.load_state_dict(theirs.state_dict())
    gradients, optimizer = start(ours, mode)
    gradients.load_state_dict(before.state_dict())
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    train(ours, gradients, optimizer, 1, first=2)
    assert all(int(s["step"]) == 3 for s in optimizer.state.values())
    state = copy.deepcopy(optimizer.state_dict())
    train(theirs, before, other, 1, first=2)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=2**-6, atol=2e-3)
    monkeypatch.setenv(triton_adamw.SWITCH, "0")
    gradients, third = start(ours, mode)
    third.load_state_dict(state)
    train(ours, gradients, third, 1, first=3)
    assert type(third) is not triton_adamw.TritonAdamW and all(int(s["step"]) == 4 for s in third.state.values())


@pytest.mark.parametrize("mode", ["fp32", "stochastic", "none"])
def test_a_non_finite_gradient_changes_nothing(mode):
    model = layers()
    gradients, optimizer = start(model, mode)
    train(model, gradients, optimizer, 2)
    before = [p.clone() for p in model.parameters()]
    gradients.begin(1, 3)
    (sum(p.float().sum() for p in model.parameters()) * float("nan")).backward()
    norm = gradients.clip_(1.0)
    gradients.step_(optimizer, torch.isfinite(norm))
    assert not torch.isfinite(norm) and all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(int(s["step"]) == 2 for s in optimizer.state.values())
    assert all(p.grad is None for p in model.parameters()) and not gradients.buffers


def test_parameters_without_a_gradient_are_left_alone():
    model = layers()
    gradients, optimizer = start(model, "stochastic")
    train(model, gradients, optimizer, 1)
    before = [p.clone() for p in model.parameters()]
    gradients.begin(1, 2)
    model[0].weight.float().square().sum().backward()
    gradients.clip_(1.0)
    gradients.step_(optimizer, torch.tensor(True, device=DEVICE))
    same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert same == [False] + [True] * 5
    train(model, gradients, optimizer, 1, first=2)
    assert {int(s["step"]) for s in optimizer.state.values()} == {2, 3}


def test_the_host_reads_nothing():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
            return func(*args, **(kwargs or {}))

    if not INTERPRET:
        torch.cuda.set_sync_debug_mode("error")
    try:
        t, w = make(5000), nn.Parameter(make(5000).weight)
        stepped = nn.Parameter(torch.zeros((), device=DEVICE).expand(5000))
        optimizer = triton_adamw.TritonAdamW([stepped], fused=True, lr=1e-2)
        finite, scale = torch.ones((), dtype=torch.bool, device=DEVICE), torch.ones((), device=DEVICE)
        with Watch():
            for step in range(2):
                optimizer.step_all([triton_adamw.Step(stepped, w, t.grad, "stochastic", 0)], finite, scale, f"0 {step}")
    finally:
        if not INTERPRET:
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def untried():
    triton_adamw._agrees.cache_clear()
    yield
    triton_adamw._agrees.cache_clear()


@pytest.mark.parametrize("fault", ["raises", "scale", "rounding", "skips"])
def test_a_kernel_that_errs_is_not_taken(fault, untried, monkeypatch, caplog):
    right = adamw.adamw

    def wrong(table, tensors, **kwargs) -> None:
        if fault == "raises":
            raise RuntimeError("no such\ninstruction")
        if fault == "scale":
            kwargs["scale"] = None
        if fault == "rounding":
            right(table, tensors, **kwargs)
            for t in tensors if kwargs["finite"] else ():
                t.weight.view(torch.int16)[::2] -= 1  # towards zero
            return
        if fault == "skips":
            kwargs["finite"] = torch.ones_like(kwargs["finite"])
        right(table, tensors, **kwargs)

    monkeypatch.setattr(adamw, "adamw", wrong)
    with caplog.at_level(logging.WARNING, logger="fastpo"):
        for _ in range(2):
            gradients, optimizer = start(layers(), "stochastic")
            assert type(optimizer) is torch.optim.AdamW and not gradients.by_kernel
    (line,) = [r.getMessage() for r in caplog.records]
    assert "stepped by PyTorch's AdamW" in line and "\n" not in line


@pytest.mark.parametrize(
    "config",
    [{"optim_args": "amsgrad=true"}, {"optim": "sgd"}, {"optim": "rmsprop"}],
    ids=lambda c: next(iter(c.values())),
)
def test_what_else_is_asked_for_is_pytorchs(config):
    model = layers()
    gradients = Gradients(dict(model.named_parameters()), master_weights="stochastic", seed=0)
    optimizer = build_optimizer(model, TrainConfig(**config), gradients)
    assert not isinstance(optimizer, triton_adamw.TritonAdamW) and not gradients.by_kernel


def test_fp32_weights_and_strided_ones_are_pytorchs():
    model = layers(dtype=FP32)
    gradients, optimizer = start(model, "fp32")
    assert not isinstance(optimizer, triton_adamw.TritonAdamW) and not gradients.by_kernel
    strided = layers()
    strided[0].weight = nn.Parameter(strided[0].weight.detach().t().contiguous().t())
    gradients, optimizer = start(strided, "stochastic")
    assert len(gradients.by_kernel) == 3
    before = strided[0].weight.clone()
    train(strided, gradients, optimizer, 1)
    assert not torch.equal(before, strided[0].weight)
