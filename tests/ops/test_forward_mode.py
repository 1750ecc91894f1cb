"""Derivatives that the ops do not have are an error under every transform, never a number: forward mode, and twice."""

import pytest
import torch
import torch.autograd.forward_ad as fw
from torch import func

from fastpo import ops
from fastpo.models import tree_attention
from fastpo.ops import vocab_parallel
from fastpo.ops.parts import OpError

N, D, V = 5, 16, 11


def inputs():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g)
    return x, w, torch.arange(N), torch.randn(V, generator=g)


def of_hidden(name):
    """A function of hidden [N, D] that runs one op."""
    x, w, y, b = inputs()
    trained = w.clone().requires_grad_()
    return {
        "frozen": lambda h: ops.linear_logprob(h, w, y, b),
        "kept": lambda h: ops.linear_logprob(h, trained, y),
        "sliced": lambda h: ops.linear_logprob(h, trained, y, memory_budget=0),
        "filtered": lambda h: ops.linear_logprob(h, w, y, grad_filter=1e-3),
        "entropy": lambda h: ops.linear_logprob_entropy(h, w, y, b)[1],
        "of the weight": lambda h: ops.linear_logprob(x, h[:, :D], torch.zeros(N, dtype=torch.int64)),
        "of the bias": lambda h: ops.linear_logprob(x, w, y, h.sum(1).repeat(3)[:V]),
        "token_kl": lambda h: ops.token_kl(h, w, x, w),
        "token_kl's reference": lambda h: ops.token_kl(x, w, h, w),
        "log_sum_sq": lambda h: ops.log_sum_sq(h, w),
    }[name]


NAMES = ["frozen", "kept", "sliced", "filtered", "entropy", "of the weight", "of the bias", "token_kl",
         "token_kl's reference", "log_sum_sq"]  # fmt: skip


def dual(f, x, requires_grad=False):
    with fw.dual_level():
        return fw.unpack_dual(f(fw.make_dual(x.clone().requires_grad_(requires_grad), torch.ones_like(x)))).tangent


FORWARD = {
    "jvp": lambda f, x: func.jvp(f, (x,), (torch.ones_like(x),)),
    "linearize": lambda f, x: func.linearize(f, x)[1](torch.ones_like(x)),
    "jacfwd": lambda f, x: func.jacfwd(f)(x),
    "dual numbers": dual,
    "dual numbers that require a gradient": lambda f, x: dual(f, x, True),
    "vmap of jvp": lambda f, x: func.vmap(lambda v: func.jvp(f, (v,), (x,)))(torch.stack([x, x])),
    "jvp of vmap": lambda f, x: func.jvp(func.vmap(f), (torch.stack([x, x]),), (torch.stack([x, x]),)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", FORWARD)
@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_an_error(name, transform):
    with pytest.raises((OpError, RuntimeError), match="forward-mode derivatives are not implemented"):
        FORWARD[transform](of_hidden(name), inputs()[0])


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("token_kl's reference", "log_sum_sq")])
def test_reverse_mode_of_torch_func_and_second_derivatives_are_errors(name):
    f, (x, *_) = of_hidden(name), inputs()
    for transform in (func.grad, func.jacrev, func.hessian):
        with pytest.raises(OpError, match="not implemented"):
            transform(lambda h: f(h).sum())(x)
    h = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(h).sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad((first + h).sum(), h)


def test_plain_reverse_mode_inside_a_dual_level_is_untouched():
    f, (x, *_) = of_hidden("frozen"), inputs()
    h = x.clone().requires_grad_()
    with fw.dual_level():
        (inside,) = torch.autograd.grad(f(h).sum(), h)
    assert torch.equal(inside, torch.autograd.grad(f(h).sum(), h)[0]) and inside.abs().sum() > 0


def test_every_registered_op_refuses_a_tangent():
    """Whatever custom op there is: the check comes before the op runs, so its other arguments need not fit."""
    names = {n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastpo::")}
    assert vocab_parallel and {"linear_logprob", "token_kl", "preference_loss", "scaled"} <= names
    for name in names:
        overload = getattr(torch.ops.fastpo, name).default
        with fw.dual_level():
            made = {"Tensor": torch.ones(1, 1), "int": 1, "float": 1.0, "bool": False, "str": "x", "ScalarType": 6}
            filled = [None if str(a.type).startswith("Optional") else made.get(str(a.type), [])
                      for a in overload._schema.arguments]  # fmt: skip
            filled[0] = fw.make_dual(torch.ones(1, 1), torch.ones(1, 1))
            with pytest.raises(OpError, match=f"{name}: forward-mode"):
                overload(*filled)


def test_the_attention_refuses_a_tangent():
    plan = torch.randn(4, 2, 8)

    class Call:
        @staticmethod
        def forward(q, k, v):
            return q, q.sum(-1)

    run = lambda q: tree_attention.TreeAttention.apply(q, plan, plan, Call, ())  # noqa: E731
    for transform in ("jvp", "dual numbers", "dual numbers that require a gradient"):
        with pytest.raises((RuntimeError, NotImplementedError)):
            FORWARD[transform](run, plan)
