"""AdamW of 16-bit weights in one pass: torch.optim.AdamW's numbers, state and checkpoints."""

import pytest
import torch
from torch import nn

from fastpo.config.train_config import TrainConfig
from fastpo.ops import backends
from fastpo.training import cpu_adamw
from fastpo.training.optim import Gradients, build_optimizer

pytestmark = pytest.mark.skipif(backends.compiled is None, reason="needs the compiled extension")


def layer(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(33, 70), nn.Linear(70, 5)).to(torch.bfloat16)


def run(model: nn.Module, steps: int, micro_batches: int = 1, plain: bool = False, state=None, norm: float = 0.05):
    """(gradients, optimiser) after steps whose gradients depend on their number alone."""
    config = TrainConfig.build({"learning_rate": 1e-2, "weight_decay": 0.1, "adam_beta2": 0.95, "use_cpu": True})
    gradients = Gradients(dict(model.named_parameters()), master_weights="fp32", seed=0)
    optimizer = build_optimizer(model, config, gradients)
    assert type(optimizer) is cpu_adamw.CpuAdamW
    if plain:  # what it is beside: fp32 copies of the gradients, PyTorch's fused AdamW, a copy into the weights
        optimizer = torch.optim.AdamW(optimizer.param_groups)
    first = 0
    if state is not None:
        gradients.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
        first = state[2]
    for step in range(first, first + steps):
        gradients.begin(micro_batches, step + 1)
        for k in range(micro_batches):
            x = torch.randn(8, 33, generator=torch.Generator().manual_seed(100 * step + k)).bfloat16()
            model(x).float().square().sum().backward()
        found = gradients.clip_(norm)
        gradients.step_(optimizer, torch.isfinite(found))
    return gradients, optimizer


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_equal_to_pytorchs(micro_batches):
    """To rounding, after two steps; the weights are the copies, rounded."""
    ours, theirs = layer(), layer()
    got, optimizer = run(ours, 2, micro_batches)
    want, plain = run(theirs, 2, micro_batches, plain=True)
    for (name, a), (_, b) in zip(got.state_dict().items(), want.state_dict().items(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), name
        assert torch.equal(ours.get_parameter(name), a.bfloat16())
    states, others = optimizer.state_dict()["state"], plain.state_dict()["state"]
    assert states.keys() == others.keys()
    for i, state in states.items():
        assert state.keys() == others[i].keys()
        assert all(torch.allclose(state[k], others[i][k], rtol=1e-4, atol=1e-8) for k in state)
    moved = max(float((a - b).abs().max()) for a, b in zip(ours.parameters(), layer().parameters(), strict=True))
    assert moved > 1e-2


def test_saved_and_loaded_it_goes_on_bit_for_bit():
    whole, parts = layer(), layer()
    run(whole, 6)
    gradients, optimizer = run(parts, 2)
    saved = gradients.state_dict(), optimizer.state_dict(), 2
    again = layer(seed=1)
    run(again, 4, state=saved)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_non_finite_gradient_changes_nothing():
    model = layer()
    gradients, optimizer = run(model, 2)
    before = [p.clone() for p in model.parameters()], [int(s["step"]) for s in optimizer.state.values()]
    gradients.begin(1, 3)
    (model(torch.ones(1, 33).bfloat16()).sum() * float("nan")).backward()
    norm = gradients.clip_(1.0)
    gradients.step_(optimizer, torch.isfinite(norm))
    assert not torch.isfinite(norm)
    assert all(torch.equal(a, b) for a, b in zip(before[0], model.parameters(), strict=True))
    assert before[1] == [int(s["step"]) for s in optimizer.state.values()]
    run_on = [p.grad for p in model.parameters()]
    assert run_on == [None] * 4 and not gradients.buffers


def test_hooks_see_one_step():
    model = layer()
    seen = []
    gradients, optimizer = run(model, 1)
    optimizer.register_step_post_hook(lambda *a: seen.append(1))
    gradients.begin(1, 2)
    model(torch.ones(1, 33).bfloat16()).sum().backward()
    gradients.step_(optimizer, torch.isfinite(gradients.clip_(0.0)))
    assert seen == [1] and all(int(s["step"]) == 2 for s in optimizer.state.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(dtype):
    grads = [torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (1, 17, 40_000)]
    true = torch.cat([g.double() for g in grads]).norm()
    before = torch.get_num_threads()
    try:
        norms = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            norms.append(cpu_adamw.norm(grads))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*norms) and abs(float(norms[0]) - float(true)) <= 1e-6 * float(true)
    assert cpu_adamw.norm([grads[0], torch.zeros(2, dtype=torch.float64)]) is None
    assert not torch.isfinite(cpu_adamw.norm([torch.tensor([1.0, float("inf")])]))
