"""Packed attention against a dense reference in fp64, chain by chain, outputs and gradients."""

import math
import sys
import types

import pytest
import torch
from torch import Tensor, nn

from fastpo.errors import ConfigError, UnsupportedModelError
from fastpo.models import attention, tree_attention
from fastpo.models.attention import packed_attention
from fastpo.models.layout import Layout

CPU = torch.device("cpu")
RAGGED = (7, 1, 19, 3, 3, 40, 1, 12)  # one-token chains, equal neighbours, longer than every window below


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """These problems are too small to share among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Layer(nn.Module):
    """Stands in for a model's attention module."""

    is_causal = True

    def __init__(self, training: bool = False):
        super().__init__()
        self.training = training


def layout_of(lengths: tuple[int, ...]) -> Layout:
    return Layout.from_chains((0, *torch.tensor(lengths).cumsum(0).tolist()))


def make_qkv(
    lengths: tuple[int, ...],
    heads: tuple[int, int],
    sizes: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    transposed: bool = True,
    device: torch.device = CPU,
) -> list[Tensor]:
    """query [1, H, T, Dq], key [1, G, T, Dq], value [1, G, T, Dv] to be differentiated, token-major as in models."""
    total = sum(lengths)
    out = []
    for h, d in ((heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1])):
        x = torch.randn(1, total, h, d, dtype=torch.float64) if transposed else torch.randn(1, h, total, d).double()
        x = x.transpose(1, 2) if transposed else x
        out.append(x.to(dtype).to(device).detach().requires_grad_())
    return out


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """The definition: softmax over one's own chain's past, one chain at a time -> [1, T, H, Dv]."""
    groups = query.shape[1] // key.shape[1]
    outputs, start = [], 0
    for length in lengths:
        q, k, v = (x[0, :, start : start + length] for x in (query, key, value))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores = q @ k.mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        i, j = torch.arange(length)[:, None], torch.arange(length)
        visible = (j <= i) & (j > i - (window or length))
        scores = scores.masked_fill(~visible.to(scores.device), -math.inf)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux[:, None, None].expand(-1, length, 1)], -1)
        outputs.append((scores.softmax(-1)[..., :length] @ v).transpose(0, 1))
        start += length
    return torch.cat(outputs).unsqueeze(0)


def run(qkv: list[Tensor], lengths: tuple[int, ...], dout: Tensor, **kwargs: object) -> dict[str, Tensor]:
    """Output and gradients by name, in fp64."""
    for x in qkv:
        x.grad = None
    out, weights = packed_attention(Layer(), *qkv, None, fastpo_layout=layout_of(lengths), dropout=0.3, **kwargs)
    assert weights is None
    out.backward(dout.to(out))
    return {"out": out.detach(), **{n: x.grad for n, x in zip(("dquery", "dkey", "dvalue"), qkv, strict=True)}}


def expected(qkv: list[Tensor], lengths: tuple[int, ...], dout: Tensor, **kwargs: object) -> dict[str, Tensor]:
    """The same by the reference on the same values in fp64."""
    wide = [x.detach().double().cpu().requires_grad_() for x in qkv]
    out = reference(*wide, lengths, **kwargs)
    out.backward(dout.double().cpu())
    return {"out": out.detach(), **{n: x.grad for n, x in zip(("dquery", "dkey", "dvalue"), wide, strict=True)}}


def assert_matches(got: dict[str, Tensor], want: dict[str, Tensor], eps: float) -> None:
    for name, w in want.items():
        g = got[name].double().cpu()
        assert g.shape == w.shape, name
        assert torch.isfinite(g).all(), name
        error = float((g - w).abs().max())
        # 32 roundings of the largest value: sums of up to 40 terms, and their products.
        assert error <= 32 * eps * max(1.0, float(w.abs().max())), f"{name}: {error:.3g}"


OPTIONS = {
    "plain": {},
    "window": {"window": 5},
    "window_of_one": {"window": 1},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "everything": {"window": 5, "softcap": 1.5, "sinks": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("sizes", [(8, 8), (20, 12)], ids=["same_size", "value_smaller"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_against_reference(options: str, heads: tuple, sizes: tuple, dtype: torch.dtype, poison_empty: None) -> None:
    given = dict(OPTIONS[options])
    s_aux = torch.randn(heads[0], dtype=torch.float64).to(dtype).requires_grad_() if given.pop("sinks", False) else None
    window, softcap = given.get("window"), given.get("softcap")
    qkv = make_qkv(RAGGED, heads, sizes, dtype)
    dout = torch.randn(1, sum(RAGGED), heads[0], sizes[1], dtype=torch.float64).to(dtype)
    got = run(qkv, RAGGED, dout, scaling=0.4, sliding_window=window, softcap=softcap, s_aux=s_aux)
    wide_aux = None if s_aux is None else s_aux.detach().double().requires_grad_()
    want = expected(qkv, RAGGED, dout, scale=0.4, window=window, softcap=softcap, s_aux=wide_aux)
    if s_aux is not None:
        got["ds_aux"], want["ds_aux"] = s_aux.grad, wide_aux.grad
    assert got["out"].dtype == dtype
    assert_matches(got, want, torch.finfo(dtype).eps)


LENGTHS = {
    "one_token": (1,),
    "one_chain": (33,),
    "equal": (6,) * 9,
    "many_short": tuple(1 + i % 9 for i in range(60)),
    "short_and_long": (2, 300, 3, 2, 150, 1, 70),
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("transposed", [True, False], ids=["token_major", "head_major"])
def test_cpu_groups(lengths: str, transposed: bool, poison_empty: None) -> None:
    """Chains that share a kernel call, and those that do not, give what each gives alone."""
    chains = LENGTHS[lengths]
    qkv = make_qkv(chains, (4, 2), (16, 16), transposed=transposed)
    dout = torch.randn(1, sum(chains), 4, 16)
    assert_matches(run(qkv, chains, dout), expected(qkv, chains, dout, scale=0.25), 4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("width", [32, 256, 4096])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_plan_covers_every_token_once(lengths: str, width: int) -> None:
    boundaries = layout_of(LENGTHS[lengths]).cu_seqlens
    seen = []
    for group in tree_attention._plan(boundaries, width):
        if group.sink is None:
            seen += range(group.start, group.start + group.length)
        else:
            real = group.sink < boundaries[-1]
            assert torch.equal(group.sink[real], group.source[real])
            assert (group.padding is None) == bool(real.all())
            assert real.numel() == group.size * group.length
            seen += group.sink[real].tolist()
    assert sorted(seen) == list(range(boundaries[-1]))


def test_short_chains_share_calls() -> None:
    assert len(tree_attention._plan(layout_of((9, 8) * 100).cu_seqlens, 128)) == 1
    assert len(tree_attention._plan(layout_of((128,) * 16).cu_seqlens, 1024)) == 16


@pytest.mark.parametrize("options", ["window", "softcap", "everything"])
def test_long_chains_in_blocks_of_queries(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_QUERY_BLOCK", 8)
    test_against_reference(options, (4, 2), (8, 8), torch.float64, None)


def test_gradcheck() -> None:
    qkv = make_qkv((3, 1, 4), (2, 1), (4, 4), torch.float64)
    layout = layout_of((3, 1, 4))
    assert torch.autograd.gradcheck(lambda *x: packed_attention(Layer(), *x, None, fastpo_layout=layout)[0], qkv)


def test_memory_stays_linear_in_the_pack() -> None:
    """No tensor of a forward and backward comes near T * T."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    chains = (50,) * 40
    for kwargs in ({}, {"sliding_window": 16}, {"softcap": 5.0}):
        qkv = make_qkv(chains, (2, 2), (8, 8))
        with Largest() as largest:
            run(qkv, chains, torch.randn(1, sum(chains), 2, 8), **kwargs)
        assert largest.numel <= 3 * 2 * 8 * (sum(chains) + 1)


def test_dropout_is_honoured_in_training_only() -> None:
    chains = (30, 10)
    qkv = [x.detach() for x in make_qkv(chains, (2, 2), (8, 8))]
    kwargs = {"fastpo_layout": layout_of(chains), "dropout": 0.5}
    want = packed_attention(Layer(), *qkv, None, fastpo_layout=layout_of(chains))[0]
    assert torch.equal(packed_attention(Layer(training=False), *qkv, None, **kwargs)[0], want)
    for extra in ({}, {"softcap": 50.0}, {"sliding_window": 8}):
        want = packed_attention(Layer(), *qkv, None, fastpo_layout=layout_of(chains), **extra)[0]
        samples = torch.stack(
            [packed_attention(Layer(training=True), *qkv, None, **kwargs, **extra)[0] for _ in range(400)]
        )
        assert samples.std(0).max() > 0.1
        # The mean of 400 samples lies within five standard errors.
        assert ((samples.mean(0) - want).abs() <= 5 * samples.std(0) / 20 + 1e-6).all()


def test_mixed_dtypes_and_autocast() -> None:
    """Rotary embeddings leave fp32 queries beside 16-bit values; attention runs in the values' or autocast's dtype."""
    q, k, v = make_qkv((5, 4), (2, 2), (8, 8))
    kwargs = {"fastpo_layout": layout_of((5, 4))}
    assert packed_attention(Layer(), q, k, v.bfloat16(), None, **kwargs)[0].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert packed_attention(Layer(), q, k, v, None, **kwargs)[0].dtype == torch.bfloat16


# ---- refusals


def _call(layer: nn.Module | None = None, lengths: tuple[int, ...] = (4, 4), mask: Tensor | None = None, **kwargs):
    qkv = make_qkv((4, 4), (2, 2), (8, 8))
    return packed_attention(layer or Layer(), *qkv, mask, **{"fastpo_layout": layout_of(lengths), **kwargs})


def test_refusals() -> None:
    with pytest.raises(UnsupportedModelError, match="without fastpo's layout"):
        _call(fastpo_layout=None)
    with pytest.raises(UnsupportedModelError, match="not causal"):
        _call(is_causal=False)
    layer = Layer()
    layer.is_causal = False
    with pytest.raises(UnsupportedModelError, match="Layer is not causal"):
        _call(layer)
    with pytest.raises(UnsupportedModelError, match="mask of its own"):
        _call(mask=torch.zeros(1, 1, 8, 8))
    with pytest.raises(UnsupportedModelError, match="indices, position_bias"):
        _call(position_bias=torch.zeros(2, 8, 8), indices=torch.zeros(2), position_ids=torch.arange(8), cache=None)
    with pytest.raises(UnsupportedModelError, match="one packed row of 9 tokens"):
        _call(lengths=(4, 5))


def test_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPO_ATTENTION", "fast")
    with pytest.raises(ConfigError, match="expected one of flash_attn, varlen, triton, sdpa"):
        _call()
    monkeypatch.setenv("FASTPO_ATTENTION", "varlen")
    with pytest.raises(ConfigError, match="cannot run here"):
        _call()
    monkeypatch.setenv("FASTPO_ATTENTION", "sdpa")
    assert _call()[0].shape == (1, 8, 2, 8)


# ---- the kernels of a GPU: their calling convention here, their numbers there


@pytest.mark.parametrize("backend", ["flash_attn", "varlen"])
@pytest.mark.parametrize("window", [None, 5], ids=["full", "window"])
@pytest.mark.parametrize("sizes", [(8, 8), (20, 12)], ids=["same_size", "padded"])
def test_calling_convention(backend: str, window: int | None, sizes: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the kernels' signature, whose window counts tokens before and after, gets the right problem."""

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size):  # noqa: ANN001
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        assert q.shape[-1] % 8 == 0
        assert torch.equal(cu_q, cu_k)
        assert max_q == max_k == max(RAGGED)
        assert window_size[1] == 0
        lengths = tuple(torch.diff(cu_q).tolist())
        reach = None if window_size[0] == -1 else window_size[0] + 1
        return reference(*(x.transpose(0, 1)[None] for x in (q, k, v)), lengths, scale, reach)[0]

    def flash(q, k, v, cu_q, cu_k, max_q, max_k, *, dropout_p, softmax_scale, causal, window_size, **kwargs):  # noqa: ANN001, ANN003
        assert causal
        assert dropout_p == 0.0
        assert kwargs == {"softcap": 0.0, "deterministic": False}
        return kernel(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale, window_size)

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):  # noqa: ANN001
        assert enable_gqa
        assert torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cuda.cudnn_sdp_enabled()
        return kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size)

    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    monkeypatch.setattr(attention, "_choose_backend", lambda *args: backend)
    layout = layout_of(RAGGED)
    q, k, v = make_qkv(RAGGED, (4, 2), sizes, torch.float64)
    out, _ = packed_attention(Layer(), q, k, v, None, scaling=0.4, fastpo_layout=layout, sliding_window=window)
    torch.testing.assert_close(out, reference(q, k, v, RAGGED, 0.4, window))


class _Chosen(Exception):
    """What varlen_attn was about to run; there is no CPU kernel to go on with."""


def test_varlen_is_flash_attention_where_pytorch_prefers_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own choice, as it falls on a GPU whose cuDNN could do the call."""
    from torch.nn.attention import SDPBackend, varlen

    if not hasattr(varlen, "_select_backend"):
        pytest.skip(f"PyTorch {torch.__version__} has no choice there: causal calls go to FlashAttention")
    select = varlen._select_backend

    def stop(*args: object) -> int:
        raise _Chosen(SDPBackend(select(*args)))

    monkeypatch.setattr(varlen, "_cudnn_rejection_reasons", lambda *args: [])
    monkeypatch.setattr(varlen, "_select_backend", stop)
    q = torch.zeros(8, 4, 8)
    cu = torch.tensor([0, 8], dtype=torch.int32)
    with pytest.raises(_Chosen, match="CUDNN_ATTENTION"):
        varlen.varlen_attn(q, q, q, cu, cu, 8, 8, window_size=(-1, 0))
    monkeypatch.setattr(attention, "_choose_backend", lambda *args: "varlen")
    with pytest.raises(_Chosen, match="FLASH_ATTENTION"):
        _call()
    with pytest.raises(_Chosen, match="CUDNN_ATTENTION"):  # the caller's own setting is back
        varlen.varlen_attn(q, q, q, cu, cu, 8, 8, window_size=(-1, 0))


def test_real_varlen_signature() -> None:
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    assert {"scale", "window_size"} <= parameters.keys()
    assert ("enable_gqa" in parameters) == (torch.__version__ >= (2, 12))  # 2.11 takes grouped heads as they come


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash_attn", "varlen", "sdpa"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sizes", [(64, 64), (20, 12), (128, 128)], ids=["64", "padded", "128"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_gpu_against_reference(
    backend: str, options: str, sizes: tuple, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Error against fp64 at most 1.5 times that of plain eager attention in the same dtype, chain by chain."""
    given = dict(OPTIONS[options])
    sinks = given.pop("sinks", False)
    if backend != "sdpa" and (dtype == torch.float32 or sinks):
        pytest.skip("flash kernels are for 16 bits, without sinks")
    if backend == "flash_attn" and not attention.flash_attn_available():
        pytest.skip("flash_attn is not installed")
    if backend == "varlen" and ("softcap" in given or not attention._has_varlen(torch.device("cuda"))):
        pytest.skip("varlen_attn has no soft cap, and needs compute capability 8.0")
    monkeypatch.setenv("FASTPO_ATTENTION", backend)
    device = torch.device("cuda")
    heads, window, softcap = (4, 2), given.get("window"), given.get("softcap")
    chains = (*RAGGED, 600)  # longer than a block of queries
    s_aux = torch.randn(heads[0], device=device, dtype=dtype) if sinks else None
    qkv = make_qkv(chains, heads, sizes, dtype, device=device)
    dout = torch.randn(1, sum(chains), heads[0], sizes[1], device=device, dtype=dtype)
    scale = sizes[0] ** -0.5
    want = expected(
        qkv,
        chains,
        dout,
        scale=scale,
        window=window,
        softcap=softcap,
        s_aux=None if s_aux is None else s_aux.double().cpu(),
    )
    eager = [x.detach().clone().requires_grad_() for x in qkv]
    out = reference(*eager, chains, scale, window, softcap, s_aux)
    out.backward(dout)
    plain = {"out": out.detach(), **{n: x.grad for n, x in zip(("dquery", "dkey", "dvalue"), eager, strict=True)}}
    got = run(qkv, chains, dout, scaling=scale, sliding_window=window, softcap=softcap, s_aux=s_aux)
    for name, w in want.items():
        error = float((got[name].double().cpu() - w).abs().max())
        budget = 1.5 * float((plain[name].double().cpu() - w).abs().max())
        # Storing the result rounds it once more: one spacing of its largest value.
        assert error <= budget + torch.finfo(dtype).eps * float(w.abs().max()), f"{name}: {error:.3g} over {budget:.3g}"
