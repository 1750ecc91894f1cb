"""RMSNorm, rotary embeddings and SwiGLU on a CPU in one pass each: against fp64, and in every family that has them."""

import copy
import importlib

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from fastpo.models import cpu_layers
from fastpo.ops import backends

pytestmark = pytest.mark.skipif(backends.compiled is None, reason="needs the compiled extension")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def plain_norm(x, weight, eps=1e-5, offset=0.0):
    """As transformers writes it: the norm in fp32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight + offset) * y.to(x.dtype)


def plain_rotary(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def half(x):
        return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)

    return q * cos + half(q) * sin, k * cos + half(k) * sin


LAYERS = {  # ours, the plain one, shapes of what has gradients, of what has none
    "norm": (lambda x, w: cpu_layers.rms_norm(x, w, 1e-5), plain_norm, [(7, 10, 96), (96,)], []),
    "gemma's norm": (
        lambda x, w: cpu_layers.rms_norm(x, w, 1e-5, 1.0), lambda x, w: plain_norm(x, w, offset=1.0),
        [(70, 576), (576,)], [],
    ),
    "silu": (cpu_layers.silu_mul, lambda g, u: nn.functional.silu(g) * u, [(1, 70, 176)] * 2, []),
    "rotary": (cpu_layers.rotary, plain_rotary, [(1, 3, 70, 64), (1, 1, 70, 64)], [(1, 70, 64)] * 2),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_no_further_from_fp64_than_pytorch(layer, dtype, isa):
    ours, plain, learnt, given = LAYERS[layer]
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(s, generator=generator).mul(2).bfloat16().double() for s in (*learnt, *given)]
    douts: list[torch.Tensor] = []

    def results(function, kind):
        inputs = [x.to(kind).requires_grad_(i < len(learnt)) for i, x in enumerate(numbers)]
        out = function(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        if not douts:
            douts.extend(torch.randn(y.shape, generator=generator).bfloat16().double() for y in out)
        grads = torch.autograd.grad(out, inputs[: len(learnt)], [d.to(kind) for d in douts])
        return [x.detach().double() for x in (*out, *grads)]

    true, theirs = results(plain, torch.float64), results(plain, DTYPES[dtype])
    if not backends.compiled.use_isa(isa):
        pytest.skip(f"this processor has no {isa}")
    try:
        got = results(ours, DTYPES[dtype])
    finally:
        backends.compiled.use_isa(None)
    for a, b, t in zip(got, theirs, true, strict=True):
        assert (a - t).norm() <= 1.5 * (b - t).norm() + 1e-7 * t.norm()


def test_the_same_bits_on_any_number_of_threads():
    x, w = torch.randn(500, 64), torch.randn(64)
    before, several = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            inputs = x.clone().requires_grad_(), w.clone().requires_grad_()
            y = cpu_layers.rms_norm(*inputs, 1e-5)
            several.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in several[1:] for a, b in zip(several[0], other, strict=True))


# What is replaced in a family, by trial: (norm's offset or None, MLP, rotary).
FAMILIES = {
    "llama": (0.0, True, True), "qwen3": (0.0, True, True), "gemma2": (1.0, True, True), "olmo2": (0.0, True, True),
    "phi3": (0.0, False, True), "glm4": (0.0, False, False), "cohere": (None, True, False),
    "falcon_h1": (0.0, False, True),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_familys_layers_compute_is_tried(family):
    """An MLP with factors (Falcon-H1), a joined projection (Phi-3, GLM-4) or angles by pairs (GLM-4, Cohere) stays."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    classes = {n: c for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, nn.Module)}
    norms = [cpu_layers._norm_rule(c, 1e-6) for n, c in classes.items() if n.endswith("RMSNorm")]
    mlps = [cpu_layers._multiplies(c, type(ACT2FN["silu"])) for n, c in classes.items() if n.endswith("MLP")]
    offset, mlp, rotary = FAMILIES[family]
    assert norms == ([] if offset is None else [(1e-6, offset)] * len(norms))
    assert mlps == [mlp] * len(mlps) and cpu_layers._turns_halves(module.__name__) == rotary


def test_a_norm_that_computes_something_else_stays():
    class HalvedRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6

        def forward(self, x):
            return 0.5 * plain_norm(x, self.weight, self.eps)

    trunk = nn.Sequential(HalvedRMSNorm())
    x = torch.randn(3, 32)
    before = trunk(x)
    fused = cpu_layers.FusedLayers(trunk)
    fused.switch(True)
    assert torch.equal(trunk(x), before) and "forward" not in vars(trunk[0])
    fused.switch(False)


def test_hooks_dtypes_and_names_are_the_models_own(toy):
    """Inside: hooks run, fp64 takes the model's own layers; outside: nothing is left behind."""
    model = toy.model()
    from transformers.models.llama import modeling_llama

    original, names = modeling_llama.apply_rotary_pos_emb, set(model.state_dict())
    seen = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *a: seen.append(1))
    fused = cpu_layers.FusedLayers(model.model)
    fused.switch(True)
    ids = torch.arange(9)[None]
    inside = model(ids).logits
    assert seen and set(model.state_dict()) == names and modeling_llama.apply_rotary_pos_emb is not original
    wide = model.double()(ids).logits
    fused.switch(False)
    assert torch.allclose(wide, model(ids).logits, rtol=0, atol=1e-12)
    assert torch.allclose(inside, model.float()(ids).logits, atol=1e-5)
    assert modeling_llama.apply_rotary_pos_emb is original
    assert not any("forward" in vars(m) for m in model.modules())
    handle.remove()


def test_a_deep_copy_made_inside_is_of_its_own(toy):
    """As callbacks make them, for an average of the weights: the copy's layers read the copy's weights."""
    model = toy.model()
    ids = torch.arange(9)[None]
    fused = cpu_layers.FusedLayers(model.model)
    fused.switch(True)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    inside = twin(ids).logits
    fused.switch(False)
    plain = copy.deepcopy(model)
    plain.load_state_dict(twin.state_dict())
    assert torch.allclose(inside, plain(ids).logits, atol=1e-5)
    assert not torch.allclose(inside, model(ids).logits, atol=1e-3)
