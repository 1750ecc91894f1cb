"""Every loss of the table: its coefficients, its formula written out again, identities, documentation."""

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fastpo import cli
from fastpo.errors import ConfigError
from fastpo.losses import docs, table
from fastpo.losses.table import STATISTICS, Pairs, canonical_name, resolve_terms

P, K = 9, 4
# The losses per token are in test_tokens.py.
LOSSES = table._Table({name: loss for name, loss in table.LOSSES.items() if loss.shape != "tokens"})

# Hyper-parameters beside the defaults with which each loss is tried too.
VARIANTS = {
    "dpo": [{"label_smoothing": 0.2}], "robust": [{"label_smoothing": 0.2}], "ipo": [{"ipo_reduce": "sum"}],
    "simpo": [{"label_smoothing": 0.1}], "slic": [{"nll_reduction": r} for r in ("seq_mean", "seq_sum")],
    "orpo": [{"disable_prompt_loss": True}, {"nll_coef": 0.0}, {"nll_reduction": "seq_mean"}],
    "cpo": [{"label_smoothing": 0.1, "cpo_alpha": 0.3}, {"nll_reduction": "seq_sum"}],
    "cpo_hinge": [{"nll_reduction": "seq_sum"}], "cpo_ipo": [{"nll_reduction": "seq_mean", "cpo_alpha": 0.3}],
    "apo_zero_unpaired": [{"desirable_weight": 1.3, "undesirable_weight": 0.7}],
    "cpo_simpo": [{"label_smoothing": 0.1, "nll_reduction": "seq_mean"}], "rpo": [{"rpo_alpha": 1.0}],
    "kto": [{"desirable_weight": 1.3, "undesirable_weight": 0.7}], "bco_pair": [{"delta": 0.4}],
    "aot": [{"label_smoothing": 0.1}], "aot_unpaired": [{"label_smoothing": 0.1}], "wpo": [{"clamp_weight": False}],
    "fdpo": [{"f_divergence_type": k} for k in ("reverse_kl", "forward_kl", "alpha_divergence")],
    "exo_pair": [{"label_smoothing": 0.2}],
    "alphapo": [{"alpha": 0.0}, {"alpha": -0.5}], "dno": [{"score_scale": 5.0}], "dno_reg": [{"kappa": 0.0}],
    "inpo": [{"eta": 0.1}], "infonca": [{"temperature": 0.5}], "nca_rw": [{"temperature": 0.5}],
    "ld_dpo": [{"ld_alpha": 0.0}], "reward": [{"center_rewards_coefficient": 0.1}],
    "discopop": [{"beta": 0.5, "discopop_tau": 0.7}],
}  # fmt: skip
CASES = [(name, hyper) for name in LOSSES for hyper in [{}, *VARIANTS.get(name, [])]]
IDS = ["-".join([name, *(f"{k}={v}" for k, v in hyper.items())]) for name, hyper in CASES]


def inputs(name: str, seed: int = 0, scale: float = 1.0, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Every argument that a loss may take, at random; log-ratios of about ten nats times `scale`."""
    g = torch.Generator().manual_seed(seed)
    shape = (P, K) if LOSSES[name].shape in ("lists", "degrees") else (P,)
    rand = lambda *s: torch.rand(*(s or shape), generator=g, dtype=torch.float64)  # noqa: E731
    x = {k: torch.randint(2, 40, shape, generator=g).double() for k in ("chosen_len", "rejected_len", "prompt_len")}
    logps = lambda length: -(0.05 + 2 * rand()) * length * scale  # noqa: E731
    for k in ("", "ref_", "prev_"):
        x |= {f"{k}{side}_logps": logps(x[f"{side}_len"]) for side in ("chosen", "rejected")}
    for k in ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"):
        x[k.replace("_logps", "_tail_logps")] = x[k] * rand()
    x |= {f"{side}_log_sum_sq": x[f"{side}_logps"] * (0.8 + 0.4 * rand()) for side in ("chosen", "rejected")}
    x |= {f"{side}_kl": 5 * rand() for side in ("chosen", "rejected")}
    x |= {k: logps(x["prompt_len"]) for k in ("prompt_logps", "greedy_logps", "ref_greedy_logps")}
    x |= {"win_prob": rand(), "scores": rand(*shape), "label": rand() > 0.4, "chosen_of_reference": rand() > 0.5}
    x |= {"kl": torch.tensor(0.7), "reward_mean": torch.tensor(-0.2), "margin": 3 * rand()}
    if LOSSES[name].win_prob or name == "dno_reg":
        x |= {"win_prob_chosen": x.pop("win_prob"), "win_prob_rejected": rand()}
    if name == "degree_aux":
        x = {"chosen_logps": x["chosen_logps"], "degree": torch.randint(K, (P,), generator=g)}
    if LOSSES[name].shape not in ("pairs", "scores"):
        x = {k: v for k, v in x.items() if k not in ("rejected_logps", "ref_rejected_logps")}
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in x.items()}


def call(name: str, x: dict[str, torch.Tensor], what: str = "__call__", **hyper):
    x = dict(x)
    first = [x.pop(k, None) for k in ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")]
    return getattr(LOSSES[name], what)(*first, **x, **hyper)


def autograd(name: str, x: dict[str, torch.Tensor], **hyper):
    """(losses, gradients of their sum); gradients None for an argument that is not there."""
    sides = [x[k].clone().requires_grad_() for k in ("chosen_logps", "rejected_logps") if k in x]
    losses = call(name, x | dict(zip(("chosen_logps", "rejected_logps"), sides, strict=False)), **hyper)
    return losses.detach(), torch.autograd.grad(losses.sum(), sides)


def coefficients(name, x, **hyper):
    return [c for c in call(name, x, "coefficients", **hyper) if c is not None]


# ------------------------------------------------------------------------------------------------- coefficients


@pytest.mark.parametrize("name, hyper", CASES, ids=IDS)
@pytest.mark.parametrize("seed, scale", [(0, 1.0), (1, 1.0), (2, 0.01), (3, 30.0)])
def test_coefficients_are_autograds(name, hyper, seed, scale):
    x = inputs(name, seed, scale)
    losses, expected = autograd(name, x, **hyper)
    assert torch.isfinite(losses).all()
    for c, grad in zip(coefficients(name, x, **hyper), expected, strict=True):
        torch.testing.assert_close(c, grad, rtol=1e-9, atol=1e-12)


# Hyper-parameters, and the log-probabilities of chosen and rejected that lie on a loss's kink or bound, to the bit;
# those of the reference are 0, and lengths 1.
AT_BOUNDS = {
    "hinge": ({"beta": 0.5}, -2.0, -4.0), "gpo_hinge": ({"beta": 0.5}, -2.0, -4.0),
    "slic": ({"delta": 2.0}, -4.0, -6.0),
    "gpo_tquad": ({"beta": 0.5}, -2.0, -4.0), "dpop": ({}, 0.0, -4.0), "gpo_exp": ({"beta": 0.5}, -164.0, -4.0),
    "fdpo-forward": ({"beta": 0.5, "f_divergence_type": "forward_kl"}, -80.0, -4.0),
    "fdpo-alpha": ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5}, -160.0, -4.0),
    "alphapo": ({"alpha": 0.5}, -160.0, -4.0),
    "orpo-chosen": ({"nll_coef": 0.0}, -1e-6, -4.0), "orpo-rejected": ({"nll_coef": 0.0}, -4.0, -1e-6),
    "kto": ({}, -2.0, None), "wpo": ({}, -2.0, -4.0), "discopop": ({"discopop_tau": 1.0}, -800.0, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("case", AT_BOUNDS)
def test_coefficients_are_autograds_at_the_bounds(case):
    """And to either side of them: the derivative at the bound is one of the two."""
    name = case.split("-")[0]
    hyper, *where = AT_BOUNDS[case]
    sides = [k for k in ("chosen_logps", "rejected_logps") if k in inputs(name)]

    def of(*logps):
        x = inputs(name)
        x |= {k: torch.zeros_like(v) for k, v in x.items() if k.endswith("logps") or k.endswith("_sum_sq")}
        x |= {k: torch.ones_like(x[k]) for k in ("chosen_len", "rejected_len")}
        x |= {k: torch.full_like(x[k], v) for k, v in zip(sides, logps, strict=False)}
        x |= {"kl": torch.tensor(0.0, dtype=torch.float64)}
        if name == "wpo":  # its weight is e^0, where it is cut off
            x |= {f"{s}_log_sum_sq": x[f"{s}_logps"] for s in ("chosen", "rejected")}
        _, expected = autograd(name, x, **hyper)
        for c, grad in zip(coefficients(name, x, **hyper), expected, strict=True):
            torch.testing.assert_close(c, grad, rtol=1e-12, atol=0)
        return expected

    at = of(*where)
    if name in ("kto", "wpo", "discopop"):
        return
    apart = [of(*(None if v is None else v * factor for v in where)) for factor in (1 - 1e-9, 1 + 1e-9)]
    jumps = [not torch.allclose(a, b, rtol=1e-3) for a, b in zip(*apart, strict=True)]
    assert any(jumps) != (name in ("gpo_tquad", "dpop")), "the case lies on a bound"
    for grad, low, high in zip(at, *apart, strict=True):
        assert torch.allclose(grad, low, rtol=1e-3) or torch.allclose(grad, high, rtol=1e-3)


def test_coefficients_take_the_calls_own_keywords():
    x = inputs("dpo")
    names = {"policy_chosen_logps": "chosen_logps", "policy_rejected_logps": "rejected_logps"}
    given = {k: x[names.get(k, k)] for k in (*names, "ref_chosen_logps", "ref_rejected_logps")}
    got, expected = LOSSES["dpo"].coefficients(**given, beta=0.3), coefficients("dpo", x, beta=0.3)
    for c, other in zip(got, expected, strict=True):
        assert torch.equal(c, other)
    with pytest.raises(ConfigError, match="dpo needs ref_rejected_logps"):
        LOSSES["dpo"].coefficients(x["chosen_logps"], x["rejected_logps"], ref_chosen_logps=x["ref_chosen_logps"])
    with pytest.raises(ConfigError, match="ref_chosen_logps.*must have the shape"):
        LOSSES["dpo"].coefficients(**given | {"ref_chosen_logps": torch.zeros(2)})


@pytest.mark.parametrize("name, hyper", CASES, ids=IDS)
def test_coefficients_are_central_differences(name, hyper):
    for numeric, c, size in central_differences(name, 5, **hyper):
        assert abs(numeric - c) <= 1e-5 * (1 + abs(numeric)) + 1e-10 * size


def central_differences(name, seed, **hyper):
    """(difference quotient of the summed losses, closed form, largest loss) of every log-probability. No autograd."""
    x, h = inputs(name, seed), 1e-5
    if name == "alphapo":  # its fourth derivative grows like its exponential
        x = inputs(name, seed, 0.3)
    for key, c in zip(("chosen_logps", "rejected_logps"), coefficients(name, x, **hyper), strict=False):
        for at in range(x[key].numel()):
            step = torch.zeros_like(x[key])
            step.view(-1)[at] = h
            # What carries no gradient stays where it is.
            held = {}
            if name == "wpo":
                side = key.split("_")[0]
                held = {f"{side}_log_sum_sq": step}
            ups, downs = (
                call(name, x | {key: x[key] + s * step} | {k: x[k] + s * v for k, v in held.items()}, **hyper)
                for s in (1, -1)
            )
            yield (ups - downs).sum() / (2 * h), c.view(-1)[at], ups.abs().max()


@pytest.mark.parametrize("name, hyper", CASES, ids=IDS)
@pytest.mark.parametrize("shift", [-1e4, -500.0, 500.0, 1e4])
def test_extremes_stay_finite_in_float32(name, hyper, shift):
    """Log-ratios of thousands of nats, of either sign, on either side."""
    for key in ("ref_chosen_logps", "ref_rejected_logps", "chosen_logps", "rejected_logps"):
        x = inputs(name, 4, dtype=torch.float32)
        of_policy_alone = not LOSSES[name].reference or name == "wpo"
        if key not in x or (shift > 0 and of_policy_alone and not key.startswith("ref_")):
            continue  # a log-probability is never positive
        x[key] = x[key] + shift
        losses, grads = autograd(name, x, **hyper)
        assert torch.isfinite(losses).all(), key
        for c, grad in zip(coefficients(name, x, **hyper), grads, strict=True):
            assert torch.isfinite(c).all() and torch.isfinite(grad).all(), key
            torch.testing.assert_close(c, grad, rtol=2e-4, atol=1e-5 * float(1 + grad.abs().max()))


# ---------------------------------------------------------------------------------- the formulas, written out again


def ls(u):
    return -torch.log1p(torch.exp(-u.abs())) - (-u).clamp(min=0)


def s(u):
    return 1 / (1 + torch.exp(-u))


def rank(t):
    return t.sort().values


def _kto(v):
    z0 = max(0.0, float(v.kl))
    return torch.where(v.label, 1 - s(0.1 * (v.a - z0)), 1 - s(0.1 * (z0 - v.a)))


def _bco(v):
    u = 0.01 * v.a - v.reward_mean
    return torch.where(v.label, -ls(u), -ls(-u))


def _orpo(v):
    odds = [p - torch.log(1 - torch.exp(p)) for p in (v.lw / v.nw, v.ll / v.nl)]
    return -(v.lw + v.prompt_logps) / (v.nw + v.prompt_len).mean() - 0.1 * ls(odds[0] - odds[1])


def _exo_rw(v):
    p, q = torch.softmax(0.5 * v.a, 1), torch.softmax(v.scores / 0.5, 1)
    return (p * (p / q).log()).sum(1)


# From section 1 of ALGORITHMS.md, each with its defaults; those that TRL or Liger have are in losses/test_peers.py too.
FORMULAS = {
    "cdpo": lambda v: -0.9 * ls(0.1 * v.d) - 0.1 * ls(-0.1 * v.d),
    "dpo_soft": lambda v: -v.win_prob * ls(0.1 * v.d) - (1 - v.win_prob) * ls(-0.1 * v.d),
    "slic": lambda v: (1 - v.lw + v.ll).clamp(min=0) - 0.1 * v.lw / v.nw.mean(),
    "sigmoid_norm": lambda v: -ls(5 * (v.a / v.nw - v.b / v.nl)),
    "orpo": _orpo,
    "cpo": lambda v: -ls(0.1 * (v.lw - v.ll)) - v.lw / v.nw.mean(),
    "cpo_simpo": lambda v: -ls(10 * (v.lw / v.nw - v.ll / v.nl) - 5.4) - 0.05 * v.lw / v.nw.mean(),
    "cpo_hinge": lambda v: (1 - 0.1 * (v.lw - v.ll)).clamp(min=0) - v.lw / v.nw.mean(),
    "cpo_ipo": lambda v: (v.lw / v.nw - v.ll / v.nl - 5) ** 2 - v.lw / v.nw.mean(),
    "rpo": lambda v: -ls(0.01 * v.d) - 0.005 * v.lw / v.nw.mean(),
    "dpop": lambda v: -ls(0.1 * (v.d - 50 * (v.rw - v.lw).clamp(min=0))),
    "rdpo": lambda v: -ls(0.1 * v.d + 0.01 * (v.nw - v.nl)),
    "exo_pair": lambda v: s(0.1 * v.d) * torch.log(s(0.1 * v.d) / 0.999)
    + s(-0.1 * v.d) * torch.log(s(-0.1 * v.d) / 0.001),
    "exo_rw": _exo_rw,
    "nca_pair": lambda v: -ls(0.01 * v.a) - 0.5 * ls(-0.01 * v.a) - 0.5 * ls(-0.01 * v.b),
    "nca_rw": lambda v: -(torch.softmax(v.scores / 1e-4, 1) * ls(0.01 * v.a)).sum(1) - ls(-0.01 * v.a).sum(1) / K,
    "infonca": lambda v: -(torch.softmax(v.scores / 1e-4, 1) * torch.log_softmax(0.01 * v.a, 1)).sum(1),
    "kto": _kto,
    "bco_pair": lambda v: -ls(0.01 * v.a) - ls(-0.01 * v.b),
    "bco": _bco,
    "apo_zero_unpaired": lambda v: torch.where(v.label, 1 - s(0.1 * v.a), s(0.1 * v.a)),
    "apo_zero": lambda v: 1 - s(0.1 * v.a) + s(0.1 * v.b),
    "apo_down": lambda v: s(0.1 * v.a) + 1 - s(0.1 * v.d),
    "aot": lambda v: -ls(0.01 * (rank(v.lw - v.ll) - rank(v.rw - v.rl))),
    "aot_unpaired": lambda v: -ls(0.01 * (rank(v.a) - rank(v.b))),
    "discopop": lambda v: -(1 - s(v.d)) * ls(0.05 * v.d) + s(v.d) * torch.exp(-0.05 * v.d),
    "wpo": lambda v: -ls(0.01 * v.d) * torch.exp((v.lw - v.chosen_log_sum_sq) / v.nw
                                               + (v.ll - v.rejected_log_sum_sq) / v.nl).clamp(max=1),
    "ld_dpo": lambda v: -ls(0.1 * (v.d - 0.5 * (v.chosen_tail_logps - v.ref_chosen_tail_logps)
                                   + 0.5 * (v.rejected_tail_logps - v.ref_rejected_tail_logps))),
    "sampo": lambda v: -ls(0.1 * v.d),
    "tdpo1": lambda v: -ls(0.1 * (v.d - (v.rejected_kl - v.chosen_kl))),
    "tdpo2": lambda v: -ls(0.1 * (v.d - 0.5 * (v.rejected_kl - v.chosen_kl))),
    "gpo_logistic": lambda v: torch.log(1 + torch.exp(-0.1 * v.d)),
    "gpo_exp": lambda v: torch.exp(-0.1 * v.d),
    "gpo_sq": lambda v: (0.1 * v.d - 1) ** 2,
    "gpo_hinge": lambda v: (1 - 0.1 * v.d).clamp(min=0),
    "gpo_tquad": lambda v: (1 - 0.1 * v.d).clamp(min=0) ** 2,
    "gpo_savage": lambda v: 1 / (1 + torch.exp(0.1 * v.d)) ** 2,
    "fdpo": lambda v: -ls(0.1 * (ls(v.a) - ls(v.b))),
    "alphapo": lambda v: -ls(2.5 * (torch.exp(-0.25 * v.ll / v.nl) - torch.exp(-0.25 * v.lw / v.nw)) / 0.25 - 0.1),
    "sppo_single": lambda v: 0.5 * ((v.a - 1000 * (v.win_prob - 0.5)) ** 2 + (v.b + 1000 * (v.win_prob - 0.5)) ** 2),
    "dno": lambda v: -s(v.win_prob_chosen - v.win_prob_rejected) * ls(0.1 * v.d)
    - s(v.win_prob_rejected - v.win_prob_chosen) * ls(-0.1 * v.d),
    "dno_prct": lambda v: -ls(0.1 * v.d),
    "dno_reg": lambda v: -s(v.win_prob_chosen - v.win_prob_rejected) * ls(0.1 * v.h)
    - s(v.win_prob_rejected - v.win_prob_chosen) * ls(-0.1 * v.h),
    "inpo": lambda v: (v.h - 100) ** 2,
    "online_ipo": lambda v: (v.d - 5) ** 2,
    "ipo_md": lambda v: (v.d - 5) ** 2,
    "selm": lambda v: -ls(0.01 * v.d) + 1e-5 * (v.greedy_logps - v.ref_greedy_logps),
    "xpo": lambda v: -ls(0.1 * v.d) + 1e-5 * (v.chosen_of_reference * v.lw + ~v.chosen_of_reference * v.ll),
    "reward": lambda v: -ls(v.lw - v.ll - v.margin),
    "degree_aux": lambda v: v.lw.logsumexp(1) - v.lw[torch.arange(P), v.degree],
}  # fmt: skip
IN_TEST_LOSSES = {"dpo", "robust", "ipo", "hinge", "simpo", "sppo", "sppo_hard"}


def values(x):
    v = SimpleNamespace(**x, lw=x["chosen_logps"])
    if "ref_chosen_logps" not in x:
        return v
    v.rw, v.nw, v.nl = x["ref_chosen_logps"], x["chosen_len"], x["rejected_len"]
    v.a = v.lw - v.rw
    if "rejected_logps" in x:
        v.ll, v.rl = x["rejected_logps"], x["ref_rejected_logps"]
        v.b = v.ll - v.rl
        v.d = v.a - v.b
        v.h = v.lw - v.ll - (v.rw - v.rl) / 3 - 2 * (x["prev_chosen_logps"] - x["prev_rejected_logps"]) / 3
    return v


def test_every_loss_has_its_formula_here():
    assert set(FORMULAS) | IN_TEST_LOSSES == set(LOSSES)


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name):
    for seed in range(3):
        x = inputs(name, seed)
        torch.testing.assert_close(call(name, x), FORMULAS[name](values(x)), rtol=1e-10, atol=1e-12)


def test_every_name_of_the_specification():
    names = """dpo cdpo robust dpo_soft ipo hinge slic sigmoid_norm simpo orpo cpo cpo_simpo cpo_hinge cpo_ipo
        rpo dpop rdpo exo_pair exo_rw nca_pair nca_rw infonca kto bco_pair bco apo_zero apo_zero_unpaired apo_down aot
        aot_unpaired discopop wpo ld_dpo sampo tdpo1 tdpo2
        fdpo alphapo sppo sppo_single sppo_hard dno dno_prct dno_reg inpo online_ipo ipo_md selm
        xpo reward degree_aux""".split()
    assert {n for n in LOSSES if not n.startswith("gpo_")} == set(names)
    assert sum(n.startswith("gpo_") for n in LOSSES) == 6


# --------------------------------------------------------------------------- identities (ALGORITHMS.md, section 4.4)


def same(left, right):
    torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11)


def test_identities():
    x, one = inputs("dpo"), torch.ones(P, dtype=torch.float64)
    short = x | {"chosen_len": one, "rejected_len": one}
    dpo = call("dpo", x)
    same(call("simpo", short, beta=0.3, gamma_beta_ratio=0.0), call("cpo", short, beta=0.3, cpo_alpha=0.0))
    same(call("sigmoid_norm", short, beta=0.1), dpo)
    for tau in (0.05, 0.3):
        same(call("gpo_sq", x, beta=2 * tau), 4 * tau**2 * call("ipo", x, beta=tau, ipo_reduce="sum"))
        ipo = call("ipo", x, beta=tau, ipo_reduce="sum")
        same(call("inpo", x, eta=tau, kappa=1.0), ipo)
        first = x | {"prev_chosen_logps": x["ref_chosen_logps"], "prev_rejected_logps": x["ref_rejected_logps"]}
        same(call("inpo", first, eta=tau), ipo)
        same(call("online_ipo", x, beta=tau), ipo)
        same(call("ipo_md", x, beta=tau), ipo)
    sure = {k: v for k, v in x.items() if k != "win_prob"} | {"win_prob_chosen": one, "win_prob_rejected": 0 * one}
    same(call("dno", sure, score_scale=1e3), dpo)
    same(call("dno_prct", x), dpo)
    same(call("sppo_single", x | {"win_prob": one}, beta=0.1), 0.5 * call("sppo_hard", x, beta=0.1))
    same(call("robust", x, label_smoothing=0.0), dpo)
    same(call("cdpo", x, label_smoothing=0.0), dpo)
    same(call("ld_dpo", x, ld_alpha=1.0), dpo)
    same(call("tdpo2", x, alpha=0.0), dpo)
    no_kl = x | {"chosen_kl": 0 * one, "rejected_kl": 0 * one}
    same(call("tdpo1", no_kl), dpo)
    same(call("xpo", x, alpha=0.0), dpo)
    same(call("selm", x, alpha=0.0, beta=0.1), dpo)


def test_further_identities():
    x, one = inputs("dpo"), torch.ones(P, dtype=torch.float64)
    dpo = call("dpo", x)
    same(call("dpo_soft", x | {"win_prob": 0.8 * one}), call("cdpo", x, label_smoothing=0.2))
    same(call("gpo_logistic", x), dpo)
    same(call("gpo_hinge", x), call("hinge", x))
    same(call("gpo_tquad", x), call("gpo_hinge", x) ** 2)
    same(call("fdpo", x, f_divergence_type="reverse_kl"), dpo)
    same(call("dpop", x, dpop_lambda=0.0), dpo)
    same(call("rdpo", x, alpha=0.0), dpo)
    same(call("rpo", x, beta=0.1, rpo_alpha=0.0), dpo)
    same(call("alphapo", x, alpha=0.0, beta=2.0, gamma_beta_ratio=0.5), call("simpo", x))
    same(
        call("alphapo", x, alpha=1e-7, beta=2.0, gamma_beta_ratio=0.5).round(decimals=4),
        call("simpo", x).round(decimals=4),
    )
    same(call("cpo_simpo", x, cpo_alpha=0.0, beta=2.0, gamma_beta_ratio=0.5), call("simpo", x))
    same(call("dno_reg", x | {"win_prob": None}, kappa=1.0), dpo)
    unit = x | {"chosen_log_sum_sq": x["chosen_logps"], "rejected_log_sum_sq": x["rejected_logps"]}
    same(call("wpo", unit, beta=0.1), dpo)
    single = {k: v[:1] if v.dim() else v for k, v in x.items()}
    same(call("aot", single, beta=0.1), dpo[:1])
    same(call("aot_unpaired", single, beta=0.1), dpo[:1])
    # InfoNCA on two responses, the first sure to be better, is dpo.
    stack = lambda a, b: torch.stack([x[a], x[b]], 1)  # noqa: E731
    two = LOSSES["infonca"](
        stack("chosen_logps", "rejected_logps"), None, stack("ref_chosen_logps", "ref_rejected_logps"),
        scores=torch.tensor([[1.0, 0.0]]).double().expand(P, 2), beta=0.1,
    )  # fmt: skip
    same(two, dpo)


def test_where_gradients_vanish():
    """The optima of the bounded losses, and those of the hinges."""
    zero = torch.zeros(1, dtype=torch.float64)

    def slope(name, delta, **hyper):
        at = torch.tensor([delta], dtype=torch.float64)
        extra = {"win_prob": torch.tensor([0.7]).double()} if name == "dpo_soft" else {}
        return LOSSES[name].coefficients(at, zero, zero, zero, **extra, **hyper)[0].abs().item()

    logit = lambda p: math.log(p / (1 - p))  # noqa: E731
    assert slope("cdpo", 0.0, label_smoothing=0.5) < 1e-16
    assert slope("cdpo", logit(0.9), beta=1.0, label_smoothing=0.1) < 1e-12
    assert slope("exo_pair", logit(0.9), beta=1.0, label_smoothing=0.1) < 1e-12
    assert slope("dpo_soft", logit(0.7), beta=1.0) < 1e-7  # 0.7 in float32
    assert slope("nca_pair", math.log(2), beta=1.0) < 1e-12
    assert slope("ipo", 1.0, beta=0.5, ipo_reduce="sum") == slope("gpo_sq", 1.0, beta=1.0) == 0
    assert slope("hinge", 11.0) == slope("gpo_tquad", 11.0) == 0 and slope("dpo", 11.0) > 0


def test_token_mean_is_the_mean_over_all_tokens():
    x = inputs("cpo")
    nll = call("cpo", x) - call("cpo", x, cpo_alpha=0.0)
    same(nll.mean(), -x["chosen_logps"].sum() / x["chosen_len"].sum())


def test_other_arguments_get_the_gradients_that_are_documented():
    x = inputs("tdpo2")
    c_w, c_l = coefficients("tdpo2", x)
    kl = {k: x[k].clone().requires_grad_() for k in ("chosen_kl", "rejected_kl")}
    grads = torch.autograd.grad(call("tdpo2", x | kl).sum(), list(kl.values()), allow_unused=True)
    assert grads[0] is None
    same(grads[1], 0.5 * c_l)
    grads = torch.autograd.grad(call("tdpo1", x | kl).sum(), list(kl.values()))
    same(torch.stack(grads), torch.stack(coefficients("tdpo1", x)))
    tail = x["chosen_tail_logps"].clone().requires_grad_()
    (grad,) = torch.autograd.grad(call("ld_dpo", x | {"chosen_tail_logps": tail}).sum(), tail)
    same(grad, (0.5 - 1) * coefficients("ld_dpo", x)[0])  # with the sum's own: alpha times it
    leaf = x["greedy_logps"].clone().requires_grad_()
    (grad,) = torch.autograd.grad(call("selm", x | {"greedy_logps": leaf}).sum(), leaf)
    same(grad, torch.full_like(grad, 1e-5))
    added = [c - other for c, other in zip(coefficients("xpo", x, alpha=0.5), coefficients("dpo", x), strict=True)]
    same(added[0], 0.5 * x["chosen_of_reference"].double())
    same(added[1], 0.5 * (~x["chosen_of_reference"]).double())


# -------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_missing_is_named(name):
    loss, x = LOSSES[name], inputs(name)
    needed = [("policy_" if n == "rejected_logps" else "") + n for n in loss.needed(loss.hyper())]
    for absent in needed + (["win_prob"] if loss.pair_prob else []):
        less = {k: v for k, v in x.items() if k != absent.removeprefix("policy_")}
        with pytest.raises(ConfigError, match=f"{name} needs {absent}$"):
            call(name, less)


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("robust", {"label_smoothing": 0.5}, r"robust: label_smoothing must be in \[0, 0.5\), not 0.5"),
        ("exo_pair", {"label_smoothing": 0.0}, r"exo_pair: label_smoothing must be in \(0, 0.5\), not 0.0"),
        ("discopop", {"discopop_tau": -0.1}, "discopop_tau must be positive, not -0.1"),
        ("dpo", {"beta": math.inf}, "beta must be positive"),
        ("dpo", {"beta": math.nan}, "beta must be positive"),
        ("dpo", {"beta": "0.1"}, "beta must be positive, not '0.1'"),
        ("dpo", {"beta": True}, "beta must be positive, not True"),
        ("inpo", {"eta": 0}, "eta must be positive"),
        ("inpo", {"kappa": 1.5}, r"kappa must be in \[0, 1\], not 1.5"),
        ("ld_dpo", {"ld_alpha": -0.1}, r"ld_alpha must be in \[0, 1\]"),
        ("ipo", {"ipo_reduce": "max"}, "ipo_reduce must be mean or sum, not 'max'"),
        ("cpo", {"nll_reduction": "mean"}, "nll_reduction must be one of token_mean, seq_mean, seq_sum, not 'mean'"),
        ("orpo", {"disable_prompt_loss": 1}, "disable_prompt_loss must be true or false, not 1"),
        ("fdpo", {"f_divergence_type": "kl"}, "f_divergence_type must be one of reverse_kl, forward_kl"),
        ("simpo", {"gamma_beta_ratio": math.nan}, "gamma_beta_ratio must be a finite number"),
        ("simpo", {"gamma_beta": 0.5}, "simpo has no 'gamma_beta'; did you mean 'gamma_beta_ratio'"),
        ("tdpo1", {"chosen_kll": 0.5}, "tdpo1 has no 'chosen_kll'; did you mean 'chosen_kl'"),
        ("slic", {"delta": -1.0}, "delta must be zero or more"),
        ("degree_aux", {"degrees": 3.5}, "degrees must be a whole number from 2 to 64, not 3.5"),
    ],
    ids=str,
)  # fmt: skip
def test_hyper_parameters_outside_their_domain(name, hyper, message):
    with pytest.raises(ConfigError, match=message) as caught:
        call(name, inputs(name), **hyper)
    assert "\n" not in str(caught.value)


def test_shapes_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"dpo: ref_chosen_logps \[3\] must have the shape \[4\]"):
        LOSSES["dpo"](torch.zeros(4), torch.zeros(4), torch.zeros(3), torch.zeros(4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resolve_terms(["dpo"], loss_kwargs={"cpo_alpha": 1}), "cpo_alpha is set, but dpo does not read it"),
        (lambda: resolve_terms(["cpo"], loss_kwargs={"cpo_alfa": 1}), "cpo_alfa is set.*did you mean 'cpo_alpha'"),
        (lambda: resolve_terms(["dpo"], beta=0.1, loss_kwargs={"beta": 1}), "beta is set, and in loss_kwargs too"),
        (lambda: resolve_terms(["hinge"], f_divergence_type="js_divergence"), "f_divergence_type is set, but hinge"),
        (lambda: resolve_terms(["hinge"], ld_alpha=0.5), "ld_alpha is set, but hinge does not read it"),
        (lambda: resolve_terms(["dpo"], ld_alpha=1.5), r"ld_dpo: ld_alpha must be in \[0, 1\]"),
        (lambda: resolve_terms(["dpo", "sft"], use_weighting=True), "use_weighting goes with loss_type=dpo alone"),
        (lambda: resolve_terms(["dpo"], ld_alpha=0.5, use_weighting=True), "ld_alpha and use_weighting make ld_dpo"),
        (lambda: resolve_terms(["dpo"], discopop_tau=0.1), "discopop_tau is set, but dpo does not read it"),
        (lambda: resolve_terms(["dpo_soft", "sppo"]), "dpo_soft reads win_prob .* sppo .* cannot be mixed"),
        (lambda: canonical_name("sppo_singel"), "did you mean 'sppo_single'"),
    ],
)  # fmt: skip
def test_configurations_that_cannot_be(make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_number_that_yaml_leaves_a_text():
    assert resolve_terms(["cpo_simpo"], loss_kwargs={"beta": "1e-3"})[0].hyper["beta"] == 1e-3


def test_terms():
    cpo, sft = resolve_terms(["cpo"], [0.5], loss_kwargs={"cpo_alpha": 0.2})
    assert (cpo.name, cpo.weight, cpo.hyper) == ("cpo", 0.5, {"beta": 0.1, "label_smoothing": 0.0})
    assert (sft.name, sft.weight, sft.loss) == ("sft", 0.1, None)
    (alone,) = resolve_terms(["cpo"], loss_kwargs={"cpo_alpha": 0.0})
    assert alone.name == "cpo"
    (own,) = resolve_terms(["rpo"], loss_kwargs={"nll_reduction": "seq_sum"})
    assert own.hyper == {"beta": 0.01, "rpo_alpha": 0.005, "nll_reduction": "seq_sum"}
    for without in (False, True):
        orpo, sft = resolve_terms(["orpo"], loss_kwargs={"disable_prompt_loss": without})
        assert (orpo.name, sft.name) == ("orpo", "sft") and orpo.hyper == {"beta": 0.1}
        assert not orpo.reads_prompt and sft.reads_prompt is not without
        (own,) = resolve_terms(["orpo"], loss_kwargs={"disable_prompt_loss": without, "nll_reduction": "seq_mean"})
        assert own.reads_prompt is not without
    assert not any(t.reads_prompt for t in resolve_terms(["orpo", "cpo", "sft"], loss_kwargs={"nll_coef": 0.0}))
    (f,) = resolve_terms(["sigmoid"], f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.7)
    assert f.name == "fdpo" and f.hyper["f_alpha_divergence_coef"] == 0.7
    assert [t.name for t in resolve_terms(["sigmoid"], f_divergence_type="reverse_kl")] == ["dpo"]
    assert [t.name for t in resolve_terms(["hinge"], f_divergence_type="reverse_kl")] == ["hinge"]
    for given in ({"f_divergence_type": "reverse_kl"}, {"loss_kwargs": {"f_divergence_type": "reverse_kl"}}):
        (f,) = resolve_terms(["fdpo"], **given)
        assert f.hyper["f_divergence_type"] == "reverse_kl", "asked for, though it is dpo"
    assert resolve_terms(["fdpo"])[0].hyper["f_divergence_type"] == "js_divergence"
    assert resolve_terms(["exo_pair"], label_smoothing=0.0)[0].hyper["label_smoothing"] == 1e-3


# ------------------------------------------------------------------------------------------------- documentation


def test_the_page(repo_root):
    page = (repo_root / "docs" / "losses.md").read_text()
    assert page == docs.page(), "run python -m fastpo.losses.docs > docs/losses.md"
    for name, loss in table.LOSSES.items():
        assert f"\n## {name}\n" in page and loss.paper in page
    done = subprocess.run(
        [sys.executable, "-m", "fastpo.losses.docs"], capture_output=True, text=True, timeout=60, cwd=repo_root
    )
    assert done.stdout == page, done.stderr


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_documented(name):
    loss = LOSSES[name]
    assert loss.paper in loss.fn.__doc__ or name == "sppo_hard"  # TRL's variant of SPPO
    assert loss.gradient.__doc__ and docs.NOTES[name].use
    assert set(loss.needs) <= set(STATISTICS) and set(loss.needed(loss.hyper())) <= set(Pairs._fields)


def test_what_is_unverified_says_so():
    """Section 6 of ALGORITHMS.md."""
    marked = {name for name, note in docs.NOTES.items() if note.unverified}
    gpo = {name for name in LOSSES if name.startswith("gpo_")}
    assert marked == gpo | {"grpo", "cispo", "luspo", "nash_md"} | {
        "online_ipo",
        "ipo_md",
        "sigmoid_norm",
        "kto",
        "rpo",
        "dno",
        "dno_prct",
        "degree_aux",
    }
    assert set(docs.NOTES) == set(table.LOSSES)


def test_the_command(capsys):
    assert cli.main(["losses"]) == 0
    table = capsys.readouterr().out
    assert all(f"\n{name} " in table for name in LOSSES) and "\nsft:" in table
    for name in (*LOSSES, "sft", "sigmoid"):
        assert cli.main(["losses", name]) == 0
    assert cli.main(["losses", "simpo"]) == 0
    assert "gamma_beta_ratio 0.5" in capsys.readouterr().out
    assert cli.main(["losses", "simop"]) == 2
    assert capsys.readouterr().err == "fastpo: error: unknown loss_type 'simop'; did you mean 'simpo'?\n"
