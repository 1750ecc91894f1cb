"""Packed trees through the merged calls, with stand-ins for FlashAttention; the tables; the choice of a backend."""

import math
import random
import sys
import types

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastpo.data.packing import Branch
from fastpo.errors import ConfigError
from fastpo.kernels import reference
from fastpo.models import attention, tree_attention
from fastpo.models.attention import packed_attention
from fastpo.models.layout import Layout
from fastpo.models.tree_attention import VarlenKernel, VarlenProblem

# As tests/models/test_tree_attention_interpreter.py has it: ragged responses, one-token ones, chains that share
# nothing, a one-token prompt, a prompt whose first response adds no token.
CHAINS = (8, 4, 1, 17, 6, 1, 3, 2, 20, 9, 30)
BRANCHES = (Branch(8, 30, 0, 5), Branch(40, 42, 37, 38), Branch(62, 101, 42, 62))
NAMES = ("dquery", "dkey", "dvalue")


class Layer(nn.Module):
    is_causal = True


def forest(chains: tuple[int, ...] = CHAINS, branches: tuple[Branch, ...] = BRANCHES) -> Layout:
    return Layout.from_chains((0, *torch.tensor(chains).cumsum(0).tolist()), branches)


def make_qkv(total: int, heads: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype, device: str = "cpu"):
    """query [1, H, T, D], key [1, G, T, D], value [1, G, T, E] to be differentiated, and dout [1, T, H, E]."""
    shapes = ((heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1]))
    qkv = [torch.randn(1, total, *s, dtype=torch.float64).to(device, dtype).transpose(1, 2) for s in shapes]
    dout = torch.randn(1, total, heads[0], sizes[1], dtype=torch.float64).to(device, dtype)
    return [x.requires_grad_() for x in qkv], dout


def by_reference(qkv: list[Tensor], dout: Tensor, layout: Layout, dtype: torch.dtype, window=None, **rules):
    wide = [x.detach()[0].transpose(0, 1).to(dtype).requires_grad_() for x in qkv]
    out = reference.tree_attention(*wide, reference.tree_mask(layout.cu_seqlens, layout.branches, window), **rules)
    grads = torch.autograd.grad(out, wide, dout[0].to(dtype))
    return {"out": out.detach()[None], **{n: g.transpose(0, 1)[None] for n, g in zip(NAMES, grads)}}


def by_fastpo(qkv: list[Tensor], dout: Tensor, layout: Layout, scale: float, window=None, softcap=None):
    out, _ = packed_attention(
        Layer(), *qkv, None, fastpo_layout=layout, scaling=scale, sliding_window=window, softcap=softcap
    )
    return {"out": out.detach(), **dict(zip(NAMES, torch.autograd.grad(out, qkv, dout)))}


# ---- FlashAttention, written plainly: what its two functions compute, with the arguments they have


def _sequences(q: Tensor, k: Tensor, p: VarlenProblem):
    assert p.cu_q.dtype == p.cu_k.dtype == torch.int32
    cu_q, cu_k = p.cu_q.tolist(), p.cu_k.tolist()
    assert len(cu_q) == len(cu_k) and (cu_q[-1], cu_k[-1]) == (len(q), len(k))
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        assert 0 < b - a <= p.max_q and 0 < d - c <= p.max_k
        yield slice(a, b), slice(c, d)


def _scores(q: Tensor, k: Tensor, p: VarlenProblem) -> Tensor:
    """[H, Lq, Lk] of one sequence, aligned at its end."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * p.scale
    if p.softcap:
        scores = p.softcap * torch.tanh(scores / p.softcap)
    if p.causal:
        scores = scores.masked_fill(
            ~torch.ones_like(scores[0]).tril(scores.shape[2] - scores.shape[1]).bool(), -math.inf
        )
    return scores


def plain_forward(q: Tensor, k: Tensor, v: Tensor, p: VarlenProblem) -> tuple[Tensor, Tensor]:
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
    out, lse = torch.full_like(q, math.nan), q.new_full((q.shape[1], len(q)), math.nan)
    for rows, keys in _sequences(q, k, p):
        scores = _scores(q[rows], k[keys], p)
        lse[:, rows] = scores.logsumexp(-1)
        values = v[keys].repeat_interleave(q.shape[1] // v.shape[1], 1)
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return out, lse


def plain_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, p: VarlenProblem):
    """The formulas of FlashAttention-2's backward: it never normalises by itself."""
    assert lse.shape == (q.shape[1], len(q)) and lse.is_contiguous() and dout.stride(-1) == 1
    group, grads = q.shape[1] // k.shape[1], [torch.zeros_like(x) for x in (q, k, v)]
    delta = (dout * out).sum(-1).t()
    for rows, keys in _sequences(q, k, p):
        with torch.enable_grad():
            raw = [x.detach().requires_grad_() for x in (q[rows], k[keys])]
            scores = _scores(*raw, p)
        probs = (scores - lse[:, rows, None]).exp().detach()
        dp = torch.einsum("qhd,khd->hqk", dout[rows], v[keys].repeat_interleave(group, 1))
        dscores = probs * (dp - delta[:, rows, None])
        grads[0][rows], grads[1][keys] = torch.autograd.grad(scores, raw, dscores)
        dv = torch.einsum("hqk,qhd->khd", probs, dout[rows])
        grads[2][keys] = dv.unflatten(1, (-1, group)).sum(2)
    return tuple(grads)


@pytest.mark.parametrize("backend", ["flash_attn", "varlen"])
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["", "softcap"])
@pytest.mark.parametrize("heads, sizes", [((4, 4), (8, 8)), ((4, 2), (20, 12)), ((3, 1), (8, 24))], ids=str)
def test_two_calls_merge_exactly(backend, softcap, heads, sizes, monkeypatch) -> None:
    """Output and gradients equal autograd's through the whole softmax, by the code that a GPU runs."""
    problems: list[VarlenProblem] = []

    def forward(q, k, v, problem):
        problems.append(problem)
        return plain_forward(q, k, v, problem)

    monkeypatch.setitem(tree_attention.VARLEN_KERNELS, backend, VarlenKernel(forward, plain_backward))
    monkeypatch.setattr(attention, "_choose_backend", lambda *args: backend)
    layout = forest()
    qkv, dout = make_qkv(sum(CHAINS), heads, sizes, torch.float64)
    got = by_fastpo(qkv, dout, layout, 0.4, softcap=softcap)
    want = by_reference(qkv, dout, layout, torch.float64, scale=0.4, softcap=softcap)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    chains, prompts = problems
    assert chains.causal and not prompts.causal
    assert torch.diff(chains.cu_q).tolist() == torch.diff(chains.cu_k).tolist() == list(CHAINS)
    assert (torch.diff(prompts.cu_q).tolist(), torch.diff(prompts.cu_k).tolist()) == ([22, 2, 39], [5, 1, 20])
    assert (chains.max_q, prompts.max_q, prompts.max_k) == (30, 39, 20)


@pytest.mark.parametrize("window", [None, 7, 1], ids=["full", "window", "window-of-one"])
@pytest.mark.parametrize("softcap", [None, 1.5], ids=["", "softcap"])
def test_cpu(window, softcap) -> None:
    """The flash kernel's merged calls, and the plain paths for windows and soft caps, on the same forest."""
    qkv, dout = make_qkv(sum(CHAINS), (4, 2), (8, 8), torch.float64)
    got = by_fastpo(qkv, dout, forest(), 0.4, window, softcap)
    want = by_reference(qkv, dout, forest(), torch.float64, window=window, scale=0.4, softcap=softcap)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


# ---- the real functions' arguments: PyTorch's own schema, and the package's as its source has it


def test_pytorch_takes_these_arguments() -> None:
    """The operators' meta kernels bind every argument and give the shapes that the merge relies on."""
    q, k = (torch.empty(n, h, 64, dtype=torch.bfloat16, device="meta") for n, h in ((50, 4), (20, 2)))
    cu = torch.empty(4, dtype=torch.int32, device="meta")
    for causal in (False, True):
        problem = VarlenProblem(cu, cu, 30, 12, causal, 0.1, 0.0)
        out, lse = tree_attention._torch_forward(q, k, k, problem)
        assert (out.shape, lse.shape, lse.dtype) == (q.shape, (4, 50), torch.float32)
        grads = tree_attention._torch_backward(out, q, k, k, out, lse, problem)
        assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]


def test_package_gets_its_arguments(monkeypatch) -> None:
    """Functions with the signatures of flash_attn 2.7 and 2.8."""

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right) == (0.0, -1, -1)
        p = VarlenProblem(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale, softcap)
        return *plain_forward(q, k, v, p), None, None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, deterministic) == (0.0, -1, -1, False)
        p = VarlenProblem(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale, softcap)
        for grad, value in zip((dq, dk, dv), plain_backward(dout, q, k, v, out, softmax_lse, p)):
            grad.copy_(value)
        return None

    package, interface = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward = _flash_attn_varlen_forward
    interface._flash_attn_varlen_backward = _flash_attn_varlen_backward
    package.flash_attn_interface = interface
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    monkeypatch.setattr(attention, "_choose_backend", lambda *args: "flash_attn")
    qkv, dout = make_qkv(sum(CHAINS), (4, 2), (16, 16), torch.float64)
    got = by_fastpo(qkv, dout, forest(), 0.4, softcap=1.5)
    want = by_reference(qkv, dout, forest(), torch.float64, scale=0.4, softcap=1.5)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


# ---- the tables


def random_forest(rng: random.Random) -> Layout:
    chains: list[int] = []
    branches: list[Branch] = []
    for _ in range(rng.randint(1, 6)):
        start, prompt = sum(chains), rng.choice((1, 2, 5, 33))
        chains.append(prompt + rng.choice((0, 1, 4, 40)))
        following = [rng.choice((1, 2, 3, 50)) for _ in range(rng.choice((0, 0, 1, 2, 7)))]
        if following:
            first = sum(chains)
            branches.append(Branch(first, first + sum(following), start, start + prompt))
            chains += following
    return forest(tuple(chains), tuple(branches))


@pytest.mark.parametrize("seed", range(20))
def test_blocks_cover_what_is_seen(seed: int) -> None:
    """Every token is in one block of queries and one of keys, and each block's ranges hold all that the mask shows."""
    rng = random.Random(seed)
    layout = random_forest(rng)
    sizes = rng.choice(((1, 1), (4, 16), (16, 8), (128, 64)))
    starts, other, queries, keys = (t.numpy() for t in layout.tree_blocks(torch.device("cpu"), 7, *sizes))
    assert sum(stop - first for first, stop, *_ in other) == layout.cu_seqlens[-1]
    assert starts.dtype == queries.dtype == keys.dtype == np.int32
    mask = reference.tree_mask(layout.cu_seqlens, layout.branches).numpy()
    total = layout.cu_seqlens[-1]
    for blocks, size in ((queries, sizes[0]), (keys, sizes[1])):
        assert sorted(t for first, stop, *_ in blocks for t in range(first, stop)) == list(range(total))
        assert (blocks[:, 1] - blocks[:, 0]).max() <= size
    for first, stop, own, prompt, prompt_stop in queries:
        shown = np.zeros(total, bool)
        shown[own:stop] = shown[prompt:prompt_stop] = True
        assert not (mask[first:stop] & ~shown).any()
        assert mask[first:stop, prompt:prompt_stop].all()  # a block has one prompt
    for first, stop, own_stop, branch, branch_stop, prompt_stop in keys:
        shown = np.zeros(total, bool)
        shown[first:own_stop] = shown[branch:branch_stop] = True
        assert not (mask[:, first:stop] & ~shown[:, None]).any()
        assert mask[branch:branch_stop, first:stop].all()
        assert branch == branch_stop or stop <= prompt_stop


def test_tables_are_made_once_and_short_responses_share_blocks() -> None:
    layout = forest((40, *(8,) * 16), (Branch(40, 168, 0, 32),))
    cpu = torch.device("cpu")
    blocks = layout.tree_blocks(cpu, 32, 64, 64)
    assert [len(table) for table in blocks] == [168, 2 + 4, 1 + 2, 1 + 3]
    assert layout.tree_blocks(cpu, 32, 64, 64) is blocks
    assert layout.varlen_tables(cpu) is layout.varlen_tables(cpu)
    with pytest.raises(ValueError, match="must be one branch"):
        forest((5, 2, 2), (Branch(5, 7, 0, 3), Branch(7, 9, 0, 3))).tree_blocks(cpu, 16, 16, 16)


# ---- the choice


BF16, FP32 = torch.bfloat16, torch.float32
CHOICES = [  # dtype, head size, then what differs from a plain call, and the backend with and without flash_attn
    (BF16, 64, {}, "flash_attn", "varlen"),
    (BF16, 64, {"branches": True}, "flash_attn", "varlen"),
    (BF16, 64, {"window": 9}, "flash_attn", "varlen"),
    (BF16, 64, {"branches": True, "window": 9}, "triton", "triton"),
    (BF16, 64, {"branches": True, "softcap": 30.0}, "flash_attn", "triton"),
    (BF16, 64, {"branches": True, "s_aux": torch.zeros(2)}, "triton", "triton"),
    (BF16, 64, {"dropout": 0.1}, "flash_attn", "sdpa"),
    (BF16, 64, {"branches": True, "dropout": 0.1}, "sdpa", "sdpa"),
    (FP32, 64, {"branches": True}, "triton", "triton"),
    (torch.float64, 64, {"branches": True}, "sdpa", "sdpa"),
    (BF16, 512, {"branches": True}, "sdpa", "sdpa"),
    (FP32, 256, {"branches": True}, "sdpa", "sdpa"),
]


@pytest.mark.parametrize("package", [True, False], ids=["with_flash_attn", "without"])
@pytest.mark.parametrize("dtype, size, given, with_package, without", CHOICES)
def test_choice_on_a_gpu(dtype, size, given, with_package, without, package, monkeypatch) -> None:
    tensor = types.SimpleNamespace(is_cuda=True, dtype=dtype, shape=(1, 2, 9, size), device=torch.device("cuda", 0))
    given = {"branches": False, "dropout": 0.0, "window": None, "softcap": None, "s_aux": None, **given}
    monkeypatch.setattr(attention, "flash_attn_available", lambda: package)
    monkeypatch.setattr(attention, "_old_flash_attn", lambda: False)
    monkeypatch.setattr(attention, "_has_varlen", lambda device: True)
    monkeypatch.setattr(attention, "_has_triton_kernels", lambda device: True)
    assert attention._choose_backend(tensor, tensor, **given) == (with_package if package else without)
    monkeypatch.setattr(attention, "_has_triton_kernels", lambda device: False)
    assert attention._choose_backend(tensor, tensor, **given) != "triton"


def test_old_package_does_not_share(monkeypatch) -> None:
    package = types.ModuleType("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    for version, old in (("2.6.3", True), ("2.7.0.post2", False), ("2.8.3+cu12", False), ("3.0.0b1", False)):
        package.__version__ = version
        attention._old_flash_attn.cache_clear()
        assert attention._old_flash_attn() == old
    attention._old_flash_attn.cache_clear()


def test_triton_is_refused_where_it_cannot_run(monkeypatch) -> None:
    qkv, dout = make_qkv(sum(CHAINS), (2, 2), (8, 8), FP32)
    monkeypatch.setenv("FASTPO_ATTENTION", "triton")
    with pytest.raises(ConfigError, match="triton cannot run here: torch.float32 on cpu.*shared prompts True"):
        by_fastpo(qkv, dout, forest(), 0.4)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash_attn", "varlen", "triton", "sdpa"])
@pytest.mark.parametrize("rules", [{}, {"softcap": 20.0}, {"window": 90}], ids=["plain", "softcap", "window"])
@pytest.mark.parametrize("sizes", [(64, 64), (20, 12), (128, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32], ids=["bf16", "fp16", "fp32"])
def test_gpu_forest(backend, rules, sizes, dtype, monkeypatch) -> None:
    """Error against fp64 at most 1.5 times that of plain PyTorch with one mask, on the same inputs, and a rounding."""
    monkeypatch.setenv("FASTPO_ATTENTION", backend)
    chains = (*CHAINS, 700, 130, 1, 515)  # a prompt of 600 tokens and responses beyond a block
    layout = forest(chains, (*BRANCHES, Branch(801, 1447, 101, 701)))
    qkv, dout = make_qkv(sum(chains), (4, 2), sizes, dtype, "cuda")
    scale = sizes[0] ** -0.5
    try:
        got = by_fastpo(qkv, dout, layout, scale, **rules)
    except ConfigError as error:
        pytest.skip(str(error))
    want = by_reference(qkv, dout, layout, torch.float64, scale=scale, **rules)
    plain = by_reference(qkv, dout, layout, dtype, scale=scale, **rules)
    for name, exact in want.items():
        error, budget = (float((x[name].double() - exact).abs().max()) for x in (got, plain))
        allowed = 1.5 * budget + torch.finfo(dtype).eps * float(exact.abs().max())
        assert error <= allowed, f"{name}: {error:.3g} over {allowed:.3g}"
        again = by_fastpo(qkv, dout, layout, scale, **rules)[name]
        assert backend != "triton" or torch.equal(again, got[name]), f"{name} differs from run to run"
