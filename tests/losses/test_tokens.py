"""The losses per token: against their plain definition, autograd, difference quotients and TRL 1.16's trainers."""

import itertools
import math

import pytest
import torch

from fastpo import cli
from fastpo.errors import ConfigError
from fastpo.kernels import reference_tokens
from fastpo.losses import docs
from fastpo.losses.table import LOSSES, canonical_name, resolve_terms
from fastpo.losses.token_metrics import token_metrics
from fastpo.losses.token_table import TOKEN_LOSSES
from fastpo.losses.tokens import TokenLoss, Tokens, Totals

NAMES = [loss.name for loss in TOKEN_LOSSES]
LENGTHS = (5, 1, 9, 3, 0, 12, 4)
ADVANTAGE = (1.3, -0.8, -1.1, 0.0, 0.7, 0.9, -2.0)
MAX_LENGTH = 16
OF_NAME = {
    "grpo": [{"epsilon_high": 0.28, "delta": 1.5}, {"importance_sampling_level": "sequence"}, {"delta": 1.1}],
    "dapo": [{"importance_sampling_level": "sequence", "delta": 2.0}], "gspo": [{"importance_sampling_level": "token"}],
    "luspo": [{"importance_sampling_level": "token"}, {"delta": 1.3}],
    "cispo": [{"epsilon_high": 1.1}, {"importance_sampling_level": "sequence", "epsilon_high": 1.02}],
    "sapo": [{"sapo_temperature_pos": 0.5, "sapo_temperature_neg": 3.0}, {"importance_sampling_level": "sequence"}],
    "vespo": [{"vespo_k_pos": 1.0, "vespo_lambda_neg": 0.5}, {"importance_sampling_level": "sequence"}],
    "gmpo": [{"epsilon": 0.1, "epsilon_high": 0.05}, {"use_bias_correction_kl": True}], "rloo": [{"epsilon": 1.5}],
    "nash_md": [{"kl_level": "token"}, {"beta": 0.3}],
}  # fmt: skip
KLS = [{"beta": 0.3, "kl_estimator": k, "use_bias_correction_kl": b} for k in ("k1", "k2", "k3") for b in (True, False)]
REDUCTIONS = [{"reduction": r} for r in ("seq_mean", "token_mean", "constant", "seq_sum")]


def cases():
    """Every loss with each setting it is tried with."""
    return list(_cases())


def _cases():
    for name in NAMES:
        shared = [{}, *OF_NAME.get(name, []), *REDUCTIONS]
        if name != "nash_md":
            shared += [*KLS, {"off_policy_mask_threshold": 0.01}]
            if "importance_sampling_level" in LOSSES[name].defaults:
                shared += [{**KLS[4], "importance_sampling_level": level} for level in ("token", "sequence")]
        for hyper in shared:
            yield pytest.param(name, hyper, id="-".join([name, *(f"{k}={v}" for k, v in hyper.items())]))


def batch(seed=0, dtype=torch.float64, spread=0.4, lengths=LENGTHS, advantage=ADVANTAGE, **more):
    """Every argument that a loss per token may take, at random."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    noise = lambda scale: scale * torch.randn(n, generator=g, dtype=torch.float64)  # noqa: E731
    logp = -3 * torch.rand(n, generator=g, dtype=torch.float64) - 0.1
    old = logp + noise(spread)
    x = {
        "logp": logp, "advantage": torch.tensor(advantage, dtype=torch.float64),
        "offsets": torch.tensor([0, *itertools.accumulate(lengths)]), "old_logp": old, "ref_logp": logp + noise(spread),
        "sampler_logp": old + noise(0.1), "correction": torch.exp(noise(0.3)),
        "mask": (torch.rand(n, generator=g) > 0.2).double(), "policy_mask": (torch.rand(n, generator=g) > 0.3).double(),
    }  # fmt: skip
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in (x | more).items() if v is not None}


# What beside log-probabilities and advantages is given.
GIVEN = {
    "all": {},
    "plain": dict.fromkeys(("correction", "mask", "policy_mask", "sampler_logp")),
    "on policy": dict.fromkeys(("old_logp", "correction", "mask", "policy_mask", "sampler_logp")),
    "per response": {"correction": torch.tensor([0.5, 2.0, 1.1, 0.0, 3.0, 0.9, 1.0], dtype=torch.float64),
                     "policy_mask": None},
}  # fmt: skip


def totals(x):
    mask = x.get("mask", torch.ones_like(x["logp"]))
    return Totals(float(mask.sum()), len(x["advantage"]), MAX_LENGTH)


def value_and_gradient(f, x):
    leaf = x["logp"].clone().requires_grad_()
    value = f(**x | {"logp": leaf})
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def defined(name, x, hyper, **more):
    return value_and_gradient(
        lambda **x: reference_tokens.token_loss(
            name, **x, hyper=LOSSES[name].hyper(**hyper), max_length=MAX_LENGTH, **more
        ),
        x,
    )


def same(got, expected, rtol=1e-12, atol=1e-12):
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name, hyper", cases())
def test_value_gradient_and_coefficients_are_the_definitions(name, hyper, given):
    for seed in range(2):
        x = batch(seed, **GIVEN[given])
        value, grad = value_and_gradient(lambda **x: LOSSES[name](**x, totals=totals(x), **hyper), x)
        expected, expected_grad = defined(name, x, hyper)
        same(value, expected)
        same(grad, expected_grad)
        same(LOSSES[name].coefficients(**x, totals=totals(x), **hyper), expected_grad)
        assert grad.abs().max() > 0


# Of which a factor is a constant to autograd that moves with the point of a difference quotient.
FACTORED = ("cispo", "vespo", "nash_md")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FACTORED])
def test_gradcheck(name):
    x = batch(3, spread=0.15)
    logp = x.pop("logp").requires_grad_()
    hyper = {"beta": 0.2, "epsilon": 0.1} if "epsilon" in LOSSES[name].defaults else {"beta": 0.2}
    assert torch.autograd.gradcheck(lambda t: LOSSES[name](t, **x, totals=totals(x | {"logp": t}), **hyper), logp)


@pytest.mark.parametrize("name", NAMES)
def test_difference_quotients(name):
    """The coefficients against the definition's values, no autograd: sg() factors are those of the unmoved point."""
    x, h = batch(4, spread=0.15, policy_mask=None), 1e-6
    if name in FACTORED:  # linear in logp given the factor
        factor = LOSSES[name].coefficients(**x, totals=totals(x)) / LOSSES[name].token_weights(
            Tokens(**x), totals(x)
        )  # fmt: skip
        per_token = LOSSES[name].per_token(Tokens(**x))
        live = x["mask"] > 0
        same((factor * x["logp"])[live], per_token[live])
        return
    closed = LOSSES[name].coefficients(**x, totals=totals(x), beta=0.2)
    hyper = LOSSES[name].hyper(beta=0.2)
    for at in range(len(x["logp"])):
        step = torch.zeros_like(x["logp"])
        step[at] = h
        up, down = (
            reference_tokens.token_loss(name, **x | {"logp": x["logp"] + s * step}, hyper=hyper, max_length=MAX_LENGTH)
            for s in (1, -1)
        )
        assert abs((up - down) / (2 * h) - closed[at]) < 1e-7


# ----------------------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "luspo", "rloo", "gmpo"])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("side", ["low", "high"])
def test_at_the_clip_it_follows_the_ratio(name, advantage, side):
    """To the bit at 1 - e or 1 + E the gradient is that of the ratio, just outside it is 0 on the side that clips."""
    change = 0.5 if side == "high" else -0.5
    r = math.exp(change)
    hyper = {"epsilon": 0.5, "epsilon_high": 0.5} if name == "gmpo" else {
        "epsilon": 1 - torch.tensor(change, dtype=torch.float64).exp().item() if side == "low" else 0.9,
        "epsilon_high": torch.tensor(change, dtype=torch.float64).exp().item() - 1 if side == "high" else 0.9,
    }  # fmt: skip
    logp = torch.zeros(1, dtype=torch.float64)
    args = {"advantage": torch.tensor([advantage], dtype=torch.float64), "offsets": torch.tensor([0, 1])}

    def gradient(change):
        x = {"logp": logp, **args, "old_logp": logp - change}
        _, grad = value_and_gradient(lambda **x: LOSSES[name](**x, **hyper), x)
        same(LOSSES[name].coefficients(**x, **hyper), grad, rtol=0, atol=0)
        return grad.item()

    clips = (advantage > 0) == (side == "high")
    out = change * (1 + 1e-9)
    at = change * (1 - 1e-15)  # the ratio's own rounding may lie on either side of the bound to the bit
    assert gradient(at) == pytest.approx(-advantage * r)
    assert gradient(out) == (0.0 if clips else pytest.approx(-advantage * r))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_bound_itself(sign):
    """A ratio of exactly 2 and a bound of exactly 2: log 2 does not round, since the ratio is given as one."""
    from fastpo.losses.token_functions import _clipped

    x = Tokens(torch.zeros(1, dtype=torch.float64), torch.tensor([sign]), torch.tensor([0, 1]))
    log_r = torch.zeros(1, dtype=torch.float64, requires_grad=True)  # r = 1 = 1 + E = 1 - e
    value, slope = _clipped(x, log_r, 0.0, 0.0, None)
    (grad,) = torch.autograd.grad(value.sum(), log_r)
    same(grad, slope)
    assert grad.item() == -sign


@pytest.mark.parametrize("name", NAMES)
def test_on_policy_the_ratio_is_one_and_the_gradient_is_there(name):
    """Without old log-probabilities every loss is -A of each token times its weight: the policy gradient."""
    x = batch(5, **GIVEN["on policy"])
    hyper = {"beta": 0.0}
    weights = LOSSES[name].token_weights(Tokens(**x), totals(x))
    a = x["advantage"][Tokens(**x).response]
    same(LOSSES[name].coefficients(**x, totals=totals(x), **hyper), -a * weights)
    same(LOSSES[name].coefficients(**x, old_logp=x["logp"], totals=totals(x), **hyper), -a * weights)


@pytest.mark.parametrize("name", NAMES)
def test_advantage_zero_has_no_gradient(name):
    x = batch(6, advantage=(0.0,) * len(LENGTHS))
    assert not LOSSES[name].coefficients(**x, totals=totals(x), beta=0.0).any()
    assert LOSSES[name](**x, totals=totals(x), beta=0.0) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_response_that_is_masked_out_counts_as_a_response(name):
    """As TRL's truncated completions: no gradient and no value, but a share in the mean over responses."""
    x = batch(7, mask=None, policy_mask=None)
    mask = torch.ones_like(x["logp"])
    mask[int(x["offsets"][2]) : int(x["offsets"][3])] = 0
    x["logp"][mask == 0] = -math.inf  # whatever is there
    grad = LOSSES[name].coefficients(**x, mask=mask, totals=Totals(float(mask.sum()), 7, MAX_LENGTH))
    assert not grad[mask == 0].any() and grad.isfinite().all()
    value, by_autograd = value_and_gradient(
        lambda **x: LOSSES[name](**x, mask=mask, totals=Totals(float(mask.sum()), 7, MAX_LENGTH)), x
    )
    same(by_autograd, grad)
    live = mask > 0
    lengths = [n if s != 2 else 0 for s, n in enumerate(LENGTHS)]
    without = {k: v[live] if v.shape == mask.shape else v for k, v in x.items()}
    without["offsets"] = torch.tensor([0, *itertools.accumulate(lengths)])
    same(value, LOSSES[name](**without, totals=Totals(float(mask.sum()), 7, MAX_LENGTH)))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_counts(name):
    x = batch(8, mask=torch.zeros(sum(LENGTHS), dtype=torch.float64))
    value, grad = value_and_gradient(lambda **x: LOSSES[name](**x, totals=totals(x)), x)
    assert value == 0 and not grad.any()
    empty = {k: v[:0] for k, v in batch(8).items()} | {"offsets": torch.tensor([0])}
    assert LOSSES[name](**empty, totals=Totals(5, 2, 4)) == 0
    assert LOSSES[name].coefficients(**empty, totals=Totals(5, 2, 4)).shape == (0,)


@pytest.mark.parametrize("name, hyper", cases())
def test_packing_does_not_matter(name, hyper):
    """Two micro-batches of a step, with the step's totals, add up to the step; in another order too."""
    x = batch(9)
    whole, of_step = totals(x), LOSSES[name](**x, totals=totals(x), **hyper)
    grads = LOSSES[name].coefficients(**x, totals=whole, **hyper)
    parts, part_grads = [], torch.zeros_like(grads)
    for responses in ([4, 1, 6], [0, 5, 3, 2]):
        rows = torch.cat([torch.arange(int(x["offsets"][s]), int(x["offsets"][s + 1])) for s in responses])
        part = {k: v[rows] if v.shape == x["logp"].shape else v for k, v in x.items()}
        part |= {"advantage": x["advantage"][responses]}
        part |= {"offsets": torch.tensor([0, *itertools.accumulate(LENGTHS[s] for s in responses)])}
        parts.append(LOSSES[name](**part, totals=whole, **hyper))
        part_grads[rows] = LOSSES[name].coefficients(**part, totals=whole, **hyper)
    same(sum(parts), of_step)
    assert torch.equal(part_grads, grads), "to the bit: no number depends on the batch it is in"


@pytest.mark.parametrize("name, hyper", cases())
def test_float32_and_extremes(name, hyper):
    """Log-ratios of hundreds of nats stay finite, and the closed form is autograd's."""
    for shift in (-300.0, 300.0):
        x = batch(10, torch.float32)
        x["old_logp"] = x["old_logp"] + shift
        x["ref_logp"] = x["ref_logp"] - shift / 2
        value, grad = value_and_gradient(lambda **x: LOSSES[name](**x, totals=totals(x), **hyper), x)
        assert value.dtype == torch.float32 and value.isfinite() and grad.isfinite().all()
        closed = LOSSES[name].coefficients(**x, totals=totals(x), **hyper)
        torch.testing.assert_close(closed, grad, rtol=1e-4, atol=1e-5 * float(1 + grad.abs().max()))


def test_vespo_takes_a_correction_of_whole_responses_once():
    x = batch(11, mask=None, policy_mask=None, correction=None)
    by = torch.tensor([0.5, 2.0, 1.1, 0.7, 3.0, 0.9, 1.0], dtype=torch.float64)
    of_tokens = torch.zeros_like(x["logp"])
    first = x["offsets"][:-1][torch.tensor(LENGTHS) > 0]
    of_tokens[first] = by.log()[torch.tensor(LENGTHS) > 0]  # all of a response's weight on its first token
    same(LOSSES["vespo"](**x, correction=by), LOSSES["vespo"](**x, correction=of_tokens.exp()))
    assert LOSSES["vespo"](**x, correction=by) != LOSSES["vespo"](**x)


def test_off_policy_masking():
    x = batch(12, **GIVEN["plain"])
    apart = x["old_logp"] - x["logp"]
    means = torch.stack([apart[a:b].mean() for a, b in itertools.pairwise(x["offsets"].tolist())]).nan_to_num()
    negative = [s for s in range(7) if ADVANTAGE[s] < 0]
    worst = max(negative, key=lambda s: means[s])
    threshold = float(means[negative].sort().values[-2:].mean())  # between the two that are furthest off
    kept = LOSSES["reinforce"].coefficients(**x, off_policy_mask_threshold=threshold)
    plain = LOSSES["reinforce"].coefficients(**x)
    rows = slice(int(x["offsets"][worst]), int(x["offsets"][worst + 1]))
    assert plain[rows].any() and not kept[rows].any()
    others = torch.ones(len(plain), dtype=torch.bool)
    others[rows] = False
    assert torch.equal(kept[others], plain[others])
    x["sampler_logp"] = torch.full_like(x["logp"], math.nan)  # the sampler says nothing: no evidence
    assert torch.equal(LOSSES["reinforce"].coefficients(**x, off_policy_mask_threshold=0.0), plain)


# --------------------------------------------------------------------------------------------- mistakes, terms, docs


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LOSSES["grpo"](**batch(), beta=-1.0), "grpo: beta must be zero or more, not -1.0"),
        (lambda: LOSSES["grpo"](**batch(ref_logp=None), beta=0.1), "grpo needs ref_logp$"),
        (lambda: LOSSES["nash_md"](**batch(ref_logp=None)), "nash_md needs ref_logp$"),
        (lambda: LOSSES["grpo"](**batch(), epsilon_hi=1.0), "grpo has no 'epsilon_hi'; did you mean 'epsilon_high'"),
        (lambda: LOSSES["grpo"](**batch(), old_logps=1.0), "grpo has no 'old_logps'; did you mean 'old_logp'"),
        (lambda: LOSSES["gmpo"](**batch(), delta=2.0), "gmpo has no 'delta'"),
        (lambda: LOSSES["grpo"](**batch(), importance_sampling_level="response"), "must be token or sequence, not 'r"),
        (lambda: LOSSES["grpo"](**batch(), kl_estimator="k4"), "kl_estimator must be one of k1, k2, k3, not 'k4'"),
        (lambda: LOSSES["grpo"](**batch(), reduction="mean"), "reduction must be one of seq_mean, token_mean"),
        (lambda: LOSSES["grpo"](**batch(), delta=0.0), "grpo: delta must be positive"),
        (lambda: LOSSES["cispo"](**batch(), epsilon_high=0.0), "cispo: epsilon_high must be positive"),
        (lambda: LOSSES["sapo"](**batch(), sapo_temperature_pos=0), "sapo_temperature_pos must be positive"),
        (lambda: LOSSES["dr_grpo"](**batch()), "dr_grpo divides by responses times max_completion_length: give totals"),
        (lambda: LOSSES["grpo"](**batch(mask=torch.ones(3))), r"grpo: mask \[3\] must have the shape \[34\]"),
        (lambda: LOSSES["grpo"](**batch(advantage=(1.0,))), r"grpo: advantage \[1\] must have the shape \[7\]"),
        (lambda: LOSSES["grpo"](**batch(offsets=torch.arange(8))), "grpo: offsets must run from 0 to the 34 tokens"),
        (lambda: resolve_terms(["grpo", "dpo"]), "grpo is a loss per token .* dpo cannot be added to: give"),
        (lambda: resolve_terms(["sft", "rloo"]), "rloo is a loss per token of .* sft cannot be added to"),
        (lambda: resolve_terms(["grpo", "dapo"]), "grpo is a loss per token of .* dapo cannot be added to"),
        (lambda: resolve_terms(["grpo"], label_smoothing=0.1), "label_smoothing is set, but grpo does not read it"),
        (lambda: resolve_terms(["grpo"], loss_kwargs={"epsilon_hig": 1}), "did you mean 'epsilon_high'"),
        (lambda: canonical_name("dr_grop"), "unknown loss_type 'dr_grop'; did you mean 'dr_grpo'"),
        (lambda: canonical_name("GSPO"), "did you mean 'gspo'"),
    ],
)  # fmt: skip
def test_mistakes(make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_terms(name):
    assert canonical_name(name) == name
    (term,) = resolve_terms([name], beta=0.04)
    assert term.of_tokens and not term.of_pairs and term.beta == 0.04 and term.reads_reference
    assert isinstance(term.loss, TokenLoss) and not term.reads_prompt
    (term,) = resolve_terms([name], loss_kwargs={"beta": 0.0})
    assert not term.reads_reference
    dpo, sft = resolve_terms(["dpo", "sft"])
    assert dpo.reads_reference and not dpo.of_tokens and not sft.reads_reference


@pytest.mark.parametrize("name", NAMES)
def test_metrics_add_up(name):
    """Over two micro-batches as over one."""
    x = batch(13)
    whole = token_metrics(LOSSES[name], Tokens(**x), beta=0.1)
    parts = []
    for responses in ([4, 1, 6], [0, 5, 3, 2]):
        rows = torch.cat([torch.arange(int(x["offsets"][s]), int(x["offsets"][s + 1])) for s in responses])
        part = {k: v[rows] if v.shape == x["logp"].shape else v for k, v in x.items()}
        part |= {"advantage": x["advantage"][responses]}
        part |= {"offsets": torch.tensor([0, *itertools.accumulate(LENGTHS[s] for s in responses)])}
        parts.append(token_metrics(LOSSES[name], Tokens(**part), beta=0.1))
    assert "kl" in whole.means
    for key, (total, count) in whole.means.items():
        same(sum(p.means[key][0] for p in parts), total)
        same(sum(p.means[key][1] for p in parts), count)
    assert whole.lowest == {k: min(p.lowest[k] for p in parts) for k in whole.lowest}
    assert whole.highest == {k: max(p.highest[k] for p in parts) for k in whole.highest}


@pytest.mark.parametrize("name", NAMES)
def test_documentation(name, capsys):
    loss = LOSSES[name]
    assert loss.paper in loss.fn.__doc__ and loss.gradient.__doc__ and docs.NOTES[name].use
    assert cli.main(["losses", name]) == 0
    text = capsys.readouterr().out
    assert loss.reduction in text and loss.paper in text
    assert cli.main(["losses"]) == 0
    assert f"\n{name} " in capsys.readouterr().out
