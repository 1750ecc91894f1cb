"""Weights cast once while they do not change: when they are made again, and that no number changes by it."""

import gc
import weakref

import pytest
import torch
from torch import nn

from fastpo import ops
from fastpo.ops import casts


def test_once_inside_and_every_time_outside():
    weight, made = nn.Parameter(torch.randn(3, 4)), []

    def make():
        made.append(1)
        return weight.to(torch.bfloat16)

    casts.once("x", (weight,), make)
    casts.once("x", (weight,), make)
    assert len(made) == 2
    with casts.keeping():
        first = casts.once("x", (weight,), make)
        with casts.keeping():
            assert casts.once("x", (weight,), make) is first
        assert casts.once("x", (weight,), make) is first and len(made) == 3
        casts.once("y", (weight,), make)
        with torch.no_grad():
            assert not casts.once("x", (weight,), make).requires_grad
            weight.mul_(2)
        assert torch.equal(casts.once("x", (weight,), make), weight.bfloat16()) and len(made) == 6
        casts.clear()
        casts.once("x", (weight,), make)
        assert len(made) == 7
        kept = weakref.ref(casts.once("x", (weight,), make))
    del first
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("bias", [False, True])
def test_the_heads_weight_is_cast_once_a_step_and_its_gradient_is_the_same(bias, monkeypatch):
    weight = nn.Parameter(torch.randn(50, 16))
    of_bias = nn.Parameter(torch.randn(50)) if bias else None
    learnt = [weight] if of_bias is None else [weight, of_bias]
    hidden, target = torch.randn(2, 9, 16), torch.randint(0, 50, (2, 9))
    made = []
    once = casts.once
    monkeypatch.setattr(casts, "once", lambda w, t, make: once(w, t, lambda: (made.append(1), make())[1]))

    def step():
        for p in learnt:
            p.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            for h, t in zip(hidden, target, strict=True):
                ops.linear_logprob(h, weight, t, of_bias).sum().backward()
        return [p.grad.clone() for p in learnt]

    want = step()
    assert len(made) == 2 * len(learnt)
    made.clear()
    with casts.keeping():
        got = step()
    assert len(made) == len(learnt)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(got, want, strict=True))
