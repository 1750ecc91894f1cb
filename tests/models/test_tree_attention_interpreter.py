"""The Triton tree attention against its fp64 reference: in Triton's interpreter on a CPU, or compiled on a GPU.

TRITON_INTERPRET=1 pytest tests/models/test_tree_attention_interpreter.py   (Triton reads the variable at import)
pytest -m gpu tests/models/test_tree_attention_interpreter.py               (the same bodies, compiled)

Criterion: the error against fp64 is at most 1.5 times plain PyTorch's on the same 16-bit or fp32 inputs, plus one
rounding of the result's largest value at the store, and eps32 * max|score|: the log-sum-exp is stored, and every
probability of the backward is as wrong as its rounding.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the Triton kernels need triton")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRET and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 in its own process, or a GPU", allow_module_level=True)

from fastpo.data.packing import Branch  # noqa: E402
from fastpo.kernels import attention, attention_tiles, reference  # noqa: E402
from fastpo.models.layout import Layout  # noqa: E402
from fastpo.models.tree_attention import triton_tree_attention  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRET else "cuda")
pytestmark = [
    pytest.mark.usefixtures("poison_empty", "round_to_bf16"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
if not INTERPRET:
    pytestmark.append(pytest.mark.gpu)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# A prompt of 5 with its first response of 3 and three more, one of a single token; two chains that share nothing; a
# prompt of one token; a prompt longer than a block whose first response added no token, and two long responses.
CHAINS = (8, 4, 1, 17, 6, 1, 3, 2, 20, 9, 18)
BRANCHES = (Branch(8, 30, 0, 5), Branch(40, 42, 37, 38), Branch(62, 89, 42, 62))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that this forest has many, in the interpreter's time."""
    tiles = [attention.Tile(*sizes, 4, 1) for sizes in ((16, 16), (16, 32), (32, 16))]
    config = attention.TreeConfig(*tiles)
    monkeypatch.setattr(attention, "tree_config", lambda *sizes: config)


def forest(chains=CHAINS, branches=BRANCHES) -> Layout:
    return Layout.from_chains((0, *torch.tensor(chains).cumsum(0).tolist()), branches)


def make(layout: Layout, heads: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype, sinks: bool):
    """(query [T, H, D], key [T, G, D], value [T, G, E], sink [H] | None) to be differentiated, dout [T, H, E]; strides
    as models have them, one of them head-major."""
    total = layout.cu_seqlens[-1]
    shapes = ((heads[0], total, sizes[0]), (total, heads[1], sizes[0]), (total, heads[1], sizes[1]))
    tensors = [torch.randn(s, device=DEVICE).to(dtype) for s in (*shapes, (heads[0],))]
    tensors[0] = tensors[0].transpose(0, 1)
    inputs = [x.requires_grad_() for x in tensors[: 3 + sinks]] + [None] * (not sinks)
    return inputs, torch.randn(total, heads[0], sizes[1], device=DEVICE).to(dtype)


def gradients(out: Tensor, inputs: list, dout: Tensor) -> dict[str, Tensor]:
    live = {n: x for n, x in zip(("dquery", "dkey", "dvalue", "dsink"), inputs) if x is not None}
    return {"out": out.detach(), **dict(zip(live, torch.autograd.grad(out, live.values(), dout)))}


def by_reference(layout: Layout, inputs: list, dout: Tensor, dtype: torch.dtype, window=None, **rules):
    inputs = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    mask = reference.tree_mask(layout.cu_seqlens, layout.branches, window)
    out = reference.tree_attention(*inputs[:3], mask, sink=inputs[3], **rules)
    return gradients(out, inputs, dout.to(dtype))


def check(layout: Layout, inputs: list, dout: Tensor, **rules: object) -> None:
    rules = {"scale": 0.4, **rules}
    dtype = inputs[0].dtype
    out = triton_tree_attention(*inputs[:3], layout, sink=inputs[3], **rules)
    got = gradients(out, inputs, dout)
    exact = by_reference(layout, inputs, dout, torch.float64, **rules)
    plain = by_reference(layout, inputs, dout, dtype, **rules)
    group = dout.shape[1] // inputs[1].shape[1]
    scores = torch.einsum("qhd,khd->hqk", inputs[0].float(), inputs[1].float().repeat_interleave(group, 1))
    largest = max(8.0, rules["scale"] * scores.abs().max().item())
    for name, want in exact.items():
        assert got[name].dtype == dtype and got[name].shape == want.shape, name
        assert got[name].isfinite().all(), name
        error, allowed = ((x[name].double() - want).abs().max().item() for x in (got, plain))
        roundings = torch.finfo(dtype).eps / 2 + torch.finfo(FP32).eps * largest
        allowed = 1.5 * allowed + roundings * max(1.0, want.abs().max().item())
        assert error <= allowed, f"{name}: error {error:.3g} over allowed {allowed:.3g}"


@pytest.mark.parametrize(
    "heads, sizes, dtype, rules",
    [
        pytest.param((2, 2), (16, 16), FP32, {}, id="fp32"),
        pytest.param((4, 2), (20, 12), FP32, {}, id="fp32-grouped-uneven"),
        pytest.param((2, 1), (16, 16), BF16, {}, id="bf16"),
        pytest.param((3, 1), (40, 64), FP16, {}, id="fp16-larger-values"),
        pytest.param((1, 1), (16, 16), FP32, {"window": 7}, id="window"),
        pytest.param((1, 1), (8, 8), FP32, {"window": 1}, id="window-of-one"),
        pytest.param((1, 1), (16, 16), FP32, {"softcap": 1.5}, id="softcap"),
        pytest.param((1, 1), (16, 16), FP32, {"sinks": True}, id="sinks"),
        pytest.param((2, 1), (16, 16), BF16, {"window": 7, "softcap": 1.5, "sinks": True}, id="bf16-everything"),
        pytest.param((2, 1), (24, 24), FP32, {"window": 23, "softcap": 1.5, "sinks": True}, id="everything"),
    ],
)
def test_forest(heads, sizes, dtype, rules, small_blocks):
    rules = dict(rules)
    layout = forest()
    inputs, dout = make(layout, heads, sizes, dtype, rules.pop("sinks", False))
    check(layout, inputs, dout, **rules)


# A prompt of three blocks and a rest, whose branch has long, short and tiny chains; a chain of its own, longer still.
LONG = (57, 40, 3, 2, 21, 60)
LONG_BRANCHES = (Branch(57, 123, 0, 50),)


@pytest.mark.parametrize("window", [None, 45, 16])
def test_tiles_with_and_without_masks(window, small_blocks):
    layout = forest(LONG, LONG_BRANCHES)
    inputs, dout = make(layout, (1 if window else 2, 1), (16, 16), FP32, sinks=False)
    check(layout, inputs, dout, window=window)


@pytest.mark.skipif(not INTERPRET, reason="the tiles of a compiled kernel cannot be exchanged")
@pytest.mark.parametrize(
    "branches, window", [((), None), ((Branch(32, 77, 0, 32),), None), ((Branch(32, 77, 0, 32),), 37)]
)
def test_a_mask_that_hides_nothing_changes_no_bit(branches, window, small_blocks, monkeypatch):
    """All tiles masked, and some of them not: the same numbers where they come in the same order, as those of queries
    do without a window and with a prompt of whole tiles."""
    layout = forest((32, 40, 3, 2, 60), branches)
    inputs, dout = make(layout, (1, 1), (16, 16), FP32, sinks=False)
    plain = []

    def none(low, n, first, stop, BLOCK):
        a, b = tiles(low, n, first, stop, BLOCK)
        plain.append(int(b) - int(a))
        return a, a

    tiles = attention_tiles._plain_tiles
    split = gradients(triton_tree_attention(*inputs[:3], layout, scale=0.4, window=window), inputs, dout)
    for module in (attention, attention_tiles):
        monkeypatch.setattr(module, "_plain_tiles", none)
    masked = gradients(triton_tree_attention(*inputs[:3], layout, scale=0.4, window=window), inputs, dout)
    assert sum(plain) > 5
    for name, want in masked.items():
        if window is None and name in ("out", "dquery"):
            assert torch.equal(split[name], want), name
        assert torch.allclose(split[name], want, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("size, dtype", [(16, BF16), (80, FP32), (128, BF16)], ids=["16-bf16", "80-fp32", "128-bf16"])
def test_the_blocks_that_are_launched(size, dtype):
    """Other heads than blocks, chains shorter than a block, and ends in the middle of one."""
    layout = forest()
    inputs, dout = make(layout, (2, 1), (size, size), dtype, sinks=True)
    check(layout, inputs, dout, scale=size**-0.5, softcap=3.0)


def test_extreme_scores(small_blocks):
    """Scores of +-1e3, whose exponentials overflow unless the running maximum is subtracted."""
    layout = forest()
    inputs, dout = make(layout, (1, 1), (16, 16), FP32, sinks=True)
    check(layout, inputs, dout, scale=100.0)


def test_the_same_from_run_to_run(small_blocks):
    layout = forest(CHAINS[:4], BRANCHES[:1])
    inputs, dout = make(layout, (4, 2), (16, 16), BF16, sinks=True)
    first, second = (
        gradients(triton_tree_attention(*inputs[:3], layout, scale=0.3, sink=inputs[3]), inputs, dout) for _ in range(2)
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.skipif(not INTERPRET, reason="tests/models/test_policy.py keeps its models on the CPU")
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_models(family, small_blocks, monkeypatch):
    """Grouped heads with soft cap and window, and with sinks and window: log-probabilities and the gradient of every
    parameter equal the model's own, a shared prompt of eight responses among them."""
    spec = importlib.util.spec_from_file_location("fastpo_test_model", Path(__file__).with_name("test_policy.py"))
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    if family not in models.FAMILIES:
        pytest.skip(f"this transformers has no {family}")
    monkeypatch.setenv("FASTPO_ATTENTION", "triton")
    model = models.make_model(family).to(DEVICE)
    models.assert_same(model, models.make_examples(share=True)[::2], relative=1e-5)
