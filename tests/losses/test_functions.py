"""The table of losses: values against the formulas of the papers, coefficients against closed forms, in fp64."""

import math

import pytest
import torch

from fastpo.errors import ConfigError
from fastpo.losses.table import LOSSES, canonical_name, resolve_terms, segment_sum

P = 7


@pytest.fixture
def pairs() -> dict[str, torch.Tensor]:
    return random_pairs()


def random_pairs(seed: int = 3) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    rand = lambda: -60 * torch.rand(P, generator=g, dtype=torch.float64)  # noqa: E731
    win = torch.rand(P, generator=g, dtype=torch.float64)
    return {
        "lw": rand(), "ll": rand(), "rw": rand(), "rl": rand(),
        "nw": torch.randint(1, 40, (P,), generator=g).double(), "nl": torch.randint(1, 40, (P,), generator=g).double(),
        "pw": win, "pl": 0.7 * (1 - win),
    }  # fmt: skip


def call(name: str, x: dict[str, torch.Tensor], lw=None, ll=None, **hyper) -> torch.Tensor:
    return LOSSES[name](
        x["lw"] if lw is None else lw, x["ll"] if ll is None else ll, x["rw"], x["rl"], chosen_len=x["nw"],
        rejected_len=x["nl"], win_prob_chosen=x["pw"], win_prob_rejected=x["pl"], **hyper,
    )  # fmt: skip


def sp(u: torch.Tensor) -> torch.Tensor:
    return torch.log1p(torch.exp(-u.abs())) + u.clamp(min=0)


def s(u: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-u))


# name, hyper, loss, dL/dlw, dL/dll, written from ALGORITHMS.md with D = delta, a, b the log-ratios
def formulas(x):
    a, b = x["lw"] - x["rw"], x["ll"] - x["rl"]
    d, nw, nl = a - b, x["nw"], x["nl"]
    beta = 0.1
    z = 2.0 * (x["lw"] / nw - x["ll"] / nl) - 1.0  # simpo, beta 2, gamma 1
    dbar = a / nw - b / nl
    one = torch.ones_like(a)
    return [
        ("dpo", {}, sp(-beta * d), -beta * s(-beta * d), beta * s(-beta * d)),
        ("dpo", {"label_smoothing": 0.2}, 0.8 * sp(-beta * d) + 0.2 * sp(beta * d),
         beta * (s(beta * d) - 0.8), -beta * (s(beta * d) - 0.8)),
        ("robust", {"label_smoothing": 0.2}, (0.8 * sp(-beta * d) - 0.2 * sp(beta * d)) / 0.6,
         beta * (s(beta * d) - 0.8 / 0.6), -beta * (s(beta * d) - 0.8 / 0.6)),
        ("ipo", {}, (dbar - 5) ** 2, 2 * (dbar - 5) / nw, -2 * (dbar - 5) / nl),
        ("ipo", {"ipo_reduce": "sum", "beta": 0.5}, (d - 1) ** 2, 2 * (d - 1), -2 * (d - 1)),
        ("hinge", {}, (1 - beta * d).clamp(min=0), -beta * (beta * d < 1).double(), beta * (beta * d < 1).double()),
        ("simpo", {}, sp(-z), -2 / nw * s(-z), 2 / nl * s(-z)),
        ("simpo", {"label_smoothing": 0.1}, 0.9 * sp(-z) + 0.1 * sp(z), 2 / nw * (s(z) - 0.9), -2 / nl * (s(z) - 0.9)),
        ("sppo", {}, 0.5 * ((a - 1000 * (x["pw"] - 0.5)) ** 2 + (b - 1000 * (x["pl"] - 0.5)) ** 2),
         a - 1000 * (x["pw"] - 0.5), b - 1000 * (x["pl"] - 0.5)),
        ("sppo_hard", {"beta": 0.1}, (a - 5) ** 2 + (b + 5) ** 2, 2 * (a - 5 * one), 2 * (b + 5 * one)),
    ]  # fmt: skip


CASES = range(10)


@pytest.mark.parametrize("case", CASES)
def test_value_and_coefficients(pairs, case):
    name, hyper, expected, cw, cl = formulas(pairs)[case]
    lw, ll = (pairs[k].clone().requires_grad_() for k in ("lw", "ll"))
    got = call(name, pairs, lw, ll, **hyper)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    got.sum().backward()
    torch.testing.assert_close(lw.grad, cw, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ll.grad, cl, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_central_differences(pairs, case):
    name, hyper, *_ = formulas(pairs)[case]
    lw, ll = (pairs[k].clone().requires_grad_() for k in ("lw", "ll"))
    assert torch.autograd.gradcheck(lambda w, r: call(name, pairs, w, r, **hyper), (lw, ll), eps=1e-6, atol=1e-4)


def test_identities(pairs):
    ref_equals_policy = {**pairs, "rw": pairs["lw"], "rl": pairs["ll"]}
    torch.testing.assert_close(call("dpo", ref_equals_policy), torch.full((P,), math.log(2), dtype=torch.float64))
    torch.testing.assert_close(call("robust", pairs, label_smoothing=0.0), call("dpo", pairs))
    single = LOSSES["sppo"](*(pairs[k] for k in ("lw", "ll", "rw", "rl")), win_prob=torch.ones(P).double(), beta=0.1)
    torch.testing.assert_close(single, 0.5 * call("sppo_hard", pairs, beta=0.1))
    half = call("dpo", ref_equals_policy, pairs["lw"].clone().requires_grad_(), label_smoothing=0.5)
    assert half.sum().backward() is None


def test_defaults_follow_the_loss():
    hyper = {t.name: t.hyper for t in resolve_terms(["sigmoid", "simpo", "sppo", "ipo", "sft"])}
    assert hyper["dpo"]["beta"] == 0.1 and hyper["simpo"] == {
        "beta": 2.0,
        "gamma_beta_ratio": 0.5,
        "label_smoothing": 0,
    }
    assert hyper["sppo"]["beta"] == 0.001 and hyper["ipo"]["beta"] == 0.1
    assert hyper["sft"] == {"nll_reduction": "token_mean"}
    assert [t.hyper["beta"] for t in resolve_terms(["dpo", "simpo"], beta=0.7)] == [0.7, 0.7]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: canonical_name("simop"), "did you mean 'simpo'"),
        (lambda: resolve_terms(["dpo"], gamma_beta_ratio=0.5), "gamma_beta_ratio is set, but dpo does not read it"),
        (lambda: resolve_terms(["robust"], label_smoothing=0.5), r"robust: label_smoothing must be in \[0, 0.5\)"),
        (lambda: resolve_terms(["dpo"], beta=-1.0), "beta must be positive"),
        (lambda: LOSSES["dpo"](torch.zeros(1), torch.zeros(1)), "dpo needs ref_chosen_logps and ref_rejected_logps"),
        (lambda: LOSSES["simpo"](torch.zeros(1), torch.zeros(1)), "simpo needs chosen_len and rejected_len"),
        (lambda: LOSSES["sppo"](*[torch.zeros(1)] * 4), "sppo needs win_prob_chosen and win_prob_rejected"),
        (lambda: LOSSES["dpo"](*[torch.zeros(1)] * 4, gamma=1), "dpo has no 'gamma'"),
    ],
)  # fmt: skip
def test_bad_input(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_segment_sum_with_empty_segments():
    values = torch.randn(9, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 0, 4, 4, 9, 9], dtype=torch.int32)
    out = segment_sum(values, offsets)
    torch.testing.assert_close(
        out, torch.stack([values[a:b].sum() for a, b in zip(offsets, offsets[1:], strict=False)])
    )
    assert torch.autograd.gradcheck(lambda v: segment_sum(v, offsets), (values,))
    assert segment_sum(values[:0], torch.zeros(3, dtype=torch.int32)).tolist() == [0, 0]


def test_the_table_knows_names_and_options_that_say_nothing():
    assert LOSSES["sigmoid"] is LOSSES["dpo"] and "sigmoid" not in LOSSES
    with pytest.raises(ConfigError, match="did you mean 'simpo'"):
        LOSSES["simpso"]
    with pytest.raises(ConfigError, match="the trainer's term"):
        LOSSES["sft"]
    with pytest.raises(ConfigError, match="typo is set, but dpo does not read it"):
        resolve_terms(["dpo"], loss_kwargs={"typo": None})
