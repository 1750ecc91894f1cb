"""Compiled attention of packed trees on a CPU: against fp64, in every instruction set, on any number of threads."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastpo.data.packing import Branch
from fastpo.models import attention
from fastpo.models.cpu_attention import can_run, compiled_tree_attention, tasks_of
from fastpo.models.layout import Layout
from fastpo.models.tree_attention import cpu_tree_attention
from fastpo.ops import backends

pytestmark = pytest.mark.skipif(backends.compiled is None, reason="needs the compiled extension")

CHAINS = (0, 143, 230, 300, 310, 310, 600, 605, 700)  # one of no tokens
BRANCHES = (Branch(143, 230, 0, 70), Branch(600, 700, 310, 500))  # the second of two chains
HEADS = {
    "one": (1, 1, 16),
    "grouped": (9, 3, 64),
    "own": (4, 4, 80),
    "many": (71, 1, 16),
    "wide": (2, 1, 256),
}  # H, G, D


def tensors(heads: str, dtype: torch.dtype, tokens: int = CHAINS[-1], seed: int = 0) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, of values that bf16 holds."""
    h, g, d = HEADS[heads]
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, n, d) for n in (h, g, g, h)]
    return [torch.randn(s, generator=generator).bfloat16().to(dtype) for s in shapes]


def results(function, layout: Layout, q, k, v, dout) -> list[torch.Tensor]:
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*inputs, layout, scale=q.shape[-1] ** -0.5)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def error(got: torch.Tensor, true: torch.Tensor) -> float:
    return float((got.double() - true).norm() / true.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("heads", HEADS)
def test_no_further_from_fp64_than_pytorch(heads, dtype):
    layout = Layout.from_chains(CHAINS, BRANCHES)
    true = results(cpu_tree_attention, layout, *tensors(heads, torch.float64))
    ours = results(compiled_tree_attention, layout, *tensors(heads, dtype))
    theirs = results(cpu_tree_attention, layout, *tensors(heads, dtype))
    floor = 2 * torch.finfo(torch.float32).eps
    for name, a, b, t in zip(("out", "dq", "dk", "dv"), ours, theirs, true, strict=True):
        assert a.dtype == dtype and error(a, t) <= 1.5 * error(b, t) + floor, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "generic"])
def test_every_instruction_set(isa, dtype):
    layout = Layout.from_chains(CHAINS, BRANCHES)
    true = results(cpu_tree_attention, layout, *tensors("grouped", torch.float64))
    if not backends.compiled.use_isa(isa):
        pytest.skip(f"this processor has no {isa}")
    try:
        got = results(compiled_tree_attention, layout, *tensors("grouped", dtype))
    finally:
        backends.compiled.use_isa(None)
    assert max(error(a, t) for a, t in zip(got, true, strict=True)) < (5e-7 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("start", [310, 311])
def test_prompts_anywhere_in_their_chain(start):
    """Keys in pairs begin with their chain; a prompt of an odd place is multiplied in fp32."""
    layout = Layout.from_chains(CHAINS, (Branch(600, 700, start, 500),))
    true = results(cpu_tree_attention, layout, *tensors("grouped", torch.float64))
    ours = results(compiled_tree_attention, layout, *tensors("grouped", torch.bfloat16))
    theirs = results(cpu_tree_attention, layout, *tensors("grouped", torch.bfloat16))
    assert all(error(a, t) <= 1.5 * error(b, t) + 1e-6 for a, b, t in zip(ours, theirs, true, strict=True))


def test_a_chain_has_the_same_bits_alone_and_on_any_number_of_threads():
    parts = tensors("grouped", torch.bfloat16)
    together = results(compiled_tree_attention, Layout.from_chains(CHAINS), *parts)
    alone = results(compiled_tree_attention, Layout.from_chains((0, 290)), *(x[310:600] for x in parts))
    assert all(torch.equal(a[310:600], b) for a, b in zip(together, alone, strict=True))
    layout = Layout.from_chains(CHAINS, BRANCHES)
    before, several = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            several.append(results(compiled_tree_attention, layout, *parts))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in several[1:] for a, b in zip(several[0], other, strict=True))


def test_tensors_in_the_models_own_strides():
    """Head-major memory, as some families leave it after their rotary embeddings."""
    layout = Layout.from_chains(CHAINS, BRANCHES)
    parts = tensors("grouped", torch.float32)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in parts]
    for a, b in zip(*(results(compiled_tree_attention, layout, *x) for x in (parts, turned)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nan_and_infinite_scores_are_not_hidden(dtype):
    q, k, v, dout = tensors("grouped", dtype)
    q[50, 0, 3] = float("nan")
    out, dq, _, _ = results(compiled_tree_attention, Layout.from_chains(CHAINS), q, k, v, dout)
    assert out[50, 0].isnan().all() and dq[50, 0].isnan().all()
    rest = torch.ones(out.shape[:2], dtype=torch.bool)
    rest[50, 0] = False
    assert out[rest].isfinite().all()


def test_large_scores_are_exact():
    """Scores of thousands: the softmax is one key, and nothing overflows."""
    q, k, v, dout = tensors("grouped", torch.float64)
    layout, parts = Layout.from_chains(CHAINS, BRANCHES), (200 * q, k, v, dout)
    true = results(cpu_tree_attention, layout, *parts)
    got = results(compiled_tree_attention, layout, *(x.float() for x in parts))
    theirs = results(cpu_tree_attention, layout, *(x.float() for x in parts))
    for a, b, t in zip(got, theirs, true, strict=True):
        assert error(a, t) <= 1.5 * error(b, t) + 1e-6


def test_tasks_cover_every_token_once():
    tasks = tasks_of(Layout.from_chains(CHAINS, BRANCHES))
    tokens = [t for i, first, stop in tasks.forward.tolist() for t in range(first, stop)]
    assert sorted(tokens) == list(range(CHAINS[-1]))
    for i, first, stop in tasks.forward.tolist():
        a, b, *_ = tasks.chains[i].tolist()
        assert a <= first < stop <= b
    trees = tasks.backward.tolist()
    assert sorted(c for a, b in trees for c in range(a, b)) == list(range(len(tasks.chains)))
    for first, end in trees:
        start, stop, *prompt = tasks.chains[first].tolist()
        assert prompt == [0, 0]
        assert all(start <= p < q <= stop for _, _, p, q in tasks.chains[first + 1 : end].tolist())


def test_the_model_runs_through_it(monkeypatch):
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    from fastpo.models.policy import Policy

    called = []
    real = attention.compiled_tree_attention
    monkeypatch.setattr(attention, "compiled_tree_attention", lambda *a, **k: called.append(1) or real(*a, **k))
    ids = torch.randint(0, 50, (12,))
    own = model.model(ids[None]).last_hidden_state[0]
    policy = Policy(model)
    with policy.attach():
        packed = policy._trunk_forward(ids, torch.arange(12), Layout.from_chains((0, 12)))
        with policy.detached():
            again = model.model(ids[None]).last_hidden_state[0]
    assert len(called) == 2 and torch.allclose(packed, own, atol=2e-6) and torch.equal(own, again)


@pytest.mark.parametrize(
    ("change", "value"),
    [("dtype", torch.float64), ("dtype", torch.float16), ("size", 24), ("size", 528), ("scale", -1.0)],
)
def test_what_it_is_not_made_for(change, value):
    size, dtype = (value if change == "size" else 64), (value if change == "dtype" else torch.float32)
    q = torch.zeros(3, 2, size, dtype=dtype)
    assert not can_run(q, q, q, value if change == "scale" else 1.0)
